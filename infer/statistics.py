"""How sure a mean is, and a difference of two: bootstrap intervals (percentiles of resampled means)."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np

RESAMPLES = 10_000
LEVEL = 0.95

Contrast = Literal["difference", "ratio"]


class Interval(NamedTuple):
    """An estimate and the ends of its interval; these are nan for a single value, which says nothing of its spread."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4g} [{self.low:.4g}, {self.high:.4g}]"


def mean_interval(values: Sequence[float], seed: int = 0, groups: Sequence[Hashable] | None = None) -> Interval:
    """The mean of values, with its 95 % interval.

    Args:
        values: one a pair, at least one.
        seed: of the resampling.
        groups: what each pair is of: pairs of one film are alike, so films are resampled, with all their pairs. Every
            pair by itself if not given.
    """
    places, sizes = _grouped(groups, len(values))
    sums = np.bincount(places, np.asarray(values, np.float64))
    return _interval(lambda picked: sums[picked].sum(-1) / sizes[picked].sum(-1), len(sizes), seed)


def paired_interval(
    a: Sequence[float],
    b: Sequence[float],
    contrast: Contrast = "difference",
    seed: int = 0,
    groups: Sequence[Hashable] | None = None,
) -> Interval:
    """`mean(b) - mean(a)`, or `mean(b) / mean(a)`, with its 95 % interval.

    Pairs are resampled as pairs, so what is hard for both does not widen the interval.

    Args:
        a: one value a pair, at least one.
        b: the other evaluation's, of the same pairs in the same order.
        contrast: which.
        seed: of the resampling.
        groups: see `mean_interval`.

    Raises:
        ValueError: for numbers of values that differ.
    """
    if len(a) != len(b):
        raise ValueError(f"{len(a)} values against {len(b)}: both must be of the same pairs.")
    places, sizes = _grouped(groups, len(a))
    first, second = (np.bincount(places, np.asarray(values, np.float64)) for values in (a, b))

    def between(picked: np.ndarray) -> np.ndarray:
        number = sizes[picked].sum(-1)
        mean, other = first[picked].sum(-1) / number, second[picked].sum(-1) / number
        found: np.ndarray = other - mean if contrast == "difference" else other / mean
        return found

    with np.errstate(divide="ignore", invalid="ignore"):
        return _interval(between, len(sizes), seed)


def _grouped(groups: Sequence[Hashable] | None, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The number of each value's group, in order of first appearance, and each group's size."""
    if count < 1:
        raise ValueError("no values: a mean needs at least one.")
    numbers: dict[Hashable, int] = {}
    places = np.array([numbers.setdefault(group, len(numbers)) for group in groups or range(count)])
    return places, np.bincount(places)


def _interval(estimate: Callable[[np.ndarray], np.ndarray], count: int, seed: int) -> Interval:
    value = float(estimate(np.arange(count)))
    if count == 1:
        return Interval(value, float("nan"), float("nan"))
    picked = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    low, high = np.percentile(estimate(picked), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(value, float(low), float(high))
