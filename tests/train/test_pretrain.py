"""The whole pretraining from the command line, at a tiny size: stopped, gone on with, loaded by the pipelines."""

import csv
import os
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import psutil
import pytest
import torch
from diffusers import StableVideoDiffusionPipeline
from PIL import Image
from safetensors.torch import load_file

from trfpp.configs.load import command_line
from trfpp.configs.pretraining import PretrainConfig
from trfpp.data_prep.motion import motion_bucket, motion_score
from trfpp.data_prep.procedural import film
from trfpp.train.films import CHUNK, FilmShelf
from trfpp.train.pretrain import STAGES, pretrain
from trfpp.train.stage import StageStopped, fit
from trfpp.trf.pipeline import TimeReversalFusionPipeline

SHELF = dict(seed=2, num_frames=2, side=16)
# The UNet's rate rises for 500 steps: with its usual peak the 20 steps of the recipe would change next to nothing.
SMOKE = ("smoke", "unet.lr=0.05")


def start(*words):
    return subprocess.Popen(
        [sys.executable, *words],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def wait_for(condition, process=None, seconds=600):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happened"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.05)


def settings(folder, *more):
    return command_line(PretrainConfig, "pretrain", [*SMOKE, f"output={folder}", *more])


def lines_of(curve):
    with curve.open() as file:
        return [{key: value for key, value in row.items() if key != "steps per second"} for row in csv.DictReader(file)]


def tensors(folder, *patterns):
    """Of the files of such names, each by its file and name."""
    files = [path for pattern in patterns for path in folder.glob(pattern)]
    return {f"{path.relative_to(folder)}:{name}": value for path in files for name, value in load_file(path).items()}


def differing(one, other):
    assert one.keys() == other.keys()
    return [name for name in one if not torch.equal(one[name], other[name])]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that nothing stops: its folder and what it said."""
    folder = tmp_path_factory.mktemp("pretrain") / "run"
    process = start("-m", "trfpp", "pretrain", *SMOKE, f"output={folder}")
    said, wrong = process.communicate(timeout=600)
    assert process.returncode == 0, wrong
    return folder, said


@pytest.fixture(scope="module")
def stopped(tmp_path_factory):
    """A run that is sent SIGTERM while the autoencoder trains: its folder, exit status, last words and what is there."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    process = start("-m", "trfpp", "pretrain", *SMOKE, f"output={folder}")
    wait_for((folder / "autoencoder.csv").is_file, process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=300)
    return folder, process.returncode, said, {path.name for path in folder.iterdir()}


@pytest.fixture(scope="module")
def parts(stopped):
    """That run gone on with: stopped in both later stages too, between two lines of their curves, then done. Its folder."""
    folder = stopped[0]
    with pytest.MonkeyPatch.context() as patching:
        for stage, at in (("image_encoder", 6), ("unet", 12)):
            patching.setattr("trfpp.train.pretrain.fit", fit_with_signal(stage, at))
            with pytest.raises(StageStopped):
                pretrain(settings(folder))
    pretrain(settings(folder, "appraisal.films=0"))
    return folder


def fit_with_signal(stage, at):
    """`fit`, but SIGTERM comes in a step of a stage."""

    def fit_it(name, modules, losses, *rest):
        def signalled(step):
            if (name, step) == (stage, at):
                os.kill(os.getpid(), signal.SIGTERM)
            return losses(step)

        fit(name, modules, signalled, *rest)

    return fit_it


def test_a_signal_ends_the_run_with_its_status_and_one_sentence(stopped):
    _, status, said, there = stopped
    assert status == 128 + signal.SIGTERM
    sentences = [line for line in said.splitlines() if line.startswith("trfpp pretrain:")]
    assert len(sentences) == 1
    assert "run the same command again" in sentences[0]
    assert "Traceback" not in said
    assert "autoencoder.checkpoint.safetensors" in there
    assert not {"image_encoder.csv", "model"} & there


def test_a_run_that_was_stopped_in_every_stage_is_the_run_to_the_bit(run, parts):
    for stage in STAGES:
        assert lines_of(parts / f"{stage}.csv") == lines_of(run[0] / f"{stage}.csv")
    # The checkpoints have in full precision what the model has in half, and the optimizer's state.
    files = ("*.checkpoint.safetensors", "model/*/*.safetensors")
    whole = tensors(run[0], *files)
    assert len({name.partition(":")[0] for name in whole}) == 2 * len(STAGES)
    assert differing(whole, tensors(parts, *files)) == []


@pytest.mark.parametrize(("stage", "most"), [("autoencoder", 0.8), ("image_encoder", 0.95), ("unet", 0.85)])
def test_every_stages_loss_falls(run, stage, most):
    losses = [float(line["loss"]) for line in lines_of(run[0] / f"{stage}.csv")]
    assert losses[-1] < most * losses[0]


def test_the_run_leaves_model_curves_and_appraisal(run):
    folder, said = run
    assert f"model: {folder / 'model'}" in said
    for stage, steps in (("autoencoder", 20), ("image_encoder", 10), ("unet", 20)):
        lines = (folder / f"{stage}.csv").read_text().splitlines()
        assert [int(line.split(",")[0]) for line in lines[1:]] == list(range(5, steps + 1, 5))
    names = {
        "appraisal.json",
        *(f"{name}.png" for name in ("reconstructions", "samples", "conditioned", "conditioning", "curves")),
    }
    assert {path.name for path in (folder / "appraisal").iterdir()} == names
    assert not [path for path in folder.rglob("*") if path.name.startswith(".") or path.suffix == ".tmp"]


def test_the_model_runs_in_diffusers_and_in_time_reversal_fusion(run):
    model = run[0] / "model"
    shown = film("base", 0, 500, 6, 32).frames
    first, last = Image.fromarray(shown[0]), Image.fromarray(shown[-1])
    plain = StableVideoDiffusionPipeline.from_pretrained(model, dtype=torch.float32)
    plain.set_progress_bar_config(disable=True)
    made = plain(first, height=32, width=32, num_inference_steps=2, output_type="np").frames
    assert np.asarray(made).shape == (1, 6, 32, 32, 3)
    fused = TimeReversalFusionPipeline.from_pretrained(model)
    fused.set_progress_bar_config(disable=True)
    frames = fused(first, last, num_inference_steps=2, output_type="np").frames
    assert frames.shape == (1, 6, 32, 32, 3)
    assert np.isfinite(frames).all()


def test_a_second_call_does_nothing(run):
    folder = run[0]

    def content():
        return {path: path.stat().st_mtime_ns for path in folder.rglob("*") if path.name != "settings.json"}

    before = content()
    assert pretrain(settings(folder)) == folder / "model"
    assert content() == before


def test_a_run_with_other_settings_is_refused(run):
    with pytest.raises(ValueError, match=r"a run with another seed, unet lies there; restore the settings or choose"):
        pretrain(settings(run[0], "seed=1", "unet.lr=1e-5"))
    pretrain(settings(run[0], "render_workers=1", "checkpoint_every=5"))  # these shape nothing


def test_a_compiled_unet_is_the_one_that_is_trained(run, tmp_path):
    """Here without a compiler: the same bits come out, by the way that a compiled run takes."""
    folder = tmp_path / "run"
    shutil.copytree(run[0], folder, ignore=shutil.ignore_patterns("model", "unet.*", "appraisal"))
    with torch.compiler.set_stance("force_eager"):
        pretrain(settings(folder, "compile=true", "appraisal.films=0"))
    files = ("unet.checkpoint.safetensors", "model/unet/*.safetensors")
    assert differing(tensors(run[0], *files), tensors(folder, *files)) == []


def test_films_are_rendered_once_and_are_those_of_the_worlds(tmp_path):
    def shelf(count=CHUNK + 6):
        return FilmShelf(tmp_path / "films", ("linear", "control"), count, workers=1, **SHELF)

    rendering = shelf()
    films = rendering.take(CHUNK + 6)
    rendering.close()
    assert films.frames.shape == (CHUNK + 6, 2, 16, 16, 3)
    for index in (0, 1, CHUNK + 5):
        shown = film(("linear", "control")[index % 2], SHELF["seed"], index, SHELF["num_frames"], SHELF["side"])
        assert np.array_equal(films.frames[index].numpy(), shown.frames)
        assert films.fps[index] == shown.fps
        assert float(films.motion_bucket[index]) == pytest.approx(
            motion_bucket(motion_score(shown.frames, shown.fps)), rel=1e-5
        )
    files = {path: path.stat().st_mtime_ns for path in (tmp_path / "films").iterdir()}
    assert torch.equal(shelf().take(CHUNK).frames, films.frames[:CHUNK])
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "films").iterdir()} == files


def test_a_killed_rendering_goes_on_and_leaves_no_process(tmp_path):
    folder, count = tmp_path / "films", 3 * CHUNK
    script = tmp_path / "render.py"
    script.write_text(
        "from pathlib import Path\n"
        "from trfpp.train.films import FilmShelf\n"
        "if __name__ == '__main__':\n"
        f"    FilmShelf(Path({str(folder)!r}), ('control',), {count}, workers=1, **{SHELF!r}).take({count})\n"
    )
    process = start(str(script))
    wait_for(lambda: list(folder.glob("films-*")), process)
    workers = psutil.Process(process.pid).children(recursive=True)
    assert workers
    process.kill()
    process.communicate()
    wait_for(lambda: not any(worker.is_running() and worker.status() != "zombie" for worker in workers))
    there = {path: path.stat().st_mtime_ns for path in folder.glob("films-*")}

    again = FilmShelf(folder, ("control",), count, workers=1, **SHELF)
    films = again.take(count)
    again.close()
    assert len(films.frames) == count
    for index in range(0, count, 31):
        shown = film("control", SHELF["seed"], index, SHELF["num_frames"], SHELF["side"])
        assert np.array_equal(films.frames[index].numpy(), shown.frames)
    assert there.items() <= {path: path.stat().st_mtime_ns for path in folder.iterdir()}.items()
