"""Where a patch starts that does not start at zero, and how it is saved as a patch for the untouched base all the same.

    pissa    adapters start as the principal part of the weights they act on, and the base keeps the rest (PiSSA, arXiv
             2404.02948); of a quantised base the rest is what is quantised
    loftq    adapters start as what quantisation took from the weights, as far as their rank can hold it (LoftQ, arXiv
             2310.08659, of one iteration: the base is quantised as ever)

In training a layer computes `base x + s B A x`, having started from the factors B0 and A0 that its base lacks. What it
has learnt, for the untouched base, is `s (B A - B0 A0)`: itself a plain LoRA, of twice the rank. That is what is saved,
and from its second half the base is prepared again when training goes on, to the bit.

PEFT's own `init_lora_weights` are not used: its PiSSA decomposes again for a second adapter, cannot quantise the rest
and does not know convolutions, and its LoftQ needs a GPU. Its conversion of PiSSA to twice the rank is the one below.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Set
from copy import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import PartialState
from safetensors.torch import load_file
from torch import Tensor

from ..trf.adapters import (
    STATE_PREFIX,
    active_scales,
    adapter_parameters,
    adapter_state,
    inject,
    load_adapter,
    lora_layers,
    set_scales,
)
from ..trf.patch import Direction, PatchFiles, adapters_of, weight_files
from ..trf.quantization import Quantization, quantize, quantizes
from ..trf.seeds import derived_seed
from ..trf.variants import target_pattern
from .principal import most_rank, principal_factors, product

if TYPE_CHECKING:
    from ..configs.training import LoraSettings, TrainConfig

A, B = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True)
class Origin:
    """The factors that the adapters of a patch start from and that the base lacks; none where they start at zero."""

    factors: Mapping[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    """A0 and B0 of every adapted module by its name, as an adapter has them, float32, on the CPU; zeros for a module
    whose adapter starts as a plain one."""

    def saved(self, files: PatchFiles) -> PatchFiles:
        """The patch for the untouched base: twice the rank at the same scale, `[B, -B0] [A; A0]`."""
        if not self.factors:
            return files
        states = {
            part: {key: self._joined(key, value) for key, value in state.items()}
            for part, state in files.states.items()
        }
        return PatchFiles(configs={part: _of_twice_the_rank(one) for part, one in files.configs.items()}, states=states)

    def _joined(self, key: str, value: Tensor) -> Tensor:
        name, leaf = _split(key)
        a0, b0 = self.factors[name]
        return torch.cat([value, a0]) if leaf == A else torch.cat([value, -b0], dim=1)

    def trained(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The weights of an adapter in training, of its saved ones; see `saved`."""
        return {key: _half(key, value, 0) for key, value in state.items()} if self.factors else dict(state)

    def place(self, unet: Any, direction: Direction, **adapter: Any) -> None:
        """Let the fresh patch `default` in the UNet start here.

        Beside a patch that acts on backward rows alone, a frozen adapter of the same factors acts on the forward rows:
        they are to see the whole base too.

        Args:
            unet: whose base `prepare_base` has prepared.
            direction: of the patch.
            adapter: that it was injected with, see `variants.adapter_config`.
        """
        if not self.factors:
            return
        for name in adapters_of(direction).values():
            self._load(unet, name, started={name for name, (_, b0) in self.factors.items() if b0.any()})
        if direction == "backward":
            beside = "default/origin"
            scales = active_scales(unet)
            inject(unet, name=beside, **adapter)
            self._load(unet, beside, started=set(self.factors))
            set_scales(unet, {**scales, beside: (1.0, 0.0)}, trainable=True)
            for parameter in adapter_parameters(unet, beside):
                parameter.requires_grad_(False)

    def _load(self, unet: Any, adapter: str, started: Set[str]) -> None:
        """Give an adapter the factors of these modules, and leave it as it is elsewhere."""
        state = adapter_state(unet, adapter)
        for key in state:
            module, leaf = _split(key)
            if module in started:
                state[key] = self.factors[module][(A, B).index(leaf)]
        load_adapter(unet, state, adapter)


def prepare_base(unet: Any, config: TrainConfig, checkpoint: Path | None) -> Origin:
    """Quantise a fresh UNet as the settings say, and take from it what the patch starts from; in place.

    Args:
        unet: a whole `UNetSpatioTemporalConditionModel`, without adapters, on the CPU; the same on all processes.
        config: of the run.
        checkpoint: from which it goes on; without one the factors are found here.

    Raises:
        ValueError: if the checkpoint is not of such a run.
    """
    lora, how = config.lora, config.quantization
    pattern, scale = target_pattern(lora.targets), _scale(lora)
    weights = {name: one.weight.detach() for name, one in unet.named_modules() if re.fullmatch(pattern, name)}
    generator = torch.Generator().manual_seed(derived_seed(config.seed, "origin"))
    origin = Origin() if checkpoint is None or lora.init == "plain" else _origin_of(checkpoint, weights, lora)
    if lora.init == "pissa":
        if checkpoint is None:
            origin = _find(weights.items(), lora.rank, scale, generator)
        for name, factors in origin.factors.items():
            weights[name].copy_(weights[name].float() - scale * product(*factors))
    if how is not None:
        quantize(unet, how)
    if lora.init == "loftq" and checkpoint is None:
        from peft.utils.integrations import dequantize_module_weight

        kept = ((name, dequantize_module_weight(unet.get_submodule(name)).detach()) for name in weights)
        lost = ((name, weights[name].float() - one.float()) for name, one in kept)
        origin = _find(lost, lora.rank, scale, generator)
    return origin


def check_origin(unet: Any, lora: LoraSettings, how: Quantization | None) -> None:
    """Check that a patch can start as its settings say.

    Args:
        unet: with the patch; it may be without weights.
        lora: settings of the patch.
        how: the base is quantised.

    Raises:
        ValueError: if it cannot.
    """
    if lora.init == "plain":
        return
    bases = {name: layer.get_base_layer() for name, layer in lora_layers(unet)}
    for name, base in bases.items():
        if lora.rank > (most := most_rank(base.weight)):
            raise ValueError(f"lora.rank={lora.rank}: lora.init={lora.init} finds at most {most} in {name}; lower it.")
    if lora.init == "loftq" and not any(quantizes(how, name, base) for name, base in bases.items()):
        raise ValueError(
            f"lora.init=loftq: quantization={how} takes nothing from lora.targets={lora.targets!r}: there is nothing "
            "to make up for; choose plain or pissa."
        )


def _scale(lora: LoraSettings) -> float:
    return lora.alpha / (math.sqrt(lora.rank) if lora.rslora else lora.rank)


def _find(weights: Iterable[tuple[str, Tensor]], rank: int, scale: float, generator: torch.Generator) -> Origin:
    factors = {}
    for name, weight in weights:
        found = principal_factors(weight, rank, scale, generator)
        ones = [1] * (weight.ndim - 2)
        a, b = found or (torch.zeros(rank, *weight.shape[1:]), torch.zeros(len(weight), rank, *ones))
        factors[name] = (_of_first_process(a), _of_first_process(b))
    return Origin(factors)


def _of_first_process(value: Tensor) -> Tensor:
    """What the first process found: others may round otherwise, and turn a singular vector round."""
    if not torch.distributed.is_initialized():
        return value
    own = value.to(PartialState().device)
    torch.distributed.broadcast(own, src=0)
    return own.to("cpu")


def _origin_of(checkpoint: Path, weights: Mapping[str, Tensor], lora: LoraSettings) -> Origin:
    """The origin of a saved patch, of which all adapters have the same."""
    state = load_file(next(iter(weight_files(checkpoint).values())))
    ranks = {len(value) for key, value in state.items() if key.endswith(A)}
    if {_split(key)[0] for key in state} != weights.keys() or ranks != {2 * lora.rank}:
        raise ValueError(
            f"{checkpoint}: its patch is not one that started with lora.init={lora.init} and rank {lora.rank} on these "
            "modules; restore its settings or choose another output."
        )
    keys = {name: (f"{STATE_PREFIX}{name}.{A}", f"{STATE_PREFIX}{name}.{B}") for name in weights}
    return Origin({name: (_half(a, state[a], 1), -_half(b, state[b], 1)) for name, (a, b) in keys.items()})


def _split(key: str) -> tuple[str, str]:
    """Module and leaf, one of `A` and `B`, of a key of a saved adapter."""
    leaf = next(leaf for leaf in (A, B) if key.endswith(leaf))
    return key.removeprefix(STATE_PREFIX).removesuffix(f".{leaf}"), leaf


def _half(key: str, value: Tensor, which: int) -> Tensor:
    """The trained half of a saved factor, or that of the origin."""
    # A copy: how a product is rounded may depend on how its factors lie in memory.
    return value.chunk(2, dim=0 if _split(key)[1] == A else 1)[which].clone(memory_format=torch.contiguous_format)


def _of_twice_the_rank(config: Any) -> Any:
    """PEFT's configuration of a LoRA of twice the rank and the same scale."""
    twice = copy(config)
    twice.r = 2 * config.r
    twice.lora_alpha = config.lora_alpha * (math.sqrt(2) if config.use_rslora else 2)
    return twice
