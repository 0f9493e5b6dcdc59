"""The cache of targets: labelled once by however many, addressed by content, damage found, unbiased through a file."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path

import labeller
import pytest
import torch
from architectures import V, make, save_with_tokenizer
from labeller import cache, label, noted, samples, states_of
from truth import bound, fresh, off

import pennyweight
from pennyweight.bench import Bench
from pennyweight.data.pack import collate, first_fit
from pennyweight.errors import ModelError
from pennyweight.loss.chunked import Terms, tiled_loss
from pennyweight.loss.divergence import Divergence, divergence
from pennyweight.loss.signals import Dense, Sparse, TopK
from pennyweight.model.device import choose
from pennyweight.model.head import Head
from pennyweight.model.load import load
from pennyweight.recipe import HiddenTargets, SampledTargets, TopKTargets
from pennyweight.recipe_file import load as read_recipe
from pennyweight.teacher.cache import read_settled, settled
from pennyweight.teacher.local import LocalTeacher
from pennyweight.teacher.shards import Shard
from pennyweight.teacher.targets import Keep, restore

CPU = torch.device("cpu")
KINDS = {"sampled": Keep("sampled", 0.05), "top_k": Keep("top_k", 0.0, 9), "hidden": Keep("hidden", 0.0)}


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    loaded = load(str(save_with_tokenizer(make("llama", 3), tmp_path_factory.mktemp("teacher") / "t")))
    return LocalTeacher(loaded, choose("cpu", "float32"))


def files(folder):
    """Name and bytes of everything there, hidden files too."""
    return {f.name: f.read_bytes() for f in sorted(folder.iterdir())}


def counted(asked, label=label):
    def count(group, keep):
        asked.append(len(group))
        return label(group, keep)

    return count


# What a shard depends on


@pytest.mark.parametrize("kind", KINDS)
def test_labelled_once_whatever_the_order(tmp_path, kind):
    data, asked, keep = samples(), [], KINDS[kind]
    first = cache(tmp_path / "a", counted(asked), keep=keep).fill(data)
    assert asked == [3, 3, 3, 3, 2] and first.made == 5 and first.damaged == ()
    assert first.tokens == sum(len(s.loss_positions) for s in data)
    assert set(files(tmp_path / "a")) == {f.name for f in (tmp_path / "a").glob("*.targets")}
    assert first.bytes == sum(len(x) for x in files(tmp_path / "a").values())
    assert first.bytes_per_token == first.bytes / first.tokens
    again = cache(tmp_path / "a", counted(asked), keep=keep).fill(data[::-1] + data[:3])
    assert replace(again, made=5) == first and again.made == 0 and len(asked) == 5
    g = torch.Generator().manual_seed(fresh())
    shuffled = [data[i] for i in torch.randperm(len(data), generator=g)] + data[4:6]
    assert cache(tmp_path / "b", keep=keep).fill(shuffled) == first
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_entries_are_counted(tmp_path):
    c, data = cache(tmp_path), samples()
    assert c.filled is False
    facts = c.fill(data)
    assert c.filled and facts.entries == sum(len(c.kept(s).ids) for s in data)


def test_a_live_teacher_labels_the_same_whatever_the_order(tmp_path, teacher):
    """Its rows go together by length, and what is drawn is drawn by each sample's own seed."""
    data = samples(vocabulary=V)
    for name, given in (("a", data), ("b", data[::-1])):
        cache(tmp_path / name, teacher.targets, vocabulary=V, shard=5).fill(given)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_a_samples_draws_are_its_own_whatever_company_it_is_in(tmp_path):
    """A teacher that finds everything equally likely: only the draws tell one position from another."""
    flat = load(str(save_with_tokenizer(make("llama", 3), tmp_path / "flat")))
    with torch.no_grad():
        flat.model.lm_head.weight.zero_()
    data, keep = samples(9, 3, V), Keep("sampled", 0.1)
    who = LocalTeacher(flat, choose("cpu", "float32"), rows=4)
    together = who.targets(data, keep)
    seen = set()
    for sample, got in zip(data, together, strict=True):
        (alone,) = who.targets([sample], keep)
        assert torch.equal(alone.ids, got.ids) and torch.equal(alone.tails, got.tails)
        seen.add(tuple(got.split([1, len(got) - 1])[0].ids.tolist()))
    assert len(seen) > 4


@pytest.mark.parametrize(
    "change",
    [
        {"keep": Keep("sampled", 0.06)},
        {"keep": Keep("sampled", 0.05, temperature=2.0)},
        {"keep": Keep("sampled", 0.05, precision="float32")},
        {"keep": Keep("top_k", 0.05, 9)},
        {"keep": Keep("hidden", 0.05)},
        {"fingerprint": "0" * 64},
        {"vocabulary": 2 * labeller.V},
    ],
    ids=lambda c: " ".join(map(str, c.values()))[:60],
)
def test_another_setting_teacher_or_vocabulary_is_another_shard(tmp_path, change):
    data = samples()
    cache(tmp_path).fill(data)
    before = set(files(tmp_path))
    assert cache(tmp_path, **change).fill(data).made == 5
    keys = {n.split(".")[0] for n in files(tmp_path)}
    assert len(keys) == 5 and not keys & {n.split(".")[0] for n in before}  # and nothing else is left
    assert cache(tmp_path, **change).fill(data).made == 0


def test_another_k_another_text_or_another_mask_is_another_shard(tmp_path):
    data = samples()
    cache(tmp_path, keep=KINDS["top_k"]).fill(data)
    assert cache(tmp_path, keep=Keep("top_k", 0.0, 8)).fill(data).made == 5
    cache(tmp_path).fill(data)
    changed = [replace(s, mask=(False, *s.mask[1:-1], False)) for s in data]
    assert cache(tmp_path).fill(changed).made == 5
    cache(tmp_path).fill(data)
    one = [replace(data[0], ids=(*data[0].ids[:-1], 3 if data[0].ids[-1] != 3 else 4)), *data[1:]]
    assert 1 <= cache(tmp_path).fill(one).made <= 5
    assert cache(tmp_path).fill([replace(s, id="9" * 64) for s in one]).made == 0  # a name is no token


# Kills and damage


@pytest.mark.parametrize("after", [0, 2, 4])
def test_a_killed_pass_goes_on_where_it_stopped(tmp_path, after):
    data, asked = samples(), []

    def dies(group, keep):
        if len(asked) == after:
            raise KeyboardInterrupt
        return counted(asked)(group, keep)

    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path / "a", dies).fill(data)
    assert len(files(tmp_path / "a")) == after and len(asked) == after
    lost = f".making-{'0' * 32}.left.targets"
    (tmp_path / "a" / lost).write_bytes(b"half a sh")
    facts = cache(tmp_path / "a", counted(asked)).fill(data)
    assert facts.made == 5 - after and asked == [3, 3, 3, 3, 2] and facts.damaged == ()
    cache(tmp_path / "b").fill(data)
    assert files(tmp_path / "a") == files(tmp_path / "b")


def test_who_helps_removes_nothing_and_whose_folder_it_is_all_else(tmp_path):
    of_others = cache(tmp_path / "a", keep=Keep(threshold=0.2))
    of_others.fill(samples())
    left = files(tmp_path / "a")
    cache(tmp_path / "a").fill(samples(), clean=False)
    both = files(tmp_path / "a")
    assert left.items() < both.items() and len(both) == 2 * len(left)
    cache(tmp_path / "a").fill(samples())
    assert files(tmp_path / "a") == {n: both[n] for n in both if n not in left}


@pytest.mark.parametrize("kind", KINDS)
def test_a_damaged_byte_anywhere_is_found_named_and_made_again(tmp_path, kind):
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    data, keep = samples(), KINDS[kind]
    cache(tmp_path, keep=keep).fill(data)
    good = files(tmp_path)
    for trial in range(8):
        name = sorted(good)[int(torch.randint(0, len(good), (), generator=g))]
        size = len(good[name])
        place = {0: 0, 1: size - 1}.get(trial, int(torch.randint(0, size, (), generator=g)))
        content = bytearray(good[name])
        content[place] ^= 1 << int(torch.randint(0, 8, (), generator=g))
        (tmp_path / name).write_bytes(bytes(content))
        asked = []
        found = cache(tmp_path, counted(asked), keep=keep).fill(data)
        told = f"seed {seed}: byte {place} of {size}"
        assert found.damaged == (name,) and found.made == 1 and len(asked) == 1, told
        assert files(tmp_path) == good, told


@pytest.mark.parametrize("harm", ["cut", "longer", "empty", "another's", "not ours"])
def test_other_damage_is_found_too(tmp_path, harm):
    data = samples()
    cache(tmp_path).fill(data)
    good = files(tmp_path)
    first, victim = sorted(good)[:2]
    content = {
        "cut": good[victim][:-9],
        "longer": good[victim] + b"\0",
        "empty": b"",
        "another's": good[first],
        "not ours": b"\x89PNG\r\n",
    }[harm]
    (tmp_path / victim).write_bytes(content)
    found = cache(tmp_path).fill(data)
    assert found.damaged == (victim,) and found.made == 1 and files(tmp_path) == good


def test_a_shard_under_another_key_is_not_believed(tmp_path):
    """A whole shard, renamed to a key that it does not belong to: it has not the positions that are expected."""
    data = samples()
    cache(tmp_path).fill(data)
    good = files(tmp_path)
    (short,) = (n for n in good if len(Shard(tmp_path / n).sizes()) == 2)
    victim = next(n for n in good if n != short)
    impostor = f"{victim.split('.')[0]}.{short.split('.')[1]}.targets"
    (tmp_path / victim).rename(tmp_path / impostor)
    (tmp_path / impostor).write_bytes(good[short])
    found = cache(tmp_path).fill(data)
    assert found.damaged == (impostor,) and found.made == 1 and files(tmp_path) == good


def test_all_that_was_damaged_is_named(tmp_path):
    data = samples()
    cache(tmp_path).fill(data)
    good = files(tmp_path)
    for name in list(good)[::2]:
        (tmp_path / name).write_bytes(good[name][:-1])
    found = cache(tmp_path).fill(data)
    assert sorted(found.damaged) == sorted(good)[::2] and found.made == 3 and files(tmp_path) == good


# Several at one folder


DATA = samples(labeller.DATA_COUNT, labeller.DATA_SEED)
SHARDS = -(-len(DATA) // labeller.SHARD)


def spawned(folder: Path, mode: str) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(pennyweight.__file__).parents[1])}
    command = [sys.executable, labeller.__file__, str(folder), mode]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


def labelled(folder: Path) -> list[list[str]]:
    """(process, shard, samples) of every time that somebody labelled a shard of this folder or one beside it."""
    return [x.split() for x in (folder.parent / "labelled.txt").read_text().splitlines()]


@pytest.fixture(scope="module")
def beside(tmp_path_factory):
    """A folder that two processes labelled at once, and what each of them settled and got."""
    folder = tmp_path_factory.mktemp("beside") / "targets"
    with spawned(folder, "beside") as other:
        thresholds = labeller.settle(folder)
        mine = cache(folder, labeller.together(folder)).fill(DATA)
        theirs = json.loads(other.communicate(timeout=120)[0])
    return folder, [thresholds, json.loads(json.dumps(asdict(mine)))], theirs


def test_two_processes_share_the_shards_and_make_each_once(tmp_path, beside):
    folder, (_, mine), (_, theirs) = beside
    lines = labelled(folder)
    assert len(lines) == len({shard for _, shard, _ in lines}) == SHARDS
    assert sum(int(n) for *_, n in lines) == len(DATA)
    assert len({process for process, *_ in lines}) == 2  # each waited for the other to have one
    assert mine["made"] + theirs["made"] == SHARDS and min(mine["made"], theirs["made"]) >= 1
    assert {**mine, "made": 0} == {**theirs, "made": 0}
    alone = cache(tmp_path / "alone").fill(DATA)
    assert {**mine, "made": SHARDS} == json.loads(json.dumps(asdict(alone)))
    assert files(folder) == files(tmp_path / "alone")


def test_two_processes_settle_thresholds_at_once(beside):
    _, (mine, _), (theirs, _) = beside
    assert mine == theirs == [0.1 + i // 2 for i in range(100)]


def test_a_shard_in_anothers_hands_is_waited_for_and_made_if_that_one_is_killed(tmp_path):
    with spawned(tmp_path, "holds") as other:
        try:
            cache(tmp_path / "alone").fill(DATA)
            for folder in (tmp_path / "slow", tmp_path / "held"):
                end, done = time.monotonic() + 120, []
                while not (tmp_path / f"{folder.name}-holding").exists():
                    assert other.poll() is None and time.monotonic() < end, "the other process never took a shard"
                    time.sleep(0.01)

                def progress(n, folder=folder, done=done):
                    done.append(n)
                    if len(done) < SHARDS - 1 or other.poll() is not None:
                        return
                    if folder.name == "slow":  # only the one that is held is missing now
                        (tmp_path / "slow-release").touch()
                    else:
                        other.kill()

                mine = cache(folder, noted(folder)).fill(DATA, progress)
                assert sum(done) == len(DATA) and mine.damaged == ()
                assert mine.made == (SHARDS - 1 if folder.name == "slow" else SHARDS)
                assert files(folder) == files(tmp_path / "alone")
        finally:
            other.kill()
    lines = labelled(tmp_path / "slow")
    assert len(lines) == 2 * SHARDS + 1 and len({shard for _, shard, _ in lines}) == SHARDS  # one was begun twice


def test_two_that_find_the_same_damage_do_not_undo_each_others_repair(tmp_path, monkeypatch):
    """The other one repairs a shard just after this one has read its damaged bytes."""
    data, asked = samples(), []
    cache(tmp_path).fill(data)
    good = files(tmp_path)
    victim = sorted(good)[2]
    (tmp_path / victim).write_bytes(good[victim][:-1])
    read, others = Path.read_bytes, []

    def read_bytes(path):
        content = read(path)
        if path.name == victim and not others:
            others.append(None)
            others.append(cache(tmp_path, counted(asked)).fill(data))
        return content

    monkeypatch.setattr(Path, "read_bytes", read_bytes)
    cache(tmp_path, counted(asked)).fill(data)
    monkeypatch.undo()
    assert files(tmp_path) == good and others[1].damaged == (victim,)
    assert len(asked) == 1, "what the other had repaired was thrown away and labelled again"


def test_one_that_is_interrupted_while_another_waits_leaves_the_shard_to_that_one_alone(tmp_path):
    """The second waits for the first's shard and gets it; a third that comes then waits for the second."""
    data = samples(3)
    second_has_it, go_on, asked = threading.Event(), threading.Event(), []

    def interrupted(group, keep):
        asked.append("first")
        waiting.start()
        time.sleep(0.3)  # so that the second has come to wait
        raise KeyboardInterrupt

    def slow(group, keep):
        asked.append("second")
        second_has_it.set()
        assert go_on.wait(60)
        return label(group, keep)

    def late(group, keep):
        asked.append("third")
        return label(group, keep)

    waiting = threading.Thread(target=lambda: cache(tmp_path, slow).fill(data))
    third = threading.Thread(target=lambda: cache(tmp_path, late).fill(data))
    with pytest.raises(KeyboardInterrupt):
        cache(tmp_path, interrupted).fill(data)
    assert second_has_it.wait(60)
    third.start()
    third.join(0.5)
    go_on.set()
    for thread in (waiting, third):
        thread.join(60)
    assert asked == ["first", "second"], "two had the same shard at once"
    assert len(files(tmp_path)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_teacher_whose_numbers_are_none_is_refused_and_leaves_nothing(tmp_path, kind):
    broken = load(str(save_with_tokenizer(make("llama", 3), tmp_path / "broken")))
    with torch.no_grad():
        broken.model.model.norm.weight[0] = torch.inf
    who = LocalTeacher(broken, choose("cpu", "float32"))
    with pytest.raises(ModelError, match="no numbers .*targets.precision=float32"):
        cache(tmp_path / "a", who.targets, keep=KINDS[kind]).fill(samples(vocabulary=V))
    assert not files(tmp_path / "a")
    if kind == "sampled":
        with pytest.raises(ModelError, match="no numbers"):
            who.expected(samples(vocabulary=V), [0.1], 1.0)


# Thresholds that keep to a budget


def test_a_threshold_is_found_once_for_what_it_was_found_from(tmp_path):
    file, found = tmp_path / "labelling.json", iter([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])
    find = lambda: next(found)  # noqa: E731
    one, other = {"made": "from", "this": 1}, {"made": "from", "this": 2}
    assert settled(file, one, find) == 0.1
    assert settled(file, one, find) == 0.1
    assert settled(file, other, find) == 0.2
    assert settled(file, one, find) == 0.3  # one is kept, that of the last settings
    assert read_settled(file) == {"settled": 0.3, "made_from": one}
    for harm in (b"", b"{", b"[]", b"3", b'{"made_from": 1}', b"\xff\xfe", file.read_bytes().replace(b"0.3", b"null")):
        file.write_bytes(harm)
        assert read_settled(file) is None
        found = iter([0.7])
        assert settled(file, one, lambda: next(found)) == 0.7, harm  # noqa: B023
        found = iter([])
        assert settled(file, one, lambda: next(found)) == 0.7, harm  # noqa: B023
    assert sorted(f.name for f in tmp_path.iterdir()) == [".claims", "labelling.json"]


def a_bench(tmp_path, teacher, **targets) -> Bench:
    """A Bench that has its teacher and its samples already."""
    settings = SampledTargets(**targets)
    recipe = read_recipe(Path(__file__).with_name("tiny.toml")).model_copy(update={"targets": settings})
    bench = Bench(recipe, tmp_path)
    bench.__dict__.update(teacher=teacher.loaded, answering=teacher, encoded=samples(30, vocabulary=V), context=64)
    return bench


def test_a_budget_raises_the_threshold_of_a_diffuse_teacher_and_no_others(tmp_path, teacher):
    flat = load(str(save_with_tokenizer(make("llama", 3), tmp_path / "flat")))
    with torch.no_grad():
        flat.model.lm_head.weight.mul_(0.01)
    diffuse = LocalTeacher(flat, choose("cpu", "float32"))
    asked = {"threshold": 0.01, "budget": 10.0}
    spent = {}
    for name, who in (("as given", teacher), ("diffuse", diffuse)):
        bench = a_bench(tmp_path / name, who, **asked)
        facts, damaged = bench.label()
        spent[name] = facts
        assert damaged == () and facts["threshold"] >= 0.01
        assert json.loads((tmp_path / name / "labelling.json").read_text())["settled"] == facts["threshold"]
        again = a_bench(tmp_path / name, who, **asked)
        again.__dict__["answering"] = again.__dict__["labelling"] = None  # whatever labels is not asked again
        assert again.cache.keep.threshold == facts["threshold"]
    unbounded, _ = a_bench(tmp_path / "free", diffuse, threshold=0.01, budget=1000.0).label()
    assert unbounded["threshold"] == 0.01 < spent["diffuse"]["threshold"] <= 0.5
    assert unbounded["entries_per_token"] > 50 > 20 > spent["diffuse"]["entries_per_token"]
    # One step finer would have cost too much.
    steps = math.log2(spent["diffuse"]["threshold"] / 0.01) * 4
    assert steps == pytest.approx(round(steps))
    cheap, _ = a_bench(tmp_path / "cheap", teacher, threshold=0.2, budget=40.0).label()
    assert cheap["threshold"] == 0.2


# What the loss gets


def by_sample(batch, parts):
    return {s.id: p for s, p in zip(batch.placed, parts, strict=True)}


def head() -> Head:
    return Head(labeller.HEAD)


@pytest.mark.parametrize("kind", KINDS)
def test_a_batch_gets_what_each_of_its_samples_was_given(tmp_path, kind):
    """In any order, padded or packed."""
    data, keep = samples(), KINDS[kind]
    c = cache(tmp_path, keep=keep)
    c.fill(data)
    for batch in (collate([[s] for s in data], 0), collate(first_fit(data, 64), 0), collate([[data[6]], [data[1]]], 0)):
        sizes = [len(s.loss_positions) for s in batch.placed]
        target = c.signal(batch, CPU, head)
        assert batch.count == sum(sizes)
        if isinstance(target, Dense):
            parts = target.logits(slice(0, batch.count), None).split(sizes)
            for s, part in by_sample(batch, parts).items():
                want = states_of(next(x for x in data if x.id == s)).half().float() @ labeller.HEAD.T
                torch.testing.assert_close(part, want)
            continue
        start = 0
        for s, size in zip(batch.placed, sizes, strict=True):
            counts, ids, weights, entropy = restore(c.kept(s), keep.threshold, keep.bits)
            if isinstance(target, TopK):
                part = target.span(start, start + size)
                assert torch.equal(part.ids.flatten(), ids) and torch.equal(part.probs.flatten(), weights)
                assert part.ids.shape == (size, 9)
            else:
                assert isinstance(target, Sparse)
                part = target.span(start, start + size)
                assert torch.equal(part.starts.diff(), counts) and torch.equal(part.ids, ids)
                assert torch.equal(part.weights, weights) and torch.equal(part.entropy, entropy)
            start += size


def test_shards_of_both_16_bit_types_make_one_batch(tmp_path):
    """One sample overflows float16, so that its shard, and no other, is bfloat16."""
    data = samples()
    wide = sorted(data, key=lambda s: s.token_hash)[0]

    def big(group, keep):
        return [states_of(s) * (1e6 if s.id == wide.id else 1.0) for s in group]

    c = cache(tmp_path, big, keep=KINDS["hidden"])
    c.fill(data)
    kinds = [Shard(tmp_path / n).layout.dtype for n in files(tmp_path)]
    assert sorted(kinds) == [1, 1, 1, 1, 2]
    batch = collate([[s] for s in data], 0)
    logits = c.signal(batch, CPU, lambda: Head(torch.eye(labeller.D))).logits(slice(0, batch.count), None)
    want = torch.cat([states_of(s) * (1e6 if s.id == wide.id else 1.0) for s in batch.placed])
    torch.testing.assert_close(logits, want, rtol=0.01, atol=0.01)


@pytest.mark.parametrize(
    ("targets", "limit"),
    [
        (HiddenTargets(), 2e-3),
        (TopKTargets(k=100), 0.15),
        (SampledTargets(threshold=1e-5), 1e-3),
        (SampledTargets(threshold=0.02), 0.7),
    ],
    ids=["hidden", "top_k", "sampled, nearly all", "sampled"],
)
@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_every_kind_end_to_end_is_about_the_dense_gradient(tmp_path, teacher, targets, limit, temperature):
    """Teacher, shards, memory map, batch, tiles: against the same teacher beside the student."""
    seed = fresh()
    data = samples(20, seed, V)
    batch = collate(first_fit(data, 64), 0)
    keep = Keep(targets.kind, getattr(targets, "threshold", 0.0), getattr(targets, "k", 0),
                1.0 if targets.kind == "hidden" else temperature)  # fmt: skip
    c = cache(tmp_path, teacher.targets, teacher.fingerprint, keep, V, 6)
    c.fill(data)
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(batch.count, 16, generator=g), torch.randn(V, 16, generator=g) * 0.5
    spec = Divergence(temperature=temperature)

    def gradient(target):
        h = hidden.clone().requires_grad_(True)
        terms = Terms(batch.loss_labels, torch.zeros(batch.count), torch.ones(batch.count), spec, target)
        found = tiled_loss(h, Head(weight), terms, tile=7)
        found.loss.backward()
        return found.divergence / batch.count, h.grad

    value, want = gradient(teacher.dense(batch))
    found, got = gradient(c.signal(batch, CPU, lambda: teacher.head))
    assert off(got, want.double()) < limit, f"seed {seed}: {off(got, want.double()):.1e}"
    assert found == pytest.approx(value, rel=0.1, abs=0.2 * temperature**2), f"seed {seed}"


def test_sampled_targets_of_a_batch_are_an_unbiased_estimate_of_the_dense_gradient(tmp_path):
    """Through file, batch and loss. Many samples, each with draws of its own; the teacher says one of five things."""
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    threshold, says, v = 0.04, 5, labeller.V
    table, student = torch.randn(says, v, generator=g) * 1.5, torch.randn(1, v, generator=g)

    def logits_at(sample):
        return table[[sample.ids[t] % says for t in sample.loss_positions]]

    def one_of_five(group, keep):
        out = []
        for s in group:
            u = labeller.uniforms(len(s.loss_positions), int(s.token_hash[:15], 16))
            out.append(labeller.draw(logits_at(s), keep.threshold, keep.temperature, u))
        return out

    data = samples(600, seed)
    c = cache(tmp_path, one_of_five, keep=Keep("sampled", threshold), shard=200)
    c.fill(data)
    batch = collate([[s] for s in data], 0)
    hidden = student.repeat(batch.count, 1).requires_grad_(True)
    terms = Terms(
        batch.loss_labels, torch.zeros(batch.count), torch.ones(batch.count), Divergence(), c.signal(batch, CPU, head)
    )
    tiled_loss(hidden, Head(torch.eye(v)), terms, tile=333).loss.backward()
    said = torch.tensor([s.ids[t] % says for s in batch.placed for t in s.loss_positions])
    for which in range(says):
        drawn = hidden.grad[said == which].double()
        _, want = divergence(Divergence(), table[which : which + 1].clone(), student.clone())
        q, p = torch.softmax(student.double(), -1), torch.softmax(table[which].double(), -1)
        # Hoeffding, as in test_teacher_targets.
        reach = (2 * threshold + 2 / 255) * q + torch.where(p < threshold, threshold, 2 / 255)
        limit = reach * math.sqrt(bound(v * says) / (2 * len(drawn))) + 1e-6
        error = (drawn.mean(0) - want.double()).abs()
        assert bool((error <= limit).all()), f"seed {seed}: {float((error / limit).max()):.1f} of what chance allows"
        assert float(error.norm()) < 0.15 * float(want.norm()), f"seed {seed}: {len(drawn)} draws"
