"""Every kind of adapter: starts at the base, trains, is saved as PEFT saves it, loads again, fuses, and leaves no trace;
what a kind cannot do is said."""

from typing import get_args

import pytest
import torch
from peft import PeftModel
from peft.functional import get_peft_model_state_dict

from trfpp.trf import adapters
from trfpp.trf.base import load_component
from trfpp.trf.fusing import fuse, unfuse
from trfpp.trf.patch import load_patch
from trfpp.trf.variants import Kind, adapter_config, target_pattern

KINDS = get_args(Kind)


@pytest.fixture
def unet(tiny_model):
    return load_component(tiny_model, "unet").eval()


def relative(one, other):
    return float((one - other).detach().norm() / other.norm())


@pytest.mark.parametrize("kind", KINDS)
def test_a_fresh_adapter_changes_nothing_is_seeded_and_can_learn(unet, tiny_model, kind, output):
    before = output(unet).detach()
    parameters = adapters.inject(unet, targets="all", kind=kind, rank=4, alpha=4, seed=3)
    assert relative(output(unet), before) < 1e-5
    output(unet).square().mean().backward()
    moved = [bool(parameter.grad is not None and parameter.grad.any()) for parameter in parameters]
    assert sum(moved) >= len(moved) / 4  # the factors at zero hold back the others' gradient until they move
    with torch.no_grad():
        for parameter in parameters:
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad.sign()
    assert relative(output(unet), before) > 1e-3
    other = load_component(tiny_model, "unet")
    torch.manual_seed(99)
    adapters.inject(other, targets="all", kind=kind, rank=4, alpha=4, seed=3)
    fresh = load_component(tiny_model, "unet")
    adapters.inject(fresh, targets="all", kind=kind, rank=4, alpha=4, seed=3)
    one, two = adapters.adapter_state(other), adapters.adapter_state(fresh)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_is_what_peft_saves_and_loads(unet, tiny_model, make_patch, kind, output):
    base = output(unet)
    folder = make_patch(kind=kind, targets="all")
    load_patch(unet, folder)
    patched = output(unet)
    assert relative(patched, base) > 0.01
    theirs = get_peft_model_state_dict(unet, adapter_name="default")
    ours = adapters.adapter_state(unet)
    assert {adapters.STATE_PREFIX + key for key in theirs} == ours.keys()
    assert all(torch.equal(value, ours[adapters.STATE_PREFIX + key]) for key, value in theirs.items())
    plain = PeftModel.from_pretrained(load_component(tiny_model, "unet").eval(), str(folder))
    assert relative(output(plain), patched) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_fused_and_taken_out(unet, make_patch, kind, output):
    base = output(unet)
    load_patch(unet, make_patch(kind=kind, targets="all"))
    patched = output(unet)
    fuse(unet)
    assert relative(output(unet), patched) < 1e-4
    unfuse(unet)
    adapters.remove_adapters(unet)
    assert relative(output(unet), base) < 1e-4
    assert {type(module).__module__ for module in unet.modules() if "peft" in type(module).__module__} == set()


@pytest.mark.parametrize("kind", KINDS)
def test_weights_of_another_kind_are_refused_and_the_model_left_alone(unet, make_patch, kind, output):
    folder, other = make_patch(kind=kind), make_patch("other", kind=KINDS[KINDS.index(kind) - 1])
    (other / "adapter_model.safetensors").replace(folder / "adapter_model.safetensors")
    before = output(unet)
    with pytest.raises(ValueError, match=r"patch: .* (belong nowhere|missing)"):
        load_patch(unet, folder)
    assert torch.equal(output(unet), before)
    assert adapters.adapter_names(unet) == []


def test_what_a_kind_cannot_do_is_said(unet):
    with pytest.raises(ValueError, match="kind=loha knows neither rslora nor dropout"):
        adapter_config(kind="loha", targets="all", rank=2, alpha=2, dropout=0.1)
    with pytest.raises(ValueError, match=r"targets='conv': not for this kind of adapter: .*Conv3d"):
        adapters.inject(unet, kind="lokr", targets="conv", rank=2, alpha=2)
    with pytest.raises(ValueError, match="neither a preset"):
        target_pattern("(")
