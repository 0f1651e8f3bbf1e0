"""Contact sheets: videos side by side as one labelled picture, or playing beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..trf.replace import replacing

CELL_WIDTH = (160, 320)
"""Narrowest and widest column, pixels; frames outside are resized."""
GAP = 8
LABEL = 14
"""Height of the text, pixels."""
HOLD = 6
"""Frames' time that an animation rests on its last one."""


def contact_sheet(columns: Mapping[str, Sequence[np.ndarray] | np.ndarray], rows: int) -> Image.Image:
    """Videos as labelled columns, time going down; `start | base | patched | end` reads as one would tell it.

    A single image is a still and is shown once: at the top if it stands left of the videos (where they start), at the
    bottom if it stands right of the first of them (where they end).

    Args:
        columns: by name and from left to right, the frames of each: uint8 RGB `[F, H, W, 3]`, or `[1, H, W, 3]`.
        rows: frames shown of each video, evenly spaced from the first to the last.

    Raises:
        ValueError: without a video, for videos of different lengths, or for less than 2 rows.
    """
    videos = {name: frames for name, frames in columns.items() if len(frames) > 1}
    if not videos:
        raise ValueError("a contact sheet needs at least one video; there are stills only.")
    if len({len(frames) for frames in videos.values()}) > 1:
        lengths = ", ".join(f"{name} {len(frames)}" for name, frames in videos.items())
        raise ValueError(f"videos of a contact sheet must have the same number of frames, these have: {lengths}.")
    if rows < 2:
        raise ValueError(f"rows={rows}: the first and the last frame need 2.")
    first = next(iter(videos.values()))
    rows = min(rows, len(first))
    shown = [round(float(index)) for index in np.linspace(0, len(first) - 1, rows)]

    cell = _cell(first)
    font = ImageFont.load_default(LABEL)
    left = GAP + round(font.getlength(str(len(first)))) + GAP
    top = GAP + LABEL + GAP
    size = (left + len(columns) * (cell[0] + GAP), top + rows * (cell[1] + GAP))
    sheet = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(sheet)

    for row, index in enumerate(shown):
        position = (left - GAP, top + row * (cell[1] + GAP) + cell[1] // 2)
        draw.text(position, str(index), "dimgray", font, anchor="rm")
    still_row = 0
    for column, (name, frames) in enumerate(columns.items()):
        x = left + column * (cell[0] + GAP)
        draw.text((x + cell[0] // 2, GAP + LABEL // 2), name, "black", font, anchor="mm")
        if name in videos:
            still_row = rows - 1
            cells = {row: frames[index] for row, index in enumerate(shown)}
        else:
            cells = {still_row: frames[0]}
        for row, frame in cells.items():
            sheet.paste(_fitted(frame, cell), (x, top + row * (cell[1] + GAP)))
    return sheet


def moving_sheet(rows: Mapping[str, Mapping[str, np.ndarray]]) -> list[Image.Image]:
    """Videos playing beside each other, as the pictures of an animation.

    Args:
        rows: by label, from top to bottom, the videos of each by name, uint8 RGB `[F, H, W, 3]`. Those of one name are
            one column; a row that has none of that name leaves its place empty.

    Raises:
        ValueError: without a video, or for videos of different lengths.
    """
    videos = [video for row in rows.values() for video in row.values()]
    if len({len(video) for video in videos}) != 1:
        raise ValueError("videos that play beside each other must have the same number of frames, and be at least one.")
    names = list(dict.fromkeys(name for row in rows.values() for name in row))
    cell = _cell(videos[0])
    font = ImageFont.load_default(LABEL)
    left = GAP + round(max(font.getlength(label) for label in rows)) + GAP
    top = GAP + LABEL + GAP
    empty = Image.new("RGB", (left + len(names) * (cell[0] + GAP), top + len(rows) * (cell[1] + GAP)), "white")
    draw = ImageDraw.Draw(empty)
    corners = {
        (label, name): (left + column * (cell[0] + GAP), top + row * (cell[1] + GAP))
        for row, label in enumerate(rows)
        for column, name in enumerate(names)
    }
    for label in rows:
        draw.text((left - GAP, corners[label, names[0]][1] + cell[1] // 2), label, "dimgray", font, anchor="rm")
    for name in names:
        x = corners[next(iter(rows)), name][0]
        draw.text((x + cell[0] // 2, GAP + LABEL // 2), name, "black", font, anchor="mm")
    pictures = [empty.copy() for _ in videos[0]]
    for (label, name), corner in corners.items():
        for picture, frame in zip(pictures, rows[label].get(name, ())):
            picture.paste(_fitted(frame, cell), corner)
    return pictures


def save_animation(file: Path, pictures: Sequence[Image.Image], fps: float) -> None:
    """Write an endless animation (WebP) of RGB pictures, which rests on the last one before it begins again."""
    duration = 1000 / fps
    durations = [round(duration)] * (len(pictures) - 1) + [round(HOLD * duration)]
    first, *others = pictures
    with replacing(file) as beside:
        first.save(beside, "WEBP", save_all=True, append_images=others, duration=durations, loop=0, quality=85)


def _cell(video: Sequence[np.ndarray] | np.ndarray) -> tuple[int, int]:
    """Width and height of a column's pictures."""
    height, width = video[0].shape[:2]
    cell_width = min(max(width, CELL_WIDTH[0]), CELL_WIDTH[1])
    return cell_width, round(height * cell_width / width)


def _fitted(frame: np.ndarray, cell: tuple[int, int]) -> Image.Image:
    return ImageOps.pad(Image.fromarray(frame), cell, Image.Resampling.LANCZOS, color="white")
