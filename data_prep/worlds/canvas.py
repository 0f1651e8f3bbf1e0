"""Drawing with soft edges: textures that move by fractions of a pixel exactly, shapes, colours, video's chroma.

Pixel values are floats, 0 to 255, until `to_frames`. `[H, W, 3]` images, `[H, W]` coverages in [0, 1].
"""

from __future__ import annotations

import colorsys
from dataclasses import dataclass

import numpy as np

Array = np.ndarray
LUMA = np.array([0.299, 0.587, 0.114])


@dataclass(frozen=True)
class Texture:
    """A sum of sine waves, defined everywhere, of unit variance or so."""

    wave_x: Array
    wave_y: Array
    phase: Array

    def __call__(self, x: Array, y: Array) -> Array:
        """Its values at points, in parts of the frame's side."""
        angles = np.multiply.outer(self.wave_x, x) + np.multiply.outer(self.wave_y, y)
        angles += self.phase.reshape(-1, *[1] * np.ndim(x)).astype(np.float32)
        values: Array = np.sin(angles).sum(0) * np.float32(np.sqrt(2 / len(self.phase)))
        return values


def draw_texture(generator: np.random.Generator, shortest: float, longest: float, waves: int = 5) -> Texture:
    """A texture of wavelengths between two lengths."""
    frequency = 2 * np.pi / generator.uniform(shortest, longest, waves)
    angle = generator.uniform(0, np.pi, waves)
    phase = generator.uniform(0, 2 * np.pi, waves)
    wave_x, wave_y = frequency * np.cos(angle), frequency * np.sin(angle)
    return Texture(wave_x.astype(np.float32), wave_y.astype(np.float32), phase)


def vivid(generator: np.random.Generator) -> Array:
    """A saturated colour `[3]`, such as moving things have."""
    hue, saturation, value = generator.random(), generator.uniform(0.75, 0.95), generator.uniform(0.75, 0.95)
    return 255 * np.array(colorsys.hsv_to_rgb(hue, saturation, value))


def dull(generator: np.random.Generator, low: float = 70, high: float = 150) -> Array:
    """A greyish colour `[3]`, such as grounds have, so that a vivid thing stands out."""
    return generator.uniform(low, high) + generator.uniform(-8, 8, 3)


@dataclass(frozen=True)
class Canvas:
    """The pixels' middles of a square frame, and soft shapes on them."""

    side: int
    """Pixels."""

    @property
    def points(self) -> tuple[Array, Array]:
        """`x` and `y` of the pixels' middles, `[H, W]`, in parts of the side."""
        middles = ((np.arange(self.side) + 0.5) / self.side).astype(np.float32)
        x, y = np.meshgrid(middles, middles)
        return x, y

    def inside(self, distance: Array) -> Array:
        """Coverage of a shape from the signed distance to its edge (parts of the side, positive inside)."""
        covered: Array = np.clip(distance * self.side + 0.5, 0, 1)
        return covered


def blend(image: Array, coverage: Array, colour: Array) -> Array:
    """`colour` (`[3]` or `[H, W, 3]`) over the image where it covers."""
    blended: Array = image + coverage[..., None] * (colour - image)
    return blended


def with_pole(background: Array, canvas: Canvas, at: Array) -> Array:
    """A background with a small dark pole at a point `[2]`, for things to go round."""
    x, y = canvas.points
    return blend(background, canvas.inside(0.035 - np.hypot(x - at[0], y - at[1])), np.array([30.0, 30.0, 30.0]))


def ground(generator: np.random.Generator, canvas: Canvas) -> Array:
    """A dull textured ground with a few flat stones."""
    x, y = canvas.points
    image: Array = dull(generator) + (22 * draw_texture(generator, 0.2, 0.7)(x, y))[..., None]
    for _ in range(generator.integers(2, 5)):
        (at_x, at_y), radius = generator.uniform(0, 1, 2), generator.uniform(0.05, 0.14)
        stretch = generator.uniform(0.6, 1.0)
        stone = radius - np.hypot(x - at_x, (y - at_y) / stretch)
        image = blend(image, canvas.inside(stone * stretch), dull(generator, 40, 190))
    return image


def to_frames(images: list[Array]) -> Array:
    """uint8 `[F, H, W, 3]` with colour at half resolution, as ordinary (4:2:0) video keeps it."""
    return np.stack([_halve_colour(np.clip(image, 0, 255)) for image in images])


def _halve_colour(image: Array) -> Array:
    """Every four pixels get the mean of their colours, each keeps its own luma (BT.601); uint8.

    OpenCV's 4:2:0 takes the upper left one's colour instead, which would move colour by half a pixel.
    """
    luma = (image @ LUMA)[..., None]
    height, width, _ = image.shape
    blocks = (image - luma).reshape(height // 2, 2, width // 2, 2, 3)
    chroma = np.broadcast_to(blocks.mean(axis=(1, 3), keepdims=True), blocks.shape).reshape(image.shape)
    halved: Array = np.clip(luma + chroma, 0, 255).round().astype(np.uint8)
    return halved
