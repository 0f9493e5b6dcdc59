"""What teachers write: answers and own samples in parts that survive a kill, and the store of trained teachers."""

from __future__ import annotations

import pytest
from architectures import make, save_with_tokenizer

from pennyweight.errors import DataError
from pennyweight.model.load import load
from pennyweight.records import Message, Prompt, Sample, Verdict
from pennyweight.teacher import answers, own_samples, store


class Scripted:
    """A teacher that numbers what it writes, and fails when it is told to."""

    name, fingerprint, keeps, tokenizer = "scripted", "f" * 64, False, None

    def __init__(self, fails_at=None):
        self.calls, self.fails_at = [], fails_at

    def write(self, prompts, seed, progress):
        if self.fails_at == len(self.calls):
            raise KeyboardInterrupt
        self.calls.append((len(prompts), seed))
        return [(f"reply to {p.ids[0]} by {seed}", p.ids[0] % 7 != 0) for p in prompts]


def asked(count):
    return [Sample((Message("user", str(i)),), None, "test") for i in range(count)]


def ids(sample):
    return Prompt(sample.prompt, "", (int(sample.prompt[0].content),))


def test_a_killed_pass_goes_on_and_writes_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(answers, "_PART", 4)
    whole = answers.write_answers(asked(11), ids, Scripted(), tmp_path / "a", 3)
    with pytest.raises(KeyboardInterrupt):
        answers.write_answers(asked(11), ids, Scripted(fails_at=2), tmp_path / "b", 3)
    second = Scripted()
    assert answers.write_answers(asked(11), ids, second, tmp_path / "b", 3) == whole
    assert [n for n, _ in second.calls] == [3]
    assert whole[5].response.startswith("reply to 5") and whole[5].author == "scripted"
    assert not whole[7].complete and whole[8].complete


def test_only_right_answers_are_kept_and_empty_ones_never():
    rows = [s.answered(r, "t", True) for s, r in zip(asked(4), ["good", "bad", "  ", "unjudged"], strict=True)]
    verdicts = {"good": Verdict(True, None), "bad": Verdict(False, None), "unjudged": None}
    kept, rejected = answers.keep(rows, lambda s: verdicts.get(s.response))
    assert [s.response for s in kept] == ["good", "unjudged"] and rejected == 2
    assert [s.response for s in answers.keep(rows, None)[0]] == ["good", "bad", "unjudged"]


def test_a_base_model_writes_texts_and_a_chat_model_prompts(tmp_path):
    base = load(str(save_with_tokenizer(make("llama"), tmp_path / "base", chat=False))).tokenizer
    chat = load(str(save_with_tokenizer(make("llama"), tmp_path / "chat"))).tokenizer
    texts = own_samples.own_samples(Scripted(), base, 5, 1, tmp_path / "x", "MIT")
    assert [s.prompt for s in texts] == [()] * 5 and texts[0].response == "reply to 1 by 1000003"
    assert texts[0].licence == "MIT" and texts[0].source == "samples of scripted" and texts[0].author == "scripted"
    prompts = own_samples.own_samples(Scripted(), chat, 5, 1, tmp_path / "y", "MIT")
    assert all(s.response is None and s.prompt[0].role == "user" for s in prompts)


def test_own_samples_go_on_after_a_kill(tmp_path, monkeypatch):
    monkeypatch.setattr(own_samples, "_PART", 4)
    base = load(str(save_with_tokenizer(make("llama"), tmp_path / "base", chat=False))).tokenizer
    whole = own_samples.own_samples(Scripted(), base, 10, 1, tmp_path / "a", "MIT")
    with pytest.raises(KeyboardInterrupt):
        own_samples.own_samples(Scripted(fails_at=1), base, 10, 1, tmp_path / "b", "MIT")
    second = Scripted()
    assert own_samples.own_samples(second, base, 10, 1, tmp_path / "b", "MIT") == whole
    assert [n for n, _ in second.calls] == [4, 2]


def test_a_tokenizer_without_an_end_cannot_write_from_nothing(tmp_path):
    tokenizer = load(str(save_with_tokenizer(make("llama"), tmp_path / "base", chat=False))).tokenizer
    tokenizer.bos_token = tokenizer.eos_token = None
    with pytest.raises(DataError, match="give prompts or texts with --data"):
        own_samples.own_samples(Scripted(), tokenizer, 2, 0, tmp_path / "x", "MIT")


def test_a_kept_teacher_is_taken_and_a_damaged_one_is_not(tmp_path):
    folder = save_with_tokenizer(make("llama"), tmp_path / "teacher")
    place = store.place_of("key")
    assert not store.adopt(place, tmp_path / "to")
    store.keep(folder, place)
    assert store.adopt(place, tmp_path / "to")
    assert {f.name: f.read_bytes() for f in (tmp_path / "to").iterdir()} == {
        f.name: f.read_bytes() for f in folder.iterdir()
    }
    weights = place / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\x01")
    assert not store.adopt(place, tmp_path / "again") and not (tmp_path / "again").exists()
