"""SVD-XT at its full size with random weights, which cost what others cost; nothing is downloaded.

The configurations are those of stabilityai/stable-video-diffusion-img2vid-xt.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from torch import nn
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModelWithProjection

from trfpp import TimeReversalFusionPipeline
from trfpp.trf.base import load_component
from trfpp.trf.device import best_device

UNET: dict[str, Any] = {
    "sample_size": 96,
    "in_channels": 8,
    "out_channels": 4,
    "down_block_types": (*["CrossAttnDownBlockSpatioTemporal"] * 3, "DownBlockSpatioTemporal"),
    "up_block_types": ("UpBlockSpatioTemporal", *["CrossAttnUpBlockSpatioTemporal"] * 3),
    "block_out_channels": (320, 640, 1280, 1280),
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 768,
    "layers_per_block": 2,
    "cross_attention_dim": 1024,
    "transformer_layers_per_block": 1,
    "num_attention_heads": (5, 10, 20, 20),
    "num_frames": 25,
}
VAE: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "block_out_channels": (128, 256, 512, 512),
    "layers_per_block": 2,
    "latent_channels": 4,
    "sample_size": 768,
    "scaling_factor": 0.18215,
    "force_upcast": True,
}
IMAGE_ENCODER: dict[str, Any] = {
    "hidden_size": 1280,
    "intermediate_size": 5120,
    "projection_dim": 1024,
    "num_hidden_layers": 32,
    "num_attention_heads": 16,
    "image_size": 224,
    "patch_size": 14,
    "hidden_act": "gelu",
}


def build(name: str, device: torch.device | str, dtype: torch.dtype = torch.float32) -> Any:
    """A component with random weights, the same every time on one machine.

    Args:
        name: `unet`, `vae`, `image_encoder` or `feature_extractor`.
        device: where it is made; on `meta` it takes no memory.
        dtype: of its weights.
    """
    if name == "feature_extractor":
        return CLIPImageProcessor()
    torch.manual_seed(0)
    with torch.device(device):
        component: nn.Module = {
            "unet": lambda: UNetSpatioTemporalConditionModel(**UNET),
            "vae": lambda: AutoencoderKLTemporalDecoder(**VAE),
            "image_encoder": lambda: CLIPVisionModelWithProjection(CLIPVisionConfig(**IMAGE_ENCODER)),
        }[name]()
    return nn.Module.to(component, device=device, dtype=dtype)


def save(folder: str | Path) -> None:
    """Write such a model, in half precision and at SVD-XT's noise levels, which are the miniature's too."""
    names = ("unet", "vae", "image_encoder", "feature_extractor")
    components = {name: build(name, best_device(), torch.float16) for name in names}
    TimeReversalFusionPipeline(**components, scheduler=load_component("miniature", "scheduler")).save_pretrained(folder)
