"""Between two log entries the loop asks the device for nothing: every `.item()`, `bool()` and `nonzero()` of a tensor would
make the host wait until all that was sent to a GPU is done. Nor does it keep VAE and CLIP there."""

import signal
import sys
import tempfile
import time

import psutil
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from trfpp.train.checkpoint import list_checkpoints
from trfpp.train.log import TrainingLog
from trfpp.train.processes import Agreement
from trfpp.train.validate import Validator
from trfpp.trf.patch import read_card

COMPANIONS = ("AutoencoderKLTemporalDecoder", "CLIPVisionModelWithProjection")

QUESTIONS = {"aten::_local_scalar_dense", "aten::item", "aten::nonzero", "aten::is_nonzero", "aten::equal"}
RUNS = {
    "forward": {},
    "both": {"direction": "both", "objective": {"fusion": 0.5}},
    "alternating": {"direction": "both", "objective": {"alternate_directions": True}},
    "rotated": {"direction": "both", "objective": {"rotated_attention": True}},
    "dora both": {"direction": "both", "lora": {"kind": "dora"}},
    "recomputed, accumulated": {"gradient_checkpointing": True, "gradient_accumulation": 2, "ema": 0.9},
    "schedule-free": {"optim": {"name": "adamw_schedulefree"}},
    "bf16": {"precision": "bf16"},
}


ANSWERS = ("tolist", "cpu", "numpy")
"""Methods that ask, too, and of which the profiler knows nothing."""


def within_adam(event):
    """The fused optimizer's kernel reads its counters where they lie: on a GPU in the GPU, here on the CPU."""
    while event is not None and event.name != "aten::_fused_adamw_":
        event = event.cpu_parent
    return event is not None


def watched(name, steps, seen):
    """A method of tensors that notes its name in `seen` between steps 1 and 3."""
    usual = getattr(torch.Tensor, name)

    def ask(tensor, *args, **kwargs):
        if steps == [1] and tensor.is_floating_point():  # the loader's clip numbers lie in the host's memory
            seen.add(name)
        return usual(tensor, *args, **kwargs)

    return ask


@pytest.fixture
def recorded(config, train_here, monkeypatch):
    """Trains, and gives the names of the operations of steps 2 and 3, of which none writes to the log."""

    def train(**changes):
        recorder, seen, real = profile(activities=[ProfilerActivity.CPU]), set(), TrainingLog.step
        steps = []
        for name in ANSWERS:
            monkeypatch.setattr(torch.Tensor, name, watched(name, steps, seen))

        def step(log, done, *args):
            if done == 3:
                steps.append(3)
                recorder.stop()
                seen.update(event.name for event in recorder.events() if not within_adam(event))
            real(log, done, *args)
            if done == 1:
                recorder.start()
                steps.append(1)

        monkeypatch.setattr(TrainingLog, "step", step)
        shared = {"steps": 4, "log_every": 100, "checkpoint": {"every": 100}, "loader_workers": 1}
        train_here(config(**{**shared, **changes}))
        return seen

    return train


@pytest.mark.parametrize("run", RUNS)
def test_a_step_asks_nothing(recorded, run):
    seen = recorded(**RUNS[run])
    assert "aten::conv2d" in seen
    assert seen & {*QUESTIONS, *ANSWERS} == set()


def test_a_signal_to_one_of_two_processes_ends_both_at_one_step(config, train_elsewhere):
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    run = config(steps=100_000, checkpoint={"every": 5, "keep": 1})
    process = train_elsewhere(run, launcher, ACCELERATE_USE_CPU="true")
    checkpoints = run.output / "checkpoints"
    deadline = time.monotonic() + 300
    while not list_checkpoints(checkpoints) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    ranks = {rank.environ()["RANK"]: rank for rank in psutil.Process(process.pid).children()}
    ranks["1"].send_signal(signal.SIGTERM)
    _, err = process.communicate(timeout=300)
    assert "run the same command again to go on" in err
    (last,) = list_checkpoints(checkpoints)
    assert read_card(last).training_steps == int(last.name.removeprefix("step-"))


def test_processes_agree_one_step_late_and_alone_at_once():
    alone = Agreement(1)
    assert [alone(0), alone(15), alone.close()] == [0, 15, 0]
    address = f"file://{tempfile.mkdtemp()}/store"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    try:
        group = Agreement(2)
        assert [group(0), group(15), group(0), group(2), group.close(), group.close()] == [0, 0, 15, 0, 2, 0]
    finally:
        torch.distributed.destroy_process_group()


def test_vae_and_clip_are_away_but_for_sampling(config, train_here, monkeypatch):
    where, losses = {}, Validator._losses
    moved = torch.nn.Module.to

    def watch(module, *args, **kwargs):
        where[type(module).__name__] = str(args[0]) if args else ""
        return moved(module, *args, **kwargs)

    def check(validator, unet):
        seen.append({name: place for name, place in where.items() if name in COMPANIONS})
        return losses(validator, unet)

    seen = []
    monkeypatch.setattr(torch.nn.Module, "to", watch)
    monkeypatch.setattr(Validator, "_losses", check)
    monkeypatch.setattr(Validator, "device", property(lambda self: "cpu:0", lambda self, value: None), raising=False)
    train_here(config(steps=1, validation={"every": 1, "pairs": 1, "num_inference_steps": 1}))
    assert seen == [dict.fromkeys(COMPANIONS, "cpu")] * 2


def test_what_has_to_ask_is_seen(recorded):
    """Or the test above would hold nothing."""
    assert "aten::item" in recorded(on_nonfinite="skip")
