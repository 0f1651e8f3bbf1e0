"""Where clips lie in a video: scene cuts, and windows of evenly spaced frames between them. Times are in seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from scenedetect import ContentDetector, FrameTimecode

from .video import Video


@dataclass(frozen=True)
class Window:
    """The frames of one clip: their indices in the source and their times there, in seconds."""

    indices: tuple[int, ...]
    times: tuple[float, ...]

    @property
    def fps(self) -> float:
        """Measured frames per second."""
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])


def cuts(video: Video, threshold: float = 27.0) -> list[int]:
    """Indices of the frames at which a new scene starts (PySceneDetect's `ContentDetector`, one frame at a time).

    Args:
        video: read once, small and forward, which also measures its times.
        threshold: mean change of hue, saturation and brightness, in 8-bit levels, that counts as a cut.

    Raises:
        UnreadableVideo: with the reason.
    """
    # Every jump counts, close ones too: a clip must hold none of them.
    detector = ContentDetector(threshold=threshold, min_scene_len=0)
    found: list[int] = []
    for index, frame in enumerate(video.small_frames()):
        # The detector counts frames; the rate given here plays no part in what it finds.
        at = detector.process_frame(FrameTimecode(index, fps=1.0), np.ascontiguousarray(frame[..., ::-1]))
        found += [time.frame_num for time in at]
    return found


def windows(
    timestamps: np.ndarray,
    boundaries: Sequence[int],
    fps: float | None,
    num_frames: int | Sequence[int],
    stride_seconds: float | None = None,
) -> list[Window]:
    """Windows of `num_frames` frames at `fps` that hold no cut, in order of time.

    Of several numbers of frames each scene gets the largest of which a window fits, for all of its windows.

    A window starts at a source frame, at `t0`, and takes the source frame nearest to each of `t0 + k / fps`. Where two
    of them are the same frame, or one is more than half a step off, the source is too slow there: no window.

    Without `fps` a window takes every source frame, at whatever rate they come; where one is more than half a step off
    that rate, they come too unevenly: no window.

    Args:
        timestamps: times of the source's frames, `[n]`, increasing.
        boundaries: frames at which a scene starts; the first frame is one without saying.
        fps: frames per second wanted, or `None` for the source's own.
        num_frames: frames of a window, at least 2; one number, or several to choose from.
        stride_seconds: time from one window's start to the next one's; without overlap if not given.
    """
    lengths = sorted({num_frames} if isinstance(num_frames, int) else set(num_frames), reverse=True)
    for length in lengths:
        _check(fps, length, stride_seconds)
    edges = [0, *sorted(set(boundaries) - {0}), len(timestamps)]
    found = []
    for first, end in pairwise(edges):
        scene = timestamps[first:end]
        tried = (
            _even_windows(scene, length, stride_seconds)
            if fps is None
            else _paced_windows(scene, fps, length, stride_seconds)
            for length in lengths
        )
        chosen: list[np.ndarray] = next(filter(None, tried), [])
        for picked in chosen:
            indices = tuple(int(index) for index in picked + first)
            found.append(Window(indices, tuple(float(timestamps[index]) for index in indices)))
    return found


def _paced_windows(scene: np.ndarray, fps: float, num_frames: int, stride_seconds: float | None) -> list[np.ndarray]:
    """The frames of each window of one scene, at `fps`."""
    found: list[np.ndarray] = []
    start = 0
    while start < len(scene):
        targets = scene[start] + np.arange(num_frames) / fps
        # The last frame may come up to half of the source's own step before its target.
        if targets[-1] > scene[-1] + np.diff(scene[-2:]).sum() / 2:
            break
        picked = nearest(scene, targets)
        late = np.abs(scene[picked] - targets) > 0.5 / fps
        late[1:] |= np.diff(picked) == 0
        if late.any():
            start = max(start + 1, int(picked[late.argmax()]))
            continue
        found.append(picked)
        step = num_frames / fps if stride_seconds is None else stride_seconds
        following = int(nearest(scene, np.asarray([scene[start] + step]))[0])
        if scene[start] + step > scene[-1] + 0.5 / fps:
            break
        start = max(following, int(picked[-1]) + 1 if stride_seconds is None else start + 1)
    return found


def _even_windows(times: np.ndarray, num_frames: int, stride_seconds: float | None) -> list[np.ndarray]:
    """Windows of consecutive frames of one scene, none of which is more than half a step off an even pace."""
    found: list[np.ndarray] = []
    start = 0
    while start + num_frames <= len(times):
        window = times[start : start + num_frames]
        off = np.abs(window - np.linspace(window[0], window[-1], num_frames))
        if off.max() > (window[-1] - window[0]) / (num_frames - 1) / 2:
            start += 1
            continue
        found.append(np.arange(start, start + num_frames))
        if stride_seconds is None:
            start += num_frames
        elif window[0] + stride_seconds > times[-1]:
            break
        else:
            start = max(start + 1, int(nearest(times, window[:1] + stride_seconds)[0]))
    return found


def why_no_window(timestamps: np.ndarray, boundaries: Sequence[int], fps: float | None, num_frames: int) -> str:
    """The reason that `windows` finds none: too short, cut too often, slower than the target, or too uneven."""
    if fps is None:
        longest = int(np.diff([0, *sorted(set(boundaries) - {0}), len(timestamps)]).max())
        if longest < num_frames:
            where = "it has" if longest == len(timestamps) else "its longest scene has"
            return f"too short: {where} {longest} frames, and a clip {num_frames}"
        return f"its frames come too unevenly, up to {np.diff(timestamps).max():.3g} s apart; ask for an fps"
    needed = (num_frames - 1) / fps
    asked = f"{num_frames} frames at {fps:g} fps last {needed:.2f} s"
    if timestamps[-1] < needed:
        return f"too short: {len(timestamps)} frames over {timestamps[-1]:.2f} s, and {asked}"
    edges = [0, *sorted(set(boundaries) - {0}), len(timestamps)]
    longest = max(timestamps[end - 1] - timestamps[first] for first, end in pairwise(edges))
    if longest < needed:
        return f"its longest scene lasts {longest:.2f} s, and {asked}"
    measured = (len(timestamps) - 1) / timestamps[-1]
    if measured < fps:
        return f"runs at {measured:.4g} fps, slower than the target of {fps:g} fps; ask for at most {measured:.4g}"
    gap = float(np.diff(timestamps).max())
    return f"its frames come too unevenly for {fps:g} fps, up to {gap:.3g} s apart; ask for a lower fps"


def nearest(times: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Index of the time nearest to each target; `times` increases. The earlier of two equally near ones."""
    after = np.clip(np.searchsorted(times, targets), 1, max(1, len(times) - 1))
    before = after - 1
    after = np.minimum(after, len(times) - 1)
    return np.where(targets - times[before] <= times[after] - targets, before, after)


def _check(fps: float | None, num_frames: int, stride_seconds: float | None) -> None:
    if fps is not None and fps <= 0:
        raise ValueError(f"fps={fps}: must be above 0.")
    if num_frames < 2:
        raise ValueError(f"num_frames={num_frames}: a clip needs at least 2 frames.")
    if stride_seconds is not None and stride_seconds <= 0:
        raise ValueError(f"stride_seconds={stride_seconds}: must be above 0; leave it out for clips without overlap.")
