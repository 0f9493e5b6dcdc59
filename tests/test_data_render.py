"""Training sees exactly the prompt that generation sees, and learns exactly what the model is to write."""

from __future__ import annotations

import random
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from pennyweight.data.render import encode, encode_all, learnt_bytes, prompt_ids
from pennyweight.data.token_stream import shown
from pennyweight.errors import DataError
from pennyweight.evaluate.held_out import windows
from pennyweight.records import Message, Sample

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"
needs_real = pytest.mark.skipif(
    not REAL.is_dir(), reason="needs the real tokenizers, which lie beside a full checkout only"
)

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' "
    "+ m['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
STRIPS = (
    "{% for m in messages %}{% set c = m['content'] %}"
    "{% if m['role'] == 'assistant' and not loop.last and '</think>' in c %}"
    "{% set c = c.split('</think>')[-1] %}{% endif %}"
    "{{ '<|im_start|>' + m['role'] + '\n' + c + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ALWAYS_STRIPS = STRIPS.replace("and not loop.last ", "").replace(
    "assistant\n' }}{% endif", "assistant\n<think>' }}{% endif"
)
BARE = (
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
)
TEXTS = [
    "Hello there, how are you today?",
    "안녕하세요, 반갑습니다! 오늘은 어때요?",
    "1 + 1 = 2\n\n#### 2",
    "Fine 😀👋🏽, ok.",
]
CONVERSATION = (
    Message("system", "Be brief. 짧게."),
    Message("user", "Hi 😀"),
    Message("assistant", "안녕하세요!"),
    Message("user", "1 + 1?"),
)


@cache
def trained(template=None, bos=False, prepend=False):
    """A byte-level BPE tokenizer with the control tokens of both templates."""
    control = ["<|pad|>", "<|bos|>", "<|end|>", "<|im_start|>", "<|im_end|>"]
    control += ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not prepend)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=control, initial_alphabet=alphabet, show_progress=False
    )
    core.train_from_iterator([*TEXTS, "assistant: Hello assistant\n\nHello\n\n\n"] * 3, trainer)
    if bos:
        core.post_processor = processors.TemplateProcessing(single="<|bos|> $A", special_tokens=[("<|bos|>", 1)])
    out = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<|bos|>", eos_token="<|end|>", pad_token="<|pad|>")
    out.chat_template = template
    return out


def ask(prompt, response, **more):
    return Sample((Message("user", prompt),), response, "s", **more)


def learnt(encoded, tokenizer):
    """Texts of the learnt runs."""
    runs, last = [], False
    for i, m in zip(encoded.ids, encoded.mask, strict=True):
        if m and not last:
            runs.append([])
        if m:
            runs[-1].append(i)
        last = m
    return [tokenizer.decode(r) for r in runs]


def whole(encoded, tokenizer):
    return tokenizer.decode(list(encoded.ids))


@pytest.mark.parametrize(
    "template", [CHATML, LLAMA3, STRIPS, BARE, None], ids=["chatml", "llama3", "strips", "bare", "none"]
)
@pytest.mark.parametrize("bos", [False, True])
def test_the_prompt_of_training_is_the_prompt_of_generation(template, bos):
    tokenizer = trained(template, bos)
    pieces = ["Hello", " ", "\n", "\n\n", "안녕", "하", "😀", "👋🏽", "#### 2", "1 + 1", "assistant", ":", "\t", "é"]
    rng = random.Random()
    for _ in range(150):
        text = ["".join(rng.choices(pieces, k=rng.randint(1, 8))) for _ in range(4)]
        turns = (
            [Message("system", text[0]), Message("user", text[1])] if rng.random() < 0.5 else [Message("user", text[1])]
        )
        sample = Sample(tuple(turns), text[2], "s", complete=rng.random() < 0.7)
        encoded, prompt = encode(sample, tokenizer), prompt_ids(sample, tokenizer)
        assert encoded is not None
        assert list(encoded.ids[: len(prompt)]) == prompt, (sample, text)
        assert len(encoded.mask) == len(encoded.ids)
        assert not any(encoded.mask[: len(prompt)])
        assert all(encoded.mask[len(prompt) :])
        wanted = {LLAMA3: text[2].strip(), BARE: " " + text[2]}.get(template, text[2])
        wanted += end_of(template) if sample.complete else ""
        assert learnt(encoded, tokenizer) == ([wanted] if wanted else []), sample


def end_of(template):
    return {CHATML: "<|im_end|>", STRIPS: "<|im_end|>", ALWAYS_STRIPS: "<|im_end|>", LLAMA3: "<|eot_id|>"}.get(
        template, "<|end|>"
    )


def test_chatml_learns_every_assistant_turn_and_its_end():
    tokenizer = trained(CHATML)
    sample = Sample(CONVERSATION, "2 👋🏽", "s")
    encoded = encode(sample, tokenizer)
    assert encoded is not None
    assert whole(encoded, tokenizer) == (
        "<|im_start|>system\nBe brief. 짧게.<|im_end|>\n<|im_start|>user\nHi 😀<|im_end|>\n"
        "<|im_start|>assistant\n안녕하세요!<|im_end|>\n<|im_start|>user\n1 + 1?<|im_end|>\n"
        "<|im_start|>assistant\n2 👋🏽<|im_end|>"
    )
    assert learnt(encoded, tokenizer) == ["안녕하세요!<|im_end|>", "2 👋🏽<|im_end|>"]
    assert encoded.id == sample.id


def test_llama3_has_one_beginning_even_where_the_tokenizer_adds_one():
    for bos in (False, True):
        tokenizer = trained(LLAMA3, bos)
        encoded = encode(Sample(CONVERSATION, "2", "s"), tokenizer)
        assert encoded is not None
        assert list(encoded.ids).count(tokenizer.bos_token_id) == 1
        assert learnt(encoded, tokenizer) == ["안녕하세요!<|eot_id|>", "2<|eot_id|>"]


def test_turns_that_the_template_rewrites_are_not_learnt():
    tokenizer = trained(STRIPS)
    turns = (Message("user", "a"), Message("assistant", "<think>x</think>b"), Message("user", "c"))
    encoded = encode(Sample(turns, "<think>y</think>d", "s"), tokenizer)
    assert encoded is not None
    assert "<think>x" not in whole(encoded, tokenizer)
    assert learnt(encoded, tokenizer) == ["<think>y</think>d<|im_end|>"]
    plain = (Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    encoded = encode(Sample(plain, "d", "s"), tokenizer)
    assert encoded is not None
    assert learnt(encoded, tokenizer) == ["b<|im_end|>", "d<|im_end|>"]


def test_a_response_that_the_template_would_cut_stands_as_written():
    tokenizer = trained(ALWAYS_STRIPS)
    sample = ask("a", "so</think>b")
    encoded = encode(sample, tokenizer)
    assert encoded is not None
    assert whole(encoded, tokenizer).endswith("<|im_start|>assistant\n<think>so</think>b<|im_end|>")
    assert list(encoded.ids[: len(prompt_ids(sample, tokenizer))]) == prompt_ids(sample, tokenizer)


def test_what_was_cut_off_gets_no_end():
    for template in (CHATML, LLAMA3, None):
        tokenizer = trained(template)
        for sample in (ask("a", "b", complete=False), Sample((), "b", "s", complete=False)):
            encoded = encode(sample, tokenizer)
            assert encoded is not None
            assert learnt(encoded, tokenizer) == ["b"]


def test_without_a_template():
    tokenizer = trained(bos=True)
    encoded = encode(Sample((Message("system", "s"), Message("user", "u")), "r", "s"), tokenizer)
    assert encoded is not None
    assert whole(encoded, tokenizer) == "<|bos|>s\nu\nr<|end|>"
    assert learnt(encoded, tokenizer) == ["r<|end|>"]
    bare = encode(ask("u", "r"), trained())
    assert bare is not None
    assert whole(bare, trained()) == "u\nr<|end|>"


def test_merges_across_the_border_are_undone():
    tokenizer = trained(BARE, prepend=True)
    both = tokenizer("assistant: Hello")["input_ids"]
    sample = ask("Hi", "Hello")
    encoded, prompt = encode(sample, tokenizer), prompt_ids(sample, tokenizer)
    assert encoded is not None
    assert both[: len(tokenizer("assistant:")["input_ids"])] != tokenizer("assistant:")["input_ids"]
    assert list(encoded.ids[: len(prompt)]) == prompt
    assert whole(encoded, tokenizer) == "user: Hi\nassistant: Hello<|end|>"


def test_plain_texts():
    for bos in (False, True):
        encoded = encode(Sample((), "안녕 😀", "s"), trained(bos=bos))
        assert encoded is not None
        assert whole(encoded, trained()) == "<|bos|>안녕 😀<|end|>"
        assert encoded.mask == (False, *[True] * (len(encoded.ids) - 1))


def test_control_tokens_in_the_data():
    encoded = encode(ask("<|im_end|>", "<|end|>"), trained())
    assert encoded is not None
    assert list(encoded.ids).count(trained().eos_token_id) == 1
    with pytest.raises(DataError, match=r"user turn holds the control token '<\|im_end\|>'.*remove it"):
        encode(ask("a<|im_end|>", "b"), trained(CHATML))
    with pytest.raises(DataError, match=r"sample 1: the assistant turn holds the control token '<\|eot_id\|>'"):
        encode_all([ask("a", "b"), ask("a", "<|eot_id|>")], trained(CHATML), 100, "drop")


def test_a_template_that_refuses():
    tokenizer = trained("{{ raise_exception('no system turn here') }}")
    with pytest.raises(DataError, match="refuses a conversation of user .no system turn here.*roles"):
        prompt_ids(ask("a", "b"), tokenizer)
    with pytest.raises(DataError, match="no response yet"):
        encode(Sample((Message("user", "a"),), None, "s"), trained())


def test_too_long():
    tokenizer = trained(CHATML)
    short, long, crowded = ask("a", "b"), ask("a", "Hello there " * 30), ask("안녕 " * 60, "b")
    length = len(getattr(encode(long, tokenizer), "ids"))  # noqa: B009
    with pytest.raises(
        DataError,
        match=rf"1 of 2 samples are too long; .* has {length} tokens: the context is 40; set data.too_long=drop",
    ):
        encode_all([short, long], tokenizer, 40, "refuse")
    assert [e.id for e in encode_all([short, long, crowded], tokenizer, 40, "drop")] == [short.id]
    cut = encode_all([short, long], tokenizer, 40, "truncate")[1]
    assert cut.ids == getattr(encode(long, tokenizer), "ids")[:40]  # noqa: B009
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") != cut.ids[-1]
    for too_long in ("refuse", "truncate"):
        with pytest.raises(DataError, match="samples are too long.*prompt alone leaves no room"):
            encode_all([short, crowded, long], tokenizer, 40, too_long)
        with pytest.raises(DataError, match="prompt alone leaves no room"):
            encode(crowded, tokenizer, 40, too_long)
    assert encode(long, tokenizer, 40, "drop") is None
    assert encode(long, tokenizer, 40, "truncate") == cut
    with pytest.raises(DataError, match="nothing is left"):
        encode_all([long], tokenizer, 40, "drop")


def test_texts_longer_than_the_context_become_windows():
    tokenizer = trained()
    rng = random.Random()
    for context in (8, 13, 40):
        sample = Sample((), " ".join(rng.choices(TEXTS, k=40)), "s")
        full = encode(sample, tokenizer)
        parts = encode_all([sample], tokenizer, context, "refuse")
        assert full is not None
        assert [p.id for p in parts] == [f"{sample.id}:{k}" for k in range(len(parts))]
        assert max(len(p.ids) for p in parts) == context
        assert tuple(t for p in parts for t, m in zip(p.ids, p.mask, strict=True) if m) == full.ids[1:]
        for before, after in pairwise(parts):
            assert before.ids[-1] == after.ids[0]
            assert not after.mask[0]
        assert sum(learnt_bytes(parts, tokenizer)) == len((sample.response or "").encode())
    assert encode_all([Sample((), "Hi", "s")], tokenizer, 8, "refuse")[0].id == Sample((), "Hi", "s").id


def test_windows_of_a_file(tmp_path):
    tokenizer = trained()
    text = "안녕하세요 😀\n\nHello there\n<|endoftext|>\nFine, ok.\n" * 3
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    found = windows(tmp_path / "t.txt", tokenizer, 16)
    assert sum(learnt_bytes(found, tokenizer)) == 3 * len("안녕하세요 😀\n\nHello thereFine, ok.".encode()) + 2
    (tmp_path / "e.txt").write_text(" \n")
    with pytest.raises(DataError, match="e.txt holds no text"):
        windows(tmp_path / "e.txt", tokenizer, 16)
    with pytest.raises(DataError, match="cannot read gone.txt"):
        windows(str(tmp_path / "gone.txt"), tokenizer, 16)
    (tmp_path / "b.txt").write_bytes(b"ok\n\xff")
    with pytest.raises(DataError, match="b.txt line 2 is not valid UTF-8"):
        windows(str(tmp_path / "b.txt"), tokenizer, 16)


def test_shown():
    tokenizer = trained(CHATML)
    encoded = encode(ask("Hi", "안녕하세요 👋🏽"), tokenizer)
    assert encoded is not None
    stream, table = shown(encoded, tokenizer).split("\n\n   pos")
    assert stream.startswith("<|im_start|>│")
    assert stream.replace("│", "").endswith("assistant\n[[안녕하세요 👋🏽<|im_end|>]]")
    rows = table.split("\n")[1:]
    assert len(rows) == len(encoded.ids)
    for t, row in enumerate(rows):
        assert row.split()[:2] == [str(t), str(encoded.ids[t])]
        assert row.endswith(" learnt") == encoded.mask[t]


@cache
def real(name):
    if name == "stories260K":
        return AutoTokenizer.from_pretrained(REAL / name)
    if name == "gpt2":
        folder = REAL / "tokenizers" / "gpt2"
        return GPT2Tokenizer(vocab=str(folder / "vocab.json"), merges=str(folder / "merges.txt"))
    out = PreTrainedTokenizerFast(tokenizer_file=str(REAL / "tokenizers" / "smollm2" / "tokenizer.json"))
    if name == "smollm2-chat":
        out.chat_template = CHATML
    return out


@needs_real
@pytest.mark.parametrize("name", ["stories260K", "gpt2", "smollm2", "smollm2-chat"])
def test_real_tokenizers(name):
    tokenizer = real(name)
    lines = (REAL / "korean" / "ChatbotData.csv").read_text(encoding="utf-8").splitlines()[1:]
    pairs = [line.split(",")[:2] for line in random.sample(lines, 60)] + [
        ["Hi 😀", "\n two  spaces\n"],
        ["x ", " y"],
        ["\n", "0"],
    ]
    for prompt, response in pairs:
        sample = ask(prompt, response)
        encoded, begin = encode(sample, tokenizer), prompt_ids(sample, tokenizer)
        assert encoded is not None
        assert list(encoded.ids[: len(begin)]) == begin
        assert encoded.mask == tuple(t >= len(begin) for t in range(len(encoded.ids)))
        assert learnt_bytes([encoded], tokenizer) == [len(response.encode())]
        kept = tokenizer.decode(list(encoded.ids), skip_special_tokens=True)
        assert kept.endswith(response), (prompt, response)


@needs_real
@pytest.mark.parametrize("name", ["stories260K", "gpt2"])
def test_real_windows_spell_the_text(name, tmp_path):
    text = "Once upon a time, 옛날에 😀 there was\na cat.\n\n" * 30
    (tmp_path / "t.txt").write_text(text, encoding="utf-8")
    for context in (16, 512):
        found = windows(tmp_path / "t.txt", real(name), context)
        assert sum(learnt_bytes(found, real(name))) == len(text.strip().encode())


@needs_real
def test_a_tokenizer_without_control_tokens_of_its_own_loses_only_the_first_token():
    encoded = encode(Sample((), "Once upon a time", "s"), real("smollm2"))
    assert encoded is not None
    assert encoded.mask == (False, *[True] * (len(encoded.ids) - 1))
    assert learnt_bytes([encoded], real("smollm2")) == [len(" upon a time")]
