"""Head and loss in one pass over tiles: the number and the gradient of whole logits, whatever the tile, in float64."""

from __future__ import annotations

import pytest
import torch
from truth import between, fresh, off

from pennyweight.loss import chunked
from pennyweight.loss.chunked import Terms, tiled_loss
from pennyweight.loss.divergence import DIVERGENCES, Divergence
from pennyweight.loss.signals import Dense, Grouped, Sets, Sparse, TopK
from pennyweight.model.head import Head

N, D, V, K = 37, 16, 83, 9
PLAIN, CAPPED = {"scale": 1.0, "softcap": None}, {"scale": 0.5, "softcap": 6.0}

# Tokens from 41 on are said only in runs of three, of the vocabulary in another order; ids are then those of outcomes.
SETS = Sets(
    41, torch.randperm(V, generator=torch.Generator().manual_seed(1)), torch.arange(42)[:, None] + torch.tensor([0, 3])
)


def inputs(seed):
    g = torch.Generator().manual_seed(seed)
    r = lambda *s: torch.randn(*s, generator=g)  # noqa: E731
    return {
        "hidden": r(N, D),
        "weight": r(V, D),
        "bias": r(V),
        "teacher": 2 * r(N, V),
        "labels": torch.randint(0, V, (N,), generator=g),
        "ce": torch.rand(N, generator=g),
        "kd": torch.rand(N, generator=g),
    }


def target_of(x, kind, temperature=1.0):
    """The teacher as one of the four; the sample holds every second id, twice its probability, and with sets the second
    half of the ids stands for the runs of ``SETS``."""
    p = torch.softmax(x["teacher"] / temperature, -1)
    if kind == "dense":
        return Dense.of(x["teacher"])
    if kind == "top_k":
        probs, ids = p.topk(K)
        return TopK(ids, probs)
    held = torch.rand(N, V, generator=torch.Generator().manual_seed(int(x["labels"].sum()))) < 0.5
    held[3] = False
    row, ids = held.nonzero(as_tuple=True)
    sample = Sparse.of(held.sum(-1), ids, 2 * p[row, ids], torch.linspace(0, 2, N))
    return sample if kind == "sparse" else Grouped(sample, SETS)


def truth(x, spec, head, kind="dense"):
    """Textbook, float64, all logits at once: loss, gradients, and sums of cross-entropy, divergence and entropy."""
    leaves = [x[k].double().requires_grad_(True) for k in ("hidden", "weight", "bias")]
    logits = head["scale"] * (leaves[0] @ leaves[1].T + leaves[2])
    logits = head["softcap"] * torch.tanh(logits / head["softcap"]) if head["softcap"] else logits
    t = spec.temperature
    log_q, log_p, plain = (torch.log_softmax(y, -1) for y in (logits / t, x["teacher"].double() / t, logits))
    target = target_of(x, kind, t)
    if isinstance(target, TopK):
        others = torch.ones_like(log_q, dtype=torch.bool).scatter(-1, target.ids, False)
        q_rest = torch.where(others, log_q, -torch.inf).logsumexp(-1, keepdim=True)
        log_q = torch.cat([log_q.gather(-1, target.ids), q_rest], -1)
        p = target.probs.double()
        log_p = torch.cat([p, 1 - p.sum(-1, keepdim=True)], -1).log()
    if isinstance(target, Grouped):
        runs = [target.sets.order[a:b] for a, b in target.sets.bounds.tolist()]
        log_q = torch.cat([log_q[:, :41], *(log_q[:, run].logsumexp(-1, keepdim=True) for run in runs)], -1)
        target = target.sample
    if isinstance(target, Sparse):
        w = torch.zeros(N, V, dtype=torch.float64).index_put((target.row, target.ids), target.weights.double())
        kd = t * t * (-(w * log_q).sum(-1) - target.entropy)
    else:
        kd = t * t * between(spec.kind, log_p, log_q, spec.beta, spec.alpha)
    ce, entropy = -plain[range(N), x["labels"]], -(plain.exp() * plain).sum(-1)
    loss = (x["ce"].double() * ce + x["kd"].double() * kd).sum()
    return (
        float(loss.detach()),
        torch.autograd.grad(loss, leaves),
        float(ce.detach().sum()),
        float(kd.detach().sum()),
        float(entropy.detach().sum()),
    )


def terms_of(x, spec, kind="dense"):
    return Terms(x["labels"], x["ce"], x["kd"], spec, target_of(x, kind, spec.temperature))


def ours(x, terms, head=PLAIN, scale=1.0, dtype=torch.float32, **kw):
    """Totals, and the gradients of hidden states, weight and bias."""
    leaves = [x[k].to(dtype, copy=True).requires_grad_(True) for k in ("hidden", "weight", "bias")]
    found = tiled_loss(leaves[0], Head(leaves[1], leaves[2], **head), terms, **kw)
    (scale * found.loss).backward()
    return found, [leaf.grad for leaf in leaves]


def check(found, grads, want, seed, scale=1.0, limit=1e-5):
    loss, want_grads, *_ = want
    assert float(found.loss.detach()) == pytest.approx(loss, rel=limit), f"seed {seed}"
    for name, grad, w in zip(("hidden", "weight", "bias"), grads, want_grads, strict=True):
        assert off(grad / scale, w) < limit, f"seed {seed}: gradient of the {name} off by {off(grad / scale, w):.1e}"


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("head", [PLAIN, CAPPED])
@pytest.mark.parametrize("tile", [1, 10, N, None])
def test_any_tile_is_the_whole(kind, head, tile):
    seed = fresh()
    x, spec = inputs(seed), Divergence(kind, 0.4, 1.3, 0.2)
    want = truth(x, spec, head)
    found, grads = ours(x, terms_of(x, spec), head, 2.0, measure=True, tile=tile)
    check(found, grads, want, seed, 2.0, 2e-5 if kind == "tvd" else 1e-5)
    assert found.count == N
    assert (found.cross_entropy, found.divergence, found.entropy) == pytest.approx(want[2:], rel=1e-5), f"seed {seed}"


@pytest.mark.parametrize("target", ["top_k", "sparse", "grouped"])
@pytest.mark.parametrize("measure", [True, False])
@pytest.mark.parametrize("tile", [1, 5, None])
@pytest.mark.parametrize("head", [PLAIN, CAPPED])
def test_every_kind_of_target_goes_through_tiles(target, measure, tile, head):
    seed = fresh()
    kind = "forward_kl" if target in ("sparse", "grouped") else list(DIVERGENCES)[seed % 5]
    x, spec = inputs(seed), Divergence(kind, 0.4, 1.3, 0.2)
    want = truth(x, spec, head, target)
    found, grads = ours(x, terms_of(x, spec, target), head, measure=measure, tile=tile)
    check(found, grads, want, seed, limit=2e-5)
    assert found.divergence == pytest.approx(want[3], rel=2e-5), f"seed {seed}"
    assert (found.cross_entropy is None) == (found.entropy is None) == (not measure)
    if measure:
        assert (found.cross_entropy, found.entropy) == pytest.approx((want[2], want[4]), rel=1e-5), f"seed {seed}"


@pytest.mark.parametrize("target", ["dense", "top_k", "sparse", "grouped"])
@pytest.mark.parametrize("head", [PLAIN, CAPPED])
def test_any_split_of_a_batch_gives_the_same_gradient(target, head):
    """To 1e-6: cut into parts at random, each in tiles of its own, parts of no position among them."""
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    x, spec = inputs(seed), Divergence(temperature=1.5)
    whole = terms_of(x, spec, target)
    _, want = ours(x, whole, head)
    order = torch.randperm(N, generator=g)
    cuts = sorted(torch.randint(0, N + 1, (4,), generator=g).tolist())
    got = [torch.zeros_like(w, dtype=torch.float64) for w in want]
    for a, b in zip([0, *cuts], [*cuts, N], strict=True):
        index = order[a:b]
        part = {**x, "hidden": x["hidden"][index]}
        _, grads = ours(part, whole.take(index), head, tile=1 + int(torch.randint(0, 8, (), generator=g)))
        got[0][index] += grads[0]
        got[1] += grads[1]
        got[2] += grads[2]
    for a, b in zip(got, want, strict=True):
        assert off(a, b.double()) < 1e-6, f"seed {seed}, cuts {cuts}: {off(a, b.double()):.1e}"


@pytest.mark.parametrize("target", ["dense", "top_k", "sparse", "grouped"])
def test_blocks_within_a_tile_change_nothing(target, monkeypatch):
    seed = fresh()
    x, spec = inputs(seed), Divergence(temperature=0.8)
    found, want = ours(x, terms_of(x, spec, target), CAPPED, measure=True, tile=16)
    monkeypatch.setattr(chunked, "_BLOCK_ENTRIES", {"cpu": 3 * V + 5})
    again, grads = ours(x, terms_of(x, spec, target), CAPPED, measure=True, tile=16)
    for a, b in zip(grads, want, strict=True):
        assert off(a, b.double()) < 1e-6, f"seed {seed}"
    one, other = ((y.cross_entropy, y.divergence, y.entropy) for y in (found, again))
    assert one == pytest.approx(other, rel=1e-6), f"seed {seed}"


def test_a_vocabulary_wider_than_a_block():
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    v = 70_000
    hidden, weight = torch.randn(3, 4, generator=g).requires_grad_(True), torch.randn(v, 4, generator=g)
    teacher, labels = torch.randn(3, v, generator=g), torch.tensor([0, v - 1, 65_536])
    terms = Terms(labels, 0.5 * torch.ones(3), torch.ones(3), Divergence(), Dense.of(teacher))
    tiled_loss(hidden, Head(weight), terms).loss.backward()
    h = hidden.detach().double().requires_grad_(True)
    log_q, log_p = torch.log_softmax(h @ weight.double().T, -1), torch.log_softmax(teacher.double(), -1)
    (between("forward_kl", log_p, log_q).sum() - 0.5 * log_q[range(3), labels].sum()).backward()
    assert off(hidden.grad, h.grad) < 1e-5, f"seed {seed}"


@pytest.mark.parametrize("vocabulary", [8192, 8193, 20_000, 32_768])
def test_heads_multiplied_in_parts_and_rows_moved_apart_are_the_whole(vocabulary):
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(9, D, generator=g), torch.randn(vocabulary, D, generator=g)
    other, bias = torch.randn(9, D, generator=g), torch.randn(vocabulary, generator=g)
    head = Head(weight, bias, **CAPPED)
    out = torch.empty(9, vocabulary)
    assert head.logits(hidden, out) is out and torch.allclose(out, head.logits(hidden), atol=1e-5)
    leaves = [x.double().requires_grad_() for x in (hidden, weight)]
    logits = 0.5 * (leaves[0] @ leaves[1].T + bias.double())
    q, p = (torch.log_softmax(6 * torch.tanh(x / 6), -1) for x in (logits, 0.5 * (other @ weight.T + bias).double()))
    want = torch.autograd.grad((p.exp() * (p - q)).sum(), leaves)
    leaf, moved = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    target = Dense.live(other, head.logits)
    terms = Terms(torch.zeros(9, dtype=torch.long), torch.zeros(9), torch.ones(9), Divergence(), target)
    tiled_loss(leaf, Head(moved, bias, **CAPPED), terms, tile=4).loss.backward()
    for got, exact in zip((leaf.grad, moved.grad), want, strict=True):
        assert off(got, exact) < 1e-5, f"seed {seed}"


@pytest.mark.parametrize("vocabulary", [2048, 2050])
@pytest.mark.parametrize("grouped", [False, True])
def test_samples_where_rows_are_moved_apart(vocabulary, grouped):
    """A CPU's rows have a gap between them where the vocabulary is a multiple of 1,024."""
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(9, D, generator=g), torch.randn(vocabulary, D, generator=g)
    ids, w = torch.stack([torch.randperm(vocabulary, generator=g)[:4] for _ in range(9)]), torch.rand(9, 4, generator=g)
    target = Sparse.of(torch.full((9,), 4), ids.flatten(), w.flatten(), torch.zeros(9))
    if grouped:
        target = Grouped(
            target, Sets(vocabulary, torch.zeros(0, dtype=torch.long), torch.zeros(0, 2, dtype=torch.long))
        )
    leaf, h = hidden.clone().requires_grad_(), hidden.double().requires_grad_()
    terms = Terms(ids[:, 0], torch.zeros(9), torch.ones(9), Divergence(), target)
    found = tiled_loss(leaf, Head(weight), terms, tile=4)
    found.loss.backward()
    want = -(w.double() * torch.log_softmax(h @ weight.double().T, -1).gather(1, ids)).sum()
    want.backward()
    assert float(found.loss.detach()) == pytest.approx(float(want.detach()), rel=1e-5), f"seed {seed}"
    assert off(leaf.grad, h.grad) < 1e-5, f"seed {seed}"


@pytest.mark.parametrize("kind", ["forward_kl", "jsd"])
def test_bfloat16_hidden_states_and_head(kind):
    """Their gradients are the float64 ones of the same rounded numbers, rounded once more at the end."""
    seed = fresh()
    x, spec = inputs(seed), Divergence(kind)
    x = {k: v.bfloat16().float() if k in ("hidden", "weight", "bias") else v for k, v in x.items()}
    want = truth(x, spec, CAPPED)
    found, grads = ours(x, terms_of(x, spec), CAPPED, dtype=torch.bfloat16, tile=8)
    assert float(found.loss.detach()) == pytest.approx(want[0], rel=1e-5), f"seed {seed}"
    for grad, w in zip(grads, want[1], strict=True):
        assert grad.dtype == torch.bfloat16
        assert bool(((grad.double() - w).abs() <= 2**-8 * w.abs() + 1e-5 * w.norm()).all()), f"seed {seed}"


def test_bfloat16_hidden_states_over_a_float32_head_give_its_float32_gradient():
    seed = fresh()
    x, spec = inputs(seed), Divergence()
    x["hidden"] = x["hidden"].bfloat16().float()
    want = truth(x, spec, PLAIN)
    hidden, weight = x["hidden"].bfloat16().requires_grad_(True), x["weight"].clone().requires_grad_(True)
    tiled_loss(hidden, Head(weight, x["bias"]), terms_of(x, spec)).loss.backward()
    assert hidden.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
    assert off(weight.grad, want[1][1]) < 1e-5, f"seed {seed}"


def test_a_head_that_is_trained_in_two_places_gets_both_gradients():
    """Tied embeddings: the hidden states come of the weight as well."""
    seed = fresh()
    x, spec = inputs(seed), Divergence()
    weight = x["weight"].clone().requires_grad_(True)
    tiled_loss(torch.tanh(weight[:N]), Head(weight), terms_of(x, spec), tile=7).loss.backward()
    w = x["weight"].double().requires_grad_(True)
    log_q, log_p = torch.log_softmax(torch.tanh(w[:N]) @ w.T, -1), torch.log_softmax(x["teacher"].double(), -1)
    ce = -log_q[range(N), x["labels"]]
    ((x["ce"] * ce).sum() + (x["kd"] * between("forward_kl", log_p, log_q)).sum()).backward()
    assert off(weight.grad, w.grad) < 1e-5, f"seed {seed}"


@pytest.mark.parametrize("target", ["dense", "top_k", "sparse", "grouped"])
def test_what_is_frozen_gets_no_gradient_and_the_rest_is_as_before(target):
    seed = fresh()
    x, spec = inputs(seed), Divergence()
    _, want = ours(x, terms_of(x, spec, target))
    for moves in ("hidden", "weight", "bias"):
        leaves = {k: x[k].clone().requires_grad_(k == moves) for k in ("hidden", "weight", "bias")}
        head = Head(leaves["weight"], leaves["bias"])
        tiled_loss(leaves["hidden"], head, terms_of(x, spec, target)).loss.backward()
        for k, w in zip(leaves, want, strict=True):
            assert (leaves[k].grad is None) == (k != moves)
            assert k != moves or off(leaves[k].grad, w.double()) < 1e-6, f"seed {seed}"


def test_nothing_that_moves_is_a_measurement():
    x = inputs(fresh())
    found = tiled_loss(x["hidden"], Head(x["weight"]), terms_of(x, Divergence()), measure=True)
    assert not found.loss.requires_grad and found.entropy is not None and found.entropy > 0


def test_cross_entropy_alone():
    seed = fresh()
    x = inputs(seed)
    x["kd"] = torch.zeros(N)
    want = truth(x, Divergence(), CAPPED)
    for measure in (False, True):
        terms = Terms(x["labels"], x["ce"], x["kd"], Divergence())
        found, grads = ours(x, terms, CAPPED, measure=measure, tile=6)
        check(found, grads, want, seed)
        assert found.divergence is None
        assert found.cross_entropy == (pytest.approx(want[2], rel=1e-5) if measure else None), f"seed {seed}"
        assert found.entropy == (pytest.approx(want[4], rel=1e-5) if measure else None), f"seed {seed}"


@pytest.mark.parametrize("target", ["dense", "top_k", "sparse", "grouped"])
@pytest.mark.parametrize("measure", [False, True])
def test_positions_that_weigh_nothing_pull_nothing(target, measure):
    """Some weigh nothing at all, some only one of the two; the others pull as if alone."""
    seed = fresh()
    x, spec = inputs(seed), Divergence(temperature=1.4)
    x["ce"][::2] = 0
    x["kd"][::3] = 0
    x["kd"][20:25] = 0
    x["ce"][20:25] = 0
    want = truth(x, spec, PLAIN, target)
    found, grads = ours(x, terms_of(x, spec, target), measure=measure, tile=4)
    check(found, grads, want, seed)
    idle = (x["ce"] == 0) & (x["kd"] == 0)
    assert int(idle.sum()) > 8 and bool((grads[0][idle] == 0).all()) and bool((grads[0][~idle] != 0).any(-1).all())
    assert found.count == N
    if measure:  # sums are over all positions, whatever they weigh
        assert (found.cross_entropy, found.divergence, found.entropy) == pytest.approx(want[2:], rel=1e-5)


def test_positions_that_weigh_nothing_are_not_asked_of_the_teacher():
    x, asked = inputs(3), []
    x["ce"][:] = 0
    x["kd"][5:] = 0

    def logits(states, out):
        asked.append(states[:, 0].tolist())
        return states.clone() if out is None else out.copy_(states)

    marked = x["teacher"].clone()
    marked[:, 0] = torch.arange(N)
    terms = Terms(x["labels"], x["ce"], x["kd"], Divergence(), Dense.live(marked, logits))
    ours(x, terms, tile=2)
    assert asked == [[0, 1], [2, 3], [4]]


def test_no_weight_anywhere_is_a_loss_of_nothing():
    x = inputs(2)
    nothing = Terms(x["labels"], torch.zeros(N), torch.zeros(N), Divergence(), target_of(x, "dense"))
    for measure in (False, True):
        found, grads = ours(x, nothing, measure=measure)
        assert float(found.loss.detach()) == 0.0 and all(bool((g == 0).all()) for g in grads)
        assert found.count == N


def test_a_weight_on_a_teacher_that_is_not_there_pulls_nothing():
    x = inputs(4)
    for ce in (torch.zeros(N), torch.cat([torch.zeros(20), torch.ones(N - 20)])):
        found, grads = ours(x, Terms(x["labels"], ce, torch.ones(N), Divergence()), tile=4)
        assert bool((grads[0][:20] == 0).all()), "raw logits came out as the gradient"
        assert found.divergence is None


@pytest.mark.parametrize("target", [None, "dense", "top_k", "sparse", "grouped"])
@pytest.mark.parametrize("measure", [False, True])
def test_a_batch_without_positions(target, measure):
    x = inputs(5)
    none = torch.zeros(0, dtype=torch.long)
    spec = Divergence()
    whole = Terms(x["labels"], x["ce"], x["kd"], spec, target and target_of(x, target))
    found, grads = ours({**x, "hidden": x["hidden"][:0]}, whole.take(none), measure=measure)
    assert float(found.loss.detach()) == 0.0 and found.count == 0 and grads[0].shape == (0, D)
    assert all(bool((g == 0).all()) for g in grads)
    assert found.divergence == (0.0 if target else None) and found.cross_entropy == (0.0 if measure else None)


def test_a_second_backward_pass_is_refused():
    x = inputs(6)
    hidden = x["hidden"].clone().requires_grad_(True)
    loss = tiled_loss(hidden, Head(x["weight"]), terms_of(x, Divergence())).loss
    loss.backward(retain_graph=True)
    before = hidden.grad.clone()
    with pytest.raises(RuntimeError, match="one backward pass"):
        loss.backward()
    assert torch.equal(hidden.grad, before)


def test_inputs_are_kept():
    x = inputs(7)
    before = {k: v.clone() for k, v in x.items()}
    for target in ("dense", "top_k", "sparse"):
        terms = terms_of(x, Divergence(temperature=2.0), target)
        for measure in (False, True):
            ours(x, terms, CAPPED, measure=measure)
        again = target_of(x, target, 2.0)
        if isinstance(again, TopK):
            assert torch.equal(again.ids, terms.target.ids) and torch.equal(again.probs, terms.target.probs)
        if isinstance(again, Sparse):
            assert torch.equal(again.ids, terms.target.ids) and torch.equal(again.weights, terms.target.weights)
    assert all(torch.equal(x[k], before[k]) for k in x)
