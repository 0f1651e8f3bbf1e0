"""Every way of sampling by name: its plan, and what it does otherwise than Time-Reversal Fusion.

A way is one entry: a plan (`schedule`) and choices that the core knows (`samplers.sample`). The settings its authors
use are in `settings`.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .fusion import even_weights, linear_weights
from .schedule import Iteration, count, fused_plan, gi_plan, mpd_par_plan, mpd_seq_plan, trf_plan, vibid_plan
from .settings import GUIDANCE, OWN_DEFAULTS, RENOISING, SamplerName, SamplerSettings

logger = logging.getLogger(__name__)

Weights = Callable[[int, torch.device | str | None], Tensor]


@dataclass(frozen=True, kw_only=True)
class Strategy:
    """A way of sampling."""

    plan: Callable[[SamplerSettings], list[Iteration]]
    """What is done at which noise level."""
    weights: Weights = linear_weights
    """Fusion weights of the forward path, from the number of frames."""
    cfg_plus: bool = False
    """Step along the noise of the estimate without conditions, which is then needed even where nothing is guided."""
    rotated: bool = False
    """Rotate the temporal attention of the backward rows."""
    anchored: bool = False
    """Put both bounds in place in every fused estimate."""
    as_released: bool = False
    """As TRF's release does it: with the defect of `samplers.sample`'s `stale_scaling`, and seams between chunks."""


def _trf(settings: SamplerSettings) -> list[Iteration]:
    return trf_plan(
        settings.num_inference_steps, settings.jump_length, settings.jump_n_sample, settings.repeat_step_ratio
    )


STRATEGIES: Mapping[SamplerName, Strategy] = {
    "trf": Strategy(plan=_trf),
    "trf++": Strategy(plan=lambda own: fused_plan(own.num_inference_steps), anchored=True),
    "trf-reference": Strategy(plan=_trf, as_released=True),
    "gi": Strategy(plan=lambda own: gi_plan(own.num_inference_steps), weights=even_weights, rotated=True),
    "vibid": Strategy(plan=lambda own: vibid_plan(own.num_inference_steps), cfg_plus=True),
    "mpd-seq": Strategy(plan=lambda own: mpd_seq_plan(own.num_inference_steps), cfg_plus=True),
    "mpd-par": Strategy(plan=lambda own: mpd_par_plan(own.num_inference_steps), cfg_plus=True),
}


def warn_of_what_is_left_out(settings: SamplerSettings, plan: Sequence[Iteration]) -> None:
    """Say which settings do nothing with this sampler, or with so few steps."""
    renoises = settings.sampler in ("trf", "trf-reference")
    if renoises and settings.jump_n_sample > 1 and not count(plan, "renoise"):
        logger.warning(
            "%d denoising steps are too few to re-noise with jump_length=%d and repeat_step_ratio=%g: the halves "
            "are fused, but not harmonised.",
            settings.num_inference_steps, settings.jump_length, settings.repeat_step_ratio,
        )  # fmt: skip
    if not count(plan, "renoise") and settings.noise_scale_ratio != SamplerSettings.noise_scale_ratio:
        logger.warning("noise_scale_ratio=%g has no effect: nothing is re-noised.", settings.noise_scale_ratio)
    own = OWN_DEFAULTS.get(settings.sampler, {})
    guided = [name for name in GUIDANCE if getattr(settings, name) != own.get(name, getattr(SamplerSettings, name))]
    if not settings.guided and (idle := [name for name in guided if name != "max_guidance_scale"]):
        logger.warning(
            "max_guidance_scale=%g: nothing is guided, so %s is left aside.",
            settings.max_guidance_scale, ", ".join(idle),
        )  # fmt: skip
    changed = [name for name in RENOISING if getattr(settings, name) != getattr(SamplerSettings, name)]
    if changed and not renoises:
        logger.warning(
            "sampler=%s has re-noising of its own, or none: %s is left aside.", settings.sampler, ", ".join(changed)
        )
