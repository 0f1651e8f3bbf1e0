"""Validation in the loop: what training is for, bounded generation between held-out frames, and the held-out loss.

Runs the same pipeline as inference on the live UNet, each adapter on the half it is trained for. VAE and CLIP are
loaded on first use and kept off the device between validations.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch

from ..data_prep.dataset import clip_frames
from ..data_prep.likeness import psnr
from ..data_prep.motion import motion_ratio
from ..data_prep.writing import write_video
from ..trf.base import load_component
from ..trf.patch import PatchCard
from ..trf.pipeline import TimeReversalFusionPipeline
from ..trf.settings import USUAL
from ..trf.strategies import STRATEGIES
from .data import CachedSamples, collate
from .objective import Objective

LOSS_SAMPLES = 16


@dataclass(frozen=True)
class Outcome:
    """Result of one validation."""

    metrics: dict[str, float]
    """Scalars, means over the pairs."""
    pictures: dict[str, PIL.Image.Image]
    """By clip: truth above, generation below, evenly spaced frames from start to end."""
    videos: dict[str, np.ndarray]
    """By clip: truth above, generation below, uint8 `[F, 2 H, W, 3]`."""
    fps: dict[str, float]
    """Frames per second of each video."""


def strip(rows: Sequence[np.ndarray], columns: int = 7) -> PIL.Image.Image:
    """Videos `[F, H, W, 3]` uint8 as rows of evenly spaced frames."""
    picks = np.unique(np.linspace(0, len(rows[0]) - 1, columns).round().astype(int))
    return PIL.Image.fromarray(np.concatenate([np.concatenate(list(row[picks]), axis=1) for row in rows]))


class Validator:
    """Samples held-out pairs through TRF with the patch as it is.

    Args:
        model: base model, of which VAE, CLIP tower and scheduler are used.
        revision: of a hub model.
        variant: file variant of a hub model.
        card: of the patch, which is sampled as it says.
        clips: rows of the dataset's validation split to join the ends of.
        samples: held-out samples for the loss.
        num_inference_steps: denoising steps.
        decode_chunk_size: frames decoded at a time.
        seed: of the sampler's draws.
        dtype: of the UNet's inputs, and of VAE and CLIP.
        device: where to run.
    """

    def __init__(
        self,
        *,
        model: str,
        revision: str | None,
        variant: str | None,
        card: PatchCard,
        clips: Sequence[dict[str, Any]],
        samples: CachedSamples,
        num_inference_steps: int,
        decode_chunk_size: int,
        seed: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.source = dict(revision=revision, variant=variant)
        self.model = model
        self.card = card
        self.clips = clips
        self.samples = samples
        self.num_inference_steps = num_inference_steps
        self.decode_chunk_size = decode_chunk_size
        self.seed = seed
        self.dtype = dtype
        self.device = device
        self._companions: dict[str, Any] = {}

    def run(self, unet: Any, stopping: Callable[[], bool] = lambda: False) -> Outcome | None:
        """Validate the (unwrapped) UNet with its adapter; leaves it in training mode.

        Returns:
            The outcome; `None` if there is nothing held out, or once `stopping()` says so between two samplings.
        """
        if not self.clips:
            return None
        unet.eval()
        try:
            pipe = self._pipeline(unet)
            pictures: dict[str, PIL.Image.Image] = {}
            videos: dict[str, np.ndarray] = {}
            measured: dict[str, list[float]] = {
                name: [] for name in ("inner_psnr", "bound_psnr", "disagreement", "motion_ratio")
            }  # not every sampler sees both halves at once, nor does every film move
            for clip in self.clips:
                if stopping():
                    return None
                truth = clip_frames(clip)
                video, apart = self._generate(pipe, clip, truth)
                pictures[clip["clip_id"]] = strip([truth, video])
                videos[clip["clip_id"]] = np.concatenate([truth, video], axis=1)
                measured["inner_psnr"].append(psnr(video[1:-1], truth[1:-1]))
                measured["bound_psnr"].append(psnr(video[[0, -1]], truth[[0, -1]]))
                if apart is not None:
                    measured["disagreement"].append(apart)
                if (moved := motion_ratio(video, truth)) is not None:
                    measured["motion_ratio"].append(moved)
            metrics = {name: float(np.mean(values)) for name, values in measured.items() if values}
            fps = {clip["clip_id"]: clip["fps"] for clip in self.clips}
            self._put_away()
            return Outcome(self._losses(unet) | metrics, pictures, videos, fps)
        finally:
            self._put_away()
            unet.train()

    def _put_away(self) -> None:
        """Take VAE and CLIP off the device."""
        for name in ("vae", "image_encoder"):
            if name in self._companions:
                self._companions[name].to("cpu")

    @torch.no_grad()
    def _losses(self, unet: Any) -> dict[str, float]:
        """Held-out loss on the same few draws every time; for two adapters also that of each, and the fused one."""
        objective = Objective(direction=self.card.direction, dtype=self.dtype, rotated=self.card.rotated_attention)
        rows, fused = [], []
        for n in range(LOSS_SAMPLES):
            batch = collate(self.samples.__getitems__([n])).to(self.device)
            with objective.losses(unet, unet, batch, 0) as losses:
                rows.append(losses.rows)
                fused.append(losses.fused)
        means = {"loss": float(torch.cat(rows).mean())}
        if self.card.direction == "both":
            forward, backward = torch.stack(rows).mean(0)
            means |= {"loss_forward": float(forward), "loss_backward": float(backward)}
            means["loss_fused"] = float(torch.cat([one for one in fused if one is not None]).mean())
        return means

    def _pipeline(self, unet: Any) -> TimeReversalFusionPipeline:
        for name in ("vae", "image_encoder", "feature_extractor", "scheduler"):
            if name not in self._companions:
                self._companions[name] = load_component(self.model, name, dtype=self.dtype, **self.source)
        pipe = TimeReversalFusionPipeline(unet=unet, **self._companions)
        for name in ("vae", "image_encoder"):
            self._companions[name].to(self.device)
        pipe.set_progress_bar_config(disable=True)
        pipe.cards = {"default": self.card}
        return pipe

    def _generate(
        self, pipe: TimeReversalFusionPipeline, clip: dict[str, Any], truth: np.ndarray
    ) -> tuple[np.ndarray, float | None]:
        """The video between a clip's bounds, and how far its halves disagreed where the sampler sees both at once."""
        sampler = self.card.sampler.get("sampler", USUAL)
        start, end = (PIL.Image.fromarray(truth[i]) for i in (0, -1))
        made = pipe(
            start,
            end,
            height=truth.shape[1],
            width=truth.shape[2],
            num_frames=len(truth),
            num_inference_steps=self.num_inference_steps,
            fps=clip["fps"],
            motion_bucket_id=clip["motion_bucket"],
            generator=torch.Generator().manual_seed(self.seed),
            # Beside the optimizer there is less room than at inference.
            low_memory=not (self.card.rotated_attention or STRATEGIES[sampler].rotated),
            decode_chunk_size=self.decode_chunk_size,
            output_type="np",
        )
        apart = None if made.disagreement is None else float(made.disagreement[0])
        return np.asarray((made.frames[0] * 255).round(), dtype=np.uint8), apart


def save_pictures(outcome: Outcome, folder: Path) -> None:
    """Write the pictures as PNG files and the videos as MP4 files into `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in outcome.pictures.items():
        picture.save(folder / f"{name}.png")
        write_video(folder / f"{name}.mp4", outcome.videos[name], outcome.fps[name])
