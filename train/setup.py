"""What a training run is made of, each part from the settings: processes, cached samples, validator, patch card."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import WandBTracker
from accelerate.utils import (
    DistributedDataParallelKwargs,
    GradientAccumulationPlugin,
    InitProcessGroupKwargs,
    gather_object,
    parse_flag_from_env,
)

from ..data_prep.calibration import calibrate
from ..data_prep.dataset import load_clips
from ..data_prep.latents import CacheKey, build_cache, check_cache, find_cache, finish_cache
from ..data_prep.motion import statistics
from ..data_prep.plan import Split
from ..data_prep.shapes import shapes_of
from ..trf.base import essential_config, fingerprint, load_config, resolved_revision
from ..trf.patch import PatchCard
from ..trf.settings import resolve
from ..version import __version__
from .buckets import buckets_of
from .data import CachedSamples, Clip
from .objective import Objective
from .plan import Plan
from .validate import Validator
from .zero import ZeroAccelerator

if TYPE_CHECKING:
    from ..configs.training import TrainConfig


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Precision, tracker and process group of a run.

    Raises:
        ValueError: if Weights & Biases are asked for and not installed.
    """
    if config.wandb and find_spec("wandb") is None:  # accelerate would leave it out and say nothing
        raise ValueError("wandb=true needs the package wandb: pip install wandb, or leave it out.")
    kind = ZeroAccelerator if parse_flag_from_env("ACCELERATE_USE_DEEPSPEED") else Accelerator
    return kind(
        mixed_precision=config.precision,
        log_with=["tensorboard", WandBTracker("trfpp")] if config.wandb else "tensorboard",
        project_dir=str(config.output),
        # Said here, or a launcher's environment would divide the gradient a second time.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            DistributedDataParallelKwargs(find_unused_parameters=config.objective.alternate_directions),
            # Ranks wait for validation on the first one, and for each other's share of the cache.
            InitProcessGroupKwargs(timeout=timedelta(hours=3)),
        ],
    )


def cache_of(config: TrainConfig) -> Path | None:
    """The cache that a run reads: the one it names, or that of its dataset and model if there is one yet.

    Raises:
        ValueError: if the named one is another model's.
    """
    if config.cache is not None:
        check_cache(config.cache, config.model, config.revision)
    return config.cache or find_cache(config.data, config.model, config.revision)


def shared_cache(config: TrainConfig, accelerator: Accelerator) -> Path:
    """The cache that all processes read; if there is none yet, each of them encodes its share of it.

    Raises:
        ValueError: if the named one is another model's, or one is there for some processes only.
    """
    cache = cache_of(config)
    if len(set(gather_object([cache and cache.name]))) > 1:
        raise ValueError(
            f"data={str(config.data)!r}: its cache is there for some processes only; give all of them one folder that "
            "they share, or copies with their caches."
        )
    if cache is None:
        accelerator.print("the dataset's conditioning is not cached yet for this model: encoding it once.")
        cache = _make_cache(config, accelerator)
    return cache


def _make_cache(config: TrainConfig, accelerator: Accelerator) -> Path:
    """Cache the dataset's conditioning on all processes; returns its folder."""
    key = CacheKey(model=config.model, revision=config.revision, variant=config.variant)
    folder = build_cache(
        config.data,
        key,
        device=accelerator.device,
        progress=accelerator.is_main_process,
        share=(accelerator.process_index, accelerator.num_processes),
    )
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        finish_cache(config.data, key)
    accelerator.wait_for_everyone()
    return folder


def make_samples(
    config: TrainConfig, cache: Path, split: Split, *, per_step: int, dropout: bool = True
) -> CachedSamples:
    """Samples of one split of the dataset, so many a step; without `dropout` the conditions are always there."""
    clips = load_clips(config.data, split)
    columns = zip(clips["clip_id"], clips["fps"], clips["motion_bucket"], shapes_of(clips))
    return CachedSamples(
        [Clip(*values) for values in columns],
        cache,
        scaling_factor=load_config(config.model, "vae", revision=config.revision)["scaling_factor"],
        sigma_mean=config.objective.sigma_mean,
        sigma_std=config.objective.sigma_std,
        conditioning_dropout=config.objective.conditioning_dropout if dropout else 0.0,
        seed=config.seed,
        direction=config.direction,
        guided=config.objective.rotated_attention,
        per_step=per_step,
    )


def make_objective(config: TrainConfig, dtype: torch.dtype) -> Objective:
    """What a run's batches are trained by."""
    return Objective(
        direction=config.direction,
        dtype=dtype,
        fusion=config.objective.fusion,
        alternate=config.objective.alternate_directions,
        rotated=config.objective.rotated_attention,
    )


def make_validator(
    config: TrainConfig, cache: Path, card: PatchCard, dtype: torch.dtype, device: torch.device
) -> Validator:
    """The validator of a run, of patches such as `card` describes.

    Its pairs are the first held-out clips; of several shapes, the first one of each, then the second one of each, ….
    """
    clips = load_clips(config.data, "validation")
    recommended, _ = resolve({}, config.sampler.model_dump(exclude_none=True), {})
    ranked = [
        (rank, own, place)
        for own, bucket in enumerate(buckets_of(shapes_of(clips)))
        for rank, place in enumerate(bucket.clips)
    ]
    return Validator(
        model=config.model,
        revision=config.revision,
        variant=config.variant,
        card=card,
        clips=[clips[place] for _, _, place in sorted(ranked)[: config.validation.pairs]],
        samples=make_samples(config, cache, "validation", per_step=1, dropout=False),
        num_inference_steps=min(config.validation.num_inference_steps, recommended.num_inference_steps),
        decode_chunk_size=config.validation.decode_chunk_size,
        seed=config.validation.seed,
        dtype=dtype,
        device=device,
    )


def make_card(config: TrainConfig, plan: Plan, unet_config: Mapping[str, Any]) -> PatchCard:
    """The patch card of a run, as far as it is known before training."""
    clips = load_clips(config.data, "train")
    resolved = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return PatchCard(
        trfpp_version=__version__,
        base_model=config.model,
        base_revision=resolved_revision(config.model, config.revision),
        base_variant=config.variant,
        unet_fingerprint=fingerprint(unet_config),
        unet_config=essential_config(unet_config),
        domain=config.domain,
        direction=config.direction,
        rotated_attention=config.objective.rotated_attention,
        height=plan.height,
        width=plan.width,
        num_frames=plan.num_frames,
        fps=round(float(np.median(clips["fps"])), 3),
        motion=statistics(clips["motion_score"], clips["motion_bucket"]),
        calibration=calibrate(
            list(zip(clips["bound_flow"], clips["bound_difference"])),
            clips["motion_score"],
            clips["fps"],
            [len(indices) for indices in clips["frame_indices"]],
            clips["video"],
        ),
        sampler=config.sampler.model_dump(mode="json", exclude_none=True),
        training_digest=hashlib.sha256(resolved.encode()).hexdigest(),
    )
