"""The linear world: seeded, moving forward at constant speed along its front, and files that hold the same frames."""

import numpy as np
import pytest

from trfpp.data_prep.motion import motion_score
from trfpp.data_prep.procedural import linear_clip, write_linear_world
from trfpp.data_prep.video import open_video

FRONT = (250, 240, 160)


def clip(seed, num_frames=9, size=(96, 128)):
    return linear_clip(np.random.default_rng(seed), num_frames, size).astype(float)


def centres(frames):
    """Centre of what differs from the still ground, which is the frames' median."""
    moving = np.abs(frames - np.median(frames, axis=0)).sum(-1) > 60
    y, x = np.mgrid[: frames.shape[1], : frames.shape[2]]
    return np.array([[x[mask].mean(), y[mask].mean()] for mask in moving])


def test_same_seed_same_bits_and_others_differ():
    np.testing.assert_array_equal(clip(3), clip(3))
    assert np.abs(clip(3) - clip(4)).mean() > 5


@pytest.mark.parametrize("seed", range(6))
def test_the_body_moves_steadily_and_front_first(seed):
    frames = clip(seed, num_frames=33)
    bright = [np.argwhere(np.abs(frame - FRONT).max(-1) < 12).mean(0)[::-1] for frame in frames]
    steps = np.diff(bright, axis=0)
    forward = steps.mean(0) / np.linalg.norm(steps.mean(0))
    # Constant velocity: every step points and measures as the mean one does, to a fraction of a pixel.
    assert np.abs(steps - steps.mean(0)).max() < 0.6
    # The bright front is ahead of the rest.
    assert ((np.array(bright) - centres(frames)) @ forward)[12:20].min() > 0


def test_clips_move_and_differ_in_speed():
    scores = [motion_score(clip(seed).astype(np.uint8), 7) for seed in range(5)]
    assert min(scores) > 0.3
    assert max(scores) / min(scores) > 1.3


def test_files_hold_the_clips(tmp_path):
    paths = write_linear_world(tmp_path / "world", count=2, seed=5, num_frames=6, fps=8, size=(64, 96))
    assert [path.name for path in paths] == ["linear_0000.mp4", "linear_0001.mp4"]
    for index, path in enumerate(paths):
        video = open_video(path, 1)
        np.testing.assert_allclose(video.timestamps, np.arange(6) / 8)
        truth = linear_clip(np.random.default_rng([5, index]), 6, (64, 96))
        assert np.abs(video.read(range(6)).astype(int) - truth).mean() < 5
