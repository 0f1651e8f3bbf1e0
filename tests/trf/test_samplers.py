"""The samplers on an analytic model: each against its paper's own form, written down independently; calls and anchors.

The core works in estimates of the clean film. The forms here are those of the papers and their public code: velocities and
Euler steps by a derivative (TRF, GI), noise residuals and their differences between frames (MPD), decomposed
diffusion sampling by conjugate gradients (ViBiD), one direction at a time and no shared step.
"""

import itertools
from functools import partial

import pytest
import torch

from trfpp.trf.denoiser import BoundedDenoiser, Condition, Guidance
from trfpp.trf.fusion import even_weights, linear_weights
from trfpp.trf.samplers import Bounds, Estimate, anchored, sample
from trfpp.trf.schedule import mpd_par_plan, trf_plan, unet_calls, vibid_plan
from trfpp.trf.settings import OWN_DEFAULTS, SamplerSettings, resolve
from trfpp.trf.strategies import STRATEGIES

FRAMES, CHANNELS, SIDE = 5, 3, 2


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def film(seed):
    return draw(2, FRAMES, CHANNELS, SIDE, SIDE, seed=seed)


BOUNDS = Bounds(start=draw(2, CHANNELS, SIDE, SIDE, seed=100), end=draw(2, CHANNELS, SIDE, SIDE, seed=101))


def levels(steps):
    return torch.cat([torch.logspace(1.5, -1, steps, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])


def velocity(x, sigma, bound):
    """A model's output on a film in its own order: neither linear nor symmetric in time; `bound` is its condition."""
    told = torch.zeros_like(x[:, 0]) if bound is None else bound
    scaled = x / (sigma**2 + 1).sqrt()
    before = torch.cat([told.unsqueeze(1), scaled[:, :-1]], dim=1)
    return torch.sin(scaled + 0.7 * before) * (1 + 0.1 * sigma.log()) - 0.3 * told.unsqueeze(1)


def clean(x, sigma, bound):
    return x / (sigma**2 + 1) - velocity(x, sigma, bound) * sigma / (sigma**2 + 1).sqrt()


class Analytic:
    """`velocity` as a `Denoise`, guided by a constant scale; it counts its calls."""

    def __init__(self, sigmas, guidance=1.0):
        self.sigmas, self.guidance, self.calls = sigmas, guidance, 0

    def __call__(self, x, level, ways, scaled_as):
        assert scaled_as == level
        self.calls += len(ways)
        sigma, estimates = self.sigmas[level], {}
        for way in ways:
            own, bound = (x, BOUNDS.start) if way == "forward" else (x.flip(1), BOUNDS.end)
            conditional, free = clean(own, sigma, bound), clean(own, sigma, None)
            estimates[way] = Estimate(free + self.guidance * (conditional - free), free)
        return estimates


class Noise:
    """The same stream of noise for two samplers."""

    def __init__(self):
        self.numbers = itertools.count(1000)

    def __call__(self):
        return film(next(self.numbers))


def ours(name, steps, guidance=1.0):
    sigmas = levels(steps)
    strategy = STRATEGIES[name]
    plan = strategy.plan(SamplerSettings(num_inference_steps=steps))
    model = Analytic(sigmas, guidance)
    weights = strategy.weights(FRAMES, None).double()
    bounds = BOUNDS if strategy.cfg_plus else None
    more = {"hold": partial(anchored, **BOUNDS._asdict())} if strategy.anchored else {}
    end = sample(
        model, film(0) * sigmas[0], sigmas, plan, Noise(), weights=weights, bounds=bounds, cfg_plus=strategy.cfg_plus,
        **more,
    )  # fmt: skip
    assert model.calls == unet_calls(plan)
    return end


# The papers' forms ---------------------------------------------------------------------------------------------------


def guided_velocity(x, sigma, bound, scale):
    free = velocity(x, sigma, None)
    return free + scale * (velocity(x, sigma, bound) - free)


def mixed_step(x, sigma, sigma_next, scale, weights):
    """The velocities of both directions mixed, and an Euler step by the derivative."""
    forward = guided_velocity(x, sigma, BOUNDS.start, scale)
    backward = guided_velocity(x.flip(1), sigma, BOUNDS.end, scale).flip(1)
    v = weights * forward + (1 - weights) * backward
    derivative = (x - (x / (sigma**2 + 1) - v * sigma / (sigma**2 + 1).sqrt())) / sigma
    return x + derivative * (sigma_next - sigma)


def generative_inbetweening(steps, scale):
    sigmas, noise = levels(steps), Noise()
    x = film(0) * sigmas[0]
    for i in range(steps):
        x = mixed_step(x, sigmas[i], sigmas[i + 1], scale, 0.5)
        if i < steps // 2:
            for _ in range(5):
                x = x + noise() * (sigmas[i] ** 2 - sigmas[i + 1] ** 2).sqrt()
                x = mixed_step(x, sigmas[i], sigmas[i + 1], scale, 0.5)
    return x


def time_reversal_fusion(steps, scale):
    """Each half stepped by itself, the results fused; back five levels, one at a time, at each anchor."""
    sigmas, noise, weights = levels(steps), Noise(), linear_weights(FRAMES).double()
    x = film(0) * sigmas[0]

    def step(x, i):
        halves = []
        for own, bound in ((x, BOUNDS.start), (x.flip(1), BOUNDS.end)):
            v = guided_velocity(own, sigmas[i], bound, scale)
            estimate = own / (sigmas[i] ** 2 + 1) - v * sigmas[i] / (sigmas[i] ** 2 + 1).sqrt()
            halves.append(own + (own - estimate) / sigmas[i] * (sigmas[i + 1] - sigmas[i]))
        return weights * halves[0] + (1 - weights) * halves[1].flip(1)

    anchors, i = {steps - left for left in range(int(steps * 0.8), steps - 5, 5)}, 0
    while i < steps:
        x, i = step(x, i), i + 1
        if i in anchors:
            anchors.remove(i)
            for _ in range(5):
                x = x + (sigmas[i - 1] ** 2 - sigmas[i] ** 2).sqrt() * noise()
                i -= 1
    return x


def conjugate_gradients(estimate, index, measured, rounds=5):
    """min ||A x - y|| from the estimate, where A takes one frame out; A is a projection, so A^T A is A."""
    mask = torch.zeros_like(estimate)
    mask[:, index] = 1
    target = torch.zeros_like(estimate)
    target[:, index] = measured
    x, residual = estimate, target - mask * estimate
    direction, power = residual, residual.square().sum()
    for _ in range(rounds):
        if power.sqrt() < 1e-9:
            break
        size = power / (direction * (mask * direction)).sum()
        x, residual = x + size * direction, residual - size * (mask * direction)
        direction, power = residual + residual.square().sum() / power * direction, residual.square().sum()
    return x


def noise_of(x, v, sigma):
    """The noise that a velocity says is in a film."""
    return x * sigma / (sigma**2 + 1) + v / (sigma**2 + 1).sqrt()


def noises(x, sigma, bound, scale):
    """CFG++ (algorithm 2): the noise without conditions, and that towards the condition or past it."""
    free, conditional = (noise_of(x, velocity(x, sigma, told), sigma) for told in (None, bound))
    return free, free + scale * (conditional - free)


def one_way(x, sigma, sigma_next, free, guided, far):
    """CFG++ on a film in its own order, the far bound measured: noise is taken off guided and put back unguided."""
    return conjugate_gradients(x - sigma * guided, -1, far) + sigma_next * free


def to_and_fro(x, sigma, sigma_next, noise, scale):
    x = one_way(x, sigma, sigma_next, *noises(x, sigma, BOUNDS.start, scale), BOUNDS.end)
    x = (x + noise() * (sigma**2 - sigma_next**2).sqrt()).flip(1)
    return one_way(x, sigma, sigma_next, *noises(x, sigma, BOUNDS.end, scale), BOUNDS.start).flip(1)


def aligned(x, sigma, sigma_next, noise, scale):
    """MPD: the backward residual noise begins at the end bound and changes over the frames as the forward one does."""
    own, (free, residual) = x.flip(1), noises(x, sigma, BOUNDS.start, scale)
    first = (own[:, :1] - BOUNDS.end.unsqueeze(1)) / sigma
    changes = -(residual[:, 1:] - residual[:, :-1]).flip(1)
    distilled = torch.cat([first, first + changes.cumsum(1)], dim=1)
    own = one_way(own, sigma, sigma_next, free.flip(1), distilled, BOUNDS.start)
    return own.flip(1) + noise() * (sigma**2 - sigma_next**2).sqrt()


def vibid(steps, scale, early=0.0, rounds=0):
    sigmas, noise = levels(steps), Noise()
    x = film(0) * sigmas[0]
    for i in range(steps):
        for _ in range(rounds if i < early * steps else 0):
            x = aligned(x, sigmas[i], sigmas[i + 1], noise, scale)
        x = to_and_fro(x, sigmas[i], sigmas[i + 1], noise, scale)
    x[:, -1] = BOUNDS.end  # theirs leaves the frame at the end as it was estimated from that very frame
    return x


def mpd_parallel(steps, scale):
    sigmas, noise, weights = levels(steps), Noise(), linear_weights(FRAMES).double()
    x = film(0) * sigmas[0]
    for i in range(steps):
        sigma, lower = sigmas[i], sigmas[i + 1]
        if i < 0.1 * steps:
            x = to_and_fro(aligned(x, sigma, lower, noise, scale), sigma, lower, noise, scale)
            continue
        for again in (True, True, True, False):
            free, forward = noises(x, sigma, BOUNDS.start, scale)
            backward = noises(x.flip(1), sigma, BOUNDS.end, scale)[1].flip(1)
            x = x - sigma * (weights * forward + (1 - weights) * backward) + lower * free
            if again:
                x = x + noise() * (sigma**2 - lower**2).sqrt()
    return x


@pytest.mark.parametrize(
    ("name", "steps", "guidance", "theirs"),
    [
        ("trf", 30, 1.8, time_reversal_fusion),
        ("gi", 8, 2.0, generative_inbetweening),
        *(
            (name, 10, scale, theirs)
            for name, theirs in (
                ("vibid", vibid),
                ("mpd-seq", partial(vibid, early=0.2, rounds=3)),
                ("mpd-par", mpd_parallel),
            )
            for scale in (1.0, 1.7, 0.6)
        ),
    ],
)
def test_each_is_what_its_paper_says(name, steps, guidance, theirs):
    assert torch.allclose(ours(name, steps, guidance), theirs(steps, guidance), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("scale", [1.7, 0.6])
def test_a_unet_steps_along_what_it_says_without_conditions(pipe, scale):
    """Two levels of ViBiD's, of which one is guided, against a UNet that sees a row at a time."""
    told = {"sampler": "vibid", "num_frames": 4, "max_guidance_scale": scale, "min_guidance_sigma": 2.0}
    guidance = Guidance.of(resolve(told, {}, {})[0], 4, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    conditions = {
        way: Condition(embedding=draw(1, 1, 32), latents=draw(1, 1, 4, 4, 6)) for way in ("forward", "backward")
    }
    bounds, drawn = Bounds(start=draw(1, 4, 4, 6), end=draw(1, 4, 4, 6)), [draw(1, 4, 4, 4, 6) for _ in range(2)]
    sigmas, x, ids = torch.tensor([7.0, 1.0, 0.0]), draw(1, 4, 4, 4, 6) * 7, torch.tensor([[6.0, 127.0, 0.02]])

    def seen(x, sigma, way):
        noise = []
        for share in (0, 1):
            latents = share * conditions[way].latents.expand_as(x)
            inputs = torch.cat([x / (sigma**2 + 1).sqrt(), latents], dim=2)
            v = pipe.unet(inputs, 0.25 * sigma.log(), share * conditions[way].embedding, added_time_ids=ids).sample
            noise.append(noise_of(x, v, sigma))
        free, conditional = noise
        return free, free + (scale if sigma > 2 else 1) * (conditional - free)

    denoise = BoundedDenoiser(
        unet=pipe.unet, conditions=conditions, ids=ids, sigmas=sigmas, timesteps=0.25 * sigmas[:2].log(),
        guidance=guidance, free=True,
    )  # fmt: skip
    noise, again = iter(drawn), iter(drawn)
    with torch.no_grad():
        made = sample(denoise, x, sigmas, vibid_plan(2), lambda: next(noise), bounds=bounds, cfg_plus=True)
        for sigma, lower in itertools.pairwise(sigmas):
            x = one_way(x, sigma, lower, *seen(x, sigma, "forward"), bounds.end)
            x = (x + next(again) * (sigma**2 - lower**2).sqrt()).flip(1)
            x = one_way(x, sigma, lower, *seen(x, sigma, "backward"), bounds.start).flip(1)
    assert torch.allclose(made[:, :-1], x[:, :-1], atol=1e-4)
    assert torch.equal(made[:, -1], bounds.end)


def test_no_two_of_them_are_the_same():
    ends = [ours(name, 10) for name in STRATEGIES if name != "trf-reference"]
    assert all((one - other).norm() > 0.01 * other.norm() for one, other in itertools.combinations(ends, 2))


@pytest.mark.parametrize(
    ("name", "calls"),
    [
        ("trf", 110),
        ("trf++", 24),
        ("trf-reference", 110),
        ("gi", 350),
        ("vibid", 50),
        ("mpd-seq", 65),
        ("mpd-par", 185),
    ],
)
def test_as_published_they_cost_what_their_papers_say(name, calls):
    settings = SamplerSettings(sampler=name, **OWN_DEFAULTS.get(name, {}))
    assert unet_calls(STRATEGIES[name].plan(settings)) == calls


@pytest.mark.parametrize("name", ["vibid", "mpd-seq", "trf++"])
def test_both_bounds_are_in_place_at_the_end(name):
    end = ours(name, 4)
    assert torch.equal(end[:, 0], BOUNDS.start)
    assert torch.equal(end[:, -1], BOUNDS.end)


def test_anchoring_leaves_the_rest_alone():
    one = film(3)
    both = anchored(one, start=BOUNDS.start, end=BOUNDS.end)
    assert torch.equal(both[:, 1:-1], one[:, 1:-1])
    assert torch.equal(anchored(one), one)


def test_sampler_solves_the_ode_of_a_gaussian():
    """For data N(m, s^2) the ideal denoiser is known, and so is the end: (x - m) shrunk from the start's spread to s."""
    mean, spread = 1.5, 0.4
    sigmas = torch.cat([torch.logspace(2, -4, 800), torch.zeros(1)]).double()
    visited = []

    def denoise(x, level, ways, scaled_as):
        visited.append(level)
        sigma = sigmas[level]
        estimate = mean + spread**2 / (spread**2 + sigma**2) * (x - mean)
        return {"forward": Estimate(estimate), "backward": Estimate(estimate.flip(1))}

    start = mean + film(0) * (spread**2 + sigmas[0] ** 2).sqrt()
    end = sample(
        denoise, start, sigmas, trf_plan(800, jump_n_sample=1), lambda: 1 / 0, weights=even_weights(FRAMES).double()
    )
    assert visited == list(range(800))
    assert torch.allclose(end, mean + film(0) * spread, atol=0.01)


def test_only_the_reference_scales_with_a_stale_index():
    sigmas = torch.linspace(5, 0, 7).double()
    plan = trf_plan(6, jump_length=2, jump_n_sample=2, repeat_step_ratio=0.5)
    for stale, expected in ((False, []), (True, [(1, 3)])):
        odd = []

        def denoise(x, level, ways, scaled_as, odd=odd):
            if level != scaled_as:
                odd.append((level, scaled_as))
            return {"forward": Estimate(x), "backward": Estimate(x)}

        sample(denoise, film(0), sigmas, plan, lambda: film(1), stale_scaling=stale)
        assert odd == expected


@pytest.mark.parametrize("plan", [vibid_plan(3), mpd_par_plan(3)])
def test_latents_are_observed_after_every_iteration_and_may_be_replaced(plan):
    seen = []

    def observe(number, iteration, x):
        seen.append((number, iteration))
        return x * 0

    sigmas = levels(3)
    end = sample(Analytic(sigmas), film(0), sigmas, plan, Noise(), bounds=BOUNDS, cfg_plus=True, observe=observe)
    assert seen == list(enumerate(plan))
    assert not end[:, 1:-1].any()
