"""Shares and standard errors against brute force over all outcomes."""

import itertools
import math
import statistics

import pytest

from llmfusion.reporting.stats import error_of_mean, mean, per_cent, standard_error


@pytest.mark.parametrize(
    ("k", "n", "score", "error"),
    [
        (82, 164, 50.0, 3.904344),
        (0, 10, 0.0, 0.0),
        (10, 10, 100.0, 0.0),
        (1, 4, 25.0, 21.650635),
        (1, 3, 33.333333, 27.216553),
    ],
)
def test_per_cent_by_hand(k: int, n: int, score: float, error: float) -> None:
    assert per_cent(k, n) == (score, error)


def test_the_error_is_the_deviation_of_the_score_over_all_outcomes() -> None:
    n, p = 5, 2 / 5
    outcomes = [(sum(bits), math.prod(p if b else 1 - p for b in bits)) for bits in itertools.product((0, 1), repeat=n)]
    centre = sum(100 * k / n * weight for k, weight in outcomes)
    deviation = math.sqrt(sum((100 * k / n - centre) ** 2 * weight for k, weight in outcomes))
    assert per_cent(2, n) == pytest.approx((centre, deviation), abs=1e-6)


@pytest.mark.parametrize("n", [0, -1])
def test_a_score_of_nothing_is_refused(n: int) -> None:
    with pytest.raises(ValueError, match="at least one item"):
        per_cent(0, n)


def test_the_mean_is_unweighted_and_its_error_that_of_independent_scores() -> None:
    assert mean([10.0, 20.0, 60.0]) == 30.0
    assert error_of_mean([3.0, 0.0, 4.0]) == round(5 / 3, 6)
    assert (mean([42.0]), error_of_mean([1.5])) == (42.0, 1.5)


def test_the_error_of_a_mean_is_the_deviation_of_a_sum_of_two_coins() -> None:
    totals = [((a + b) / 2, 0.25) for a, b in itertools.product((0.0, 100.0), repeat=2)]
    deviation = math.sqrt(sum((v - 50) ** 2 * weight for v, weight in totals))
    assert error_of_mean([per_cent(1, 2)[1] * math.sqrt(2)] * 2) == pytest.approx(deviation, abs=1e-5)


def test_replicates_have_the_error_of_their_spread_and_a_single_value_its_own() -> None:
    assert standard_error([1.0, 3.0], [9.0, 9.0]) == 1.0  # deviation sqrt(2), over sqrt(2)
    assert standard_error([5.0, 5.0, 5.0], []) == 0.0
    assert standard_error([7.0], [2.5]) == 2.5
    values = [2.0, 4.0, 4.0, 5.0]
    assert standard_error(values, []) == pytest.approx(statistics.stdev(values) / 2, abs=1e-6)
