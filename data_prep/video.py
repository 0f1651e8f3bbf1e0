"""Videos in: finding files, decoding them with decord, measuring their frame times.

Frames are uint8 RGB `[F, H, W, 3]`, upright, with square pixels. decord decodes and turns them upright. Five things it
gets wrong were measured (decord2 3.4) and decide how it is used here:

- Its times come from packets: nonsense where a container does not time each of them (AVI with B-frames). Here times
  are those of the decoded frames, read with PyAV.
- It counts key frames in storage order, so its seeks miss in open GOPs; in MPEG-TS it misses even the start. Here it is
  sent to key frames that PyAV has seen, must show the same picture there, and reads on. MPEG-TS is refused.
- It counts frames that an edit list hides, so in files that were trimmed without re-encoding its key frames have other
  numbers. There it reads on from the start.
- It hands out concealed and repeated frames of damaged files in silence. Here PyAV decodes every file once, strictly,
  before decord reads it; the same pass feeds scene detection.
- It decodes ahead without bound while its caller is busy. Here it is stopped after every read.
"""

from __future__ import annotations

import logging
import os
import re
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import av.error
import cv2
import decord
import numpy as np
from PIL import Image

from .frames import load_image

_CONTAINERS = "3gp avi flv gif m2ts m4v mkv mov mp4 mpeg mpg mts ogv ts webm wmv"
VIDEO_SUFFIXES = frozenset(f".{name}" for name in _CONTAINERS.split())
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})

SMALL_SIDE = 192
"""Pixels of the longer side of the small frames that scene detection sees."""
SAME_FRAME = 2.0
"""Mean difference, in 8-bit levels, up to which what two decoders give is taken for the same frame."""
KEY_SPACING = 24
"""Frames at least between two key frames that are kept in mind; in some codecs every frame is one."""
HIGH_DYNAMIC_RANGE = {16: "PQ", 18: "HLG"}
"""Transfer characteristics (ITU-T H.273) whose code values are not those of ordinary pictures."""
TONE_MAP = "zscale=t=linear:npl=100,tonemap=hable,zscale=p=bt709:t=bt709:m=bt709:r=tv,format=yuv420p"
OTHER_CONTAINER = (
    "decord does not find its frames; copy it into another container, e.g. ffmpeg -i FILE -c copy FILE.mp4"
)

# What FFmpeg says about a damaged file reaches the user once, as the reason.
logging.getLogger("libav").setLevel(logging.CRITICAL)


class UnreadableVideo(ValueError):
    """A file that cannot be used; the message is the reason, without the file's name."""


class Video(ABC):
    """A sequence of frames with measured times. `path` is the file, or the folder of images."""

    path: Path
    _timestamps: np.ndarray | None = None
    _size = (0, 0)

    @property
    def timestamps(self) -> np.ndarray:
        """Presentation times in seconds, `[n]` float64, from 0 and strictly increasing.

        Known after one pass over `small_frames`; asked for earlier, it makes that pass.

        Raises:
            UnreadableVideo: with the reason.
        """
        if self._timestamps is None:
            deque(self.small_frames(), maxlen=0)
        assert self._timestamps is not None
        return self._timestamps

    @property
    def size(self) -> tuple[int, int]:
        """Width and height of the frames, upright and with square pixels; known as `timestamps` are."""
        _ = self.timestamps
        return self._size

    @abstractmethod
    def small_frames(self) -> Iterator[np.ndarray]:
        """Every frame in order, at most `SMALL_SIDE` pixels a side, `[h, w, 3]`; the whole file is checked on the way.

        Raises:
            UnreadableVideo: with the reason, at the first frame that is damaged.
        """

    @abstractmethod
    def close(self) -> None:
        """Let go of open files; reading again opens them again."""

    @abstractmethod
    def read(self, indices: Sequence[int]) -> np.ndarray:
        """The frames at `indices`, in any order, `[F, H, W, 3]`.

        Raises:
            UnreadableVideo: with the reason.
        """

    def _measured(self, times: Sequence[float | None]) -> np.ndarray:
        if not times:
            raise UnreadableVideo("holds no frames")
        seconds: np.ndarray = np.array([np.nan if time is None else time for time in times])
        steady = np.isfinite(seconds) & (np.diff(seconds, prepend=-np.inf) > 0)
        if not steady.all():
            raise UnreadableVideo(f"frame {steady.argmin()} has no time later than the frame before it; re-encode it")
        seconds -= seconds[0]
        return seconds

    def _check_indices(self, indices: Sequence[int]) -> None:
        if not len(indices) or min(indices) < 0 or max(indices) >= len(self.timestamps):
            raise ValueError(f"{self.path}: has frames 0 to {len(self.timestamps) - 1}, asked for {list(indices)}.")


class VideoFile(Video):
    """A video file: decord decodes, PyAV measures and checks."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._reader: decord.VideoReader | None = None
        # What PyAV shows at key frames to start reading at, by index.
        self._keys: dict[int, np.ndarray] = {}

    def small_frames(self) -> Iterator[np.ndarray]:
        """See `Video.small_frames`."""
        if self.path.stat().st_size == 0:
            raise UnreadableVideo("the file is empty")
        times: list[float | None] = []
        try:
            with av.open(str(self.path), metadata_errors="replace") as container:
                stream = container.streams.best("video")
                if not isinstance(stream, av.VideoStream):
                    raise UnreadableVideo("holds no video stream")
                if container.format.name == "mpegts":
                    raise UnreadableVideo(f"an MPEG transport stream: {OTHER_CONTAINER}")
                if curve := HIGH_DYNAMIC_RANGE.get(stream.codec_context.color_trc):
                    raise UnreadableVideo(
                        f"high dynamic range ({curve}), which would come out pale; tone-map it first, e.g. "
                        f"ffmpeg -i FILE -vf {TONE_MAP} FILE_sdr.mp4"
                    )
                # Without this FFmpeg paints over what it cannot decode and says nothing. (So it does at the end of a
                # truncated file when it decodes frames in parallel, which PyAV leaves off.)
                stream.codec_context.options = {"err_detect": "explode"}
                for frame in container.decode(stream):
                    if frame.is_corrupt:
                        raise UnreadableVideo(_damaged(times, "a frame is incomplete"))
                    quarter_turns = round(frame.rotation / 90)
                    if not times:
                        self._size = _display_size(frame, stream, quarter_turns)
                    if not times or (frame.key_frame and len(times) >= max(self._keys) + KEY_SPACING):
                        upright = np.rot90(frame.to_ndarray(format="rgb24"), quarter_turns)
                        self._keys[len(times)] = _thumbnail(upright)
                    times.append(frame.time)
                    yield np.rot90(_small(frame), quarter_turns)
        except av.error.FFmpegError as error:
            reason = error.strerror or str(error)
            raise UnreadableVideo(_damaged(times, reason) if times else f"not a readable video: {reason}") from None
        self._timestamps = self._measured(times)

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """See `Video.read`."""
        self._check_indices(indices)
        decord.logging.set_level(decord.logging.QUIET)
        try:
            reader = self._reader = self._reader or decord.VideoReader(str(self.path), ctx=decord.cpu(0))
            # A container without an index may seek past the nearest key frame; the start is slow, but right.
            counted_alike = len(reader) == len(self.timestamps)
            nearest = max(key for key in self._keys if key <= min(indices)) if counted_alike else 0
            found = self._read_from(nearest, reader, indices) or self._read_from(0, reader, indices)
            # Drops what is decoded ahead and ends the decoder's thread.
            reader.seek(0)
        except (decord.DECORDError, RuntimeError, StopIteration) as error:
            self.close()
            raise UnreadableVideo(f"decord fails on frames {min(indices)} to {max(indices)}") from error
        if not found:
            raise UnreadableVideo(OTHER_CONTAINER)
        return np.stack([found[index] for index in indices])

    def close(self) -> None:
        """See `Video.close`."""
        self._reader = None

    def _read_from(self, key: int, reader: decord.VideoReader, indices: Sequence[int]) -> dict[int, np.ndarray]:
        """The frames at `indices`, decoding on from key frame `key`; none if decord shows another picture there."""
        # Coming from behind makes decord look for the key frame at or before this time, not after.
        reader.seek(len(reader) - 1)
        reader.seek(key)
        wanted, found = set(indices), {}
        for index in range(key, max(indices) + 1):
            decoded = reader.next()
            if index == key and _apart(_thumbnail(_packed(decoded.asnumpy())), self._keys[key]) > SAME_FRAME:
                return {}
            if index in wanted:
                frame = _packed(decoded.asnumpy())
                # decord leaves pixels that are not square as they are.
                square = frame.shape[1::-1] == self._size
                found[index] = frame if square else cv2.resize(frame, self._size, interpolation=cv2.INTER_CUBIC)
        return found


class ImageSequence(Video):
    """A folder of images in natural order, `fps` of them a second."""

    def __init__(self, path: Path, fps: float) -> None:
        self.path = path
        self.fps = fps
        self.files = _images(path)

    def small_frames(self) -> Iterator[np.ndarray]:
        """See `Video.small_frames`."""
        size: tuple[int, int] | None = None
        for file in self.files:
            image = self._load(file)
            if image.size != (size := size or image.size):
                raise UnreadableVideo(
                    f"{file.name} is {image.size[0]}x{image.size[1]}, the images before it {size[0]}x{size[1]}"
                )
            self._size = size
            image.thumbnail((SMALL_SIDE, SMALL_SIDE), Image.Resampling.BOX)
            yield np.asarray(image)
        self._timestamps = np.arange(len(self.files)) / self.fps

    def read(self, indices: Sequence[int]) -> np.ndarray:
        """See `Video.read`."""
        self._check_indices(indices)
        return np.stack([np.asarray(self._load(self.files[index])) for index in indices])

    def close(self) -> None:
        """See `Video.close`; nothing is held open."""

    def _load(self, file: Path) -> Image.Image:
        try:
            return load_image(file)
        except ValueError as error:
            raise UnreadableVideo(str(error)) from None


def open_video(path: Path, sequence_fps: float) -> Video:
    """A file as a `VideoFile`, a folder as an `ImageSequence` of `sequence_fps` images a second; reads nothing yet."""
    return ImageSequence(path, sequence_fps) if path.is_dir() else VideoFile(path)


def find_videos(root: Path) -> list[Path]:
    """Video files and image-sequence folders at or under `root`, in natural order (`clip2` before `clip10`).

    A folder with at least two images and no video directly in it is one sequence. Hidden files are left out; links to
    folders are followed, each folder once.

    Raises:
        ValueError: if `root` does not exist.
    """
    if root.is_file():
        return [root]
    if not root.is_dir():
        raise ValueError(f"{root}: no such file or folder; give a video or a folder of videos or image sequences.")
    found, seen = [], set()
    for name, folders, files in os.walk(root, followlinks=True):
        folder = Path(name)
        if (place := folder.resolve()) in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(other for other in folders if not other.startswith("."))
        videos = [folder / f for f in files if Path(f).suffix.lower() in VIDEO_SUFFIXES and not f.startswith(".")]
        found += videos if videos or len(_images(folder)) < 2 else [folder]
    return sorted(found, key=natural_key)


def natural_key(path: Path) -> list[list[int | str]]:
    """Sort key of a path that counts runs of digits as numbers."""
    return [
        [int(part) if part.isdecimal() else part.casefold() for part in re.split(r"(\d+)", name)] for name in path.parts
    ]


def _images(folder: Path) -> list[Path]:
    files = [f for f in folder.iterdir() if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")]
    return sorted(files, key=natural_key)


def _small(frame: av.VideoFrame) -> np.ndarray:
    factor = min(1, SMALL_SIDE / max(frame.width, frame.height))
    width, height = max(1, round(frame.width * factor)), max(1, round(frame.height * factor))
    return frame.reformat(width, height, format="rgb24", interpolation="AREA").to_ndarray()


def _display_size(frame: av.VideoFrame, stream: av.VideoStream, quarter_turns: int) -> tuple[int, int]:
    """Width and height of the upright frames with square pixels."""
    aspect = stream.sample_aspect_ratio or Fraction(1)
    width, height = max(1, round(frame.width * aspect)), frame.height
    return (height, width) if quarter_turns % 2 else (width, height)


def _thumbnail(frame: np.ndarray) -> np.ndarray:
    return cv2.resize(np.ascontiguousarray(frame), (32, 32), interpolation=cv2.INTER_AREA)


def _apart(one: np.ndarray, other: np.ndarray) -> float:
    return float(np.abs(one.astype(np.int16) - other).mean())


def _packed(frame: np.ndarray) -> np.ndarray:
    """RGB out of what decord gives: at some small widths it takes a row's padding for a fourth channel."""
    height, width, channels = frame.shape
    return frame if channels == 3 else frame.reshape(height, -1)[:, : width * 3].reshape(height, width, 3)


def _damaged(times: Sequence[float | None], reason: str) -> str:
    return f"damaged after {len(times)} frames ({reason}); re-encode it to keep what is readable"
