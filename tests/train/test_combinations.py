"""Every direction, kind of adapter, quantisation and optimizer trains, is saved and loaded again as the same thing, and
goes on from a checkpoint as if it had not stopped; what cannot work together says so at once."""

import shutil
from pathlib import Path
from typing import get_args

import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder
from pydantic import ValidationError
from safetensors.torch import load_file

from trfpp.configs.training import LoraSettings, OptimSettings, TrainConfig
from trfpp.data_prep.latents import find_cache
from trfpp.train.setup import make_validator
from trfpp.trf.base import load_component
from trfpp.trf.patch import CARD_FILE, load_patch, read_card, weight_files
from trfpp.trf.quantization import Quantization, quantize

STEPS = 8
HALF = STEPS // 2


def choices(model, field):
    return get_args(model.model_fields[field].annotation)


def lr(name):
    # Prodigy has hardly found its rate after so few steps.
    return 100.0 if name == "prodigy" else 1e-2


RUNS = {
    **{f"direction {one}": {"direction": one} for one in choices(TrainConfig, "direction")},
    **{f"kind {one}": {"lora": {"kind": one}} for one in choices(LoraSettings, "kind")},
    **{f"{one} both": {"lora": {"kind": one}, "direction": "both"} for one in choices(LoraSettings, "kind")[1:]},
    **{f"optimizer {one}": {"optim": {"name": one, "lr": lr(one)}} for one in choices(OptimSettings, "name")},
    **{one: {"quantization": one} for one in get_args(Quantization)},
    "dora nf4": {"lora": {"kind": "dora"}, "quantization": "nf4"},
    **{
        f"{one} fp8 both": {"lora": {"kind": one}, "quantization": "fp8", "direction": "both"}
        for one in ("dora", "lokr")
    },
    "nf4 both adamw8bit": {"quantization": "nf4", "direction": "both", "optim": {"name": "adamw8bit"}},
    "convolutions": {"lora": {"targets": "all_conv"}},
    "dora on convolutions": {"lora": {"targets": "conv", "kind": "dora"}},
    "rslora and lora plus": {"lora": {"rslora": True, "dropout": 0.1}, "optim": {"lora_plus": 8.0}},
    "ema": {"ema": 0.9, "direction": "both"},
    "pissa both": {"lora": {"init": "pissa"}, "direction": "both"},
    "pissa on convolutions": {"lora": {"init": "pissa", "targets": "all_conv", "rslora": True}, "ema": 0.9},
    "pissa rotated": {"lora": {"init": "pissa"}, "objective": {"rotated_attention": True}, "direction": "backward"},
    **{f"pissa {one}": {"lora": {"init": "pissa"}, "quantization": one} for one in get_args(Quantization)},
    **{f"loftq {one}": {"lora": {"init": "loftq"}, "quantization": one} for one in get_args(Quantization)},
    "loftq nf4 both": {"lora": {"init": "loftq"}, "quantization": "nf4", "direction": "both"},
    "fusion": {"objective": {"fusion": 0.5}, "direction": "both"},
    "fusion, alternating": {"objective": {"fusion": 0.5, "alternate_directions": True}, "direction": "both"},
    **{f"rotated {one}": {"objective": {"rotated_attention": True}, "direction": one} for one in ("backward", "both")},
}


def weights(patch):
    return {
        f"{part}:{key}": value for part, file in weight_files(patch).items() for key, value in load_file(file).items()
    }


def base_of(run):
    unet = load_component(run.model, "unet")
    if run.quantization is not None and run.lora.init == "plain":
        quantize(unet, run.quantization)
    return unet


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU")
@pytest.mark.parametrize("name", RUNS)
def test_trains_saves_reloads_and_resumes(name, config, train_here, tmp_path):
    validation = {"every": STEPS, "pairs": 1, "num_inference_steps": 2}
    run = config("whole", steps=STEPS, checkpoint={"every": HALF, "keep": 2}, validation=validation, **RUNS[name])
    patch = train_here(run)
    trained = weights(patch)
    assert all(value.isfinite().all() for value in trained.values())
    metrics = read_card(patch).metrics

    validator = make_validator(
        run, find_cache(run.data, run.model), read_card(patch), torch.float32, torch.device("cpu")
    )
    base = validator.run(base_of(run)).metrics
    unet = base_of(run)
    load_patch(unet, patch)
    again = validator.run(unet).metrics
    again.pop("motion_ratio")  # optical flow magnifies rounding
    # A patch that started from the weights fits the whole base, from which the quantised one it was trained on differs.
    near = 1e-4 if run.lora.init == "plain" or run.quantization is None else 0.06
    assert {key: metrics[f"validation {key}"] for key in again} == pytest.approx(again, rel=near)
    assert abs(base["loss"] / again["loss"] - 1) > 1e-3  # it is the patch that is compared

    half = Path("checkpoints") / f"step-{HALF:06}"
    shutil.copytree(run.output / half, tmp_path / "resumed" / half)
    resumed = weights(train_here(config("resumed", steps=STEPS, checkpoint={"every": HALF}, **RUNS[name])))
    assert all(torch.equal(trained[key], resumed[key]) for key in trained)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"lora": {"kind": "loha"}, "quantization": "nf4"}, "loha needs whole weights, not nf4"),
        ({"lora": {"kind": "lokr"}, "quantization": "int8"}, "lokr needs whole weights, not int8"),
        ({"lora": {"kind": "dora"}, "quantization": "int8"}, "which int8 cannot give"),
        ({"lora": {"kind": "loha", "rslora": True}}, "neither rslora nor dropout"),
        ({"lora": {"kind": "lokr"}, "optim": {"lora_plus": 4.0}}, "no second matrices"),
        ({"lora": {"init": "pissa", "kind": "dora"}}, "lora.init=pissa is for lora.kind=lora, not dora"),
        ({"lora": {"init": "loftq", "kind": "lokr"}, "quantization": "fp8"}, "lora.init=loftq is for lora.kind=lora"),
        ({"lora": {"init": "loftq"}}, "set quantization, or choose pissa"),
        ({"lora": {"init": "pissa", "dropout": 0.1}}, "would drop parts of the base itself"),
        ({"lora": {"init": "pissa"}, "start_from": Path("patch")}, "both say where the adapter starts"),
        ({"objective": {"fusion": 0.5}}, "set direction=both"),
        ({"validation": {"best": "loss_fused"}}, "set direction=both"),
        ({"sampler": {"patch_frames": [(0.0, 1.0)]}, "feed_forward_chunks": 2}, "leave feed_forward_chunks out"),
        ({"validation": {"best": "disagreement"}, "sampler": {"sampler": "vibid"}}, "never sees both halves at once"),
        (
            {"objective": {"rotated_attention": True}, "direction": "both", "sampler": {"sampler": "mpd-par"}},
            "sampler.sampler=mpd-par asks for one direction at a time",
        ),
        ({"objective": {"alternate_directions": True}, "direction": "either"}, "set direction=both"),
        ({"objective": {"rotated_attention": True}}, "set direction=backward or both"),
        ({"optim": {"name": "prodigy", "lr": 1.0, "lora_plus": 16.0}}, "optim.name=prodigy has one rate for all"),
        ({"sampler": {"fps": "auto"}}, "sampler.fps=auto: a card recommends numbers"),
        (
            {"objective": {"rotated_attention": True, "alternate_directions": True}, "direction": "both"},
            "needs both directions in one call",
        ),
        ({"optim": {"name": "prodigy", "lr": 1e-4}}, "set optim.lr=1"),
        ({"optim": {"name": "adamw_schedulefree", "schedule": "cosine"}}, "averages the weights itself"),
        ({"optim": {"name": "adamw_schedulefree"}, "ema": 0.9}, "averages the weights itself"),
        (
            {
                "optim": {"name": "adamw_schedulefree"},
                "direction": "both",
                "objective": {"alternate_directions": True},
            },
            "adamw_schedulefree counts steps that objective.alternate_directions gives to the other",
        ),
        (
            {
                "optim": {"name": "prodigy", "lr": 1.0},
                "direction": "both",
                "objective": {"alternate_directions": True},
            },
            "prodigy counts steps that objective.alternate_directions gives to the other",
        ),
        (
            {"lora": {"init": "pissa"}, "sampler": {"patch_frames": [(0.0, 0.0), (1.0, 1.0)]}},
            "lora.init=pissa trains parts of the base itself",
        ),
    ],
)
def test_what_cannot_work_together_is_said_before_anything_loads(config, settings, said):
    with pytest.raises(ValidationError, match=said):
        config(**settings)


@pytest.mark.parametrize("sampler", ["gi", "vibid"])
def test_validation_samples_as_the_card_says(config, train_here, sampler):
    """`gi` cannot do so in small passes; `vibid` sees one half at a time, so there is no disagreement."""
    recommended = {"sampler": sampler, "max_guidance_scale": 1.0}
    validation = {"every": 1, "pairs": 1, "num_inference_steps": 2}
    metrics = read_card(train_here(config(steps=1, sampler=recommended, validation=validation))).metrics
    assert metrics["validation inner_psnr"] > 0
    assert ("validation disagreement" in metrics) == (sampler == "gi")


@pytest.mark.parametrize(("chunk", "lengths"), [(1, [3, 4, 4, 3]), (8, [4])])
def test_validation_decodes_so_many_frames_at_a_time(config, train_here, monkeypatch, chunk, lengths):
    """Of 4, with two neighbours on either side."""
    decoded, decode = [], AutoencoderKLTemporalDecoder.decode
    monkeypatch.setattr(
        AutoencoderKLTemporalDecoder, "decode", lambda self, z, **own: decoded.append(len(z)) or decode(self, z, **own)
    )
    validation = {"every": 1, "pairs": 1, "num_inference_steps": 1, "decode_chunk_size": chunk}
    train_here(config(steps=1, validation=validation))
    assert decoded == lengths * 2  # before the first step and after it


def test_validation_follows_points_of_the_card_beside_checkpointing(config, train_here):
    """Recomputed blocks have a forward pass of their own, and patches that change go through it."""
    shown = []
    for name, points in (("usual", None), ("changing", [(0.0, 0.0), (1.0, 1.0)])):
        sampler = {"patch_frames": points, "patch_schedule": points and [(1.0, 0.5)]}
        validation = {"every": 2, "pairs": 1, "num_inference_steps": 2}
        run = config(name, steps=2, gradient_checkpointing=True, sampler=sampler, validation=validation)
        shown.append(read_card(train_here(run)).metrics)
    assert shown[0]["validation loss"] == shown[1]["validation loss"]
    assert shown[0]["validation disagreement"] != shown[1]["validation disagreement"]


def test_a_kind_that_cannot_act_on_the_targets_is_said_by_the_plan(config, train_here):
    with pytest.raises(ValueError, match="targets='conv': not for this kind of adapter"):
        train_here(config(lora={"kind": "loha", "targets": "conv"}, dry_run=True))


def test_a_warm_start_begins_where_the_other_run_ended(config, train_here):
    first = config("first", ema=0.9)
    patch = train_here(first)
    still = config("still", start_from=patch, steps=1, optim={"lr": 1e-30, "weight_decay": 0.0})
    started = weights(train_here(still))
    assert all(torch.equal(value, started[key]) for key, value in weights(patch).items())
    with pytest.raises(ValueError, match=r"not an adapter like the one to train, .* has to be"):
        train_here(config("other", start_from=patch, lora={"rank": 3}))
    with pytest.raises(ValueError, match=r"not an adapter like the one to train, it has alpha 2.0, not 8.0. Give"):
        train_here(config("stronger", start_from=patch, lora={"alpha": 8.0}))
    with pytest.raises(ValueError, match="it has rslora False, not True"):
        train_here(config("other strength", start_from=patch, lora={"rslora": True}))
    with pytest.raises(ValueError, match="of direction forward, not both"):
        train_here(config("turned", start_from=patch, direction="both"))
    with pytest.raises(FileNotFoundError, match="not a patch folder"):
        train_here(config("nowhere", start_from=patch.parent))
    card = patch / CARD_FILE
    card.write_text(card.read_text().replace('"rotated_attention": false', '"rotated_attention": true'))
    with pytest.raises(ValueError, match=r"trained with objective\.rotated_attention=true; set it so"):
        train_here(config("upright", start_from=patch))
