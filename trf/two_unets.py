"""Two UNets as one: rows that run forward in time go through the first, rows that run backward through the second.

A model folder that has a UNet in `unet_backward/` beside the one in `unet/` is loaded like that by the pipeline.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

BACKWARD_FOLDER = "unet_backward"
"""Sub-folder of the second UNet in a model folder."""


class TwoUNets(nn.Module):
    """With the interface of one UNet, as far as sampling needs it; called inside of `halves.on_halves`.

    Args:
        forward_unet: `UNetSpatioTemporalConditionModel` of the rows that run forward in time.
        backward_unet: of those that run backward; of the same config.
    """

    def __init__(self, forward_unet: Any, backward_unet: Any) -> None:
        super().__init__()
        self.forward_unet = forward_unet
        self.backward_unet = backward_unet
        self._backward_rows: Tensor | None = None

    @property
    def config(self) -> Any:
        """That of the forward UNet."""
        return self.forward_unet.config

    @property
    def dtype(self) -> torch.dtype:
        """Precision of the weights."""
        return self.forward_unet.dtype

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return self.forward_unet.device

    @contextmanager
    def rows(self, backward: Tensor) -> Iterator[None]:
        """Inside the block, `backward` (`[B]` bool) says for each row which UNet it goes through."""
        self._backward_rows = backward
        try:
            yield
        finally:
            self._backward_rows = None

    def forward(
        self,
        sample: Tensor,
        timestep: Tensor | float,
        encoder_hidden_states: Tensor,
        added_time_ids: Tensor,
        return_dict: bool = True,
    ) -> Any:
        """As `UNetSpatioTemporalConditionModel.forward`.

        Raises:
            RuntimeError: outside of `rows`.
        """
        if self._backward_rows is None:
            raise RuntimeError("two UNets need to be told which rows run backward: call them inside `on_halves`.")
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        output = torch.empty(0)
        for unet, chosen in ((self.forward_unet, ~self._backward_rows), (self.backward_unet, self._backward_rows)):
            if chosen.any():
                part = unet(
                    sample[chosen], timesteps[chosen], encoder_hidden_states[chosen], added_time_ids[chosen],
                    return_dict=False,
                )[0]  # fmt: skip
                if not len(output):
                    output = part.new_empty(len(sample), *part.shape[1:])
                output[chosen] = part
        if not return_dict:
            return (output,)
        from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionOutput

        return UNetSpatioTemporalConditionOutput(sample=output)
