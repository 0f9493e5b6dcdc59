"""What tokens spell: joined they are the text, whatever the text, for real tokenizers and ones made here."""

from __future__ import annotations

import pytest
from real_tokenizers import REAL_ONES, real_spelling, tokenizer_of
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from pennyweight.errors import ModelError
from pennyweight.model.spelling import joined
from pennyweight.model.token_bytes import spelling_of
from pennyweight.model.tokenizer import train_tokenizer

TEXTS = [
    "Once upon a time, there was 1 little girl; she had 12, 123 and 1234567 things.",
    "  two  spaces,\ttabs\n\n\nlines   ",
    "안녕하세요, 세계! 대한민국 ㅋㅋㅋ 뷁",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 é e\u0301 ﬁ ½ Ω Ω",
    "\x00\x01\x7f\u200b\u202e <|endoftext|></s><s>[INST] <0x41>",
    "日本語テキスト、ภาษาไทย עברית",
]


@pytest.mark.parametrize("name", REAL_ONES)
@pytest.mark.parametrize("text", TEXTS)
def test_joined_tokens_are_the_text(name, text):
    tokenizer, spelling = tokenizer_of(name), real_spelling(name)
    (ids,) = spelling.cut([text.encode()])
    assert ids and joined(ids, spelling) == text.encode()
    # As the tokenizer itself cuts it, up to the space that it puts first.
    own = joined(tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"], spelling)
    assert own in (text.encode(), b" " + text.encode())


@pytest.mark.parametrize("name", REAL_ONES)
def test_bytes_that_are_no_text_are_spelt_too(name):
    spelling = real_spelling(name)
    parts = ["뷁".encode()[:2], "뷁".encode()[1:] + b" yes", b"a\xf0\x9f", "🙂".encode()[3:], b"\xf0\x9f\x99\x82 \x99"]
    for part, ids in zip(parts, spelling.cut(parts), strict=True):
        assert ids and joined(ids, spelling) == part


def test_the_middle_of_a_text_has_no_space_put_before_it(stories):
    spelling = spelling_of(AutoTokenizer.from_pretrained(stories))
    assert spelling.pieces[spelling.cut([b"time"])[0][0]][:1] == b"t"
    assert spelling.pieces[1] is None and spelling.pieces[2] is None  # <s>, </s>
    assert spelling.pieces[3] == b"\x00"  # <0x00>


def test_metaspace_and_unknown_characters():
    model = models.BPE({"<unk>": 0, "▁": 1, "a": 2, "b": 3, "▁a": 4}, [("▁", "a")], unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    spelling = spelling_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    assert spelling.cut([b"ab a", b"ac"]) == [[2, 3, 4], None]


def test_one_of_our_own_spells_what_it_was_trained_on():
    spelling = spelling_of(train_tokenizer(["3 + 14 = 17", "한국"] * 9, 200, 64))
    assert joined(spelling.cut(["17 + 3 한국".encode()])[0], spelling) == "17 + 3 한국".encode()
    assert spelling.cut([b"unheard"]) == [None]


def test_what_loses_letters_is_refused():
    alphabet = {c: i for i, c in enumerate(sorted(set("".join(TEXTS).lower()) | set("xtworldh,!.67")))}
    tokenizer = Tokenizer(models.BPE(alphabet, []))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    with pytest.raises(ModelError, match="the teacher's tokenizer spell is not understood: 'Hello"):
        spelling_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer), "the teacher's")
    tokenizer.normalizer = normalizers.Lowercase()
    with pytest.raises(ModelError, match="not understood"):
        spelling_of(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


def test_one_without_a_tokenizer_json_is_refused():
    class Slow:
        is_fast = False

    with pytest.raises(ModelError, match=r"does not come as a tokenizer\.json"):
        spelling_of(Slow())
