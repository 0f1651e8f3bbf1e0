"""Parts of a report in Markdown: tables, differences, pictures, lists."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from ..infer.statistics import Interval
from .results import Metric

NOTE = "95 % intervals of the mean over pairs in brackets."
PAIRED_NOTE = "Differences pair by pair with 95 % bootstrap intervals; **bold** where the interval leaves out zero."


def gain(metric: Metric, one: Interval | None) -> str:
    """A difference with its interval, bold where that leaves out zero; empty without one."""
    if one is None:
        return ""
    text = metric.interval(one, "+")
    sure = one.low > 0 or one.high < 0
    return f"**{text}**" if sure else text


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of cells."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def picture(file: Path, about: str) -> str:
    """A picture that lies beside the report."""
    return f"![{about}]({file.name})"


def bullets(lines: Iterable[str]) -> list[str]:
    """The lines of a list."""
    return [f"- {line}" for line in lines]
