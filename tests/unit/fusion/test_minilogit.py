import math

import pytest
import torch

from llmfusion.fusion.fused_loss import fused_loss
from llmfusion.fusion.targets.minilogit import MinilogitDistribution, relative_minimum

N, D, V = 23, 5, 8


def minilogit_loss(hidden, head, bias, labels, teachers, fusion_weight=0.5, temperature=1.0):
    """The loss as the objective takes it: the ensemble is the one teacher, weighted by its mask."""
    ensemble = MinilogitDistribution(teachers, labels)
    return fused_loss(
        hidden, head, bias, labels, [ensemble], ensemble.mask[:, None], fusion_weight, temperature
    ), ensemble


class Teacher:
    """Random logits; ``unknown`` tokens have no probability, ``masked`` rows are not usable."""

    is_own_entropy = False

    def __init__(self, seed, unknown=(), masked=()):
        self.logits = torch.randn(N, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
        self.logits[:, list(unknown)] = -torch.inf
        self.mask = torch.ones(N, dtype=torch.float64)
        self.mask[list(masked)] = 0
        self.entropy = self.cross_entropy = torch.zeros(N, dtype=torch.float64)
        self.temperatures = set()

    def log_probs(self, rows, temperature):
        self.temperatures.add(temperature)
        return (self.logits[rows] / temperature).log_softmax(-1)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def labels_of(teachers):
    """Labels that every teacher knows."""
    known = torch.stack([t.logits for t in teachers]).isfinite().all(0)
    return torch.multinomial(known.double(), 1, generator=generator())[:, 0]


def target_by_hand(teachers, labels, row, temperature=1.0):
    """The ensemble's probabilities from the definition, from raw logits; None without a usable teacher."""
    label = int(labels[row])
    usable = [t for t in teachers if t.mask[row] > 0 and math.isfinite(t.logits[row, label])]
    if not usable:
        return None
    least = [min(float(t.logits[row, v]) - float(t.logits[row, label]) for t in usable) for v in range(V)]
    exponentials = [math.exp(z / temperature) for z in least]
    return [e / sum(exponentials) for e in exponentials]


def cross_entropy(teacher, labels, row):
    return -float(teacher.log_probs(slice(row, row + 1), 1.0)[0, labels[row]])


def committees():
    plain = [Teacher(1), Teacher(2), Teacher(3)]
    holed = [Teacher(1, masked=(0, 3, 4)), Teacher(2, unknown=(6,), masked=(3, 5)), Teacher(3, masked=(3, 4, 9))]
    return {"one": [Teacher(1)], "three": plain, "masked": holed}


@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("name", committees())
def test_the_target_is_that_of_the_definition(name, temperature):
    teachers = committees()[name]
    labels = labels_of(teachers)
    rows = MinilogitDistribution(teachers, labels, chunk=5)
    probabilities = rows.log_probs(slice(0, N), temperature).exp()
    for row in range(N):
        expected = target_by_hand(teachers, labels, row, temperature)
        assert rows.mask[row] == (expected is not None)
        if expected is not None:
            assert probabilities[row].tolist() == pytest.approx(expected, rel=1e-12)
            assert rows.cross_entropy[row].item() == pytest.approx(
                -math.log(target_by_hand(teachers, labels, row)[labels[row]])
            )
            entropy = -sum(p * math.log(p) for p in target_by_hand(teachers, labels, row) if p > 0)
            assert rows.entropy[row].item() == pytest.approx(entropy)
    assert teachers[0].temperatures <= {1.0}


@pytest.mark.parametrize("name", committees())
def test_the_labels_logit_is_zero_and_the_cross_entropy_at_most_the_best_teachers(name):
    teachers = committees()[name]
    labels = labels_of(teachers)
    z, _ = relative_minimum(
        [t.log_probs(slice(0, N), 1.0) for t in teachers], labels, torch.stack([t.mask for t in teachers], 1)
    )
    assert (z.gather(1, labels[:, None]) == 0).all()
    rows = MinilogitDistribution(teachers, labels)
    below = 0
    for row in range(N):
        costs = [cross_entropy(t, labels, row) for t in teachers if t.mask[row] > 0]
        if costs:
            assert rows.cross_entropy[row] <= min(costs) + 1e-12
            below += bool(rows.cross_entropy[row] < min(costs) - 1e-3)
    assert (below > N / 2) == (len(teachers) > 1)


def test_a_case_worked_by_hand():
    teachers = [Teacher(0), Teacher(0)]
    for teacher, probabilities in zip(teachers, ([0.25, 0.25, 0.5], [0.2, 0.6, 0.2]), strict=True):
        teacher.logits = torch.tensor([probabilities + [0.0] * (V - 3)] * N, dtype=torch.float64).log()
    rows = MinilogitDistribution(teachers, torch.zeros(N, dtype=torch.long))
    # relative to the label: (1, 1, 2) and (1, 3, 1); the minimum is (1, 1, 1)
    assert rows.log_probs(slice(0, 1), 1.0).exp()[0].tolist() == pytest.approx([1 / 3] * 3 + [0] * (V - 3))
    assert rows.cross_entropy[0].item() == pytest.approx(math.log(3))  # the teachers': log 4 and log 5
    assert rows.entropy[0].item() == pytest.approx(math.log(3))
    assert rows.share[0].tolist() == pytest.approx([6 / 7, 1 / 7])  # the first has the lower token 1, and all ties


def test_one_teacher_is_its_own_minimum():
    teacher = Teacher(1)
    rows = MinilogitDistribution([teacher], labels_of([teacher]))
    for temperature in (1.0, 2.0):
        torch.testing.assert_close(
            rows.log_probs(slice(2, 9), temperature), teacher.log_probs(slice(2, 9), temperature)
        )


def test_a_teacher_to_which_the_label_is_impossible_is_not_usable():
    whole, limited = Teacher(1), Teacher(2, unknown=(6,))
    labels = torch.full((N,), 6)
    torch.testing.assert_close(
        MinilogitDistribution([whole, limited], labels).log_probs(slice(0, N), 1.0), whole.log_probs(slice(0, N), 1.0)
    )
    alone = MinilogitDistribution([limited], labels)
    assert not alone.mask.any()
    assert (alone.cross_entropy == 0).all()
    assert torch.isfinite(alone.log_probs(slice(0, N), 1.0)).all()


def test_the_order_of_teachers_changes_only_their_shares():
    teachers = committees()["masked"]
    labels = labels_of(teachers)
    one, other = MinilogitDistribution(teachers, labels), MinilogitDistribution(teachers[::-1], labels)
    assert torch.equal(one.log_probs(slice(0, N), 1.0), other.log_probs(slice(0, N), 1.0))
    torch.testing.assert_close(one.share, other.share.flip(1))
    torch.testing.assert_close(one.share.sum(1), one.mask)


def student(seed=5):
    hidden, head, bias = (
        torch.randn(*shape, generator=generator(seed + i), dtype=torch.float64)
        for i, shape in enumerate([(N, D), (V, D), (V,)])
    )
    return hidden.requires_grad_(), head.requires_grad_(), bias.requires_grad_()


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_the_loss_is_that_of_the_definition_and_rows_without_a_teacher_carry_sft_only(temperature):
    teachers, fusion_weight = committees()["masked"], 0.3
    labels = labels_of(teachers)
    hidden, head, bias = student()
    found, rows = minilogit_loss(hidden, head, bias, labels, teachers, fusion_weight, temperature)
    logits = (hidden @ head.T + bias).detach()
    sft, kl = 0.0, 0.0
    for row in range(N):
        sft -= float(logits[row].log_softmax(-1)[labels[row]])
        target = target_by_hand(teachers, labels, row, temperature)
        log_p = (logits[row] / temperature).log_softmax(-1).tolist()
        kl += 0 if target is None else sum(q * (math.log(q) - log_p[v]) for v, q in enumerate(target) if q > 0)
    assert found.sft.item() == pytest.approx(sft, rel=1e-5)  # the loss itself is in float32
    assert found.fusion.item() == pytest.approx(kl, rel=1e-5)
    assert found.loss.item() == pytest.approx((1 - fusion_weight) * sft + fusion_weight * kl, rel=1e-5)
    found.loss.backward()
    p = logits[3].softmax(-1)
    p[labels[3]] -= 1
    torch.testing.assert_close(hidden.grad[3], (1 - fusion_weight) * p @ head.detach(), rtol=1e-5, atol=1e-6)
    assert rows.mask[3] == 0
    assert rows.mask.sum() == N - 1


def test_two_halves_sum_to_the_whole():
    teachers = committees()["masked"]
    labels = labels_of(teachers)

    class Part:
        def __init__(self, teacher, rows):
            self.teacher, self.first, self.mask = teacher, rows.start, teacher.mask[rows]

        def log_probs(self, rows, temperature):
            return self.teacher.log_probs(torch.arange(self.first, self.first + len(self.mask))[rows], temperature)

    hidden, head, bias = student()
    whole = minilogit_loss(hidden, head, bias, labels, teachers)[0].loss
    halves = [
        minilogit_loss(hidden[rows], head, bias, labels[rows], [Part(t, rows) for t in teachers])[0].loss
        for rows in (slice(0, 9), slice(9, N))
    ]
    assert sum(half.item() for half in halves) == pytest.approx(whole.item(), rel=1e-6)


def test_no_gradient_reaches_the_teachers():
    teachers = [Teacher(1), Teacher(2)]
    for teacher in teachers:
        teacher.logits.requires_grad_()
    hidden, head, bias = student()
    minilogit_loss(hidden, head, bias, labels_of(teachers), teachers)[0].loss.backward()
    assert all(teacher.logits.grad is None for teacher in teachers)
    assert hidden.grad is not None
