"""How a copy is taught: on-policy texts are the copy's own, and weights are drawn towards their codes."""

from __future__ import annotations

import torch
from architectures import make, save_with_tokenizer
from truth import fresh

from pennyweight.data.pack import collate
from pennyweight.model.device import choose
from pennyweight.model.load import load
from pennyweight.quant.export import formats_of
from pennyweight.quant.formats import FORMATS, decode, encode
from pennyweight.quant.learned import RoundedLinear, learn_to_be_rounded, rounded_once
from pennyweight.quant.recovery import _calmed, _live_lessons, _rewritten
from pennyweight.quant.rounding import Recovery, rounded_to
from pennyweight.records import Encoded
from pennyweight.teacher.local import LocalTeacher


def a_copy(tmp_path):
    """A model that learns to be rounded, as the speaker of its own texts."""
    parent = load(str(save_with_tokenizer(make("llama"), tmp_path / "parent")))
    codes, _ = rounded_to(parent.model, formats_of(parent.model, "int3", 32))
    learn_to_be_rounded(parent.model, codes)
    return LocalTeacher(parent, choose("cpu", "float32"))


def samples():
    """Prompts of 1 to 30 tokens, and rows of up to 36 in all."""
    sizes = [(1, 30), (30, 4), (5, 20), (1, 30), (1, 30), (1, 30)]
    rows = [(tuple(range(3, 3 + p + r)), (False,) * p + (True,) * r) for p, r in sizes]
    return [Encoded(f"s{i}", ids, mask) for i, (ids, mask) in enumerate(rows)]


def test_what_is_rewritten_begins_as_it_did_and_fits(tmp_path):
    copied, batch = a_copy(tmp_path), collate([[s] for s in samples()], 0)
    made = _rewritten(copied, batch, 5)
    before, after = ({s.id: s for s in b.placed} for b in (batch, made))
    assert set(before) == set(after)
    for name, sample in before.items():
        prompt, new = sample.ids[: sample.mask.index(True)], after[name]
        assert new.ids[: len(prompt)] == prompt and new.ids != sample.ids
        assert new.mask == (False,) * len(prompt) + (True,) * (len(new.ids) - len(prompt))
        assert len(prompt) < len(new.ids) <= 34


def test_micro_batches_of_an_on_policy_step_write_texts_of_their_own(tmp_path):
    copied = a_copy(tmp_path)
    alike = [Encoded(f"s{i}", (5, *range(10, 30)), (False,) + (True,) * 20) for i in range(8)]
    lessons = _live_lessons(copied, alike, Recovery(4, 8, 2, on_policy=0.5))
    given, written = ([s.ids for b in lessons(step) for s in b.placed] for step in (0, 1))
    assert given == [s.ids for s in alike] and len(set(written)) == 8
    assert written == [s.ids for b in lessons(1) for s in b.placed]  # as often as it is asked, while nothing is learnt


def test_weights_are_drawn_towards_their_codes_late_in_training(tmp_path):
    copied = a_copy(tmp_path)
    layers = [m for m in copied.loaded.model.modules() if isinstance(m, RoundedLinear)]
    with torch.no_grad():
        for m in layers:
            m.weight.add_(0.2 * m.start.scale.mean() * torch.randn_like(m.weight))

    def distance():
        return sum(float((m.weight - decode(m.coded())).detach().norm()) for m in layers)

    asked = []
    batches = _calmed(copied.loaded.model, 100, lambda step: asked.append(step) or [])
    start = distance()
    batches(10)
    assert distance() == start
    for step in range(20, 100):
        batches(step)
    assert distance() < 0.5 * start and asked == [10, *range(20, 100)]


def test_what_is_pulled_half_way_is_half_as_far_and_is_rounded_to_the_same():
    seed, layer = fresh(), torch.nn.Linear(32, 8, bias=False)
    torch.manual_seed(seed)
    torch.nn.init.normal_(layer.weight)
    model = torch.nn.ModuleList([layer])
    m = learn_to_be_rounded(model, {"0": encode(layer.weight, FORMATS["int4"])})["0"]
    codes, far = m.coded(), (m.weight - decode(m.coded())).detach()
    m.pull(0.5)
    assert torch.equal(m.coded().codes, codes.codes)
    torch.testing.assert_close((m.weight - decode(m.coded())).detach(), far / 2, atol=1e-6, rtol=1e-4)
    with rounded_once(model), torch.no_grad():
        assert torch.equal(m.rounded, decode(codes)) and torch.equal(m(torch.eye(32)), decode(codes).T)
    assert m.rounded is None
