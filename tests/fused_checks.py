"""The Triton kernels of the loss against float64 truth and the eager loss; ``test_loss_fused.py`` runs this file.

It needs a process of its own, in which Triton is first imported under its interpreter (TRITON_INTERPRET=1: on a CPU, no
GPU needed), or not (0: on a GPU).
"""

from __future__ import annotations

import os

import pytest
import torch
from test_loss_divergence import DISTANCES, KINDS, NONE, a_spec, assert_up_to_undecided_signs, inputs
from truth import fresh, off, textbook, uniform, with_gradient

from pennyweight.loss.divergence import Divergence, divergence
from pennyweight.loss.fused import Slope, Text, available, dense_, sampled_, text_
from pennyweight.loss.signals import Sparse

DEVICE = torch.device("cpu" if os.environ.get("TRITON_INTERPRET") == "1" else "cuda")
SIZES = [5, 129, 700, 1024, 2500]  # blocks are of 128 to 2,048


def drawn(seed: int, distance: float | None = None, temperature: float = 1.0):
    """Three rows of a teacher's and a student's logits, of a size that is drawn too."""
    g = torch.Generator().manual_seed(seed + 2)
    v = SIZES[int(torch.randint(len(SIZES), (), generator=g))]
    return inputs(seed, distance, temperature, 3, v)


def decided(kind: str, distance: float | None = None):
    """Seed, settings and logits, drawn until no log-ratio is too near 0 for float32 to have its sign."""
    while True:
        seed = fresh()
        spec = a_spec(seed, kind)
        teacher, student = drawn(seed, distance, spec.temperature)
        log_p, log_q = (torch.log_softmax(x.double() / spec.temperature, -1) for x in (teacher, student))
        if float((log_p - log_q).abs().min()) > 3e-6:
            return seed, spec, teacher, student


def weights(seed: int, n: int):
    return torch.rand(n, generator=torch.Generator().manual_seed(seed + 3)) + 0.1


def ours(spec, teacher, student, weight=None, text=None, slope=Slope()):  # noqa: B008
    """Losses and gradient, on the CPU; the teacher's logits are seen to be kept."""
    weight = torch.ones(len(student)) if weight is None else weight
    text = None if text is None else Text(text.labels.to(DEVICE), text.weight.to(DEVICE))
    given, made = teacher.to(DEVICE, copy=True), student.to(DEVICE, copy=True)
    losses = dense_(spec, given, made, weight.to(DEVICE), text, slope)
    assert torch.equal(given.cpu(), teacher) or bool(teacher.isnan().any())
    return losses, made.cpu()


def cpu(x):
    return x.cpu()


def of_text(student, labels):
    """Cross-entropy (n,) and entropy (n,)."""
    log_q = torch.log_softmax(student, -1)
    return -log_q.gather(-1, labels.unsqueeze(-1)).squeeze(-1), -(log_q.exp() * log_q).nan_to_num(0.0).sum(-1)


def steepness(student, slope: Slope):
    """The head's slope at float64 logits."""
    return slope.scale * (1.0 if slope.cap is None else 1 - (student.double() / slope.cap) ** 2)


def test_available_here():
    assert available(DEVICE)
    assert not available(torch.device("meta"))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "distance"), [*((None, d) for d in DISTANCES), (1.0, None), (1.0, 0.0016)])
def test_as_near_the_truth_as_the_eager_loss(kind, temperature, distance):
    seed = fresh()
    spec = a_spec(seed, kind, temperature)
    teacher, student = drawn(seed, distance, spec.temperature)
    want, want_gradient = with_gradient(lambda s: textbook(spec, teacher.double(), s), student)
    rival, rival_gradient = divergence(spec, teacher.clone(), student.clone())
    losses, gradient = ours(spec, teacher, student)
    got = cpu(losses.divergence)
    told = (
        f"seed {seed}, {spec}, {tuple(student.shape)}: value off by {off(got, want):.1e} (eager {off(rival, want):.1e})"
    )
    told += f", gradient by {off(gradient, want_gradient):.1e} (eager {off(rival_gradient, want_gradient):.1e})"
    # Half the distance of p and q is a sum of numbers rounded to float32, however small it is itself.
    room = 1e-6 + (3e-7 / float(want.mean()) if kind == "tvd" else 0.0)
    assert off(got, want) <= off(rival, want) + room, told
    if distance and kind != "tvd":  # where p and q nearly agree too, a value is exact in relative terms
        assert off(got, want) <= 3e-6, told
    if kind == "tvd":
        assert_up_to_undecided_signs(gradient, want_gradient, spec, teacher, student, told)
        return
    assert off(gradient, want_gradient) <= 3 * off(rival_gradient, want_gradient) + 3e-6, told
    if distance:
        assert float(gradient.sum(-1).abs().max()) <= 1e-5 * float(gradient.abs().sum(-1).max()), told


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_a_long_row_loses_nothing(kind):
    seed = fresh()
    spec = a_spec(seed, kind, 1.0)
    teacher, student = inputs(seed, 0.04, 1.0, 1, 150_001)
    want, want_gradient = with_gradient(lambda s: textbook(spec, teacher.double(), s), student)
    losses, gradient = ours(spec, teacher, student)
    assert off(cpu(losses.divergence), want) < 2e-6, f"seed {seed}, {spec}"
    assert off(gradient, want_gradient) < 3e-6, f"seed {seed}, {spec}"


@pytest.mark.parametrize("kind", KINDS)
def test_teacher_equal_to_student_gives_exactly_nothing(kind):
    seed = fresh()
    _, student = drawn(seed)
    losses, gradient = ours(a_spec(seed, kind), student, student)
    assert float(cpu(losses.divergence).abs().max()) == 0.0 == float(gradient.abs().max()), f"seed {seed}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("slope", [Slope(), Slope(0.25), Slope(0.5, 15.0)])
def test_weights_text_and_slope(kind, slope):
    """All at once, at a temperature: the gradient of the weighted sum, times the slope; labels are drawn."""
    seed, spec, teacher, student = decided(kind, 1.0)
    n, v = student.shape
    if slope.cap is not None:
        student, teacher = (slope.cap * torch.tanh(x / slope.cap) for x in (student, teacher))
    kd, ce, labels = weights(seed, n), weights(seed + 1, n), torch.randint(v, (n,))
    kd[0] = ce[1] = 0.0
    text = Text(labels, ce)

    def whole(s):
        return kd * textbook(spec, teacher.to(s.dtype), s) + ce * of_text(s, labels)[0]

    _, want = with_gradient(whole, student)
    losses, gradient = ours(spec, teacher, student, kd, text, slope)
    told = f"seed {seed}, {spec}, {tuple(student.shape)}"
    s = student.double()
    assert off(cpu(losses.divergence), textbook(spec, teacher.double(), s)) < 2e-6, told
    assert off(cpu(losses.cross_entropy), of_text(s, labels)[0]) < 1e-6, told
    assert off(cpu(losses.entropy), of_text(s, labels)[1]) < 3e-6, told
    assert off(gradient, want * steepness(s, slope)) < 1e-5, told
    if slope != Slope():
        return
    alone, without = ours(spec, teacher, student, kd, None, slope)
    assert alone.cross_entropy is None and alone.entropy is None
    assert off(cpu(alone.divergence), cpu(losses.divergence).double()) < 1e-6, told
    assert float(without[0].abs().max()) == 0.0, told


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nothing", [NONE, -1e9])
@pytest.mark.parametrize("whose", ["teacher", "student", "both"])
def test_impossible_tokens(kind, nothing, whose):
    """Logits of minus infinity, or as good as that: never a NaN; an infinite value is a very large number."""
    seed, spec, teacher, student = decided(kind)
    told = f"seed {seed}, {spec}, {tuple(student.shape)}"
    if whose == "both":
        want, want_gradient = with_gradient(lambda s: textbook(spec, teacher[:, 3:].double(), s), student[:, 3:])
        teacher[:, :3] = student[:, :3] = nothing
    else:
        (teacher if whose == "teacher" else student)[:, :3] = -1e9  # of probability 0 in float64 too, but finite
        want, want_gradient = with_gradient(lambda s: textbook(spec, teacher.double(), s), student)
        (teacher if whose == "teacher" else student)[:, :3] = nothing
    losses, gradient = ours(spec, teacher, student)
    got = cpu(losses.divergence)
    assert bool(torch.isfinite(got).all()) and bool(torch.isfinite(gradient).all()), told
    if nothing == NONE and (kind, whose) in (("forward_kl", "student"), ("reverse_kl", "teacher")):
        assert bool((got > 1e15).all()), told
        return
    assert off(got, want) < 1e-5, f"{told}: {got[0]} for {want[0]}"
    if whose == "both":
        assert float(gradient[:, :3].abs().max()) == 0.0, told
        gradient = gradient[:, 3:]
    rival = divergence(spec, teacher, student)[1]
    rival = rival[:, 3:] if whose == "both" else rival
    assert off(gradient, want_gradient) < 3 * off(rival, want_gradient) + 1e-5, told


@pytest.mark.parametrize("kind", KINDS)
def test_no_number_in_gives_no_number_out(kind):
    for whose in (0, 1):
        both = inputs(fresh(), n=3, v=300)
        both[whose][1, 7] = float("nan")
        losses, gradient = ours(a_spec(fresh(), kind), *both)
        assert losses.divergence.isnan().tolist() == [False, True, False]
        assert gradient.isnan().any(-1).tolist() == [False, True, False]


def test_rows_of_a_wider_tensor_and_none_at_all():
    seed = fresh()
    teacher, student = inputs(seed, n=5, v=300)
    wide, want = torch.full((5, 333), 7.0, device=DEVICE), student.to(DEVICE, copy=True)
    wide[:, 9:309] = want
    one = torch.ones(5, device=DEVICE)
    a = dense_(Divergence(), teacher.to(DEVICE), want, one).divergence
    b = dense_(Divergence(), teacher.to(DEVICE), wide[:, 9:309], one).divergence
    assert off(b, a.double()) < 1e-6 and off(wide[:, 9:309], want.double()) < 1e-6, f"seed {seed}"
    assert bool((wide[:, :9] == 7).all()) and bool((wide[:, 309:] == 7).all())
    assert dense_(Divergence(), teacher[:0].to(DEVICE), want[:0], one[:0]).divergence.shape == (0,)


@pytest.mark.parametrize("bad", [torch.zeros(2, 8, dtype=torch.float64), torch.zeros(8, 2).T])
def test_other_memory_is_refused(bad):
    with pytest.raises(ValueError, match="float32"):
        dense_(Divergence(), torch.zeros(2, 8), bad, torch.ones(2))


@pytest.mark.parametrize("slope", [Slope(), Slope(0.5, 15.0)])
def test_text_alone(slope):
    seed = fresh()
    _, student = drawn(seed)
    n, v = student.shape
    labels, weight = torch.randint(v, (n,)), weights(seed, n)
    weight[0] = 0.0
    ce, entropy = of_text(student.double(), labels)
    _, want = with_gradient(lambda s: weight * of_text(s, labels)[0], student)
    made = student.to(DEVICE, copy=True)
    losses = text_(made, Text(labels.to(DEVICE), weight.to(DEVICE)), slope)
    told = f"seed {seed}, {tuple(student.shape)}"
    assert losses.divergence is None
    assert off(cpu(losses.cross_entropy), ce) < 1e-6 and off(cpu(losses.entropy), entropy) < 3e-6, told
    assert off(made.cpu(), want * steepness(student, slope)) < 3e-6, told


@pytest.mark.parametrize("temperature", [1.0, None])
@pytest.mark.parametrize("with_text", [False, True])
@pytest.mark.parametrize("slope", [Slope(), Slope(0.5, 15.0)])
def test_a_sample(temperature, with_text, slope):
    """As ``Sparse.loss`` in float64, also where a position has no entries and where an id comes twice."""
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    spec = Divergence(temperature=uniform(g, 0.5, 3.0) if temperature is None else temperature)
    _, student = drawn(seed)
    n, v = student.shape
    counts = torch.randint(0, 20, (n,), generator=g)
    counts[0] = 0
    e = int(counts.sum())
    ids = torch.randint(min(v, 50), (e,), generator=g)
    sample = Sparse.of(counts, ids, torch.rand(e, generator=g) / 10, torch.rand(n, generator=g))
    kd, text = weights(seed, n), Text(torch.randint(v, (n,), generator=g), weights(seed + 1, n))
    value, want = sample.loss(spec, student.double())
    want = want * kd.unsqueeze(-1)
    if with_text:
        want += with_gradient(lambda s: text.weight * of_text(s, text.labels)[0], student)[1]
    made = student.to(DEVICE, copy=True)
    losses = sampled_(
        spec,
        tuple(x.to(DEVICE) for x in (sample.row, sample.ids, sample.weights, sample.entropy)),
        made,
        kd.to(DEVICE),
        Text(text.labels.to(DEVICE), text.weight.to(DEVICE)) if with_text else None,
        slope,
    )
    told = f"seed {seed}, {spec}, {tuple(student.shape)}"
    assert off(cpu(losses.divergence), value) < 3e-6, told
    assert off(made.cpu(), want * steepness(student, slope)) < 3e-6, told
    if with_text:
        ce, entropy = of_text(student.double(), text.labels)
        assert off(cpu(losses.cross_entropy), ce) < 1e-6 and off(cpu(losses.entropy), entropy) < 3e-6, told
    with pytest.raises(ValueError, match="not linear"):
        sampled_(Divergence("jsd"), (), made, kd.to(DEVICE))
