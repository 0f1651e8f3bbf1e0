"""The core of bounded sampling: it walks a plan over a `denoise` callable. Each way is a plan and a few choices.

Everything happens in `x0_hat` space: denoised estimates are made, two are combined or one is anchored, and one step
follows, which is affine in the estimate. So fusing two estimates once and stepping once is the same as stepping both
halves and fusing the results, which is how TRF's paper writes it.

Shapes: latents `x` are `[B, F, C, h, w]`, float32; `sigmas` is `[N + 1]`, falling, `sigmas[N] = 0`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from .edm import step_towards
from .fusion import fuse, linear_weights, renoise, reverse_time
from .schedule import WAYS, Iteration, Way


class Estimate(NamedTuple):
    """What the model makes of noisy latents in one direction, `[B, F, C, h, w]` in that direction's own frame order."""

    guided: Tensor
    """The denoised estimate, with guidance if there is any."""
    free: Tensor | None = None
    """The one without conditions; where it was asked for."""


class Bounds(NamedTuple):
    """Clean, scaled latents of the two bounds, each `[B, C, h, w]`."""

    start: Tensor
    end: Tensor


class Denoise(Protocol):
    """Denoised estimates at one noise level.

    Called with `x` in forward order, the index of the noise level in `sigmas`, the directions that are wanted, and the
    index of the level whose `c_in` scales the model's input (equal to `level` in every sound sampler).
    """

    def __call__(self, x: Tensor, level: int, ways: Sequence[Way], scaled_as: int) -> Mapping[Way, Estimate]:
        """Return the estimate of each direction."""
        ...


NoiseSource = Callable[[], Tensor]
"""Returns fresh unit noise of the latents' shape; called once per re-noising iteration, in the plan's order."""

Observer = Callable[[int, Iteration, Tensor], Tensor]
"""Called after every iteration with its number, the iteration and the latents; returns the latents to go on with."""


def sample(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    plan: Sequence[Iteration],
    noise: NoiseSource,
    *,
    weights: Tensor | None = None,
    bounds: Bounds | None = None,
    cfg_plus: bool = False,
    noise_scale: float = 1.0,
    stale_scaling: bool = False,
    hold: Callable[[Tensor], Tensor] = lambda film: film,
    observe: Observer = lambda number, iteration, x: x,
) -> Tensor:
    """Sample the film between two bounds.

    Args:
        denoise: the model, see `Denoise`.
        x: start latents at noise level `sigmas[0]`.
        sigmas: noise levels.
        plan: what is done at which level, see `schedule`.
        noise: source of the re-noising noise.
        weights: fusion weights of the forward path, broadcast against `x`; TRF's linear ones by default.
        bounds: where the plan has iterations that are anchored: all but the fused ones are.
        cfg_plus: step along the noise of the estimate without conditions (CFG++, arXiv 2406.08070).
        noise_scale: factor on the re-noising noise.
        stale_scaling: reproduce a defect of TRF's release: the first denoising step after a re-noising run scales the
            model's input for the level the run started from.
        hold: puts what is known of the film in its place in every fused estimate.
        observe: called after every iteration; may replace the latents.

    Returns:
        Latents at `sigmas[N] = 0`.
    """
    weights = linear_weights(x.shape[1], x.device) if weights is None else weights
    scaled_as: int | None = None
    for number, step in enumerate(plan):
        sigma, sigma_next = sigmas[step.start], sigmas[step.end]
        if step.kind == "renoise":
            x = renoise(x, sigma, sigma_next, noise(), noise_scale)
            if stale_scaling and scaled_as is None:
                scaled_as = step.start
        else:
            estimates = denoise(x, step.start, WAYS[step.kind], step.start if scaled_as is None else scaled_as)
            x0_hat = combined(step, estimates, weights, bounds)
            x0_hat = hold(x0_hat) if step.kind == "fused" else x0_hat
            x = step_towards(x, x0_hat, sigma, sigma_next, _free(step, estimates) if cfg_plus else None)
            scaled_as = None
        x = observe(number, step, x)
    if bounds is not None and plan[-1].kind != "fused":  # the last step has put only one of them in place
        x = anchored(x, start=bounds.start, end=bounds.end)
    return x


def combined(step: Iteration, estimates: Mapping[Way, Estimate], weights: Tensor, bounds: Bounds | None) -> Tensor:
    """The estimate of the film that an iteration steps towards, in forward order.

    `fused` mixes both directions; `forward` and `backward` are one of them with the far bound put in place (the
    projection of decomposed diffusion sampling, arXiv 2303.05754, which for a known frame is exact); `shifted` is the
    forward one moved, all frames alike, until its last frame is the end bound (MPD).
    """
    if step.kind == "fused":
        return fuse(estimates["forward"].guided, estimates["backward"].guided, weights)
    assert bounds is not None
    if step.kind == "backward":
        return anchored(reverse_time(estimates["backward"].guided), start=bounds.start)
    forward = estimates["forward"].guided
    if step.kind == "forward":
        return anchored(forward, end=bounds.end)
    return anchored(forward + (bounds.end - forward[:, -1]).unsqueeze(1), start=bounds.start)


def anchored(film: Tensor, *, start: Tensor | None = None, end: Tensor | None = None) -> Tensor:
    """The film `[B, F, C, h, w]` with the given first and last frames `[B, C, h, w]` in place of its own."""
    first = film[:, :1] if start is None else start.unsqueeze(1)
    last = film[:, -1:] if end is None else end.unsqueeze(1)
    return torch.cat([first, film[:, 1:-1], last], dim=1)


def _free(step: Iteration, estimates: Mapping[Way, Estimate]) -> Tensor:
    """The estimate without conditions that CFG++ steps along, in forward order; of both directions the forward one."""
    way = WAYS[step.kind][0]
    free = estimates[way].free
    assert free is not None
    return reverse_time(free) if way == "backward" else free
