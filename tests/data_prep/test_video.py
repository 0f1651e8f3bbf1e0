"""Reading odd videos: every frame at its right place and time, upright; damaged ones refused with a reason. Writing."""

import io
import struct
import time
import zlib
from fractions import Fraction

import av
import numpy as np
import psutil
import pytest
from PIL import Image

from trfpp.data_prep.procedural import film
from trfpp.data_prep.video import UnreadableVideo, find_videos, open_video
from trfpp.data_prep.writing import write_frames, write_video

GOOD = [
    *["anim.gif", "b_frames.mp4", "cfr.mp4", "odd_size.mkv", "portrait.mp4", "starts_late.mkv", "starts_late.mp4"],
    *["ten_bit.mp4", "ten_bit_hevc.mp4", "trimmed.mp4", "turned90.mp4", "turned180.mp4", "turned270.mp4"],
    *["untimed.avi", "vfr.mkv", "vfr.mp4", "vp9.webm"],
]
BAD = ["cut_off.mp4", "flipped.mp4", "concealed.avi", "text.mp4", "empty.mp4", "sound.mp4", "stream.ts", "hlg.mp4"]


def numbers(footage, frames):
    return [footage.number(frame) for frame in frames]


def test_lists_are_complete(good_files, bad_files):
    assert sorted(GOOD) == sorted(good_files[1])
    assert set(BAD) < set(bad_files[1])


@pytest.mark.parametrize("name", GOOD)
def test_frames_and_times_are_the_true_ones(footage, good_files, name):
    folder, truth = good_files
    times, first = truth[name]
    video = open_video(folder / name, sequence_fps=1)
    # Matroska keeps milliseconds.
    np.testing.assert_allclose(video.timestamps, times, atol=1e-3)
    assert video.timestamps[0] == 0
    assert video.timestamps.dtype == np.float64
    frames = video.read(range(len(times)))
    assert frames.dtype == np.uint8
    assert numbers(footage, frames) == list(range(first, first + len(times)))


@pytest.mark.parametrize("name", ["b_frames.mp4", "trimmed.mp4", "vfr.mkv", "untimed.avi"])
def test_frames_in_any_order_are_those_read_in_order(good_files, name):
    folder, truth = good_files
    video = open_video(folder / name, sequence_fps=1)
    picks = np.random.default_rng(0).permutation(len(truth[name][0]))[:12]
    whole = video.read(range(len(truth[name][0])))
    np.testing.assert_array_equal(video.read(picks), whole[picks])
    for pick in picks:
        np.testing.assert_array_equal(video.read([pick])[0], whole[pick])


def test_hidden_frames_of_a_still_shot_are_not_counted(footage, tmp_path):
    """Of a trimmed file, where the picture at one key frame is nearly that at the next."""
    frames = np.repeat(footage.numbered(1), 124, axis=0)
    for index in range(124):
        frames[index, 40:44, index : index + 4] = 255
    footage.encode(tmp_path / "whole.mp4", frames, g="30")
    footage.trim(tmp_path / "whole.mp4", tmp_path / "trimmed.mp4", 30, 47)
    video = open_video(tmp_path / "trimmed.mp4", sequence_fps=1)
    picks = [5, 40, 60, 75]
    assert len(video.timestamps) == 124 - 47
    for pick in picks:
        (frame,) = video.read([pick])
        assert abs(int(frame[40:44].sum((0, 2)).argmax()) - (47 + pick)) <= 4


def test_metadata_in_another_encoding_is_no_obstacle(footage, tmp_path):
    file = tmp_path / "old.avi"
    with av.open(str(file), "w") as container:
        container.metadata["title"] = "cafe0"
        stream = container.add_stream("mpeg4", rate=footage.fps)
        stream.height, stream.width, stream.pix_fmt = footage.height, footage.width, "yuv420p"
        for pixels in footage.numbered(12):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    file.write_bytes(file.read_bytes().replace(b"cafe0", "café".encode("latin-1") + b" "))
    assert numbers(footage, open_video(file, sequence_fps=1).read([3, 7])) == [3, 7]


def test_nothing_is_decoded_ahead_after_a_read(tmp_path):
    write_video(tmp_path / "a.mp4", np.zeros((300, 480, 640, 3), np.uint8), 30)
    video = open_video(tmp_path / "a.mp4", 1)
    video.read([0])
    before = psutil.Process().memory_info().rss
    time.sleep(0.5)
    # Left alone, decord fills memory with all 300 frames, 276 MB.
    assert psutil.Process().memory_info().rss - before < 60e6


def test_frames_that_are_not_there_are_refused(good_files):
    with pytest.raises(ValueError, match=r"has frames 0 to 47, asked for \[3, 48\]"):
        open_video(good_files[0] / "cfr.mp4", 1).read([3, 48])


@pytest.mark.parametrize("name", GOOD)
def test_frames_are_upright(footage, good_files, name):
    frame = open_video(good_files[0] / name, sequence_fps=1).read([0])[0]
    expected = footage.numbered(1, *frame.shape[:2], first=good_files[1][name][1])[0]
    tall = name in ("portrait.mp4", "turned90.mp4", "turned270.mp4")
    assert (frame.shape[0] > frame.shape[1]) == tall
    # The picture brightens to the right (red) and down (green), and its numbers are on top.
    mirrored = [expected[::-1], expected[:, ::-1], expected[::-1, ::-1]]
    distances = [np.abs(frame.astype(int) - picture).mean() for picture in (expected, *mirrored)]
    assert np.argmin(distances) == 0


@pytest.mark.parametrize("name", BAD)
def test_unusable_files_say_why(bad_files, name):
    folder, reasons = bad_files
    video = open_video(folder / name, sequence_fps=1)
    with pytest.raises(UnreadableVideo, match=reasons[name]):
        video.read([len(video.timestamps) - 1])


@pytest.mark.parametrize("width", [16, 32, 48, 96, 144])
def test_widths_at_which_decord_pads_rows(footage, tmp_path, width):
    encoded = footage.numbered(4, 64, width)
    footage.encode(tmp_path / "a.mp4", encoded, crf="1")
    frames = open_video(tmp_path / "a.mp4", 1).read(range(4))
    assert frames.shape == encoded.shape
    assert np.abs(frames.astype(int) - encoded).mean() < 6


def test_pixels_that_are_not_square_are_made_so(footage, tmp_path):
    footage.encode(tmp_path / "a.mp4", footage.numbered(4), aspect=Fraction(3, 2))
    assert open_video(tmp_path / "a.mp4", 1).read([0]).shape == (1, 96, 192, 3)


def test_end_of_a_truncated_file_is_not_made_up(footage, tmp_path):
    footage.encode(tmp_path / "a.mkv", footage.numbered(120), g="24")
    data = (tmp_path / "a.mkv").read_bytes()
    (tmp_path / "a.mkv").write_bytes(data[: len(data) * 6 // 10])
    video = open_video(tmp_path / "a.mkv", 1)
    times = video.timestamps
    assert 24 < len(times) < 120
    # The last frames may have gaps, where one stored later is lost; their times say so.
    assert numbers(footage, video.read(range(len(times)))) == np.round(times * footage.fps).astype(int).tolist()


def test_image_sequence_in_natural_order(footage, tmp_path):
    for index, frame in enumerate(footage.numbered(12)):
        Image.fromarray(frame).save(tmp_path / f"shot{index}.png")
    video = open_video(tmp_path, sequence_fps=8)
    np.testing.assert_array_equal(video.timestamps, np.arange(12) / 8)
    np.testing.assert_array_equal(video.read([11, 2, 2]), footage.numbered(12)[[11, 2, 2]])


def test_image_sequence_of_grey_palette_transparent_and_deep_images(tmp_path):
    levels = np.full((6, 8), 100, np.uint8)
    Image.fromarray(levels).save(tmp_path / "0.png")
    Image.fromarray(levels.astype(np.uint16) * 256).save(tmp_path / "1.png")
    Image.fromarray(np.stack([levels] * 3, -1)).quantize(4).save(tmp_path / "2.png")
    Image.merge("RGBA", [Image.fromarray(levels)] * 3 + [Image.new("L", (8, 6), 255)]).save(tmp_path / "3.png")
    (tmp_path / "4.png").write_bytes(deep_png(levels))
    frames = open_video(tmp_path, 1).read(range(5))
    assert frames.shape == (5, 6, 8, 3)
    assert (frames == 100).all()


def deep_png(levels):
    """A PNG of 16 bits a channel, RGB, which Pillow cannot write."""
    rows = b"".join(b"\0" + np.repeat(row.astype(">u2") * 256, 3).astype(">u2").tobytes() for row in levels)

    def chunk(kind, body):
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", levels.shape[1], levels.shape[0], 16, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_image_sequence_with_a_bad_image_says_which(tmp_path):
    for index in range(3):
        Image.new("RGB", (8, 8)).save(tmp_path / f"{index}.png")
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 50).save(buffer, "PNG")
    (tmp_path / "1.png").write_bytes(buffer.getvalue()[:900])
    with pytest.raises(UnreadableVideo, match=r"1\.png: not a readable image"):
        _ = open_video(tmp_path, 1).timestamps
    Image.new("RGB", (9, 8)).save(tmp_path / "1.png")
    with pytest.raises(UnreadableVideo, match=r"1\.png is 9x8, the images before it 8x8"):
        _ = open_video(tmp_path, 1).timestamps


def test_find_videos_recurses_in_natural_order(tmp_path):
    names = ["clip10.mp4", "clip2.MP4", "sub/b.webm", "sub/notes.txt", ".hidden.mp4", "sub/._b.mp4", ".git/a.mp4"]
    names += ["shots/1.png", "shots/2.png", "lone/1.png", "sub/1.png", "sub/2.png"]
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    found = [path.relative_to(tmp_path).as_posix() for path in find_videos(tmp_path)]
    assert found == ["clip2.MP4", "clip10.mp4", "shots", "sub/b.webm"]
    assert find_videos(tmp_path / "clip10.mp4") == [tmp_path / "clip10.mp4"]
    elsewhere = tmp_path / "sub" / "elsewhere"
    elsewhere.symlink_to(tmp_path, target_is_directory=True)  # round in a circle
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "day1").symlink_to(tmp_path / "shots", target_is_directory=True)
    assert [path.relative_to(tmp_path / "links").as_posix() for path in find_videos(tmp_path / "links")] == ["day1"]
    assert len(find_videos(tmp_path)) == 4
    with pytest.raises(ValueError, match="no such file or folder"):
        find_videos(tmp_path / "nowhere")


@pytest.mark.parametrize(("size", "fps"), [((96, 128), 7), ((97, 129), 29.97), ((64, 48), 6.5)])
def test_written_video_reads_back(footage, tmp_path, size, fps):
    frames = footage.numbered(9, *size)
    write_video(tmp_path / "new" / "a.mp4", frames, fps)
    video = open_video(tmp_path / "new" / "a.mp4", 1)
    np.testing.assert_allclose(video.timestamps, np.arange(9) / fps, atol=1e-3)
    back = video.read(range(9))
    assert back.shape == (9, size[0] + size[0] % 2, size[1] + size[1] % 2, 3)
    assert numbers(footage, back) == list(range(9))
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["a.mp4"]


def test_written_video_keeps_its_colours(tmp_path):
    colours = np.array([[200, 40, 40], [40, 180, 60], [50, 60, 200], [220, 200, 60]], np.uint8)
    frames = np.repeat(np.repeat(colours, 32, 0)[None, None], 64, 1).repeat(3, 0)
    write_video(tmp_path / "a.mp4", frames, 10, crf=4)
    back = open_video(tmp_path / "a.mp4", 1).read([1])[0]
    np.testing.assert_allclose(back[32, 16::32], colours, atol=5)


def test_the_same_frames_always_give_the_same_bytes(tmp_path):
    """x264's macroblock tree made a few of a hundred encodes of this film differ."""
    generator, one, written = np.random.default_rng(0), film("linear", 0, 26), set()
    for _ in range(150):
        generator.bytes(int(generator.integers(1, 200_000)))  # memory that was something else before
        write_video(tmp_path / "a.mp4", one.frames, one.fps)
        written.add((tmp_path / "a.mp4").read_bytes())
    assert len(written) == 1


@pytest.mark.parametrize(
    "frames", [np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 3)), np.zeros((8, 8, 3), np.uint8)]
)
def test_writing_what_is_no_video_is_refused(tmp_path, frames):
    with pytest.raises(ValueError, match="give uint8 RGB"):
        write_video(tmp_path / "a.mp4", frames, 7)
    with pytest.raises(ValueError, match="give uint8 RGB"):
        write_frames(tmp_path / "a", frames)
    with pytest.raises(ValueError, match="fps=0"):
        write_video(tmp_path / "a.mp4", np.zeros((2, 8, 8, 3), np.uint8), 0)
    assert not list(tmp_path.iterdir())


def test_written_frames_replace_those_before(footage, tmp_path):
    write_frames(tmp_path / "a", footage.numbered(5))
    write_frames(tmp_path / "a", footage.numbered(3))
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["00000.png", "00001.png", "00002.png"]
    np.testing.assert_array_equal(open_video(tmp_path / "a", 1).read(range(3)), footage.numbered(3))
