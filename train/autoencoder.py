"""Pretraining of a miniature's autoencoder: squared error on short windows of films.

Squared error of what the posterior's mode decodes to; what made it learn is in docs/experiments.md. The variance head
stays where it is put, near zero, so that a posterior's sample is its mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..trf.seeds import derived_seed
from .initial import identity, zero_residuals

LOG_VARIANCE = -9.0
"""Of the posterior, everywhere: its standard deviation is 0.011."""
WINDOWS = (4, 8, 12)
"""Frames of a window: the pipelines decode 8 frames at a time and what is left, so the decoder sees several lengths."""


def make_autoencoder(config: Mapping[str, Any], side: int, seed: int) -> Any:
    """A fresh `AutoencoderKLTemporalDecoder` whose posterior has the variance `exp(LOG_VARIANCE)`.

    Args:
        config: `block_out_channels` and `latent_channels`.
        side: pixels of the frames it is for.
        seed: of the weights.
    """
    from diffusers import AutoencoderKLTemporalDecoder

    channels = tuple(config["block_out_channels"])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "autoencoder"))
        vae = AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * len(channels),
            block_out_channels=channels,
            latent_channels=config["latent_channels"],
            sample_size=side,
        )
    zero_residuals(vae)
    identity(vae.decoder.time_conv_out)
    half = config["latent_channels"]
    with torch.no_grad():
        vae.quant_conv.weight[half:] = 0
        vae.quant_conv.bias[half:] = LOG_VARIANCE
    return vae


def reconstruction(
    vae: Any, frames: Tensor, *, batch_size: int, latent_noise: float, moment_weight: float, seed: int
) -> Callable[[int], dict[str, Tensor]]:
    """The losses of a step, for `stage.fit`.

    Squared error in [-1, 1], and a pull of every latent channel towards zero mean and unit variance, so that one
    scaling factor fits all. The decoder sees slightly noisy latents: those that a UNet draws are never exact.

    Args:
        vae: the autoencoder.
        frames: uint8 `[N, F, H, W, 3]`, on its device.
        batch_size: films of a step.
        latent_noise: standard deviation of the noise on the latents.
        moment_weight: weight of the pull.
        seed: of every draw.
    """
    windows = [length for length in WINDOWS if length <= frames.shape[1]]

    def losses(step: int) -> dict[str, Tensor]:
        generator = torch.Generator(frames.device).manual_seed(derived_seed(seed, "autoencoder step", step))
        draw = torch.Generator().manual_seed(derived_seed(seed, "autoencoder window", step))
        length = windows[int(torch.randint(len(windows), (), generator=draw))]
        first = int(torch.randint(frames.shape[1] - length + 1, (), generator=draw))
        chosen = torch.randint(len(frames), (batch_size,), generator=draw).to(frames.device)
        pixels = to_pixels(frames[chosen, first : first + length].flatten(0, 1))
        moments = vae.quant_conv(vae.encoder(pixels))
        latents = moments.chunk(2, dim=1)[0]
        noise = torch.randn(latents.shape, generator=generator, device=latents.device)
        shown = vae.decoder(
            latents + latent_noise * noise,
            num_frames=length,
            image_only_indicator=torch.zeros(batch_size, length, device=latents.device),
        )
        error = (shown - pixels).square().mean()
        variance, mean = torch.var_mean(latents, dim=(0, 2, 3))
        pull = (mean.square() + (variance.sqrt() - 1).square()).mean()
        # PSNR in [0, 1] pixels: a range of 2 makes a squared error four times as large.
        return {"loss": error + moment_weight * pull, "psnr": -10 * torch.log10(error / 4), "pull": pull}

    return losses


def to_pixels(frames: Tensor) -> Tensor:
    """Float32 `[..., 3, H, W]` in [-1, 1] of uint8 `[..., H, W, 3]`."""
    return frames.movedim(-1, -3).float() / 127.5 - 1


@torch.no_grad()
def latents_of(vae: Any, frames: Tensor, chunk: int = 256) -> Tensor:
    """The posterior's means `[N, F, C, h, w]`, unscaled, of uint8 films `[N, F, H, W, 3]`, where the autoencoder is."""
    device = next(vae.parameters()).device
    flat = torch.split(frames.flatten(0, 1), chunk)
    means = [vae.encode(to_pixels(part.to(device))).latent_dist.mode() for part in flat]
    return torch.unflatten(torch.cat(means), 0, frames.shape[:2])
