"""Steps of LoRA training from cached conditioning, against the way the public trainer of SVD works; see `ways`.

MODEL is `miniature` (in float32), or `svd-xt`, which is SVD-XT's full size with random weights (for a GPU; bfloat16,
activations recomputed, 25 frames of 576x1024 and 14 of 320x576).

The losses of both ways must be the same, and are compared. Each run starts from the first weights; runs of the ways
alternate and ratios are taken pair by pair. Prints one table and saves it beside this file.
"""

from __future__ import annotations

import argparse
import multiprocessing
import platform
import statistics
import tempfile
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import torch

from trfpp.bench import svd_xt
from trfpp.bench.ways import OURS, PACKED, PUBLIC, TARGETS, Case, Run, prepare, synchronise, train
from trfpp.configs.training import TrainConfig
from trfpp.train.memory import estimate
from trfpp.trf.base import hide_loading_bars
from trfpp.trf.device import best_device

TOLERANCE = 1e-4
"""On the losses in float32."""


def try_train(way: str, case: Case) -> Run | None:
    """A run, or nothing where it does not fit the GPU."""
    try:
        return train(way, case)
    except torch.OutOfMemoryError:
        return None


def matmul_rate(device: str, dtype: torch.dtype) -> float:
    """FLOP/s of a large matrix product: the median of ten."""
    side = 8192 if device == "cuda" else 1024
    one = torch.randn(side, side, device=device, dtype=dtype)
    rates = []
    for _ in range(11):
        synchronise(device)
        began = time.perf_counter()
        one @ one
        synchronise(device)
        rates.append(2 * side**3 / (time.perf_counter() - began))
    return statistics.median(rates[1:])


def in_own_process(way: str, case: Case) -> Run:
    """A run in a fresh process, whose growth tells what this way takes on a CPU."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(train, (way, case))


def measure(case: Case, pairs: int) -> list[str]:
    """Time the ways in turn, `pairs` times each; returns the lines of the table."""
    encoding = prepare(case)
    ways = [PUBLIC, OURS] + ([PACKED] if case.device == "cuda" else [])
    runs: dict[str, list[Run | None]] = {way: [] for way in ways}
    for number in range(pairs):
        for way in ways if number % 2 else ways[::-1]:
            runs[way].append(try_train(way, case))
    if case.device == "cpu":
        once = replace(case, steps=1)
        memory = {way: in_own_process(way, once).memory for way in ways}
    else:
        memory = {way: max((run.memory for run in own if run), default=0) for way, own in runs.items()}
    rate = matmul_rate(case.device, case.dtype)
    lines = [
        f"{case.model}, {case.frames} frames of {case.height}x{case.width}, rank {case.rank}, "
        + f"precision {case.precision}"
        + (", activations recomputed" if case.recomputed else "")
        + f"; {pairs} alternating runs of {case.steps} steps of one clip; encoding a clip once for the cache took "
        f"{encoding:.2f} s",
        "",
        "| way | clips/s, median | min | max | of it VAE and CLIP | peak memory, MiB | share of the matmul rate |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for way, own in runs.items():
        done = [run for run in own if run is not None]
        if not done:
            lines.append(f"| {way} | out of memory | | | | | |")
            continue
        speeds = [case.steps / run.seconds for run in done]
        inside = statistics.median(run.conditioning / run.seconds for run in done)
        share = statistics.median(run.flops * case.steps / run.seconds for run in done) / rate
        lines.append(
            f"| {way} | {statistics.median(speeds):.3f} | {min(speeds):.3f} | {max(speeds):.3f} | {inside:.0%} "
            f"| {memory[way] / 2**20:,.0f} | {share:.0%} |"
        )
    lines.append("")
    for way in ways[1:]:
        both = [(one, other) for one, other in zip(runs[PUBLIC], runs[way]) if one is not None and other is not None]
        if not both:
            continue
        ratios = [public.seconds / ours.seconds for public, ours in both]
        apart = max(abs(a - b) for public, ours in both for a, b in zip(public.losses, ours.losses))
        lines.append(
            f"{way} against the public way: {statistics.median(ratios):.2f} times as fast ({min(ratios):.2f} to "
            f"{max(ratios):.2f}); largest difference of a step's loss {apart:.1e}"
        )
        if case.precision == "no" and apart > TOLERANCE:
            raise AssertionError(f"{way}: losses differ by {apart:.1e}, more than {TOLERANCE:g}: not the same work.")
    lines += [f"matmul rate {rate / 1e12:.3g} TFLOP/s; memory {_MEMORY[case.device]}"]
    if case.device == "cuda":
        for way in ways[1:]:
            lines.append(
                f"{way}: estimated {_estimated(way, case) / 2**20:,.0f} MiB, {memory[way] / 2**20:,.0f} measured"
            )
    return lines


_MEMORY = {
    "cuda": "is torch.cuda.max_memory_allocated",
    "cpu": "is by how much a process of its own grew (peak RSS) from the libraries' import on",
}


def _estimated(way: str, case: Case) -> int:
    config = TrainConfig(
        model="miniature",
        data=case.folder,
        output=case.folder,
        precision=case.precision,
        gradient_checkpointing=case.recomputed,
        quantization="nf4" if way == PACKED else None,
        lora={"targets": TARGETS[OURS], "rank": case.rank, "alpha": float(case.rank)},
    )  # type: ignore[arg-type]
    unet = svd_xt.UNET if case.model == "svd-xt" else dict(case.component("unet", case.dtype).config)
    channels = unet["in_channels"] // 2
    return estimate(config, unet, (case.frames, channels, case.height // 8, case.width // 8)).total


def main(model: str, pairs: int, steps: int) -> str:
    """The whole table."""
    device = best_device().type
    big = model == "svd-xt"
    if big and device != "cuda":
        raise SystemExit("svd-xt is for a GPU; there is none here.")
    shapes = [(14, 320, 576), (25, 576, 1024)] if big else [(12, 64, 64)]
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    lines = [f"{name}, torch {torch.__version__}, {date.today()}", ""]
    for frames, height, width in shapes:
        with tempfile.TemporaryDirectory() as folder:
            case = Case(
                model=model, frames=frames, height=height, width=width, precision="bf16" if big else "no",
                recomputed=big, folder=Path(folder), device=device, steps=steps,
            )  # fmt: skip
            lines += [*measure(case, pairs), ""]
    return "\n".join(lines)


if __name__ == "__main__":
    hide_loading_bars()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="miniature", choices=("miniature", "svd-xt"))
    parser.add_argument("--pairs", type=int, default=5, help="runs of either way (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=8, help="steps a run (default: %(default)s)")
    told = parser.parse_args()
    table = main(told.model, told.pairs, told.steps)
    print(table)
    (Path(__file__).parent / f"train-{best_device().type}.md").write_text(table, encoding="utf-8")
