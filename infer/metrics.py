"""How near a generated video comes to the true one and how sharp it is, how well it keeps its bounds, and how it loops.

Videos are `[F, H, W, 3]`, RGB, 0 to 255. *Inner* frames are all but the first and the last, which were given.
"""

from __future__ import annotations

import cv2
import numpy as np

from ..data_prep.likeness import check_shapes, psnr

WINDOW, SIGMA = 11, 1.5
"""Width and standard deviation of SSIM's Gaussian window, pixels (Wang et al. 2004)."""


def ssim(video: np.ndarray, truth: np.ndarray) -> float:
    """Structural similarity (Wang et al. 2004), mean over frames, channels and pixels; 1 for equal videos.

    With the paper's Gaussian window and constants, over the pixels whose window lies inside the frame: what
    scikit-image's `structural_similarity(gaussian_weights=True, use_sample_covariance=False)` gives.

    Raises:
        ValueError: for other shapes, or frames smaller than the window.
    """
    check_shapes(video, truth)
    if min(video.shape[1:3]) < WINDOW:
        raise ValueError(f"frames of {video.shape[2]}x{video.shape[1]} are smaller than SSIM's window of {WINDOW}.")
    return float(np.mean([_ssim(one, other) for one, other in zip(video, truth)]))


def inner_psnr(video: np.ndarray, truth: np.ndarray) -> float:
    """`psnr` of the inner frames."""
    return psnr(_inner(video), _inner(truth))


def inner_ssim(video: np.ndarray, truth: np.ndarray) -> float:
    """`ssim` of the inner frames."""
    return ssim(_inner(video), _inner(truth))


def sharpness_ratio(video: np.ndarray, truth: np.ndarray) -> float | None:
    """Fine detail of the inner frames over that of the true ones: 1 is as sharp, less is blurred, more is noise.

    Detail is the root mean square of the Laplacian of brightness (a focus measure: Pertuz et al. 2013, LAPV), over all
    inner frames at once. Where things are does not count, so it says what PSNR and SSIM, which reward blur, do not.
    `None` where the truth is flat.
    """
    shown, true = _detail(_inner(video)), _detail(_inner(truth))
    return shown / true if true > 0 else None


def bound_psnr(video: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    """`psnr` of the first and last frame against the bounds `[H, W, 3]` they were generated between."""
    return psnr(video[[0, -1]], np.stack([start, end]))


def seam_gap(loop: np.ndarray) -> float | None:
    """How far the last frame of a loop is from the first, which it should equal, in steps of the loop.

    `rms(x[F-1] - x[0])` over the mean of `rms(x[t+1] - x[t])`: 0 is a perfect loop, 1 one that misses a frame. `None`
    for a still.
    """
    frames = loop.astype(np.float64)
    return _ratio(_rms(frames[-1:] - frames[:1]), _rms(np.diff(frames, axis=0)))


def seam_jump(loop: np.ndarray) -> float | None:
    """How much the velocity changes across a loop's seam, over how much it changes inside from frame to frame.

    `rms((x[1] - x[0]) - (x[F-1] - x[F-2]))` over the mean of `rms((x[t+1] - x[t]) - (x[t] - x[t-1]))`: 1 is a seam that
    nobody sees, more is a jerk. `None` for a still and for less than three frames.
    """
    steps = np.diff(loop.astype(np.float64), axis=0)
    return _ratio(_rms(steps[:1] - steps[-1:]), _rms(np.diff(steps, axis=0))) if len(steps) > 1 else None


def _inner(video: np.ndarray) -> np.ndarray:
    if len(video) < 3:
        raise ValueError(f"a video of {len(video)} frames has no inner ones; at least 3 are needed.")
    return video[1:-1]


def _detail(frames: np.ndarray) -> float:
    grey = (cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in frames)
    return float(np.sqrt(np.mean([np.mean(cv2.Laplacian(one, cv2.CV_64F) ** 2) for one in grey])))


def _rms(frames: np.ndarray) -> np.ndarray:
    values: np.ndarray = np.sqrt(np.mean(frames**2, axis=(1, 2, 3)))
    return values


def _ratio(seam: np.ndarray, inside: np.ndarray) -> float | None:
    return float(seam.mean() / inside.mean()) if inside.any() else None


def _ssim(one: np.ndarray, other: np.ndarray) -> float:
    """Of two frames `[H, W, 3]`, with the names of the paper's equation 13."""

    def mean(values: np.ndarray) -> np.ndarray:
        edge = WINDOW // 2
        blurred: np.ndarray = cv2.GaussianBlur(values, (WINDOW, WINDOW), SIGMA)
        return blurred[edge:-edge, edge:-edge]

    x, y = one.astype(np.float64), other.astype(np.float64)
    mean_x, mean_y = mean(x), mean(y)
    var_x, var_y, covariance = mean(x * x) - mean_x**2, mean(y * y) - mean_y**2, mean(x * y) - mean_x * mean_y
    c1, c2 = (0.01 * 255) ** 2, (0.03 * 255) ** 2
    above = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(above / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))
