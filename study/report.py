"""The report: `report.md` and its pictures, made from what is done so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from ..configs.studying import StudyConfig
from ..data_prep.bounds import MANIFEST_FILE, PAIRS_FOLDER, read_manifest
from ..data_prep.video import ImageSequence, open_video
from ..infer.sheets import contact_sheet, moving_sheet, save_animation
from ..infer.statistics import Interval
from ..trf.replace import replacing
from .figures import gains_figure, methods_figure, sweep_figure
from .log import duration, read_log, seconds_taken
from .markdown import NOTE, PAIRED_NOTE, bullets, gain, picture, table
from .overview import overview_table
from .plan import MAIN, METHODS, VARIANTS, Curve, Plan
from .results import ERRORS, METRICS, Results
from .ways import ways_of_sampling

REPORT_FILE = "report.md"
FLOORS = ("cross_fade", "flow_warp")
ON_SHEETS = {
    "cross_fade": "cross-fade",
    "flow_warp": "flow warp",
    "base": "base",
    "pair": "patched",
    "long": "trained longer",
    "full": "full fine-tune",
}
SHEET_ROWS = 6
IN_MOTION = ("cross_fade", "base")
"""Of the overview's animation, beside the pair, or the pair that was trained longer."""
MOTION_FPS = 8.0
MOTION_FILE = "worlds.webp"
PANELS = {
    "PSNR, dB": ("inner_psnr",),
    "SSIM": ("inner_ssim",),
    "path error, % points": ERRORS,
    "disagreement": ("disagreement",),
}
"""Of the overview's figure: the metric, or which of them a domain has."""
PICTURED = ("inner_psnr", "inner_ssim", "track_pixels", "path_degrees", "motion_ratio", "disagreement")
SWEPT = ("inner_psnr", "inner_ssim", "track_pixels", "path_degrees", "disagreement")
CONTRASTED = ("inner_psnr", "track_pixels", "path_degrees")


def write_report(config: StudyConfig, plan: Plan) -> Path:
    """Write the report of all that is done; gives its file. Without a finished evaluation it says so."""
    folder = config.report or config.output / "report"
    folder.mkdir(parents=True, exist_ok=True)
    results = Results(config.output, plan)
    sections = [
        _head(config, results),
        _overview(config, results, folder),
        *(_world(config, results, folder, world) for world in config.worlds),
        _forgetting(config, results, folder),
        ways_of_sampling(results),
        *(_sweep(results, folder, name) for name in dict.fromkeys(curve.sweep for curve in plan.curves)),
        _state(config, results),
    ]
    with replacing(folder / REPORT_FILE) as beside:
        beside.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    return folder / REPORT_FILE


def _head(config: StudyConfig, results: Results) -> str:
    patch, sampler = config.patch, config.sampler.model_dump(exclude_none=True)
    said = [
        f"model `{config.model}`",
        f"{config.train_films} films of {config.num_frames} frames of {config.size} x {config.size} to train on",
        f"{config.pairs} held-out pairs a domain",
        f"patches: {patch.steps} steps of {patch.batch_size} clips, {patch.lora.targets}, rank {patch.lora.rank}, "
        f"learning rate {patch.optim.lr:g}",
        *([_trained_on(config)] if config.worlds_of(config.longer) else []),
        *([f"full fine-tune: {config.full.steps} steps, rate {config.full.optim.lr:g}"] if config.full else []),
        "sampler: " + ", ".join(f"{name} {value}" for name, value in sampler.items()),
    ]
    done = f"{len(results.evaluations)} evaluations are done, {len(results.missing)} runs are to come."
    return "\n".join(["# What a domain patch does", "", f"Written by `trfpp study`. {done}", "", *bullets(said)])


def _trained_on(config: StudyConfig) -> str:
    longer, worlds = config.longer, ", ".join(config.worlds_of(config.longer))
    return (
        f"{METHODS['long']} ({worlds}): {longer.steps:,} steps more, on {longer.films:,} films, "
        f"{longer.fusion:.0%} of the loss for the fusion"
    )


def _overview(config: StudyConfig, results: Results, folder: Path) -> str:
    """The answer in one table and one figure."""
    gains: dict[str, dict[str, dict[str, Interval]]] = {title: {} for title in PANELS}
    for world in config.worlds:
        for method in (name for name in METHODS if name not in (*FLOORS, "base", "ceiling")):
            base, name = f"eval/{world}-base", f"eval/{world}-{method}"
            if results.has(base) and results.has(name):
                found = results.gains(base, name)
                for title, metrics in PANELS.items():
                    for metric in found.keys() & set(metrics):
                        gains[title].setdefault(world, {})[method] = found[metric]
    if not any(gains.values()):
        return "## Against the base and the floor\n\nNo patch was measured against the base yet."
    file = folder / "gains.png"
    gains_figure(file, {title: worlds for title, worlds in gains.items() if worlds}, METHODS)
    moving = _in_motion(config, results, folder)
    parts = [
        "## Against the base and the floor",
        overview_table(results, config.worlds),
        picture(moving, "A pair of each domain, in motion") if moving else "",
        picture(file, "What each method has more than the base"),
    ]
    return "\n\n".join(filter(None, parts))


def _world(config: StudyConfig, results: Results, folder: Path, world: str) -> str:
    names = {method: f"eval/{world}-{method}" for method in METHODS if results.has(f"eval/{world}-{method}")}
    if not names:
        return f"## {world}\n\nNothing is measured yet."
    parts = [f"## {world}", *_measured(results, names, METHODS, folder / f"{world}.png")]
    parts += [
        picture(file, f"{world}: truth and methods, {file.stem}") for file in _sheets(config, results, folder, world)
    ]
    return "\n\n".join(parts)


def _forgetting(config: StudyConfig, results: Results, folder: Path) -> str:
    """What patches cost where they are not meant for."""
    labels: dict[str, str] = {name: METHODS[name] for name in ("cross_fade", "flow_warp", "base")}
    for world in config.worlds:
        labels |= {world: f"patch for {world}", f"{world}-long": f"patch for {world}, trained longer"}
    labels["ceiling"] = METHODS["ceiling"]
    names = {name: f"eval/base-{name}" for name in labels if results.has(f"eval/base-{name}")}
    if not any(name not in METHODS for name in names):
        return ""
    head = "## On the base world\n\nEvery domain's patch on films of the base world, which moves little and every way."
    return "\n\n".join([head, *_measured(results, names, labels)])


def _measured(
    results: Results, names: Mapping[str, str], labels: Mapping[str, str], file: Path | None = None
) -> Iterable[str]:
    """A table of means, one of differences against the base if that is there, and a figure if a file is given."""
    means = {key: results.means(name) for key, name in names.items()}
    metrics = {name: metric for name, metric in METRICS.items() if any(name in one for one in means.values())}
    head = ["", *map(str, metrics.values())]
    rows = [
        [labels[key], *(metric.interval(one[name]) if name in one else "" for name, metric in metrics.items())]
        for key, one in means.items()
    ]
    yield f"{results.summary(next(iter(names.values())))['pairs']} pairs. {NOTE}"
    yield table(head, rows)
    contrasts = {"base": [key for key in names if key != "base"], MAIN: [key for key in VARIANTS if key in names]}
    for reference, others in contrasts.items():
        if reference in names and others:
            found = {key: results.gains(names[reference], names[key]) for key in others}
            yield f"Against the {labels[reference]}. {PAIRED_NOTE}"
            yield table(head, [
                [labels[key], *(gain(metric, one.get(name)) for name, metric in metrics.items())]
                for key, one in found.items()
            ])  # fmt: skip
    if file is not None:
        methods_figure(file, means, labels, {name: str(metrics[name]) for name in PICTURED if name in metrics})
        yield picture(file, f"All methods, {file.stem}")


def _sheets(config: StudyConfig, results: Results, folder: Path, world: str) -> list[Path]:
    """Contact sheets of the first pairs: truth beside every method that is done.

    Once films or videos of any are deleted, the sheets stay as they are.
    """
    shown = _shown(config, results, world, ON_SHEETS)
    if not shown:
        done = any(results.has(f"eval/{world}-{name}") for name in ON_SHEETS)
        return sorted(folder.glob(f"{world}-[0-9]*.jpg"))[: config.sheets] if done else []
    files = []
    for number, columns in enumerate(shown, start=1):
        files.append(folder / f"{world}-{number}.jpg")
        labelled = {ON_SHEETS.get(name, name): video for name, video in columns.items()}
        with replacing(files[-1]) as beside:
            contact_sheet(labelled, SHEET_ROWS).save(beside, quality=92)
    return files


def _in_motion(config: StudyConfig, results: Results, folder: Path) -> Path | None:
    """An animation of the first pair of every domain; stays as it is once films or videos of any are deleted."""
    rows: dict[str, dict[str, np.ndarray]] = {}
    done = [world for world in config.worlds if any(results.has(f"eval/{world}-{name}") for name in ON_SHEETS)]
    for world in done:
        best = "long" if results.has(f"eval/{world}-long") else MAIN
        labels = {**ON_SHEETS, best: ON_SHEETS[MAIN]}
        for columns in _shown(config, results, world, (*IN_MOTION, best))[:1]:
            rows[world] = {labels.get(name, name): video for name, video in columns.items()}
    file = folder / MOTION_FILE
    if rows and len(rows) == len(done):
        save_animation(file, moving_sheet(rows), MOTION_FPS)
    return file if file.is_file() else None


def _shown(config: StudyConfig, results: Results, world: str, methods: Iterable[str]) -> list[dict[str, np.ndarray]]:
    """Of the first pairs the truth and what those methods made of them, by method; nothing once any are deleted."""
    names = {method: f"eval/{world}-{method}" for method in methods}
    videos = {method: results.videos(name) for method, name in names.items() if results.has(name)}
    manifest = config.output / world / "pairs" / PAIRS_FOLDER / MANIFEST_FILE
    pairs = read_manifest(manifest)[: config.sheets] if videos and manifest.is_file() else []
    if any(pair.id not in of_pairs for of_pairs in videos.values() for pair in pairs):
        return []
    shown = []
    for pair in pairs:
        assert pair.truth is not None
        truth = ImageSequence(pair.truth, 1.0)
        frames = range(len(truth.files))
        columns: dict[str, np.ndarray] = {"truth": truth.read(frames)}
        columns |= {method: _frames(of_pairs[pair.id], len(frames)) for method, of_pairs in videos.items()}
        shown.append(columns)
    return shown


def _frames(file: Path, count: int) -> np.ndarray:
    video = open_video(file, 1)
    try:
        return video.read(range(count))
    finally:
        video.close()


def _sweep(results: Results, folder: Path, sweep: str) -> str:
    parts = []
    curves = [curve for curve in results.plan.curves if curve.sweep == sweep]
    for world in dict.fromkeys(curve.world for curve in curves):
        parts += _swept(results, folder, sweep, world, [curve for curve in curves if curve.world == world])
    return "\n\n".join([f"## Sweep: {sweep}", f"{NOTE} {PAIRED_NOTE}", *parts]) if parts else ""


def _swept(results: Results, folder: Path, sweep: str, world: str, curves: Sequence[Curve]) -> list[str]:
    found = {curve.method: results.over_shared(curve.points, f"eval/{world}-base") for curve in curves}
    if all(len(points) < 2 for points in found.values()):
        return []
    metrics = {
        name: metric
        for name, metric in METRICS.items()
        if name in SWEPT and any(name in one.means for points in found.values() for one in points.values())
    }
    against = {name: metric for name, metric in metrics.items() if name in CONTRASTED}
    rows = []
    for curve in curves:
        for value, (means, gains) in found[curve.method].items():
            rows.append([
                str(value) if isinstance(value, str) else f"{value:g}",
                METHODS[curve.method],
                *(metric.interval(means[name]) if name in means else "" for name, metric in metrics.items()),
                *(gain(metric, gains.get(name)) for name, metric in against.items()),
            ])  # fmt: skip
    file = folder / f"sweep-{world}-{sweep.replace(' ', '-')}.png"
    drawn = {method: {value: one.means for value, one in points.items()} for method, points in found.items()}
    sweep_figure(file, drawn, METHODS, {name: str(metric) for name, metric in metrics.items()}, sweep)
    head = [sweep, f"on {world}", *map(str, metrics.values())]
    head += [f"{metric.title}, minus the base" for metric in against.values()]
    return [table(head, rows), picture(file, f"{world}: {sweep}")]


def _state(config: StudyConfig, results: Results) -> str:
    """What was done and what is missing, and how long it took."""
    latest, taken = {line["name"]: line for line in read_log(config.output)}, seconds_taken(config.output)
    failed = {name: latest[name]["error"] for name in results.missing if "error" in latest.get(name, {})}
    needed = results.plan.chosen(results.evaluations) if results.evaluations else []
    took = sum(taken.get(run.name, 0.0) for run in needed)
    machines = {
        f"{(made := results.summary(name)['machine'])['name']} ({made['device']}, {made['cores']} cores)"
        for name in results.evaluations
    }
    lines = [
        "## Runs",
        "",
        f"{len(results.evaluations)} evaluations, and what they need, took {duration(took)}; "
        f"{len(results.missing)} runs are to come.",
    ]
    lines += ["", *bullets(f"machine: {machine}" for machine in sorted(machines))] if machines else []
    lines += ["", *bullets(f"`{name}` failed: {' '.join(reason.split())}" for name, reason in failed.items())]
    return "\n".join(lines).rstrip()
