"""The command line: `trfpp COMMAND [CONFIG] [key=value ...]`."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib import import_module

from .version import __version__

COMMANDS = {
    "quickstart": "the whole job on the built-in miniature: films, patch, what it gains, export",
    "prep": "cut videos and image sequences into a dataset of clips",
    "cache": "precompute what VAE and CLIP say of a dataset",
    "train": "fit a LoRA patch (also: accelerate launch -m trfpp.train CONFIG)",
    "infer": "generate between two frames, a loop, or a manifest of pairs",
    "film": "generate a film of any length through any number of keyframes",
    "evaluate": "measure a model, a patch or a baseline on held-out pairs",
    "compare": "set two evaluations against each other",
    "export": "write a patch for another tool, and check it",
    "worlds": "make procedural films with known ground truth",
    "pretrain": "build a miniature SVD from nothing",
    "study": "show in numbers what patches do: films, patches, evaluations, a report",
}

HELP = f"""trfpp {__version__}: domain patches for Time-Reversal Fusion with Stable Video Diffusion

usage: trfpp COMMAND [CONFIG] [key=value ...]

{{commands}}

CONFIG is a YAML file or the name of a shipped recipe; key=value (or --key value) overrides it.
`trfpp COMMAND --help` explains every setting. Start with: trfpp quickstart
"""


def help_text() -> str:
    """What `trfpp --help` prints."""
    return HELP.format(commands="\n".join(f"  {name:<11} {about}" for name, about in COMMANDS.items()))


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit status."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help", "help"):
        print(help_text())
        return 0
    if words[0] in ("-V", "--version"):
        print(f"trfpp {__version__}")
        return 0
    command, rest = words[0], words[1:]
    if command not in COMMANDS:
        import difflib

        near = difflib.get_close_matches(command, COMMANDS, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"commands: {', '.join(COMMANDS)}."
        print(f"trfpp: no command {command!r}; {hint}", file=sys.stderr)
        return 2
    return int(import_module(".commands", __package__).run(command, rest))


if __name__ == "__main__":
    raise SystemExit(main())
