"""The order in which TRF visits noise levels, as data: denoising steps and the re-noising runs between them.

TRF goes back in noise and denoises again ("time travel", after RePaint, arXiv 2201.09865) so that the two fused halves
can harmonise. A plan is made before sampling starts, so its cost is known and it can be tested without a model.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Iteration:
    """One iteration of a plan, which takes the latents from noise level `sigmas[start]` to `sigmas[end]`."""

    kind: Literal["denoise", "renoise"]
    start: int
    end: int


def trf_plan(
    num_steps: int, jump_length: int = 5, jump_n_sample: int = 2, repeat_step_ratio: float = 0.8
) -> list[Iteration]:
    """Plan of TRF: `num_steps` denoising steps with re-noising runs.

    Args:
        num_steps: number of denoising steps N; the noise levels are `sigmas[0] > ... > sigmas[N] = 0`.
        jump_length: how many levels a re-noising run goes back; also the distance between its anchors.
        jump_n_sample: how often the levels after an anchor are denoised; 1 switches re-noising off.
        repeat_step_ratio: the anchors lie where at least this fraction of the steps remains to be done.

    Raises:
        ValueError: for settings outside their range.
    """
    if num_steps < 1:
        raise ValueError(f"num_inference_steps={num_steps}: at least 1 denoising step is needed.")
    if jump_length < 1 or jump_n_sample < 1:
        raise ValueError(f"jump_length={jump_length}, jump_n_sample={jump_n_sample}: both must be at least 1.")
    if not 0 <= repeat_step_ratio <= 1:
        raise ValueError(f"repeat_step_ratio={repeat_step_ratio}: must lie between 0 and 1.")

    anchors = range(int(num_steps * repeat_step_ratio), num_steps - jump_length, jump_length)
    visits_left = {num_steps - remaining: jump_n_sample - 1 for remaining in anchors}
    plan: list[Iteration] = []
    level = 0
    while level < num_steps:
        plan.append(Iteration("denoise", level, level + 1))
        level += 1
        if visits_left.get(level, 0) > 0:
            visits_left[level] -= 1
            for _ in range(jump_length):
                plan.append(Iteration("renoise", level, level - 1))
                level -= 1
    return plan


def count(plan: list[Iteration], kind: Literal["denoise", "renoise"]) -> int:
    """How many iterations of one kind a plan holds."""
    return sum(iteration.kind == kind for iteration in plan)
