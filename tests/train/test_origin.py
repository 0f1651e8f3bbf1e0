"""Patches that start from the weights (PiSSA) or from what quantisation took of them (LoftQ): training starts at the base, the
saved patch is for the untouched one, and what cannot start so is said."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, PeftConfig
from peft.functional import inject_adapter_in_model
from peft.utils.integrations import dequantize_module_weight
from safetensors.torch import load_file

from trfpp.train.checkpoint import STATE_FILE, list_checkpoints
from trfpp.train.origin import prepare_base
from trfpp.train.principal import product
from trfpp.trf.adapters import adapter_parameters, lora_layers
from trfpp.trf.base import essential_config, fingerprint, load_component
from trfpp.trf.halves import Halves
from trfpp.trf.patch import PatchCard, inject_patch, load_patch, patch_files, save_patch, weight_files
from trfpp.trf.variants import target_pattern


@pytest.fixture
def start(config, tiny_model):
    """A UNet and its patch as a run begins with them, and where it began; `moved` is as if it had trained."""

    def make(moved=0.0, model=tiny_model, direction="forward", quantization=None, **lora):
        lora = {"rank": 4, "targets": "all", "alpha": 6.0, **lora}
        run = config(model=str(model), direction=direction, quantization=quantization, lora=lora)
        unet = load_component(run.model, "unet").eval()
        origin = prepare_base(unet, run, None)
        adapter = run.lora.model_dump(exclude={"init"})
        adapters = inject_patch(unet, direction, seed=run.seed, **adapter)
        origin.place(unet, direction, **adapter)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in (one for own in adapters.values() for one in own):
                parameter += moved * torch.randn(parameter.shape, generator=generator)
        return unet, origin, adapters

    return make


@pytest.fixture
def base(tiny_model):
    return load_component(tiny_model, "unet").eval()


def save(folder, unet, origin, direction):
    card = PatchCard(
        trfpp_version="0", base_model="miniature", unet_fingerprint=fingerprint(unet.config), direction=direction,
        unet_config=essential_config(unet.config), height=64, width=64, num_frames=4, fps=7,
    )  # fmt: skip
    save_patch(folder, origin.saved(patch_files(unet, direction)), card)
    return folder


@torch.no_grad()
def output(unet):
    """Of one row that runs forward and one that runs backward."""
    generator = torch.Generator().manual_seed(0)
    draws = [(2, 4, unet.config.in_channels, 8, 8), (2, 1, unet.config.cross_attention_dim)]
    latents, context = (torch.randn(shape, generator=generator) for shape in draws)
    with Halves(unet).rows(1, 1):
        return unet(latents, torch.tensor(0.3), context, torch.tensor([[6.0, 127.0, 0.02]]).repeat(2, 1)).sample


def relative(one, other):
    return float((one - other).detach().norm() / other.detach().norm())


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("lora", [{}, {"targets": "conv", "rslora": True}], ids=["linear", "convolutions"])
def test_at_first_nothing_is_changed_in_training_nor_by_the_saved_patch(start, base, tmp_path, direction, lora):
    before = output(base)
    unet, origin, adapters = start(init="pissa", direction=direction, **lora)
    name, layer = next(lora_layers(unet))
    assert relative(layer.get_base_layer().weight, base.get_submodule(name).weight) > 0.1
    assert relative(output(unet), before) < 1e-5
    trained = [one for own in adapters.values() for one in own]
    assert {id(one) for one in unet.parameters() if one.requires_grad} == {id(one) for one in trained}
    load_patch(base, save(tmp_path / "patch", unet, origin, direction))
    for name, layer in lora_layers(base):
        for adapter in layer.scaling:
            half = product(*origin.factors[name]) * layer.scaling[adapter]
            assert float(layer.get_delta_weight(adapter).detach().norm()) < 1e-6 * float(half.norm())
    assert relative(output(base), before) < 1e-5


@pytest.mark.parametrize("direction", ["forward", "backward", "both"])
@pytest.mark.parametrize("lora", [{}, {"targets": "all_conv", "rslora": True}], ids=["linear", "convolutions"])
def test_the_saved_patch_does_to_the_untouched_base_what_was_trained(start, base, tmp_path, direction, lora):
    before = output(base)
    unet, origin, _ = start(init="pissa", direction=direction, moved=0.05, **lora)
    folder = save(tmp_path / "patch", unet, origin, direction)
    load_patch(base, folder)
    assert relative(output(unet), before) > 0.03
    assert relative(output(base), output(unet)) < 1e-5
    part = next(iter(weight_files(folder).values())).parent
    assert PeftConfig.from_pretrained(str(part)).r == 8


@pytest.mark.parametrize("how", ["nf4", "int8", "fp8"])
@pytest.mark.parametrize("init", ["pissa", "loftq"])
def test_what_is_learnt_on_a_quantised_base_is_the_same_for_the_whole_one(start, base, tmp_path, init, how):
    """Whatever training does, what parts it from the whole base with the saved patch is what did so at first."""
    first, origin, _ = start(init=init, quantization=how)
    moved, _, _ = start(init=init, quantization=how, moved=0.05)
    load_patch(base, save(tmp_path / "patch", moved, origin, "forward"))
    layers = [dict(lora_layers(unet)) for unet in (first, moved, base)]
    for name in layers[0]:
        weights = [
            dequantize_module_weight(own[name].get_base_layer()) + own[name].get_delta_weight("default")
            for own in layers
        ]
        whole = layers[2][name].get_base_layer().weight
        assert relative(weights[1], weights[0]) > 0.02
        torch.testing.assert_close(weights[1] - weights[2], weights[0] - whole, rtol=0, atol=1e-5)


def test_a_quantised_base_starts_nearer_to_the_whole_one(start):
    """Of trained weights: random ones have no principal part to speak of."""
    whole = output(load_component("miniature", "unet").eval())
    distance = {
        init: relative(output(start(model="miniature", init=init, quantization="nf4", rank=16)[0]), whole)
        for init in ("plain", "loftq", "pissa")
    }
    assert max(distance["loftq"], distance["pissa"]) < 0.7 * distance["plain"]
    assert min(distance.values()) > 0.01


def test_it_is_the_start_that_peft_gives_one_adapter_of_linear_layers(start, base):
    unet, origin, _ = start(init="pissa")
    pattern = target_pattern("all")
    inject_adapter_in_model(LoraConfig(r=4, lora_alpha=6, target_modules=pattern, init_lora_weights="pissa"), base)
    theirs = dict(lora_layers(base))
    for name, layer in lora_layers(unet):
        delta = theirs[name].get_delta_weight("default")
        # What lies between two directions that are nearly as strong may be taken from either.
        assert float(product(*origin.factors[name]).norm()) * 1.5 == pytest.approx(float(delta.norm()), rel=1e-3)
        both = theirs[name].get_base_layer().weight + delta
        torch.testing.assert_close(both, layer.get_base_layer().weight + layer.get_delta_weight("default"))


def test_what_quantisation_leaves_whole_starts_plain_and_learns(start):
    unet, origin, adapters = start(init="loftq", quantization="nf4", targets="all_conv", direction="backward")
    plain = {name for name, (a, b) in origin.factors.items() if not a.any() and not b.any()}
    assert plain == {name for name in origin.factors if name.rpartition(".")[2].startswith("conv")}
    layers = dict(lora_layers(unet))
    for name, layer in layers.items():
        assert layer.lora_A["default"].weight.any()
        assert bool(layer.lora_B["default"].weight.any()) == (name not in plain)
        assert bool(layer.lora_A["default/origin"].weight.any()) == (name not in plain)
    assert not {id(one) for one in adapter_parameters(unet, "default/origin")} & {
        id(one) for one in adapters["default"]
    }


def test_a_run_says_how_it_starts_and_saves_twice_the_rank_everywhere(config, train_here, capsys):
    settings = {
        "lora": {"init": "pissa", "rank": 2, "alpha": 3.0}, "ema": 0.9, "seed": 3,
        "validation": {"every": 2, "pairs": 1, "num_inference_steps": 2}, "steps": 2,
    }  # fmt: skip
    run = config("whole", **settings)
    patch = train_here(run)
    said = capsys.readouterr().out
    assert "start        PiSSA: the weights' principal part, WHICH optim.weight_decay=0.01 WEARS AWAY" in said
    assert "the saved patch has rank 4" in said
    for saved in (patch, run.output / "best", list_checkpoints(run.output / "checkpoints")[-1]):
        adapter = PeftConfig.from_pretrained(str(saved))
        assert (adapter.r, adapter.lora_alpha) == (4, 6.0)
        state = load_file(weight_files(saved)[""])
        assert all(torch.equal(value, state[key]) for key, value in load_file(weight_files(patch)[""]).items())


def test_a_checkpoint_that_started_otherwise_is_refused(config, train_here):
    train_here(config("run", steps=2))
    last = list_checkpoints(config("run").output / "checkpoints")[-1]
    with pytest.raises(ValueError, match=r"lora.init \(was 'plain', is 'pissa'\)"):
        train_here(config("run", lora={"init": "pissa"}))
    state = json.loads((last / STATE_FILE).read_text())
    del state["settings"]["lora.init"]  # as written before there was a choice
    (last / STATE_FILE).write_text(json.dumps(state))
    with pytest.raises(ValueError, match=r"step-000002: its patch is not one that started with lora.init=pissa"):
        train_here(config("run", lora={"init": "pissa"}))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"lora": {"init": "pissa", "rank": 1000}},
            r"lora.rank=1000: lora.init=pissa finds at most \d+ in \S+; lower it",
        ),
        ({"lora": {"init": "loftq", "targets": "conv"}, "quantization": "nf4"}, "nf4 takes nothing from lora.targets"),
    ],
)
def test_what_the_plan_refuses(config, train_here, settings, said):
    with pytest.raises(ValueError, match=said):
        train_here(config(dry_run=True, **settings))


def test_two_processes_start_and_learn_as_one(config, train_here, train_elsewhere):
    settings = {"lora": {"init": "loftq"}, "quantization": "nf4", "steps": 2}
    launcher = (sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone")
    two = config("two", **settings)
    process = train_elsewhere(two, launcher, ACCELERATE_USE_CPU="true")
    _, err = process.communicate(timeout=180)
    assert process.returncode == 0, err
    one = load_file(weight_files(train_here(config("one", gradient_accumulation=2, **settings)))[""])
    for key, value in load_file(weight_files(two.output / "patch")[""]).items():
        torch.testing.assert_close(value, one[key], rtol=0, atol=1e-4 * float(one[key].abs().max()))
