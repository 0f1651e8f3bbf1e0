"""The worlds: films that depend on seed and number alone, ground truth that the pixels bear out, and files of both."""

import json

import numpy as np
import pytest

from trfpp.data_prep.motion import motion_score
from trfpp.data_prep.procedural import BASE_SHARES, DOMAINS, TRUTH_FILE, WORLDS, film, turntable, write_world
from trfpp.data_prep.video import open_video
from trfpp.data_prep.worlds.canvas import to_frames
from trfpp.data_prep.worlds.irreversible import GRAVITY, RESTITUTION, fall
from trfpp.data_prep.worlds.views import render

WITH_A_THING = ("linear", "loop", "irreversible", "control")


def chroma(pixels):
    return pixels - pixels.mean(-1, keepdims=True)


def likeness(frame, colour):
    """How much of a colour's chroma each pixel has, `[H, W]`: 1 for the colour itself, 0 for greys."""
    pure = chroma(colour)
    return chroma(frame.astype(float)) @ pure / (pure @ pure)


def seen_at(frame, shown, position):
    """Middle of the pixels of the thing's colour near a position."""
    y, x = np.mgrid[: frame.shape[0], : frame.shape[1]] + 0.5
    own = likeness(frame, shown.colour) > 0.7
    own &= np.hypot(x - position[0], y - position[1]) < 2 * shown.radius
    return np.array([x[own].mean(), y[own].mean()])


@pytest.mark.parametrize("world", WORLDS)
def test_a_film_depends_on_its_seed_and_number_alone(world):
    alone = film(world, 3, 4, 3, 32)
    for other in (film(world, 3, 5, 3, 32), film(world, 4, 4, 3, 32)):
        assert not np.array_equal(other.frames, alone.frames)
    np.testing.assert_array_equal(film(world, 3, 4, 3, 32).frames, alone.frames)


def test_worlds_of_one_seed_do_not_share_draws():
    films = [film(world, 0, 0, 2, 32).frames for world in WORLDS]
    assert all(not np.array_equal(one, other) for i, one in enumerate(films) for other in films[:i])


@pytest.mark.parametrize("world", WORLDS)
def test_films_have_the_shape_asked_for_and_a_whole_rate(world):
    kinds = {"linear": {"traveller"}, "views": {"turntable"}, "loop": {"comet"}, "control": {"disc"}}
    for index in range(6):
        shown = film(world, 1, index, num_frames=5, side=48)
        assert shown.frames.shape == (5, 48, 48, 3)
        assert shown.frames.dtype == np.uint8
        assert 6 <= shown.fps <= 24
        assert shown.fps == int(shown.fps)
        assert shown.kind in kinds.get(world, {"traveller", "turntable", "comet", "disc", "ball", "glass", "stem"})
        assert (shown.camera is None) == (shown.kind != "turntable")
        for truth in (shown.positions, shown.camera):
            assert truth is None or len(truth) == 5


def test_an_unknown_world_is_refused_with_those_there_are():
    with pytest.raises(ValueError, match=r"world='moon': choose one of base, linear, views"):
        film("moon", 0, 0)


@pytest.mark.parametrize("world", [*WITH_A_THING, "base"])
def test_the_vivid_thing_is_where_the_truth_says(world):
    followed = 0
    for index in range(8):
        shown = film(world, 2, index)
        if shown.positions is not None:
            errors = [seen_at(frame, shown, at) - at for frame, at in zip(shown.frames, shown.positions)]
            assert np.linalg.norm(errors, axis=1).max() < 2, (world, index)
            assert np.linalg.norm(np.mean(errors, axis=0)) < 1.5
            followed += 1
    assert followed >= 4


@pytest.mark.parametrize("index", range(5))
def test_travellers_go_far_and_nose_first(index):
    shown = film("linear", 0, index)
    steps = np.diff(shown.positions, axis=0)
    np.testing.assert_allclose(steps, np.broadcast_to(steps[0], steps.shape), atol=1e-9)
    travelled = np.linalg.norm(shown.positions[-1] - shown.positions[0])
    assert 0.35 * 64 <= travelled <= 0.6 * 64
    ahead = steps[0] / np.linalg.norm(steps[0])
    y, x = np.mgrid[:64, :64] + 0.5
    for frame, position in zip(shown.frames, shown.positions):
        away = np.stack([x, y], axis=-1) - position
        near = np.linalg.norm(away, axis=-1) < 1.6 * shown.radius
        nose = near & (frame.min(-1) > 190) & (np.abs(chroma(frame.astype(float))).max(-1) < 35)
        assert nose.any()
        assert (away[nose] @ ahead).mean() > 0.6 * shown.radius


@pytest.mark.parametrize("world", ["linear", "loop"])
def test_the_heading_is_where_it_goes(world):
    for index in range(5):
        shown = film(world, 0, index, num_frames=49, side=32)
        steps = np.diff(shown.positions, axis=0)
        going = np.degrees(np.arctan2(steps[:, 1], steps[:, 0]))
        assert shown.headings.shape == (49,)
        off = (shown.headings[:-1] + shown.headings[1:]) / 2 - going
        turned = np.abs(np.diff(shown.headings)) > 180  # where 360 degrees are 0 again
        assert np.abs((off + 180) % 360 - 180)[~turned].max() < 0.01
        assert turned.sum() <= 1


def test_what_has_no_front_has_no_heading():
    assert all(film(world, 0, 0, 2, 16).headings is None for world in ("views", "irreversible", "control"))


@pytest.mark.parametrize("index", range(5))
def test_a_loop_closes_and_its_tail_is_behind(index):
    shown = film("loop", 0, index)
    assert np.abs(shown.frames[0].astype(int) - shown.frames[-1]).max() <= 2
    np.testing.assert_allclose(shown.positions[0], shown.positions[-1], atol=1e-6)
    middle = shown.positions[:-1].mean(0)  # of a whole turn in equal steps
    (x, y), (next_x, next_y) = shown.positions[:2] - middle
    turn = np.sign(x * next_y - y * next_x)
    for frame, position in zip(shown.frames, shown.positions):
        like = likeness(frame, shown.colour)

        def beside(angle, position=position, like=like):
            (x, y), (cos, sin) = position - middle, (np.cos(angle), np.sin(angle))
            column, row = middle + np.array([cos * x - sin * y, sin * x + cos * y])
            return like[int(row), int(column)]

        assert beside(-0.6 * turn) > beside(0.6 * turn) + 0.15


def test_where_a_control_disc_is_does_not_tell_which_way_it_goes():
    """Nor where it ends which way it came: in every quarter of the frame as many go either way round."""
    paths = np.array([film("control", 0, index, 3, 16).positions / 16 for index in range(600)])
    assert paths.min() > 0.08
    assert paths.max() < 0.92
    travelled = np.linalg.norm(np.diff(paths, axis=1), axis=2).sum(1)  # along two chords, which are a little shorter
    assert 0.3 < travelled.min() < travelled.max() < 0.62
    (before, after) = np.moveaxis(np.diff(paths, axis=1), 1, 0)
    clockwise = before[:, 0] * after[:, 1] > before[:, 1] * after[:, 0]
    for bound in (paths[:, 0], paths[:, -1]):
        quarter = 2 * (bound[:, 0] > 0.5) + (bound[:, 1] > 0.5)
        shares = [clockwise[quarter == number].mean() for number in range(4)]
        assert 0.38 < min(shares) < max(shares) < 0.62


def test_the_base_moves_much_less_than_any_domain():
    def median(world):
        return np.median([motion_score(one.frames, one.fps) for one in (film(world, 0, i) for i in range(12))])

    base = median("base")
    assert base > 0
    assert all(median(world) > 3 * base for world in DOMAINS)


def test_the_base_shows_every_scene_and_turns_either_way():
    shown = [film("base", 0, index, 2, 16) for index in range(60)]
    assert sum(BASE_SHARES.values()) == pytest.approx(1)
    assert {one.kind for one in shown} == {"traveller", "turntable", "comet", "disc", "ball", "glass", "stem"}
    sweeps = [one.camera[-1, 0] - one.camera[0, 0] for one in shown if one.camera is not None]
    assert min(sweeps) < 0 < max(sweeps)
    assert max(map(abs, sweeps)) <= 14
    rises = [one.positions[-1, 1] - one.positions[0, 1] for one in shown if one.kind in ("ball", "glass", "stem")]
    assert min(rises) < 0 < max(rises)


def test_views_orbit_one_way_and_far():
    for index in range(8):
        camera = film("views", 0, index, 4, 16).camera
        steps = np.diff(camera[:, 0])
        assert (steps > 0).all()
        assert 45 <= steps.sum() <= 90
        assert np.ptp(camera[:, 1:], axis=0).max() == 0


@pytest.mark.parametrize("world", ["views", "base"])
def test_rendering_the_scene_from_the_true_camera_gives_the_frame(world):
    index = next(index for index in range(30) if film(world, 5, index, 2, 16).camera is not None)
    shown = film(world, 5, index, 4, 48)
    scene = turntable(world, 5, index)
    for frame, pose in zip(shown.frames, shown.camera):
        np.testing.assert_array_equal(to_frames([render(scene, pose, 48)])[0], frame)
    assert np.abs(shown.frames[0].astype(int) - shown.frames[-1]).max() > 20  # the camera matters


def test_a_ball_falls_freely_and_loses_energy_at_bounces_only():
    step = 1e-3
    height = fall(0.5, np.arange(0, 2.5, step))
    first = np.sqrt(2 * 0.5 / GRAVITY)
    times = np.arange(0, first, step)
    np.testing.assert_allclose(height[: len(times)], 0.5 - GRAVITY * times**2 / 2, atol=1e-12)
    assert height.min() >= 0
    speed = (height[2:] - height[:-2]) / (2 * step)
    flying = np.abs(height[2:] - 2 * height[1:-1] + height[:-2] + GRAVITY * step**2) < 1e-9
    assert flying.mean() > 0.98  # all but the instants of bounces
    energy = (speed**2 / 2 + GRAVITY * height[1:-1])[flying]
    assert np.diff(energy).max() < 1e-9
    levels = np.unique(energy.round(6))[::-1]
    np.testing.assert_allclose(levels[1:4] / levels[:3], RESTITUTION**2, rtol=1e-3)


def test_what_is_irreversible_goes_one_way():
    kinds = set()
    for index in range(20):
        shown = film("irreversible", 0, index, 6, 16)
        kinds.add(shown.kind)
        down = np.diff(shown.positions[:, 1])
        assert (down < 0).all() if shown.kind != "ball" else down[0] > 0
    assert kinds == {"ball", "glass", "stem"}


@pytest.mark.parametrize("world", ["irreversible", "views", "linear"])
def test_written_films_and_their_truth_agree(tmp_path, world):
    truth = write_world(tmp_path / "films", world, count=2, seed=5, num_frames=6, side=48, first=3)
    assert truth == tmp_path / "films" / TRUTH_FILE
    lines = [json.loads(line) for line in truth.read_text().splitlines()]
    assert sorted(path.name for path in truth.parent.glob("*.mp4")) == [line["video"] for line in lines]
    for index, line in enumerate(lines, start=3):
        shown, video = film(world, 5, index, 6, 48), open_video(truth.parent / line["video"], 1)
        assert line["video"] == f"{world}-{index:05d}.mp4"
        assert {key: line[key] for key in ("world", "seed", "index", "side", "fps", "kind")} == {
            "world": world, "seed": 5, "index": index, "side": 48, "fps": shown.fps, "kind": shown.kind
        }  # fmt: skip
        np.testing.assert_allclose(video.timestamps, np.arange(6) / shown.fps, atol=1e-3)
        read = video.read(range(6))
        assert np.abs(read.astype(int) - shown.frames).mean() < 3
        if world == "views":
            np.testing.assert_allclose(line["camera"], shown.camera, atol=1e-3)
            assert "positions" not in line
            assert "headings" not in line
        else:
            np.testing.assert_allclose(line["positions"], shown.positions, atol=1e-3)
            np.testing.assert_allclose(line["colour"], shown.colour, atol=1e-3)
            assert ("headings" in line) == (world == "linear")
            np.testing.assert_allclose(
                line.get("headings", []), [] if shown.headings is None else shown.headings, atol=1e-3
            )
            for frame, at in zip(read, np.array(line["positions"])):
                assert np.linalg.norm(seen_at(frame, shown, at) - at) < 2.5


def test_writing_replaces_the_folder_whole_or_not_at_all(tmp_path):
    write_world(tmp_path / "films", "control", count=2, seed=0, num_frames=2, side=16)
    write_world(tmp_path / "films", "linear", count=1, seed=0, num_frames=2, side=16)
    whole = sorted(path.name for path in (tmp_path / "films").iterdir())
    assert whole == ["linear-00000.mp4", TRUTH_FILE]
    with pytest.raises(ValueError, match="moon"):
        write_world(tmp_path / "films", "moon", count=1, seed=0)
    assert sorted(path.name for path in (tmp_path / "films").iterdir()) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["films"]
