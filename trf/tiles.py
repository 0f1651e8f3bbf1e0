"""Large frames in overlapping tiles, each by itself and blended with its neighbours, for what would not fit at once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

import torch
from torch import Tensor


def in_tiles(function: Callable[[Tensor], Tensor], x: Tensor, tile: int, overlap: int, factor: int) -> Tensor:
    """What a function makes of `x`, tile by tile; where tiles overlap, one fades linearly into the other.

    Args:
        function: from `[N, C, t, u]` to `[N, C', factor t, factor u]`.
        x: `[N, C, h, w]`.
        tile: side of a tile; where `x` is smaller, its whole side.
        overlap: what neighbours share at least; both in places of `x`.
        factor: by how much the function enlarges a side.

    Returns:
        `[N, C', factor h, factor w]`, float32.

    Raises:
        ValueError: if a tile is not larger than its overlap.
    """
    rows, columns = (tile_starts(size, tile, overlap) for size in x.shape[-2:])
    shares = [
        _shares([factor * start for start in starts], factor * min(tile, size), factor * size).to(x.device)
        for starts, size in zip((rows, columns), x.shape[-2:], strict=True)
    ]
    total: Tensor | None = None
    for (row, top), (column, left) in product(enumerate(rows), enumerate(columns)):
        made = function(x[..., top : top + tile, left : left + tile]).float()
        down, across = (
            slice(factor * start, factor * start + size) for start, size in zip((top, left), made.shape[-2:])
        )
        if total is None:
            total = made.new_zeros(*made.shape[:2], len(shares[0][0]), len(shares[1][0]))
        total[..., down, across] += made * shares[0][row, down, None] * shares[1][column, across]
    assert total is not None
    return total


def tile_starts(size: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin that cover a side, evenly spaced.

    Raises:
        ValueError: if a tile is not larger than its overlap.
    """
    if not 0 <= overlap < tile:
        raise ValueError(f"tiles of {tile} cannot overlap by {overlap}: an overlap is smaller than a tile.")
    if size <= tile:
        return [0]
    count = -(-(size - overlap) // (tile - overlap))
    return [round(number * (size - tile) / (count - 1)) for number in range(count)]


def _shares(starts: Sequence[int], tile: int, size: int) -> Tensor:
    """Each tile's share of every place of a side, `[tiles, size]`: falling towards the tile's ends, one in all."""
    places, begins = torch.arange(size) + 0.5, torch.tensor(starts).unsqueeze(1)
    depth = torch.minimum(places - begins, begins + tile - places).clamp(min=0)
    return depth / depth.sum(0)
