"""What a run rests on, as text: to tell whether what is there would be made the same way now."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path

from ..configs.schema import Settings
from ..trf.miniature import MINIATURE

FREE = {
    "batch", "checkpoint", "domain", "dry_run", "log_every", "loader_workers", "num_processes", "overwrite", "wandb",
}  # fmt: skip
"""Settings that change no result."""


def deciding(settings: Settings, folder: Path) -> str:
    """The settings of a run that decide its results, the same wherever the study's folder lies.

    Those that are as by default are left out, so that what is there does not change with a setting that is new.

    Args:
        settings: of the run.
        folder: the study's, from which paths inside it are seen.
    """
    values, folder = settings.model_dump(exclude=FREE, exclude_defaults=True), folder.resolve()
    if "model" in values:  # a folder, also one of the study's that is deleted by now, or a name
        model = Path(values["model"]).expanduser()
        if values["model"] != MINIATURE and (model.is_dir() or model.resolve().is_relative_to(folder)):
            values["model"] = model
    return json.dumps(values, default=lambda path: _seen_from(folder, path.resolve()), sort_keys=True)


def digest(settings: Settings, folder: Path, needs: Iterable[str]) -> str:
    """Of what decides a run's results and of the digests of all that it uses: 16 hexadecimal digits."""
    return hashlib.sha256(json.dumps([deciding(settings, folder), *sorted(needs)]).encode()).hexdigest()[:16]


def _seen_from(folder: Path, path: Path) -> str:
    return path.relative_to(folder).as_posix() if path.is_relative_to(folder) else str(path)
