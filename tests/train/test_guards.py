"""What goes wrong in a run: bad losses and gradients are laid to their clips; a full disk, a dead worker, a lost rank and
one that sees other files leave a sentence and a last checkpoint that can be gone on from."""

import logging
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import replace

import psutil
import pytest
import torch
import yaml

from trfpp.data_prep.latents import find_cache
from trfpp.train import loop, saver, setup
from trfpp.train.checkpoint import list_checkpoints
from trfpp.train.guards import SPIKE, Guard, first_bad
from trfpp.train.objective import Losses, Objective
from trfpp.train.processes import lost_process
from trfpp.trf.patch import read_card

NAN = float("nan")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")


def losses(*values, sigma=1.0):
    rows = torch.tensor(values)
    return Losses(
        total=rows.mean(),
        rows=rows,
        sigma=torch.full_like(rows, sigma),
        backward=torch.arange(len(values)) % 2 == 1,
        numbers=torch.arange(len(values)) + 10,
    )


def test_bad_rows_are_named_and_outstanding_ones_too():
    guard = Guard("clip {}".format)
    guard.add(1, losses(0.5, 0.7))
    guard.add(2, losses(0.6, NAN, float("inf")))
    bad, spikes = guard.review()
    assert [(row.step, row.clip) for row in bad] == [(2, "clip 10"), (2, "clip 11"), (2, "clip 12")]
    assert first_bad(bad) == (
        "a loss was not finite: clip clip 11 (reversed, sigma 1) at step 2: loss nan; "
        "clip clip 12 (as filmed, sigma 1) at step 2: loss inf"
    )
    assert spikes == []  # nothing was usual yet
    guard.add(3, losses(0.6, 0.6 * SPIKE * 0.9, 0.6 * SPIKE * 1.1))
    guard.add(4, losses(0.6 * SPIKE * 1.1, sigma=20.0))  # another noise level, with a usual loss of its own
    bad, spikes = guard.review()
    assert bad == []
    assert [(row.step, row.clip) for row in spikes] == [(3, "clip 12")]
    assert guard.review() == ([], [])


def test_a_bad_gradient_is_laid_to_the_rows_of_its_step_and_ends_a_row_of_bad_ones():
    guard, fine = Guard("clip {}".format), torch.tensor(1.0)
    for step, norm in enumerate((fine, fine * NAN, fine * float("inf"))):
        guard.add(step, losses(*[0.5] * 6))
        guard.gradient(step, norm)
    bad, _ = guard.review()
    assert [row.step for row in bad] == [1] * 6 + [2] * 6
    said = first_bad(bad)
    assert said.startswith("a gradient was not finite: clip clip 10 (as filmed, sigma 1) at step 1: loss 0.5; ")
    assert said.endswith("clip clip 13 (reversed, sigma 1) at step 1: loss 0.5; and 2 more")
    assert guard.in_a_row == 2
    guard.gradient(3, fine * NAN)
    guard.review()
    assert guard.in_a_row == 3
    guard.gradient(4, fine)
    guard.review()
    assert guard.in_a_row == 0


def spoiling(monkeypatch, steps, *, gradient_only=False):
    """Makes the loss of a training step not finite, or its gradient only."""
    real = Objective.losses

    @contextmanager
    def spoil(self, model, unet, batch, step):
        with real(self, model, unet, batch, step) as found:
            factor = NAN if step in steps and torch.is_grad_enabled() else 1.0
            rows = found.rows if gradient_only else found.rows * factor
            yield replace(found, total=found.total * factor, rows=rows)

    monkeypatch.setattr(Objective, "losses", spoil)


@pytest.fixture
def scaled(monkeypatch):
    """A gradient scaler as fp16 has on a GPU, around losses that are left as they are."""
    real = loop.make_accelerator

    def make(config):
        accelerator = real(config)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=1.0)
        return accelerator

    monkeypatch.setattr(loop, "make_accelerator", make)


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_clip(config, train_here, monkeypatch):
    spoiling(monkeypatch, {3})
    run = config(steps=6, checkpoint={"every": 1, "keep": 3})
    with pytest.raises(FloatingPointError, match=r"not finite: clip \S+ \(as filmed, sigma \S+\) at step 3: loss nan"):
        train_here(run)
    assert [path.name for path in list_checkpoints(run.output / "checkpoints")][-1] == "step-000003"


@pytest.mark.parametrize("saved", [1, 100])
def test_a_gradient_that_is_not_finite_stops_the_run_and_names_the_clips_of_its_step(
    config, train_here, monkeypatch, saved
):
    """Whether the log is written first or a checkpoint."""
    spoiling(monkeypatch, {2}, gradient_only=True)
    run = config(steps=6, log_every=6, checkpoint={"every": saved})
    with pytest.raises(
        FloatingPointError, match=r"a gradient was not finite: clip linear-\S+ .* at step 2: loss 0\.\d+;"
    ):
        train_here(run)
    assert [path.name for path in list_checkpoints(run.output / "checkpoints")][-1:] == ["step-000002"][: saved == 1]


@pytest.mark.parametrize("scaler", [False, True])
def test_such_steps_can_be_skipped_and_are_told_with_their_clips(
    config, train_here, monkeypatch, caplog, capsys, request, scaler
):
    if scaler:
        request.getfixturevalue("scaled")
    spoiling(monkeypatch, {2, 3, 5})
    with caplog.at_level(logging.WARNING):
        patch = train_here(config("whole", steps=6, on_nonfinite="skip"))
    said = [record.message for record in caplog.records if "skipped" in record.message]
    assert [message.split(",")[0] for message in said] == ["step 2 and 1 after it skipped", "step 5 skipped"]
    assert all("a loss was not finite: clip linear-" in message for message in said)
    assert "step 4 of 6: loss nan" in capsys.readouterr().out
    assert read_card(patch).training_steps == 6
    spoiling(monkeypatch, set(range(100)))
    with pytest.raises(FloatingPointError, match=r"the last 20 steps were skipped: .*clip linear-"):
        train_here(config("hopeless", steps=40, on_nonfinite="skip"))


def test_a_scaler_skips_gradients_and_losses_stop_the_run(config, train_here, monkeypatch, scaled, caplog):
    spoiling(monkeypatch, {2}, gradient_only=True)
    with caplog.at_level(logging.WARNING):
        assert read_card(train_here(config("overflow", steps=4))).training_steps == 4
    assert any("step 2 skipped, a gradient was not finite: clip linear-" in one.message for one in caplog.records)
    spoiling(monkeypatch, {3})
    with pytest.raises(FloatingPointError, match=r"a loss was not finite: clip \S+ .* at step 3"):
        train_here(config("lost", steps=4))


def test_a_full_disk_is_said_and_the_run_goes_on_from_the_checkpoint_before(config, train_elsewhere, tmp_path):
    run = config(steps=4, checkpoint={"every": 2}, lora={"targets": "all", "rank": 16})
    settings = tmp_path / "full.yaml"
    settings.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    code, _, err = finish(train_elsewhere(run.model_copy(update={"steps": 2})))
    assert code == 0, err
    size = (run.output / "patch" / "adapter_model.safetensors").stat().st_size
    full = subprocess.run(
        [sys.executable, "-m", "trfpp.train", str(settings)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (size // 2, size // 2)),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert full.returncode == 2
    assert "step-000004 was not saved:" in full.stderr
    assert "The checkpoints before it are whole" in full.stderr
    assert [path.name for path in list_checkpoints(run.output / "checkpoints")] == ["step-000002"]
    assert not list((run.output / "checkpoints").glob(".*"))
    code, out, err = finish(train_elsewhere(run))
    assert code == 0, err
    assert "resumed from" in out


@pytest.mark.parametrize("name", ["best", "patch"])
def test_a_patch_that_does_not_fit_the_disk_is_said_with_its_folder(config, train_here, monkeypatch, name):
    """Of a run whose checkpoints still did fit."""
    real = saver.save_patch

    def save(folder, *args):
        if folder.name != name:
            return real(folder, *args)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, before[1]))
        try:
            return real(folder, *args)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    monkeypatch.setattr(saver, "save_patch", save)
    run = config(steps=2, validation={"every": 1, "pairs": 1, "num_inference_steps": 1})
    with pytest.raises(OSError, match=rf"run/{name} was not saved: .*make room if the disk is full, and run again"):
        train_here(run)
    monkeypatch.undo()
    assert read_card(train_here(run)).training_steps == 2


def finish(process, seconds=180):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


def wait_for_checkpoint(run, process):
    deadline = time.monotonic() + 120
    while not list_checkpoints(run.output / "checkpoints") and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.02)
    assert process.poll() is None, process.communicate()[1]


def test_a_dead_loader_worker_is_said(config, train_elsewhere):
    run = config(steps=100_000, loader_workers=1, checkpoint={"every": 5, "keep": 1})
    process = train_elsewhere(run)
    wait_for_checkpoint(run, process)
    (worker,) = psutil.Process(process.pid).children()
    worker.kill()
    code, _, err = finish(process)
    assert code == 2, err
    assert "a process that reads clips ended" in err
    assert "run again to resume from it" in err
    assert "Traceback" not in err
    (last,) = list_checkpoints(run.output / "checkpoints")
    done = int(last.name.removeprefix("step-"))
    code, out, err = finish(train_elsewhere(run.model_copy(update={"steps": done + 2, "loader_workers": 0})))
    assert code == 0, err
    assert f"resumed from {last}" in out


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("DataLoader worker (pid(s) 7) exited unexpectedly"), "reads clips ended"),
        (ConnectionResetError(104, "Connection reset by peer"), "reads clips ended"),  # while it hands a batch over
        (ConnectionRefusedError(111, "Connection refused"), "reads clips ended"),
        (FileNotFoundError(2, "No such file or directory"), "reads clips ended"),  # its socket
        (FileNotFoundError(2, "No such file or directory", "clip.safetensors"), None),
        (ValueError("Caught ValueError in DataLoader worker process 0."), None),
        (EOFError(), "reads clips ended"),
        (RuntimeError("[gloo] Connection closed by peer"), "another of the 2 processes is gone"),
        (RuntimeError("shapes do not match"), None),
        (BrokenPipeError(32, "Broken pipe"), None),
        (ValueError("Connection"), None),
    ],
)
def test_lost_processes_are_told_from_other_errors(error, said):
    found = lost_process(error, 2)
    assert found is None if said is None else said in found


def test_a_lost_rank_is_said_by_those_that_are_left(config, train_elsewhere):
    run = config(steps=100_000, checkpoint={"every": 5, "keep": 1})
    process = train_elsewhere(run, TORCHRUN, ACCELERATE_USE_CPU="true")
    wait_for_checkpoint(run, process)
    ranks = {rank.environ()["RANK"]: rank for rank in psutil.Process(process.pid).children()}
    ranks["0"].send_signal(signal.SIGKILL)
    code, _, err = finish(process)
    assert code != 0
    assert "trfpp train (rank 1): another of the 2 processes is gone" in err
    assert list_checkpoints(run.output / "checkpoints")


PROGRAM = """
import os, sys
from contextlib import contextmanager
from dataclasses import replace
from trfpp.train.__main__ import main
from trfpp.train.objective import Objective

real = Objective.losses

@contextmanager
def spoil(self, model, unet, batch, step):
    with real(self, model, unet, batch, step) as found:
        factor = float("nan") if step == 3 and os.environ["RANK"] == "1" else 1.0
        yield replace(found, total=found.total * factor, rows=found.rows * factor)

Objective.losses = spoil
raise SystemExit(main(sys.argv[-1:]))
"""


def test_the_first_bad_step_is_named_whichever_rank_had_it(config, train_elsewhere, tmp_path):
    """Its gradient spoils the weights of both, and with them all later losses of the other rank too."""
    (tmp_path / "program.py").write_text(PROGRAM)
    process = train_elsewhere(
        config(steps=12, log_every=12, checkpoint={"every": 100}),
        (*TORCHRUN, str(tmp_path / "program.py")),
        ACCELERATE_USE_CPU="true",
    )
    code, _, err = finish(process)
    assert code != 0
    said = [line for line in err.splitlines() if line.startswith("trfpp train (rank ")]
    assert said
    assert all("a loss was not finite: clip linear-" in line for line in said)
    assert all(line.count("at step") == line.count("at step 3: loss nan") == 1 for line in said)


def test_what_one_rank_alone_sees_is_said_by_it(config, dataset, train_elsewhere, tmp_path):
    """A clip that is gone from the cache, which the first step takes to the second rank."""
    data = tmp_path / "data"
    shutil.copytree(dataset, data)
    cache = find_cache(data, "miniature", None)
    run = config(data=data, steps=2)
    samples = setup.make_samples(run, cache, "train", per_step=2)
    (cache / f"{samples.clip_of(1).clip_id}.safetensors").unlink()
    code, _, err = finish(train_elsewhere(run, TORCHRUN, ACCELERATE_USE_CPU="true"))
    assert code != 0
    assert f"trfpp train (rank 1): {cache}" in err


def test_ranks_that_would_start_from_different_steps_are_refused(config, train_here, train_elsewhere, tmp_path):
    """Each has an output folder of its own; only the first one's holds a checkpoint."""
    run = config(steps=2, gradient_accumulation=2)
    train_here(run)
    (tmp_path / "apart.py").write_text(
        "import os, sys\n"
        "from trfpp.train.__main__ import main\n"
        "own = [f'output={sys.argv[1]}/other'] if os.environ['RANK'] == '1' else []\n"
        "raise SystemExit(main([sys.argv[-1], *own]))\n"
    )
    more = run.model_copy(update={"steps": 4, "gradient_accumulation": 1})
    words = (*TORCHRUN, str(tmp_path / "apart.py"), str(tmp_path))
    code, _, err = finish(train_elsewhere(more, words, ACCELERATE_USE_CPU="true"))
    assert code != 0
    assert "rank 0 would start from step 2, rank 1 from step 0; give all processes one output folder" in err
    assert not (tmp_path / "other" / "patch").exists()
