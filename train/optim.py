"""Optimizers, their state as plain tensors, and the learning rate as a function of the step, which needs no state."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
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


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """State by `<parameter number>.<name>`, tensors (on the CPU) and plain numbers apart."""
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, float] = {}
    for number, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{name}"] = value.detach().cpu().clone().contiguous()
            else:
                numbers[f"{number}.{name}"] = value
    return tensors, numbers


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, float]
) -> None:
    """Give an optimizer of the same parameters the state that `optimizer_state` returned, to the bit."""
    parameters = _parameters(optimizer)
    # torch keeps its step counters on the CPU, unless the step is one fused kernel.
    counters_move = bool(optimizer.defaults.get("fused"))
    for key, value in {**tensors, **numbers}.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        if isinstance(value, torch.Tensor) and (name != "step" or counters_move):
            value = value.to(parameter.device)
        optimizer.state[parameter][name] = value


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
