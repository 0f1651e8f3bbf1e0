"""Tracking: right to a pixel and a degree on true films of every world, wrong on cross-fades, whose mean would be right."""

import numpy as np
import pytest

from trfpp.data_prep.procedural import film
from trfpp.infer.baselines import cross_fade
from trfpp.infer.tracking import camera_path, path_errors, track, track_errors

FILMS = range(12)


def faded(shown):
    return cross_fade(shown.frames[0], shown.frames[-1], len(shown.frames))


def errors(shown, frames):
    return track_errors(frames, shown.positions, shown.colour, shown.radius)


@pytest.mark.parametrize(
    ("world", "mean", "worst"),
    [("linear", 0.6, 1.2), ("loop", 0.7, 1.2), ("irreversible", 0.6, 1.3), ("control", 0.3, 0.6)],
)
def test_things_are_found_in_true_films(world, mean, worst):
    found = [errors(shown, shown.frames) for shown in (film(world, 3, index) for index in FILMS)]
    assert np.mean(found) < mean
    assert np.max(found) < worst


@pytest.mark.parametrize("world", ["linear", "control"])
def test_a_cross_fade_is_caught(world):
    """In each frame either ghost is found, a quarter of the way off on average; their mean would be no way off."""
    for index in FILMS:
        shown = film(world, 3, index)
        way = np.linalg.norm(shown.positions[-1] - shown.positions[0])
        found = errors(shown, faded(shown))
        assert 0.15 * way < found.mean() < 0.4 * way
        assert found.max() > 0.3 * way


def test_a_still_is_no_loop():
    for index in FILMS:
        shown = film("loop", 3, index)
        assert errors(shown, np.repeat(shown.frames[:1], 12, 0)).mean() > 15


def test_the_track_has_fractions_of_a_pixel():
    """A slow disc moves by less than a pixel a frame, and so does its track."""
    shown = next(
        one
        for one in (film("base", 0, index) for index in range(200))
        if one.kind == "disc" and 2 < np.linalg.norm(one.positions[-1] - one.positions[0]) < 5
    )
    track_steps = np.diff(track(shown.frames, shown.colour, shown.radius), axis=0)
    assert np.abs(track_steps - np.diff(shown.positions, axis=0)).max() < 0.4


def test_the_camera_is_found_in_true_films_and_not_in_a_cross_fade():
    for index in range(3):
        shown = film("views", 3, index)
        about = ("views", 3, index, shown.camera)
        true = path_errors(shown.frames, *about)
        assert true.shape == (10,)
        assert true.mean() < 0.3
        assert true.max() < 1
        sweep = shown.camera[-1, 0] - shown.camera[0, 0]
        assert path_errors(faded(shown), *about).mean() > 0.15 * sweep


def test_the_camera_of_a_gentle_film_is_found_too():
    films = ((index, film("base", 0, index, num_frames=3)) for index in range(20))
    index, shown = next((index, one) for index, one in films if one.kind == "turntable")
    found = camera_path(shown.frames, "base", 0, index, shown.camera)
    assert np.abs(found - shown.camera[:, 0]).max() < 1


def test_the_wrong_scene_is_not_followed():
    shown = film("views", 3, 0)
    assert path_errors(film("views", 3, 1).frames, "views", 3, 0, shown.camera).mean() > 5
