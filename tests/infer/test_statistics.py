"""Intervals: seeded, covering the truth as often as they promise, narrower for pairs, and silent where nothing is known."""

import math

import numpy as np
import pytest

from trfpp.infer.statistics import mean_interval, paired_interval


def test_same_seed_same_interval_and_the_mean_lies_inside():
    values = np.random.default_rng(0).normal(5, 2, 30)
    one = mean_interval(values)
    assert one == mean_interval(list(values))
    assert one != mean_interval(values, seed=1)
    assert one.low < one.value < one.high
    assert one.value == pytest.approx(values.mean())


def test_the_interval_is_that_of_the_normal_law_for_many_values():
    values = np.random.default_rng(1).normal(0, 1, 400)
    half = 1.96 * values.std() / 20
    low, high = mean_interval(values)[1:]
    assert low == pytest.approx(values.mean() - half, abs=0.01)
    assert high == pytest.approx(values.mean() + half, abs=0.01)


@pytest.mark.parametrize(("contrast", "truth"), [("difference", 0.5), ("ratio", 1.05)])
def test_paired_intervals_hold_the_truth_as_often_as_they_say(contrast, truth):
    held = 0
    for seed in range(100):
        generator = np.random.default_rng(seed)
        hard = generator.normal(10, 3, 40)
        a, b = hard + generator.normal(0, 0.3, 40), hard + 0.5 + generator.normal(0, 0.3, 40)
        low, high = paired_interval(a, b, contrast)[1:]
        held += low <= truth <= high
    assert 87 <= held <= 99


def test_pairs_narrow_the_interval():
    generator = np.random.default_rng(0)
    hard = generator.normal(10, 3, 40)
    a, b = hard + generator.normal(0, 0.1, 40), hard + 0.2 + generator.normal(0, 0.1, 40)
    paired, mixed = paired_interval(a, b), paired_interval(a, generator.permutation(b))
    assert paired.value == pytest.approx(mixed.value)
    assert (paired.high - paired.low) * 5 < mixed.high - mixed.low
    assert paired.low > 0 > mixed.low


def test_which_way_round():
    assert paired_interval([1.0, 3.0], [4.0, 4.0]).value == 2
    assert paired_interval([1.0, 3.0], [4.0, 4.0], "ratio").value == 2
    assert paired_interval([2.0, 2.0], [2.0, 2.0])[1:] == (0, 0)


def test_one_value_says_nothing_of_its_spread():
    one = mean_interval([3.0])
    assert one.value == 3
    assert math.isnan(one.low)
    assert math.isnan(one.high)


def test_what_cannot_be_estimated_is_refused():
    with pytest.raises(ValueError, match="at least one"):
        mean_interval([])
    with pytest.raises(ValueError, match="2 values against 1"):
        paired_interval([1.0, 2.0], [1.0])


def test_pairs_of_one_film_do_not_prove_each_other():
    """Twenty clips of each of five films, which are alike within a film: as sure as five values, not as a hundred."""
    generator = np.random.default_rng(0)
    of_film = generator.normal(0, 1, 5)
    films = np.repeat(np.arange(5), 20)
    values = of_film[films] + generator.normal(0, 0.01, 100)
    alone, grouped, five = mean_interval(values), mean_interval(values, groups=films.tolist()), mean_interval(of_film)
    assert grouped.value == pytest.approx(alone.value)
    assert grouped.high - grouped.low == pytest.approx(five.high - five.low, rel=0.02)
    assert grouped.high - grouped.low > 3 * (alone.high - alone.low)
    other = values + 0.5 + 0.2 * of_film[films]
    paired = paired_interval(values, other, groups=films.tolist())
    assert paired.high - paired.low == pytest.approx(0.2 * (five.high - five.low), rel=0.1)
    each = [f"pair {number}" for number in range(100)]
    assert mean_interval(values, groups=each) == alone
    assert math.isnan(mean_interval([1.0, 2.0], groups=["a", "a"]).low)
    assert mean_interval([1.0, 2.0, 6.0], groups=["a", "a", "b"]).value == 3
