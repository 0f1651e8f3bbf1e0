"""The order in which a sampler visits noise levels, as data: what it estimates where, and when it goes back in noise.

A plan is made before sampling starts, so its cost is known and it can be tested without a model. One UNet call is one
direction at one noise level, with its guidance: that is what papers count, whatever is batched together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

Way = Literal["forward", "backward"]
"""Which way a film runs where the model sees it: from the start bound, or from the end bound to the start."""
Kind = Literal["fused", "forward", "backward", "shifted", "renoise"]

WAYS: Mapping[Kind, tuple[Way, ...]] = {
    "fused": ("forward", "backward"),
    "forward": ("forward",),
    "backward": ("backward",),
    "shifted": ("forward",),
    "renoise": (),
}
"""The directions that the model is asked for in an iteration of each kind; `samplers` says what is made of them."""


@dataclass(frozen=True)
class Iteration:
    """One iteration of a plan, which takes the latents from noise level `sigmas[start]` to `sigmas[end]`."""

    kind: Kind
    start: int
    end: int


def count(plan: Iterable[Iteration], kind: Kind) -> int:
    """How many iterations of one kind a plan holds."""
    return sum(iteration.kind == kind for iteration in plan)


def unet_calls(plan: Iterable[Iteration]) -> int:
    """What a plan costs, in UNet calls."""
    return sum(len(WAYS[iteration.kind]) for iteration in plan)


def factor_at(points: Sequence[tuple[float, float]], sigma: float) -> float:
    """The factor of points (sigma, factor) at a noise level: linear in ln sigma between them, constant beyond.

    Without points it is 1. The points' sigmas rise.
    """
    if not points:
        return 1.0
    for (low, before), (high, after) in pairwise(points):
        if low <= sigma <= high:
            share = math.log(sigma / low) / math.log(high / low)
            return before + share * (after - before)
    return points[0][1] if sigma < points[0][0] else points[-1][1]


def trf_plan(
    num_steps: int, jump_length: int = 5, jump_n_sample: int = 2, repeat_step_ratio: float = 0.8
) -> list[Iteration]:
    """Plan of TRF (arXiv 2403.14611): fused steps with re-noising runs between them.

    TRF goes back in noise and denoises again ("time travel", after RePaint, arXiv 2201.09865) so that the two fused
    halves can harmonise.

    Args:
        num_steps: number of denoising steps N; the noise levels are `sigmas[0] > ... > sigmas[N] = 0`.
        jump_length: how many levels a re-noising run goes back; also the distance between its anchors.
        jump_n_sample: how often the levels after an anchor are denoised; 1 switches re-noising off.
        repeat_step_ratio: the anchors lie where at least this fraction of the steps remains to be done.

    Raises:
        ValueError: for settings outside their range.
    """
    _check_steps(num_steps)
    if jump_length < 1 or jump_n_sample < 1:
        raise ValueError(f"jump_length={jump_length}, jump_n_sample={jump_n_sample}: both must be at least 1.")
    if not 0 <= repeat_step_ratio <= 1:
        raise ValueError(f"repeat_step_ratio={repeat_step_ratio}: must lie between 0 and 1.")

    anchors = range(int(num_steps * repeat_step_ratio), num_steps - jump_length, jump_length)
    visits_left = {num_steps - remaining: jump_n_sample - 1 for remaining in anchors}
    plan: list[Iteration] = []
    level = 0
    while level < num_steps:
        plan.append(Iteration("fused", level, level + 1))
        level += 1
        if visits_left.get(level, 0) > 0:
            visits_left[level] -= 1
            for _ in range(jump_length):
                plan.append(Iteration("renoise", level, level - 1))
                level -= 1
    return plan


def fused_plan(num_steps: int) -> list[Iteration]:
    """Plan of `trf++`: fused steps, and no way back in noise.

    Raises:
        ValueError: without a step.
    """
    return _level_by_level(num_steps, lambda level: [Iteration("fused", level, level + 1)])


def gi_plan(num_steps: int, ratio: float = 0.5, rounds: int = 5) -> list[Iteration]:
    """Plan of Generative Inbetweening (arXiv 2408.15239): in the first part every step is done over and over.

    Args:
        num_steps: number of levels that are denoised.
        ratio: the part of them that is.
        rounds: how often a step is re-noised and done again.

    Raises:
        ValueError: without a step.
    """
    first = int(num_steps * ratio)
    return _level_by_level(num_steps, lambda level: _again("fused", level, rounds if level < first else 0))


def vibid_plan(num_steps: int) -> list[Iteration]:
    """Plan of ViBiDSampler (arXiv 2410.05651): at every level forward, re-noised, and backward.

    Raises:
        ValueError: without a step.
    """
    return _level_by_level(num_steps, _to_and_fro)


def mpd_seq_plan(num_steps: int, ratio: float = 0.2, rounds: int = 3) -> list[Iteration]:
    """Plan of MPD's sequential sampler (ICLR 2026): ViBiDSampler's, aligned at the first levels.

    Args:
        num_steps: number of levels that are denoised.
        ratio: the part of them that are aligned, by shifting the forward estimate onto the end bound.
        rounds: how often each of those is.

    Raises:
        ValueError: without a step.
    """
    return _level_by_level(
        num_steps, lambda level: [*_aligned(level, rounds if level < ratio * num_steps else 0), *_to_and_fro(level)]
    )


def mpd_par_plan(num_steps: int, ratio: float = 0.1, rounds: int = 3) -> list[Iteration]:
    """Plan of MPD's parallel sampler (ICLR 2026): aligned and done to and fro at the first levels, then fused.

    Args:
        num_steps: number of levels that are denoised.
        ratio: the part of them that comes first.
        rounds: how often a fused step is done before its last time.

    Raises:
        ValueError: without a step.
    """
    return _level_by_level(
        num_steps,
        lambda level: (
            [*_aligned(level, 1), *_to_and_fro(level)] if level < ratio * num_steps else _again("fused", level, rounds)
        ),
    )


def _check_steps(num_steps: int) -> None:
    if num_steps < 1:
        raise ValueError(f"num_inference_steps={num_steps}: at least 1 denoising step is needed.")


def _level_by_level(num_steps: int, at: Callable[[int], Iterable[Iteration]]) -> list[Iteration]:
    """The iterations of all levels, one level after another."""
    _check_steps(num_steps)
    return [iteration for level in range(num_steps) for iteration in at(level)]


def _again(kind: Kind, level: int, rounds: int) -> Sequence[Iteration]:
    """A step, then so many times back to where it began and done again."""
    once, back = Iteration(kind, level, level + 1), Iteration("renoise", level + 1, level)
    return [once, *[back, once] * rounds]


def _aligned(level: int, rounds: int) -> Sequence[Iteration]:
    """A shifted step so many times, each re-noised: it ends where it began."""
    return [Iteration("shifted", level, level + 1), Iteration("renoise", level + 1, level)] * rounds


def _to_and_fro(level: int) -> Sequence[Iteration]:
    return [
        Iteration("forward", level, level + 1),
        Iteration("renoise", level + 1, level),
        Iteration("backward", level, level + 1),
    ]
