"""The sampler's settings of one pair: who says what, and what is measured of its images."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from ..data_prep.bounds import Pair
from ..data_prep.calibration import distance, estimate
from ..data_prep.frames import FitMode, fit_image, load_image
from ..trf.patch import Calibration
from ..trf.pipeline import TimeReversalFusionPipeline
from ..trf.settings import SamplerSettings, resolve

if TYPE_CHECKING:
    from ..configs.schema import SamplingConfig

PAIR_SETTINGS = ("fps", "motion_bucket_id", "num_frames", "height", "width")
"""Sampler settings a manifest can give for each pair."""


def settings_of(
    config: SamplingConfig, pipe: TimeReversalFusionPipeline, pair: Pair | None = None
) -> tuple[SamplerSettings, dict[str, str]]:
    """Sampler settings, of one pair if given, and where each came from: see `generate`."""
    auto = config.sampler.measured
    caller = {name: value for name, value in config.sampler.model_dump(exclude={*auto}).items() if value is not None}
    own = {name: getattr(pair, name) for name in PAIR_SETTINGS if pair and name not in auto}
    own = {name: value for name, value in own.items() if value is not None}
    settings, sources = resolve({**own, **caller}, pipe.recommended, pipe.native)
    sources |= dict.fromkeys(own.keys() - caller.keys(), "manifest")
    for name in ("fuse", "compile"):
        if getattr(config, name) and (points := settings.patch_points):
            raise ValueError(f"{name}=true keeps patches as they are, and {points[0]} changes them; leave one out.")
    if not auto:
        return settings, sources
    if pipe.calibration is None:
        raise ValueError(
            f"sampler.{auto[0]}=auto: no patch is loaded whose card holds a calibration (patches trained by this "
            "version have one if their clips moved); give a number."
        )
    if pair is not None:
        settings = measured(pair, settings, auto, pipe.calibration, config.fit)
    return settings, sources | dict.fromkeys(auto, "measured")


def measured(
    pair: Pair, settings: SamplerSettings, names: Collection[str], calibration: Calibration, fit: FitMode
) -> SamplerSettings:
    """Settings of a pair, `fps` and `motion_bucket_id` as its images and the patch's clips have it, where asked for.

    Raises:
        ValueError: for an image that cannot be read.
    """
    start, end = (
        np.asarray(fit_image(load_image(path), settings.height, settings.width, fit))
        for path in (pair.start, pair.end)
    )  # fmt: skip
    known = None if "fps" in names else settings.fps
    fps, bucket = estimate(calibration, distance(start, end), settings.num_frames, known)
    return replace(
        settings,
        fps=round(fps, 2) if "fps" in names else settings.fps,
        motion_bucket_id=round(bucket, 1) if "motion_bucket_id" in names else settings.motion_bucket_id,
    )
