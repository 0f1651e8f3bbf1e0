"""Whole training runs: what they leave behind, being killed and resumed, signals, and two processes against one."""

import json
import os
import random
import signal
import subprocess
import sys
import termios
from statistics import median

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from trfpp.data_prep.dataset import load_clips, prepare
from trfpp.data_prep.procedural import write_world
from trfpp.train.objective import Objective
from trfpp.train.processes import StopRequest, check_processes
from trfpp.trf.patch import read_card, weight_files

TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")


def weights(folder):
    """Of all adapters of a patch, by names that tell them apart."""
    files = weight_files(folder).items()
    return {f"{part}:{key}": value for part, file in files for key, value in load_file(file).items()}


def adapter(folder, part=""):
    return {key: value for key, value in weights(folder).items() if key.startswith(f"{part}:")}


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def relative(one, other):
    difference = sum(float((one[key] - other[key]).square().sum()) for key in one)
    return (difference / sum(float(other[key].square().sum()) for key in other)) ** 0.5


def finish(process, seconds=180):
    out, err = process.communicate(timeout=seconds)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Kept between the tests below: the patch of one uninterrupted run in a process of its own."""
    return {}


@pytest.fixture
def uninterrupted(reference, config, train_elsewhere):
    if not reference:
        run = config("uninterrupted", gradient_accumulation=2, steps=8)
        code, _, err = finish(train_elsewhere(run))
        assert code == 0, err
        reference["weights"] = weights(run.output / "patch")
    return reference["weights"]


def test_a_run_leaves_a_patch_a_log_pictures_and_its_settings(config, train_here):
    run = config(validation={"every": 3, "pairs": 1, "num_inference_steps": 2})
    patch = train_here(run)
    card = read_card(patch)
    assert (card.training_steps, card.num_frames, card.height, card.width) == (6, 4, 32, 32)
    assert card.fps == pytest.approx(median(load_clips(run.data, "train")["fps"]), abs=1e-3)
    assert card.motion is not None
    assert card.motion.motion_bucket_median > 0
    assert card.calibration is None  # so few clips say nothing
    assert {"train loss", "validation loss", "validation inner_psnr"} <= card.metrics.keys()
    assert all(float(value.abs().max()) > 0 for key, value in weights(patch).items() if "lora_B" in key)

    log = EventAccumulator(str(run.output / "log")).Reload()
    scalars = log.Tags()["scalars"]
    assert {"train/loss", "train/learning rate", "train/gradient norm", "train/clips per second"} <= set(scalars)
    assert any(name.startswith("loss by noise/") for name in scalars)
    assert [event.step for event in log.Scalars("train/loss")] == [2, 4, 6]
    assert len(log.Tags()["images"]) == 2  # frames side by side, and a video
    steps = [path.name for path in sorted((run.output / "validation").iterdir())]
    assert steps == ["step-000000", "step-000003", "step-000006"]
    assert all(len(list((run.output / "validation" / step).glob("*.png"))) == 1 for step in steps)
    assert "steps: 6" in (run.output / "train.yaml").read_text()
    assert [path.name for path in sorted((run.output / "checkpoints").iterdir())] == ["step-000004", "step-000006"]


def test_the_same_seed_gives_the_same_bits_and_validation_moves_nothing(config, train_here):
    plain = weights(train_here(config("plain", steps=3)))
    validated = config("validated", steps=3, validation={"every": 1, "pairs": 1, "num_inference_steps": 1})
    again = weights(train_here(validated))
    other = weights(train_here(config("other", steps=3, seed=1)))
    assert all(torch.equal(plain[key], again[key]) for key in plain)
    assert not any(torch.equal(plain[key], other[key]) for key in plain)


@pytest.mark.parametrize("norm", [None, 1e-3])
def test_two_directions_in_one_run_are_two_runs(config, train_here, norm):
    """Neither adapter feels the other, not even where the gradient is clipped; up to rounding, for batches differ."""
    optim = {"max_grad_norm": norm, "eps": 1.0, "lr": 0.1}  # a large eps, or Adam would blow rounding up
    shared = {"batch_size": 2, "steps": 4, "optim": optim}
    both = train_here(config("both", direction="both", **shared))
    alone = {part: weights(train_here(config(part, direction=part, **shared))) for part in ("forward", "backward")}
    updates = []
    for part, theirs in alone.items():
        ours = {key.removeprefix(part): value for key, value in adapter(both, part).items()}
        updates.append({key: value for key, value in ours.items() if "lora_B" in key})
        assert ours.keys() == theirs.keys()
        assert relative(ours, theirs) < 1e-5
        assert relative(updates[-1], {key: theirs[key] for key in updates[-1]}) < 1e-5
    assert relative(*updates) > 0.1


def test_two_directions_leave_a_patch_with_both_and_a_log_of_each(config, train_here, capsys):
    run = config(
        "both",
        direction="both",
        gradient_checkpointing=True,
        validation={"every": 6, "pairs": 1, "num_inference_steps": 1},
    )
    patch = train_here(run)
    card = read_card(patch)
    assert (card.direction, card.training_steps) == ("both", 6)
    named = {f"{when} loss{way}" for when in ("train", "validation") for way in ("", "_forward", "_backward")}
    assert named <= card.metrics.keys()
    for when in ("train", "validation"):
        loss, forward, backward = (card.metrics[f"{when} loss{way}"] for way in ("", "_forward", "_backward"))
        assert loss == pytest.approx((forward + backward) / 2, rel=1e-5)
        assert forward != backward
    scalars = EventAccumulator(str(run.output / "log")).Reload()
    assert [event.step for event in scalars.Scalars("train/loss_forward")] == [2, 4, 6]
    said = capsys.readouterr().out
    assert "both: every clip as filmed for one adapter, and reversed in time for another" in said
    size = sum(value.numel() for value in adapter(patch, "forward").values())
    assert f"2 adapters of {size:,} trainable parameters" in said
    assert size == sum(value.numel() for value in adapter(patch, "backward").values())


@pytest.mark.parametrize("direction", ["backward", "both", "either"])
def test_any_direction_goes_on_to_the_bit(config, train_here, direction):
    shared = {"direction": direction, "validation": {"every": 2, "pairs": 1, "num_inference_steps": 1}}
    whole = weights(train_here(config("whole", steps=4, **shared)))
    train_here(config("parts", steps=2, **shared))
    assert equal(weights(train_here(config("parts", steps=4, **shared))), whole)
    assert all(float(value.abs().max()) > 0 for value in whole.values())
    forward = weights(train_here(config("forward", steps=4)))
    assert not any(torch.equal(value, forward.get(key, torch.zeros(0))) for key, value in whole.items())


def test_validation_samples_each_adapter_on_its_half(config, train_here, monkeypatch):
    from trfpp.train import validate
    from trfpp.trf.adapters import active_scales

    seen, real = [], validate.Validator._generate

    def watch(self, pipe, *args):
        seen.append(active_scales(pipe.unet))
        return real(self, pipe, *args)

    monkeypatch.setattr(validate.Validator, "_generate", watch)
    check = {"every": 1, "pairs": 1, "num_inference_steps": 1}
    for direction in ("forward", "backward", "both"):
        train_here(config(direction, direction=direction, steps=1, validation=check))
    assert (
        seen[::2]
        == seen[1::2]
        == [
            {"default": 1.0},
            {"default": (0.0, 1.0)},
            {"default/forward": (1.0, 0.0), "default/backward": (0.0, 1.0)},
        ]
    )


def test_a_run_of_another_direction_is_not_continued(config, train_here):
    train_here(config(steps=2))
    with pytest.raises(ValueError, match=r"direction \(was 'forward', is 'backward'\)"):
        train_here(config(steps=4, direction="backward"))
    state = config().output / "checkpoints" / "step-000002" / "state.json"
    content = json.loads(state.read_text())
    del content["settings"]["direction"]  # as before there were directions
    state.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"trained with direction=forward, not backward"):
        train_here(config(steps=4, direction="backward"))
    assert read_card(train_here(config(steps=4))).training_steps == 4


def test_dropout_is_seeded_by_the_step(config, train_here):
    lora = {"dropout": 0.5}
    whole = weights(train_here(config("whole", steps=4, lora=lora)))
    train_here(config("parts", steps=2, lora=lora))
    parts = weights(train_here(config("parts", steps=4, lora=lora)))
    assert all(torch.equal(whole[key], parts[key]) for key in whole)


def test_a_finished_run_goes_on_when_given_more_steps(config, train_here):
    whole = weights(train_here(config("whole", steps=4)))
    train_here(config("longer", steps=2))
    longer = weights(train_here(config("longer", steps=4)))
    assert all(torch.equal(whole[key], longer[key]) for key in whole)
    again = weights(train_here(config("longer", steps=4)))
    assert all(torch.equal(longer[key], again[key]) for key in longer)


def test_a_run_with_other_settings_is_not_continued(config, train_here):
    train_here(config(steps=2))
    with pytest.raises(ValueError, match=r"lora\.rank \(was 2, is 4\)"):
        train_here(config(steps=4, lora={"rank": 4}))


def test_the_gradient_is_clipped(config, train_here):
    log = {}
    for name, norm in (("clipped", 1e-3), ("free", None)):
        optim = {"max_grad_norm": norm, "eps": 1.0, "warmup_steps": 0}  # a large eps keeps Adam's step proportional
        log[name] = weights(train_here(config(name, steps=1, optim=optim)))
    sizes = {
        name: sum(float(v.square().sum()) for k, v in state.items() if "lora_B" in k) ** 0.5
        for name, state in log.items()
    }
    assert sizes["clipped"] == pytest.approx(1e-2 * 1e-3, rel=0.05)
    assert sizes["free"] > 3 * sizes["clipped"]


@pytest.mark.parametrize("precision", ["bf16"])
def test_half_precision_keeps_the_adapter_in_float32(config, train_here, precision):
    patch = train_here(config(precision=precision, steps=3, gradient_checkpointing=True))
    assert {value.dtype for value in weights(patch).values()} == {torch.float32}


def test_the_8_bit_optimizer_trains(config, train_here):
    patch = train_here(config(optim={"name": "adamw8bit"}, steps=3))
    assert all(bool(value.isfinite().all()) for value in weights(patch).values())


def test_weights_and_biases_gets_the_same(config, train_here, tmp_path, monkeypatch):
    """A stand-in for its client, which wants an account: the calls are accelerate's own."""
    (tmp_path / "client").mkdir()
    (tmp_path / "client" / "wandb.py").write_text(
        "calls = []\n"
        "class Run:\n"
        "    def log(self, values, **kwargs): calls.append((kwargs.get('step'), sorted(values)))\n"
        "    def finish(self): calls.append('finished')\n"
        "def init(**kwargs):\n"
        "    calls.append(kwargs)\n"
        "    return Run()\n"
        "def Image(picture, **kwargs): return picture\n"
    )
    monkeypatch.syspath_prepend(tmp_path / "client")
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    train_here(config(wandb=True, steps=2, validation={"every": 2, "pairs": 1, "num_inference_steps": 1}))
    calls = sys.modules["wandb"].calls
    assert calls[0] == {"project": "trfpp"}
    assert any(isinstance(call, tuple) and call[0] == 2 and "train/loss" in call[1] for call in calls)
    assert any(isinstance(call, tuple) and any(name.startswith("validation/") for name in call[1]) for call in calls)
    monkeypatch.delitem(sys.modules, "wandb")


def test_no_vae_and_no_clip_tower_are_loaded_for_training(config, train_here, monkeypatch):
    from trfpp.train import model, validate

    loaded = []
    real = model.load_component
    for module in (model, validate):
        monkeypatch.setattr(
            module, "load_component", lambda m, name, **kw: (loaded.append(name), real(m, name, **kw))[1]
        )
    train_here(config(steps=1))
    assert loaded == ["unet"]


PROGRAM = """
import json, os, random, signal, sys, yaml
from trfpp.configs.training import TrainConfig
from trfpp.train import checkpoint, loop
config = TrainConfig.model_validate_json(json.dumps(yaml.safe_load(open(sys.argv[1]))))
def die(*args, **kwargs):
    os.kill(os.getpid(), signal.SIGKILL)
where, number = sys.argv[2], int(sys.argv[3])
if where == "saving":
    real_save, calls = checkpoint.save_file, []
    def save_file(tensors, path):
        calls.append(path)
        if len(calls) == number:
            path.write_bytes(b"half a file")
            die()
        real_save(tensors, path)
    checkpoint.save_file = save_file
else:
    from trfpp.train.objective import Objective
    real_losses, calls = Objective.losses, []
    def losses(*args):
        calls.append(1)
        if len(calls) == number:
            die()
        return real_losses(*args)
    Objective.losses = losses
loop.train(config)
"""


@pytest.mark.parametrize("where", ["stepping", "saving"])
def test_killed_and_started_again_ends_with_the_same_bits(config, train_elsewhere, uninterrupted, tmp_path, where):
    """SIGKILL at a random batch, another on every run of this test, and half-way through writing a checkpoint."""
    run = config(f"killed_{where}", gradient_accumulation=2, steps=8, checkpoint={"every": 2})
    number = 2 if where == "saving" else random.randrange(1, 17)
    program, settings = tmp_path / "die.py", tmp_path / "die.yaml"
    program.write_text(PROGRAM)
    settings.write_text(yaml.safe_dump(run.model_dump(mode="json")))
    died = subprocess.run(
        [sys.executable, str(program), str(settings), where, str(number)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert died.returncode == -signal.SIGKILL, died.stderr
    assert not (run.output / "patch").exists()
    code, out, err = finish(train_elsewhere(run))
    assert code == 0, err
    assert ("resumed from" in out) == (where == "saving" or number > 4), f"killed at batch {number}"
    ended = weights(run.output / "patch")
    assert all(torch.equal(ended[key], uninterrupted[key]) for key in uninterrupted), f"killed at batch {number}"
    assert not list((run.output / "checkpoints").glob(".*"))


@pytest.mark.parametrize(("number", "group"), [(signal.SIGTERM, False), (signal.SIGTERM, True), (signal.SIGINT, True)])
def test_a_signal_saves_first_and_the_run_goes_on(config, train_elsewhere, train_here, number, group):
    """Also when the whole process group gets it, loader workers included, as from a scheduler or a terminal."""
    run = config(f"signal{number}", steps=60, checkpoint={"every": 100}, loader_workers=2 if group else 0)
    process = train_elsewhere(run, start_new_session=True)
    said = []
    while process.poll() is None and not (said and said[-1].startswith("step 2 of 60")):
        said.append(process.stdout.readline())
    if group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    code, _, err = finish(process)
    assert code == 128 + number, err
    assert "run the same command again" in err
    (saved,) = (run.output / "checkpoints").iterdir()
    state = json.loads((saved / "state.json").read_text())
    assert 0 < state["step"] < 60
    assert saved.name == f"step-{state['step']:06d}"
    if group:
        return
    code, out, err = finish(train_elsewhere(run))
    assert code == 0, err
    assert f"step-{state['step']:06d}" in out
    whole = config("whole", steps=60, checkpoint={"every": 100})
    code, _, err = finish(train_elsewhere(whole))
    assert code == 0, err
    ended, expected = weights(run.output / "patch"), weights(whole.output / "patch")
    assert all(torch.equal(ended[key], expected[key]) for key in expected)


def test_a_run_is_saved_when_its_terminal_is_closed(config, train_elsewhere):
    """Nothing can be written there any more, also not by a progress bar before the checkpoint."""
    run = config(steps=2000, log_every=1, checkpoint={"every": 5000})
    ours, its = os.openpty()
    termios.tcsetwinsize(its, (24, 120))  # a bar needs room
    process = train_elsewhere(run, launcher=("setsid", "--ctty", sys.executable), terminal=its)
    os.close(its)
    shown = b""
    while b" 2/2000 " not in shown:
        shown += os.read(ours, 4096)
    os.close(ours)
    assert process.wait(timeout=180) == 128 + signal.SIGHUP
    (saved,) = (run.output / "checkpoints").iterdir()
    assert 0 < json.loads((saved / "state.json").read_text())["step"] < 2000


def test_a_run_under_nohup_outlives_its_terminal(config, train_elsewhere):
    run = config(steps=20)
    process = train_elsewhere(run, launcher=("nohup", sys.executable))
    said = ""
    while "step 2 of 20" not in said and process.poll() is None:
        said = process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    code, _, err = finish(process)
    assert code == 0, err
    assert (run.output / "patch").is_dir()


def test_only_ctrl_c_hurries_a_run_that_is_asked_to_stop():
    """SLURM sends SIGTERM at the start and at the end of the time of grace, a checkpoint being saved between."""
    # Raised in this thread: a signal to the process may reach another one, and this one a moment later.
    with StopRequest() as stop:
        for _ in range(2):
            signal.raise_signal(signal.SIGTERM)
        assert stop.number == signal.SIGTERM
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGINT)
        assert stop.number == signal.SIGINT
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_stop_request_skips_validation(config, train_here, monkeypatch):
    from trfpp.train.loop import Stopped

    run = config(steps=4, validation={"every": 1, "pairs": 1, "num_inference_steps": 1})
    real = Objective.losses

    def ask(self, model, unet, batch, step):
        if torch.is_grad_enabled():  # not in the validation before the first step
            os.kill(os.getpid(), signal.SIGTERM)
        return real(self, model, unet, batch, step)

    monkeypatch.setattr(Objective, "losses", ask)
    with pytest.raises(Stopped):
        train_here(run)
    assert [path.name for path in (run.output / "validation").iterdir()] == ["step-000000"]
    assert [path.name for path in (run.output / "checkpoints").iterdir()] == ["step-000001"]


def test_a_failing_validation_loses_no_checkpoint(config, train_here, monkeypatch):
    from trfpp.train import validate

    real, calls = validate.Validator._generate, []

    def fail(*args):
        calls.append(1)
        if len(calls) > 1:  # the first validates the base model
            raise MemoryError
        return real(*args)

    monkeypatch.setattr(validate.Validator, "_generate", fail)
    run = config(steps=2, checkpoint={"every": 1}, validation={"every": 1, "pairs": 1, "num_inference_steps": 1})
    with pytest.raises(MemoryError):
        train_here(run)
    assert [path.name for path in (run.output / "checkpoints").iterdir()] == ["step-000001"]


def test_weights_that_are_not_finite_are_not_saved(config, train_here):
    """At a rate that no float32 can hold, which no loss or gradient shows."""
    run = config(steps=6, log_every=6, checkpoint={"every": 1, "keep": 2}, optim={"lr": 1e39, "warmup_steps": 0})
    with pytest.raises(FloatingPointError, match="not finite at step 1, which was not saved"):
        train_here(run)
    assert not (run.output / "checkpoints").exists()


def test_a_finished_run_is_left_as_it_is(config, train_here):
    run = config(steps=2)
    card = (train_here(run) / "patch.json").read_text()
    assert (train_here(run) / "patch.json").read_text() == card
    with pytest.raises(ValueError, match=r"steps=1, but .*step-000002 has 2"):
        train_here(config(steps=1))


def test_a_finished_patch_takes_a_new_domain(config, train_here):
    train_here(config(steps=2))
    run = config(steps=2, domain="red boxes", log_every=7, sampler={"num_inference_steps": 40})
    card = read_card(train_here(run))
    kept = yaml.safe_load((run.output / "train.yaml").read_text())
    assert (kept["domain"], kept["log_every"]) == ("red boxes", 7)
    assert (card.domain, card.sampler, card.training_steps) == ("red boxes", {"num_inference_steps": 40}, 2)


def test_clips_of_a_size_the_vae_cannot_make_are_refused_before_anything(config, train_here, tmp_path):
    write_world(tmp_path / "videos", "linear", count=2, seed=0, num_frames=10, side=32)
    prepare(tmp_path / "videos", tmp_path / "data", fps=8, num_frames=4, height=33, width=32, progress=False)
    with pytest.raises(ValueError, match=r"clips are 32x33, and this model's VAE needs multiples of 8"):
        train_here(config(data=tmp_path / "data"))
    assert not (tmp_path / "data" / "latents").exists()


def test_a_schedule_that_looks_ahead_binds_the_number_of_steps(config, train_here):
    train_here(config(steps=2, optim={"schedule": "cosine"}))
    with pytest.raises(ValueError, match=r"steps \(was 2, is 4\)"):
        train_here(config(steps=4, optim={"schedule": "cosine"}))


def test_without_held_out_clips_there_is_no_validation(config, train_here, monkeypatch, capsys):
    from trfpp.train import plan, setup

    for module in (setup, plan):
        real = module.load_clips
        monkeypatch.setattr(
            module,
            "load_clips",
            lambda f, split="train", real=real: real(f, split).select([]) if split != "train" else real(f),
        )
    run = config(steps=1, validation={"every": 1})
    train_here(run)
    assert "no validation" in capsys.readouterr().out
    assert not (run.output / "validation").exists()


def test_a_launchers_accumulation_does_not_divide_twice(config, train_here, monkeypatch):
    plain = weights(train_here(config("plain", steps=1, optim={"eps": 1.0, "warmup_steps": 0})))
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    other = weights(train_here(config("other", steps=1, optim={"eps": 1.0, "warmup_steps": 0})))
    assert all(torch.equal(plain[key], other[key]) for key in plain)


def test_two_processes_equal_one_with_twice_the_accumulation(config, train_elsewhere, uninterrupted):
    run = config("two", gradient_accumulation=1, steps=8)
    code, _, err = finish(train_elsewhere(run, TORCHRUN, ACCELERATE_USE_CPU="true"))
    assert code == 0, err
    assert relative(weights(run.output / "patch"), uninterrupted) <= 1e-5


@pytest.mark.parametrize("first", [1, 2])
def test_a_run_goes_on_in_another_number_of_processes(config, train_elsewhere, uninterrupted, first):
    for processes, steps in ((first, 4), (3 - first, 8)):
        run = config("moved", gradient_accumulation=2 // processes, steps=steps)
        launcher = TORCHRUN if processes == 2 else (sys.executable,)
        code, out, err = finish(train_elsewhere(run, launcher, ACCELERATE_USE_CPU="true"))
        assert code == 0, err
    assert "resumed from" in out
    assert relative(weights(run.output / "patch"), uninterrupted) <= 1e-5


def test_two_processes_train_both_directions(config, train_elsewhere, train_here):
    run = config("two", gradient_accumulation=1, steps=4, direction="both")
    code, _, err = finish(train_elsewhere(run, TORCHRUN, ACCELERATE_USE_CPU="true"))
    assert code == 0, err
    one = train_here(config("one", gradient_accumulation=2, steps=4, direction="both"))
    assert relative(weights(run.output / "patch"), weights(one)) <= 1e-5
    names = [f"train loss{way}" for way in ("", "_forward", "_backward", "_fused")]
    ours, theirs = ([read_card(folder).metrics[name] for name in names] for folder in (run.output / "patch", one))
    assert ours == pytest.approx(theirs, rel=1e-5)


def test_both_ranks_hold_the_same_weights(config, train_elsewhere, tmp_path):
    """Each rank writes what it holds after training, and what it drew."""
    program = tmp_path / "ranks.py"
    program.write_text(
        "import sys, torch, yaml\n"
        "from trfpp.configs.training import TrainConfig\n"
        "from trfpp.train import loop\n"
        "from safetensors.torch import save_file\n"
        "import os, json\n"
        "rank = os.environ['RANK']\n"
        "seen = []\n"
        "from trfpp.train.objective import Objective\n"
        "real = Objective.losses\n"
        "def watch(self, model, unet, batch, step):\n"
        "    seen.append([float(batch.sigma.sum()), float(batch.noise.sum()), float(batch.latents.sum())])\n"
        "    watch.model = model\n"
        "    return real(self, model, unet, batch, step)\n"
        "Objective.losses = watch\n"
        "from trfpp.train.data import CachedSamples\n"
        "clips, clip_of = [], CachedSamples.clip_of\n"
        "CachedSamples.clip_of = lambda self, n: (clips.append(clip_of(self, n).clip_id), clip_of(self, n))[1]\n"
        "config = TrainConfig.model_validate_json(json.dumps(yaml.safe_load(open(sys.argv[1]))))\n"
        "loop.train(config)\n"
        "state = {k: v.detach().clone() for k, v in watch.model.module.named_parameters() if 'lora_' in k}\n"
        "save_file(state, f'{sys.argv[2]}/{rank}.safetensors')\n"
        "json.dump([seen, clips], open(f'{sys.argv[2]}/{rank}.json', 'w'))\n"
    )
    run = config("ranks", steps=3)
    (tmp_path / "ranks.yaml").write_text(yaml.safe_dump(run.model_dump(mode="json")))
    command = [*TORCHRUN, str(program), str(tmp_path / "ranks.yaml"), str(tmp_path)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    one, two = (load_file(tmp_path / f"{rank}.safetensors") for rank in (0, 1))
    assert all(torch.equal(one[key], two[key]) for key in one)
    drawn = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1)]
    values = [value for seen, _ in drawn for step in seen for value in step]
    assert len(set(values)) == len(values) == 18
    clips = [clip for _, clips in drawn for clip in clips]
    assert len(set(clips)) == len(clips) == 6  # one epoch: every clip once, on one rank


def test_fewer_processes_than_asked_for_is_an_error(config, train_here, train_elsewhere):
    with pytest.raises(ValueError, match="asks for 2 processes, but training runs on 1"):
        train_here(config(num_processes=2))
    launcher = (sys.executable, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2")
    code, _, err = finish(train_elsewhere(config("launched"), launcher))
    assert code != 0
    assert "accelerate launch asks for 2 processes, but training runs on 1" in err
    assert "torchrun --nproc_per_node 2" in err


def test_processes_that_do_not_join_are_an_error(monkeypatch):
    """torchrun without ACCELERATE_USE_CPU on a machine without GPUs: each would train alone, into one output."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="the launcher asks for 2 processes, but training runs on 1"):
        check_processes(1, None)
