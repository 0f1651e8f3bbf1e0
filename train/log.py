"""What training tells people: the progress bar, TensorBoard, and pictures."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import torch
from accelerate import Accelerator
from tqdm.auto import tqdm

from .objective import band_names, band_of
from .validate import Outcome, save_pictures

if TYPE_CHECKING:
    from ..configs.schema import TrainConfig


class TrainingLog:
    """Collects a step's figures without waiting for the device, and writes them out every `log_every` steps."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig) -> None:
        self.accelerator = accelerator
        self.config = config
        self.start = 0
        """Step the run goes on from."""
        self.grad_norm: torch.Tensor | float | None = None
        self.metrics: dict[str, float] = {}
        bands = len(band_names())
        self._sums = torch.zeros(bands, device=accelerator.device)
        self._counts = torch.zeros(bands, device=accelerator.device)
        self._steps = 0
        self._since = time.perf_counter()

    def __enter__(self) -> TrainingLog:
        self.accelerator.init_trackers("log")
        main = self.accelerator.is_main_process
        # disable=None: no bar where nobody watches, such as a log file; there each log entry is a line.
        self._bar = tqdm(
            total=self.config.steps,
            initial=self.start,
            desc="train",
            unit="step",
            disable=None if main else True,
            dynamic_ncols=True,
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()
        if self.accelerator.is_main_process:
            self.accelerator.get_tracker("tensorboard", unwrap=True).flush()

    def add(self, sigma: torch.Tensor, losses: torch.Tensor) -> None:
        """Add the losses `[B]` of one batch."""
        bands = band_of(sigma)
        self._sums.index_add_(0, bands, losses)
        self._counts.index_add_(0, bands, torch.ones_like(losses))

    def step(self, done: int, clips: int, lr: float) -> None:
        """Finish an optimizer step."""
        self._bar.update()
        self._steps += 1
        if done % self.config.log_every and done != self.config.steps:
            return
        sums, counts = self.accelerator.reduce(torch.stack([self._sums, self._counts])).tolist()
        seconds = time.perf_counter() - self._since
        loss = sum(sums) / sum(counts)
        if not np.isfinite(loss):
            raise FloatingPointError(
                f"the loss became {loss} by step {done}; lower optim.lr, or run with precision=bf16 or no. "
                f"The last checkpoint is whole: run again to resume from it."
            )
        values = {
            "train/loss": loss,
            "train/learning rate": lr,
            "train/clips per second": clips * self._steps / seconds,
        }
        values |= {f"loss by noise/{n}": s / c for n, s, c in zip(band_names(), sums, counts) if c}
        if self.grad_norm is not None:
            values["train/gradient norm"] = float(self.grad_norm)
        self.accelerator.log(values, step=done)
        self.metrics["train loss"] = loss
        self._bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}")
        if self._bar.disable:
            rate = values["train/clips per second"]
            self.accelerator.print(f"step {done} of {self.config.steps}: loss {loss:.4f}, {rate:.2f} clips/s")
        self._sums.zero_()
        self._counts.zero_()
        self._steps = 0
        self._since = time.perf_counter()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Time in this block is not training: it does not count in clips per second."""
        began = time.perf_counter()
        yield
        self._since += time.perf_counter() - began

    def validation(self, done: int, outcome: Outcome) -> None:
        """Write a validation's figures and pictures."""
        self.metrics |= {f"validation {name}": value for name, value in outcome.metrics.items()}
        self.accelerator.log({f"validation/{name}": value for name, value in outcome.metrics.items()}, step=done)
        writer = self.accelerator.get_tracker("tensorboard", unwrap=True)
        for name, picture in outcome.pictures.items():
            writer.add_image(f"validation/{name}", np.asarray(picture), done, dataformats="HWC")
        save_pictures(outcome, self.config.output / "validation" / f"step-{done:06d}")
        self._bar.write(f"step {done}: " + ", ".join(f"{k} {v:.3f}" for k, v in outcome.metrics.items()))
