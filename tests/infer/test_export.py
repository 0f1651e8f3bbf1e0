"""Exports: a patch does the same to the UNet and to a video live, in plain PEFT and merged; scaling is baked in right;
whatever is broken or does not fit is refused and leaves nothing behind."""

import json
import math
import shutil

import PIL.Image
import pytest
import torch
from diffusers import UNetSpatioTemporalConditionModel
from peft import LoraConfig, PeftModel
from peft.functional import inject_adapter_in_model
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from trfpp import TimeReversalFusionPipeline, load_patch
from trfpp.configs.schema import ExportConfig
from trfpp.infer import export as exporting
from trfpp.infer.export import export
from trfpp.trf.base import load_component
from trfpp.trf.patch import CONFIG_FILE, WEIGHTS_FILE

# Every kind of weight a patch can train: linear, 2d and temporal convolutions, 1x1 convolutions.
CONVOLUTIONS = r".*(conv1|conv_shortcut|conv|to_q|time_emb_proj)"


def write(patch, output, model, **kwargs):
    return export(ExportConfig(patch=patch, output=output, model=str(model), **kwargs))


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@torch.no_grad()
def respond(unet):
    generator = torch.Generator().manual_seed(1)
    sample = torch.randn(2, 4, 8, 8, 12, generator=generator)
    context = torch.randn(2, 1, 32, generator=generator)
    ids = torch.tensor([[6.0, 127.0, 0.02]] * 2)
    return unet(sample, torch.tensor(1.2), context, ids, return_dict=False)[0]


def sample_video(model, unet):
    pipe = TimeReversalFusionPipeline.from_pretrained(model, unet=unet)
    pipe.set_progress_bar_config(disable=True)
    start, end = PIL.Image.new("RGB", (48, 32), "teal"), PIL.Image.new("RGB", (48, 32), "orange")
    settings = dict(height=32, width=48, num_frames=4, num_inference_steps=3, fps=7, jump_length=1)
    generator = torch.Generator().manual_seed(0)
    return pipe(start, end, generator=generator, output_type="pt", **settings).frames


@pytest.mark.parametrize("targets", ["all", CONVOLUTIONS])
def test_live_peft_and_merged_agree(make_patch, tiny_model, tmp_path, targets):
    patch = make_patch("patch", targets=targets, rank=4, alpha=6.0, rslora=True, size=0.1)
    live = load_component(tiny_model, "unet")
    load_patch(live, patch)
    base = respond(load_component(tiny_model, "unet"))
    truth = respond(live)
    assert relative(base, truth) > 0.01  # the patch does something

    folder = write(patch, tmp_path / "peft", tiny_model)
    plain = PeftModel.from_pretrained(load_component(tiny_model, "unet"), folder)
    assert relative(respond(plain), truth) <= 1e-6
    merged = UNetSpatioTemporalConditionModel.from_pretrained(
        write(patch, tmp_path / "merged", tiny_model, format="merged")
    ).eval()
    assert merged.dtype == torch.float32
    assert relative(respond(merged), truth) <= 1e-4

    video = sample_video(tiny_model, live)
    assert relative(sample_video(tiny_model, merged), video) <= 1e-4
    assert relative(sample_video(tiny_model, plain.get_base_model()), video) <= 1e-4


@pytest.mark.parametrize(
    ("rslora", "alpha", "scaling"), [(False, 4.0, 1.0), (False, 6.0, 1.5), (True, 6.0, 3.0), (True, 1.0, 0.5)]
)
def test_diffusers_file_holds_the_true_scaling(make_patch, tiny_model, tmp_path, rslora, alpha, scaling):
    patch = make_patch("patch", rank=4, alpha=alpha, rslora=rslora)
    file = write(patch, tmp_path / "patch.safetensors", tiny_model, format="diffusers")
    trained = load_file(patch / WEIGHTS_FILE)
    exported = load_file(file)
    assert len(exported) == len(trained) * 3 // 2
    for key, a in trained.items():
        if ".lora_B." in key:
            continue
        module = "unet." + key.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        ours = exported[f"{module}.lora_B.weight"].double() @ exported[f"{module}.lora_A.weight"].double()
        ours *= exported[f"{module}.alpha"].double() / 4
        truth = scaling * trained[key.replace("_A", "_B")].double() @ a.double()
        assert relative(ours, truth) <= 1e-6


def test_diffusers_metadata_says_the_same_as_the_alphas(make_patch, tiny_model, tmp_path):
    patch = make_patch("patch", domain="tiny things", targets="all", alpha=6.0, rslora=True)
    config = json.loads((patch / CONFIG_FILE).read_text())
    odd = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    (patch / CONFIG_FILE).write_text(json.dumps(config | {"alpha_pattern": {odd: 5.0}}))
    file = write(patch, tmp_path / "patch.safetensors", tiny_model, format="diffusers")
    with safe_open(file, "pt") as tensors:
        metadata = tensors.metadata()
    assert json.loads(metadata["trfpp_card"])["domain"] == "tiny things"

    raw = json.loads(metadata["lora_adapter_metadata"])
    adapter = LoraConfig(**{key.removeprefix("unet."): value for key, value in raw.items()})
    unet = load_component(tiny_model, "unet")
    inject_adapter_in_model(adapter, unet, "default")
    scalings = {name: low_rank.scaling for name, low_rank in exporting.live_updates(unet).items()}
    by_alpha = {name: low_rank.scaling for name, low_rank in exporting.read_diffusers(file).items()}
    assert scalings == pytest.approx(by_alpha)
    assert scalings[odd] == pytest.approx(5 / 2)
    assert scalings[odd.replace("to_q", "to_k")] == pytest.approx(6 / 2)


def test_merged_follows_scale_and_leaves_the_rest_alone(make_patch, tiny_model, tmp_path):
    patch = make_patch("patch", targets="temporal")
    base = load_component(tiny_model, "unet").state_dict()
    whole, half, none = (
        load_component_state(write(patch, tmp_path / f"at{scale}", tiny_model, format="merged", scale=scale))
        for scale in (1.0, 0.5, 0.0)
    )
    trained = {key for key in base if not torch.equal(whole[key], base[key])}
    assert trained
    assert all(".temporal_transformer_blocks." in key for key in trained)
    assert all(torch.equal(none[key], base[key]) for key in base)
    for key in trained:
        torch.testing.assert_close(half[key] - base[key], (whole[key] - base[key]) / 2, atol=1e-6, rtol=1e-4)


def test_of_two_directions_one_is_exported_or_both(make_patch, tiny_model, tmp_path):
    patch = make_patch("patch", direction="both", targets="motion", alpha=6.0, rslora=True)
    parts = ("forward", "backward")
    truth = {part: exporting.read_peft(patch / part, tiny_model) for part in parts}
    for form in ("diffusers", "merged"):
        output = tmp_path / ("out.safetensors" if form == "diffusers" else "out")
        with pytest.raises(ValueError, match=f"format {form} holds one; say direction=forward or direction=backward"):
            write(patch, output, tiny_model, format=form)
        assert not output.exists()

    folder = write(patch, tmp_path / "peft", tiny_model)
    assert sorted(path.name for path in folder.iterdir()) == ["backward", "forward"]
    write(patch, folder, tiny_model, overwrite=True)
    base = load_component(tiny_model, "unet").state_dict()
    for part in parts:
        exporting.check_updates(exporting.read_peft(folder / part, tiny_model), truth[part], folder)
        alone = write(patch, tmp_path / f"peft_{part}", tiny_model, direction=part)
        exporting.check_updates(exporting.read_peft(alone, tiny_model), truth[part], alone)
        file = write(patch, tmp_path / f"{part}.safetensors", tiny_model, format="diffusers", direction=part)
        exporting.check_updates(exporting.read_diffusers(file), truth[part], file)
        with safe_open(file, "pt") as tensors:
            assert json.loads(tensors.metadata()["trfpp_card"])["direction"] == part
        merged = write(patch, tmp_path / f"merged_{part}", tiny_model, format="merged", direction=part, scale=0.5)
        exporting.check_merged(merged, base, truth[part], 0.5, merged)
    with pytest.raises(ValueError, match="off the patch's"):
        exporting.check_updates(truth["forward"], truth["backward"], patch)


def test_a_patch_of_one_direction_is_exported_as_it_is(make_patch, tiny_model, tmp_path):
    patch = make_patch("patch", direction="backward", targets="motion")
    for number, direction in enumerate((None, "backward")):
        folder = write(patch, tmp_path / str(number), tiny_model, direction=direction)
        exporting.check_updates(exporting.read_peft(folder, tiny_model), exporting.read_peft(patch, tiny_model), folder)
    with pytest.raises(ValueError, match=r"direction=forward: .* holds one adapter, of direction backward"):
        write(patch, tmp_path / "other", tiny_model, direction="forward")


def load_component_state(folder):
    return UNetSpatioTemporalConditionModel.from_pretrained(folder).state_dict()


def test_a_corrupted_adapter_is_detected(make_patch, tiny_model, tmp_path):
    patch = make_patch("patch", targets="motion")
    truth = exporting.read_peft(patch, tiny_model)
    file = write(patch, tmp_path / "patch.safetensors", tiny_model, format="diffusers")
    state = load_file(file)
    exporting.check_updates(exporting.read_diffusers(file), truth, file)
    some = next(key for key in state if key.endswith("lora_B.weight"))
    module = some.removesuffix(".lora_B.weight")

    def changed(**tensors):
        save_file({**state, **tensors}, file)
        return exporting.read_diffusers(file)

    for value in (state[some] * (1 + 1e-5), state[some] * math.nan, torch.zeros_like(state[some])):
        with pytest.raises(ValueError, match=f"update of {module.removeprefix('unet.')} is .* off"):
            exporting.check_updates(changed(**{some: value}), truth, file)
    with pytest.raises(ValueError, match=r"is .* off"):
        exporting.check_updates(changed(**{f"{module}.alpha": torch.tensor(4.0)}), truth, file)

    less = {key: value for key, value in state.items() if not key.startswith(module)}
    save_file(less, file)
    with pytest.raises(ValueError, match=f"holds {len(truth) - 1} of {len(truth)} trained modules"):
        exporting.check_updates(exporting.read_diffusers(file), truth, file)
    save_file({key: value for key, value in state.items() if key != f"{module}.alpha"}, file)
    with pytest.raises(ValueError, match="no counterpart"):
        exporting.read_diffusers(file)


def test_a_corrupted_merged_unet_is_detected(make_patch, tiny_model, tmp_path):
    patch = make_patch("patch", targets="motion")
    updates = exporting.read_peft(patch, tiny_model)
    folder = write(patch, tmp_path / "merged", tiny_model, format="merged")
    (file,) = folder.glob("*.safetensors")
    state, base = load_file(file), load_component(tiny_model, "unet").state_dict()
    trained = f"{next(iter(updates))}.weight"
    exporting.check_merged(folder, base, updates, 1.0, folder)
    with pytest.raises(ValueError, match="not the base's with the patch added"):
        exporting.check_merged(folder, base, updates, 0.9, folder)
    for key in (trained, "conv_in.bias"):
        save_file({**state, key: state[key] + 1e-5}, file)
        with pytest.raises(ValueError, match=f"{key} of the merged"):
            exporting.check_merged(folder, base, updates, 1.0, folder)
    save_file({key: value for key, value in state.items() if key != "conv_in.bias"}, file)
    with pytest.raises(ValueError, match=r"lacks 1 weights, first conv_in\.bias"):
        exporting.check_merged(folder, base, updates, 1.0, folder)


@pytest.mark.parametrize("form", ["peft", "diffusers", "merged"])
def test_a_broken_or_foreign_patch_leaves_nothing(make_patch, tiny_model, tmp_path, form):
    results = tmp_path / "results"
    output = results / ("out.safetensors" if form == "diffusers" else "out")
    patch = make_patch("patch", targets="motion")
    with pytest.raises(ValueError, match="block_out_channels"):
        write(patch, output, "miniature", format=form)
    state = load_file(patch / WEIGHTS_FILE)
    key = next(iter(state))
    state[key][0, 0] = math.inf
    save_file(state, patch / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="not finite"):
        write(patch, output, tiny_model, format=form)
    del state[key]
    save_file(state, patch / WEIGHTS_FILE)
    with pytest.raises(ValueError, match="are missing"):
        write(patch, output, tiny_model, format=form)
    with pytest.raises(FileNotFoundError, match="not a patch"):
        write(tmp_path / "nowhere", output, tiny_model, format=form)
    assert not results.exists() or not list(results.iterdir())


def test_a_sum_that_overflows_leaves_nothing(make_patch, tiny_model, tmp_path):
    patch = make_patch("patch", targets="motion", size=1e37)
    with pytest.raises(ValueError, match="not the base's with the patch added"):
        write(patch, tmp_path / "results" / "merged", tiny_model, format="merged", scale=100.0)
    assert not list((tmp_path / "results").iterdir())


@pytest.mark.parametrize("form", ["peft", "diffusers", "merged"])
def test_only_an_earlier_export_is_replaced(make_patch, tiny_model, tmp_path, form):
    patch = make_patch("patch", targets="motion")
    suffix = ".safetensors" if form == "diffusers" else ""
    others = tmp_path / f"model{suffix}", tmp_path / f"broken{suffix}"
    if form == "diffusers":
        shutil.copy(tiny_model / "unet" / "diffusion_pytorch_model.safetensors", others[0])
        others[1].write_text("no weights")
    else:  # a model's UNet, and an adapter as other tools write it
        shutil.copytree(tiny_model / "unet", others[0])
        shutil.copytree(patch, others[1], ignore=shutil.ignore_patterns("patch.json"))
    for other in others:
        files = {file: file.read_bytes() for file in (other, *other.rglob("*")) if file.is_file()}
        with pytest.raises(ValueError, match=r"is no earlier export \(no card is in it\), so it is not replaced"):
            write(patch, other, tiny_model, format=form, overwrite=True)
        assert {file: file.read_bytes() for file in (other, *other.rglob("*")) if file.is_file()} == files
    output = write(patch, tmp_path / f"ours{suffix}", tiny_model, format=form)
    stamp = output.stat().st_mtime_ns
    assert write(patch, output, tiny_model, format=form, overwrite=True).stat().st_mtime_ns > stamp


def test_output_is_kept_unless_overwritten(make_patch, tiny_model, tmp_path, caplog):
    patch = make_patch("patch", targets="motion")
    other = make_patch("other", targets="motion", seed=2)
    folder = write(patch, tmp_path / "out", tiny_model)
    before = (folder / WEIGHTS_FILE).read_bytes()
    with pytest.raises(ValueError, match="overwrite=true"):
        write(other, folder, tiny_model)
    assert (folder / WEIGHTS_FILE).read_bytes() == before
    write(other, folder, tiny_model, overwrite=True)
    assert (folder / WEIGHTS_FILE).read_bytes() != before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other", "out", "patch"]

    with pytest.raises(ValueError, match="no earlier export"):
        write(patch, other, tiny_model, overwrite=True)
    with pytest.raises(ValueError, match="no earlier export"):
        write(patch, tmp_path, tiny_model, overwrite=True)
    with pytest.raises(ValueError, match=r"writes a \.safetensors file"):
        write(patch, tmp_path / "folder", tiny_model, format="diffusers")
    with pytest.raises(ValueError, match="writes a folder"):
        write(patch, tmp_path / "a.safetensors", tiny_model, format="merged")
    assert not caplog.records
    write(patch, tmp_path / "half", tiny_model, scale=0.5)
    assert "scale=0.5 is ignored" in caplog.text
