"""Bounded generation of a few pairs: ours, against the way TRF's release works, and all samplers against each other.

MODEL is `miniature`, `svd-xt` (full size, random weights), an SVD folder or a hub id. The release's way: the model is
loaded anew for every pair, and each direction has a forward pass of its own. Ours: loaded once, both directions in one
pass. Settings, pairs and draws are equal. Every run is a process of its own; the ways alternate, and ratios are taken
run by run, so a machine whose speed drifts does not favour one. Prints one table and saves it beside this file.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import platform
import statistics
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image

from trfpp import TimeReversalFusionPipeline
from trfpp.bench import svd_xt
from trfpp.trf import pipeline
from trfpp.trf.base import hide_loading_bars
from trfpp.trf.denoiser import BoundedDenoiser
from trfpp.trf.device import best_device, peak_memory
from trfpp.trf.strategies import STRATEGIES

RELEASE, OURS = "the release's way", "ours"
PAIRS = 3


@dataclass
class Spent:
    """Seconds of one run."""

    load: list[float] = field(default_factory=list)
    """Before each pair, if the model was loaded for it."""
    pairs: list[float] = field(default_factory=list)
    """Of each pair, without loading."""
    parts: dict[str, float] = field(default_factory=lambda: {"unet": 0.0, "vae": 0.0, "clip": 0.0})
    """In the networks."""
    calls: int = 0
    """UNet calls of a pair."""
    forwards: int = 0
    """Forward passes of the UNet that they were made in."""
    memory: int = 0
    """Bytes at the most: allocated on a GPU, else of the process."""

    @property
    def outside(self) -> float:
        """Share of the pairs' time that is spent outside of all networks."""
        return 1 - sum(self.parts.values()) / sum(self.pairs)


def load(model: str) -> TimeReversalFusionPipeline:
    """The pipeline on the best device, in the precision one would sample in."""
    device = best_device()
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    pipe = (
        svd_xt.pipeline(device, dtype)
        if model == "svd-xt"
        else TimeReversalFusionPipeline.from_pretrained(model, dtype=dtype).to(device)
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def now() -> float:
    """Seconds, after the device has done what it was asked for."""
    if best_device().type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


@contextmanager
def timed(pipe: TimeReversalFusionPipeline, spent: Spent) -> Iterator[None]:
    """Note the time of the networks inside the block."""
    began: dict[torch.nn.Module, float] = {}
    hooks = []
    parts = [("unet", pipe.unet), ("vae", pipe.vae.encoder), ("vae", pipe.vae.decoder), ("clip", pipe.image_encoder)]
    for name, module in parts:

        def before(module: torch.nn.Module, _: object) -> None:
            began[module] = now()

        def after(module: torch.nn.Module, *_: object, name: str = name) -> None:
            spent.parts[name] += now() - began[module]

        hooks += [module.register_forward_pre_hook(before), module.register_forward_hook(after)]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def bounds(size: tuple[int, ...], number: int) -> list[Image.Image]:
    """A pair of images of noise: time does not depend on what they show."""
    noise = np.random.default_rng(number).integers(0, 255, (2, *size, 3), dtype=np.uint8)
    return [Image.fromarray(image) for image in noise]


def one_direction_at_a_time(**own: object) -> BoundedDenoiser:
    """The pipeline's denoiser; the two rows of a direction, with conditions and without, have a pass of their own."""
    return BoundedDenoiser(**{**own, "rows_per_forward": 2})


def run(model: str, way: str, sampler: str, steps: int | None) -> Spent:
    """Sample some pairs one way, in this process."""
    logging.disable(logging.WARNING)
    hide_loading_bars()
    spent, pipe = Spent(), None
    for number in range(PAIRS):
        generator = torch.Generator().manual_seed(number)
        if pipe is None or way == RELEASE:
            began = now()
            pipe = load(model)
            spent.load.append(now() - began)
            size = (pipe.native.get("height", 576), pipe.native.get("width", 1024))
            if number == 0:  # warms up, as a long run would be
                pipe(*bounds(size, 99), num_inference_steps=1, generator=torch.Generator().manual_seed(99))
        with ExitStack() as contexts:
            contexts.enter_context(timed(pipe, spent))
            if way == RELEASE:
                contexts.enter_context(patch.object(pipeline, "BoundedDenoiser", one_direction_at_a_time))
            began = now()
            made = pipe(*bounds(size, number), sampler=sampler, num_inference_steps=steps, generator=generator)
            spent.pairs.append(now() - began)
    spent.calls, spent.forwards = made.unet_calls, made.unet_forwards
    spent.memory = peak_memory(best_device()) or 0
    return spent


def in_own_process(*arguments: object) -> Spent:
    """A run in a fresh process."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(run, arguments)


def compared(model: str, runs: int, steps: int | None) -> str:
    """Both ways, so often each."""
    both: list[tuple[Spent, Spent]] = []
    for number in range(runs):
        order = (RELEASE, OURS) if number % 2 else (OURS, RELEASE)
        found = {way: in_own_process(model, way, "trf", steps) for way in order}
        both.append((found[RELEASE], found[OURS]))
    lines = [
        "| way | s a pair | of these loading | outside of the networks | second pair / first | peak memory, GiB |",
        "|" + " --- |" * 6,
    ]
    for way, own in zip((RELEASE, OURS), zip(*both)):
        seconds = statistics.median((sum(one.load) + sum(one.pairs)) / PAIRS for one in own)
        loading = statistics.median(sum(one.load) / PAIRS for one in own)
        outside = statistics.median(one.outside for one in own)
        second = statistics.median(one.pairs[1] / one.pairs[0] for one in own)
        memory = max(one.memory for one in own) / 2**30
        lines.append(f"| {way} | {seconds:.2f} | {loading:.2f} | {outside:.1%} | {second:.2f} | {memory:.2f} |")
    for name, ratios in (
        ("with loading", [(sum(r.load) + sum(r.pairs)) / (sum(o.load) + sum(o.pairs)) for r, o in both]),
        ("without", [sum(r.pairs) / sum(o.pairs) for r, o in both]),
    ):
        lines.append(
            f"\nOurs is {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to {max(ratios):.2f}) {name}."
        )
    return "\n".join(lines)


def samplers(model: str, steps: int | None) -> str:
    """Every sampler once, as published."""
    lines = ["| sampler | UNet calls | s a pair | outside of the networks | peak memory, GiB |", "|" + " --- |" * 5]
    for name in STRATEGIES:
        own = in_own_process(model, OURS, name, steps)
        pair = statistics.median(own.pairs)
        lines.append(f"| {name} | {own.calls} | {pair:.2f} | {own.outside:.1%} | {own.memory / 2**30:.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="miniature")
    parser.add_argument("--runs", type=int, default=3, help="runs of either way (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="denoising steps (default: as published)")
    told = parser.parse_args()
    kind = best_device().type
    machine = (
        torch.cuda.get_device_name() if kind == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    text = "\n\n".join([
        f"{told.model}, {machine}, torch {torch.__version__}, {date.today()}; {PAIRS} pairs a run, {told.runs} runs; "
        f"{told.steps or 'published numbers of'} steps.",
        compared(told.model, told.runs, told.steps),
        samplers(told.model, told.steps),
    ])  # fmt: skip
    print(text)
    (Path(__file__).parent / f"sample-{kind}.md").write_text(text + "\n", encoding="utf-8")
