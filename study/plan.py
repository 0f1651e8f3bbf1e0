"""What the study runs, as data: every set of films, training and evaluation with its settings and what it needs.

The order of the list is the order of work: what answers the question comes first, sweeps come last. A run's name is
where its output lies in the study's folder:

    <world>/train, held         films; clips, pairs: datasets of them; pairs/pairs: the held-out pairs
    runs/<world>-<patch>        trainings
    eval/<world>-<method>       evaluations
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any, Literal

Kind = Literal["films", "clips", "cache", "told", "train", "full", "evaluate"]

METHODS = {
    "cross_fade": "cross-fade",
    "flow_warp": "flow warp",
    "base": "base",
    "forward_half": "forward patch, forward half",
    "forward_both": "forward patch, both halves",
    "either": "one patch for both directions",
    "pair": "forward/backward pair",
    "long": "pair, trained longer",
    "fused": "pair trained for its fusion",
    "rotated": "pair with rotated attention",
    "full": "full fine-tune",
    "ceiling": "VAE reconstruction",
}
"""What is measured in a domain, floor to ceiling; `VARIANTS` in some."""
MAIN = "pair"
"""The method whose patch is swept and measured on the base world."""
VARIANTS = ("long", "fused", "rotated")
"""Other ways to train it, which are set against it in some domains."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One step of the study."""

    name: str
    """Where its output lies in the study's folder; unlike any other's."""
    kind: Kind
    settings: Any
    """Of the command that does it."""
    needs: tuple[str, ...] = ()
    """Names of the runs whose output it uses."""
    digest: str
    """Of what decides its results, theirs included."""
    seconds: float
    """Roughly, for the miniature on two CPU cores."""


@dataclass(frozen=True, kw_only=True)
class Curve:
    """Evaluations along one setting."""

    sweep: str
    """The setting."""
    world: str
    method: str
    """Whose setting it is, one of `METHODS`."""
    points: tuple[tuple[float | str, str], ...]
    """The setting's values, in order, and the evaluation of each."""


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """Evaluations of one method by every way of sampling."""

    world: str
    method: str
    """What is sampled, one of `METHODS`."""
    ways: tuple[tuple[str, str], ...]
    """Names of the ways, that which the others are set against first, and the evaluation of each."""


@dataclass
class Plan:
    """All runs by name, each after what it needs, and what some evaluations belong to."""

    runs: dict[str, Run] = field(default_factory=dict)
    curves: list[Curve] = field(default_factory=list)
    sampled: list[Sampled] = field(default_factory=list)

    def chosen(self, patterns: Sequence[str]) -> list[Run]:
        """The runs whose names match a pattern and all they need, in order; all runs without patterns.

        Raises:
            ValueError: for a pattern that matches none.
        """
        return self._with_needs(self._wanted(patterns), but=())

    def missing(self, patterns: Sequence[str], done: Collection[str]) -> list[Run]:
        """Those that have to be done: not done yet, and wanted or needed by one that has to be done.

        Only evaluations are wanted without patterns: once they are done, films, caches and trainings may be deleted.

        Raises:
            ValueError: for a pattern that matches none.
        """
        return self._with_needs(self._wanted(patterns), but=done)

    def _wanted(self, patterns: Sequence[str]) -> set[str]:
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in self.runs):
                raise ValueError(f"only: no run is called {pattern!r}; dry_run=true lists them.")
        if not patterns:
            return {run.name for run in self.runs.values() if run.kind == "evaluate"}
        return {name for name in self.runs if any(fnmatchcase(name, one) for one in patterns)}

    def _with_needs(self, names: set[str], but: Collection[str]) -> list[Run]:
        found = set()
        for run in reversed(self.runs.values()):  # what a run needs lies before it
            if run.name in names and run.name not in but:
                found.add(run.name)
                names.update(run.needs)
        return [run for run in self.runs.values() if run.name in found]
