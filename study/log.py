"""What became of each run: `study.jsonl`, a line a run, to tell how long others will take and what failed."""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from .plan import Run

LOG_FILE = "study.jsonl"


def read_log(output: Path) -> list[dict[str, Any]]:
    """All lines, oldest first: `name`, `kind`, `seconds`, `expected` seconds, and `digest` once it is done, or `error`.

    A run that was interrupted has neither. A line that was cut off as it was written, by a full disk or a kill, is left
    out.
    """
    file = output / LOG_FILE
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
        with suppress(json.JSONDecodeError):
            lines.append(json.loads(line))
    return lines


def add_line(output: Path, run: Run, seconds: float, **became: str) -> None:
    """Write down what became of a run: its `digest`, or an `error`, or nothing."""
    line = {"name": run.name, "kind": run.kind, "seconds": round(seconds, 2), "expected": round(run.seconds, 2)}
    output.mkdir(parents=True, exist_ok=True)
    with (output / LOG_FILE).open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read() != b"\n":  # the last line was cut off
                file.write(b"\n")
        file.write(json.dumps(line | became).encode() + b"\n")


def seconds_taken(output: Path) -> dict[str, float]:
    """What every run took by its name, all goes of it together, since it was last done with other settings."""
    taken: dict[str, tuple[str, float]] = {}
    for line in read_log(output):
        name, digest = line["name"], line.get("digest", "")
        before, seconds = taken.get(name, ("", 0.0))
        anew = before and digest and digest != before
        taken[name] = (digest or before, line["seconds"] + (0.0 if anew else seconds))
    return {name: seconds for name, (_, seconds) in taken.items()}


def outdated(output: Path, runs: Iterable[Run]) -> Collection[str]:
    """Names of the runs that were last done with other settings, or of what was; lines without a digest do not tell."""
    latest = {line["name"]: line for line in read_log(output) if "error" not in line}
    return {run.name for run in runs if latest.get(run.name, {}).get("digest", run.digest) != run.digest}


def expected(output: Path, runs: Iterable[Run], jobs: int = 1) -> float:
    """Seconds that runs will take, so many of them at a time, from what runs of their kind took so far."""
    done, taken = {line["name"]: line for line in read_log(output) if "digest" in line}, seconds_taken(output)
    took: dict[str, list[tuple[float, float]]] = {}
    for name, line in done.items():
        took.setdefault(line["kind"], []).append((taken[name], line["expected"]))
    slower = {kind: sum(s for s, _ in both) / sum(e for _, e in both) for kind, both in took.items()}
    each = [run.seconds * slower.get(run.kind, 1.0) for run in runs]
    return max(sum(each) / jobs, max(each, default=0.0))


def duration(seconds: float) -> str:
    """For people: `45 s`, `12 min`, `3.4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
