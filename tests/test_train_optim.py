"""The schedule at its corners, and which parameters decay."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from pennyweight.train.optim import adamw, lr_at


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
