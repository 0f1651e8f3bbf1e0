"""LoRA adapters living in a UNet: putting them in, their scales, fusing them into the weights, taking them out.

diffusers gives SVD's UNet no adapter support of its own, so this stands on PEFT's functional interface.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

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
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, unet, name)
    cast_adapter_dtype(unet, name)
    unet.train(unet.training)  # new modules start in training mode, whatever the model is in
    return [parameter for parameter in unet.parameters() if parameter.requires_grad]


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
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        # The stream is kept since the initial weights are overwritten; a second adapter is what is wanted, not a slip.
        warnings.filterwarnings("ignore", message="Already found a `peft_config`")
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


def _layers(unet: Any) -> Iterator[tuple[str, Any]]:
    from peft.tuners.tuners_utils import BaseTunerLayer

    for name, module in unet.named_modules():
        if isinstance(module, BaseTunerLayer):
            yield name, module


def adapter_names(unet: Any) -> list[str]:
    """Names of the adapters in the UNet, in the order they were put in."""
    return list(getattr(unet, "peft_config", {}))


def active_scales(unet: Any) -> dict[str, float]:
    """The active adapters and their scales."""
    scales: dict[str, float] = {}
    for _, layer in _layers(unet):
        for name in set(layer.active_adapters) & set(layer.scaling) - set(scales):
            scales[name] = layer.scaling[name] / _unit_scaling(layer, name)
    return {name: scales[name] for name in adapter_names(unet) if name in scales}


def _unit_scaling(layer: Any, name: str) -> float:
    now = layer.scaling[name]
    layer.set_scale(name, 1.0)
    unit, layer.scaling[name] = layer.scaling[name], now
    return float(unit)


def set_scales(unet: Any, scales: Mapping[str, float]) -> None:
    """Make exactly these adapters active, each at its scale (1 = as trained), frozen.

    Raises:
        ValueError: for an adapter that is not there, or while adapters are fused into the weights.
    """
    unknown = [name for name in scales if name not in adapter_names(unet)]
    if unknown:
        raise ValueError(
            f"no patch named {unknown[0]!r} is loaded; there are: {', '.join(adapter_names(unet)) or 'none'}."
        )
    if is_fused(unet):
        raise ValueError("patches are fused into the weights; call unfuse_patches() first.")
    for _, layer in _layers(unet):
        layer.set_adapter(list(scales), inference_mode=True)
        for name, scale in scales.items():
            layer.set_scale(name, scale)


def is_fused(unet: Any) -> bool:
    """Whether adapters are fused into the base weights."""
    return any(layer.merged for _, layer in _layers(unet))


def fuse(unet: Any) -> None:
    """Add the active adapters, at their scales, to the base weights: no cost per step any more.

    Raises:
        ValueError: if the result is not finite, or no adapter is active.
    """
    if not active_scales(unet):
        raise ValueError("no active patch to fuse; load one first.")
    for _, layer in _layers(unet):
        layer.merge(safe_merge=True)


def unfuse(unet: Any) -> None:
    """Undo `fuse`, up to rounding."""
    for _, layer in _layers(unet):
        layer.unmerge()


def remove_adapters(unet: Any, names: Iterable[str] | None = None) -> None:
    """Take adapters out (all of them by default); with the last one gone the UNet's modules are the stock ones again.

    Raises:
        ValueError: for an adapter that is not there, or while adapters are fused into the weights.
    """
    going = list(adapter_names(unet) if names is None else names)
    staying = {name: scale for name, scale in active_scales(unet).items() if name not in going}
    if unknown := [name for name in going if name not in adapter_names(unet)]:
        raise ValueError(
            f"no patch named {unknown[0]!r} is loaded; there are: {', '.join(adapter_names(unet)) or 'none'}."
        )
    if is_fused(unet):
        raise ValueError("patches are fused into the weights; call unfuse_patches() first.")
    for path, layer in list(_layers(unet)):
        for name in going:
            layer.delete_adapter(name)
        if not layer.scaling:
            parent, _, child = path.rpartition(".")
            setattr(unet.get_submodule(parent), child, layer.get_base_layer())
    for name in going:
        del unet.peft_config[name]
    if not adapter_names(unet):
        if hasattr(unet, "peft_config"):
            del unet.peft_config
    else:
        set_scales(unet, staying)
