"""Files and folders that are whole or not there: written beside, then renamed."""

from __future__ import annotations

import os
import re
import shutil
import socket
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

import psutil

_UMASK = os.umask(0)  # which cannot be read without being set
os.umask(_UMASK)


@contextmanager
def replacing(path: Path, *, settled: bool = False) -> Iterator[Path]:
    """A hidden name beside `path` to write a file or folder to; it takes `path`'s place when the block ends well.

    If the block fails or is interrupted, what it wrote is removed and `path` stays as it was. A folder that is replaced
    is moved aside first and removed last, so that a whole one is there at any time but for the instant of two renames.

    Args:
        path: the file or folder.
        settled: have all of it on the disk before it takes its place, and its name after: a power failure can leave a
            name without what it names. For what older copies are deleted for; it waits for the disk once a file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # Several hosts may share the folder, and each knows its own processes only. The suffix stays: writers choose the
    # format by it.
    host = f".{path.stem}.{socket.gethostname()}."
    beside, old = (path.with_name(f"{host}{os.getpid()}.{kind}{path.suffix}") for kind in ("tmp", "old"))
    ours = re.compile(rf"{re.escape(host)}(\d+)\.(tmp|old){re.escape(path.suffix)}")
    for other in path.parent.iterdir():
        if (name := ours.fullmatch(other.name)) and not psutil.pid_exists(int(name[1])):  # of one that was killed
            if name[2] == "old" and not path.exists():
                os.rename(other, path)
            remove(other)
    remove(beside)
    try:
        yield beside
        _share(beside)
        for one in (beside, *beside.rglob("*")) if settled else ():
            _settle(one)
        if path.is_dir():
            os.rename(path, old)
        os.replace(beside, path)
        if settled:
            _settle(path.parent)
    finally:
        if old.is_dir() and not path.exists():  # interrupted between the two
            os.rename(old, path)
        remove(beside)
        remove(old)


def _share(path: Path) -> None:
    """Let those read a file, or the files of a folder, who may read the user's others: safetensors' are private."""
    for file in path.rglob("*") if path.is_dir() else [path]:
        if file.is_file() and file.stat().st_mode & 0o777 == 0o600:
            file.chmod(0o666 & ~_UMASK)


def _settle(path: Path) -> None:
    """Have a file, or a folder's list of names, on the disk."""
    folder = path.is_dir()
    with suppress(OSError) if folder else nullcontext():  # not every system does so with folders
        handle = os.open(path, os.O_RDONLY if folder else os.O_RDWR)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)
