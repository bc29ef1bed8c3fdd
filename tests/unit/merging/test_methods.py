"""TA, TIES, SCE and RSAF against hand-worked cases, plain references, mergekit's semantics, and identities."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmfusion.errors import UserError
from llmfusion.merging.arrays import merge_arrays
from llmfusion.merging.blocks import BLOCK, PivotDeltas
from llmfusion.merging.rate_of_change import Moments
from llmfusion.merging.selection import select
from llmfusion.study.merge_methods import method_names

RNG = np.random.default_rng(0)


def some(models: int = 3, n: int = 501, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    return rng.normal(0, 0.02, n).astype(np.float32), rng.normal(0, 1e-3, (models, n)).astype(np.float32)


def merged(name: str, theta: np.ndarray, deltas: np.ndarray, options: dict | None = None) -> np.ndarray:
    out, _ = merge_arrays(name, theta, list(deltas), options, deltas=True)
    assert out.dtype == np.float32
    return out


def notes(name: str, theta: np.ndarray, deltas: np.ndarray, options: dict | None = None) -> dict[str, float]:
    return merge_arrays(name, theta, list(deltas), options, deltas=True)[1]


# ------------------------------------------------------------------------------------------------ by hand
def test_ta_by_hand() -> None:
    theta, deltas = np.array([1, 1], np.float32), np.array([[1, 2], [3, -2]], np.float32)
    assert merged("ta", theta, deltas).tolist() == [3, 1]  # the mean
    assert merged("ta", theta, deltas, {"weight": [1.0, 0.5], "lambda": 2.0}).tolist() == [6, 3]
    assert merged("ta", theta, deltas, {"weight": [3.0, 1.0], "normalize": True}).tolist() == [2.5, 2]
    with pytest.raises(UserError, match=r"weight: .* sum 0"):
        merged("ta", theta, deltas, {"weight": [1.0, -1.0], "normalize": True})


def test_ties_by_hand() -> None:
    theta = np.zeros(4, np.float32)
    deltas = np.array([[4, -3, 1, 0.5], [-1, -5, 2, 4]], np.float32)
    # half of each: [4 -3 . .] and [. -5 . 4]; signs + - . +; means 4, (-3 - 5)/2, 0, 4
    assert merged("ties", theta, deltas, {"density": 0.5}).tolist() == [4, -4, 0, 4]
    # without the division the agreeing ones are summed
    assert merged("ties", theta, deltas, {"density": 0.5, "normalize": False}).tolist() == [4, -8, 0, 4]
    # all kept: signs of the sums 3, -8, 3, 4.5; the minority -1 is erased
    assert merged("ties", theta, deltas, {"density": 1.0}).tolist() == [4, -4, 1.5, 2.25]
    # a tensor too small for its density keeps one value
    assert merged("ties", np.zeros(2, np.float32), np.array([[1, -3]], np.float32), {"density": 0.1}).tolist() == [
        0,
        -3,
    ]


def test_sce_by_hand() -> None:
    theta = np.zeros(4, np.float32)
    deltas = np.array([[3, 1, 0, 2], [1, 1, 0, -4]], np.float32)
    # variances 1, 0, 0, 9: of two that are not 0 the half is one, the last; eta = 4/20, 16/20
    stats = notes("sce", theta, deltas, {"tau": 0.5})
    assert (stats["k"], stats["eta_0"], stats["eta_1"]) == pytest.approx((1, 0.2, 0.8))
    assert stats["threshold"] == pytest.approx(3)  # the standard deviation of 2 and -4
    # disjoint over all values: 0.2*3 + 0.8*1; 1; 0; the elected sign is -: -4
    np.testing.assert_allclose(merged("sce", theta, deltas, {"tau": 0.5}), [1.4, 1, 0, -4], rtol=1e-6)
    np.testing.assert_allclose(
        merged("sce", theta, deltas, {"tau": 0.5, "select_scope": "values", "normalize": "none"}),
        [0, 0, 0, -3.2],
        rtol=1e-6,
    )
    # tau 1 selects all, also where the models agree: eta = 14/31, 18/32
    everything = merged("sce", theta, deltas, {"tau": 1.0, "select_scope": "values", "normalize": "none"})
    np.testing.assert_allclose(everything, [(3 * 14 + 18) / 32, 1, 0, -4 * 18 / 32], rtol=1e-6)


def test_rsaf_by_hand() -> None:
    theta = np.array([1, 1, 1, 1], np.float32)
    deltas = np.array([[8, 0, 0, 0], [0, 1, 1, 1]], np.float32)
    # rates 8 0 0 0: S = (n-2)/sqrt(n-1) = 2/sqrt(3); rates 0 1 1 1: S = -2/sqrt(3)
    stats = notes("rsaf", theta, deltas, {"tau": 0.3, "eps": 1e-300})
    skew = 2 / math.sqrt(3)
    assert (stats["S_0"], stats["S_1"]) == pytest.approx((skew, -skew), abs=1e-12)
    assert (stats["K_0"], stats["K_1"]) == pytest.approx((0.3 / (1 + skew), 0.3 * (1 + skew)))
    assert (stats["k_0"], stats["k_1"]) == (1, 3)  # ceil(0.14 4) and ceil(0.646 4)
    assert (stats["eta_0"], stats["eta_1"]) == pytest.approx((64 / 67, 3 / 67))
    np.testing.assert_allclose(
        merged("rsaf", theta, deltas, {"tau": 0.3}), [9, 2, 2, 2]
    )  # each stands alone where it is not 0
    np.testing.assert_allclose(
        merged("rsaf_literal", theta, deltas, {"tau": 0.3}), 1 + np.array([8 * 64, 3, 3, 3]) / 67, rtol=1e-6
    )


# -------------------------------------------------------------------------------- a plain float64 reference
def top(values: np.ndarray, k: int) -> np.ndarray:
    """The k largest, of equal ones the first: sorted, in plain Python."""
    mask = np.zeros(values.size, bool)
    mask[np.argsort(-values, kind="stable")[:k]] = True
    return mask


def two_pass_skewness(rates: np.ndarray) -> float:
    centred = rates - math.fsum(rates) / rates.size
    variance = math.fsum(centred**2) / rates.size
    return math.fsum(centred**3) / rates.size / variance**1.5 if variance > 0 else 0.0


def reference(
    name: str, theta: np.ndarray, deltas: np.ndarray, options: dict, numbers: list[int] | None = None
) -> np.ndarray:
    """What a method must give, bit for bit given the numbers of selected values: masks from sorting, coefficients in
    float64, the merge in float32."""
    count, n = deltas.shape
    wide = deltas.astype(np.float64)
    one = np.float32(1)
    weights = np.broadcast_to(np.float32(options.get("weight", 1 / count if name == "ta" else 1.0)), (count,))
    if name == "ta":
        total = np.zeros(n, np.float32)
        for w, d in zip(weights, deltas, strict=True):
            total += w * d
        return theta + np.float32(options.get("lambda", 1.0)) * total
    votes, divide, used = np.ones(count, np.float32), options.get("normalize", "disjoint") in ("disjoint", True), deltas
    if name == "ties":
        votes, divide = weights, options.get("normalize", True)
        used = np.stack(
            [np.where(top(np.abs(d), max(1, int(options.get("density", 0.6) * n))), d, 0) for d in deltas]
        ).astype(np.float32)
    else:
        if name == "sce":
            spread = np.sqrt(((count * wide - wide.sum(0)) ** 2).sum(0)).astype(np.float32)
            k = int(options.get("tau", 0.1) * np.count_nonzero(spread))
            masks = np.broadcast_to(
                top(spread, k) if options.get("tau", 0.1) < 1 and count > 1 else np.ones(n, bool), deltas.shape
            )
        else:
            rates = np.abs(wide) / (np.abs(theta.astype(np.float64)) + options.get("eps", 1e-8))
            assert numbers is not None
            order = np.abs(deltas) if options.get("select_by") == "delta" else rates.astype(np.float32)
            masks = np.stack([top(o, k) for o, k in zip(order, numbers, strict=True)])
        squares = (np.where(masks, wide, 0) ** 2).sum(1)
        weights = (squares / squares.sum() if squares.sum() > 0 else np.full(count, 1 / count)).astype(np.float32)
        if name == "rsaf_literal" or options.get("select_scope") == "values":
            used = np.where(masks, deltas, np.float32(0))
        divide = divide and name != "rsaf_literal"
    vote, total, share = (np.zeros(n, np.float32) for _ in range(3))
    for v, d in zip(votes, used, strict=True):
        vote += v * d
    for v, w, d in zip(votes, weights, used, strict=True):
        agrees = np.where(vote >= 0, v * d > 0, v * d < 0)
        total += np.where(agrees, w * d, np.float32(0))
        share += np.where(agrees, w, np.float32(0))
    return theta + np.float32(options.get("lambda", 1.0)) * (
        total / np.where(share == 0, one, share) if divide else total
    )


CASES = [
    ("ta", {}),
    ("ta", {"weight": [0.3, 0.5, -0.1], "lambda": 0.7}),
    ("ties", {}),
    ("ties", {"density": 0.2, "weight": [1.0, 0.5, 2.0], "lambda": 0.5}),
    ("ties", {"density": 1.0, "normalize": False}),
    ("sce", {}),
    ("sce", {"tau": 0.5, "select_scope": "values"}),
    ("sce", {"tau": 1.0, "select_scope": "values", "normalize": "none"}),
    ("rsaf", {}),
    ("rsaf", {"eps": 1e-3, "select_scope": "values", "tau": 0.4}),
    ("rsaf", {"select_by": "delta", "normalize": "none"}),
    ("rsaf_literal", {"eps": 1e-2, "tau": 1.0}),
]


def coarse(values: np.ndarray) -> np.ndarray:
    """Values as bfloat16 would leave them: many equal ones."""
    return (values.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(CASES)])
@pytest.mark.parametrize("kind", ["smooth", "ties", "sparse"])
def test_each_method_is_its_plain_reference_bit_for_bit(name: str, options: dict, kind: str) -> None:
    theta, deltas = some(n=2 * BLOCK + 4321)
    if kind == "ties":
        theta, deltas = coarse(theta), coarse(np.round(deltas, 4))
    if kind == "sparse":
        deltas = np.where(np.random.default_rng(1).random(deltas.shape) < 0.97, np.float32(0), deltas)
    out, stats = merge_arrays(name, theta, list(deltas), options, deltas=True)
    numbers = [int(stats[f"k_{j}"]) for j in range(3)] if name.startswith("rsaf") else None
    assert np.array_equal(out.view(np.uint32), reference(name, theta, deltas, options, numbers).view(np.uint32))
    if name.startswith("rsaf"):
        rates = np.abs(deltas.astype(np.float64)) / (np.abs(theta.astype(np.float64)) + options.get("eps", 1e-8))
        for j, row in enumerate(rates):
            assert stats[f"S_{j}"] == pytest.approx(two_pass_skewness(row), rel=1e-9)
            assert stats[f"k_{j}"] == min(math.ceil(stats[f"K_{j}"] * row.size), np.count_nonzero(deltas[j]))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 300),
    st.integers(1, 4),
    st.integers(0, 2**32 - 1),
    st.sampled_from(CASES[:1] + CASES[2:3] + CASES[4:]),
    st.sampled_from([0, 1, 3]),
)
def test_small_tensors_of_any_size_and_number_of_models_are_their_reference(
    n: int, models: int, seed: int, case: tuple, digits: int
) -> None:
    name, options = case
    theta, deltas = some(models, n, seed)
    if digits:
        deltas = np.round(deltas * 1000, digits - 1).astype(np.float32) / np.float32(
            1024
        )  # few different values, zeros among them
    out, stats = merge_arrays(name, theta, list(deltas), options, deltas=True)
    numbers = [int(stats[f"k_{j}"]) for j in range(models)] if name.startswith("rsaf") else None
    assert np.array_equal(out.view(np.uint32), reference(name, theta, deltas, options, numbers).view(np.uint32))


# -------------------------------------------------------------------------------- mergekit's published semantics
def mergekit(name: str, phi: np.ndarray, theta: np.ndarray, options: dict) -> np.ndarray:
    """task_arithmetic, ties and sce as mergekit defines them, in float64: consensus by sum, +1 for 0, its divisors
    and its clamp."""
    deltas = phi.astype(np.float64) - theta
    if name == "sce":
        variance = deltas.var(0)
        mask = (
            top(variance, int(np.count_nonzero(variance) * options["tau"]))
            if options["tau"] < 1
            else np.ones(theta.size, bool)
        )
        deltas = deltas * mask
        weights = (deltas**2).mean(1)
        assert weights.sum() >= 1e-6, "mergekit falls back to equal weights here"
        weights = (weights / weights.sum())[:, None]
        erased = np.sign(deltas) == np.where(deltas.sum(0) >= 0, 1, -1)
        return theta + (deltas * weights * erased).sum(0) / np.maximum((weights * erased).sum(0), 1e-6)
    if name == "ties":
        keep = int(options["density"] * theta.size)
        deltas = np.stack([np.where(top(np.abs(d), keep), d, 0) for d in deltas]) if options["density"] < 1 else deltas
    weights = np.asarray(options["weight"], np.float64)[:, None]
    weighted, mask = weights * deltas, np.ones(deltas.shape)
    if name == "ties":
        mask = np.sign(weighted) == np.where(weighted.sum(0) >= 0, 1, -1)
    total, divisor = (weighted * mask).sum(0), (weights * mask).sum(0)
    return theta + options.get("lambda", 1.0) * (
        total / np.where(np.abs(divisor) < 1e-8, 1, divisor) if options["normalize"] else total
    )


KIT = [("ta", {"normalize": n, "weight": [0.3, 0.5, 0.9], "lambda": 0.8}) for n in (False, True)]
KIT += [
    ("ties", {"normalize": n, "density": d, "weight": [0.3, 0.5, 0.9]})
    for n in (False, True)
    for d in (0.1, 0.35, 0.6, 1.0)
]
KIT += [("sce", {"tau": t, "select_scope": "values", "normalize": "disjoint"}) for t in (0.05, 0.1, 0.5, 1.0)]


@pytest.mark.parametrize(("name", "options"), KIT, ids=str)
def test_what_mergekit_gives(name: str, options: dict) -> None:
    rng = np.random.default_rng(3)
    theta = rng.normal(0, 0.5, 3001).astype(np.float32)
    phi = theta + rng.normal(0, 0.1, (3, 3001)).astype(np.float32)
    out, _ = merge_arrays(name, theta, list(phi), options)
    np.testing.assert_allclose(out, mergekit(name, phi, theta, options), rtol=0, atol=1e-6)


# ------------------------------------------------------------------------------------------------ selection
@pytest.mark.parametrize("k", [0, 1, 2, 3, 4, 5, 6])
def test_a_selection_takes_exactly_k_and_the_lower_index_of_equals(k: int) -> None:
    values = np.array([1.0, 3, 3, 2, 3, 0], np.float32)
    tensor = PivotDeltas(values, [values], deltas=True)
    (chosen,) = select(tensor, lambda block, first_pass: np.abs(block.deltas), [range(1)], lambda selections: [k])
    kept = values + 1  # so that a kept 0 shows
    chosen.zero_unselected(0, values, kept)
    assert (kept > 0).tolist() == top(values, k).tolist()
    assert chosen.squares[0] == pytest.approx((values[top(values, k)] ** 2).sum())
    assert chosen.value == (sorted(values)[-k] if k else math.inf)


def test_ties_across_blocks_are_resolved_by_position() -> None:
    n = 3 * BLOCK + 5
    theta, deltas = np.ones(n, np.float32), np.ones((1, n), np.float32)
    deltas[0, 10::7] = 2.0
    for count in (1, BLOCK // 7, BLOCK, 2 * BLOCK + 3, n - 1):
        out = merged("ties", theta, deltas, {"density": (count + 0.5) / n})
        assert np.array_equal(out > 1, top(deltas[0], count))


# ------------------------------------------------------------------------------------------------ skewness
def skewness(rates: np.ndarray, centre_of: int = BLOCK) -> float:
    moments, ones = Moments(), np.ones(centre_of, np.float32)
    for start in range(0, rates.size, centre_of):
        part = rates[start : start + centre_of].astype(np.float32)
        moments.add(ones[: part.size], part, 0.0, np.empty_like(part))
    return moments.skewness()


def test_skewness_of_one_spike_is_the_largest_there_is_and_of_constants_zero() -> None:
    for n in (2, 10, 1000, 3 * BLOCK):
        for place in (0, n - 1):
            spike = np.zeros(n)
            spike[place] = 1
            assert skewness(spike) == pytest.approx((n - 2) / math.sqrt(n - 1), rel=1e-9, abs=1e-12)
    for constant in (0.0, 0.1, 1e-9, 1e12):
        assert skewness(np.full(1001, constant)) == 0.0
        assert skewness(np.full(2 * BLOCK + 1, constant)) == 0.0
    assert skewness(1 - np.eye(1, 10)[0]) == pytest.approx(-8 / 3)


def test_skewness_of_blocks_unlike_the_first_is_that_of_two_passes() -> None:
    rates = np.abs(RNG.normal(0, 1, 4 * BLOCK)).astype(np.float32)
    rates[BLOCK:] *= np.float32(1e4)
    assert skewness(rates) == pytest.approx(two_pass_skewness(rates.astype(np.float64)), rel=1e-9)


def test_a_long_left_tail_selects_more_but_never_more_than_all() -> None:
    theta = np.ones(1000, np.float32)
    deltas = np.full((1, 1000), 0.5, np.float32)
    deltas[0, 7] = 0.001
    stats = notes("rsaf", theta, deltas, {"tau": 0.5})
    assert stats["S_0"] < -30
    assert stats["K_0"] == 1.0
    assert stats["k_0"] == 1000


def test_the_skewness_of_logarithms_leaves_zeros_out() -> None:
    theta, deltas = some(2, 5000)
    deltas[:, ::3] = 0
    stats = notes("rsaf", theta, deltas, {"rate": "log", "eps": 1e-6})
    for j in range(2):
        used = deltas[j] != 0
        logs = np.log(np.abs(deltas[j][used].astype(np.float64)) / (np.abs(theta[used].astype(np.float64)) + 1e-6))
        assert stats[f"S_{j}"] == pytest.approx(two_pass_skewness(logs), rel=1e-9)
    assert notes("rsaf", theta, deltas * 0, {"rate": "log"})["k_0"] == 0


def test_an_eps_too_small_for_cubes_is_refused_by_name() -> None:
    with pytest.raises(UserError, match="eps: 1e-200 is too small"):
        merged("rsaf", np.zeros(10, np.float32), np.eye(1, 10, dtype=np.float32), {"eps": 1e-200})


# ------------------------------------------------------------------------------------------------ identities
ALL = [
    ("ta", {}),
    ("ties", {"density": 1.0}),
    ("sce", {}),
    ("sce", {"tau": 1.0}),
    ("rsaf", {}),
    ("rsaf", {"select_by": "delta"}),
    ("rsaf", {"rate": "log"}),
]
LITERAL = [("ties", {"density": 0.3}), ("sce", {"select_scope": "values", "normalize": "none"}), ("rsaf_literal", {})]


def test_every_method_of_the_papers_is_held_to_these_identities() -> None:
    """What holds for every registered method, also for one that is added, is in test_plugins.py."""
    assert {name for name, _ in ALL + LITERAL} == {"ta", "ties", "sce", "rsaf", "rsaf_literal"} <= set(method_names())


@pytest.mark.parametrize(("name", "options"), ALL)
def test_identical_models_and_a_single_model_are_returned(name: str, options: dict) -> None:
    theta, deltas = some(1)
    for same in (deltas, np.repeat(deltas, 3, 0)):
        np.testing.assert_allclose(merged(name, theta, same, options), theta + deltas[0], atol=2e-9)


@pytest.mark.parametrize(("name", "options"), ALL + LITERAL)
def test_no_deltas_give_the_pivot(name: str, options: dict) -> None:
    theta, deltas = some()
    assert np.array_equal(merged(name, theta, deltas * 0, options), theta)


@pytest.mark.parametrize(("name", "options"), ALL + LITERAL)
def test_the_order_of_models_does_not_matter(name: str, options: dict) -> None:
    theta, deltas = some()
    np.testing.assert_allclose(
        merged(name, theta, deltas[[2, 0, 1]], options), merged(name, theta, deltas, options), atol=3e-9
    )


@pytest.mark.parametrize(("name", "options"), [*ALL[:4], *LITERAL[:2]])
def test_small_deltas_give_the_same_method(name: str, options: dict) -> None:
    theta, deltas = some()
    zero = np.zeros_like(theta)
    for scale in (
        2.0**-20,
        2.0**-40,
        2.0**-80,
    ):  # powers of two: exact in float32; squares of the last would underflow there
        np.testing.assert_allclose(
            merged(name, zero, deltas * np.float32(scale), options) / scale,
            merged(name, zero, deltas, options),
            rtol=1e-12,
        )


@pytest.mark.parametrize(("name", "options"), [case for case in ALL + LITERAL if case[0].startswith("rsaf")])
def test_pivot_and_deltas_scaled_together_scale_the_merge(name: str, options: dict) -> None:
    theta, deltas = some()
    small = np.float32(2.0**-30)
    scaled = merged(name, theta * small, deltas * small, {**options, "eps": 1e-6 * 2.0**-30})
    np.testing.assert_array_equal(scaled / small, merged(name, theta, deltas, {**options, "eps": 1e-6}))


def test_of_exactly_opposite_deltas_the_positive_wins() -> None:
    theta = np.zeros(2, np.float32)
    deltas = np.array([[1, -2], [-1, 2]], np.float32)
    for name, options in [
        ("ties", {"density": 1.0}),
        ("sce", {"tau": 1.0}),
        ("rsaf", {"tau": 1.0, "select_by": "delta"}),
    ]:
        assert merged(name, theta, deltas, options).tolist() == [1, 2], name


@pytest.mark.parametrize(("name", "options"), ALL + LITERAL)
def test_tensors_of_one_element_and_of_none(name: str, options: dict) -> None:
    one = merged(name, np.ones(1, np.float32), np.full((2, 1), 0.5, np.float32), options)
    assert np.isfinite(one).all()
    assert merged(name, np.ones(0, np.float32), np.ones((2, 0), np.float32), options).shape == (0,)


@pytest.mark.parametrize(("name", "options"), ALL + LITERAL)
def test_the_inputs_are_left_alone_and_the_shape_is_kept(name: str, options: dict) -> None:
    theta, deltas = some(2, 600)
    before = theta.copy(), deltas.copy()
    phi = [(theta + d).reshape(20, 30) for d in deltas]
    out, _ = merge_arrays(name, theta.reshape(20, 30), phi, options)
    assert out.shape == (20, 30)
    assert np.array_equal(theta, before[0])
    assert np.array_equal(deltas, before[1])


def test_bfloat16_and_float16_arrays_are_merged_as_their_values() -> None:
    theta, deltas = some(2)
    half = [np.float16(theta + d) for d in deltas]
    assert np.array_equal(
        merge_arrays("ties", theta, half)[0],
        merge_arrays("ties", theta, [h.astype(np.float32) for h in half])[0],
    )
    short = [coarse(theta + d) for d in deltas]
    bits = [(values.view(np.uint32) >> 16).astype(np.uint16) for values in short]
    assert np.array_equal(merge_arrays("ties", theta, bits)[0], merge_arrays("ties", theta, short)[0])
    assert np.array_equal(merge_arrays("ties", bits[0], bits)[0], merge_arrays("ties", short[0], short)[0])


def test_a_value_that_is_not_finite_is_refused_with_the_array_that_holds_it() -> None:
    theta, deltas = some(2)
    broken = (theta + deltas[1]).copy()
    broken[77] = np.nan
    with pytest.raises(UserError, match="model 1 holds a NaN or an infinity"):
        merge_arrays("ta", theta, [theta + deltas[0], broken])
    with pytest.raises(UserError, match="the difference to a model overflows float32"):
        merge_arrays("ta", np.full(3, 3e38, np.float32), [np.full(3, -3e38, np.float32)])
