"""Compiling the transformer blocks that the UNet repeats: blocks of one shape share their code, so it is soon done."""

from __future__ import annotations

from typing import Any

import torch
import torch._dynamo
from diffusers.models.attention import BasicTransformerBlock, TemporalBasicTransformerBlock

PER_SHAPE = 8
"""Times that the code of a block may be compiled for a shape of clips: for every width, with gradients and without."""


def compile_blocks(unet: Any, shapes: int = 1) -> None:
    """Compile the UNet's spatial and temporal transformer blocks, adapters included; before `recompute_activations`.

    Args:
        unet: a `UNetSpatioTemporalConditionModel` with its adapters.
        shapes: how many shapes of clips it is going to see; blocks are compiled for each.
    """
    # PyTorch's limit is meant for one shape; beyond it blocks would run uncompiled, with a warning at most.
    dynamo: Any = torch._dynamo.config
    dynamo.recompile_limit = max(dynamo.recompile_limit, PER_SHAPE * shapes)
    for block in unet.modules():
        if isinstance(block, BasicTransformerBlock | TemporalBasicTransformerBlock):
            block.forward = torch.compile(block.forward, dynamic=False)
