"""What a result was made with, written beside it: enough to repeat it to the bit, or to see that it differs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import diffusers
import peft
import torch

from ..data_prep.bounds import Pair
from ..trf.adapters import Scale
from ..trf.base import resolved_revision
from ..trf.device import best_device
from ..trf.patch import base_of, weight_files
from ..trf.settings import SamplerSettings, as_recorded
from ..version import __version__

if TYPE_CHECKING:
    from ..configs.schema import OnPatch, SamplingConfig

C = TypeVar("C", bound="OnPatch")

Digest = str | dict[str, str]
"""SHA-256 of a patch's weights, as hexadecimal; of a patch with two adapters that of each, by its folder."""

RECORD_FILE = "generation.json"
DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


@dataclass(frozen=True, kw_only=True)
class Job:
    """One pair with everything decided."""

    pair: Pair
    settings: SamplerSettings
    sources: dict[str, str]
    """Where each setting came from: `caller`, `measured`, `manifest`, `patch card`, `model`, `sampler` or `default`."""
    seed: int
    folder: Path
    """Where the result goes."""
    made_at: int | None
    """When the result that was there at first was written, nanoseconds; none if there was none."""
    done: bool
    """A finished result is there and is to be kept."""

    @property
    def made_since(self) -> bool:
        """Whether another process has written the result since."""
        return written_at(self.folder) != self.made_at

    @property
    def images(self) -> dict[str, Path]:
        """The bounds, as `trfpp infer` calls them."""
        pair = self.pair
        return {"loop": pair.start} if pair.loop else {"start": pair.start, "end": pair.end}


def written_at(folder: Path) -> int | None:
    """When a folder's record was written, nanoseconds; none if there is none."""
    record = folder / RECORD_FILE
    return record.stat().st_mtime_ns if record.is_file() else None


def read_record(folder: Path) -> dict[str, Any]:
    """A result's record.

    Raises:
        ValueError: if it is broken.
    """
    file = folder / RECORD_FILE
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:
        record = {}
    match record:
        case {"config": {"sampler": dict()}, "sha256": dict()}:
            return record
    raise ValueError(
        f"{file}: the record is broken, so nothing says what made this result; move {folder} away to make it again."
    )


def on_its_model(config: C, patches: Sequence[Path]) -> C:
    """The settings with the model said: as asked, else that of the first patch, files and all."""
    if config.model:
        return config
    return config.model_copy(update={name: getattr(config, name) or own for name, own in base_of(patches).items()})


def patches_of(config: SamplingConfig) -> Iterator[tuple[Path, Scale]]:
    """Patch folders and their scales."""
    return zip(config.patches, config.scales or [1.0] * len(config.patches))


def precision_of(config: SamplingConfig) -> str:
    """Precision of the model: as asked, else float32 on a CPU and float16 elsewhere."""
    return config.precision or ("no" if device_of(config).type == "cpu" else "fp16")


def dtype_name(config: SamplingConfig) -> str:
    """The same as PyTorch calls it."""
    return str(DTYPES[precision_of(config)]).removeprefix("torch.")


def device_of(config: SamplingConfig) -> torch.device:
    """The device to run on.

    Raises:
        ValueError: if it is not there, or cannot be offloaded from.
    """
    device = best_device(config.device)
    if config.offload and device.type == "cpu":
        raise ValueError("offload=true moves models between a GPU and the CPU, but the device is the CPU; drop it.")
    return device


def optional(config: SamplingConfig) -> dict[str, Any]:
    """Settings that decide bits where they are used; left out where they are not, as in records older than they are."""
    return {name: value for name in ("fuse", "decode_tile_size", "compile") if (value := getattr(config, name))}


def recipe(
    config: SamplingConfig,
    images: Mapping[str, Path | Sequence[Path]],
    settings: SamplerSettings,
    seed: int,
    patches_sha256: list[Digest],
) -> dict[str, Any]:
    """What decides a result's bits: the settings that repeat it, and digests of the files they name.

    Args:
        config: the command's settings.
        images: its image settings, a file or several each.
        settings: of the sampler, resolved.
        seed: of the result.
        patches_sha256: digests of the patches.
    """
    local = Path(config.model).expanduser().is_dir()
    return {
        "config": {
            "model": str(Path(config.model).expanduser().resolve()) if local else config.model,
            "revision": resolved_revision(config.model, config.revision),
            "variant": config.variant,
            **{name: _each(files, lambda path: str(path.resolve())) for name, files in images.items()},
            "patches": [str(folder.resolve()) for folder, _ in patches_of(config)],
            "scales": [list(scale) if isinstance(scale, tuple) else scale for _, scale in patches_of(config)],
            "sampler": as_recorded(settings),
            "fit": config.fit,
            "seed": seed,
            "precision": precision_of(config),
            "device": device_of(config).type,  # which of several alike decides nothing
            "low_memory": config.low_memory,
            "decode_chunk_size": config.decode_chunk_size,
            **optional(config),
        },
        "sha256": {**{name: _each(files, sha256) for name, files in images.items()}, "patches": patches_sha256},
    }


def _each(files: Path | Sequence[Path], say: Callable[[Path], str]) -> str | list[str]:
    return say(files) if isinstance(files, Path) else [say(file) for file in files]


def differences(folder: Path, made_with: Mapping[str, Any]) -> list[str]:
    """Names of what a result that is there was made with differently.

    Raises:
        ValueError: if its record is broken.
    """
    record = read_record(folder)
    record["config"]["sampler"] = as_recorded() | record["config"]["sampler"]
    now, then = dict(_flat(made_with)), dict(_flat({key: record[key] for key in made_with}))
    return sorted(key.removeprefix("config.") for key in {*now, *then} if now.get(key) != then.get(key))


def versions() -> dict[str, str]:
    """Versions of what a result depends on."""
    return {
        "trfpp": __version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "peft": peft.__version__,
    }


def _flat(values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from ((f"{key}.{inner}", item) for inner, item in _flat(value))
        else:
            yield key, value


def patch_sha256(folder: Path) -> Digest:
    """Digest of a patch's weights."""
    digests = {part: sha256(file) for part, file in weight_files(folder).items()}
    return digests.get("", digests)


def sha256(path: Path) -> str:
    """SHA-256 of a file, as hexadecimal.

    Raises:
        ValueError: if it cannot be read.
    """
    digest = hashlib.sha256()
    try:
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read: {error.strerror}.") from None
    return digest.hexdigest()
