"""Everything that is measured of one generated video: `docs/evaluation.md` says what each name means."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..data_prep.motion import motion_ratio
from .metrics import bound_psnr, inner_psnr, inner_ssim, seam_gap, seam_jump, sharpness_ratio
from .tracking import path_errors, track_errors


@dataclass(frozen=True)
class FilmTruth:
    """What is known of one procedural film, a line of its world's `truth.jsonl`."""

    world: str
    seed: int
    index: int
    side: int
    """Pixels of the film's side."""
    radius: float
    """Half the width of what moves, pixels."""
    positions: np.ndarray | None
    """Where it is in every frame, `[F, 2]` pixels; `None` where the camera moves."""
    colour: np.ndarray | None
    """Its colour, `[3]`."""
    camera: np.ndarray | None
    """Azimuth, elevation and distance of the camera in every frame, `[F, 3]`; `None` where it stands still."""

    @property
    def num_frames(self) -> int:
        """Frames of the film."""
        path = self.positions if self.camera is None else self.camera
        assert path is not None
        return len(path)


def read_truth(path: Path) -> dict[str, FilmTruth]:
    """The ground truth of a world's films, by the file name of the film.

    Raises:
        ValueError: if it cannot be read.
    """
    try:
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        return {line["video"]: _film(line) for line in lines}
    except OSError as error:
        raise ValueError(f"truth={str(path)!r}: cannot be read: {error.strerror}.") from None
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"truth={str(path)!r}: no ground truth as `trfpp worlds` writes it ({error!r}).") from None


def _film(line: Mapping[str, Any]) -> FilmTruth:
    plain: dict[str, Any] = {name: line[name] for name in ("world", "seed", "index", "side", "radius")}
    needed = ("camera",) if "camera" in line else ("positions", "colour")
    arrays: dict[str, Any] = {
        name: np.array(line[name]) if name in needed else None for name in ("positions", "colour", "camera")
    }
    return FilmTruth(**plain, **arrays)


def measure(
    video: np.ndarray, truth: np.ndarray, start: np.ndarray, end: np.ndarray, *, loop: bool
) -> dict[str, float]:
    """Metrics of a video against the true one; what the truth does not define is left out.

    Args:
        video: `[F, H, W, 3]` uint8.
        truth: likewise.
        start: first bound it was generated from, `[H, W, 3]` uint8.
        end: last bound.
        loop: both bounds are one image: the seam is measured too.
    """
    found = {
        "inner_psnr": inner_psnr(video, truth),
        "inner_ssim": inner_ssim(video, truth),
        "bound_psnr": bound_psnr(video, start, end),
        "motion_ratio": motion_ratio(video, truth),
        "sharpness_ratio": sharpness_ratio(video, truth),
    }
    if loop:
        found |= {"seam_gap": seam_gap(video), "seam_jump": seam_jump(video)}
    return {name: value for name, value in found.items() if value is not None}


def measure_film(video: np.ndarray, film: FilmTruth) -> dict[str, float]:
    """How far what is seen in a video lies from where it is in the procedural film the video is to equal.

    Args:
        video: `[F, H, W, 3]` uint8, square, in any size, of as many frames as the film.
        film: the film's ground truth.
    """
    side = video.shape[1]
    if film.camera is not None:
        degrees = float(path_errors(video, film.world, film.seed, film.index, film.camera).mean())
        return {"path_degrees": degrees, "path_percent": 100 * degrees / float(np.ptp(film.camera[:, 0]))}
    assert film.positions is not None
    assert film.colour is not None
    scale = side / film.side
    pixels = float(track_errors(video, scale * film.positions, film.colour, scale * film.radius).mean())
    return {"track_pixels": pixels, "track_percent": 100 * pixels / side}
