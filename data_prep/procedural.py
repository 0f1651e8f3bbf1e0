"""Procedural videos: seeded worlds to try the whole chain on without any footage.

The linear world: a textured body with a bright front travels along its front over a still, textured ground. Which way
is forward shows in every frame. Textures are sums of sine waves, so they move by fractions of a pixel exactly.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .writing import write_video

Waves = tuple[np.ndarray, np.ndarray, np.ndarray]


def linear_clip(generator: np.random.Generator, num_frames: int, size: tuple[int, int]) -> np.ndarray:
    """One body that travels through the frame at constant velocity, uint8 `[num_frames, H, W, 3]`.

    Args:
        generator: draws direction, speed, size, colours and textures.
        num_frames: frames of the clip.
        size: height and width, pixels.
    """
    height, width = size
    shorter = min(size)
    heading = generator.uniform(0, 2 * np.pi)
    forward = np.array([np.cos(heading), np.sin(heading)])
    # The whole body stays in the frame: 0.05 off the middle, 0.225 of travel and 1.6 * 0.14 of body make 0.5.
    radius = generator.uniform(0.10, 0.14) * shorter
    travel = generator.uniform(0.15, 0.45) * shorter
    middle = np.array([width, height]) * generator.uniform(0.45, 0.55, 2)
    ground, coat = _waves(generator, shorter), _waves(generator, shorter)
    ground_colour, coat_colour = generator.uniform(50, 110, 3), generator.uniform(100, 160, 3)
    front_colour = np.array([250.0, 240.0, 160.0])

    y, x = np.mgrid[:height, :width].astype(np.float64)
    background = ground_colour + 30 * _texture(ground, x, y)[..., None]
    frames = np.empty((num_frames, height, width, 3), np.uint8)
    for index, progress in enumerate(np.linspace(-0.5, 0.5, num_frames)):
        centre = middle + forward * travel * progress
        along = (x - centre[0]) * forward[0] + (y - centre[1]) * forward[1]
        across = (y - centre[1]) * forward[0] - (x - centre[0]) * forward[1]
        # An ellipse, longer along its way; one pixel of ramp on every edge keeps sub-pixel motion visible.
        inside = _ramp(radius - np.hypot(along / 1.6, across))
        front = _ramp(along - 0.8 * radius)
        body = coat_colour + 40 * _texture(coat, along, across)[..., None]
        body += front[..., None] * (front_colour - body)
        frames[index] = np.clip(background + inside[..., None] * (body - background), 0, 255).round()
    return frames


def write_linear_world(
    folder: Path, *, count: int, seed: int, num_frames: int, fps: float, size: tuple[int, int]
) -> list[Path]:
    """Write `count` clips of the linear world as `linear_0000.mp4`, …; clip `i` depends on `seed` and `i` alone."""
    paths = [folder / f"linear_{index:04d}.mp4" for index in range(count)]
    for index, path in enumerate(paths):
        write_video(path, linear_clip(np.random.default_rng([seed, index]), num_frames, size), fps)
    return paths


def _waves(generator: np.random.Generator, shorter: int, count: int = 6) -> Waves:
    lengths = shorter * generator.uniform(0.06, 0.25, count)
    angles = generator.uniform(0, np.pi, count)
    return 2 * np.pi / lengths * np.cos(angles), 2 * np.pi / lengths * np.sin(angles), generator.uniform(0, 6.28, count)


def _texture(waves: Waves, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    kx, ky, phase = (wave[:, None, None] for wave in waves)
    texture: np.ndarray = np.sin(kx * x + ky * y + phase).sum(0) / np.sqrt(len(phase))
    return texture


def _ramp(distance: np.ndarray) -> np.ndarray:
    return np.clip(distance + 0.5, 0, 1)
