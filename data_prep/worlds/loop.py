"""Comets that circle: their tail says which way, and the last frame is the first again."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, blend, ground, to_frames, vivid, with_pole
from .film import Film, Pace, draw_fps, log_uniform

TAIL = 1.6
"""Angle from a comet's head to the end of its tail, radians."""


def loop(generator: np.random.Generator, num_frames: int, side: int, pace: Pace) -> Film:
    """A comet that goes round a pole once, head first: the last frame equals the first.

    `gentle`: it swings by a few degrees, head or tail first.
    """
    canvas = Canvas(side)
    x, y = canvas.points
    background = ground(generator, canvas)
    colour = vivid(generator)
    hub = generator.uniform(0.45, 0.55, 2)
    orbit, radius = generator.uniform(0.24, 0.30), generator.uniform(0.08, 0.105)
    turn = generator.choice([-1.0, 1.0])
    first = generator.uniform(0, 2 * np.pi)
    if pace == "full":
        sweep = 2 * np.pi
    else:
        sweep = log_uniform(generator, np.radians(1.5), np.radians(25)) * generator.choice([-1.0, 1.0])
    distance = np.hypot(x - hub[0], y - hub[1])
    angle = np.arctan2(y - hub[1], x - hub[0])
    background = with_pole(background, canvas, hub)
    pale = 0.45 * colour + 0.55 * np.array([250.0, 250.0, 240.0])
    images, path = [], []
    phases = first + turn * sweep * np.linspace(0, 1, num_frames)
    for phase in phases:
        at_x, at_y = hub + orbit * np.array([np.cos(phase), np.sin(phase)])
        behind = np.mod(turn * (phase - angle), 2 * np.pi)
        tail = 0.85 * radius * (1 - behind / TAIL) - np.abs(distance - orbit)
        image = blend(background, canvas.inside(tail) * (behind < TAIL), pale)
        images.append(blend(image, canvas.inside(radius - np.hypot(x - at_x, y - at_y)), colour))
        path.append((at_x, at_y))
    headings = np.degrees(phases + turn * np.pi / 2) % 360
    where, size = np.array(path) * side, radius * side
    return Film(to_frames(images), draw_fps(generator), "comet", where, colour, size, headings=headings)
