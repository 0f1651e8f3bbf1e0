"""Manifests made of another: some of its pairs, or pairs of which the model is told what was not measured."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..configs.schema import Positive, Settings
from ..trf.replace import replacing

FILES = ("start", "end", "truth")
MOST_MOTION = 255


class Told(Settings):
    """A manifest to write: another one's pairs, all or the last ones, with factors on what was measured."""

    manifest: Path
    """The pairs as measured, JSON lines."""
    output: Path
    """The manifest to write."""
    last: Positive | None = None
    """How many of the pairs, the last ones; all by default."""
    fps: float = 1.0
    """Factor on the frames per second."""
    motion_bucket_id: float = 1.0
    """Factor on the motion bucket, which stays at most 255."""


def told_lines(told: Told) -> str:
    """What the manifest is to say; images and truth stay where they are."""
    lines = [json.loads(line) for line in told.manifest.read_text(encoding="utf-8").splitlines()]
    lines = lines if told.last is None else lines[-told.last :]
    there = os.path.relpath(told.manifest.parent, told.output.parent)
    for pair in lines:
        pair |= {name: Path(there, pair[name]).as_posix() for name in FILES}
        pair["fps"] *= told.fps
        pair["motion_bucket_id"] = min(MOST_MOTION, pair["motion_bucket_id"] * told.motion_bucket_id)
    return "".join(json.dumps(pair) + "\n" for pair in lines)


def write_told(told: Told) -> None:
    """Write the manifest."""
    with replacing(told.output) as beside:
        beside.write_text(told_lines(told), encoding="utf-8")
