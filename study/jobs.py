"""Doing runs of the study: one after another in this process, or several at once, each in a process of its own."""

from __future__ import annotations

import multiprocessing
import os
import signal
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Protocol

from .apart import STOPPED, apart, words_of
from .log import add_line
from .plan import Run
from .work import attempt


class Jobs(Protocol):
    """Runs that were started and are not told of yet."""

    def free(self) -> bool:
        """Whether another run may start."""

    def running(self) -> int:
        """Number of runs that are not told of yet."""

    def start(self, run: Run) -> None:
        """Start a run."""

    def next(self) -> tuple[Run, str | None]:
        """Wait for a run to end; gives it and, if it failed, the reason.

        Raises:
            KeyboardInterrupt: if it was asked to stop.
        """

    def stop(self) -> None:
        """Ask what still runs to save and stop, and wait for it."""


def make_jobs(output: Path, number: int) -> Jobs:
    """To do so many runs at once."""
    return InTurn(output) if number == 1 else AtOnce(output, number)


class InTurn:
    """One run after another, in this process."""

    def __init__(self, output: Path) -> None:
        self.output = output
        self._started: list[Run] = []

    def free(self) -> bool:
        """Whether another run may start."""
        return not self._started

    def running(self) -> int:
        """Number of runs that are not told of yet."""
        return len(self._started)

    def start(self, run: Run) -> None:
        """Note a run; it is done when it is waited for."""
        self._started.append(run)

    def next(self) -> tuple[Run, str | None]:
        """Do it."""
        run = self._started.pop()
        return run, attempt(self.output, run)

    def stop(self) -> None:
        """Nothing runs on its own."""


class AtOnce:
    """Several runs at once. They share this machine's processors and its one GPU, which small runs leave idle."""

    def __init__(self, output: Path, number: int) -> None:
        self.output, self.number = output, number
        self.threads = max(1, (os.cpu_count() or 1) // number)
        self._context = multiprocessing.get_context("spawn")
        self._started: dict[Connection, tuple[Run, multiprocessing.process.BaseProcess]] = {}

    def free(self) -> bool:
        """Whether another run may start."""
        return len(self._started) < self.number

    def running(self) -> int:
        """Number of runs that are not told of yet."""
        return len(self._started)

    def start(self, run: Run) -> None:
        """Start a run in a process of its own, whose words go to a file."""
        here, there = self._context.Pipe(duplex=False)
        process = self._context.Process(target=apart, args=(self.output, run, self.threads, there), name=run.name)
        process.start()
        there.close()  # so that the end of the process is the end of the pipe
        self._started[here] = run, process

    def next(self) -> tuple[Run, str | None]:
        """Wait for the first that ends."""
        ended = wait(list(self._started))[0]
        assert isinstance(ended, Connection)
        run, process = self._started.pop(ended)
        try:
            told: list[str | None] = [ended.recv()]
        except EOFError:
            told = []
        process.join()
        if told:
            return run, told[0]
        if process.exitcode in (STOPPED, -signal.SIGTERM, -signal.SIGINT):
            raise KeyboardInterrupt(signal.SIGTERM)
        error = f"its process ended with status {process.exitcode}; see {words_of(self.output, run)}"
        add_line(self.output, run, 0.0, error=error)
        return run, error

    def stop(self) -> None:
        """Ask what still runs to save and stop, and wait for it."""
        for _, process in self._started.values():
            process.terminate()
        for _, process in self._started.values():
            process.join()
