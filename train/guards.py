"""Losses and gradients that are not finite, and losses out of all proportion, by the clips that had them.

Nothing here waits for the device in a step: rows and norms are kept as they are and looked at when the log is written.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from .objective import Losses, band_names, band_of

SPIKE = 10.0
"""A row whose loss is so many times the usual one at its noise level is told of."""
MEMORY = 0.9
"""What the usual loss keeps of itself from one review to the next."""
SKIPS = 20
"""So many steps skipped in a row end a run. The fp16 scaler, which halves its scale at each, is long past helping."""
SHOWN = 4
"""Rows that a message shows."""


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


def first_bad(rows: Sequence[Row]) -> str:
    """Says what was not finite in the first step of the rows, and of which clips, from whichever process they come.

    A bad step spoils the weights, and with them all that comes after it on every process, so only the first one counts.
    """
    step = min(row.step for row in rows)
    own = [row for row in rows if row.step == step]
    lost = [row for row in own if not math.isfinite(row.loss)]
    said = [str(row) for row in lost or own]
    more = f"; and {len(said) - SHOWN} more" if len(said) > SHOWN else ""
    return f"a {'loss' if lost else 'gradient'} was not finite: {'; '.join(said[:SHOWN])}{more}"


class Guard:
    """Keeps the rows and the gradients' norms of a process since the last review.

    Args:
        clip_of: from a sample's number to its clip's name.
    """

    def __init__(self, clip_of: Callable[[int], str]) -> None:
        self.clip_of = clip_of
        self.usual = torch.full((len(band_names()),), float("nan"), dtype=torch.float64)
        self.in_a_row = 0
        """Latest steps, as far as they are reviewed, without a finite gradient."""
        self._rows: list[tuple[int, tuple[torch.Tensor, ...]]] = []
        self._norms: dict[int, torch.Tensor] = {}

    def add(self, step: int, losses: Losses) -> None:
        """Take in a batch's losses."""
        self._rows.append((step, (losses.numbers, losses.backward, losses.sigma, losses.rows)))

    def gradient(self, step: int, norm: torch.Tensor) -> None:
        """Take in the norm of a step's gradient, of all processes."""
        self._norms[step] = norm

    def review(self) -> tuple[list[Row], list[Row]]:
        """The rows of steps with a loss or gradient that was not finite, and those that stood out; forgets all."""
        bad_steps = set()
        if self._norms:
            for step, fine in zip(self._norms, torch.stack(list(self._norms.values())).isfinite().tolist()):
                self.in_a_row = 0 if fine else self.in_a_row + 1
                if not fine:
                    bad_steps.add(step)
            self._norms.clear()
        if not self._rows:
            return [], []
        # Float64 here, for not every device knows it.
        tables = [(step, torch.stack([column.cpu().double() for column in columns])) for step, columns in self._rows]
        table = torch.cat([nn.functional.pad(one, (0, 0, 1, 0), value=step) for step, one in tables], dim=1)
        self._rows.clear()
        sigma, loss = table[3], table[4]
        finite, bands = loss.isfinite(), band_of(sigma)
        high = finite & (loss > SPIKE * self.usual[bands])  # never where nothing is usual yet
        for band in sorted(set(bands.tolist())):
            if (own := loss[finite & ~high & (bands == band)]).numel():
                before = self.usual[band]
                self.usual[band] = own.mean() if before.isnan() else MEMORY * before + (1 - MEMORY) * own.mean()
        bad_steps.update(map(int, table[0, ~finite].tolist()))
        of_bad_step = torch.tensor([step in bad_steps for step in table[0].tolist()])
        bad, spikes = ([self._row(column) for column in table[:, which].T.tolist()] for which in (of_bad_step, high))
        return bad, spikes

    def _row(self, column: list[float]) -> Row:
        step, number, backward, sigma, loss = column
        return Row(step=int(step), clip=self.clip_of(int(number)), backward=bool(backward), sigma=sigma, loss=loss)
