"""Bounded generation with both directions in one UNet call, against the low-memory way of four calls.

MODEL is `miniature`, an SVD folder or a hub id. The two ways alternate and the ratio is taken pair by
pair, so a machine whose speed drifts does not favour one. Prints one table and saves it beside this file.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import time
from datetime import date
from pathlib import Path

import numpy as np
import PIL.Image
import torch

from trfpp import TimeReversalFusionPipeline
from trfpp.trf.device import best_device


def measure(model: str, runs: int) -> str:
    """Time both ways `runs` times each after a warm-up; returns the table."""
    device = best_device()
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    pipe = TimeReversalFusionPipeline.from_pretrained(model, dtype=dtype).to(device)
    pipe.set_progress_bar_config(disable=True)
    size = (pipe.native.get("height", 576), pipe.native.get("width", 1024))
    noise = np.random.default_rng(0).integers(0, 255, (2, *size, 3), dtype=np.uint8)
    bounds = [PIL.Image.fromarray(image) for image in noise]

    def seconds(low_memory: bool, steps: int = 10) -> float:
        began = time.perf_counter()
        pipe(
            *bounds,
            num_inference_steps=steps,
            low_memory=low_memory,
            generator=torch.Generator().manual_seed(0),
            output_type="latent",
        )
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    seconds(False, steps=1), seconds(True, steps=1)
    pairs = [(seconds(False), seconds(True)) for _ in range(runs)]
    one, four = zip(*pairs)
    ratios = [slow / fast for fast, slow in pairs]
    name = (
        torch.cuda.get_device_name()
        if device.type == "cuda"
        else f"{platform.machine()}, {torch.get_num_threads()} threads"
    )
    return "\n".join(
        [
            f"{model}, {size[0]}x{size[1]}, {pipe.native['num_frames']} frames, 10 steps, {name}, "
            f"torch {torch.__version__}, {date.today()}, {runs} alternating runs",
            "",
            "| way | median s | min s | max s |",
            "| --- | --- | --- | --- |",
            f"| one call | {statistics.median(one):.2f} | {min(one):.2f} | {max(one):.2f} |",
            f"| four calls (low_memory) | {statistics.median(four):.2f} | {min(four):.2f} | {max(four):.2f} |",
            f"| four / one | {statistics.median(ratios):.2f} | {min(ratios):.2f} | {max(ratios):.2f} |",
            "",
        ]
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="miniature")
    parser.add_argument("--runs", type=int, default=5, help="runs of either way (default: %(default)s)")
    told = parser.parse_args()
    table = measure(told.model, told.runs)
    print(table)
    (Path(__file__).parent / f"sample-{best_device().type}.md").write_text(table, encoding="utf-8")
