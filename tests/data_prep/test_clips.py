"""Where clips lie: evenly timed, distinct, within one scene, nothing refused that fits; cuts found in real files."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trfpp.data_prep.clips import cuts, nearest, why_no_window, windows
from trfpp.data_prep.video import open_video
from trfpp.data_prep.writing import write_video


def steady(count, fps):
    return np.arange(count) / fps


def test_steady_source_gives_every_third_frame():
    found = windows(steady(61, 30), [], fps=10, num_frames=5)
    assert [window.indices for window in found] == [tuple(range(s, s + 13, 3)) for s in (0, 15, 30, 45)]
    assert all(window.fps == pytest.approx(10) for window in found)
    assert found[1].times == tuple(steady(61, 30)[list(found[1].indices)])


def test_a_source_at_the_target_rate_is_taken_whole():
    found = windows(steady(50, 25), [], fps=25, num_frames=25)
    assert [window.indices for window in found] == [tuple(range(25)), tuple(range(25, 50))]


def test_one_window_when_the_source_just_suffices():
    assert len(windows(steady(13, 30), [], 10, 5)) == 1
    assert not windows(steady(12, 30), [], 10, 5)


def test_stride_makes_windows_overlap_or_leave_gaps():
    starts = [window.indices[0] for window in windows(steady(61, 30), [], 10, 5, stride_seconds=0.2)]
    assert starts == list(range(0, 49, 6))
    starts = [window.indices[0] for window in windows(steady(61, 30), [], 10, 5, stride_seconds=1)]
    assert starts == [0, 30]


def test_windows_keep_to_their_scene():
    found = windows(steady(90, 30), [20, 50], fps=10, num_frames=5)
    assert [window.indices[0] for window in found] == [0, 20, 35, 50, 65]
    for window in found:
        assert not any(window.indices[0] < cut <= window.indices[-1] for cut in (20, 50))


def test_stalls_are_stepped_over():
    times = np.concatenate([steady(20, 30), 5 + steady(20, 30)])
    assert [window.indices[0] for window in windows(times, [], 10, 5)] == [0, 20]


@pytest.mark.parametrize(
    ("times", "cuts_", "reason"),
    [
        (steady(40, 25), [], "runs at 25 fps, slower than the target of 30 fps; ask for at most 25"),
        (steady(3, 30), [], r"too short: 3 frames over 0\.07 s, and 8 frames at 30 fps last 0\.23 s"),
        (steady(30, 30), range(0, 30, 5), r"its longest scene lasts 0\.13 s, and 8 frames at 30 fps last 0\.23 s"),
        (np.sort(np.concatenate([steady(9, 10) + late for late in (0, 0.001, 0.002)])), [], "too unevenly for 25 fps"),
    ],
)
def test_reasons(times, cuts_, reason):
    fps = 25 if "unevenly" in reason else 30
    assert not windows(times, list(cuts_), fps, 8)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(why_no_window(times, list(cuts_), fps, 8))


def test_without_fps_every_frame_counts_at_the_sources_own_rate():
    for fps in (6, 13, 24):
        found = windows(steady(25, fps), [], None, 12)
        assert [window.indices for window in found] == [tuple(range(12)), tuple(range(12, 24))]
        assert all(window.fps == pytest.approx(fps) for window in found)
    assert [window.indices[0] for window in windows(steady(30, 10), [7], None, 5)] == [0, 7, 12, 17, 22]
    starts = [window.indices[0] for window in windows(steady(20, 10), [], None, 8, stride_seconds=0.5)]
    assert starts == [0, 5, 10]


def test_without_fps_uneven_stretches_are_stepped_over():
    times = np.concatenate([steady(9, 30), 5 + steady(9, 30)])
    assert [window.indices for window in windows(times, [], None, 4)] == [
        tuple(range(start, start + 4)) for start in (0, 4, 9, 13)
    ]
    uneven = np.cumsum([0, 1, 1, 1, 19, 1, 1, 1, 19]) / 10
    assert not windows(uneven, [], None, 5)
    assert "too unevenly, up to 1.9 s apart; ask for an fps" in why_no_window(uneven, [], None, 5)
    assert why_no_window(steady(9, 30), [], None, 10) == "too short: it has 9 frames, and a clip 10"
    assert why_no_window(steady(9, 30), [5], None, 7) == "too short: its longest scene has 5 frames, and a clip 7"


@given(
    steps=st.lists(st.floats(0.005, 0.4), min_size=1, max_size=60),
    boundary=st.integers(0, 40),
    num_frames=st.integers(2, 9),
    stride=st.none() | st.floats(0.05, 2),
)
def test_windows_without_fps_hold_what_they_promise(steps, boundary, num_frames, stride):
    times = np.concatenate([[0.0], np.cumsum(steps)])
    boundaries = [boundary] if boundary < len(times) else []
    found = windows(times, boundaries, None, num_frames, stride)
    for window in found:
        assert window.indices == tuple(range(window.indices[0], window.indices[0] + num_frames))
        targets = window.times[0] + np.arange(num_frames) / window.fps
        assert np.abs(np.array(window.times) - targets).max() <= 0.5 / window.fps + 1e-9
        assert not any(window.indices[0] < cut <= window.indices[-1] for cut in boundaries)
    for earlier, later in zip(found, found[1:]):  # noqa: RUF007
        assert later.indices[0] > (earlier.indices[-1] if stride is None else earlier.indices[0])


@pytest.mark.parametrize("bad", [{"fps": 0}, {"num_frames": 1}, {"stride_seconds": 0}])
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        windows(steady(9, 9), [], **{"fps": 3, "num_frames": 2, **bad})


@given(
    steps=st.lists(st.floats(0.005, 0.4), min_size=1, max_size=120),
    boundaries=st.lists(st.integers(0, 120), max_size=4),
    fps=st.floats(2, 40),
    num_frames=st.integers(2, 9),
    stride=st.none() | st.floats(0.05, 2),
)
def test_windows_hold_what_they_promise(steps, boundaries, fps, num_frames, stride):
    times = np.concatenate([[0.0], np.cumsum(steps)])
    boundaries = [boundary for boundary in boundaries if boundary < len(times)]
    found = windows(times, boundaries, fps, num_frames, stride)
    for window in found:
        targets = window.times[0] + np.arange(num_frames) / fps
        assert np.abs(np.array(window.times) - targets).max() <= 0.5 / fps + 1e-9
        assert (np.diff(window.indices) > 0).all()
        assert not any(window.indices[0] < boundary <= window.indices[-1] for boundary in boundaries)
        assert window.times == tuple(times[list(window.indices)])
    for earlier, later in zip(found, found[1:]):  # noqa: RUF007
        assert later.indices[0] > (earlier.indices[-1] if stride is None else earlier.indices[0])


def test_a_scene_gets_the_longest_windows_that_fit():
    times = steady(90, 30)
    found = windows(times, [40, 52], 10, [4, 12, 2])
    # 40 frames hold 12 at every third; 12 frames hold 4; 38 frames hold 12 again.
    assert [(len(window.indices), window.indices[0]) for window in found] == [(12, 0), (4, 40), (12, 52)]
    whole = windows(times, [40, 52], None, [30, 12])
    assert [(len(window.indices), window.indices[0]) for window in whole] == [(30, 0), (12, 40), (30, 52)]


@given(
    steps=st.lists(st.floats(0.005, 0.4), min_size=1, max_size=80),
    boundaries=st.lists(st.integers(0, 80), max_size=3),
    fps=st.none() | st.floats(2, 40),
    lengths=st.lists(st.integers(2, 9), min_size=1, max_size=3, unique=True),
    stride=st.none() | st.floats(0.05, 2),
)
def test_of_several_lengths_each_scene_is_cut_as_with_its_own_alone(steps, boundaries, fps, lengths, stride):
    times = np.concatenate([[0.0], np.cumsum(steps)])
    edges = sorted({0, *(boundary for boundary in boundaries if boundary < len(times)), len(times)})
    alone = {length: windows(times, edges[:-1], fps, length, stride) for length in lengths}
    expected = []
    for first, end in itertools.pairwise(edges):
        inside = {length: [one for one in alone[length] if first <= one.indices[0] < end] for length in lengths}
        longest = max((length for length in lengths if inside[length]), default=None)
        expected += inside.get(longest, [])
    assert windows(times, edges[:-1], fps, lengths, stride) == expected


def test_nearest_by_brute_force():
    generator = np.random.default_rng(0)
    for count in (1, 2, 30):
        times, targets = np.sort(generator.random(count)), generator.random(200) * 1.4 - 0.2
        expected = np.abs(targets[:, None] - times).argmin(1)
        np.testing.assert_array_equal(nearest(times, targets), expected)


def test_cuts_are_found_to_the_frame(tmp_path):
    generator = np.random.default_rng(0)
    y, x = np.mgrid[:96, :128]
    scenes = []
    for length in (17, 9, 24):
        base, waves = generator.integers(0, 200, 3), generator.uniform(0.05, 0.3, 2)
        still = np.clip(base + 55 * np.sin(x * waves[0] + y * waves[1])[..., None], 0, 255)
        scenes += [np.roll(still, 2 * step, 1) for step in range(length)]
    write_video(tmp_path / "a.mp4", np.stack(scenes).astype(np.uint8), 24)
    video = open_video(tmp_path / "a.mp4", 1)
    assert cuts(video) == [17, 26]
    assert len(video.timestamps) == 50


def test_footage_has_the_cuts_one_sees(real_footage):
    assert cuts(open_video(real_footage / "bikes.mp4", 1)) == [30, 76, 137, 187, 242]
    assert cuts(open_video(real_footage / "carphone_pristine.mp4", 1)) == []
