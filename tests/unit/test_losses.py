import numpy as np
import pytest
import torch

from llmfusion.fusion.divergences import DIVERGENCES
from llmfusion.fusion.losses import fused_loss

N, D, V = 11, 6, 13


class Teacher:
    """A teacher that knows its logits; ``unknown`` tokens and ``absent`` rows have no probability."""

    def __init__(self, seed, unknown=(), absent=()):
        self.logits = np.random.default_rng(seed).normal(size=(N, V)) * 2
        self.logits[:, list(unknown)] = -np.inf
        self.absent = list(absent)

    def probabilities(self, temperature):
        q = np.exp(self.logits / temperature)
        q /= q.sum(1, keepdims=True)
        q[self.absent] = 0
        return q

    def log_probs(self, rows, temperature):
        with np.errstate(divide="ignore"):
            return torch.tensor(np.log(self.probabilities(temperature)), dtype=torch.float32)[rows]


class Exact(Teacher):
    """The same in float64."""

    def log_probs(self, rows, temperature):
        with np.errstate(divide="ignore"):
            return torch.tensor(np.log(self.probabilities(temperature)))[rows]


def problem(teachers, seed=0):
    random = np.random.default_rng(seed)
    hidden, head, bias = random.normal(size=(N, D)), random.normal(size=(V, D)), random.normal(size=V)
    weights = random.uniform(size=(N, teachers))
    return hidden, head, bias, random.integers(V, size=N), weights


def by_hand(hidden, head, bias, labels, teachers, weights, lam, temperature):
    """Value, its gradient to the logits, and X, all in float64 from the definitions."""
    z = hidden @ head.T + bias
    p1, p = (np.exp(z / t) / np.exp(z / t).sum(1, keepdims=True) for t in (1.0, temperature))
    sft = -np.log(p1[np.arange(N), labels]).sum()
    value, gradient = (1 - lam) * sft, (1 - lam) * (p1 - np.eye(V)[labels])
    crosses = []
    for k, teacher in enumerate(teachers):
        q = teacher.probabilities(temperature)
        known = q > 0
        kl = np.where(known, q * (np.log(np.where(known, q, 1)) - np.log(p)), 0).sum(1)
        value += lam * (weights[:, k] * kl).sum()
        gradient += lam / temperature * weights[:, k, None] * (q.sum(1, keepdims=True) * p - q)
        crosses.append(-(q * np.log(p)).sum(1))
    return value, sft, gradient, np.stack(crosses, 1) if crosses else np.zeros((N, 0))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_value_gradient_and_cross_entropies_are_those_of_the_definition(count, lam, temperature):
    teachers = [Teacher(seed, unknown=(2, 5) if seed == 1 else ()) for seed in range(count)]
    hidden, head, bias, labels, weights = problem(count)
    value, sft, gradient, crosses = by_hand(hidden, head, bias, labels, teachers, weights, lam, temperature)
    h, w, b = (torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in (hidden, head, bias))
    found = fused_loss(h, w, b, torch.tensor(labels), teachers, torch.tensor(weights, dtype=torch.float32), lam, temperature)
    found.loss.backward()
    assert found.loss.item() == pytest.approx(value, rel=2e-6)
    assert found.sft.item() == pytest.approx(sft, rel=2e-6)
    for leaf, expected in ((h, gradient @ head), (w, gradient.T @ hidden), (b, gradient.sum(0))):
        np.testing.assert_allclose(leaf.grad.numpy(), expected, rtol=0, atol=2e-5)
    np.testing.assert_allclose(found.cross_entropy.numpy(), crosses, rtol=2e-6)
    assert not any(t.requires_grad for t in (found.sft, found.fusion, found.cross_entropy))


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("chunk", [1, 7, N])
@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_any_chunks_give_value_and_gradients_of_the_full_logits(count, chunk, divergence):
    """Against autograd through the (N, V) logits, in float64, for all four inputs; two rows are ignored, one token unknown to a teacher."""
    teachers = [Exact(seed, unknown=(3,) if seed == 1 else ()) for seed in range(count)]
    hidden, head, bias, labels, weights = (torch.tensor(x) for x in problem(count))
    labels[[2, 9]] = -100
    leaves = [x.clone().requires_grad_() for x in (hidden, head, bias, weights)]
    found = fused_loss(*leaves[:3], labels, teachers, leaves[3], 0.4, 1.7, DIVERGENCES[divergence], chunk)
    ours = torch.autograd.grad(found.loss * 3, leaves)
    h, w, b, k = leaves
    kept = labels >= 0
    log_p = (h @ w.T + b).log_softmax(-1)
    soft = ((h @ w.T + b) / 1.7).log_softmax(-1)
    terms = [k[:, i] * DIVERGENCES[divergence](t.log_probs(slice(None), 1.7), soft) for i, t in enumerate(teachers)]
    expected = 0.6 * torch.nn.functional.nll_loss(log_p[kept], labels[kept], reduction="sum") + 0.4 * sum(t[kept].sum() for t in terms)
    torch.testing.assert_close(found.loss, expected)
    for mine, theirs in zip(ours, torch.autograd.grad(expected * 3, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert (found.cross_entropy[[2, 9]] == 0).all()


@pytest.mark.parametrize("count", [0, 2])
def test_gradients_are_those_of_finite_differences(count):
    teachers = [Exact(seed) for seed in range(count)]
    hidden, head, bias, labels, weights = (torch.tensor(x) for x in problem(count))
    leaves = [x.requires_grad_() for x in (hidden, head, bias, *([weights] if count else []))]
    assert torch.autograd.gradcheck(lambda h, w, b, *k: fused_loss(h, w, b, torch.as_tensor(labels), teachers, *(k or [None]), 0.4, 2.0, chunk=4).loss, leaves)


def test_inputs_that_need_no_gradient_get_none():
    hidden, head, bias, labels, weights = (torch.tensor(x) for x in problem(1))
    hidden.requires_grad_()
    fused_loss(hidden, head, bias, labels, [Exact(1)], weights, 0.5).loss.backward()
    assert hidden.grad is not None
    assert head.grad is bias.grad is weights.grad is None
    assert not fused_loss(hidden.detach(), head, bias, labels, [Exact(1)], weights, 0.5).loss.requires_grad


def test_the_parts_add_up():
    teachers = [Teacher(1), Teacher(2)]
    hidden, head, bias, labels, weights = (torch.tensor(x) for x in problem(2))
    found = fused_loss(hidden.float(), head.float(), bias.float(), labels, teachers, weights.float(), 0.3)
    assert found.loss.item() == pytest.approx(0.7 * found.sft.item() + 0.3 * found.fusion.item(), rel=1e-6)


def test_rows_without_any_teacher_probability_and_weight_add_nothing():
    whole, holed = Teacher(1), Teacher(1, absent=(0, 4))
    hidden, head, bias, labels, weights = problem(1)
    weights[[0, 4]] = 0
    results = []
    for teacher in (whole, holed):
        h = torch.tensor(hidden, dtype=torch.float32, requires_grad=True)
        found = fused_loss(h, torch.tensor(head).float(), torch.tensor(bias).float(), torch.tensor(labels), [teacher], torch.tensor(weights).float(), 0.5)
        found.loss.backward()
        results.append((found.loss, h.grad))
    torch.testing.assert_close(results[0], results[1])
    assert torch.isfinite(results[1][1]).all()


def test_a_teacher_equal_to_the_student_leaves_sft_alone():
    hidden, head, bias, labels, weights = problem(1)
    teacher = Teacher(0)
    teacher.logits = hidden @ head.T + bias
    arguments = (torch.tensor(hidden).float(), torch.tensor(head).float(), torch.tensor(bias).float(), torch.tensor(labels))
    found = fused_loss(*arguments, [teacher], torch.tensor(weights).float(), 0.5, 2.0)
    assert found.fusion.item() == pytest.approx(0, abs=1e-5)
    assert found.loss.item() == pytest.approx(0.5 * found.sft.item(), rel=1e-5)
