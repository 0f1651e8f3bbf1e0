"""Which bucket of clips an optimizer step is of: clips of one shape make a bucket, and a step is of one bucket.

The schedule follows from the numbers of clips alone, so it is the same for any number of processes, resumed or not. It
is Tijdeman's (The chairman assignment problem, 1980): of K buckets, after any step, each has had its share of the steps
up to `1 - 1 / (2K - 2)` of a step, and no order is sure to do better. With one bucket every step is of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import NamedTuple

from ..data_prep.shapes import Shape, counted


@dataclass(frozen=True)
class Bucket:
    """Clips of one shape."""

    shape: Shape
    clips: list[int]
    """Their places in the dataset, in its order."""


class Turn(NamedTuple):
    """What a step is of."""

    bucket: int
    earlier: int
    """Steps before it that were of the same bucket."""


@dataclass(frozen=True)
class Schedule:
    """The buckets of all steps, without end; it repeats after as few steps as give each bucket its exact share."""

    cycle: tuple[Turn, ...]
    per_cycle: tuple[int, ...]
    """Steps of each bucket in a cycle."""

    def at(self, step: int) -> Turn:
        """The bucket of a step, from 0."""
        rounds, place = divmod(step, len(self.cycle))
        bucket, earlier = self.cycle[place]
        return Turn(bucket, rounds * self.per_cycle[bucket] + earlier)

    def totals(self, steps: int) -> list[int]:
        """How many of the first `steps` steps each bucket has."""
        rounds, rest = divmod(steps, len(self.cycle))
        of_rest = [turn.bucket for turn in self.cycle[:rest]]
        return [rounds * whole + of_rest.count(bucket) for bucket, whole in enumerate(self.per_cycle)]


def buckets_of(shapes: Sequence[Shape]) -> list[Bucket]:
    """Clips by their shapes, the bucket of most clips first.

    Args:
        shapes: of each clip, in the dataset's order.
    """
    places: dict[Shape, list[int]] = {shape: [] for shape in counted(shapes)}
    for place, shape in enumerate(shapes):
        places[shape].append(place)
    return [Bucket(shape, clips) for shape, clips in places.items()]


@lru_cache(maxsize=8)
def schedule(counts: tuple[int, ...]) -> Schedule:
    """The order in which buckets of so many clips take turns, in proportion to them and evenly spread.

    A bucket is due once it is `1 / D` of a step behind its share, `D = 2K - 2`; of those that are due, the one goes
    first that would be the first to be more than `1 - 1 / D` behind.

    Args:
        counts: clips of each bucket, each at least 1.
    """
    common = gcd(*counts)
    counts = tuple(count // common for count in counts)
    total, fine = sum(counts), max(1, 2 * len(counts) - 2)
    cycle: list[Turn] = []
    given = [0] * len(counts)
    for step in range(1, total + 1):
        # In whole numbers, `fine * total` times the steps behind.
        due = [one for one, count in enumerate(counts) if fine * (step * count - given[one] * total) >= total]
        first = min(due, key=lambda one: (fine * given[one] + fine - 1) * total // (fine * counts[one]))
        cycle.append(Turn(first, given[first]))
        given[first] += 1
    return Schedule(tuple(cycle), counts)
