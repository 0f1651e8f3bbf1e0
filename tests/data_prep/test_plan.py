"""What would be cut: which clips are held out, how many of a source are kept, and what a dry run says."""

import os
import shutil
import sys

import pytest

from trfpp.data_prep.clips import Window
from trfpp.data_prep.plan import ClipSettings, assign_splits, plan
from trfpp.data_prep.writing import write_video

SMALL = {"fps": 10, "num_frames": 4, "height": 32, "width": 32}


def spans(*starts, length=10):
    return [Window((start, start + length - 1), (start / 10, (start + length - 1) / 10)) for start in starts]


def test_the_last_windows_are_held_out():
    splits = assign_splits(spans(0, 10, 20, 30), 1)
    assert [split for _, split in splits] == ["train", "train", "train", "validation"]
    assert [split for _, split in assign_splits(spans(0, 10), 0)] == ["train", "train"]


def test_training_windows_that_overlap_held_out_ones_are_dropped():
    splits = assign_splits(spans(0, 5, 10, 15, 20), 2)
    assert splits == [(window, "train") for window in spans(0, 5)] + [(w, "validation") for w in spans(15, 20)]


@pytest.fixture
def many_short(footage, tmp_path):
    """Ten files with room for one clip each, and a long one with room for ten."""
    for index in range(10):
        footage.encode(tmp_path / f"short{index}.mp4", footage.numbered(12, 32, 32))
    footage.encode(tmp_path / "tall.mp4", footage.numbered(120, 32, 32))
    return tmp_path


@pytest.mark.parametrize(("holdout", "held"), [(0, 0), (0.1, 2), (0.25, 5), (0.5, 10), (1, 20)])
def test_the_fraction_holds_over_sources_of_any_length(many_short, holdout, held):
    found = plan(many_short, progress=False, holdout=holdout, **SMALL)
    splits = [split for video in found.videos for _, split in video.windows]
    assert len(splits) == 20
    assert splits.count("validation") == held


def test_limited_clips_are_spread_over_the_source(many_short):
    found = plan(many_short / "tall.mp4", progress=False, max_clips_per_video=3, holdout=0, **SMALL)
    assert [window.indices[0] for window, _ in found.videos[0].windows] == [0, 48, 108]


def test_a_dry_run_says_what_would_be_cut_and_why_not(many_short):
    (many_short / "text.mp4").write_text("no video")
    said = str(plan(many_short, progress=False, **SMALL))
    assert "tall.mp4: 10 clips, 1 of them held out" in said
    assert "text.mp4: skipped: not a readable video" in said
    assert said.endswith("20 clips of 12 files before motion is measured; each 4 frames of 32x32 at 10 fps")


def test_sources_keep_their_own_rate_without_fps(footage, tmp_path):
    for fps in (8, 12):
        write_video(tmp_path / f"at{fps}.mp4", footage.numbered(4, 32, 32), fps)
    found = plan(tmp_path, progress=False, **{**SMALL, "fps": None})
    rates = {one.name: [window.fps for window, _ in one.windows] for one in found.videos}
    assert rates == {"at8.mp4": [pytest.approx(8)], "at12.mp4": [pytest.approx(12)]}
    assert str(found).endswith("each 4 frames of 32x32 at its source's own fps")


@pytest.fixture
def both_ways(footage, tmp_path):
    """Landscape with a long take, landscape with a short one, portrait as filmed, and portrait by a phone's turn."""
    folder = tmp_path / "both_ways"
    folder.mkdir()
    footage.encode(folder / "long.mp4", footage.numbered(48, 36, 64))
    footage.encode(folder / "short.mp4", footage.numbered(15, 36, 64))
    footage.encode(folder / "tall.mp4", footage.numbered(48, 64, 36))
    footage.encode(folder / "turned.mp4", footage.numbered(48, 36, 64))
    footage.set_rotation(folder / "turned.mp4", 90)
    return folder


def test_every_source_finds_its_bucket(both_ways):
    wanted = {"fps": 10, "num_frames": [4, 8], "sizes": ["64x32", "32x64"], "holdout": 0}
    found = plan(both_ways, progress=False, **wanted)
    shapes = {one.name: [(len(window.indices), *one.size) for window, _ in one.windows] for one in found.videos}
    assert shapes == {
        "long.mp4": [(8, 32, 64)] * 2,
        "short.mp4": [(4, 32, 64)],
        "tall.mp4": [(8, 64, 32)] * 2,
        "turned.mp4": [(8, 64, 32)] * 2,
    }
    said = str(found)
    assert "tall.mp4: 2 clips of 32x64, 0 of them held out" in said
    assert said.splitlines()[-5:] == [
        "7 clips of 4 files before motion is measured; each at 10 fps, in buckets:",
        "  8 frames of 32x64: 4 clips",
        "  8 frames of 64x32: 2 clips",
        "  4 frames of 64x32: 1 clips",
        "  4 frames of 32x64: no clips",
    ]


def test_too_short_for_the_shortest_is_the_reason(both_ways):
    found = plan(both_ways / "short.mp4", progress=False, fps=10, num_frames=[40, 9])
    assert "9 frames at 10 fps last 0.80 s" in found.videos[0].reason


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere names are text")
def test_a_name_that_is_no_text_is_the_reason(footage, tmp_path):
    footage.encode(tmp_path / "good.mp4", footage.numbered(12, 32, 32))
    shutil.copy(tmp_path / "good.mp4", os.fsencode(tmp_path) + b"/caf\xe9.mp4")
    said = str(plan(tmp_path, progress=False, **SMALL)).splitlines()
    assert r"caf\udce9.mp4: skipped: its path is not UTF-8; rename it." in said
    assert any(line.startswith("good.mp4: 1 clip") for line in said)


def test_nothing_to_look_at(tmp_path):
    with pytest.raises(ValueError, match="holds no videos"):
        plan(tmp_path, progress=False)


@pytest.mark.parametrize(
    "bad",
    [
        {"fps": 0},
        {"num_frames": 1},
        {"num_frames": []},
        {"num_frames": [8, 1]},
        {"sizes": []},
        {"sizes": ["64x32", "big"]},
        {"height": 0},
        {"holdout": 1.1},
        {"max_clips_per_video": 0},
        {"fit": "stretch"},
        {"image_format": "gif"},
        {"stride_seconds": -1},
    ],
)
def test_bad_settings_are_named(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        ClipSettings(**bad)
