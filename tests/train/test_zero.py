"""DeepSpeed, as accelerate starts it. On two CPU processes, where it is installed: under ZeRO-2 and ZeRO-3 a run ends with the
weights and the optimizer's state of one without them, to a ten-thousandth, skips the same step, and goes on from the other's
checkpoint. Everywhere: what a stage cannot do is refused."""

import importlib.util
import re
import shutil
import sys

import pytest
from safetensors.torch import load_file

from trfpp.train.zero import check_zero

PROGRAM = """
import os, sys
from contextlib import contextmanager
from dataclasses import replace
import torch
from accelerate import PartialState
from trfpp.train.objective import Objective
torch.set_num_threads(1)
real = Objective.losses
@contextmanager
def spoil(self, model, unet, batch, step):
    with real(self, model, unet, batch, step) as found:
        yield replace(found, total=found.total * float("nan")) if step == 4 else found
Objective.losses = spoil
if "ACCELERATE_USE_DEEPSPEED" in os.environ:
    PartialState(backend="gloo")  # by itself accelerate starts DeepSpeed on accelerators only
from trfpp.train.__main__ import main
raise SystemExit(main(sys.argv[-1:]))
"""


@pytest.mark.parametrize(
    ("stage", "offloads", "changes", "says"),
    [
        (1, False, {}, "zero_stage 1"),
        (3, True, {}, "offload_optimizer_device"),
        (2, False, {"precision": "fp16"}, "precision=fp16"),
        (2, False, {"compile": True}, "compile cannot hold"),
        (3, False, {"quantization": "nf4"}, "quantization=nf4"),
        (3, False, {"lora": {"kind": "dora"}}, "lora.kind=dora"),
        (2, False, {"optim": {"name": "prodigy", "lr": 1.0}}, "optim.name=prodigy"),
        (2, False, {"direction": "both", "objective": {"alternate_directions": True}}, "alternate_directions"),
    ],
)
def test_what_a_stage_cannot_do_is_refused(config, stage, offloads, changes, says):
    with pytest.raises(ValueError, match=says):
        check_zero(stage, offloads, config(**changes))


@pytest.mark.parametrize(
    ("stage", "changes"),
    [
        (2, {"quantization": "nf4", "lora": {"kind": "dora"}, "precision": "bf16", "on_nonfinite": "skip"}),
        (3, {"optim": {"name": "prodigy", "lr": 1.0}, "lora": {"kind": "lokr"}, "ema": 0.9}),
        (3, {"direction": "both", "objective": {"alternate_directions": True}}),
    ],
)
def test_the_rest_is_left_to_it(config, stage, changes):
    """Settings that the other stage refuses, or that it might: none of them is an error here."""
    refusal = None
    try:
        check_zero(stage, False, config(**changes))
    except ValueError as error:
        refusal = str(error)
    assert refusal is None


def weights(folder):
    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.relative_to(folder)}:{key}": value for file in files for key, value in load_file(file).items()}


def kind_of(key):
    file, _, name = key.partition(":")
    return file, name.rpartition(".")[2] if "optimizer" in file else "lora_B" in name


def relative(one, other):
    """The largest distance of one kind of tensor in a file, such as Adam's second moments, from the other's, over its norm."""
    assert one.keys() == other.keys()
    distances = []
    for kind in {kind_of(key) for key in one}:
        keys = [key for key in one if kind_of(key) == kind]
        squares = [(float((one[k] - other[k]).square().sum()), float(other[k].square().sum())) for k in keys]
        distances.append((sum(a for a, _ in squares) / sum(b for _, b in squares)) ** 0.5)
    return max(distances)


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("deepspeed") is None, reason="DeepSpeed is not installed")
def test_both_stages_train_as_none_and_go_on_from_each_other(config, train_elsewhere, tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    settings = {
        "direction": "both", "gradient_accumulation": 2, "on_nonfinite": "skip", "ema": 0.5,
        "optim": {"max_grad_norm": 0.01, "lora_plus": 2.0}, "checkpoint": {"every": 3, "keep": 9},
    }  # fmt: skip

    def train(name, stage, steps):
        words = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "program.py")]
        deepspeed = {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
        environment = {**deepspeed, "DS_ACCELERATOR": "cpu"} if stage else {"ACCELERATE_USE_CPU": "true"}
        run = config(name, steps=steps, **settings)
        launcher = [sys.executable, *words]
        # train_elsewhere starts `launcher -m trfpp.train FILE`; the program takes the last word only.
        process = train_elsewhere(run, launcher, **environment)
        out, err = process.communicate(timeout=600)
        assert process.returncode == 0, err
        assert ("step 4 skipped" in err) == (steps > 4)
        return out, weights(run.output / "checkpoints" / f"step-{steps:06d}")

    _, plain = train("plain", 0, 6)
    said, _ = train("three", 3, 3)
    held, of = (int(number.replace(",", "")) for number in re.search(r"holds ([\d,]+) of .* ([\d,]+) w", said).groups())
    assert 0.5 * of <= held < 0.51 * of
    said, _ = train("two", 2, 3)
    held = int(re.search(r"optimizer of ([\d,]+) weights", said).group(1).replace(",", ""))
    trained = sum(value.numel() for key, value in plain.items() if "adapter_model" in key)
    assert 0.5 * trained <= held < 0.51 * trained
    for name, first, second in (("crossed", 3, 2), ("back", 2, 3), ("three", 3, 3)):
        if name != "three":
            shutil.copytree(tmp_path / {2: "two", 3: "three"}[first], tmp_path / name)
        said, ended = train(name, second, 6)
        assert "resumed from" in said
        assert all(value.dtype == plain[key].dtype for key, value in ended.items())
        assert relative(ended, plain) < 1e-4
