"""Pictures of a pretraining: its curves, how motion follows the conditions, and films as rows of frames."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from .appraise import Level

LABEL_WIDTH = 80
CURVES = {
    "autoencoder": ("psnr", "PSNR, dB", "linear"),
    "image_encoder": ("loss", "InfoNCE", "log"),
    "unet": ("loss", "denoising loss", "log"),
}
"""Of each stage: the column that is drawn, what it is called, and its scale."""


def film_sheet(rows: Iterable[tuple[str, np.ndarray]]) -> Image.Image:
    """Films as labelled rows of frames, time to the right.

    Args:
        rows: name and uint8 frames `[F, H, W, 3]` of each, all of one shape.
    """
    named = list(rows)
    count, height, width = named[0][1].shape[:3]
    sheet = Image.new("RGB", (LABEL_WIDTH + count * (width + 1), len(named) * (height + 2)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for row, (name, frames) in enumerate(named):
        top = row * (height + 2)
        draw.text((LABEL_WIDTH - 6, top + height // 2), name, "black", font, anchor="rm")
        for column, frame in enumerate(frames):
            sheet.paste(Image.fromarray(frame), (LABEL_WIDTH + column * (width + 1), top))
    return sheet


def draw_curves(curves: Mapping[str, Path], file: Path) -> None:
    """Draw the curves of the stages side by side, those of the UNet by noise level too.

    Args:
        curves: CSV files, as `stage.fit` writes them, by the names of their stages.
        file: the PNG to write.
    """
    figure = Figure(figsize=(4 * len(curves), 3), layout="constrained")
    for number, (name, path) in enumerate(curves.items(), start=1):
        with path.open(encoding="utf-8", newline="") as opened:
            rows = list(csv.DictReader(opened))
        column, label, scale = CURVES[name]
        axes = figure.add_subplot(1, len(curves), number, title=name.replace("_", " "), xlabel="step", ylabel=label)
        steps = [int(row["step"]) for row in rows]
        for own in [key for key in rows[0] if key.startswith("sigma")]:
            axes.plot(steps, [float(row[own]) for row in rows], linewidth=0.8, alpha=0.6, label=own)
        axes.plot(steps, [float(row[column]) for row in rows], color="black", linewidth=1.2, label="all")
        axes.set_yscale(scale)
        axes.grid(alpha=0.3)
        if name == "unet":
            axes.legend(fontsize=6)
    figure.savefig(file, dpi=110)


def draw_conditioning(of_bucket: Sequence[Level], of_fps: Sequence[Level], file: Path, learnt: float) -> None:
    """Draw how much videos move, a frame and a second, against the motion bucket and against the frame rate.

    Args:
        of_bucket: levels of the motion bucket.
        of_fps: levels of the frame rate.
        file: the PNG to write.
        learnt: buckets above are shaded.
    """
    figure = Figure(figsize=(11, 3.2), layout="constrained")
    left, middle, right = (figure.add_subplot(1, 3, number) for number in (1, 2, 3))
    fps, bucket = of_bucket[0].fps, of_fps[0].motion_bucket
    _line(left, of_bucket, "motion_bucket", "per_second")
    left.axvspan(learnt, of_bucket[-1].motion_bucket, color="black", alpha=0.08, linewidth=0, label="not learnt")
    left.set(title=f"at {fps:g} fps", xlabel="motion bucket", ylabel="% of the diagonal a second")
    _line(middle, of_fps, "fps", "per_second")
    middle.set(title=f"at motion bucket {bucket:g}", xlabel="fps", ylabel="% of the diagonal a second", ylim=(0, None))
    _line(right, of_fps, "fps", "per_frame")
    right.set(title=f"at motion bucket {bucket:g}", xlabel="fps", ylabel="% of the diagonal a frame", ylim=(0, None))
    left.legend(fontsize=8)
    figure.savefig(file, dpi=110)


def _line(axes: Any, levels: Sequence[Level], across: str, up: str) -> None:
    where = [getattr(level, across) for level in levels]
    axes.plot(where, [getattr(level, up) for level in levels], "o-", color="black", label="made")
    asked = [level.asked_per_second / (level.fps if up == "per_frame" else 1) for level in levels]
    axes.plot(where, asked, "--", color="gray", label="asked for")
    axes.grid(alpha=0.3)
