"""What SVD is told about a bound: its CLIP embedding, its VAE latents, and the micro-conditioning.

Images are RGB tensors `[B, 3, H, W]`, float32: in [0, 1] for CLIP, in [-1, 1] for the VAE. The conventions are those of
SVD's inference (arXiv 2311.15127): conditioning latents are the *mode* of the noised image, **not** multiplied by the
VAE's scaling factor, and the fps given to the model is fps - 1.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def resize_antialiased(images: Tensor, size: tuple[int, int]) -> Tensor:
    """Resize `[B, 3, H, W]` to `size` (height, width) as SVD's CLIP input is: Gaussian blur, then bicubic.

    The blur's sigma is `(factor - 1) / 2` per axis and its kernel two sigmas a side, made odd; borders reflect; corners
    are aligned. These are the choices SVD's CLIP branch was trained with, so they are fixed.
    """
    channels = images.shape[1]
    for axis, target in ((-1, size[1]), (-2, size[0])):
        sigma = max((images.shape[axis] / target - 1) / 2, 0.001)
        length = int(max(4 * sigma, 3)) | 1
        offsets = torch.arange(length, device=images.device, dtype=images.dtype) - length // 2
        kernel = torch.exp(-(offsets**2) / (2 * sigma**2))
        kernel = (kernel / kernel.sum()).view((1, -1) if axis == -1 else (-1, 1))
        padding = [(length // 2) * (axis == -1)] * 2 + [(length // 2) * (axis == -2)] * 2
        images = F.pad(images, padding, mode="reflect")
        images = F.conv2d(images, kernel.expand(channels, 1, *kernel.shape), groups=channels)
    return F.interpolate(images, size=size, mode="bicubic", align_corners=True)


def clip_pixels(images: Tensor, image_encoder: Any, feature_extractor: Any) -> Tensor:
    """What the image encoder is shown of images in [0, 1]: resized and normalised, `[B, 3, size, size]` float32.

    Args:
        images: `[B, 3, H, W]` in [0, 1], any size.
        image_encoder: a `CLIPVisionModelWithProjection`, of which the size is used.
        feature_extractor: its `CLIPImageProcessor`, of which the normalisation is used.
    """
    size = int(image_encoder.config.image_size)
    # Resized in [-1, 1], where SVD's CLIP branch resizes: bicubic overshoot and reflected borders fall out the same.
    resized = (resize_antialiased(images.float() * 2 - 1, (size, size)) + 1) / 2
    mean = resized.new_tensor(feature_extractor.image_mean).view(1, 3, 1, 1)
    std = resized.new_tensor(feature_extractor.image_std).view(1, 3, 1, 1)
    return (resized - mean) / std


@torch.no_grad()
def encode_clip(images: Tensor, image_encoder: Any, feature_extractor: Any) -> Tensor:
    """CLIP embedding of images in [0, 1], as the UNet's context: `[B, 1, D]` in the encoder's dtype.

    Args:
        images: `[B, 3, H, W]` in [0, 1], any size, on the device the encoder runs on.
        image_encoder: a `CLIPVisionModelWithProjection`.
        feature_extractor: its `CLIPImageProcessor`.
    """
    pixels = clip_pixels(images, image_encoder, feature_extractor)
    dtype = next(image_encoder.parameters()).dtype
    return image_encoder(pixels.to(dtype)).image_embeds.unsqueeze(1)


@contextmanager
def upcast(vae: nn.Module) -> Iterator[None]:
    """Run the VAE in float32 inside the block if it asks for that (`force_upcast`) and is in half precision."""
    dtype = next(vae.parameters()).dtype
    needed = dtype in (torch.float16, torch.bfloat16) and bool(vae.config.force_upcast)  # type: ignore[union-attr]
    if needed:
        vae.to(dtype=torch.float32)
    try:
        yield
    finally:
        if needed:
            vae.to(dtype=dtype)


@torch.no_grad()
def encode_condition(images: Tensor, vae: Any) -> Tensor:
    """Conditioning latents `[B, C, h, w]` of (noised) images in [-1, 1]: the posterior's mode, unscaled, float32.

    The images lie where the VAE runs, which is not where its weights lie while it is offloaded.
    """
    with upcast(vae):
        return vae.encode(images.to(vae.dtype)).latent_dist.mode().float()


@torch.no_grad()
def encode_posterior(frames: Tensor, vae: Any, chunk: int = 8) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation, each `[F, C, h, w]` float32, unscaled, of frames `[F, 3, H, W]` in [-1, 1].

    A training latent is `(mean + std * eps) * vae.config.scaling_factor`; keeping both halves lets every epoch draw
    afresh without the VAE. The frames may lie elsewhere than the VAE: `chunk` of them are moved and encoded at a time.
    """
    means, stds = [], []
    with upcast(vae):
        for part in frames.split(chunk):
            posterior = vae.encode(part.to(vae.device, vae.dtype)).latent_dist
            means.append(posterior.mean.float().cpu())
            stds.append(posterior.std.float().cpu())
    return torch.cat(means), torch.cat(stds)


def micro_conditioning(
    fps: float | Tensor, motion_bucket_id: float | Tensor, noise_aug_strength: float | Tensor, batch_size: int
) -> Tensor:
    """SVD's added time ids `(fps - 1, motion bucket, augmentation)`, `[B, 3]` float32.

    Args:
        fps: frames per second of the video (not minus one: that happens here, once, for training and sampling alike).
        motion_bucket_id: amount of motion, 0 to 255.
        noise_aug_strength: standard deviation of the noise added to the conditioning image in [-1, 1].
        batch_size: B; numbers are repeated, tensors must be `[B]`.
    """
    columns: Sequence[float | Tensor] = (fps, motion_bucket_id, noise_aug_strength)
    ids = torch.stack([torch.as_tensor(c, dtype=torch.float32).expand(batch_size) for c in columns], dim=1)
    return ids - torch.tensor([1.0, 0.0, 0.0], device=ids.device)
