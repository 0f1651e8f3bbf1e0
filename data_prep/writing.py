"""Videos and frames to disk, whole or not at all."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from PIL import Image

from ..trf.replace import replacing


def write_video(path: Path, frames: np.ndarray, fps: float, crf: int = 18) -> None:
    """Write an H.264 video that any player takes; the suffix of `path` (`.mp4`, `.mkv`, …) chooses the container.

    Args:
        path: file to write; one already there is replaced at the end.
        frames: uint8 RGB `[F, H, W, 3]`. An odd height or width gets its last row or column twice, as H.264 needs.
        fps: frames per second.
        crf: x264's quality, 0 (lossless but for the colour conversion) to 51.

    Raises:
        ValueError: if there are no frames, they are not uint8 RGB, or fps is not above 0.
    """
    _check_frames(frames)
    if fps <= 0:
        raise ValueError(f"fps={fps}: must be above 0.")
    odd = [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)]
    frames = np.pad(frames, odd, mode="edge")
    rate = Fraction(fps).limit_denominator(10_000)
    with replacing(path) as beside, av.open(str(beside), "w") as container:
        # Without its macroblock tree, which now and then gives other bytes for the same frames.
        stream = container.add_stream("libx264", rate=rate, options={"crf": str(crf), "x264-params": "mbtree=0"})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], "yuv420p"
        stream.codec_context.time_base = 1 / rate
        # BT.709, and said so: players guess the matrix of an untagged file from its size.
        context = stream.codec_context
        context.colorspace = context.color_primaries = context.color_trc = 1
        context.color_range = 1
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame = frame.reformat(format="yuv420p", dst_colorspace="ITU709", dst_color_range="MPEG")
            frame.pts, frame.time_base = index, 1 / rate
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_frames(folder: Path, frames: np.ndarray) -> None:
    """Write uint8 RGB `[F, H, W, 3]` as `00000.png`, `00001.png`, …; a folder already there is replaced at the end."""
    _check_frames(frames)
    with replacing(folder) as beside:
        beside.mkdir()
        for index, pixels in enumerate(frames):
            Image.fromarray(pixels).save(beside / f"{index:05d}.png")


def _check_frames(frames: np.ndarray) -> None:
    if frames.dtype != np.uint8 or frames.ndim != 4 or frames.shape[-1] != 3 or 0 in frames.shape:
        raise ValueError(f"frames are {frames.dtype} {frames.shape}: give uint8 RGB [F, H, W, 3].")
