"""How sure a mean is, and a difference of two: bootstrap intervals (percentiles of resampled means)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
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


def mean_interval(values: Sequence[float], seed: int = 0) -> Interval:
    """The mean of values, with its 95 % interval.

    Args:
        values: one a pair, at least one.
        seed: of the resampling.
    """
    array = np.asarray(values, np.float64)
    return _interval(lambda picked: array[picked].mean(-1), len(array), seed)


def paired_interval(
    a: Sequence[float], b: Sequence[float], contrast: Contrast = "difference", seed: int = 0
) -> Interval:
    """`mean(b) - mean(a)`, or `mean(b) / mean(a)`, with its 95 % interval.

    Pairs are resampled as pairs, so what is hard for both does not widen the interval.

    Args:
        a: one value a pair, at least one.
        b: the other evaluation's, of the same pairs in the same order.
        contrast: which.
        seed: of the resampling.

    Raises:
        ValueError: for numbers of values that differ.
    """
    first, second = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if len(first) != len(second):
        raise ValueError(f"{len(first)} values against {len(second)}: both must be of the same pairs.")

    def between(picked: np.ndarray) -> np.ndarray:
        mean, other = first[picked].mean(-1), second[picked].mean(-1)
        found: np.ndarray = other - mean if contrast == "difference" else other / mean
        return found

    with np.errstate(divide="ignore", invalid="ignore"):
        return _interval(between, len(first), seed)


def _interval(estimate: Callable[[np.ndarray], np.ndarray], count: int, seed: int) -> Interval:
    if count < 1:
        raise ValueError("no values: a mean needs at least one.")
    value = float(estimate(np.arange(count)))
    if count == 1:
        return Interval(value, float("nan"), float("nan"))
    picked = np.random.default_rng(seed).integers(0, count, (RESAMPLES, count))
    low, high = np.percentile(estimate(picked), [50 * (1 - LEVEL), 50 * (1 + LEVEL)])
    return Interval(value, float(low), float(high))
