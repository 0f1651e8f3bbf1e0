"""What every command does with its settings; the work itself is in the folders."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from .configs import pretraining, schema, studying
from .configs.entry import run as run_work


def run(command: str, argv: Sequence[str]) -> int:
    """Run one command; returns the exit status."""
    if command == "train":
        from .train.__main__ import main

        return main(argv)
    settings, work = _COMMANDS[command]
    return run_work(command, settings, work, argv)


def keep_settings(settings: schema.Settings, folder: Path, command: str) -> None:
    """Write the resolved settings into an output's folder, loadable as a CONFIG again."""
    folder.mkdir(parents=True, exist_ok=True)
    settings.save(folder / f"{command}.yaml", command)


def _prep(config: schema.PrepConfig) -> None:
    from .data_prep.bounds import held_out_pairs
    from .data_prep.dataset import prepare
    from .data_prep.plan import plan

    if config.dry_run:
        print(plan(**config.model_dump(exclude={"dry_run", "output", "overwrite"})))
        return
    report = prepare(**config.model_dump(exclude={"dry_run"}))
    print(report.summary())
    keep_settings(config, config.output, "prep")
    if pairs := held_out_pairs(config.output):
        print(f"held-out pairs with their truth: {pairs}")


def _cache(config: schema.CacheConfig) -> None:
    from .data_prep.latents import CacheKey, build_cache, finish_cache
    from .trf.base import hide_loading_bars
    from .trf.device import best_device

    hide_loading_bars()
    names = ("model", "revision", "variant", "augmentations", "noise_aug_mean", "noise_aug_std", "precision", "seed")
    key = CacheKey(**{name: getattr(config, name) for name in names})
    folder = build_cache(
        config.data,
        key,
        device=best_device(config.device),
        chunk=config.chunk,
        overwrite=config.overwrite,
    )
    finish_cache(config.data, key)
    keep_settings(config, folder, "cache")
    print(f"cached in {folder}")


def _infer(config: schema.InferConfig) -> None:
    from .infer.generate import generate, plan
    from .trf.base import hide_loading_bars

    hide_loading_bars()
    if config.dry_run:
        print(plan(config))
        return

    def results() -> set[tuple[Path, int]]:
        return {(path, path.stat().st_mtime_ns) for path in config.output.glob("*/generation.json")}

    before = results()
    try:
        generate(config)
    finally:  # settings with which nothing was made are not kept
        if results() - before:
            keep_settings(config, config.output, "infer")


def _film(config: schema.FilmConfig) -> None:
    from .infer.film import film, plan
    from .trf.base import hide_loading_bars

    hide_loading_bars()
    if config.dry_run:
        print(plan(config))
    elif film(config):
        keep_settings(config, config.output, "film")


def _export(config: schema.ExportConfig) -> None:
    from .infer.export import export

    made = export(config)
    config.save(made.with_name(f"{made.name}.export.yaml"), "export")
    print(f"exported and checked: {made}")


def _pretrain(config: pretraining.PretrainConfig) -> int:
    from .train.pretrain import pretrain
    from .train.stage import StageStopped
    from .trf.base import hide_loading_bars

    hide_loading_bars()
    try:
        model = pretrain(config)
    except StageStopped as stopped:
        keep_settings(config, config.output, "pretrain")
        print(
            "trfpp pretrain: stopped, and a checkpoint written; run the same command again to go on.", file=sys.stderr
        )
        return 128 + stopped.number
    keep_settings(config, config.output, "pretrain")
    print(f"model: {model}; use it as model={model}")
    return 0


def _study(config: studying.StudyConfig) -> None:
    from .study.runs import listing, study
    from .trf.base import hide_loading_bars

    hide_loading_bars()
    if config.dry_run:
        print(listing(config))
        return
    study(config)


def _worlds(config: schema.WorldsConfig) -> None:
    from .data_prep.procedural import TRUTH_FILE, write_world

    there = config.output.exists() and any(config.output.iterdir())
    if there and not (config.overwrite and (config.output / TRUTH_FILE).is_file()):
        hint = "films are there; replace them with overwrite=true" if (config.output / TRUTH_FILE).is_file() else ""
        raise ValueError(f"output={str(config.output)!r}: {hint or 'something else is there; choose another folder'}.")
    truth = write_world(config.output, **config.films)
    keep_settings(config, config.output, "worlds")
    shape = f"num_frames={config.num_frames} height={config.size} width={config.size}"
    print(f"{config.count} films, where everything is in them: {truth}")
    print(f"to train on them:    trfpp prep worlds source={config.output} output=... {shape}")
    print(f"to evaluate on them: trfpp prep worlds source={config.output} output=... {shape} holdout=1")


def _evaluate(config: schema.EvaluateConfig) -> None:
    from .infer.evaluate import evaluate, table
    from .trf.base import hide_loading_bars

    hide_loading_bars()
    print(table(evaluate(config)))
    keep_settings(config, config.output, "evaluate")


def _compare(config: schema.CompareConfig) -> None:
    from .infer.compare import compare

    print(compare(config.a, config.b, config.contrast, config.seed))


def _quickstart(config: schema.QuickstartConfig) -> None:
    from .quickstart import quickstart
    from .trf.base import hide_loading_bars

    hide_loading_bars()
    keep_settings(config, config.output, "quickstart")
    quickstart(config)


_COMMANDS: dict[str, tuple[type[schema.Settings], Callable[[Any], int | None]]] = {
    "quickstart": (schema.QuickstartConfig, _quickstart),
    "prep": (schema.PrepConfig, _prep),
    "cache": (schema.CacheConfig, _cache),
    "infer": (schema.InferConfig, _infer),
    "film": (schema.FilmConfig, _film),
    "evaluate": (schema.EvaluateConfig, _evaluate),
    "compare": (schema.CompareConfig, _compare),
    "export": (schema.ExportConfig, _export),
    "worlds": (schema.WorldsConfig, _worlds),
    "pretrain": (pretraining.PretrainConfig, _pretrain),
    "study": (studying.StudyConfig, _study),
}
