"""The patch format: a LoRA for SVD's UNet and its card, in one folder.

adapter_config.json          PEFT's configuration: plain `peft` loads the folder
adapter_model.safetensors    the weights, float32
patch.json                   the card: what it was trained on and for, and how to sample with it

A patch of direction `both` is two adapters: the first two files lie in `forward/` and in `backward/`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor, nn

from .adapters import (
    Scale,
    active_scales,
    adapter_names,
    adapter_parameters,
    adapter_state,
    add_adapter,
    inject,
    remove_adapters,
    scale_pair,
    set_scales,
)
from .base import complete_config, fingerprint
from .miniature import MINIATURE
from .replace import replacing
from .seeds import derived_seed

Direction = Literal["forward", "backward", "both", "either"]
"""Which way the training clips ran: as filmed, reversed, each way for an adapter of its own, or by a coin."""

FORMAT_VERSION = 1
CARD_FILE = "patch.json"
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTER_FILES = (CONFIG_FILE, WEIGHTS_FILE)

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


class Calibration(BaseModel):
    """What the distance of two bounds says of the film between them, by the training clips.

    See `data_prep.calibration`. A line is a constant and a slope for each logarithm of the two distances: of the
    optical flow and of the difference.
    """

    model_config = ConfigDict(extra="forbid")

    clips: int = Field(description="Number of clips it was fitted on.")
    nearest: tuple[float, float] = Field(description="Logarithms of the smallest distances among them.")
    farthest: tuple[float, float] = Field(description="Logarithms of the largest distances.")
    way: tuple[float, float, float] = Field(description="Line of ln(percent of the diagonal that a clip moves in all).")
    way_explained: float = Field(description="Share of that logarithm's variance it explains, cross-validated.")
    fps: tuple[float, float, float] = Field(description="Line of ln(frames per second).")
    fps_explained: float = Field(description="Share of that logarithm's variance it explains, cross-validated.")


class PatchCard(BaseModel):
    """What a patch is for and how to use it; `patch.json`."""

    model_config = ConfigDict(extra="forbid")

    format_version: int = Field(FORMAT_VERSION, description="Version of this format.")
    trfpp_version: str = Field(description="Version of trfpp that wrote the patch.")
    base_model: str = Field(description="Model id or folder name the patch was trained on.")
    base_revision: str | None = Field(None, description="Revision of a hub model.")
    base_variant: str | None = Field(None, description="File variant of its weights, such as fp16.")
    unet_fingerprint: str = Field(description="SHA-256 of the base UNet's config.")
    unet_config: dict[str, Any] = Field(description="The base UNet's config, to say what differs.")
    domain: str = Field("", description="What the patch was trained on, in words.")
    direction: Direction = Field("forward", description="Direction of time in training.")
    rotated_attention: bool = Field(False, description="Whether backward rows attend in time as forward ones, turned.")
    height: int = Field(description="Training height, pixels.")
    width: int = Field(description="Training width, pixels.")
    num_frames: int = Field(description="Frames of a training clip.")
    fps: float = Field(description="Median measured frames per second of the training clips.")
    motion: MotionStatistics | None = Field(None, description="Measured motion of the training clips.")
    calibration: Calibration | None = Field(None, description="For fps and motion bucket measured of a pair of bounds.")
    sampler: dict[str, Any] = Field(default_factory=dict, description="Recommended sampler settings.")
    training_steps: int = Field(0, description="Optimizer steps trained.")
    training_digest: str = Field("", description="SHA-256 of the resolved training configuration.")
    metrics: dict[str, float] = Field(default_factory=dict, description="Measured at the end of training.")
    licence: str = Field(LICENCE_NOTE, description="What governs the use of the base model.")


def adapters_of(direction: Direction, name: str = "default") -> dict[str, str]:
    """Adapters of a patch called `name`: their sub-folders in the patch folder (`""` is itself) and names in a UNet."""
    if direction == "both":
        return {part: f"{name}/{part}" for part in ("forward", "backward")}  # PyTorch has its own use for 'forward'
    return {"": name}


def adapter_scales(direction: Direction, name: str = "default", scale: Scale = 1.0) -> dict[str, Scale]:
    """The scale of each adapter of a patch at a scale of the whole.

    A number is the strength wherever the patch is meant for: on the backward half for `backward`, on both halves
    otherwise. A pair says it for the forward and for the backward half. Of a `both` patch each adapter has its half.

    Raises:
        ValueError: if the scale is neither.
    """
    forward, backward = scale_pair(scale)
    if direction == "both":
        return {f"{name}/forward": (forward, 0.0), f"{name}/backward": (0.0, backward)}
    if direction == "backward" and isinstance(scale, int | float):
        return {name: (0.0, backward)}
    return {name: (forward, backward)}


def inject_patch(
    unet: Any, direction: Direction = "forward", *, seed: int = 0, name: str = "default", **adapter: Any
) -> dict[str, list[nn.Parameter]]:
    """Put a fresh patch into the UNet, in place: the adapters of its direction, trainable, and everything else frozen.

    Args:
        unet: a `UNetSpatioTemporalConditionModel`.
        direction: of time in training.
        seed: of the initial weights. An adapter trained backward starts the same alone and beside a forward one.
        name: of the patch.
        adapter: see `variants.adapter_config`.

    Returns:
        The trainable parameters of each adapter, by its name in the UNet.

    Raises:
        ValueError: for an adapter that cannot be, or that cannot act on this UNet.
    """
    scales = adapter_scales(direction, name)
    for own, scale in scales.items():
        meant_backward = scale_pair(scale)[0] == 0
        own_seed = derived_seed(seed, "backward") if meant_backward else seed
        inject(unet, seed=own_seed, name=own, **adapter)
    set_scales(unet, scales, trainable=True)
    return {own: adapter_parameters(unet, own) for own in scales}


@dataclass(frozen=True)
class PatchFiles:
    """What a patch's folder holds besides its card, by the sub-folders of its adapters."""

    configs: dict[str, Any]
    """PEFT's configurations."""
    states: dict[str, dict[str, Tensor]]
    """The weights, under PEFT's names."""


def patch_files(unet: Any, direction: Direction, name: str = "default") -> PatchFiles:
    """The patch `name` as it is now, copied; of a sharded UNet all processes have to ask at once."""
    adapters = adapters_of(direction, name)
    return PatchFiles(
        configs={part: unet.peft_config[adapter] for part, adapter in adapters.items()},
        states={part: adapter_state(unet, adapter) for part, adapter in adapters.items()},
    )


def save_patch(folder: Path, files: PatchFiles, card: PatchCard) -> None:
    """Write a patch and its card as a patch folder; one already there is replaced at the end."""
    with replacing(folder, settled=True) as beside:
        beside.mkdir()
        write_patch_files(beside, files, card)


def write_patch_files(folder: Path, files: PatchFiles, card: PatchCard) -> None:
    """Write a patch's files into an existing folder."""
    from safetensors.torch import save_file

    for part, config in files.configs.items():
        (folder / part).mkdir(exist_ok=True)
        config.save_pretrained(str(folder / part))
        save_file(files.states[part], folder / part / WEIGHTS_FILE, metadata={"format": "pt"})
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
    if not (folder / CARD_FILE).is_file():
        raise FileNotFoundError(f"{folder}: not a patch folder, {CARD_FILE} missing.")
    try:
        raw = json.loads((folder / CARD_FILE).read_text(encoding="utf-8"))
        version = raw.get("format_version")
        if version != FORMAT_VERSION:
            raise ValueError(
                f"{folder}: patch format {version}, this trfpp reads format {FORMAT_VERSION}; update one of them."
            )
        card = PatchCard.model_validate(raw)
    except (json.JSONDecodeError, AttributeError, ValidationError) as error:
        raise ValueError(f"{folder / CARD_FILE}: broken patch card: {error}") from None
    files = [Path(part, file) for part in adapters_of(card.direction) for file in ADAPTER_FILES]
    if missing := [str(file) for file in files if not (folder / file).is_file()]:
        raise FileNotFoundError(f"{folder}: not a whole patch folder, {', '.join(missing)} missing.")
    return card


def weight_files(folder: Path) -> dict[str, Path]:
    """The weights of each adapter of a patch, by its sub-folder (`""` is the patch's own).

    Raises:
        FileNotFoundError: if the folder is no patch.
        ValueError: if the card is of another format version or broken.
    """
    return {part: folder / part / WEIGHTS_FILE for part in adapters_of(read_card(folder).direction)}


def base_of(patches: Sequence[Path]) -> dict[str, str | None]:
    """What the first patch was made for, as `model`, `revision` and `variant`.

    Raises:
        ValueError: without a patch.
    """
    if not patches:
        raise ValueError(f"no model: give model=..., or a patch, which names its own; model={MINIATURE} is built in.")
    card = read_card(patches[0])
    return {"model": card.base_model, "revision": card.base_revision, "variant": card.base_variant}


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


def load_patch(unet: Any, folder: str | Path, name: str = "default", scale: Scale = 1.0) -> PatchCard:
    """Load a patch into the UNet, in place, frozen and active beside those active already.

    Args:
        unet: a `UNetSpatioTemporalConditionModel`.
        folder: patch folder.
        name: of the patch; its adapters are those of `adapters_of`.
        scale: see `adapter_scales`.

    Raises:
        FileNotFoundError: if the folder is no patch.
        ValueError: if the patch does not fit the UNet, matches nothing, or the name is taken.
    """
    folder = Path(folder)
    card = read_card(folder)
    check_fit(card, unet.config, folder)
    if "/" in name or hasattr(nn.ModuleDict, name):
        raise ValueError(f"a patch cannot be named {name!r}, that is taken for another use; choose another.")
    if name in {adapter.partition("/")[0] for adapter in adapter_names(unet)}:
        raise ValueError(f"a patch named {name!r} is loaded already; unload it or choose another name.")
    scales = {**active_scales(unet), **adapter_scales(card.direction, name, scale)}
    saved = {part: _read_adapter(folder / part) for part in adapters_of(card.direction)}
    try:
        for part, adapter in adapters_of(card.direction, name).items():
            try:
                add_adapter(unet, *saved[part], adapter)
            except ValueError as error:
                raise ValueError(f"{folder / part}: {error}") from None
            except TypeError as error:
                raise ValueError(f"{folder / part / CONFIG_FILE}: no adapter can be made of it: {error}") from None
        set_scales(unet, scales)
    except BaseException:
        remove_adapters(unet, set(adapters_of(card.direction, name).values()) & set(adapter_names(unet)))
        raise
    return card


def _read_adapter(folder: Path) -> tuple[Any, dict[str, Tensor]]:
    """An adapter's configuration and weights, as they lie in a patch folder."""
    from peft import PeftConfig
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        state = load_file(folder / WEIGHTS_FILE)
    except SafetensorError as error:
        raise ValueError(f"{folder / WEIGHTS_FILE}: not whole, fetch or copy it again: {error}") from None
    try:
        config = PeftConfig.from_pretrained(str(folder))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG_FILE}: not a configuration that PEFT can read: {error}") from None
    if config.peft_type is None:
        raise ValueError(f"{folder / CONFIG_FILE}: says no peft_type, so it is no adapter's.")
    return config, state
