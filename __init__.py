"""TRF++: domain LoRA patches for Time-Reversal Fusion, bounded generation with Stable Video Diffusion.

The public names load on first use, so that `import trfpp` and `trfpp --help` stay fast.
"""

from typing import TYPE_CHECKING, Any

from .version import __version__

if TYPE_CHECKING:
    from .trf.patch import PatchCard, load_patch
    from .trf.pipeline import TimeReversalFusionPipeline

__all__ = ["PatchCard", "TimeReversalFusionPipeline", "__version__", "load_patch"]

_HOMES = {
    "TimeReversalFusionPipeline": ".trf.pipeline",
    "PatchCard": ".trf.patch",
    "load_patch": ".trf.patch",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name], __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
