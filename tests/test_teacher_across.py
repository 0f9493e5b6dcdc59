"""A teacher's distribution carried over to another tokenizer: beside what its own chain rule gives, enumerated."""

from __future__ import annotations

import itertools
from collections import Counter, defaultdict
from functools import cache

import numpy as np
import pytest
import torch
from real_tokenizers import real_spelling
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from truth import fresh

from pennyweight.data.pack import collate
from pennyweight.data.render import encode
from pennyweight.errors import DataError
from pennyweight.loss.divergence import Divergence, kl
from pennyweight.loss.signals import Grouped, Sparse
from pennyweight.model.device import choose
from pennyweight.model.head import Head
from pennyweight.model.loaded import Loaded
from pennyweight.model.spelling import Spelling
from pennyweight.model.token_bytes import spelling_of
from pennyweight.records import Encoded, Message, Sample
from pennyweight.teacher.across import AcrossTeacher
from pennyweight.teacher.alignment import align, check_same_text, compare
from pennyweight.teacher.cache import TargetCache
from pennyweight.teacher.carry import Carry, levels
from pennyweight.teacher.local import LocalTeacher
from pennyweight.teacher.targets import Keep
from pennyweight.teacher.vocabulary_trie import build_trie

STORY = "Once there was a girl, Lily. She had 12 cats, 345 dogs and 6,789 birds!\n\n“Wow”, said the 🙂 한국."


def encoded(ids, ends=()):
    """Token ids of a text after one that opens it; all are learnt."""
    return Encoded("x", (0, *ids, *ends), (False, *[True] * (len(ids) + len(ends))))


# The trie


def test_a_trie_sorts_a_vocabulary_by_its_cuts():
    cuts = [None, [5], [5, 6], [7], [5, 6, 8], [7], [9, 9], []]
    trie = build_trie(cuts, 9)
    assert trie.order.tolist() == [1, 2, 4, 3, 5, 6]
    assert trie.rank.tolist() == [-1, 0, 1, 3, 2, 4, 5, -1, -1]
    five = trie.child[0, 5]
    assert (trie.low[five], trie.high[five], trie.ends[five]) == (0, 3, 1)
    nine = trie.child[0, 9]
    assert trie.ends[nine] == 0 and trie.outcome[nine] == trie.outcome[trie.child[nine, 9]] == 6
    assert trie.way(trie.child[trie.child[five, 6], 8]) == [5, 6, 8] and trie.way(0) == []
    sets = {
        trie.outcome[n]: set(trie.order[a:b].tolist())
        for n, (a, b) in enumerate(zip(trie.low, trie.high, strict=True))
        if n
    }
    assert {k: v for k, v in sets.items() if k >= 9} == {
        trie.vocabulary + k: set(trie.order[a:b].tolist()) for k, (a, b) in enumerate(trie.sets)
    }
    assert {frozenset(v) for v in sets.values()} == set(map(frozenset, ({1, 2, 4}, {2, 4}, {4}, {3, 5}, {6})))
    children = trie.children[trie.first_child[five] : trie.first_child[five + 1]]
    assert children.tolist() == [trie.child[five, 6]]


# Beside a plain walk over the same definitions


def plainly(p_RV, place, v):
    """Outcome -> probability of one place, the mean over its levels, by dictionaries and loops, in float64."""
    trie, out, children = v.trie, Counter(), defaultdict(dict)
    for (above, t), node in trie.child.items():
        children[above][t] = node
    if place.remainder is not None:
        asked = [(p_RV[place.row][place.remainder.teacher], place.remainder.student)]
    else:
        asked = []
        for d, (node, then) in enumerate(zip((0, *place.way), (place.actual, *place.then), strict=True)):
            p = p_RV[place.row + d].copy()
            barred = {t for at, n in place.barred if at == d for t in children[n]} - {then}
            p[list(barred)] = 0
            leave = v.first if not node else np.full(len(p), v.ended[node])
            says = [trie.outcome[children[node][t]] if t in children[node] else leave[t] for t in range(len(p))]
            asked.append((p, np.array(says)))
    for p, says in asked:
        whole = p.sum()
        for t in np.flatnonzero(p):
            out[int(says[t])] += p[t] / whole / len(asked)
    return out


@cache
def of_real_ones(student, teacher, ends, others_ends, more=(0, 0)):
    """``compare`` of two real tokenizers, whose vocabularies have so many more ids than tokens."""
    mine, theirs = real_spelling(student), real_spelling(teacher)
    return compare(mine, theirs, ends, others_ends, len(mine.pieces) + more[0], len(theirs.pieces) + more[1])


PAIRS = [
    ("stories260K", "tokenizers/gpt2"),
    ("tokenizers/gpt2", "stories260K"),
    ("tokenizers/smollm2", "tokenizers/gpt2"),
    ("tokenizers/gpt2", "tokenizers/smollm2"),
]
ENDS = {"stories260K": (2, 1), "tokenizers/gpt2": (50256,), "tokenizers/smollm2": (0, 2)}


@pytest.mark.parametrize(("teacher", "student"), PAIRS)
def test_tables_give_what_a_plain_walk_gives(teacher, student):
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    theirs, mine = real_spelling(teacher), real_spelling(student)
    v = of_real_ones(student, teacher, ENDS[student], ENDS[teacher], (3, 5))
    cuts = [s.cut([STORY.encode()])[0] for s in (mine, theirs)]
    places = align(encoded(cuts[0], ENDS[student][:1]), encoded(cuts[1], ENDS[teacher][-1:]), v)
    assert [p.label for p in places] == [*cuts[0], ENDS[student][0]] and all(p.row >= 0 for p in places)
    logits = 4 * torch.randn(len(cuts[1]) + 1, len(theirs.pieces) + 5, generator=g, dtype=torch.float64)
    silent = [t for t in range(logits.shape[1]) if v.first[t] < 0 and (0, t) not in v.trie.child]
    p = logits.clone()
    p[:, silent] = -torch.inf
    p = torch.softmax(p, -1).numpy()
    mass = Carry(v.trie, v.first, v.ended).told(logits, places)
    assert torch.allclose(mass.sum(-1), torch.ones(len(places), dtype=torch.float64))
    some = torch.randperm(len(places), generator=g)[:4].tolist()
    for i in {0, len(places) - 1, *some}:
        want = torch.zeros(v.trie.outcomes, dtype=torch.float64)
        for k, x in plainly(p, places[i], v).items():
            want[k] = x
        worst = float((mass[i] - want).abs().max())
        assert worst < 1e-12, f"seed {seed}, position {i}: off by {worst:.1e} at {int((mass[i] - want).abs().argmax())}"


@pytest.mark.parametrize("name", ["tokenizers/gpt2", "stories260K"])
def test_of_one_tokenizer_the_outcomes_are_the_tokens(name):
    """But for tokens that the tokenizer itself never writes, to which the teacher gives nothing here."""
    seed = fresh()
    spelling = real_spelling(name)
    size, end = len(spelling.pieces), ENDS[name][0]
    v = compare(spelling, spelling, [end], [end], size, size)
    (ids,) = spelling.cut([STORY.encode()])
    both = encoded(ids, [end])
    cuts = spelling.cut([p or b"" for p in spelling.pieces])
    written = torch.tensor([cut == [i] or i in ids or i == end for i, cut in enumerate(cuts)])
    logits = torch.randn(len(ids) + 1, size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    logits[:, ~written] = -torch.inf
    p = torch.softmax(logits, -1)
    places, carry = align(both, both, v), Carry(v.trie, v.first, v.ended)
    mass = carry.told(logits, places)
    alone = [i for i, x in enumerate(places) if not x.way]  # all but where a token has parts of characters after it
    assert len(alone) > 0.9 * len(places) and not any(carry.settled(places[i]) for i in alone)
    got = mass[:, :size].clone()
    for k, (a, b) in enumerate(v.trie.sets):
        members_written = [i for i in v.trie.order[a:b].tolist() if written[i]]
        assert len(members_written) == 1 or bool((mass[:, size + k] == 0).all())
        got[:, members_written] += mass[:, size + k : size + k + 1]
    assert len(v.trie.sets) < 20 and torch.allclose(got[alone], p[alone], rtol=1e-9, atol=1e-15), f"seed {seed}"


# Beside a teacher that knows the law of its texts: the average over texts is the student's own true distribution


def toy(merges):
    """A tokenizer of the letters a, b and c and some merges; 0 ends a text."""
    names = ["<end>", *"abc", *dict.fromkeys(x + y for x, y in merges)]
    tokenizer = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, merges))
    pieces = tuple(n.encode() if i else None for i, n in enumerate(names))
    return Spelling(pieces, tokenizer, {p: i for i, p in enumerate(pieces) if p}, None)


def next_tokens(texts, law, size):
    """Prefix of tokens -> probabilities of it and the next token."""
    found = defaultdict(lambda: torch.zeros(size, dtype=torch.float64))
    for ids, p in zip(texts, law, strict=True):
        for i in range(len(ids)):
            found[tuple(ids[:i])][ids[i]] += p
    return found


AB, BC, ABC = ("a", "b"), ("b", "c"), ("ab", "c")


@pytest.mark.parametrize(
    ("student", "teacher"),
    [
        ([AB, ABC], [AB, ABC]),
        ([], [AB, ABC]),
        ([AB, ABC], []),
        ([AB, ABC], [BC]),
        ([BC], [AB, ABC]),
        ([], [AB, BC, ("c", "a"), ABC]),
        ([("a", "a"), ("aa", "b"), ("aab", "c")], [("a", "a")]),
        ([("a", "a"), ("aa", "b"), ("aab", "c")], []),
    ],
)
def test_the_mean_over_a_teachers_texts_is_the_students_true_distribution(student, teacher):
    """All texts of up to five letters, each with its probability; the teacher's distributions are the exact conditional
    ones of its own tokens. A set's weight is spread as the true distribution spreads it: so weighed, the gradient at
    the true distribution is zero on average."""
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    mine, theirs = toy(student), toy(teacher)
    v = compare(mine, theirs, [0], [0], len(mine.pieces), len(theirs.pieces))
    carry, size = Carry(v.trie, v.first, v.ended), len(mine.pieces)
    strings = ["".join(x).encode() for n in range(6) for x in itertools.product("abc", repeat=n)]
    law = torch.rand(len(strings), generator=g, dtype=torch.float64) ** 3
    law *= 3.0 ** -torch.tensor([len(s) for s in strings], dtype=torch.float64)
    law /= law.sum()
    ours, of_teacher = ([[*cut, 0] for cut in s.cut(strings)] for s in (mine, theirs))
    truth, known = next_tokens(ours, law, size), next_tokens(of_teacher, law, len(theirs.pieces))
    mean, spread, spread_of_text = (defaultdict(lambda: torch.zeros(size, dtype=torch.float64)) for _ in range(3))
    for ids, others, p in zip(ours, of_teacher, law, strict=True):
        logits = torch.stack([known[tuple(others[:i])].log() for i in range(len(others))])
        places = align(encoded(ids), encoded(others), v)
        told = carry.told(logits, places)
        for i, place in enumerate(places):
            weights = levels(place) * told[i]
            for outcome, w in carry.settled(place).items():
                weights[outcome] += w
            assert float(weights.sum()) == pytest.approx(1.0)
            before = tuple(ids[:i])
            q = truth[before] / truth[before].sum()
            got = weights[:size].clone()
            for k, (a, b) in enumerate(v.trie.sets):
                inside = torch.from_numpy(v.trie.order[a:b])
                got[inside] += weights[size + k] * q[inside] / q[inside].sum().clamp(min=1e-300)
            mean[before] += p * got
            spread[before] += p * (got - q).square()
            spread_of_text[before] += p * (torch.eye(size, dtype=torch.float64)[ids[i]] - q).square()
    for prefix, want in truth.items():
        assert torch.allclose(mean[prefix], want, rtol=1e-9, atol=1e-15), f"seed {seed}, after {prefix}"
    less, whole = (sum(float(x.sum()) for x in y.values()) for y in (spread, spread_of_text))
    assert less < 0.9 * whole, f"seed {seed}: the spread is {less:.3f} and of the text alone {whole:.3f}"


# Digits


def of_digits(width, words=()):
    """A byte-level tokenizer with numbers of up to ``width`` digits as one token, and some words."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    numbers = ["".join(d) for n in range(2, width + 1) for d in itertools.product("0123456789", repeat=n)]
    names = ["<|end|>", *alphabet, *numbers, *words]
    tokenizer = Tokenizer(models.BPE({n: i for i, n in enumerate(names)}, [], ignore_merges=True))
    cut = pre_tokenizers.Split(Regex(rf"\d{{1,{width}}}"), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([cut, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def a_teacher(tokenizer, seed, dtype=torch.float64):
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.6, eos_token_id=0,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).to(dtype).eval()
    return LocalTeacher(Loaded(model, tokenizer, "t", f"t{seed}", "t", 1, 1, 128), choose("cpu", "float32"))


@torch.no_grad()
def next_of(model, *prefixes):
    """Next-token distributions after prefixes of one length."""
    return torch.softmax(model(torch.tensor(prefixes)).logits[:, -1], -1)


def compared(student_tokenizer, teacher):
    one, other = student_tokenizer, teacher.loaded.tokenizer
    return compare(spelling_of(one), spelling_of(other), [0], [0], len(one), len(other))


def carried(teacher, student_tokenizer, text):
    """What is told at each position, and what that was made from."""
    sample = Sample((), text, "test")
    mine, theirs = (encode(sample, t) for t in (student_tokenizer, teacher.loaded.tokenizer))
    v = compared(student_tokenizer, teacher)
    places = align(mine, theirs, v)
    with torch.no_grad():
        logits = teacher.loaded.model(torch.tensor([theirs.ids])).logits[0, :-1]
    told = Carry(v.trie, v.first, v.ended).told(logits.clone(), places)
    return told, places, mine, theirs, v


def members(v, outcome):
    size = v.trie.vocabulary
    if outcome < size:
        return [outcome]
    a, b = v.trie.sets[outcome - size]
    return v.trie.order[a:b].tolist()


def test_numbers_of_three_digits_from_a_teacher_of_single_ones():
    """At a number, every outcome has the sum over its tokens of the chain rule through the teacher's digits, their own
    probabilities and that of no further digit, as a share of the number that is there already."""
    seed = fresh()
    teacher, tokenizer = a_teacher(of_digits(1, ["Ġcats", "Ġhad"]), seed), of_digits(3)
    model, their = teacher.loaded.model, teacher.loaded.tokenizer
    told, places, mine, theirs, v = carried(teacher, tokenizer, "x 407 cats had 12 or 3")
    digits = [their.convert_tokens_to_ids(str(d)) for d in range(10)]
    for number in ("407", "12"):
        t = mine.ids.index(tokenizer.convert_tokens_to_ids(number)) - 1
        before = tokenizer.decode(list(mine.ids[1 : t + 1]))
        prefix = next(x for n in range(len(theirs.ids)) if their.decode((x := list(theirs.ids[:n]))[1:]) == before)
        one = next_of(model, prefix)[0]
        two = next_of(model, *[[*prefix, d] for d in digits])
        three = next_of(model, *[[*prefix, d, e] for d in digits for e in digits]).view(10, 10, -1)
        truth = torch.zeros(len(tokenizer), dtype=torch.float64)
        for d, e, f in itertools.product(range(10), repeat=3):
            both = one[digits[d]] * two[d, digits[e]]
            truth[tokenizer.convert_tokens_to_ids(f"{d}{e}{f}")] = both * three[d, e, digits[f]]
            truth[tokenizer.convert_tokens_to_ids(f"{d}{e}")] = both * (1 - three[d, e, digits].sum())
            truth[tokenizer.convert_tokens_to_ids(f"{d}")] = one[digits[d]] * (1 - two[d, digits].sum())
        for t_id, name in enumerate(their.convert_ids_to_tokens(list(range(len(their))))):
            if t_id not in digits:  # of a word the student's first token is its first byte
                truth[tokenizer.convert_tokens_to_ids(name if len(name) == 1 or t_id == 0 else name[0])] += one[t_id]
        got = levels(places[t]) * told[t]
        reached = [set(v.trie.order[v.trie.low[n] : v.trie.high[n]].tolist()) for n in places[t].way]
        assert len(reached) == 2 and int((got > 0).sum()) > 40
        for k in got.nonzero().flatten().tolist():
            above = next((r for r in reversed(reached) if set(members(v, k)) < r), None)
            want = truth[members(v, k)].sum() / (truth[list(above)].sum() if above else 1.0)
            assert float(got[k]) == pytest.approx(float(want), rel=1e-9), f"seed {seed}, {members(v, k)[:3]}"


def test_single_digits_from_a_teacher_of_numbers():
    """The first digit has the sum over the numbers that begin with it; the next ones the share of those among the
    numbers that begin with what is there and go on."""
    seed = fresh()
    teacher, tokenizer = a_teacher(of_digits(3), seed), of_digits(1)
    model, their = teacher.loaded.model, teacher.loaded.tokenizer
    told, _, mine, theirs, v = carried(teacher, tokenizer, "x 407 y")
    p = next_of(model, list(theirs.ids[:3]))[0]
    number = {n: p[i] for i, n in enumerate(their.convert_ids_to_tokens(list(range(len(their))))) if n.isdigit()}
    for t, had in ((2, ""), (3, "4"), (4, "40")):
        assert tokenizer.decode(list(mine.ids[t + 1 : t + 2])) == "407"[len(had)]
        going_on = sum(x for n, x in number.items() if n.startswith(had) and len(n) > len(had)) if had else 1.0
        for d in "0123456789":
            want = sum(x for n, x in number.items() if n.startswith(had + d)) / going_on
            assert float(told[t, tokenizer.convert_tokens_to_ids(d)]) == pytest.approx(float(want), rel=1e-9), seed
    assert v.trie.outcomes == len(tokenizer)


# The teacher as the run uses it


def test_targets_through_shards_are_an_unbiased_sample_of_the_exact_ones(tmp_path):
    teacher, tokenizer = a_teacher(of_digits(1, ["Ġcats", "Ġhad"]), 3, torch.float32), of_digits(3)
    texts = [f"x {n} cats had {7 * n} or {n % 90}" for n in range(400, 440)]
    samples = [Sample((Message("user", "count"),), text, "test", complete=i % 2 == 0) for i, text in enumerate(texts)]
    mine = [encode(s, tokenizer) for s in samples]
    theirs = {m.token_hash: encode(s, teacher.loaded.tokenizer) for m, s in zip(mine, samples, strict=True)}
    v = compared(tokenizer, teacher)
    across = AcrossTeacher(teacher, v, lambda s: theirs[s.token_hash])
    exact = across.exact(mine)
    keep = Keep(threshold=0.05)
    cache = TargetCache(tmp_path / "targets", across.fingerprint, keep, v.trie.outcomes, 16, across.targets)
    facts = cache.fill(mine)
    assert facts.tokens == sum(len(m.loss_positions) for m in mine) and facts.made == 3
    ((heads, tails),) = across.expected(mine, [keep.threshold])
    assert heads == pytest.approx(sum(int(cache.kept(m).heads.sum()) for m in mine) / facts.tokens, abs=0.01)
    assert tails == pytest.approx(sum(int(cache.kept(m).tails.sum()) for m in mine) / facts.tokens, rel=0.05)
    batch = collate([[m] for m in mine], 0)
    drawn = cache.signal(batch, torch.device("cpu"), lambda: Head(torch.zeros(0, 0)))
    assert isinstance(drawn, Sparse) and bool((drawn.ids >= len(tokenizer)).any())
    found = across.signal(batch.placed, drawn)
    assert torch.equal(found.sets.bounds, torch.from_numpy(v.trie.sets))
    rows = len(found.sample.entropy)

    def dense(s):
        return torch.zeros(rows, v.trie.outcomes).index_put_((s.row, s.ids), s.weights, accumulate=True)

    got, want = dense(found.sample), dense(exact.sample)
    times = torch.cat([across.settled(m).levels for m in mine])
    assert float((want.sum(-1) - 1).abs().max()) < 1e-4, "the text's own are taken off as often as the teacher speaks"
    assert bool((dense(exact.sample).min(-1).values > -1.0001).all()) and float(times.max()) >= 3
    assert bool(((got.sum(-1) - 1).abs() < 0.07 * times.clamp(min=1)).all())
    assert bool(((found.sample.entropy - exact.sample.entropy).abs() < times.clamp(min=1) / 16 + 1e-3).all())
    # Summed over positions, what was drawn is off from what is there by no more than its own deviation.
    says = [across.settled(m) for m in mine]
    row = torch.repeat_interleave(torch.arange(rows), torch.cat([x.counts for x in says]))
    ids, weights = (torch.cat([getattr(x, n) for x in says]) for n in ("ids", "weights"))
    told = (want - torch.zeros_like(want).index_put_((row, ids), weights)) / times.clamp(min=1).unsqueeze(1)
    assert float(told.min()) > -1e-5
    deviation = (torch.where(told < 0.05, 0.05 * told, 1e-5).clamp(min=0) * times.unsqueeze(1) ** 2).sum(0).sqrt()
    off = (got - want).sum(0).abs()
    assert bool((off < 6 * deviation + 0.05 * times.max() + 0.05).all()), f"{(off - 6 * deviation).max()}"


def test_positions_that_the_tables_settle_are_worth_nothing_at_the_truth():
    """Of one tokenizer the value is the KL, which is nothing where student and teacher agree."""
    tokenizer = of_digits(1, ["Ġcats"])
    teacher = a_teacher(tokenizer, fresh(), torch.float32)
    mine = encode(Sample((), "x 407 cats 12 or 3", "test"), tokenizer)
    across = AcrossTeacher(teacher, compared(tokenizer, teacher), lambda s: s)
    with torch.no_grad():
        logits = teacher.loaded.model(torch.tensor([mine.ids])).logits[0, :-1]
    value, gradient = across.exact([mine]).loss(Divergence(), logits.clone())
    assert float(value.abs().max()) < 1e-4 and float(gradient.abs().max()) < 1e-5
    other = logits + torch.randn(logits.shape, generator=torch.Generator().manual_seed(1))
    assert torch.allclose(across.exact([mine]).loss(Divergence(), other.clone())[0], kl(logits, other), rtol=1e-3)


def test_spaces_that_a_tokenizer_puts_first_are_no_difference():
    mine, theirs = real_spelling("tokenizers/gpt2"), real_spelling("stories260K")
    text = b"Once upon a time"
    (ours,), (others,) = mine.cut([text]), theirs.cut([b" " + text])
    v = of_real_ones("tokenizers/gpt2", "stories260K", (50256,), (2,))
    places = align(encoded(ours), encoded(others), v)
    first = places[0]
    assert first.row == 0 and first.remainder is not None
    assert all(theirs.pieces[t].startswith(b" ") and len(theirs.pieces[t]) > 1 for t in first.remainder.teacher)
    once = {
        mine.pieces[s]
        for t, s in zip(first.remainder.teacher, first.remainder.student, strict=True)
        if t == first.actual
    }
    assert once == {b"Once"}  # whatever the teacher's token is, for the actual one the label is known
    back = of_real_ones("stories260K", "tokenizers/gpt2", (2,), (50256,))
    places = align(encoded(others), encoded(ours), back)
    assert places[0].row == 0 and places[0].remainder is not None
    assert all(theirs.pieces[s].startswith(b" ") for s in places[0].remainder.student)


def test_what_cannot_be_aligned_is_refused():
    mine, theirs = real_spelling("tokenizers/gpt2"), real_spelling("tokenizers/smollm2")
    ends = (ENDS["tokenizers/gpt2"], ENDS["tokenizers/smollm2"])
    v = of_real_ones("tokenizers/gpt2", "tokenizers/smollm2", *ends, (3, 5))
    (one,), (other,) = mine.cut([b"A cat sat."]), theirs.cut([b"A cow sat."])
    with pytest.raises(DataError, match=r"'t sat.' for 'w sat.'|'at sat.' for 'ow sat.'"):
        align(encoded(one), encoded(other), v)
    turns = Encoded("x", (0, *one, 0, *one), (False, *[True] * len(one), False, *[True] * len(one)))
    with pytest.raises(DataError, match="2 turns of a sample to learn, and the teacher's 1"):
        check_same_text(turns, encoded(other), mine, theirs, True)
    across = AcrossTeacher(a_teacher(of_digits(1), 1), v, lambda s: s)
    for keep in (Keep(temperature=2.0), Keep("top_k", k=5)):
        with pytest.raises(ValueError, match="sampled, at temperature 1"):
            across.targets([], keep)


def test_what_was_cut_from_one_of_them_is_left_to_the_text():
    mine, theirs = real_spelling("tokenizers/gpt2"), real_spelling("stories260K")
    v = of_real_ones("tokenizers/gpt2", "stories260K", (50256,), (2,))
    (ours,), (others,) = (
        mine.cut([b"Once upon a time there was a cat."]),
        theirs.cut([b" Once upon a time there was a cat."]),
    )
    whole = align(encoded(ours, [50256]), encoded(others, [2]), v)
    assert all(p.row >= 0 for p in whole)
    spelt = len(b"".join(theirs.pieces[i] for i in others[:9])) - 1
    cut = align(encoded(ours, [50256]), encoded(others[:9]), v)
    starts = np.cumsum([0, *(len(mine.pieces[i]) for i in ours)])
    assert [p.row >= 0 for p in cut] == [int(a) < spelt for a in starts] and [p.label for p in cut] == [*ours, 50256]
    assert all(p.row + len(p.way) < 9 for p in cut)
    carry = Carry(v.trie, v.first, v.ended)
    told = carry.told(torch.randn(9, 512), cut)
    assert torch.allclose(told.sum(-1), torch.ones(len(cut))) and levels(cut[-1]) == 0
    assert carry.settled(cut[-1]) == {50256: 1}
    short = align(encoded(ours[:4]), encoded(others, [2]), v)
    assert [p.label for p in short] == ours[:4] and all(p.row >= 0 for p in short)


def test_turns_are_aligned_each_with_its_own():
    mine, theirs = real_spelling("tokenizers/gpt2"), real_spelling("stories260K")
    v = of_real_ones("tokenizers/gpt2", "stories260K", (50256,), (2,))
    texts = [b" one day", b" and another"]
    sides = []
    for spelling, end in ((mine, 50256), (theirs, 2)):
        ids, mask = [0], [False]
        for cut in spelling.cut(texts):
            ids += [*cut, end, 0]
            mask += [*[True] * (len(cut) + 1), False]
        sides.append(Encoded("x", tuple(ids), tuple(mask)))
    places = align(*sides, v)
    learnt = [t for t, m in zip(sides[1].ids, sides[1].mask, strict=True) if m]
    assert [p.label for p in places if p.label == 50256] == [50256] * 2
    for place in places:
        if place.row >= 0:
            assert learnt[place.row] == place.actual
    second = [p for p in places if p.row > len(theirs.cut(texts[:1])[0])]
    assert second and theirs.pieces[second[0].actual].startswith(b" a")


def test_grouped_targets_go_with_their_positions():
    v = compare(toy([AB, ABC]), toy([]), [0], [0], 6, 4)
    sets = AcrossTeacher(a_teacher(of_digits(1), 1), v, lambda s: s).sets
    sample = Sparse.of(torch.tensor([2, 1, 0]), torch.tensor([6, 1, 2]), torch.tensor([0.5, 0.25, 1.0]), torch.zeros(3))
    whole = Grouped(sample, sets)
    assert np.all(whole.take(torch.tensor([1, 0])).sample.ids.numpy() == [2, 6, 1])
    assert whole.span(1, 3).sample.ids.tolist() == [2] and whole.to(torch.device("cpu")).sets.vocabulary == 6
