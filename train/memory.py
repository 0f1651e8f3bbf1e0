"""What a training step needs of a GPU's memory, worked out without one and without the model's weights.

One step of the real UNet class, with its adapters, by the real objective, runs on PyTorch's `meta` device, where
tensors have shapes and no content; every tensor that comes and goes is counted. What does not move in a step (frozen
weights, optimizer) is arithmetic. Counted as on a GPU: its autocast, and attention that never holds its map.

Not counted: the CUDA context and the libraries' own workspaces (1 to 2 GB), what the allocator loses between tensors,
what `compile` saves, and validation.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.weak import WeakIdKeyDictionary

from ..trf.attention import attend_to_one_token
from ..trf.patch import inject_patch
from ..trf.quantization import narrowed_layers, narrowed_size, quantize
from .data import Sample
from .objective import Objective
from .recompute import chunk_feed_forward, recompute_activations

if TYPE_CHECKING:
    from ..configs.training import TrainConfig

PRECISIONS = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STATE_BYTES = {"adamw": 8.0, "prodigy": 16.0, "adamw_schedulefree": 8.0}
"""Of an optimizer, for each trained value; see also `optimizer_state_size`."""
EIGHT_BITS_FROM, EIGHT_BIT_BLOCK = 4096, 256
"""bitsandbytes keeps smaller tensors in float32, and a scale for every block of the others."""


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes at the peak of a step, by part."""

    weights: int
    """The frozen UNet."""
    adapters: int
    """Their float32 weights."""
    gradients: int
    """Of the adapters, and the copy that several processes average them in."""
    optimizer: int
    """Its state."""
    average: int
    """The moving average of the weights."""
    activations: int
    """What the forward pass keeps for the backward pass."""
    transients: int
    """What is needed beyond that at the worst moment."""

    @property
    def total(self) -> int:
        """Their sum."""
        return sum(getattr(self, field.name) for field in fields(self))

    def table(self) -> list[str]:
        """For people: a line for each part, in GiB."""
        parts = {**{field.name: getattr(self, field.name) for field in fields(self)}, "in all": self.total}
        return [f"  {name:<12} {value / 2**30:9.3f}  {_SAID[name]}" for name, value in parts.items() if value]


_SAID = {
    "weights": "the frozen UNet",
    "adapters": "float32",
    "gradients": "of the adapters",
    "optimizer": "its state",
    "average": "of the adapters",
    "activations": "kept for the backward pass",
    "transients": "beyond that, at the worst moment",
    "in all": "without the CUDA context and the libraries' workspaces (1 to 2 GiB), nor validation",
}


def estimate(
    config: TrainConfig,
    unet_config: Mapping[str, Any],
    latents: Sequence[int],
    *,
    num_processes: int = 1,
    device: Literal["cuda", "cpu"] = "cuda",
) -> Memory:
    """What a step of a run takes on each of its devices.

    Args:
        config: of the run.
        unet_config: of the base model's UNet.
        latents: of a clip, `[F, C, h, w]`.
        num_processes: that the run has; each holds the whole UNet.
        device: whose arithmetic is assumed; CPUs keep norms in half precision.
    """
    from diffusers import UNetSpatioTemporalConditionModel

    dtype = PRECISIONS[config.precision]
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel.from_config(dict(unet_config))
    nn.Module.to(unet, device="meta", dtype=dtype)
    weights = sum(one.nbytes for one in (*unet.parameters(), *unet.buffers()))
    narrow: dict[int, str] = {}
    if config.quantization == "fp8":
        quantize(unet, "fp8")
        weights = sum(one.nbytes for one in (*unet.parameters(), *unet.buffers()))
    elif config.quantization is not None:
        for _, layer in narrowed_layers(unet, config.quantization):
            weights += narrowed_size(layer, config.quantization) - layer.weight.nbytes
            narrow[id(layer.weight)] = config.quantization
    with torch.device("meta"):
        own = inject_patch(unet, config.direction, **config.lora.model_dump(exclude={"init"}))
    attend_to_one_token(unet)
    adapters = [parameter for parameters in own.values() for parameter in parameters]
    low = None if dtype == torch.float32 else dtype

    def kernels() -> Kernels:
        return Kernels(low, device, narrow)

    def again() -> tuple[AbstractContextManager[Any], AbstractContextManager[Any]]:
        return nullcontext(), kernels()

    if config.feed_forward_chunks > 1:
        chunk_feed_forward(unet, config.feed_forward_chunks, again)
    if config.gradient_checkpointing:
        recompute_activations(unet, again)
    unet.train()
    trained = sum(one.nbytes for one in adapters)
    copies = 2 if num_processes > 1 else 1
    if config.gradient_accumulation > 1:  # from the second batch on they are there all the time
        for one in adapters:
            one.grad = torch.zeros_like(one)
    batch = _batch(config, unet.config.cross_attention_dim, latents)
    settings = config.objective
    objective = Objective(
        direction=config.direction,
        dtype=dtype,
        fusion=settings.fusion,
        alternate=settings.alternate_directions,
        rotated=settings.rotated_attention,
    )
    with LiveBytes() as live:
        with kernels():
            found = objective.losses(unet, unet, batch, 0)
            losses = found.__enter__()
        kept = live.now
        torch.autograd.backward(losses.total)
        found.__exit__(None, None, None)
    inputs = sum(one.nbytes for one in vars(batch).values() if isinstance(one, Tensor))
    during = live.peak - kept - (trained if config.gradient_accumulation == 1 else 0)
    return Memory(
        weights=weights,
        adapters=trained,
        gradients=trained * copies,
        optimizer=sum(optimizer_state_size(one.numel(), config.optim.name) for one in adapters),
        average=trained if config.ema else 0,
        activations=kept,
        transients=max(0, during) + inputs,
    )


def optimizer_state_size(values: int, name: str) -> int:
    """Bytes of an optimizer's state for a tensor of so many values."""
    if name in STATE_BYTES:
        return int(STATE_BYTES[name] * values)
    if values < EIGHT_BITS_FROM:
        return 8 * values
    return 2 * values + 2 * 4 * -(-values // EIGHT_BIT_BLOCK)


def _batch(config: TrainConfig, context: int, latents: Sequence[int]) -> Sample:
    frames, channels, height, width = latents
    rows = config.batch_size * (2 if config.direction == "both" or config.objective.rotated_attention else 1)
    with torch.device("meta"):
        return Sample(
            latents=torch.empty(rows, frames, channels, height, width),
            noise=torch.empty(rows, frames, channels, height, width),
            sigma=torch.empty(rows),
            condition=torch.empty(rows, channels, height, width),
            embedding=torch.empty(rows, 1, context),
            added_time_ids=torch.empty(rows, 3),
            backward=torch.empty(rows, dtype=torch.bool),
            number=torch.empty(rows, dtype=torch.long),
        )


class LiveBytes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the bytes of the tensors that are made inside the block, while they live; views cost nothing."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.now = 0
        """Bytes of those alive."""
        self.peak = 0
        """The most there were."""
        self._known: Any = WeakIdKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        given = {id(one.untyped_storage()) for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)}
        for one in tree_leaves(made):
            if isinstance(one, Tensor) and id(storage := one.untyped_storage()) not in given:
                self._count(storage)
        return made

    def _count(self, storage: torch.UntypedStorage) -> None:
        if storage not in self._known:
            size = storage.nbytes()
            self._known[storage] = True
            self.now += size
            self.peak = max(self.peak, self.now)
            weakref.finalize(storage, self._freed, size)

    def _freed(self, size: int) -> None:
        self.now -= size


_IN_LOW = {F.linear, F.conv2d, F.conv3d, torch.conv2d, torch.conv3d, torch.matmul, torch.bmm, torch.baddbmm}
_IN_FULL = {F.group_norm, F.layer_norm, torch.group_norm, torch.layer_norm}
_ATTENTION = F.scaled_dot_product_attention


class Kernels(TorchFunctionMode):
    """What a real device does otherwise than `meta`: autocast, attention in one kernel, packed weights widened.

    Args:
        low: precision of autocast, if any.
        device: whose autocast.
        narrow: how weights are packed, by their id.
    """

    def __init__(self, low: torch.dtype | None, device: str, narrow: Mapping[int, str]) -> None:
        super().__init__()
        self.low = low
        self.full: Collection[Any] = _IN_FULL if device == "cuda" else ()
        self.narrow = narrow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        widened = self._widened(args) if func is F.linear else None
        if self.low is not None and (func in _IN_LOW or func is _ATTENTION):
            args, kwargs = _cast((args, kwargs), self.low)
        elif self.low is not None and func in self.full:
            args, kwargs = _cast((args, kwargs), torch.float32)
        if func is _ATTENTION:
            queries, keys, values = args[:3] if len(args) > 2 else (kwargs[name] for name in ("query", "key", "value"))
            return torch.ops.aten._scaled_dot_product_flash_attention(queries, keys, values)[0]
        made = func(*args, **kwargs)
        del widened
        return made

    def _widened(self, args: Sequence[Tensor]) -> Any:
        """What a packed layer holds while it runs."""
        how = self.narrow.get(id(args[1])) if len(args) > 1 else None
        if how == "nf4":
            return torch.empty_like(args[1])
        if how == "int8":  # its input in 8 bits, its product in 32
            shape = (*args[0].shape[:-1], args[1].shape[0])
            return torch.empty_like(args[0], dtype=torch.int8), args[0].new_empty(shape, dtype=torch.int32)
        return None


def _cast(values: Any, dtype: torch.dtype) -> Any:
    return tree_map(lambda one: one.to(dtype) if isinstance(one, Tensor) and one.is_floating_point() else one, values)
