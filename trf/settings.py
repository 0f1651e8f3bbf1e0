"""The sampler's settings, their defaults, and where a call's values come from.

A value is taken from the caller, else from the patch card, else from the model, else from what the sampler's authors
use, else from TRF's release. The sampler itself is `USUAL` if neither caller nor card names one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from itertools import chain
from numbers import Integral, Real
from typing import Any, Literal, get_args

SamplerName = Literal["trf", "trf++", "trf-reference", "gi", "vibid", "mpd-seq", "mpd-par"]
USUAL: SamplerName = "trf++"
"""The sampler of calls and cards that name none."""
RENOISING = ("jump_length", "jump_n_sample", "repeat_step_ratio")
"""The settings that only `trf` and `trf-reference` know: where they go back in noise."""
SCALES = ("min_guidance_scale", "max_guidance_scale")
"""The settings of how strong classifier-free guidance is."""
GUIDANCE = (*SCALES, "min_guidance_sigma", "max_guidance_sigma")
"""The settings of classifier-free guidance: how strong it is, and at which noise levels."""
CFG_PLUS: tuple[SamplerName, ...] = ("vibid", "mpd-seq", "mpd-par")
"""The samplers with CFG++ (arXiv 2406.08070): guided by one scale for all frames, unless that is 1."""
OF_SAMPLER = ("num_inference_steps", *GUIDANCE, "noise_scale_ratio", *RENOISING)
"""The settings that suit one sampler and mean something else to another."""
PATCH_POINTS = ("patch_schedule", "patch_frames")
"""The settings that make patches stronger at some noise levels or frames than at others."""
OWN_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    # With patches more steps lost, and guidance gains as much here as at all noise levels: docs/experiments.md.
    "trf++": {"num_inference_steps": 12, "min_guidance_sigma": 1.0, "max_guidance_sigma": 20.0},
    # Its guidance rises over the frames in either half, and the mean of both is taken: 2 everywhere.
    "gi": {"num_inference_steps": 50, "min_guidance_scale": 2.0, "max_guidance_scale": 2.0},
    **{name: {"num_inference_steps": 25, **dict.fromkeys(SCALES, 1.0)} for name in CFG_PLUS},
}
"""What a sampler's authors use where it differs from TRF's release."""


@dataclass(frozen=True, kw_only=True)
class SamplerSettings:
    """Everything that decides a bounded generation besides the two bounds, the model and the draws.

    The defaults are those of TRF's release; `resolve` knows those of the other samplers.
    """

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
    """Classifier-free guidance at the frame farthest from the condition; with 1 or less no guidance is done.

    With CFG++ both are the one scale of all frames: `resolve` takes either for both, and 1 alone is no guidance.
    """
    min_guidance_sigma: float = 0.0
    """Least noise level at which guidance is done, in units of sigma; see arXiv 2404.07724. A step without guidance
    costs half, but for samplers with CFG++."""
    max_guidance_sigma: float = 1000.0
    """Largest one; SVD's noise goes up to 700."""
    jump_length: int = 5
    """Noise levels a re-noising run goes back."""
    jump_n_sample: int = 2
    """Times the levels after an anchor are denoised; 1 switches re-noising off."""
    repeat_step_ratio: float = 0.8
    """Re-noising happens while at least this fraction of the steps remains."""
    noise_scale_ratio: float = 1.0
    """Factor on the re-noising noise."""
    patch_schedule: tuple[tuple[float, float], ...] = ()
    """Factor on the scale of all patches over noise: points (sigma, factor), linear in ln sigma between them and
    constant beyond; without points 1."""
    patch_frames: tuple[tuple[float, float], ...] = ()
    """Factor on what all patches do over the film: points (place, factor), place 0 at the start bound and 1 at the end
    bound, linear between them and constant beyond; without points 1."""
    sampler: SamplerName = "trf"
    """`trf` (arXiv 2403.14611); `trf++`: ours, few steps and none of them done again, the bounds held;
    `trf-reference`: the release's exact behaviour, its defect included; `gi` (Generative Inbetweening,
    arXiv 2408.15239), `vibid` (ViBiDSampler, arXiv 2410.05651), `mpd-seq` and `mpd-par` (MPD, ICLR 2026)."""

    @property
    def guided(self) -> bool:
        """Whether there is guidance, at some noise level at least."""
        scale = self.max_guidance_scale
        return scale != 1 if self.sampler in CFG_PLUS else scale > 1

    @property
    def patch_points(self) -> list[str]:
        """The settings in use of those that change the strength of patches."""
        return [name for name in PATCH_POINTS if getattr(self, name)]

    def __post_init__(self) -> None:
        check_counts(**{one.name: getattr(self, one.name) for one in fields(self) if one.type == "int"})
        for one in fields(self):
            value = getattr(self, one.name)
            if one.type == "float" and not (isinstance(value, Real) and math.isfinite(value)):
                hint = "; docs/sampling.md shows how to measure it" if one.name in ("fps", "motion_bucket_id") else ""
                raise ValueError(f"{one.name}={value!r}: give a number{hint}.")
        if self.num_frames < 2:
            raise ValueError(f"num_frames={self.num_frames}: two bounds need at least 2 frames.")
        if self.sampler not in get_args(SamplerName):
            raise ValueError(f"sampler={self.sampler!r}: choose one of {', '.join(get_args(SamplerName))}.")
        if self.fps <= 0:
            raise ValueError(f"fps={self.fps}: must be above 0.")
        if self.noise_aug_strength < 0:
            raise ValueError(f"noise_aug_strength={self.noise_aug_strength}: must not be negative.")
        if self.min_guidance_sigma > self.max_guidance_sigma:
            raise ValueError(
                f"min_guidance_sigma={self.min_guidance_sigma:g} is more than max_guidance_sigma="
                f"{self.max_guidance_sigma:g}: nothing would be guided; give both."
            )
        schedule, over_film = _points(self.patch_schedule), _points(self.patch_frames)
        if schedule is None or not all(sigma > 0 for sigma, _ in schedule):
            raise ValueError(
                f"patch_schedule={self.patch_schedule}: give points (sigma, factor), sigma rising from above 0."
            )
        if over_film is None or not all(0 <= place <= 1 for place, _ in over_film):
            raise ValueError(
                f"patch_frames={self.patch_frames}: give points (place, factor), place rising from 0 to 1."
            )
        object.__setattr__(self, "patch_schedule", schedule)
        object.__setattr__(self, "patch_frames", over_film)


def check_counts(**counts: Any) -> None:
    """Refuse what is no whole number of 1 or more.

    Raises:
        ValueError: naming the first that is none.
    """
    for name, value in counts.items():
        if not isinstance(value, Integral) or value < 1:
            raise ValueError(f"{name}={value!r}: must be a whole number, 1 or more.")


def _points(given: Any) -> tuple[tuple[float, float], ...] | None:
    """Points that rise, as tuples, since JSON has lists; none if they are no such points."""
    try:
        points = tuple((float(at), float(factor)) for at, factor in given)
    except (TypeError, ValueError):
        return None
    ats = [at for at, _ in points]
    return points if ats == sorted({*ats}) and all(map(math.isfinite, chain(*points))) else None


def as_recorded(settings: SamplerSettings = SamplerSettings()) -> dict[str, Any]:
    """Settings as JSON gives them back. The defaults stand for what a record from before a setting was added lacks."""
    points = {name: [list(point) for point in getattr(settings, name)] for name in PATCH_POINTS}
    return {**asdict(settings), **points}


SETTING_NAMES = tuple(field.name for field in fields(SamplerSettings))


def resolve(
    told: Mapping[str, Any], recommended: Mapping[str, Any], native: Mapping[str, Any]
) -> tuple[SamplerSettings, dict[str, str]]:
    """Settings of one call, and for each where it came from: `caller`, `patch card`, `model`, `sampler` or `default`.

    A card recommends steps, guidance and re-noising for its own sampler; with another one they are left aside. For
    samplers with CFG++ the guidance scale is said by `min_guidance_scale` or `max_guidance_scale`, and is then both.

    Args:
        told: what the caller said; `None` counts as unsaid.
        recommended: what the active patch's card recommends.
        native: what the base model was made for (size and number of frames).

    Raises:
        ValueError: for an unknown name, a value out of range, or two guidance scales where there is one.
    """
    unknown = sorted({*told, *recommended, *native} - set(SETTING_NAMES))
    if unknown:
        raise ValueError(f"unknown sampler setting {unknown[0]!r}: valid ones are {', '.join(SETTING_NAMES)}.")
    sources: dict[str, str] = {}
    usual = recommended.get("sampler") or USUAL
    chosen = told.get("sampler") or usual
    if chosen.removesuffix("-reference") != usual.removesuffix("-reference"):
        recommended = {name: value for name, value in recommended.items() if name not in OF_SAMPLER}
    values: dict[str, Any] = {"sampler": chosen}
    own = OWN_DEFAULTS.get(chosen, {})
    for source, given in (("sampler", own), ("model", native), ("patch card", recommended), ("caller", told)):
        said = {name: value for name, value in given.items() if value is not None}
        if chosen in CFG_PLUS:
            said |= _one_scale(chosen, said)
        values |= said
        sources |= dict.fromkeys(said, source)
    settings = SamplerSettings(**values)
    return settings, {name: sources.get(name, "default") for name in asdict(settings)}


def _one_scale(sampler: str, said: Mapping[str, Any]) -> dict[str, Any]:
    """The guidance scale that is said, if any, as both settings of it."""
    scales = [said[name] for name in SCALES if name in said]
    if scales and scales[0] != scales[-1]:
        raise ValueError(
            f"min_guidance_scale={scales[0]}, max_guidance_scale={scales[-1]}: sampler={sampler!r} has one scale for "
            "all frames; give one of the two."
        )
    return dict.fromkeys(SCALES, scales[0]) if scales else {}
