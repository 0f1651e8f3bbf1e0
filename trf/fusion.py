"""Time reversal, fusion and re-noising: the tensor operations that make TRF out of an image-to-video model.

Shapes: videos of latents are `[B, F, C, h, w]` (batch, frames, channels, height, width). Paper: arXiv 2403.14611.
"""

from __future__ import annotations

import torch
from torch import Tensor

FRAME_AXIS = 1


def reverse_time(video: Tensor) -> Tensor:
    """`R`: the video `[B, F, ...]` with its frames in reverse order. Its own inverse."""
    return video.flip(FRAME_AXIS)


def linear_weights(num_frames: int, device: torch.device | str | None = None) -> Tensor:
    """The forward path's fusion weights `w_i = 1 - i / (F - 1)`, shape `[1, F, 1, 1, 1]`, float32 (paper, eq. 5)."""
    return torch.linspace(1, 0, num_frames, device=device).view(1, -1, 1, 1, 1)


def even_weights(num_frames: int, device: torch.device | str | None = None) -> Tensor:
    """Fusion weights of one half for every frame, `[1, F, 1, 1, 1]`, float32 (Generative Inbetweening)."""
    return torch.full((1, num_frames, 1, 1, 1), 0.5, device=device)


def fuse(forward: Tensor, backward: Tensor, weights: Tensor) -> Tensor:
    """Fuse two videos `[B, F, C, h, w]`; `backward` is in its own (reversed) frame order.

    Returns `w * forward + (1 - w) * R(backward)`, in forward order.
    """
    return weights * forward + (1 - weights) * reverse_time(backward)


def frame_guidance(minimum: float, maximum: float, num_frames: int, device: torch.device | str | None = None) -> Tensor:
    """SVD's classifier-free guidance scale per frame, `[1, F, 1, 1, 1]`: rises with distance from the condition."""
    return torch.linspace(minimum, maximum, num_frames, device=device).view(1, -1, 1, 1, 1)


def guide(unconditional: Tensor, conditional: Tensor, scale: Tensor) -> Tensor:
    """Classifier-free guidance (arXiv 2207.12598): `u + scale * (c - u)`."""
    return unconditional + scale * (conditional - unconditional)


def renoise(x: Tensor, sigma: Tensor, sigma_to: Tensor, noise: Tensor, noise_scale: float = 1.0) -> Tensor:
    """Raise `x` from noise level `sigma` to the higher `sigma_to` with fresh unit `noise` of the same shape.

    `noise_scale` below 1 adds less than the level asks for, which the release uses to calm its video-frames scenario.
    """
    return x + noise_scale * (sigma_to**2 - sigma**2).sqrt() * noise


def disagreement(forward: Tensor, backward: Tensor) -> Tensor:
    """How far two halves are apart before they are fused, `[B]`: the RMS of their difference over their own.

    Args:
        forward: denoised estimate in its own frame order, `[B, F, C, h, w]`.
        backward: likewise, running from the end bound to the start.
    """
    one, other = forward.flatten(1), reverse_time(backward).flatten(1)
    return (one - other).norm(dim=1) / ((one.square().sum(1) + other.square().sum(1)) / 2).sqrt()
