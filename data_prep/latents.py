"""The latent cache: what VAE and CLIP say of every clip, computed once, so that training loads neither.

One safetensors file a clip, float32, `F` frames, `K` augmentations:

    mean, std           [F, C, h, w]   the VAE's posterior, unscaled: each epoch draws its latents afresh
    start.embedding     [1, D]         CLIP embedding of the clean first frame; end.* the same of the last
    start.condition     [K, C, h, w]   conditioning latents: mode of the noised frame, unscaled
    start.noise_aug     [K]            the noise level each was made with, which the model is told

The augmentation noise depends on the seed and the clip alone, not on the order of work.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from tqdm.auto import tqdm

from ..trf.base import essential_config, load_component, load_config
from ..trf.conditioning import encode_clip, encode_condition, encode_posterior
from ..trf.edm import log_normal_sigmas
from ..trf.replace import replacing
from ..trf.seeds import derived_seed
from .dataset import clip_frames, load_clips
from .frames import to_tensor
from .plan import Split

logger = logging.getLogger(__name__)

Bound = Literal["start", "end"]
INDEX_FILE = "cache.json"
FORMAT_VERSION = 1


@dataclass(frozen=True, kw_only=True)
class CacheKey:
    """Everything the content of a cache depends on besides the clips."""

    model: str
    """Model id or folder."""
    revision: str | None = None
    """Revision of a hub model."""
    variant: str | None = None
    """File variant of a hub model."""
    augmentations: int = 4
    """K."""
    noise_aug_mean: float = -3.0
    """Mean of ln sigma of the augmentation."""
    noise_aug_std: float = 0.5
    """Standard deviation of that ln sigma."""
    precision: str = "no"
    """Precision the encoders ran in."""
    seed: int = 0
    """Of the augmentation noise."""

    def content(self) -> dict[str, Any]:
        """The key with the encoders' configs, as plain JSON values."""
        configs = {
            name: essential_config(load_config(self.model, name, revision=self.revision))
            for name in ("vae", "image_encoder")
        }
        return {"format_version": FORMAT_VERSION, **asdict(self), **configs}


def cache_folder(data: Path, key: CacheKey) -> Path:
    """Where the cache of dataset `data` for `key` lies; caches for several models live side by side."""
    digest = hashlib.sha256(json.dumps(key.content(), sort_keys=True).encode()).hexdigest()[:12]
    return data / "latents" / digest


def find_cache(data: Path, model: str, revision: str | None = None) -> Path | None:
    """The complete cache of dataset `data` for a model, `None` if there is none.

    Raises:
        ValueError: if there are several, made with different settings.
    """
    found = [
        index.parent
        for index in sorted((data / "latents").glob(f"*/{INDEX_FILE}"))
        if not _differences(index.parent, model, revision)
    ]
    if len(found) > 1:
        names = ", ".join(str(folder) for folder in found)
        raise ValueError(f"{data} has several caches for {model}: {names}; choose one with cache=FOLDER.")
    return found[0] if found else None


def check_cache(folder: Path, model: str, revision: str | None = None) -> None:
    """Check that a folder is a complete cache for a model.

    Raises:
        ValueError: if it is not, saying why.
    """
    if not (folder / INDEX_FILE).is_file():
        raise ValueError(f"cache={str(folder)!r}: no complete cache ({INDEX_FILE} is missing); see trfpp cache.")
    if differing := _differences(folder, model, revision):
        raise ValueError(f"cache={str(folder)!r}: made for another model, which differs in {', '.join(differing)}.")


def _differences(folder: Path, model: str, revision: str | None) -> list[str]:
    wanted = CacheKey(model=model, revision=revision).content()
    content = json.loads((folder / INDEX_FILE).read_text(encoding="utf-8"))
    identity = ("format_version", "model", "revision", "vae", "image_encoder")
    return [name for name in identity if content.get(name) != wanted[name]]


def build_cache(
    data: Path,
    key: CacheKey,
    *,
    device: torch.device | str = "cpu",
    chunk: int = 8,
    overwrite: bool = False,
    progress: bool = True,
    share: tuple[int, int] = (0, 1),
) -> Path:
    """Encode every clip of a dataset; clips encoded by an interrupted run are kept.

    Several processes may each take a share; once all are done, `finish_cache` declares the cache complete.

    Args:
        data: dataset folder as written by `prepare`.
        key: what the content depends on.
        device: where the encoders run.
        chunk: frames the VAE encodes at a time.
        overwrite: encode again what is there.
        progress: show a progress bar.
        share: (i, n) encodes every n-th clip from the i-th on.

    Returns:
        The cache folder.
    """
    splits: tuple[Split, ...] = ("train", "validation")
    clips_of = {split: load_clips(data, split) for split in splits}
    folder = cache_folder(data, key)
    if (folder / INDEX_FILE).is_file() and not overwrite:
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    if share[0] == 0:
        (folder / INDEX_FILE).unlink(missing_ok=True)

    dtype = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}[key.precision]
    load: dict[str, Any] = {"dtype": dtype, "revision": key.revision, "variant": key.variant}
    vae = load_component(key.model, "vae", **load).to(device)
    image_encoder = load_component(key.model, "image_encoder", **load).to(device)
    feature_extractor = load_component(key.model, "feature_extractor", revision=key.revision)

    for split, clips in clips_of.items():
        numbers = range(share[0], len(clips), share[1])
        for number in tqdm(numbers, unit="clip", desc=f"cache {split}", disable=None if progress else True):
            clip = clips[number]
            file = folder / f"{clip['clip_id']}.safetensors"
            if overwrite or not _is_whole(file):
                frames = to_tensor(clip_frames(clip))
                tensors = _encode(frames, clip["clip_id"], key, vae, image_encoder, feature_extractor, chunk)
                with replacing(file) as beside:
                    save_file(tensors, beside)
    return folder


def finish_cache(data: Path, key: CacheKey) -> None:
    """Declare the cache complete; called once, after every share was encoded."""
    with replacing(cache_folder(data, key) / INDEX_FILE) as beside:
        beside.write_text(json.dumps(key.content(), indent=2) + "\n", encoding="utf-8")


def _encode(
    frames: Tensor, clip_id: str, key: CacheKey, vae: Any, image_encoder: Any, feature_extractor: Any, chunk: int
) -> dict[str, Tensor]:
    mean, std = encode_posterior(frames, vae, chunk)
    tensors = {"mean": mean, "std": std}
    device = vae.device
    generator = torch.Generator().manual_seed(derived_seed(key.seed, clip_id))
    bounds: Mapping[Bound, Tensor] = {"start": frames[:1], "end": frames[-1:]}
    for name, frame in bounds.items():
        sigmas = log_normal_sigmas((key.augmentations,), key.noise_aug_mean, key.noise_aug_std, generator)
        conditions = []
        for sigma in sigmas:
            noise = torch.randn(frame.shape, generator=generator)
            conditions.append(encode_condition((frame + sigma * noise).to(device), vae).cpu())
        embedding = encode_clip((frame.to(device) + 1) / 2, image_encoder, feature_extractor)
        tensors[f"{name}.embedding"] = embedding[0].float().cpu()
        tensors[f"{name}.condition"] = torch.cat(conditions)
        tensors[f"{name}.noise_aug"] = sigmas
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def _is_whole(file: Path) -> bool:
    if not file.is_file():
        return False
    try:
        with safe_open(file, "pt") as opened:
            return "end.noise_aug" in opened.keys()  # noqa: SIM118 (not a dictionary)
    except SafetensorError:
        logger.warning("%s: broken, encoded again.", file)
        return False


def read_clip(folder: Path, clip_id: str) -> dict[str, Tensor]:
    """Tensors of one cached clip, see the top of this file.

    Raises:
        FileNotFoundError: if the cache lacks the clip.
    """
    from safetensors.torch import load_file

    file = folder / f"{clip_id}.safetensors"
    if not file.is_file():
        raise FileNotFoundError(f"{file}: missing from the latent cache; run trfpp cache again with overwrite=true.")
    return load_file(file)
