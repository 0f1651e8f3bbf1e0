"""What every sampler makes between two images, side by side: one picture a pair, to look at.

Each sampler has the settings of its authors and starts from the same noise. Prints a table of what it cost and saves
`<output>-<n>.jpg` for the n-th pair.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from trfpp import TimeReversalFusionPipeline
from trfpp.data_prep.frames import fit_image, load_image
from trfpp.infer.sheets import contact_sheet
from trfpp.trf.base import hide_loading_bars
from trfpp.trf.device import best_device
from trfpp.trf.replace import replacing
from trfpp.trf.strategies import STRATEGIES

ROWS = 6


def main() -> None:
    """Parse, sample, draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("images", nargs="+", type=Path, help="start and end of the first pair, of the second, ...")
    parser.add_argument("--model", default="miniature", help="`miniature`, an SVD folder, or a hub id")
    parser.add_argument("--patch", type=Path, help="a patch folder")
    parser.add_argument("--samplers", nargs="+", default=list(STRATEGIES), choices=list(STRATEGIES))
    parser.add_argument("--output", type=Path, required=True, help="where the pictures go, without `-1.jpg`")
    given = parser.parse_args()
    if len(given.images) % 2:
        parser.error(f"{len(given.images)} images: every pair has a start and an end.")
    try:
        images = [load_image(file) for file in given.images]
    except ValueError as error:
        parser.error(str(error))
    hide_loading_bars()
    pipe = TimeReversalFusionPipeline.from_pretrained(given.model).to(best_device())
    pipe.set_progress_bar_config(disable=True)
    if given.patch:
        pipe.load_patch(given.patch)
    size = (pipe.native.get("height", 576), pipe.native.get("width", 1024))

    bar = tqdm(total=len(given.images) // 2 * len(given.samplers), unit="video")
    print("| pair | sampler | UNet calls | seconds |", "| --- | --- | --- | --- |", sep="\n")
    for number, pair in enumerate(zip(images[::2], images[1::2]), start=1):
        bounds = [fit_image(image, *size, "crop") for image in pair]
        columns = {"start": np.asarray(bounds[0])[None]}
        for sampler in given.samplers:
            began = time.perf_counter()
            made = pipe(*bounds, sampler=sampler, generator=torch.Generator().manual_seed(42), output_type="np")
            columns[sampler] = (made.frames[0] * 255).round().astype(np.uint8)
            bar.write(f"| {number} | {sampler} | {made.unet_calls} | {time.perf_counter() - began:.1f} |")
            bar.update()
        columns["end"] = np.asarray(bounds[1])[None]
        file = given.output.with_name(f"{given.output.name}-{number}.jpg")
        with replacing(file) as beside:
            contact_sheet(columns, ROWS).convert("RGB").save(beside, quality=90)
    bar.close()


if __name__ == "__main__":
    main()
