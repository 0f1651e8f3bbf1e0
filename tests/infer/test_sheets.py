"""Contact sheets: which frame lies where, how large, and what is refused."""

import numpy as np
import pytest

from trfpp.infer.sheets import contact_sheet


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
