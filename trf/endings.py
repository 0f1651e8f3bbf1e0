"""Signals by which a process is asked to end: Ctrl-C, a scheduler's SIGTERM, the SIGHUP of a closed terminal."""

from __future__ import annotations

import os
import signal
import stat
from types import FrameType

ENDINGS = (signal.SIGTERM, signal.SIGHUP)
"""Those that Python does not turn into a KeyboardInterrupt by itself."""


def interrupt_on_endings() -> None:
    """Take them as Ctrl-C, so that half-written results are removed; a hangup that `nohup` shuts out stays shut out."""
    for number in ENDINGS:
        if not shut_out(number):
            signal.signal(number, interrupted)


def shut_out(number: signal.Signals) -> bool:
    """Whether a hangup is ignored, as under `nohup`, where a run is to outlive its terminal."""
    return number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN


def interrupted(number: int, frame: FrameType | None) -> None:
    """A signal as Ctrl-C, which also says which one it was."""
    leave_terminal(number)
    raise KeyboardInterrupt(number)


def leave_terminal(number: int) -> None:
    """After a hangup nothing can be written to the terminal, or through a pipe to it: drop what would be.

    Otherwise the next line of a log would fail before anything is saved.
    """
    if number != signal.SIGHUP:
        return
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for output in (1, 2):
        mode = os.fstat(output).st_mode
        if stat.S_ISCHR(mode) or stat.S_ISFIFO(mode):  # a file is still there
            os.dup2(nowhere, output)
    os.close(nowhere)
