"""Contact sheets: videos side by side as one labelled picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont, ImageOps

CELL_WIDTH = (160, 320)
"""Narrowest and widest column, pixels; frames outside are resized."""
GAP = 8
LABEL = 14
"""Height of the text, pixels."""


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

    height, width = first[0].shape[:2]
    cell_width = min(max(width, CELL_WIDTH[0]), CELL_WIDTH[1])
    cell = (cell_width, round(height * cell_width / width))
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
            fitted = ImageOps.pad(Image.fromarray(frame), cell, Image.Resampling.LANCZOS, color="white")
            sheet.paste(fitted, (x, top + row * (cell[1] + GAP)))
    return sheet
