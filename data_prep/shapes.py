"""Shapes of clips: which of several sizes footage is put into, and clips counted by their shapes."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from math import log
from typing import TYPE_CHECKING, NamedTuple

from .frames import FitMode

if TYPE_CHECKING:
    import datasets

SAME_ASPECT = 0.05
"""Aspect ratios whose logs differ by no more count as one: multiples of 64 are seldom nearer to what they stand for."""


class Size(NamedTuple):
    """Pixels of a frame; as a string, width first."""

    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"


class Shape(NamedTuple):
    """All that must be equal for clips to be in one batch."""

    num_frames: int
    height: int
    width: int

    def __str__(self) -> str:
        return f"{self.num_frames} frames of {Size(self.height, self.width)}"


def parse_size(text: str) -> Size:
    """A size written as WIDTHxHEIGHT.

    Raises:
        ValueError: if it is not written so.
    """
    match = re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", str(text))
    if not match:
        raise ValueError(f"sizes: {text!r} is no size; write WIDTHxHEIGHT, such as 1024x576.")
    return Size(height=int(match[2]), width=int(match[1]))


def nearest_size(source: Size, sizes: Sequence[Size], fit: FitMode) -> Size:
    """The size that footage is put into: the one of the nearest aspect ratio, by the distance of their logs.

    Sizes that are as near up to `SAME_ASPECT` are told apart by their areas: the largest that needs no enlarging, and
    where all do, the smallest; of equal ones the first. So a square film between a wide and a tall size goes into the
    first given.

    Args:
        source: of the footage, upright and with square pixels.
        sizes: to choose from, at least one.
        fit: `crop` fills the size, so enlarges sooner than `pad`, which lies within it.
    """
    distance = {size: abs(log(source.width * size.height / (source.height * size.width))) for size in sizes}
    alike = [size for size in sizes if distance[size] <= min(distance.values()) + SAME_ASPECT]
    factor = max if fit == "crop" else min
    whole = [size for size in alike if factor(size.height / source.height, size.width / source.width) <= 1]
    return max(whole, key=_area) if whole else min(alike, key=_area)


def shapes_of(clips: datasets.Dataset) -> list[Shape]:
    """The shape of each clip of a dataset; no image is decoded."""
    return [
        Shape(len(indices), height, width)
        for indices, height, width in zip(clips["frame_indices"], clips["height"], clips["width"])
    ]


def counted(shapes: Iterable[Shape]) -> dict[Shape, int]:
    """How often each shape is there, most often first; of equal ones the largest."""
    return dict(sorted(Counter(shapes).items(), key=lambda one: (one[1], one[0]), reverse=True))


def _area(size: Size) -> int:
    return size.height * size.width
