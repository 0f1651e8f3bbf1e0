"""What any method must beat: a cross-fade, and frames interpolated along dense optical flow.

Images are uint8 RGB `[H, W, 3]`, flows `[H, W, 2]` in pixels, x first.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import cv2
import numpy as np

BaselineName = Literal["cross_fade", "flow_warp"]

FLOW_SIDE = 256
"""Pixels of the longer side that smaller images are enlarged to before flow is estimated: DIS matches patches of 8."""
MISMATCH = 20.0
"""Colour difference, in 8-bit levels, at which a pixel that flow carries to the other image counts e times less."""
TRUSTED = 0.05
"""Weight of what lands on a pixel at which the cross-fade below it still shows by half."""


def cross_fade(start: np.ndarray, end: np.ndarray, num_frames: int) -> np.ndarray:
    """From one image to the other by mixing them; the bounds are exact. Gives `[F, H, W, 3]` uint8."""
    return np.stack([_mixed(start, end, time) for time in np.linspace(0, 1, num_frames)]).round().astype(np.uint8)


def flow_warp(start: np.ndarray, end: np.ndarray, num_frames: int) -> np.ndarray:
    """From one image to the other along straight paths of optical flow; the bounds are exact.

    Flow is estimated both ways (DIS, arXiv 1603.03590). For time `t`, both images are splatted forward, by `t` and
    `1 - t` of their flow (softmax splatting, Niklaus and Liu, arXiv 2003.05534): where two pixels land on one, the one
    that flow carries to its like goes first. So what is hidden in one image is taken from the other. What nothing
    lands on is cross-faded.

    Args:
        start: first frame.
        end: last frame, of its size.
        num_frames: frames, both included.

    Returns:
        `[F, H, W, 3]` uint8.
    """
    there, back = _flow(start, end), _flow(end, start)
    sure_there, sure_back = _likeness(start, end, there), _likeness(end, start, back)
    frames = [start]
    for time in np.linspace(0, 1, num_frames)[1:-1]:
        first, first_weight = _splat(start, time * there, (1 - time) * sure_there)
        last, last_weight = _splat(end, (1 - time) * back, time * sure_back)
        image = first + last + TRUSTED * _mixed(start, end, time)
        frames.append((image / (first_weight + last_weight + TRUSTED)[..., None]).round().astype(np.uint8))
    return np.stack([*frames, end])


BASELINES: dict[BaselineName, Callable[[np.ndarray, np.ndarray, int], np.ndarray]] = {
    "cross_fade": cross_fade,
    "flow_warp": flow_warp,
}


def _mixed(start: np.ndarray, end: np.ndarray, time: float) -> np.ndarray:
    mixed: np.ndarray = start * (1 - time) + end * time
    return mixed


def _flow(source: np.ndarray, target: np.ndarray) -> np.ndarray:
    height, width = source.shape[:2]
    scale = max(1.0, FLOW_SIDE / max(height, width))
    size = (round(width * scale), round(height * scale))
    grey = [
        cv2.resize(cv2.cvtColor(image, cv2.COLOR_RGB2GRAY), size, interpolation=cv2.INTER_CUBIC)
        for image in (source, target)
    ]
    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    flow = estimator.calc(grey[0], grey[1], np.zeros((*grey[0].shape, 2), np.float32))
    fitted: np.ndarray = cv2.resize(flow, (width, height), interpolation=cv2.INTER_AREA) / scale
    return fitted


def _likeness(source: np.ndarray, target: np.ndarray, flow: np.ndarray) -> np.ndarray:
    """How like each pixel of `source` is to where flow takes it in `target`, `[H, W]`, 1 for equal."""
    row, column = np.indices(flow.shape[:2], dtype=np.float32)
    seen = cv2.remap(
        target.astype(np.float32), column + flow[..., 0], row + flow[..., 1], cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REPLICATE,
    )  # fmt: skip
    likeness: np.ndarray = np.exp(-np.abs(seen - source).mean(-1) / MISMATCH)
    return likeness


def _splat(image: np.ndarray, flow: np.ndarray, weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every pixel carried along its flow and shared among the four it lands between.

    Returns:
        The sum of weighted colours that landed on each pixel, `[H, W, 3]`, and that of the weights, `[H, W]`.
    """
    height, width = weight.shape
    row, column = np.indices((height, width))
    x, y = column + flow[..., 0].astype(np.float64), row + flow[..., 1].astype(np.float64)
    left, top = np.floor(x), np.floor(y)
    total = np.zeros((height * width, 4))
    values = np.concatenate([image, np.ones((height, width, 1))], axis=-1)
    for to_x, to_y in ((left, top), (left + 1, top), (left, top + 1), (left + 1, top + 1)):
        share = weight * (1 - np.abs(x - to_x)) * (1 - np.abs(y - to_y))
        inside = (to_x >= 0) & (to_x < width) & (to_y >= 0) & (to_y < height)
        place = (to_y * width + to_x)[inside].astype(np.int64)
        for channel in range(4):
            amount = (share * values[..., channel])[inside]
            total[:, channel] += np.bincount(place, amount, minlength=height * width)
    shaped = total.reshape(height, width, 4)
    return shaped[..., :3], shaped[..., 3]
