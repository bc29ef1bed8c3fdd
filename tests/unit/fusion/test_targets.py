import pytest
import torch

from llmfusion.fusion.targets import TARGETS, TeacherStats


def stats(entropy, cross_entropy, mask=None, sequence=None, dtype=torch.float64):
    entropy, cross_entropy = (torch.tensor(x, dtype=dtype) for x in (entropy, cross_entropy))
    mask = torch.ones_like(entropy) if mask is None else torch.tensor(mask, dtype=dtype)
    sequence = torch.zeros(len(entropy), dtype=torch.long) if sequence is None else torch.tensor(sequence)
    return TeacherStats(entropy, cross_entropy, mask, sequence)


def random_stats(count=40, teachers=3, masked=0.3):
    generator = torch.Generator().manual_seed(0)
    entropy, cross_entropy = (
        torch.rand(count, teachers, generator=generator) * 3,
        torch.rand(count, teachers, generator=generator) * 6,
    )
    mask = (torch.rand(count, teachers, generator=generator) > masked).float()
    return TeacherStats(entropy, cross_entropy, mask, torch.arange(count) // 7)


def test_kd_and_naive_count_every_usable_teacher_once():
    given = random_stats()
    assert torch.equal(TARGETS["kd"](given, {}), given.mask)
    assert torch.equal(TARGETS["naive"](given, {}), given.mask)
    full = random_stats(masked=0)
    torch.testing.assert_close(
        TARGETS["naive"](full, {"reduction": "mean"}), torch.full((40, 3), 1 / 3, dtype=full.mask.dtype)
    )
    shares = TARGETS["naive"](given, {"reduction": "mean"}).sum(1)
    torch.testing.assert_close(shares, (given.mask.sum(1) > 0).to(shares.dtype))  # over the usable ones


def test_mince_takes_one_teacher_for_a_whole_response_by_its_mean_cross_entropy():
    cross_entropy = [[1.0, 2.0], [5.0, 2.5], [3.0, 9.0], [3.0, 1.0]]  # means: 3 and 2.25; 3 and 5
    weights = TARGETS["mince"](stats([[0.0, 0.0]] * 4, cross_entropy, sequence=[0, 0, 1, 0]), {})
    assert weights.tolist() == [[0, 1], [0, 1], [1, 0], [0, 1]]


def test_mince_by_token_takes_the_lowest_at_each():
    given = random_stats()
    weights = TARGETS["mince"](given, {"granularity": "token"})
    for t in range(40):
        usable = [(float(given.cross_entropy[t, k]), k) for k in range(3) if given.mask[t, k]]
        expected = [0.0] * 3
        if usable:
            expected[min(usable)[1]] = 1.0
        assert weights[t].tolist() == expected


def test_mince_compares_means_over_usable_tokens_only():
    given = random_stats()
    weights = TARGETS["mince"](given, {})
    for sequence in range(int(given.sequence.max()) + 1):
        tokens = [t for t in range(40) if given.sequence[t] == sequence]
        means = []
        for k in range(3):
            costs = [float(given.cross_entropy[t, k]) for t in tokens if given.mask[t, k]]
            means.append(sum(costs) / len(costs) if costs else float("inf"))
        best = means.index(min(means))
        for t in tokens:
            assert weights[t].tolist() == [float(k == best and given.mask[t, k] == 1) for k in range(3)]


@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_mince_gives_a_tie_to_the_teacher_named_first_and_never_a_masked_one(granularity):
    options = {"granularity": granularity}
    assert TARGETS["mince"](stats([[0, 0, 0]], [[2.0, 1.0, 1.0]]), options).tolist() == [[0, 1, 0]]
    assert TARGETS["mince"](stats([[0, 0, 0]], [[0.5, 1.0, 1.0]], [[0, 1, 1]]), options).tolist() == [[0, 1, 0]]
    assert TARGETS["mince"](stats([[0, 0]], [[1.0, 2.0]], [[0, 0]]), options).tolist() == [[0, 0]]


def test_udf_is_the_inverse_of_entropy_plus_cross_entropy_normalised_over_usable_teachers():
    given = random_stats()
    weights = TARGETS["udf"](given, {"epsilon": 0.01})
    for t in range(40):
        scores = [
            float(given.mask[t, k]) / (float(given.entropy[t, k]) + float(given.cross_entropy[t, k]) + 0.01)
            for k in range(3)
        ]
        expected = [score / sum(scores) if sum(scores) else 0.0 for score in scores]
        assert weights[t].tolist() == pytest.approx(expected, abs=1e-6)


def test_udf_sums_to_one_where_a_teacher_is_usable_and_to_zero_elsewhere():
    given = random_stats(masked=0.7)
    sums, usable = TARGETS["udf"](given, {}).sum(1), given.mask.sum(1) > 0
    assert usable.any()
    assert not usable.all()
    torch.testing.assert_close(sums, usable.float())


def test_udf_is_uniform_for_equal_teachers():
    same = random_stats(teachers=1, masked=0)
    repeated = TeacherStats(
        same.entropy.repeat(1, 4), same.cross_entropy.repeat(1, 4), same.mask.repeat(1, 4), same.sequence
    )
    torch.testing.assert_close(TARGETS["udf"](repeated, {}), torch.full((40, 4), 0.25))


def test_udf_stays_finite_where_a_teacher_is_certain():
    weights = TARGETS["udf"](stats([[0.0, 1.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]], dtype=torch.float32), {})
    assert weights[0].tolist() == pytest.approx([1.0, 5e-7], abs=1e-6)
    assert 4e-7 < weights[0, 1] < 6e-7
    assert weights[1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("name", TARGETS)
def test_no_target_gives_negative_weights_or_weight_to_a_masked_teacher(name):
    given = random_stats()
    weights = TARGETS[name](given, {})
    assert torch.isfinite(weights).all()
    assert (weights >= 0).all()
    assert (weights[given.mask == 0] == 0).all()
