"""A long film's layout: windows cover it and their weights are shares, levels reach every keyframe, ramps interpolate;
two keyframes a window apart are TRF; films through keyframes hold them, and continue where a closed one begins."""

import random
from itertools import pairwise

import PIL.Image
import pytest
import torch

from trfpp.trf.denoiser import BoundedDenoiser, Condition, Guidance, WindowedDenoiser
from trfpp.trf.fusion import fuse, linear_weights, reverse_time
from trfpp.trf.through import course_of
from trfpp.trf.windows import held, levels_of, ramps_of, starts_of, windows_of

SMALL = {"height": 32, "width": 48, "num_frames": 6, "num_inference_steps": 2, "max_guidance_scale": 1.0}


def courses(number=60):
    """Courses of all kinds: keyframes near and far apart, open and closed, windows from 4 to 25 frames."""
    draw = random.Random(0)
    for _ in range(number):
        closed = draw.random() < 0.5
        gaps = [draw.randint(1, draw.choice([3, 12, 60])) for _ in range(draw.randint(1, 7))]
        times = [sum(gaps[:k]) for k in range(len(gaps) + (not closed))]
        frames = sum(gaps) + (not closed)
        if not (closed and frames < times[-1] + 2):
            yield course_of(len(times), times, frames, closed=closed), draw.choice([4, 5, 12, 14, 25])


@pytest.mark.parametrize(("course", "length"), courses())
def test_every_frame_is_seen_and_shares_sum_to_one(course, length):
    for level in course.levels(length):
        *both, (before, after) = windows_of(level.times, level.frames, length, closed=course.closed)
        total = before + level.frames + after
        shares = torch.zeros(total)
        for windows, step in zip(both, (1, -1)):
            assert windows.frames.shape[1] == (min(length, level.frames + 1) if course.closed else length)
            steps = (windows.frames[:, 1:] - windows.frames[:, :-1]) % total
            assert (steps == step % total).all()
            at = torch.tensor(level.times)[list(windows.keyframes)] + before
            assert torch.equal(windows.frames[:, 0], at)
            assert (windows.weights[:, 0] > 0.4999).all()  # shared with none but the keyframe's other window
            shares.index_add_(0, windows.frames.flatten(), windows.weights.flatten())
        assert torch.allclose(shares, torch.ones(total), atol=1e-5)


@pytest.mark.parametrize(("course", "length"), courses())
def test_levels_lead_from_few_frames_to_all_of_them(course, length):
    levels = course.levels(length)
    own = list(range(len(course.times)))
    for coarse, fine in zip([None, *levels], levels):
        assert len(fine.times) == (coarse.frames if coarse else len(course.times))
        ends = [*fine.times, fine.frames] if course.closed else fine.times
        gaps = [b - a for a, b in pairwise(ends)]
        assert min(gaps) >= 1
        assert max(gaps) <= (length - 1 if len(fine.times) == 2 and not course.closed else length // 2)
        starts = starts_of(fine.times, fine.frames, length, closed=course.closed)
        assert starts == sorted(set(starts))
        own = [fine.times[place] for place in own]
    assert (levels[-1].frames, levels[-1].stride) == (course.frames, 1.0)
    assert own == list(course.times)
    strides = [level.stride for level in levels]
    assert strides == sorted(strides, reverse=True)


def test_two_keyframes_a_window_apart_have_the_weights_of_trf():
    forward, backward, margin = windows_of([0, 11], 12, 12, closed=False)
    assert margin == (0, 0)
    assert torch.allclose(forward.weights[0], linear_weights(12).flatten(), atol=1e-6)
    assert torch.allclose(backward.weights[0], linear_weights(12).flatten(), atol=1e-6)


def test_the_weight_of_a_window_fades_beyond_the_next_keyframe():
    forward, _, (before, _) = windows_of([0, 4, 8, 12], 13, 12, closed=False)
    assert forward.keyframes == (0, 1, 2)
    assert 0 < forward.weights[0, -1] < 0.05 < forward.weights[0, 5]
    assert before > 0


def test_two_keyframes_are_estimated_as_a_pair(pipe):
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    conditions = {
        way: Condition(embedding=draw(1, 1, 32), latents=draw(1, 1, 4, 4, 6)) for way in ("forward", "backward")
    }
    sigmas, x = torch.tensor([7.0, 1.0, 0.0]), draw(1, 6, 4, 4, 6) * 7
    denoise = BoundedDenoiser(
        unet=pipe.unet, conditions=conditions, ids=torch.tensor([[6.0, 127.0, 0.02]]), sigmas=sigmas,
        timesteps=0.25 * sigmas[:2].log(), guidance=Guidance(scale=torch.linspace(1, 2, 6).view(1, -1, 1, 1, 1), sigmas=(0, 10)),
    )  # fmt: skip
    with torch.no_grad():
        both = denoise(x, 0, ("forward", "backward"), 0)
        expected = fuse(both["forward"].guided, both["backward"].guided, linear_weights(6))
        forward, backward, _ = windows_of([0, 5], 6, 6, closed=False)
        windowed = WindowedDenoiser(denoise=denoise, windows={"forward": forward, "backward": backward})
        ways = windowed(x, 0, ("forward", "backward"), 0)
        made = fuse(ways["forward"].guided, ways["backward"].guided, forward.share)
    assert torch.allclose(made, expected, atol=1e-5)
    assert not torch.allclose(made, reverse_time(expected), atol=1e-2)


@pytest.mark.parametrize("closed", [False, True])
def test_ramps_interpolate_and_hold_keyframes(closed):
    times, frames = [0, 3, 4, 9], 12 if closed else 10
    ramps = (
        ramps_of(times, frames, (2, 1), closed=closed) if not closed else ramps_of(times, frames, (0, 0), closed=True)
    )
    before = 0 if closed else 2
    assert torch.allclose(ramps.sum(0), torch.ones(ramps.shape[1]))
    at = torch.tensor(times) + before
    assert torch.equal(ramps[:, at], torch.eye(4))
    assert torch.allclose(ramps[:2, before + 1], torch.tensor([2 / 3, 1 / 3]))
    if closed:
        assert torch.allclose(ramps[[3, 0], 11], torch.tensor([1 / 3, 2 / 3]))
    else:
        assert torch.equal(ramps[:, 0], ramps[:, 2])
    film, latents = torch.randn(1, ramps.shape[1], 1, 1, 1), torch.randn(1, 4, 1, 1, 1)
    moved = held(film, at, latents, ramps)
    assert torch.allclose(moved[:, at], latents, atol=1e-6)
    assert torch.allclose(held(moved, at, latents, ramps), moved, atol=1e-6)


# Films ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def keyframes():
    generator = torch.Generator().manual_seed(3)
    arrays = (torch.rand(4, 32, 48, 3, generator=generator) * 255).to(torch.uint8).numpy()
    return [PIL.Image.fromarray(array) for array in arrays]


def film(pipe, keyframes, times, seed=0, **changes):
    settings = {**SMALL, "output_type": "latent", **changes}
    return pipe.through(keyframes, times, generator=torch.Generator().manual_seed(seed), **settings)


@pytest.mark.parametrize(
    ("times", "frames"),
    [((0, 2, 5), None), ((0, 1, 2, 12), None), ((0, 40), None), ((0, 3, 5), 8), ((0, 9), 30), ((0,), 5)],
)
def test_a_film_goes_through_its_keyframes(pipe, keyframes, times, frames):
    images = keyframes[: len(times)]
    made = film(pipe, images, times, film_frames=frames, closed=frames is not None)
    assert made.frames.shape == (1, frames or times[-1] + 1, 4, 16, 24)
    assert torch.isfinite(made.frames).all()
    known = torch.cat([pipe.encode_clean(image, made.settings, torch.device("cpu")) for image in images])
    assert torch.allclose(made.frames[0, list(times)], known, atol=1e-4)
    between = [i for i in range(made.frames.shape[1]) if i not in times]
    assert made.frames[0, between].std() > 0.1
    again = film(pipe, images, times, film_frames=frames, closed=frames is not None)
    assert torch.equal(made.frames, again.frames)


def test_unet_calls_are_counted_a_window(pipe, keyframes):
    seen = []

    class Bar:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def update(self, calls):
            seen.append(calls)

    made = film(pipe, keyframes[:3], (0, 3, 6))
    assert made.unet_calls == 2 * 2 * 2  # two windows either way, two steps
    pipe.progress_bar, own = lambda total: seen.append(-total) or Bar(), pipe.progress_bar
    try:
        made = film(pipe, keyframes[:2], (0, 30))
    finally:
        pipe.progress_bar = own
    assert -seen[0] == sum(seen[1:]) == made.unet_calls


def test_draws_come_from_the_generator_and_low_memory_changes_nothing(pipe, keyframes):
    one = film(pipe, keyframes[:3], (0, 3, 6))
    small = film(pipe, keyframes[:3], (0, 3, 6), low_memory=True)
    other = film(pipe, keyframes[:3], (0, 3, 6), seed=1)
    assert small.unet_forwards > one.unet_forwards
    assert torch.allclose(small.frames, one.frames, atol=1e-4)
    assert not torch.allclose(other.frames, one.frames, atol=1e-2)


def test_a_closed_film_is_decoded_across_its_seam(pipe):
    latents = torch.randn(1, 6, 4, 4, 6, generator=torch.Generator().manual_seed(0))
    changed = latents.clone()
    changed[:, -1] += 1
    with torch.no_grad():
        first, other = (pipe.decode_film(one, 2, closed=True)[:, 0] for one in (latents, changed))
        assert not torch.allclose(first, other)
        first, other = (pipe.decode_film(one, 2, closed=False)[:, 0] for one in (latents, changed))
        assert torch.equal(first, other)


def test_a_patch_acts_on_its_half_of_a_film(clean, keyframes, make_patch):
    base = film(clean, keyframes[:3], (0, 3, 6)).frames
    clean.load_patch(make_patch(direction="both", num_frames=6), "p")
    whole = film(clean, keyframes[:3], (0, 3, 6)).frames
    clean.set_patches({"p": (1.0, 0.0)})
    half = film(clean, keyframes[:3], (0, 3, 6)).frames
    clean.set_patches({"p": (0.0, 0.0)})
    assert torch.allclose(film(clean, keyframes[:3], (0, 3, 6)).frames, base, atol=1e-4)
    assert not torch.allclose(whole, base, atol=1e-2)
    assert not torch.allclose(half, base, atol=1e-2)
    assert not torch.allclose(half, whole, atol=1e-2)


@pytest.mark.parametrize(
    ("times", "changes", "said"),
    [
        ((0, 2), {}, "2 times for 3 keyframes"),
        ((0, 2, 2), {}, "must begin with 0 and rise"),
        ((1, 2, 3), {}, "must begin with 0 and rise"),
        ((0, 2, 4), {"film_frames": 9}, "ends at its last keyframe, at 4"),
        ((0, 2, 4), {"closed": True}, "say how many"),
        ((0, 2, 4), {"closed": True, "film_frames": 5}, "6 or more with a keyframe at 4"),
        ((0, 2, 4), {"sampler": "vibid"}, "made by trf, trf"),
        ((0, 2, 4), {"num_frames": 3}, "at least 4"),
        ((0, 2, 4), {"height": 33}, "multiples of"),
        ((0, 2, 4), {"output_type": "gif"}, "choose pil"),
        ((0, 2, 4), {"colour": 3}, "unknown sampler setting 'colour'"),
        ((0, 2, 4), {"fps": "auto"}, "fps='auto': give a number"),
        ((0, 2, 4), {"film_frames": 0}, "ends at its last keyframe"),
    ],
)
def test_what_cannot_work_is_said(pipe, keyframes, times, changes, said):
    with pytest.raises(ValueError, match=said):
        film(pipe, keyframes[:3], times, **changes)


def test_a_keyframe_is_one_image(pipe, keyframes):
    with pytest.raises(ValueError, match="holds several images"):
        film(pipe, [keyframes[:2], keyframes[2]], (0, 3))
    with pytest.raises(ValueError, match="two keyframes or more"):
        film(pipe, [], ())


def test_one_keyframe_needs_a_closed_film(pipe, keyframes):
    with pytest.raises(ValueError, match="two keyframes or more"):
        film(pipe, keyframes[:1], (0,))


def test_a_patch_of_rotated_attention_is_refused(clean, keyframes, make_patch):
    clean.load_patch(make_patch(direction="both", rotated_attention=True), "p")
    with pytest.raises(ValueError, match="rotated attention needs pairs"):
        film(clean, keyframes[:3], (0, 2, 4))


def test_levels_are_as_few_as_can_be():
    assert [level.frames for level in levels_of([0, 24], 25, 25, closed=False)] == [25]
    assert [level.frames for level in levels_of([0, 25], 26, 25, closed=False)] == [14, 26]
    assert len(levels_of([0, 240], 241, 25, closed=False)) == 2


@pytest.mark.parametrize(("keyframes", "times", "frames"), [(1, [0], 4), (1, [0], 12), (2, [0, 4], 9)])
def test_closed_films_shorter_than_a_window_are_guided(pipe, keyframes, times, frames):
    """Their windows, and those of coarse passes, have fewer frames than the model's own."""
    images = [PIL.Image.new("RGB", (48, 32), (80 * number, 120, 40)) for number in range(keyframes)]
    arguments = {**SMALL, "sampler": "trf", "num_frames": 8, "max_guidance_scale": 3.0, "output_type": "latent"}
    made = [
        pipe.through(
            images, times, film_frames=frames, closed=True, generator=torch.Generator().manual_seed(0),
            **{**arguments, **guidance},
        ).frames
        for guidance in ({}, {"max_guidance_scale": 1.0})
    ]  # fmt: skip
    assert made[0].shape[1] == frames
    assert not torch.equal(*made)
