"""`accelerate launch -m trfpp.train CONFIG [key=value ...]`, and `trfpp train`, which is the same."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from ..configs.entry import run
from ..configs.training import TrainConfig


def work(config: TrainConfig) -> int:
    """Train; returns the exit status, 128 + signal if asked to stop."""
    from ..trf.base import hide_loading_bars
    from .loop import Stopped, train

    hide_loading_bars()
    try:
        patch = train(config)
    except Stopped as stopped:
        print(f"trfpp train: {stopped}", file=sys.stderr)
        return 128 + stopped.number
    if not config.dry_run and os.environ.get("RANK", "0") == "0":
        print(f"patch: {patch}")
    return 0


def main(argv: Sequence[str]) -> int:
    """Run the command."""
    return run("train", TrainConfig, work, argv)


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
