"""Optimizers by name, their state as plain tensors, and the learning rate as a function of the step, without state."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..trf.sharding import like, whole

if TYPE_CHECKING:
    from ..configs.training import OptimSettings

SECOND = (".lora_B.weight",)
"""Names of the matrices that start at zero; LoRA+ (arXiv 2402.12354) trains them faster."""


def make_optimizer(weights: Mapping[str, nn.Parameter], settings: OptimSettings) -> torch.optim.Optimizer:
    """The optimizer that `settings.name` asks for, in the state to train in.

    Args:
        weights: what is trained, by name.
        settings: the optimizer's.
    """
    arguments: dict[str, Any] = {
        "lr": settings.lr, "betas": tuple(settings.betas), "eps": settings.eps, "weight_decay": settings.weight_decay,
    }  # fmt: skip
    groups = _groups(weights, settings.lora_plus)
    optimizer: torch.optim.Optimizer
    if settings.name == "adamw8bit":
        from bitsandbytes.optim import AdamW8bit

        optimizer = AdamW8bit(groups, **arguments)
    elif settings.name == "paged_adamw8bit":
        from bitsandbytes.optim import PagedAdamW8bit

        optimizer = PagedAdamW8bit(groups, **arguments)
    elif settings.name == "prodigy":
        from prodigyopt import Prodigy

        optimizer = Prodigy(groups, **arguments, use_bias_correction=True, safeguard_warmup=True)
    elif settings.name == "adamw_schedulefree":
        from schedulefree import AdamWScheduleFree

        schedule_free = AdamWScheduleFree(groups, **arguments)
        schedule_free.train()
        optimizer = schedule_free
    else:
        # One kernel, whose step counters lie beside the weights: torch's other ways read them every step.
        optimizer = torch.optim.AdamW(groups, **arguments, fused=True)
    return optimizer


def _groups(weights: Mapping[str, nn.Parameter], lora_plus: float) -> list[dict[str, Any]]:
    """One group, or two where the second matrices have a rate of their own."""
    if lora_plus == 1:
        return [{"params": list(weights.values()), "rate_factor": 1.0}]
    second = [parameter for name, parameter in weights.items() if name.endswith(SECOND)]
    first = [parameter for name, parameter in weights.items() if not name.endswith(SECOND)]
    return [{"params": first, "rate_factor": 1.0}, {"params": second, "rate_factor": lora_plus}]


def make_schedule(settings: OptimSettings, total: int) -> Callable[[int], float]:
    """The learning rate of optimizer step 0, 1, … of `total`: linear warm-up, then one of diffusers' schedules."""
    from diffusers.optimization import get_scheduler

    warmup = settings.warmup_steps
    # Only its closed form is used: what has no state needs no saving.
    nobody = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    factor = get_scheduler(
        settings.schedule, nobody, num_warmup_steps=warmup, num_training_steps=max(total, warmup + 1),
        num_cycles=settings.cycles, power=settings.power,
    ).lr_lambdas[0]  # fmt: skip
    # diffusers' warm-up would begin with a step of rate 0.
    return lambda step: settings.lr * ((step + 1) / warmup if step < warmup else float(factor(step)))


def set_rate(optimizer: torch.optim.Optimizer, rate: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = rate * group["rate_factor"]


def optimizer_state(optimizer: torch.optim.Optimizer) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """State by `<parameter number>.<name>` and `group <number>.<name>`: tensors, on the CPU, and plain numbers.

    Tensors are whole: of sharded parameters all processes have to ask at once.
    """
    tensors: dict[str, torch.Tensor] = {}
    numbers: dict[str, float] = {}
    for number, parameter in enumerate(_parameters(optimizer)):
        for name, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                tensors[f"{number}.{name}"] = whole(value.detach()).to("cpu", copy=True).contiguous()
            else:
                numbers[f"{number}.{name}"] = value
    for number, group in enumerate(optimizer.param_groups):
        # Prodigy and schedule-free keep counters and estimates there.
        counted = {name: value for name, value in group.items() if isinstance(value, int | float) and name != "lr"}
        numbers |= {f"group {number}.{name}": value for name, value in counted.items()}
    return tensors, numbers


def restore_optimizer(
    optimizer: torch.optim.Optimizer, tensors: Mapping[str, torch.Tensor], numbers: Mapping[str, float]
) -> None:
    """Give an optimizer of the same parameters the state that `optimizer_state` returned, to the bit."""
    parameters = _parameters(optimizer)
    # torch keeps its step counters on the CPU, unless the step is one fused kernel.
    counters_move = bool(optimizer.defaults.get("fused"))
    for key, value in {**tensors, **numbers}.items():
        owner, _, name = key.partition(".")
        if owner.startswith("group "):
            optimizer.param_groups[int(owner.removeprefix("group "))][name] = value
            continue
        parameter = parameters[int(owner)]
        if isinstance(value, torch.Tensor) and (name != "step" or counters_move):
            value = like(value, parameter)
        optimizer.state[parameter][name] = value


def _parameters(optimizer: torch.optim.Optimizer) -> list[nn.Parameter]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]
