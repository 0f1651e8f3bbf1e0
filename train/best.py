"""Which validation was the best so far, and whether it is time to stop waiting for a better one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..trf.replace import replacing

Metric = Literal["inner_psnr", "bound_psnr", "disagreement", "loss", "loss_fused"]
HIGHER_IS_BETTER: dict[Metric, bool] = {
    "inner_psnr": True,
    "bound_psnr": True,
    "disagreement": False,
    "loss": False,
    "loss_fused": False,
}


@dataclass
class Best:
    """Follows one metric of a run's validations."""

    metric: Metric
    patience: int | None = None
    """Validations without improvement after which a run stops; `None` never stops one."""
    value: float | None = None
    """The best so far."""
    step: int = 0
    """Of the best."""
    since: int = 0
    """Validations since the best."""

    def update(self, step: int, metrics: Mapping[str, float]) -> bool:
        """Take in a validation; whether it is the best so far. A value that is no number never is."""
        value, sign = metrics[self.metric], 1 if HIGHER_IS_BETTER[self.metric] else -1
        if math.isfinite(value) and (self.value is None or sign * value > sign * self.value):
            self.value, self.step, self.since = value, step, 0
            return True
        self.since += 1
        return False

    @property
    def exhausted(self) -> bool:
        """Whether patience is at its end."""
        return self.patience is not None and self.since >= self.patience


def replay(best: Best, file: Path, until: int) -> None:
    """Let `best` see again the validations that a run wrote to `file`, up to step `until`."""
    for values in _lines(file, until):
        if values["step"]:
            best.update(int(values["step"]), values)


def trim(file: Path, until: int) -> None:
    """Drop the validations after step `until` from the file: they come again."""
    if file.is_file():
        kept = [json.dumps(values) + "\n" for values in _lines(file, until)]
        with replacing(file) as beside:
            beside.write_text("".join(kept), encoding="utf-8")


def _lines(file: Path, until: int) -> list[dict[str, float]]:
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    return [values for values in map(json.loads, text.splitlines()) if values["step"] <= until]
