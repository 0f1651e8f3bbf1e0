"""The report's part on ways of sampling: what each costs, and what it makes of the same pairs, patched or not."""

from __future__ import annotations

from collections.abc import Sequence

from .markdown import NOTE, PAIRED_NOTE, gain, table
from .plan import METHODS, Sampled
from .results import METRICS, Results

SHOWN = ("inner_psnr", "inner_ssim", "track_pixels", "path_degrees", "bound_psnr", "motion_ratio", "sharpness_ratio")
CONTRASTED = ("inner_psnr", "inner_ssim", "track_pixels", "path_degrees")
ABOUT = (
    "A UNet call is one direction at one noise level, guided or not. What a way costs in seconds and memory, "
    "`bench/sample.py` measures on a machine that does nothing else."
)


def ways_of_sampling(results: Results) -> str:
    """A table a world, of those of which two ways or more are done."""
    parts = []
    for world in dict.fromkeys(one.world for one in results.plan.sampled):
        methods = [one for one in results.plan.sampled if one.world == world]
        done = [name for one in methods for _, name in one.ways[1:] if results.has(name)]
        if done:
            pairs = results.summary(done[0])["pairs"]
            parts.append(f"### {world}\n\n{pairs} pairs.\n\n{_table(results, methods)}")
    return "\n\n".join(["## Ways of sampling", f"{ABOUT} {NOTE} {PAIRED_NOTE}", *parts]) if parts else ""


def _table(results: Results, methods: Sequence[Sampled]) -> str:
    points = {one.method: results.over_shared(one.ways, one.ways[0][1]) for one in methods}
    found = {name for ways in points.values() for point in ways.values() for name in point.means}
    shown = [name for name in SHOWN if name in found]
    less = [name for name in CONTRASTED if name in found]
    own = methods[0].ways[0][0]
    head = [
        "way", "on", "UNet calls", *(str(METRICS[name]) for name in shown),
        *(f"{METRICS[name].title}, minus {own}" for name in less),
    ]  # fmt: skip
    rows = []
    for one in methods:
        for way, name in one.ways:
            if way not in points[one.method]:
                continue
            means, gains = points[one.method][way]
            rows.append([
                way, METHODS[one.method],
                f"{results.summary(name)['unet_calls_per_video']:g}",
                *(METRICS[metric].interval(means[metric]) if metric in means else "" for metric in shown),
                *(gain(METRICS[metric], gains.get(metric)) for metric in less),
            ])  # fmt: skip
    return table(head, rows)
