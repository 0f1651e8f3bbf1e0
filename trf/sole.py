"""One process at a time writes an output folder."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

LOCK_FILE = ".lock"


@contextmanager
def sole(output: Path) -> Iterator[None]:
    """Keep other processes from the same output while the block runs.

    The lock is the operating system's, on a file in the folder, and ends with its process, however that ends. The
    folder is made, and goes again if nothing was written into it. Where there are no locks, a warning says so.

    Raises:
        ValueError: if another process has it, or the folder cannot be made or written to.
    """
    file = output / LOCK_FILE
    lock = FileLock(file)
    try:
        output.mkdir(parents=True, exist_ok=True)
        file.touch()
    except OSError as error:
        raise ValueError(
            f"output={str(output)!r}: nothing can be written there ({error.strerror}); choose another folder."
        ) from None
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise ValueError(
            f"output={str(output)!r}: another process is at it; wait for that, or choose another output."
        ) from None
    except (OSError, NotImplementedError) as error:
        warnings.warn(f"{output}: no locks there, so start no other process on it. ({error})", stacklevel=3)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)  # nobody waits for it, so it need not stay
        lock.release()
        with suppress(OSError):  # gone, or not empty
            output.rmdir()
