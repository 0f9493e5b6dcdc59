"""The cache of targets: labelled once, addressed by content, damage found, and unbiased through the file."""

from __future__ import annotations

import pytest
import torch
from architectures import V, make, save_with_tokenizer

from pennyweight.data.pack import collate, first_fit
from pennyweight.loss.divergence import Divergence, divergence
from pennyweight.model.device import choose
from pennyweight.model.load import load
from pennyweight.records import Encoded
from pennyweight.teacher.cache import TargetCache
from pennyweight.teacher.local import LocalTeacher

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    loaded = load(str(save_with_tokenizer(make("llama", 3), tmp_path_factory.mktemp("teacher") / "t")))
    return LocalTeacher(loaded, choose("cpu", "float32"))


def samples(count=14, seed=1):
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        length = int(torch.randint(4, 20, (1,), generator=g))
        ids = torch.randint(3, V, (length,), generator=g).tolist()
        out.append(Encoded(f"{i:064x}", tuple(ids), tuple(j >= 2 for j in range(length))))
    return out


def cache(folder, teacher, asked=None, temperature=1.0):
    def label(group, threshold, temperature):
        if asked is not None:
            asked.append(len(group))
        return teacher.targets(group, threshold, temperature)

    return TargetCache(folder, teacher.fingerprint, 0.02, temperature, 4, label)


def test_labelled_once_whatever_the_order(tmp_path, teacher):
    data, asked = samples(), []
    first = cache(tmp_path, teacher, asked).fill(data)
    assert asked == [4, 4, 4, 2] and first.made == 4
    assert first.tokens == sum(len(s.loss_positions) for s in data)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert first.bytes == sum(f.stat().st_size for f in files)
    again = cache(tmp_path, teacher, asked).fill(data[::-1] + data[:3])
    assert again.made == 0 and len(asked) == 4 and again.bytes == first.bytes
    assert sorted(tmp_path.glob("*.safetensors")) == files


def test_another_temperature_teacher_or_text_is_another_shard(tmp_path, teacher):
    data = samples()
    cache(tmp_path, teacher).fill(data)
    assert cache(tmp_path, teacher, temperature=2.0).fill(data).made == 4
    other = TargetCache(tmp_path, "0" * 64, 0.02, 1.0, 4, teacher.targets)
    assert other.fill(data).made == 4
    changed = [Encoded(s.id, s.ids, (False, *s.mask[1:-1], False)) for s in data]
    assert cache(tmp_path, teacher).fill(changed).made == 4


@pytest.mark.parametrize("harm", ["flip", "cut", "empty"])
def test_a_damaged_shard_is_named_and_made_again(tmp_path, teacher, harm):
    data = samples()
    cache(tmp_path, teacher).fill(data)
    good = {f.name: f.read_bytes() for f in tmp_path.glob("*.safetensors")}
    victim = sorted(tmp_path.glob("*.safetensors"))[1]
    content = bytearray(victim.read_bytes())
    content[-3] ^= 1
    victim.write_bytes({"flip": bytes(content), "cut": bytes(content[:-9]), "empty": b""}[harm])
    (tmp_path / ".making-left-by-a-kill").write_bytes(b"x")
    found = cache(tmp_path, teacher).fill(data)
    assert found.damaged == (victim.name,) and found.made == 1
    assert {f.name: f.read_bytes() for f in tmp_path.iterdir()} == good


def test_signals_belong_to_their_positions_packed_or_not(tmp_path, teacher):
    data = samples()
    c = cache(tmp_path, teacher)
    c.fill(data)
    padded, packed = collate([[s] for s in data], 0), collate(first_fit(data, 64), 0)

    def by_sample(batch):
        whole = c.signal(batch, CPU)(0, batch.count)
        sizes = [len(s.loss_positions) for s in batch.placed]
        parts = zip(whole.ids.split(sizes), whole.weights.split(sizes), strict=True)
        return {s.id: p for s, p in zip(batch.placed, parts, strict=True)}

    a, b = by_sample(padded), by_sample(packed)
    for s in data:
        assert torch.equal(a[s.id][0], b[s.id][0]) and torch.equal(a[s.id][1], b[s.id][1])
    part = c.signal(padded, CPU)(3, 7)
    assert torch.equal(part.weights, c.signal(padded, CPU)(0, padded.count).weights[3:7])


def test_the_loss_through_the_file_is_unbiased(tmp_path, teacher):
    """Mean of the sampled KL over many labellings against the dense KL of the same student, both per position."""
    one = samples(1, 8)[0]
    batch = collate([[one]], 0)
    student = make("llama", 11)
    from pennyweight.model.head import forward_hidden, head_of

    with torch.no_grad():
        hidden = forward_hidden(student, batch.ids, batch.positions).flatten(0, 1)[batch.selected]
        logits = head_of(student).logits(hidden)
        want = divergence(Divergence(), logits, teacher.dense(batch)(0, batch.count))
        dense = teacher.dense(batch)(0, batch.count).logits
        from pennyweight.teacher.targets import draw, restore

        values = []
        for k in range(3000):
            kept = draw(dense, 0.05, 1.0, torch.Generator().manual_seed(k))
            values.append(divergence(Divergence(), logits, restore(kept, 0.05)))
    values = torch.stack(values)
    error = (values.mean(0) - want).abs() / (values.std(0) / len(values) ** 0.5)
    assert float(error.max()) < 5, "more than 5 standard errors from the dense value"
    # And what the cache hands out is one such draw, of the sample's own seed.
    c = cache(tmp_path, teacher)
    c.fill([one])
    from_file = divergence(Divergence(), logits, c.signal(batch, CPU)(0, batch.count))
    assert bool(((from_file - want).abs() < 8 * values.std(0) + 1e-3).all())
