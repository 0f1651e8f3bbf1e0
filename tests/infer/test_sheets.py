"""Contact sheets: which frame lies where, how large, and what is refused."""

import numpy as np
import pytest
from PIL import Image

from trfpp.infer.sheets import contact_sheet, moving_sheet, save_animation


def plain(*values, size=(64, 64)):
    """Grey frames, one a value."""
    return np.stack([np.full((*size, 3), value, np.uint8) for value in values])


def cells(sheet, columns, rows, cell):
    """Grey value at the centre of each cell, row by row; columns end at the right border, rows at the lower."""
    pixels = np.asarray(sheet)
    step_x, step_y = cell[0] + 8, cell[1] + 8
    xs = [sheet.width - (columns - c) * step_x + cell[0] // 2 for c in range(columns)]
    ys = [sheet.height - (rows - r) * step_y + cell[1] // 2 for r in range(rows)]
    return [[int(pixels[y, x, 0]) for x in xs] for y in ys]


def test_frames_are_evenly_spaced_and_stills_stand_at_their_time():
    video = plain(*range(100, 109))
    sheet = contact_sheet({"start": plain(10), "base": video, "patched": list(video + 50), "end": plain(20)}, 3)
    white = 255
    assert cells(sheet, 4, 3, (160, 160)) == [
        [10, 100, 150, white],
        [white, 104, 154, white],
        [white, 108, 158, 20],
    ]


def test_small_frames_grow_and_large_ones_shrink_with_their_aspect():
    small = contact_sheet({"a": plain(1, 2, size=(32, 64))}, 2)
    assert cells(small, 1, 2, (160, 80)) == [[1], [2]]
    assert small.height < 2 * 80 + 60
    large = contact_sheet({"a": plain(1, 2, size=(576, 1024)), "b": plain(3, 4, size=(576, 1024))}, 2)
    assert large.width < 2 * 320 + 80


def test_every_label_is_drawn():
    video = plain(255, 255)
    ink = [(np.asarray(contact_sheet({name: video}, 2)) < 128).any(2).sum() for name in ("", "base")]
    assert ink[1] > ink[0] > 0  # the frame numbers alone, and with a name


def test_no_more_rows_than_frames():
    assert cells(contact_sheet({"a": plain(1, 2, 3)}, 9), 1, 3, (160, 160)) == [[1], [2], [3]]


def test_what_cannot_be_drawn_is_refused():
    with pytest.raises(ValueError, match="stills only"):
        contact_sheet({"start": plain(1)}, 2)
    with pytest.raises(ValueError, match="base 2, patched 3"):
        contact_sheet({"base": plain(1, 2), "patched": plain(1, 2, 3)}, 2)
    with pytest.raises(ValueError, match="rows=1"):
        contact_sheet({"base": plain(1, 2)}, 1)


def test_videos_play_beside_each_other_and_a_missing_one_leaves_its_place_empty():
    rows = {"cars": {"truth": plain(10, 20), "base": plain(30, 40)}, "walkers": {"base": plain(50, 60)}}
    pictures = moving_sheet(rows)
    assert [cells(picture, 2, 2, (160, 160)) for picture in pictures] == [
        [[10, 30], [255, 50]],
        [[20, 40], [255, 60]],
    ]
    with pytest.raises(ValueError, match="same number of frames"):
        moving_sheet({"cars": {"truth": plain(1, 2), "base": plain(1)}})
    with pytest.raises(ValueError, match="same number of frames"):
        moving_sheet({})


def test_an_animation_never_ends_and_rests_on_its_last_picture(tmp_path):
    save_animation(tmp_path / "a.webp", moving_sheet({"": {"truth": plain(10, 100, 200)}}), fps=8)
    with Image.open(tmp_path / "a.webp") as animation:
        assert (animation.n_frames, animation.info["loop"]) == (3, 0)
        shown, times = [], []
        for number in range(3):
            animation.seek(number)
            shown.append(int(np.asarray(animation.convert("RGB"))[100, 100, 0]))
            times.append(animation.info["timestamp"])
            last = animation.info["duration"]
    assert shown == pytest.approx([10, 100, 200], abs=3)
    assert np.diff(times) == pytest.approx([125, 125])
    assert last == 750
