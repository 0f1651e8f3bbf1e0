"""The training measurement compares the same work, and its full-size SVD-XT is SVD-XT."""

import numpy as np
import pytest
import torch
from PIL import Image

from trfpp.bench import keyframes, quality, sample, svd_xt
from trfpp.bench.ways import OURS, PUBLIC, Case, prepare, train
from trfpp.configs.schema import InferConfig, SamplerOverrides
from trfpp.infer.generate import generate
from trfpp.infer.models import outline_of


def test_both_ways_have_the_same_losses(tmp_path):
    case = Case(
        model="miniature", frames=4, height=32, width=32, precision="no", recomputed=False, folder=tmp_path, device="cpu",
        steps=3, rank=2,
    )  # fmt: skip
    prepare(case)
    public, ours = train(PUBLIC, case), train(OURS, case)
    assert ours.losses == pytest.approx(public.losses, abs=1e-4)
    assert len(set(ours.losses)) == 4
    assert ours.flops < public.flops
    assert ours.conditioning == 0 < public.conditioning


def test_the_releases_way_has_a_pass_for_each_direction(tiny_model):
    release, ours = (sample.run(str(tiny_model), way, "trf", 2, steps=2) for way in (sample.RELEASE, sample.OURS))
    assert release.calls == ours.calls == release.forwards == 2 * ours.forwards
    assert (len(release.load), len(ours.load)) == (2, 1)
    for own in (release, ours):
        assert len(own.pairs) == 2
        assert own.total > sum(own.load) + sum(own.parts.values())
        assert tuple(own.shares) == sample.SHARES
        assert all(0 < share < 1 for share in own.shares.values())
        assert sum(own.shares.values()) == pytest.approx(1)


def test_ours_is_as_good_where_it_is_neither_less_true_nor_less_sharp():
    def made(psnr, sharpness, seconds):
        return quality.Made(24, [seconds, seconds], [psnr - 1, psnr + 1], [sharpness] * 2)

    ours = {2: made(25, 0.4, 1.0), 4: made(24, 0.6, 2.0), 12: made(23, 0.7, 6.0)}
    others = {"true and blurred": made(24.5, 0.4, 10.0), "sharp": made(20, 0.6, 10.0), "both": made(24.5, 0.6, 10.0)}
    lines = quality.table(others, ours).splitlines()[-3:]
    assert "| 2 steps | +0.50 [+0.50, +0.50] | 10.0 (10.0 to 10.0) |" in lines[0]
    assert "| 4 steps | +4.00 [+4.00, +4.00] | 5.0 (5.0 to 5.0) |" in lines[1]
    assert lines[2].endswith("| none |  |  |")


def test_all_samplers_make_the_same_films(monkeypatch):
    monkeypatch.setattr(quality, "STEPS", (1, 2))
    monkeypatch.setattr(quality, "STRATEGIES", {"vibid": None, "trf++": None})
    others, ours = quality.measure("miniature", "linear", None, 1)
    assert {name: made.calls for name, made in others.items()} == {"vibid": 50}
    assert {steps: made.calls for steps, made in ours.items()} == {1: 2, 2: 4}
    assert all(
        10 < made.psnr[0] < 40 and made.seconds[0] > 0 < made.sharpness[0]
        for made in [*others.values(), *ours.values()]
    )


def test_the_full_size_is_svd_xts():
    for name, millions in {"unet": 1525, "vae": 98, "image_encoder": 632}.items():
        component = svd_xt.build(name, "meta", torch.bfloat16)
        assert round(sum(one.numel() for one in component.parameters()) / 1e6) == millions
        assert {one.device.type for one in component.parameters()} == {"meta"}


def test_a_model_of_that_size_is_written_as_any(monkeypatch, tmp_path):
    """Here in its shape, but narrow."""
    monkeypatch.setattr(
        svd_xt, "UNET", svd_xt.UNET | {"block_out_channels": (32,) * 4, "num_attention_heads": (2,) * 4}
    )
    monkeypatch.setattr(svd_xt, "VAE", svd_xt.VAE | {"block_out_channels": (32,) * 4})
    narrow = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    monkeypatch.setattr(svd_xt, "IMAGE_ENCODER", svd_xt.IMAGE_ENCODER | narrow)
    svd_xt.save(tmp_path / "model")
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    size = SamplerOverrides(height=64, width=64, num_frames=2, num_inference_steps=1)
    config = InferConfig(
        model=str(tmp_path / "model"), loop=tmp_path / "a.png", output=tmp_path / "out", sampler=size, save_frames=False
    )
    assert outline_of(config).native == {"num_frames": 25}
    assert len(generate(config)) == 1


def test_films_and_pairs_are_measured_at_the_same_keyframes():
    world = keyframes.World("linear", None)
    rows = keyframes.measure("miniature", world, 1, "trf++")
    assert rows.shape == (1, len(keyframes.WAYS), len(keyframes.METRICS))
    copy, *made = rows[0, :, 0]  # the truth through the VAE, and both ways
    assert copy > max(made)
    truth = world.film(keyframes.HELD_OUT)
    exact = keyframes.measured(world, keyframes.HELD_OUT, truth, truth.frames, 0)
    assert exact[:2] == [100.0, 100.0]
    assert exact[2] < 1 > exact[3]
    turning = keyframes.World("views", None)
    orbit = turning.film(keyframes.HELD_OUT)
    assert turning.path(orbit.frames[:2], orbit, keyframes.HELD_OUT) == pytest.approx(orbit.camera[:2, :1], abs=0.2)
    shown = keyframes.table([world], [np.repeat(rows, 2, axis=0)])
    assert "| linear, base | film |" in shown
