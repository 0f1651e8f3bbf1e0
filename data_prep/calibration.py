"""How far a film goes between two images, by what films of a domain have shown: fps and motion for a pair of bounds.

Two images do not say how fast things went from one to the other, nor how much they swayed on the way. But within a
domain the way is longer where the bounds are farther apart. `calibrate` learns from clips how much longer, and
`estimate` applies it.
"""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from ..trf.patch import Calibration
from .motion import motion_bucket, motion_score

BLUR = 1 / 15
"""Standard deviation of the blur under which two images are compared, as a part of the diagonal: what has moved less
than about that much counts the less."""
LEAST = 1e-3
"""Added to a distance before its logarithm is taken: equal images have none."""
FEWEST_CLIPS = 8
"""Below, a line through clips says nothing."""
RIDGE = 1.0
"""Weight of the penalty on slopes, in clips: few clips give a flat line."""
PARTS = 5
"""Of the cross-validation, or as many as there are films."""


def distance(start: np.ndarray, end: np.ndarray) -> tuple[float, float]:
    """How far two images are apart.

    Args:
        start: uint8 RGB `[H, W, 3]`.
        end: the same.

    Returns:
        Mean optical flow between them, percent of the diagonal; mean difference of their blurred pixels, 0 to 1.
    """
    sigma = BLUR * float(np.hypot(*start.shape[:2]))
    blurred = [cv2.GaussianBlur(image.astype(np.float32) / 255, (0, 0), sigma) for image in (start, end)]
    return motion_score(np.stack([start, end]), 1.0), float(np.abs(blurred[0] - blurred[1]).mean())


def calibrate(
    distances: Sequence[tuple[float, float]],
    scores: Sequence[float],
    fps: Sequence[float],
    frames: Sequence[int],
    films: Sequence[str],
) -> Calibration | None:
    """Learn from clips what the distance of their bounds says; `None` of fewer than `FEWEST_CLIPS` moving ones.

    Args:
        distances: of the first and last frame of every clip, see `distance`.
        scores: motion scores, see `motion.motion_score`.
        fps: frames per second.
        frames: number of frames.
        films: what each was cut from; clips of one film are alike, and do not prove each other.
    """
    moving = np.asarray(scores) > 0
    if moving.sum() < FEWEST_CLIPS:
        return None
    logs = _logs(np.asarray(distances)[moving])
    rates, steps = np.asarray(fps, float)[moving], np.asarray(frames)[moving] - 1
    ways = np.log(np.asarray(scores)[moving] * steps / rates)
    _, film = np.unique(np.asarray(films)[moving], return_inverse=True)
    (way, way_told), (rate, rate_told) = (_line(logs, target, film % PARTS) for target in (ways, np.log(rates)))
    return Calibration(
        clips=int(moving.sum()),
        nearest=tuple(logs.min(0)),
        farthest=tuple(logs.max(0)),
        way=way,
        way_explained=way_told,
        fps=rate,
        fps_explained=rate_told,
    )


def estimate(
    calibration: Calibration, apart: tuple[float, float], num_frames: int, fps: float | None = None
) -> tuple[float, float]:
    """Frames per second and motion bucket of the film between two images.

    Bounds nearer or farther apart than those of any clip count as the nearest or farthest of them.

    Args:
        calibration: see `calibrate`.
        apart: see `distance`.
        num_frames: frames of the film, bounds included.
        fps: where it is known.
    """
    logs = np.clip(_logs(np.asarray(apart)), calibration.nearest, calibration.farthest)
    rate = float(np.exp(_at(calibration.fps, logs))) if fps is None else fps
    return rate, motion_bucket(float(np.exp(_at(calibration.way, logs))) * rate / (num_frames - 1))


def _logs(distances: np.ndarray) -> np.ndarray:
    return np.log(distances + LEAST)


def _at(line: Sequence[float], logs: np.ndarray) -> np.ndarray:
    constant, *slopes = line
    return np.asarray(constant + logs @ slopes)


def _line(logs: np.ndarray, target: np.ndarray, part: np.ndarray) -> tuple[tuple[float, ...], float]:
    """The line through the points, and the share of the variance that it explains of parts it has not seen."""
    variance, parts = float(target.var()), np.unique(part)
    if len(parts) == 1:
        return _through(logs, target), 0.0
    unseen = np.concatenate([
        target[part == own] - _at(_through(logs[part != own], target[part != own]), logs[part == own])
        for own in parts
    ])  # fmt: skip
    # Not below 0: where distances tell nothing, a line is hardly worse than the mean.
    told = max(0.0, 1 - float(np.mean(unseen**2)) / variance) if variance > 1e-12 else 0.0
    return _through(logs, target), told


def _through(logs: np.ndarray, target: np.ndarray) -> tuple[float, ...]:
    """Constant and slopes of a ridge regression on standardised logs."""
    mean, spread = logs.mean(0), np.maximum(logs.std(0), 1e-6)
    scaled = (logs - mean) / spread
    slopes = np.linalg.solve(scaled.T @ scaled + RIDGE * np.eye(logs.shape[1]), scaled.T @ (target - target.mean()))
    slopes = slopes / spread
    return (float(target.mean() - mean @ slopes), *map(float, slopes))
