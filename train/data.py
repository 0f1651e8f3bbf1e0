"""Which clip and which draws belong to the n-th training sample.

Everything random about sample `n` comes from a generator seeded with `(seed, n)`, so a run gives the same samples on
one process or on many, resumed or not, with loader workers or without; and no two ranks ever share a draw.

A sample may run backward: its frames in reverse order, conditioned on the clip's last frame. That is what the backward
half of TRF works on.

The samples of one optimizer step are of clips of one shape: those of a bucket (see `train.buckets`).

Shapes: B samples, F frames, latents `[B, F, C, h, w]`.
"""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data_prep.latents import read_clip
from ..data_prep.shapes import Shape
from ..trf.conditioning import micro_conditioning
from ..trf.edm import log_normal_sigmas
from ..trf.endings import ENDINGS
from ..trf.patch import Direction
from ..trf.seeds import derived_seed
from .buckets import buckets_of, schedule


@dataclass(frozen=True)
class Sample:
    """A training sample, or a batch of them with a leading B; all float32, on the CPU until moved."""

    latents: Tensor
    """Clean, scaled video latents `[F, C, h, w]`."""
    noise: Tensor
    """Unit noise of the same shape."""
    sigma: Tensor
    """Noise level, `[]`."""
    condition: Tensor
    """Conditioning latents of the sample's first frame `[C, h, w]`; zeros where the conditions are dropped."""
    embedding: Tensor
    """CLIP embedding of the sample's first frame `[1, D]`; zeros where the conditions are dropped."""
    added_time_ids: Tensor
    """`(fps - 1, motion bucket, noise augmentation)`, `[3]`."""
    backward: Tensor = field(default_factory=lambda: torch.tensor(False))
    """Whether the sample runs backward in time, `[]` bool."""
    number: Tensor = field(default_factory=lambda: torch.tensor(0))
    """Of the sample in the run, `[]`."""

    def to(self, device: torch.device | str) -> Sample:
        """The same on another device."""
        return Sample(**{f.name: getattr(self, f.name).to(device, non_blocking=True) for f in fields(self)})

    def halves(self) -> tuple[Sample, Sample]:
        """The first and the second half of a batch: of direction `both`, the rows that run forward and backward."""
        half = len(self.sigma) // 2
        first, second = (
            Sample(**{f.name: getattr(self, f.name)[rows] for f in fields(self)})
            for rows in (slice(0, half), slice(half, None))
        )
        return first, second

    def pin_memory(self) -> Sample:
        """The same in page-locked memory; the loader calls it."""
        return Sample(**{f.name: getattr(self, f.name).pin_memory() for f in fields(self)})


def collate(samples: Sequence[Sample]) -> Sample:
    """Samples stacked into a batch."""
    return Sample(**{f.name: torch.stack([getattr(s, f.name) for s in samples]) for f in fields(Sample)})


@dataclass(frozen=True)
class Clip:
    """What the loader needs to know of a clip."""

    clip_id: str
    fps: float
    motion_bucket: float
    shape: Shape


_BACKWARD: dict[Direction, tuple[bool | None, ...]] = {
    "forward": (False,),
    "backward": (True,),
    "both": (False, True),
    "either": (None,),
}
"""Whether the rows that a sample gives run backward; `None` leaves it to a coin."""
_GUIDED = (False, True)
"""The same where forward rows guide the backward ones."""


class CachedSamples(Dataset[Sample]):
    """Samples by their global number `n = 0, 1, 2, …`, of which `per_step` make an optimizer step.

    A bucket's clips come in one permutation after another, through all the steps that are of that bucket. With a single
    shape, epoch `n // len(clips)` is one permutation of the clips.

    With direction `both`, and with `backward` if `guided`, every sample gives two rows of a batch with the same draws,
    forward and backward.
    """

    def __init__(
        self,
        clips: Sequence[Clip],
        cache: Path,
        *,
        scaling_factor: float,
        sigma_mean: float,
        sigma_std: float,
        conditioning_dropout: float,
        seed: int,
        direction: Direction = "forward",
        guided: bool = False,
        per_step: int,
    ) -> None:
        self.clips = list(clips)
        self.per_step = per_step
        self.buckets = buckets_of([clip.shape for clip in clips])
        self.schedule = schedule(tuple(len(bucket.clips) for bucket in self.buckets))
        self.cache = cache
        self.scaling_factor = scaling_factor
        self.sigma_mean = sigma_mean
        self.sigma_std = sigma_std
        self.conditioning_dropout = conditioning_dropout
        self.seed = seed
        self.direction = direction
        self.ways = _GUIDED if guided else _BACKWARD[direction]

    def clip_of(self, n: int) -> Clip:
        """The clip of sample `n`."""
        step, place = divmod(n, self.per_step)
        turn = self.schedule.at(step)
        bucket = self.buckets[turn.bucket]
        epoch, position = divmod(turn.earlier * self.per_step + place, len(bucket.clips))
        own = () if len(self.buckets) == 1 else bucket.shape
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "order", epoch, *own))
        return self.clips[bucket.clips[int(torch.randperm(len(bucket.clips), generator=generator)[position])]]

    def __getitem__(self, n: int) -> Sample:
        return self.sample(n, self.ways[0])

    def __getitems__(self, numbers: Sequence[int]) -> list[Sample]:
        """The rows of a batch, as the loader asks for them: all that run one way, then all that run the other."""
        return [self.sample(n, backward) for backward in self.ways for n in numbers]

    def sample(self, n: int, backward: bool | None) -> Sample:
        """Sample `n`, running forward or backward, or either by a fair coin of its own (`None`)."""
        clip = self.clip_of(n)
        cached = read_clip(self.cache, clip.clip_id)
        generator = torch.Generator().manual_seed(derived_seed(self.seed, "sample", n))
        posterior_noise = torch.randn(cached["mean"].shape, generator=generator)
        noise = torch.randn(cached["mean"].shape, generator=generator)
        sigma = log_normal_sigmas((), self.sigma_mean, self.sigma_std, generator)
        augmentation = int(torch.randint(len(cached["start.noise_aug"]), (), generator=generator))
        kept = float(torch.rand((), generator=generator) >= self.conditioning_dropout)
        if backward is None:  # drawn last: all else is as it would be without
            backward = bool(torch.rand((), generator=generator) < 0.5)
        bound = "end" if backward else "start"
        latents = (cached["mean"] + cached["std"] * posterior_noise) * self.scaling_factor
        ids = micro_conditioning(clip.fps, clip.motion_bucket, cached[f"{bound}.noise_aug"][augmentation], 1)[0]
        return Sample(
            # SVD's encoder sees one frame at a time: the latents of the reversed clip are these in reverse.
            latents=latents.flip(0) if backward else latents,
            noise=noise.flip(0) if backward else noise,
            sigma=sigma,
            condition=cached[f"{bound}.condition"][augmentation] * kept,
            embedding=cached[f"{bound}.embedding"] * kept,
            added_time_ids=ids,
            backward=torch.tensor(backward),
            number=torch.tensor(n),
        )


class RankOrder(Sampler[int]):
    """The numbers of the samples that one rank sees, in its order, from optimizer step `start` to step `stop`.

    A global batch is `accumulation` rounds of `num_processes * batch_size` consecutive samples, split between the
    ranks: twice the processes with half the accumulation see the same global batches.
    """

    def __init__(
        self, *, start: int, stop: int, batch_size: int, accumulation: int, rank: int, num_processes: int
    ) -> None:
        self.rounds = range(start * accumulation, stop * accumulation)
        self.batch_size = batch_size
        self.rank = rank
        self.num_processes = num_processes

    def __len__(self) -> int:
        return len(self.rounds) * self.batch_size

    def __iter__(self) -> Iterator[int]:
        for number in self.rounds:
            first = (number * self.num_processes + self.rank) * self.batch_size
            yield from range(first, first + self.batch_size)


def loader(samples: CachedSamples, order: RankOrder, workers: int) -> DataLoader[Any]:
    """Batches of `order`'s samples, read ahead by `workers` processes (0: in the loop)."""
    return DataLoader(
        samples,
        batch_size=order.batch_size,
        sampler=order,
        collate_fn=collate,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_leave_signals_to_the_loop,
    )


def _leave_signals_to_the_loop(worker: int) -> None:
    """Ctrl-C and schedulers signal the whole process group; a worker that died of it would take the loop along."""
    for number in (*ENDINGS, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
