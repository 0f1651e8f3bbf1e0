"""Pretraining of a miniature SVD: films, autoencoder, image encoder, UNet; then the folder diffusers loads, measured.

Every stage resumes: to go on after an interruption, run the same command again.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..data_prep.procedural import WORLDS
from ..trf.conditioning import encode_clip
from ..trf.device import best_device
from ..trf.miniature import make_feature_extractor, make_scheduler
from ..trf.replace import replacing
from ..trf.sole import sole
from .appraise import appraise
from .autoencoder import latents_of, make_autoencoder, reconstruction
from .base import EncodedFilms, denoising, make_batch, make_unet
from .films import Films, FilmShelf
from .image_encoder import contrast, make_image_encoder
from .stage import StageSettings, bind, fit

if TYPE_CHECKING:
    from ..configs.pretraining import PretrainConfig

MODEL_FOLDER = "model"
STAGES = ("autoencoder", "image_encoder", "unet")
FREE = {"output", "device", "render_workers", "checkpoint_every", "appraisal", "compile"}
"""Settings that shape neither the films nor the weights: a run that goes on may have others."""


def pretrain(config: PretrainConfig) -> Path:
    """Run all stages that are not done yet, and measure the model.

    Returns:
        The model's folder.

    Raises:
        ValueError: if the output holds a run with other settings, or another process is at it.
        StageStopped: after Ctrl-C or SIGTERM, with a checkpoint written.
    """
    output, folder = config.output, config.output / MODEL_FOLDER
    with sole(output):
        bind(output, config.model_dump(mode="json", exclude=FREE))
        device = best_device(config.device)
        if not folder.is_dir():
            _build(config, folder, device)
        if config.appraisal.films:
            curves = {stage: output / f"{stage}.csv" for stage in STAGES}
            asked = config.appraisal.model_dump()
            appraise(folder, output / "appraisal", curves=curves, seed=config.seed, device=device, **asked)
    return folder


def _build(config: PretrainConfig, folder: Path, device: torch.device) -> None:
    output = config.output
    size = dict(seed=config.seed, num_frames=config.num_frames, side=config.size)
    workers = config.render_workers or os.cpu_count() or 1
    # The few films of every world come first: the autoencoder learns from them while the many of the base render.
    varied = FilmShelf(output / "films" / "varied", WORLDS, config.varied_films, workers=workers, **size)
    base = FilmShelf(output / "films" / "base", ("base",), config.base_films, workers=workers, **size)
    try:
        vae = _autoencoder(config, varied.take, device)
        image_encoder, feature_extractor = _image_encoder(config, varied.take, device)
        unet = _unet(config, base.take, vae, image_encoder, feature_extractor, device)
    finally:
        varied.close()
        base.close()
    _save(folder, vae, image_encoder, feature_extractor, unet)


def _autoencoder(config: PretrainConfig, take: Callable[[int], Films], device: torch.device) -> Any:
    settings = config.autoencoder
    vae = make_autoencoder(settings.model_dump(), config.size, config.seed).to(device)
    frames = take(config.varied_films).frames.to(device)
    losses = reconstruction(
        vae,
        frames,
        batch_size=settings.batch_size,
        latent_noise=settings.latent_noise,
        moment_weight=settings.moment_weight,
        seed=config.seed,
    )
    stage = StageSettings(steps=settings.steps, lr=settings.lr, max_grad_norm=0.5, **_often(config))
    fit("autoencoder", [vae], losses, stage, config.output)
    vae.requires_grad_(False).eval()
    spread = latents_of(vae, frames[: min(256, len(frames))]).std().item()
    vae.register_to_config(scaling_factor=round(1 / spread, 4))
    return vae


def _image_encoder(config: PretrainConfig, take: Callable[[int], Films], device: torch.device) -> tuple[Any, Any]:
    settings = config.image_encoder
    encoder = make_image_encoder(settings.model_dump(), config.seed).to(device)
    feature_extractor = make_feature_extractor()
    temperature = nn.Parameter(torch.tensor(2.0, device=device))
    holder = nn.ParameterList([temperature])
    frames = take(config.varied_films).frames.to(device)
    losses = contrast(encoder, feature_extractor, temperature, frames, batch_size=settings.batch_size, seed=config.seed)
    stage = StageSettings(steps=settings.steps, lr=settings.lr, **_often(config))
    fit("image_encoder", [encoder, holder], losses, stage, config.output)
    return encoder.requires_grad_(False).eval(), feature_extractor


def _unet(
    config: PretrainConfig,
    take: Callable[[int], Films],
    vae: Any,
    image_encoder: Any,
    feature_extractor: Any,
    device: torch.device,
) -> Any:
    settings = config.unet
    unet = make_unet(
        settings.model_dump(),
        latent_channels=vae.config.latent_channels,
        latent_side=config.size // 2 ** (len(vae.config.block_out_channels) - 1),
        num_frames=config.num_frames,
        seed=config.seed,
    ).to(device)
    films = _encode(take(config.base_films), vae, image_encoder, feature_extractor, device)
    draws: dict[str, Any] = config.objective.model_dump()
    losses = denoising(
        # Whole steps as CUDA graphs: a UNet this small is many short kernels.
        torch.compile(unet, mode="reduce-overhead") if config.compile else unet,
        lambda step: make_batch(films, vae, step, batch_size=settings.batch_size, seed=config.seed, **draws),
        autocast={"no": None, "bf16": torch.bfloat16}[config.precision],
    )
    stage = StageSettings(
        steps=settings.steps, lr=settings.lr, weight_decay=0.01, warmup_steps=500, ema=settings.ema, **_often(config)
    )
    fit("unet", [unet], losses, stage, config.output)
    return unet.requires_grad_(False).eval()


def _often(config: PretrainConfig) -> dict[str, Any]:
    return {"checkpoint_every": config.checkpoint_every, "log_every": config.log_every}


def _encode(films: Films, vae: Any, image_encoder: Any, feature_extractor: Any, device: torch.device) -> EncodedFilms:
    factor = vae.config.scaling_factor
    bounds = films.frames[:, [0, -1]].to(device)
    images = bounds.flatten(0, 1).movedim(-1, -3).float() / 255
    embeddings = [encode_clip(part, image_encoder, feature_extractor) for part in torch.split(images, 256)]
    latents = [latents_of(vae, part) * factor for part in torch.split(films.frames, 256)]
    return EncodedFilms(
        latents=torch.cat(latents),
        bounds=bounds,
        embeddings=torch.unflatten(torch.cat(embeddings).squeeze(1).float(), 0, bounds.shape[:2]),
        fps=films.fps.to(device),
        motion_bucket=films.motion_bucket.to(device),
        scaling_factor=factor,
    )


def _save(folder: Path, vae: Any, image_encoder: Any, feature_extractor: Any, unet: Any) -> None:
    """The components as a stock pipeline's folder, the large ones in half precision.

    diffusers reads those back as float32. transformers does not, so the image encoder is kept as it is.
    """
    from diffusers import StableVideoDiffusionPipeline

    for module in (vae, unet):
        module.to("cpu").half()
    image_encoder.to("cpu")
    pipeline = StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=image_encoder,
        unet=unet,
        scheduler=make_scheduler(),
        feature_extractor=feature_extractor,
    )
    with replacing(folder) as beside:
        pipeline.save_pretrained(beside)
