"""The numbers of the study, read from the evaluations that are finished: nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from ..infer.compare import Comparison, compare
from ..infer.evaluation import SUMMARY_FILE, VIDEOS_FOLDER, Row, read_rows
from ..infer.statistics import Contrast, Interval, mean_interval, paired_interval
from .plan import Plan
from .work import done_in

V = TypeVar("V", bound=float | str)


@dataclass(frozen=True)
class Metric:
    """How a metric of `docs/evaluation.md` is shown."""

    title: str
    digits: int
    """After the point."""
    better: str
    """Which way is better, for a heading."""

    def __str__(self) -> str:
        return f"{self.title} ({self.better})"

    def number(self, value: float, sign: str = "") -> str:
        """A value as text; `sign="+"` for differences."""
        return f"{value:{sign}.{self.digits}f}"

    def interval(self, one: Interval, sign: str = "") -> str:
        """A value with its interval as text; a single value has none."""
        if one.low != one.low:
            return self.number(one.value, sign)
        return f"{self.number(one.value, sign)} [{self.number(one.low, sign)}, {self.number(one.high, sign)}]"


METRICS = {
    "inner_psnr": Metric("PSNR, dB", 2, "higher"),
    "inner_ssim": Metric("SSIM", 3, "higher"),
    "track_pixels": Metric("object off by, px", 2, "lower"),
    "path_degrees": Metric("camera off by, °", 2, "lower"),
    "bound_psnr": Metric("bounds' PSNR, dB", 1, "higher"),
    "motion_ratio": Metric("motion ratio", 2, "near the reconstruction's"),
    "sharpness_ratio": Metric("sharpness ratio", 2, "near the reconstruction's"),
    "disagreement": Metric("disagreement", 3, "lower"),
    "seam_gap": Metric("seam gap", 2, "lower"),
    "seam_jump": Metric("seam jump", 2, "near 1"),
}
"""Those of the tables, in their order."""
ERRORS = ("track_percent", "path_percent")
"""Where things, or the camera, are: in percent of the frame or of the sweep, to be set beside each other."""


class Point(NamedTuple):
    """An evaluation among others, over the pairs that all of them share, by metric."""

    means: Mapping[str, Interval]
    gains: Mapping[str, Interval]
    """What it has more than the base, pair by pair; nothing of the base itself, or without one."""


class Results:
    """The finished evaluations of a study.

    Args:
        output: the study's folder.
        plan: all its runs.
    """

    def __init__(self, output: Path, plan: Plan) -> None:
        self.output = output
        self.plan = plan
        self._compared: dict[tuple[str, str, Contrast], Comparison] = {}
        self._read: dict[str, Mapping[str, Row]] = {}

    @cached_property
    def _done(self) -> Collection[str]:
        return done_in(self.output, self.plan.runs.values())

    @cached_property
    def missing(self) -> Collection[str]:
        """Names of the runs that are still to be done, in their order."""
        return [run.name for run in self.plan.missing((), self._done)]

    @cached_property
    def evaluations(self) -> Sequence[str]:
        """Names of the evaluations that are done, in their order."""
        return [run.name for run in self.plan.runs.values() if run.kind == "evaluate" and run.name in self._done]

    def has(self, name: str) -> bool:
        """Whether an evaluation is done."""
        return name in self.evaluations

    def summary(self, name: str) -> dict[str, Any]:
        """What an evaluation's summary says."""
        found: dict[str, Any] = json.loads((self.output / name / SUMMARY_FILE).read_text(encoding="utf-8"))
        return found

    def means(self, name: str) -> dict[str, Interval]:
        """Mean and interval of each metric, as the summary has them."""
        return {
            metric: Interval(one["mean"], *(float("nan") if end is None else end for end in (one["low"], one["high"])))
            for metric, one in self.summary(name)["metrics"].items()
        }

    def gains(self, base: str, name: str) -> dict[str, Interval]:
        """What an evaluation has more than another, of each metric, pair by pair."""
        return self._contrasts(base, name, "difference")

    def ratios(self, base: str, name: str) -> dict[str, Interval]:
        """How many times as much an evaluation has as another, of each metric, in the mean."""
        return self._contrasts(base, name, "ratio")

    def _contrasts(self, base: str, name: str, contrast: Contrast) -> dict[str, Interval]:
        key = (base, name, contrast)
        if key not in self._compared:
            self._compared[key] = compare(self.output / base, self.output / name, contrast)
        return {metric: one.contrast for metric, one in self._compared[key].metrics.items()}

    def over_shared(self, points: Iterable[tuple[V, str]], base: str) -> dict[V, Point]:
        """The finished ones of these evaluations, and what each has more than the base, over the pairs all share."""
        found = {value: self._rows(name) for value, name in points if self.has(name)}
        reference = self._rows(base) if self.has(base) else {}
        every = [rows for rows in (*found.values(), reference) if rows]
        shared = [pair for pair in every[0] if all(pair in rows for rows in every)] if every else []
        return {
            value: Point(
                _means([rows[pair] for pair in shared]),
                _gains([(reference[pair], rows[pair]) for pair in shared])
                if reference and rows is not reference
                else {},
            )
            for value, rows in found.items()
        }

    def _rows(self, name: str) -> Mapping[str, Row]:
        """The pairs of an evaluation; the same object each time."""
        if name not in self._read:
            self._read[name] = read_rows(self.output / name)
        return self._read[name]

    def videos(self, name: str) -> dict[str, Path]:
        """The videos of an evaluation that kept them, by pair."""
        return {file.stem: file for file in sorted((self.output / name / VIDEOS_FOLDER).glob("*.mp4"))}


def _means(rows: Sequence[Row]) -> dict[str, Interval]:
    names = [name for name in METRICS if rows and all(name in row for row in rows)]
    return {name: mean_interval([row[name] for row in rows]) for name in names}


def _gains(pairs: Sequence[tuple[Row, Row]]) -> dict[str, Interval]:
    names = [name for name in METRICS if pairs and all(name in row for pair in pairs for row in pair)]
    return {name: paired_interval([base[name] for base, _ in pairs], [row[name] for _, row in pairs]) for name in names}
