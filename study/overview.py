"""The report's answer: every patched domain in one row, against the base and against the floor."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from ..infer.statistics import Interval
from .markdown import gain, table
from .plan import MAIN, METHODS
from .results import ERRORS, METRICS, Metric, Results

ANSWERS = (MAIN, "long", "full")
"""The methods that are set against the others."""
BELOW = ("base", "cross_fade", "flow_warp")
ABOUT = (
    "Differences pair by pair with 95 % bootstrap intervals; **bold** where the interval leaves out zero. Path error "
    "is how far things, or the camera, are off their way: the share of the base's that is gone. Motion is the "
    "amplitude over that of the truth through the VAE."
)
LESS = Metric("path error less, %", 0, "higher")
MOTION = Metric("motion", 2, "near 1")


def overview_table(results: Results, worlds: Sequence[str]) -> str:
    """A row a domain and method that is done, with what it is about; empty if none is."""
    rows = list(_rows(results, worlds))
    head = [
        "domain", "method", "PSNR over the base, dB", "over a cross-fade", "over a flow warp", "SSIM over the base",
        LESS.title, "motion of the base", "its motion",
    ]  # fmt: skip
    return f"{ABOUT}\n\n{table(head, rows)}" if rows else ""


def _rows(results: Results, worlds: Sequence[str]) -> Iterator[list[str]]:
    for world in worlds:
        base, ceiling = f"eval/{world}-base", f"eval/{world}-ceiling"
        for method in ANSWERS:
            name = f"eval/{world}-{method}"
            if results.has(base) and results.has(name):
                yield [
                    world,
                    METHODS[method],
                    *(_more(results, f"eval/{world}-{one}", name, "inner_psnr") for one in BELOW),
                    _more(results, base, name, "inner_ssim"),
                    _less(results, base, name),
                    *(_over(results, ceiling, one) for one in (base, name)),
                ]  # fmt: skip


def _more(results: Results, reference: str, name: str, metric: str) -> str:
    if not results.has(reference):
        return ""
    return gain(METRICS[metric], results.gains(reference, name).get(metric))


def _less(results: Results, base: str, name: str) -> str:
    """In how many percent of the base's path error the path error is less."""
    left = [one for metric, one in results.ratios(base, name).items() if metric in ERRORS]
    return gain(LESS, Interval(*(100 * (1 - left[0][place]) for place in (0, 2, 1)))) if left else ""


def _over(results: Results, reference: str, name: str) -> str:
    if not results.has(reference):
        return ""
    one = results.ratios(reference, name).get("motion_ratio")
    return MOTION.interval(one) if one else ""
