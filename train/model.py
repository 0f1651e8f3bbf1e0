"""The UNet of a run: its base as the settings ask for it, with fresh adapters, ready to be trained."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from accelerate import Accelerator
from peft import PeftConfig
from safetensors.torch import load_file

from ..data_prep.dataset import load_clips
from ..data_prep.shapes import shapes_of
from ..trf.adapters import load_adapter
from ..trf.attention import attend_to_one_token
from ..trf.base import load_component
from ..trf.compiling import compile_blocks
from ..trf.patch import adapters_of, check_fit, inject_patch, read_card, weight_files
from .buckets import buckets_of
from .memory import PRECISIONS
from .origin import Origin, prepare_base
from .recompute import chunk_feed_forward, recompute_activations
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
        compile_blocks(unet, len(buckets_of(shapes_of(load_clips(config.data, "train")))))
    if config.feed_forward_chunks > 1:
        chunk_feed_forward(unet, config.feed_forward_chunks)
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
    if card.rotated_attention != config.objective.rotated_attention:
        trained = str(card.rotated_attention).lower()
        raise ValueError(f"start_from={str(folder)!r}: trained with objective.rotated_attention={trained}; set it so.")
    for part, file in weight_files(folder).items():
        name = adapters_of(card.direction)[part]
        try:
            _check_strength(PeftConfig.from_pretrained(str(file.parent)), unet.peft_config[name])
            load_adapter(unet, load_file(file), name)
        except ValueError as error:
            raise ValueError(
                f"start_from={str(folder)!r}: not an adapter like the one to train, {error} Give the settings in lora "
                "that it was trained with."
            ) from None


def _check_strength(trained: PeftConfig, fresh: PeftConfig) -> None:
    """Weights that fit still act otherwise under another alpha, of which PEFT keeps no trace in them.

    Raises:
        ValueError: naming what differs.
    """
    differing = [
        f"{said} {getattr(trained, name)}, not {getattr(fresh, name)}"
        for name, said in {"lora_alpha": "alpha", "alpha": "alpha", "use_rslora": "rslora", "use_dora": "dora"}.items()
        if getattr(trained, name, None) != getattr(fresh, name, None)
    ]
    if differing:
        raise ValueError(f"it has {', '.join(differing)}.")
