"""Two evaluations of the same pairs against each other: each metric's means, and the contrast with its interval."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .evaluation import RECIPE_FILE, differing, films_of_rows, metrics_of, read_recipe, read_rows
from .statistics import Contrast, Interval, mean_interval, paired_interval

SHAPE = ("height", "width", "num_frames")


@dataclass(frozen=True)
class Compared:
    """One metric of two evaluations, over the pairs that both have it for."""

    a: Interval
    b: Interval
    contrast: Interval
    pairs: int


@dataclass(frozen=True)
class Comparison:
    """Two evaluations; as a string, a table for people."""

    contrast: Contrast
    metrics: Mapping[str, Compared]
    left_out: int
    """Pairs that only one of them has."""
    changed: list[str]
    """Names of the settings in which they differ."""

    def __str__(self) -> str:
        title = "b - a" if self.contrast == "difference" else "b / a"
        lines = [("metric", "pairs", "a", "b", f"{title} [95 %]")]
        lines += [
            (name, str(one.pairs), f"{one.a.value:.4g}", f"{one.b.value:.4g}", str(one.contrast))
            for name, one in self.metrics.items()
        ]
        widths = [max(map(len, column)) for column in zip(*lines)]
        table = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths)).rstrip() for line in lines]
        if self.left_out:
            table.append(f"{self.left_out} pairs are in one of the two only, and left out.")
        return "\n".join([*table, f"settings that differ: {', '.join(self.changed) or 'none'}"])


def compare(a: Path, b: Path, contrast: Contrast = "difference", seed: int = 0) -> Comparison:
    """Compare two evaluations pair by pair.

    Args:
        a: output folder of one evaluation.
        b: output folder of the other.
        contrast: of means: `b - a` or `b / a`.
        seed: of the resampling.

    Raises:
        ValueError: if one is no evaluation, they share no pair, or a pair was made in another size or length or has
            other frames in one than in the other.
    """
    recipes = []
    for name, folder in (("a", a), ("b", b)):
        if not (folder / RECIPE_FILE).is_file():
            raise ValueError(f"{name}={str(folder)!r}: no evaluation there; `trfpp evaluate` makes one.")
        recipes.append(read_recipe(folder))
    first, second = read_rows(a), read_rows(b)
    shared = [key for key in first if key in second]
    if not shared:
        raise ValueError(f"{a} and {b} have no pair in common.")
    for key in shared:
        shapes = [{name: rows[key]["made_with"][name] for name in SHAPE} for rows in (first, second)]
        if shapes[0] != shapes[1]:
            raise ValueError(
                f"pair {key} was made as {shapes[0]} in {a} and as {shapes[1]} in {b}: measure both alike."
            )
        footage = {rows[key].get("footage_sha256") for rows in (first, second)}
        if len(footage) == 2 and None not in footage:
            raise ValueError(f"pair {key} of {a} has other frames than that of {b}: measure both on the same footage.")
    metrics = {}
    for name in dict.fromkeys(name for key in shared for name in metrics_of(first[key])):
        pairs = [key for key in shared if name in first[key] and name in second[key]]
        if pairs:
            films = films_of_rows(first[key] for key in pairs)
            one, other = ([rows[key][name] for key in pairs] for rows in (first, second))
            metrics[name] = Compared(
                mean_interval(one, seed, films),
                mean_interval(other, seed, films),
                paired_interval(one, other, contrast, seed, films),
                len(pairs),
            )
    own = {f"sampler.{name}" for key in shared for name in differing(first[key]["made_with"], second[key]["made_with"])}
    changed = sorted({*differing(*recipes), *own} - {"sampler.seed"})  # a seed is said by its own name
    return Comparison(contrast, metrics, len({*first} ^ {*second}), changed)
