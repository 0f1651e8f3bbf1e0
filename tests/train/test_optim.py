"""Learning-rate schedules, and that every optimizer goes on from a checkpoint as if it had never stopped."""

import itertools
from typing import get_args

import pytest
import torch
from safetensors.torch import load_file

from trfpp.configs.training import OptimSettings
from trfpp.train.average import Average
from trfpp.train.checkpoint import check_binding, list_checkpoints, resume, save_checkpoint, snapshot
from trfpp.train.optim import make_optimizer, make_schedule, set_rate
from trfpp.trf.adapters import adapter_parameters, adapter_state, adapter_weights, inject
from trfpp.trf.base import load_component
from trfpp.trf.patch import PatchCard

CARD = PatchCard(
    trfpp_version="0", base_model="tiny", unet_fingerprint="", unet_config={}, height=8, width=8, num_frames=4, fps=7
)


def _content(model):
    unet = load_component(model, "unet")
    optimizer = torch.optim.AdamW(inject(unet, targets="motion", rank=2, alpha=2))
    return snapshot(unet, "forward", optimizer, Average([], optimizer, 0.0))


def test_schedules():
    def rates(**settings):
        return [*map(make_schedule(OptimSettings(lr=1.0, **settings), 10), range(10))]

    assert rates(warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(warmup_steps=0) == [1.0] * 10
    assert rates(warmup_steps=0, schedule="linear") == pytest.approx([1 - i / 10 for i in range(10)])
    cosine = rates(warmup_steps=2, schedule="cosine")
    assert cosine[2] == 1.0
    assert cosine[6] == pytest.approx(0.5)
    assert all(earlier > later for earlier, later in itertools.pairwise(cosine[2:]))
    restarts = rates(warmup_steps=2, schedule="cosine_with_restarts", cycles=2)
    assert restarts[2:6] == pytest.approx(restarts[6:])
    assert restarts[2] == 1.0
    assert rates(warmup_steps=0, schedule="polynomial", power=2.0)[5] == pytest.approx(0.25, abs=1e-4)
    assert rates(warmup_steps=20) == pytest.approx([(step + 1) / 20 for step in range(10)])  # longer than the run


# Rank 64 gives tensors over 4096 elements, below which the 8-bit optimizers keep their state in float32.
ADAPTER = {"targets": "motion", "rank": 64, "alpha": 2}
CASES = {name: {"name": name} for name in get_args(OptimSettings.model_fields["name"].annotation)}
CASES["lora plus"] = {"lora_plus": 16.0}


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("case", CASES)
def test_resuming_equals_never_stopping(case, ema, tiny_model, tmp_path):
    settings = OptimSettings(**{"lr": 1.0 if case == "prodigy" else 1e-2, **CASES[case]})
    rate = make_schedule(settings, 6)

    def fresh():
        unet = load_component(tiny_model, "unet")
        inject(unet, **ADAPTER)
        optimizer = make_optimizer(adapter_weights(unet), settings)
        return unet, optimizer, Average(adapter_parameters(unet), optimizer, ema)

    def step(unet, optimizer, average, number):
        generator = torch.Generator().manual_seed(number)
        set_rate(optimizer, rate(number))
        for parameter in adapter_parameters(unet):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
        average.update()

    def kept(unet, average):
        with average.applied():
            return adapter_state(unet)

    unet, optimizer, average = run = fresh()
    for number in range(3):
        step(*run, number)
    trained = adapter_state(unet)
    saved = save_checkpoint(tmp_path, 3, snapshot(unet, "forward", optimizer, average), CARD, {}, {}, keep=1)
    assert all(torch.equal(value, trained[key]) for key, value in adapter_state(unet).items())
    shown = load_file(saved / "adapter_model.safetensors")
    assert average.differs == any(not torch.equal(shown[key], trained[key]) for key in shown)
    assert average.differs == (bool(ema) or case == "adamw_schedulefree")
    for number in range(3, 6):
        step(*run, number)

    again = fresh()
    assert resume(saved, *again)["step"] == 3
    for number in range(3, 6):
        step(*again, number)
    for one, two in (
        (adapter_state(unet), adapter_state(again[0])),
        (kept(unet, average), kept(again[0], again[2])),
    ):
        assert all(torch.equal(one[key], two[key]) for key in one)


def test_the_average_is_that_of_the_last_weights(tiny_model):
    """With the warm-up of its decay: step n keeps min(decay, n / (9 + n)) of the average before, the first nothing."""
    parameter = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    average, expected = Average([parameter], optimizer, 0.2), torch.zeros(2)
    for number in range(6):
        with torch.no_grad():
            parameter.fill_(float(number))
        average.update()
        decay = min(0.2, (1 + number) / (10 + number)) if number else 0.0
        expected = decay * expected + (1 - decay) * number
    with average.applied():
        torch.testing.assert_close(parameter.detach(), expected)
    assert torch.equal(parameter, torch.full((2,), 5.0))


def test_lora_plus_trains_what_starts_at_zero_faster(tiny_model):
    unet = load_component(tiny_model, "unet")
    inject(unet, **ADAPTER)
    before = adapter_state(unet)
    optimizer = make_optimizer(adapter_weights(unet), OptimSettings(lora_plus=8.0, weight_decay=0.0))
    set_rate(optimizer, 1e-3)
    for parameter in adapter_parameters(unet):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    moved = {key: float((value - before[key]).abs().mean()) for key, value in adapter_state(unet).items()}
    assert all(size == pytest.approx(8e-3 if ".lora_B." in key else 1e-3, rel=1e-3) for key, size in moved.items())


def test_old_checkpoints_go_only_once_the_new_one_is_whole(tiny_model, tmp_path, monkeypatch):
    content = _content(tiny_model)
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, content, CARD, {}, {}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-000010"]

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("trfpp.train.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 11, content, CARD, {}, {}, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-000010"]


def test_other_settings_are_refused_by_name(tiny_model, tmp_path):
    saved = save_checkpoint(tmp_path, 1, _content(tiny_model), CARD, {}, {"seed": 0, "lr": 1}, keep=1)
    with pytest.raises(ValueError, match=r"seed \(was 0, is 1\)"):
        check_binding(saved, {"seed": 1, "lr": 1})
