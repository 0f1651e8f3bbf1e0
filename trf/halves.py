"""Adapters that act on one half of TRF's batch: on the rows that run forward in time, or on those that run backward.

Both halves lie in one UNet call, so a plain LoRA's contribution is scaled row by row; with other kinds each layer is
called once for the rows of either direction. Whatever a layer of SVD's UNet sees, contexts included, the batch is its
slowest dimension (`[B, C]`, `[B F, C, h, w]`, `[B, C, F, h, w]`, `[B h w, F, C]`): each of the B rows is one run of
equal length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from .adapters import lora_layers, uneven_scales
from .two_unets import TwoUNets


@contextmanager
def on_halves(unet: Any, backward: Tensor, turned: int | None = None) -> Iterator[None]:
    """Let each adapter act on every row at the scale it has for that row's direction, inside the block.

    The block holds the UNet's call and, in training, the backward pass too: gradient checkpointing computes layers
    again there. Outside of such a block an adapter with a pair of scales acts on every row at scale 1. Adapters whose
    scale is the same for both halves cost nothing here. Of two UNets, each gets the rows of its direction.

    Args:
        unet: a `UNetSpatioTemporalConditionModel`, or `TwoUNets`.
        backward: whether each row of the batch runs backward in time, `[B]` bool, on the device of the UNet's inputs.
        turned: how many of them do, where the caller knows, so that nobody waits for the device to tell.

    Raises:
        ValueError: if the UNet cuts its batch into chunks.
    """
    with ExitStack() as hooks:
        if isinstance(unet, TwoUNets):
            hooks.enter_context(unet.rows(backward))
        uneven = uneven_scales(unet)
        if turned in (0, len(backward)) and all(pair[turned > 0] == 1 for pair in uneven.values()):
            uneven = {}  # such as a backward patch on backward rows: nothing to do
        if uneven:
            _check_whole_batches(unet)
            factors = {name: torch.where(backward, pair[1], pair[0]) for name, pair in uneven.items()}
            ways: list[Tensor] | None = None
            for _, layer in lora_layers(unet):
                own = [name for name in uneven if name in layer.scaling]
                if all(_is_plain(layer, name) for name in own):
                    for name in own:
                        # B A x is linear in A x, which has only `rank` channels: that is where scaling costs least.
                        hooks.callback(layer.lora_A[name].register_forward_hook(_scale_rows(factors[name])).remove)
                else:
                    ways = ways or rows_of_ways(backward, turned)
                    layer.forward = _in_two_calls(layer, layer.forward, {name: uneven[name] for name in own}, ways)
                    hooks.callback(delattr, layer, "forward")
        yield


def rows_of_ways(backward: Tensor, turned: int | None = None) -> list[Tensor]:
    """The numbers of the rows that run forward, and of those that run backward, in their order.

    Args:
        backward: whether each row does, `[B]` bool.
        turned: how many do, see `on_halves`.
    """
    if turned is None:
        turned = int(backward.sum())
    rows = backward.int().argsort(stable=True)
    return [rows[: len(rows) - turned], rows[len(rows) - turned :]]


def _is_plain(layer: Any, name: str) -> bool:
    """Whether an adapter adds `B A x` to the layer's output and nothing else."""
    return name in getattr(layer, "lora_A", {}) and name not in layer.lora_variant and not layer.lora_bias.get(name)


def _scale_rows(scales: Tensor) -> Callable[[Any, Any, Tensor], Tensor]:
    def hook(module: Any, inputs: Any, output: Tensor) -> Tensor:
        rows = output.unflatten(0, (len(scales), -1))
        return (rows * scales.to(output.dtype).view(-1, *[1] * output.ndim)).flatten(0, 1)

    return hook


def _in_two_calls(
    layer: Any, forward: Callable[..., Tensor], pairs: Mapping[str, tuple[float, float]], ways: Sequence[Tensor]
) -> Callable[..., Tensor]:
    """The layer's forward for adapters of any kind: the rows of either direction apart, each with its own scales."""
    home = torch.cat(list(ways)).argsort()

    def split(inputs: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rows = inputs.unflatten(0, (len(home), -1))
        parts = []
        for way, numbers in enumerate(ways):
            if len(numbers):
                with _acting(layer, {name: pair[way] for name, pair in pairs.items()}):
                    part = forward(rows[numbers].flatten(0, 1), *args, **kwargs)
                parts.append(part.unflatten(0, (len(numbers), -1)))
        return torch.cat(parts)[home].flatten(0, 1)

    return split


@contextmanager
def _acting(layer: Any, scales: Mapping[str, float]) -> Iterator[None]:
    """Let a layer's adapters act at these scales, at zero not at all: what multiplies weights is no base at scale 0."""
    active, before = layer.active_adapters, {name: layer.scaling[name] for name in scales}
    layer._active_adapter = [name for name in active if scales.get(name) != 0]
    for name, scale in scales.items():
        layer.set_scale(name, scale)
    try:
        yield
    finally:
        layer._active_adapter = active
        layer.scaling.update(before)


def _check_whole_batches(unet: Any) -> None:
    for module in unet.modules():
        if getattr(module, "_chunk_size", None) is not None and module._chunk_dim == 0:
            raise ValueError(
                "unet.enable_forward_chunking() cuts the batch apart, which patches that act on one half cannot bear; "
                "call it with dim=1."
            )
