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
    """With the interface of one UNet, as far as sampling needs it; called inside of `halves.Halves.rows`.

    Args:
        forward_unet: `UNetSpatioTemporalConditionModel` of the rows that run forward in time.
        backward_unet: of those that run backward; of the same config.
    """

    def __init__(self, forward_unet: Any, backward_unet: Any) -> None:
        super().__init__()
        self.forward_unet = forward_unet
        self.backward_unet = backward_unet
        self._rows: tuple[int, int] | None = None

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
    def rows(self, forward: int, backward: int) -> Iterator[None]:
        """Inside the block, so many rows of a batch go through the first, and so many after them through the second."""
        self._rows = (forward, backward)
        try:
            yield
        finally:
            self._rows = None

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
        if self._rows is None:
            raise RuntimeError("two UNets need to be told which rows run backward: call them inside `Halves.rows`.")
        timesteps = torch.as_tensor(timestep, device=sample.device).expand(len(sample))
        inputs = (one.split(self._rows) for one in (sample, timesteps, encoder_hidden_states, added_time_ids))
        output = torch.cat([
            unet(*rows, return_dict=False)[0]
            for unet, rows in zip((self.forward_unet, self.backward_unet), zip(*inputs))
            if len(rows[0])
        ])  # fmt: skip
        if not return_dict:
            return (output,)
        from diffusers.models.unets.unet_spatio_temporal_condition import UNetSpatioTemporalConditionOutput

        return UNetSpatioTemporalConditionOutput(sample=output)
