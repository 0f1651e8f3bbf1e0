"""Pretraining of a miniature's UNet on films: all its weights, by the same objective as a patch.

Films here know no direction of time, so every sample is shown forwards or backwards by the toss of a coin.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..trf.conditioning import encode_condition, micro_conditioning
from ..trf.edm import log_normal_sigmas
from ..trf.seeds import derived_seed
from .autoencoder import LOG_VARIANCE, to_pixels
from .data import Sample
from .initial import zero_residuals
from .objective import band_names, band_of, denoising_loss


def make_unet(config: Mapping[str, Any], *, latent_channels: int, latent_side: int, num_frames: int, seed: int) -> Any:
    """A fresh `UNetSpatioTemporalConditionModel`, attention at every level.

    Args:
        config: `block_out_channels`, `layers_per_block` and `context_dim`; a head has 32 channels.
        latent_channels: channels of the latents; the condition's come on top.
        latent_side: height and width of the latents.
        num_frames: frames it is trained on.
        seed: of the weights.
    """
    from diffusers import UNetSpatioTemporalConditionModel

    channels = tuple(config["block_out_channels"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "unet"))
        unet = UNetSpatioTemporalConditionModel(
            sample_size=latent_side,
            in_channels=2 * latent_channels,
            out_channels=latent_channels,
            down_block_types=("CrossAttnDownBlockSpatioTemporal",) * len(channels),
            up_block_types=("CrossAttnUpBlockSpatioTemporal",) * len(channels),
            block_out_channels=channels,
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=96,
            layers_per_block=config["layers_per_block"],
            cross_attention_dim=config["context_dim"],
            num_attention_heads=tuple(width // 32 for width in channels),
            num_frames=num_frames,
        )
    zero_residuals(unet)
    nn.init.zeros_(unet.conv_out.weight)
    return unet


@dataclass(frozen=True)
class EncodedFilms:
    """Films as the UNet is trained on them, all on its device; N films."""

    latents: Tensor
    """Posterior means, scaled, `[N, F, C, h, w]`."""
    bounds: Tensor
    """First and last frame, uint8 `[N, 2, H, W, 3]`."""
    embeddings: Tensor
    """Their image embeddings `[N, 2, D]`."""
    fps: Tensor
    """`[N]`."""
    motion_bucket: Tensor
    """`[N]`."""
    scaling_factor: float
    """Of the latents."""


def make_batch(
    films: EncodedFilms,
    vae: Any,
    step: int,
    *,
    batch_size: int,
    sigma_mean: float,
    sigma_std: float,
    noise_aug_mean: float,
    noise_aug_std: float,
    conditioning_dropout: float,
    seed: int,
) -> Sample:
    """The batch of a step: which films, which way round, and every draw follow from the seed and the step's number."""
    device, count = films.latents.device, len(films.latents)
    draw = torch.Generator(device).manual_seed(derived_seed(seed, "unet step", step))
    chosen = _films_of(step, batch_size, count, seed).to(device)
    backwards = torch.rand(batch_size, generator=draw, device=device) < 0.5
    latents = films.latents[chosen].float()
    latents = torch.where(backwards.view(-1, 1, 1, 1, 1), latents.flip(1), latents)
    std = films.scaling_factor * torch.tensor(LOG_VARIANCE / 2).exp().item()
    latents = latents + std * torch.randn(latents.shape, generator=draw, device=device)

    bound = backwards.long()
    pixels = to_pixels(films.bounds[chosen, bound])
    augmentation = log_normal_sigmas((batch_size,), noise_aug_mean, noise_aug_std, draw)
    pixels = pixels + augmentation.view(-1, 1, 1, 1) * torch.randn(pixels.shape, generator=draw, device=device)
    kept = (torch.rand(batch_size, generator=draw, device=device) >= conditioning_dropout).float()
    return Sample(
        latents=latents,
        noise=torch.randn(latents.shape, generator=draw, device=device),
        sigma=log_normal_sigmas((batch_size,), sigma_mean, sigma_std, draw),
        condition=encode_condition(pixels, vae) * kept.view(-1, 1, 1, 1),
        embedding=(films.embeddings[chosen, bound] * kept.view(-1, 1)).unsqueeze(1),
        added_time_ids=micro_conditioning(films.fps[chosen], films.motion_bucket[chosen], augmentation, batch_size),
    )


def _films_of(step: int, batch_size: int, count: int, seed: int) -> Tensor:
    """Numbers of the films of a step; an epoch is one permutation of them, what is left over of it is not used."""
    per_epoch = max(1, count // batch_size)
    epoch, position = divmod(step, per_epoch)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(derived_seed(seed, "unet order", epoch)))
    return order.repeat(-(-batch_size // count))[position * batch_size :][:batch_size]


def denoising(
    unet: Any, make: Callable[[int], Sample], *, autocast: torch.dtype | None
) -> Callable[[int], dict[str, Tensor]]:
    """The losses of a step, for `stage.fit`: SVD's objective, in all and by noise level.

    Args:
        unet: the UNet.
        make: the batch of a step.
        autocast: precision of the arithmetic, float32 if `None`.
    """

    def losses(step: int) -> dict[str, Tensor]:
        batch = make(step)
        with torch.autocast(batch.sigma.device.type, autocast, enabled=autocast is not None):
            each = denoising_loss(unet, batch)
        values = {"loss": each.mean()}
        bands = band_of(batch.sigma)
        for number, name in enumerate(band_names()):
            member = (bands == number).float()
            values[name] = (each.detach() * member).sum() / member.sum().clamp(min=1)
        return values

    return losses
