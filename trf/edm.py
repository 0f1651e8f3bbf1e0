"""EDM preconditioning, noise levels and loss weight of SVD, as pure tensor functions.

Notation of Karras et al. (arXiv 2206.00364) at sigma_data = 1: a noisy video is `x = x0 + sigma * eps`; the UNet sees
`c_in * x` and `c_noise` and its output `v` gives the denoised estimate `x0_hat = c_skip * x + c_out * v`.
SVD (arXiv 2311.15127, appendix D) fine-tunes with this parametrisation.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Preconditioning(NamedTuple):
    """The four factors of EDM's preconditioning; each has the shape of the sigma they were made from."""

    c_skip: Tensor
    c_out: Tensor
    c_in: Tensor
    c_noise: Tensor


def preconditioning(sigma: Tensor) -> Preconditioning:
    """Factors for noise level `sigma` (any shape, > 0): the v-prediction column of Karras et al., table 1."""
    root = (sigma**2 + 1).sqrt()
    return Preconditioning(
        c_skip=1 / (sigma**2 + 1),
        c_out=-sigma / root,
        c_in=1 / root,
        c_noise=0.25 * sigma.log(),
    )


def denoised(x: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """Denoised estimate `x0_hat` from a noisy `x` and the UNet's output `v`; `sigma` broadcasts against both."""
    factors = preconditioning(sigma)
    return factors.c_skip * x + factors.c_out * v


def loss_weight(sigma: Tensor) -> Tensor:
    """Weight of the squared error of `x0_hat`: `(1 + sigma^2) / sigma^2`, which makes it the plain error of `v`."""
    return (1 + sigma**2) / sigma**2


def log_normal_sigmas(shape: tuple[int, ...], mean: float, std: float, generator: torch.Generator) -> Tensor:
    """Noise levels with `ln sigma ~ N(mean, std^2)`, float32 on the generator's device.

    SVD trains with (0.7, 1.6) for the video's noise and (-3, 0.5) for the conditioning augmentation.
    """
    return (torch.randn(shape, generator=generator, device=generator.device) * std + mean).exp()


def step_towards(x: Tensor, x0_hat: Tensor, sigma: Tensor, sigma_next: Tensor, x0_free: Tensor | None = None) -> Tensor:
    """One step from `sigma` to `sigma_next`: an estimate of the clean video plus less of the noise.

    By default the noise is what the estimate leaves of `x`, which is an Euler step of the probability-flow ODE (Karras
    et al., algorithm 1). With `x0_free`, the estimate without conditions, it is what that leaves: CFG++
    (arXiv 2406.08070).
    """
    noise = (x - (x0_hat if x0_free is None else x0_free)) / sigma
    return x0_hat + sigma_next * noise
