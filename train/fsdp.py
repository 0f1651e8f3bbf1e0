"""What FSDP, as accelerate starts it, cannot do: said before anything is loaded."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..configs.training import TrainConfig


def check_fsdp(version: int, config: TrainConfig) -> None:
    """Check that FSDP can do what is asked for.

    Args:
        version: of FSDP, that was launched.
        config: of the run.

    Raises:
        ValueError: naming what it cannot.
    """
    if version != 2:
        raise ValueError(f"FSDP was launched with fsdp_version {version}; give it 2.")
    if config.optim.name in ("adamw8bit", "paged_adamw8bit"):
        raise ValueError(
            f"optim.name={config.optim.name}: bitsandbytes cannot step weights that FSDP holds in parts; set "
            "optim.name=adamw."
        )
    if config.optim.name == "prodigy":
        raise ValueError(
            "optim.name=prodigy: it would find another rate on each process, of whose weights FSDP holds a part; set "
            "optim.name=adamw."
        )
    if config.quantization is not None:
        raise ValueError(
            f"quantization={config.quantization}: FSDP cannot hold quantized weights in parts; choose one of the two."
        )
