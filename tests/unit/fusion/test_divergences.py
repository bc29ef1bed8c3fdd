import math

import pytest
import torch

from llmfusion.fusion.divergences import DIVERGENCES, forward_kl, js, reverse_kl
from llmfusion.fusion.fused_loss import fused_loss

C, V = 7, 9


def log_probabilities(seed, unknown=()):
    logits = torch.randn(C, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2
    logits[:, list(unknown)] = -torch.inf
    return logits.log_softmax(-1)


def by_hand(name, log_q, log_p):
    """From the definitions, a row and a token at a time.

    The student is restricted to what the teacher knows, but for the forward KL.
    """
    out = []
    for row in range(C):
        q, p = ([math.exp(x) for x in side[row].tolist()] for side in (log_q, log_p))
        known = [v for v in range(V) if q[v] > 0]
        mass = sum(p[v] for v in known)
        if name == "forward_kl":
            out.append(sum(q[v] * math.log(q[v] / p[v]) for v in known))
        elif name == "reverse_kl":
            out.append(sum(p[v] / mass * math.log(p[v] / mass / q[v]) for v in known))
        else:
            middle = {v: (q[v] + p[v] / mass) / 2 for v in known}
            left = sum(q[v] * math.log(q[v] / middle[v]) for v in known)
            out.append((left + sum(p[v] / mass * math.log(p[v] / mass / middle[v]) for v in known)) / 2)
    return out


@pytest.mark.parametrize("unknown", [(), (2, 5), (0, 1, 2, 3, 4, 5, 6, 7)])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_value_is_that_of_the_definition(name, unknown):
    log_q, log_p = log_probabilities(0, unknown), log_probabilities(1)
    assert DIVERGENCES[name](log_q, log_p).tolist() == pytest.approx(by_hand(name, log_q, log_p), rel=1e-12, abs=1e-14)


@pytest.mark.parametrize("unknown", [(), (2, 5)])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_gradient_is_that_of_finite_differences(name, unknown):
    log_q = log_probabilities(0, unknown)
    logits = log_probabilities(1).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: DIVERGENCES[name](log_q, z.log_softmax(-1)), logits)
    assert torch.autograd.gradcheck(lambda log_p: DIVERGENCES[name](log_q, log_p), logits)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_it_is_zero_between_equals_and_positive_otherwise(name):
    log_q, log_p = log_probabilities(0), log_probabilities(1)
    assert DIVERGENCES[name](log_q, log_q).tolist() == pytest.approx([0] * C, abs=1e-14)
    assert (DIVERGENCES[name](log_q, log_p) > 0).all()


def test_the_two_directions_mirror_each_other_and_js_has_its_bounds():
    log_q, log_p = log_probabilities(0), log_probabilities(1)
    torch.testing.assert_close(reverse_kl(log_q, log_p), forward_kl(log_p, log_q))
    torch.testing.assert_close(js(log_q, log_p), js(log_p, log_q))
    distant = torch.tensor([[0.0, -800.0]]), torch.tensor([[-800.0, 0.0]])
    assert js(*distant).item() == pytest.approx(math.log(2), rel=1e-6)


def test_a_case_worked_by_hand():
    log_q, log_p = (torch.tensor([row], dtype=torch.float64).log() for row in ([0.5, 0.5, 0.0], [0.25, 0.25, 0.5]))
    assert forward_kl(log_q, log_p).item() == pytest.approx(
        math.log(2)
    )  # half the student's mass is lost on the third token
    assert reverse_kl(log_q, log_p).item() == pytest.approx(0)  # over the first two they agree
    assert js(log_q, log_p).item() == pytest.approx(0)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_unknown_tokens_and_rows_without_any_leave_values_and_gradients_finite(name):
    log_q = log_probabilities(0, (2, 5)).float()
    log_q[3] = -torch.inf
    logits = (log_probabilities(1).float() * 30).requires_grad_()
    values = DIVERGENCES[name](log_q, logits.log_softmax(-1))
    values.sum().backward()
    assert torch.isfinite(values).all()
    assert values[3] == 0
    assert torch.isfinite(logits.grad).all()
    assert (logits.grad[3] == 0).all()


@pytest.mark.parametrize("name", ["reverse_kl", "js"])
def test_the_students_mass_on_unknown_tokens_does_not_count(name):
    log_q, logits = log_probabilities(0, (2, 5)), log_probabilities(1).requires_grad_()
    values = DIVERGENCES[name](log_q, logits.log_softmax(-1))
    moved = logits.detach().clone()
    moved[:, [2, 5]] += 3
    torch.testing.assert_close(DIVERGENCES[name](log_q, moved.log_softmax(-1)), values)
    values.sum().backward()
    assert logits.grad[:, [2, 5]].abs().max() < 1e-15


class Teacher:
    is_own_entropy = False

    def __init__(self, log_q):
        self.log_q = log_q.float()

    def log_probs(self, rows, temperature):
        return self.log_q[rows]


def test_the_fused_loss_sums_several_teachers_by_their_weights():
    log_qs, log_p = [log_probabilities(0), log_probabilities(2, (4,))], log_probabilities(1)
    weights = torch.rand(C, 2, dtype=torch.float64)
    for name, divergence in DIVERGENCES.items():
        expected = [sum(weights[t, k].item() * by_hand(name, log_qs[k], log_p)[t] for k in range(2)) for t in range(C)]
        logits, head, labels = log_p.float(), torch.eye(log_p.shape[1]), torch.zeros(C, dtype=torch.long)
        values = fused_loss(
            logits,
            head,
            None,
            labels,
            [Teacher(log_q) for log_q in log_qs],
            weights.float(),
            fusion_weight=1.0,
            divergence=divergence,
        )
        assert values.loss.item() == pytest.approx(sum(expected), rel=1e-5)
