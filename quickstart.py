"""The whole job on the miniature, in minutes on two CPU cores: clips, patch, videos with and without it, export."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from .configs.schema import (
    CheckpointSettings,
    ExportConfig,
    InferConfig,
    OptimSettings,
    QuickstartConfig,
    SamplerOverrides,
    TrainConfig,
    ValidationSettings,
)
from .data_prep.bounds import PAIRS_FOLDER, Pair, read_manifest, write_pairs
from .data_prep.dataset import prepare
from .data_prep.frames import load_image
from .data_prep.procedural import write_linear_world
from .infer.export import export
from .infer.generate import generate
from .infer.sheets import contact_sheet
from .train.loop import train
from .trf.replace import replacing

MODEL = "miniature"
SIZE = 64
FRAMES = 12
FPS = 8.0


def quickstart(config: QuickstartConfig) -> dict[str, Path]:
    """Run the main job, saying what is done, and print where everything lies; a finished step is not done again.

    Returns:
        What was made, by name.
    """
    root = config.output
    _say(1, "clips: things that travel along their front, written as video files and cut as real footage would be")
    videos = root / "videos"
    if not videos.exists():
        with replacing(videos) as beside:
            beside.mkdir(parents=True)
            write_linear_world(
                beside, count=24, seed=config.seed, num_frames=2 * FRAMES + 1, fps=FPS, size=(SIZE, SIZE)
            )
    report = prepare(videos, root / "data", fps=FPS, num_frames=FRAMES, height=SIZE, width=SIZE, holdout=0.5)
    print(report.summary())
    pair = read_manifest(write_pairs(root / "data", root / "data" / PAIRS_FOLDER))[0]

    _say(2, f"a LoRA patch for the {MODEL}, {config.steps} steps")
    patch = train(
        TrainConfig(
            model=MODEL,
            data=root / "data",
            output=root / "train",
            domain="a textured thing that travels along its front",
            steps=config.steps,
            seed=config.seed,
            loader_workers=0,
            optim=OptimSettings(lr=1e-3, warmup_steps=10, schedule="cosine"),
            checkpoint=CheckpointSettings(every=50, keep=1),
            validation=ValidationSettings(every=0),
        )
    )

    _say(3, "from the first to the last frame of a held-out clip, without and with the patch")
    base = _generate(pair, root / "base", [])
    patched = _generate(pair, root / "patched", [patch])
    sheet = root / "contact_sheet.png"
    _draw(pair, base, patched, sheet)

    _say(4, "an export for other tools, read back and checked")
    exported = export(
        ExportConfig(patch=patch, output=root / "patch.safetensors", format="diffusers", model=MODEL, overwrite=True)
    )
    made = {
        "patch": patch,
        "base video": base / "video.mp4",
        "patched video": patched / "video.mp4",
        "contact sheet": sheet,
        "TensorBoard log": root / "train" / "log",
        "export": exported,
    }
    print("\nMade:")
    for name, path in made.items():
        print(f"  {name:<16} {path}")
    print(
        "\nThe miniature's weights are random, so its pictures are noise: the steps are real, the model is not.\n"
        f"Look at the log with: tensorboard --logdir {root / 'train'}"
    )
    return made


def _say(number: int, what: str) -> None:
    print(f"\n[{number}/4] {what}", flush=True)


def _generate(pair: Pair, output: Path, patches: list[Path]) -> Path:
    sampler = SamplerOverrides(
        height=SIZE,
        width=SIZE,
        num_frames=FRAMES,
        fps=pair.fps,
        motion_bucket_id=pair.motion_bucket_id,
        num_inference_steps=30,
    )
    (folder,) = generate(
        InferConfig(model=MODEL, start=pair.start, end=pair.end, output=output, patches=patches, sampler=sampler)
    )
    return folder


def _draw(pair: Pair, base: Path, patched: Path, sheet: Path) -> None:
    def frames(folder: Path) -> np.ndarray:
        return np.stack([np.asarray(load_image(file)) for file in sorted(folder.glob("*.png"))])

    assert pair.truth is not None
    truth = frames(pair.truth)
    columns = {
        "start": truth[:1],
        "base": frames(base / "frames"),
        "patched": frames(patched / "frames"),
        "ground truth": truth,
        "end": truth[-1:],
    }
    contact_sheet(columns, rows=6).save(sheet)
