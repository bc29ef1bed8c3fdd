"""The weights of every target against the definitions, a target that learns, and what is refused."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from llmfusion.fusion.objective import Objective, StepTokenCounts, build_target
from llmfusion.fusion.student import StudentBatch
from llmfusion.fusion.target import TeacherStats
from llmfusion.fusion.teacher import TeacherOutput
from llmfusion.study.fusion_targets import PACKAGE, load_target, target_class, target_names
from llmfusion.study.plugins import PluginError
from llmfusion.study.schema.training import Training
from tests.unit.fusion.stand_ins import GATE, fusion_options, target_weights


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


# ------------------------------------------------------------------------------------------------------ definitions
def test_kd_and_naive_count_every_usable_teacher_once():
    some = random_stats()
    assert torch.equal(target_weights("kd", some), some.mask)
    assert torch.equal(target_weights("naive", some), some.mask)
    full = random_stats(masked=0)
    torch.testing.assert_close(
        target_weights("naive", full, reduction="mean"), torch.full((40, 3), 1 / 3, dtype=full.mask.dtype)
    )
    shares = target_weights("naive", some, reduction="mean").sum(1)
    torch.testing.assert_close(shares, (some.mask.sum(1) > 0).to(shares.dtype))  # over the usable ones


def test_mince_takes_one_teacher_for_a_whole_response_by_its_mean_cross_entropy():
    cross_entropy = [[1.0, 2.0], [5.0, 2.5], [3.0, 9.0], [3.0, 1.0]]  # means: 3 and 2.25; 3 and 5
    weights = target_weights("mince", stats([[0.0, 0.0]] * 4, cross_entropy, sequence=[0, 0, 1, 0]))
    assert weights.tolist() == [[0, 1], [0, 1], [1, 0], [0, 1]]


def test_mince_by_token_takes_the_lowest_at_each():
    some = random_stats()
    weights = target_weights("mince", some, granularity="token")
    for t in range(40):
        usable = [(float(some.cross_entropy[t, k]), k) for k in range(3) if some.mask[t, k]]
        expected = [0.0] * 3
        if usable:
            expected[min(usable)[1]] = 1.0
        assert weights[t].tolist() == expected


def test_mince_compares_means_over_usable_tokens_only():
    some = random_stats()
    weights = target_weights("mince", some)
    for sequence in range(int(some.sequence.max()) + 1):
        tokens = [t for t in range(40) if some.sequence[t] == sequence]
        means = []
        for k in range(3):
            costs = [float(some.cross_entropy[t, k]) for t in tokens if some.mask[t, k]]
            means.append(sum(costs) / len(costs) if costs else float("inf"))
        best = means.index(min(means))
        for t in tokens:
            assert weights[t].tolist() == [float(k == best and some.mask[t, k] == 1) for k in range(3)]


@pytest.mark.parametrize("granularity", ["sequence", "token"])
def test_mince_gives_a_tie_to_the_teacher_named_first_and_never_a_masked_one(granularity):
    def weights(*arguments):
        return target_weights("mince", stats(*arguments), granularity=granularity).tolist()

    assert weights([[0, 0, 0]], [[2.0, 1.0, 1.0]]) == [[0, 1, 0]]
    assert weights([[0, 0, 0]], [[0.5, 1.0, 1.0]], [[0, 1, 1]]) == [[0, 1, 0]]
    assert weights([[0, 0]], [[1.0, 2.0]], [[0, 0]]) == [[0, 0]]


def test_udf_is_the_inverse_of_entropy_plus_cross_entropy_normalised_over_usable_teachers():
    some = random_stats()
    weights = target_weights("udf", some, epsilon=0.01)
    for t in range(40):
        scores = [
            float(some.mask[t, k]) / (float(some.entropy[t, k]) + float(some.cross_entropy[t, k]) + 0.01)
            for k in range(3)
        ]
        expected = [score / sum(scores) if sum(scores) else 0.0 for score in scores]
        assert weights[t].tolist() == pytest.approx(expected, abs=1e-6)


def test_udf_sums_to_one_where_a_teacher_is_usable_and_to_zero_elsewhere():
    some = random_stats(masked=0.7)
    sums, usable = target_weights("udf", some).sum(1), some.mask.sum(1) > 0
    assert usable.any()
    assert not usable.all()
    torch.testing.assert_close(sums, usable.float())


def test_udf_is_uniform_for_equal_teachers():
    same = random_stats(teachers=1, masked=0)
    repeated = TeacherStats(
        same.entropy.repeat(1, 4), same.cross_entropy.repeat(1, 4), same.mask.repeat(1, 4), same.sequence
    )
    torch.testing.assert_close(target_weights("udf", repeated), torch.full((40, 4), 0.25))


def test_udf_stays_finite_where_a_teacher_is_certain():
    certain = stats([[0.0, 1.0], [0.0, 0.0]], [[0.0, 1.0], [0.0, 0.0]], dtype=torch.float32)
    weights = target_weights("udf", certain)
    assert weights[0].tolist() == pytest.approx([1.0, 5e-7], abs=1e-6)
    assert 4e-7 < weights[0, 1] < 6e-7
    assert weights[1].tolist() == [0.5, 0.5]


# ----------------------------------------------------------------------------------------------------- every target
N, D, V = 40, 5, 8


class Distribution:
    """Random logits, in float64."""

    is_own_entropy = False

    def __init__(self, seed, labels, masked=0.3):
        generator = torch.Generator().manual_seed(seed)
        self.log_q = (torch.randn(N, V, generator=generator, dtype=torch.float64) * 2).log_softmax(-1)
        self.mask = (torch.rand(N, generator=generator) > masked).double()
        self.entropy = -(self.log_q.exp() * self.log_q).sum(-1)
        self.cross_entropy = -self.log_q[torch.arange(N), labels]

    def log_probs(self, rows, temperature):
        return (self.log_q[rows] / temperature).log_softmax(-1)


def student_batch(rows=slice(None), sizes=(7, 13, 20)):
    generator = torch.Generator().manual_seed(9)
    hidden, head = (torch.randn(n, D, generator=generator, dtype=torch.float64) for n in (N, V))
    labels = torch.randint(V, (N,), generator=generator)
    return StudentBatch(hidden[rows], labels[rows], labels[rows], list(sizes), head, head)


class Teacher:
    """A teacher without a cache, at some rows of the batch."""

    def __init__(self, name, distribution):
        self.name = name
        self.whole = distribution

    def projectors(self, student_width):
        return None

    def output(self, batch, student, projectors, temperature):
        some = object.__new__(Distribution)
        for key in ("log_q", "mask", "entropy", "cross_entropy"):
            setattr(some, key, getattr(self.whole, key)[batch])
        return TeacherOutput(some)


def committee(count=3):
    labels = student_batch().labels
    return [Teacher(f"t{seed}", Distribution(seed, labels)) for seed in range(count)]


@pytest.mark.parametrize("name", target_names())
def test_no_target_gives_negative_weights_or_weight_to_a_masked_teacher(name):
    student = student_batch()
    distributions = [teacher.whole for teacher in committee(target_class(name).max_teachers or 3)]
    entropy, cross_entropy, mask = (
        torch.stack([getattr(d, key) for d in distributions], 1) for key in ("entropy", "cross_entropy", "mask")
    )
    target = build_target(fusion_options(name), len(distributions), 8)
    result = target.combine(distributions, student, TeacherStats(entropy, cross_entropy, mask, torch.arange(N) // 7))
    assert result.weights.shape == (N, len(result.distributions))
    assert result.shares.shape == mask.shape
    for weights in (result.weights, result.shares):
        assert torch.isfinite(weights).all()
        assert (weights >= 0).all()
        assert (weights[mask.sum(1) == 0] == 0).all()
    assert (result.shares[mask == 0] == 0).all()
    assert result.shares.sum() > 0


@pytest.mark.parametrize("name", target_names())
def test_every_target_is_a_module_with_the_options_of_its_file(name):
    target = build_target(fusion_options(name), 2, 8)
    assert isinstance(target, torch.nn.Module)
    assert isinstance(target, load_target(name).Target)
    assert isinstance(target.options, load_target(name).Options)
    assert target.options.target == name


TITLES = {
    "kd": "Knowledge fusion",
    "naive": "Unified fusion, naive",
    "minilogit": "Unified fusion, Minilogit",
    "mince": "Unified fusion, MinCE",
    "udf": "Unified fusion, UDF",
}


def test_titles_on_model_cards_and_parameters_are_what_they_were():
    assert {name: target_class(name).title for name in target_names()} == TITLES
    assert not any(list(build_target(fusion_options(name), 2, 8).parameters()) for name in TITLES)


def test_checking_a_study_imports_all_targets_and_no_torch():
    code = (
        "import sys; from llmfusion.study.load import read_study; from llmfusion.study.fusion_targets import *; "
        "print([target_class(name).title for name in target_names()]); "
        "print([m for m in ('torch', 'numpy', 'numba') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == [str([TITLES[name] for name in target_names()]), "[]"]


# --------------------------------------------------------------------------------------------------- one that learns
COUNTS = StepTokenCounts(N, [N] * 3)


def test_weights_and_penalty_give_a_learned_target_the_gradients_of_finite_differences(gate):
    torch.manual_seed(0)
    student = student_batch()
    objective = Objective(gate(target="gate", balance=0.7), committee(), D).double()

    def loss(weight, bias):
        named = {"target.gate.weight": weight, "target.gate.bias": bias}
        return torch.func.functional_call(objective, named, (student, slice(None), COUNTS))[0]

    parameters = [p.detach().clone().requires_grad_() for p in objective.target.parameters()]
    assert torch.autograd.gradcheck(loss, parameters)
    with_penalty = torch.autograd.grad(loss(*parameters), parameters)
    objective.target.options = gate(target="gate", balance=0.0)
    without = torch.autograd.grad(loss(*parameters), parameters)
    for one, other in zip(with_penalty, without, strict=True):
        assert float(other.abs().max()) > 0
        assert not torch.allclose(one, other)


def test_the_penalty_is_inside_the_fusion_term_and_recorded(gate):
    student = student_batch()
    for balance in (0.0, 0.7):
        objective = Objective(gate(target="gate", balance=balance, **{"lambda": 0.3}), committee(), D).double()
        loss, record = objective(student, slice(None), COUNTS)
        assert (record["penalty"] > 0) == (balance > 0)
        expected = 0.7 * record["sft"] + 0.3 * (record["fusion"] + record["penalty"])
        assert loss.item() == pytest.approx(expected, rel=1e-9)
        assert record["loss"] == loss.item()
    assert sum(record["weight"].values()) == pytest.approx(
        float((sum(teacher.whole.mask for teacher in committee()) > 0).double().mean())
    )
    assert "penalty" not in Objective(fusion_options("udf"), committee(), D)(student, slice(None), COUNTS)[1]


def test_micro_batches_change_neither_loss_nor_gradient_of_a_learned_target(gate):
    torch.manual_seed(0)
    objective = Objective(gate(target="gate"), committee(), D).double()
    whole = objective(student_batch(), slice(None), COUNTS)[0]
    cuts = [(slice(0, 7), [7]), (slice(7, N), [13, 20])]
    parts = [objective(student_batch(rows, sizes), rows, COUNTS)[0] for rows, sizes in cuts]
    torch.testing.assert_close(sum(parts), whole)
    parameters = list(objective.target.parameters())
    expected = torch.autograd.grad(whole, parameters)
    torch.testing.assert_close(torch.autograd.grad(sum(parts), parameters), expected)


def test_a_learned_target_trains_at_its_own_rate_and_others_at_none(gate):
    run = Training(mix="m", steps=1, lr=1e-3)
    learned = Objective(gate(target="gate"), committee(), D)
    assert learned.parameter_groups(run) == [{"params": list(learned.target.parameters()), "peak_lr": 0.02}]
    learned.target.learning_rate = None
    assert learned.parameter_groups(run)[0]["peak_lr"] == 1e-3
    assert Objective(fusion_options("udf"), committee(), D).parameter_groups(run) == []
    assert Objective(None, [], D).parameter_groups(run) == []


def test_weights_of_another_shape_are_refused_by_name(add_target):
    add_target("narrow", GATE.replace("gate", "narrow").replace("return weights,", "return weights[:, :1],"))
    objective = Objective(load_target("narrow").Options(target="narrow"), committee(), D).double()
    with pytest.raises(ValueError, match=r"narrow: weights of shape \(40, 1\), expected \(40, 3\)"):
        objective(student_batch(), slice(None), COUNTS)


# -------------------------------------------------------------------------------------------------- broken plug-ins
HEAD = GATE[: GATE.index("class Target")].replace("gate", "broken")
TARGET = """class Target(FusionTarget):
    title = "Broken"

    def forward(self, stats):
        return stats.mask, None
"""
BROKEN = {
    "no docstring": (HEAD[HEAD.index("from __future__") :] + TARGET, "missing: a docstring"),
    "no options": (HEAD.replace("class Options(", "class Choices(") + TARGET, "missing: Options"),
    "no target": (HEAD, "missing: Target"),
    "another name": (
        HEAD.replace('Literal["broken"]', 'Literal["other"]') + TARGET,
        'Options.target: Literal["broken"]',
    ),
    "free options": (HEAD.replace("Options(FusionOptions)", "Options") + TARGET, "class Options(FusionOptions)"),
    "any name": (HEAD.replace('Literal["broken"] =', "str =") + TARGET, 'Options.target: Literal["broken"]'),
    "no base": (HEAD + TARGET.replace("(FusionTarget)", ""), "class Target(FusionTarget)"),
    "a function": (HEAD + "def Target(stats):\n    return stats.mask, None\n", "class Target(FusionTarget)"),
    "no title": (HEAD + TARGET.replace('"Broken"', '" "'), "Target.title"),
    "no computation": (HEAD + TARGET.replace("forward", "weights"), "Target.forward"),
    "no teachers": (HEAD + TARGET + "    min_teachers = 0\n", "1 <= Target.min_teachers <= max_teachers"),
    "fewer than it needs": (HEAD + TARGET + "    max_teachers = 1\n", "which are 2 and 1"),
    "no number": (HEAD + TARGET + '    min_teachers = "2"\n', "whole numbers for Target.min_teachers"),
    "own arguments": (HEAD + TARGET + "    def __init__(self, options):\n        pass\n", "Target.__init__"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_plug_in_is_refused_with_its_file_and_what_it_lacks(add_target, tmp_path, name):
    text, message = BROKEN[name]
    add_target("broken", text)
    with pytest.raises(PluginError) as refused:
        load_target("broken")
    assert str(tmp_path / "broken.py") in str(refused.value)
    assert message in str(refused.value)


def test_the_check_of_a_study_refuses_a_broken_plug_in_before_any_job(tmp_path):
    """In a process of its own: the file stands among the targets from the start."""
    (tmp_path / "broken.py").write_text(HEAD + TARGET.replace('"Broken"', '""'))
    code = f"import {PACKAGE} as targets; targets.__path__.append({str(tmp_path)!r}); import llmfusion.study.load"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith(
        "the fusion target broken needs: Target.title, which model cards print"
    )
    assert str(Path(tmp_path / "broken.py")) in done.stderr
