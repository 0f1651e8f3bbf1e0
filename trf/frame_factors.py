"""Adapters that act more strongly in some frames than in others.

What an adapter adds to a layer's output is multiplied by a factor of each frame. Layers of SVD's UNet see frames in
three places: folded into the batch (spatial ones, `[B F, ...]`), along an axis (temporal ones, `[B h w, F, C]` and
`[B, C, F, h, w]`), or not at all (the noise level's embedding, `[B, C]`), which serves all frames at once and takes the
mean of their factors. The context of temporal cross-attention is one token for all frames, `[B h w, 1, D]`; since
attention to one token is its value, each frame is given a value of its own there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .adapters import lora_layers
from .attention import one_token_attention
from .schedule import Way
from .two_unets import TwoUNets


def factors_over(points: Sequence[tuple[float, float]], places: Mapping[Way, Tensor]) -> Mapping[Way, Tensor] | None:
    """The factors of points (place, factor): linear between them, constant beyond; none without points.

    Args:
        points: their places rise; 0 is a film's first frame and 1 its last.
        places: of each direction's frames, in its own order, `[rows, F]`.

    Returns:
        Factors of these frames, of the same shape, float32.
    """
    if not points:
        return None
    known, factors = zip(*points)
    return {
        way: torch.from_numpy(np.interp(at.cpu().numpy(), known, factors)).to(at.device, torch.float32)
        for way, at in places.items()
    }


@contextmanager
def on_frames(unet: Any, factors: Tensor) -> Iterator[None]:
    """Multiply what all active adapters add by a factor of each row and frame, inside the block.

    The block holds the UNet's call, and lies inside of `halves.Halves.rows` where adapters differ between the halves.
    Cross-attention is done as by `attention.one_token_attention`.

    Args:
        unet: a `UNetSpatioTemporalConditionModel`.
        factors: `[B, F]`, for the B rows of the UNet's batch and their F > 1 frames.

    Raises:
        ValueError: where a layer sees only a part of the frames, or of two UNets each only its own rows.
    """
    if isinstance(unet, TwoUNets):
        raise ValueError("patch_frames is for models with one UNet, and this one has two.")
    if any(getattr(module, "_chunk_size", None) is not None for module in unet.modules()):
        raise ValueError("patch_frames needs all frames in a layer; load a model without enable_forward_chunking().")
    with ExitStack() as undo:
        undo.enter_context(one_token_attention(unet))
        for name, layer in lora_layers(unet):
            undo.callback(_put_back, layer, vars(layer).get("forward"))
            layer.forward = _weighted(layer, factors, temporal="temporal_" in name)
        yield


def _put_back(layer: Any, forward: Callable[..., Tensor] | None) -> None:
    if forward is None:
        del layer.forward
    else:
        layer.forward = forward


def _weighted(layer: Any, factors: Tensor, *, temporal: bool) -> Callable[..., Tensor]:
    """The forward pass of a layer, between that without adapters and that with them, both of which are made."""
    adapted = layer.forward

    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        output = adapted(x, *args, **kwargs)
        base = layer.get_base_layer()(x, *args, **kwargs)
        # At a factor of 0 or 1 this is either of them to the bit.
        return base.lerp(output, _along(factors, output, temporal=temporal).to(output.dtype))

    return forward


def _along(factors: Tensor, output: Tensor, *, temporal: bool) -> Tensor:
    """Factors `[B, F]` in the shape that multiplies a layer's output."""
    rows, frames = factors.shape
    if output.ndim == 5 and output.shape[2] == frames:
        return factors.view(rows, 1, frames, 1, 1)
    if temporal and output.ndim == 3 and output.shape[1] in (1, frames):  # one token becomes one for each frame
        return factors.repeat_interleave(len(output) // rows, 0).unsqueeze(-1)
    if not temporal and len(output) == rows * frames:
        return factors.view(-1, *[1] * (output.ndim - 1))
    if not temporal and output.shape[:-1] == (rows,):
        return factors.mean(1, keepdim=True)
    raise ValueError(f"patch_frames needs all {frames} frames in a layer, and one makes {tuple(output.shape)} of them.")
