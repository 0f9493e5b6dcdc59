"""Several teachers: whose a record is, mixtures against float64, caches by teacher, and runs whose ledger says who
wrote what under which licence."""

from __future__ import annotations

import json
import math
import sqlite3
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace

import labeller
import pytest
import torch
from architectures import make, save_with_tokenizer
from faulty import Faulty

from pennyweight.bench import Bench
from pennyweight.commands import show_sample, verify
from pennyweight.data.pack import collate
from pennyweight.data.prepare import Writer, answer, both_licences
from pennyweight.data.sources import read
from pennyweight.data.split import is_held_out, split
from pennyweight.errors import DataError, MethodError, ModelError, RecipeError, RunError
from pennyweight.evaluate.agreement import Routed, Scored, as_scorer, score
from pennyweight.evaluate.held_out import HeldOut
from pennyweight.evaluate.suite import Sampling, examine
from pennyweight.inspection import help_to_label, inspect_targets
from pennyweight.model.device import choose
from pennyweight.model.load import load, save
from pennyweight.model.mixture import mixed
from pennyweight.recipe import FileData
from pennyweight.recipe_file import parse
from pennyweight.records import Encoded, Message, Sample, Verdict
from pennyweight.run_folder import recipe_of
from pennyweight.stages import run_line
from pennyweight.teacher.cache import AssignedCache
from pennyweight.teacher.local import LocalTeacher
from pennyweight.teacher.several import Team, assigned, member_of, one_teacher_each, route_of, seed_of
from pennyweight.teacher.targets import Keep, draw, restore, uniforms

CPU = choose("cpu", "float32")
SEED = time.time_ns() % 2**31


@pytest.fixture(autouse=True)
def _told():
    print(f"seed {SEED}")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three teachers of one tokenizer, of which one is of another architecture, and one of another tokenizer."""
    root = tmp_path_factory.mktemp("teachers")
    for name, (kind, seed) in {"a": ("llama", 1), "b": ("llama", 2), "c": ("gemma2-softcap-and-window", 3)}.items():
        save_with_tokenizer(make(kind, seed), root / name)
    other = load(str(root / "a"))
    other.tokenizer.add_tokens(["new"])
    other.model.resize_token_embeddings(114, mean_resizing=False)
    save(other.model, other.tokenizer, root / "other")
    wide = load(str(root / "a"))
    wide.model.resize_token_embeddings(120, mean_resizing=False)
    save(wide.model, wide.tokenizer, root / "wide")
    return root


def several(names="ab", **how):
    """The settings of some teachers, as a table."""
    how = how or {"weights": dict.fromkeys(names, 1)}
    licences = {"a": "MIT", "b": "CC0-1.0"}
    members = {n: {"kind": "folder", "path": n, "licence": licences.get(n, "undeclared")} for n in names}
    return {"kind": "several", "members": members, **how}


def recipe(teacher, folders=None, **tables):
    if folders:
        for m in teacher["members"].values():
            m["path"] = str(folders / m["path"]) if "path" in m else None
    table = {
        "name": "several",
        "compute": {"dtype": "float32", "threads": 1},
        "teacher": teacher,
        "data": {"context": 96, "eval_fraction": 0.3, "responses": {"max_tokens": 16}},
        "student": {"kind": "cut", "layers": 1},
        "targets": {"shard": 4},
        "train": {"steps": 2, "batch": 4},
        "quantize": {"formats": []},
        "evaluate": {"shown": 1, "max_tokens": 8},
    }
    for key, value in tables.items():
        table[key] = value if "kind" in value else {**table.get(key, {}), **value}
    return parse(table, "")


def prompts(file, count=24, **columns):
    rows = [{"prompt": f"question {i}", **{k: v(i) for k, v in columns.items()}} for i in range(count)]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return {"kind": "files", "path": str(file), "licence": "CC-BY-4.0"}


# Whose a record is


def test_records_are_dealt_out_in_proportion_and_by_their_content_alone():
    shares, n = {"a": 2.0, "b": 1.0, "c": 0.0}, 6000
    keys = [f"{SEED} {i}" for i in range(n)]
    of = {k: member_of(k, shares) for k in keys}
    p, count = 2 / 3, sum(m == "a" for m in of.values())
    assert abs(count - n * p) < 5 * math.sqrt(n * p * (1 - p)) and set(of.values()) == {"a", "b"}
    again = {k: member_of(k, {"b": 10.0, "a": 20.0}) for k in reversed(keys)}
    assert again == of  # whatever the order, and in what the shares are counted
    more = {k: member_of(k, {**shares, "d": 1.5}) for k in keys}
    moved = [k for k in keys if more[k] != of[k]]
    assert {more[k] for k in moved} == {"d"} and abs(len(moved) - n / 3) < 5 * math.sqrt(n * 2 / 9)


def test_who_teaches_does_not_go_with_what_is_held_out():
    teacher = recipe(several()).teacher
    samples = [Sample((Message("user", f"{SEED} {i}"),), None, "x") for i in range(4000)]
    dealt = assigned(samples, teacher)
    out = [s.teacher for s in dealt if is_held_out(s.prompt_hash, 0.3)]
    assert abs(out.count("a") - len(out) / 2) < 5 * math.sqrt(len(out) / 4)
    assert assigned(dealt[:1], recipe(several(weights={"a": 0, "b": 1})).teacher)[0].teacher == dealt[0].teacher
    assert assigned(samples, recipe(several()).teacher.members["a"]) == samples  # one teacher: nobody is named


def test_a_sample_without_a_teacher_is_what_it_was():
    plain = Sample((Message("user", "q"),), "r", "x")
    assert "teacher" not in plain.to_json() and Sample.from_json(plain.to_json()) == plain
    routed = replace(plain, teacher="a")
    assert routed.id == plain.id and Sample.from_json(routed.to_json()) == routed


def test_a_column_says_whose_a_row_is(tmp_path):
    source = FileData.model_validate(prompts(tmp_path / "d.jsonl", 6, who=lambda i: "ab"[i % 2]))
    by = lambda **how: route_of(recipe(several(**how)).teacher)  # noqa: E731
    assert [s.teacher for s in read(source, by(route="who"))] == ["a", "b"] * 3
    prompts(tmp_path / "d.jsonl", 3, who=lambda i: [" a ", "x", None][i])
    with pytest.raises(
        DataError, match="d.jsonl line 2: who is 'x', which is no member .*one of a, b, or set teacher.d"
    ):
        read(source, by(route="who"))
    assert [s.teacher for s in read(source, by(route="who", default="b"))] == ["a", "b", "b"]
    with pytest.raises(DataError, match="d.jsonl line 1 has no column 'whom' .teacher.route; it has: prompt, who"):
        read(source, by(route="whom"))
    mistyped = by(route="whom", default="b")
    read(source, mistyped)
    with pytest.raises(DataError, match="no row has the column 'whom'; correct teacher.route"):
        mistyped.check()


def test_a_prompt_may_go_to_two_teachers_and_a_record_has_one():
    ask = [Sample((Message("user", f"q{i}"),), None, "x", teacher=t) for i in range(40) for t in "aab"]
    parts = split(ask, 0.3, 100)
    assert parts.duplicates == 40 and {s.teacher for s in parts.train} == {"a", "b"}
    same = [s.answered("yes", f"m ({s.teacher})", True) for s in parts.train]
    assert {s.teacher for s in one_teacher_each(same)} == {"a"} and len(one_teacher_each(same)) == len(same) / 2
    apart = [s.answered(f"yes, {s.teacher}", "m", True) for s in parts.train]
    assert one_teacher_each(apart) == apart


def test_licences_of_both_sides_are_kept():
    assert both_licences("MIT", "MIT") == "MIT" and both_licences("MIT", "CC0-1.0") == "MIT AND CC0-1.0"
    assert both_licences("MIT OR Apache-2.0", "undeclared") == "(MIT OR Apache-2.0) AND undeclared"


class Numbering:
    """A teacher that says who it is and what it was asked, and is stopped when it is told to."""

    fingerprint, keeps, tokenizer = "f" * 64, False, None

    def __init__(self, name, stops=False):
        self.name, self.stops, self.asked = name, stops, []

    def write(self, prompts, seed, progress):
        if self.stops:
            raise KeyboardInterrupt
        self.asked += [p.messages[0].content for p in prompts]
        return [(f"{self.name} on {p.messages[0].content} by {seed}", True) for p in prompts]


def test_writing_that_is_killed_goes_on_with_the_teacher_that_it_was_at(folders, tmp_path):
    tokenizer = load(str(folders / "a")).tokenizer
    ask = [Sample((Message("user", f"q{i}"),), None, "x", "CC0-1.0", teacher="ab"[i % 2]) for i in range(9)]

    def answered(place, teachers):
        quiet = lambda *_: nullcontext(SimpleNamespace(advance=lambda n: None))  # noqa: E731
        writer = lambda m: Writer(teachers[m], tokenizer, place / m, seed_of(5, m), quiet, 96, "refuse", m)  # noqa: E731
        return answer(ask, "auto", writer, "train")

    def fresh():
        return {n: Numbering(n) for n in "ab"}

    whole = answered(tmp_path / "whole", fresh())
    assert [s.response.split(" by ")[0] for s in whole] == [f"{'ab'[i % 2]} on q{i}" for i in range(9)]
    assert [(s.author, s.licence) for s in whole[:2]] == [("a", "CC0-1.0 AND a"), ("b", "CC0-1.0 AND b")]
    assert len({s.response.split(" by ")[1] for s in whole}) == 2  # seeds of their own
    with pytest.raises(KeyboardInterrupt):
        answered(tmp_path / "r", {"a": Numbering("a"), "b": Numbering("b", stops=True)})
    after = fresh()
    assert answered(tmp_path / "r", after) == whole
    assert after["a"].asked == [] and len(after["b"].asked) == 4


# Mixtures


def teacher_of(folder) -> LocalTeacher:
    return LocalTeacher(load(str(folder)), CPU)


def mixture(folders, shares, temperature=1.0, teachers=None) -> LocalTeacher:
    teachers = teachers or {n: teacher_of(folders / n) for n in shares}
    facts = dict.fromkeys(("name", "fingerprint", "identity", "params", "bytes"))
    return mixed(teachers, shares, {**facts, "context": 128}, temperature)


def encoded(count=5, seed=SEED, vocabulary=113):
    return labeller.samples(count, seed % 1000, vocabulary)


@torch.no_grad()
def mean_in_float64(teachers, shares, samples, temperature=1.0):
    """(N, V) of sum w_m softmax(logits_m / temperature), by the models' own forward pass, sample by sample."""
    rows = []
    for s in samples:
        total = 0
        for name, t in teachers.items():
            logits = t.loaded.model(input_ids=torch.tensor([s.ids]), use_cache=False).logits[0].double()
            total = total + shares[name] / sum(shares.values()) * torch.softmax(logits / temperature, -1)
        rows.append(total[s.loss_positions])
    return torch.cat(rows)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("names", ["ab", "ac"])
def test_a_mixture_is_the_mean_of_both_distributions(folders, names, temperature):
    teachers = {n: teacher_of(folders / n) for n in names}
    shares, samples = {names[0]: 7.0, names[1]: 3.0}, encoded()
    want = mean_in_float64(teachers, shares, samples, temperature)
    both = mixture(folders, shares, temperature, teachers)
    batch = collate([[s] for s in samples], 0)
    dense = both.dense(batch)
    got = torch.softmax(dense.logits(slice(None), None).double() / temperature, -1)
    torch.testing.assert_close(got, want, atol=2e-6, rtol=2e-5)
    out = torch.empty(len(want), 113)
    assert (
        torch.equal(dense.logits(slice(None), out), dense.logits(slice(None), None))
        and dense.logits(slice(None), out).data_ptr() == out.data_ptr()
    )
    k = 6
    kept = both.targets(samples, Keep("top_k", 0.0, k, temperature))
    probs = torch.cat([x.probs for x in kept]).view(-1, k) / 65535
    ids = torch.cat([x.ids for x in kept]).view(-1, k).long()
    assert (probs - want.topk(k).values).abs().max() < 2 / 65535 + 1e-5
    assert (want.gather(1, ids) - want.topk(k).values).abs().max() < 1e-5


def test_a_sample_of_a_mixture_is_unbiased(folders):
    """Mean weight of each token over fresh draws, within five standard errors of the float64 mean; and the entropy."""
    teachers = {n: teacher_of(folders / n) for n in "ac"}
    shares, samples, draws, t = {"a": 0.6, "c": 0.4}, encoded(2), 600, 0.1
    want = mean_in_float64(teachers, shares, samples)
    both = mixture(folders, shares, 1.0, teachers)
    states = torch.cat([both.hidden(collate([[s]], 0)) for s in samples])
    total, entropy = torch.zeros_like(want), torch.zeros(len(want), dtype=torch.float64)
    for i in range(draws):
        kept = draw(both.head.logits(states), t, 1.0, uniforms(len(want), SEED + i))
        counts, ids, weights, h = restore(kept, t, Keep("sampled", t).bits)
        total.index_put_((torch.repeat_interleave(counts), ids), weights.double(), accumulate=True)
        entropy += h
    error = torch.sqrt(torch.where(want < t, want * (t - want), (1 / 255) ** 2) / draws)
    assert ((total / draws - want).abs() < 5.5 * error + 1e-5).all()
    assert (entropy / draws - torch.special.entr(want).sum(-1)).abs().max() < 5 * (1 / 16) / math.sqrt(draws)


def test_a_mixture_of_a_teacher_with_itself_gives_its_own_targets(folders):
    one, samples = teacher_of(folders / "a"), encoded(8)
    twice = mixture(folders, {"x": 0.3, "y": 0.7}, 1.0, {"x": one, "y": one})
    states = one.hidden(collate([[s] for s in samples], 0))
    own = torch.log_softmax(one.head.logits(states), -1)
    torch.testing.assert_close(twice.head.logits(torch.cat([states, states], -1)), own, atol=2e-5, rtol=0)
    kept, theirs = (t.targets(samples, Keep("top_k", 0.0, 4)) for t in (twice, one))
    for x, y in zip(kept, theirs, strict=True):
        assert torch.equal(x.ids, y.ids) and (x.probs - y.probs).abs().max() <= 2
    only = mixture(folders, {"x": 0.0, "y": 2.0}, 1.0, {"x": teacher_of(folders / "c"), "y": one})
    torch.testing.assert_close(only.head.logits(states), own, atol=2e-5, rtol=0)


def test_forward_kl_to_a_mixture_has_the_mean_gradient(folders):
    """As docs/teachers.md derives it: the gradient of KL to the mixture is the mean of those to its members."""
    teachers, shares = {n: teacher_of(folders / n) for n in "ac"}, {"a": 0.25, "c": 0.75}
    batch = collate([[s] for s in encoded()], 0)
    student = torch.randn(batch.count, 113, dtype=torch.float64, generator=torch.Generator().manual_seed(SEED))
    logits = {n: t.dense(batch).logits(slice(None), None).double() for n, t in teachers.items()}
    logits["both"] = mixture(folders, shares, 1.0, teachers).dense(batch).logits(slice(None), None).double()
    gradient, value = {}, {}
    for name, teacher in logits.items():
        leaf = student.clone().requires_grad_()
        p, log_q = torch.softmax(teacher, -1), torch.log_softmax(leaf, -1)
        kl = (p * (torch.log_softmax(teacher, -1) - log_q)).sum(-1)
        value[name] = kl.detach()
        (gradient[name],) = torch.autograd.grad(kl.sum(), leaf)
    mean = sum(w * gradient[n] for n, w in shares.items())
    torch.testing.assert_close(gradient["both"], mean, atol=1e-6, rtol=1e-5)
    apart = sum(w * value[n] for n, w in shares.items()) - value["both"]
    assert (apart > 0).all()  # by what the members differ among themselves, which no student changes


def test_the_real_tiny_model_mixed_with_a_perturbed_copy(stories, tmp_path):
    one = teacher_of(stories)
    noisy = load(str(stories))
    g = torch.Generator().manual_seed(SEED)
    with torch.no_grad():
        for p in noisy.model.parameters():
            p += 0.1 * p.std() * torch.randn(p.shape, generator=g)
    teachers = {"real": one, "noisy": replace(one, loaded=noisy)}
    samples, shares = encoded(4, vocabulary=512), {"real": 0.7, "noisy": 0.3}
    want = mean_in_float64(teachers, shares, samples)
    got = mixture(tmp_path, shares, 1.0, teachers).dense(collate([[s] for s in samples], 0))
    torch.testing.assert_close(torch.softmax(got.logits(slice(None), None).double(), -1), want, atol=2e-6, rtol=1e-4)


# Targets of several teachers


def label_by(sign, asked=None, fails_after=None):
    """A teacher that is a function of the tokens: ``labeller``'s, its logits times ``sign``."""

    def label(group, keep):
        if fails_after is not None and len(asked) >= fails_after:
            raise KeyboardInterrupt
        asked is None or asked.append(len(group))
        head, labeller.HEAD = labeller.HEAD, sign * labeller.HEAD
        try:
            return labeller.label(group, keep)
        finally:
            labeller.HEAD = head

    return label


def by_id(sample):
    return "abc"[int(sample.id, 16) % 3 // 2 if int(sample.id, 16) < 10**6 else 0]


def assigned_cache(folder, asked=None, owner=by_id, keep=None, fails_after=None, order=None):
    signs = {"a": 1.0, "b": -1.0, "c": 0.5}

    def one(name):
        (order if order is not None else []).append(name)
        how = label_by(signs[name], (asked or {}).get(name), fails_after if name == "b" else None)
        own = replace(keep or Keep("sampled", 0.05), **({"threshold": 0.11} if name == "b" and not keep else {}))
        return labeller.cache(folder, how, name * 64, own)

    return AssignedCache(owner, one)


@pytest.mark.parametrize("keep", [None, Keep("top_k", 0.0, 5)])
def test_each_sample_of_a_batch_gets_the_targets_of_its_own_teacher(tmp_path, keep):
    data = labeller.samples(14, SEED % 1000)
    order: list[str] = []
    cache = assigned_cache(tmp_path / "targets", keep=keep, order=order)
    made = cache.fill(data)
    assert order == ["a", "b"] and cache.filled and made.tokens == sum(len(s.loss_positions) for s in data)
    assert {n: m["tokens"] for n, m in made.members.items()} == {
        n: sum(len(s.loss_positions) for s in data if by_id(s) == n) for n in "ab"
    }
    batch = collate([[s] for s in data[3:11]], 0)
    got = cache.signal(batch, torch.device("cpu"), lambda: None)
    at = 0
    for s in batch.placed:
        alone = cache._caches[by_id(s)].told([s], torch.device("cpu"))
        n = len(s.loss_positions)
        part = got.span(at, at + n)
        at += n
        for x, y in zip(*((t.ids, getattr(t, "weights", None)) for t in (part, alone)), strict=True):
            assert (x is None and y is None) or torch.equal(x, y)
        if keep:
            assert torch.equal(part.probs, alone.probs)
        else:
            assert torch.equal(part.entropy, alone.entropy)
    assert at == batch.count
    if not keep:
        assert {n: m["threshold"] for n, m in made.members.items()} == {"a": 0.05, "b": 0.11}


def test_the_same_tokens_under_two_teachers_are_two_records(tmp_path):
    first = labeller.samples(1, 3)[0]
    twin = Encoded(f"{1:063x}2", first.ids, first.mask)
    owner = lambda s: "a" if s is first else "b"  # noqa: E731
    cache = assigned_cache(tmp_path / "t", owner=owner)
    cache.fill([first, twin])
    got = cache.signal(collate([[twin], [first]], 0), torch.device("cpu"), lambda: None)
    n = len(first.loss_positions)
    want = [cache._caches[name].told([first], torch.device("cpu")) for name in "ba"]
    for part, whole in zip((got.span(0, n), got.span(n, 2 * n)), want, strict=True):
        assert torch.equal(part.ids, whole.ids) and torch.equal(part.weights, whole.weights)
    assert not torch.equal(want[0].ids, want[1].ids)


def test_a_killed_pass_goes_on_and_a_new_teacher_leaves_the_others_shards(tmp_path):
    data = labeller.samples(30, SEED % 1000)
    whole = assigned_cache(tmp_path / "whole")
    whole.fill(data)
    asked = {"a": [], "b": []}
    with pytest.raises(KeyboardInterrupt):
        assigned_cache(tmp_path / "t", asked, fails_after=1).fill(data)
    before = {n: len(x) for n, x in asked.items()}
    made = assigned_cache(tmp_path / "t", asked).fill(data)
    assert before["b"] == 1 and len(asked["a"]) == before["a"] and made.made == len(asked["b"]) - 1
    names = lambda folder: {p.name for p in (tmp_path / folder).iterdir()}  # noqa: E731
    assert names("t") == names("whole")
    third = [Encoded(f"{10**7 + i:064x}", s.ids, s.mask) for i, s in enumerate(labeller.samples(5, SEED % 1000 + 1))]
    owner = lambda s: "c" if int(s.id, 16) >= 10**7 else by_id(s)  # noqa: E731
    again = assigned_cache(tmp_path / "t", {"a": (a := []), "b": (b := [])}, owner=owner)
    again.fill(data + third)
    assert a == b == [] and names("whole") < names("t")
    again = assigned_cache(tmp_path / "t")
    again.fill(data)  # what the third one made is none of this run's any more
    assert names("t") == names("whole")


def test_one_teacher_is_in_memory_at_a_time():
    benches = {n: SimpleNamespace(teacher=n, local=n, labelling=n, encoded=n) for n in "abc"}
    team = Team(recipe(several("abc")).teacher, benches, None)
    assert team.of("b") is benches["b"]
    assert [sorted(vars(b)) for b in benches.values()] == [
        ["encoded"], ["encoded", "labelling", "local", "teacher"], ["encoded"]
    ]  # fmt: skip


def test_models_are_measured_against_the_teacher_that_each_sample_has(folders):
    a, b, student = (load(str(folders / n)) for n in ("a", "b", "c"))
    samples = encoded(7)
    held_out = HeldOut(samples, [len(s.loss_positions) for s in samples], [], [])
    owner = lambda s: "ab"[int(s.id, 16) % 2]  # noqa: E731
    routed = Routed(owner, {"a": a, "b": b}.__getitem__, a.tokenizer)
    found = examine(student, held_out, lambda t, k: Verdict(True, t), Sampling(4, 0, 1.0, 0), CPU, teacher=routed)
    sides = {n: score(samples, held_out.bytes, as_scorer(student, CPU), as_scorer(m, CPU), 0) for n, m in zip("ab", (a, b), strict=True)}  # noqa: E501  # fmt: skip
    kl = sum(sides[owner(s)].kl_to[i] for i, s in enumerate(samples)) / sides["a"].tokens.sum()
    assert found.metrics["kl_to_teacher"].mean == pytest.approx(kl, rel=1e-5)
    itself = examine(routed, held_out, lambda t, k: Verdict(True, t), Sampling(4, 0, 1.0, 0), CPU)
    alone = {n: score(samples, held_out.bytes, as_scorer(m, CPU), None, 0) for n, m in zip("ab", (a, b), strict=True)}
    nats = sum(alone[owner(s)].nats[i] for i, s in enumerate(samples))
    bits = nats / math.log(2) / sum(held_out.bytes)
    assert itself.metrics["bits_per_byte"].mean == pytest.approx(bits, rel=1e-5)
    assert itself.decode_tokens_per_second is None
    halves = [[i for i in range(7) if i % 2 == odd] for odd in (1, 0)]
    parts = [(at, score([samples[i] for i in at], [1] * len(at), as_scorer(a, CPU), None, 0)) for at in halves]
    assert Scored.of(parts).nats == pytest.approx(alone["a"].nats, rel=1e-5)  # each at its place


# Runs


def ledger_rows(out):
    with sqlite3.connect(out / "ledger.sqlite") as db:
        return db.execute(
            "SELECT id, split, source, licence, author, teacher, teacher_fingerprint FROM training_records"
        ).fetchall()


def started(out) -> list[str]:
    with sqlite3.connect(out / "ledger.sqlite") as db:
        rows = db.execute("SELECT body FROM entries WHERE kind = 'stage' ORDER BY seq").fetchall()
    return [b["name"] for b in map(json.loads, (r[0] for r in rows)) if b["status"] == "started"]


@pytest.fixture(scope="module")
def routed_run(folders, tmp_path_factory):
    root = tmp_path_factory.mktemp("routed")
    source = prompts(root / "prompts.jsonl", 36, who=lambda i: "ab"[i % 3 == 0])
    made = recipe(several(route="who"), folders, data={"source": source, "context": 96, "eval_fraction": 0.3})
    return root, made, run_line(made, root / "run")


def test_the_ledger_says_who_wrote_each_record_under_which_licence(routed_run, folders):
    root, _, summary = routed_run
    out = root / "run"
    fingerprints = {n: load(str(folders / n)).fingerprint for n in "ab"}
    licences = {"a": "CC-BY-4.0 AND MIT", "b": "CC-BY-4.0 AND CC0-1.0"}
    samples = {}
    for side in ("train", "eval"):
        for line in (out / "data" / f"{side}.jsonl").read_text().splitlines():
            sample = Sample.from_json(json.loads(line))
            number = int(sample.prompt[0].content.split()[1])
            assert sample.teacher == "ab"[number % 3 == 0] and sample.licence == licences[sample.teacher]
            assert sample.author == f"{sample.teacher} ({sample.teacher})"
            samples[sample.id] = sample
    rows = ledger_rows(out)
    assert {r[0] for r in rows} == set(samples) and {r[1] for r in rows} == {"train", "eval"}
    for name, _, source, licence, author, teacher, fingerprint in rows:
        s = samples[name]
        assert (source, licence, author) == ("prompts.jsonl", s.licence, s.author)
        assert teacher == s.author and fingerprint == fingerprints[s.teacher]
    assert verify(str(out)).ok and "learnt" in show_sample(str(out), 0)
    counts = summary["data"]["teachers"]
    assert sum(counts.values()) == summary["data"]["train"] and set(counts) == {"a", "b"}
    assert summary["data"]["authors"] == {f"{n} ({n})": c for n, c in counts.items()}
    assert summary["targets"]["tokens"] == sum(m["tokens"] for m in summary["targets"]["members"].values())
    assert summary["teacher"]["members"]["b"]["licence"] == "CC0-1.0"
    assert {"kl_to_teacher", "bits_per_byte"} <= set(summary["arms"]["kd"]["metrics"])
    assert summary["teacher"]["metrics"]["bits_per_byte"]["mean"] > 0
    page = (out / "report.html").read_text()
    assert "a (a), licence MIT, wrote" in page and "the one that its record has" in page


def test_what_each_teacher_wrote_is_what_it_writes_alone(routed_run, folders):
    """The text of every record is among what its own teacher, and no other, writes to these prompts."""
    root, made, _ = routed_run
    rows = [Sample.from_json(json.loads(x)) for x in (root / "run" / "data" / "train.jsonl").read_text().splitlines()]
    for name in "ab":
        own = [s for s in rows if s.teacher == name]
        bench = Bench(made, root / "run").of(name)
        logs = torch.stack([likelihood(bench.teacher, s) for s in own]).sum()
        other = load(str(folders / ("b" if name == "a" else "a")))
        assert logs > torch.stack([likelihood(other, s) for s in own]).sum() + 10


@torch.no_grad()
def likelihood(loaded, sample):
    from pennyweight.data.render import encode

    e = encode(sample, loaded.tokenizer)
    log_p = torch.log_softmax(loaded.model(input_ids=torch.tensor([e.ids])).logits[0].double(), -1)
    return sum(log_p[t, e.ids[t + 1]] for t in e.loss_positions)


def test_the_targets_of_a_run_are_those_of_each_records_teacher(routed_run):
    root, made, _ = routed_run
    bench = Bench(made, root / "run")
    batch = collate([[e] for e in bench.encoded[:6]], 0)
    got = bench.signal(batch)
    assert all("teacher" not in vars(b) for b in bench.team.benches.values())
    at = 0
    for e in batch.placed:
        one = bench.team.benches[bench.team.owner(e)]
        (kept,) = one.labelling.targets([e], one.cache.keep)
        want = one.cache.keep.threshold, restore(kept, one.cache.keep.threshold, one.cache.keep.bits)
        part = got.span(at, at + len(e.loss_positions))
        assert torch.equal(part.ids, want[1][1]) and torch.equal(part.weights, want[1][2])
        at += len(e.loss_positions)
    assert help_to_label(str(root / "run"))["made"] == 0
    with pytest.raises(RunError, match="several teachers.*inspect a run with one teacher, or with a mixture"):
        inspect_targets(str(root / "run"))


def test_a_finished_run_is_skipped_and_a_moved_record_is_not(routed_run, folders, tmp_path, no_charts):
    root, made, _ = routed_run
    before = len(started(root / "run"))
    assert run_line(made, root / "run")["arms"] and len(started(root / "run")) == before
    given = lambda who: prompts(tmp_path / "g.jsonl", 30, who=who, response=lambda i: f"answer {i}")  # noqa: E731
    tables = {"source": given(lambda i: "ab"[i % 2]), "context": 96, "eval_fraction": 0.3}
    made = recipe(several(route="who"), folders, data=tables)
    first = run_line(made, tmp_path / "r")
    assert first["data"]["authors"] == {"given": first["data"]["train"]} and first["data"]["licence"] == "CC-BY-4.0"
    begun = len(started(tmp_path / "r"))
    given(lambda i: "ab"[i % 2 == 0])  # the same words, each by the other teacher
    second = run_line(made, tmp_path / "r")
    again = started(tmp_path / "r")[begun:]
    assert {"data", "targets", "kd-0"} <= set(again) and "teacher" not in again
    assert second["data"]["teachers"] == dict(zip("ab", reversed(first["data"]["teachers"].values()), strict=True))


def test_own_samples_are_dealt_out_and_carry_the_writers_licence(tmp_path, no_charts):
    for seed, name in enumerate("ab"):
        save_with_tokenizer(make("llama", seed), tmp_path / name, chat=False)
    tables = {"source": {"count": 40, "max_tokens": 12}, "context": 64, "eval_fraction": 0.3}
    made = recipe(several(weights={"a": 3, "b": 1}), tmp_path, data=tables, method={"kind": "sft"})
    run_line(made, tmp_path / "r")
    found = Counter(r[2:6] for r in ledger_rows(tmp_path / "r"))
    dealt = Counter(member_of(f"own sample {i}", {"a": 3.0, "b": 1.0}) for i in range(40))
    licences = {"a": "MIT", "b": "CC0-1.0"}
    assert found == {(f"samples of {n} ({n})", licences[n], *[f"{n} ({n})"] * 2): c for n, c in dealt.items()}


@pytest.mark.parametrize("kind", ["sampled", "dense"])
def test_a_run_on_a_mixture(folders, tmp_path, kind):
    source = prompts(tmp_path / "p.jsonl", 24)
    tables = {"source": source, "context": 96, "eval_fraction": 0.3}
    teacher = several("ac", mixture={"a": 0.7, "c": 0.3})
    made = recipe(teacher, folders, data=tables, targets={"kind": kind})
    found = run_line(made, tmp_path / "r")
    name = "0.7 a (a) + 0.3 c (c)"
    assert found["teacher"]["name"] == name and set(found["data"]["authors"]) == {"a (a)", "c (c)"}
    assert {r[5] for r in ledger_rows(tmp_path / "r")} == {name}
    assert (
        found["teacher"]["metrics"]["bits_per_byte"]["mean"] > 0 and "kl_to_teacher" in found["arms"]["kd"]["metrics"]
    )
    assert (
        verify(str(tmp_path / "r")).ok and "The teacher is the mixture" in (tmp_path / "r" / "report.html").read_text()
    )
    if kind == "sampled":
        assert inspect_targets(str(tmp_path / "r"), 64)["students"]
        assert recipe_of(tmp_path / "r") == made


def test_a_server_and_a_folder_side_by_side(folders, tmp_path):
    source = prompts(tmp_path / "p.jsonl", 24, who=lambda i: ["far", "a"][i % 2])
    with Faulty() as server:
        teacher = several("a", route="who")
        teacher["members"]["far"] = {"kind": "endpoint", "url": server.url, "licence": "their terms"}
        teacher["members"]["a"]["path"] = str(folders / "a")
        tables = {"source": source, "context": 96, "eval_fraction": 0.3}
        made = recipe(teacher, data=tables, method={"kind": "sft"})
        found = run_line(made, tmp_path / "r")
        host = server.url.split("/")[2]
    assert set(found["data"]["authors"]) == {"a (a)", f"small@{host} (far)"}
    licences = {r[4]: r[3] for r in ledger_rows(tmp_path / "r")}
    assert licences == {"a (a)": "CC-BY-4.0 AND MIT", f"small@{host} (far)": "CC-BY-4.0 AND their terms"}
    assert found["teacher"]["params"] is None and found["teacher"]["metrics"] == {}
    assert found["data"]["usage"]["answers"] > 0 and (tmp_path / "r" / "far-answers.jsonl").exists()
    assert "one of them is behind a server" in (tmp_path / "r" / "report.html").read_text()


# Refusals


@pytest.mark.parametrize(
    ("teacher", "says"),
    [
        ({"weights": {"a": 1, "b": -1}}, "weights.b: Input should be greater than or equal to 0"),
        ({"weights": {"a": 0, "b": 0}}, "weights are all 0; give at least one member a share"),
        ({"weights": {"a": 1}}, r"weights must name each member once \(a, b\), not a"),
        ({"mixture": {"a": 1, "b": 1, "c": 1}}, r"mixture must name each member once \(a, b\), not a, b, c"),
        ({"route": "x", "weights": {"a": 1, "b": 1}}, "set one of route, weights and mixture"),
        ({"weights": None}, "set one of route, weights and mixture"),
        ({"route": "x", "default": "z"}, r"default=z must be a member \(a, b\)"),
        ({"members": {}, "route": "x"}, "teacher.members: .*at least 1 item"),
        ({"members": {"a/b": {"kind": "folder", "path": "x"}}, "route": "x"}, "teacher.members.a/b"),
        (
            {"members": {"a": {"kind": "folder", "pth": "x", "path": "y"}}, "route": "x"},
            "unknown key .*did you mean 'path'",
        ),
    ],
)
def test_settings_that_do_not_fit_together(teacher, says):
    rule = {} if {"route", "mixture"} & teacher.keys() else {"weights": {"a": 1, "b": 1}}
    with pytest.raises(RecipeError, match=says) as e:
        recipe({"kind": "several", "members": several()["members"], **rule, **teacher})
    assert "\n" not in str(e.value) and ".folder." not in str(e.value)


MIX = {"mixture": {"a": 1, "b": 1}}
SERVED = {"kind": "endpoint", "url": "http://127.0.0.1:9/v1"}


@pytest.mark.parametrize(
    ("how", "members", "tables", "error", "says"),
    [
        ({"route": "x"}, {}, {}, RecipeError, "teacher.route=x goes by a column of files.*teacher.weights"),
        (MIX, {"b": SERVED}, {}, RecipeError, r"a server \(b\).*teacher.weights"),
        ({}, {}, {"targets": {"kind": "dense"}}, MethodError, "targets.kind=dense .*sampled or top_k, or mix them"),
        ({}, {}, {"targets": {"kind": "hidden"}}, MethodError, "targets.kind=hidden .*sampled or top_k"),
        (MIX, {}, {"targets": {"kind": "hidden"}}, MethodError, "sampled or top_k or dense"),
        (MIX, {}, {"targets": {"kind": "dense"}, "method": {"hidden": 0.5}}, MethodError, "set method.hidden=0$"),
        ({}, {"b": SERVED}, {}, MethodError, "set targets.kind=top_k"),
        ({}, {"b": SERVED}, {"targets": {"kind": "top_k"}}, MethodError, "as teacher.members.b.tokenizer"),
        ({}, {"b": {**SERVED, "api": "chat"}}, {"method": {"kind": "sft"}}, RecipeError, "set teacher.members.b.api=c"),
        ({}, {}, {"student": {"kind": "cut", "member": "z"}}, RecipeError, r"cannot be cut from z.*\(a, b\)"),
        ({}, {"a": SERVED, "b": SERVED}, {}, RecipeError, "cannot be cut from an endpoint.*here is none"),
    ],
)  # fmt: skip
def test_what_several_teachers_cannot_be_is_refused_before_anything_is_written(
    tmp_path, how, members, tables, error, says
):
    teacher = several(**how)
    teacher["members"] |= members
    with pytest.raises(error, match=says):
        run_line(recipe(teacher, **tables), tmp_path / "r")
    assert not (tmp_path / "r").exists()


@pytest.mark.parametrize(
    ("names", "says"),
    [
        (("a", "other"), "members a and other cannot teach one student: the tokenizers differ: .*give members of one"),
        (("a", "wide"), "their heads have 113 and 120 entries; give members of one vocabulary"),
        (("a", "nowhere"), "there is no model folder at .*nowhere"),
    ],
)
def test_members_that_do_not_speak_alike(folders, tmp_path, names, says):
    teacher = several(names)
    for m in teacher["members"].values():
        m["path"] = str(folders / m["path"])
    with pytest.raises(ModelError, match=says):
        Bench(recipe(teacher), tmp_path).language  # noqa: B018
