"""Bounded pairs: manifests that ask for generations between two images, and pairs cut from held-out clips."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from ..trf.replace import replacing
from .dataset import clip_frames, load_clips
from .plan import Split
from .writing import write_frames

MANIFEST_FILE = "pairs.jsonl"
PAIRS_FOLDER = "pairs"
"""Where the command line writes a dataset's held-out pairs, inside its folder."""
SAFE_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
COLUMNS = (
    "id", "start", "end", "loop", "truth", "fps", "motion_bucket_id", "num_frames", "height", "width", "seed", "video",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Pair:
    """Two bounds and, where given, how to generate between them."""

    id: str
    """Name of the pair's outputs; unlike any other in the manifest, and safe as a file name."""
    start: Path
    """Image of the first frame."""
    end: Path
    """Image of the last frame; the first one's file for a loop."""
    truth: Path | None = None
    """Folder of the true frames, both bounds included."""
    fps: float | None = None
    """Frames per second."""
    motion_bucket_id: float | None = None
    """Amount of motion, 0 to 255."""
    num_frames: int | None = None
    """Frames, both bounds included."""
    height: int | None = None
    """Pixels of the video; given with `width` or not at all."""
    width: int | None = None
    """Pixels."""
    seed: int | None = None
    """Seed of the pair's draws."""
    video: str | None = None
    """Where the truth comes from: the video's name in its dataset."""

    @property
    def loop(self) -> bool:
        """Whether both bounds are one image."""
        return self.start == self.end


def write_pairs(dataset_folder: Path, output: Path, split: Split = "validation") -> Path:
    """Turn the clips of a dataset into bounded pairs with their true frames.

    Args:
        dataset_folder: a dataset written by `prepare`.
        output: folder to write: `<clip id>/start.png`, `end.png`, `truth/00000.png`, …, and `pairs.jsonl`; one already
            there is replaced at the end.
        split: which clips.

    Returns:
        The manifest's path.

    Raises:
        ValueError: if the split is empty or something else lies at `output`.
    """
    clips = load_clips(dataset_folder, split)
    if not len(clips):
        raise ValueError(
            f"{dataset_folder}: its {split} split is empty; prepare it with a higher holdout or more clips."
        )
    if output.exists() and any(output.iterdir()) and not (output / MANIFEST_FILE).is_file():
        raise ValueError(f"output={str(output)!r}: something else than pairs is there; choose another folder.")
    with replacing(output) as beside:
        beside.mkdir()
        with (beside / MANIFEST_FILE).open("w", encoding="utf-8") as manifest:
            for row in clips:
                frames, name = clip_frames(row), row["clip_id"]
                write_frames(beside / name / "truth", frames)
                Image.fromarray(frames[0]).save(beside / name / "start.png")
                Image.fromarray(frames[-1]).save(beside / name / "end.png")
                pair = {
                    "id": name,
                    "start": f"{name}/start.png",
                    "end": f"{name}/end.png",
                    "truth": f"{name}/truth",
                    "fps": row["fps"],
                    "motion_bucket_id": row["motion_bucket"],
                    "num_frames": len(frames),
                    "height": row["height"],
                    "width": row["width"],
                    "video": row["video"],
                }
                manifest.write(json.dumps(pair) + "\n")
    return output / MANIFEST_FILE


def held_out_pairs(dataset_folder: Path) -> Path | None:
    """The manifest of a dataset's held-out pairs, written if it is not there; `None` if nothing is held out."""
    manifest = dataset_folder / PAIRS_FOLDER / MANIFEST_FILE
    if manifest.is_file():
        return manifest
    held_out = len(load_clips(dataset_folder, "validation"))
    return write_pairs(dataset_folder, manifest.parent) if held_out else None


def read_manifest(path: Path) -> list[Pair]:
    """Read a manifest of pairs, CSV with a header or JSON lines.

    Columns: `start` and `end`, or `loop` for one image that is both; optional `id` (`pair00001`, … by row if left out),
    `truth`, `fps`, `motion_bucket_id`, `num_frames`, `height` and `width`, `seed`, `video`. Paths are relative to the
    manifest's folder.

    Raises:
        ValueError: naming the line and what is wrong there, for every bad row.
    """
    if path.suffix.lower() not in (".csv", ".jsonl"):
        raise ValueError(f"{path}: a manifest is a .csv or a .jsonl file.")
    if not path.is_file():
        raise ValueError(f"{path}: no such manifest.")
    pairs: list[Pair] = []
    wrong: list[str] = []
    first_line: dict[str, int] = {}
    try:
        rows = list(_rows(path))
    except UnicodeDecodeError:
        raise ValueError(f"{path}: not UTF-8; save it as such (in a spreadsheet: CSV UTF-8).") from None
    for number, (line, cells) in enumerate(rows, start=1):
        try:
            pair = _pair(cells, path.parent, f"pair{number:05d}")
            # Case does not tell files apart everywhere.
            earlier = first_line.setdefault(pair.id.lower(), line)
            if earlier != line:
                raise ValueError(f"id {pair.id!r} is that of line {earlier} too")
            pairs.append(pair)
        except ValueError as error:
            wrong.append(f"  line {line}: {error}")
    if wrong:
        raise ValueError("\n".join([f"{path}: {len(wrong)} rows cannot be used:", *wrong]))
    if not pairs:
        raise ValueError(f"{path}: holds no pairs.")
    return pairs


def _rows(path: Path) -> Iterator[tuple[int, Any]]:
    """Line number and cells of each row; a broken JSON line comes as the text it is."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        if path.suffix.lower() == ".csv":
            reader = csv.DictReader(file, skipinitialspace=True)
            for cells in reader:
                yield reader.line_num, cells
            return
        for line, text in enumerate(file, start=1):
            if text.strip():
                try:
                    yield line, json.loads(text)
                except json.JSONDecodeError:
                    yield line, text


def _pair(cells: Any, folder: Path, default_id: str) -> Pair:
    if not isinstance(cells, dict):
        raise ValueError("not a JSON object")
    said = {key: value for key, value in cells.items() if value not in (None, "")}
    if None in said:
        raise ValueError("more cells than the header has columns")
    unknown = [str(key) for key in said if key not in COLUMNS]
    if unknown:
        raise ValueError(f"unknown column {unknown[0]!r}; valid ones are {', '.join(COLUMNS)}")
    if ("loop" in said) == ("start" in said or "end" in said):
        raise ValueError("give either start and end, or loop")
    if ("height" in said) != ("width" in said):
        raise ValueError("give both height and width, or neither")
    name = str(said.get("id", default_id))
    if not SAFE_ID.fullmatch(name):
        raise ValueError(
            f"id {name!r} is no safe file name; use letters, digits, '.', '_' and '-', first a letter or digit"
        )
    return Pair(
        id=name,
        start=_file(said, "loop" if "loop" in said else "start", folder),
        end=_file(said, "loop" if "loop" in said else "end", folder),
        truth=_path(said, "truth", folder) if "truth" in said else None,
        fps=_number(said, "fps", 0, 1000),
        motion_bucket_id=_number(said, "motion_bucket_id", 0, 255),
        num_frames=_whole(said, "num_frames", 2),
        height=_whole(said, "height", 1),
        width=_whole(said, "width", 1),
        seed=_whole(said, "seed", 0),
        video=str(said["video"]) if "video" in said else None,
    )


def _path(said: dict[str, Any], column: str, folder: Path) -> Path:
    if column not in said:
        raise ValueError(f"{column} is missing")
    path = folder / str(said[column])
    if not path.exists():
        raise ValueError(f"{column}: {path} does not exist")
    return path


def _file(said: dict[str, Any], column: str, folder: Path) -> Path:
    path = _path(said, column, folder)
    if not path.is_file():
        raise ValueError(f"{column}: {path} is not a file")
    return path


def _number(said: dict[str, Any], column: str, low: float, high: float) -> float | None:
    if column not in said:
        return None
    try:
        value = float(said[column])
    except (TypeError, ValueError):
        raise ValueError(f"{column}: {said[column]!r} is not a number") from None
    if not low <= value <= high or (column == "fps" and value == 0):
        raise ValueError(f"{column}: {value:g} is not between {low:g} and {high:g}")
    return value


def _whole(said: dict[str, Any], column: str, low: int) -> int | None:
    value = _number(said, column, low, 2**63 - 1)
    if value is None:
        return None
    if value != int(value):
        raise ValueError(f"{column}: {value:g} is not a whole number")
    try:  # every digit of it, where there are more than a float holds
        return int(said[column])
    except ValueError:  # "12.0"
        return int(value)
