"""An evaluation's folder: what it was made with, and its metrics, a line a pair."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..trf.base import resolved_revision
from ..trf.replace import remove, replacing
from ..trf.settings import as_recorded
from ..trf.sole import LOCK_FILE
from .cases import Case, manifest_of
from .pair_settings import PAIR_SETTINGS
from .record import device_of, optional, patch_sha256, patches_of, precision_of, sha256

if TYPE_CHECKING:
    from ..configs.schema import EvaluateConfig

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
RECIPE_FILE = "recipe.json"
SHEET_FILE = "sheet.png"
VIDEOS_FOLDER = "videos"

Row = dict[str, Any]
"""A line of `metrics.jsonl`: the pair's `id`, its metrics and what else there is to it, see `OTHERS`."""
OTHERS = ("id", "film", "footage_sha256", "seconds", "unet_calls", "made_with")
"""In a row beside the metrics: `film` is what the pair was cut from, `footage_sha256` tells its frames from others."""


def recipe_of(config: EvaluateConfig, cases: Sequence[Case]) -> dict[str, Any]:
    """What decides the numbers, flat: settings, and digests of the files they name."""
    maker: dict[str, Any] = {"baseline": config.baseline}
    if not config.baseline:
        local = Path(config.model).expanduser().is_dir()
        maker = {
            "model": str(Path(config.model).expanduser().resolve()) if local else config.model,
            "revision": resolved_revision(config.model, config.revision),
            "variant": config.variant,
            "reconstruct": config.reconstruct,
            "patches": [str(folder.resolve()) for folder, _ in patches_of(config)],
            "patches_sha256": [patch_sha256(folder) for folder, _ in patches_of(config)],
            "scales": [scale for _, scale in patches_of(config)],
            "precision": precision_of(config),
            "device": device_of(config).type,
            "low_memory": config.low_memory,
            "decode_chunk_size": config.decode_chunk_size,
            **optional(config),
            "seed": config.seed,
        }
    # Where fps, motion, frames and size are each pair's own, those of the first stand for all: rows have each pair's.
    sampler = {f"sampler.{name}": value for name, value in as_recorded(cases[0].settings).items()}
    manifest = manifest_of(config)
    data = {"manifest": str(manifest.resolve()), "manifest_sha256": sha256(manifest), "loop": config.loop}
    truth = {"truth_sha256": sha256(config.truth)} if config.truth else {}
    recipe: dict[str, Any] = {**maker, **sampler, "fit": config.fit, **data, **truth}
    recipe = json.loads(json.dumps(recipe))  # as it will be read back
    return recipe


def differing(recipe: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Names of what two evaluations were made with differently."""
    return sorted(key for key in {*recipe, *other} if recipe.get(key) != other.get(key))


def read_recipe(folder: Path) -> dict[str, Any]:
    """What an evaluation was made with; sampler settings that were added since then have their defaults."""
    recipe: dict[str, Any] = json.loads((folder / RECIPE_FILE).read_text(encoding="utf-8"))
    return {f"sampler.{name}": value for name, value in as_recorded().items()} | recipe


def read_rows(folder: Path) -> dict[str, Row]:
    """The lines of an evaluation's `metrics.jsonl`, by pair; none if there is no such file."""
    file = folder / METRICS_FILE
    lines = file.read_text(encoding="utf-8").splitlines() if file.is_file() else []
    return {row["id"]: row for row in map(json.loads, lines)}


def write_rows(folder: Path, rows: Iterable[Row]) -> None:
    """Write `metrics.jsonl`, whole."""
    with replacing(folder / METRICS_FILE) as beside:
        beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def metrics_of(row: Row) -> dict[str, float]:
    """The metrics in a line of `metrics.jsonl`, without what else it holds."""
    return {name: value for name, value in row.items() if name not in OTHERS}


def films_of_rows(rows: Iterable[Row]) -> list[str]:
    """What each row's pair was cut from; a pair of which that is not known stands by itself."""
    return [row.get("film") or f"pair {row['id']}" for row in rows]


def made_with(case: Case) -> dict[str, Any]:
    """What a pair's video is made with that may be its own."""
    return {**{name: getattr(case.settings, name) for name in PAIR_SETTINGS}, "seed": case.seed}


def resume(config: EvaluateConfig, recipe: dict[str, Any], cases: Sequence[Case]) -> dict[str, Row]:
    """The rows that are there already, by pair, and are to be kept.

    Raises:
        ValueError: if something else is there, or an evaluation with other settings that is not to be replaced.
    """
    output, file = config.output, config.output / RECIPE_FILE
    if not file.is_file() and output.exists() and any(other.name != LOCK_FILE for other in output.iterdir()):
        raise ValueError(f"output={str(output)!r}: something else than an evaluation is there; choose another folder.")
    rows = {} if config.overwrite else read_rows(output)
    own = {case.pair.id: made_with(case) for case in cases}
    of_pairs = [differing(own[name], row["made_with"]) for name, row in rows.items() if name in own]
    changed = differing(recipe, read_recipe(output)) if rows else []
    if changed := changed or sorted({name for names in of_pairs for name in names}):
        raise ValueError(
            f"output={str(output)!r} was measured with another {', '.join(changed)}; "
            "choose another folder, or overwrite=true."
        )
    return rows


def begin(folder: Path, recipe: dict[str, Any]) -> None:
    """Make the folder one for this recipe; what an earlier evaluation left there goes."""
    for name in (METRICS_FILE, SUMMARY_FILE, SHEET_FILE, VIDEOS_FOLDER):
        remove(folder / name)
    with replacing(folder / RECIPE_FILE) as beside:
        beside.write_text(json.dumps(recipe, indent=2) + "\n", encoding="utf-8")
