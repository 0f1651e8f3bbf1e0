"""Bounded pairs: cut from held-out clips, and manifests read back; bad rows are named with their line."""

import json

import numpy as np
import pytest
from PIL import Image

from trfpp.data_prep.bounds import read_manifest, write_pairs
from trfpp.data_prep.dataset import clip_frames, load_clips, prepare
from trfpp.data_prep.procedural import write_world


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    write_world(folder / "videos", "linear", count=4, seed=0, num_frames=8)
    settings = {"fps": None, "num_frames": 8, "height": 32, "width": 48, "holdout": 0.5, "progress": False}
    prepare(folder / "videos", folder / "clips", **settings)
    return folder / "clips"


def test_pairs_hold_the_clips_bounds_and_truth(clips, tmp_path):
    manifest = write_pairs(clips, tmp_path / "pairs")
    pairs, rows = read_manifest(manifest), load_clips(clips, "validation")
    assert len(pairs) == len(rows) == 2
    for pair, row in zip(pairs, rows):
        frames = clip_frames(row)
        truth = np.stack([np.asarray(Image.open(file)) for file in sorted(pair.truth.iterdir())])
        np.testing.assert_array_equal(truth, frames)
        np.testing.assert_array_equal(np.asarray(Image.open(pair.start)), frames[0])
        np.testing.assert_array_equal(np.asarray(Image.open(pair.end)), frames[-1])
        assert (pair.id, pair.num_frames, pair.seed, pair.loop) == (row["clip_id"], 8, None, False)
        assert (pair.height, pair.width) == frames.shape[1:3]
        assert (pair.fps, pair.motion_bucket_id, pair.video) == (row["fps"], row["motion_bucket"], row["video"])


def test_pairs_can_be_moved_and_made_again(clips, tmp_path):
    write_pairs(clips, tmp_path / "pairs")
    write_pairs(clips, tmp_path / "pairs")
    (tmp_path / "pairs").rename(tmp_path / "elsewhere")
    assert all(pair.start.is_file() for pair in read_manifest(tmp_path / "elsewhere" / "pairs.jsonl"))


def test_other_things_are_not_replaced(clips, tmp_path):
    (tmp_path / "thesis.txt").write_text("years")
    with pytest.raises(ValueError, match="something else than pairs"):
        write_pairs(clips, tmp_path)


@pytest.fixture
def folder(tmp_path):
    for name in ("a.png", "b.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    (tmp_path / "truth").mkdir()
    return tmp_path


def write(folder, name, text):
    (folder / name).write_text(text, encoding="utf-8")
    return folder / name


def test_csv_with_everything(folder):
    path = write(
        folder,
        "m.csv",
        "\ufeffid,start,end,loop,truth,fps,motion_bucket_id,num_frames,seed,video\n"
        "one,a.png,b.png,,truth,7.5,100,14,3,films/a.mp4\n"
        f",,,{folder / 'b.png'},,,,,,\n",
    )
    one, two = read_manifest(path)
    assert (one.id, one.start, one.end) == ("one", folder / "a.png", folder / "b.png")
    assert (one.truth, one.fps, one.motion_bucket_id, one.num_frames, one.seed) == (folder / "truth", 7.5, 100, 14, 3)
    assert one.video == "films/a.mp4"
    assert not one.loop
    assert (two.id, two.start, two.end, two.loop) == ("pair00002", folder / "b.png", folder / "b.png", True)
    assert (two.truth, two.fps, two.motion_bucket_id, two.num_frames, two.seed, two.video) == (None,) * 6


def test_numbers_in_csv_keep_every_digit(folder):
    path = write(folder, "m.csv", f"loop,seed,num_frames\na.png,{2**53 + 1},12.0\n")
    (one,) = read_manifest(path)
    assert (one.seed, one.num_frames) == (2**53 + 1, 12)
    with pytest.raises(ValueError, match="line 2: more cells than the header has columns"):
        read_manifest(write(folder, "more.csv", "loop,seed\na.png,1,2\n"))


def test_jsonl_with_blank_lines(folder):
    rows = [{"start": "a.png", "end": "b.png", "seed": 2**60 + 1}, {"id": "x", "loop": "a.png"}]
    path = write(folder, "m.jsonl", "\n\n".join(map(json.dumps, rows)))
    one, two = read_manifest(path)
    assert (one.id, one.seed, two.id) == ("pair00001", 2**60 + 1, "x")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"start": "a.png"}, "end is missing"),
        ({"start": "a.png", "end": "c.png"}, "end: .*c.png does not exist"),
        ({"start": "a.png", "end": "truth"}, "end: .*truth is not a file"),
        ({"start": "a.png", "end": "b.png", "loop": "a.png"}, "either start and end, or loop"),
        ({}, "either start and end, or loop"),
        ({"loop": "a.png", "caption": "a cat"}, "unknown column 'caption'"),
        ({"loop": "a.png", "id": "../up"}, "no safe file name"),
        ({"loop": "a.png", "id": "/etc/passwd"}, "no safe file name"),
        ({"loop": "a.png", "id": ".."}, "no safe file name"),
        ({"loop": "a.png", "id": "GOOD"}, "id 'GOOD' is that of line 1 too"),
        ({"loop": "a.png", "fps": "fast"}, "fps: 'fast' is not a number"),
        ({"loop": "a.png", "fps": 0}, "fps: 0 is not between"),
        ({"loop": "a.png", "fps": float("nan")}, "fps: nan is not between"),
        ({"loop": "a.png", "motion_bucket_id": 256}, "motion_bucket_id: 256 is not between 0 and 255"),
        ({"loop": "a.png", "seed": 1.5}, "seed: 1.5 is not a whole number"),
        ({"loop": "a.png", "seed": -1}, "seed: -1 is not between"),
        ({"loop": "a.png", "height": 64}, "give both height and width, or neither"),
        ({"loop": "a.png", "height": 64, "width": 0}, "width: 0 is not between"),
        ({"loop": "a.png", "num_frames": 1}, "num_frames: 1 is not between"),
        (["a.png"], "not a JSON object"),
    ],
)
def test_bad_rows_are_named_with_their_line(folder, row, reason):
    path = write(folder, "m.jsonl", json.dumps({"id": "good", "loop": "a.png"}) + "\n" + json.dumps(row))
    with pytest.raises(ValueError, match=f"(?s)m.jsonl: 1 rows cannot be used:.*line 2: .*{reason}"):
        read_manifest(path)


def test_all_bad_rows_are_named_at_once(folder):
    path = write(folder, "m.csv", "start,end\na.png,b.png\nc.png,b.png\na.png\na.png,b.png,7\n")
    with pytest.raises(ValueError, match="3 rows cannot be used") as raised:
        read_manifest(path)
    assert [line.split(":")[0] for line in str(raised.value).splitlines()[1:]] == ["  line 3", "  line 4", "  line 5"]


def test_a_table_in_another_encoding_is_named(folder):
    (folder / "pairs.csv").write_bytes("start,end\ncafé.png,b.png\n".encode("cp1252"))
    with pytest.raises(ValueError, match=r"pairs\.csv: not UTF-8"):
        read_manifest(folder / "pairs.csv")


def test_no_manifest_and_no_pairs(folder):
    with pytest.raises(ValueError, match="no such manifest"):
        read_manifest(folder / "none.csv")
    with pytest.raises(ValueError, match=r"a manifest is a \.csv or a \.jsonl file"):
        read_manifest(folder / "a.png")
    with pytest.raises(ValueError, match="holds no pairs"):
        read_manifest(write(folder, "m.csv", "start,end\n"))
    with pytest.raises(ValueError, match="line 1: not a JSON object"):
        read_manifest(write(folder, "m.jsonl", "{start: a.png"))
