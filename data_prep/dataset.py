"""A folder of videos into a Hugging Face dataset of clips, with where each clip comes from and how much it moves."""

from __future__ import annotations

import hashlib
import io
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from tqdm import tqdm

from ..trf.replace import replacing
from .calibration import distance
from .clips import Window
from .frames import fit
from .motion import motion_bucket, motion_score, statistics
from .plan import ClipSettings, PlannedVideo, Split, name_in, plan
from .shapes import counted, shapes_of
from .video import UnreadableVideo, find_videos

REPORT_FILE = "report.json"
FEATURES = datasets.Features(
    {
        "clip_id": datasets.Value("string"),
        "video": datasets.Value("string"),
        "frame_indices": datasets.Sequence(datasets.Value("int64")),
        "timestamps": datasets.Sequence(datasets.Value("float64")),
        "start_seconds": datasets.Value("float64"),
        "end_seconds": datasets.Value("float64"),
        "fps": datasets.Value("float64"),
        "motion_score": datasets.Value("float64"),
        "motion_bucket": datasets.Value("float64"),
        "bound_flow": datasets.Value("float64"),
        "bound_difference": datasets.Value("float64"),
        "height": datasets.Value("int32"),
        "width": datasets.Value("int32"),
        "frames": datasets.Sequence(datasets.Image()),
    }
)


@dataclass
class Report:
    """What became of every file."""

    files: dict[str, int]
    """Clips made of each source, by its path relative to the source folder."""
    skipped: dict[str, str]
    """Why a source was skipped or given up half-way, by its path."""
    train: int = 0
    """Clips for training."""
    validation: int = 0
    """Clips held out."""
    too_still: int = 0
    """Clips left out for a motion score below the minimum."""
    too_lively: int = 0
    """Clips left out for a motion score above the maximum."""
    fps_median: float | None = None
    """Median of the clips' measured frames per second."""
    motion: dict[str, float] | None = None
    """Motion of the clips; see `trf.patch.MotionStatistics`."""
    buckets: dict[str, dict[Split, int]] = field(default_factory=dict)
    """Clips of each split, by their shape; the shape of most clips first."""
    sources: dict[str, list[int]] = field(default_factory=dict)
    """Size and latest change of each source, by its path: to notice one that was replaced."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The `ClipSettings`, and `source`."""
    already_there: bool = False
    """The output was complete from an earlier run; nothing was done."""

    @property
    def clips(self) -> int:
        """All clips."""
        return self.train + self.validation

    def summary(self) -> str:
        """The report in a few lines for people."""
        lines = [
            f"{self.clips} clips ({self.train} train, {self.validation} validation) of {len(self.files)} files"
            + (", made by an earlier run with the same settings; nothing was done" if self.already_there else "")
        ]
        if len(self.buckets) > 1:
            lines += [
                f"  {shape}: {sum(of.values())} clips ({of['train']} train, {of['validation']} validation)"
                for shape, of in self.buckets.items()
            ]
        if self.motion:
            low, middle, high = (self.motion[f"score_{name}"] for name in ("p10", "median", "p90"))
            bucket = self.motion["motion_bucket_median"]
            lines.append(
                f"motion {middle:.1f} %/s (10th to 90th percentile {low:.1f} to {high:.1f}), bucket {bucket:.0f}"
            )
        if self.too_still or self.too_lively:
            lines.append(f"left out by motion: {self.too_still} too still, {self.too_lively} too lively")
        lines += [f"skipped {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def prepare(source: Path, output: Path, *, overwrite: bool = False, progress: bool = True, **settings: Any) -> Report:
    """Cut the videos under `source` into clips and save them as a `datasets.DatasetDict` at `output`.

    A file that cannot be used is skipped with its reason. `output` appears when all is done; `report.json` lies in it.
    A run with the settings and files of a complete `output` does nothing.

    Args:
        source: a folder of videos and image sequences, searched recursively, or one video.
        output: the dataset folder to write.
        overwrite: replace a dataset at `output`, at the end of the run.
        progress: show bars on standard error.
        settings: fields of `ClipSettings`.

    Raises:
        ValueError: for a bad setting, if `output` holds something else, or if no clip was found; then with all reasons.
    """
    if source.is_dir() and output.resolve().is_relative_to(source.resolve()):
        raise ValueError(
            f"output={str(output)!r} lies in the source folder, where its own images would count as footage."
        )
    wanted = ClipSettings(**settings)
    given = json.loads(json.dumps({"source": str(source.resolve()), **asdict(wanted)}))  # as it will be read back
    earlier = _earlier_report(source, output, given, overwrite)
    if earlier is not None:
        return earlier
    sources = _sources(source)  # before they are read: one that changes meanwhile counts as changed
    planned = plan(source, progress=progress, **settings).videos
    report = Report(
        sources=sources,
        files=dict.fromkeys((one.name for one in planned), 0),
        skipped={one.name: one.reason for one in planned if one.reason},
        settings=given,
    )
    with replacing(output) as beside:
        # Inside the folder that is removed when the run fails or is interrupted.
        staging = beside / "staging"
        staging.mkdir(parents=True)
        with ExitStack() as stack:
            writers = {split: stack.enter_context(_writer(staging / split)) for split in ("train", "validation")}
            for row, split in _rows(planned, wanted, report, progress):
                writers[split].write(FEATURES.encode_example(row))
        splits = _balanced(
            datasets.Dataset.from_file(str(staging / "train")),
            datasets.Dataset.from_file(str(staging / "validation")),
            wanted.holdout,
        )
        if not any(map(len, splits.values())):
            raise ValueError(_nothing_found(source, report))
        _describe(report, splits)
        with _quiet_datasets():
            # An empty split is only readable again with a shard of its own.
            splits.save_to_disk(
                str(beside), num_shards={name: None if len(rows) else 1 for name, rows in splits.items()}
            )
        shutil.rmtree(staging)
        (beside / REPORT_FILE).write_text(json.dumps(asdict(report), indent=2) + "\n", encoding="utf-8")
    return report


def load_clips(folder: str | Path, split: Split = "train") -> datasets.Dataset:
    """The clips of one split of a dataset written by `prepare`; validation may be empty.

    Raises:
        ValueError: if the folder is no such dataset, or another version's.
    """
    folder = Path(folder)
    if not (folder / REPORT_FILE).is_file():
        raise ValueError(f"{folder}: not a clip dataset, {REPORT_FILE} is missing; make one with `trfpp prep`.")
    clips = datasets.load_from_disk(str(folder / split))
    if missing := [name for name in FEATURES if name not in clips.column_names]:
        raise ValueError(
            f"{folder}: made by another version of trfpp, its clips have no {', '.join(missing)}; make it again with "
            "`trfpp prep` and overwrite=true."
        )
    return clips


def clip_frames(row: dict[str, Any]) -> np.ndarray:
    """The frames of one row of a clip dataset, uint8 RGB `[F, H, W, 3]`."""
    return np.stack([np.asarray(image.convert("RGB")) for image in row["frames"]])


def _rows(
    planned: list[PlannedVideo], settings: ClipSettings, report: Report, progress: bool
) -> Iterator[tuple[dict[str, Any], Split]]:
    """The rows of all clips with their split; `report` is kept up on the way."""
    total = sum(len(one.windows) for one in planned)
    with tqdm(total=total, desc="cutting", unit="clip", disable=None if progress else True) as bar:
        for one in planned:
            try:
                for window, split in one.windows:
                    bar.update()
                    frames = fit(one.video.read(window.indices), *one.size, settings.fit)
                    score = motion_score(frames, window.fps)
                    if settings.min_motion is not None and score < settings.min_motion:
                        report.too_still += 1
                    elif settings.max_motion is not None and score > settings.max_motion:
                        report.too_lively += 1
                    else:
                        report.files[one.name] += 1
                        yield _row(one.name, window, frames, score, settings.image_format), split
            except (UnreadableVideo, OSError) as error:
                report.skipped[one.name] = f"{error} (after {report.files[one.name]} clips)"
            one.video.close()
            if one.windows and not report.files[one.name] and one.name not in report.skipped:
                report.skipped[one.name] = f"the motion of all its {len(one.windows)} clips is out of bounds"


def _row(name: str, window: Window, frames: np.ndarray, score: float, image_format: str) -> dict[str, Any]:
    stem = re.sub(r"[^A-Za-z0-9_-]+", "_", Path(name).stem).strip("_-") or "clip"
    digest = hashlib.sha256(name.encode()).hexdigest()[:8]
    flow, difference = distance(frames[0], frames[-1])
    return {
        "clip_id": f"{stem[:60]}-{digest}-{window.indices[0]:06d}",
        "video": name,
        "frame_indices": list(window.indices),
        "timestamps": list(window.times),
        "start_seconds": window.times[0],
        "end_seconds": window.times[-1],
        "fps": window.fps,
        "motion_score": score,
        "motion_bucket": motion_bucket(score),
        "bound_flow": flow,
        "bound_difference": difference,
        "height": frames.shape[1],
        "width": frames.shape[2],
        "frames": [{"bytes": _encoded(frame, image_format), "path": None} for frame in frames],
    }


def _encoded(frame: np.ndarray, image_format: str) -> bytes:
    buffer = io.BytesIO()
    options: dict[str, Any] = {"quality": 95, "subsampling": 0} if image_format == "jpeg" else {"compress_level": 1}
    Image.fromarray(frame).save(buffer, image_format.upper(), **options)
    return buffer.getvalue()


@contextmanager
def _writer(path: Path) -> Iterator[ArrowWriter]:
    # A few clips at a time: a row holds all images of a clip.
    writer = ArrowWriter(features=FEATURES, path=str(path), writer_batch_size=4)
    try:
        yield writer
        writer.finalize()
    finally:
        writer.close()


def _balanced(train: datasets.Dataset, validation: datasets.Dataset, holdout: float) -> datasets.DatasetDict:
    """Both splits, none empty if it need not be.

    Rounding or motion bounds can leave one empty. Training comes first, unless all clips are to be held out; then, with
    a hold-out asked for, the last clip is held out.
    """
    if not len(train) and holdout < 1:
        train, validation = validation, train
    if holdout and not len(validation) and len(train) > 1:
        videos, indices = list(train["video"]), list(train["frame_indices"])
        apart = [row for row in range(len(train) - 1) if videos[row] != videos[-1] or indices[row][-1] < indices[-1][0]]
        if apart:
            train, validation = train.select(apart), train.select([len(train) - 1])
    return datasets.DatasetDict({"train": train, "validation": validation})


def _describe(report: Report, splits: datasets.DatasetDict) -> None:
    report.train, report.validation = len(splits["train"]), len(splits["validation"])
    shapes = {name: counted(shapes_of(rows)) for name, rows in splits.items()}
    every = counted(shape for rows in splits.values() for shape in shapes_of(rows))
    report.buckets = {str(shape): {name: of.get(shape, 0) for name, of in shapes.items()} for shape in every}
    columns = {
        name: [value for rows in splits.values() for value in rows[name]]
        for name in ("fps", "motion_score", "motion_bucket")
    }
    report.fps_median = float(np.median(columns["fps"]))
    report.motion = statistics(columns["motion_score"], columns["motion_bucket"]).model_dump()


def _earlier_report(source: Path, output: Path, given: dict[str, Any], overwrite: bool) -> Report | None:
    """The report of a complete earlier run with the same settings and files; None if the run should go on.

    Raises:
        ValueError: if something else is in the way.
    """
    if source.resolve() == output.resolve() or output.resolve() in source.resolve().parents:
        raise ValueError(f"output={str(output)!r}: holds the source {source}; choose another folder.")
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return None
    if not (output / REPORT_FILE).is_file():
        raise ValueError(f"output={str(output)!r}: something else than a clip dataset is there; choose another folder.")
    if overwrite:
        return None
    said = json.loads((output / REPORT_FILE).read_text(encoding="utf-8"))
    report = Report(**{name: said[name] for name in Report.__dataclass_fields__ if name in said})
    report.already_there, before = True, report.settings
    changed = [
        f"{name} ({before.get(name)}, now {value})" for name, value in given.items() if before.get(name) != value
    ]
    now = _sources(source)
    if now.keys() != report.files.keys():
        changed.append("the files of the source")
    elif report.sources and (others := [name for name in now if now[name] != report.sources.get(name)]):
        more = f" and {len(others) - 1} other files" if len(others) > 1 else ""
        changed.append(f"{others[0]}{more} of the source")
    if changed:
        raise ValueError(
            f"output={str(output)!r}: a dataset is there, and since then {', '.join(changed)} changed; "
            "give another output, or overwrite it."
        )
    return report


def _sources(source: Path) -> dict[str, list[int]]:
    """See `Report.sources`; of a folder of images those of all together."""
    found = {}
    for path in find_videos(source):
        stats = [file.stat() for file in (path.iterdir() if path.is_dir() else [path]) if file.is_file()]
        found[name_in(source, path)] = [sum(one.st_size for one in stats), max(one.st_mtime_ns for one in stats)]
    return found


def _nothing_found(source: Path, report: Report) -> str:
    reasons = [f"  {name}: {reason}" for name, reason in report.skipped.items()]
    return "\n".join([f"{source}: not one clip could be made of its {len(report.files)} files:", *reasons])


@contextmanager
def _quiet_datasets() -> Iterator[None]:
    """Without the bars of `datasets`, which say nothing about clips."""
    shown = not datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if shown:
            datasets.enable_progress_bars()
