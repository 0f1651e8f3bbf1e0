"""Whether a failure is a want of memory. Imports no torch: help and mistakes are told without it."""

from __future__ import annotations

WORDS = ("out of memory", "can't allocate memory")
"""What PyTorch says on Apple's GPUs and on a CPU; CUDA's failure has a type of its own."""


def lacks_memory(error: BaseException) -> bool:
    """Whether the device had too little memory, whichever it is."""
    if type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in WORDS)
