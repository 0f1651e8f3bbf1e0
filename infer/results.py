"""Generated videos: checked, and written with their record.

Such a folder holds `video.mp4`, `frames/00000.png`, ... and `generation.json`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..data_prep.writing import write_frames, write_video
from ..trf.replace import remove, replacing
from .record import RECORD_FILE, precision_of

if TYPE_CHECKING:
    from ..configs.schema import SamplingConfig

REPLACED_FILE = f".{RECORD_FILE}.replaced"
"""The record of a result that another one is taking the place of."""


def make_folder(output: Path) -> None:
    """Make the folder that results go to.

    Raises:
        ValueError: if it cannot be made or nothing can be written into it.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output):
            pass
    except OSError as error:
        raise ValueError(
            f"output={str(output)!r}: no results can be written there ({error.strerror}); choose another folder."
        ) from None


def finite_frames(video: np.ndarray, config: SamplingConfig) -> np.ndarray:
    """A generated video `[F, H, W, 3]` in [0, 1], as uint8.

    Raises:
        ValueError: if not all of it is finite.
    """
    if not np.isfinite(video).all():
        raise ValueError(
            f"the video holds values that are not finite at precision={precision_of(config)}; try bf16 or no, "
            "or a smaller scale of the patch."
        )
    return (video * 255).round().astype(np.uint8)


def write_result(folder: Path, frames: np.ndarray, fps: float, record: Mapping[str, Any], *, save_frames: bool) -> None:
    """Write a result's folder, whole or not at all."""
    with replacing(folder) as beside:
        beside.mkdir()
        write_into(beside, frames, fps, record, save_frames=save_frames)


def write_into(folder: Path, frames: np.ndarray, fps: float, record: Mapping[str, Any], *, save_frames: bool) -> None:
    """Write a result into a folder that is there.

    Until all of it is written, what was there stays. The record comes last: with it the result is complete. That of a
    result that is replaced is hidden first, and goes last.
    """
    hidden = folder / REPLACED_FILE
    with ExitStack() as parts:  # which take their places in the reverse order
        told = parts.enter_context(replacing(folder / RECORD_FILE))
        told.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
        if save_frames:
            write_frames(parts.enter_context(replacing(folder / "frames")), frames)
        write_video(parts.enter_context(replacing(folder / "video.mp4")), frames, fps)
        if (folder / RECORD_FILE).is_file():
            (folder / RECORD_FILE).replace(hidden)
        if not save_frames:
            remove(folder / "frames")
    hidden.unlink(missing_ok=True)


def is_unfinished(folder: Path) -> bool:
    """Whether the replacing of a result in a folder was interrupted."""
    return (folder / REPLACED_FILE).is_file()
