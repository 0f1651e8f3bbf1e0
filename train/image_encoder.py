"""Pretraining of a miniature's image encoder: two frames of one film are told from frames of other films.

CLIP's objective (arXiv 2103.00020), with a second frame in the place of the caption.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..trf.conditioning import clip_pixels
from ..trf.seeds import derived_seed


def make_image_encoder(config: Mapping[str, Any], seed: int) -> Any:
    """A fresh `CLIPVisionModelWithProjection` for 224 x 224 pixels, as SVD's pipeline gives them.

    Args:
        config: `width`, `layers` and `projection_dim`.
        seed: of the weights.
    """
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derived_seed(seed, "image encoder"))
        return CLIPVisionModelWithProjection(
            CLIPVisionConfig(
                hidden_size=config["width"],
                intermediate_size=2 * config["width"],
                num_hidden_layers=config["layers"],
                num_attention_heads=4,
                projection_dim=config["projection_dim"],
                image_size=224,
                patch_size=32,
            )
        )


def contrast(
    image_encoder: Any, feature_extractor: Any, temperature: nn.Parameter, frames: Tensor, *, batch_size: int, seed: int
) -> Callable[[int], dict[str, Tensor]]:
    """The losses of a step, for `stage.fit`: InfoNCE both ways, with a learnt temperature.

    Args:
        image_encoder: the encoder.
        feature_extractor: its normalisation.
        temperature: logarithm of the inverse temperature, `[]`, trained along.
        frames: uint8 `[N, F, H, W, 3]`, on its device.
        batch_size: films of a step.
        seed: of every draw.
    """

    def losses(step: int) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(derived_seed(seed, "image encoder step", step))
        films = torch.randperm(len(frames), generator=draw)[:batch_size]
        times = torch.randint(frames.shape[1], (2, len(films)), generator=draw)
        pair = frames[films.repeat(2).to(frames.device), times.flatten().to(frames.device)]
        pixels = clip_pixels(pair.movedim(-1, -3).float() / 255, image_encoder, feature_extractor)
        one, other = F.normalize(image_encoder(pixels).image_embeds, dim=-1).chunk(2)
        scores = temperature.exp().clamp(max=100) * one @ other.T
        own = torch.arange(len(films), device=scores.device)
        loss = (F.cross_entropy(scores, own) + F.cross_entropy(scores.T, own)) / 2
        return {"loss": loss, "accuracy": (scores.argmax(1) == own).float().mean()}

    return losses
