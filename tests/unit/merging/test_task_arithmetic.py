import numpy as np
import pytest

from llmfusion.merging.arrays import merge_arrays

RANDOM = np.random.default_rng(0)
THETA = RANDOM.normal(size=500).astype(np.float32)
DELTAS = (RANDOM.normal(size=(3, 500)) * 1e-2).astype(np.float32)


def ta(options=None, deltas=DELTAS):
    merged, _ = merge_arrays("ta", THETA, list(deltas), options, deltas=True)
    assert merged.dtype == np.float32
    return merged


@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, [1 / 3] * 3),
        ({"weight": 1.0}, [1, 1, 1]),
        ({"weight": [0.5, 0.25, 2.0]}, [0.5, 0.25, 2.0]),
        ({"weight": [0.5, 0.25, 2.0], "lambda": 0.3}, [0.15, 0.075, 0.6]),
        ({"weight": [1.0, 2.0, 5.0], "normalize": True}, [0.125, 0.25, 0.625]),
        ({"weight": 7.0, "normalize": True, "lambda": 2.0}, [2 / 3] * 3),
        ({"weight": [1.0, -1.0, 0.0]}, [1, -1, 0]),
    ],
)
def test_ta_adds_weighted_deltas_to_the_pivot(options, weights):
    expected = THETA.astype(np.float64) + np.asarray(weights) @ DELTAS.astype(np.float64)
    np.testing.assert_allclose(ta(options), expected, rtol=0, atol=5e-7)


def test_the_order_of_models_does_not_matter_if_weights_move_along():
    np.testing.assert_allclose(
        ta(), ta(deltas=DELTAS[::-1]), rtol=0, atol=2.5e-7
    )  # one rounding each, at values of up to 3
    one, other = ta({"weight": [0.1, 0.2, 0.3]}), ta({"weight": [0.3, 0.2, 0.1]}, DELTAS[::-1])
    np.testing.assert_allclose(one, other, rtol=0, atol=2.5e-7)  # one rounding each, at values of up to 3
    assert np.abs(one - ta({"weight": [0.3, 0.2, 0.1]})).max() > 1e-3


def test_identical_models_merge_to_themselves_and_one_model_is_itself():
    phi = THETA + DELTAS[0]
    np.testing.assert_allclose(ta(deltas=np.stack([phi - THETA] * 3)), phi, rtol=0, atol=5e-7)
    np.testing.assert_array_equal(ta(deltas=(phi - THETA)[None]), THETA + (phi - THETA))


def test_without_deltas_or_lambda_the_pivot_stays():
    np.testing.assert_array_equal(ta(deltas=np.zeros_like(DELTAS)), THETA)
    np.testing.assert_array_equal(ta({"lambda": 0.0}), THETA)


def test_the_inputs_are_left_alone():
    theta, deltas = THETA.copy(), DELTAS.copy()
    ta({"weight": 2.0, "normalize": True})
    np.testing.assert_array_equal(theta, THETA)
    np.testing.assert_array_equal(deltas, DELTAS)
