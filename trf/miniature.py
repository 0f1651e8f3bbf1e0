"""The miniature SVD: SVD's classes and scheduler, small enough for two CPU cores.

Its weights are drawn from a fixed seed, so it runs every code path but does not draw pictures.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch

MINIATURE = "miniature"
"""The name that stands for the miniature wherever a model id goes."""

SEED = 0
LAYOUT = 1  # raised whenever the configuration below changes, so that a stale copy in the cache is not used


def cache_root() -> Path:
    """Where generated files are kept: `$TRFPP_CACHE`, else `~/.cache/trfpp`."""
    return Path(os.environ.get("TRFPP_CACHE") or Path.home() / ".cache" / "trfpp")


def miniature_folder() -> Path:
    """The miniature as a diffusers folder, built on first use."""
    folder = cache_root() / f"miniature-{LAYOUT}-torch{torch.__version__}"
    if not (folder / "model_index.json").is_file():
        folder.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(dir=folder.parent, prefix="miniature-"))
        try:
            _build(beside)
            os.rename(beside, folder)
        except OSError:
            # Another process was faster; its copy has the same bits.
            if not (folder / "model_index.json").is_file():
                raise
        finally:
            shutil.rmtree(beside, ignore_errors=True)
    return folder


def _build(folder: Path) -> None:
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )
    from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        unet = UNetSpatioTemporalConditionModel(
            sample_size=16,
            down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            block_out_channels=(32, 64),
            addition_time_embed_dim=32,
            projection_class_embeddings_input_dim=96,
            layers_per_block=1,
            cross_attention_dim=32,
            num_attention_heads=(2, 4),
            num_frames=12,
        )
        vae = AutoencoderKLTemporalDecoder(
            down_block_types=("DownEncoderBlock2D",) * 3, block_out_channels=(32, 32, 32), sample_size=64
        )
        image_encoder = CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=32,
                intermediate_size=64,
                projection_dim=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                image_size=224,
                patch_size=32,
            )
        )
    # SVD-XT's scheduler config.
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        timestep_spacing="leading",
        timestep_type="continuous",
        steps_offset=1,
        use_karras_sigmas=True,
        sigma_min=0.002,
        sigma_max=700.0,
    )
    StableVideoDiffusionPipeline(
        vae=vae,
        image_encoder=image_encoder,
        unet=unet,
        scheduler=scheduler,
        feature_extractor=CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224}),
    ).save_pretrained(folder)
