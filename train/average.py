"""The weights a run leaves, where they are not those it trains: their moving average, or schedule-free's."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers.training_utils import EMAModel
from torch import Tensor, nn

from ..trf.sharding import assign, whole


class Average:
    """Keeps the weights that a run shows and leaves.

    Args:
        parameters: that are trained.
        optimizer: that trains them; of a schedule-free one the weights to keep are its own average.
        decay: of the exponential moving average (its warm-up makes it lower at first); 0 keeps none.
    """

    def __init__(self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, decay: float) -> None:
        self.parameters = list(parameters)
        self.optimizer: Any = optimizer
        self.ema = EMAModel(self.parameters, decay=decay, foreach=True) if decay else None
        self.schedule_free = hasattr(optimizer, "eval")

    @property
    def differs(self) -> bool:
        """Whether the weights it keeps are others than the trained ones."""
        return self.ema is not None or self.schedule_free

    def update(self) -> None:
        """Take in the weights of a finished step."""
        if self.ema is not None:
            self.ema.step(self.parameters)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside the block the parameters hold the weights to keep; afterwards the trained ones, to the bit."""
        if not self.differs:
            yield
            return
        trained = [parameter.detach().clone() for parameter in self.parameters]
        try:
            if self.ema is not None:
                _copy(self.parameters, self.ema.shadow_params)
            else:
                self.optimizer.eval()
            yield
        finally:
            if self.schedule_free:
                self.optimizer.train()
            _copy(self.parameters, trained)

    def state(self) -> dict[str, Tensor]:
        """What resuming needs besides the kept weights: the trained ones, and how far the average is."""
        if not self.differs:
            return {}
        tensors = {f"trained.{number}": whole(value.detach()).cpu() for number, value in enumerate(self.parameters)}
        if self.ema is not None:
            tensors |= {f"average.{number}": whole(value).cpu() for number, value in enumerate(self.ema.shadow_params)}
            tensors["updates"] = torch.tensor(self.ema.optimization_step)
        return {name: value.contiguous() for name, value in tensors.items()}

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Go on from what `state` returned, to the bit."""
        for number, parameter in enumerate(self.parameters if self.differs else ()):
            assign(parameter, state[f"trained.{number}"])
            if self.ema is not None:
                assign(self.ema.shadow_params[number], state[f"average.{number}"])
        if self.ema is not None:
            self.ema.optimization_step = int(state["updates"])


@torch.no_grad()
def _copy(parameters: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    for parameter, value in zip(parameters, values):
        parameter.copy_(value)
