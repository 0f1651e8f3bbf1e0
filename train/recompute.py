"""Gradient checkpointing of the whole UNet: diffusers leaves SVD's temporal transformer blocks out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import TemporalBasicTransformerBlock
from torch.utils.checkpoint import checkpoint, noop_context_fn

Contexts = Callable[[], tuple[AbstractContextManager[Any], AbstractContextManager[Any]]]


def recompute_activations(unet: Any, contexts: Contexts = noop_context_fn) -> None:
    """Keep only what goes into the UNet's blocks, and compute the rest again in the backward pass.

    Args:
        unet: a `UNetSpatioTemporalConditionModel`, with its adapters or without.
        contexts: what the first and the second computation of a block run in, as of `torch.utils.checkpoint`.
    """
    again = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    unet.enable_gradient_checkpointing(again)
    for block in unet.modules():
        if isinstance(block, TemporalBasicTransformerBlock):
            block.forward = partial(_where_it_pays, again, block.forward)


def _where_it_pays(again: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return again(forward, *args, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)
