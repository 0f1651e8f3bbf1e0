"""The published samplers against outputs of their authors' code (tests/golden/README.md says how they were made)."""

import json
from pathlib import Path

import PIL.Image
import pytest
import torch
from diffusers import AutoencoderKLTemporalDecoder, UNetSpatioTemporalConditionModel
from safetensors import safe_open

from trfpp import TimeReversalFusionPipeline

GOLDEN = Path(__file__).parents[1] / "golden"
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def heeding(tiny_model):
    """A random model that heeds noise level, fps and motion, which the tests' usual one does not.

    With as many channels as norm groups, a group norm takes out whatever the time embedding adds to a channel.
    """
    torch.manual_seed(7)
    vae = AutoencoderKLTemporalDecoder(
        block_out_channels=(32, 32, 32, 32), down_block_types=("DownEncoderBlock2D",) * 4, latent_channels=4,
        layers_per_block=1, sample_size=64, scaling_factor=0.18215,
    ).eval()  # fmt: skip
    torch.manual_seed(11)
    unet = UNetSpatioTemporalConditionModel(
        sample_size=16, in_channels=8, out_channels=4, block_out_channels=(64, 64), layers_per_block=1,
        down_block_types=("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
        up_block_types=("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
        num_attention_heads=(2, 4), cross_attention_dim=32, addition_time_embed_dim=32,
        projection_class_embeddings_input_dim=96, num_frames=14,
    ).eval()  # fmt: skip
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            if "time_emb" in name or "add_embedding" in name:
                parameter *= 3
    usual = TimeReversalFusionPipeline.from_pretrained(tiny_model)
    made = TimeReversalFusionPipeline(**usual.components | {"vae": vae, "unet": unet})
    made.set_progress_bar_config(disable=True)
    return made


def recorded(sampler):
    """Settings and tensors, and the sum of the UNet's weights in size."""
    with safe_open(GOLDEN / "published" / f"{sampler}.safetensors", "pt") as file:
        told = file.metadata()
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    return json.loads(told["settings"]), tensors, float(told["unet_sum"])


def run(pipe, sampler, **changes):
    """Ours and theirs, and our latents after every step."""
    settings, case, weights = recorded(sampler)
    own = float(sum(one.double().abs().sum() for one in pipe.unet.parameters()))
    assert own == pytest.approx(weights, rel=1e-9), "first weights are drawn in another way than when it was recorded"
    seen = []
    ours = pipe(
        *(PIL.Image.fromarray(case[name].numpy()) for name in ("start_image", "end_image")),
        latents=case["init_latents"], aug_noise=case["aug_noise"].reshape(-1, 1, 3, 64, 64)[0],
        renoise_noise=case["renoise"], sampler=sampler, output_type="latent",
        callback_on_step_end=lambda p, i, t, kw: seen.append(kw["latents"]), **{**settings, **changes},
    )  # fmt: skip
    return ours.frames, case["final_latents"], seen


def relative(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


@pytest.fixture
def as_its_authors(heeding, monkeypatch):
    """The model in a pipeline that has what ViBiDSampler's and MPD's code draws apart: each bound's noise and latents."""

    def make(sampler):
        _, case, _ = recorded(sampler)
        noises, anchors, usual = iter(case["aug_noise"]), iter(case["anchors"]), heeding.encode_bound
        monkeypatch.setattr(
            heeding, "encode_bound", lambda image, settings, noise, device: usual(image, settings, next(noises), device)
        )
        monkeypatch.setattr(heeding, "encode_clean", lambda image, settings, device: next(anchors))
        return heeding

    return make


@pytest.mark.parametrize("sampler", ["trf-reference", "gi"])
def test_it_is_its_authors_to_rounding(heeding, sampler):
    ours, theirs, _ = run(heeding, sampler)
    assert relative(ours, theirs) <= TOLERANCE


@pytest.mark.parametrize("sampler", ["vibid", "mpd-seq", "mpd-par"])
def test_the_others_are_but_for_what_the_documents_name(as_its_authors, sampler):
    """Both draws apart as in their code, MPD's fps; their code leaves the last frame as it is estimated."""
    ours, theirs, seen = run(as_its_authors(sampler), sampler)
    assert relative(seen[-1], theirs) <= TOLERANCE
    assert relative(ours[:, 1:-1], theirs[:, 1:-1]) <= TOLERANCE


@pytest.mark.parametrize("sampler", ["trf-reference", "gi"])
@pytest.mark.parametrize("changes", [{"fps": 12}, {"motion_bucket_id": 20}, {"noise_aug_strength": 0.2}])
def test_the_model_heeds_what_it_is_told(heeding, sampler, changes):
    """Else these recordings would say nothing of it."""
    ours, theirs, _ = run(heeding, sampler, **changes)
    assert relative(ours, theirs) > 100 * TOLERANCE
