"""One forward: batch -> prediction -> loss: SVD's denoising objective, and the same of what TRF makes of both halves.

Shapes: `[B, F, C, h, w]`; see `train.data.Sample`. Reference: arXiv 2311.15127, appendix D; arXiv 2206.00364.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ..trf.adapters import adapter_parameters
from ..trf.attention import rotated_attention
from ..trf.edm import denoised, loss_weight, preconditioning
from ..trf.fusion import fuse, linear_weights, reverse_time
from ..trf.halves import Halves
from ..trf.patch import Direction, adapters_of
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
    return weighted_error(*predict(unet, batch, dtype), batch.sigma)


def weighted_error(estimate: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
    """EDM's loss of every video, `[B]`: mean squared error of `[B, F, C, h, w]`, weighted for its noise level."""
    return loss_weight(sigma) * (estimate - target).square().mean(dim=(1, 2, 3, 4))


def fused_loss(forward: Tensor, backward: Tensor, target: Tensor, sigma: Tensor) -> Tensor:
    """Loss of what TRF makes of two estimates, `[B]`: of `w x_f + (1 - w) R(x_b)` with the sampler's linear weights.

    Args:
        forward: estimate of the rows that run forward, `[B, F, C, h, w]`.
        backward: that of the same clips under the same noise, reversed in time.
        target: clean latents in forward order.
        sigma: noise levels, `[B]`.
    """
    weights = linear_weights(target.shape[1], target.device)
    return weighted_error(fuse(forward, backward, weights), target, sigma)


@dataclass(frozen=True, kw_only=True)
class Losses:
    """Of a batch, or of the half of it that is trained."""

    total: Tensor
    """What the gradient is taken of, a scalar."""
    rows: Tensor
    """Denoising loss of every row, `[R]`, detached."""
    sigma: Tensor
    """Their noise levels, `[R]`."""
    backward: Tensor
    """Whether they run backward in time, `[R]` bool."""
    numbers: Tensor
    """Of their samples, `[R]`."""
    fused: Tensor | None = None
    """Loss of the fused estimates, one a clip, detached; where a batch has both directions."""


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What a batch is trained by: SVD's denoising loss of every adapter on its own rows, mixed with the fused loss.

    Each adapter has rows of its own, as many as any other, and the sum of their means is taken, so that none feels
    another but through the fused loss.
    """

    direction: Direction
    dtype: torch.dtype
    """Of the UNet's inputs."""
    fusion: float = 0.0
    """Share of the fused loss."""
    alternate: bool = False
    """Take the gradient of one direction a step, in turn; the other direction's estimate is made without one."""
    rotated: bool = False
    """Rotate the backward rows' temporal attention; a batch then begins with as many forward rows, which only guide
    where no adapter is trained on them."""

    @contextmanager
    def losses(self, model: Any, unet: Any, batch: Sample, step: int) -> Iterator[Losses]:
        """The losses of a batch; the backward pass belongs inside the block.

        Args:
            model: called for what is trained, wrapped or not, so that gradients synchronise.
            unet: the UNet itself.
            batch: rows that run forward come first.
            step: number of the optimizer step.
        """
        resting, halves = None, Halves(unet)
        with ExitStack() as contexts:
            if self.alternate:
                batch, other = batch.halves()[:: -1 if step % 2 else 1]
                with torch.no_grad(), halves.rows(*self._rows(other, step + 1)):
                    resting = predict(unet, other, self.dtype)[0]
                # Without a gradient, not with one of zero: an optimizer would go on by momentum.
                contexts.enter_context(
                    _frozen(unet, adapters_of(self.direction)["forward" if step % 2 else "backward"])
                )
            running = self._rows(batch, step)
            contexts.enter_context(halves.rows(*running))
            if self.rotated:
                contexts.enter_context(rotated_attention(unet, *running))
            estimate, target = predict(model, batch, self.dtype)
            rows = weighted_error(estimate, target, batch.sigma)
            sigma, backward, numbers = batch.sigma, batch.backward, batch.number
            if self.rotated and self.direction == "backward":  # the first half only guides
                rows, sigma, backward, numbers = (_both(one)[1] for one in (rows, sigma, backward, numbers))
            total, fused = rows.mean(), None
            if self.direction == "both":
                if resting is None:
                    total = 2 * total
                    fused = fused_loss(*_both(estimate), _both(target)[0], _both(sigma)[0])
                elif step % 2:
                    fused = fused_loss(resting, estimate, reverse_time(target), sigma)
                else:
                    fused = fused_loss(estimate, resting, target, sigma)
                if self.fusion:
                    total = (1 - self.fusion) * total + self.fusion * fused.mean()
                fused = fused.detach()
            yield Losses(total=total, rows=rows.detach(), sigma=sigma, backward=backward, numbers=numbers, fused=fused)

    def _rows(self, batch: Sample, step: int) -> tuple[int, int]:
        """How many rows of a batch run forward, and how many backward; of `either` all count as forward ones, since
        its adapter acts on both alike.
        """
        rows = len(batch.sigma)
        if self.rotated or (self.direction == "both" and not self.alternate):
            return rows // 2, rows // 2
        return (0, rows) if self.direction == "backward" or (self.alternate and step % 2) else (rows, 0)


@contextmanager
def _frozen(unet: Any, adapter: str) -> Iterator[None]:
    """An adapter gets no gradient inside the block."""
    parameters = adapter_parameters(unet, adapter)
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


def _both(rows: Tensor) -> tuple[Tensor, Tensor]:
    first, second = rows.chunk(2)
    return first, second


def band_of(sigma: Tensor) -> Tensor:
    """Index of the noise-level band of each sigma: 0 below `SIGMA_BANDS[0]`, up to `len(SIGMA_BANDS)`."""
    # Counted, since a table of borders would have to be sent to the device, which waits for it.
    return torch.stack([sigma > border for border in SIGMA_BANDS]).sum(0)


def band_names() -> list[str]:
    """Names of the bands, for logs."""
    borders = ["0", *(f"{border:g}" for border in SIGMA_BANDS), "inf"]
    return [f"sigma {low} to {high}" for low, high in pairwise(borders)]
