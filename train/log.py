"""What training tells people: the progress bar, TensorBoard, and pictures."""

from __future__ import annotations

import io
import logging
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import PIL.Image
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from tensorboard.compat.proto.summary_pb2 import Summary
from tqdm.auto import tqdm

from .guards import SKIPS, SPIKE, Guard, first_bad
from .objective import Losses, band_names, band_of
from .validate import Outcome, save_pictures

if TYPE_CHECKING:
    from ..configs.training import TrainConfig


logger = logging.getLogger(__name__)

ADVICE = (
    "lower optim.lr, or run with precision=bf16 or no, or look at the clip. "
    "The last checkpoint is whole: run again to resume from it."
)


class TrainingLog:
    """Collects a step's figures without waiting for the device, and writes them out every `log_every` steps."""

    def __init__(self, accelerator: Accelerator, config: TrainConfig, guard: Guard) -> None:
        self.accelerator = accelerator
        self.config = config
        self.guard = guard
        self.start = 0
        """Step the run goes on from."""
        self.metrics: dict[str, float] = {}
        self._names = [*band_names(), "forward", "backward", "fused"]
        # Sums and numbers of losses: of each noise band, of each direction, of what is fused.
        self._sums = torch.zeros(2, len(self._names), device=accelerator.device)
        self._steps = self._skipped = 0
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

    def add(self, step: int, losses: Losses) -> None:
        """Add the losses of one batch."""
        self.guard.add(step, losses)
        bands = len(band_names())
        finite = losses.rows.isfinite()
        each = torch.stack([torch.where(finite, losses.rows, 0), finite.float()])
        self._sums.index_add_(1, band_of(losses.sigma), each)
        self._sums.index_add_(1, bands + losses.backward.long(), each)
        if losses.fused is not None:
            finite = losses.fused.isfinite()
            self._sums[:, -1] += torch.stack([torch.where(finite, losses.fused, 0).sum(), finite.sum()])

    def review(self) -> None:
        """Say what stood out since the last review, and which steps were skipped; all processes at once.

        Raises:
            FloatingPointError: if a loss or gradient was not finite, naming the clips of the first such step, unless
                such steps are skipped; then if too many in a row were.
        """
        mine, spikes = self.guard.review()
        for row in spikes:
            logger.warning("a loss over %g times the usual one at its noise level: %s", SPIKE, row)
        bad = gather_object(mine)
        # In fp16 a gradient that overflows is the scaler's business, which skips the step and lowers its scale.
        grave = [row for row in bad if self.accelerator.scaler is None or not math.isfinite(row.loss)]
        if grave and self.config.on_nonfinite == "stop":
            raise FloatingPointError(f"{first_bad(grave)}; {ADVICE}")
        if not bad:
            return
        steps = sorted({row.step for row in bad})
        self._skipped += len(steps)
        if self.guard.in_a_row >= SKIPS:
            raise FloatingPointError(f"the last {self.guard.in_a_row} steps were skipped: {first_bad(bad)}; {ADVICE}")
        if self.accelerator.is_main_process:
            more = f" and {len(steps) - 1} after it" if len(steps) > 1 else ""
            logger.warning("step %d%s skipped, %s", steps[0], more, first_bad(bad))

    def step(self, done: int, clips: int, lr: float, norm: torch.Tensor) -> None:
        """Finish an optimizer step, of which `norm` is the gradient's.

        Raises:
            FloatingPointError: see `review`.
        """
        self.guard.gradient(done - 1, norm)
        self._bar.update()
        self._steps += 1
        if done % self.config.log_every and done != self.config.steps:
            return
        self.review()
        sums, counts = self.accelerator.reduce(self._sums).tolist()
        seconds = time.perf_counter() - self._since
        means = {name: total / count for name, total, count in zip(self._names, sums, counts) if count}
        count = sum(counts[:-3])
        loss = sum(sums[:-3]) / count if count else math.nan
        values = {
            "train/loss": loss,
            "train/learning rate": lr,
            "train/clips per second": clips * self._steps / seconds,
            "train/gradient norm": float(norm),
            "train/skipped steps": self._skipped,
        }
        values |= {f"loss by noise/{name}": means[name] for name in band_names() if name in means}
        if "forward" in means and "backward" in means:
            apart = {f"loss_{name}": means[name] for name in ("forward", "backward", "fused") if name in means}
            values |= {f"train/{name}": mean for name, mean in apart.items()}
            self.metrics |= {f"train {name}": mean for name, mean in apart.items()}
        self.accelerator.log(values, step=done)
        if count:
            self.metrics["train loss"] = loss
        self._bar.set_postfix(loss=f"{loss:.4f}", lr=f"{lr:.1e}")
        if self._bar.disable:
            rate = values["train/clips per second"]
            self.accelerator.print(f"step {done} of {self.config.steps}: loss {loss:.4f}, {rate:.2f} clips/s")
        self._sums.zero_()
        self._steps = self._skipped = 0
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
            writer.file_writer.add_summary(_moving(f"validation/{name}/video", outcome, name), done)
        for tracker in self.accelerator.trackers:
            if tracker.name == "wandb":
                tracker.log_images({f"validation/{n}": [picture] for n, picture in outcome.pictures.items()}, step=done)
        save_pictures(outcome, self.config.output / "validation" / f"step-{done:06d}")
        self._bar.write(f"step {done}: " + ", ".join(f"{k} {v:.3f}" for k, v in outcome.metrics.items()))


def _moving(tag: str, outcome: Outcome, name: str) -> Summary:
    """A video for TensorBoard, which shows GIF files as they are; its own writer of them needs one more package."""
    video, buffer = outcome.videos[name], io.BytesIO()
    frames = [PIL.Image.fromarray(frame) for frame in video]
    frames[0].save(
        buffer, "GIF", save_all=True, append_images=frames[1:], duration=round(1000 / outcome.fps[name]), loop=0
    )
    picture = Summary.Image(
        height=video.shape[1], width=video.shape[2], colorspace=3, encoded_image_string=buffer.getvalue()
    )
    return Summary(value=[Summary.Value(tag=tag, image=picture)])
