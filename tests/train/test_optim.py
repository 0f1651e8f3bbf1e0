"""Learning-rate schedules, and that every optimizer goes on from a checkpoint as if it had never stopped."""

import itertools

import pytest
import torch

from trfpp.configs.schema import OptimSettings
from trfpp.train.checkpoint import check_binding, list_checkpoints, resume, save_checkpoint
from trfpp.train.optim import learning_rate, make_optimizer
from trfpp.trf.adapters import adapter_state, inject
from trfpp.trf.base import load_component
from trfpp.trf.patch import PatchCard

CARD = PatchCard(
    trfpp_version="0", base_model="tiny", unet_fingerprint="", unet_config={}, height=8, width=8, num_frames=4, fps=7
)


def test_schedules():
    def rates(**settings):
        return [learning_rate(step, 10, OptimSettings(lr=1.0, **settings)) for step in range(10)]

    assert rates(warmup_steps=4)[:5] == [0.25, 0.5, 0.75, 1.0, 1.0]
    assert rates(warmup_steps=0) == [1.0] * 10
    assert rates(warmup_steps=0, schedule="linear") == pytest.approx([1 - i / 10 for i in range(10)])
    cosine = rates(warmup_steps=2, schedule="cosine")
    assert cosine[2] == 1.0
    assert cosine[6] == pytest.approx(0.5)
    assert all(earlier > later for earlier, later in itertools.pairwise(cosine[2:]))


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_resuming_equals_never_stopping(name, tiny_model, tmp_path):
    def fresh():
        unet = load_component(tiny_model, "unet")
        # Rank 64 gives tensors over 4096 elements, below which the 8-bit optimizer keeps its state in float32.
        parameters = inject(unet, targets="motion", rank=64, alpha=2)
        return unet, parameters, make_optimizer(parameters, OptimSettings(name=name, lr=1e-2))

    def step(parameters, optimizer, number):
        generator = torch.Generator().manual_seed(number)
        for parameter in parameters:
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()

    unet, parameters, optimizer = fresh()
    for number in range(3):
        step(parameters, optimizer, number)
    saved = save_checkpoint(tmp_path, 3, unet, CARD, optimizer, {}, {"lr": 1}, keep=1)
    for number in range(3, 6):
        step(parameters, optimizer, number)

    other, parameters, optimizer = fresh()
    assert resume(saved, other, optimizer)["step"] == 3
    for number in range(3, 6):
        step(parameters, optimizer, number)
    one, two = adapter_state(unet), adapter_state(other)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_old_checkpoints_go_only_once_the_new_one_is_whole(tiny_model, tmp_path, monkeypatch):
    unet = load_component(tiny_model, "unet")
    optimizer = make_optimizer(inject(unet, targets="motion", rank=2, alpha=2), OptimSettings())
    for step in (1, 2, 10):
        save_checkpoint(tmp_path, step, unet, CARD, optimizer, {}, {}, keep=2)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-000010"]

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("trfpp.train.checkpoint.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_checkpoint(tmp_path, 11, unet, CARD, optimizer, {}, {}, keep=1)
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step-000002", "step-000010"]


def test_other_settings_are_refused_by_name(tiny_model, tmp_path):
    unet = load_component(tiny_model, "unet")
    optimizer = make_optimizer(inject(unet, targets="motion", rank=2, alpha=2), OptimSettings())
    saved = save_checkpoint(tmp_path, 1, unet, CARD, optimizer, {}, {"seed": 0, "lr": 1}, keep=1)
    with pytest.raises(ValueError, match=r"seed \(was 0, is 1\)"):
        check_binding(saved, {"seed": 1, "lr": 1})
