"""How long other samplers take where ours is as good: each as published, against the fewest steps of trf++.

On held-out films of a procedural world, of which the bounds are given. As good is what has no less PSNR in the inner
frames and is no less sharp, in the mean. All ways make a film before the next one's turn, each from the same noise, so
a machine whose speed drifts favours none. Prints one table and saves it beside this file.
"""

from __future__ import annotations

import argparse
import logging
import platform
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from trfpp import TimeReversalFusionPipeline
from trfpp.data_prep.motion import motion_bucket, motion_score
from trfpp.data_prep.procedural import film
from trfpp.infer.metrics import inner_psnr, sharpness_ratio
from trfpp.infer.statistics import paired_interval
from trfpp.trf.base import hide_loading_bars
from trfpp.trf.device import best_device
from trfpp.trf.strategies import STRATEGIES

HELD_OUT = 100_000
"""Number of the first film: patches are trained on earlier ones."""
OURS, STEPS = "trf++", (2, 3, 4, 6, 8, 12)


@dataclass
class Made:
    """What one way made of the films."""

    calls: int = 0
    """UNet calls of a film."""
    seconds: list[float] = field(default_factory=list)
    psnr: list[float] = field(default_factory=list)
    """Of inner frames, dB."""
    sharpness: list[float] = field(default_factory=list)
    """Over the truth's."""

    def is_as_good_as(self, other: Made) -> bool:
        """No worse in the mean, by either measure."""
        return all(
            statistics.mean(own) >= statistics.mean(theirs)
            for own, theirs in ((self.psnr, other.psnr), (self.sharpness, other.sharpness))
        )


def measure(model: str, world: str, patch: Path | None, films: int) -> tuple[dict[str, Made], dict[int, Made]]:
    """Every other sampler by name, and ours by its number of steps."""
    hide_loading_bars()
    pipe = TimeReversalFusionPipeline.from_pretrained(model).to(best_device())
    pipe.set_progress_bar_config(disable=True)
    if patch:
        pipe.load_patch(patch, "patch")
    others: dict[str, Made] = {name: Made() for name in STRATEGIES if name not in (OURS, "trf-reference")}
    ours = {steps: Made() for steps in STEPS}
    ways: list[tuple[Made, dict[str, Any]]] = [
        *((made, {"sampler": name}) for name, made in others.items()),
        *((made, {"sampler": OURS, "num_inference_steps": steps}) for steps, made in ours.items()),
    ]
    bounds = [Image.new("RGB", (64, 64))] * 2
    pipe(*bounds, num_inference_steps=1, generator=torch.Generator().manual_seed(0))  # warms up
    bar = tqdm(total=films * len(ways), unit="video")
    for index in range(HELD_OUT, HELD_OUT + films):
        truth = film(world, 1, index)
        told = {"fps": truth.fps, "motion_bucket_id": motion_bucket(motion_score(truth.frames, truth.fps))}
        for made, settings in ways:
            began = time.perf_counter()
            out = pipe(
                *(Image.fromarray(truth.frames[at]) for at in (0, -1)), **told, **settings,
                generator=torch.Generator().manual_seed(index), output_type="np",
            )  # fmt: skip
            made.seconds.append(time.perf_counter() - began)
            frames = (out.frames[0] * 255).round().astype(np.uint8)
            sharpness = sharpness_ratio(frames, truth.frames)
            assert sharpness is not None
            made.calls = out.unet_calls
            made.psnr.append(inner_psnr(frames, truth.frames))
            made.sharpness.append(sharpness)
            bar.update()
    bar.close()
    return others, ours


def table(others: Mapping[str, Made], ours: Mapping[int, Made]) -> str:
    """Ours by its steps, and every other sampler against the fewest of them that are as good."""

    def cells(made: Made) -> list[str]:
        means = (statistics.mean(values) for values in (made.psnr, made.sharpness))
        return [f"{made.calls}", f"{statistics.median(made.seconds):.2f}", *(f"{mean:.2f}" for mean in means)]

    head = ["sampler", "UNet calls", "s a pair", "PSNR, dB", "sharpness"]
    rows = [[f"{OURS}, {steps} steps", *cells(made), "", "", ""] for steps, made in ours.items()]
    for name, other in others.items():
        steps = next((steps for steps, made in ours.items() if made.is_as_good_as(other)), None)
        said = ["none", "", ""] if steps is None else against(other, ours[steps], steps)
        rows.append([name, *cells(other), *said])
    head += [f"as good: {OURS} of", "its PSNR more, dB", "times as fast"]
    return "\n".join(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows))


def against(other: Made, own: Made, steps: int) -> Sequence[str]:
    """What ours of so many steps has more, and how much faster it is."""
    gain = paired_interval(other.psnr, own.psnr)
    ratios = [theirs / mine for theirs, mine in zip(other.seconds, own.seconds)]
    return [
        f"{steps} steps",
        f"{gain.value:+.2f} [{gain.low:+.2f}, {gain.high:+.2f}]",
        f"{statistics.median(ratios):.1f} ({min(ratios):.1f} to {max(ratios):.1f})",
    ]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("worlds", nargs="+", help="world, or world=PATCH")
    parser.add_argument("--model", default="miniature", help="an SVD folder or a hub id (default: %(default)s)")
    parser.add_argument("--films", type=int, default=8, help="films (default: %(default)s)")
    asked = parser.parse_args()
    logging.disable(logging.WARNING)
    kind = best_device().type
    machine = (
        torch.cuda.get_device_name() if kind == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    text = (
        f"{asked.model}, {asked.films} films a world, {machine}, torch {torch.__version__}, {date.today()}. "
        "Seconds are medians of films; intervals of 95 %."
    )
    for world, _, patch in (one.partition("=") for one in asked.worlds):
        made = measure(asked.model, world, Path(patch) if patch else None, asked.films)
        text += f"\n\n{world}, {'patched' if patch else 'base'}:\n\n{table(*made)}"
    print(text)
    (Path(__file__).parent / f"quality-{kind}.md").write_text(text + "\n", encoding="utf-8")
