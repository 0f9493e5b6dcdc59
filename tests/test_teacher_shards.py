"""Shards: what goes in comes out, bit for bit, by our reader and by one written from docs/targets.md alone."""

from __future__ import annotations

import struct
from itertools import pairwise

import pytest
import torch
from truth import fresh

from pennyweight.teacher.shards import Layout, Shard, encode, encode_hidden
from pennyweight.teacher.targets import Keep, Kept, draw, join, uniforms

FIELDS = ("heads", "tails", "ids", "probs", "entropy")


def a_kept(g, positions, vocabulary, heads=(0, 4), tails=(0, 9), bits=8, skew=0.0) -> Kept:
    """Numbers within their limits and no more sense than that; with ``skew`` some ids come far more often."""

    def between(low, high, n):
        return torch.randint(low, high + 1, (n,), generator=g, dtype=torch.int64).int()

    of_heads, of_tails = between(*heads, positions), between(*tails, positions)
    e = int(of_heads.sum() + of_tails.sum())
    u = torch.rand(e, generator=g, dtype=torch.float64) ** (1 + skew)
    ids = (u * vocabulary).long().clamp(max=vocabulary - 1)
    ids = (ids * 48_271 + 11) % vocabulary if skew else ids  # so that often and small are not the same
    probs = between(0, (1 << bits) - 1, int(of_heads.sum()))
    return Kept(of_heads, of_tails, ids.int(), probs, between(0, 255, positions).to(torch.uint8))


def written(folder, content: bytes) -> Shard:
    (folder / "x.targets").write_bytes(content)
    return Shard(folder / "x.targets")


def assert_same(a: Kept, b: Kept, told: str):
    for name in FIELDS:
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype and torch.equal(x, y), f"{told}: {name}"


def decoded(raw: bytes) -> list[dict[str, list[int]]]:
    """Each sample's fields, by a reader that knows docs/targets.md and nothing of ours."""
    assert raw[:8] == b"PWTARGET" and raw[-8:] == bytes(8)
    version, kind, dtype, id_bits, prob_bits, head_bits, tail_bits, classes, zero = struct.unpack(
        "<HBBBBBBBB", raw[8:18]
    )
    assert (version, dtype, zero) == (1, 0, 0) and kind in (1, 2) and 1 <= classes <= 4
    widths = list(raw[18 : 18 + classes - 1])
    samples, ranked, _, entries, least_heads, least_tails = struct.unpack("<IIIIHH", raw[24:44])
    table = struct.unpack(f"<{ranked}I", raw[64 : 64 + 4 * ranked])
    at = 64 + 4 * ranked
    index = [struct.unpack("<QI", raw[at + 12 * i : at + 12 * i + 12]) for i in range(samples + 1)]
    assert index[-1][0] == len(raw) - 8
    out = []
    for (start, first), (end, last) in pairwise(index):
        place = start

        def section(field_widths):
            nonlocal place
            size = -(-sum(field_widths) // 8)
            bits, found = int.from_bytes(raw[place : place + size], "little"), []
            place += size
            for w in field_widths:
                found.append(bits & ((1 << w) - 1))
                bits >>= w
            return found

        positions = last - first
        heads = [x + least_heads for x in section([head_bits] * positions)]
        tails = [x + least_tails for x in section([tail_bits] * positions)]
        e = sum(heads) + sum(tails)
        class_of = section([{1: 0, 2: 1, 3: 2, 4: 2}[classes]] * e)
        fields = section([[*widths, id_bits][c] for c in class_of])
        before = [sum(1 << w for w in widths[:c]) for c in range(classes)]
        ids = [table[before[c] + f] if c < classes - 1 else f for c, f in zip(class_of, fields, strict=True)]
        probs = section([prob_bits] * sum(heads))
        entropy = list(raw[place : place + positions])
        assert place + positions == end
        out.append({"heads": heads, "tails": tails, "ids": ids, "probs": probs, "entropy": entropy})
    assert sum(len(s["ids"]) for s in out) == entries
    return out


CASES = {
    "usual": {"vocabulary": 50_257, "skew": 3.0},
    "two ids": {"vocabulary": 2},
    "no tails": {"vocabulary": 300, "tails": (0, 0)},
    "no heads": {"vocabulary": 300, "heads": (0, 0)},
    "nothing at all": {"vocabulary": 300, "heads": (0, 0), "tails": (0, 0)},
    "fixed counts": {"vocabulary": 1000, "heads": (7, 7), "tails": (3, 3)},
    "many": {"vocabulary": 30_000, "heads": (900, 1500), "tails": (2000, 3000), "sizes": (1, 2)},
    "as many as the header can say": {
        "vocabulary": 9,
        "heads": (65_534, 65_535),
        "tails": (60_000, 65_535),
        "sizes": (2,),
    },
    "16-bit probabilities": {"vocabulary": 999, "bits": 16, "threshold": 1e-5},
    "11-bit probabilities": {"vocabulary": 999, "bits": 11, "threshold": 2.1e-3},
    "wide ids": {"vocabulary": 1 << 24, "skew": 1.0},
    "wide and even ids": {"vocabulary": 1 << 24},
    "skewed": {"vocabulary": 150_000, "skew": 9.0, "tails": (5, 60)},
}


def a_case(name, seed, sizes=None):
    """Kept of several samples, vocabulary and what was to be kept."""
    g = torch.Generator().manual_seed(seed)
    case = dict(CASES[name])
    sizes = sizes or case.pop("sizes", (1, 3, 0, 17, 8, 1))
    case.pop("sizes", None)
    keep = Keep("sampled", case.pop("threshold", 0.025))
    return [a_kept(g, n, **case) for n in sizes], case["vocabulary"], keep


@pytest.mark.parametrize("name", CASES)
def test_what_goes_in_comes_out(name, tmp_path):
    seed = fresh()
    kept, vocabulary, keep = a_case(name, seed)
    content = encode(kept, vocabulary, keep)
    shard = written(tmp_path, content)
    assert shard.sizes() == [len(k) for k in kept] and shard.positions == sum(len(k) for k in kept)
    for i in torch.randperm(len(kept), generator=torch.Generator().manual_seed(seed)).tolist():
        assert_same(shard.read(i), kept[i], f"seed {seed}, sample {i}")
    x = shard.layout
    assert (x.kind, x.threshold, x.temperature, x.prob_bits) == ("sampled", keep.threshold, 1.0, keep.bits)
    assert (x.samples, x.entries) == (len(kept), sum(len(k.ids) for k in kept))
    assert x.id_bits == max(1, (vocabulary - 1).bit_length()) and len(x.widths) in (0, 1, 3)
    if "many" not in name:
        for got, k in zip(decoded(content), kept, strict=True):
            assert got == {n: getattr(k, n).tolist() for n in FIELDS}, f"seed {seed}"


def test_any_sizes_of_anything(tmp_path):
    """Forty shards of random shapes."""
    seed = fresh()
    g = torch.Generator().manual_seed(seed)

    def number(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    for trial in range(40):
        vocabulary, bits = number(2, 1 << number(2, 18)), number(8, 16)
        heads, tails = sorted((number(0, 9), number(0, 9))), sorted((number(0, 40), number(0, 40)))
        sizes = [number(0, 12) for _ in range(number(1, 5))]
        kept = [a_kept(g, n, vocabulary, heads, tails, bits, number(0, 6)) for n in sizes]
        keep = Keep("sampled", 4 / ((1 << bits) - 0.5), temperature=1.5)
        assert keep.bits == bits
        shard = written(tmp_path, encode(kept, vocabulary, keep))
        for i, k in enumerate(kept):
            assert_same(shard.read(i), k, f"seed {seed}, trial {trial}, sample {i} of sizes {sizes}")
        assert shard.layout.temperature == 1.5


def test_ids_at_the_end_of_a_vocabulary_of_2_to_the_24(tmp_path):
    ids = torch.tensor([(1 << 24) - 1, 0, (1 << 24) - 2, 1 << 23, (1 << 24) - 1], dtype=torch.int32)
    one = Kept(
        torch.tensor([2, 1], dtype=torch.int32),
        torch.tensor([0, 2], dtype=torch.int32),
        ids,
        torch.tensor([255, 0, 7], dtype=torch.int32),
        torch.tensor([255, 0], dtype=torch.uint8),
    )
    assert_same(written(tmp_path, encode([one], 1 << 24, Keep())).read(0), one, "wide")


@pytest.mark.parametrize(
    ("ids", "widths"),
    [
        ([5] * 400, (0,)),  # one id only: in a class of its own, no bits but the class's
        (list(range(500)), ()),  # every id once: a table would cost more than it saves
        ([i for i in range(16) for _ in range(200)] + list(range(16, 200)), (4,)),
        ([i for i in range(2000) for _ in range(1 + 4000 // (i + 1))], 3),  # as words do
    ],
)
def test_every_number_of_classes_of_ids(ids, widths, tmp_path):
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    vocabulary = 1 << 16
    names = torch.randperm(vocabulary, generator=g)
    ids = names[torch.tensor(ids)][torch.randperm(len(ids), generator=g)].int()
    none = torch.zeros(1, dtype=torch.int32)
    kept = Kept(none, torch.tensor([len(ids)], dtype=torch.int32), ids, none[:0], torch.zeros(1, dtype=torch.uint8))
    content = encode([kept], vocabulary, Keep())
    shard = written(tmp_path, content)
    found = shard.layout.widths
    assert found == widths if isinstance(widths, tuple) else len(found) == widths, f"seed {seed}: {found}"
    assert_same(shard.read(0), kept, f"seed {seed}")
    assert decoded(content)[0]["ids"] == ids.tolist(), f"seed {seed}"
    # Never larger than ids of a fixed width would be, and here all but the even ones are much smaller.
    fixed = 64 + 2 * 12 + -(-len(ids) * 16 // 8) + 1 + 8
    assert len(content) <= fixed and (widths == () or len(content) < 0.8 * fixed), (
        f"seed {seed}: {len(content)}, {fixed}"
    )


def test_a_teacher_that_repeats_itself_costs_less_than_ids_of_a_fixed_width(tmp_path):
    """Targets drawn of one diffuse distribution over and over: their ids recur as its probabilities say."""
    seed = fresh()
    v, n, t = 8192, 600, 0.02
    logits = -1.1 * torch.arange(1, v + 1).log()[torch.randperm(v, generator=torch.Generator().manual_seed(seed))]
    kept = draw(logits.repeat(n, 1), t, 1.0, uniforms(n, seed)).split([n // 4] * 4)
    content = encode(kept, v, Keep("sampled", t))
    whole = join(kept)
    x = written(tmp_path, content).layout
    counts = n * (x.head_bits + x.tail_bits)
    fixed = 64 + 5 * 12 + n + (len(whole.ids) * 13 + len(whole.probs) * x.prob_bits + counts) // 8
    assert len(content) < 0.85 * fixed, f"seed {seed}: {len(content)} bytes, {fixed} with ids of a fixed width"


def test_the_same_targets_give_the_same_bytes_and_others_do_not():
    seed = fresh()
    kept, vocabulary, keep = a_case("usual", seed)
    content = encode(kept, vocabulary, keep)
    copies = [Kept(*(getattr(k, n).clone() for n in FIELDS)) for k in kept]
    assert encode(copies, vocabulary, keep) == content, f"seed {seed}"
    assert encode(join(kept).split([len(k) for k in kept]), vocabulary, keep) == content, f"seed {seed}"
    assert encode(kept[::-1], vocabulary, keep) != content, f"seed {seed}"
    assert encode(kept, vocabulary, Keep("sampled", 0.025, temperature=2.0)) != content, f"seed {seed}"
    for name in FIELDS:
        changed = Kept(*(getattr(kept[3], n).clone() for n in FIELDS))
        getattr(changed, name)[0] += -1 if int(getattr(changed, name)[0]) else 1
        if name not in ("heads", "tails"):  # else numbers and entries would disagree
            assert encode([*kept[:3], changed, *kept[4:]], vocabulary, keep) != content, f"seed {seed}: {name}"


@pytest.mark.parametrize("k", [1, 8, 33])
def test_top_k_shards(k, tmp_path):
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    kept = [a_kept(g, n, 5000, (k, k), (0, 0), 16) for n in (4, 1, 9)]
    content = encode(kept, 5000, Keep("top_k", 0.0, k, 2.0))
    shard = written(tmp_path, content)
    for i, one in enumerate(kept):
        assert_same(shard.read(i), one, f"seed {seed}")
    x = shard.layout
    assert (x.kind, x.head_bits, x.tail_bits, x.least_heads, x.prob_bits) == ("top_k", 0, 0, k, 16)
    assert [s["ids"] for s in decoded(content)] == [one.ids.tolist() for one in kept]


def test_more_entries_a_position_than_16_bits_count(tmp_path):
    """A k that a recipe may ask for."""
    kept = a_kept(torch.Generator().manual_seed(fresh()), 2, 100_000, (70_000, 70_000), (0, 0), 16)
    shard = written(tmp_path, encode([kept], 100_000, Keep("top_k", 0.0, 70_000)))
    assert_same(shard.read(0), kept, "many")


@pytest.mark.parametrize("scale", [1.0, 1e6, 65_504.0])
def test_hidden_states_in_16_bits(scale, tmp_path):
    """In float16, rounded once; in bfloat16 where a number would not fit."""
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    states = [torch.randn(n, 24, generator=g).clamp(-1, 1) * scale for n in (3, 0, 1, 11)]
    states[0][0, 0] = -scale
    shard = written(tmp_path, encode_hidden(states))
    dtype = torch.float16 if scale <= 65_504 else torch.bfloat16
    assert shard.sizes() == [3, 0, 1, 11] and shard.layout.kind == "hidden" and shard.layout.columns == 24
    for i in (2, 0, 3, 1):
        found = shard.hidden(i)
        assert found.dtype == dtype and torch.equal(found, states[i].to(dtype)), f"seed {seed}, sample {i}"
        assert bool(torch.isfinite(found.float()).all())
    assert encode_hidden([s.clone() for s in states]) == encode_hidden(states)


def test_hidden_states_that_are_16_bits_already_come_back_as_they_were(tmp_path):
    states = [torch.randn(5, 8).half(), torch.randn(2, 8).half()]
    assert torch.equal(written(tmp_path, encode_hidden(states)).hidden(1), states[1])
    wide = [(torch.randn(5, 8) * 1e30).bfloat16()]
    assert torch.equal(written(tmp_path, encode_hidden(wide)).hidden(0), wide[0])


def test_the_header_holds_every_field():
    seed = fresh()
    g = torch.Generator().manual_seed(seed)
    r = lambda high: int(torch.randint(0, high, (), generator=g))  # noqa: E731
    for kind in ("sampled", "top_k", "hidden"):
        for widths in ((), (3,), (1, 5, 15)):
            layout = Layout(
                kind, r(26), r(17), r(26), r(26), widths, r(1 << 32), r(1 << 32), r(1 << 32), r(1 << 32), r(3),
                r(1 << 16), r(1 << 16), r(10**6) / 10**6, r(9) / 7,
            )  # fmt: skip
            raw = layout.to_bytes()
            assert len(raw) == 64 and Layout.from_bytes(raw) == layout, f"seed {seed}"
            assert layout.class_bits == {0: 0, 1: 1, 3: 2}[len(widths)]


@pytest.mark.parametrize(("place", "value"), [(0, 0x51), (7, 0), (8, 2), (9, 1), (10, 0), (10, 9)])
def test_another_format_or_version_is_refused(place, value, tmp_path):
    content = bytearray(encode([a_kept(torch.Generator(), 5, 40)], 40, Keep()))
    content[place] = value
    with pytest.raises(ValueError):
        written(tmp_path, bytes(content))


@pytest.mark.parametrize("kind", ["sampled", "hidden"])
def test_a_cut_file_is_refused_wherever_it_was_cut(kind, tmp_path):
    if kind == "sampled":
        content = encode([a_kept(torch.Generator().manual_seed(1), n, 400, skew=5.0) for n in (30, 9)], 400, Keep())
    else:
        content = encode_hidden([torch.randn(30, 6), torch.randn(9, 6)])
    passed = []
    for length in (*range(0, 120, 7), *range(120, len(content), 37), *range(len(content) - 12, len(content))):
        try:
            written(tmp_path, content[:length])
        except ValueError:
            continue
        except Exception as error:
            passed.append(f"{length}: {type(error).__name__}")
        else:
            passed.append(f"{length}: opened")
    assert not passed, f"of {len(content)} bytes, cut to {passed[:3]} ... {passed[-3:]}: no ValueError"


def test_a_shard_is_read_from_a_map_and_holds_nothing_of_it(tmp_path):
    """What was read stays when the file is gone."""
    kept = [a_kept(torch.Generator().manual_seed(2), 6, 90)]
    shard = written(tmp_path, encode(kept, 90, Keep()))
    got = shard.read(0)
    (tmp_path / "x.targets").unlink()
    assert_same(got, kept[0], "after the file was removed")
    got.entropy[0] = 1  # and may be changed
    assert_same(shard.read(0), kept[0], "read again")
