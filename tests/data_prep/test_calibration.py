"""fps and motion for a pair of bounds: what clips tell is recovered, what they do not tell stays at their mean, and bounds
unlike any clip's count as the nearest there are."""

import cv2
import numpy as np
import pytest

from trfpp.data_prep.calibration import FEWEST_CLIPS, calibrate, distance, estimate
from trfpp.data_prep.motion import motion_bucket


@pytest.fixture
def texture():
    noise = np.random.default_rng(0).integers(0, 256, (24, 48, 3), dtype=np.uint8)
    return cv2.resize(noise, (192, 96), interpolation=cv2.INTER_CUBIC)


def shifted(texture, pixels):
    return np.ascontiguousarray(texture[:, 20 + pixels : 148 + pixels])


def clips(count, fps_exponent=0.0, frames=13):
    """Distances and motion of clips that go three times as far as the flow between their bounds; fps as a power of it."""
    generator = np.random.default_rng(1)
    flow = np.exp(generator.uniform(0, 2, count))
    difference = np.exp(generator.uniform(-4, -2, count))
    fps = 8 * flow**fps_exponent
    return list(zip(flow, difference)), 3 * flow * fps / (frames - 1), fps, [frames] * count, [*map(str, range(count))]


def test_distances_grow_with_the_way_and_are_zero_between_equal_images(texture):
    apart = [distance(shifted(texture, 0), shifted(texture, pixels)) for pixels in (0, 4, 12)]
    assert apart[0] == (0.0, 0.0)
    assert 0 < apart[1][0] < apart[2][0]
    assert 0 < apart[1][1] < apart[2][1] < 1
    flow = 100 * 4 / np.hypot(96, 128)
    assert apart[1][0] == pytest.approx(flow, rel=0.25)


def test_what_clips_tell_is_recovered():
    calibration = calibrate(*clips(400, fps_exponent=0.5))
    assert calibration.clips == 400
    assert calibration.way_explained > 0.99
    assert calibration.fps_explained > 0.99
    fps, bucket = estimate(calibration, (4.0, 0.05), 13)
    assert fps == pytest.approx(16, rel=0.02)
    assert bucket == pytest.approx(motion_bucket(3 * 4 * 16 / 12), rel=0.01)


def test_the_way_is_shared_among_the_frames_at_the_rate_that_is_said():
    """Half the steps at the same rate is twice the motion a second; so is twice the rate."""
    calibration = calibrate(*clips(400))
    score = 3 * 4 * 8 / 12
    for frames, fps in ((7, 8.0), (13, 16.0)):
        told, bucket = estimate(calibration, (4.0, 0.05), frames, fps)
        assert told == fps
        assert bucket == pytest.approx(motion_bucket(2 * score), rel=0.01)


def test_what_clips_do_not_tell_is_their_mean():
    distances, scores, _, frames, films = clips(60)
    fps = np.random.default_rng(5).choice([6.0, 24.0], 60)
    calibration = calibrate(distances, scores, fps, frames, films)
    assert calibration.fps_explained < 0.1
    assert estimate(calibration, (4.0, 0.05), 13)[0] == pytest.approx(np.exp(np.log(fps).mean()), rel=0.25)


def test_bounds_unlike_any_clips_count_as_the_nearest_there_are():
    calibration = calibrate(*clips(400))
    nearest, farthest = (tuple(np.exp(one) - 1e-3) for one in (calibration.nearest, calibration.farthest))
    assert estimate(calibration, (0.0, 0.0), 13) == pytest.approx(estimate(calibration, nearest, 13))
    assert estimate(calibration, (1e3, 1.0), 13) == pytest.approx(estimate(calibration, farthest, 13))


def test_few_clips_or_still_ones_say_nothing():
    assert calibrate(*(part[: FEWEST_CLIPS - 1] for part in clips(40))) is None
    assert calibrate(*(part[:FEWEST_CLIPS] for part in clips(40))) is not None
    distances, scores, fps, frames, films = clips(40)
    assert calibrate(distances, 0 * scores, fps, frames, films) is None
    alike = calibrate(
        [(2.0, 0.1)] * 20, [3.0] * 20, [7.0] * 20, [13] * 20, films[:20]
    )  # nothing varies, nothing is divided by
    assert estimate(alike, (5.0, 0.3), 13) == pytest.approx((7.0, motion_bucket(3.0)))
    assert (alike.way_explained, alike.fps_explained) == (0, 0)


def test_clips_of_one_film_do_not_prove_each_other():
    """Any line goes through three films, each with a distance and a motion of its own, and says nothing of a fourth."""
    flow, difference, score = (np.repeat(values, 40) for values in ([1.0, 2.0, 5.0], [0.1, 0.05, 0.2], [3.0, 9.0, 4.0]))
    rest = list(zip(flow, difference)), score, [8.0] * 120, [13] * 120
    by_film = calibrate(*rest, [str(film) for film in range(3) for _ in range(40)])
    by_clip = calibrate(*rest, [str(clip) for clip in range(120)])
    assert by_clip.way_explained > 0.9
    assert by_film.way_explained < 0.1
    assert (by_film.way, by_film.fps) == (by_clip.way, by_clip.fps)
    assert calibrate(*rest, ["one"] * 120).way_explained == 0
