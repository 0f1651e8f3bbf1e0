"""Metrics: golden values, what equal and still videos give, and that they rise with the fault they measure."""

import cv2
import numpy as np
import pytest

from trfpp.data_prep.likeness import HIGHEST_PSNR, psnr
from trfpp.data_prep.motion import motion_ratio
from trfpp.infer.metrics import (
    bound_psnr,
    inner_psnr,
    inner_ssim,
    seam_gap,
    seam_jump,
    sharpness_ratio,
    ssim,
)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def turning(num_frames, shift=0, revolutions=1.0, size=64):
    """A soft blob on a circle; with `revolutions=1` the last frame is the first."""
    y, x = np.mgrid[:size, :size]
    frames = []
    for progress in np.linspace(0, revolutions, num_frames):
        angle = 2 * np.pi * progress
        at_x, at_y = size / 2 + 0.25 * size * np.cos(angle), size / 2 + 0.25 * size * np.sin(angle)
        blob = 200 * np.exp(-((x - at_x) ** 2 + (y - at_y) ** 2) / (2 * (size / 12) ** 2))
        frames.append(np.repeat((30 + shift + blob)[..., None], 3, -1))
    return np.stack(frames).round().clip(0, 255).astype(np.uint8)


def test_psnr_of_a_known_error():
    truth = np.full((3, 8, 8, 3), 100, np.uint8)
    assert psnr(truth + np.uint8(10), truth) == pytest.approx(10 * np.log10(255**2 / 100))
    # The mean of squared errors over everything, not of each frame's decibels.
    video = truth.copy()
    video[0] += 10
    assert psnr(video, truth) == pytest.approx(10 * np.log10(255**2 / (100 / 3)))


def test_equal_videos_have_finite_marks():
    video = noise(4, 24, 24, 3)
    assert psnr(video, video) == inner_psnr(video, video) == HIGHEST_PSNR
    assert ssim(video, video) == pytest.approx(1, abs=1e-12)
    nearly = video.astype(float)
    nearly[0, 0, 0, 0] += 1e-9
    assert psnr(nearly, video) == HIGHEST_PSNR


def test_ssim_is_that_of_scikit_image():
    one = noise(2, 24, 32, 3)
    generator = np.random.default_rng(0)
    generator.integers(0, 256, one.shape, dtype=np.uint8)
    other = np.clip(one * 0.8 + generator.integers(0, 60, one.shape), 0, 255).astype(np.uint8)
    # structural_similarity(gaussian_weights=True, sigma=1.5, use_sample_covariance=False) of scikit-image 0.26.0
    assert ssim(one, other) == pytest.approx(0.9432420689519003, abs=1e-12)
    assert ssim(one, other) == ssim(other, one)


def test_bounds_do_not_count_as_inner_frames():
    truth = noise(5, 16, 16, 3)
    video = truth.copy()
    video[[0, -1]] = 0
    assert inner_psnr(video, truth) == HIGHEST_PSNR
    assert inner_ssim(video, truth) == pytest.approx(1)
    assert bound_psnr(video, truth[0], truth[-1]) < 15
    video = truth.copy()
    video[1:-1] = 0
    assert bound_psnr(video, truth[0], truth[-1]) == HIGHEST_PSNR
    assert inner_psnr(video, truth) < 15


def test_motion_is_relative_to_the_truth():
    truth = turning(13)
    assert motion_ratio(truth, truth) == 1
    assert motion_ratio(turning(13, revolutions=0.3), truth) < 0.6
    still = np.repeat(truth[:1], 13, 0)
    assert motion_ratio(still, truth) == 0
    assert motion_ratio(truth, still) is None


def test_blur_is_less_sharp_and_noise_is_more_wherever_things_are():
    truth = turning(13)
    truth[:, 20:30, 20:30] = noise(10, 10, 3)
    assert sharpness_ratio(truth, truth) == 1
    halved = (truth // 2).astype(np.uint8)
    assert sharpness_ratio(2 * halved, halved) == pytest.approx(2, rel=0.01)
    blurred = np.stack([cv2.GaussianBlur(frame, (0, 0), 1.0) for frame in truth])
    assert sharpness_ratio(blurred, truth) < 0.5
    mixed = np.repeat(((truth[:1].astype(int) + truth[6:7]) // 2).astype(np.uint8), 13, 0)
    assert sharpness_ratio(np.concatenate([mixed[:6], truth[6:]]), truth) < 1
    grain = np.clip(truth.astype(int) + noise(*truth.shape, seed=1) % 20, 0, 255).astype(np.uint8)
    assert sharpness_ratio(grain, truth) > 1.1
    assert sharpness_ratio(np.roll(truth, (4, 4), (1, 2)), truth) == pytest.approx(1, rel=0.02)
    ends = truth.copy()
    ends[[0, -1]] = 0
    assert sharpness_ratio(ends, truth) == 1  # bounds do not count
    assert sharpness_ratio(truth, np.zeros_like(truth)) is None


def test_sharpness_of_a_single_bright_pixel():
    """Its Laplacian is -4 at it and 1 at its four neighbours; that of a line two pixels long -3, -3 and six ones."""
    truth, video = np.zeros((2, 3, 16, 16, 3), np.uint8)
    truth[:, 8, 8] = video[:, 8, 8:10] = 100
    assert sharpness_ratio(video, truth) == pytest.approx(np.sqrt((2 * 9 + 6) / (16 + 4)))


def test_a_perfect_loop_has_no_seam():
    assert seam_gap(turning(17)) == 0
    assert seam_jump(turning(17)) == pytest.approx(1, abs=0.1)


def test_a_loop_that_misses_a_frame_misses_by_one_step():
    assert seam_gap(turning(17)[:-1]) == pytest.approx(1, abs=0.05)


def test_there_and_back_jerks_at_the_seam():
    there = turning(9, revolutions=0.25)
    # It comes back to the first frame at full speed and leaves it at full speed the other way.
    jerky = np.concatenate([there, there[-2::-1]])
    assert seam_gap(jerky) == 0
    assert seam_jump(jerky) > 2


def test_stills_have_no_seam_to_speak_of():
    still = np.repeat(noise(1, 8, 8, 3), 5, 0)
    assert seam_gap(still) is None
    assert seam_jump(still) is None
    assert seam_jump(noise(2, 8, 8, 3)) is None


def test_what_cannot_be_measured_is_refused():
    with pytest.raises(ValueError, match="one shape"):
        psnr(noise(2, 8, 8, 3), noise(3, 8, 8, 3))
    with pytest.raises(ValueError, match="2 frames has no inner ones"):
        inner_psnr(noise(2, 8, 8, 3), noise(2, 8, 8, 3))
    with pytest.raises(ValueError, match="9x8 are smaller than SSIM's window"):
        ssim(noise(1, 8, 9, 3), noise(1, 8, 9, 3))
