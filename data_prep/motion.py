"""How much a clip moves: a score from dense optical flow, and its place on SVD's motion-bucket scale.

The score is in percent of the frame's diagonal per second, so neither the resolution nor the frame rate matters.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import cv2
import numpy as np

from ..trf.patch import MotionStatistics

FLOW_DIAGONAL = 320
"""Pixels of the diagonal that frames are resized to before flow is estimated."""
ORDINARY_MOTION = 4.0
"""Score in the middle of the bucket scale, percent of the diagonal per second: a hand-held shot, someone talking."""


def motion_score(frames: np.ndarray, fps: float) -> float:
    """Mean length of the optical flow (DIS, arXiv 1603.03590) between neighbouring frames, over all pixels.

    Args:
        frames: uint8 RGB `[F, H, W, 3]`, at least two.
        fps: frames per second.

    Returns:
        Percent of the frame's diagonal per second; 0 for a still.
    """
    scale = FLOW_DIAGONAL / np.hypot(*frames.shape[1:3])
    size = (round(frames.shape[2] * scale), round(frames.shape[1] * scale))
    filter_ = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    grey = [cv2.resize(cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY), size, interpolation=filter_) for frame in frames]
    flow = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    still = np.zeros((*grey[0].shape, 2), np.float32)
    lengths = []
    for earlier, later in pairwise(grey):
        # On equal frames the estimator may still return a little flow.
        moved = not np.array_equal(earlier, later)
        lengths.append(float(np.linalg.norm(flow.calc(earlier, later, still.copy()), axis=-1).mean()) if moved else 0.0)
    return 100 * float(np.mean(lengths)) * fps / FLOW_DIAGONAL


def motion_ratio(video: np.ndarray, truth: np.ndarray) -> float | None:
    """Motion score of a video over that of the truth, both at one frame rate; `None` where the truth stands still."""
    true = motion_score(truth, 1.0)
    return motion_score(video, 1.0) / true if true > 0 else None


def motion_bucket(score: float) -> float:
    """Place of a motion score on SVD's scale of motion buckets, 0 to 255.

    SVD was tuned with motion buckets, but its mapping was never published. This one is ours: 0 for a still, the middle
    of the scale (SVD's usual 127) for `ORDINARY_MOTION`, rising all the way and levelling off towards 255.
    """
    return 255 * score / (score + ORDINARY_MOTION)


def statistics(scores: Sequence[float], buckets: Sequence[float]) -> MotionStatistics:
    """Motion of a set of clips as a patch card records it."""
    low, middle, high = (float(value) for value in np.percentile(scores, [10, 50, 90]))
    return MotionStatistics(
        clips=len(scores),
        score_median=middle,
        score_p10=low,
        score_p90=high,
        motion_bucket_median=float(np.median(buckets)),
    )
