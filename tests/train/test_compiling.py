"""Compiled transformer blocks train as others do, recomputed or not; what they cannot hold is refused."""

import json
import shutil
from functools import partial

import pytest
import torch
from pydantic import ValidationError
from torch._dynamo.utils import counters

from trfpp.train.best import VALIDATION_FILE
from trfpp.train.data import Sample
from trfpp.train.objective import Objective
from trfpp.train.recompute import recompute_activations
from trfpp.trf.base import load_component
from trfpp.trf.compiling import compile_blocks
from trfpp.trf.patch import inject_patch, read_card

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or " " in torch.__file__,
    reason="compiling for a CPU needs a C++ compiler, and a PyTorch that lies under a path without spaces",
)


def losses_of(model, *, compiled, recomputed, steps=3):
    unet = load_component(model, "unet").train()
    (own,) = inject_patch(unet, targets="all", rank=2, alpha=2.0).values()
    if compiled:
        compile_blocks(unet)
    if recomputed:
        recompute_activations(unet)
    optimizer = torch.optim.AdamW(own, lr=1e-2)
    objective, generator = Objective(direction="forward", dtype=torch.float32), torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(2, *shape, generator=generator)

    found = []
    for step in range(steps):
        batch = Sample(
            latents=normal(4, 4, 8, 8), noise=normal(4, 4, 8, 8), sigma=normal().exp(), condition=normal(4, 8, 8),
            embedding=normal(1, 32), added_time_ids=normal(3).abs(), number=torch.arange(2),
            backward=torch.zeros(2, dtype=torch.bool),
        )  # fmt: skip
        with objective.losses(unet, unet, batch, step) as losses:
            losses.total.backward()
        optimizer.step()
        optimizer.zero_grad()
        found.append(float(losses.total.detach()))
    return found


@needs_compiler
def test_losses_are_the_same_and_blocks_are_whole_graphs(tiny_model):
    usual = losses_of(tiny_model, compiled=False, recomputed=False)
    for recomputed in (False, True):
        torch._dynamo.reset()
        counters.clear()
        assert losses_of(tiny_model, compiled=True, recomputed=recomputed) == pytest.approx(usual, rel=1e-4)
        assert not counters["graph_break"]
        assert 0 < counters["frames"]["ok"] == counters["frames"]["total"] < 8  # blocks of one shape share their code


@torch._dynamo.config.patch(recompile_limit=8, fail_on_recompile_limit_hit=True)
def test_every_shape_of_clips_is_compiled_for(tiny_model, monkeypatch):
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    unet = load_component(tiny_model, "unet").train()
    inject_patch(unet, targets="all", rank=2, alpha=2.0)
    shapes = [(frames, side) for frames in (3, 4, 5) for side in (8, 16)]
    counters.clear()
    compile_blocks(unet, len(shapes))
    for frames, side in shapes:
        inputs = torch.zeros(1, frames, 8, side, side), torch.tensor(0.5), torch.zeros(1, 1, 32), torch.zeros(1, 3)
        unet(*inputs).sample.mean().backward()
    found = counters["frames"]
    assert found["ok"] == found["total"] >= 2 * len(shapes)  # both kinds of block for each, and none given up


@needs_compiler
def test_a_run_is_compiled_and_its_validation_is_not(config, train_here):
    shared = {"steps": 2, "log_every": 1, "direction": "backward", "objective": {"conditioning_dropout": 0.0}}
    validation = {"every": 2, "pairs": 1, "num_inference_steps": 1}
    found = []
    for compiled in (False, True):
        torch._dynamo.reset()
        counters.clear()
        patch = train_here(config(f"run {compiled}", compile=compiled, validation=validation, **shared))
        rows = (patch.parent / VALIDATION_FILE).read_text().splitlines()
        found.append([read_card(patch).metrics["train loss"], *(json.loads(row)["loss"] for row in rows)])
        assert bool(counters["frames"]) == compiled
    assert found[1] == pytest.approx(found[0], rel=1e-3)


@pytest.mark.parametrize(
    "settings",
    [
        {"direction": "both"},
        {"direction": "backward", "objective": {"rotated_attention": True}},
        {"quantization": "nf4"},
        {"quantization": "int8"},
        {"quantization": "fp8"},
        {"feed_forward_chunks": 2},
        {"lora": {"kind": "dora"}},
        {"lora": {"kind": "lokr"}},
    ],
)
def test_what_it_cannot_hold_is_refused(config, settings):
    with pytest.raises(ValidationError, match="compile is for"):
        config(compile=True, **settings)
