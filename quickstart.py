"""The whole job on the miniature, in minutes on two CPU cores: films, a patch, and what it gains, measured; export."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from .configs.schema import EvaluateConfig, ExportConfig, InferConfig, QuickstartConfig, SamplerOverrides
from .configs.training import (
    CheckpointSettings,
    LoraSettings,
    ObjectiveSettings,
    OptimSettings,
    TrainConfig,
    ValidationSettings,
)
from .data_prep.bounds import PAIRS_FOLDER, Pair, read_manifest, write_pairs
from .data_prep.dataset import prepare
from .data_prep.frames import load_image
from .data_prep.procedural import TRUTH_FILE, holds_films, write_world
from .infer.compare import compare
from .infer.evaluate import evaluate
from .infer.export import export
from .infer.generate import generate
from .infer.sheets import contact_sheet, moving_sheet, save_animation
from .train.loop import train

MODEL = "miniature"
WORLD = "linear"
CLIPS = 96
BATCH_SIZE = 4
HELD_OUT = 100_000
"""Number of the first film that is kept from training."""
OBJECTIVE = ObjectiveSettings(sigma_mean=2.5, sigma_std=1.2, fusion=0.5)
"""More noise than SVD's own training: where things go is decided there, and a short training has no steps to spare; and
half of the loss on what TRF makes of both directions."""


def quickstart(config: QuickstartConfig) -> dict[str, Path]:
    """Run the main job, saying what is done, and print where everything lies; a finished step is not done again.

    Returns:
        What was made, by name.

    Raises:
        ValueError: if the output is of another seed, or of other numbers of steps or pairs.
    """
    root = config.output
    _say(1, "films: things that travel along their front, written as video files and cut as real footage would be")
    training = _films(root / "films", root / "data", first=0, count=CLIPS, seed=config.seed, holdout=0.0)
    held_out = _films(
        root / "held_out", root / "pairs", first=HELD_OUT, count=config.pairs, seed=config.seed, holdout=1.0
    )
    pairs = read_manifest(write_pairs(held_out, held_out / PAIRS_FOLDER))

    _say(2, f"a patch for the {MODEL}: one adapter for either direction of time, {config.steps} steps")
    patch = train(
        TrainConfig(
            model=MODEL,
            data=training,
            output=root / "train",
            domain="a thing that travels along its front",
            direction="both",
            steps=config.steps,
            batch_size=BATCH_SIZE,
            seed=config.seed,
            loader_workers=0,
            lora=LoraSettings(targets="all", rank=16, alpha=16),
            optim=OptimSettings(lr=4e-3, warmup_steps=10, schedule="cosine"),
            objective=OBJECTIVE,
            checkpoint=CheckpointSettings(every=50, keep=1),
            validation=ValidationSettings(every=0),
        )
    )

    _say(3, f"what it gains: {len(pairs)} held-out pairs, with and without it")
    for name, patches in (("base", []), ("patched", [patch])):
        evaluate(
            EvaluateConfig(
                model=MODEL,
                data=held_out,
                truth=root / "held_out" / TRUTH_FILE,
                output=root / name,
                patches=patches,
                batch=8,
                seed=config.seed,
            )
        )
    gained = compare(root / "base", root / "patched")
    print(f"\n{gained}")

    _say(4, "one of them as a video, and an export for other tools, read back and checked")
    videos = {
        name: _generate(pairs[0], root / f"video_{name}", patches)
        for name, patches in (("base", []), ("patched", [patch]))
    }
    sheet, moving = root / "contact_sheet.png", root / "in_motion.webp"
    _draw(pairs[0], videos, sheet, moving)
    exported = export(ExportConfig(patch=patch, output=root / "peft", format="peft", model=MODEL, overwrite=True))
    made = {
        "patch": patch,
        "base video": videos["base"] / "video.mp4",
        "patched video": videos["patched"] / "video.mp4",
        "contact sheet": sheet,
        "in motion": moving,
        "TensorBoard log": root / "train" / "log",
        "export": exported,
    }
    print("\nMade:")
    for name, path in made.items():
        print(f"  {name:<16} {path}")
    seconds = _seconds(root / "train" / "log")
    psnr, track = gained.metrics["inner_psnr"].contrast, gained.metrics["track_pixels"]
    print(
        f"\nTraining took {seconds:.0f} s for {config.steps} steps.\n"
        f"The patch brought the frames between the bounds {psnr.value:+.2f} dB closer to the truth (95 % interval "
        f"{psnr.low:+.2f} to {psnr.high:+.2f}),\nand the thing in them from {track.a.value:.1f} to {track.b.value:.1f} "
        f"pixels off its true way, in frames of 64 x 64.\n"
        f"Look at the log with: tensorboard --logdir {root / 'train'}"
    )
    return made


def _say(number: int, what: str) -> None:
    print(f"\n[{number}/4] {what}")


def _films(films: Path, data: Path, *, first: int, count: int, seed: int, holdout: float) -> Path:
    if not films.exists():
        write_world(films, WORLD, count=count, seed=seed, first=first)
    elif not holds_films(films, WORLD, count=count, seed=seed, first=first):
        raise ValueError(f"{films}: not the {count} films of seed {seed}; choose another output, or remove this one.")
    report = prepare(films, data, fps=None, num_frames=12, height=64, width=64, holdout=holdout, cut_threshold=255.0)
    print(report.summary())
    return data


def _generate(pair: Pair, output: Path, patches: list[Path]) -> Path:
    sampler = SamplerOverrides(
        height=64, width=64, num_frames=pair.num_frames, fps=pair.fps, motion_bucket_id=pair.motion_bucket_id
    )
    (folder,) = generate(
        InferConfig(model=MODEL, start=pair.start, end=pair.end, output=output, patches=patches, sampler=sampler)
    )
    return folder


def _seconds(log: Path) -> float:
    """Of all the training's steps, whichever call took them; loading, encoding and saving are no training."""
    logging.getLogger("tensorboard").setLevel(logging.WARNING)  # else it names each file that it reads
    seconds, before = 0.0, 0
    for one in EventAccumulator(str(log)).Reload().Scalars("train/clips per second"):
        seconds += (one.step - before) * BATCH_SIZE / one.value
        before = one.step
    return seconds


def _draw(pair: Pair, videos: dict[str, Path], sheet: Path, moving: Path) -> None:
    """The videos beside the truth, as a picture and as an animation for the browser."""
    assert pair.truth is not None
    truth = _frames(pair.truth)
    columns = {**{name: _frames(folder / "frames") for name, folder in videos.items()}, "ground truth": truth}
    contact_sheet({"start": truth[:1], **columns, "end": truth[-1:]}, rows=6).save(sheet)
    save_animation(moving, moving_sheet({"": columns}), fps=8)


def _frames(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(load_image(file)) for file in sorted(folder.glob("*.png"))])
