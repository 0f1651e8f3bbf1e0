"""What a pretrained miniature can do, measured on films it never saw.

Its autoencoder on every world; and image-to-video from one frame of base films, through diffusers' own pipeline:
whether it moves as much as the motion bucket and the frame rate ask for, and whether things keep colour and size.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from ..data_prep.likeness import psnr
from ..data_prep.motion import ORDINARY_MOTION, motion_bucket, motion_score
from ..data_prep.procedural import WORLDS, film
from ..data_prep.worlds.film import Film
from ..trf.base import model_location
from ..trf.replace import replacing
from ..trf.seeds import derived_seed
from .autoencoder import latents_of
from .figures import draw_conditioning, draw_curves, film_sheet

FIRST = 1_000_000
"""Number of the first film: far beyond those that any run trains on."""
BUCKETS = (10, 25, 40, 55, 70, 85, 100, 115)
BUCKETS_FPS = 12
"""Motion buckets asked for, up to the most that one in a thousand base films has, and the frame rate beside them."""
BEYOND = (145, 172, 200)
"""Buckets of more motion than any base film has."""
RATES = (6, 8, 10, 12, 16, 20, 24)
RATES_BUCKET = 50
"""Frame rates asked for, and the motion bucket beside them, which is one that base films have."""
SHOWN = 4
"""Films on the sheet of samples."""
VIVID = 0.6
"""Chroma of a pixel that counts as the thing's, over that of the thing's colour."""


@dataclass(frozen=True)
class Level:
    """Motion of the videos made at one level of a sweep, in percent of the frame's diagonal; means over films."""

    fps: float
    motion_bucket: float
    asked_per_second: float
    """What the bucket stands for."""
    per_second: float
    per_frame: float


@dataclass(frozen=True)
class Sweep:
    """How motion follows one of the conditions."""

    levels: list[Level]
    rank_correlation: float
    """Spearman's, of the condition with the mean flow: a frame for motion buckets, a frame and downwards for fps."""
    rank_correlation_of_films: float
    """The same within each film, mean over films."""


@dataclass(frozen=True)
class Keeping:
    """How the vivid thing of the last frame compares with that of the given one."""

    videos: int
    hue_error: float | None
    """Degrees between both mean hues, median over the videos that still have a thing; `None` if none has."""
    area_ratio: float
    """Vivid pixels of the last frame over those of the given one, median."""
    kept: float
    """Fraction of videos whose thing is within 20 degrees and between 2/3 and 3/2 of its area."""


def appraise(
    model: str | Path,
    output: Path,
    *,
    films: int,
    num_inference_steps: int,
    curves: Mapping[str, Path],
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, Any]:
    """Measure a model; nothing, if that is done.

    Args:
        model: see `model_location`; made for square frames, whose side and number its UNet's config says.
        output: folder to write: `appraisal.json`, and `reconstructions`, `samples`, `conditioned` (one first
            frame at every second level), `conditioning` and `curves` as PNG.
        films: number of films of every world, and of base films that videos are made of.
        num_inference_steps: denoising steps of a video; all else is the pipeline's default.
        curves: the training curves (CSV files) by the names of their stages.
        seed: of the films and of every draw.
        device: where the model runs.

    Returns:
        What `appraisal.json` holds.
    """
    file = output / "appraisal.json"
    if file.is_file():
        done: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return done
    from diffusers import StableVideoDiffusionPipeline

    pipeline = StableVideoDiffusionPipeline.from_pretrained(model_location(model), dtype=torch.float32).to(device)
    pipeline.set_progress_bar_config(disable=True)
    frames, side = pipeline.unet.config.num_frames, pipeline.unet.config.sample_size * pipeline.vae_scale_factor
    shown = {world: [film(world, seed, FIRST + i, frames, side) for i in range(films)] for world in WORLDS}
    rebuilt = {world: reconstruct(pipeline.vae, _stacked(those)) for world, those in shown.items()}
    maker = Animator(pipeline, shown["base"], num_inference_steps, seed)
    calls = len(BUCKETS) + len(BEYOND) + len(RATES) + SHOWN
    with tqdm(total=calls, desc="appraisal", unit="call", disable=None) as maker.bar:
        moved = [maker(BUCKETS_FPS, bucket) for bucket in BUCKETS]
        beyond = [maker(BUCKETS_FPS, bucket) for bucket in BEYOND]
        rated = [maker(rate, RATES_BUCKET) for rate in RATES]
        alike = maker.as_filmed(SHOWN)
    levels = [(BUCKETS_FPS, bucket) for bucket in BUCKETS], [(rate, RATES_BUCKET) for rate in RATES]
    of_bucket, of_fps = sweep(levels[0], moved, BUCKETS), sweep(levels[1], rated, [-rate for rate in RATES])
    every = (*BUCKETS, *BEYOND)
    of_every = sweep([(BUCKETS_FPS, bucket) for bucket in every], [*moved, *beyond], every)
    result = {
        "films": films,
        "num_inference_steps": num_inference_steps,
        "seed": seed,
        "autoencoder_psnr": {world: _likeness(shown[world], rebuilt[world]) for world in WORLDS},
        "motion_bucket": asdict(of_bucket),
        "motion_bucket_and_beyond": asdict(of_every),
        "fps": asdict(of_fps),
        "things": _plain(keeping(shown["base"], moved)),
        "things_beyond": _plain(keeping(shown["base"], beyond)),
        "things_of_true_films": _plain(keeping(shown["base"], [[one.frames for one in shown["base"]]])),
    }
    first = [(world, shown[world][0].frames, rebuilt[world][0]) for world in WORLDS]
    sampled = [(one.kind, one.frames, made) for one, made in zip(shown["base"], alike)]
    one = next((number for number, those in enumerate(shown["base"]) if those.positions is not None), 0)
    conditioned = [
        *((f"bucket {bucket}", made[one]) for bucket, made in list(zip(every, (*moved, *beyond)))[::2]),
        *((f"{rate} fps", made[one]) for rate, made in list(zip(RATES, rated))[::2]),
    ]
    with replacing(output) as beside:
        beside.mkdir()
        film_sheet(_rows(first, "rebuilt")).save(beside / "reconstructions.png", optimize=True)
        film_sheet(_rows(sampled, "sampled")).save(beside / "samples.png", optimize=True)
        film_sheet(conditioned).save(beside / "conditioned.png", optimize=True)
        draw_conditioning(of_every.levels, of_fps.levels, beside / "conditioning.png", learnt=BUCKETS[-1])
        draw_curves(curves, beside / "curves.png")
        (beside / file.name).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    return result


@torch.no_grad()
def reconstruct(vae: Any, frames: np.ndarray) -> np.ndarray:
    """What the autoencoder gives back of films, uint8 `[N, F, H, W, 3]`, from the posteriors' modes."""
    rebuilt = []
    for one in torch.from_numpy(frames):
        shown = vae.decode(latents_of(vae, one[None])[0], num_frames=len(one)).sample
        rebuilt.append(((shown.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(1, -1).cpu().numpy())
    return np.stack(rebuilt)


class Animator:
    """Image-to-video of the first frames of films, each with draws of its own, the same at every level."""

    def __init__(self, pipeline: Any, films: Sequence[Film], num_inference_steps: int, seed: int) -> None:
        self.pipeline, self.films, self.steps, self.seed = pipeline, films, num_inference_steps, seed
        self.bar: Any = None

    def __call__(self, fps: float, bucket: float, chosen: slice = slice(None)) -> np.ndarray:
        """Videos uint8 `[N, F, H, W, 3]` of the chosen films, in one batch."""
        numbers = range(len(self.films))[chosen]
        side = self.films[0].frames.shape[1]
        made = self.pipeline(
            [Image.fromarray(self.films[number].frames[0]) for number in numbers],
            height=side,  # or the pipeline would take SVD's 576 x 1024
            width=side,
            fps=fps,
            motion_bucket_id=bucket,
            num_inference_steps=self.steps,
            generator=[torch.Generator().manual_seed(derived_seed(self.seed, "appraisal", n)) for n in numbers],
            output_type="np",
        ).frames
        self.bar.update()
        videos: np.ndarray = (np.asarray(made) * 255).round().astype(np.uint8)
        return videos

    def as_filmed(self, count: int) -> list[np.ndarray]:
        """Videos of the first films, each at its own frame rate and motion bucket."""
        return [
            self(one.fps, motion_bucket(motion_score(one.frames, one.fps)), slice(number, number + 1))[0]
            for number, one in enumerate(self.films[:count])
        ]


def sweep(levels: Sequence[tuple[float, float]], videos: Sequence[np.ndarray], order: Sequence[float]) -> Sweep:
    """Motion of videos made at several levels.

    Args:
        levels: fps and motion bucket of each.
        videos: those made at each, `[N, F, H, W, 3]`, of the same films.
        order: what motion a frame should rise with, a number for each level.
    """
    per_frame = np.array([[motion_score(video, 1.0) for video in made] for made in videos])  # [levels, films]
    means = per_frame.mean(1)
    return Sweep(
        levels=[
            # The inverse of `motion_bucket`, whose scale is of motion a second.
            Level(fps, bucket, ORDINARY_MOTION * bucket / (255 - bucket), float(mean * fps), float(mean))
            for (fps, bucket), mean in zip(levels, means)
        ],
        rank_correlation=rank_correlation(order, means),
        rank_correlation_of_films=float(np.mean([rank_correlation(order, one) for one in per_frame.T])),
    )


def rank_correlation(one: Sequence[float] | np.ndarray, other: Sequence[float] | np.ndarray) -> float:
    """Spearman's rank correlation of values without ties."""
    first, second = (np.argsort(np.argsort(np.asarray(values))) for values in (one, other))
    return float(np.corrcoef(first, second)[0, 1])


def keeping(films: Sequence[Film], videos: Sequence[Iterable[np.ndarray]]) -> Keeping | None:
    """How well things keep hue and area to the last frame, in videos of films; those without a thing do not count.

    Grounds are dull and things vivid, so the thing is the pixels of enough chroma, whatever their hue.

    Args:
        films: whose first frame was given.
        videos: several of each film, `[levels][films]` of `[F, H, W, 3]`.

    Returns:
        `None` if no film has a thing.
    """
    hues, areas = [], []
    for made in videos:
        for one, video in zip(films, made):
            if one.colour is not None:
                threshold = VIVID * float(np.linalg.norm(one.colour - one.colour.mean()))
                (hue, area), (last_hue, last_area) = (_thing(frame, threshold) for frame in (one.frames[0], video[-1]))
                hues.append(abs((last_hue - hue + 180) % 360 - 180))
                areas.append(last_area / area)
    if not areas:
        return None
    errors, ratios = np.array(hues), np.array(areas)
    return Keeping(
        videos=len(areas),
        hue_error=float(np.nanmedian(errors)) if np.isfinite(errors).any() else None,
        area_ratio=float(np.median(ratios)),
        kept=float(np.mean((errors < 20) & (ratios > 2 / 3) & (ratios < 3 / 2))),
    )


def _thing(frame: np.ndarray, threshold: float) -> tuple[float, int]:
    """Hue in degrees (nan without a thing) and number of the pixels of more chroma than the threshold."""
    chroma = frame.astype(np.float64) - frame.mean(-1, keepdims=True)
    own = chroma[np.linalg.norm(chroma, axis=-1) > threshold]
    if not len(own):
        return float("nan"), 0
    red, green, blue = own.mean(0)
    return float(np.degrees(np.arctan2(np.sqrt(3) * (green - blue), 2 * red - green - blue))), len(own)


def _plain(kept: Keeping | None) -> dict[str, Any] | None:
    return None if kept is None else asdict(kept)


def _likeness(films: Sequence[Film], rebuilt: np.ndarray) -> dict[str, float]:
    each = [psnr(one.frames, made) for one, made in zip(films, rebuilt)]
    return {"mean": float(np.mean(each)), "worst": min(each)}


def _rows(pairs: Sequence[tuple[str, np.ndarray, np.ndarray]], made: str) -> list[tuple[str, np.ndarray]]:
    """Rows of a sheet: of each film the true frames under its name, and what was made of it."""
    return [row for name, truth, other in pairs for row in ((name, truth), (made, other))]


def _stacked(films: Sequence[Film]) -> np.ndarray:
    return np.stack([one.frames for one in films])
