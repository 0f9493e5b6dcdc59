"""What servers tell of a text's tokens, read beside the teacher itself: forms, strings, limits, and refusals."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from conftest import REAL
from transformers import GPT2Tokenizer, PreTrainedTokenizerFast
from truth import fresh

from pennyweight.data.render import encode
from pennyweight.errors import EndpointError
from pennyweight.model.device import choose
from pennyweight.model.load import load, open_tokenizer
from pennyweight.records import Sample
from pennyweight.teacher.local import LocalTeacher
from pennyweight.teacher.targets import Keep
from pennyweight.teacher.token_names import TokenNames
from pennyweight.teacher.told import align, asking, by_id, find_telling, kept, read_line

K = 12
KEEP = Keep("top_k", 0.0, K)
TEXT = 'Once upon a time, there was a little girl named Lily.\nShe said: "Hi!" and saw 3 birds. It was a café.'


@pytest.fixture(scope="module")
def teacher(stories):
    return load(str(stories))


class Imitation:
    """A server around a model in this process, which tells by id as vLLM does, or by string and without the beginning
    of the text as llama-cpp-python does.

    ``most`` entries at most; ``shift`` attaches them one place too early; ``forms`` are those it knows.
    """

    def __init__(self, loaded, forms=("prompt_logprobs", "echo"), most=None, shift=0, takes_ids=True):
        self.loaded, self.forms, self.most, self.shift, self.takes_ids = loaded, forms, most, shift, takes_ids
        self.spelt = [self.piece(i) for i in range(len(loaded.tokenizer))]

    def piece(self, i: int) -> str:
        name = self.loaded.tokenizer.convert_ids_to_tokens(i)
        if name.startswith("<0x"):
            return bytes([int(name[3:5], 16)]).decode(errors="ignore")
        return "" if i in self.loaded.tokenizer.all_special_ids else name.replace("▁", " ")

    def ask(self, form, prompt, k):
        """As ``told.Ask``."""
        if self.most and k > self.most:
            return f"400: at most {self.most}"
        if isinstance(prompt, list) and not self.takes_ids:
            return "422: a string is wanted"
        if form not in self.forms:
            return []
        return read_line(form, self.body(asking(form, prompt, k)))

    @torch.no_grad()
    def body(self, asked):
        tokenizer, k = self.loaded.tokenizer, asked.get("prompt_logprobs", asked.get("logprobs"))
        ids = list(asked["prompt"] if isinstance(asked["prompt"], list) else tokenizer(asked["prompt"])["input_ids"])
        logs = torch.log_softmax(self.loaded.model(torch.tensor([ids])).logits[0].float(), -1)
        ids.append(int(logs[-1].argmax()))
        rows = [None, *({i: float(v) for v, i in zip(*(t.tolist() for t in row.topk(k)), strict=True)} for row in logs)]
        for i, row, log in zip(ids[1:], rows[1:], logs, strict=True):
            row.setdefault(i, float(log[i]))
        if "prompt_logprobs" in asked:
            told = [
                r and {str(i): {"logprob": v, "rank": 1, "decoded_token": self.spelt[i]} for i, v in r.items()}
                for r in rows
            ]
            return {"choices": [{"text": "", "prompt_logprobs": told[:-1]}]}
        strings = [r and {self.spelt[i]: v for i, v in sorted(r.items(), key=lambda e: -e[1])} for r in rows]
        if self.shift:
            return {
                "choices": [{"logprobs": {"tokens": [self.spelt[i] for i in ids[:-1]], "top_logprobs": strings[1:]}}]
            }
        strings[1] = None  # the first after the beginning, of which it could tell
        told = {"tokens": [self.spelt[i] for i in ids[1:]], "top_logprobs": strings[1:]}
        return {"choices": [{"logprobs": told}]}


def found_by(loaded, imitation, k=K, tokenizer=None):
    tokenizer = tokenizer or loaded.tokenizer
    return find_telling(imitation.ask, k, tokenizer, TokenNames(tokenizer), "host")


@pytest.mark.parametrize("form", ["prompt_logprobs", "echo"])
def test_the_targets_are_the_teachers_own(teacher, form):
    server, spelling = Imitation(teacher, (form,), takes_ids=form == "prompt_logprobs"), TokenNames(teacher.tokenizer)
    telling = found_by(teacher, server)
    assert telling.form == form and telling.silent_first == (form == "echo") == (not telling.by_ids)
    whole = encode(Sample((), TEXT, "", complete=False), teacher.tokenizer)
    sample = whole.learnt_from(2 if telling.silent_first else 0)
    line = server.ask(form, list(sample.ids) if telling.by_ids else TEXT, telling.asked)
    got = kept(sample, line, telling.asked, KEEP, spelling)
    want = LocalTeacher(teacher, choose("cpu", "float32")).targets([sample], KEEP)[0]
    assert len(got) == len(want) == len(sample.loss_positions) > 40
    with torch.no_grad():
        truth = teacher.model(torch.tensor([sample.ids])).logits[0].float().softmax(-1)[sample.loss_positions]
    ids, probs = got.ids.view(-1, K).long(), got.probs.view(-1, K) / 65_535
    assert (probs - truth.gather(-1, ids)).abs().max() <= 2 / 65_535  # six digits of a logarithm, and chance
    same = (ids.sort(-1).values == want.ids.view(-1, K).long().sort(-1).values).all(-1)
    # By string, what may be hidden behind a single byte is left to the rest, and the next takes its place.
    assert same.all() if form == "prompt_logprobs" else same.float().mean() > 0.9


def test_a_limit_is_found_and_said(teacher):
    for form in ("prompt_logprobs", "echo"):
        with pytest.raises(EndpointError, match=r"tells of at most 5 tokens at a position.*set targets.k=5"):
            found_by(teacher, Imitation(teacher, (form,), most=5))
        assert found_by(teacher, Imitation(teacher, (form,), most=5), k=5).asked == 5
    assert found_by(teacher, Imitation(teacher, ("echo",)), k=5).asked == 13


@pytest.mark.parametrize("form", ["prompt_logprobs", "echo"])
@pytest.mark.parametrize("nothing", [lambda told: [], lambda told: [(token, None) for token, _ in told]])
def test_a_limit_is_found_where_a_server_passes_over_what_is_beyond_it(teacher, form, nothing):
    class Silent(Imitation):
        def ask(self, form, prompt, k):
            told = super().ask(form, prompt, k)
            return told if k <= 5 else nothing(told)

    with pytest.raises(EndpointError, match=r"tells of at most 5 tokens at a position.*set targets.k=5"):
        found_by(teacher, Silent(teacher, (form,)))


def test_what_does_not_line_up_or_is_cut_otherwise_is_refused(teacher, tmp_path):
    with pytest.raises(EndpointError, match="does not line up"):
        found_by(teacher, Imitation(teacher, ("echo",), shift=1))
    with pytest.raises(EndpointError, match="tells no log-probabilities of a prompt; start it so"):
        found_by(teacher, Imitation(teacher, ()))
    with pytest.raises(EndpointError, match=r"of a prompt \(400: at most 0.5\)"):
        found_by(teacher, Imitation(teacher, most=0.5))
    for form in ("prompt_logprobs", "echo"):
        with pytest.raises(EndpointError, match="into other tokens than teacher.tokenizer"):
            found_by(teacher, Imitation(teacher, (form,)), tokenizer=real_tokenizer("smollm2"))


def real_tokenizer(name: str):
    folder = REAL / "tokenizers" / name
    if not folder.is_dir():
        pytest.skip("needs the real tokenizers, which lie beside a full checkout only")
    if name == "gpt2":
        return GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    return PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"))


@pytest.mark.parametrize("name", ["gpt2", "smollm2", "stories"])
def test_each_token_is_known_by_its_name_its_number_and_its_text(name, request):
    stories = str(request.getfixturevalue("stories")) if name == "stories" else ""
    tokenizer = open_tokenizer(stories) if stories else real_tokenizer(name)
    spelling = TokenNames(tokenizer)
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    texts = [tokenizer.decode([i]) if name != "stories" else n.replace("▁", " ") for i, n in enumerate(names)]
    whole = [t for t in texts if "\ufffd" not in t and not t.startswith("<0x")]
    count, among_them = Counter(texts), set(whole)
    for i, (n, t) in enumerate(zip(names, texts, strict=True)):
        assert spelling.spells(n, i) and spelling.spells(f"token_id:{i}", i) and spelling.only(f"token_id:{i}") == i
        assert spelling.only(n) in (i, None) and not spelling.spells("token_id:999999", i)
        if t in among_them:
            assert spelling.spells(t, i), (i, n, t)
            assert count[t] > 1 or spelling.only(t) in (i, None)
    assert sum(spelling.only(t) == i for i, t in enumerate(texts)) > 0.99 * len(whole) if name != "stories" else True
    assert spelling.only("no token at all") is None


def test_a_byte_that_hides_a_piece_is_left_out(teacher):
    spelling = TokenNames(teacher.tokenizer)
    a, byte = (teacher.tokenizer.convert_tokens_to_ids(t) for t in ("a", "<0x61>"))
    assert spelling.spells("a", a) and spelling.spells("a", byte) and spelling.only("a") == a and spelling.twins("a")
    other = teacher.tokenizer.convert_tokens_to_ids("e")
    whole = [("a", -1.0), ("e", -2.0), ("▁the", -3.0)]
    assert [i for i, _ in by_id(whole, other, 2, spelling)][:2] == [a, other]
    assert a not in [i for i, _ in by_id(whole, other, 4, spelling)]
    assert by_id([("", -1.0)], a, 1, spelling) == []


def test_log_probabilities_that_are_none_are_refused(teacher):
    sample = encode(Sample((), "Once upon", "", complete=False), teacher.tokenizer).learnt_from(2)
    entries = [[i, -0.1] for i in (*range(300, 300 + K), sample.ids[2])]
    line = [[None, None], [None, [[sample.ids[1], -0.1]]], [None, entries]]
    with pytest.raises(EndpointError, match="sums to .* may have changed them"):
        kept(sample, line, K, KEEP, TokenNames(teacher.tokenizer))
    with pytest.raises(EndpointError, match="tells of only 2 tokens for certain.*set targets.k=2"):
        kept(sample, [*line[:2], [None, entries[-2:]]], 2, KEEP, TokenNames(teacher.tokenizer))
    with pytest.raises(EndpointError, match="cuts a sample of 3 tokens otherwise"):
        kept(sample, line[:2], K, KEEP, TokenNames(teacher.tokenizer))
    with pytest.raises(ValueError, match="not a log-probability"):
        read_line("echo", {"choices": [{"logprobs": {"tokens": ["a"], "top_logprobs": [{"a": 0.5}]}}]})


def test_alignment_passes_over_the_beginning_and_takes_a_trimmed_space(teacher):
    spelling = TokenNames(teacher.tokenizer)
    ids = teacher.tokenizer("Once upon a time")["input_ids"]
    names = teacher.tokenizer.convert_ids_to_tokens(ids)
    seed = fresh()
    told = [(n, [(n, -0.1)]) for n in names]
    assert align(told, ids, spelling).at == [e for _, e in told]
    trimmed = [("Once", None), *((n.replace("▁", " "), [(n, -0.1)]) for n in names[2:]), ("x", [("x", -1.0)])]
    beside = align(trimmed, ids, spelling)
    assert beside.at[:2] == [None, None] and beside.after == ("x", [("x", -1.0)])
    place = 1 + seed % (len(names) - 1)
    wrong = [*told[:place], ("▁dog", [("▁dog", -0.1)]), *told[place + 1 :]]
    assert align(wrong, ids, spelling) is None, f"seed {seed}"
    assert align(told[:-1], ids, spelling) is None and align([*told, *told[:2]], ids, spelling) is None
