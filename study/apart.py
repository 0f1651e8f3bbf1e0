"""A run of the study in a process of its own.

What is heavy is imported late: libraries have something to say while they are imported, and that belongs into the file
of the run's words.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
import threading
import traceback
from multiprocessing.connection import Connection
from pathlib import Path

from ..configs.entry import hush_libraries
from ..trf.endings import interrupt_on_endings
from .plan import Run

JOBS_FOLDER = "jobs"
"""What runs of their own process print, a text file each."""
STOPPED = 75
"""Exit status of a process that was asked to stop."""


def apart(output: Path, run: Run, threads: int, told: Connection) -> None:
    """What such a process does: the run, with so many threads; tells the reason if it fails."""
    # Ctrl-C reaches all processes of a terminal's group, and a second signal ends a training at once: only the study's
    # own may come here.
    os.setpgrp()
    interrupt_on_endings()
    threading.Thread(target=_stop_with_parent, daemon=True).start()
    hush_libraries()
    words = words_of(output, run)
    words.parent.mkdir(parents=True, exist_ok=True)
    with words.open("w", encoding="utf-8", buffering=1) as file:
        sys.stdout = sys.stderr = file
        try:
            import torch

            from .work import attempt

            torch.set_num_threads(threads)
            told.send(attempt(output, run))
        except KeyboardInterrupt:
            sys.exit(STOPPED)
        except BaseException:
            traceback.print_exc()
            raise


def _stop_with_parent() -> None:
    """A study that is killed cannot ask its runs to stop."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os.kill(os.getpid(), signal.SIGTERM)


def words_of(output: Path, run: Run) -> Path:
    """The file of what a run prints."""
    return output / JOBS_FOLDER / f"{run.name.replace('/', '-')}.txt"
