"""Checkpoints: a patch folder that also holds what training needs to go on as if it had never stopped.

    checkpoints/step-000500/
        patch.json, adapter_config.json, adapter_model.safetensors   a complete patch, usable as it is
        optimizer.safetensors                                        the optimizer's tensors
        average.safetensors                                          the trained weights, where the patch has an average
        state.json                                                   step, digest of the settings, the rest

The order of clips and every draw follow from the step alone (`train.data`), so no generator state is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..trf.adapters import load_adapter
from ..trf.patch import (
    Direction,
    PatchCard,
    PatchFiles,
    adapters_of,
    patch_files,
    read_card,
    weight_files,
    write_patch_files,
)
from ..trf.replace import remove, replacing
from .average import Average
from .optim import optimizer_state, restore_optimizer
from .origin import Origin

CHECKPOINTS_FOLDER = "checkpoints"
"""In the folder of a run."""
OPTIMIZER_FILE = "optimizer.safetensors"
AVERAGE_FILE = "average.safetensors"
STATE_FILE = "state.json"
FROM_ZERO = Origin()
_NAME = re.compile(r"step-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Snapshot:
    """What a checkpoint holds of a run, copied from wherever its parts lie."""

    patch: PatchFiles
    optimizer: dict[str, Tensor]
    numbers: dict[str, float]
    """Plain numbers of the optimizer's state."""
    average: dict[str, Tensor]
    """See `Average.state`."""


def snapshot(
    unet: Any,
    direction: Direction,
    optimizer: torch.optim.Optimizer,
    average: Average,
    origin: Origin = FROM_ZERO,
) -> Snapshot:
    """The patch `default` and its training as they are now; of a sharded UNet all processes have to ask at once.

    Args:
        unet: with the patch.
        direction: of the patch.
        optimizer: the plain optimizer, not accelerate's wrapper.
        average: whose weights the patch gets.
        origin: that the patch started from.
    """
    with average.applied():
        patch = origin.saved(patch_files(unet, direction))
    tensors, numbers = optimizer_state(optimizer)
    return Snapshot(patch=patch, optimizer=tensors, numbers=numbers, average=average.state())


def save_checkpoint(
    folder: Path,
    step: int,
    content: Snapshot,
    card: PatchCard,
    scaler: Mapping[str, Any],
    settings: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step` beside and rename it, then delete all but the newest `keep`.

    Args:
        folder: holds all checkpoints of the run.
        step: optimizer steps done.
        content: see `snapshot`.
        card: of the patch as it is now.
        scaler: state of the fp16 gradient scaler, empty without one.
        settings: those a resumed run must share.
        keep: number of checkpoints kept.
    """
    target = folder / f"step-{step:06d}"
    for leftover in folder.glob(".step-*"):  # of a run that was killed while it saved
        remove(leftover)
    with replacing(target, settled=True) as beside:
        beside.mkdir()
        write_patch_files(beside, content.patch, card)
        if content.average:
            save_file(content.average, beside / AVERAGE_FILE)
        save_file(content.optimizer, beside / OPTIMIZER_FILE)
        state = {"step": step, "optimizer": content.numbers, "scaler": dict(scaler), "settings": dict(settings)}
        (beside / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for old in list_checkpoints(folder)[:-keep]:
        remove(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and (path / STATE_FILE).is_file()]
    return sorted(found, key=step_of)


def step_of(checkpoint: Path) -> int:
    """The step a checkpoint is named after."""
    return int(checkpoint.name.removeprefix("step-"))


def check_shared(folder: Path, steps: Sequence[int]) -> None:
    """Check that all processes go on from one step; from different weights they would average what cannot be averaged.

    Args:
        folder: where each looks for checkpoints.
        steps: of the newest checkpoint each found, by rank; 0 for none.

    Raises:
        ValueError: naming the first that differs.
    """
    for rank, step in enumerate(steps):
        if step != steps[0]:
            raise ValueError(
                f"{folder}: rank 0 would start from step {steps[0]}, rank {rank} from step {step}; give all processes "
                "one output folder that they share."
            )


def check_binding(checkpoint: Path, settings: Mapping[str, Any]) -> None:
    """Check that a checkpoint was made with these settings, of those that both name.

    Raises:
        ValueError: naming each that differs.
    """
    saved = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))["settings"]
    differing = [
        f"{key} (was {saved[key]!r}, is {settings[key]!r})"
        for key in sorted(saved.keys() & settings.keys())
        if saved[key] != settings[key]
    ]
    if differing:
        raise ValueError(
            f"{checkpoint}: made with other settings: {', '.join(differing)}; restore them or choose another output."
        )


def resume(
    checkpoint: Path,
    unet: Any,
    optimizer: torch.optim.Optimizer,
    average: Average,
    direction: Direction = "forward",
    origin: Origin = FROM_ZERO,
) -> dict[str, Any]:
    """Load a checkpoint into the patch `default` and the optimizer, to the bit; returns its state (step, scaler).

    Raises:
        ValueError: if its weights are not those of the patch.
    """
    state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    if (saved := read_card(checkpoint).direction) != direction:
        raise ValueError(f"{checkpoint}: trained with direction={saved}, not {direction}; choose another output.")
    for part, file in weight_files(checkpoint).items():
        try:
            load_adapter(unet, origin.trained(load_file(file)), adapters_of(direction)[part])
        except ValueError as error:
            raise ValueError(f"{checkpoint}: {error}") from None
    if average.differs:
        average.load(load_file(checkpoint / AVERAGE_FILE))
    restore_optimizer(optimizer, load_file(checkpoint / OPTIMIZER_FILE), state["optimizer"])
    return state
