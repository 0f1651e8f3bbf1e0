"""Attention of SVD's UNet done otherwise than diffusers does it.

Rotated temporal attention: rows running backward attend as those running forward do, turned by 180 degrees.

Generative Inbetweening (arXiv 2408.15239) replaces the temporal self-attention map of the backward pass by that of the
forward pass, both of its axes reversed. No map needs to be stored, since reversing queries and keys does the same:
`rotate(softmax(Q K^T)) = softmax(flip(Q) flip(K)^T)`. With the rows of both directions in one batch, the backward rows
take queries and keys from their forward rows and only the values from themselves.

Attention to one token: all of a softmax over one key is 1, so the cross-attention to SVD's one CLIP token is its value.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


class RotatedAttention:
    """A processor of diffusers for SVD's temporal self-attention, along the frames."""

    def __call__(self, attention: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attend; `hidden_states` is `[B h w, F, C]`, and so is the result.

        The first half of the rows runs forward, and the n-th row of the second half attends as the n-th of the first
        does, turned.
        """
        query, key, value = (
            project(hidden_states).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for project in (attention.to_q, attention.to_k, attention.to_v)
        )
        attended = F.scaled_dot_product_attention(_turned(query), _turned(key), value)
        projected: Tensor = attention.to_out[0](attended.transpose(1, 2).flatten(2))
        return attention.to_out[1](projected) / attention.rescale_output_factor


def _turned(heads: Tensor) -> Tensor:
    """`[2 h w, heads, F, d]` with its second half replaced by the first, their frames reversed."""
    forward = heads[: len(heads) // 2]
    # Detached: what trains the backward rows is not to change how the forward ones attend.
    return torch.cat([forward, forward.detach().flip(-2)])


@contextmanager
def rotated_attention(unet: Any, forward: int, backward: int) -> Iterator[None]:
    """Rotate the temporal self-attention of the backward rows inside the block.

    As with `halves.Halves.rows`, the block holds the UNet's call and, in training, the backward pass too.

    Args:
        unet: a `UNetSpatioTemporalConditionModel`.
        forward: number of rows of the UNet's batch that run forward in time; they come first.
        backward: number of those that run backward; the n-th of them belongs to the n-th that runs forward.

    Raises:
        ValueError: if not as many rows run backward as forward.
    """
    from diffusers.models.attention import TemporalBasicTransformerBlock

    if forward != backward:
        raise ValueError("rotated attention needs the rows of both directions in one UNet call; use no low_memory.")
    blocks = [module for module in unet.modules() if isinstance(module, TemporalBasicTransformerBlock)]
    usual = [block.attn1.processor for block in blocks]
    for block in blocks:
        block.attn1.processor = RotatedAttention()
    try:
        yield
    finally:
        for block, processor in zip(blocks, usual):
            block.attn1.processor = processor


class OneTokenAttention:
    """A processor of diffusers for cross-attention to one token."""

    def __call__(
        self, attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
    ) -> Tensor:
        """Attend; `[N, L, C]` from hidden states of that shape and a context `[N, 1, D]`."""
        projected: Tensor = attention.to_out[0](attention.to_v(encoder_hidden_states))
        return (attention.to_out[1](projected) / attention.rescale_output_factor).expand(hidden_states.shape)


def attend_to_one_token(unet: Any) -> None:
    """Let the UNet's cross-attention give its one token's value, for good; up to rounding it gives the same.

    It then needs no queries and keys, and projects one token for all places. Layers whose queries or keys are adapted
    stay as they are.

    Args:
        unet: a `UNetSpatioTemporalConditionModel`, whose context is one token (SVD's always is).
    """
    from peft.tuners.tuners_utils import BaseTunerLayer

    for block in unet.modules():
        attention = getattr(block, "attn2", None)
        if attention is not None and not any(
            isinstance(one, BaseTunerLayer) for one in (attention.to_q, attention.to_k)
        ):
            attention.processor = OneTokenAttention()


@contextmanager
def one_token_attention(unet: Any) -> Iterator[None]:
    """The same inside the block only, for all layers; those with a processor other than diffusers' usual keep it.

    Args:
        unet: as above, or `TwoUNets`.
    """
    from diffusers.models.attention_processor import AttnProcessor, AttnProcessor2_0

    layers = [block.attn2 for block in unet.modules() if getattr(block, "attn2", None) is not None]
    usual = [(layer, layer.processor) for layer in layers if type(layer.processor) in (AttnProcessor, AttnProcessor2_0)]
    for layer, _ in usual:
        layer.processor = OneTokenAttention()
    try:
        yield
    finally:
        for layer, processor in usual:
            layer.processor = processor
