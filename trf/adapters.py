"""LoRA adapters living in a UNet: putting them in, their scales, taking them out.

diffusers gives SVD's UNet no adapter support of its own, so this stands on PEFT's functional interface. A scale may
differ between rows that run forward and rows that run backward in time; `halves.py` applies such a pair.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .sharding import assign, whole
from .variants import adapter_config

Scale = float | tuple[float, float]
"""Strength of an adapter: 1 is as trained, 0 is not at all; a pair is for forward rows and for backward rows."""

BACKWARD_LAYER = "backward_layer"
"""What a layer of `lora_layers` holds its backward rows' own weights in, once adapters are fused that differ there."""
STATE_PREFIX = "base_model.model."
"""PEFT's prefix of every weight in a saved adapter."""


def scale_pair(scale: Scale) -> tuple[float, float]:
    """A scale on forward and on backward rows.

    Raises:
        ValueError: if it is neither a number nor two of them.
    """
    both = (scale, scale) if isinstance(scale, int | float) else tuple(scale)
    if len(both) != 2 or not all(isinstance(one, int | float) for one in both):
        raise ValueError(f"scale={scale!r}: give a number, or a pair of them for the forward and the backward half.")
    return float(both[0]), float(both[1])


def inject(unet: Any, *, seed: int = 0, name: str = "default", **adapter: Any) -> list[nn.Parameter]:
    """Put a fresh adapter into the UNet, in place, and freeze everything else.

    Args:
        unet: a `UNetSpatioTemporalConditionModel`.
        seed: of the initial weights. The update itself starts at zero.
        name: adapter name.
        adapter: see `variants.adapter_config`.

    Returns:
        The trainable parameters, float32.

    Raises:
        ValueError: for an adapter that cannot be, if no module matches, or if its kind cannot act on one that does.
    """
    from peft.functional import cast_adapter_dtype, inject_adapter_in_model

    config = adapter_config(**adapter)
    if not any(re.fullmatch(config.target_modules, key) for key, _ in unet.named_modules()):
        raise ValueError(
            f"targets={adapter['targets']!r}: matches no module of the UNet; "
            "see a module's full name in unet.named_modules()."
        )
    unet.requires_grad_(False)
    try:
        with torch.random.fork_rng(devices=[]), _second_adapter_wanted():
            torch.default_generator.manual_seed(seed)  # the CPU's alone: `torch.manual_seed` moves the GPU's too
            inject_adapter_in_model(config, unet, name)
    except (TypeError, ValueError) as error:  # PEFT's ways to say that a kind does not know a module's type
        _take_out(unet, name)
        raise ValueError(f"targets={adapter['targets']!r}: not for this kind of adapter: {error}") from None
    cast_adapter_dtype(unet, name)
    unet.train(unet.training)  # new modules start in training mode, whatever the model is in
    return adapter_parameters(unet, name)


def adapter_parameters(unet: Any, name: str = "default") -> list[nn.Parameter]:
    """The parameters of one adapter, in the order of the UNet's modules."""
    return list(adapter_weights(unet, name).values())


def adapter_weights(unet: Any, name: str = "default") -> dict[str, nn.Parameter]:
    """The live parameters of one adapter under the names that PEFT saves them by, such as `<module>.lora_A.weight`."""
    weights: dict[str, nn.Parameter] = {}
    for path, layer in lora_layers(unet):
        for part in dict.fromkeys(layer.adapter_layer_names):
            held = getattr(layer, part, {})
            if name not in held:
                continue
            own = held[name]
            if isinstance(own, nn.Parameter):
                weights[f"{path}.{part}"] = own
            elif part == "lora_magnitude_vector":  # a module that PEFT saves as what it was before, a parameter
                weights[f"{path}.{part}"] = own.weight
            else:
                weights |= {f"{path}.{part}.{leaf}": value for leaf, value in own.named_parameters()}
    return weights


def adapter_state(unet: Any, name: str = "default") -> dict[str, Tensor]:
    """A copy of the adapter's weights under PEFT's names (`base_model.model.<module>.lora_A.weight`), on the CPU.

    Of a sharded UNet all processes have to ask at once; each gets all of it.
    """
    weights = adapter_weights(unet, name).items()
    return {f"{STATE_PREFIX}{key}": whole(value.detach()).to("cpu", copy=True).contiguous() for key, value in weights}


def add_adapter(unet: Any, config: Any, state: Mapping[str, Tensor], name: str) -> None:
    """Put a trained adapter in, frozen, float32, and active at scale 1 beside those active already.

    Args:
        unet: a `UNetSpatioTemporalConditionModel`.
        config: the adapter's PEFT configuration.
        state: its weights, under PEFT's names.
        name: adapter name.

    Raises:
        ValueError: if they are not the weights of such an adapter in this UNet, which is left as it was.
    """
    from peft.functional import cast_adapter_dtype, inject_adapter_in_model

    kinds = {str(own.peft_type.value) for own in getattr(unet, "peft_config", {}).values()}
    if kinds - {config.peft_type.value}:  # PEFT would put one's layers around the other's
        raise ValueError(
            f"adapters of kind {config.peft_type.value} cannot lie beside those of kind {kinds.pop()}; load one."
        )
    scales = active_scales(unet)
    # PEFT freezes the base. That alone lets PyTorch choose other kernels, so a frozen base rounds differently: undo it.
    grads = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    # The stream is kept since the initial weights are overwritten.
    try:
        with torch.random.fork_rng(devices=[]), _second_adapter_wanted():
            inject_adapter_in_model(config, unet, name)
        cast_adapter_dtype(unet, name)
        unet.train(unet.training)  # new modules start in training mode, where dropout is on
        load_adapter(unet, state, name)
    except BaseException:
        _take_out(unet, name)
        if scales:
            set_scales(unet, scales)
        raise
    finally:
        for parameter, flag in grads:
            parameter.requires_grad_(flag)
    set_scales(unet, {**scales, name: 1.0})


def load_adapter(unet: Any, state: Mapping[str, Tensor], name: str = "default") -> None:
    """Give an adapter in the UNet the weights that `adapter_state` returned, to the bit.

    Raises:
        ValueError: if they are not those of this adapter.
    """
    live = {f"{STATE_PREFIX}{key}": parameter for key, parameter in adapter_weights(unet, name).items()}
    if strange := [key for key in state if key not in live]:
        raise ValueError(f"{len(strange)} of its {len(state)} tensors belong nowhere in this UNet, first {strange[0]}.")
    if missing := [key for key in live if key not in state]:
        raise ValueError(
            f"{len(missing)} of the {len(live)} tensors of such an adapter are missing, first {missing[0]}."
        )
    for key, value in state.items():
        if value.shape != live[key].shape:
            raise ValueError(f"{key} is {tuple(value.shape)}, but in this UNet it has to be {tuple(live[key].shape)}.")
    for key, value in state.items():
        assign(live[key], value)


@contextmanager
def _second_adapter_wanted() -> Iterator[None]:
    """PEFT warns of a second adapter as if it were a slip."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
        yield


def lora_layers(unet: Any) -> Iterator[tuple[str, Any]]:
    """The modules of the UNet that hold adapters, by name."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in unet.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def acting(layer: Any) -> list[str]:
    """The active adapters that a layer of `lora_layers` has."""
    return [name for name in layer.active_adapters if name in layer.scaling]


def is_plain(layer: Any, name: str) -> bool:
    """Whether an adapter adds `B A x` to the output of a layer of `lora_layers` and nothing else."""
    return name in getattr(layer, "lora_A", {}) and name not in layer.lora_variant and not layer.lora_bias.get(name)


def adapter_names(unet: Any) -> list[str]:
    """Names of the adapters in the UNet, in the order they were put in."""
    return list(getattr(unet, "peft_config", {}))


def uneven_scales(unet: Any) -> dict[str, tuple[float, float]]:
    """The active adapters that act differently on forward and on backward rows, or on none; no others need
    `halves.Halves.rows`.
    """
    # PEFT's layers know one scale an adapter, so the pairs hang on the UNet, as PEFT's own `peft_config` does.
    return getattr(unet, "uneven_scales", {})


def active_scales(unet: Any) -> dict[str, Scale]:
    """The active adapters and their scales, a pair where the halves differ."""
    scales: dict[str, Scale] = {}
    names = adapter_names(unet)
    for _, layer in lora_layers(unet):
        for name in set(layer.active_adapters) & set(layer.scaling) - set(scales):
            scales[name] = layer.scaling[name] / _unit_scaling(layer, name)
        if len(scales) == len(names):  # most often after the first layer
            break
    return {name: scales[name] for name in names if name in scales} | uneven_scales(unet)


def _unit_scaling(layer: Any, name: str) -> float:
    now = layer.scaling[name]
    layer.set_scale(name, 1.0)
    unit, layer.scaling[name] = layer.scaling[name], now
    return float(unit)


def set_scales(unet: Any, scales: Mapping[str, Scale], *, trainable: bool = False) -> None:
    """Make exactly these adapters active, each at its scale, frozen unless `trainable`.

    Raises:
        ValueError: for an adapter that is not there, or while adapters are fused into the weights.
    """
    pairs = {name: scale_pair(scale) for name, scale in scales.items()}
    # At zero on both too: what multiplies weights, such as a DoRA's magnitude, is no base model at scale 0.
    uneven = {name: pair for name, pair in pairs.items() if pair[0] != pair[1] or not any(pair)}
    _check_free(unet, scales)
    for _, layer in lora_layers(unet):
        layer.set_adapter(list(scales), inference_mode=not trainable)
        for name, (forward, backward) in pairs.items():
            layer.set_scale(name, forward if forward == backward else 1.0)
    unet.uneven_scales = uneven


@contextmanager
def at_factor(unet: Any, factor: float) -> Iterator[None]:
    """Multiply the scales of all active adapters inside the block, at 0 leave them out; afterwards all is as it was."""
    if factor == 1:
        yield
        return
    layers = [layer for _, layer in lora_layers(unet)]
    before = [(layer, layer.active_adapters, dict(layer.scaling)) for layer in layers]
    uneven = uneven_scales(unet)
    if uneven:
        unet.uneven_scales = {name: (factor * f, factor * b) for name, (f, b) in uneven.items()} if factor else {}
    for layer in layers:
        if not factor:  # what multiplies weights, such as a DoRA's magnitude, is no base model at scale 0
            layer._active_adapter = []
        for name in {*layer.active_adapters} & {*layer.scaling} - {*uneven}:
            layer.scaling[name] *= factor
    try:
        yield
    finally:
        for layer, active, scaling in before:
            layer._active_adapter = active
            layer.scaling.update(scaling)
        if uneven:
            unet.uneven_scales = uneven


@contextmanager
def acting_at(layer: Any, scales: Mapping[str, float]) -> Iterator[None]:
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


def _check_free(unet: Any, names: Iterable[str]) -> None:
    if unknown := [name for name in names if name not in adapter_names(unet)]:
        patches = dict.fromkeys(name.partition("/")[0] for name in adapter_names(unet))
        raise ValueError(f"no patch named {unknown[0]!r} is loaded; there are: {', '.join(patches) or 'none'}.")
    if is_fused(unet):
        raise ValueError("patches are fused into the weights; call unfuse_patches() first.")


def is_fused(unet: Any) -> bool:
    """Whether adapters are fused into the base weights."""
    return any(layer.merged or hasattr(layer, BACKWARD_LAYER) for _, layer in lora_layers(unet))


def remove_adapters(unet: Any, names: Iterable[str] | None = None) -> None:
    """Take adapters out (all of them by default); with the last one gone the UNet's modules are the stock ones again.

    Raises:
        ValueError: for an adapter that is not there, or while adapters are fused into the weights.
    """
    going = list(adapter_names(unet) if names is None else names)
    staying = {name: scale for name, scale in active_scales(unet).items() if name not in going}
    _check_free(unet, going)
    for name in going:
        _take_out(unet, name)
    if adapter_names(unet):
        set_scales(unet, staying)
    elif hasattr(unet, "uneven_scales"):
        del unet.uneven_scales


def _take_out(unet: Any, name: str) -> None:
    """Take an adapter out of all layers that have it, be they all or, after an error, some."""
    for path, layer in list(lora_layers(unet)):
        layer.delete_adapter(name)
        if not layer.scaling:
            parent, _, child = path.rpartition(".")
            setattr(unet.get_submodule(parent), child, layer.get_base_layer())
    configs = getattr(unet, "peft_config", {})
    configs.pop(name, None)
    if not configs and hasattr(unet, "peft_config"):
        del unet.peft_config
