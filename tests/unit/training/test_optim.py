import math
from itertools import pairwise

import numpy as np
import pytest
import torch

from llmfusion.errors import UserError
from llmfusion.training import optim
from llmfusion.training.optim import (
    CautiousAdamW,
    clip_grad_norm,
    effective_update_fraction,
    learning_rate,
    require_effective_updates,
)


def start(shapes=((3, 4), (5,)), seed=0):
    random = np.random.default_rng(seed)
    gradients = [[random.normal(size=shape) for shape in shapes] for _ in range(6)]
    gradients[3][0][0] = gradients[5][1][:2] = 0.0  # no sign to agree with
    return [random.normal(size=shape) for shape in shapes], gradients


def by_hand(values, gradients, lr, b1, b2, eps, decay, norm):
    """Liang et al.'s update in float64, one number at a time where it matters."""
    values = [v.copy() for v in values]
    m, v = [np.zeros_like(x) for x in values], [np.zeros_like(x) for x in values]
    for t, step in enumerate(gradients, 1):
        for i, g in enumerate(step):
            values[i] *= 1 - lr * decay
            m[i], v[i] = b1 * m[i] + (1 - b1) * g, b2 * v[i] + (1 - b2) * g**2
            mask = (m[i] * g > 0).astype(float)
            if norm is None:
                mask[:] = 1
            elif norm == "numel_plus_1":
                mask *= mask.size / (mask.sum() + 1)
            else:
                mask /= max(mask.mean(), 1e-3)
            values[i] -= lr * math.sqrt(1 - b2**t) / (1 - b1**t) * m[i] * mask / (np.sqrt(v[i]) + eps)
    return values


def trained(values, gradients, **options):
    parameters = [torch.nn.Parameter(torch.tensor(v)) for v in values]
    optimizer = CautiousAdamW(parameters, **options)
    for step in gradients:
        for parameter, g in zip(parameters, step, strict=True):
            parameter.grad = torch.tensor(g)
        optimizer.step()
    return [p.detach().numpy() for p in parameters]


@pytest.mark.parametrize("norm", ["mean_clamp", "numel_plus_1", None])
def test_updates_are_those_of_the_formula(norm):
    values, gradients = start()
    options = {"cautious": False} if norm is None else {"norm": norm}
    found = trained(values, gradients, lr=0.1, betas=(0.9, 0.99), eps=1e-3, weight_decay=0.2, **options)
    for a, b in zip(found, by_hand(values, gradients, 0.1, 0.9, 0.99, 1e-3, 0.2, norm), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12)


def test_without_caution_it_is_torchs_adamw():
    values, gradients = start()
    theirs = [torch.nn.Parameter(torch.tensor(v)) for v in values]
    optimizer = torch.optim.AdamW(theirs, lr=0.1, betas=(0.9, 0.99), eps=1e-12, weight_decay=0.2)
    for step in gradients:
        for parameter, g in zip(theirs, step, strict=True):
            parameter.grad = torch.tensor(g)
        optimizer.step()
    found = trained(values, gradients, lr=0.1, betas=(0.9, 0.99), eps=1e-12, weight_decay=0.2, cautious=False)
    for a, b in zip(found, theirs, strict=True):
        np.testing.assert_allclose(a, b.detach().numpy(), rtol=1e-9)


def test_where_all_signs_agree_caution_changes_nothing():
    values, gradients = start()
    positive = [[abs(g) + 0.1 for g in step] for step in gradients]
    cautious, plain = (trained(values, positive, lr=0.1, cautious=flag) for flag in (True, False))
    for a, b, v in zip(cautious, plain, values, strict=True):
        np.testing.assert_array_equal(a, b)
        assert (a != v).all()
    reckless = trained(values, gradients, lr=0.1, cautious=False)
    assert any((a != b).any() for a, b in zip(trained(values, gradients, lr=0.1), reckless, strict=True))


@pytest.mark.parametrize("norm", ["mean_clamp", "numel_plus_1"])
def test_where_no_sign_agrees_only_weight_decay_acts(norm):
    values, _ = start()
    up, down = [np.ones_like(v) for v in values], [np.full_like(v, -1e-3) for v in values]
    before, after = (trained(values, steps, lr=0.1, weight_decay=0.5, norm=norm) for steps in ([up], [up, down]))
    for a, b in zip(before, after, strict=True):
        np.testing.assert_allclose(b, a * (1 - 0.1 * 0.5), rtol=1e-15)


def test_a_parameter_without_a_gradient_stays():
    used, unused = torch.nn.Parameter(torch.ones(2)), torch.nn.Parameter(torch.ones(2))
    optimizer = CautiousAdamW([used, unused], lr=0.1, weight_decay=0.5)
    used.grad = torch.ones(2)
    optimizer.step()
    assert unused.tolist() == [1, 1]
    assert used[0] < 0.95


def test_the_rate_rises_to_its_peak_and_falls_along_half_a_cosine():
    rates = [learning_rate(step, 100, 2.0, 0.5, 0.1) for step in range(100)]
    np.testing.assert_allclose(rates[:10], 0.2 * np.arange(1, 11))
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.25)  # half-way between peak and lowest
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert 0.5 < rates[-1] < 0.501
    assert learning_rate(0, 100, 2.0, 0.0, 0.0) == 2.0


def test_the_other_schedules_are_a_line_and_a_level_behind_the_same_warm_up():
    line, level = (
        [learning_rate(step, 100, 2.0, 0.5, 0.1, schedule) for step in range(100)]
        for schedule in ("linear", "constant")
    )
    np.testing.assert_allclose(line[:10], 0.2 * np.arange(1, 11))
    np.testing.assert_allclose(line[10:], 2.0 - 1.5 * np.arange(90) / 90)
    assert level[:10] == line[:10]
    assert [learning_rate(step, 100, 2.0, 0.0, 0.1, "constant") for step in range(10, 100)] == [2.0] * 90


def test_gradients_are_clipped_by_the_norm_of_all_of_them():
    parameters = [torch.nn.Parameter(torch.zeros(2)), torch.nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_grad_norm(parameters, 1.0) == pytest.approx(5.0)
    assert parameters[1].grad.item() == pytest.approx(0.8, rel=1e-5)


def weights(precision):
    model = torch.nn.Linear(300, 400, bias=False)
    torch.manual_seed(0)
    torch.nn.init.normal_(model.weight, std=0.02)
    return model.to(precision)


def test_bfloat16_weights_move_where_the_step_is_half_of_the_gap_to_the_next_number():
    weight = torch.tensor([1.0, 0.5, 2.0**-10])  # below 1 the gap is half of that above: 2^-8 and 2^-7
    model = torch.nn.Module()
    model.weight = torch.nn.Parameter(weight.bfloat16())
    assert effective_update_fraction(model, 2.0**-8 * 1.01) == pytest.approx(6 / 6)
    assert effective_update_fraction(model, 2.0**-9 * 1.01) == pytest.approx((1 + 2 + 2) / 6)
    assert effective_update_fraction(model, 2.0**-20) == 0


def test_bfloat16_weights_are_refused_at_a_rate_that_they_would_round_away():
    assert effective_update_fraction(weights(torch.float32), 1e-6) > 0.99
    assert effective_update_fraction(weights(torch.bfloat16), 1e-6) < 0.05
    require_effective_updates(weights(torch.bfloat16), 1e-3)
    with pytest.raises(
        UserError, match=r"parameters: bfloat16 at lr 1e-06: a step of this size changes \d\.\d% of the weights"
    ) as error:
        require_effective_updates(weights(torch.bfloat16), 1e-6)
    require_effective_updates(weights(torch.bfloat16), float(str(error.value).split("an lr of ")[1].split()[0]) * 1.05)


@pytest.mark.parametrize("norm", ["mean_clamp", "numel_plus_1"])
def test_few_parameters_at_a_time_are_updated_as_all_at_once(monkeypatch, norm):
    values, gradients = start(((3, 4), (5,), (2, 2), (7,), (1,)))
    whole = trained(values, gradients, lr=0.1, norm=norm)
    for chunk in (1, 9, 16):
        monkeypatch.setattr(optim, "CHUNK_VALUES", chunk)
        for a, b in zip(trained(values, gradients, lr=0.1, norm=norm), whole, strict=True):
            assert np.array_equal(a, b)


def test_moments_of_bfloat16_weights_are_those_of_float32_ones_and_each_weight_is_rounded_once():
    """In bfloat16 the second moment times 0.999 would be rounded back to what it was.

    Steps would stay as small as the first gradients made them.
    """
    start_at = torch.linspace(0.5, 2, 64).bfloat16()
    gradients = [torch.full((64,), 1.0 if step < 100 else 1e-2).bfloat16() for step in range(600)]
    pair = [torch.nn.Parameter(start_at.to(dtype)) for dtype in (torch.bfloat16, torch.float32)]
    optimizers = [CautiousAdamW([p], lr=1e-4, weight_decay=10.0) for p in pair]
    for gradient in gradients:
        for parameter, optimizer in zip(pair, optimizers, strict=True):
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
        states = [optimizer.state[p] for p, optimizer in zip(pair, optimizers, strict=True)]
        assert all(torch.equal(states[0][key], states[1][key]) for key in ("exp_avg", "exp_avg_sq"))
    assert float(states[0]["exp_avg_sq"][0]) == pytest.approx(
        (1 - 0.999**100) * 0.999**500 + 1e-4 * (1 - 0.999**500), rel=1e-4
    )
    # half of the gap to the next number is 9.8e-4: neither the decay of 9.4e-4 nor the step of 1e-4 crosses it alone
    one = torch.nn.Parameter(torch.tensor([0.49609375]).bfloat16())
    one.grad = torch.ones(1).bfloat16()
    CautiousAdamW([one], lr=1e-4, weight_decay=19.0).step()
    assert float(one.detach()) == 0.494140625
