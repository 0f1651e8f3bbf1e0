"""The study's figures, from numbers alone; every mark has its 95 % interval."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from ..infer.statistics import Interval
from ..trf.replace import replacing

COLOURS = {
    "cross_fade": "#b0b0b0",
    "flow_warp": "#7f7f7f",
    "base": "#222222",
    "forward_half": "#9ecae1",
    "forward_both": "#3182bd",
    "either": "#e6ab02",
    "pair": "#d95f02",
    "long": "#a6761d",
    "fused": "#7570b3",
    "rotated": "#e7298a",
    "full": "#1b9e77",
    "ceiling": "#b0b0b0",
}
"""Of the methods, the same in every figure: floors and ceiling grey, the base black."""
PANEL = 3.1
"""Width of a panel, inches."""
DPI = 110


def methods_figure(
    file: Path, means: Mapping[str, Mapping[str, Interval]], labels: Mapping[str, str], metrics: Mapping[str, str]
) -> None:
    """Methods below each other, a panel a metric: points, since most of these scales have no zero to start a bar from.

    Args:
        file: the PNG to write.
        means: of each method, its metrics.
        labels: of the methods, for people.
        metrics: those to show, with their titles.
    """
    figure, panels = _panels(metrics, height=0.32 * len(means) + 0.9)
    for panel, name in zip(panels, metrics):
        for row, (method, values) in enumerate(means.items()):
            if name in values:
                one = values[name]
                panel.errorbar(
                    one.value, row, xerr=_whiskers([one]), fmt="o", color=COLOURS[method], capsize=2, markersize=5
                )
        if "base" in means and name in means["base"]:
            panel.axvline(means["base"][name].value, color=COLOURS["base"], linewidth=0.7, linestyle=":")
        panel.set_yticks(range(len(means)), [labels[method] for method in means] if panel is panels[0] else [])
        panel.set_ylim(len(means) - 0.5, -0.5)
        panel.grid(axis="x", alpha=0.25)
    _save(figure, file)


def gains_figure(
    file: Path, gains: Mapping[str, Mapping[str, Mapping[str, Interval]]], labels: Mapping[str, str]
) -> None:
    """Bars of what methods have more than the base (0), by domain, a panel a metric.

    Args:
        file: the PNG to write.
        gains: by the metric's title, by domain, by method.
        labels: of the methods, for people.
    """
    figure, panels = _panels({title: title for title in gains}, height=3.4)
    methods = [name for name in labels if any(name in one for worlds in gains.values() for one in worlds.values())]
    width = 0.8 / max(1, len(methods))
    for panel, worlds in zip(panels, gains.values()):
        for number, method in enumerate(methods):
            places = [place for place, one in enumerate(worlds.values()) if method in one]
            found = [one[method] for one in worlds.values() if method in one]
            panel.bar(
                np.array(places) + (number - (len(methods) - 1) / 2) * width,
                [one.value for one in found],
                width,
                yerr=_whiskers(found),
                color=COLOURS[method],
                ecolor="#333333",
                capsize=1.5,
                error_kw={"linewidth": 0.8},
                label=labels[method],
            )
        panel.axhline(0, color=COLOURS["base"], linewidth=0.8)
        panel.set_xticks(range(len(worlds)), list(worlds), rotation=30, ha="right")
        panel.grid(axis="y", alpha=0.25)
        panel.set_axisbelow(True)
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.supylabel("minus the base", fontsize=8)
    _save(figure, file)


def sweep_figure(
    file: Path,
    curves: Mapping[str, Mapping[float | str, Mapping[str, Interval]]],
    labels: Mapping[str, str],
    metrics: Mapping[str, str],
    setting: str,
) -> None:
    """Lines over a setting, its values evenly spaced, a panel a metric.

    Args:
        file: the PNG to write.
        curves: of each method, the setting's values with their metrics.
        labels: of the methods, for people.
        metrics: those to show, with their titles.
        setting: its name.
    """
    figure, panels = _panels(metrics, height=2.8)
    values = list(dict.fromkeys(value for points in curves.values() for value in points))
    values = sorted(values, key=float) if not any(isinstance(value, str) for value in values) else values
    for panel, name in zip(panels, metrics):
        for number, (method, points) in enumerate(curves.items()):
            aside = 0.08 * (number - (len(curves) - 1) / 2)  # or whiskers would hide each other
            found = [(values.index(value) + aside, one[name]) for value, one in points.items() if name in one]
            places, shown = [place for place, _ in found], [one for _, one in found]
            line = "none" if any(isinstance(value, str) for value in values) else "-"
            panel.errorbar(
                places, [one.value for one in shown], yerr=_whiskers(shown), fmt="o", linestyle=line, capsize=2,
                markersize=4, color=COLOURS[method], label=labels[method],
            )  # fmt: skip
        panel.set_xticks(range(len(values)), [str(v) if isinstance(v, str) else f"{v:g}" for v in values])
        panel.set_xlabel(setting)
        panel.grid(alpha=0.25)
    if len(curves) > 1:
        figure.legend(*panels[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    _save(figure, file)


def _panels(titles: Mapping[str, str], height: float) -> tuple[Figure, Sequence[Any]]:
    figure = Figure(figsize=(PANEL * len(titles) + 0.6, height), layout="constrained")
    panels = figure.subplots(1, len(titles), squeeze=False)[0]
    for panel, title in zip(panels, titles.values()):
        panel.set_title(title, fontsize=9)
        panel.tick_params(labelsize=8)
        panel.spines[["top", "right"]].set_visible(False)
    return figure, list(panels)


def _whiskers(found: Sequence[Interval]) -> np.ndarray:
    """Lengths below and above each value, `[2, N]`."""
    return np.array([[one.value - one.low for one in found], [one.high - one.value for one in found]]).clip(min=0)


def _save(figure: Figure, file: Path) -> None:
    with replacing(file) as beside:
        figure.savefig(beside, dpi=DPI, metadata={"Software": None})
