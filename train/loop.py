"""The training loop, readable top to bottom: batch -> loss -> backward -> step -> log -> save.

To resume, run the same command again. Ctrl-C and SIGTERM save a checkpoint and exit.
"""

from __future__ import annotations

import math
import signal
import traceback
from collections.abc import Iterable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from accelerate import Accelerator, DistributedType
from accelerate.utils import gather_object
from torch import nn
from torch.nn.utils import clip_grad_norm_

from ..trf.adapters import adapter_parameters, adapter_weights
from ..trf.patch import read_card, update_card
from ..trf.seeds import derived_seed
from ..trf.sharding import is_sharded, whole
from ..trf.sole import sole
from .average import Average
from .best import VALIDATION_FILE, Best, record, replay, trim
from .binding import binding_settings, validation_digest
from .checkpoint import CHECKPOINTS_FOLDER, check_binding, check_shared, list_checkpoints, resume, step_of
from .data import RankOrder, loader
from .fsdp import check_fsdp
from .guards import Guard
from .log import TrainingLog
from .memory import PRECISIONS
from .model import make_model
from .optim import make_optimizer, make_schedule, set_rate
from .plan import make_plan
from .processes import Agreement, StopRequest, check_processes, lost_process
from .saver import Saver
from .setup import make_accelerator, make_card, make_objective, make_samples, make_validator, shared_cache
from .zero import SplitOptimizer, ZeroAccelerator

if TYPE_CHECKING:
    from ..configs.training import TrainConfig


class Stopped(Exception):
    """Training was asked to stop and has saved a checkpoint; `number` is the signal."""

    def __init__(self, number: int, checkpoint: Path) -> None:
        super().__init__(f"stopped; run the same command again to go on from {checkpoint}.")
        self.number = number


def train(config: TrainConfig) -> Path:
    """Train a patch; returns its folder.

    Raises:
        ValueError: for settings that cannot work, or an output that another process is at.
        Stopped: after a signal, once a checkpoint is saved.
        FloatingPointError: if a loss, a gradient, or a weight that would be saved, is not finite.
        ChildProcessError: if a loader's worker or another rank is gone.
        OSError: if a checkpoint or patch cannot be written; the checkpoints before it are whole.
    """
    accelerator = make_accelerator(config)
    try:
        with sole(config.output) if accelerator.is_main_process and not config.dry_run else nullcontext():
            return _train(config, accelerator)
    except BaseException as error:
        if gone := lost_process(error, accelerator.num_processes):
            # A launcher ends the ranks that are left; they end by themselves, and have something to say.
            for number in StopRequest.signals:
                signal.signal(number, signal.SIG_IGN)
            traceback.clear_frames(error.__traceback__)
            raise ChildProcessError(f"{gone} The last checkpoint is whole: run again to resume from it.") from None
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
    if isinstance(accelerator, ZeroAccelerator):
        accelerator.check(config)
    elif accelerator.distributed_type == DistributedType.FSDP:
        check_fsdp(accelerator.state.fsdp_plugin.fsdp_version, config)
    plan = make_plan(config, accelerator.num_processes)
    accelerator.print(plan.text)
    patch_folder = config.output / "patch"
    if config.dry_run:
        return patch_folder

    checkpoints = config.output / CHECKPOINTS_FOLDER
    existing = list_checkpoints(checkpoints)
    check_shared(checkpoints, gather_object([step_of(existing[-1]) if existing else 0]))
    binding = binding_settings(config, plan)
    if existing:
        check_binding(existing[-1], binding)

    # 2. Data: conditioning from the cache
    cache = shared_cache(config, accelerator)
    samples = make_samples(config, cache, "train", per_step=plan.clips_per_step)

    # 3. Model, adapters (one, or one for each direction), optimizer
    unet, names, origin = make_model(config, accelerator, existing[-1] if existing else None)
    named = {f"{name}:{key}": one for name in names for key, one in adapter_weights(unet, name).items()}
    optimizer, rate = make_optimizer(named, config.optim), make_schedule(config.optim, config.steps)
    model, wrapped_optimizer = accelerator.prepare(unet, optimizer)
    # Sharding replaces the parameters.
    adapters = [adapter_parameters(unet, name) for name in names]
    parameters = [parameter for own in adapters for parameter in own]
    sharded = is_sharded(unet.parameters())
    average = Average(parameters, optimizer, config.ema)

    # 4. Resume
    binding["cache"] = cache.name
    log = TrainingLog(accelerator, config, Guard(lambda number: samples.clip_of(number).clip_id))
    start = 0
    if existing:
        check_binding(existing[-1], binding)
        state = resume(existing[-1], unet, optimizer, average, config.direction, origin)
        start = log.start = state["step"]
        if start > config.steps:
            raise ValueError(f"steps={config.steps}, but {existing[-1]} has {start}; give more, or another output.")
        if accelerator.scaler is not None and state["scaler"]:
            accelerator.scaler.load_state_dict(state["scaler"])
        log.metrics = read_card(existing[-1]).metrics
        accelerator.print(f"resumed from {existing[-1]}.")
    split = None
    if isinstance(accelerator, ZeroAccelerator) and accelerator.stage == 2:
        split = wrapped_optimizer = SplitOptimizer(accelerator, unet, optimizer)
        model = split.model
    best = Best(config.validation.best, config.validation.patience)
    validations, manner = config.output / VALIDATION_FILE, validation_digest(config)
    validated = replay(best, validations, start if existing else -1, manner)
    if best.step and _is_anothers(config.output / "best", best.step, start):
        best = Best(config.validation.best, config.validation.patience)
    log.metrics |= {f"validation {name}": value for name, value in (validated or {}).items()}
    if accelerator.is_main_process:
        trim(validations, start if existing else -1)
        config.output.mkdir(parents=True, exist_ok=True)
        config.save(config.output / "train.yaml", "train")
    if existing and (best.exhausted or start == config.steps) and is_finished(patch_folder, start):
        accelerator.print("all steps are done and the patch is there.")
        if accelerator.is_main_process and update_card(patch_folder, make_card(config, plan, unet.config)):
            accelerator.print("its card now has the new domain and sampler settings.")
        return patch_folder

    # 5. The loop
    order = RankOrder(
        start=start, stop=config.steps, batch_size=config.batch_size, accumulation=config.gradient_accumulation,
        rank=accelerator.process_index, num_processes=accelerator.num_processes,
    )  # fmt: skip
    batches = iter(loader(samples, order, config.loader_workers))
    dtype = PRECISIONS[config.precision]
    objective = make_objective(config, dtype)
    card = make_card(config, plan, unet.config)
    validator = make_validator(config, cache, card, dtype, accelerator.device)

    most = math.inf if config.optim.max_grad_norm is None else config.optim.max_grad_norm
    skipping = config.on_nonfinite == "skip" and accelerator.scaler is None

    saver = Saver(
        output=config.output, accelerator=accelerator, unet=unet, parameters=parameters,
        optimizer=split.whole if split else lambda: optimizer, average=average, origin=origin, card=card,
        metrics=lambda: log.metrics, binding=binding, keep=config.checkpoint.keep, review=log.review,
    )  # fmt: skip

    def due(step: int) -> bool:
        every = config.validation.every
        return every > 0 and (step == config.steps or step % every == 0)

    def validate(step: int) -> bool:
        """Whether it was done; not if a signal came, and then on no process."""
        log.review()  # what is not finite is no validation's business, and never the best
        outcome = None
        # A sharded UNet runs on all processes or on none, whatever signal one of them may have got.
        if accelerator.is_main_process or sharded:
            # Compiled blocks are for training: validation calls them in other ways.
            with average.applied(), torch.compiler.set_stance("force_eager" if config.compile else "default"):
                outcome = validator.run(unet, stopping=lambda: bool(stop.number) and not sharded)
                if outcome is not None:
                    # Devices may round differently, but all processes that hold a part have to save it, or none.
                    metrics = gather_object([outcome.metrics])[0] if sharded else outcome.metrics
                    if accelerator.is_main_process:
                        log.validation(step, outcome)
                    if step and best.update(step, metrics):
                        saver.best(step)
                    if accelerator.is_main_process:
                        record(validations, step, metrics, manner)
        aborted = accelerator.is_main_process and outcome is None and bool(validator.clips)
        return not _told_by_any(accelerator, aborted)

    agreed = Agreement(accelerator.num_processes)
    with StopRequest() as stop, log:
        # Of the base model, for comparison; or that of a checkpoint after which a run was killed.
        if _told_by_any(accelerator, due(start) and validated is None):
            with log.paused():
                if not validate(start):
                    if existing:
                        raise Stopped(stop.number or signal.SIGTERM, existing[-1])
                    raise KeyboardInterrupt(stop.number or signal.SIGTERM)
        done, stop_at = start, start if _told_by_any(accelerator, best.exhausted) else config.steps
        for step in range(start, stop_at):
            torch.manual_seed(derived_seed(config.seed, "dropout", step, accelerator.process_index))
            set_rate(optimizer, rate(step))
            for micro in range(config.gradient_accumulation):
                batch = next(batches).to(accelerator.device)
                last = micro == config.gradient_accumulation - 1
                with (
                    nullcontext() if last else accelerator.no_sync(model),
                    objective.losses(model, unet, batch, step) as losses,
                ):
                    accelerator.backward(losses.total / config.gradient_accumulation)
                log.add(step, losses)
            accelerator.unscale_gradients()
            norms = (split.clip if split else clip)(adapters, most)
            norm = torch.stack(norms).norm()
            # In fp16 the gradient scaler skips by itself.
            if not skipping or bool(norm.isfinite()):
                wrapped_optimizer.step()
                if accelerator.scaler is None or bool(norm.isfinite()):
                    average.update()
            wrapped_optimizer.zero_grad()

            done = step + 1
            log.step(done, plan.clips_per_step, rate(step), norm)
            last_step = done == config.steps
            with log.paused():
                saved = saver.checkpoint(done) if last_step or done % config.checkpoint.every == 0 else None
                if due(done) and not validate(done):  # it comes when the run goes on
                    raise Stopped(stop.number or signal.SIGTERM, saved or saver.checkpoint(done))
            requested = agreed(stop.number)
            if requested and not last_step:
                raise Stopped(requested, saved or saver.checkpoint(done))
            if due(done) and _told_by_any(accelerator, best.exhausted):
                accelerator.print(f"stopped early: no validation since step {best.step} had a better {best.metric}.")
                if saved is None:
                    saver.checkpoint(done)
                break
    agreed.close()

    # 6. The patch
    return saver.patch(done)


def clip(adapters: Iterable[Sequence[nn.Parameter]], most: float) -> list[torch.Tensor]:
    """Clip each adapter's gradient by itself, of those that have one; returns their norms before."""
    trained = [own for own in adapters if any(one.grad is not None for one in own)]
    return [whole(clip_grad_norm_(own, most)) for own in trained]


def _told_by_any(accelerator: Accelerator, said: bool) -> bool:
    """Whether any rank says so, the same on all."""
    if accelerator.num_processes == 1:
        return said
    return bool(accelerator.gather(torch.tensor([said], device=accelerator.device)).any())


def _is_anothers(kept: Path, step: int, start: int) -> bool:
    """Whether the patch kept as the best is not that of `step`, by another metric; one after `start` comes again."""
    if not kept.is_dir():
        return True
    of = read_card(kept).training_steps
    return of != step and of <= start


def is_finished(patch: Path, steps: int) -> bool:
    """Whether a patch of so many steps is there."""
    return patch.is_dir() and read_card(patch).training_steps == steps
