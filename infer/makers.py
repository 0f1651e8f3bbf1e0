"""Where an evaluated video comes from: the model with its patches, a baseline, or the VAE's copy of the truth.

A maker is given a few cases that can be sampled together, and gives a video for each.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..data_prep.frames import to_tensor, to_uint8
from ..trf.base import load_component
from ..trf.conditioning import encode_condition
from ..trf.pipeline import TimeReversalFusionPipeline
from .baselines import BASELINES, BaselineName
from .cases import Case, Footage
from .models import load_pipeline
from .record import DTYPES, device_of, precision_of

if TYPE_CHECKING:
    from ..configs.schema import EvaluateConfig


class Made(NamedTuple):
    """A video, and what was measured while it was made."""

    frames: np.ndarray
    """`[F, H, W, 3]`, 0 to 255; uint8, or float where it is not finite."""
    metrics: dict[str, float]
    unet_calls: int


Maker = Callable[[Sequence[Case], Sequence[Footage]], list[Made]]


def maker_of(config: EvaluateConfig) -> Maker:
    """What the settings ask to be measured, with its weights loaded.

    Raises:
        FileNotFoundError: if a patch folder is no patch.
        ValueError: if a patch does not fit, or the device is not there.
    """
    if config.baseline:
        return baseline_maker(config.baseline)
    if config.reconstruct:
        dtype = DTYPES[precision_of(config)]
        vae = load_component(config.model, "vae", dtype=dtype, revision=config.revision, variant=config.variant)
        return reconstruction_maker(vae.to(device_of(config)), config.decode_chunk_size, config.decode_tile_size)
    pipe = load_pipeline(config)
    pipe.set_progress_bar_config(desc="sampling", leave=False, disable=None)
    return sampling_maker(pipe, low_memory=config.low_memory, decode_chunk_size=config.decode_chunk_size)


def sampling_maker(pipe: TimeReversalFusionPipeline, *, low_memory: bool, decode_chunk_size: int) -> Maker:
    """TRF: all cases in one call of the pipeline, each with its own fps, motion and generator."""

    def make(cases: Sequence[Case], footage: Sequence[Footage]) -> list[Made]:
        of_pairs = {
            "fps": [case.settings.fps for case in cases],
            "motion_bucket_id": [case.settings.motion_bucket_id for case in cases],
        }
        result = pipe(
            [Image.fromarray(one.start) for one in footage],
            [Image.fromarray(one.end) for one in footage],
            **{**asdict(cases[0].settings), **of_pairs},
            generator=[torch.Generator("cpu").manual_seed(case.seed) for case in cases],
            low_memory=low_memory,
            decode_chunk_size=decode_chunk_size,
            output_type="np",
        )
        apart: list[dict[str, float]] = [{}] * len(cases)
        if result.disagreement is not None:
            apart = [{"disagreement": one} for one in result.disagreement.tolist()]
        return [Made(_pixels(video), one, result.unet_calls) for video, one in zip(result.frames, apart)]

    return make


def baseline_maker(name: BaselineName) -> Maker:
    """A baseline, from the bounds alone."""

    def make(cases: Sequence[Case], footage: Sequence[Footage]) -> list[Made]:
        return [Made(BASELINES[name](one.start, one.end, len(one.truth)), {}, 0) for one in footage]

    return make


def reconstruction_maker(vae: torch.nn.Module, decode_chunk_size: int, decode_tile_size: int | None = None) -> Maker:
    """The truth, encoded and decoded again: a ceiling for whatever is sampled in the VAE's latents."""
    pipe = TimeReversalFusionPipeline(vae, None, None, None, None)
    pipe.decode_tile_size = decode_tile_size

    @torch.no_grad()
    def make(cases: Sequence[Case], footage: Sequence[Footage]) -> list[Made]:
        made = []
        for one in footage:
            pixels, step = to_tensor(one.truth).to(pipe.vae.device), decode_chunk_size
            chunks = (pixels[first : first + step] for first in range(0, len(pixels), step))
            latents = torch.cat([encode_condition(chunk, pipe.vae) for chunk in chunks])
            latents *= pipe.vae.config.scaling_factor
            made.append(Made(to_uint8(pipe.decode_latents(latents[None], step)[0]), {}, 0))
        return made

    return make


def _pixels(video: np.ndarray) -> np.ndarray:
    """`[0, 1]` as uint8, unless something is not finite."""
    scaled = (video * 255).round()
    return scaled.astype(np.uint8) if np.isfinite(scaled).all() else scaled
