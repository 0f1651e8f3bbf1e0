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

import torch.nn.functional as F
from torch import Tensor

from .halves import rows_of_ways


class RotatedAttention:
    """Attention processor of diffusers for SVD's temporal self-attention.

    Args:
        backward: whether each row of the UNet's batch runs backward, `[B]` bool; the n-th of these belongs to the n-th
            that runs forward, and half of them do.
    """

    def __init__(self, backward: Tensor) -> None:
        self.rows = len(backward)
        self.forward_rows, self.backward_rows = rows_of_ways(backward, len(backward) // 2)

    def __call__(self, attention: Any, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Attend along the frames; `hidden_states` is `[B h w, F, C]`, and so is the result."""
        query, key, value = (
            project(hidden_states).unflatten(-1, (attention.heads, -1)).transpose(1, 2)
            for project in (attention.to_q, attention.to_k, attention.to_v)
        )
        attended = F.scaled_dot_product_attention(self._rotated(query), self._rotated(key), value)
        projected: Tensor = attention.to_out[0](attended.transpose(1, 2).flatten(2))
        return attention.to_out[1](projected) / attention.rescale_output_factor

    def _rotated(self, heads: Tensor) -> Tensor:
        """`[B h w, heads, F, d]` with the backward rows replaced by the forward ones, their frames reversed."""
        rows = heads.unflatten(0, (self.rows, -1))
        # Detached: what trains the backward rows is not to change how the forward ones attend.
        turned = rows[self.forward_rows].flip(-2).detach()
        return rows.index_copy(0, self.backward_rows, turned).flatten(0, 1)


@contextmanager
def rotated_attention(unet: Any, backward: Tensor, turned: int | None = None) -> Iterator[None]:
    """Rotate the temporal self-attention of the backward rows inside the block.

    As with `halves.on_halves`, the block holds the UNet's call and, in training, the backward pass too.

    Args:
        unet: a `UNetSpatioTemporalConditionModel`.
        backward: as of `RotatedAttention`, on the device of the UNet's inputs.
        turned: how many rows run backward, as of `halves.on_halves`.

    Raises:
        ValueError: if not as many rows run backward as forward.
    """
    from diffusers.models.attention import TemporalBasicTransformerBlock

    if 2 * (int(backward.sum()) if turned is None else turned) != len(backward):
        raise ValueError("rotated attention needs the rows of both directions in one UNet call; use no low_memory.")
    rotated = RotatedAttention(backward)
    blocks = [module for module in unet.modules() if isinstance(module, TemporalBasicTransformerBlock)]
    usual = [block.attn1.processor for block in blocks]
    for block in blocks:
        block.attn1.processor = rotated
    try:
        yield
    finally:
        for block, processor in zip(blocks, usual):
            block.attn1.processor = processor


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
            attention.processor = _value_of_one_token


def _value_of_one_token(
    attention: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """`[N, L, C]` from hidden states of that shape and a context `[N, 1, D]`."""
    projected: Tensor = attention.to_out[0](attention.to_v(encoder_hidden_states))
    return (attention.to_out[1](projected) / attention.rescale_output_factor).expand(hidden_states.shape)
