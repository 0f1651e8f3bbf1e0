"""Patches of a pipeline: loading, mixing, fusing and unloading them, and the settings they recommend."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from . import adapters
from .adapters import Scale
from .fusing import fuse, unfuse
from .patch import Calibration, PatchCard, adapter_scales, adapters_of, load_patch
from .settings import SamplerSettings
from .two_unets import TwoUNets

logger = logging.getLogger(__name__)


class PatchesMixin:
    """What a pipeline with a `unet` needs to use patches; `cards` holds the card of each that is loaded."""

    unet: Any
    cards: dict[str, PatchCard]

    def load_patch(self, path: str | Path, name: str | None = None, scale: Scale = 1.0) -> PatchCard:
        """Load a patch folder and make it active beside those already active.

        Args:
            path: patch folder.
            name: name to address it by; the folder's name by default. Dots become underscores.
            scale: 1 is the patch as trained, 0 is the base model; a pair is for the forward and the backward half. A
                number is for the halves the patch is meant for: the backward one if it was trained backward, both
                otherwise, and of a patch trained in `both` directions each adapter acts on its own half.

        Raises:
            FileNotFoundError: if the folder is no patch.
            ValueError: if it does not fit the model, with what differs, or the name is taken.
        """
        name = _module_name(name or Path(path).resolve().name)
        if isinstance(self.unet, TwoUNets):
            raise ValueError("this model has a UNet for either direction, and patches are for models with one.")
        if any(parameter.is_meta for parameter in self.unet.parameters()):
            raise ValueError("load patches before enable_sequential_cpu_offload(): the UNet's weights are away now.")
        if adapters.is_fused(self.unet):
            raise ValueError("patches are fused into the weights; call unfuse_patches() first.")
        self.cards[name] = load_patch(self.unet, path, name, scale)
        return self.cards[name]

    def set_patches(self, scales: Mapping[str, Scale] | Sequence[str]) -> None:
        """Make exactly these patches active, each at its scale (a plain list means scale 1), see `load_patch`.

        Raises:
            ValueError: for a patch that is not loaded, or a scale that is neither a number nor a pair.
        """
        wanted: dict[str, Scale] = {}
        for name, scale in (scales if isinstance(scales, Mapping) else dict.fromkeys(scales, 1.0)).items():
            name = _module_name(name)
            card = self.cards.get(name)
            # An adapter may have come with the UNet, without a card.
            wanted |= adapter_scales(card.direction, name, scale) if card else {name: scale}
        adapters.set_scales(self.unet, wanted)

    @property
    def patch_scales(self) -> dict[str, tuple[float, float]]:
        """The active patches and their scales on the forward and on the backward half."""
        scales: dict[str, tuple[float, float]] = {}
        for adapter, scale in adapters.active_scales(self.unet).items():
            name = adapter.partition("/")[0]
            (f, b), (forward, backward) = scales.get(name, (0.0, 0.0)), adapters.scale_pair(scale)
            scales[name] = (f + forward, b + backward)
        return scales

    def unload_patches(self, names: Sequence[str] | None = None) -> None:
        """Take patches out (all by default). The base model is then as it was, to the bit unless patches were fused.

        Raises:
            ValueError: for a patch that is not loaded, or while patches are fused.
        """
        for name in map(_module_name, list(self.cards) if names is None else names):
            card = self.cards.get(name)
            adapters.remove_adapters(self.unet, adapters_of(card.direction, name).values() if card else [name])
            self.cards.pop(name, None)

    def fuse_patches(self) -> None:
        """Add the active patches to the model's weights, so that they cost nothing per step.

        A layer on whose halves patches act differently, as a pair of adapters does, holds weights for either then.

        Raises:
            ValueError: if none is active, they are fused already, or the weights are offloaded one by one.
        """
        fuse(self.unet)

    def unfuse_patches(self) -> None:
        """Undo `fuse_patches`, up to rounding: that of the base's precision, which in half precision shows."""
        unfuse(self.unet)

    def check_patches(self, settings: SamplerSettings) -> None:
        """Whether the active patches work here, and can follow `patch_schedule` and `patch_frames`.

        Raises:
            ValueError: while patches are to change and are fused, or while weights are away that other patches than
                plain LoRAs act on.
        """
        away = any(parameter.is_meta for parameter in self.unet.parameters())
        if (
            away
            and not adapters.is_fused(self.unet)
            and not all(
                adapters.is_plain(layer, name)
                for _, layer in adapters.lora_layers(self.unet)
                for name in adapters.acting(layer)
            )
        ):
            raise ValueError(
                "enable_sequential_cpu_offload() takes the weights away that a DoRA, LoHa or LoKr patch acts on; use "
                "enable_model_cpu_offload()."
            )
        for name in settings.patch_points:
            if adapters.is_fused(self.unet):
                raise ValueError(f"patches are fused into the weights, which no {name} can change; unfuse them.")
            if not self.patch_scales:
                logger.warning("%s has no effect: no patch is active.", name)

    @property
    def rotated_attention(self) -> bool:
        """Whether an active patch was trained with rotated temporal attention on the backward half."""
        return any(
            self.cards[name].rotated_attention
            for name, (_, backward) in self.patch_scales.items()
            if name in self.cards and backward
        )

    @property
    def recommended(self) -> dict[str, Any]:
        """Sampler settings that an active patch recommends; of several patches, the one loaded last decides.

        Cards are not mixed: the steps and the guidance of one are for the sampler that it names, or for the usual one.
        """
        cards = [card for name in self.patch_scales if (card := self.cards.get(name))]
        if not cards:
            return {}
        card = cards[-1]
        recommended = dict(height=card.height, width=card.width, num_frames=card.num_frames, fps=card.fps)
        if card.motion:
            recommended["motion_bucket_id"] = card.motion.motion_bucket_median
        return recommended | card.sampler

    @property
    def calibration(self) -> Calibration | None:
        """What the active patches' cards know of fps and motion for a pair; of several that do, the last one's."""
        known = [card.calibration for name in self.patch_scales if (card := self.cards.get(name))]
        return next((one for one in reversed(known) if one is not None), None)


def _module_name(name: str) -> str:
    """A patch's name as PyTorch can have it among those of modules."""
    return name.replace(".", "_")
