"""How each kind of run is done, by the functions behind the commands, and how to see that it was done."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from ..configs.load import read_yaml
from ..configs.schema import CacheConfig, EvaluateConfig, PrepConfig, WorldsConfig
from ..configs.training import TrainConfig
from ..data_prep.bounds import MANIFEST_FILE, PAIRS_FOLDER, held_out_pairs
from ..data_prep.dataset import REPORT_FILE, prepare
from ..data_prep.latents import CacheKey, build_cache, find_cache, finish_cache
from ..data_prep.procedural import holds_films, write_world
from ..infer.evaluate import evaluate, table
from ..infer.evaluation import SUMMARY_FILE
from ..infer.record import patch_sha256
from ..train.full import MODEL_FOLDER, fine_tune
from ..train.loop import Stopped, is_finished, train
from ..train.stage import StageStopped
from ..trf.device import best_device
from ..trf.settings import OF_SAMPLER, as_recorded, resolve
from .digest import deciding
from .log import add_line, outdated
from .plan import Kind, Run
from .told import Told, told_lines, write_told

Made = WorldsConfig | PrepConfig | TrainConfig | EvaluateConfig
"""Settings that are kept in the output."""


def attempt(output: Path, run: Run) -> str | None:
    """Do a run and write down how it went; gives the reason if it failed.

    Raises:
        KeyboardInterrupt: after Ctrl-C or SIGTERM.
    """
    began, became = time.perf_counter(), {}
    try:
        perform(output, run)
        became = {"digest": run.digest}
    except (Stopped, StageStopped) as stopped:  # asked to stop, with a checkpoint saved
        raise KeyboardInterrupt(stopped.number) from None
    except Exception as failure:  # of whatever kind: a night's other runs are not to wait for it
        became = {"error": str(failure) if isinstance(failure, ValueError) else f"{type(failure).__name__}: {failure}"}
    finally:
        add_line(output, run, time.perf_counter() - began, **became)
    return became.get("error")


def perform(output: Path, run: Run) -> None:
    """Do a run of the study in a folder; what an interrupted one has left is used.

    Raises:
        ValueError: if what is there cannot be gone on with.
    """
    if outdated(output, [run]) and _is_there(run):  # the command itself would find nothing to do
        raise ValueError(
            f"output={str(output)!r}: {run.name} there rests on other settings; move it away, or choose another output."
        )
    _WORK[run.kind](run.settings)


def done_in(output: Path, runs: Collection[Run]) -> set[str]:
    """Names of the runs whose output is there, whole, and made with the settings of now, as was what it rests on."""
    others = outdated(output, runs)
    return {run.name for run in runs if run.name not in others and _is_there(run)}


def _is_there(run: Run) -> bool:
    """Whether a run's output is there, whole, and made with its settings, whatever it was made of."""
    return _IS_THERE[run.kind](run.settings)


def _films(settings: WorldsConfig) -> None:
    if settings.output.exists() and any(settings.output.iterdir()):
        raise ValueError(f"output={str(settings.output)!r}: other films, or something else, are there; move it away.")
    write_world(settings.output, **settings.films)
    _keep(settings, "worlds")


def _films_are_there(settings: WorldsConfig) -> bool:
    return holds_films(settings.output, **settings.films)


def _clips(settings: PrepConfig) -> None:
    report = prepare(**settings.model_dump(exclude={"dry_run"}))
    print(report.summary())
    if report.skipped:
        raise ValueError(f"{len(report.skipped)} films could not be used; see {settings.output / REPORT_FILE}.")
    held_out_pairs(settings.output)
    _keep(settings, "prep")


def _clips_are_there(settings: PrepConfig) -> bool:
    manifest = settings.output / PAIRS_FOLDER / MANIFEST_FILE
    return _kept(settings, "prep") and (not settings.holdout or manifest.is_file())


def _cache(settings: CacheConfig) -> None:
    key = CacheKey(model=settings.model)
    build_cache(settings.data, key, device=best_device(settings.device), chunk=settings.chunk)
    finish_cache(settings.data, key)


def _cache_is_there(settings: CacheConfig) -> bool:
    return find_cache(settings.data, settings.model) is not None


def _told_is_there(told: Told) -> bool:
    files = (told.manifest, told.output)
    return all(file.is_file() for file in files) and told.output.read_text(encoding="utf-8") == told_lines(told)


def _patch_is_there(settings: TrainConfig) -> bool:
    return _kept(settings, "train") and is_finished(settings.output / "patch", settings.steps)


def _full(settings: TrainConfig) -> None:
    fine_tune(settings)
    _keep(settings, "train")


def _full_is_there(settings: TrainConfig) -> bool:
    return _kept(settings, "train") and (settings.output / MODEL_FOLDER).is_dir()


def _evaluate(settings: EvaluateConfig) -> None:
    print(table(evaluate(settings)))
    _keep(settings, "evaluate")


def _evaluation_is_there(settings: EvaluateConfig) -> bool:
    summary = settings.output / SUMMARY_FILE
    if not summary.is_file() or not _kept(settings, "evaluate"):
        return False
    said = json.loads(summary.read_text(encoding="utf-8"))
    if not (settings.baseline or settings.reconstruct) and not _sampled_as_now(settings, said["settings"]):
        return False
    try:
        digests = [patch_sha256(patch) for patch in settings.patches]
    except FileNotFoundError:  # patches may be deleted
        digests = said["settings"]["patches_sha256"]
    # A patch may also have been trained anew.
    return bool(said["pairs"] == settings.pairs) and digests == said["settings"].get("patches_sha256", [])


def _sampled_as_now(settings: EvaluateConfig, recorded: Mapping[str, Any]) -> bool:
    """Whether a sampler's own defaults are still those that an evaluation was made with."""
    now = as_recorded(resolve(settings.sampler.model_dump(exclude_none=True), {}, {})[0])
    then = as_recorded() | {name.removeprefix("sampler."): value for name, value in recorded.items()}
    return all(now[name] == then[name] for name in OF_SAMPLER)


def _keep(settings: Made, command: str) -> None:
    settings.save(settings.output / f"{command}.yaml", command)


def _kept(settings: Made, command: str) -> bool:
    """Whether an output was made with its settings, wherever the study's folder lay then."""
    file = settings.output / f"{command}.yaml"
    if not file.is_file():
        return False
    try:  # as settings, so that one which is new since then has its default
        then = type(settings).model_validate_json(json.dumps(read_yaml(file)))
    except ValidationError:
        return False
    # Names of these runs have two parts.
    made, now = (deciding(one, one.output.resolve().parent.parent) for one in (then, settings))
    return made == now


_WORK: dict[Kind, Callable[[Any], object]] = {
    "films": _films,
    "clips": _clips,
    "cache": _cache,
    "told": write_told,
    "train": train,
    "full": _full,
    "evaluate": _evaluate,
}
_IS_THERE: dict[Kind, Callable[[Any], bool]] = {
    "films": _films_are_there,
    "clips": _clips_are_there,
    "cache": _cache_is_there,
    "told": _told_is_there,
    "train": _patch_is_there,
    "full": _full_is_there,
    "evaluate": _evaluation_is_there,
}
