"""One forward: batch -> prediction -> loss. SVD's denoising objective, as a pure function of model and batch.

Shapes: `[B, F, C, h, w]`; see `train.data.Sample`. Reference: arXiv 2311.15127, appendix D; arXiv 2206.00364.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..trf.edm import denoised, loss_weight, preconditioning
from .data import Sample

SIGMA_BANDS = (0.3, 1.0, 3.0, 10.0)
"""Borders of the noise-level bands in which the loss is reported; quartiles or so of SVD's training distribution."""


def predict(unet: Any, batch: Sample, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Denoised estimate and its target, both `[B, F, C, h, w]` float32.

    Args:
        unet: called as the (wrapped) UNet is, so that gradients synchronise.
        batch: on the UNet's device.
        dtype: of the UNet's inputs.
    """
    sigma = batch.sigma.view(-1, 1, 1, 1, 1)
    factors = preconditioning(sigma)
    noisy = batch.latents + sigma * batch.noise
    condition = batch.condition.unsqueeze(1).expand(-1, noisy.shape[1], -1, -1, -1)
    v = unet(
        torch.cat([factors.c_in * noisy, condition], dim=2).to(dtype),
        factors.c_noise.flatten(),
        encoder_hidden_states=batch.embedding.to(dtype),
        added_time_ids=batch.added_time_ids,
        return_dict=False,
    )[0]
    return denoised(noisy, v.float(), sigma), batch.latents


def denoising_loss(unet: Any, batch: Sample, dtype: torch.dtype = torch.float32) -> Tensor:
    """SVD's loss of every sample, `[B]` float32: weighted squared error of the estimate, mean over the video."""
    estimate, target = predict(unet, batch, dtype)
    return loss_weight(batch.sigma) * (estimate - target).square().mean(dim=(1, 2, 3, 4))


def band_of(sigma: Tensor) -> Tensor:
    """Index of the noise-level band of each sigma: 0 below `SIGMA_BANDS[0]`, up to `len(SIGMA_BANDS)`."""
    return torch.bucketize(sigma, torch.tensor(SIGMA_BANDS, device=sigma.device))


def band_names() -> list[str]:
    """Names of the bands, for logs."""
    borders = ["0", *(f"{border:g}" for border in SIGMA_BANDS), "inf"]
    return [f"sigma {low} to {high}" for low, high in pairwise(borders)]
