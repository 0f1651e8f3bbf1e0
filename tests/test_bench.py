"""The training measurement compares the same work, and its full-size SVD-XT is SVD-XT."""

import numpy as np
import pytest
import torch

from trfpp.bench import keyframes, sample, svd_xt
from trfpp.bench.ways import OURS, PUBLIC, Case, prepare, train


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
    release, ours = (sample.run(str(tiny_model), way, "trf", 2) for way in (sample.RELEASE, sample.OURS))
    assert release.calls == ours.calls == release.forwards == 2 * ours.forwards
    assert (len(release.load), len(ours.load)) == (sample.PAIRS, 1)
    assert 0 < ours.outside < 1


def test_the_full_size_is_svd_xts():
    for name, millions in {"unet": 1525, "vae": 98, "image_encoder": 632}.items():
        component = svd_xt.build(name, "meta", torch.bfloat16)
        assert round(sum(one.numel() for one in component.parameters()) / 1e6) == millions
        assert {one.device.type for one in component.parameters()} == {"meta"}


def test_films_and_pairs_are_measured_at_the_same_keyframes():
    world = keyframes.World("linear", None)
    rows = keyframes.measure("miniature", world, 1, steps=1)
    assert rows.shape == (1, 2, len(keyframes.METRICS))
    truth = world.film(keyframes.HELD_OUT)
    exact = keyframes.measured(world, keyframes.HELD_OUT, truth, truth.frames / 255, 0)
    assert exact[:2] == [100.0, 100.0]
    assert exact[2] < 1 > exact[3]
    shown = keyframes.table([world], [np.repeat(rows, 2, axis=0)])
    assert "| linear, base | film |" in shown
