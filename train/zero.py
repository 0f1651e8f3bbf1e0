"""DeepSpeed's ZeRO as accelerate starts it, around adapters that stay float32.

Stage 3 holds the frozen base in parts. The adapters come in afterwards and are none of DeepSpeed's business: they lie
whole on every process, their gradients are averaged (DDP), and all else about them is as on one GPU.

Stage 2 holds in parts what training adds to the weights, the adapters' gradients and their optimizer's state; the base
is not touched.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

if TYPE_CHECKING:
    from ..configs.training import TrainConfig

LIVE = 100_000_000
"""Weights of the base that a process may hold whole under stage 3; DeepSpeed's own limit is ten times that."""


class ZeroAccelerator(Accelerator):  # type: ignore[misc]
    """accelerate's, where DeepSpeed does what is said above and no more."""

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        # Or transformers would cut up the image encoder too.
        unset_hf_deepspeed_config()
        self.stage: int = self.deepspeed_plugin.zero_stage
        self.autocast_dtype = torch.bfloat16 if self.mixed_precision == "bf16" else None
        self.last = True
        settings = self.deepspeed_plugin.deepspeed_config
        # The loop's own business, whatever a machine file says.
        settings |= {"train_micro_batch_size_per_gpu": 1, "train_batch_size": self.num_processes}
        settings |= {"gradient_accumulation_steps": 1, "gradient_clipping": 0.0}
        if self.stage == 2:
            settings["bf16"] = {"enabled": False}  # it would round the adapters
        else:
            limits = {"stage3_max_live_parameters": LIVE, "stage3_max_reuse_distance": LIVE}
            settings["zero_optimization"] = {**limits, **settings["zero_optimization"]}

    def check(self, config: TrainConfig) -> None:
        """See `check_zero`."""
        offload = self.deepspeed_plugin.deepspeed_config["zero_optimization"].get("offload_optimizer", {})
        check_zero(self.stage, offload.get("device", "none") != "none", config)

    def cut(self, unet: Any) -> None:
        """Under stage 3, hold the frozen UNet in parts; before adapters are in it."""
        if self.stage == 3:
            super().prepare(unet.requires_grad_(False))
            held = sum(one.ds_tensor.numel() for one in unet.parameters())
            of = sum(one.ds_numel for one in unet.parameters())
            self.print(f"ZeRO-3: each process holds {held:,} of the base's {of:,} weights.")

    def prepare(self, unet: Any, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, torch.optim.Optimizer]:
        """The UNet with its adapters on the device, and how it is called to be trained."""
        unet.to(self.device)
        if self.autocast_dtype is not None:
            unet.forward = torch.autocast(self.device.type, self.autocast_dtype)(unet.forward)
        if self.stage == 2:
            return unet, optimizer  # see SplitOptimizer
        handled = self.ddp_handler.to_kwargs()
        return DistributedDataParallel(unet, init_sync=False, **handled), optimizer

    @contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:
        """A batch after which no step is made."""
        self.last = False
        with model.no_sync() if self.stage == 3 else nullcontext():
            yield
        self.last = True

    def backward(self, loss: Tensor, **_: Any) -> None:
        """Take the gradient."""
        engine = self.deepspeed_engine_wrapped.engine
        if self.stage == 3:
            torch.autograd.backward(loss)
            # Gradient checkpointing leaves weights gathered whose hooks never run.
            engine.optimizer.release_backward_leftovers()
        else:
            engine.set_gradient_accumulation_boundary(self.last)
            engine.backward(loss)


def check_zero(stage: int, offloads_optimizer: bool, config: TrainConfig) -> None:
    """Check that a stage of ZeRO can do what is asked for.

    Args:
        stage: that was launched.
        offloads_optimizer: whether the machine file says so.
        config: of the run.

    Raises:
        ValueError: naming what it cannot.
    """
    if stage not in (2, 3):
        raise ValueError(f"DeepSpeed was launched with zero_stage {stage}; give it 2 or 3, or no DeepSpeed.")
    if offloads_optimizer:
        raise ValueError("offload_optimizer_device: an adapter's optimizer is small and stays where it is; set none.")
    if config.precision == "fp16":
        raise ValueError("precision=fp16 scales the gradient, which is not supported under DeepSpeed; choose bf16.")
    if config.compile:
        raise ValueError("compile cannot hold layers whose weights DeepSpeed brings and takes; leave one out.")
    if stage == 3 and config.quantization is not None:
        raise ValueError(
            f"quantization={config.quantization}: ZeRO-3 cannot cut packed weights; choose one of the two."
        )
    if stage == 3 and config.lora.kind in ("dora", "loha"):
        raise ValueError(f"lora.kind={config.lora.kind} is made from weights that ZeRO-3 has cut; choose lora or lokr.")
    if stage == 2 and config.optim.name != "adamw":
        raise ValueError(
            f"optim.name={config.optim.name}: ZeRO-2 cuts through weights, which only adamw bears; use it."
        )
    if stage == 2 and config.objective.alternate_directions:
        raise ValueError("objective.alternate_directions rests adapters in turn, which ZeRO-2 cannot; choose ZeRO-3.")


class SplitOptimizer:
    """Stage 2: DeepSpeed's optimizer over parts of the adapters, in place of accelerate's wrapper.

    Args:
        accelerator: of stage 2.
        unet: with its adapters, prepared.
        optimizer: of the adapters, with the state it is to go on from. From here on its groups hold, instead of the
            adapters' parameters, one flat tensor each: this process's part.
    """

    def __init__(self, accelerator: ZeroAccelerator, unet: Any, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer
        self.groups: list[list[nn.Parameter]] = [list(group["params"]) for group in optimizer.param_groups]
        state = {one: optimizer.state.pop(one, {}) for one in self._parameters()}
        self.model, wrapped = Accelerator.prepare(accelerator, _Trained(unet, self._parameters()), optimizer)
        self.zero = wrapped.optimizer
        self.pending = False
        held = sum(part.numel() for part in self._parts())
        accelerator.print(f"ZeRO-2: each process keeps the optimizer of {held:,} weights.")
        for own, flat in zip(self.groups, self._parts()):
            for name, value in state[own[0]].items():
                if value.shape != own[0].shape:  # the step counter
                    optimizer.state[flat][name] = value
                    continue
                optimizer.state[flat][name] = torch.zeros_like(flat)
                for one in own:
                    _copy_part(optimizer.state[flat][name], state[one][name], one, back=False)

    def _parameters(self) -> list[nn.Parameter]:
        return [one for own in self.groups for one in own]

    def _parts(self) -> list[Tensor]:
        return [group["params"][0] for group in self.optimizer.param_groups]

    def whole(self) -> Any:
        """The optimizer as it would be in one piece, to be read; all processes have to ask at once."""
        state: dict[Tensor, dict[str, Any]] = {one: {} for one in self._parameters()}
        for own, flat in zip(self.groups, self._parts()):
            for name, value in self.optimizer.state[flat].items():
                if value.shape != flat.shape:
                    pieces: Iterable[Tensor] = [value] * len(own)
                else:
                    gathered = torch.zeros(sum(one.numel() for one in own), device=flat.device)
                    pieces = torch.split(gathered, [one.numel() for one in own])
                    for one, piece in zip(own, pieces):
                        _copy_part(value, piece, one, back=True)
                    torch.distributed.all_reduce(gathered)
                    pieces = [piece.view_as(one) for one, piece in zip(own, pieces)]
                for one, piece in zip(own, pieces):
                    state[one][name] = piece
        groups = [{**group, "params": own} for group, own in zip(self.optimizer.param_groups, self.groups)]
        return SimpleNamespace(param_groups=groups, state=state)

    def clip(self, adapters: Iterable[Sequence[nn.Parameter]], most: float) -> list[Tensor]:
        """Clip each adapter's gradient by itself, after a backward pass; returns their norms before."""
        gradients = self.zero.averaged_gradients
        for number, pieces in gradients.items():
            gradients[number] = [torch.cat([piece.flatten() for piece in pieces])]
        parts = [
            [_part(gradients[place.param_group_index][0], place) for one in own if (place := _place(one))]
            for own in adapters
        ]
        nothing = torch.zeros((), device=self._parts()[0].device)
        squares = torch.stack([get_total_norm(own).square() if own else nothing for own in parts])
        torch.distributed.all_reduce(squares)
        norms = squares.sqrt()
        for own, norm in zip(parts, norms):
            for part in own:
                part.mul_((most / (norm + 1e-6)).clamp(max=1.0))
        self.pending = True
        return list(norms)

    def step(self) -> None:
        """Make the step, and gather the weights."""
        self.model.step()
        self.pending = False

    def zero_grad(self) -> None:
        """Drop a gradient that no step was made with; it is not finite, and such a step is none to DeepSpeed."""
        if self.pending:
            self.step()


class _Trained(nn.Module):
    """Called, it is the UNet; its parameters are only those that are trained."""

    def __init__(self, unet: nn.Module, parameters: Iterable[nn.Parameter]) -> None:
        super().__init__()
        self.trained = nn.ParameterList(parameters)
        self.call = [unet]  # in a list, where torch does not look for modules

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.call[0](*args, **kwargs)


def _place(parameter: Any) -> Any:
    """Which part of a parameter this process holds, and where; `None` if it holds none of it."""
    return parameter._hp_mapping


def _part(flat: Tensor, place: Any) -> Tensor:
    """What this process holds of a parameter, in its flat tensor."""
    return flat.narrow(0, place.hp_fragment_address.start, place.hp_fragment_address.numel)


def _copy_part(flat: Tensor, value: Tensor, parameter: nn.Parameter, *, back: bool) -> None:
    """Copy what this process holds of a parameter from a whole tensor into its flat one, or back."""
    if place := _place(parameter):
        its = value.view(-1).narrow(0, place.lp_fragment_address.start, place.lp_fragment_address.numel)
        mine = _part(flat, place)
        (its if back else mine).copy_(mine if back else its)
