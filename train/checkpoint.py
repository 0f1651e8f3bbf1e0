"""Checkpoints: a patch folder that also holds what training needs to go on as if it had never stopped.

    checkpoints/step-000500/
        patch.json, adapter_config.json, adapter_model.safetensors   a complete patch, usable as it is
        optimizer.safetensors                                        the optimizer's tensors
        state.json                                                   step, digest of the settings, the rest

The order of clips and every draw follow from the step alone (`train.data`), so no generator state is kept.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from ..trf.adapters import STATE_PREFIX, adapter_state
from ..trf.patch import Direction, PatchCard, adapters_of, read_card, weight_files, write_patch_files
from ..trf.replace import remove, replacing
from .optim import optimizer_state, restore_optimizer

OPTIMIZER_FILE = "optimizer.safetensors"
STATE_FILE = "state.json"
_NAME = re.compile(r"step-(\d+)")


def save_checkpoint(
    folder: Path,
    step: int,
    unet: Any,
    card: PatchCard,
    optimizer: torch.optim.Optimizer,
    scaler: Mapping[str, Any],
    settings: Mapping[str, Any],
    keep: int,
) -> Path:
    """Write the checkpoint of `step` beside and rename it, then delete all but the newest `keep`.

    Args:
        folder: holds all checkpoints of the run.
        step: optimizer steps done.
        unet: with the patch `default`.
        card: of the patch as it is now.
        optimizer: the plain optimizer, not accelerate's wrapper.
        scaler: state of the fp16 gradient scaler, empty without one.
        settings: those a resumed run must share.
        keep: number of checkpoints kept.
    """
    target = folder / f"step-{step:06d}"
    for leftover in folder.glob(".step-*"):  # of a run that was killed while it saved
        remove(leftover)
    with replacing(target) as beside:
        beside.mkdir()
        write_patch_files(beside, unet, card)
        tensors, numbers = optimizer_state(optimizer)
        save_file(tensors, beside / OPTIMIZER_FILE)
        state = {"step": step, "optimizer": numbers, "scaler": dict(scaler), "settings": dict(settings)}
        (beside / STATE_FILE).write_text(json.dumps(state, indent=2) + "\n", encoding="utf-8")
    for old in list_checkpoints(folder)[:-keep]:
        remove(old)
    return target


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    found = [path for path in folder.glob("step-*") if _NAME.fullmatch(path.name) and (path / STATE_FILE).is_file()]
    return sorted(found, key=lambda path: int(path.name.removeprefix("step-")))


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
    checkpoint: Path, unet: Any, optimizer: torch.optim.Optimizer, direction: Direction = "forward"
) -> dict[str, Any]:
    """Load a checkpoint into the patch `default` and the optimizer, to the bit; returns its state (step, scaler).

    Raises:
        ValueError: if its weights are not those of the patch.
    """
    state: dict[str, Any] = json.loads((checkpoint / STATE_FILE).read_text(encoding="utf-8"))
    if (saved := read_card(checkpoint).direction) != direction:
        raise ValueError(f"{checkpoint}: trained with direction={saved}, not {direction}; choose another output.")
    parameters = dict(unet.named_parameters())
    for part, file in weight_files(checkpoint).items():
        name = adapters_of(direction)[part]
        weights = load_file(file)
        if weights.keys() != adapter_state(unet, name).keys():
            raise ValueError(f"{checkpoint}: its weights are not those of this adapter.")
        with torch.no_grad():
            for key, value in weights.items():
                parameters[_live_name(key, name)].copy_(value)
    restore_optimizer(optimizer, load_file(checkpoint / OPTIMIZER_FILE), state["optimizer"])
    return state


def _live_name(key: str, adapter: str) -> str:
    """Parameter name in the UNet of a saved weight: `….lora_A.weight` is `….lora_A.<adapter>.weight` there."""
    path, _, leaf = key.removeprefix(STATE_PREFIX).rpartition(".")
    return f"{path}.{adapter}.{leaf}"
