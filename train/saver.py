"""Writes what a run leaves behind: checkpoints, the best patch, the finished one.

Of a sharded model all processes have to ask at once; the first one writes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor

from ..trf.patch import PatchCard, patch_files, save_patch
from ..trf.sharding import whole
from .average import Average
from .checkpoint import CHECKPOINTS_FOLDER, save_checkpoint, snapshot
from .origin import Origin


@dataclass(frozen=True, kw_only=True)
class Saver:
    """See the module."""

    output: Path
    """The run's folder."""
    accelerator: Accelerator
    unet: Any
    """With the patch `default`."""
    parameters: Sequence[Tensor]
    """Those that are trained."""
    optimizer: Callable[[], Any]
    """Gives the plain optimizer, whole."""
    average: Average
    origin: Origin
    card: PatchCard
    """As far as it is known before training."""
    metrics: Callable[[], Mapping[str, float]]
    """Gives those of the card."""
    binding: Mapping[str, Any]
    """Settings that a run must share to go on from here."""
    keep: int
    """Newest checkpoints kept."""
    review: Callable[[], None]
    """Raises if a loss or gradient so far was not finite."""

    def checkpoint(self, step: int) -> Path:
        """Write a checkpoint; returns its folder.

        Raises:
            FloatingPointError: if a loss, a gradient or a weight is not finite.
            OSError: if it cannot be written; those before it are whole.
        """
        self.review()  # or a bad weight would be all that is said, without its clip
        checkpoints = self.output / CHECKPOINTS_FOLDER
        path = checkpoints / f"step-{step:06d}"
        self._check(step)
        content = snapshot(self.unet, self.card.direction, self.optimizer(), self.average, self.origin)
        if self.accelerator.is_main_process:
            scaler = self.accelerator.scaler.state_dict() if self.accelerator.scaler is not None else {}
            with _saving(path):
                save_checkpoint(checkpoints, step, content, self._card(step), scaler, self.binding, self.keep)
        self.accelerator.wait_for_everyone()
        return path

    def best(self, step: int) -> None:
        """Write the patch as it is, of whichever weights the UNet holds, as the best so far.

        Raises:
            FloatingPointError: if a weight is not finite.
            OSError: if it cannot be written.
        """
        self._check(step)
        self._patch("best", step)

    def patch(self, step: int) -> Path:
        """Write the finished patch, of the averaged weights if there are any; returns its folder."""
        with self.average.applied():
            folder = self._patch("patch", step)
        self.accelerator.wait_for_everyone()
        return folder

    def _check(self, step: int) -> None:
        if not all(bool(whole(parameter.isfinite().all())) for parameter in self.parameters):
            raise FloatingPointError(
                f"the adapter holds values that are not finite at step {step}, which was not saved; lower optim.lr. "
                "Running again resumes from the last checkpoint, which is whole."
            )

    def _patch(self, name: str, step: int) -> Path:
        files = self.origin.saved(patch_files(self.unet, self.card.direction))
        if self.accelerator.is_main_process:
            with _saving(self.output / name):
                save_patch(self.output / name, files, self._card(step))
        return self.output / name

    def _card(self, step: int) -> PatchCard:
        return self.card.model_copy(update={"training_steps": step, "metrics": dict(self.metrics())})


@contextmanager
def _saving(path: Path) -> Iterator[None]:
    """A disk that is full is said; safetensors has an error of its own for it."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise OSError(
            f"{path} was not saved: {error}. The checkpoints before it are whole: make room if the disk is full, "
            "and run again to resume from the last one."
        ) from None
