"""The best validation and patience: which counts as better, what resuming sees again or makes up for, and whole runs that
stop early."""

import json
import shutil
import signal

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trfpp.train import loop, validate
from trfpp.train.best import Best, record, replay, trim
from trfpp.train.checkpoint import list_checkpoints
from trfpp.trf.patch import read_card

VALIDATION = {"every": 1, "pairs": 1, "num_inference_steps": 1}


@pytest.mark.parametrize(
    ("metric", "values", "best"),
    [("inner_psnr", [20, 22, 21, float("nan"), 22], 2), ("loss", [0.3, 0.2, float("nan"), 0.25, 0.1], 5)],
)
def test_the_best_is_the_highest_or_lowest_and_patience_counts_from_it(metric, values, best):
    follower = Best(metric, patience=3)
    for step, value in enumerate(values, 1):
        follower.update(step, {metric: value})
    assert follower.step == best
    assert follower.since == len(values) - best
    assert follower.exhausted == (follower.since >= 3)
    assert not Best(metric).exhausted


def test_replaying_gives_the_same_and_trimming_drops_what_comes_again(tmp_path):
    file, whole = tmp_path / "metrics.jsonl", Best("loss", 2)
    rows = [{"step": step, "loss": loss} for step, loss in ((0, 0.1), (2, 0.5), (4, 0.4), (6, 0.45), (8, 0.46))]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    replay(whole, file, 8, "one")
    assert (whole.step, whole.since, whole.exhausted) == (4, 2, True)  # the base model, step 0, does not count
    part = Best("loss", 2)
    replay(part, file, 6, "one")
    assert (part.step, part.since) == (4, 1)
    trim(file, 6)
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [0, 2, 4, 6]
    assert replay(Best("loss"), tmp_path / "nothing.jsonl", 8, "one") is None


def test_a_line_cut_off_is_no_validation_and_goes(tmp_path):
    file, best = tmp_path / "validation.jsonl", Best("loss")
    for step, loss in ((2, 0.5), (4, 0.4), (6, 0.3)):
        record(file, step, {"loss": loss}, "one")
    assert replay(Best("loss"), file, 6, "one") == {"loss": 0.3}
    file.write_text(file.read_text()[:-9])
    assert replay(best, file, 6, "one") is None
    assert (best.step, best.value) == (4, 0.4)
    trim(file, 6)
    record(file, 6, {"loss": 0.3}, "one")
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == [2, 4, 6]


def test_what_was_measured_in_another_manner_is_not_compared(tmp_path):
    file, best = tmp_path / "validation.jsonl", Best("disagreement")
    record(file, 2, {"inner_psnr": 20.0}, "by vibid")
    record(file, 4, {"inner_psnr": 21.0, "disagreement": 0.4}, "by trf")
    assert replay(best, file, 4, "by trf") == {"inner_psnr": 21.0, "disagreement": 0.4}
    assert (best.step, best.since) == (4, 0)
    assert replay(Best("inner_psnr"), file, 2, "by trf") is None


def test_another_metric_begins_anew_and_another_sampler_too(config, train_here):
    """A run that goes on keeps in `best` what is the best by its own metric."""
    run = config("run", steps=2, optim={"schedule": "constant"}, validation={**VALIDATION, "best": "loss"})
    train_here(run)
    kept = read_card(run.output / "best").training_steps
    lines = [json.loads(line) for line in (run.output / "validation.jsonl").read_text().splitlines()]
    assert len({line["manner"] for line in lines}) == 1
    lines = [{**line, "inner_psnr": -line["step"] if kept == 2 else line["step"]} for line in lines]
    (run.output / "validation.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    more = config("run", steps=3, optim={"schedule": "constant"}, validation={**VALIDATION, "best": "inner_psnr"})
    train_here(more)
    assert read_card(run.output / "best").training_steps == 3  # whatever it has: the earlier best's weights are gone
    sampled = config(
        "run", steps=4, optim={"schedule": "constant"}, validation=VALIDATION, sampler={"sampler": "trf++"}
    )
    train_here(sampled)
    lines = [json.loads(line) for line in (run.output / "validation.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 1, 2, 3, 3, 4]  # where it went on with another sampler, once more
    assert [line["manner"] == lines[-1]["manner"] for line in lines] == 4 * [False] + 2 * [True]


@pytest.mark.parametrize("at", ["generation", "record"])
def test_a_run_killed_during_its_last_validation_makes_it_when_it_goes_on(config, train_here, monkeypatch, at):
    """Whether it had its pictures by then, and the best patch, or not."""
    whole, run = (config(name, steps=2, validation={**VALIDATION, "best": "loss"}) for name in ("whole", "run"))
    train_here(whole)
    place, name = (validate.Validator, "_generate") if at == "generation" else (loop, "record")
    real, calls = getattr(place, name), []

    def kill(*args):
        calls.append(1)
        if len(calls) == 3:  # after the base model and the first step
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(place, name, kill)
    with pytest.raises(KeyboardInterrupt):
        train_here(run)
    assert list_checkpoints(run.output / "checkpoints")[-1].name == "step-000002"
    monkeypatch.undo()
    train_here(run)
    assert (run.output / "validation.jsonl").read_text() == (whole.output / "validation.jsonl").read_text()
    for folder in ("patch", "best"):
        ours, theirs = (read_card(one.output / folder) for one in (run, whole))
        assert ours.training_steps == theirs.training_steps
        assert {k: v for k, v in ours.metrics.items() if "validation" in k} == {
            k: v for k, v in theirs.metrics.items() if "validation" in k
        }


@pytest.mark.parametrize("number", [1, 2, 3], ids=["of the base", "on the way", "the last one"])
def test_a_validation_that_a_signal_cuts_off_comes_when_the_run_goes_on(config, train_here, monkeypatch, number):
    settings = dict(steps=2, validation={**VALIDATION, "pairs": 2, "best": "loss"})
    whole, run = config("whole", **settings), config("run", **settings)
    train_here(whole)
    real, calls = validate.Validator._generate, []

    def asked_to_stop(*args):
        calls.append(1)
        if len(calls) == 2 * number - 1:  # in the first pair of that validation
            signal.raise_signal(signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(validate.Validator, "_generate", asked_to_stop)
    with pytest.raises(KeyboardInterrupt if number == 1 else loop.Stopped):
        train_here(run)
    steps = [path.name for path in list_checkpoints(run.output / "checkpoints")]
    assert steps[-1:] == [[], ["step-000001"], ["step-000002"]][number - 1]  # where the validation was to be
    monkeypatch.undo()
    train_here(run)
    assert (run.output / "validation.jsonl").read_text() == (whole.output / "validation.jsonl").read_text()
    ours, theirs = (read_card(one.output / "patch") for one in (run, whole))
    assert ours.metrics["validation loss"] == theirs.metrics["validation loss"]


def test_weights_that_are_not_finite_are_never_the_best(config, train_here):
    """Although a video of nothing but NaN, as pixels, is as near the truth as any black one."""
    run = config(
        steps=6, log_every=6, optim={"lr": 1e39, "warmup_steps": 0}, validation={**VALIDATION, "best": "inner_psnr"}
    )
    with pytest.raises(FloatingPointError, match="not finite at step 1"):
        train_here(run)
    assert not (run.output / "best").exists()


def test_patience_that_ends_with_a_validation_made_late_ends_the_run(config, train_here, monkeypatch):
    """At a hopeless rate; the kill comes in the validation that would have ended it."""
    run = config(steps=6, optim={"lr": 3.0}, validation={**VALIDATION, "best": "loss", "patience": 1})
    stopped = read_card(train_here(run)).training_steps
    assert stopped < 6
    shutil.rmtree(run.output / "patch")
    file = run.output / "validation.jsonl"
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:-1]))
    assert read_card(train_here(run)).training_steps == stopped


def test_a_run_that_gets_no_better_stops_and_stays_stopped(config, train_here, capsys):
    """At a hopeless rate the first step is the best."""
    run = config(steps=6, optim={"lr": 3.0}, validation={**VALIDATION, "best": "loss", "patience": 2})
    patch = train_here(run)
    rows = [json.loads(line) for line in (run.output / "validation.jsonl").read_text().splitlines()]
    assert {"inner_psnr", "bound_psnr", "disagreement", "motion_ratio", "loss"} <= rows[0].keys()
    losses = [row["loss"] for row in rows]
    at = losses.index(min(losses[1:]))
    assert [row["step"] for row in rows] == list(range(at + 3))
    assert read_card(patch).training_steps == at + 2 < 6
    assert f"no validation since step {at} had a better loss" in capsys.readouterr().out
    best = read_card(run.output / "best")
    assert (best.training_steps, best.metrics["validation loss"]) == (at, pytest.approx(losses[at]))
    (log,) = (EventAccumulator(str(run.output / "log")).Reload(),)
    (clip,) = {name for name in log.Tags()["images"] if name.endswith("/video")}
    assert log.Images(clip)[0].encoded_image_string[:3] == b"GIF"
    assert len(list((run.output / "validation" / "step-000001").glob("*.mp4"))) == 1

    before = load_file(patch / "adapter_model.safetensors")
    train_here(run)
    assert "all steps are done" in capsys.readouterr().out
    after = load_file(patch / "adapter_model.safetensors")
    assert all(torch.equal(before[key], after[key]) for key in before)
    more = config(steps=6, optim={"lr": 3.0}, validation={**VALIDATION, "best": "loss"})
    assert read_card(train_here(more)).training_steps == 6
