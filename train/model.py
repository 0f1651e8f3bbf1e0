"""The UNet of a run: its base as the settings ask for it, with fresh adapters, ready to be trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from safetensors.torch import load_file

from ..trf.adapters import load_adapter
from ..trf.attention import attend_to_one_token
from ..trf.base import load_component
from ..trf.patch import adapters_of, check_fit, inject_patch, read_card, weight_files
from .compiling import compile_blocks
from .memory import PRECISIONS
from .origin import Origin, prepare_base
from .recompute import recompute_activations
from .zero import ZeroAccelerator

if TYPE_CHECKING:
    from ..configs.training import TrainConfig


def make_model(config: TrainConfig, accelerator: Accelerator, checkpoint: Path | None) -> tuple[Any, list[str], Origin]:
    """The UNet with the patch `default`, the names of its adapters, and what they start from.

    Args:
        config: of the run.
        accelerator: its; DeepSpeed holds the base in parts before adapters come in.
        checkpoint: that the run goes on from; its weights are loaded later.

    Raises:
        ValueError: if checkpoint or `start_from` do not fit the settings.
    """
    dtype = PRECISIONS[config.precision]
    unet = load_component(config.model, "unet", dtype=dtype, revision=config.revision, variant=config.variant)
    origin = prepare_base(unet, config, checkpoint)
    if isinstance(accelerator, ZeroAccelerator):
        accelerator.cut(unet)
    adapter = config.lora.model_dump(exclude={"init"})
    names = list(inject_patch(unet, config.direction, seed=config.seed, **adapter))
    origin.place(unet, config.direction, **adapter)
    attend_to_one_token(unet)
    if config.compile:
        compile_blocks(unet)
    if config.gradient_checkpointing:
        recompute_activations(unet)
    if config.start_from is not None and checkpoint is None:
        warm_start(unet, config)
    return unet.train(), names, origin


def warm_start(unet: Any, config: TrainConfig) -> None:
    """Give the fresh adapters in the UNet the weights of the patch `config.start_from`.

    Raises:
        FileNotFoundError: if it is no patch.
        ValueError: if it was made for another UNet, or its adapters are not such as these.
    """
    folder = config.start_from
    assert folder is not None
    card = read_card(folder)
    check_fit(card, unet.config, folder)
    if card.direction != config.direction:
        raise ValueError(f"start_from={str(folder)!r}: of direction {card.direction}, not {config.direction}.")
    for part, file in weight_files(folder).items():
        try:
            load_adapter(unet, load_file(file), adapters_of(card.direction)[part])
        except ValueError as error:
            raise ValueError(
                f"start_from={str(folder)!r}: not an adapter like the one to train, {error} Give the settings in lora "
                "that it was trained with."
            ) from None
