import numpy as np
import pytest
import torch

from llmfusion.fusion.divergences import DIVERGENCES
from llmfusion.fusion.fused_loss import fused_loss
from llmfusion.fusion.head import chunk_rows

N, D, V = 11, 6, 13


class Teacher:
    """A teacher that knows its logits; ``unknown`` tokens and ``absent`` rows have no probability."""

    is_own_entropy = False

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


class KnownEntropy(Exact):
    """Its entropy at temperature 1 is known."""

    is_own_entropy = True

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        q = self.probabilities(1.0)
        self.entropy = -torch.tensor((q * np.log(np.where(q > 0, q, 1))).sum(1))


def problem(teachers, seed=0):
    random = np.random.default_rng(seed)
    hidden, head, bias = random.normal(size=(N, D)), random.normal(size=(V, D)), random.normal(size=V)
    weights = random.uniform(size=(N, teachers))
    return hidden, head, bias, random.integers(V, size=N), weights


def by_hand(hidden, head, bias, labels, teachers, weights, fusion_weight, temperature):
    """Value, its gradient to the logits, and X, all in float64 from the definitions."""
    z = hidden @ head.T + bias
    p1, p = (np.exp(z / t) / np.exp(z / t).sum(1, keepdims=True) for t in (1.0, temperature))
    sft = -np.log(p1[np.arange(N), labels]).sum()
    value, gradient = (1 - fusion_weight) * sft, (1 - fusion_weight) * (p1 - np.eye(V)[labels])
    crosses = []
    for k, teacher in enumerate(teachers):
        q = teacher.probabilities(temperature)
        known = q > 0
        kl = np.where(known, q * (np.log(np.where(known, q, 1)) - np.log(p)), 0).sum(1)
        value += fusion_weight * (weights[:, k] * kl).sum()
        gradient += fusion_weight / temperature * weights[:, k, None] * (q.sum(1, keepdims=True) * p - q)
        crosses.append(-(q * np.log(p)).sum(1))
    return value, sft, gradient, np.stack(crosses, 1) if crosses else np.zeros((N, 0))


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
@pytest.mark.parametrize("fusion_weight", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_value_gradient_and_cross_entropies_are_those_of_the_definition(count, fusion_weight, temperature):
    teachers = [Teacher(seed, unknown=(2, 5) if seed == 1 else ()) for seed in range(count)]
    hidden, head, bias, labels, weights = problem(count)
    value, sft, gradient, crosses = by_hand(hidden, head, bias, labels, teachers, weights, fusion_weight, temperature)
    h, w, b = (torch.tensor(x, dtype=torch.float32, requires_grad=True) for x in (hidden, head, bias))
    found = fused_loss(
        h, w, b, torch.tensor(labels), teachers, torch.tensor(weights, dtype=torch.float32), fusion_weight, temperature
    )
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
    """Against autograd through the (N, V) logits, in float64, for all four inputs.

    Two rows are ignored, one token is unknown to a teacher.
    """
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
    expected = 0.6 * torch.nn.functional.nll_loss(log_p[kept], labels[kept], reduction="sum") + 0.4 * sum(
        t[kept].sum() for t in terms
    )
    torch.testing.assert_close(found.loss, expected)
    for mine, theirs in zip(ours, torch.autograd.grad(expected * 3, leaves), strict=True):
        torch.testing.assert_close(mine, theirs)
    assert (found.cross_entropy[[2, 9]] == 0).all()


@pytest.mark.parametrize("count", [0, 2])
def test_gradients_are_those_of_finite_differences(count):
    teachers = [Exact(seed) for seed in range(count)]
    hidden, head, bias, labels, weights = (torch.tensor(x) for x in problem(count))
    leaves = [x.requires_grad_() for x in (hidden, head, bias, *([weights] if count else []))]
    assert torch.autograd.gradcheck(
        lambda h, w, b, *k: (
            fused_loss(h, w, b, torch.as_tensor(labels), teachers, *(k or [None]), 0.4, 2.0, chunk=4).loss
        ),
        leaves,
    )


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
        found = fused_loss(
            h,
            torch.tensor(head).float(),
            torch.tensor(bias).float(),
            torch.tensor(labels),
            [teacher],
            torch.tensor(weights).float(),
            0.5,
        )
        found.loss.backward()
        results.append((found.loss, h.grad))
    torch.testing.assert_close(results[0], results[1])
    assert torch.isfinite(results[1][1]).all()


def test_a_teacher_equal_to_the_student_leaves_sft_alone():
    hidden, head, bias, labels, weights = problem(1)
    teacher = Teacher(0)
    teacher.logits = hidden @ head.T + bias
    arguments = (
        torch.tensor(hidden).float(),
        torch.tensor(head).float(),
        torch.tensor(bias).float(),
        torch.tensor(labels),
    )
    found = fused_loss(*arguments, [teacher], torch.tensor(weights).float(), 0.5, 2.0)
    assert found.fusion.item() == pytest.approx(0, abs=1e-5)
    assert found.loss.item() == pytest.approx(0.5 * found.sft.item(), rel=1e-5)


def weighted(**options):
    """Loss and gradients for one problem with two teachers, the second without a weight in three rows."""
    hidden, head, bias, labels, weights = (torch.tensor(x) for x in problem(2))
    weights[[1, 4, 5], 1] = 0
    leaves = [x.requires_grad_() for x in (hidden, head, bias)]
    teachers = [Exact(1), Exact(2, unknown=(3,))]
    found = fused_loss(*leaves, labels, teachers, weights, 0.4, 1.7, **options)
    return found, torch.autograd.grad(found.loss, leaves), teachers


def test_a_count_divides_loss_and_gradients_and_nothing_else():
    whole, gradients, _ = weighted()
    mean, parts, _ = weighted(count=8.0)
    torch.testing.assert_close(
        [mean.loss * 8, mean.sft, mean.fusion, mean.cross_entropy],
        [whole.loss, whole.sft, whole.fusion, whole.cross_entropy],
    )
    torch.testing.assert_close([8 * g for g in parts], list(gradients))
    hidden, head, bias, labels, weights = (torch.tensor(x) for x in problem(1))
    weights.requires_grad_()
    by_weight = [
        torch.autograd.grad(fused_loss(hidden, head, bias, labels, [Exact(1)], weights, 0.4, count=c).loss, weights)[0]
        for c in (1, 8)
    ]
    torch.testing.assert_close(by_weight[0], 8 * by_weight[1])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("temperature", [1.0, 1.7])
def test_an_entropy_that_is_known_need_not_be_taken_again(divergence, temperature):
    results = []
    for kind in (Exact, KnownEntropy):
        hidden, head, bias, labels, weights = (torch.tensor(x) for x in problem(2))
        labels[[2, 9]] = -100
        weights[[0, 3], 1] = 0
        leaves = [x.requires_grad_() for x in (hidden, head, bias, weights)]
        teachers = [kind(0, unknown=(3,)), kind(1)]
        found = fused_loss(*leaves[:3], labels, teachers, leaves[3], 0.4, temperature, DIVERGENCES[divergence], chunk=4)
        results.append([found.loss, found.fusion, found.cross_entropy, *torch.autograd.grad(found.loss, leaves)])
    torch.testing.assert_close(results[0], results[1])


@pytest.mark.parametrize("divergence", DIVERGENCES)
@pytest.mark.parametrize("ignored", [(), (4, 6)])
def test_a_teacher_is_not_asked_for_rows_without_a_weight(divergence, ignored):
    """As MinCE leaves most rows of most teachers out: nothing changes but the work.

    Weights that need a gradient ask for all rows.
    """

    class Recording(Exact):
        def log_probs(self, rows, temperature):
            requested.extend(torch.arange(N)[rows].tolist())
            return super().log_probs(rows, temperature)

    results = []
    for needs in (False, True):
        requested: list[int] = []
        hidden, head, bias, labels, weights = (torch.tensor(x) for x in problem(1))
        weights[[0, 4, 5, 9]] = 0
        labels[list(ignored)] = -100
        leaves = [x.requires_grad_() for x in (hidden, head, bias)]
        found = fused_loss(
            *leaves, labels, [Recording(1)], weights.requires_grad_(needs), 0.4, 2.0, DIVERGENCES[divergence], chunk=4
        )
        results.append((found.loss.detach(), *torch.autograd.grad(found.loss, leaves)))
        left = {*ignored} | (set() if needs else {0, 4, 5, 9})
        assert sorted(requested) == [i for i in range(N) if i not in left]
    torch.testing.assert_close(*results)


def test_tiles_of_one_row_and_of_all_give_the_same(monkeypatch):
    results = []
    for tile in (1, 2**20):
        monkeypatch.setattr("llmfusion.fusion.fused_loss.TILE_VALUES", tile)
        found, gradients, _ = weighted(with_student_stats=True)
        results.append((found.loss.detach(), found.cross_entropy, found.student_stats, *gradients))
    torch.testing.assert_close(*results)


def test_what_the_student_says_is_described_row_by_row():
    hidden, head, bias, labels, _ = (torch.tensor(x) for x in problem(1))
    labels[3] = -100
    right = (hidden @ head.T + bias).argmax(1)
    labels[[0, 5]] = right[[0, 5]]
    stats = fused_loss(hidden, head, bias, labels, with_student_stats=True, chunk=4).student_stats
    for t in range(N):
        p = np.exp((hidden[t] @ head.T + bias).numpy())
        p /= p.sum()
        expected = (
            [-(p * np.log(p)).sum(), -np.log(p[labels[t]]), float(right[t] == labels[t])] if t != 3 else [0, 0, 0]
        )
        np.testing.assert_allclose(stats[t].numpy(), expected, atol=1e-12)
    assert len(fused_loss(hidden, head, bias, labels).student_stats) == 0


def test_products_in_bfloat16_are_those_of_rounded_inputs():
    """In float32 of inputs that bfloat16 holds exactly the loss must be that of float64.

    On a CPU the product itself is rounded.
    """
    hidden, head, _, labels, weights = (torch.tensor(x, dtype=torch.float32) for x in problem(1))
    leaves = [x.bfloat16().float().requires_grad_() for x in (hidden, head)]
    results = []
    for matmul_dtype in (None, torch.bfloat16):
        found = fused_loss(*leaves, None, labels.long(), [Teacher(1)], weights, 0.4, matmul_dtype=matmul_dtype)
        results.append((found.loss.detach(), *torch.autograd.grad(found.loss, leaves)))
    for one, other in zip(*results, strict=True):
        assert one.dtype == other.dtype == torch.float32
        assert not torch.equal(one, other)
        assert (one - other).norm() < 0.01 * one.norm()


def test_a_second_backward_is_scaled_as_the_first():
    hidden, head, bias, labels, _ = (torch.tensor(x) for x in problem(1))
    loss = fused_loss(hidden.requires_grad_(), head, bias, labels).loss
    once, thrice = (torch.autograd.grad(factor * loss, hidden, retain_graph=True)[0] for factor in (1.0, 3.0))
    torch.testing.assert_close(3 * once, thrice)


def test_chunks_are_large_for_small_vocabularies_and_bounded_for_large_ones():
    assert chunk_rows(torch.empty(500, 1)) == 2**22 // 500
    assert chunk_rows(torch.empty(128256, 1)) == 192


def test_only_a_few_chunks_of_logits_exist_at_once():
    """Peak memory, by torch's own count, is a small part of (N, V) logits and does not grow with N."""
    from torch.profiler import ProfilerActivity, profile

    def peak(rows):
        generator = torch.Generator().manual_seed(0)
        hidden, head = (
            torch.randn(rows, 4, generator=generator).requires_grad_(),
            torch.randn(30_000, 4, generator=generator),
        )
        labels = torch.randint(30_000, (rows,), generator=generator)
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            fused_loss(hidden, head, None, labels).loss.backward()
        held = [0]
        for event in sorted(
            (e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
        ):
            held.append(held[-1] + event.nbytes())
        return max(held)

    small, large = peak(1000), peak(4000)
    assert small < 0.6 * 4 * 1000 * 30_000
    assert large < 1.15 * small
