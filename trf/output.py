"""What a call of the pipeline returns."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput
from torch import Tensor

from .settings import SamplerSettings

OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class TimeReversalFusionOutput(BaseOutput):
    """What a call returns."""

    frames: Any
    """By `output_type`: `pil` a list of lists of images; `np` `[B, F, H, W, 3]` in [0, 1]; `pt` `[B, F, 3, H, W]` in
    [0, 1]; `latent` the latents `[B, F, C, h, w]`."""
    settings: SamplerSettings
    """The settings the call ran with; of several pairs, those of the first."""
    pair_settings: list[SamplerSettings]
    """The same for each pair: `fps` and `motion_bucket_id` may be its own."""
    sources: dict[str, str]
    """For each setting, where it came from: `caller`, `patch card`, `model`, `sampler` or `default`."""
    unet_calls: int
    """UNet calls made, as papers count: one direction at one noise level, guidance included."""
    unet_forwards: int
    """Forward passes of the UNet, in which several calls may lie together."""
    disagreement: Tensor | None
    """Of each video, `[B]`: how far its halves were apart before fusion (`disagreement`), mean over the fused
    iterations; none where a sampler fuses nothing."""
