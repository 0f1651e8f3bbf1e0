"""Which validation was the best so far, and whether it is time to stop waiting for a better one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..trf.replace import replacing

VALIDATION_FILE = "validation.jsonl"
"""In the folder of a run: a line for each validation, which is done once its line is whole."""
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


def record(file: Path, step: int, metrics: Mapping[str, float], manner: str) -> None:
    """Write down a validation, done in this manner; the last thing done of it."""
    with file.open("a", encoding="utf-8") as lines:
        lines.write(json.dumps({"step": step, **metrics, "manner": manner}) + "\n")


def replay(best: Best, file: Path, until: int, manner: str) -> dict[str, float] | None:
    """Let `best` see again the validations that a run wrote to `file`, up to step `until`.

    Those done in another manner are left out: they cannot be compared.

    Returns:
        What was measured at step `until` itself; `None` if that step has no such validation.
    """
    found = None
    for values in _lines(file, until):
        step = values.pop("step")
        if values.pop("manner", manner) != manner:
            continue
        if step:
            best.update(step, values)
        if step == until:
            found = values
    return found


def trim(file: Path, until: int) -> None:
    """Drop the validations after step `until` from the file: they come again."""
    if file.is_file():
        kept = [json.dumps(values) + "\n" for values in _lines(file, until)]
        with replacing(file) as beside:
            beside.write_text("".join(kept), encoding="utf-8")


def _lines(file: Path, until: int) -> list[dict[str, Any]]:
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    # What follows the last line end was cut off as it was written, by a full disk or a kill.
    whole = text[: text.rfind("\n") + 1]
    return [values for values in map(json.loads, whole.splitlines()) if values["step"] <= until]
