"""What `trfpp prep` would cut: the settings of a clip dataset, and the windows of each source with their splits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from typing import Any, Literal

import numpy as np
from tqdm import tqdm

from .clips import Window, cuts, why_no_window, windows
from .frames import FitMode
from .shapes import Shape, Size, counted, nearest_size, parse_size
from .video import UnreadableVideo, Video, find_videos, open_video

Split = Literal["train", "validation"]


@dataclass(frozen=True, kw_only=True)
class ClipSettings:
    """What clips are cut, and how they are kept."""

    fps: float | None = 7
    """Frames per second of a clip, by the source's frame times; `None` takes every frame, at each source's own rate."""
    num_frames: int | Sequence[int] = 25
    """Frames of a clip; of several numbers each uncut stretch gets the largest of which a clip fits."""
    height: int = 576
    """Pixels."""
    width: int = 1024
    """Pixels."""
    sizes: Sequence[str] | None = None
    """Several sizes as WIDTHxHEIGHT, in place of `height` and `width`; see `shapes.nearest_size`."""
    fit: FitMode = "crop"
    """`crop` cuts off what overhangs the size, `pad` adds black; the aspect is kept either way."""
    stride_seconds: float | None = None
    """Seconds from one clip's start to the next one's; clips do not overlap if not given."""
    cut_threshold: float = 27.0
    """Change between neighbouring frames that counts as a scene cut, 8-bit levels; lower finds more cuts."""
    min_motion: float | None = None
    """Clips with a lower motion score are left out; percent of the diagonal per second."""
    max_motion: float | None = None
    """Clips with a higher motion score are left out; percent of the diagonal per second."""
    max_clips_per_video: int | None = None
    """At most so many clips of one source, spread evenly over it."""
    holdout: float = 0.1
    """Fraction of the clips kept for validation, the last ones of each source; 0 leaves validation empty, 1 train."""
    sequence_fps: float = 24
    """Images per second of image-sequence folders."""
    image_format: Literal["png", "jpeg"] = "png"
    """`png` keeps frames exactly; `jpeg` (quality 95) takes about a fifth of the room."""

    def __post_init__(self) -> None:
        for name in ("fps", "sequence_fps", "cut_threshold", "height", "width", "stride_seconds"):
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"{name}={value}: must be above 0.")
        if not self.lengths or min(self.lengths) < 3:
            raise ValueError(f"num_frames={self.num_frames}: a clip needs at least 3 frames, one between two bounds.")
        if not self.all_sizes:
            raise ValueError("sizes=[]: give at least one, or leave it out.")
        if self.max_clips_per_video is not None and self.max_clips_per_video < 1:
            raise ValueError(f"max_clips_per_video={self.max_clips_per_video}: must be at least 1.")
        if not 0 <= self.holdout <= 1:
            raise ValueError(f"holdout={self.holdout}: must be from 0 to 1.")
        for name, choices in (("fit", ("crop", "pad")), ("image_format", ("png", "jpeg"))):
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {' or '.join(choices)}.")

    @property
    def lengths(self) -> list[int]:
        """The numbers of frames to choose from, the largest first."""
        given = [self.num_frames] if isinstance(self.num_frames, int) else self.num_frames
        return sorted(set(given), reverse=True)

    @property
    def all_sizes(self) -> list[Size]:
        """The sizes to choose from, as they were given.

        Raises:
            ValueError: for one that cannot be read.
        """
        if self.sizes is None:
            return [Size(self.height, self.width)]
        return list(dict.fromkeys(map(parse_size, self.sizes)))


@dataclass(frozen=True)
class PlannedVideo:
    """The windows to cut of one source, and the split of each; or why there are none."""

    name: str
    video: Video
    windows: list[tuple[Window, Split]]
    size: Size
    """Of its clips."""
    reason: str = ""


@dataclass(frozen=True)
class Plan:
    """What would be cut; as a string, a line for every source."""

    settings: ClipSettings
    videos: list[PlannedVideo]

    def __str__(self) -> str:
        kept = self.settings
        sizes, lengths = kept.all_sizes, kept.lengths
        lines = []
        for one in self.videos:
            held = sum(split == "validation" for _, split in one.windows)
            of_size = f" of {one.size}" if len(sizes) > 1 else ""
            made = f"{len(one.windows)} clips{of_size}, {held} of them held out"
            lines.append(f"{one.name}: {made}" if one.windows else f"{one.name}: skipped: {one.reason}")
        shapes = [Shape(len(window.indices), *one.size) for one in self.videos for window, _ in one.windows]
        pace = f"{kept.fps:g} fps" if kept.fps else "its source's own fps"
        total = f"{len(shapes)} clips of {len(self.videos)} files before motion is measured; each"
        asked = [Shape(length, *size) for length in lengths for size in sizes]
        if len(asked) == 1:
            return "\n".join([*lines, f"{total} {asked[0]} at {pace}"])
        buckets = {**counted(shapes), **{shape: 0 for shape in asked if shape not in shapes}}
        counts = [f"  {shape}: {clips or 'no'} clips" for shape, clips in buckets.items()]
        return "\n".join([*lines, f"{total} at {pace}, in buckets:", *counts])


def plan(source: Path, *, progress: bool = True, **settings: Any) -> Plan:
    """What `prepare` would cut; nothing is written, and every file is decoded once, to measure times and find cuts.

    Motion is not measured here, so `min_motion` and `max_motion` may leave out some of these clips later.

    Args:
        source: a folder, searched recursively, or one video.
        progress: show a bar on standard error.
        settings: fields of `ClipSettings`.

    Raises:
        ValueError: if there is nothing at `source`, or for a bad setting.
    """
    wanted = ClipSettings(**settings)
    found = find_videos(source)
    if not found:
        raise ValueError(f"{source}: holds no videos and no folders of images.")
    planned = []
    owed = 0.0
    with tqdm(found, desc="looking", unit="file", disable=None if progress else True) as bar:
        for path in bar:
            name, video = name_in(source, path), open_video(path, wanted.sequence_fps)
            try:
                _check_name(path)
                chosen, reason = _plan_video(video, wanted)
                width, height = video.size
                size = nearest_size(Size(height, width), wanted.all_sizes, wanted.fit)
            except (UnreadableVideo, OSError) as error:
                chosen, reason, size = [], str(error), wanted.all_sizes[0]
            # Carried from source to source, so that many short ones together still give the fraction asked for.
            owed += wanted.holdout * len(chosen)
            held = min(int(owed + 0.5), ceil(wanted.holdout * len(chosen)))
            owed -= held
            planned.append(PlannedVideo(name, video, assign_splits(chosen, held), size, reason))
            clips = sum(len(one.windows) for one in planned)
            bar.set_postfix(clips=clips, skipped=sum(not one.windows for one in planned))
    return Plan(wanted, planned)


def name_in(source: Path, path: Path) -> str:
    """How a video found at or under `source` is called in datasets and reports."""
    name = path.name if path == source else path.relative_to(source).as_posix()
    return name.encode(errors="backslashreplace").decode()


def _check_name(path: Path) -> None:
    """Decoders and datasets take text.

    Raises:
        UnreadableVideo: for a path that is none.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        raise UnreadableVideo("its path is not UTF-8; rename it.") from None


def assign_splits(chosen: list[Window], held: int) -> list[tuple[Window, Split]]:
    """Hold out the last `held` windows of one source; training windows that share time with them are dropped."""
    keep, last = chosen[: len(chosen) - held], chosen[len(chosen) - held :]
    if last:
        keep = [window for window in keep if window.indices[-1] < last[0].indices[0]]
    return [*((window, "train") for window in keep), *((window, "validation") for window in last)]


def _plan_video(video: Video, settings: ClipSettings) -> tuple[list[Window], str]:
    boundaries = cuts(video, settings.cut_threshold)
    timing = (video.timestamps, boundaries, settings.fps)
    chosen = windows(*timing, settings.lengths, settings.stride_seconds)
    if not chosen:
        return [], why_no_window(*timing, settings.lengths[-1])
    limit = settings.max_clips_per_video
    if limit is not None and len(chosen) > limit:
        chosen = [chosen[round(place)] for place in np.linspace(0, len(chosen) - 1, limit)]
    return chosen, ""
