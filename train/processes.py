"""Whether training runs on as many processes as were asked for, and how it is asked to stop.

`accelerate launch --cpu --num_processes 2` starts one process and says nothing, after which everything would work, at
half the batch. So the launcher that started this process is asked what it had been told.
"""

from __future__ import annotations

import errno
import os
import signal
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any

import psutil
import torch

from ..trf.endings import ENDINGS, leave_terminal, shut_out


def asked_of_accelerate(arguments: Sequence[str]) -> int | None:
    """The number of processes an `accelerate launch` command line (or its machine file) asks for; `None` if none."""
    words = [Path(word).name for word in arguments]
    starts = [i for i, word in enumerate(words) if word == "launch" and i and words[i - 1].startswith("accelerate")]
    starts += [i for i, word in enumerate(words) if word in ("accelerate-launch", "accelerate.commands.launch")]
    if not starts:
        return None
    from accelerate.commands.config import load_config_from_file
    from accelerate.commands.config.config_args import default_yaml_config_file
    from accelerate.commands.launch import launch_command_parser

    told, _ = launch_command_parser().parse_known_args(list(arguments[starts[0] + 1 :]))
    if told.num_processes is not None:
        return int(told.num_processes)
    if told.config_file is None and not Path(default_yaml_config_file).is_file():
        return None
    return int(load_config_from_file(told.config_file).num_processes)


def check_processes(running: int, expected: int | None) -> None:
    """Stop unless `running` processes are what was asked for, by the settings (`expected`) or by accelerate's launcher.

    Raises:
        ValueError: with both numbers and the command that works.
    """
    parent = psutil.Process().parent()
    asked = asked_of_accelerate(parent.cmdline()) if parent else None
    started = int(os.environ["WORLD_SIZE"]) if "WORLD_SIZE" in os.environ else None
    sources = ((expected, "num_processes in the settings"), (asked, "accelerate launch"), (started, "the launcher"))
    for number, source in sources:
        if number is not None and number != running:
            raise ValueError(
                f"{source} asks for {number} processes, but training runs on {running}. accelerate starts only one on "
                f"CPUs; there use: ACCELERATE_USE_CPU=true torchrun --nproc_per_node {number} -m trfpp.train CONFIG."
            )


def lost_process(error: BaseException, num_processes: int) -> str | None:
    """A sentence for an error that means that a process which training needs is gone; `None` for any other."""
    said = str(error)
    if "DataLoader worker (pid" in said or _hung_up(error):
        return (
            "a process that reads clips ended, most often for want of memory; give it more, or read in the loop with "
            "loader_workers=0."
        )
    if not isinstance(error, RuntimeError):
        return None
    # Connections between ranks: gloo says so in words, NCCL by the type.
    talk = isinstance(error, torch.distributed.DistBackendError) or "onnection" in said or "gloo" in said
    if num_processes > 1 and talk:
        return f"another of the {num_processes} processes is gone; see what it said above. ({said.splitlines()[0]})"
    return None


def _hung_up(error: BaseException) -> bool:
    """Whether a reading process has died while it handed a batch over, before the loader could find it dead."""
    gone = (errno.ECONNRESET, errno.ECONNREFUSED, errno.ENOENT)
    socket = isinstance(error, OSError) and error.errno in gone and error.filename is None
    return socket or isinstance(error, EOFError)


class Agreement:
    """Whether any of the processes was asked to stop, the same on all, so that all stop at one step.

    Processes tell each other through the hosts, not the devices, and read the answer one step later: nothing waits.
    """

    def __init__(self, num_processes: int) -> None:
        self.alone = num_processes == 1
        self._asked: tuple[torch.Tensor, Any] | None = None
        if not self.alone:
            self._group = torch.distributed.new_group(backend="gloo", timeout=timedelta(hours=3))

    def __call__(self, number: int) -> int:
        """Tell this process's signal, 0 for none; gives one that some process told in the step before, or 0."""
        if self.alone:
            return number
        answer = self.close()
        told = torch.tensor([number])
        handle = torch.distributed.all_reduce(told, torch.distributed.ReduceOp.MAX, self._group, async_op=True)
        self._asked = told, handle
        return answer

    def close(self) -> int:
        """Wait for the answer that is under way; gives it."""
        if self._asked is None:
            return 0
        told, handle = self._asked
        self._asked = None
        handle.wait()
        return int(told.tolist()[0])


class StopRequest:
    """Turns SIGTERM, Ctrl-C and the hangup of a terminal into a request that the loop honours at its next step.

    Another Ctrl-C ends at once.
    """

    signals = (*ENDINGS, signal.SIGINT)

    def __init__(self) -> None:
        self.number = 0
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopRequest:
        taken = [number for number in self.signals if not shut_out(number)]
        self._before = {number: signal.signal(number, self._handle) for number in taken}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        leave_terminal(number)
        # Schedulers send SIGTERM again while the checkpoint is saved; who presses Ctrl-C again will not wait for it.
        for ending in ENDINGS:
            signal.signal(ending, signal.SIG_IGN)
        signal.signal(signal.SIGINT, self._before[signal.SIGINT])
