"""One stage of pretraining: steps of AdamW on a loss that depends on the step's number alone, with exact resuming.

Whatever is drawn in a step must come from generators seeded with its number, so a stage that was stopped and started
again from its checkpoint gives the same bits as one that ran through.
"""

from __future__ import annotations

import csv
import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..trf.replace import replacing
from .optim import optimizer_state, restore_optimizer
from .processes import StopRequest


@dataclass(frozen=True, kw_only=True)
class StageSettings:
    """How a stage is optimised."""

    steps: int
    """Optimizer steps."""
    lr: float
    """Peak learning rate; it falls to zero along a cosine."""
    warmup_steps: int = 100
    """Steps of linear warm-up."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Decay of AdamW's moments."""
    eps: float = 1e-8
    """Added to its denominator."""
    max_grad_norm: float = 1.0
    """Clip the gradient's norm to this."""
    ema: float = 0.0
    """Decay of the averaged weights that the stage ends with; 0 ends with the last weights."""
    checkpoint_every: int = 1000
    """Steps between checkpoints."""
    log_every: int = 50
    """Steps between lines of the curve."""


class StageStopped(Exception):
    """A signal asked for an end; the checkpoint is written."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def fit(
    name: str,
    modules: Sequence[nn.Module],
    losses: Callable[[int], Mapping[str, Tensor]],
    settings: StageSettings,
    folder: Path,
) -> None:
    """Minimise `losses(step)["loss"]` over the modules' parameters, in place.

    Args:
        name: of the stage, and of its files.
        modules: what is trained; all parameters that require gradients.
        losses: from the step's number to named scalars; `loss` is minimised, all are written to the curve.
        settings: the optimisation.
        folder: holds `<name>.csv`, the curve, and `<name>.checkpoint.safetensors`.

    Raises:
        StageStopped: after Ctrl-C or SIGTERM, once the checkpoint is written.
        FloatingPointError: if the loss is not finite.
    """
    parameters = [p for module in modules for p in module.parameters() if p.requires_grad]
    fused = parameters[0].is_cuda
    optimizer = torch.optim.AdamW(
        parameters, settings.lr, settings.betas, settings.eps, settings.weight_decay, fused=fused
    )
    average = [p.detach().clone() for p in parameters] if settings.ema else []
    checkpoint, curve = folder / f"{name}.checkpoint.safetensors", folder / f"{name}.csv"
    done, began = 0, 0
    sums: dict[str, Tensor] = {}
    if checkpoint.is_file():
        done, began, sums = _load(checkpoint, parameters, average, optimizer)
    _trim(curve, done)
    since, resumed = time.perf_counter(), done
    with StopRequest() as stop, tqdm(total=settings.steps, initial=done, desc=name, unit="step", disable=None) as bar:
        for step in range(done, settings.steps):
            for group in optimizer.param_groups:
                group["lr"] = cosine(step, settings)
            values = losses(step)
            torch.autograd.backward(values["loss"])
            nn.utils.clip_grad_norm_(parameters, settings.max_grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if average:
                # A young average would remember the initial weights: its decay starts low.
                decay = min(settings.ema, (step + 1) / (step + 10))
                torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
            for key, value in values.items():
                sums[key] = sums[key] + value.detach() if key in sums else value.detach().clone()
            bar.update()
            done = step + 1
            line = done % settings.log_every == 0 or done == settings.steps
            asked = stop.number  # read once: a signal that comes later is the next step's
            keep = asked or done % settings.checkpoint_every == 0 or done == settings.steps
            if (line or keep) and not math.isfinite(total := float(sums["loss"])):
                raise FloatingPointError(f"{name}: the loss became {total} by step {done}; lower its lr.")
            if line:
                means = {key: float(sums[key]) / (done - began) for key in values}
                rate = (done - max(began, resumed)) / (time.perf_counter() - since)
                _append(curve, {"step": done, "steps per second": rate, **means})
                bar.set_postfix({key: f"{value:.4f}" for key, value in means.items()})
                if bar.disable:
                    figures = ", ".join(f"{key} {value:.4f}" for key, value in means.items())
                    print(f"{name} step {done} of {settings.steps}: {figures}, {rate:.1f} steps/s")
                sums, since, began = {}, time.perf_counter(), done
            if keep:
                _save(checkpoint, done, began, sums, parameters, average, optimizer)
            if asked:
                raise StageStopped(asked)
    with torch.no_grad():
        for parameter, mean in zip(parameters, average):
            parameter.copy_(mean)


def cosine(step: int, settings: StageSettings) -> float:
    """Learning rate of a step: linear warm-up, then a cosine to zero at the last step."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    progress = (step - settings.warmup_steps) / max(1, settings.steps - settings.warmup_steps)
    return settings.lr * 0.5 * (1 + math.cos(math.pi * progress))


def _save(
    file: Path,
    step: int,
    began: int,
    sums: Mapping[str, Tensor],
    parameters: Sequence[Tensor],
    average: Sequence[Tensor],
    optimizer: torch.optim.Optimizer,
) -> None:
    """Write a checkpoint; `sums` are of the losses since step `began`, for the curve's next line."""
    tensors = {f"optimizer.{key}": value for key, value in optimizer_state(optimizer)[0].items()}
    tensors |= {f"sum.{key}": value.cpu() for key, value in sums.items()}
    for name, values in (("weight", parameters), ("average", average)):
        tensors |= {f"{name}.{number}": value.detach().cpu().contiguous() for number, value in enumerate(values)}
    with replacing(file, settled=True) as beside:
        save_file(tensors, beside, {"step": str(step), "began": str(began)})


def _load(
    file: Path, parameters: Sequence[Tensor], average: Sequence[Tensor], optimizer: torch.optim.Optimizer
) -> tuple[int, int, dict[str, Tensor]]:
    """Restore a checkpoint; gives what `_save` was given as step, began and sums."""
    tensors = load_file(file)
    with torch.no_grad():
        for name, values in (("weight", parameters), ("average", average)):
            for number, value in enumerate(values):
                value.copy_(tensors[f"{name}.{number}"])
    state = {key.removeprefix("optimizer."): value for key, value in tensors.items() if key.startswith("optimizer.")}
    restore_optimizer(optimizer, state, {})
    device = parameters[0].device
    sums = {key.removeprefix("sum."): value.to(device) for key, value in tensors.items() if key.startswith("sum.")}
    with safe_open(file, "pt") as opened:
        return int(opened.metadata()["step"]), int(opened.metadata()["began"]), sums


def bind(folder: Path, settings: Mapping[str, Any]) -> None:
    """Keep the settings that decide a run's result in its folder; a run with others does not go on there.

    Args:
        folder: of the run, made if it is not there.
        settings: plain JSON values, by name.

    Raises:
        ValueError: naming each that differs.
    """
    own = json.loads(json.dumps(settings))  # as it will be read back
    file = folder / "settings.json"
    if file.is_file():
        before = json.loads(file.read_text(encoding="utf-8"))
        if differing := sorted(key for key in own.keys() | before.keys() if own.get(key) != before.get(key)):
            raise ValueError(
                f"output={str(folder)!r}: a run with another {', '.join(differing)} lies there; restore the settings "
                f"or choose another output."
            )
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(file) as beside:
        beside.write_text(json.dumps(own, indent=2) + "\n", encoding="utf-8")


def _append(curve: Path, row: Mapping[str, float]) -> None:
    new = not curve.is_file()
    with curve.open("a", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(row))
        if new:
            writer.writeheader()
        writer.writerow({key: value if key == "step" else f"{value:.6g}" for key, value in row.items()})


def _trim(curve: Path, done: int) -> None:
    """Drop the curve's lines after the checkpoint that a run goes on from."""
    text = curve.read_text(encoding="utf-8") if curve.is_file() else ""
    # What follows the last line end was cut off as it was written, by a full disk or a kill.
    lines = text[: text.rfind("\n") + 1].splitlines()
    if not lines:
        curve.unlink(missing_ok=True)
        return
    kept = [lines[0], *(row for row in lines[1:] if int(row.split(",")[0]) <= done)]
    with replacing(curve) as beside:
        beside.write_text("\n".join(kept) + "\n", encoding="utf-8")
