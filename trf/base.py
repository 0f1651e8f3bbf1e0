"""Where a base model comes from: the miniature, a local folder, or a hub id; and what identifies it."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from .miniature import FOLDER, MINIATURE

COMPONENTS = ("unet", "vae", "image_encoder", "feature_extractor", "scheduler")


def model_location(model: str | Path) -> str:
    """What diffusers' `from_pretrained` takes for `model`: `miniature`, a folder, or a hub id.

    Raises:
        ValueError: if `model` looks like a local path but no SVD model lies there.
    """
    if str(model) == MINIATURE:
        return str(FOLDER)
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "model_index.json").is_file():
            raise ValueError(
                f"model={str(model)!r}: that folder holds no model_index.json; give a diffusers SVD folder."
            )
        return str(path)
    if path.is_absolute() or str(model).startswith((".", "~")) or str(model).count("/") != 1:
        raise ValueError(
            f"model={str(model)!r}: no such folder; give an SVD folder, a hub id such as "
            f"'stabilityai/stable-video-diffusion-img2vid-xt', or '{MINIATURE}'."
        )
    return str(model)


def hide_loading_bars() -> None:
    """Keep diffusers and transformers from drawing a bar for every component they load; for command lines."""
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()


def load_component(
    model: str | Path,
    name: str,
    *,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
    variant: str | None = None,
) -> Any:
    """Load one component of an SVD model (one of `COMPONENTS`), without the others; safetensors only.

    Args:
        model: see `model_location`.
        name: component and sub-folder name.
        dtype: precision of the weights, float32 if not given. Ignored for components without weights.
        revision: branch, tag or commit of a hub model.
        variant: `fp16` for hub repositories that keep half-precision files beside the full ones.
    """
    from diffusers import AutoencoderKLTemporalDecoder, EulerDiscreteScheduler, UNetSpatioTemporalConditionModel
    from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection

    location = model_location(model)
    classes: dict[str, Any] = {
        "unet": UNetSpatioTemporalConditionModel,
        "vae": AutoencoderKLTemporalDecoder,
        "image_encoder": CLIPVisionModelWithProjection,
        "feature_extractor": CLIPImageProcessor,
        "scheduler": EulerDiscreteScheduler,
    }
    kwargs: dict[str, Any] = {"subfolder": name, "revision": revision}
    if name in ("unet", "vae", "image_encoder"):
        kwargs |= {"dtype": dtype or torch.float32, "use_safetensors": True, "variant": variant}
    component = classes[name].from_pretrained(location, **kwargs)
    if isinstance(component, torch.nn.Module):
        # Tensors read from safetensors lie at any multiple of 8 bytes, and CPU kernels round differently by alignment:
        # in memory of their own, the same weights give the same bits in every process.
        for parameter in component.parameters():
            parameter.data = parameter.data.clone()
    return component


def load_config(model: str | Path, name: str, *, revision: str | None = None) -> dict[str, Any]:
    """The config of one component, without its weights."""
    from diffusers import UNetSpatioTemporalConditionModel
    from transformers import CLIPVisionConfig

    location = model_location(model)
    try:
        if name == "image_encoder":
            return CLIPVisionConfig.from_pretrained(location, subfolder=name, revision=revision).to_dict()
        # The loader of any diffusers class reads any component's config.json.
        return dict(UNetSpatioTemporalConditionModel.load_config(location, subfolder=name, revision=revision))
    except OSError as error:
        raise ValueError(
            f"model={str(model)!r}: its {name} cannot be read, neither from this machine nor from the hub. If it is "
            f"gated, accept its licence and run `hf auth login`; without a network give a local folder. "
            f"({str(error).splitlines()[0]})"
        ) from None


def empty_unet(model: str | Path, *, revision: str | None = None) -> Any:
    """A model's UNet without its weights: its memory is reserved but never touched, and only its config is read."""
    from diffusers import UNetSpatioTemporalConditionModel

    config = load_config(model, "unet", revision=revision)
    with torch.device("meta"):
        unet = UNetSpatioTemporalConditionModel.from_config(config)
    return unet.to_empty(device="cpu").eval()


def essential_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A component's config without what does not shape it (precision, versions), as plain JSON values."""
    incidental = ("architectures", "dtype", "torch_dtype", "transformers_version")
    kept = {key: value for key, value in config.items() if not key.startswith("_") and key not in incidental}
    return json.loads(json.dumps(kept, sort_keys=True))


def complete_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A UNet's essential config with the class's defaults for what it leaves out."""
    from diffusers import UNetSpatioTemporalConditionModel

    parameters = inspect.signature(UNetSpatioTemporalConditionModel.__init__).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not inspect.Parameter.empty}
    return essential_config({**defaults, **config})


def resolved_revision(model: str, revision: str | None) -> str | None:
    """The commit of a hub model whose config has been read, since branches move on; `None` for a local model."""
    from huggingface_hub import try_to_load_from_cache

    location = model_location(model)
    if Path(location).is_dir():
        return None
    # It lies in the cache: <cache>/<repository>/snapshots/<commit>/unet/config.json
    cached = try_to_load_from_cache(location, "unet/config.json", revision=revision)
    return Path(cached).parents[1].name if isinstance(cached, str) else revision


def fingerprint(config: Mapping[str, Any]) -> str:
    """SHA-256 of a component's essential config, as hexadecimal."""
    return hashlib.sha256(json.dumps(essential_config(config), sort_keys=True).encode()).hexdigest()
