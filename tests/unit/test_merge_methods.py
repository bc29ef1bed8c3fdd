"""TIES, SCE and RSAF against hand-worked cases, plain float64 references and the identities every method must keep."""

import math

import numpy as np
import pytest

from llmfusion.merging.methods import METHODS, rsaf, sce, skewness, ties, top

RNG = np.random.default_rng(0)


def some(models: int = 3, n: int = 501) -> tuple[np.ndarray, np.ndarray]:
    return RNG.normal(0, 0.02, n).astype(np.float32), RNG.normal(0, 1e-3, (models, n)).astype(np.float32)


def test_top_takes_exactly_k_and_the_lower_index_of_equals() -> None:
    values = np.array([1.0, 3, 3, 2, 3, 0])
    assert top(values, 2).tolist() == [False, True, True, False, False, False]
    assert top(values, 4).tolist() == [False, True, True, True, True, False]
    for k in range(1, 7):
        assert top(values, k).sum() == k


def test_ties_by_hand() -> None:
    theta = np.zeros(4, np.float32)
    deltas = np.array([[4, -3, 1, 0.5], [-1, -5, 2, 4]], np.float32)
    # half of each: [4 -3 . .] and [. -5 . 4]; signs + - . +; means 4, (-3 - 5)/2, 0, 4
    assert ties(theta, deltas, {"density": 0.5})[0].tolist() == [4, -4, 0, 4]
    # without the division the agreeing ones are summed
    assert ties(theta, deltas, {"density": 0.5, "normalize": False})[0].tolist() == [4, -8, 0, 4]
    # all kept: signs of the sums 3, -8, 3, 4.5; the minority -1 is erased
    assert ties(theta, deltas, {"density": 1.0})[0].tolist() == [4, -4, 1.5, 2.25]


def test_sce_by_hand() -> None:
    theta = np.zeros(4, np.float32)
    deltas = np.array([[3, 1, 0, 2], [1, 1, 0, -4]], np.float32)
    # variances 1, 0, 0, 9: of two that are not 0 the half is one, the last; eta = 4/20, 16/20
    merged, notes = sce(theta, deltas, {"tau": 0.5})
    assert (notes["eta_0"], notes["eta_1"]) == pytest.approx((0.2, 0.8))
    # disjoint over all values: 0.2*3 + 0.8*1; 1; 0; the elected sign is -: -4
    np.testing.assert_allclose(merged, [1.4, 1, 0, -4], rtol=1e-6)
    np.testing.assert_allclose(sce(theta, deltas, {"tau": 0.5, "select_scope": "values", "normalize": "none"})[0], [0, 0, 0, -3.2], rtol=1e-6)


def test_rsaf_follows_algorithm_1() -> None:
    theta, deltas = some()
    options = {"tau": 0.3, "eps": 1e-4, "select_scope": "values", "normalize": "none"}
    kept = np.zeros(deltas.shape)
    for j, d in enumerate(deltas.astype(np.float64)):
        r = np.abs(d) / (np.abs(theta.astype(np.float64)) + 1e-4)
        s = ((r - r.mean()) ** 3).mean() / ((r - r.mean()) ** 2).mean() ** 1.5
        k = math.ceil(min(1, 0.3 / (1 + s) if s >= 0 else 0.3 * (1 - s)) * r.size)
        for i in sorted(range(r.size), key=lambda i: (-r[i], i))[:k]:
            kept[j, i] = d[i]
    eta = (kept**2).sum(1) / (kept**2).sum()
    sign = np.where(kept.sum(0) >= 0, 1, -1)
    expected = theta + (eta[:, None] * np.where(np.sign(kept) == sign, kept, 0)).sum(0)
    np.testing.assert_allclose(rsaf(theta, deltas, options)[0], expected, atol=1e-7)


def test_skewness_of_one_spike_is_the_largest_there_is_and_of_constants_zero() -> None:
    for n in (2, 10, 1000):
        assert skewness(np.eye(1, n)[0]) == pytest.approx((n - 2) / math.sqrt(n - 1), abs=1e-9)
    for constant in (0.0, 0.1, 1e-9, 1e12):
        assert skewness(np.full(1001, constant)) == 0.0
    assert skewness(-np.eye(1, 10)[0]) == pytest.approx(-8 / 3)


def test_a_long_left_tail_selects_more_but_never_more_than_all() -> None:
    theta = np.ones(1000, np.float32)
    deltas = np.full((1, 1000), 0.5, np.float32)
    deltas[0, 7] = 0.001
    notes = rsaf(theta, deltas, {"tau": 0.5})[1]
    assert notes["S_0"] < -30
    assert notes["K_0"] == 1.0
    assert notes["k_0"] == 1000


ALL = [("ta", {}), ("ties", {"density": 1.0}), ("sce", {}), ("sce", {"tau": 1.0}), ("rsaf", {}), ("rsaf", {"select_by": "delta"})]
LITERAL = [("ties", {"density": 0.3}), ("sce", {"select_scope": "values", "normalize": "none"}), ("rsaf", {"select_scope": "values", "normalize": "none"})]


@pytest.mark.parametrize(("name", "options"), ALL)
def test_identical_models_and_a_single_model_are_returned(name: str, options: dict) -> None:
    theta, deltas = some(1)
    for same in (deltas, np.repeat(deltas, 3, 0)):
        np.testing.assert_allclose(METHODS[name](theta, same, options)[0], theta + deltas[0], atol=2e-9)


@pytest.mark.parametrize(("name", "options"), ALL + LITERAL)
def test_no_deltas_give_the_pivot(name: str, options: dict) -> None:
    theta, deltas = some()
    assert np.array_equal(METHODS[name](theta, deltas * 0, options)[0], theta)


@pytest.mark.parametrize(("name", "options"), ALL + LITERAL)
def test_the_order_of_models_does_not_matter(name: str, options: dict) -> None:
    theta, deltas = some()
    np.testing.assert_allclose(METHODS[name](theta, deltas[[2, 0, 1]], options)[0], METHODS[name](theta, deltas, options)[0], atol=3e-9)


@pytest.mark.parametrize(("name", "options"), [*ALL[:4], *LITERAL[:2]])
def test_small_deltas_give_the_same_method(name: str, options: dict) -> None:
    theta, deltas = some()
    zero = np.zeros_like(theta)
    for scale in (2.0**-20, 2.0**-40):  # powers of two: exact in float32
        np.testing.assert_allclose(METHODS[name](zero, deltas * np.float32(scale), options)[0] / scale, METHODS[name](zero, deltas, options)[0], rtol=1e-12)


def test_of_exactly_opposite_deltas_the_positive_wins() -> None:
    theta = np.zeros(2, np.float32)
    deltas = np.array([[1, -2], [-1, 2]], np.float32)
    for name, options in [("ties", {"density": 1.0}), ("sce", {"tau": 1.0}), ("rsaf", {"tau": 1.0, "select_by": "delta"})]:
        assert METHODS[name](theta, deltas, options)[0].tolist() == [1, 2], name


@pytest.mark.parametrize(("name", "options"), ALL + LITERAL)
def test_tensors_of_one_element_and_of_none(name: str, options: dict) -> None:
    one = METHODS[name](np.ones(1, np.float32), np.full((2, 1), 0.5, np.float32), options)[0]
    assert np.isfinite(one).all()
    assert METHODS[name](np.ones(0, np.float32), np.ones((2, 0), np.float32), options)[0].shape == (0,)
