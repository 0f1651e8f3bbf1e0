"""The odd lot end to end and the dataset it makes: right frames and times, provenance, splits, reruns, failures."""

import json
import os
import shutil

import numpy as np
import pytest
from PIL import Image

from trfpp.data_prep import dataset
from trfpp.data_prep.dataset import clip_frames, load_clips, prepare
from trfpp.data_prep.motion import motion_bucket

LOT = {"fps": 10, "num_frames": 6, "height": 128, "width": 128, "fit": "pad", "progress": False, "sequence_fps": 20}


@pytest.fixture(scope="module")
def lot(footage, good_files, bad_files, real_footage, tmp_path_factory):
    """Every odd file, real footage, an image sequence, and a whole and a broken one: prepared."""
    source = tmp_path_factory.mktemp("lot")
    for folder, name in ((good_files[0], "good"), (bad_files[0], "bad"), (real_footage, "real")):
        shutil.copytree(folder, source / name, ignore=shutil.ignore_patterns(".*"))
    for name in ("images", "broken"):
        (source / name).mkdir()
        for index, frame in enumerate(footage.numbered(24)):
            Image.fromarray(frame).save(source / name / f"{index}.png")
    (source / "broken" / "7.png").write_bytes(b"")
    output = tmp_path_factory.mktemp("prepared") / "clips"
    report = prepare(source, output, **LOT)
    rows = [row for split in ("train", "validation") for row in load_clips(output, split)]
    return source, output, report, rows


def content(frame, tall):
    """The part of a padded square frame that is picture, for sources of 128x96 and 96x128."""
    return frame[:, 16:112] if tall else frame[16:112]


def test_every_file_is_accounted_for(lot, bad_files):
    source, _, report, rows = lot
    names = {path.relative_to(source).as_posix() for path in source.rglob("*.*") if path.suffix != ".png"}
    assert set(report.files) == names | {"images", "broken"}
    expected = {f"bad/{name}": reason for name, reason in bad_files[1].items()}
    expected["broken"] = "7.png: not a readable image"
    assert set(report.skipped) == set(expected)
    for name, reason in expected.items():
        assert reason in report.skipped[name]
        assert f"skipped {name}: " in report.summary()
    assert sum(report.files.values()) == report.clips == len(rows)
    assert all(clips for name, clips in report.files.items() if name not in expected)


def test_all_clips_can_be_held_out(footage, tmp_path):
    (tmp_path / "videos").mkdir()
    for index in range(2):
        footage.encode(tmp_path / "videos" / f"{index}.mp4", footage.numbered(12, 32, 32))
    settings = {"fps": None, "num_frames": 4, "height": 32, "width": 32, "holdout": 1, "progress": False}
    report = prepare(tmp_path / "videos", tmp_path / "clips", **settings)
    assert (report.train, report.validation) == (0, 6)
    assert len(load_clips(tmp_path / "clips", "train")) == 0
    assert load_clips(tmp_path / "clips", "validation")["fps"][:] == pytest.approx([footage.fps] * 6)
    assert prepare(tmp_path / "videos", tmp_path / "clips", **settings).already_there


def test_frames_are_the_ones_their_times_say(lot, footage, good_files):
    truths = {f"good/{name}": truth for name, truth in good_files[1].items()} | {"images": (np.arange(24) / 20, 0)}
    checked = set()
    for row in lot[3]:
        if row["video"] not in truths:
            continue
        times, first = truths[row["video"]]
        tall = row["video"].split("/")[-1] in ("portrait.mp4", "turned90.mp4", "turned270.mp4")
        numbers = [footage.number(content(frame, tall)) for frame in clip_frames(row)]
        # Indices, times and pixels tell of the same frames of the source.
        assert numbers == [index + first for index in row["frame_indices"]]
        np.testing.assert_allclose(row["timestamps"], times[row["frame_indices"]], atol=1e-3)
        # Evenly spaced at the target rate, to within one frame of the source.
        targets = row["timestamps"][0] + np.arange(LOT["num_frames"]) / LOT["fps"]
        assert np.abs(np.array(row["timestamps"]) - targets).max() <= np.diff(times).max()
        assert row["fps"] == pytest.approx(5 / (row["timestamps"][-1] - row["timestamps"][0]))
        assert row["fps"] == pytest.approx(10, rel=0.11)
        checked.add(row["video"])
    assert checked == set(truths)


def test_rows_say_where_they_come_from(lot):
    _, _, _, rows = lot
    assert len({row["clip_id"] for row in rows}) == len(rows)
    for row in rows:
        assert clip_frames(row).shape == (6, 128, 128, 3)
        assert (row["height"], row["width"]) == (128, 128)
        assert row["clip_id"].endswith(f"-{row['frame_indices'][0]:06d}")
        assert (row["start_seconds"], row["end_seconds"]) == (row["timestamps"][0], row["timestamps"][-1])
        assert row["motion_bucket"] == motion_bucket(row["motion_score"])


def test_held_out_clips_share_no_time_with_training(lot):
    _, output, report, rows = lot
    train, held = load_clips(output, "train"), load_clips(output, "validation")
    assert (len(train), len(held)) == (report.train, report.validation)
    assert len(held) == pytest.approx(0.1 * len(rows), abs=1)
    for row in held.remove_columns("frames"):
        for other in train.remove_columns("frames"):
            if other["video"] == row["video"]:
                assert other["end_seconds"] < row["start_seconds"]


def test_report_lies_in_the_dataset(lot):
    _, output, report, rows = lot
    kept = json.loads((output / "report.json").read_text())
    assert kept["files"] == report.files
    assert kept["skipped"] == report.skipped
    assert kept["settings"]["fps"] == 10
    assert kept["motion"]["clips"] == len(rows)
    assert kept["fps_median"] == pytest.approx(np.median([row["fps"] for row in rows]))
    assert {path.name for path in output.iterdir()} == {"dataset_dict.json", "report.json", "train", "validation"}


def test_same_again_does_nothing_and_other_settings_are_refused(lot):
    source, output, report, _ = lot
    before = os.stat(output / "report.json")
    again = prepare(source, output, **LOT)
    assert again.already_there
    assert "nothing was done" in again.summary()
    assert (again.files, again.skipped, again.clips) == (report.files, report.skipped, report.clips)
    assert os.stat(output / "report.json") == before
    with pytest.raises(ValueError, match=r"fps \(10, now 9\) changed; give another output, or overwrite it"):
        prepare(source, output, **{**LOT, "fps": 9})


@pytest.fixture
def source(footage, tmp_path):
    """One still video and two that move, at different speeds."""
    folder = tmp_path / "source"
    folder.mkdir()
    x, y = np.meshgrid(np.arange(128) * 2 * np.pi / 128, np.arange(96))
    level = 128 + 30 * (np.sin(5 * x + y / 7) + np.sin(9 * x - y / 11) + np.sin(2 * x + y / 5))
    texture = np.repeat(level[..., None], 3, axis=-1).astype(np.uint8)
    for speed in (0, 1, 3):
        frames = np.stack([np.roll(texture, speed * index, axis=1) for index in range(36)])
        footage.encode(folder / f"speed {speed}.mp4", frames)
    return folder


SMALL = {"fps": 10, "num_frames": 4, "height": 48, "width": 64, "progress": False}


def test_motion_bounds_leave_clips_out(source, tmp_path):
    scores = {row["video"]: row["motion_score"] for row in load_clips_of(source, tmp_path / "all", holdout=0)}
    assert scores["speed 0.mp4"] < 5 < scores["speed 1.mp4"] < scores["speed 3.mp4"]
    report = prepare(source, tmp_path / "some", **SMALL, min_motion=5, max_motion=scores["speed 1.mp4"] * 1.5)
    assert report.files == {"speed 0.mp4": 0, "speed 1.mp4": 3, "speed 3.mp4": 0}
    assert (report.too_still, report.too_lively) == (3, 3)
    assert "motion of all its 3 clips" in report.skipped["speed 0.mp4"]


def test_a_dataset_without_what_is_measured_now_is_refused(footage, tmp_path):
    (tmp_path / "videos").mkdir()
    footage.encode(tmp_path / "videos" / "one.mp4", footage.numbered(12, 32, 32))
    output = tmp_path / "clips"
    prepare(tmp_path / "videos", output, fps=None, progress=False, num_frames=4, height=32, width=32, holdout=0)
    load_clips(output).remove_columns("bound_flow").save_to_disk(str(tmp_path / "old"))
    shutil.rmtree(output / "train")
    (tmp_path / "old").rename(output / "train")
    with pytest.raises(
        ValueError, match="made by another version of trfpp, its clips have no bound_flow; make it again"
    ):
        load_clips(output)


def load_clips_of(source, output, **settings):
    prepare(source, output, **{**SMALL, **settings})
    return load_clips(output)


@pytest.mark.parametrize(("max_clips", "train", "validation"), [(None, 2, 1), (1, 1, 0)])
def test_a_hold_out_is_found_where_rounding_gives_none(source, tmp_path, max_clips, train, validation):
    report = prepare(source / "speed 1.mp4", tmp_path / "out", **SMALL, holdout=0.01, max_clips_per_video=max_clips)
    assert (report.train, report.validation) == (train, validation)
    assert len(load_clips(tmp_path / "out", "validation")) == validation


def test_overlapping_clips_hold_the_same_frames(source, footage, tmp_path):
    footage.encode(tmp_path / "a.mp4", footage.numbered(40))
    rows = load_clips_of(tmp_path / "a.mp4", tmp_path / "out", stride_seconds=0.1, holdout=0, height=96, width=128)
    assert len(rows) == 11
    for row in rows:
        assert [footage.number(frame) for frame in clip_frames(row)] == row["frame_indices"]


def test_png_keeps_what_jpeg_nearly_keeps(source, tmp_path):
    png = load_clips_of(source, tmp_path / "png", holdout=0)
    jpeg = load_clips_of(source, tmp_path / "jpeg", holdout=0, image_format="jpeg")
    assert png["clip_id"] == jpeg["clip_id"]
    difference = np.abs(clip_frames(png[0]).astype(int) - clip_frames(jpeg[0]))
    assert 0 < difference.mean() < 3


def test_same_source_same_rows(source, tmp_path):
    first, second = (load_clips_of(source, tmp_path / name) for name in "ab")
    assert first.to_dict() == second.to_dict()


def test_nothing_found_names_every_reason(bad_files, tmp_path):
    folder, reasons = bad_files
    with pytest.raises(ValueError, match="not one clip could be made of its 10 files") as raised:
        prepare(folder, tmp_path / "out", **{**SMALL, "num_frames": 60})
    assert all(f"  {name}: " in str(raised.value) for name in reasons)
    assert not list(tmp_path.iterdir())


def test_other_things_at_the_output_are_left_alone(source, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="something else than a clip dataset"):
        prepare(source, tmp_path / "mine", **SMALL, overwrite=True)
    with pytest.raises(ValueError, match="holds the source"):
        prepare(source, tmp_path, **SMALL, overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").exists()


def test_an_interrupted_run_leaves_the_old_dataset(source, tmp_path, monkeypatch):
    prepare(source, tmp_path / "out", **SMALL)
    before = load_clips(tmp_path / "out").to_dict()
    left = iter(range(4))

    def interrupted(frames, fps):
        next(left, None) is None and (_ for _ in ()).throw(KeyboardInterrupt)
        return 1.0

    monkeypatch.setattr(dataset, "motion_score", interrupted)
    with pytest.raises(KeyboardInterrupt):
        prepare(source, tmp_path / "out", **{**SMALL, "fps": 9}, overwrite=True)
    assert load_clips(tmp_path / "out").to_dict() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "source"]


def test_a_file_that_was_mended_in_its_place_is_noticed(source, tmp_path):
    prepare(source, tmp_path / "out", **SMALL)
    file = next(source.glob("*.mp4"))
    stat = file.stat()
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns + 10**9))
    with pytest.raises(ValueError, match=rf"since then {file.name} of the source changed"):
        prepare(source, tmp_path / "out", **SMALL)
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    del report["sources"]  # of an earlier version, which did not say
    (tmp_path / "out" / "report.json").write_text(json.dumps({**report, "of another version": 1}))
    assert prepare(source, tmp_path / "out", **SMALL).already_there


def test_overwrite_replaces_and_new_files_are_noticed(source, tmp_path):
    prepare(source, tmp_path / "out", **SMALL)
    (source / "new.mp4").write_text("no video")
    with pytest.raises(ValueError, match="the files of the source changed"):
        prepare(source, tmp_path / "out", **SMALL)
    report = prepare(source, tmp_path / "out", **{**SMALL, "fps": 9}, overwrite=True)
    assert not report.already_there
    assert "new.mp4" in report.skipped
    assert load_clips(tmp_path / "out")["fps"][0] == pytest.approx(9, rel=0.1)


def test_no_dataset_to_load(tmp_path):
    with pytest.raises(ValueError, match=r"not a clip dataset, report\.json is missing"):
        load_clips(tmp_path)


def test_portrait_and_landscape_short_and_long_lie_in_one_dataset(footage, tmp_path):
    folder = tmp_path / "videos"
    folder.mkdir()
    footage.encode(folder / "long.mp4", footage.numbered(48, 36, 64))
    footage.encode(folder / "short.mp4", footage.numbered(15, 36, 64))
    footage.encode(folder / "tall.mp4", footage.numbered(48, 64, 36))
    wanted = {"fps": 10, "num_frames": (8, 4), "sizes": ("64x32", "32x64"), "holdout": 0.4, "progress": False}
    report = prepare(folder, tmp_path / "clips", **wanted)
    rows = [row for split in ("train", "validation") for row in load_clips(tmp_path / "clips", split)]
    shapes = {(row["video"], *clip_frames(row).shape[:3]) for row in rows}
    assert shapes == {("long.mp4", 8, 32, 64), ("short.mp4", 4, 32, 64), ("tall.mp4", 8, 64, 32)}
    assert all((row["height"], row["width"]) == clip_frames(row).shape[1:3] for row in rows)
    assert len({row["clip_id"] for row in rows}) == len(rows) == 5
    assert {shape: sum(of.values()) for shape, of in report.buckets.items()} == {
        "8 frames of 32x64": 2, "8 frames of 64x32": 2, "4 frames of 64x32": 1,
    }  # fmt: skip
    assert sum(of["validation"] for of in report.buckets.values()) == report.validation == 2
    assert "  8 frames of 32x64: 2 clips (1 train, 1 validation)" in report.summary()
    assert prepare(folder, tmp_path / "clips", **{**wanted, "num_frames": [8, 4]}).already_there


def test_one_of_several_is_cut_as_alone(source, tmp_path):
    alone = prepare(source, tmp_path / "alone", **SMALL)
    listed = {**SMALL, "num_frames": [SMALL["num_frames"]], "sizes": [f"{SMALL['width']}x{SMALL['height']}"]}
    prepare(source, tmp_path / "listed", **listed)
    for split in ("train", "validation"):
        assert load_clips(tmp_path / "alone", split).to_dict() == load_clips(tmp_path / "listed", split).to_dict()
    assert "frames of" not in alone.summary()
