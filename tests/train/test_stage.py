"""One stage of pretraining: stopped anywhere and started again it gives the same bits and the same curve."""

import csv
import os
import signal
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from torch import nn

from trfpp.train.optim import optimizer_state, restore_optimizer
from trfpp.train.stage import StageSettings, StageStopped, cosine, fit

SETTINGS = StageSettings(steps=12, lr=0.05, warmup_steps=3, weight_decay=0.01, ema=0.9, checkpoint_every=6, log_every=3)


def network():
    with torch.random.fork_rng():
        torch.manual_seed(0)
        used, unused = nn.Linear(4, 2), nn.Linear(3, 3)
    return nn.ModuleDict({"used": used, "unused": unused})


def losses_of(model, at=None, event=lambda: None):
    def losses(step):
        if step == at:
            event()
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        error = (model["used"](x) - x[:, :2] * 3).square().mean()
        return {"loss": error, "root": error.sqrt()}

    return losses


def run(folder, settings=SETTINGS, **event):
    folder.mkdir(exist_ok=True)
    model = network()
    fit("toy", [model], losses_of(model, **event), settings, folder)
    return model.state_dict()


def curve(folder):
    with (folder / "toy.csv").open() as file:
        return [{key: value for key, value in row.items() if key != "steps per second"} for row in csv.DictReader(file)]


def equal(one, other):
    return all(torch.equal(one[key], other[key]) for key in one)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("at", [0, 4, 5, 10, 11])
def test_a_stage_that_was_stopped_goes_on_to_the_bit(tmp_path, at, number):
    whole = run(tmp_path / "whole")
    before = signal.getsignal(number)
    with pytest.raises(StageStopped) as stopped:
        run(tmp_path / "parts", at=at, event=lambda: os.kill(os.getpid(), number))
    assert stopped.value.number == number
    assert signal.getsignal(number) is before
    # It ends after the step in which it was asked to, with a checkpoint; also after the last, so that no stage follows.
    calls = []
    assert equal(run(tmp_path / "parts", at=at, event=lambda: calls.append(1)), whole)
    assert not calls
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


@pytest.mark.parametrize("at", [2, 5, 7, 11])
def test_a_stage_that_was_killed_goes_on_from_its_checkpoint(tmp_path, at):
    whole = run(tmp_path / "whole")

    def crash():
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "parts", at=at, event=crash)
    assert equal(run(tmp_path / "parts"), whole)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_checkpoints_need_not_fall_on_lines_of_the_curve(tmp_path):
    settings = replace(SETTINGS, checkpoint_every=4)
    whole = run(tmp_path / "whole", settings)

    def crash():
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "parts", settings, at=10, event=crash)
    assert equal(run(tmp_path / "parts", settings), whole)
    assert curve(tmp_path / "parts") == curve(tmp_path / "whole")


def test_a_finished_stage_takes_no_more_steps(tmp_path):
    whole = run(tmp_path)
    lines = (tmp_path / "toy.csv").read_text()

    def fail():
        raise AssertionError("a step was taken")

    for step in range(SETTINGS.steps):
        assert equal(run(tmp_path, at=step, event=fail), whole)
    assert (tmp_path / "toy.csv").read_text() == lines


def test_a_stage_ends_with_the_average_if_there_is_one(tmp_path):
    last = run(tmp_path / "last", StageSettings(steps=12, lr=0.05, warmup_steps=3, weight_decay=0.01, log_every=3))
    averaged = run(tmp_path / "averaged")
    assert not torch.equal(last["used.weight"], averaged["used.weight"])
    assert torch.allclose(last["used.weight"], averaged["used.weight"], atol=0.3)
    assert torch.equal(last["unused.weight"], network().state_dict()["unused.weight"])  # what no loss reaches stays
    assert float(curve(tmp_path / "averaged")[-1]["loss"]) < 0.85 * float(curve(tmp_path / "averaged")[0]["loss"])


def test_a_loss_that_is_not_finite_is_said_with_its_step(tmp_path):
    model = network()

    def losses(step):
        return {"loss": model["used"].weight.sum() * (float("nan") if step == 4 else 1.0)}

    with pytest.raises(FloatingPointError, match="toy: the loss became nan by step 6; lower its lr"):
        fit("toy", [model], losses, SETTINGS, tmp_path)
    assert not list(tmp_path.glob("*.safetensors"))


def test_the_rate_rises_linearly_and_falls_along_a_cosine():
    rates = [cosine(step, SETTINGS) for step in range(SETTINGS.steps + 1)]
    assert rates[:3] == pytest.approx([0.05 / 3, 0.1 / 3, 0.05])
    assert rates[3] == pytest.approx(0.05)
    assert rates[-1] == pytest.approx(0)
    assert all(later < earlier for earlier, later in pairwise(rates[3:]))
    middle = StageSettings(steps=13, lr=1.0, warmup_steps=3)
    assert cosine(8, middle) == pytest.approx(0.5)


@pytest.mark.parametrize("fused", [False, True])
def test_an_optimizers_state_is_restored_to_the_bit(fused):
    def make():
        model = network()
        return model, torch.optim.AdamW(model.parameters(), lr=0.1, fused=fused)

    def step(model, optimizer, number):
        losses_of(model)(number)["loss"].backward()
        optimizer.step()
        optimizer.zero_grad()

    one, other = make(), make()
    for number in range(3):
        step(*one, number)
    other[0].load_state_dict(one[0].state_dict())
    restore_optimizer(other[1], *optimizer_state(one[1]))
    for number in range(3, 5):
        step(*one, number)
        step(*other, number)
    assert equal(one[0].state_dict(), other[0].state_dict())
