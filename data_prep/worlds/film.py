"""What a world yields: a film, what moves in it, and where that is in every frame.

Lengths in the worlds' files are in parts of the frame's side, `x` to the right and `y` down; times are in seconds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

Pace = Literal["gentle", "full"]
"""`full` is the motion a world is named for; `gentle` is short and slow, with no preferred direction in space or time:
the same scenes as the base world shows them."""

Array = np.ndarray


@dataclass(frozen=True)
class Film:
    """A procedural clip and its ground truth."""

    frames: Array
    """uint8 RGB `[F, H, W, 3]`."""
    fps: float
    """Frames per second."""
    kind: str
    """What is seen: `traveller`, `disc`, `comet`, `turntable`, `ball`, `glass` or `stem`."""
    positions: Array | None
    """Middle of the moving thing in every frame, `[F, 2]`, x and y in pixels; `None` where the camera moves."""
    colour: Array | None
    """Its colour, `[3]`, 0 to 255."""
    radius: float
    """Half its width in pixels; 0 where the camera moves."""
    camera: Array | None = None
    """Azimuth, elevation (degrees) and distance (turntable radii) of the camera in every frame, `[F, 3]`."""
    headings: Array | None = None
    """Where its front points in every frame, `[F]`: degrees from x (right) towards y (down); `None` without a front."""


def draw_fps(generator: np.random.Generator) -> float:
    """A whole number of frames per second from 6 to 24, every octave alike."""
    return float(round(np.exp(generator.uniform(np.log(6), np.log(24)))))


def log_uniform(generator: np.random.Generator, low: float, high: float) -> float:
    """A draw whose logarithm is uniform."""
    return float(np.exp(generator.uniform(np.log(low), np.log(high))))
