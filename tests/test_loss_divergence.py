"""Divergences and their gradients against float64 autograd of the textbook, a naive rival, and their properties."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from truth import fresh, off, textbook, uniform, with_gradient

from pennyweight.loss.divergence import DIVERGENCES, Divergence, cross_entropy, divergence, hidden_error, kl
from pennyweight.settings import KdMethod

KINDS = list(DIVERGENCES)
DISTANCES = [None, 1.0, 0.04, 0.0016, 1e-6]  # forward KL at the temperature, about; None: far apart
NEAR = [d for d in DISTANCES if d]
NONE = float("-inf")


def inputs(seed: int, distance: float | None = None, temperature: float = 1.0, n: int = 48, v: int = 301):
    """Float32 logits of a teacher and a student. Truths are taken at these: rounding them is not the loss's error."""
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(n, v, generator=g) * 3
    if distance is None:
        return torch.randn(n, v, generator=g) * 3, student
    return student + math.sqrt(2 * distance) * temperature * torch.randn(n, v, generator=g), student


def a_spec(seed: int, kind: str, temperature: float | None = None) -> Divergence:
    """Settings drawn anew."""
    g = torch.Generator().manual_seed(seed + 1)
    beta, alpha, t = uniform(g, 0.05, 0.95), uniform(g, 0.05, 0.95), uniform(g, 0.5, 4.0)
    return Divergence(kind, beta, t if temperature is None else temperature, alpha)


def ours(spec, teacher, student):
    value, gradient = divergence(spec, teacher.clone(), student.clone())
    return value, gradient


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("temperature", [1.0, None])
def test_float32_against_float64_truth_and_a_naive_rival(kind, distance, temperature):
    seed = fresh()
    spec = a_spec(seed, kind, temperature)
    teacher, student = inputs(seed, distance, spec.temperature)
    want, want_gradient = with_gradient(lambda s: textbook(spec, teacher.double(), s), student)
    rival, rival_gradient = with_gradient(lambda s: textbook(spec, teacher, s), student, torch.float32)
    got, gradient = ours(spec, teacher, student)
    assert got.dtype == gradient.dtype == torch.float32
    told = f"seed {seed}, {spec}: value off by {off(got, want):.1e}, gradient by {off(gradient, want_gradient):.1e}"
    # Half the distance of p and q is a sum of numbers rounded to float32, however small it is itself.
    room = 2e-6 + (5e-8 / float(want.mean()) if kind == "tvd" else 0.0)
    assert off(got, want) <= off(rival, want) + room, f"{told}; the naive value by {off(rival, want):.1e}"
    if kind == "tvd":
        assert_up_to_undecided_signs(gradient, want_gradient, spec, teacher, student, told)
        return
    rivals = off(rival_gradient, want_gradient)
    assert off(gradient, want_gradient) <= rivals + 5e-6, f"{told}; the naive gradient by {rivals:.1e}"


def assert_up_to_undecided_signs(gradient, want, spec, teacher, student, told):
    """The total variation's gradient, apart from ids whose log-ratio is too near 0 for float32 to have its sign."""
    t = spec.temperature
    d = torch.log_softmax(teacher.double() / t, -1) - torch.log_softmax(student.double() / t, -1)
    undecided = torch.where(d.abs() < 3e-6, torch.softmax(student.double() / t, -1), 0.0).sum(-1)
    error = (gradient.double() - want).norm(dim=-1)
    assert bool((error <= 1e-6 * t + 2e-6 * want.norm(dim=-1) + 2 * t * undecided).all()), told
    assert float(undecided.mean()) < 0.1, told


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, None])
def test_precise_where_student_and_teacher_nearly_agree(kind, temperature):
    """At a KL of 0.0016: the summed value within a millionth of that KL, the gradient within 1e-5 of its own size.

    The total variation is about thirty times that KL; it is held to 1e-5 of itself.
    """
    seed = fresh()
    spec = a_spec(seed, kind, temperature)
    teacher, student = inputs(seed, 0.0016, spec.temperature)
    want, want_gradient = with_gradient(lambda s: textbook(spec, teacher.double(), s), student)
    got, gradient = ours(spec, teacher, student)
    forward = textbook(Divergence("forward_kl", temperature=spec.temperature), teacher.double(), student.double())
    scale = 10 * want if kind == "tvd" else forward
    error = abs(float((got.double() - want).sum() / scale.sum()))
    assert error < 1e-6, f"seed {seed}, {spec}: {error:.1e}"
    assert float((got.double() - want).norm() / scale.norm()) < 4e-6, f"seed {seed}, {spec}"
    if kind != "tvd":
        assert off(gradient, want_gradient) < 1e-5, f"seed {seed}, {spec}: {off(gradient, want_gradient):.1e}"


@pytest.mark.parametrize("kind", KINDS)
def test_float64_given_is_float64_throughout(kind):
    seed = fresh()
    spec = a_spec(seed, kind)
    teacher, student = (x.double() for x in inputs(seed, n=16, v=77))
    want, want_gradient = with_gradient(lambda s: textbook(spec, teacher, s), student)
    got, gradient = ours(spec, teacher, student)
    assert got.dtype == gradient.dtype == torch.float64
    assert off(got, want) < 1e-12 and off(gradient, want_gradient) < 1e-12, f"seed {seed}, {spec}"


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_equal_to_student_gives_exactly_nothing(kind):
    seed = fresh()
    _, student = inputs(seed)
    value, gradient = ours(a_spec(seed, kind), student, student)
    assert float(value.abs().max()) == 0.0 and float(gradient.abs().max()) == 0.0, f"seed {seed}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_added_to_all_logits_changes_nothing(kind):
    seed = fresh()
    spec = a_spec(seed, kind, 1.0)
    teacher, student = ((x * 64).round() / 64 for x in inputs(seed, 0.04))  # so that adding 8 is exact
    a, b = ours(spec, teacher, student), ours(spec, teacher + 8.0, student - 8.0)
    moved = float((a[0] - b[0]).norm() / kl(teacher, student).norm())
    assert moved < 1e-5 and off(a[1], b[1].double()) < 1e-5, f"seed {seed}: {moved:.1e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", DISTANCES)
def test_never_negative_nor_above_its_bound(kind, distance):
    seed = fresh()
    spec = a_spec(seed, kind, 1.0)
    teacher, student = inputs(seed, distance, n=200, v=50)
    value, gradient = ours(spec, teacher, student)
    a, b = spec.alpha, spec.beta
    most = {
        "jsd": -b * math.log(b) - (1 - b) * math.log(1 - b),
        "skew_kl": -math.log(a),
        "skew_reverse_kl": -math.log(a),
        "tvd": 1.0,
    }.get(kind, math.inf)
    assert float(value.min()) >= -1e-9 and float(value.max()) <= most * (1 + 1e-6), f"seed {seed}, {spec}"
    # A gradient taken to logits sums to nothing at each position.
    assert float(gradient.sum(-1).abs().max()) <= 1e-5 * float(gradient.abs().sum(-1).max()), f"seed {seed}, {spec}"
    if kind == "tvd":  # Pinsker
        assert bool((value**2 <= kl(teacher, student) / 2 + 1e-6).all()), f"seed {seed}"


def test_jsd_is_symmetric_at_one_half_and_kl_reverses():
    seed = fresh()
    teacher, student = (x.double() for x in inputs(seed))
    spec = Divergence("jsd", 0.5, 1.7)
    assert off(ours(spec, teacher, student)[0], ours(spec, student, teacher)[0]) < 1e-12, f"seed {seed}"
    spec = Divergence("jsd", 0.3, 1.7)
    mirrored = Divergence("jsd", 0.7, 1.7)
    assert off(ours(spec, teacher, student)[0], ours(mirrored, student, teacher)[0]) < 1e-12, f"seed {seed}"
    for one, other in (("forward_kl", "reverse_kl"), ("skew_kl", "skew_reverse_kl")):
        a, b = ours(Divergence(one), teacher, student)[0], ours(Divergence(other), student, teacher)[0]
        assert off(a, b) < 1e-12, f"seed {seed}: {one} is {other} the other way round"


@pytest.mark.parametrize("kind", KINDS)
def test_given_room_changes_nothing_whatever_was_in_it(kind):
    seed = fresh()
    spec = a_spec(seed, kind)
    teacher, student = inputs(seed, n=5, v=40)
    room = torch.full((4, 5, 40), float("nan"))
    got = divergence(spec, teacher.clone(), student.clone(), room)
    for a, b in zip(got, ours(spec, teacher, student), strict=True):
        assert torch.equal(a, b), f"seed {seed}"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_impossible_for_the_teacher(kind):
    """A teacher's probability of exactly zero: finite wherever the mathematics is, never a NaN."""
    seed = fresh()
    spec = a_spec(seed, kind)
    teacher, student = inputs(seed, n=8, v=20)
    teacher[:, 3:7] = NONE
    value, gradient = ours(spec, teacher, student)
    assert bool(torch.isfinite(value).all()) and bool(torch.isfinite(gradient).all()), f"seed {seed}"
    if kind == "reverse_kl":  # infinite, and so a very large number
        assert bool((value > 1e20).all()), f"seed {seed}"
        return
    want, want_gradient = with_gradient(lambda s: textbook(spec, teacher.double(), s), student)
    assert off(value, want) < 1e-5 and off(gradient, want_gradient) < 1e-5, f"seed {seed}, {spec}"


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_impossible_for_both_are_as_if_they_were_not_there(kind):
    seed = fresh()
    spec = a_spec(seed, kind)
    teacher, student = inputs(seed, n=8, v=20)
    want, want_gradient = with_gradient(lambda s: textbook(spec, teacher[:, 4:].double(), s), student[:, 4:])
    teacher[:, :4] = student[:, :4] = NONE
    value, gradient = ours(spec, teacher, student)
    assert off(value, want) < 1e-5 and off(gradient[:, 4:], want_gradient) < 1e-5, f"seed {seed}, {spec}"
    assert float(gradient[:, :4].abs().max()) == 0.0, f"seed {seed}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nothing", [NONE, -1e9])
def test_tokens_impossible_for_the_student(kind, nothing):
    """A student's probability of exactly zero, by a logit of minus infinity or one that is as good as it."""
    seed = fresh()
    spec = a_spec(seed, kind)
    teacher, student = inputs(seed, n=8, v=20)
    student[:, 3:7] = nothing
    value, gradient = ours(spec, teacher, student)
    assert bool(torch.isfinite(value).all()) and bool(torch.isfinite(gradient).all()), f"seed {seed}"
    assert float(gradient[:, 3:7].abs().max()) <= (1e9 if kind == "forward_kl" else 1e-6), f"seed {seed}"
    if kind == "forward_kl" and nothing == NONE:  # infinite, and so a very large number
        assert bool((value > 1e5).all()), f"seed {seed}"
        return
    want = textbook(spec, teacher.double(), student.double())
    assert off(value, want) < 1e-5, f"seed {seed}, {spec}: {value[0]:.4f} for {want[0]:.4f}"


def test_kl_keeps_its_inputs_and_is_the_forward_kl():
    seed = fresh()
    teacher, student = inputs(seed)
    before = teacher.clone(), student.clone()
    got = kl(teacher, student)
    assert torch.equal(teacher, before[0]) and torch.equal(student, before[1])
    assert off(got, textbook(Divergence(), teacher.double(), student.double())) < 1e-6, f"seed {seed}"


def test_cross_entropy_is_that_of_the_label():
    log_q = torch.log_softmax(torch.randn(6, 9), -1)
    labels = torch.randint(0, 9, (6,))
    assert torch.equal(cross_entropy(log_q, labels), -log_q[range(6), labels])


def test_hidden_error_is_the_relative_squared_distance():
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    teacher, student = torch.randn(7, 20, generator=g) * 5, torch.randn(7, 20, generator=g)
    want, want_gradient = with_gradient(
        lambda s: (s - teacher.double()).square().sum(-1) / teacher.double().square().sum(-1), student
    )
    got, gradient = with_gradient(lambda s: hidden_error(s, teacher), student, torch.float32)
    assert off(got, want) < 1e-6 and off(gradient, want_gradient) < 1e-6, f"seed {seed}"
    assert float(hidden_error(teacher, teacher).abs().max()) == 0.0
    rounded = hidden_error(teacher, teacher.half())  # as they are kept on disk
    assert float(rounded.max()) < 1e-6 and bool(torch.isfinite(hidden_error(student, torch.zeros(7, 20))).all())


def test_a_recipe_can_name_every_row():
    assert set(get_args(KdMethod.model_fields["divergence"].annotation)) == set(DIVERGENCES)
