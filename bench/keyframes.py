"""Films through keyframes, against the same keyframes as pairs one after another.

On films of the procedural worlds that no patch saw: five keyframes at uneven times in open films, three in closed ones,
which end where they began. Both ways are sampled by one sampler as it is meant to be used, from the same seed a film;
beside them stands the truth through the VAE, which nothing could be better than. A jump is how much the velocity of the
thing (of the camera, in degrees) changes from one frame to the next. Prints one table and saves it beside this file.
"""

from __future__ import annotations

import argparse
import logging
import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from trfpp import TimeReversalFusionPipeline
from trfpp.data_prep.likeness import psnr
from trfpp.data_prep.motion import motion_bucket, motion_score
from trfpp.data_prep.procedural import film
from trfpp.data_prep.worlds.film import Film
from trfpp.infer.statistics import paired_interval
from trfpp.infer.tracking import camera_path, track
from trfpp.train.appraise import reconstruct
from trfpp.trf.device import best_device

HELD_OUT = 100_000
"""Number of the first film: patches are trained on earlier ones."""
OPEN, OPEN_FRAMES = (0, 5, 11, 16, 22), 23
CLOSED, CLOSED_FRAMES = (0, 5, 12), 18
WAYS = ("truth through the VAE", "pairs", "film")
METRICS = ("inner PSNR, dB", "keyframes' PSNR, dB", "off by", "jump at keyframes", "jump elsewhere", "UNet calls")


@dataclass(frozen=True)
class World:
    """What is sampled."""

    name: str
    patch: Path | None

    @property
    def closed(self) -> bool:
        """Its films are."""
        return self.name == "loop"

    @property
    def times(self) -> tuple[int, ...]:
        """The keyframes."""
        return CLOSED if self.closed else OPEN

    @property
    def frames(self) -> int:
        """Of a film."""
        return CLOSED_FRAMES if self.closed else OPEN_FRAMES

    def film(self, index: int) -> Film:
        """A film; one that is closed repeats its first frame at its end."""
        return film(self.name, 1, index, self.frames + self.closed)

    def path(self, frames: np.ndarray, truth: Film, index: int) -> np.ndarray:
        """Where the thing or the camera is, `[F, 2]` pixels or `[F, 1]` degrees."""
        if truth.camera is not None:
            return camera_path(frames, self.name, 1, index, truth.camera)[:, None]
        assert truth.colour is not None
        return track(frames, truth.colour, truth.radius)


def measure(model: str, world: World, number: int, sampler: str) -> np.ndarray:
    """Metrics of all ways, `[films, ways, metrics]`."""
    pipe = TimeReversalFusionPipeline.from_pretrained(model).to(best_device())
    pipe.set_progress_bar_config(disable=True)
    if world.patch:
        pipe.load_patch(world.patch, "patch")
    rows = []
    for index in tqdm(range(HELD_OUT, HELD_OUT + number), desc=world.name, unit="film"):
        truth = world.film(index)
        true = truth.frames[: world.frames]
        keyframes = [Image.fromarray(true[time]) for time in world.times]
        told = {
            "sampler": sampler,
            "fps": truth.fps,
            "motion_bucket_id": motion_bucket(motion_score(truth.frames, truth.fps)),
            "output_type": "np",
        }
        generator = torch.Generator().manual_seed(index)
        ends = [*world.times, world.frames] if world.closed else world.times
        parts, calls = [], 0
        for segment, (start, end) in enumerate(pairwise(ends)):
            bounds = keyframes[segment], keyframes[(segment + 1) % len(keyframes)]
            made = pipe(*bounds, num_frames=end - start + 1, generator=generator, **told)
            parts.append(made.frames[0][:-1])
            calls += made.unet_calls
        pairs = np.concatenate([*parts, *([] if world.closed else [made.frames[0][-1:]])])
        whole = pipe.through(
            keyframes, world.times, film_frames=world.frames, closed=world.closed,
            generator=torch.Generator().manual_seed(index), **told,
        )  # fmt: skip
        rows.append([
            measured(world, index, truth, video, used)
            for video, used in (
                (reconstruct(pipe.vae, true[None])[0], 0),
                (as_bytes(pairs), calls),
                (as_bytes(whole.frames[0]), whole.unet_calls),
            )
        ])  # fmt: skip
    return np.array(rows)


def as_bytes(video: np.ndarray) -> np.ndarray:
    """Frames of 0 to 1 as uint8."""
    frames: np.ndarray = (video * 255).round().astype(np.uint8)
    return frames


def measured(world: World, index: int, truth: Film, frames: np.ndarray, calls: int) -> list[float]:
    """Metrics of one film, uint8 `[F, H, W, 3]`."""
    true = truth.frames[: world.frames]
    path = world.path(frames, truth, index)
    known = truth.camera[:, :1] if truth.camera is not None else truth.positions
    assert known is not None
    around = np.concatenate([path[-1:], path, path[:1]]) if world.closed else path
    jumps = np.linalg.norm(np.diff(around, 2, axis=0), axis=1)
    numbers = range(world.frames) if world.closed else range(1, world.frames - 1)  # of the frames that have one
    inner = [i for i in range(world.frames) if i not in world.times]
    return [
        float(np.mean([psnr(frames[i], true[i]) for i in inner])),
        float(np.mean([psnr(frames[i], true[i]) for i in world.times])),
        float(np.linalg.norm(path - known[: world.frames], axis=1)[inner].mean()),
        float(np.mean([jump for i, jump in zip(numbers, jumps) if i in world.times])),
        float(np.mean([jump for i, jump in zip(numbers, jumps) if i not in world.times])),
        float(calls),
    ]


def table(worlds: Sequence[World], results: Sequence[np.ndarray]) -> str:
    """Means of each way, and what the film has more than the pairs with its interval."""
    lines = [
        "| world | | " + " | ".join(METRICS[:-1]) + " | jump at keyframes / elsewhere | UNet calls |",
        "|" + " --- |" * 8,
    ]
    for world, rows in zip(worlds, results):
        kind = f"{world.name}, {'patched' if world.patch else 'base'}"
        for way, own in zip(WAYS, rows.transpose(1, 0, 2)):
            cells = [f"{own[:, column].mean():.2f}" for column in range(5)]
            ratio = own[:, 3].mean() / own[:, 4].mean()
            lines.append(f"| {kind} | {way} | {' | '.join(cells)} | {ratio:.2f} | {own[:, 5].mean():.0f} |")
        gains = []
        for column in range(5):
            pairs, film_ = (rows[:, WAYS.index(way), column].tolist() for way in ("pairs", "film"))
            gain = paired_interval(pairs, film_, "difference")
            gains.append(f"{gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]")
        lines.append(f"| | film - pairs | {' | '.join(gains)} | | |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worlds", nargs="+", help="world, or world=PATCH")
    parser.add_argument("--model", default="miniature", help="an SVD folder or a hub id (default: %(default)s)")
    parser.add_argument("--films", type=int, default=16, help="films of a world (default: %(default)s)")
    parser.add_argument("--sampler", default="trf++", help="trf++ or trf, with its own settings (default: %(default)s)")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    began = time.perf_counter()
    chosen = [
        World(name, Path(patch) if patch else None) for name, _, patch in (w.partition("=") for w in asked.worlds)
    ]
    found = [measure(asked.model, world, asked.films, asked.sampler) for world in chosen]
    spent = time.perf_counter() - began
    title = (
        f"{asked.model}, {asked.films} films a world, {asked.sampler}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads, torch {torch.__version__}, {date.today()}, {spent:.0f} s. "
        f"Open films: {OPEN_FRAMES} frames, keyframes at {OPEN}; closed ones (loop): {CLOSED_FRAMES}, at {CLOSED}. "
        "Windows of the model's own length; off by and jumps in pixels, of views in degrees; 95 % intervals."
    )
    text = f"{title}\n\n{table(chosen, found)}\n"
    print(text)
    (Path(__file__).parent / f"keyframes-{best_device().type}.md").write_text(text, encoding="utf-8")
