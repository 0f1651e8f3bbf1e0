"""Loading and fitting frames: aspect kept, antialiased, centred, upright, and exact round trips to tensors."""

import numpy as np
import pytest
import torch
from PIL import Image

from trfpp.data_prep.frames import fit, fit_image, load_image, to_tensor, to_uint8


def disc(height, width, radius):
    y, x = np.mgrid[:height, :width]
    inside = np.hypot(y - (height - 1) / 2, x - (width - 1) / 2) < radius
    return np.repeat((inside * 255).astype(np.uint8)[..., None], 3, axis=-1)


@pytest.mark.parametrize("mode", ["crop", "pad"])
@pytest.mark.parametrize("size", [(90, 160), (160, 90), (64, 64), (200, 211), (33, 47)])
def test_a_disc_stays_a_centred_disc(size, mode):
    frame = fit(disc(*size, radius=0.2 * min(size))[None], 72, 128, mode)[0]
    assert frame.shape == (72, 128, 3)
    inside = frame[..., 0] > 127
    rows, columns = np.flatnonzero(inside.any(1)), np.flatnonzero(inside.any(0))
    assert len(rows) == pytest.approx(len(columns), abs=2)
    assert rows.mean() == pytest.approx(35.5, abs=1)
    assert columns.mean() == pytest.approx(63.5, abs=1)
    scale = {"crop": max, "pad": min}[mode](72 / size[0], 128 / size[1])
    assert len(rows) == pytest.approx(0.4 * min(size) * scale, abs=3)


def test_pad_adds_black_and_keeps_everything():
    frame = fit(np.full((1, 50, 50, 3), 200, np.uint8), 40, 80, "pad")[0]
    assert (frame[:, 20:60] == 200).all()
    assert (frame[:, :20] == 0).all()
    assert (frame[:, 60:] == 0).all()


def test_crop_cuts_evenly_on_both_sides():
    frame = np.zeros((1, 40, 100, 3), np.uint8)
    frame[:, :, 30:70] = 255
    assert (fit(frame, 40, 40, "crop") == 255).all()


def test_fine_stripes_become_grey_not_moire():
    stripes = np.zeros((1, 96, 96, 3), np.uint8)
    stripes[:, :, ::2] = 255
    shrunk = fit(stripes, 36, 36, "crop").astype(int)
    assert shrunk.std() < 12
    assert shrunk.mean() == pytest.approx(127.5, abs=4)


def test_the_right_size_is_left_alone():
    frames = np.random.default_rng(0).integers(0, 256, (2, 24, 40, 3), dtype=np.uint8)
    for mode in ("crop", "pad"):
        np.testing.assert_array_equal(fit(frames, 24, 40, mode), frames)


def test_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="fit='stretch': choose crop or pad"):
        fit_image(Image.new("RGB", (8, 8)), 8, 8, "stretch")


def test_tensors_round_trip_every_level():
    frames = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, -1)
    tensor = to_tensor(frames)
    assert tensor.shape == (1, 3, 16, 16)
    assert tensor.dtype == torch.float32
    assert (tensor.min(), tensor.max()) == (-1, 1)
    np.testing.assert_array_equal(to_uint8(tensor), frames)
    np.testing.assert_array_equal(to_uint8(tensor * 5)[0, 0, 0], [0, 0, 0])


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK", "I;16"])
def test_every_mode_loads_as_rgb(tmp_path, mode):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    if mode == "I;16":
        Image.fromarray(np.full((6, 8), 0xFFFF, np.uint16)).save(path)
    else:
        Image.new("RGB", (8, 6), (255, 255, 255)).convert(mode).save(path)
    image = load_image(path)
    assert (image.mode, image.size) == ("RGB", (8, 6))
    assert np.asarray(image).min() == 255


def test_transparency_is_laid_on_black(tmp_path):
    Image.new("RGBA", (4, 4), (200, 100, 0, 128)).save(tmp_path / "half.png")
    np.testing.assert_allclose(np.asarray(load_image(tmp_path / "half.png"))[0, 0], [100, 50, 0], atol=1)


def test_orientation_is_honoured(tmp_path):
    image = Image.new("RGB", (8, 4))
    image.paste((255, 255, 255), (0, 0, 4, 4))
    exif = Image.Exif()
    exif[0x0112] = 6  # turn clockwise to view
    image.save(tmp_path / "a.jpg", exif=exif)
    loaded = np.asarray(load_image(tmp_path / "a.jpg"))
    assert loaded.shape == (8, 4, 3)
    assert loaded[:3].mean() > 240
    assert loaded[5:].mean() < 15


def test_missing_and_broken_images_are_named(tmp_path):
    with pytest.raises(ValueError, match=r"none\.png: no such file"):
        load_image(tmp_path / "none.png")
    (tmp_path / "text.png").write_text("no image")
    with pytest.raises(ValueError, match=r"text\.png: not a readable image"):
        load_image(tmp_path / "text.png")
