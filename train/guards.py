"""Losses that are not finite, and losses out of all proportion, by the clips that had them.

Nothing here waits for the device in a step: rows are kept as they are and looked at when the log is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .objective import Losses, band_names, band_of

SPIKE = 10.0
"""A row whose loss is so many times the usual one at its noise level is told of."""
MEMORY = 0.9
"""What the usual loss keeps of itself from one review to the next."""
SKIPS = 20
"""Steps that may be skipped in a row."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a batch, by what it was."""

    step: int
    clip: str
    backward: bool
    sigma: float
    loss: float

    def __str__(self) -> str:
        way = "reversed" if self.backward else "as filmed"
        return f"clip {self.clip} ({way}, sigma {self.sigma:.3g}) at step {self.step}: loss {self.loss:.4g}"


class Guard:
    """Keeps the rows of a process since the last review.

    Args:
        clip_of: from a sample's number to its clip's name.
    """

    def __init__(self, clip_of: Callable[[int], str]) -> None:
        self.clip_of = clip_of
        self.usual = torch.full((len(band_names()),), float("nan"), dtype=torch.float64)
        self._rows: list[torch.Tensor] = []

    def add(self, step: int, losses: Losses) -> None:
        """Take in a batch's losses."""
        columns = (losses.numbers, losses.backward, losses.sigma, losses.rows)
        steps = torch.full_like(losses.rows, step, dtype=torch.float64)
        self._rows.append(torch.stack([steps, *(column.double() for column in columns)]))

    def last(self) -> list[Row]:
        """The rows of the latest batch: those whose loss is not finite, or all if every loss is."""
        rows = [self._row(column) for column in self._rows[-1].T.tolist()]
        return [row for row in rows if not math.isfinite(row.loss)] or rows

    def review(self) -> tuple[list[Row], list[Row]]:
        """The rows since the last review whose loss was not finite, and those that stood out; forgets them."""
        if not self._rows:
            return [], []
        table = torch.cat(self._rows, dim=1).cpu()
        self._rows.clear()
        sigma, loss = table[3], table[4]
        finite, bands = loss.isfinite(), band_of(sigma)
        high = finite & (loss > SPIKE * self.usual[bands])  # never where nothing is usual yet
        for band in sorted(set(bands.tolist())):
            if (own := loss[finite & ~high & (bands == band)]).numel():
                before = self.usual[band]
                self.usual[band] = own.mean() if before.isnan() else MEMORY * before + (1 - MEMORY) * own.mean()
        bad, spikes = ([self._row(column) for column in table[:, which].T.tolist()] for which in (~finite, high))
        return bad, spikes

    def _row(self, column: list[float]) -> Row:
        step, number, backward, sigma, loss = column
        return Row(step=int(step), clip=self.clip_of(int(number)), backward=bool(backward), sigma=sigma, loss=loss)
