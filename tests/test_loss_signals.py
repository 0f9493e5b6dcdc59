"""What a teacher comes as: dense, top-k with the rest as one outcome, and a sample, against float64 and each other."""

from __future__ import annotations

import math

import pytest
import torch
from truth import between, fresh, off, textbook, uniform, with_gradient

from pennyweight.loss.divergence import DIVERGENCES, Divergence, divergence
from pennyweight.loss.signals import Dense, Sparse, TopK, softmax_
from pennyweight.teacher.targets import restore, top, uniforms

KINDS = list(DIVERGENCES)
DISTANCES = [None, 1.0, 0.04, 0.0016, 1e-6]


def inputs(seed, distance=None, temperature=1.0, n=24, v=301):
    """Float32 logits of a teacher and a student, about so far apart at the temperature."""
    g = torch.Generator().manual_seed(seed)
    student = torch.randn(n, v, generator=g) * 3
    if distance is None:
        return torch.randn(n, v, generator=g) * 3, student
    return student + math.sqrt(2 * distance) * temperature * torch.randn(n, v, generator=g), student


def a_spec(seed, kind, temperature=None):
    g = torch.Generator().manual_seed(seed + 1)
    beta, alpha, t = uniform(g, 0.05, 0.95), uniform(g, 0.05, 0.95), uniform(g, 0.5, 4.0)
    return Divergence(kind, beta, t if temperature is None else temperature, alpha)


# Dense


def test_dense_logits_are_kept_cut_and_written_where_they_are_wanted():
    logits = torch.randn(9, 5)
    before, target = logits.clone(), Dense.of(logits)
    target.logits(slice(0, 9), None).fill_(0)
    assert torch.equal(logits, before)
    out = torch.empty(3, 5)
    assert target.logits(slice(2, 5), out) is out and torch.equal(out, before[2:5])
    index = torch.tensor([7, 0, 3, 3])
    taken = target.take(index)
    assert torch.equal(taken.logits(slice(1, 4), None), before[[0, 3, 3]])
    assert torch.equal(taken.take(torch.tensor([3, 0])).logits(slice(0, 2), None), before[[3, 7]])


def test_live_logits_are_made_of_the_rows_that_are_asked_for_and_no_others():
    states, asked = torch.randn(9, 4), []

    def logits(rows, out):
        asked.append(rows.clone())
        return rows.mul(2.0) if out is None else torch.mul(rows, 2.0, out=out)

    target = Dense.live(states, logits)
    out = torch.empty(2, 4)
    assert target.logits(slice(3, 5), out) is out and torch.equal(out, 2 * states[3:5])
    index = torch.tensor([8, 1, 5])
    assert torch.equal(target.take(index).logits(slice(1, 3), None), 2 * states[[1, 5]])
    assert [len(x) for x in asked] == [2, 2]


# Top K and the rest


def coarse(logits, ids):
    """Log-probabilities of K + 1 outcomes: the given ids, and all others together."""
    log_q = torch.log_softmax(logits, -1)
    others = torch.ones_like(log_q, dtype=torch.bool).scatter(-1, ids, False)
    rest = torch.where(others, log_q, -math.inf).logsumexp(-1, keepdim=True)
    return torch.cat([log_q.gather(-1, ids), rest], -1)


def of_top_k(spec, ids, probs, student):
    """The divergence over those outcomes as a textbook has it, in the student's dtype."""
    p = probs.to(student.dtype)
    log_p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1).log()
    t = spec.temperature
    return t * t * between(spec.kind, log_p, coarse(student / t, ids), spec.beta, spec.alpha)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("temperature", [1.0, None])
def test_top_k_against_float64_over_k_plus_one_outcomes(kind, distance, temperature):
    seed = fresh()
    spec = a_spec(seed, kind, temperature)
    teacher, student = inputs(seed, distance, spec.temperature)
    whole, k = torch.softmax(teacher / spec.temperature, -1), 1 + seed % 40
    while k > 1 and (1 - whole.topk(k).values.double().sum(-1)).min() < 1e-5:
        k //= 2  # of less, float32 does not know how much is left
    probs, ids = whole.topk(k)
    want, want_gradient = with_gradient(lambda s: of_top_k(spec, ids, probs, s), student)
    rival, rival_gradient = with_gradient(lambda s: of_top_k(spec, ids, probs, s), student, torch.float32)
    got, gradient = TopK(ids, probs).loss(spec, student.clone())
    assert got.dtype == gradient.dtype == torch.float32 and gradient.shape == student.shape
    told = f"seed {seed}, {spec}: value off by {off(got, want):.1e}, gradient by {off(gradient, want_gradient):.1e}"
    # What float32 makes of the mass that is left, 1 - sum of probs, no arithmetic afterwards takes back.
    blur = 3e-7 / float((want.mean() / spec.temperature**2) ** (1.0 if kind == "tvd" else 0.5))
    assert off(got, want) <= off(rival, want) + 5e-6 + blur, f"{told}; the naive value by {off(rival, want):.1e}"
    if kind == "tvd":  # its gradient is a matter of signs: where float32 cannot have them, there is none to compare
        t, p = spec.temperature, probs.double()
        log_p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1).log()
        sure = (log_p - coarse(student.double() / t, ids)).abs().amin(-1) > 1e-5 * (1 + 1 / (log_p[:, -1].exp()))
        error = (gradient.double() - want_gradient).norm(dim=-1)
        assert bool((error <= 2e-6 * t + 1e-5 * want_gradient.norm(dim=-1))[sure].all()), told
        return
    rivals = off(rival_gradient, want_gradient)
    assert off(gradient, want_gradient) <= rivals + 1e-5 + blur, f"{told}; the naive gradient by {rivals:.1e}"


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_is_never_above_the_whole_and_grows_with_k(kind):
    """Data processing: to look at fewer outcomes can only bring two distributions nearer.

    Reverse KL has the logarithm of the mass that is left in it, which float32 rounds when it is small.
    """
    seed = fresh()
    spec = a_spec(seed, kind)
    teacher, student = inputs(seed)
    whole = divergence(spec, teacher.clone(), student.clone())[0]
    below, slack = torch.zeros(len(teacher)), (1e-3 if kind == "reverse_kl" else 1e-5) * whole
    slack += 2e-5 * spec.temperature**2  # where float32 leaves no mass, half a step of it stands for what there is
    for k in (1, 3, 10, 40, 150):
        probs, ids = torch.softmax(teacher / spec.temperature, -1).topk(k)
        value = TopK(ids, probs).loss(spec, student.clone())[0]
        assert bool((value >= below - slack).all()), f"seed {seed}, {spec}, k {k}"
        assert bool((value <= whole + slack).all()), f"seed {seed}, {spec}, k {k}"
        below = value


@pytest.mark.parametrize("kind", KINDS)
def test_top_k_of_everything_is_dense(kind):
    seed = fresh()
    spec = a_spec(seed, kind)
    teacher, student = inputs(seed, n=16, v=13)
    want, want_gradient = with_gradient(lambda s: textbook(spec, teacher.double(), s), student)
    probs, ids = torch.softmax(teacher / spec.temperature, -1).topk(13)
    value, gradient = TopK(ids, probs).loss(spec, student.clone())
    assert off(value, want) < 1e-4 and off(gradient, want_gradient) < 1e-4, f"seed {seed}, {spec}: {value} for {want}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [3, 13])
def test_top_k_as_it_is_stored_is_near_what_it_was_made_from(kind, k):
    """Probabilities in steps of 1 / 65535, of a sharp teacher: some are stored as zero, or leave no mass at all."""
    seed = fresh()
    spec = a_spec(seed, kind)
    teacher, student = inputs(seed, n=64, v=13)
    t = spec.temperature
    kept = top(4 * t * teacher, k, t, uniforms(64, seed), 16)
    _, ids, probs, _ = restore(kept, 0.0, 16)
    ids, probs = ids.view(64, k), probs.view(64, k)
    value, gradient = TopK(ids, probs).loss(spec, student.clone())
    if kind == "reverse_kl":  # has the logarithm of what was rounded away in it: no step is below exp(-11.1)
        most = float(torch.maximum(value.abs().max() / t**2, gradient.abs().max() / t))
        assert most < 30.0, f"seed {seed}, {spec}: values or gradients of up to {most:.1e}"
        return
    log_p = coarse(4 * teacher.double(), ids)

    def truth(s):
        if k == 13:
            return textbook(spec, 4 * t * teacher.double(), s)
        return t * t * between(kind, log_p, coarse(s / t, ids), spec.beta, spec.alpha)

    want, want_gradient = with_gradient(truth, student)
    error, slip = float((value - want).abs().max()) / t**2, float((gradient - want_gradient).abs().max()) / t
    assert error < 0.01, f"seed {seed}, {spec}: values off by up to {error:.1e}"
    assert slip < 0.001 or kind == "tvd", f"seed {seed}, {spec}: gradients off by up to {slip:.1e}"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("k", [32, 1024])
def test_a_student_that_is_its_sharp_teacher_is_told_so_by_stored_top_k(kind, k):
    """Most of the k are stored as zero; what stands for them must not add up to anything."""
    seed = fresh()
    spec = a_spec(seed, kind, 1.0)
    teacher = torch.randn(64, 65_536, generator=torch.Generator().manual_seed(seed))
    teacher[:, 0] += 25
    kept = top(teacher.clone(), k, 1.0, uniforms(64, seed), 16)
    _, ids, probs, _ = restore(kept, 0.0, 16)
    assert float((probs == 0).float().mean()) > 0.9
    value, gradient = TopK(ids.view(64, k), probs.view(64, k)).loss(spec, teacher.clone())
    # Of each position, less than a step of 1.5e-5 is rounded; how probable it was is not known better than that.
    assert float(value.abs().mean()) < 2e-4, f"seed {seed}, {spec}"
    assert float(gradient.abs().sum(-1).mean()) < (3e-4 if kind != "tvd" else 1e-3), f"seed {seed}, {spec}"


@pytest.mark.parametrize("kind", KINDS)
def test_a_student_so_sharp_that_the_rest_of_it_underflows(kind):
    """A token 300 nats above all others, as dense targets take it."""
    seed = fresh()
    spec = a_spec(seed, kind, 1.0)
    teacher, student = inputs(seed, v=40)
    probs, ids = torch.softmax(teacher, -1).topk(5)
    student.scatter_add_(-1, ids[:, :1], torch.full((len(ids), 1), 300.0))
    want, want_gradient = with_gradient(lambda s: of_top_k(spec, ids, probs, s), student)
    value, gradient = TopK(ids, probs).loss(spec, student.clone())
    # A logit of 300 is itself good to 1.5e-5 only.
    error, slip = (value - want).abs() - 5e-5 * want, (gradient - want_gradient).abs()
    assert float(error.max()) < 5e-5, f"seed {seed}, {spec}: {value[:4]} for {want[:4]}"
    assert float(slip.max()) < 5e-5, f"seed {seed}, {spec}"


def test_top_k_is_cut_and_picked_by_position():
    ids, probs = torch.arange(12).view(6, 2), torch.rand(6, 2) / 2
    target = TopK(ids, probs)
    assert torch.equal(target.span(2, 5).ids, ids[2:5]) and torch.equal(target.span(2, 5).probs, probs[2:5])
    index = torch.tensor([5, 0, 5])
    assert torch.equal(target.take(index).ids, ids[index]) and torch.equal(target.take(index).probs, probs[index])


# A sample


def everything(teacher, temperature=1.0) -> Sparse:
    """A 'sample' that holds every id at its probability."""
    n, v = teacher.shape
    log_p = torch.log_softmax(teacher.double() / temperature, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    ids = torch.arange(v).repeat(n)
    return Sparse.of(torch.full((n,), v), ids, log_p.exp().flatten().float(), entropy.float())


def a_sample(seed, n=12, v=31):
    """Entries of any number, none included, in no order and with repeats."""
    g = torch.Generator().manual_seed(seed)
    counts = torch.randint(0, 6, (n,), generator=g)
    counts[[0, n // 2, n - 1]] = 0
    e = int(counts.sum())
    return Sparse.of(
        counts, torch.randint(0, v, (e,), generator=g), torch.rand(e, generator=g), torch.rand(n, generator=g)
    )


def parts(sparse):
    """(ids, weights, entropy) of each position."""
    sizes = sparse.starts.diff().tolist()
    return list(zip(sparse.ids.split(sizes), sparse.weights.split(sizes), sparse.entropy, strict=True))


def same(a, b):
    return len(a) == len(b) and all(
        torch.equal(x, y) for p, q in zip(a, b, strict=True) for x, y in zip(p, q, strict=True)
    )


@pytest.mark.parametrize("temperature", [1.0, 0.6, 3.0])
def test_a_sample_of_everything_is_the_dense_forward_kl(temperature):
    seed = fresh()
    teacher, student = inputs(seed)
    spec = Divergence(temperature=temperature)
    want, want_gradient = with_gradient(lambda s: textbook(spec, teacher.double(), s), student)
    value, gradient = everything(teacher, temperature).loss(spec, student.clone())
    assert off(value, want) < 1e-5 and off(gradient, want_gradient) < 1e-5, f"seed {seed}"


@pytest.mark.parametrize("temperature", [1.0, 2.2])
def test_a_sample_against_float64_term_by_term(temperature):
    """Weights that sum to anything, repeated ids, and positions without any entry."""
    seed = fresh()
    sample, student = a_sample(seed), torch.randn(12, 31, generator=torch.Generator().manual_seed(seed + 2)) * 2

    def truth(s):
        log_q = torch.log_softmax(s / temperature, -1)
        sums = [-(w.to(s.dtype) * log_q[i, ids]).sum() for i, (ids, w, _) in enumerate(parts(sample))]
        return temperature**2 * (torch.stack(sums) - sample.entropy)

    want, want_gradient = with_gradient(truth, student)
    value, gradient = sample.loss(Divergence(temperature=temperature), student.clone())
    assert off(value, want) < 1e-5 and off(gradient, want_gradient) < 1e-5, f"seed {seed}"
    assert float(gradient[0].abs().max()) == 0.0  # nothing was kept there
    assert float(value[0]) == pytest.approx(-(temperature**2) * float(sample.entropy[0]))


def test_a_sample_is_cut_and_picked_by_position():
    seed = fresh()
    sample = a_sample(seed)
    whole = parts(sample)
    assert sample.starts.device.type == "cpu" and torch.equal(sample.starts.diff()[sample.row].gt(0), sample.row >= 0)
    for a, b in ((0, 12), (0, 1), (3, 3), (4, 9), (11, 12)):
        cut = sample.span(a, b)
        assert same(parts(cut), whole[a:b]), f"seed {seed}: {a} to {b}"
        assert torch.equal(cut.row, torch.repeat_interleave(torch.arange(b - a), cut.starts.diff())), f"seed {seed}"
    for index in ([], [5], [11, 0, 6, 6, 3], list(range(12))):
        at = torch.tensor(index, dtype=torch.long)
        assert same(parts(sample.take(at)), [whole[i] for i in index]), f"seed {seed}: {index}"
        assert same(parts(sample.take(at).span(0, len(index))), [whole[i] for i in index]), f"seed {seed}"
    moved = sample.to(torch.device("cpu"))
    assert same(parts(moved), whole)


def test_the_loss_of_a_part_is_the_part_of_the_loss():
    seed = fresh()
    sample, student = a_sample(seed), torch.randn(12, 31)
    value, gradient = sample.loss(Divergence(), student.clone())
    index = torch.tensor([9, 2, 0, 7])
    for part, rows in ((sample.span(3, 8), slice(3, 8)), (sample.take(index), index)):
        v, g = part.loss(Divergence(), student[rows].clone())
        torch.testing.assert_close(v, value[rows], msg=f"seed {seed}")
        torch.testing.assert_close(g, gradient[rows], msg=f"seed {seed}")


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "forward_kl"])
def test_a_sample_is_refused_where_it_would_be_biased(kind):
    with pytest.raises(ValueError, match=f"{kind}.*biased"):
        a_sample(1).loss(Divergence(kind), torch.zeros(12, 31))


def test_a_sample_of_no_positions_is_one():
    none = Sparse.of(torch.zeros(0, dtype=torch.long), torch.zeros(0, dtype=torch.long), torch.zeros(0), torch.zeros(0))
    value, gradient = none.loss(Divergence(), torch.zeros(0, 7))
    assert value.shape == (0,) and gradient.shape == (0, 7)
    assert parts(none.span(0, 0)) == [] and parts(none.take(torch.zeros(0, dtype=torch.long))) == []


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_softmax_in_place_and_its_normaliser(temperature):
    logits = torch.randn(5, 90) * 30
    want = (logits.double() / temperature).softmax(-1), (logits.double() / temperature).logsumexp(-1)
    given = logits.clone()
    q, log_mass = softmax_(given, temperature)
    assert q is given
    torch.testing.assert_close(q.double(), want[0], rtol=1e-4, atol=1e-8)
    torch.testing.assert_close(log_mass.double(), want[1], rtol=1e-6, atol=1e-5)
