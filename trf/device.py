"""Which device to run on, and how much of its memory was used."""

from __future__ import annotations

import os
from pathlib import Path

import torch


def best_device(asked: str | None = None) -> torch.device:
    """The device asked for, else the best there is: CUDA, then Apple's MPS, then the CPU.

    Of several CUDA devices a process that a launcher started takes the one of its local rank.

    Raises:
        ValueError: if the device asked for is not there.
    """
    if asked is not None and not (asked == "cuda" and torch.cuda.is_available()):
        try:
            return torch.empty(0, device=asked).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(f"device={asked!r}: not available here: {str(error).splitlines()[0]}") from None
    if torch.cuda.is_available():
        rank = os.environ.get("LOCAL_RANK")
        return torch.device("cuda" if rank is None else f"cuda:{int(rank) % torch.cuda.device_count()}")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def forget_peak_memory(device: torch.device) -> None:
    """Let `peak_memory` begin anew."""
    counter = Path("/proc/self/clear_refs")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif device.type == "cpu" and counter.is_file():
        counter.write_text("5")


def peak_memory(device: torch.device) -> int | None:
    """Bytes at most: on CUDA what this process had allocated, on a CPU what it held (Linux; elsewhere not known)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    if device.type != "cpu" or not status.is_file():
        return None
    lines = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
    return int(lines["VmHWM"].split()[0]) * 1024
