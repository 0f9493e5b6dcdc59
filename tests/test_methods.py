"""Which teacher carries which method: what is refused says why, and what cures it cures it."""

from __future__ import annotations

import itertools
import re
from typing import get_args

import pytest
import torch

from pennyweight.data.pack import collate
from pennyweight.errors import MethodError
from pennyweight.loss.divergence import DIVERGENCES, Divergence
from pennyweight.loss.signals import Dense
from pennyweight.methods import METHODS, check
from pennyweight.recipe import DenseTargets, HiddenTargets, SampledTargets, TopKTargets
from pennyweight.records import Encoded
from pennyweight.settings import KdMethod, SftMethod

TARGETS = ["dense", "sampled", "top_k", "hidden"]
EVERYTHING = list(itertools.product(DIVERGENCES, TARGETS, [0.0, 0.5]))


def carried(divergence: str, targets: str, hidden: float) -> bool:
    """docs/losses.md, Which targets carry which loss."""
    if hidden and targets not in ("dense", "hidden"):
        return False
    return targets != "sampled" or divergence == "forward_kl"


def test_targets_are_these():
    kinds = [t.model_fields["kind"].default for t in (DenseTargets, SampledTargets, TopKTargets, HiddenTargets)]
    assert kinds == TARGETS
    assert set(get_args(KdMethod.model_fields["divergence"].annotation)) == set(DIVERGENCES)


@pytest.mark.parametrize(("divergence", "targets", "hidden"), EVERYTHING)
def test_what_cannot_be_carried_is_refused_with_reason_and_cure(divergence, targets, hidden):
    settings, gives = KdMethod(divergence=divergence, hidden=hidden), frozenset({targets})
    if carried(divergence, targets, hidden):
        check(settings, gives)
        return
    with pytest.raises(MethodError) as refused:
        check(settings, gives)
    said = str(refused.value)
    assert f"divergence={divergence}" in said and f"the teacher gives {targets}" in said and "\n" not in said
    reason, cure = said.split("; ")
    assert ("hidden states are matched" if hidden else "not linear in the teacher's probabilities") in reason
    # Whatever it says to do is accepted then.
    other_targets, other_method = re.fullmatch(r"set targets.kind to (.*), or method.(.*)", cure).groups()
    for kind in re.split(r", | or ", other_targets):
        check(settings, frozenset({kind}))
    changes = dict(x.split("=") for x in re.split(r" and method\.| and ", other_method))
    check(KdMethod(**{"divergence": divergence, "hidden": hidden, **changes}), gives)


def test_plain_fine_tuning_needs_no_teacher():
    for targets in TARGETS:
        check(SftMethod(), frozenset({targets}))
    check(SftMethod(), frozenset())


def test_one_signal_of_several_is_enough():
    check(KdMethod(divergence="jsd"), frozenset({"text", "sampled", "dense"}))
    with pytest.raises(MethodError, match=r"the teacher gives sampled, text"):
        check(KdMethod(divergence="jsd"), frozenset({"text", "sampled"}))


def a_batch():
    rows = [Encoded(f"{i:064x}", (3, 4, 5, 6, 7), (False, False, True, True, True)) for i in range(3)]
    return collate([[s] for s in rows], 0)


def test_distillation_weighs_its_share_and_passes_its_settings_on():
    batch = a_batch()
    target = Dense.of(torch.zeros(batch.count, 9))
    settings = KdMethod(divergence="skew_kl", beta=0.3, alpha=0.2, temperature=2.0, cross_entropy=0.25)
    asked = []
    made = METHODS["kd"].apply(batch, settings, lambda b: asked.append(b) or target)
    assert asked == [batch] and made.target is target
    assert made.divergence == Divergence("skew_kl", 0.3, 2.0, 0.2)
    assert made.ce_weight.tolist() == [0.25] * batch.count and made.kd_weight.tolist() == [0.75] * batch.count
    assert made.hidden_weight is None
    matching = METHODS["kd"].apply(batch, KdMethod(hidden=0.5), lambda b: target)
    assert matching.hidden_weight.tolist() == [0.5] * batch.count


def test_fine_tuning_weighs_the_text_alone():
    made = METHODS["sft"].apply(a_batch(), SftMethod(), None)
    assert made.target is None and set(made.ce_weight.tolist()) == {1.0} and set(made.kd_weight.tolist()) == {0.0}
