"""The memory estimate against what a real step of the same settings takes on the CPU, as PyTorch's profiler counts it."""

import json
from typing import get_args

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from trfpp.configs.training import OptimSettings, TrainConfig
from trfpp.train.data import Sample
from trfpp.train.memory import STATE_BYTES, estimate, optimizer_state_size
from trfpp.train.objective import Objective
from trfpp.train.optim import make_optimizer
from trfpp.train.recompute import chunk_feed_forward, recompute_activations
from trfpp.trf.attention import attend_to_one_token
from trfpp.trf.base import load_component, load_config
from trfpp.trf.patch import inject_patch
from trfpp.trf.quantization import quantize

LATENTS = (6, 4, 16, 16)
WITHIN = 0.1
"""Of the measured bytes."""


def settings(tmp_path, **changes):
    values = {"model": "tiny", "data": tmp_path, "output": tmp_path, "lora": {"targets": "all", "rank": 4}}
    return TrainConfig(**{**values, **changes})


def profiled(work, folder):
    """Bytes that the work took at its worst moment beyond those there were before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        work()
    recorded.export_chrome_trace(str(folder / "trace.json"))
    events = json.loads((folder / "trace.json").read_text())["traceEvents"]
    memory = sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"])
    totals = [e["args"]["Total Allocated"] for e in memory]
    return max(totals) - (totals[0] - memory[0]["args"]["Bytes"])


def batch(config, generator):
    _, channels, height, width = LATENTS
    rows = config.batch_size * (2 if config.direction == "both" or config.objective.rotated_attention else 1)
    turned = {"forward": [False], "backward": [True], "both": [False, True], "either": [False]}[config.direction]
    turned = [False, True] if config.objective.rotated_attention else turned

    def normal(*shape):
        return torch.randn(rows, *shape, generator=generator)

    return Sample(
        latents=normal(*LATENTS), noise=normal(*LATENTS), sigma=normal().exp(), condition=normal(channels, height, width),
        embedding=normal(1, 32), added_time_ids=normal(3).abs(), number=torch.arange(rows),
        backward=torch.tensor(turned).repeat_interleave(rows // len(turned)),
    )  # fmt: skip


CASES = {
    "plain": {},
    "recomputed": {"gradient_checkpointing": True},
    "two rows": {"batch_size": 2, "lora": {"targets": "temporal", "rank": 2}},
    "both": {"direction": "both"},
    "chunks": {"feed_forward_chunks": 3},
    "both, recomputed, chunks": {"direction": "both", "gradient_checkpointing": True, "feed_forward_chunks": 2},
    "both, recomputed": {"direction": "both", "gradient_checkpointing": True},
    "alternating": {"direction": "both", "objective": {"alternate_directions": True}},
    "rotated": {"direction": "backward", "objective": {"rotated_attention": True}},
    "dora both": {"direction": "both", "lora": {"kind": "dora", "targets": "temporal", "rank": 2}},
    "lokr": {"lora": {"kind": "lokr", "targets": "temporal", "rank": 2}},
    "convolutions": {"lora": {"targets": "all_conv", "rank": 4}},
    "fp8": {"quantization": "fp8"},
    "fp8, recomputed": {"quantization": "fp8", "gradient_checkpointing": True},
    "bf16": {"precision": "bf16", "gradient_checkpointing": True},
}


@pytest.mark.parametrize("case", CASES)
def test_a_step_takes_what_was_estimated(case, tiny_model, tmp_path):
    config = settings(tmp_path, **CASES[case])
    expected = estimate(config, load_config(tiny_model, "unet"), LATENTS, device="cpu")
    dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
    unet = load_component(tiny_model, "unet", dtype=dtype)
    if config.quantization:
        quantize(unet, config.quantization)
    inject_patch(unet, config.direction, **config.lora.model_dump(exclude={"init"}))
    attend_to_one_token(unet)
    if config.feed_forward_chunks > 1:
        chunk_feed_forward(unet, config.feed_forward_chunks)
    if config.gradient_checkpointing:
        recompute_activations(unet)
    unet.train()
    held = sum(one.nbytes for one in (*unet.parameters(), *unet.buffers()))
    assert expected.weights + expected.adapters == pytest.approx(held, rel=1e-3)
    rows = batch(config, torch.Generator().manual_seed(0))
    inputs = sum(one.nbytes for one in vars(rows).values())
    objective = Objective(
        direction=config.direction,
        dtype=dtype,
        alternate=config.objective.alternate_directions,
        rotated=config.objective.rotated_attention,
    )

    def step():
        unet.zero_grad()
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16, cache_enabled=False)
        with autocast, objective.losses(unet, unet, rows, 0) as losses:
            losses.total.backward()
        unet.zero_grad()

    step()  # what is made once and stays is no part of a step
    measured = profiled(step, tmp_path)
    beyond = expected.gradients + expected.activations + expected.transients - inputs
    assert beyond == pytest.approx(measured, rel=WITHIN)


def test_recomputing_temporal_blocks_too_changes_no_gradient(tiny_model, tmp_path):
    config = settings(tmp_path, lora={"dropout": 0.3})
    found = []
    for recomputed in (False, True):
        unet = load_component(tiny_model, "unet").train()
        own = inject_patch(unet, **config.lora.model_dump(exclude={"init"}))["default"]
        if recomputed:
            recompute_activations(unet)
        torch.manual_seed(0)
        rows = batch(config, torch.Generator().manual_seed(0))
        with Objective(direction="forward", dtype=torch.float32).losses(unet, unet, rows, 0) as losses:
            losses.total.backward()
        found.append([parameter.grad for parameter in own])
    assert all(torch.equal(one, other) for one, other in zip(*found))


@pytest.mark.parametrize("recomputed", [False, True])
def test_chunks_change_no_gradient_and_need_less(tiny_model, tmp_path, recomputed):
    config = settings(tmp_path, direction="both", lora={"targets": "all"})
    found = []
    for chunks in (1, 3):  # of 5 frames and of 64 pixels: neither is a multiple
        unet = load_component(tiny_model, "unet").train()
        own = inject_patch(unet, "both", **config.lora.model_dump(exclude={"init"}))
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in (one for parameters in own.values() for one in parameters):
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        if chunks > 1:
            chunk_feed_forward(unet, chunks)
        if recomputed:
            recompute_activations(unet)
        rows = batch(config, torch.Generator().manual_seed(0))
        with Objective(direction="both", dtype=torch.float32).losses(unet, unet, rows, 0) as losses:
            losses.total.backward()
        found.append(torch.cat([parameter.grad.flatten() for parameters in own.values() for parameter in parameters]))
    assert float((found[0] - found[1]).norm() / found[0].norm()) < 1e-5
    shape, model = (12, 4, 24, 24), load_config(tiny_model, "unet")
    whole, parts = (
        estimate(settings(tmp_path, gradient_checkpointing=recomputed, feed_forward_chunks=chunks), model, shape)
        for chunks in (1, 6)
    )
    assert parts.activations + parts.transients < 0.85 * (whole.activations + whole.transients)


def test_without_temporal_blocks_little_would_be_saved(tiny_model, tmp_path):
    shape = (12, 4, 24, 24)
    config = load_config(tiny_model, "unet")
    whole, less = (
        estimate(settings(tmp_path, gradient_checkpointing=on), config, shape).activations for on in (False, True)
    )
    assert less < whole / 4


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", get_args(OptimSettings.model_fields["name"].annotation))
def test_optimizer_state_takes_what_was_estimated(name):
    weights = {f"{size}": torch.nn.Parameter(torch.randn(size)) for size in (100, 5000, 70_000)}
    optimizer = make_optimizer(weights, OptimSettings(name=name, lr=1.0))
    for one in weights.values():
        one.grad = torch.randn_like(one)
    optimizer.step()
    held = sum(
        value.nbytes
        for state in optimizer.state.values()
        for key, value in state.items()
        if isinstance(value, torch.Tensor) and value.ndim and not key.startswith("qmap")
    )
    assert sum(optimizer_state_size(one.numel(), name) for one in weights.values()) == pytest.approx(held, rel=0.01)
    assert name in STATE_BYTES or "8bit" in name


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_packed_weights_take_what_was_estimated(how, tiny_model, tmp_path):
    unet = load_component(tiny_model, "unet")
    expected = estimate(settings(tmp_path, quantization=how), load_config(tiny_model, "unet"), LATENTS)
    quantize(unet, how)
    held = sum(one.nbytes for one in (*unet.parameters(), *unet.buffers()))
    for module in unet.modules():
        if (state := getattr(getattr(module, "weight", None), "quant_state", None)) is not None:
            nested = [state.state2.absmax, state.state2.code, state.offset]
            held += sum(one.nbytes for one in (state.absmax, state.code, *nested))
        if (scales := getattr(getattr(module, "weight", None), "SCB", None)) is not None:
            held += scales.nbytes
    assert expected.weights == pytest.approx(held, rel=0.01)


def test_the_plan_says_it_and_it_follows_the_settings(config, train_here, capsys):
    train_here(config(dry_run=True, direction="both", ema=0.9))
    said = capsys.readouterr().out
    assert "memory       of each GPU at the peak of a step, estimated, GiB:" in said
    shown = [line.split()[0] for line in said.splitlines() if line.startswith("  ")]
    assert shown == ["weights", "adapters", "gradients", "optimizer", "average", "activations", "transients", "in"]


def test_accumulation_and_processes_hold_gradients_for_longer(tiny_model, tmp_path):
    def of(processes=1, **changes):
        return estimate(
            settings(tmp_path, **changes), load_config(tiny_model, "unet"), LATENTS, num_processes=processes
        )

    one = of()
    assert of(2).gradients == 2 * one.gradients
    assert of(gradient_accumulation=2).total >= one.total
    assert of(ema=0.9).total == one.total + one.adapters
    assert of(direction="both").total > 1.5 * one.total - one.weights
