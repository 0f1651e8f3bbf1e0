"""Tensors that several processes hold a part of each (FSDP2's): read whole, and written from a whole one."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def whole(value: Tensor) -> Tensor:
    """The whole tensor; of a sharded one every process has to ask at once."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def assign(target: Tensor, value: Tensor) -> None:
    """Copy a whole tensor, the same on all processes, into a tensor that may be sharded."""
    with torch.no_grad():
        if isinstance(target, DTensor):
            # src_data_rank=None: each takes its part of what it has, nothing is sent.
            value = distribute_tensor(
                value.to(target.device, target.dtype), target.device_mesh, target.placements, src_data_rank=None
            )
        target.copy_(value)


def like(value: Tensor, target: Tensor) -> Tensor:
    """A whole tensor laid out as `target` is, if it has its shape."""
    if not isinstance(target, DTensor) or value.shape != target.shape:
        return value.to(target.device)
    return distribute_tensor(value.to(target.device), target.device_mesh, target.placements, src_data_rank=None)


def is_sharded(parameters: Iterable[Tensor]) -> bool:
    """Whether any of them is, by FSDP2 or by DeepSpeed's ZeRO-3."""
    return any(isinstance(parameter, DTensor) or hasattr(parameter, "ds_tensor") for parameter in parameters)
