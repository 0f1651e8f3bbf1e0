"""The training loop, readable top to bottom: batch -> loss -> backward -> step -> log -> save.

To resume, run the same command again. Ctrl-C and SIGTERM save a checkpoint and exit.
"""

from __future__ import annotations

import hashlib
import json
import traceback
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import GradientAccumulationPlugin, InitProcessGroupKwargs
from torch.nn.utils import clip_grad_norm_

from ..data_prep.dataset import load_clips
from ..data_prep.latents import CacheKey, build_cache, check_cache, find_cache, finish_cache
from ..data_prep.motion import statistics
from ..data_prep.plan import Split
from ..trf.base import essential_config, fingerprint, load_component, load_config, resolved_revision
from ..trf.halves import on_halves
from ..trf.patch import PatchCard, inject_patch, read_card, save_patch, update_card
from ..trf.seeds import derived_seed
from ..version import __version__
from .checkpoint import check_binding, list_checkpoints, resume, save_checkpoint
from .data import CachedSamples, Clip, RankOrder, loader
from .log import TrainingLog
from .objective import denoising_loss
from .optim import learning_rate, make_optimizer
from .plan import Plan, make_plan
from .processes import StopRequest, check_processes
from .validate import Validator

if TYPE_CHECKING:
    from ..configs.schema import TrainConfig

# Settings a resumed run may change: they touch neither the weights nor the order of clips (steps: see below).
_FREE = {
    "output",
    "data",
    "cache",
    "steps",
    "log_every",
    "checkpoint",
    "validation",
    "loader_workers",
    "num_processes",
    "sampler",
    "dry_run",
    "domain",
}
# Their product is what counts, and is compared in their place.
_BATCH = {"batch_size", "gradient_accumulation"}


class Stopped(Exception):
    """Training was asked to stop and has saved a checkpoint; `number` is the signal."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped; run the same command again to go on from {checkpoint}.")
        self.number = number


def train(config: TrainConfig) -> Path:
    """Train a patch; returns its folder.

    Raises:
        ValueError: for settings that cannot work.
        Stopped: after a signal, once a checkpoint is saved.
    """
    accelerator = make_accelerator(config)
    try:
        return _train(config, accelerator)
    except BaseException as error:
        traceback.clear_frames(error.__traceback__)
        raise
    finally:
        # The wrapped model goes before the process group: torch ends the group's threads while the model's reducer is
        # the last to hold it with Python's lock taken, which one of those threads may be waiting for.
        accelerator.free_memory()
        accelerator.end_training()


def _train(config: TrainConfig, accelerator: Accelerator) -> Path:
    # 1. Processes and plan
    check_processes(accelerator.num_processes, config.num_processes)
    plan = make_plan(config, accelerator.num_processes)
    accelerator.print(plan.text)
    patch_folder = config.output / "patch"
    if config.dry_run:
        return patch_folder

    checkpoints = config.output / "checkpoints"
    existing = list_checkpoints(checkpoints)
    binding = binding_settings(config, plan)
    if existing:
        check_binding(existing[-1], binding)

    # 2. Data: conditioning from the cache; if there is none yet, each process encodes its share
    if config.cache is not None:
        check_cache(config.cache, config.model, config.revision)
    cache = config.cache or find_cache(config.data, config.model, config.revision)
    if cache is None:
        accelerator.print("the dataset's conditioning is not cached yet for this model: encoding it once.")
        cache = make_cache(config, accelerator)
    samples = make_samples(config, cache, "train")

    # 3. Model, adapters (one, or one for each direction), optimizer
    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[config.precision]
    unet = load_component(config.model, "unet", dtype=dtype, revision=config.revision, variant=config.variant)
    adapters = inject_patch(unet, config.direction, seed=config.seed, **config.lora.model_dump())
    parameters = [parameter for own in adapters.values() for parameter in own]
    if config.gradient_checkpointing:
        unet.enable_gradient_checkpointing()
    unet.train()
    optimizer = make_optimizer(parameters, config.optim)
    model, wrapped_optimizer = accelerator.prepare(unet, optimizer)

    # 4. Resume
    binding["cache"] = cache.name
    log = TrainingLog(accelerator, config)
    start = 0
    if existing:
        check_binding(existing[-1], binding)
        state = resume(existing[-1], unet, optimizer, config.direction)
        start = log.start = state["step"]
        if start > config.steps:
            raise ValueError(f"steps={config.steps}, but {existing[-1]} has {start}; give more, or another output.")
        if accelerator.scaler is not None and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        log.metrics = read_card(existing[-1]).metrics
        accelerator.print(f"resumed from {existing[-1]}.")
        if start == config.steps and is_finished(patch_folder, start):
            accelerator.print("all steps are done and the patch is there.")
            if accelerator.is_main_process and update_card(patch_folder, make_card(config, plan, unet.config)):
                accelerator.print("its card now has the new domain and sampler settings.")
            return patch_folder
    if accelerator.is_main_process:
        config.output.mkdir(parents=True, exist_ok=True)
        config.save(config.output / "train.yaml", "train")

    # 5. The loop
    order = RankOrder(
        start=start, stop=config.steps, batch_size=config.batch_size, accumulation=config.gradient_accumulation,
        rank=accelerator.process_index, num_processes=accelerator.num_processes,
    )  # fmt: skip
    batches = iter(loader(samples, order, config.loader_workers))
    validator = make_validator(config, cache, dtype, accelerator.device)
    card = make_card(config, plan, unet.config)
    ways = torch.zeros(2, 2, device=accelerator.device)  # losses and their number, forward and backward, for the log

    def save(step: int) -> Path:
        path = checkpoints / f"step-{step:06d}"
        if not all(bool(parameter.isfinite().all()) for parameter in parameters):
            raise FloatingPointError(
                f"the adapter holds values that are not finite at step {step}, which was not saved; lower optim.lr. "
                "Running again resumes from the last checkpoint, which is whole."
            )
        if accelerator.is_main_process:
            scaler = accelerator.scaler.state_dict() if accelerator.scaler is not None else {}
            now = card.model_copy(update=dict(training_steps=step, metrics=log.metrics))
            save_checkpoint(checkpoints, step, unet, now, optimizer, scaler, binding, config.checkpoint.keep)
        accelerator.wait_for_everyone()
        return path

    def validate(step: int) -> None:
        if accelerator.is_main_process:
            outcome = validator.run(unet, stopping=lambda: bool(stop.number))
            if outcome is not None:
                log.validation(step, outcome)
        accelerator.wait_for_everyone()

    with StopRequest() as stop, log:
        if config.validation.every and start == 0:
            with log.paused():
                validate(0)  # the base model, for comparison
        for step in range(start, config.steps):
            torch.manual_seed(derived_seed(config.seed, "dropout", step, accelerator.process_index))
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, config.steps, config.optim)
            for micro in range(config.gradient_accumulation):
                batch = next(batches).to(accelerator.device)
                last = micro == config.gradient_accumulation - 1
                with nullcontext() if last else accelerator.no_sync(model), on_halves(unet, batch.backward):
                    losses = denoising_loss(model, batch, dtype)
                    # Each adapter has rows of its own, as many as any other: the sum of their means.
                    accelerator.backward(losses.mean() * len(adapters) / config.gradient_accumulation)
                log.add(batch.sigma, losses.detach())
                ways.index_add_(1, batch.backward.long(), torch.stack([losses.detach(), torch.ones_like(losses)]))
            if config.optim.max_grad_norm is not None:
                accelerator.unscale_gradients()
                norms = [clip_grad_norm_(own, config.optim.max_grad_norm) for own in adapters.values()]
                log.grad_norm = torch.stack(norms).norm()
            wrapped_optimizer.step()
            wrapped_optimizer.zero_grad()

            done = step + 1
            log.step(done, plan.clips_per_step, learning_rate(step, config.steps, config.optim))
            last_step = done == config.steps
            if config.direction in ("both", "either") and (last_step or done % config.log_every == 0):
                log.metrics |= log_directions(accelerator, ways, done)
                ways.zero_()
            with log.paused():
                saved = save(done) if last_step or done % config.checkpoint.every == 0 else None
                if config.validation.every and (last_step or done % config.validation.every == 0):
                    validate(done)
            requested = _agreed(accelerator, stop.number)
            if requested and not last_step:
                raise Stopped(requested, saved or save(done))

    # 6. The patch
    if accelerator.is_main_process:
        final = card.model_copy(update=dict(training_steps=config.steps, metrics=log.metrics))
        save_patch(patch_folder, unet, final)
    accelerator.wait_for_everyone()
    return patch_folder


def _agreed(accelerator: Accelerator, number: int) -> int:
    """The signal any rank has received, the same on all, so that all stop at one step; 0 for none."""
    if accelerator.num_processes == 1:
        return number
    return int(accelerator.gather(torch.tensor([number], device=accelerator.device)).max())


def log_directions(accelerator: Accelerator, ways: torch.Tensor, step: int) -> dict[str, float]:
    """Log and return the mean loss of each direction, from the losses' sums and numbers `[2, (forward, backward)]`."""
    sums, numbers = accelerator.reduce(ways).tolist()
    means = {f"loss {name}": s / n for name, s, n in zip(("forward", "backward"), sums, numbers) if n}
    accelerator.log({f"train/{name}": mean for name, mean in means.items()}, step=step)
    return {f"train {name}": mean for name, mean in means.items()}


def make_accelerator(config: TrainConfig) -> Accelerator:
    """Precision, tracker and process group of a run."""
    return Accelerator(
        mixed_precision=config.precision,
        log_with="tensorboard",
        project_dir=str(config.output),
        # Said here, or a launcher's environment would divide the gradient a second time.
        gradient_accumulation_plugin=GradientAccumulationPlugin(num_steps=1),
        kwargs_handlers=[
            # Ranks wait for validation on the first one, and for each other's share of the cache.
            InitProcessGroupKwargs(timeout=timedelta(hours=3)),
        ],
    )


def make_cache(config: TrainConfig, accelerator: Accelerator) -> Path:
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


def make_samples(config: TrainConfig, cache: Path, split: Split, dropout: bool = True) -> CachedSamples:
    """Samples of one split of the dataset; without `dropout` the conditions are always there."""
    clips = load_clips(config.data, split)
    columns = zip(clips["clip_id"], clips["fps"], clips["motion_bucket"])
    return CachedSamples(
        [Clip(*values) for values in columns],
        cache,
        scaling_factor=load_config(config.model, "vae", revision=config.revision)["scaling_factor"],
        sigma_mean=config.objective.sigma_mean,
        sigma_std=config.objective.sigma_std,
        conditioning_dropout=config.objective.conditioning_dropout if dropout else 0.0,
        seed=config.seed,
        direction=config.direction,
    )


def make_validator(config: TrainConfig, cache: Path, dtype: torch.dtype, device: torch.device) -> Validator:
    """The validator of a run, on the first held-out clips."""
    clips = load_clips(config.data, "validation")
    return Validator(
        model=config.model,
        revision=config.revision,
        variant=config.variant,
        clips=[clips[i] for i in range(min(config.validation.pairs, len(clips)))],
        samples=make_samples(config, cache, "validation", dropout=False),
        num_inference_steps=config.validation.num_inference_steps,
        seed=config.validation.seed,
        dtype=dtype,
        device=device,
    )


def binding_settings(config: TrainConfig, plan: Plan) -> dict[str, Any]:
    """The settings two runs must share for one to continue the other, by dotted name."""
    values = dict(_leaves(config.model_dump(mode="json", exclude=_FREE | _BATCH)))
    clips = load_clips(config.data, "train")
    columns = ("clip_id", "fps", "motion_bucket", "height", "width")
    rows = json.dumps([list(clips[name]) for name in columns])
    values["clips in data"] = hashlib.sha256(rows.encode()).hexdigest()[:12]
    values["clips per step"] = plan.clips_per_step
    # A constant rate does not look ahead, so such a run may be given more steps.
    return values if config.optim.schedule == "constant" else {**values, "steps": config.steps}


def _leaves(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def is_finished(patch: Path, steps: int) -> bool:
    """Whether a patch of so many steps is there."""
    return patch.is_dir() and read_card(patch).training_steps == steps


def make_card(config: TrainConfig, plan: Plan, unet_config: Mapping[str, Any]) -> PatchCard:
    """The patch card of a run, as far as it is known before training."""
    clips = load_clips(config.data, "train")
    resolved = json.dumps(config.model_dump(mode="json"), sort_keys=True)
    return PatchCard(
        trfpp_version=__version__,
        base_model=config.model,
        base_revision=resolved_revision(config.model, config.revision),
        unet_fingerprint=fingerprint(unet_config),
        unet_config=essential_config(unet_config),
        domain=config.domain,
        direction=config.direction,
        height=plan.height,
        width=plan.width,
        num_frames=plan.num_frames,
        fps=round(float(np.median(clips["fps"])), 3),
        motion=statistics(clips["motion_score"], clips["motion_bucket"]),
        sampler=config.sampler.model_dump(exclude_none=True),
        training_digest=hashlib.sha256(resolved.encode()).hexdigest(),
    )
