"""What is told of the study, in its report and in the README, is what was measured; and a patch that it ships helps."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from trfpp import TimeReversalFusionPipeline
from trfpp.configs.load import command_line
from trfpp.configs.studying import StudyConfig
from trfpp.data_prep.motion import motion_bucket, motion_score
from trfpp.data_prep.procedural import film
from trfpp.infer.metrics import inner_psnr
from trfpp.study.overview import overview_table
from trfpp.study.planner import make_plan
from trfpp.study.report import REPORT_FILE
from trfpp.study.results import Results
from trfpp.study.ways import ways_of_sampling

ROOT = Path(__file__).parents[2]
STUDY = ROOT / "docs" / "study"
MEASURED = STUDY / "measured"


@pytest.fixture(scope="module")
def results():
    config = command_line(StudyConfig, "study", ["full", f"output={MEASURED}"])
    return Results(MEASURED, make_plan(config))


@pytest.fixture(scope="module")
def report():
    return (STUDY / REPORT_FILE).read_text(encoding="utf-8")


def test_the_report_is_of_what_was_measured(results, report):
    overview = overview_table(results, ["linear", "views", "loop", "irreversible", "control"])
    assert len(overview.splitlines()) > 10
    assert overview in report
    assert ways_of_sampling(results) in report


def test_the_readmes_figures_are_those_measured():
    def mean(name, metric):
        lines = (MEASURED / "eval" / name / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return np.mean([json.loads(line)[metric] for line in lines])

    text = (ROOT / "README.md").read_text(encoding="utf-8").split("**What a patch gains**")[1]
    rows = re.findall(r"^\| `(\w+)`: [^|]*\|(.*)\|$", text, flags=re.MULTILINE)
    assert [world for world, _ in rows] == ["linear", "views", "loop", "irreversible", "control"]
    for world, cells in rows:
        path = "path_degrees" if world == "views" else "track_pixels"
        for method, cell in zip(("cross_fade", "base", "pair", "long"), cells.split("|")):
            if cell.strip():
                psnr, off = (float(value) for value in re.findall(r"([\d.]+)(?: dB| px|°)", cell))
                name = f"{world}-{method}"
                assert psnr == pytest.approx(mean(name, "inner_psnr"), abs=0.051)
                assert off == pytest.approx(mean(name, path), abs=0.051 if off < 10 else 0.51)


def test_a_shipped_patch_helps():
    """On films that nothing was trained on nor chosen by."""
    pipe = TimeReversalFusionPipeline.from_pretrained("miniature")
    pipe.set_progress_bar_config(disable=True)
    shown = [film("linear", 5, 300_000 + index) for index in range(3)]

    def likeness():
        for number, true in enumerate(shown):
            bounds = (Image.fromarray(true.frames[place]) for place in (0, -1))
            bucket = motion_bucket(motion_score(true.frames, true.fps))
            made = pipe(
                *bounds, fps=true.fps, motion_bucket_id=bucket, generator=torch.Generator().manual_seed(number),
                output_type="np",
            ).frames[0]  # fmt: skip
            yield inner_psnr((made * 255).round().astype(np.uint8), true.frames)

    base = np.mean([*likeness()])
    pipe.load_patch(MEASURED / "runs" / "linear-long" / "patch")
    assert np.mean([*likeness()]) > base + 1.5
