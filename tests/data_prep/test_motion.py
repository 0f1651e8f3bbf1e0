"""The motion score: zero for stills, the speed of what moves, blind to resolution and frame rate; its bucket scale."""

import cv2
import numpy as np
import pytest

from trfpp.data_prep.clips import cuts, windows
from trfpp.data_prep.motion import ORDINARY_MOTION, motion_bucket, motion_score, statistics
from trfpp.data_prep.video import open_video


def moving(speed, fps, size=(144, 256), num_frames=9, seed=0):
    """A texture moving at `speed` percent of the diagonal per second."""
    height, width = size
    diagonal = np.hypot(height, width)
    generator = np.random.default_rng(seed)
    y, x = (axis / diagonal for axis in np.mgrid[:height, :width])
    waves = [(generator.uniform(-90, 90), generator.uniform(-90, 90), generator.uniform(0, 6)) for _ in range(12)]
    frames = []
    for index in range(num_frames):
        along = x - 0.8 * speed / 100 * index / fps
        down = y - 0.6 * speed / 100 * index / fps
        level = sum(np.sin(kx * along + ky * down + phase) for kx, ky, phase in waves)
        frames.append(np.clip(128 + 25 * level, 0, 255))
    return np.repeat(np.stack(frames)[..., None], 3, axis=-1).astype(np.uint8)


def test_a_still_has_no_motion():
    assert motion_score(moving(0, 7), 7) == 0
    assert motion_bucket(0) == 0


@pytest.mark.parametrize("speed", [1, 4, 10, 25])
def test_score_is_the_speed(speed):
    assert motion_score(moving(speed, 10), 10) == pytest.approx(speed, rel=0.2)


@pytest.mark.parametrize("size", [(72, 128), (288, 512), (432, 768), (256, 144)])
def test_resolution_does_not_matter(size):
    assert motion_score(moving(8, 10, size), 10) == pytest.approx(8, rel=0.2)


@pytest.mark.parametrize("fps", [5, 10, 30])
def test_frame_rate_does_not_matter(fps):
    assert motion_score(moving(8, fps), fps) == pytest.approx(8, rel=0.2)


def test_a_moving_half_counts_half():
    frames = moving(8, 10)
    frames[:, :, :128] = frames[0, :, :128]
    assert motion_score(frames, 10) == pytest.approx(4, rel=0.3)


def test_real_footage_keeps_its_score_when_shrunk_or_thinned(real_footage):
    video = open_video(real_footage / "carphone_pristine.mp4", 1)
    frames = video.read(range(0, 60))
    score = motion_score(frames, 29.97)
    halved = np.stack([cv2.resize(frame, None, fx=0.5, fy=0.5, interpolation=cv2.INTER_AREA) for frame in frames])
    assert motion_score(halved, 29.97) == pytest.approx(score, rel=0.25)
    assert motion_score(frames[::2], 29.97 / 2) == pytest.approx(score, rel=0.25)


def test_buckets_rise_from_0_to_255_with_ordinary_motion_in_the_middle():
    scores = np.concatenate([[0], np.geomspace(0.01, 1000, 50)])
    buckets = [motion_bucket(score) for score in scores]
    assert (np.diff(buckets) > 0).all()
    assert max(buckets) < 255
    assert motion_bucket(ORDINARY_MOTION) == 127.5


def test_real_footage_spreads_over_the_scale(real_footage):
    buckets = []
    for name in ("bikes", "carphone_pristine", "carphone_distorted"):
        video = open_video(real_footage / f"{name}.mp4", 1)
        for window in windows(video.timestamps, cuts(video), 7, 8):
            buckets.append(motion_bucket(motion_score(video.read(window.indices), window.fps)))
    assert min(buckets) < 80
    assert max(buckets) > 170
    assert 80 < np.median(buckets) < 170


def test_statistics_of_known_numbers():
    found = statistics(list(range(11)), [10.0, 20.0, 60.0])
    assert found.model_dump() == {
        "clips": 11,
        "score_median": 5,
        "score_p10": 1,
        "score_p90": 9,
        "motion_bucket_median": 20,
    }
