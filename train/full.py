"""Fine-tuning of all weights of the UNet, one UNet each way: what a patch is measured against.

The clips, draws and batches are those of a patch of direction `both`, and so is the loss; only what is trained differs.

model/                          a diffusers folder: `unet/` of the forward half, `unet_backward/` of the backward one
forward.csv, backward.csv       the curves
settings.json                   what a run must have to go on here
"""

from __future__ import annotations

import math
from operator import attrgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch

from ..trf.base import COMPONENTS, load_component
from ..trf.device import best_device
from ..trf.replace import remove, replacing
from ..trf.sole import sole
from ..trf.two_unets import BACKWARD_FOLDER
from .base import denoising
from .binding import binding_settings
from .data import RankOrder, Sample, collate
from .plan import make_plan
from .setup import cache_of, make_samples
from .stage import StageSettings, bind, fit

if TYPE_CHECKING:
    from ..configs.training import TrainConfig

MODEL_FOLDER = "model"
Way = Literal["forward", "backward"]
ONLY: dict[str, Any] = {
    "direction": "both", "gradient_accumulation": 1, "gradient_checkpointing": False, "precision": "no",
    "quantization": None, "ema": 0.0, "start_from": None, "on_nonfinite": "stop", "compile": False,
    "feed_forward_chunks": 1,
    "optim.name": "adamw", "optim.schedule": "cosine", "optim.lora_plus": 1.0,
    "objective.fusion": 0.0, "objective.alternate_directions": False, "objective.rotated_attention": False,
}  # fmt: skip
"""All there is here of some settings; it is asked for so that none is ignored."""


def fine_tune(config: TrainConfig) -> Path:
    """Train both UNets, the forward one first; running it again goes on where it stopped.

    Args:
        config: as for a patch. What concerns the adapter, the card, validation and old checkpoints has no meaning here.

    Returns:
        The model's folder.

    Raises:
        ValueError: for settings that cannot work, a dataset that is not cached, or an output made with others or that
            another process is at.
        StageStopped: after Ctrl-C or SIGTERM, once a checkpoint is written.
    """
    for name, only in ONLY.items():
        if (value := attrgetter(name)(config)) != only:
            raise ValueError(f"{name}={value}: fine-tuning all weights knows {only} only.")
    cache = cache_of(config)
    if cache is None:
        raise ValueError(f"data={str(config.data)!r}: not cached for {config.model}; run trfpp cache first.")
    with sole(config.output):
        return _fine_tune(config, cache)


def _fine_tune(config: TrainConfig, cache: Path) -> Path:
    folder = config.output / MODEL_FOLDER
    decisive = {**binding_settings(config, make_plan(config, 1)), "steps": config.steps}
    bind(config.output, {name: value for name, value in decisive.items() if not name.startswith("lora.")})
    if folder.is_dir():
        return folder
    device = best_device(None)
    unets = {}
    for way in get_args(Way):
        unets[way] = load_component(config.model, "unet", revision=config.revision, variant=config.variant).to(device)
        unets[way].train()
        losses = denoising(unets[way], Batches(config, cache, way, device), autocast=None)
        fit(way, [unets[way]], losses, _stage(config), config.output)
    _save(config, folder, **{way: unet.eval().cpu() for way, unet in unets.items()})
    for checkpoint in config.output.glob("*.checkpoint.safetensors"):
        remove(checkpoint)
    return folder


class Batches:
    """The batch of a step, all of whose rows run one way: what an adapter of that way sees in that step."""

    def __init__(self, config: TrainConfig, cache: Path, way: Way, device: torch.device) -> None:
        own = config.model_copy(update={"direction": way})
        self.samples = make_samples(own, cache, "train", per_step=config.batch_size)
        self.batch_size = config.batch_size
        self.device = device

    def __call__(self, step: int) -> Sample:
        """The batch, on the device."""
        order = RankOrder(
            start=step, stop=step + 1, batch_size=self.batch_size, accumulation=1, rank=0, num_processes=1
        )
        return collate(self.samples.__getitems__(list(order))).to(self.device)


def _stage(config: TrainConfig) -> StageSettings:
    optim = config.optim
    return StageSettings(
        steps=config.steps,
        lr=optim.lr,
        warmup_steps=optim.warmup_steps,
        weight_decay=optim.weight_decay,
        betas=optim.betas,
        eps=optim.eps,
        max_grad_norm=math.inf if optim.max_grad_norm is None else optim.max_grad_norm,
        checkpoint_every=config.checkpoint.every,
        log_every=config.log_every,
    )


def _save(config: TrainConfig, folder: Path, forward: Any, backward: Any) -> None:
    """A stock pipeline's folder with the forward UNet, and the backward UNet beside it."""
    from diffusers import StableVideoDiffusionPipeline

    others = {
        name: load_component(config.model, name, revision=config.revision, variant=config.variant)
        for name in COMPONENTS
        if name != "unet"
    }
    with replacing(folder) as beside:
        StableVideoDiffusionPipeline(unet=forward, **others).save_pretrained(beside)
        backward.save_pretrained(beside / BACKWARD_FOLDER)
