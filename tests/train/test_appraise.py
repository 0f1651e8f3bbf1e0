"""Measuring a miniature: each measure on films whose answer is known."""

import numpy as np
import pytest

from trfpp.data_prep.likeness import psnr
from trfpp.data_prep.motion import motion_bucket
from trfpp.data_prep.procedural import film
from trfpp.train.appraise import keeping, rank_correlation, sweep
from trfpp.train.figures import LABEL_WIDTH, film_sheet


@pytest.fixture(scope="module")
def films():
    return [film(world, 0, index, 4, 64) for index, world in enumerate(("control", "linear", "views", "control"))]


def test_psnr_of_a_known_error():
    one = np.full((2, 4, 4, 3), 100, np.uint8)
    assert psnr(one, one + np.uint8(10)) == pytest.approx(20 * np.log10(25.5))
    assert psnr(one + np.uint8(10), one) == pytest.approx(20 * np.log10(25.5))


def test_rank_correlation_is_spearmans():
    assert rank_correlation([1, 5, 9], [0.1, 0.2, 70]) == pytest.approx(1)
    assert rank_correlation([1, 5, 9], [3, 2, 1]) == pytest.approx(-1)
    assert rank_correlation([1, 2, 3, 4], [2, 1, 4, 3]) == pytest.approx(0.6)


def test_a_sweep_says_motion_a_frame_and_a_second():
    texture = np.random.default_rng(0).normal(size=(8, 8))
    picture = np.kron(texture, np.ones((8, 8)))
    picture = sum(np.roll(picture, (i, j), (0, 1)) for i in range(-4, 5) for j in range(-4, 5))
    picture = (128 + 60 * picture / np.abs(picture).max()).astype(np.uint8)

    def moving(pixels):
        return np.stack([np.repeat(np.roll(picture, pixels * k, 1)[..., None], 3, -1) for k in range(4)])

    levels = [(10.0, motion_bucket(4.0)), (5.0, 200.0)]
    made = sweep(levels, [np.stack([moving(1)] * 2), np.stack([moving(2)] * 2)], order=[1, 2])
    assert (made.rank_correlation, made.rank_correlation_of_films) == pytest.approx((1, 1))
    assert made.levels[0].asked_per_second == pytest.approx(4.0)
    per_frame = [level.per_frame for level in made.levels]
    assert per_frame[0] == pytest.approx(100 / np.hypot(64, 64), rel=0.2)
    assert per_frame[1] == pytest.approx(200 / np.hypot(64, 64), rel=0.2)
    assert [level.per_second for level in made.levels] == pytest.approx([10 * per_frame[0], 5 * per_frame[1]])
    assert sweep(levels, [np.stack([moving(1)]), np.stack([moving(2)])], order=[2, 1]).rank_correlation < 0


def test_things_of_true_films_are_kept(films):
    kept = keeping(films, [[one.frames for one in films]])
    assert kept.videos == 3  # the turntable holds no single thing
    assert kept.kept == 1
    assert kept.hue_error < 3
    assert kept.area_ratio == pytest.approx(1, abs=0.15)


def test_a_thing_of_another_hue_is_not_kept(films):
    turned = keeping(films, [[one.frames[..., [1, 2, 0]] for one in films]])
    assert turned.hue_error == pytest.approx(120, abs=3)
    assert turned.kept == 0
    assert turned.area_ratio == pytest.approx(1, abs=0.15)


def test_a_thing_that_vanishes_or_grows_is_not_kept(films):
    grey = [np.repeat(one.frames.mean(-1, keepdims=True), 3, -1).astype(np.uint8) for one in films]
    gone = keeping(films, [grey])
    assert (gone.hue_error, gone.area_ratio, gone.kept) == (None, 0, 0)
    halves = [np.concatenate([one.frames, np.broadcast_to(one.frames[-1], one.frames.shape)]) for one in films]
    for video, one in zip(halves, films):
        if one.colour is not None:
            video[-1, :40] = one.colour.astype(np.uint8)
    grown = keeping(films, [halves])
    assert grown.area_ratio > 3
    assert grown.kept == 0


def test_without_a_thing_nothing_is_said(films):
    assert keeping(films[2:3], [[films[2].frames]]) is None


def test_a_sheet_has_a_row_a_film():
    rows = [(name, np.full((3, 10, 12, 3), value, np.uint8)) for name, value in (("one", 10), ("two", 200))]
    sheet = np.asarray(film_sheet(rows))
    assert sheet.shape == (24, LABEL_WIDTH + 39, 3)
    assert (sheet[:10, LABEL_WIDTH : LABEL_WIDTH + 12] == 10).all()
    assert (sheet[12:22, LABEL_WIDTH + 26 : LABEL_WIDTH + 38] == 200).all()
    assert (sheet[:, :LABEL_WIDTH].min(axis=(1, 2)) < 128).any()  # its label
