"""Reasoning traces: in whatever form they come, a chat template that thinks renders them once, whole and learnt."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from test_data_render import learnt, needs_real, real, trained, whole
from thinking_templates import TEMPLATES
from transformers import LlamaConfig, LlamaForCausalLM

from pennyweight.data.prepare import told
from pennyweight.data.render import dropped_thoughts, encode, prompt_ids
from pennyweight.data.sources import read
from pennyweight.data.thought import continued, joined, opened_by, parted, same
from pennyweight.data.token_stream import shown
from pennyweight.errors import DataError
from pennyweight.model.load import load, save
from pennyweight.model.loaded import text_of
from pennyweight.model.tokenizer import train_tokenizer
from pennyweight.recipe import FileData
from pennyweight.records import Message, Sample
from pennyweight.teacher.endpoint import Dialect

FORMS = {
    "inline": "<think>\nso\n</think>\n\ntwo",
    "tight": "<think>so</think>two",
    "apart": joined("so", "two"),
    "begun by a template": "so\n</think>\n\ntwo",
}
ENDS = ("<|im_end|>", "<|end|>", "<|eos|>")


def ask(response, *earlier, complete=True):
    turns = [Message(role, text) for role, text in zip(("user", "assistant") * 9, ("Hi", *earlier), strict=False)]
    return Sample(tuple(turns), response, "s", complete=complete)


def without_end(text):
    return next((text.removesuffix(e) for e in ENDS if text.endswith(e)), text)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("form", FORMS)
def test_a_trace_is_rendered_whole_learnt_whole_and_comes_back(name, form):
    t, tokenizer = TEMPLATES[name], trained(TEMPLATES[name].template)
    sample = ask(FORMS[form])
    encoded, prompt = encode(sample, tokenizer), prompt_ids(sample, tokenizer)
    assert encoded is not None and list(encoded.ids[: len(prompt)]) == prompt
    assert encoded.mask == tuple(i >= len(prompt) for i in range(len(encoded.ids)))
    asked = tokenizer.decode(prompt)
    assert opened_by(asked) == t.opens and asked.endswith(t.opens)
    (text,) = learnt(encoded, tokenizer)
    assert parted(t.opens + without_end(text)) == ("so", "two") and text.endswith(ENDS)
    assert whole(encoded, tokenizer).count("<think>") == whole(encoded, tokenizer).count("</think>") == 1
    if form in ("inline", "apart"):
        assert text == t.wants
    again = encode(replace(sample, response=t.opens + without_end(text)), tokenizer)
    assert again is not None and again.ids == encoded.ids and again.mask == encoded.mask


@pytest.mark.parametrize("name", TEMPLATES)
def test_what_was_generated_is_what_is_learnt(name):
    """A model that goes on from the prompt, and whose text is taken for a sample, finds the same tokens there."""
    t, tokenizer = TEMPLATES[name], trained(TEMPLATES[name].template)
    for said in ("so\n</think>\n\ntwo", "so </think>  two", "so\n\nand so\n</think>\n\n#### 2"):
        generated = said if t.opens else f"<think>\n{said}"
        encoded = encode(ask(t.opens + generated), tokenizer)
        assert encoded is not None
        (text,) = learnt(encoded, tokenizer)
        assert parted(without_end(text)) == parted(generated)
        if name in ("chatml", "r1"):  # the others have a spacing of their own
            assert without_end(text) == generated


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_thought_that_was_cut_off_stays_open(name):
    t, tokenizer = TEMPLATES[name], trained(TEMPLATES[name].template)
    encoded = encode(ask("<think>\nso and", complete=False), tokenizer)
    assert encoded is not None
    text = whole(encoded, tokenizer)
    assert text.endswith("<think>\nso and") and text.count("<think>") == 1 and "</think>" not in text
    assert learnt(encoded, tokenizer) == ["so and" if t.opens else "<think>\nso and"]


@pytest.mark.parametrize("name", TEMPLATES)
def test_an_answer_without_a_thought_leaves_none_open(name):
    t, tokenizer = TEMPLATES[name], trained(TEMPLATES[name].template)
    encoded = encode(ask("two"), tokenizer)
    assert encoded is not None
    (text,) = learnt(encoded, tokenizer)
    body = t.opens + without_end(text)
    assert body.strip() == "two" or parted(body) == ("", "two")
    assert body.count("<think>") == body.count("</think>")


@pytest.mark.parametrize("name", TEMPLATES)
def test_thoughts_of_earlier_turns_are_learnt_where_the_template_keeps_them_and_told_of_where_not(name):
    t, tokenizer = TEMPLATES[name], trained(TEMPLATES[name].template)
    sample = ask("<think>\nso\n</think>\n\ntwo", "<think>\nearly\n</think>\n\none", "More")
    encoded = encode(sample, tokenizer)
    assert encoded is not None
    turns = [without_end(x) for x in learnt(encoded, tokenizer)]
    assert dropped_thoughts([sample, ask("x")], tokenizer) == int(t.drops)
    assert ("early" in whole(encoded, tokenizer)) != t.drops
    assert whole(encoded, tokenizer).count("<think>") == (1 if t.drops else 2)
    assert [parted(t.opens + x) for x in turns] == [("so", "two")] if t.drops else [("early", "one"), ("so", "two")]
    facts = {"train": 1, "evaluation": 1, "rejected": 0, "rejected_for": {}, "train_left_out": 0, "eval_left_out": 0}
    facts |= {"overlap": {"normalised": 0, "ngram": 0}, "thoughts_dropped": dropped_thoughts([sample], tokenizer)}
    assert ("1 thoughts out of earlier turns" in told(facts)) == t.drops


def test_marks_that_are_control_tokens_may_be_in_an_answer_and_nowhere_else():
    tokenizer = trained(TEMPLATES["chatml"].template, False, False)
    tokenizer = type(tokenizer)(tokenizer_object=tokenizer.backend_tokenizer, eos_token="<|end|>")
    tokenizer.chat_template = TEMPLATES["chatml"].template
    tokenizer.add_special_tokens({"additional_special_tokens": ["<think>", "</think>", "<|im_end|>"]})
    encoded = encode(ask("<think>so</think>two"), tokenizer)
    assert encoded is not None and tokenizer.convert_tokens_to_ids("</think>") in encoded.ids
    assert text_of(tokenizer, tokenizer("<think>so</think>two<|end|>")["input_ids"]) == "<think>so</think>two"
    with pytest.raises(DataError, match="user turn holds the control token '<think>'"):
        encode(Sample((Message("user", "<think>"),), "a", "s"), tokenizer)
    with pytest.raises(DataError, match="assistant turn holds the control token"):
        encode(ask("<think>so</think>two<|im_end|>"), tokenizer)


@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"prompt": "Hi", "response": "two", "reasoning_content": "so"}, "Hi"),
        ({"prompt": "Hi", "response": "<think>\nso\n</think>\n\ntwo", "reasoning_content": "so"}, "Hi"),
        (
            {"messages": [
                {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "two", "reasoning_content": "so"},
            ]},
            "Hi",
        ),
        ({"prompt": "Hi", "generations": ["<think>\nso\n</think>\n\ntwo"]}, "Hi"),
    ],
)  # fmt: skip
def test_traces_of_files_come_in_either_form(tmp_path, row, prompt):
    (tmp_path / "r.jsonl").write_text(json.dumps(row) + "\n")
    (sample,) = read(FileData(path=str(tmp_path / "r.jsonl")))
    assert sample.response == "<think>\nso\n</think>\n\ntwo" and sample.prompt[0].content == prompt
    (tmp_path / "r.jsonl").write_text(json.dumps({"prompt": "p", "response": "r", "reasoning_content": 3}) + "\n")
    with pytest.raises(DataError, match="response reasoning_content holds 3 .int., not text"):
        read(FileData(path=str(tmp_path / "r.jsonl")))


@pytest.mark.parametrize("field", ["reasoning_content", "reasoning"])
def test_a_server_that_takes_the_thought_out_has_it_put_back(field):
    read_ = Dialect("chat", "max_tokens", {}).read
    body = lambda **m: {"choices": [{"message": m, "finish_reason": "stop"}]}  # noqa: E731
    assert read_(body(content="\n\ntwo", **{field: "\nso\n"}))["text"] == "<think>\nso\n</think>\n\ntwo"
    assert read_(body(content=None, **{field: "so"}))["text"] == "<think>\nso"
    assert read_(body(content="two", **{field: None}))["text"] == "two"
    assert read_(body(content="<think>a</think>b", **{field: "a"}))["text"] == "<think>a</think>b"


def test_a_teacher_whose_template_opens_the_thought_hands_over_all_of_it(tmp_path):
    from pennyweight.data.render import prompt_of
    from pennyweight.model.device import choose
    from pennyweight.teacher.local import LocalTeacher

    tokenizer = train_tokenizer(["<think>\nab cd", "Hi"], 80, 64)
    tokenizer.chat_template = (
        TEMPLATES["r1"].template.replace("<|start_header_id|>", "").replace("<|end_header_id|>", "")
    )
    torch.manual_seed(0)
    size = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, eos_token_id=2, **size)
    save(LlamaForCausalLM(config), tokenizer, tmp_path / "m")
    teacher = LocalTeacher(load(str(tmp_path / "m")), choose("cpu", "float32"), write_tokens=4)
    ((text, _),) = teacher.write([prompt_of(ask(None), teacher.tokenizer)], 0)
    assert text.startswith("<think>\n")


@needs_real
@pytest.mark.parametrize("name", TEMPLATES)
def test_on_a_real_tokenizer_and_printed(name):
    tokenizer = copy.deepcopy(real("smollm2"))  # which is kept for other tests
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_end|>", "<|im_start|>", "<|end|>"]})
    tokenizer.chat_template = TEMPLATES[name].template
    thought, answer = "12 + 34 is 46;\n\nso 46 + 1 = 47.", "It is 47, 맞아요."
    encoded = encode(ask(joined(thought, answer)), tokenizer)
    assert encoded is not None
    (text,) = learnt(encoded, tokenizer)
    assert parted(TEMPLATES[name].opens + without_end(text)) == (thought, answer)
    stream = shown(encoded, tokenizer).split("\n\n   pos")[0].replace("│", "")
    assert stream.endswith(f"[[{text}]]") and stream.count("[[") == 1
    assert "Hi" in stream.split("[[")[0]


def test_parts():
    assert parted("<think>a</think>b") == ("a", "b") and parted(" <think> a </think> b ") == ("a", "b")
    assert parted("a</think>b") == ("a", "b") and parted("<think></think>b") == ("", "b")
    for odd in ("b", "<think>a", "x<think>a</think>b", "<think>a</think>b</think>", "<think>a<think>b</think>c"):
        assert parted(odd) is None, odd
    assert opened_by("x<think>\n") == "<think>\n" and opened_by("<think>\n\n</think>\n\n") == ""
    assert same("<think>\na\n</think>\n\nb", "<think>a</think>b") and not same("b", "<think>a</think>b")
    assert continued("b", "<think>\n", True) == "\n</think>\n\nb" and continued("b", "<think>\n", False) == "b"
