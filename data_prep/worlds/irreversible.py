"""What looks different backwards: balls that fall and bounce, glasses that fill, stems that grow."""

from __future__ import annotations

import numpy as np

from .canvas import Canvas, blend, dull, ground, to_frames, vivid
from .film import Film, Pace, draw_fps, log_uniform

GRAVITY = 3.0
"""Sides of the frame per second squared."""
RESTITUTION = 0.75
"""Speed after a bounce over that before it."""


def irreversible(generator: np.random.Generator, num_frames: int, side: int, pace: Pace) -> Film:
    """One of the three, alike often."""
    scene = (_ball, _glass, _stem)[generator.integers(3)]
    return scene(generator, num_frames, side, pace)


def fall(height: float, times: np.ndarray) -> np.ndarray:
    """Height over the floor, in sides, of a ball let go at `height` at time 0, bouncing; `times` in seconds."""
    heights = np.empty(len(times))
    for index, time in enumerate(times):
        left, speed, above = float(time), 0.0, height
        while True:
            # Time to the floor: above + speed t - g t² / 2 = 0.
            flight = (speed + np.sqrt(speed**2 + 2 * GRAVITY * above)) / GRAVITY
            if left < flight or flight < 1e-3:
                heights[index] = max(0.0, above + speed * left - GRAVITY * left**2 / 2)
                break
            left, speed, above = left - flight, RESTITUTION * (GRAVITY * flight - speed), 0.0
    return heights


def _drift(generator: np.random.Generator, num_frames: int, low: float, high: float) -> np.ndarray:
    """A slow way within bounds, up or down, `[F]`."""
    reach = log_uniform(generator, 0.008, min(0.16, 0.9 * (high - low)))
    first = generator.uniform(low, high - reach)
    way = first + reach * np.linspace(0, 1, num_frames)
    return way[::-1] if generator.random() < 0.5 else way


def _ball(generator: np.random.Generator, num_frames: int, side: int, pace: Pace) -> Film:
    canvas, fps = Canvas(side), draw_fps(generator)
    x, y = canvas.points
    radius, floor = generator.uniform(0.09, 0.125), generator.uniform(0.82, 0.9)
    at_x = generator.uniform(0.2, 0.8)
    if pace == "full":
        height = fall(generator.uniform(0.4, 0.55), np.arange(num_frames) / fps)
        sideways = np.full(num_frames, at_x)
    else:
        height = _drift(generator, num_frames, 0.0, 0.55)
        sideways = at_x + _drift(generator, num_frames, -0.1, 0.1)
    background = ground(generator, canvas)
    background = blend(background, canvas.inside(y - floor), dull(generator, 30, 60))
    colour = vivid(generator)
    images = []
    for column, above in zip(sideways, height):
        at_y = floor - radius - above
        shadow = 0.9 * radius * (1 - 0.6 * above) - np.hypot(x - column, (y - floor - 0.03) * 3)
        image = blend(background, 0.7 * canvas.inside(shadow / 3), np.full(3, 8.0))
        image = blend(image, canvas.inside(radius - np.hypot(x - column, y - at_y)), colour)
        gleam = 0.35 * radius - np.hypot(x - column + 0.35 * radius, y - at_y + 0.35 * radius)
        images.append(blend(image, canvas.inside(gleam), 0.4 * colour + 0.6 * 255))
    path = np.stack([sideways, floor - radius - height], axis=1)
    return Film(to_frames(images), fps, "ball", path * side, colour, radius * side)


def _glass(generator: np.random.Generator, num_frames: int, side: int, pace: Pace) -> Film:
    """A float rides on what is poured into the glass."""
    canvas, fps = Canvas(side), draw_fps(generator)
    x, y = canvas.points
    half, bottom, depth = generator.uniform(0.16, 0.22), generator.uniform(0.85, 0.92), 0.55
    middle, radius = generator.uniform(0.35, 0.65), generator.uniform(0.075, 0.095)
    if pace == "full":
        first, gain = generator.uniform(0.06, 0.12), generator.uniform(0.28, 0.40)
        level = first + gain * np.linspace(0, 1, num_frames)
    else:
        level = _drift(generator, num_frames, 0.06, 0.5)
    background = ground(generator, canvas)
    wall = np.maximum(np.abs(x - middle) - half, np.maximum(y - bottom, bottom - depth - y))
    background = blend(background, canvas.inside(0.025 - wall), dull(generator, 180, 220))
    background = blend(background, canvas.inside(-wall), np.full(3, 40.0))
    colour, liquid = vivid(generator), np.array([95.0, 120.0, 140.0]) + generator.uniform(-15, 15, 3)
    images = []
    for height in level:
        surface = bottom - height
        image = blend(background, canvas.inside(np.minimum(-wall, y - surface)), liquid)
        # The jet runs along the right wall; full or gentle, it is always there.
        jet = np.minimum(0.03 - np.abs(x - middle - 0.7 * half), surface - y)
        image = blend(image, canvas.inside(jet), liquid)
        at_x, at_y = middle - 0.35 * half, surface - 0.4 * radius
        images.append(blend(image, canvas.inside(radius - np.hypot(x - at_x, y - at_y)), colour))
    path = np.stack([np.full(num_frames, middle - 0.35 * half), bottom - level - 0.4 * radius], axis=1)
    return Film(to_frames(images), fps, "glass", path * side, colour, radius * side)


def _stem(generator: np.random.Generator, num_frames: int, side: int, pace: Pace) -> Film:
    """A bud on a stem that grows up, with a bend, and leaves where it has been."""
    canvas, fps = Canvas(side), draw_fps(generator)
    x, y = canvas.points
    soil, root = generator.uniform(0.85, 0.92), generator.uniform(0.3, 0.7)
    radius, lean = generator.uniform(0.075, 0.1), generator.uniform(-0.25, 0.25)
    if pace == "full":
        first, gain = generator.uniform(0.12, 0.2), generator.uniform(0.30, 0.45)
        length = first + gain * np.linspace(0, 1, num_frames)
    else:
        length = _drift(generator, num_frames, 0.12, 0.62)
    background = ground(generator, canvas)
    background = blend(background, canvas.inside(y - soil), np.array([70.0, 55.0, 40.0]) + generator.uniform(-8, 8, 3))
    colour, green = vivid(generator), np.array([95.0, 130.0, 85.0])
    up = soil - y
    images, path = [], []
    for tip in length:
        line = root + lean * up
        stalk = np.minimum(0.022 - np.abs(x - line), np.minimum(up, tip - up))
        image = blend(background, canvas.inside(stalk), green)
        for number, knot in enumerate((0.1, 0.24, 0.38)):
            leaf = np.clip((tip - knot) / 0.12, 0, 1) * 0.09
            out = (x - line) * (-1) ** number
            blade = leaf / 2 - np.hypot(out - leaf / 2, (up - knot) * 2)
            image = blend(image, canvas.inside(blade / 2) * (leaf > 0.01), green)
        at_x, at_y = root + lean * tip, soil - tip
        images.append(blend(image, canvas.inside(radius - np.hypot(x - at_x, y - at_y)), colour))
        path.append((at_x, at_y))
    return Film(to_frames(images), fps, "stem", np.array(path) * side, colour, radius * side)
