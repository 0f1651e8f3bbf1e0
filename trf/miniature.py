"""The miniature SVD: SVD's classes and scheduler at a size for two CPU cores, pretrained, shipped with the package.

`trfpp pretrain` made it, and makes others; docs/miniature.md tells how, and the model card lies beside the weights.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

MINIATURE = "miniature"
"""The name that stands for the miniature wherever a model id goes."""

FOLDER = Path(__file__).parent / "miniature_svd"
"""A diffusers folder, the weights of UNet and autoencoder in half precision."""


def make_scheduler() -> Any:
    """A scheduler with SVD-XT's config."""
    from diffusers import EulerDiscreteScheduler

    return EulerDiscreteScheduler(
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


def make_feature_extractor() -> Any:
    """CLIP's normalisation of 224 x 224 pixels, as SVD's."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 224}, crop_size={"height": 224, "width": 224})
