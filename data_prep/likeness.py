"""How alike two videos are, pixel by pixel: for training's validation, for appraisals and for evaluation."""

from __future__ import annotations

import numpy as np

HIGHEST_PSNR = 100.0
"""dB; also of videos that are equal, so that means stay finite."""


def psnr(video: np.ndarray, truth: np.ndarray) -> float:
    """Peak signal-to-noise ratio of the squared error's mean over everything, dB; `HIGHEST_PSNR` at most.

    Args:
        video: `[F, H, W, 3]`, 0 to 255.
        truth: likewise.

    Raises:
        ValueError: for other shapes.
    """
    check_shapes(video, truth)
    error = float(np.mean((video.astype(np.float64) - truth.astype(np.float64)) ** 2))
    return HIGHEST_PSNR if error == 0 else min(HIGHEST_PSNR, 10 * float(np.log10(255**2 / error)))


def check_shapes(video: np.ndarray, truth: np.ndarray) -> None:
    """Check that two videos can be compared.

    Raises:
        ValueError: if they are not of one shape.
    """
    if video.shape != truth.shape:
        raise ValueError(f"the video is {video.shape}, the truth {truth.shape}: they must be of one shape.")
