"""The report: its numbers are those of the evaluations and of `compare`; it is made of whatever is done."""

import re
import shutil

import numpy as np
import pytest
from PIL import Image

from trfpp.infer.compare import compare
from trfpp.study.planner import make_plan
from trfpp.study.report import write_report
from trfpp.study.results import METRICS, Metric, Results

pytestmark = pytest.mark.slow


def table_after(text, heading, number=0):
    """The cells of a table in a section, by the first cell of the row, then by column."""
    section = text.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    lines = re.findall(r"(?:^\|.*\|\n?)+", section, flags=re.MULTILINE)[number].strip().splitlines()
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]
    return {row[0]: dict(zip(head[1:], row[1:])) for row in rows}


@pytest.fixture(scope="module")
def text(finished):
    return (finished.output / "report" / "report.md").read_text()


def test_means_are_those_of_the_evaluations(finished, text):
    table = table_after(text, "loop")
    assert list(table) == [
        "cross-fade", "flow warp", "base", "forward patch, forward half", "forward patch, both halves",
        "one patch for both directions", "forward/backward pair", "pair, trained longer",
        "pair trained for its fusion", "pair with rotated attention", "full fine-tune", "VAE reconstruction",
    ]  # fmt: skip
    results = Results(finished.output, make_plan(finished))
    for method, label in (("flow_warp", "flow warp"), ("pair", "forward/backward pair")):
        one = results.summary(f"eval/loop-{method}")["metrics"]["inner_psnr"]
        assert table[label]["PSNR, dB (higher)"] == f"{one['mean']:.2f} [{one['low']:.2f}, {one['high']:.2f}]"
    assert table["cross-fade"]["disagreement (lower)"] == ""
    assert table["base"]["seam gap (lower)"]


def test_differences_are_those_of_compare(finished, text):
    base = finished.output / "eval" / "loop-base"
    table = table_after(text, "loop", 1)
    assert "base" not in table
    found = compare(base, finished.output / "eval" / "loop-cross_fade").metrics["inner_psnr"].contrast
    shown = f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
    assert table["cross-fade"]["PSNR, dB (higher)"] == f"**{shown}**"
    found = compare(base, finished.output / "eval" / "loop-pair").metrics["inner_ssim"].contrast
    shown = f"{found.value:+.3f} [{found.low:+.3f}, {found.high:+.3f}]"
    variants = table_after(text, "loop", 2)
    assert list(variants) == ["pair, trained longer", "pair trained for its fusion", "pair with rotated attention"]
    pair, fused = (finished.output / "eval" / f"loop-{name}" for name in ("pair", "fused"))
    found = compare(pair, fused).metrics["inner_psnr"].contrast
    shown = f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
    assert variants["pair trained for its fusion"]["PSNR, dB (higher)"].strip("*") == shown


def test_the_answer_is_that_of_compare(finished, text):
    """Against the base and the floor in dB, the path error as the share that is gone, motion over the VAE's own."""
    evaluations = finished.output / "eval"
    section = text.split("\n## Against the base and the floor\n")[1].split("\n## ")[0]
    head, _, *rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert [row[:2] for row in rows] == [
        ["loop", "forward/backward pair"], ["loop", "pair, trained longer"], ["loop", "full fine-tune"],
    ]  # fmt: skip
    row = dict(zip(head, rows[0]))
    for column, reference in (("PSNR over the base, dB", "base"), ("over a cross-fade", "cross_fade")):
        found = compare(evaluations / f"loop-{reference}", evaluations / "loop-pair").metrics["inner_psnr"].contrast
        assert row[column].strip("*") == f"{found.value:+.2f} [{found.low:+.2f}, {found.high:+.2f}]"
    base, ceiling = evaluations / "loop-base", evaluations / "loop-ceiling"
    left = compare(base, evaluations / "loop-pair", "ratio").metrics["track_percent"].contrast
    less = [100 * (1 - one) for one in (left.value, left.high, left.low)]
    assert row["path error less, %"].strip("*") == "{:+.0f} [{:+.0f}, {:+.0f}]".format(*less)
    for column, one in (("motion of the base", "base"), ("its motion", "pair")):
        found = compare(ceiling, evaluations / f"loop-{one}", "ratio").metrics["motion_ratio"].contrast
        assert row[column] == f"{found.value:.2f} [{found.low:.2f}, {found.high:.2f}]"


def test_other_worlds_and_sweeps_are_there(text):
    assert list(table_after(text, "On the base world")) == [
        "cross-fade", "flow warp", "base", "patch for loop", "patch for loop, trained longer", "VAE reconstruction",
    ]  # fmt: skip
    assert list(table_after(text, "Sweep: patch scale")) == ["0.5", "1"]
    assert list(table_after(text, "Sweep: training clips")) == ["2", "3"]
    for what in ("fps", "motion bucket"):
        section = text.split(f"## Sweep: {what} told over measured")[1].split("\n## ")[0]
        assert [line.split(" | ")[:2] for line in section.splitlines() if re.match(r"\| [\d.]+ \|", line)] == [
            ["| 0.5", "base"], ["| 1", "base"], ["| 0.5", "forward/backward pair"], ["| 1", "forward/backward pair"],
        ]  # fmt: skip
    assert "## Sweep: rank" not in text  # a single point is no sweep


def test_ways_of_sampling_are_set_against_the_first(finished, text):
    section = text.split("## Ways of sampling\n")[1].split("\n## ")[0]
    lines = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith(("| trf", "| vibid"))]
    assert [tuple(line[:3]) for line in lines] == [
        ("trf++", "base", "24"), ("vibid", "base", "50"), ("trf++", "pair, trained longer", "24"),
        ("vibid", "pair, trained longer", "50"),
    ]  # fmt: skip
    found = compare(finished.output / "eval" / "loop-trf++-long", finished.output / "eval" / "loop-vibid-long")
    assert f"{found.metrics['inner_psnr'].contrast.value:+.2f}" in " ".join(lines[3][-3:])
    assert f"{found.metrics['inner_ssim'].contrast.value:+.3f}" in " ".join(lines[3][-3:])


def test_every_picture_is_there_and_shows_something(finished, text):
    names = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", text)
    assert {"gains.png", "worlds.webp", "loop.png", "loop-1.jpg", "sweep-loop-patch-scale.png"} <= set(names)
    for name in names:
        pixels = np.asarray(Image.open(finished.output / "report" / name).convert("L"))
        assert min(pixels.shape) > 190
        assert pixels.std() > 5
    assert {path.name for path in (finished.output / "report").iterdir()} == {"report.md", *names}


def test_it_is_made_of_what_is_done(finished, settings, tmp_path):
    """Two evaluations of one domain of two, in a folder of choice; no heading without numbers under it."""
    output = tmp_path / "out"
    config = settings("smoke", output, "worlds=[loop,views]", f"report={tmp_path / 'docs'}")
    for name in ("loop/held", "loop/pairs", "eval/loop-base", "eval/loop-flow_warp"):
        shutil.copytree(finished.output / name, output / name)
    path = write_report(config, make_plan(config))
    text = path.read_text()
    assert path == tmp_path / "docs" / "report.md"
    assert list(table_after(text, "loop")) == ["flow warp", "base"]
    assert list(table_after(text, "loop", 1)) == ["flow warp"]
    assert "## views\n\nNothing is measured yet." in text
    assert "No patch was measured against the base yet." in text
    assert "On the base world" not in text
    assert "Sweep" not in text
    assert f"2 evaluations are done, {len(make_plan(config).runs) - 4} runs are to come." in text
    assert {file.name for file in path.parent.iterdir()} == {"report.md", "loop.png", "loop-1.jpg"}
    sheet = (path.parent / "loop-1.jpg").read_bytes()
    for name in ("eval/loop-base/videos", "eval/loop-flow_warp/videos", "loop"):
        shutil.rmtree(output / name)
        write_report(config, make_plan(config))
        assert table_after(path.read_text(), "loop") == table_after(text, "loop")
        assert "loop-1.jpg" in path.read_text()  # which cannot be drawn whole again
        assert (path.parent / "loop-1.jpg").read_bytes() == sheet


def test_stale_evaluations_are_left_out(finished, settings):
    """What was measured with other settings than the study's now is not in its report."""
    other = settings("smoke", finished.output, "sampler.num_inference_steps=3")
    assert Results(finished.output, make_plan(finished)).has("eval/loop-base")
    assert not Results(other.output, make_plan(other)).has("eval/loop-base")


def test_a_single_pair_has_no_interval():
    from trfpp.infer.statistics import Interval

    metric = Metric("PSNR", 2, "higher")
    assert metric.interval(Interval(1.234, float("nan"), float("nan"))) == "1.23"
    assert metric.interval(Interval(1.234, -1, 2), "+") == "+1.23 [-1.00, +2.00]"
    assert str(METRICS["inner_ssim"]) == "SSIM (higher)"
