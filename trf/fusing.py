"""Adapters added to the weights, so that they cost nothing per step.

Where they act differently on TRF's two halves a layer gets weights for either; `halves.Halves.rows` hands the rows out.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

from .adapters import BACKWARD_LAYER, acting_at, active_scales, is_fused, lora_layers, uneven_scales


def fuse(unet: Any) -> None:
    """Add the active adapters, at their scales, to the base weights: no cost per step any more.

    Layers on whose halves they differ hold their weights twice from then on.

    Raises:
        ValueError: if no adapter is active, adapters are fused already, the result is not finite, or the weights are
            quantised or offloaded one by one. The UNet is left as it was, up to rounding.
    """
    if not active_scales(unet):
        raise ValueError("no active patch to fuse; load one first.")
    if is_fused(unet):
        raise ValueError("patches are fused already; call unfuse_patches() first.")
    _check_weights(unet)
    try:
        for layer, forward, backward in _scaled(unet):
            if forward != backward:
                setattr(layer, BACKWARD_LAYER, _merged_copy(layer, backward))
            with acting_at(layer, forward):
                layer.merge(safe_merge=True)
    except BaseException:
        unfuse(unet)
        raise


def unfuse(unet: Any) -> None:
    """Undo `fuse`, up to rounding.

    Raises:
        ValueError: if weights are offloaded one by one.
    """
    _check_weights(unet)
    for layer, forward, _ in _scaled(unet):
        if hasattr(layer, BACKWARD_LAYER):
            delattr(layer, BACKWARD_LAYER)
        if layer.merged:
            with acting_at(layer, forward):
                layer.unmerge()


def _check_weights(unet: Any) -> None:
    weights = [weight for _, layer in lora_layers(unet) for weight in layer.get_base_layer().parameters()]
    if any(weight.is_meta for weight in weights):
        raise ValueError("fuse and unfuse patches before enable_sequential_cpu_offload(): the UNet's weights are away.")
    if any(not weight.is_floating_point() or weight.itemsize == 1 for weight in weights):
        raise ValueError("the UNet's weights are quantised, and nothing can be added to them; load it without.")


def _scaled(unet: Any) -> list[tuple[Any, Mapping[str, float], Mapping[str, float]]]:
    """The layers, each with the scales of those of its adapters that differ, on forward and on backward rows."""
    pairs = uneven_scales(unet)
    own = [(layer, {name: pairs[name] for name in layer.scaling if name in pairs}) for _, layer in lora_layers(unet)]
    return [(layer, *({name: pair[way] for name, pair in some.items()} for way in (0, 1))) for layer, some in own]


def _merged_copy(layer: Any, scales: Mapping[str, float]) -> Any:
    """A copy of a layer's base with its adapters at these scales in its weights."""
    base = layer.base_layer
    layer.base_layer = copy.deepcopy(base)
    try:
        with acting_at(layer, scales):
            layer.merge(safe_merge=True)
        return layer.base_layer
    finally:
        layer.base_layer = base
        layer.merged_adapters.clear()
