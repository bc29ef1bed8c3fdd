import math
from dataclasses import replace

import pytest
import torch

from llmfusion.errors import UserError
from llmfusion.fusion.dskd import (
    OwnScores,
    Projectors,
    TeacherBatch,
    TeacherSpace,
    auxiliary_loss,
    dual_space,
    input_ids,
)
from llmfusion.fusion.fused_loss import fused_loss
from llmfusion.fusion.student import StudentBatch
from llmfusion.fusion.target import TeacherStats
from tests.unit.fusion.stand_ins import target_weights

d, D, v, V = 4, 6, 9, 11
STUDENT_SIZES, TEACHER_SIZES = [5, 2, 7], [3, 4, 6]
N, M = sum(STUDENT_SIZES), sum(TEACHER_SIZES)


def random(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def ids(count, below, seed):
    return torch.randint(below, (count,), generator=torch.Generator().manual_seed(seed))


def make_space(bias=True):
    return TeacherSpace(
        random(V, D, seed=1), random(V, seed=2) if bias else None, random(V + 2, D, seed=3), 0.8, 1.1, 1.7
    )


def make_problem(bias=True, attention=True):
    """Projectors, the student's and the teacher's side, in float64; everything that could get a gradient may."""
    torch.manual_seed(0)
    projectors = Projectors(d, D, attention).double()
    teacher = TeacherBatch(make_space(bias), random(M, D, seed=4), ids(M, V, 5), ids(M, V, 6), TEACHER_SIZES)
    leaves = {
        "hidden": random(N, d, seed=7),
        "embedding": random(v, d, seed=10),
        "head": random(v, d, seed=11),
        "bias": random(v, seed=12),
    }
    leaves = {name: leaf.requires_grad_() for name, leaf in leaves.items() if bias or name != "bias"}
    student = StudentBatch(inputs=ids(N, v, 8), labels=ids(N, v, 9), sizes=STUDENT_SIZES, **leaves)
    return projectors, student, teacher


MATCHES = torch.tensor(
    [0, -1, 1, -1, 2, -1, 6, 7, -1, -1, 10, 11, -1, 12]
)  # rows 3, 4, 5, 8 and 9 of the teacher stay alone


# ------------------------------------------------------------------------------------------------------------ by hand
def softmax(scores):
    top = max(scores)
    exponentials = [math.exp(s - top) for s in scores]
    return [e / sum(exponentials) for e in exponentials]


def linear(layer, x):
    weight, bias = layer.weight.tolist(), layer.bias.tolist()
    return [sum(w * value for w, value in zip(row, x, strict=True)) + b for row, b in zip(weight, bias, strict=True)]


def head_logits(head, bias, x):
    extra = [0.0] * len(head) if bias is None else bias.tolist()
    return [
        sum(w * value for w, value in zip(row, x, strict=True)) + b for row, b in zip(head.tolist(), extra, strict=True)
    ]


def kl(q, p):
    return sum(a * math.log(a / b) for a, b in zip(q, p, strict=True))


def by_hand(projectors, student, teacher, temperature=1.0, matches=None, with_label=True):
    """All of DSKD, token by token, as lists: P's logits at student rows, None without a match, and teacher rows' KL."""
    space = teacher.space
    sample_of = {
        "s": [b for b, n in enumerate(student.sizes) for _ in range(n)],
        "t": [b for b, m in enumerate(teacher.sizes) for _ in range(m)],
    }
    values = []
    for j in range(len(teacher.hidden)):
        x = [h / space.std_hidden for h in teacher.hidden[j].tolist()]
        if with_label:
            x = [a + e / space.std_target for a, e in zip(x, space.embedding[teacher.labels[j]].tolist(), strict=True)]
        values.append(linear(projectors.t2s, x))
    states = [linear(projectors.s2t, h) for h in student.hidden.tolist()]
    queries = [
        None
        if projectors.query is None
        else linear(projectors.query, student.embedding[x].tolist() + student.embedding[y].tolist())
        for x, y in zip(student.inputs, student.labels, strict=True)
    ]
    keys = [
        [e / space.std_index for e in space.embedding[x].tolist() + space.embedding[y].tolist()]
        for x, y in zip(teacher.inputs, teacher.labels, strict=True)
    ]

    def mixture(rows, scores, vectors):
        weights = softmax(scores)
        return [sum(w * vectors[row][c] for w, row in zip(weights, rows, strict=True)) for c in range(len(vectors[0]))]

    def score(i, j):
        return sum(a * b for a, b in zip(queries[i], keys[j], strict=True)) / math.sqrt(2 * D)

    projected, divergences = [], []
    for i in range(len(student.hidden)):
        if matches is None:
            mates = [j for j in range(len(values)) if sample_of["t"][j] == sample_of["s"][i]]
            mixed = mixture(mates, [score(i, j) for j in mates], values)
        else:
            mixed = values[matches[i]] if matches[i] >= 0 else None
        projected.append(None if mixed is None else head_logits(student.head, student.bias, mixed))
    for j in range(len(values)):
        if matches is None:
            mates = [i for i in range(len(states)) if sample_of["s"][i] == sample_of["t"][j]]
            mixed = mixture(mates, [score(i, j) for i in mates], states)
        else:
            mates = [i for i in range(len(states)) if int(matches[i]) == j]
            mixed = states[mates[0]] if mates else None
        if mixed is not None:
            q, p = (
                softmax([z / temperature for z in head_logits(space.head, space.bias, x)])
                for x in (teacher.hidden[j].tolist(), mixed)
            )
            divergences.append(kl(q, p))
    return projected, divergences


# ---------------------------------------------------------------------------------------------------- equality
MODES = {"cma": None, "exact": MATCHES}


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("mode", MODES)
def test_all_terms_and_statistics_are_those_of_the_definition(mode, temperature, bias):
    projectors, student, teacher = make_problem(bias)
    found = dual_space(projectors, student, teacher, temperature, MODES[mode])
    logits, divergences = by_hand(projectors, student, teacher, temperature, MODES[mode], with_label=mode == "cma")
    assert found.s2t_kl.item() == pytest.approx(sum(divergences), rel=1e-10)
    log_probs = found.distribution.log_probs(slice(0, N), temperature)
    total = 0.0
    for i in range(N):
        assert found.aligned[i] == (logits[i] is not None)
        if logits[i] is None:
            assert found.distribution.mask[i] == 0
            continue
        p, label = softmax(logits[i]), int(student.labels[i])
        total -= math.log(p[label])
        assert found.distribution.cross_entropy[i].item() == pytest.approx(-math.log(p[label]), rel=1e-10)
        assert found.distribution.entropy[i].item() == pytest.approx(-sum(x * math.log(x) for x in p), rel=1e-10)
        assert found.distribution.mask[i] == (p.index(max(p)) == label)
        assert log_probs[i].exp().tolist() == pytest.approx(softmax([z / temperature for z in logits[i]]), rel=1e-10)
    assert found.t2s_ce.item() == pytest.approx(total, rel=1e-10)


@pytest.mark.parametrize("mode", MODES)
def test_the_label_in_the_value_is_a_choice(mode):
    projectors, student, teacher = make_problem()
    for with_label in (True, False):
        found = dual_space(projectors, student, teacher, 1.0, MODES[mode], label_in_value=with_label)
        logits, _ = by_hand(projectors, student, teacher, 1.0, MODES[mode], with_label)
        expected = sum(
            -math.log(softmax(z)[y]) for z, y in zip(logits, student.labels.tolist(), strict=True) if z is not None
        )
        assert found.t2s_ce.item() == pytest.approx(expected)
    assert dual_space(projectors, student, teacher, 1.0, MODES[mode]).t2s_ce.item() != pytest.approx(
        dual_space(projectors, student, teacher, 1.0, MODES[mode], label_in_value=mode == "exact").t2s_ce.item()
    )


def test_one_teacher_in_unified_fusion_is_dskd():
    """``(1 - lambda) SFT + lambda (t2s_kd + t2s_ce + s2t_kd)``, the student's terms over N and the teacher's over M."""
    projectors, student, teacher = make_problem()
    student, fusion_weight = partly_right(projectors, student, teacher), 0.3
    found = dual_space(projectors, student, teacher)
    rows = found.distribution
    stats = TeacherStats(
        rows.entropy[:, None], rows.cross_entropy[:, None], rows.mask[:, None], torch.zeros(N, dtype=torch.long)
    )
    for target, options in (("kd", {}), ("naive", {}), ("mince", {"granularity": "token"}), ("udf", {})):
        weights = target_weights(target, stats, **options)
        fused = fused_loss(student.hidden, student.head, student.bias, student.labels, [rows], weights, fusion_weight)
        loss = fused.loss / N + fusion_weight * auxiliary_loss([found], N, [M])
        logits, divergences = by_hand(projectors, student, teacher)
        sft = t2s_kd = t2s_ce = 0.0
        for i, label in enumerate(student.labels.tolist()):
            p, projected = (
                softmax(head_logits(student.head, student.bias, student.hidden[i].tolist())),
                softmax(logits[i]),
            )
            sft -= math.log(p[label])
            t2s_ce -= math.log(projected[label])
            t2s_kd += kl(projected, p) * (projected.index(max(projected)) == label)
        expected = (1 - fusion_weight) * sft / N + fusion_weight * ((t2s_kd + t2s_ce) / N + sum(divergences) / M)
        assert loss.item() == pytest.approx(expected, rel=1e-5)  # the fused loss is in float32
        assert 0 < rows.mask.sum() < N


def partly_right(projectors, student, teacher):
    """The student's rows with labels of which the projected teacher gets some right.

    Labels change the attention: so a few rounds.
    """
    labels = student.labels
    for _ in range(8):
        found = dual_space(projectors, replace(student, labels=labels), teacher)
        labels = found.distribution.log_probs(slice(0, N), 1.0).argmax(-1)
    return replace(student, labels=torch.where(torch.arange(N) % 2 == 0, labels, student.labels))


def test_teachers_share_the_weight_of_the_auxiliary_terms():
    projectors, student, teacher = make_problem()
    one, other = dual_space(projectors, student, teacher), dual_space(projectors, student, teacher, matches=MATCHES)
    expected = ((one.t2s_ce + other.t2s_ce) / 50 + one.s2t_kl / 40 + other.s2t_kl / 70) / 2
    torch.testing.assert_close(auxiliary_loss([one, other], 50, [40, 70]), expected)


# ---------------------------------------------------------------------------------------------------- gradients
def gradients(loss, projectors, student):
    """Which parameters the loss reaches, by name."""
    named = {
        **dict(projectors.named_parameters()),
        **{name: getattr(student, name) for name in ("hidden", "embedding", "head", "bias")},
    }
    found = torch.autograd.grad(loss, list(named.values()), allow_unused=True)
    return {
        name for name, gradient in zip(named, found, strict=True) if gradient is not None and gradient.abs().max() > 0
    }


def layers(*names):
    return {f"{name}.{part}" for name in names for part in ("weight", "bias")}


def test_the_auxiliary_cross_entropy_trains_t2s_and_query_only():
    projectors, student, teacher = make_problem()
    assert gradients(dual_space(projectors, student, teacher).t2s_ce, projectors, student) == layers("t2s", "query")
    assert gradients(dual_space(projectors, student, teacher, matches=MATCHES).t2s_ce, projectors, student) == layers(
        "t2s"
    )


def test_the_teacher_space_term_trains_s2t_query_and_the_students_states():
    projectors, student, teacher = make_problem()
    assert gradients(dual_space(projectors, student, teacher).s2t_kl, projectors, student) == layers("s2t", "query") | {
        "hidden"
    }
    assert gradients(dual_space(projectors, student, teacher, matches=MATCHES).s2t_kl, projectors, student) == layers(
        "s2t"
    ) | {"hidden"}


def test_the_fusion_term_trains_the_student_and_no_projector():
    projectors, student, teacher = make_problem()
    rows = dual_space(projectors, student, teacher).distribution
    assert not any(
        t.requires_grad for t in (rows.entropy, rows.cross_entropy, rows.mask, rows.log_probs(slice(0, N), 2.0))
    )
    fused = fused_loss(
        student.hidden, student.head, student.bias, student.labels, [rows], torch.ones(N, 1, dtype=torch.float64), 1.0
    )
    assert gradients(fused.loss, projectors, student) == {"hidden", "head", "bias"}


def test_with_detached_states_only_projectors_are_trained():
    projectors, student, teacher = make_problem()
    found = dual_space(projectors, replace(student, hidden=student.hidden.detach()), teacher)
    assert gradients(auxiliary_loss([found], N, [M]), projectors, student) == layers("t2s", "s2t", "query")


@pytest.mark.parametrize("mode", MODES)
def test_gradients_are_those_of_finite_differences(mode):
    projectors, student, teacher = make_problem(attention=mode == "cma")
    names = [name for name, _ in projectors.named_parameters()]

    def terms(hidden, *parameters):
        found = torch.func.functional_call(
            Bound(projectors, replace(student, hidden=hidden), teacher, MODES[mode]), with_prefix(names, parameters), ()
        )
        return found.t2s_ce, found.s2t_kl

    inputs = [student.hidden, *(p.detach().clone().requires_grad_() for p in projectors.parameters())]
    assert torch.autograd.gradcheck(terms, inputs)


def with_prefix(names, parameters):
    return {f"projectors.{name}": parameter for name, parameter in zip(names, parameters, strict=True)}


class Bound(torch.nn.Module):
    """``dual_space`` as a module, so that its parameters can be given from outside."""

    def __init__(self, projectors, *rest):
        super().__init__()
        self.projectors, self.rest = projectors, rest

    def forward(self):
        student, teacher, matches = self.rest
        return dual_space(self.projectors, student, teacher, 1.5, matches)


# ---------------------------------------------------------------------------------------------------- invariance
def select(student, teacher, order, matches=None):
    """The problem with only these samples, in this order."""

    def rows(sizes):
        firsts = [sum(sizes[:b]) for b in range(len(sizes))]
        return torch.tensor([i for b in order for i in range(firsts[b], firsts[b] + sizes[b])])

    ours, theirs = rows(student.sizes), rows(teacher.sizes)
    place = {int(j): new for new, j in enumerate(theirs)} | {-1: -1}
    fewer = replace(
        student,
        hidden=student.hidden[ours],
        inputs=student.inputs[ours],
        labels=student.labels[ours],
        sizes=[student.sizes[b] for b in order],
    )
    other = replace(
        teacher,
        hidden=teacher.hidden[theirs],
        inputs=teacher.inputs[theirs],
        labels=teacher.labels[theirs],
        sizes=[teacher.sizes[b] for b in order],
    )
    return fewer, other, None if matches is None else torch.tensor([place[int(matches[i])] for i in ours]), ours


@pytest.mark.parametrize("mode", MODES)
def test_parts_of_a_batch_sum_to_the_whole(mode):
    projectors, student, teacher = make_problem()
    whole = dual_space(projectors, student, teacher, 1.5, MODES[mode])
    sums, entropies = [0.0, 0.0], []
    for order in ([0], [1, 2]):
        fewer, other, matches, _ = select(student, teacher, order, MODES[mode])
        part = dual_space(projectors, fewer, other, 1.5, matches)
        sums = [sums[0] + part.t2s_ce.item(), sums[1] + part.s2t_kl.item()]
        entropies.append(part.distribution.entropy)
    assert sums == pytest.approx([whole.t2s_ce.item(), whole.s2t_kl.item()], rel=1e-12)
    torch.testing.assert_close(torch.cat(entropies), whole.distribution.entropy)


@pytest.mark.parametrize("mode", MODES)
def test_the_order_of_samples_does_not_matter(mode):
    projectors, student, teacher = make_problem()
    whole = dual_space(projectors, student, teacher, 1.5, MODES[mode])
    fewer, other, matches, ours = select(student, teacher, [2, 0, 1], MODES[mode])
    turned = dual_space(projectors, fewer, other, 1.5, matches)
    torch.testing.assert_close((turned.t2s_ce, turned.s2t_kl), (whole.t2s_ce, whole.s2t_kl))
    for name in ("entropy", "cross_entropy", "mask"):
        torch.testing.assert_close(getattr(turned.distribution, name), getattr(whole.distribution, name)[ours])


def test_what_another_sample_holds_does_not_matter():
    projectors, student, teacher = make_problem()
    before = dual_space(projectors, student, teacher).distribution.log_probs(slice(0, N), 1.0)
    hidden, labels = teacher.hidden.clone(), student.labels.clone()
    hidden[-TEACHER_SIZES[-1] :] *= -3
    labels[-STUDENT_SIZES[-1] :] = 0
    after = dual_space(
        projectors, replace(student, labels=labels), replace(teacher, hidden=hidden)
    ).distribution.log_probs(slice(0, N), 1.0)
    rest = slice(0, N - STUDENT_SIZES[-1])
    assert torch.equal(after[rest], before[rest])
    assert not torch.allclose(after[rest.stop :], before[rest.stop :])


# ----------------------------------------------------------------------------------------------- details
def test_own_scores_take_the_place_of_the_projected_ones_and_keep_the_mask_of_right_rows():
    projectors, student, teacher = make_problem()
    student = partly_right(projectors, student, teacher)
    plain = dual_space(projectors, student, teacher)
    known = (torch.arange(N) % 3 > 0).double()
    own = OwnScores(random(N, seed=20).abs(), random(N, seed=21).abs(), known)
    found = dual_space(projectors, student, teacher, own_scores=own)
    assert torch.equal(found.distribution.entropy, own.entropy)
    assert torch.equal(found.distribution.cross_entropy, own.cross_entropy)
    assert torch.equal(found.distribution.mask, plain.distribution.mask * known)
    assert 0 < found.distribution.mask.sum() < min(plain.distribution.mask.sum(), known.sum())
    assert torch.equal(found.t2s_ce, plain.t2s_ce)


def test_exact_alignment_without_a_single_partner_is_zero_and_finite():
    projectors, student, teacher = make_problem(attention=False)
    found = dual_space(projectors, student, teacher, matches=torch.full((N,), -1))
    assert found.t2s_ce.item() == found.s2t_kl.item() == found.distribution.mask.sum() == 0
    loss = auxiliary_loss([found], N, [M])
    loss.backward()
    assert all((p.grad == 0).all() for p in projectors.parameters())
    assert torch.isfinite(found.distribution.log_probs(slice(0, N), 1.0)).all()


def test_with_the_same_tokenizer_exact_alignment_projects_each_row_onto_itself():
    projectors, student, teacher = make_problem(attention=False)
    same = replace(
        student, hidden=student.hidden[:M], inputs=student.inputs[:M], labels=student.labels[:M], sizes=TEACHER_SIZES
    )
    found = dual_space(projectors, same, teacher, matches=torch.arange(M))
    expected = projectors.t2s(teacher.hidden / teacher.space.std_hidden) @ student.head.T + student.bias
    torch.testing.assert_close(found.distribution.log_probs(slice(0, M), 1.0), expected.log_softmax(-1).detach())
    assert found.aligned.all()


def test_without_the_label_in_its_value_a_projected_teacher_does_not_learn_to_copy_wrong_labels():
    """A teacher that knows the true token, and labels of which a third are wrong.

    With the label its projection follows those too.
    """
    torch.manual_seed(0)
    count, tokens = 72, 8
    truth = torch.arange(count) % tokens
    labels = torch.where(torch.arange(count) // tokens % 3 == 0, (truth + 1) % tokens, truth)
    space = TeacherSpace(torch.eye(tokens), None, torch.randn(tokens, tokens), 1.0, 1.0, 0.3)
    teacher = TeacherBatch(space, torch.eye(tokens)[truth], labels, labels, [count])
    student = StudentBatch(
        torch.randn(count, tokens), labels, labels, [count], torch.randn(tokens, tokens), torch.eye(tokens)
    )
    copied = {}
    for with_label in (True, False):
        projectors = Projectors(tokens, tokens, attention=False)
        optimizer = torch.optim.Adam(projectors.t2s.parameters(), 0.3)
        for _ in range(60):
            found = dual_space(projectors, student, teacher, matches=torch.arange(count), label_in_value=with_label)
            optimizer.zero_grad()
            found.t2s_ce.backward()
            optimizer.step()
        copied[with_label] = found.distribution.mask[labels != truth].mean().item()
    assert copied == {True: 1, False: 0}


def test_attention_needs_a_query():
    projectors, student, teacher = make_problem(attention=False)
    with pytest.raises(ValueError, match="exact alignment"):
        dual_space(projectors, student, teacher)


def test_half_precision_from_cache_and_model_is_computed_in_float32():
    projectors, student, teacher = make_problem()
    half = {name: getattr(student, name).detach().bfloat16() for name in ("hidden", "embedding", "head", "bias")}
    space = replace(
        teacher.space, head=teacher.space.head.bfloat16(), embedding=teacher.space.embedding.bfloat16(), bias=None
    )
    small = replace(teacher, hidden=teacher.hidden.bfloat16(), space=space)
    found = dual_space(projectors.float(), replace(student, **half), small)
    assert {
        t.dtype
        for t in (
            found.t2s_ce,
            found.s2t_kl,
            found.distribution.entropy,
            found.distribution.log_probs(slice(0, 3), 1.0),
        )
    } == {torch.float32}


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
def test_constants_that_cannot_divide_are_refused(value):
    with pytest.raises(UserError, match="capture it again"):
        replace(make_space(), std_target=value)


def test_a_teacher_whose_embeddings_have_another_width_is_refused():
    with pytest.raises(UserError, match="width 7 and a head of width 6"):
        replace(make_space(), embedding=torch.zeros(V, 7))


def test_projectors_start_as_torch_starts_linear_layers_in_float32():
    torch.manual_seed(3)
    projectors = Projectors(d, D)
    torch.manual_seed(3)
    for layer, shape in ((projectors.t2s, (D, d)), (projectors.s2t, (d, D)), (projectors.query, (2 * d, 2 * D))):
        torch.testing.assert_close(layer.weight, torch.nn.Linear(*shape).weight, rtol=0, atol=0)
        assert layer.bias.dtype == torch.float32
    assert Projectors(d, D, attention=False).query is None


def test_each_rows_input_is_the_label_before_it_or_the_prompts_last_token():
    assert input_ids(torch.tensor([5, 6, 7, 8, 9]), [0, 3], [1, 2]).tolist() == [1, 5, 6, 2, 8]


def test_rows_from_a_cache_have_the_inputs_and_labels_its_constants_were_taken_over(cache):
    from safetensors.torch import load_file

    from llmfusion.teachers.cache import TeacherCache

    opened, head = TeacherCache(cache), load_file(cache.file("head.safetensors"))
    embedding, parts = head.get("embedding", head["weight"]).double(), []
    for sample, entry in opened.index.items():
        labels = opened.rows(sample)["label_id"].long()
        parts.append(
            torch.cat(
                [embedding[input_ids(labels, entry["segment_starts"], entry["segment_prompts"])], embedding[labels]], 1
            )
        )
    index = torch.cat(parts)
    assert index.std(correction=0).item() == pytest.approx(opened.facts["std_index_embedding"], rel=1e-6)
    assert index[:, index.shape[1] // 2 :].std(correction=0).item() == pytest.approx(
        opened.facts["std_target_embedding"], rel=1e-6
    )
