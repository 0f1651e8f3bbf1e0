"""Adapters that act on one half of TRF's batch: on the rows that run forward in time, or on those that run backward.

Both halves lie in one UNet call, the rows that run forward first, and each adapter sees its own rows only. Whatever a
layer of SVD's UNet sees, contexts included, the batch is its slowest dimension (`[B, C]`, `[B F, C, h, w]`,
`[B, C, F, h, w]`, `[B h w, F, C]`): each of the B rows is one run of equal length.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from .adapters import BACKWARD_LAYER, acting, acting_at, is_plain, lora_layers, uneven_scales
from .two_unets import TwoUNets


class Halves:
    """The layers of a UNet that have adapters, looked up once for many calls: adapters that come later go unseen."""

    def __init__(self, unet: Any) -> None:
        """Look them up.

        Args:
            unet: a `UNetSpatioTemporalConditionModel`, or `TwoUNets`.
        """
        self._unet = unet
        self._layers = [layer for _, layer in lora_layers(unet)]
        self._in_chunks = bool(self._layers) and any(map(_cuts_batch, unet.modules()))

    @contextmanager
    def rows(self, forward: int, backward: int) -> Iterator[None]:
        """Let each adapter act on every row at the scale it has for that row's direction, inside the block.

        The block holds the UNet's call and, in training, the backward pass too: gradient checkpointing computes layers
        again there. Outside of such a block an adapter with a pair of scales acts on every row at scale 1. Of two
        UNets, each gets the rows of its direction.

        Fused adapters that differ between the halves have weights for either, and these are for inside of it only.

        Without gradients, what plain adapters make is added in place and in the base's precision: in float32, as PEFT
        does it, the widest layers of SVD in half precision would take several times the memory of the model without
        patches.

        Args:
            forward: number of rows of the UNet's batch that run forward in time; they come first.
            backward: number of those that run backward.

        Raises:
            ValueError: if the UNet cuts its batch into chunks.
        """
        with ExitStack() as undo:
            if isinstance(self._unet, TwoUNets):
                undo.enter_context(self._unet.rows(forward, backward))
            uneven, rows = uneven_scales(self._unet), (forward, backward)
            if all(pair[way] == 1 for pair in uneven.values() for way in (0, 1) if rows[way]):
                uneven = {}
            if uneven and self._in_chunks:
                raise ValueError(
                    "unet.enable_forward_chunking() cuts the batch apart, which patches that act on one half cannot "
                    "bear; call it with dim=1."
                )
            for layer in self._layers:
                own = {name: pair for name, pair in uneven.items() if name in layer.scaling}
                if hasattr(layer, BACKWARD_LAYER):
                    layer.forward = _by_own_weights(layer, rows)
                elif not layer.merged and (own or _is_wider(layer)):  # fused: its weights hold them already
                    layer.forward = _in_parts(layer, own, rows)
                else:
                    continue
                undo.callback(delattr, layer, "forward")
            yield


def _in_parts(layer: Any, pairs: Mapping[str, tuple[float, float]], rows: tuple[int, int]) -> Callable[..., Tensor]:
    """The forward pass of a layer, some of whose adapters have a scale each for the rows of either direction."""
    ways = [way for way in (0, 1) if rows[way]]
    names = acting(layer)
    whole = layer.forward

    def updated(x: Tensor, base: Tensor, way: int) -> Tensor:
        result = base
        for name in names:
            # B A x is linear in A x, which has only `rank` channels: that is where scaling costs least.
            scale = layer.scaling[name] * pairs.get(name, (1, 1))[way]
            if scale:
                first, second, dropout = (part[name] for part in (layer.lora_A, layer.lora_B, layer.lora_dropout))
                result = _plus(result, second, first(dropout(x.to(first.weight.dtype))) * scale)
        return result.to(base.dtype)

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        sizes = [len(x) // sum(rows) * rows[way] for way in ways]
        parts = x.split(sizes)
        if all(is_plain(layer, name) for name in names):
            base = layer.base_layer(x, *args, **kwargs)
            results = [updated(*one) for one in zip(parts, base.split(sizes), ways)]
            if not torch.is_grad_enabled():
                return base  # which they were added to
        else:
            results = []
            for part, way in zip(parts, ways):
                with acting_at(layer, {name: pair[way] for name, pair in pairs.items()}):
                    results.append(whole(part, *args, **kwargs))
        return torch.cat(results) if len(results) > 1 else results[0]

    return forward


def _by_own_weights(layer: Any, rows: tuple[int, int]) -> Callable[..., Tensor]:
    """The forward pass of a layer whose adapters are fused, in weights for the rows of either direction."""
    both = (layer.base_layer, getattr(layer, BACKWARD_LAYER))

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if not all(rows):
            return both[0 if rows[0] else 1](x, *args, **kwargs)
        sizes = [len(x) // sum(rows) * number for number in rows]
        if not all(_is_bare(own) and own.weight.dtype == x.dtype for own in both) or torch.is_autocast_enabled(
            x.device.type
        ):
            return torch.cat([own(part, *args, **kwargs) for own, part in zip(both, x.split(sizes))])
        # Into one output, for copies of the widest layers' would cost as much as many a layer.
        whole = x.new_empty(*x.shape[:-1], both[0].out_features)
        for own, part, into in zip(both, x.split(sizes), whole.split(sizes)):
            _linear(own, part.flatten(0, -2), into.flatten(0, -2))
        return whole

    return forward


def _linear(layer: nn.Linear, x: Tensor, into: Tensor) -> None:
    """A linear layer's output for rows `[N, C]`."""
    if layer.bias is None:
        torch.mm(x, layer.weight.T, out=into)
    else:
        torch.addmm(layer.bias, x, layer.weight.T, out=into)


def _plus(base: Tensor, second: Any, low: Tensor) -> Tensor:
    """What a plain adapter's second matrix makes of `low` added to the base's output; in place without gradients."""
    if torch.is_grad_enabled():
        return base + second(low)
    if not _calls_itself(second):
        return base.add_(second(low).to(base.dtype))
    low, weight = low.to(base.dtype), second.weight.to(base.dtype)
    if isinstance(second, nn.Linear):
        base.view(-1, base.shape[-1]).addmm_(low.flatten(0, -2), weight.T)
        return base
    return base.add_(functional_call(second, {"weight": weight}, low))


def _is_bare(layer: Any) -> bool:
    """Whether a layer is a matrix and no more: not packed, nothing done before it is called, no gradient to keep."""
    return type(layer) is nn.Linear and _calls_itself(layer) and not torch.is_grad_enabled()


def _calls_itself(module: nn.Module) -> bool:
    """Whether a module's weights are there without calling it; offloading replaces `forward`, which brings them."""
    return "forward" not in vars(module)


def _is_wider(layer: Any) -> bool:
    """Whether plain adapters would widen the output of a layer in half precision, and no gradient needs them to."""
    names = acting(layer)
    return (
        not torch.is_grad_enabled()
        and bool(names)
        and layer.get_base_layer().weight.dtype in (torch.float16, torch.bfloat16)
        and all(is_plain(layer, name) for name in names)
    )


def _cuts_batch(module: nn.Module) -> bool:
    """Whether a module of diffusers was told to do its batch in chunks."""
    told = vars(module)
    return told.get("_chunk_size") is not None and told["_chunk_dim"] == 0
