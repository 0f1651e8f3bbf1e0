"""Gradient checkpointing of the whole UNet: diffusers leaves SVD's temporal transformer blocks out.

What a block needs while it is recomputed is then most of the memory, and most of that is in its feed-forward layers,
which are eight times as wide as it is. They can be done in chunks, each recomputed by itself.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from diffusers.models.attention import FeedForward, TemporalBasicTransformerBlock
from torch import Tensor
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


def chunk_feed_forward(unet: Any, chunks: int, contexts: Contexts = noop_context_fn) -> None:
    """Do every feed-forward layer in chunks of pixels or frames, of which only one is held at a time; exact.

    Args:
        unet: as above.
        chunks: how many; fewer where a layer has fewer pixels or frames.
        contexts: as above.
    """
    again = partial(checkpoint, use_reentrant=False, context_fn=contexts)
    for layer in unet.modules():
        if isinstance(layer, FeedForward):
            layer.forward = partial(_in_chunks, again, layer.forward, chunks)


def _in_chunks(
    again: Callable[..., Any], forward: Callable[..., Tensor], chunks: int, hidden_states: Tensor, *args: Any
) -> Tensor:
    # Of `[B, L, C]` along L, so that a chunk has all rows: adapters may act on some of them only.
    return torch.cat(
        [_where_it_pays(again, forward, part, *args) for part in hidden_states.chunk(chunks, dim=1)], dim=1
    )


def _where_it_pays(again: Callable[..., Any], forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return again(forward, *args, **kwargs) if torch.is_grad_enabled() else forward(*args, **kwargs)
