"""Baselines: exact bounds, steady mixing, and flow that follows what moves, by colours it did not invent."""

import cv2
import numpy as np
import pytest

from trfpp.infer.baselines import BASELINES, cross_fade, flow_warp
from trfpp.infer.metrics import inner_psnr


@pytest.fixture(scope="module")
def wide():
    """A smooth random picture, wider than the frames cut from it."""
    generator = np.random.default_rng(0)
    soft = cv2.GaussianBlur(generator.integers(0, 255, (96, 160, 3)).astype(np.float32), (0, 0), 3)
    return ((soft - soft.mean()) * 6 + 128).clip(0, 255).astype(np.uint8)


def pan(wide, step, num_frames=9, side=64):
    return np.stack([wide[16 : 16 + side, 16 + step * i : 16 + step * i + side] for i in range(num_frames)])


@pytest.mark.parametrize("name", BASELINES)
def test_bounds_are_exact(name, wide):
    truth = pan(wide, 2)
    video = BASELINES[name](truth[0], truth[-1], 7)
    assert (video.shape, video.dtype) == ((7, 64, 64, 3), np.uint8)
    np.testing.assert_array_equal(video[0], truth[0])
    np.testing.assert_array_equal(video[-1], truth[-1])


@pytest.mark.parametrize("name", BASELINES)
def test_equal_bounds_give_a_still(name, wide):
    first = pan(wide, 1)[0]
    video = BASELINES[name](first, first, 5).astype(int)
    assert np.abs(video - first).max() <= 1


def test_a_cross_fade_mixes_evenly():
    start, end = np.zeros((4, 4, 3), np.uint8), np.full((4, 4, 3), 200, np.uint8)
    assert cross_fade(start, end, 5)[:, 0, 0, 0].tolist() == [0, 50, 100, 150, 200]


def test_flow_follows_a_pan(wide):
    truth = pan(wide, 1)
    bounds = truth[0], truth[-1]
    flown, faded = (inner_psnr(make(*bounds, len(truth)), truth) for make in (flow_warp, cross_fade))
    assert flown > faded + 8
    assert flown > 30


def test_flow_is_symmetric_in_time(wide):
    start, end = pan(wide, 1)[[0, -1]]
    there, back = flow_warp(start, end, 7).astype(int), flow_warp(end, start, 7)[::-1].astype(int)
    assert np.abs(there - back).max() <= 1


def test_what_is_uncovered_comes_from_the_image_that_shows_it(wide):
    """A patch slides over a ground: in the middle of its way, where it was and where it goes is ground."""
    ground, patch = wide[:64, :64] // 4 + 150, wide[64:92, 100:128]
    frames = []
    for left in (12, 16, 20):
        frame = ground.copy()
        frame[18:46, left : left + 28] = patch
        frames.append(frame)
    flown, faded = (make(frames[0], frames[-1], 3)[1] for make in (flow_warp, cross_fade))
    for columns in (slice(11, 17), slice(17, 43), slice(43, 49)):  # uncovered, the patch, covered
        off, half_off = (
            np.abs(image[20:44, columns].astype(int) - frames[1][20:44, columns]) for image in (flown, faded)
        )
        assert off.mean() < 0.5 * half_off.mean()
