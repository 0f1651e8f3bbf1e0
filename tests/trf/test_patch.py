"""Patches: targets, zero start, saving and loading to the bit, refusal of what does not fit, mixing, fusing, unloading."""

import json
import re

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file

from trfpp.trf import adapters
from trfpp.trf.base import load_component
from trfpp.trf.fusing import fuse, unfuse
from trfpp.trf.patch import base_of, inject_patch, load_patch, patch_files, read_card, save_patch, weight_files
from trfpp.trf.variants import TARGET_PRESETS


@pytest.fixture
def unet(tiny_model):
    return load_component(tiny_model, "unet").eval()


def relative(one, other):
    return float((one - other).norm() / other.norm())


@pytest.mark.parametrize("preset", TARGET_PRESETS)
def test_every_targeted_module_gets_a_gradient(unet, preset):
    """The context is one token, so attn2.to_q and to_k would get none: no preset holds them."""
    parameters = adapters.inject(unet, targets=preset, rank=2, alpha=2)
    with torch.no_grad():  # lora_A has no gradient while lora_B is zero
        for parameter in parameters:
            parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.1)
    generator = torch.Generator().manual_seed(0)
    context, latents = torch.randn(1, 1, 32, generator=generator), torch.randn(1, 4, 8, 8, 8, generator=generator)
    unet(latents, torch.tensor(0.3), context, torch.tensor([[6.0, 127.0, 0.02]])).sample.square().sum().backward()
    assert min(float(parameter.grad.norm()) for parameter in parameters) > 1e-4


def test_cross_attention_queries_are_dead(unet):
    parameters = adapters.inject(unet, targets=r".*\.attn2\.to_[qk]", rank=2, alpha=2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.fill_(0.1)
    ids = torch.tensor([[6.0, 127.0, 0.02]])
    unet(torch.randn(1, 4, 8, 8, 8), torch.tensor(0.3), torch.randn(1, 1, 32), ids).sample.sum().backward()
    assert max(float(parameter.grad.norm()) for parameter in parameters) < 1e-4


def test_presets_cover_what_they_say(unet):
    names = [name for name, _ in unet.named_modules()]
    matched = {p: {n for n in names if re.fullmatch(r, n)} for p, r in TARGET_PRESETS.items()}
    assert matched["all"] == matched["temporal"] | matched["spatial"]
    assert not matched["temporal"] & matched["spatial"]
    assert matched["motion"] < matched["temporal"]
    linear = {n for n, m in unet.named_modules() if isinstance(m, torch.nn.Linear) and "transformer_blocks" in n}
    dead = {n for n in linear if re.search(r"attn2\.to_[qk]$", n)}
    assert matched["all"] == linear - dead
    convolutions = {n for n, m in unet.named_modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Conv3d)}
    assert matched["conv"] == {n for n in convolutions if re.search(r"_res_block\.conv\d$", n)}
    assert matched["all_conv"] == matched["all"] | matched["conv"]


@torch.no_grad()
def test_fresh_adapter_changes_nothing_and_is_seeded(unet, tiny_model, output):
    before = output(unet.requires_grad_(False))
    adapters.inject(unet, targets="temporal", rank=2, alpha=2, seed=3)
    assert torch.equal(output(unet), before)
    other = load_component(tiny_model, "unet")
    torch.manual_seed(99)
    adapters.inject(other, targets="temporal", rank=2, alpha=2, seed=3)
    one, two = adapters.adapter_state(unet), adapters.adapter_state(other)
    assert all(torch.equal(one[key], two[key]) for key in one)


def test_adapter_stays_float32_on_a_half_precision_base(tiny_model):
    unet = load_component(tiny_model, "unet", dtype=torch.bfloat16)
    parameters = adapters.inject(unet, targets="temporal", rank=2, alpha=2)
    assert {parameter.dtype for parameter in parameters} == {torch.float32}
    assert unet.conv_in.weight.dtype == torch.bfloat16
    assert {p.requires_grad for n, p in unet.named_parameters() if "lora_" not in n} == {False}


def test_saved_and_loaded_again_to_the_bit(unet, make_patch):
    folder = make_patch(rslora=True, alpha=3)
    load_patch(unet, folder)
    saved = load_file(folder / "adapter_model.safetensors")
    loaded = adapters.adapter_state(unet)
    assert saved.keys() == loaded.keys()
    assert all(torch.equal(saved[key], loaded[key]) for key in saved)
    assert {p.requires_grad for n, p in unet.named_parameters() if "lora_" in n} == {False}
    layer = next(m for m in unet.modules() if hasattr(m, "scaling"))
    assert layer.scaling["default"] == pytest.approx(3 / 4**0.5)


@torch.no_grad()
def test_a_patch_of_both_directions_is_two_folders_that_plain_peft_loads(unet, make_patch, tiny_model, output):
    folder = make_patch(direction="both", rslora=True, alpha=3)
    assert read_card(folder).direction == "both"
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()} == {
        "patch.json",
        *(
            f"{part}/adapter_{file}"
            for part in ("forward", "backward")
            for file in ("config.json", "model.safetensors")
        ),
    }
    load_patch(unet, folder, "it")
    assert adapters.active_scales(unet) == {"it/forward": (1.0, 0.0), "it/backward": (0.0, 1.0)}
    states = {part: load_file(file) for part, file in weight_files(folder).items()}
    assert not any(torch.equal(value, states["backward"][key]) for key, value in states["forward"].items())
    for part, state in states.items():
        loaded = adapters.adapter_state(unet, f"it/{part}")
        assert state.keys() == loaded.keys()
        assert all(torch.equal(state[key], loaded[key]) for key in state)
        adapters.set_scales(unet, {f"it/{part}": 1.0})
        plain = PeftModel.from_pretrained(load_component(tiny_model, "unet").eval(), folder / part)
        assert relative(output(plain), output(unet)) < 1e-5


def test_the_folders_are_those_that_peft_writes(make_patch, tiny_model, tmp_path):
    folder = make_patch(direction="both")
    model = PeftModel.from_pretrained(load_component(tiny_model, "unet"), folder / "forward", "one")
    model.load_adapter(folder / "backward", "backward")
    model.save_pretrained(tmp_path / "saved")
    files = weight_files(folder)["backward"], tmp_path / "saved" / "backward" / "adapter_model.safetensors"
    ours, theirs = map(load_file, files)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@torch.no_grad()
def test_a_patch_that_lacks_a_direction_is_refused(unet, make_patch, output):
    folder = make_patch(direction="both")
    rewrite(folder / "backward", lambda state: dict(list(state.items())[1:]))
    before = output(unet)
    with pytest.raises(ValueError, match=r"backward: .* are missing"):
        load_patch(unet, folder)
    assert adapters.adapter_names(unet) == []
    assert torch.equal(output(unet), before)
    (folder / "forward" / "adapter_config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"not a whole patch folder, forward/adapter_config\.json missing"):
        load_patch(unet, folder)


def test_an_adapter_starts_the_same_alone_and_beside_another(tiny_model):
    def fresh(direction):
        unet = load_component(tiny_model, "unet")
        parameters = inject_patch(unet, direction, targets="motion", rank=2, alpha=2, seed=3)
        assert all(parameter.requires_grad for own in parameters.values() for parameter in own)
        assert sum(parameter.requires_grad for parameter in unet.parameters()) == sum(map(len, parameters.values()))
        return {name: adapters.adapter_state(unet, name) for name in parameters}

    def same(one, other):
        return all(torch.equal(one[key], other[key]) for key in one)

    both, forward, backward = fresh("both"), fresh("forward")["default"], fresh("backward")["default"]
    assert same(both["default/forward"], forward)
    assert same(both["default/backward"], backward)
    assert not same(forward, backward)
    assert same(fresh("either")["default"], forward)


def test_loading_does_not_move_the_random_stream(unet, make_patch):
    folder = make_patch()
    torch.manual_seed(0)
    expected = torch.randn(3)
    torch.manual_seed(0)
    load_patch(unet, folder)
    assert torch.equal(torch.randn(3), expected)


@torch.no_grad()
def test_scales_mix_and_unloading_restores_the_base_to_the_bit(unet, make_patch, output):
    base = output(unet)
    load_patch(unet, make_patch("one", seed=1), "one")
    one = output(unet)
    load_patch(unet, make_patch("two", seed=2, targets="motion"), "two")
    assert adapters.active_scales(unet) == {"one": 1.0, "two": 1.0}
    both = output(unet)
    assert relative(both, one) > 1e-3
    adapters.set_scales(unet, {"one": 1.0})
    assert torch.equal(output(unet), one)
    adapters.set_scales(unet, {"one": 0.0})
    assert relative(output(unet), base) < 1e-6
    adapters.set_scales(unet, {"one": 0.5, "two": 2.0})
    assert adapters.active_scales(unet) == {"one": 0.5, "two": 2.0}
    adapters.remove_adapters(unet, ["two"])
    assert adapters.active_scales(unet) == {"one": 0.5}
    adapters.remove_adapters(unet)
    assert torch.equal(output(unet), base)
    assert not any("lora" in name for name, _ in unet.named_modules())
    load_patch(unet, make_patch("again", seed=1))
    assert torch.equal(output(unet), one)


def test_fusing_equals_the_live_patch_and_unfusing_the_base(unet, make_patch, output):
    base = output(unet)
    load_patch(unet, make_patch(), "it")
    adapters.set_scales(unet, {"it": 0.7})
    live = output(unet)
    fuse(unet)
    assert relative(output(unet), live) < 1e-4
    with pytest.raises(ValueError, match="fused"):
        adapters.set_scales(unet, {"it": 1.0})
    unfuse(unet)
    assert torch.allclose(output(unet), live, atol=1e-5)
    adapters.remove_adapters(unet)
    assert relative(output(unet), base) < 1e-5


@torch.no_grad()
def test_a_patch_for_another_base_is_refused_with_what_differs(unet, make_patch, output):
    config = {**dict(unet.config), "num_frames": 25}
    folder = make_patch(unet_fingerprint="0" * 64, unet_config={k: v for k, v in config.items() if k[0] != "_"})
    before = output(unet)
    with pytest.raises(ValueError, match=r"num_frames \(patch 25, model 14\)"):
        load_patch(unet, folder)
    assert torch.equal(output(unet), before)


def rewrite(folder, change):
    file = folder / "adapter_model.safetensors"
    save_file(change(load_file(file)), file)


@torch.no_grad()
@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda state: {k.replace("temporal", "missing"): v for k, v in state.items()}, "belong nowhere in this UNet"),
        (lambda state: dict(list(state.items())[1:]), "adapter are missing"),
        (lambda state: {**state, "base_model.model.nowhere.lora_A.weight": torch.zeros(2, 2)}, "1 of its .* nowhere"),
        (lambda state: {k: v[:, :-1].clone() if "lora_A" in k else v for k, v in state.items()}, "it has to be"),
    ],
)
def test_damaged_weights_are_refused_and_the_model_left_alone(unet, make_patch, change, said, output):
    folder = make_patch()
    rewrite(folder, change)
    before = output(unet)
    with pytest.raises(ValueError, match=said):
        load_patch(unet, folder)
    assert torch.equal(output(unet), before)
    assert adapters.adapter_names(unet) == []


@pytest.mark.parametrize(
    ("file", "content", "said"),
    [
        ("adapter_model.safetensors", "version https://git-lfs.github.com/spec/v1", "fetch or copy it again"),
        ("adapter_config.json", '{"peft_type": "NOPE"}', "not a configuration that PEFT can read"),
        ("adapter_config.json", "{", "not a configuration that PEFT can read"),
        ("adapter_config.json", "{}", "no peft_type"),
        ("adapter_config.json", '{"peft_type": "LORA", "r": "x", "target_modules": ".*conv1"}', "adapter_config"),
    ],
)
def test_damaged_files_are_named_and_the_model_left_alone(unet, make_patch, file, content, said, output):
    """Of a pair's second adapter: nothing of the first may stay."""
    folder = make_patch(direction="both")
    (folder / "backward" / file).write_text(content)
    before = output(unet)
    with pytest.raises(ValueError, match=said) as error:
        load_patch(unet, folder, "it")
    assert "backward" in str(error.value)
    assert torch.equal(output(unet), before)
    assert (adapters.adapter_names(unet), list(adapters.lora_layers(unet))) == ([], [])


def test_whatever_breaks_a_loading_leaves_the_model_alone(unet, make_patch, output, monkeypatch):
    load_patch(unet, make_patch("one"), "one", 0.5)
    before = output(unet)

    def interrupted(*_):
        raise KeyboardInterrupt

    folder = make_patch("other", direction="both")
    monkeypatch.setattr(adapters, "load_adapter", interrupted)
    with pytest.raises(KeyboardInterrupt):
        load_patch(unet, folder, "it")
    assert torch.equal(output(unet), before)
    assert adapters.active_scales(unet) == {"one": 0.5}


def test_kinds_that_peft_would_nest_are_refused(unet, make_patch, output):
    load_patch(unet, make_patch("one"), "one")
    load_patch(unet, make_patch("magnitude", kind="dora"), "magnitude")
    before = output(unet)
    with pytest.raises(ValueError, match="kind LOHA cannot lie beside those of kind LORA"):
        load_patch(unet, make_patch("product", kind="loha"), "product")
    assert torch.equal(output(unet), before)
    assert adapters.adapter_names(unet) == ["one", "magnitude"]


def test_broken_cards_and_folders_say_what_is_wrong(make_patch, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"not a patch folder.*patch\.json missing"):
        read_card(tmp_path)
    folder = make_patch()
    card = json.loads((folder / "patch.json").read_text())
    (folder / "patch.json").write_text(json.dumps({**card, "format_version": 99}))
    with pytest.raises(ValueError, match="format 99"):
        read_card(folder)
    (folder / "patch.json").write_text(json.dumps({**card, "fps": "fast"}))
    with pytest.raises(ValueError, match="broken patch card"):
        read_card(folder)


def test_unknown_names_and_patterns_are_named(unet, make_patch):
    with pytest.raises(ValueError, match="matches no module"):
        adapters.inject(unet, targets="nothing_like_it", rank=2, alpha=2)
    load_patch(unet, make_patch(), "one")
    with pytest.raises(ValueError, match=r"named 'two'.*one"):
        adapters.set_scales(unet, {"two": 1.0})
    with pytest.raises(ValueError, match="loaded already"):
        load_patch(unet, make_patch("copy"), "one")


@torch.no_grad()
def test_dropout_is_for_training_only(unet, make_patch, output):
    plain, dropped = make_patch("plain"), make_patch("dropped", dropout=0.5)
    load_patch(unet, plain)
    expected = output(unet)
    adapters.remove_adapters(unet)
    load_patch(unet, dropped)
    torch.manual_seed(0)
    assert torch.equal(output(unet), expected)


def test_a_setting_left_out_of_a_config_means_its_default(unet, make_patch):
    config = {k: v for k, v in unet.config.items() if k[0] != "_" and k != "transformer_layers_per_block"}
    folder = make_patch(unet_fingerprint="0" * 64, unet_config=config)
    assert "transformer_layers_per_block" not in load_patch(unet, folder).unet_config


def test_names_with_another_use_are_refused(unet, make_patch):
    for name in ("keys", "one/two"):
        with pytest.raises(ValueError, match=f"cannot be named '{name}'"):
            load_patch(unet, make_patch(), name)


def test_the_model_is_that_of_the_first_patch(make_patch):
    with pytest.raises(ValueError, match=r"no model: give model="):
        base_of([])
    made = base_of([make_patch(base_model="a/b", base_revision="c", base_variant="fp16"), make_patch("other")])
    assert made == {"model": "a/b", "revision": "c", "variant": "fp16"}


def test_a_patch_is_replaced_at_once_or_not_at_all(unet, make_patch, monkeypatch):
    folder = make_patch()
    before = (folder / "adapter_model.safetensors").read_bytes()
    card = load_patch(unet, folder)

    def full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space"):
        save_patch(folder, patch_files(unet, card.direction), card)
    assert (folder / "adapter_model.safetensors").read_bytes() == before
    assert [path.name for path in folder.parent.iterdir()] == [folder.name]
