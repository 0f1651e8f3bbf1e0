"""Fine-tuning of all weights: each UNet ends as plain steps on a patch's rows of its direction would end it, to the bit;
it stops and goes on, refuses what it does not know, and its folder is a model that samples."""

import pytest
import torch
from safetensors.torch import load_file

from trfpp.data_prep.latents import find_cache
from trfpp.train.data import RankOrder, loader
from trfpp.train.full import Batches, fine_tune
from trfpp.train.objective import denoising_loss
from trfpp.train.setup import make_samples
from trfpp.train.stage import StageStopped, fit
from trfpp.trf.base import load_component
from trfpp.trf.pipeline import TimeReversalFusionPipeline
from trfpp.trf.two_unets import TwoUNets

CHANGES = {
    "direction": "both", "steps": 2, "batch_size": 2, "log_every": 1, "checkpoint": {"every": 1},
    "optim": {"lr": 1e-3, "schedule": "cosine", "warmup_steps": 1, "max_grad_norm": 1.0, "weight_decay": 0.0},
}  # fmt: skip


@pytest.fixture
def full(config):
    def make(**changes):
        return config("full", **{**CHANGES, **changes})

    return make


def patch_batches(config):
    """The batches that a patch of direction `both` is trained on: rows forward, then the same clips backward."""
    samples = make_samples(config, find_cache(config.data, config.model), "train", per_step=2)
    order = RankOrder(start=0, stop=config.steps, batch_size=2, accumulation=1, rank=0, num_processes=1)
    return list(loader(samples, order, 0))


def test_rows_are_those_of_a_patch(full):
    settings = full()
    cache = find_cache(settings.data, settings.model)
    for step, both in enumerate(patch_batches(settings)):
        for way, part in (("forward", slice(0, 2)), ("backward", slice(2, 4))):
            batch = Batches(settings, cache, way, torch.device("cpu"))(step)
            for name in ("latents", "noise", "sigma", "condition", "embedding", "added_time_ids", "backward"):
                assert torch.equal(getattr(batch, name), getattr(both, name)[part]), (step, way, name)


def test_each_unet_ends_as_plain_steps_end_it(full):
    settings = full()
    model = fine_tune(settings)
    pipe = TimeReversalFusionPipeline.from_pretrained(model)
    assert isinstance(pipe.unet, TwoUNets)
    for way, part in (("forward", slice(0, 2)), ("backward", slice(2, 4))):
        unet = load_component(settings.model, "unet").train()
        optimizer = torch.optim.AdamW(unet.parameters(), weight_decay=0.0)
        for both, lr in zip(patch_batches(settings), (1e-3, 1e-3)):  # warm-up ends at once, the cosine starts at 1
            rows = type(both)(**{name: value[part] for name, value in vars(both).items()})
            optimizer.param_groups[0]["lr"] = lr
            denoising_loss(unet, rows).mean().backward()
            torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        ours = getattr(pipe.unet, f"{way}_unet").state_dict()
        base = load_component(settings.model, "unet").state_dict()
        assert all(torch.equal(ours[name], value) for name, value in unet.state_dict().items())
        assert any(not torch.equal(ours[name], value) for name, value in base.items())
    assert not list(settings.output.glob("*.checkpoint.safetensors"))
    before = {file: file.stat().st_mtime_ns for file in model.rglob("*.safetensors")}
    assert fine_tune(settings) == model  # and nothing is done again
    assert {file: file.stat().st_mtime_ns for file in model.rglob("*.safetensors")} == before


def test_it_goes_on_where_it_stopped(full, config, monkeypatch):
    def stopped_before_backward(name, *arguments):
        if name == "backward":
            raise StageStopped(15)
        fit(name, *arguments)

    with monkeypatch.context() as interrupted:
        interrupted.setattr("trfpp.train.full.fit", stopped_before_backward)
        with pytest.raises(StageStopped):
            fine_tune(full(steps=1))
    assert not (full().output / "model").exists()
    resumed = fine_tune(full(steps=1))
    through = fine_tune(config("through", **{**CHANGES, "steps": 1}))
    for part in ("unet", "unet_backward"):
        ours, theirs = (load_file(next((model / part).glob("*.safetensors"))) for model in (resumed, through))
        assert all(torch.equal(ours[name], value) for name, value in theirs.items())


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"direction": "forward"}, "direction=forward"),
        ({"precision": "bf16"}, "precision=bf16"),
        ({"optim": {**CHANGES["optim"], "schedule": "constant"}}, "optim.schedule=constant"),
    ],
)
def test_what_it_does_not_know_is_refused(full, changes, named):
    with pytest.raises(ValueError, match=named):
        fine_tune(full(**changes))


def test_another_run_is_not_gone_on_with(full):
    settings = full(steps=1)
    fine_tune(settings)
    with pytest.raises(ValueError, match="another steps"):
        fine_tune(full(steps=2))
