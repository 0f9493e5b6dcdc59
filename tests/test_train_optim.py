"""The schedule at its corners, and which parameters decay."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from truth import fresh

from pennyweight.train.optim import LowAdamW, adamw, lr_at, to_bfloat16


def rates(shape, steps=100, warmup=0.1, decay=0.2, floor=0.1):
    return [lr_at(s, steps, 1.0, shape, warmup, decay, floor) for s in range(steps)]


@pytest.mark.parametrize("shape", ["cosine", "wsd"])
def test_it_warms_up_linearly_and_ends_at_the_floor(shape):
    found = rates(shape)
    assert found[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert max(found) == pytest.approx(1.0) and found[-1] == pytest.approx(0.1)
    assert all(b <= a + 1e-12 for a, b in pairwise(found[10:]))


def test_wsd_is_flat_until_the_decay():
    found = rates("wsd")
    assert set(found[10:80]) == {1.0} and found[80] < 1.0 and found[90] == pytest.approx(0.1 + 0.9 * 9 / 20)


def test_cosine_is_half_way_in_the_middle():
    assert lr_at(55, 101, 2.0, "cosine", 0.1, 0.2, 0.0) == pytest.approx(1.0, abs=0.02)


@pytest.mark.parametrize("shape", ["cosine", "wsd"])
def test_one_step_and_no_warm_up_are_no_division_by_zero(shape):
    assert lr_at(0, 1, 1.0, shape, 0.0, 0.2, 0.1) > 0


def test_matrices_decay_and_vectors_do_not():
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.LayerNorm(4))
    groups = adamw(model, 1e-3, (0.9, 0.95), 0.1).param_groups
    assert [(g["weight_decay"], len(g["params"])) for g in groups] == [(0.1, 1), (0.0, 3)]


def quadratic(moments, dtype, steps=300, lr=3e-2, seed=0):
    """A regression of 200 noisy examples by AdamW; its losses."""
    g = torch.Generator().manual_seed(seed)
    x, w = torch.randn(200, 70, generator=g), torch.randn(70, 9, generator=g)
    y = x @ w + 0.1 * torch.randn(200, 9, generator=g)
    model = torch.nn.Linear(70, 9).to(dtype)
    torch.manual_seed(seed)
    optimizer = adamw(model, lr, (0.9, 0.95), 0.01, moments)
    losses = []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        loss = (model(x.to(dtype)).float() - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    return losses, optimizer, model


def test_computed_by_ourselves_it_is_torchs_adamw():
    torch.manual_seed(3)
    first, second = (torch.nn.Linear(33, 17) for _ in range(2))
    second.load_state_dict(first.state_dict())
    groups = [
        {"params": [second.weight], "weight_decay": 0.1},
        {"params": [second.bias], "weight_decay": 0.0},
    ]
    sides = [
        (first, adamw(first, 1e-2, (0.9, 0.95), 0.1)),
        (second, LowAdamW(groups, 1e-2, (0.9, 0.95), "float32")),
    ]
    for step in range(20):
        x = torch.randn(8, 33, generator=torch.Generator().manual_seed(step))
        for model, optimizer in sides:
            optimizer.zero_grad()
            model(x).square().sum().backward()
            optimizer.step()
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("moments", ["bfloat16", "fp8"])
def test_moments_in_few_bits_train_as_well_and_take_less(moments):
    want, _, _ = quadratic("float32", torch.float32)
    got, optimizer, model = quadratic(moments, torch.float32)
    assert got[-1] < 1.05 * want[-1] and got[-1] < 0.02 * want[0]
    state = optimizer.state[model.weight]
    stored = sum(t.numel() * t.element_size() for k, t in state.items() if k != "step")
    assert stored <= {"bfloat16": 4.0, "fp8": 2.2}[moments] * model.weight.numel()


def test_bfloat16_weights_take_steps_smaller_than_theirs():
    """Rounded to nearest, a weight of 1 never takes a step of 1/1000."""
    weight = torch.nn.Parameter(torch.ones(4096, 1, dtype=torch.bfloat16))
    optimizer = adamw(torch.nn.ParameterList([weight]), 1e-3, (0.0, 0.0), 0.0)  # type: ignore[arg-type]
    torch.manual_seed(fresh())
    for _ in range(50):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    assert float(weight.detach().float().mean()) == pytest.approx(0.95, abs=2e-3)


def test_rounding_to_bfloat16_is_unbiased_and_exact_where_it_can_be():
    seed = fresh()
    torch.manual_seed(seed)
    x = torch.randn(500) * torch.exp(4 * torch.randn(500))
    many = torch.stack([to_bfloat16(x).double() for _ in range(2000)])
    some = many.std(0) > 0  # the others lie next to a number of the format, to which all their draws were rounded
    assert int(some.sum()) > 400 and torch.allclose(many.mean(0)[~some], x.double()[~some], rtol=1e-4)
    z = ((many.mean(0) - x.double()) / (many.std(0) / 2000**0.5))[some]
    assert abs(float(z.mean())) < 0.25 and abs(float(z.std()) - 1) < 0.2, f"seed {seed}"
    exact = torch.tensor([0.0, -1.5, 3.0, float("inf"), -float("inf"), 2.0**-130])
    assert torch.equal(to_bfloat16(exact).float(), exact) and bool(to_bfloat16(torch.tensor([torch.nan])).isnan())


def test_a_root_that_rounds_to_nothing_does_not_divide_by_nothing():
    weight = torch.nn.Parameter(torch.zeros(1, 128))
    optimizer = adamw(torch.nn.ParameterList([weight]), 1e-3, (0.9, 0.999), 0.0, "fp8")  # type: ignore[arg-type]
    grad = torch.full((1, 128), 1e-7)
    grad[0, 0] = 1.0
    for _ in range(20):
        weight.grad = grad.clone()
        optimizer.step()
    assert float(weight.abs().max()) < 1e-3 * 20 * 1.5
