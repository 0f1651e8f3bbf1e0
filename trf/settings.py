"""The sampler's settings, their defaults, and where a call's values come from.

A value is taken from the caller, else from the patch card, else from the defaults, which are those of TRF's release.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, get_args

SamplerName = Literal["trf", "trf-reference"]


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """Everything that decides a bounded generation besides the two bounds, the model and the draws."""

    height: int = 576
    """Pixels; a multiple of the VAE's scale factor (8 for SVD)."""
    width: int = 1024
    """Pixels; a multiple of the VAE's scale factor (8 for SVD)."""
    num_frames: int = 25
    """Frames of the video, both bounds included."""
    num_inference_steps: int = 50
    """Denoising steps, re-noised ones not counted."""
    fps: float = 7
    """Frames per second, told to the model and used for the video file."""
    motion_bucket_id: float = 127
    """Amount of motion asked of the model, 0 to 255."""
    noise_aug_strength: float = 0.02
    """Standard deviation of the noise on the bounds, in units of [-1, 1] pixels."""
    min_guidance_scale: float = 1.0
    """Classifier-free guidance at the frame of the condition."""
    max_guidance_scale: float = 3.0
    """Classifier-free guidance at the frame farthest from the condition; with 1 or less no guidance is done."""
    jump_length: int = 5
    """Noise levels a re-noising run goes back."""
    jump_n_sample: int = 2
    """Times the levels after an anchor are denoised; 1 switches re-noising off."""
    repeat_step_ratio: float = 0.8
    """Re-noising happens while at least this fraction of the steps remains."""
    noise_scale_ratio: float = 1.0
    """Factor on the re-noising noise."""
    sampler: SamplerName = "trf"
    """`trf`, or `trf-reference`: the release's exact behaviour, its defect included."""

    def __post_init__(self) -> None:
        if self.num_frames < 2:
            raise ValueError(f"num_frames={self.num_frames}: two bounds need at least 2 frames.")
        if self.sampler not in get_args(SamplerName):
            raise ValueError(f"sampler={self.sampler!r}: choose one of {', '.join(get_args(SamplerName))}.")
        if self.fps <= 0:
            raise ValueError(f"fps={self.fps}: must be above 0.")
        if self.noise_aug_strength < 0:
            raise ValueError(f"noise_aug_strength={self.noise_aug_strength}: must not be negative.")


SETTING_NAMES = tuple(field.name for field in fields(SamplerSettings))


def resolve(
    told: Mapping[str, Any], recommended: Mapping[str, Any], native: Mapping[str, Any]
) -> tuple[SamplerSettings, dict[str, str]]:
    """Settings of one call, and for each where it came from: `caller`, `patch card`, `model` or `default`.

    Args:
        told: what the caller said; `None` counts as unsaid.
        recommended: what the active patch's card recommends.
        native: what the base model was made for (size and number of frames).

    Raises:
        ValueError: for an unknown name or a value out of range.
    """
    unknown = sorted({*told, *recommended, *native} - set(SETTING_NAMES))
    if unknown:
        raise ValueError(f"unknown sampler setting {unknown[0]!r}: valid ones are {', '.join(SETTING_NAMES)}.")
    values: dict[str, Any] = {}
    sources: dict[str, str] = {}
    for source, given in (("model", native), ("patch card", recommended), ("caller", told)):
        said = {name: value for name, value in given.items() if value is not None}
        values |= said
        sources |= dict.fromkeys(said, source)
    settings = SamplerSettings(**values)
    return settings, {name: sources.get(name, "default") for name in asdict(settings)}
