"""Discs that go round a pole, either way: the kind of motion can be seen in one frame, its direction cannot."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, ground, with_pole
from .film import Film, Pace, log_uniform
from .linear import filmed, straight


def control(generator: np.random.Generator, num_frames: int, side: int, pace: Pace) -> Film:
    """A disc that goes as far as travellers do, round a pole, this way or that way.

    Not in a straight line: what stays in the frame and goes far in one can be seen to go where there is room.

    `gentle`: a disc without a pole that slides up to a fifth of the frame.
    """
    canvas = Canvas(side)
    radius = generator.uniform(0.12, 0.16)
    if pace == "gentle":
        travel, way = log_uniform(generator, 0.01, 0.2), generator.uniform(0, 2 * np.pi)
        path = straight(generator, num_frames, travel, way, margin=radius)
        return filmed(generator, canvas, ground(generator, canvas), path, None, radius)
    pole, orbit = generator.uniform(0.47, 0.53, 2), generator.uniform(0.24, 0.29)
    first, sweep = generator.uniform(0, 2 * np.pi), generator.uniform(np.radians(75), np.radians(125))
    phases = first + generator.choice([-1.0, 1.0]) * sweep * np.linspace(0, 1, num_frames)
    path = pole + orbit * np.stack([np.cos(phases), np.sin(phases)], axis=1)
    return filmed(generator, canvas, with_pole(ground(generator, canvas), canvas, pole), path, None, radius)
