"""Where things are in generated frames of a procedural film, against where they truly are.

Shapes: frames `[F, H, W, 3]` uint8 RGB; positions `[F, 2]`, x and y in pixels, the first pixel's middle at 0.5; camera
`[F, 3]`, azimuth and elevation in degrees and distance.
"""

from __future__ import annotations

from functools import lru_cache

import cv2
import numpy as np

from ..data_prep.procedural import turntable
from ..data_prep.worlds.canvas import to_frames
from ..data_prep.worlds.views import render

BLUR = 0.6
"""Standard deviation of the blur over a thing's radius: a disc then has one peak, in its middle."""
SEARCHED = (-105, 135)
"""Azimuths searched for the camera, degrees from where it truly starts."""
COARSE, FINE = 3, 1
"""Steps of the search, degrees; between the fine ones a parabola is laid."""


def track(frames: np.ndarray, colour: np.ndarray, radius: float) -> np.ndarray:
    """Position of the thing of a vivid colour in every frame.

    It is where, averaged over the thing's size, the most of its chroma is found: the one best place, not the mean of
    several. Of a cross-fade, whose mean would move as the truth does, that is first the one ghost and then the other.

    Args:
        frames: `[F, H, W, 3]`.
        colour: of the thing, `[3]`, 0 to 255.
        radius: half its width, pixels.

    Returns:
        Positions `[F, 2]`, to fractions of a pixel.
    """
    pure = colour - colour.mean()
    found = []
    for frame in frames.astype(np.float32):
        chroma = frame - frame.mean(-1, keepdims=True)
        evidence = np.clip(chroma @ pure / (pure @ pure), 0, 1).astype(np.float32)
        blurred = cv2.GaussianBlur(evidence, (0, 0), BLUR * radius, borderType=cv2.BORDER_CONSTANT)
        found.append(_peak(blurred) + 0.5)  # a pixel's middle lies half a pixel behind its number
    return np.array(found)


def track_errors(frames: np.ndarray, positions: np.ndarray, colour: np.ndarray, radius: float) -> np.ndarray:
    """Distance from the thing's true position in each inner frame, pixels, `[F - 2]`."""
    errors: np.ndarray = np.linalg.norm(track(frames, colour, radius) - positions, axis=1)[1:-1]
    return errors


def _peak(image: np.ndarray) -> np.ndarray:
    """Column and row of the highest value, refined by a parabola along each axis."""
    row, column = np.unravel_index(int(image.argmax()), image.shape)
    padded = np.pad(image, 1, mode="edge")
    across = _vertex(*padded[row + 1, column : column + 3])
    down = _vertex(*padded[row : row + 3, column + 1])
    return np.array([column + across, row + down])


def _vertex(before: float, at: float, after: float) -> float:
    """Place of a parabola's extremum, in steps from the middle one of three neighbours, of which that is extreme."""
    bend = before - 2 * at + after
    return 0.0 if bend == 0 else float(np.clip((before - after) / (2 * bend), -0.5, 0.5))


def camera_path(frames: np.ndarray, world: str, seed: int, index: int, camera: np.ndarray) -> np.ndarray:
    """Azimuth of the camera in every frame, by rendering the film's scene from many and taking the likest.

    Only the azimuth is searched; elevation and distance are the frame's true ones.

    Args:
        frames: square, `[F, H, W, 3]`.
        world: of the film, whose kind is `turntable`.
        seed: of the world.
        index: of the film.
        camera: the true path, `[F, 3]`.

    Returns:
        Degrees, `[F]`.
    """
    first, side = float(camera[0, 0]), frames.shape[1]

    def error(frame: np.ndarray, offset: int, pose: np.ndarray) -> float:
        seen = _view(world, seed, index, side, first + offset, float(pose[1]), float(pose[2]))
        return float(np.mean((frame - seen.astype(np.float32)) ** 2))

    azimuths = []
    for frame, pose in zip(frames.astype(np.float32), camera):
        best = min(range(SEARCHED[0], SEARCHED[1] + 1, COARSE), key=lambda offset: error(frame, offset, pose))
        best = min(range(best - COARSE + FINE, best + COARSE, FINE), key=lambda offset: error(frame, offset, pose))
        around = (error(frame, best + step, pose) for step in (-FINE, 0, FINE))
        azimuths.append(first + best + FINE * _vertex(*around))
    return np.array(azimuths)


def path_errors(frames: np.ndarray, world: str, seed: int, index: int, camera: np.ndarray) -> np.ndarray:
    """Distance from the camera's true azimuth in each inner frame, degrees, `[F - 2]`."""
    errors: np.ndarray = np.abs(camera_path(frames, world, seed, index, camera) - camera[:, 0])[1:-1]
    return errors


@lru_cache(maxsize=20_000)
def _view(
    world: str, seed: int, index: int, side: int, azimuth: float, elevation: float, distance: float
) -> np.ndarray:
    """One view of a film's scene, uint8 `[H, W, 3]`; kept, for neighbouring frames ask for the same ones."""
    image = render(turntable(world, seed, index), np.array([azimuth, elevation, distance]), side)
    view: np.ndarray = to_frames([image])[0]
    return view
