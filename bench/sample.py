"""Bounded generation of a few pairs: ours, against the way TRF's release works, and all samplers against each other.

MODEL is `miniature`, `svd-xt` (full size, random weights), an SVD folder or a hub id. Both ways are `trfpp infer` on a
manifest, from images to files. The release's way: one pair at a time, so that the model is loaded anew for every pair
and its result is written before the next one begins, and each direction has a forward pass of its own. Ours: all pairs
at once, both directions in one pass. Settings, pairs and draws are equal. Every run is a process of its own; the ways
alternate, and ratios are taken run by run, so a machine whose speed drifts does not favour one. Prints one table and
saves it beside this file.
"""

from __future__ import annotations

import argparse
import io
import json
import logging
import multiprocessing
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from pathlib import Path
from typing import TypeVar
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from trfpp import TimeReversalFusionPipeline
from trfpp.bench import svd_xt
from trfpp.configs.schema import InferConfig, SamplerOverrides
from trfpp.infer import generate as generating
from trfpp.infer.models import load_pipeline, outline_of
from trfpp.infer.record import read_record
from trfpp.trf import pipeline
from trfpp.trf.base import hide_loading_bars
from trfpp.trf.denoiser import BoundedDenoiser
from trfpp.trf.device import best_device, peak_memory
from trfpp.trf.strategies import STRATEGIES

T = TypeVar("T")

RELEASE, OURS = "the release's way", "ours"
SHARES, MEMORY = ("UNet", "VAE", "CLIP", "rest"), "peak memory, GiB"


@dataclass
class Spent:
    """Seconds of one run."""

    total: float = 0.0
    """From the manifest to the last file."""
    load: list[float] = field(default_factory=list)
    """Of these, each time from the manifest to a loaded model."""
    pairs: list[float] = field(default_factory=list)
    """Of each pair from its images to its frames, by its record."""
    parts: dict[str, float] = field(default_factory=lambda: {"UNet": 0.0, "VAE": 0.0, "CLIP": 0.0})
    """In the networks."""
    calls: int = 0
    """UNet calls of a pair."""
    forwards: int = 0
    """Forward passes of the UNet that they were made in."""
    memory: int = 0
    """Bytes at the most: allocated on a GPU, else of the process."""

    @property
    def shares(self) -> dict[str, float]:
        """Of the time in which no model is loaded: the networks', and the rest, which is everything else."""
        whole = self.total - sum(self.load)
        shares = {name: seconds / whole for name, seconds in self.parts.items()}
        return {**shares, "rest": 1 - sum(shares.values())}


def now() -> float:
    """Seconds, after the device has done what it was asked for."""
    if best_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def watch(pipe: TimeReversalFusionPipeline, spent: Spent) -> None:
    """Note the time of the networks."""
    began: dict[torch.nn.Module, float] = {}
    parts = [("UNet", pipe.unet), ("VAE", pipe.vae.encoder), ("VAE", pipe.vae.decoder), ("CLIP", pipe.image_encoder)]
    for name, module in parts:

        def before(module: torch.nn.Module, _: object) -> None:
            began[module] = now()

        def after(module: torch.nn.Module, *_: object, name: str = name) -> None:
            spent.parts[name] += now() - began[module]

        module.register_forward_pre_hook(before)
        module.register_forward_hook(after)


def load(spent: Spent, began: float, config: InferConfig) -> TimeReversalFusionPipeline:
    """The pipeline, watched; notes how long it took since a time."""
    pipe = load_pipeline(config)
    watch(pipe, spent)
    spent.load.append(now() - began)
    return pipe


def write_pairs(folder: Path, pairs: int, size: tuple[int, int]) -> list[dict[str, object]]:
    """Images of noise, and the lines of a manifest: sampling takes as long whatever they show."""
    rows: list[dict[str, object]] = []
    for number in range(pairs):
        noise = np.random.default_rng(number).integers(0, 255, (2, *size, 3), dtype=np.uint8)
        names = {bound: f"{number}-{bound}.png" for bound in ("start", "end")}
        for name, image in zip(names.values(), noise):
            Image.fromarray(image).save(folder / name)
        rows.append({"id": f"pair{number}", "seed": number, **names})
    return rows


def one_direction_at_a_time(**own: object) -> BoundedDenoiser:
    """The pipeline's denoiser; the two rows of a direction, with conditions and without, have a pass of their own."""
    return BoundedDenoiser(**{**own, "rows_per_forward": 2})


def run(model: str, way: str, sampler: str, pairs: int, steps: int | None, compiled: bool = False) -> Spent:
    """Generate some pairs one way, in this process."""
    logging.disable(logging.WARNING)
    hide_loading_bars()
    spent = Spent()
    with tempfile.TemporaryDirectory() as name, ExitStack() as contexts:
        folder = Path(name)
        manifest = folder / "pairs.jsonl"
        config = InferConfig(
            model=model,
            manifest=manifest,
            output=folder / "out",
            sampler=SamplerOverrides(sampler=sampler, num_inference_steps=steps),
            compile=compiled,
        )
        native = outline_of(config).native
        rows = write_pairs(folder, pairs, (native.get("height", 576), native.get("width", 1024)))
        if way == RELEASE:
            contexts.enter_context(patch.object(pipeline, "BoundedDenoiser", one_direction_at_a_time))
        contexts.enter_context(redirect_stdout(io.StringIO()))
        for together in [rows] if way == OURS else [[row] for row in rows]:
            manifest.write_text("\n".join(json.dumps(row) for row in together), encoding="utf-8")
            began = now()
            with patch.object(generating, "load_pipeline", partial(load, spent, began)):
                records = [read_record(made) for made in generating.generate(config)]
            spent.total += now() - began
            spent.pairs += [record["seconds"] for record in records]
    spent.calls, spent.forwards = records[-1]["unet_calls"], records[-1]["unet_forwards"]
    spent.memory = peak_memory(best_device()) or 0
    return spent


def in_own_process(function: Callable[..., T], *arguments: object) -> T:
    """What it gives in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def row(*cells: object) -> str:
    """Of a table."""
    return f"| {' | '.join(map(str, cells))} |"


def compared(model: str, runs: int, pairs: int, steps: int | None, compiled: bool) -> str:
    """Both ways, so often each."""
    both: list[tuple[Spent, Spent]] = []
    for number in range(runs):
        order = (RELEASE, OURS) if number % 2 else (OURS, RELEASE)
        found = {way: in_own_process(run, model, way, "trf", pairs, steps, compiled) for way in order}
        both.append((found[RELEASE], found[OURS]))
    lines = [row("way", "s a pair", "of these loading", *SHARES, "second pair / first", MEMORY), "|" + " --- |" * 9]
    for way, own in zip((RELEASE, OURS), zip(*both)):
        seconds = statistics.median(one.total / pairs for one in own)
        loading = statistics.median(sum(one.load) / pairs for one in own)
        shares = [f"{statistics.median(one.shares[name] for one in own):.1%}" for name in SHARES]
        second = statistics.median(one.pairs[1] / one.pairs[0] for one in own)
        memory = max(one.memory for one in own) / 2**30
        lines.append(row(way, f"{seconds:.2f}", f"{loading:.2f}", *shares, f"{second:.2f}", f"{memory:.2f}"))
    for what, ratios in (
        ("from manifest to files", [release.total / ours.total for release, ours in both]),
        (
            "from a pair's images to its frames, the first one aside",
            [sum(release.pairs[1:]) / sum(ours.pairs[1:]) for release, ours in both],
        ),
    ):
        lines.append(
            f"\nOurs is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f}) {what}."
        )
    return "\n".join(lines)


def samplers(model: str, pairs: int, steps: int | None, compiled: bool) -> str:
    """Every sampler once, as published."""
    lines = [row("sampler", "UNet calls", "s a pair", *SHARES, MEMORY), "|" + " --- |" * 8]
    for name in STRATEGIES:
        own = in_own_process(run, model, OURS, name, pairs, steps, compiled)
        shares = [f"{share:.1%}" for share in own.shares.values()]
        lines.append(row(name, own.calls, f"{statistics.median(own.pairs):.2f}", *shares, f"{own.memory / 2**30:.2f}"))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="miniature")
    parser.add_argument("--runs", type=int, default=3, help="runs of either way (default: %(default)s)")
    parser.add_argument("--pairs", type=int, default=3, help="of the manifest (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: as published)")
    parser.add_argument("--compile", action="store_true", help="as compile=true of trfpp infer, either way")
    told = parser.parse_args()
    kind = best_device().type
    machine = (
        torch.cuda.get_device_name() if kind == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    with tempfile.TemporaryDirectory() as folder:
        model = told.model
        if model == "svd-xt":
            in_own_process(svd_xt.save, folder)
            model = folder
        text = "\n\n".join([
            f"{told.model}, {machine}, torch {torch.__version__}, {date.today()}; {told.pairs} pairs a run, "
            f"{told.runs} runs; {told.steps or 'published numbers of'} steps{'; compiled' if told.compile else ''}.",
            "Shares are of the time in which no model is loaded.",
            compared(model, told.runs, told.pairs, told.steps, told.compile),
            samplers(model, told.pairs, told.steps, told.compile),
        ])  # fmt: skip
    print(text)
    name = f"sample-{kind}{'-compiled' if told.compile else ''}.md"
    (Path(__file__).parent / name).write_text(text + "\n", encoding="utf-8")
