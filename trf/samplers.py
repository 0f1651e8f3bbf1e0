"""Bounded-generation samplers: one function a strategy, over a `denoise` callable.

Everything happens in `x0_hat` space. An Euler step is affine in `x0_hat`, so fusing the two denoised estimates once and
stepping once is the same as stepping both halves and fusing the results, which is how the paper writes it.

Shapes: latents `x` are `[B, F, C, h, w]`, float32; `sigmas` is `[N + 1]`, falling, `sigmas[N] = 0`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from torch import Tensor

from .edm import euler_step
from .fusion import fuse, renoise
from .schedule import Iteration


class Denoise(Protocol):
    """Denoised estimates of both directions at one noise level.

    Called with `x` in forward order, the index of the noise level in `sigmas`, and the index of the level whose `c_in`
    scales the model's input (equal to `level` in every sound sampler). Returns `(forward, backward)`, each
    `[B, F, C, h, w]` and each in its *own* frame order: the backward one runs from the end bound to the start.
    """

    def __call__(self, x: Tensor, level: int, scaled_as: int) -> tuple[Tensor, Tensor]:
        """Return the forward and the backward estimate."""
        ...


NoiseSource = Callable[[], Tensor]
"""Returns fresh unit noise of the latents' shape; called once per re-noising iteration, in the plan's order."""

Observer = Callable[[int, Iteration, Tensor], Tensor]
"""Called after every iteration with its number, the iteration and the latents; returns the latents to go on with."""


def sample_trf(
    denoise: Denoise,
    x: Tensor,
    sigmas: Tensor,
    plan: Sequence[Iteration],
    weights: Tensor,
    noise: NoiseSource,
    *,
    noise_scale: float = 1.0,
    stale_scaling: bool = False,
    observe: Observer = lambda number, iteration, x: x,
) -> Tensor:
    """Time-Reversal Fusion (arXiv 2403.14611, algorithm 1).

    Args:
        denoise: the model, see `Denoise`.
        x: start latents at noise level `sigmas[0]`.
        sigmas: noise levels.
        plan: order of the iterations, see `trf_plan`.
        weights: fusion weights of the forward path, broadcast against `x`.
        noise: source of the re-noising noise.
        noise_scale: factor on the re-noising noise.
        stale_scaling: reproduce the release's defect: the first denoising step after a re-noising run scales the
            model's input for the level the run started from.
        observe: called after every iteration; may replace the latents.

    Returns:
        Latents at `sigmas[N] = 0`.
    """
    scaled_as: int | None = None
    for number, step in enumerate(plan):
        if step.kind == "denoise":
            forward, backward = denoise(x, step.start, step.start if scaled_as is None else scaled_as)
            x = euler_step(x, fuse(forward, backward, weights), sigmas[step.start], sigmas[step.end])
            scaled_as = None
        else:
            x = renoise(x, sigmas[step.start], sigmas[step.end], noise(), noise_scale)
            if stale_scaling and scaled_as is None:
                scaled_as = step.start
        x = observe(number, step, x)
    return x
