"""From words to work: parse a command's settings, do the work, and say a mistake of the user's in a sentence."""

from __future__ import annotations

import io
import logging
import os
import select
import signal
import sys
from collections.abc import Callable, Sequence
from typing import Any

# Before pydantic is imported: its errors are for people here, who have no use for links to its manual.
os.environ.setdefault("PYDANTIC_ERRORS_INCLUDE_URL", "0")

from ..trf.endings import interrupt_on_endings
from ..trf.scarcity import lacks_memory
from .load import command_line
from .schema import Settings


def run(command: str, settings: type[Settings], work: Callable[[Any], int | None], argv: Sequence[str]) -> int:
    """Run one command; returns the exit status: 0, 2 for a mistake of the user's, 130 after Ctrl-C, or `work`'s own.

    Asking for more memory than the device has is such a mistake. With TRFPP_DEBUG=1 in the environment a mistake comes
    with its traceback. Where nobody reads what the command prints any more it ends without a word, with status 141.
    """
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # into a file or a pipe too: one looks there how far a run is
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    hush_libraries()
    interrupt_on_endings()  # training replaces this by saving first
    try:
        return work(command_line(settings, command, argv)) or 0
    except (ValueError, OSError, FloatingPointError, RuntimeError) as error:
        if isinstance(error, BrokenPipeError) and _unread(sys.stdout.fileno()):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it once more at its end
            return 128 + signal.SIGPIPE
        scarce = lacks_memory(error)
        if os.environ.get("TRFPP_DEBUG") or (isinstance(error, RuntimeError) and not scarce):
            raise
        said = f"the device's memory is too small; see trfpp {command} --help for what takes less." if scarce else error
        # Every rank says it, also what all of them see: a launcher ends the others as soon as one is gone, so none can
        # leave it to another.
        print(f"trfpp {command}{_rank()}: {said}", file=sys.stderr)
        return 2
    except KeyboardInterrupt as interrupt:
        print(f"trfpp {command}: interrupted; whole results stay, half ones were removed.", file=sys.stderr)
        return 128 + (interrupt.args[0] if interrupt.args else signal.SIGINT)


def hush_libraries() -> None:
    """Leave what libraries only warn of unsaid, also while they are imported."""
    for talkative in ("absl", "bitsandbytes", "datasets", "diffusers", "httpx", "huggingface_hub", "transformers"):
        logging.getLogger(talkative).setLevel(logging.ERROR)
    for chooses_its_level_on_import in ("DATASETS", "DIFFUSERS", "HF_HUB", "TRANSFORMERS"):
        os.environ.setdefault(f"{chooses_its_level_on_import}_VERBOSITY", "error")


def _unread(output: int) -> bool:
    """Whether nobody reads a pipe any more, as after `| head`."""
    poll = select.poll()
    poll.register(output, 0)
    return any(event & select.POLLERR for _, event in poll.poll(0))


def _rank() -> str:
    """Which of several processes of a launcher this is."""
    return f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", "1")) > 1 else ""
