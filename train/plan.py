"""What a training run will do, worked out before anything heavy is loaded, and printed by `--dry-run`."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..data_prep.dataset import load_clips
from ..data_prep.shapes import Shape, Size, shapes_of
from ..trf.adapters import lora_layers
from ..trf.base import empty_unet, load_config
from ..trf.patch import inject_patch
from .buckets import buckets_of, schedule
from .memory import estimate
from .origin import check_origin

if TYPE_CHECKING:
    from ..configs.training import TrainConfig


_DIRECTIONS = {
    "forward": "forward: clips as filmed",
    "backward": "backward: clips reversed in time",
    "both": "both: every clip as filmed for one adapter, and reversed in time for another",
    "either": "either: each clip as filmed or reversed in time, by a coin",
}


@dataclass(frozen=True)
class Plan:
    """The arithmetic of a run."""

    train_clips: int
    validation_clips: int
    num_frames: int
    """Of the bucket with most clips; `height` and `width` too."""
    height: int
    width: int
    clips_per_step: int
    epochs: float
    trainable_parameters: int
    adapted_modules: int
    frozen_parameters: int
    text: str
    """All of it, for people."""


def make_plan(config: TrainConfig, num_processes: int) -> Plan:
    """Work out the plan of a run.

    Raises:
        ValueError: if the dataset has no training clips, or the settings do not fit model or data.
    """
    train, validation = load_clips(config.data, "train"), load_clips(config.data, "validation")
    if not len(train):
        raise ValueError(f"data={str(config.data)!r}: the dataset has no training clips.")
    unet = empty_unet(config.model, revision=config.revision)
    frozen = sum(parameter.numel() for parameter in unet.parameters())
    lora = config.lora
    adapters = inject_patch(unet, config.direction, **lora.model_dump(exclude={"init"}))
    check_origin(unet, lora, config.quantization)
    sizes = [sum(parameter.numel() for parameter in own) for own in adapters.values()]
    modules = sum(1 for _ in lora_layers(unet))
    shapes = shapes_of(train)
    buckets = buckets_of(shapes)
    vae = load_config(config.model, "vae", revision=config.revision)
    factor = 2 ** (len(vae["block_out_channels"]) - 1)
    pixels = {Size(shape.height, shape.width) for shape in (*shapes, *shapes_of(validation))}
    if odd := [str(size) for size in sorted(pixels) if size.height % factor or size.width % factor]:
        raise ValueError(
            f"data={str(config.data)!r}: its clips are {' and '.join(odd)}, and this model's VAE needs multiples of "
            f"{factor}; prepare them again with such sizes."
        )
    per_step = config.batch_size * config.gradient_accumulation * num_processes
    epochs = config.steps * per_step / len(train)
    ramp = f"{config.optim.warmup_steps} warm-up steps"
    if config.optim.warmup_steps >= config.steps:
        ramp += ": LONGER THAN THE RUN, the rate never gets there; lower optim.warmup_steps"
    validated = config.validation.every and len(validation)
    lines = [
        f"clips        {len(train)} for training, {len(validation)} held out; "
        + (str(buckets[0].shape) if len(buckets) == 1 else f"of {len(buckets)} shapes"),
        *_bucket_lines(config.steps, {bucket.shape: len(bucket.clips) for bucket in buckets}),
        f"a step       {config.batch_size} a batch x {config.gradient_accumulation} accumulated x {num_processes} "
        f"processes = {per_step} clips",
        f"steps        {config.steps}, {epochs:.1f} epochs",
        f"direction    {_DIRECTIONS[config.direction]}",
        f"patch        {lora.kind} on {modules} modules ({lora.targets}), rank {lora.rank}: "
        + (f"{len(sizes)} adapters of " if len(sizes) > 1 else "")
        + f"{sizes[0]:,} trainable parameters",
        *_start(config),
        f"base         {config.model}: {frozen:,} frozen parameters, "
        + (f"in {config.quantization}, " if config.quantization else "")
        + f"precision {config.precision}"
        + (
            ": WITHOUT gradient_checkpointing, SO WIDENED WEIGHTS ARE KEPT for the backward pass, more than fp8 saves"
            if config.quantization == "fp8" and not config.gradient_checkpointing
            else ""
        ),
        f"optimizer    {config.optim.name}, peak learning rate {config.optim.lr:g}, {config.optim.schedule}, {ramp}",
        f"output       {config.output}: checkpoint every {config.checkpoint.every} steps, "
        + (f"validation every {config.validation.every}" if validated else "no validation"),
    ]
    if config.dry_run:
        largest = max((bucket.shape for bucket in buckets), key=math.prod)
        latents = (largest.num_frames, vae["latent_channels"], largest.height // factor, largest.width // factor)
        memory = estimate(config, dict(unet.config), latents, num_processes=num_processes)
        of_shape = f" of {largest}" if len(buckets) > 1 else ""
        lines += [f"memory       of each GPU at the peak of a step{of_shape}, estimated, GiB:", *memory.table()]
    return Plan(
        train_clips=len(train),
        validation_clips=len(validation),
        num_frames=buckets[0].shape.num_frames,
        height=buckets[0].shape.height,
        width=buckets[0].shape.width,
        clips_per_step=per_step,
        epochs=epochs,
        trainable_parameters=sum(sizes),
        adapted_modules=modules,
        frozen_parameters=frozen,
        text="\n".join(lines),
    )


def _bucket_lines(steps: int, clips: dict[Shape, int]) -> list[str]:
    """A line for each bucket, if there are several: its clips and its steps."""
    if len(clips) == 1:
        return []
    given = schedule(tuple(clips.values())).totals(steps)
    return [
        f"bucket       {shape}: {count} clips, {own} of {steps} steps" + ("" if own else ": NONE IN THIS RUN")
        for (shape, count), own in zip(clips.items(), given)
    ]


def _start(config: TrainConfig) -> list[str]:
    if config.lora.init == "plain":
        return []
    decay, start = config.optim.weight_decay, f"LoftQ: what {config.quantization} takes from the weights"
    if config.lora.init == "pissa":
        wearing = f", WHICH optim.weight_decay={decay:g} WEARS AWAY; set it to 0" if decay else ""
        start = f"PiSSA: the weights' principal part{wearing}"
    return [f"start        {start}; the saved patch has rank {2 * config.lora.rank}"]
