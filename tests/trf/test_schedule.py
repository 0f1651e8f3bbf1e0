"""The re-noising plan: the order the paper's release visits noise levels in, its length, and its limits."""

import itertools
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trfpp.trf.schedule import count, factor_at, trf_plan


def visited(plan):
    """Index of the level each iteration is numbered by in the release: where it denoises from, or re-noises to."""
    return [step.start if step.kind == "fused" else step.end - 1 for step in plan]


def test_release_settings_visit_the_documented_levels():
    plan = trf_plan(50, jump_length=5, jump_n_sample=2, repeat_step_ratio=0.8)
    assert visited(plan) == [*range(10), 8, 7, 6, 5, 4, *range(5, 50)]
    assert (count(plan, "fused"), count(plan, "renoise")) == (55, 5)


def test_one_sample_means_no_renoising():
    assert count(trf_plan(10, jump_length=2, jump_n_sample=1), "renoise") == 0


def test_anchor_at_the_very_end_renoises_from_the_clean_latents():
    plan = trf_plan(4, jump_length=2, jump_n_sample=2, repeat_step_ratio=0.0)
    assert [(step.kind, step.start, step.end) for step in plan][-4:] == [
        ("renoise", 4, 3),
        ("renoise", 3, 2),
        ("fused", 2, 3),
        ("fused", 3, 4),
    ]


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 4), st.floats(0, 1))
def test_every_plan_is_a_connected_walk_from_noise_to_clean(steps, length, samples, ratio):
    plan = trf_plan(steps, length, samples, ratio)
    assert plan[0].start == 0
    assert plan[-1].end == steps
    assert all(before.end == after.start for before, after in itertools.pairwise(plan))
    assert all(step.end - step.start == (1 if step.kind == "fused" else -1) for step in plan)
    anchors = len(range(int(steps * ratio), steps - length, length))
    assert count(plan, "renoise") == anchors * (samples - 1) * length
    assert count(plan, "fused") == steps + count(plan, "renoise")


@pytest.mark.parametrize(
    ("arguments", "named"),
    [((0,), "num_inference_steps"), ((5, 0), "jump_length"), ((5, 1, 0), "jump_n_sample"), ((5, 1, 1, 2), "ratio")],
)
def test_bad_settings_are_named(arguments, named):
    with pytest.raises(ValueError, match=named):
        trf_plan(*arguments)


def test_factors_over_noise():
    points = [(1.0, 0.5), (10.0, 1.0), (100.0, 0.0)]
    assert factor_at([], 3) == 1
    assert factor_at([(2.0, 0.25)], 0.0) == factor_at([(2.0, 0.25)], 700) == 0.25
    sigmas = [0.0, 0.1, 1, math.sqrt(10), 10, 10**1.75, 100, 700]
    assert [factor_at(points, sigma) for sigma in sigmas] == pytest.approx([0.5, 0.5, 0.5, 0.75, 1, 0.25, 0, 0])
