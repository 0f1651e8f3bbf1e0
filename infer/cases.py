"""What is evaluated: pairs with their settings and seeds, their images, and the procedural films they come from."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from ..data_prep.bounds import MANIFEST_FILE, PAIRS_FOLDER, Pair, read_manifest
from ..data_prep.frames import FitMode, fit_image, load_image
from ..data_prep.video import ImageSequence
from ..trf.seeds import derived_seed
from ..trf.settings import SamplerSettings, resolve
from .measures import FilmTruth, read_truth
from .models import outline_of
from .pair_settings import PAIR_SETTINGS, settings_of

if TYPE_CHECKING:
    from ..configs.schema import EvaluateConfig


@dataclass(frozen=True, kw_only=True)
class Case:
    """One pair with everything decided."""

    pair: Pair
    settings: SamplerSettings
    seed: int
    """Of the pair's draws."""


class Footage(NamedTuple):
    """The images of a case, at its size."""

    start: np.ndarray
    """`[H, W, 3]` uint8; so is `end`."""
    end: np.ndarray
    truth: np.ndarray
    """`[F, H, W, 3]` uint8."""


def manifest_of(config: EvaluateConfig) -> Path:
    """The manifest that is meant: `data` itself, or that of a dataset's held-out pairs.

    Raises:
        ValueError: if a dataset has none, or nothing is there.
    """
    if not config.data.exists():
        raise ValueError(f"data={str(config.data)!r}: no such dataset or manifest.")
    if not config.data.is_dir():
        return config.data
    manifest = config.data / PAIRS_FOLDER / MANIFEST_FILE
    if not manifest.is_file():
        raise ValueError(
            f"data={str(config.data)!r}: holds no held-out pairs ({PAIRS_FOLDER}/{MANIFEST_FILE}); give a dataset that "
            f"trfpp prep made with a holdout."
        )
    return manifest


def cases_of(config: EvaluateConfig) -> list[Case]:
    """The pairs to measure, each with its settings and its seed.

    Sampler settings are decided as in generation; a baseline takes the size of the truth where nothing is said.

    Raises:
        FileNotFoundError: if a patch folder is no patch.
        ValueError: if a pair has no truth or one of another length, a patch does not fit, or a setting cannot work.
    """
    manifest = manifest_of(config)
    pipe = None if config.baseline else outline_of(config)
    told = {name: value for name, value in config.sampler.model_dump().items() if value is not None}
    # Of images that cannot be read nothing is measured; that they cannot be is told when it is their turn.
    given = config.sampler.model_copy(update=dict.fromkeys(config.sampler.measured))
    unmeasured = config.model_copy(update={"sampler": given})
    cases = []
    for pair in read_manifest(manifest)[: config.pairs]:
        if pair.truth is None:
            raise ValueError(f"{manifest}: pair {pair.id} has no truth to measure against.")
        truth = _true_frames(pair)
        if pipe is None:
            native = _size(truth[0]) | {"num_frames": len(truth)}
            own = {name: getattr(pair, name) for name in PAIR_SETTINGS if getattr(pair, name) is not None}
            settings, _ = resolve({**own, **told}, {}, native)
        else:
            # Of a loop the last frame is not shown, so nothing may be measured of it.
            seen = replace(pair, end=pair.start) if config.loop else pair
            blind = config.sampler.measured and not _can_be_seen(seen)
            settings, _ = settings_of(unmeasured if blind else config, pipe, seen)
            pipe.latent_shape(settings, 1)  # refuses sizes that the VAE cannot make
            pipe.check_directions(settings, low_memory=config.low_memory)
        if settings.num_frames != len(truth):
            raise ValueError(
                f"pair {pair.id}: {settings.num_frames} frames would be made, but its truth has {len(truth)}; "
                f"give sampler.num_frames={len(truth)}, or other pairs."
            )
        seed = derived_seed(config.seed, pair.id) if pair.seed is None else pair.seed
        cases.append(Case(pair=pair, settings=settings, seed=seed))
    return cases


def _can_be_seen(pair: Pair) -> bool:
    try:
        for image in (pair.start, pair.end):
            load_image(image)
    except ValueError:
        return False
    return True


def _size(image: Path) -> dict[str, int]:
    """Height and width of an image that can be read."""
    try:
        loaded = load_image(image)
    except ValueError:
        return {}
    return {"height": loaded.height, "width": loaded.width}


def films_of(config: EvaluateConfig, cases: Sequence[Case]) -> dict[str, FilmTruth]:
    """The procedural film of each pair, by the pair's id, if its ground truth is asked for.

    Raises:
        ValueError: if the ground truth cannot be read, or does not hold a pair's film in all its frames.
    """
    if config.truth is None:
        return {}
    truth, films = read_truth(config.truth), {}
    for case in cases:
        pair, film = case.pair, truth.get(Path(case.pair.video or "").name)
        if film is None:
            raise ValueError(f"pair {pair.id}: its video {pair.video!r} is not in truth={str(config.truth)!r}.")
        if film.num_frames != case.settings.num_frames:
            raise ValueError(
                f"pair {pair.id} has {case.settings.num_frames} frames and its film {film.num_frames}: cut films whole."
            )
        if case.settings.height != case.settings.width:
            size = f"{case.settings.width}x{case.settings.height}"
            raise ValueError(f"pair {pair.id}: a video of {size} has not the square frame of its film.")
        films[pair.id] = film
    return films


def batches(cases: Sequence[Case], size: int) -> Iterator[list[Case]]:
    """Cases of one shape, so many at a time; the shape of the first case comes first."""
    groups: dict[tuple[int, int, int], list[Case]] = {}
    for case in cases:
        made = case.settings
        groups.setdefault((made.num_frames, made.height, made.width), []).append(case)
    for alike in groups.values():
        yield from (alike[first : first + size] for first in range(0, len(alike), size))


def footage_of(case: Case, fit: FitMode, *, loop: bool) -> Footage:
    """The images of a case; the first bound is the last one too if a loop is asked for.

    Raises:
        ValueError: for an image that cannot be read.
    """

    def load(path: Path) -> np.ndarray:
        return np.asarray(fit_image(load_image(path), case.settings.height, case.settings.width, fit))

    start = load(case.pair.start)
    end = start if loop else load(case.pair.end)
    return Footage(start, end, np.stack([load(path) for path in _true_frames(case.pair)]))


def _true_frames(pair: Pair) -> list[Path]:
    assert pair.truth is not None
    files = ImageSequence(pair.truth, 1.0).files if pair.truth.is_dir() else []
    if len(files) < 3:
        raise ValueError(f"pair {pair.id}: {pair.truth} is no folder of at least 3 frames.")
    return files
