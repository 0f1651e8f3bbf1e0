"""LoRA adapters living in a UNet: putting them in, their scales, fusing them into the weights, taking them out.

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

Scale = float | tuple[float, float]
"""Strength of an adapter: 1 is as trained, 0 is not at all; a pair is for forward rows and for backward rows."""

STATE_PREFIX = "base_model.model."
"""PEFT's prefix of every weight in a saved adapter."""

# SVD's cross-attention sees one CLIP token, so its softmax is constant and attn2.to_q / to_k get no gradient: left out.
_ATTENTION = r"(attn1\.(to_q|to_k|to_v|to_out\.0)|attn2\.(to_v|to_out\.0))"
_FEED_FORWARD = r"(ff|ff_in)\.net\.(0\.proj|2)"
TARGET_PRESETS: dict[str, str] = {
    "temporal": rf".*\.temporal_transformer_blocks\.\d+\.({_ATTENTION}|{_FEED_FORWARD})",
    "spatial": rf".*\.transformer_blocks\.\d+\.({_ATTENTION}|{_FEED_FORWARD})",
    "all": rf".*\.(temporal_)?transformer_blocks\.\d+\.({_ATTENTION}|{_FEED_FORWARD})",
    # What Generative Inbetweening trains (arXiv 2408.15239).
    "motion": r".*\.temporal_transformer_blocks\.\d+\.attn1\.(to_v|to_out\.0)",
}
"""Regular expressions, matched against whole module names of the UNet."""


def target_pattern(targets: str) -> str:
    """Regular expression of a preset (one of `TARGET_PRESETS`), or `targets` itself if it is one already.

    Raises:
        ValueError: if `targets` is neither a preset nor a valid regular expression.
    """
    if targets in TARGET_PRESETS:
        return TARGET_PRESETS[targets]
    try:
        re.compile(targets)
    except re.error as error:
        raise ValueError(
            f"targets={targets!r}: neither a preset ({', '.join(TARGET_PRESETS)}) nor a regular expression: {error}."
        ) from None
    return targets


def scale_pair(scale: Scale) -> tuple[float, float]:
    """A scale on forward and on backward rows.

    Raises:
        ValueError: if it is neither a number nor two of them.
    """
    both = (scale, scale) if isinstance(scale, int | float) else tuple(scale)
    if len(both) != 2 or not all(isinstance(one, int | float) for one in both):
        raise ValueError(f"scale={scale!r}: give a number, or a pair of them for the forward and the backward half.")
    return float(both[0]), float(both[1])


def inject(
    unet: Any,
    *,
    targets: str,
    rank: int,
    alpha: float,
    rslora: bool = False,
    dropout: float = 0.0,
    seed: int = 0,
    name: str = "default",
) -> list[nn.Parameter]:
    """Put a fresh LoRA into the UNet, in place, and freeze everything else.

    Args:
        unet: a `UNetSpatioTemporalConditionModel`.
        targets: preset or regular expression, see `target_pattern`.
        rank: rank of the update.
        alpha: scale of the update: `alpha / rank`, or `alpha / sqrt(rank)` with `rslora` (arXiv 2312.03732).
        rslora: see `alpha`.
        dropout: dropout on the adapter's input.
        seed: of the initial weights. The update itself starts at zero.
        name: adapter name.

    Returns:
        The trainable parameters, float32.

    Raises:
        ValueError: if no module matches.
    """
    from peft import LoraConfig
    from peft.functional import cast_adapter_dtype, inject_adapter_in_model

    pattern = target_pattern(targets)
    if not any(re.fullmatch(pattern, key) for key, _ in unet.named_modules()):
        raise ValueError(
            f"targets={targets!r}: matches no module of the UNet; see a module's full name in unet.named_modules()."
        )
    unet.requires_grad_(False)
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,
        use_rslora=rslora,
        lora_dropout=dropout,
        target_modules=pattern,
        bias="none",
    )
    with torch.random.fork_rng(devices=[]), _second_adapter_wanted():
        torch.manual_seed(seed)
        inject_adapter_in_model(config, unet, name)
    cast_adapter_dtype(unet, name)
    unet.train(unet.training)  # new modules start in training mode, whatever the model is in
    return adapter_parameters(unet, name)


def adapter_parameters(unet: Any, name: str = "default") -> list[nn.Parameter]:
    """The parameters of one adapter, in the order of the UNet's modules."""
    return [
        parameter
        for _, layer in lora_layers(unet)
        for matrices in (layer.lora_A, layer.lora_B)
        if name in matrices
        for parameter in matrices[name].parameters()
    ]


def adapter_state(unet: Any, name: str = "default") -> dict[str, Tensor]:
    """The adapter's weights under PEFT's names (`base_model.model.<module>.lora_A.weight`), contiguous, on the CPU."""
    from peft.functional import get_peft_model_state_dict

    state = get_peft_model_state_dict(unet, adapter_name=name)
    return {f"{STATE_PREFIX}{key}": value.detach().cpu().contiguous() for key, value in state.items()}


def add_adapter(unet: Any, config: Any, state: Mapping[str, Tensor], name: str) -> list[str]:
    """Put a trained adapter in, frozen, float32, and active at scale 1 beside those active already.

    Args:
        unet: a `UNetSpatioTemporalConditionModel`.
        config: the adapter's PEFT configuration.
        state: its weights, under PEFT's names.
        name: adapter name.

    Returns:
        Names of the weights that configuration and state do not agree on; empty when all is well.
    """
    from peft.functional import cast_adapter_dtype, inject_adapter_in_model, set_peft_model_state_dict

    scales = active_scales(unet)
    # PEFT freezes the base. That alone lets PyTorch choose other kernels, so a frozen base rounds differently: undo it.
    grads = [(parameter, parameter.requires_grad) for parameter in unet.parameters()]
    # The stream is kept since the initial weights are overwritten.
    with torch.random.fork_rng(devices=[]), _second_adapter_wanted():
        inject_adapter_in_model(config, unet, name)
    cast_adapter_dtype(unet, name)
    unet.train(unet.training)  # new modules start in training mode, where dropout is on
    own = {key.removeprefix(STATE_PREFIX): value for key, value in state.items()}
    result = set_peft_model_state_dict(unet, own, adapter_name=name)
    expected = adapter_state(unet, name)
    set_scales(unet, {**scales, name: 1.0})
    for parameter, flag in grads:
        parameter.requires_grad_(flag)
    return sorted({*(expected.keys() ^ state.keys()), *result.unexpected_keys})


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


def adapter_names(unet: Any) -> list[str]:
    """Names of the adapters in the UNet, in the order they were put in."""
    return list(getattr(unet, "peft_config", {}))


def uneven_scales(unet: Any) -> dict[str, tuple[float, float]]:
    """The active adapters that act differently on forward and on backward rows; no other needs `halves.on_halves`."""
    # PEFT's layers know one scale an adapter, so the pairs hang on the UNet, as PEFT's own `peft_config` does.
    return getattr(unet, "uneven_scales", {})


def active_scales(unet: Any) -> dict[str, Scale]:
    """The active adapters and their scales, a pair where the halves differ."""
    scales: dict[str, Scale] = {}
    for _, layer in lora_layers(unet):
        for name in set(layer.active_adapters) & set(layer.scaling) - set(scales):
            scales[name] = layer.scaling[name] / _unit_scaling(layer, name)
    return {name: scales[name] for name in adapter_names(unet) if name in scales} | uneven_scales(unet)


def _unit_scaling(layer: Any, name: str) -> float:
    now = layer.scaling[name]
    layer.set_scale(name, 1.0)
    unit, layer.scaling[name] = layer.scaling[name], now
    return float(unit)


def set_scales(unet: Any, scales: Mapping[str, Scale], *, trainable: bool = False) -> None:
    """Make exactly these adapters active, each at its scale, frozen unless `trainable`.

    Raises:
        ValueError: for an adapter that is not there or cannot act on one half, or while adapters are fused into the
            weights.
    """
    pairs = {name: scale_pair(scale) for name, scale in scales.items()}
    uneven = {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}
    _check_free(unet, scales)
    for _, layer in lora_layers(unet):
        for name in uneven:
            if name in layer.lora_variant or layer.lora_bias.get(name):
                raise ValueError(f"{name!r} is more than a plain LoRA; it can only act on both halves alike.")
    for _, layer in lora_layers(unet):
        layer.set_adapter(list(scales), inference_mode=not trainable)
        for name, (forward, _) in pairs.items():
            layer.set_scale(name, 1.0 if name in uneven else forward)
    unet.uneven_scales = uneven


def _check_free(unet: Any, names: Iterable[str]) -> None:
    if unknown := [name for name in names if name not in adapter_names(unet)]:
        patches = dict.fromkeys(name.partition("/")[0] for name in adapter_names(unet))
        raise ValueError(f"no patch named {unknown[0]!r} is loaded; there are: {', '.join(patches) or 'none'}.")
    if is_fused(unet):
        raise ValueError("patches are fused into the weights; call unfuse_patches() first.")


def is_fused(unet: Any) -> bool:
    """Whether adapters are fused into the base weights."""
    return any(layer.merged for _, layer in lora_layers(unet))


def fuse(unet: Any) -> None:
    """Add the active adapters, at their scales, to the base weights: no cost per step any more.

    Raises:
        ValueError: if the result is not finite, no adapter is active, or one acts differently on the two halves.
    """
    if not active_scales(unet):
        raise ValueError("no active patch to fuse; load one first.")
    if uneven := uneven_scales(unet):
        shown = ", ".join(f"{name} ({f:g} forward, {b:g} backward)" for name, (f, b) in uneven.items())
        raise ValueError(f"weights serve both halves alike, so what acts differently on them cannot be fused: {shown}.")
    for _, layer in lora_layers(unet):
        layer.merge(safe_merge=True)


def unfuse(unet: Any) -> None:
    """Undo `fuse`, up to rounding."""
    for _, layer in lora_layers(unet):
        layer.unmerge()


def remove_adapters(unet: Any, names: Iterable[str] | None = None) -> None:
    """Take adapters out (all of them by default); with the last one gone the UNet's modules are the stock ones again.

    Raises:
        ValueError: for an adapter that is not there, or while adapters are fused into the weights.
    """
    going = list(adapter_names(unet) if names is None else names)
    staying = {name: scale for name, scale in active_scales(unet).items() if name not in going}
    _check_free(unet, going)
    for path, layer in list(lora_layers(unet)):
        for name in going:
            layer.delete_adapter(name)
        if not layer.scaling:
            parent, _, child = path.rpartition(".")
            setattr(unet.get_submodule(parent), child, layer.get_base_layer())
    for name in going:
        del unet.peft_config[name]
    if not adapter_names(unet):
        for attribute in ("peft_config", "uneven_scales"):
            if hasattr(unet, attribute):
                delattr(unet, attribute)
    else:
        set_scales(unet, staying)
