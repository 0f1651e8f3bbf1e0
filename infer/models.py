"""Pipelines with their patches, as the settings of a command ask for them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import torch
from diffusers import AutoencoderKLTemporalDecoder

from ..trf.base import empty_unet, load_config
from ..trf.compiling import compile_blocks
from ..trf.pipeline import TimeReversalFusionPipeline
from ..trf.two_unets import BACKWARD_FOLDER, TwoUNets
from .record import DTYPES, device_of, patches_of, precision_of

if TYPE_CHECKING:
    from ..configs.schema import SamplingConfig

SHAPES = 8
"""Shapes of videos, batches included, that compiled blocks are kept for in a process."""


def load_pipeline(config: SamplingConfig) -> TimeReversalFusionPipeline:
    """The pipeline with its weights and patches, on its device.

    Raises:
        FileNotFoundError: if a patch folder is no patch.
        ValueError: if a patch does not fit or cannot be fused, or the device is not there.
    """
    device = device_of(config)
    pipe = TimeReversalFusionPipeline.from_pretrained(
        config.model, revision=config.revision, variant=config.variant, dtype=DTYPES[precision_of(config)]
    )
    _load_patches(pipe, config)
    if config.fuse:
        pipe.fuse_patches()
    pipe.decode_tile_size = config.decode_tile_size
    if config.compile:
        compile_blocks(pipe.unet, SHAPES)
    if config.offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
    return pipe


def outline_of(config: SamplingConfig) -> TimeReversalFusionPipeline:
    """The pipeline with patches but without the model's weights: it knows settings, and whether patches fit.

    Raises:
        FileNotFoundError: if a patch folder is no patch.
        ValueError: if a patch does not fit.
    """
    two = (Path(config.model).expanduser() / BACKWARD_FOLDER).is_dir()
    if config.patches and two:
        raise ValueError(f"{config.model}: has a UNet for either direction, and patches are for models with one.")
    vae_config = load_config(config.model, "vae", revision=config.revision)
    with torch.device("meta"):
        vae = AutoencoderKLTemporalDecoder.from_config(vae_config)
    unet = empty_unet(config.model, revision=config.revision)
    pipe = TimeReversalFusionPipeline(vae, None, TwoUNets(unet, unet) if two else unet, None, None)
    _load_patches(pipe, config)
    return pipe


def _load_patches(pipe: TimeReversalFusionPipeline, config: SamplingConfig) -> None:
    for number, (folder, scale) in enumerate(patches_of(config)):
        # Patches of several runs often lie in folders of one name; the number keeps them apart.
        pipe.load_patch(folder, f"{number}_{folder.resolve().name}", scale)
