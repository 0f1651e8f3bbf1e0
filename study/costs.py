"""What a run costs, in seconds, roughly: measured for the miniature (12 frames of 64 x 64) on two CPU cores.

The study corrects these by what its own runs have taken.
"""

from __future__ import annotations

from typing import Literal

from ..configs.schema import SamplerOverrides
from ..trf.schedule import unet_calls
from ..trf.settings import SamplerSettings, resolve
from ..trf.strategies import STRATEGIES

Maker = Literal["baseline", "reconstruct", "sample"]

START = 4.0
"""Loading models and data."""
FILM, CLIP, CACHED = 0.04, 0.15, 0.35
"""Rendering a film, cutting it, encoding it."""
UNET_ROW = 0.05
"""One UNet forward, a row of the batch."""
TRAINED_ROW, FULL_ROW = 0.13, 0.18
"""One forward and backward, a row of the batch: with a patch, and of all weights."""
SIGMAS, RHO = (700, 0.002), 7
"""SVD's noise levels, largest and least, and how they are spaced."""
CODED, MEASURED = 0.4, 0.25
"""Encoding or decoding a video, and all metrics of it."""


def of_films(films: int) -> float:
    """Rendering and writing films."""
    return films * FILM


def of_prep(films: int) -> float:
    """Cutting films into a dataset."""
    return START + films * CLIP


def of_cache(clips: int) -> float:
    """Encoding a dataset's clips."""
    return START + clips * CACHED


def of_training(steps: int, rows: int, *, full: bool) -> float:
    """A training of so many rows a step, of a patch or of all weights."""
    return START + steps * rows * (FULL_ROW if full else TRAINED_ROW)


def of_evaluation(pairs: int, maker: Maker, sampler: SamplerOverrides) -> float:
    """Making and measuring pairs."""
    settings, _ = resolve(sampler.model_dump(exclude_none=True), {}, {})
    strategy = STRATEGIES[settings.sampler]
    twice = 1.0 if strategy.cfg_plus else _guided(settings) if settings.max_guidance_scale > 1 else 0.0
    rows = (1 + twice) * unet_calls(strategy.plan(settings))
    made = {"baseline": 0, "reconstruct": 2 * CODED, "sample": CODED + rows * UNET_ROW}
    return START + pairs * (MEASURED + made[maker])


def _guided(settings: SamplerSettings) -> float:
    """Share of the noise levels that are guided, of SVD's own (arXiv 2206.00364, eq. 5)."""
    most, least = SIGMAS[0] ** (1 / RHO), SIGMAS[1] ** (1 / RHO)
    last = max(1, settings.num_inference_steps - 1)
    sigmas: list[float] = [(most + step / last * (least - most)) ** RHO for step in range(settings.num_inference_steps)]
    inside = [settings.min_guidance_sigma <= sigma <= settings.max_guidance_sigma for sigma in sigmas]
    return sum(inside) / len(inside)
