"""The quickstart by its command, at its smallest: two steps and two pairs; everything is made, and what it gained said."""

import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from PIL import Image

from trfpp.__main__ import main
from trfpp.infer.evaluation import read_rows
from trfpp.quickstart import BATCH_SIZE
from trfpp.trf.patch import read_card

STEPS, PAIRS = 2, 2


def quickstart(root):
    """What the command prints."""
    AcceleratorState._reset_state(reset_partial_state=True)
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert main(["quickstart", f"output={root}", f"steps={STEPS}", f"pairs={PAIRS}"]) == 0
    AcceleratorState._reset_state(reset_partial_state=True)
    return said.getvalue()


@pytest.fixture(scope="module")
def few_films():
    """A few films to train on do here."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("trfpp.quickstart.CLIPS", 4)
        yield


@pytest.fixture(scope="module")
def made(few_films, tmp_path_factory):
    """Its folder and what it printed."""
    root = tmp_path_factory.mktemp("quickstart") / "out"
    return root, quickstart(root)


def result(said):
    """Seconds and steps of the training; the gain in dB and its interval; pixels off the way before and after."""
    number = r"([+-]?\d+\.?\d*)"
    sentences = (
        rf"Training took {number} s for {number} steps\.\n"
        rf"The patch brought the frames between the bounds {number} dB closer to the truth "
        rf"\(95 % interval {number} to {number}\),\nand the thing in them from {number} to {number} pixels off"
    )
    return [float(value) for value in re.search(sentences, said).groups()]


def test_it_prints_what_it_measured(made):
    root, said = made
    seconds, steps, gain, low, high, before, after = result(said)
    assert steps == read_card(root / "train" / "patch").training_steps == STEPS
    rate = float(re.search(rf"step {STEPS} of {STEPS}: .* (\S+) clips/s", said)[1])
    assert seconds == pytest.approx(STEPS * BATCH_SIZE / rate, abs=0.6)
    base, patched = (json.loads((root / name / "summary.json").read_text()) for name in ("base", "patched"))
    assert base["pairs"] == patched["pairs"] == PAIRS
    psnr, track = ([one["metrics"][name]["mean"] for one in (base, patched)] for name in ("inner_psnr", "track_pixels"))
    assert gain == pytest.approx(psnr[1] - psnr[0], abs=0.006)
    assert low <= gain <= high
    assert [before, after] == pytest.approx(track, abs=0.06)
    one, other = read_rows(root / "base"), read_rows(root / "patched")
    assert all(one[pair]["inner_psnr"] != other[pair]["inner_psnr"] for pair in one)


def test_everything_that_it_names_is_there(made):
    root, said = made
    named = re.findall(r"^  [\w ]{16} (/.+)$", said.split("Made:")[1], flags=re.MULTILINE)
    assert len(named) == 7
    assert all(Path(path).exists() and Path(path).is_relative_to(root) for path in named)
    with Image.open(root / "contact_sheet.png") as sheet, Image.open(root / "in_motion.webp") as moving:
        assert sheet.width > 64
        assert moving.n_frames == 12


def test_a_second_call_does_no_step_again(made):
    root, said = made

    def results():
        files = ("data/report.json", "train/patch/patch.json", "base/metrics.jsonl", "patched/metrics.jsonl")
        videos = root.glob("video_*/*/generation.json")
        return {path: path.stat().st_mtime_ns for path in [*(root / file for file in files), *videos]}

    before = results()
    assert result(quickstart(root)) == result(said)
    assert results() == before


@pytest.mark.parametrize("other", ["seed=1", "pairs=3"])
def test_another_call_into_its_folder_is_refused(made, other, capsys):
    root, _ = made
    assert main(["quickstart", f"output={root}", f"steps={STEPS}", f"pairs={PAIRS}", other]) == 2
    assert "choose another output, or remove this one" in capsys.readouterr().err
