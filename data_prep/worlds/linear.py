"""Things that travel along their front, in a straight line, far."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, blend, draw_texture, ground, to_frames, vivid
from .film import Film, Pace, draw_fps, log_uniform

LENGTH = 1.5
"""Length of a traveller over its width."""


def linear(generator: np.random.Generator, num_frames: int, side: int, pace: Pace) -> Film:
    """A traveller with a pale nose, two eyes and a dark tail, crossing a third to two thirds of the frame.

    `gentle`: it slides up to a fifth of the frame, whichever way it faces.
    """
    radius = generator.uniform(0.10, 0.14)
    heading = generator.uniform(0, 2 * np.pi)
    if pace == "full":
        travel, way = generator.uniform(0.35, 0.60), heading
    else:
        travel, way = log_uniform(generator, 0.01, 0.2), generator.uniform(0, 2 * np.pi)
    path = straight(generator, num_frames, travel, way, margin=LENGTH * radius)
    canvas = Canvas(side)
    return filmed(generator, canvas, ground(generator, canvas), path, heading, radius)


def straight(generator: np.random.Generator, num_frames: int, travel: float, way: float, margin: float) -> np.ndarray:
    """Positions `[F, 2]` at constant velocity, with the thing inside the frame all the way."""
    step = travel * np.array([np.cos(way), np.sin(way)])
    low, high = margin + np.maximum(0, -step), 1 - margin - np.maximum(0, step)
    # A thing that is too long for its way starts where it sticks out as much as it ends.
    first = np.where(low < high, generator.uniform(np.minimum(low, high), np.maximum(low, high)), (low + high) / 2)
    path: np.ndarray = first + np.linspace(0, 1, num_frames)[:, None] * step
    return path


def filmed(
    generator: np.random.Generator,
    canvas: Canvas,
    background: np.ndarray,
    path: np.ndarray,
    heading: float | None,
    radius: float,
) -> Film:
    """A thing that is at `path` `[F, 2]` over a background; a traveller that faces `heading`, or a disc without one."""
    x, y = canvas.points
    colour, coat = vivid(generator), draw_texture(generator, 0.12, 0.3)
    pale, dark = np.array([250.0, 245.0, 225.0]), np.array([25.0, 25.0, 30.0])
    cos, sin = np.cos(heading or 0.0), np.sin(heading or 0.0)
    images = []
    for at_x, at_y in path:
        along = (x - at_x) * cos + (y - at_y) * sin
        across = (y - at_y) * cos - (x - at_x) * sin
        length = 1.0 if heading is None else LENGTH
        body = colour + (16 * coat(along, across))[..., None]
        if heading is not None:
            body = blend(body, canvas.inside(along - 0.75 * radius), pale)
            body = blend(body, canvas.inside(-along - 0.85 * radius), dark)
            for eye in (-0.4, 0.4):
                near = 0.24 * radius - np.hypot(along - 0.95 * radius, across - eye * radius)
                body = blend(body, canvas.inside(near), dark)
        images.append(blend(background, canvas.inside(radius - np.hypot(along / length, across)), body))
    kind = "disc" if heading is None else "traveller"
    headings = None if heading is None else np.full(len(path), np.degrees(heading))
    where, size = path * canvas.side, radius * canvas.side
    return Film(to_frames(images), draw_fps(generator), kind, where, colour, size, headings=headings)
