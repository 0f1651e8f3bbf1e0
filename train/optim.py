"""Optimizers, and the learning rate as a function of the step, so that resuming needs no scheduler state."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from ..configs.schema import OptimSettings


def make_optimizer(parameters: Iterable[nn.Parameter], settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimizer that `settings.name` asks for."""
    arguments: dict[str, Any] = dict(
        lr=settings.lr, betas=tuple(settings.betas), eps=settings.eps, weight_decay=settings.weight_decay
    )
    if settings.name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer: torch.optim.Optimizer = AdamW8bit(list(parameters), **arguments)
        return optimizer
    return torch.optim.AdamW(list(parameters), **arguments)


def learning_rate(step: int, total: int, settings: OptimSettings) -> float:
    """Learning rate of optimizer step `step` (counted from 0) of `total`: linear warm-up, then the schedule."""
    if step < settings.warmup_steps:
        return settings.lr * (step + 1) / settings.warmup_steps
    if settings.schedule == "constant":
        return settings.lr
    progress = (step - settings.warmup_steps) / max(1, total - settings.warmup_steps)
    factor = 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
    return settings.lr * factor
