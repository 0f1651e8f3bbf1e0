"""Compiling the transformer blocks that the UNet repeats: blocks of one shape share their code, so it is soon done."""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock


def compile_blocks(unet: Any) -> None:
    """Compile the UNet's spatial and temporal transformer blocks, adapters included; before `recompute_activations`.

    Args:
        unet: a `UNetSpatioTemporalConditionModel` with its adapters.
    """
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock | TemporalBasicTransformerBlock):
            block.forward = torch.compile(block.forward, dynamic=False)
