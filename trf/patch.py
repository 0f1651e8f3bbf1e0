"""The patch format: a LoRA for SVD's UNet and its card, in one folder.

adapter_config.json          PEFT's configuration: plain `peft` loads the folder
adapter_model.safetensors    the weights, float32
patch.json                   the card: what it was trained on and for, and how to sample with it
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from .adapters import STATE_PREFIX, adapter_names, adapter_state, add_adapter, remove_adapters
from .base import complete_config, fingerprint
from .miniature import MINIATURE
from .replace import replacing

FORMAT_VERSION = 1
CARD_FILE = "patch.json"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PATCH_FILES = (CONFIG_FILE, WEIGHTS_FILE, CARD_FILE)

LICENCE_NOTE = (
    "The base model's weights are governed by their own licence (for SVD: Stability AI's), this patch's use too."
)


class MotionStatistics(BaseModel):
    """Motion of the training clips as measured; see `data_prep.motion`."""

    model_config = ConfigDict(extra="forbid")

    clips: int = Field(description="Number of clips measured.")
    score_median: float = Field(description="Median motion score, percent of the frame's diagonal per second.")
    score_p10: float = Field(description="10th percentile of the motion score.")
    score_p90: float = Field(description="90th percentile of the motion score.")
    motion_bucket_median: float = Field(description="Median motion bucket the clips were trained with, 0 to 255.")


class PatchCard(BaseModel):
    """What a patch is for and how to use it; `patch.json`."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = Field(FORMAT_VERSION, description="Version of this format.")
    trfpp_version: str = Field(description="Version of trfpp that wrote the patch.")
    base_model: str = Field(description="Model id or folder name the patch was trained on.")
    base_revision: str | None = Field(None, description="Revision of a hub model.")
    unet_fingerprint: str = Field(description="SHA-256 of the base UNet's config.")
    unet_config: dict[str, Any] = Field(description="The base UNet's config, to say what differs.")
    domain: str = Field("", description="What the patch was trained on, in words.")
    direction: Literal["forward"] = Field("forward", description="Direction of time in training.")
    height: int = Field(description="Training height, pixels.")
    width: int = Field(description="Training width, pixels.")
    num_frames: int = Field(description="Frames of a training clip.")
    fps: float = Field(description="Median measured frames per second of the training clips.")
    motion: MotionStatistics | None = Field(None, description="Measured motion of the training clips.")
    sampler: dict[str, Any] = Field(default_factory=dict, description="Recommended sampler settings.")
    training_steps: int = Field(0, description="Optimizer steps trained.")
    training_digest: str = Field("", description="SHA-256 of the resolved training configuration.")
    metrics: dict[str, float] = Field(default_factory=dict, description="Measured at the end of training.")
    licence: str = Field(LICENCE_NOTE, description="What governs the use of the base model.")


def save_patch(folder: Path, unet: Any, card: PatchCard, name: str = "default") -> None:
    """Write the adapter `name` and its card as a patch folder; one already there is replaced at the end."""
    with replacing(folder) as beside:
        beside.mkdir()
        write_patch_files(beside, unet, card, name)


def write_patch_files(folder: Path, unet: Any, card: PatchCard, name: str = "default") -> None:
    """Write a patch's three files into an existing folder."""
    from safetensors.torch import save_file

    config = unet.peft_config[name]
    config.save_pretrained(str(folder))
    save_file(adapter_state(unet, name), folder / WEIGHTS_FILE, metadata={"format": "pt"})
    (folder / CARD_FILE).write_text(card.model_dump_json(indent=2) + "\n", encoding="utf-8")


def update_card(folder: Path, card: PatchCard) -> bool:
    """Take over what may be said of a patch after training, its domain and recommended settings; whether any is new."""
    old = read_card(folder)
    new = old.model_copy(update={"domain": card.domain, "sampler": card.sampler})
    if new == old:
        return False
    with replacing(folder / CARD_FILE) as beside:
        beside.write_text(new.model_dump_json(indent=2) + "\n", encoding="utf-8")
    return True


def read_card(folder: str | Path) -> PatchCard:
    """The card of a patch folder.

    Raises:
        FileNotFoundError: if the folder is no patch.
        ValueError: if the card is of another format version or broken.
    """
    folder = Path(folder)
    missing = [file for file in PATCH_FILES if not (folder / file).is_file()]
    if missing:
        raise FileNotFoundError(f"{folder}: not a patch folder, {', '.join(missing)} missing.")
    try:
        raw = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{folder}: patch format {version}, this trfpp reads format {FORMAT_VERSION}; update one of them."
            )
        return PatchCard.model_validate(raw)
    except (json.JSONDecodeError, AttributeError, ValidationError) as error:
        raise ValueError(f"{folder / CARD_FILE}: broken patch card: {error}") from None


def base_of(patches: Sequence[Path]) -> tuple[str, str | None]:
    """Model and revision that the first patch was made for.

    Raises:
        ValueError: without a patch.
    """
    if not patches:
        raise ValueError(f"no model: give model=..., or a patch, which names its own; model={MINIATURE} is built in.")
    card = read_card(patches[0])
    return card.base_model, card.base_revision


def check_fit(card: PatchCard, unet_config: Mapping[str, Any], folder: str | Path = "patch") -> None:
    """Check that a patch was trained on a UNet of this config.

    Raises:
        ValueError: naming every setting that differs.
    """
    if card.unet_fingerprint == fingerprint(unet_config):
        return
    # A config file may leave out what another version of diffusers writes down: absent means the class's default.
    trained, base = complete_config(card.unet_config), complete_config(unet_config)
    differing = [
        f"{key} (patch {trained.get(key)}, model {base.get(key)})"
        for key in sorted({*trained, *base})
        if trained.get(key) != base.get(key)
    ]
    if differing:
        raise ValueError(
            f"{folder}: trained on {card.base_model!r}, whose UNet differs from this model's in "
            f"{', '.join(differing)}; load the model the patch was made for."
        )


def load_patch(unet: Any, folder: str | Path, name: str = "default") -> PatchCard:
    """Load a patch into the UNet, in place, as adapter `name`, frozen and active beside those active already.

    Raises:
        FileNotFoundError: if the folder is no patch.
        ValueError: if the patch does not fit the UNet, matches nothing, or the name is taken.
    """
    from peft import LoraConfig
    from safetensors.torch import load_file

    folder = Path(folder)
    card = read_card(folder)
    check_fit(card, unet.config, folder)
    if hasattr(nn.ModuleDict, name):
        raise ValueError(f"a patch cannot be named {name!r}, PyTorch uses that name itself; choose another.")
    if name in adapter_names(unet):
        raise ValueError(f"a patch named {name!r} is loaded already; unload it or choose another name.")
    state = load_file(folder / WEIGHTS_FILE)
    _check_state(state, unet, folder)
    unfilled = add_adapter(unet, LoraConfig.from_pretrained(str(folder)), state, name)
    if unfilled:
        remove_adapters(unet, [name])
        raise ValueError(f"{folder}: {CONFIG_FILE} and {WEIGHTS_FILE} disagree, first at {unfilled[0]}.")
    return card


def _check_state(state: Mapping[str, Tensor], unet: Any, folder: Path) -> None:
    modules: dict[str, Any] = dict(unet.named_modules())
    matched = 0
    for key, value in state.items():
        module_name = key.removeprefix(STATE_PREFIX).rsplit(".lora_", 1)[0]
        module = modules.get(module_name)
        if module is None:
            continue
        matched += 1
        weight = getattr(module, "base_layer", module).weight
        axis = 1 if ".lora_A." in key else 0
        expected = weight.shape[axis]
        if value.shape[axis] != expected:
            raise ValueError(
                f"{folder}: {key} is {tuple(value.shape)}, but the model's {module_name} has {expected} there."
            )
    if not state or not matched:
        raise ValueError(f"{folder}: none of its {len(state)} tensors belongs to a module of this UNet.")
    if matched < len(state):
        raise ValueError(
            f"{folder}: {len(state) - matched} of its {len(state)} tensors belong to no module of this UNet."
        )
