"""Several processes over one manifest: each takes what no other one is at, until nothing is left."""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from .record import Job
from .results import make_folder

CLAIMS_FOLDER = ".claims"
WAIT = 2.0
"""Seconds until claims of other processes are looked at again."""
TRIES = 100
"""How often the folder of claims is made again: at most once for each process that ends just then."""


@contextmanager
def claims(jobs: Sequence[Job], size: int, folder: Path) -> Iterator[Iterator[tuple[list[Job], ExitStack]]]:
    """Batches of at most `size` jobs that can be sampled together, none of which another process is at or has done.

    Each comes with its claim, which is to be closed, in any thread, once the results are there; at the end all are. A
    claim is locked files in `folder`, which end with their process, however that ends. A process waits for what others
    are at, and takes it over if they end without a result.

    The folder is made, and goes at the end if nothing is in it.

    Raises:
        ValueError: if the folder cannot be made or written to.
    """
    make_folder(folder)
    try:
        with ExitStack() as held:
            yield _batches(jobs, size, folder / CLAIMS_FOLDER, held)
    finally:
        for made in (folder / CLAIMS_FOLDER, folder):
            with suppress(OSError):  # another process has claims there, or something is there
                made.rmdir()


def _batches(jobs: Sequence[Job], size: int, folder: Path, held: ExitStack) -> Iterator[tuple[list[Job], ExitStack]]:
    left = list(jobs)
    while left:
        with ExitStack() as locks:
            batch: list[Job] = []
            later: list[Job] = []
            for job in left:
                full = len(batch) == size or (batch and not _alike(job, batch[0]))
                if full or not _claim(job, folder, locks):
                    later.append(job)
                elif not job.made_since:
                    batch.append(job)
            left = later
            if batch:
                yield batch, held.enter_context(locks.pop_all())
            elif left:  # all of them are others' for now, who may yet be killed
                time.sleep(WAIT)


def _claim(job: Job, folder: Path, locks: ExitStack) -> bool:
    path = folder / f"{job.pair.id}.lock"
    lock = FileLock(path, thread_local=False)
    for _ in range(TRIES):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock.acquire(blocking=False)
        except Timeout:
            return False
        except FileNotFoundError:  # a process that has nothing left took the folder away
            continue
        except (OSError, NotImplementedError) as error:
            warnings.warn(f"{folder}: no locks there, so start no other process on it. ({error})", stacklevel=2)
            return True
        locks.callback(lock.release)
        # Whoever opened the file before it goes finds the job done.
        locks.callback(path.unlink, missing_ok=True)
        return True
    raise ValueError(f"{folder}: is gone whenever it was made, so nothing can be written there; choose another output.")


def _alike(job: Job, other: Job) -> bool:
    """Whether two jobs' films have one shape; fps and motion may differ."""
    one, two = job.settings, other.settings
    return (one.num_frames, one.height, one.width) == (two.num_frames, two.height, two.width)
