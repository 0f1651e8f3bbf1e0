"""Procedural worlds: seeded, endless films with ground truth, to try the whole chain on without any footage.

Film `i` of a world depends on the seed and on `i` alone. The worlds:

    base          all scenes below, moving little and slowly, with no preferred direction: what the miniature learnt
    linear        things that travel far along their front
    views         a camera that orbits solids on a turntable by 45 to 90 degrees, always the same way round
    loop          comets that go round once, head first: the last frame is the first
    irreversible  balls that fall and bounce, glasses that fill, stems that grow
    control       discs that go far round a pole, either way, which nothing shows
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from ..trf.replace import replacing
from .worlds.control import control
from .worlds.film import Film, Pace
from .worlds.irreversible import irreversible
from .worlds.linear import linear
from .worlds.loop import loop
from .worlds.views import Scene as TurntableScene
from .worlds.views import draw_scene, views

Scene = Callable[[np.random.Generator, int, int, Pace], Film]

DOMAINS: Mapping[str, Scene] = {
    "linear": linear,
    "views": views,
    "loop": loop,
    "irreversible": irreversible,
    "control": control,
}
"""What one world shows; each is called with a generator, frames, pixels of the side, and the pace."""
WORLDS = ("base", *DOMAINS)
BASE_SHARES = {"linear": 0.22, "views": 0.32, "loop": 0.18, "irreversible": 0.18, "control": 0.10}
"""How often each scene is seen in the base world."""
TRUTH_FILE = "truth.jsonl"


def film(world: str, seed: int, index: int, num_frames: int = 12, side: int = 64) -> Film:
    """Film number `index` of a world.

    Args:
        world: one of `WORLDS`.
        seed: of the whole world.
        index: which film.
        num_frames: frames.
        side: pixels of the frame's side.

    Raises:
        ValueError: for a world that does not exist.
    """
    if world not in WORLDS:
        raise ValueError(f"world={world!r}: choose one of {', '.join(WORLDS)}.")
    scene, generator = _drawn(world, seed, index)
    return DOMAINS[scene](generator, num_frames, side, "gentle" if world == "base" else "full")


def turntable(world: str, seed: int, index: int) -> TurntableScene:
    """What stands on the turntable in film number `index` of a world, a film of that kind."""
    return draw_scene(_drawn(world, seed, index)[1])


def _drawn(world: str, seed: int, index: int) -> tuple[str, np.random.Generator]:
    """The scene of a film, one of `DOMAINS`, and the generator it is drawn from."""
    generator = np.random.default_rng([seed, zlib.crc32(world.encode()), index])
    if world != "base":
        return world, generator
    return str(generator.choice(list(BASE_SHARES), p=list(BASE_SHARES.values()))), generator


def write_world(
    folder: Path, world: str, *, count: int, seed: int, num_frames: int = 12, side: int = 64, first: int = 0
) -> Path:
    """Write films as `<world>-00000.mp4`, …, and their ground truth as `truth.jsonl`, whole or not at all.

    Args:
        folder: to write; one already there is replaced at the end.
        world: one of `WORLDS`.
        count: number of films.
        seed: of the whole world.
        num_frames: frames of a film.
        side: pixels of the frame's side.
        first: number of the first film.

    Returns:
        The file of the ground truth: one JSON line a film, with `video`, `world`, `seed`, `index`,
        `side`, `fps`, `kind` and, where it applies,
        `positions` (x and y in pixels, of every frame), `headings` (of what has a front, degrees from right to down),
        `colour`, `radius` and `camera` (azimuth, elevation, distance).
    """
    from .writing import write_video  # here, so that films are rendered where no video library is

    with replacing(folder) as beside:
        beside.mkdir(parents=True)
        with (beside / TRUTH_FILE).open("w", encoding="utf-8") as truth:
            for index in range(first, first + count):
                shown, name = film(world, seed, index, num_frames, side), f"{world}-{index:05d}.mp4"
                write_video(beside / name, shown.frames, shown.fps, crf=8)
                which = {"video": name, "world": world, "seed": seed, "index": index, "side": side}
                truth.write(json.dumps(which | _plain(shown)))
                truth.write("\n")
    return folder / TRUTH_FILE


def holds_films(
    folder: Path, world: str, *, count: int, seed: int, num_frames: int = 12, side: int = 64, first: int = 0
) -> bool:
    """Whether a folder holds these films and no others, by its ground truth; arguments as of `write_world`."""
    file = folder / TRUTH_FILE
    if not file.is_file():
        return False
    films = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    return [film["index"] for film in films] == list(range(first, first + count)) and all(
        (film["world"], film["seed"], film["side"]) == (world, seed, side)
        and len(film.get("positions") or film["camera"]) == num_frames
        for film in films
    )


def _plain(shown: Film) -> dict[str, object]:
    values: dict[str, object] = {"fps": shown.fps, "kind": shown.kind, "radius": round(shown.radius, 3)}
    for name in ("positions", "headings", "colour", "camera"):
        array = getattr(shown, name)
        if array is not None:
            values[name] = np.round(array, 3).tolist()
    return values
