"""TRF, or a baseline, measured on held-out pairs whose truth is known.

metrics.jsonl    a line a pair: its metrics, and what it was made with
summary.json     mean and 95 % interval of each metric, the settings, seconds, machine, versions
sheet.png        the first pairs, truth beside what was made
recipe.json      what decides the numbers; an evaluation goes on only with the same
videos/<id>.mp4  what was made, with `save_videos`
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from tqdm.auto import tqdm

from ..data_prep.writing import write_video
from ..trf.device import forget_peak_memory, peak_memory
from ..trf.replace import replacing
from ..trf.sole import sole
from .cases import Case, Footage, batches, cases_of, films_of, footage_of
from .evaluation import (
    SHEET_FILE,
    SUMMARY_FILE,
    VIDEOS_FOLDER,
    Row,
    begin,
    films_of_rows,
    made_with,
    metrics_of,
    recipe_of,
    resume,
    write_rows,
)
from .makers import Made, maker_of
from .measures import FilmTruth, measure, measure_film
from .record import device_of, on_its_model, versions
from .sheets import contact_sheet
from .statistics import mean_interval

if TYPE_CHECKING:
    from ..configs.schema import EvaluateConfig

SHEET_PAIRS, SHEET_ROWS = 4, 6
"""Pairs of the contact sheet, and frames of each."""


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Make and measure every pair that is not measured yet, and sum up.

    Draws depend on the seed and the pair's id alone, so neither the batches nor an interruption change them. A pair
    whose files cannot be read, or whose video is not finite, does not keep the rest from going on.

    Returns:
        The summary, as it is written.

    Raises:
        FileNotFoundError: if a patch folder is no patch.
        ValueError: if a pair has no truth, a patch does not fit, a setting cannot work, or the output was measured with
            other settings or another process is at it; at the end, if some pairs could not be measured, with their
            reasons.
    """
    with sole(config.output):
        return _evaluate(config if config.baseline else on_its_model(config, config.patches))


def _evaluate(config: EvaluateConfig) -> dict[str, Any]:
    cases = cases_of(config)
    films = films_of(config, cases)
    recipe = recipe_of(config, cases)
    rows = resume(config, recipe, cases)
    todo = [case for case in cases if case.pair.id not in rows]
    forget_peak_memory(device_of(config))
    maker = maker_of(config) if todo else None
    if not rows:
        begin(config.output, recipe)
    # What was made before an interruption is not kept: the sheet is of this go, if that has more to show.
    whole = (config.output / SHEET_FILE).is_file() and len(rows) >= min(SHEET_PAIRS, len(todo))
    sheet: list[tuple[np.ndarray, np.ndarray]] = []
    failures: dict[str, str] = {}

    bar = tqdm(total=len(cases), initial=len(cases) - len(todo), desc="pairs", unit="pair", disable=None)
    for batch in batches(todo, config.batch):
        assert maker is not None
        began = time.perf_counter()
        footage = _readable(config, batch, failures)
        able = [case for case in batch if case.pair.id in footage]
        made = maker(able, list(footage.values())) if able else []
        seconds = (time.perf_counter() - began) / len(batch)
        for case, images, one in zip(able, footage.values(), made):
            if not np.isfinite(one.frames).all():
                failures[case.pair.id] = "its video holds values that are not finite; try another precision"
                continue
            rows[case.pair.id] = _row(case, images, one, films.get(case.pair.id), seconds)
            if config.save_videos:
                write_video(config.output / VIDEOS_FOLDER / f"{case.pair.id}.mp4", one.frames, case.settings.fps)
            if len(sheet) < SHEET_PAIRS and not whole:
                sheet.append((images.truth, one.frames))
                _write_sheet(config, sheet)
        write_rows(config.output, rows.values())
        bar.update(len(batch))
    bar.close()

    memory = peak_memory(device_of(config)) if todo else _memory_before(config)
    summary = _summary(config, recipe, [rows[case.pair.id] for case in cases if case.pair.id in rows], memory)
    with replacing(config.output / SUMMARY_FILE) as beside:
        beside.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if failures:
        reasons = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
        raise ValueError(f"{len(failures)} of {len(cases)} pairs could not be measured:\n{reasons}")
    return summary


def table(summary: Mapping[str, Any]) -> str:
    """The means of a summary in a few lines for people."""
    lines = [f"{summary['pairs']} pairs, {summary['seconds']:.1f} s"]
    for name, one in summary["metrics"].items():
        ends = f" [{one['low']:.4g}, {one['high']:.4g}]" if one["low"] is not None else ""
        some = f" ({one['pairs']} pairs)" if one["pairs"] != summary["pairs"] else ""
        lines.append(f"  {name:<14} {one['mean']:.4g}{ends}{some}")
    return "\n".join(lines)


def _readable(config: EvaluateConfig, batch: Sequence[Case], failures: dict[str, str]) -> dict[str, Footage]:
    """Images of the cases that have them, by the pair's id; the others' reasons go to `failures`."""
    footage = {}
    for case in batch:
        try:
            footage[case.pair.id] = footage_of(case, config.fit, loop=config.loop)
        except ValueError as error:
            failures[case.pair.id] = str(error)
    return footage


def _row(case: Case, images: Footage, made: Made, film: FilmTruth | None, seconds: float) -> Row:
    loop = np.array_equal(images.start, images.end)
    metrics = measure(made.frames, images.truth, images.start, images.end, loop=loop)
    metrics |= measure_film(made.frames, film) if film else {}
    return {
        "id": case.pair.id,
        "film": case.pair.video,
        "footage_sha256": hashlib.sha256(b"".join(one.tobytes() for one in images)).hexdigest(),
        **{name: round(value, 6) for name, value in {**metrics, **made.metrics}.items()},
        "seconds": round(seconds, 4),
        "unet_calls": made.unet_calls,
        "made_with": made_with(case),
    }


def _memory_before(config: EvaluateConfig) -> int | None:
    """What the summary that is there says of memory."""
    file = config.output / SUMMARY_FILE
    said: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return said.get("peak_memory_bytes")


def _summary(config: EvaluateConfig, recipe: dict[str, Any], rows: Sequence[Row], memory: int | None) -> dict[str, Any]:
    metrics = {}
    for name in dict.fromkeys(name for row in rows for name in metrics_of(row)):
        having = [row for row in rows if name in row]
        values = [row[name] for row in having]
        mean, *ends = mean_interval(values, groups=films_of_rows(having))
        low, high = (None if math.isnan(end) else round(end, 6) for end in ends)
        metrics[name] = {"mean": round(mean, 6), "low": low, "high": high, "pairs": len(values)}
    return {
        "pairs": len(rows),
        "metrics": metrics,
        "seconds": round(sum(row["seconds"] for row in rows), 3),
        "unet_calls_per_video": sum(row["unet_calls"] for row in rows) / max(1, len(rows)),
        "peak_memory_bytes": memory,
        "settings": recipe,
        "machine": _machine(config),
        "versions": versions(),
    }


def _machine(config: EvaluateConfig) -> dict[str, Any]:
    device = device_of(config)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {"device": str(device), "name": name, "system": platform.platform(), "cores": os.cpu_count()}


def _write_sheet(config: EvaluateConfig, shown: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
    """Truth and video of some pairs, of those as long as the first."""
    columns: dict[str, np.ndarray] = {}
    for number, videos in enumerate(shown, start=1):
        if len(videos[0]) == len(shown[0][0]):
            columns |= {f"{number}: {name}": video for name, video in zip(("truth", "made"), videos)}
    with replacing(config.output / SHEET_FILE) as beside:
        contact_sheet(columns, SHEET_ROWS).save(beside)
