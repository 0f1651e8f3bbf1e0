"""Patches in the form other tools read, each file checked against the patch before it is put in place.

A patch adds `scaling * B @ A` to each trained weight (its *update*). PEFT itself says what the patch's scaling is; what
was written is read back from disk, and its update must be the patch's. To add a format: one function that writes it,
one that reads it back, an entry in `_WRITERS`, a test.

Shapes: A `[rank, in, *kernel]`, B `[out, rank, *ones]`, an update that of its weight.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..trf.adapters import lora_layers
from ..trf.base import empty_unet, load_component
from ..trf.patch import WEIGHTS_FILE, PatchCard, adapters_of, load_patch, read_card
from ..trf.replace import replacing
from .record import on_its_model

if TYPE_CHECKING:
    from ..configs.schema import ExportConfig

logger = logging.getLogger(__name__)

TOLERANCE = 1e-6
"""Largest relative error, in float64, of an exported adapter's update."""

CARD_KEY = "trfpp_card"
"""Where the card lies in the metadata of an exported safetensors file, as JSON."""
CARD_BESIDE = f"{CARD_KEY}.json"
"""The card in an exported UNet's folder, whose weights diffusers writes."""


class LowRank(NamedTuple):
    """The update of one module: `scaling * b @ a`."""

    a: Tensor
    b: Tensor
    scaling: float

    def update(self) -> Tensor:
        """The update, float64, of shape `[out, in, *kernel]`."""
        product = self.b.double().flatten(1) @ self.a.double().flatten(1)
        return self.scaling * product.reshape(self.b.shape[0], *self.a.shape[1:])


Updates = dict[str, LowRank]
"""Updates by module name."""


@dataclass(frozen=True, kw_only=True)
class _Adapter:
    """One adapter of a patch."""

    folder: Path
    config: LoraConfig
    updates: Updates


@dataclass(frozen=True, kw_only=True)
class _Job:
    """What every format is written from."""

    model: str
    revision: str | None
    variant: str | None
    card: PatchCard
    adapters: dict[str, _Adapter]
    """By their sub-folders in the export; the formats that hold one adapter get it as `""`, the export itself."""
    scale: float


def export(config: ExportConfig) -> Path:
    """Write a patch in another tool's form, and check what was written.

    `peft` is a folder that plain PEFT loads onto the UNet. `diffusers` is one safetensors file with
    `unet.<module>.lora_A.weight`, `lora_B.weight` and `alpha`, where `alpha / rank` is the true scaling (rank
    stabilisation baked in). `merged` is a plain diffusers UNet folder, float32 whatever the base's files hold: half
    precision would round away part of the patch. `PeftModel` and `from_pretrained` cast on loading if asked to.

    Only `merged` needs the base model's weights; the others read its UNet's config.

    Of a patch trained in both directions every format holds the adapter that `direction` names; `peft` can hold both,
    in sub-folders as PEFT has them.

    Returns:
        The folder or file written.

    Raises:
        FileNotFoundError: if there is no patch.
        ValueError: if the patch does not fit the model, the output is of the wrong kind or taken by anything but an
            earlier export that is to be replaced, or what was written is not the patch; nothing is left there then.
    """
    config = on_its_model(config, [config.patch])
    _check_output(config)
    if config.scale != 1 and config.format != "merged":
        logger.warning(
            "scale=%s is ignored: with format %s the tool that loads it decides.", config.scale, config.format
        )

    output = config.output
    job = _read(config)
    with replacing(output) as beside:
        _WRITERS[config.format](beside, job)
    trained = sum(len(adapter.updates) for adapter in job.adapters.values())
    logger.info("all %d trained modules were found in the model, and their updates are the patch's.", trained)
    return output


def _check_output(config: ExportConfig) -> None:
    output, shown = config.output, f"output={str(config.output)!r}"
    if (config.format == "diffusers") != (output.suffix == ".safetensors"):
        kind = "a .safetensors file" if config.format == "diffusers" else "a folder"
        raise ValueError(f"{shown}: format {config.format} writes {kind}; name one.")
    if not output.exists():
        return
    if not config.overwrite:
        raise ValueError(f"{shown} exists; choose another, or replace it with overwrite=true.")
    if not _is_export(output):
        raise ValueError(f"{shown} is no earlier export (no card is in it), so it is not replaced; choose another.")


def _is_export(output: Path) -> bool:
    """Whether the card that every export holds is there."""
    weights = output, output / WEIGHTS_FILE, output / "forward" / WEIGHTS_FILE
    return (output / CARD_BESIDE).is_file() or any(map(_holds_card, filter(Path.is_file, weights)))


def _holds_card(file: Path) -> bool:
    try:
        with safe_open(file, "pt") as tensors:
            return CARD_KEY in (tensors.metadata() or {})
    except SafetensorError:
        return False


def _parts(config: ExportConfig, card: PatchCard) -> dict[str, str]:
    """Sub-folders of the export, and which of the patch's adapters goes into each."""
    if card.direction != "both":
        if config.direction not in (None, card.direction):
            raise ValueError(
                f"direction={config.direction}: {config.patch} holds one adapter, of direction {card.direction}; "
                "leave direction out."
            )
        return {"": ""}
    if config.direction is not None:
        return {"": config.direction}
    if config.format != "peft":
        raise ValueError(
            f"{config.patch} holds a forward and a backward adapter, and format {config.format} holds one; say "
            "direction=forward or direction=backward."
        )
    return {part: part for part in adapters_of(card.direction)}


def _read(config: ExportConfig) -> _Job:
    parts = _parts(config, read_card(config.patch))
    unet = empty_unet(config.model, revision=config.revision)
    card = load_patch(unet, config.patch)
    names = adapters_of(card.direction)
    for part in parts.values():
        weights = load_file(config.patch / part / WEIGHTS_FILE)
        if strange := [key for key in weights if not key.endswith((".lora_A.weight", ".lora_B.weight"))]:
            raise ValueError(
                f"{config.patch}: {strange[0]} is more than a plain LoRA; such a patch cannot be exported."
            )
        for key, value in weights.items():
            if not value.isfinite().all():
                raise ValueError(f"{config.patch}: {key} holds values that are not finite; the patch is broken.")
    return _Job(
        model=config.model,
        revision=config.revision,
        variant=config.variant,
        card=card.model_copy(update={"direction": config.direction or card.direction}),
        adapters={
            target: _Adapter(
                folder=config.patch / part,
                config=unet.peft_config[names[part]],
                updates=live_updates(unet, names[part]),
            )
            for target, part in parts.items()
        },
        scale=config.scale,
    )


def live_updates(unet: Any, name: str = "default") -> Updates:
    """Updates of an adapter in a UNet, as PEFT would apply it at scale 1."""
    return {
        path: LowRank(layer.lora_A[name].weight.detach(), layer.lora_B[name].weight.detach(), layer.scaling[name])
        for path, layer in lora_layers(unet)
        if name in layer.lora_A
    }


def check_updates(found: Updates, expected: Updates, where: str | Path) -> None:
    """Check that an exported adapter is the patch.

    Args:
        found: what the exported files hold.
        expected: what the patch holds.
        where: named in the error.

    Raises:
        ValueError: for a module that is missing or not the patch's, or whose update differs by more than `TOLERANCE`.
    """
    if odd := sorted(found.keys() ^ expected.keys()):
        raise ValueError(
            f"{where}: the export holds {len(found.keys() & expected.keys())} of {len(expected)} trained modules; "
            f"the first that differs is {odd[0]}."
        )
    for module, low_rank in expected.items():
        truth = low_rank.update()
        error = float((found[module].update() - truth).norm() / truth.norm().clamp_min(torch.finfo(truth.dtype).tiny))
        if not error <= TOLERANCE:  # so that NaN fails
            raise ValueError(f"{where}: the exported update of {module} is {error:.1e} off the patch's.")


# peft ----------------------------------------------------------------------------------------------------------------


def _write_peft(folder: Path, job: _Job) -> None:
    for part, adapter in job.adapters.items():
        (folder / part).mkdir(parents=True)
        config = LoraConfig.from_pretrained(str(adapter.folder))
        config.base_model_name_or_path, config.revision = job.card.base_model, job.card.base_revision
        config.inference_mode = True
        config.save_pretrained(str(folder / part))
        save_file(load_file(adapter.folder / WEIGHTS_FILE), folder / part / WEIGHTS_FILE, metadata=_metadata(job.card))
        check_updates(read_peft(folder / part, job.model, job.revision), adapter.updates, adapter.folder)


def read_peft(folder: Path, model: str | Path, revision: str | None = None) -> Updates:
    """Updates of an exported PEFT folder, as `PeftModel.from_pretrained` loads it."""
    return live_updates(PeftModel.from_pretrained(empty_unet(model, revision=revision), str(folder)).get_base_model())


# diffusers -----------------------------------------------------------------------------------------------------------


def _write_diffusers(path: Path, job: _Job) -> None:
    adapter, state = job.adapters[""], dict[str, Tensor]()
    for module, (a, b, scaling) in adapter.updates.items():
        state[f"unet.{module}.lora_A.weight"] = a.contiguous()
        state[f"unet.{module}.lora_B.weight"] = b.contiguous()
        state[f"unet.{module}.alpha"] = torch.tensor(scaling * a.shape[0], dtype=torch.float32)
    # Tools that go by the metadata get the same scaling as those that go by the alphas.
    alphas = {module: scaling * a.shape[0] for module, (a, _, scaling) in adapter.updates.items()}
    common = next(iter(alphas.values()))
    config = adapter.config.to_dict() | {
        "use_rslora": False,
        "lora_alpha": common,
        "alpha_pattern": {module: alpha for module, alpha in alphas.items() if alpha != common},
    }
    packed = json.dumps({f"unet.{key}": sorted(v) if isinstance(v, set) else v for key, v in config.items()})
    save_file(state, path, metadata={**_metadata(job.card), "lora_adapter_metadata": packed})
    check_updates(read_diffusers(path), adapter.updates, adapter.folder)


def read_diffusers(path: Path) -> Updates:
    """Updates of an exported diffusers file, by its alphas.

    Raises:
        ValueError: if a module's tensors are incomplete.
    """
    state = load_file(path)
    modules = [key.removesuffix(".alpha") for key in state if key.endswith(".alpha")]
    parts = ("lora_A.weight", "lora_B.weight", "alpha")
    if odd := sorted(state.keys() ^ {f"{module}.{part}" for module in modules for part in parts}):
        raise ValueError(f"{path}: {odd[0]} is missing or has no counterpart.")
    updates = {}
    for module in modules:
        a, b, alpha = (state[f"{module}.{part}"] for part in parts)
        updates[module.removeprefix("unet.")] = LowRank(a, b, float(alpha) / a.shape[0])
    return updates


# merged --------------------------------------------------------------------------------------------------------------


def _write_merged(folder: Path, job: _Job) -> None:
    unet = load_component(job.model, "unet", dtype=torch.float32, revision=job.revision, variant=job.variant)
    adapter = job.adapters[""]
    trained = {f"{module}.weight": low_rank for module, low_rank in adapter.updates.items()}
    weights = unet.state_dict()
    base = {key: weights[key].clone() for key in trained}
    for key, low_rank in trained.items():
        weights[key].copy_(base[key].double() + job.scale * low_rank.update())
    unet.save_pretrained(folder)
    (folder / CARD_BESIDE).write_text(job.card.model_dump_json(indent=2) + "\n", encoding="utf-8")
    check_merged(folder, {**weights, **base}, adapter.updates, job.scale, adapter.folder)


def check_merged(folder: Path, base: dict[str, Tensor], updates: Updates, scale: float, where: str | Path) -> None:
    """Check that a merged UNet is the base with the patch added, up to float32 rounding, and else the base exactly.

    Args:
        folder: the exported UNet.
        base: the base UNet's weights.
        updates: what the patch holds.
        scale: the patch's strength.
        where: named in the error.

    Raises:
        ValueError: for a weight that is missing, not the base's, or not the sum.
    """
    seen: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (no mapping)
                if key not in base:
                    raise ValueError(f"{where}: the merged UNet holds {key}, which the base has not.")
                seen.add(key)
                merged, expected = tensors.get_tensor(key).double(), base[key].double()
                module = key.removesuffix(".weight")
                rounding = 0.0
                if module in updates:
                    expected = expected + scale * updates[module].update()
                    rounding = torch.finfo(torch.float32).eps
                if not ((merged - expected).abs() <= rounding * expected.abs()).all():
                    raise ValueError(f"{where}: {key} of the merged UNet is not the base's with the patch added.")
    if missing := sorted(base.keys() - seen):
        raise ValueError(f"{where}: the merged UNet lacks {len(missing)} weights, first {missing[0]}.")


def _metadata(card: PatchCard) -> dict[str, str]:
    return {"format": "pt", CARD_KEY: card.model_dump_json()}


_WRITERS: dict[str, Callable[[Path, _Job], None]] = {
    "peft": _write_peft,
    "diffusers": _write_diffusers,
    "merged": _write_merged,
}
