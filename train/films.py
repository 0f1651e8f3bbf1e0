"""Films of a procedural world for pretraining: rendered once by several processes, kept in files, read as tensors.

A file holds `CHUNK` films: `frames` uint8 `[N, F, H, W, 3]`, `fps` and `motion_bucket` float32 `[N]`. Film `i` depends
on the seed and on `i` alone, so neither the number of processes nor an interruption changes anything.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..data_prep.motion import motion_bucket, motion_score
from ..data_prep.procedural import film
from ..trf.replace import replacing

CHUNK = 64


@dataclass(frozen=True)
class Films:
    """Rendered films, on the CPU."""

    frames: Tensor
    """uint8 `[N, F, H, W, 3]`."""
    fps: Tensor
    """`[N]`."""
    motion_bucket: Tensor
    """`[N]`, measured as a dataset's clips are."""


class FilmShelf:
    """Films `0, 1, 2, …` of one or several worlds taken in turn, rendered in the background.

    Args:
        folder: where the files are kept; those there are used.
        worlds: film `i` is of world `i mod len(worlds)`.
        count: number of films.
        seed: of the worlds.
        num_frames: frames of a film.
        side: pixels of the frame's side.
        workers: processes.
    """

    def __init__(
        self, folder: Path, worlds: Sequence[str], count: int, *, seed: int, num_frames: int, side: int, workers: int
    ) -> None:
        self.folder = folder
        self.count = count
        folder.mkdir(parents=True, exist_ok=True)
        self._pool = ProcessPoolExecutor(workers, multiprocessing.get_context("spawn"), _prepare_worker)
        starts = range(0, count, CHUNK)
        self._files = [folder / f"films-{start:06d}.safetensors" for start in starts]
        self._jobs: list[Future[None] | None] = [
            None
            if file.is_file()
            else self._pool.submit(_render, file, tuple(worlds), range(start, start + CHUNK), seed, num_frames, side)
            for file, start in zip(self._files, starts)
        ]

    def take(self, count: int) -> Films:
        """The first `count` films, once they are rendered."""
        chunks = []
        number = -(-count // CHUNK)
        for file, job in tqdm(
            list(zip(self._files, self._jobs))[:number], desc=f"films {self.folder.name}", unit="chunk", disable=None
        ):
            if job is not None:
                job.result()
            chunks.append(load_file(file))
        return Films(**{name: torch.cat([chunk[name] for chunk in chunks])[:count] for name in chunks[0]})

    def close(self) -> None:
        """Drop what is not rendered yet."""
        self._pool.shutdown(cancel_futures=True)


def _prepare_worker() -> None:
    cv2.setNumThreads(1)  # the processes are the parallelism
    # What a terminal sends reaches all processes; the one that asks for films ends these.
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    """A killed process cannot end its pool, whose workers would wait for more films for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _render(file: Path, worlds: Sequence[str], numbers: range, seed: int, num_frames: int, side: int) -> None:
    shown = [film(worlds[index % len(worlds)], seed, index, num_frames, side) for index in numbers]
    buckets = [motion_bucket(motion_score(one.frames, one.fps)) for one in shown]
    tensors = {
        "frames": torch.from_numpy(np.stack([one.frames for one in shown])),
        "fps": torch.tensor([one.fps for one in shown]),
        "motion_bucket": torch.tensor(buckets),
    }
    with replacing(file) as beside:
        save_file(tensors, beside)
