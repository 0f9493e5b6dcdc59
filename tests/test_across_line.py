"""A student of another tokenizer than its teacher's, through the whole line; and what is refused of it."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pennyweight.commands import show_sample
from pennyweight.data.both_tokenizers import BothTokenizers
from pennyweight.errors import DataError, MethodError, RunError
from pennyweight.inspection import inspect_targets
from pennyweight.model.load import language_of, open_tokenizer, save
from pennyweight.model.loaded import Language
from pennyweight.model.tokenizer import train_tokenizer
from pennyweight.recipe import DenseTargets, SampledTargets, TopKTargets
from pennyweight.recipe_file import parse
from pennyweight.records import Message, Sample
from pennyweight.settings import KdMethod
from pennyweight.stages import run_line
from pennyweight.teacher.across import AcrossTeacher
from pennyweight.teacher.alignment import align
from pennyweight.teacher.refusals import check_targets

SPELT = ["one two three four five six seven eight nine ten. " * 3, "what is 1 + 2?\n3 4567890"]


def folder_of(tokenizer, place, context=64):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=context, bos_token_id=1, eos_token_id=2, pad_token_id=0,
    )  # fmt: skip
    save(LlamaForCausalLM(config), tokenizer, place)
    return place


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A teacher of 128 tokens, and a student of 70 that cuts the same bytes otherwise, but has none for ÿ."""
    root = tmp_path_factory.mktemp("models")
    teacher = folder_of(train_tokenizer([*SPELT, "ÿ"], 128, 64), root / "teacher")
    return teacher, folder_of(train_tokenizer([t[::-1] for t in SPELT], 70, 64), root / "student")


def asked(i):
    return {"prompt": f"what is {i} + 2?", "response": f"{['one', 'two', 'three four', 'seven'][i % 4]} {i}"}


def recipe_of(models, tmp_path):
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(asked(i)) + "\n" for i in range(60)))
    teacher, student = models
    settings = {
        "name": "across",
        "compute": {"dtype": "float32", "threads": 1},
        "teacher": {"kind": "folder", "path": str(teacher)},
        "student": {"kind": "folder", "path": str(student)},
        "data": {"context": 64, "source": {"kind": "files", "path": str(tmp_path / "rows.jsonl")}},
        "train": {"steps": 6, "batch": 8, "lr": 5e-3},
        "quantize": {"formats": []},
        "evaluate": {"max_tokens": 4},
    }
    return parse(settings)


@pytest.fixture(scope="module")
def done(models, tmp_path_factory):
    place = tmp_path_factory.mktemp("run")
    return place / "r", run_line(recipe_of(models, place), place / "r")


def test_the_line_goes_through_and_says_what_it_is(done, models):
    folder, summary = done
    assert summary["targets"]["across"] and summary["targets"]["bytes"] > 0
    found = {name: json.loads((folder / "evaluation" / f"{name}.json").read_text()) for name in ("teacher", "kd-0")}
    for one in found.values():
        assert one["metrics"]["bits_per_byte"]["mean"] > 0
        assert not {"kl_to_teacher", "agreement"} & set(one["metrics"])
    assert open_tokenizer(str(folder / "student")).get_vocab() == open_tokenizer(str(models[1])).get_vocab()
    assert "carried over" in (folder / "report.html").read_text()


def test_it_learns_from_the_teacher_and_not_from_the_text_alone(done):
    folder, _ = done
    lines = [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()]
    kd = [x for x in lines if x["arm"] == "kd"]
    assert len(kd) == 6 and all(x["divergence"] is not None for x in kd)
    sft, kd = ((folder / "arms" / arm / "model.safetensors").read_bytes() for arm in ("sft-0", "kd-0"))
    assert sft != kd


def test_a_finished_run_is_gone_through_and_a_lost_student_made_again_alike(done, models, no_charts):
    folder, summary = done
    student = (folder / "arms" / "kd-0" / "model.safetensors").read_bytes()
    (folder / "arms" / "kd-0" / "model.safetensors").unlink()
    again = run_line(recipe_of(models, folder.parent), folder)
    assert (folder / "arms" / "kd-0" / "model.safetensors").read_bytes() == student
    assert again["targets"] == summary["targets"]


def test_a_sample_is_shown_in_the_students_tokens(done, models):
    rows = json.loads(show_sample(str(done[0]), 0, as_json=True))
    assert max(i for r in rows for i in r["ids"]) < language_of(str(models[1])).vocabulary


def test_inspecting_such_targets_is_refused(done):
    with pytest.raises(RunError, match="other tokens than its teacher"):
        inspect_targets(str(done[0]))


@pytest.mark.parametrize(
    ("method", "targets", "told"),
    [
        (KdMethod(), DenseTargets(), "set targets.kind=sampled"),
        (KdMethod(), TopKTargets(), "set targets.kind=sampled"),
        (KdMethod(divergence="jsd"), SampledTargets(), "set method.divergence=forward_kl"),
        (KdMethod(temperature=2.0), SampledTargets(), "set method.temperature=1"),
        (KdMethod(hidden=0.5), SampledTargets(), "set method.hidden=0"),
    ],
)
def test_what_cannot_be_carried_over_is_refused(method, targets, told):
    check_targets(method, targets, 512, across=False)
    with pytest.raises(MethodError, match=told):
        check_targets(method, targets, 512, across=True)


# Samples in both


@pytest.fixture
def both(models):
    teacher, student = (language_of(str(m)) for m in models)
    return BothTokenizers(student, teacher, 64)


def spelt(encoded, tokenizer):
    return tokenizer.decode([i for i, m in zip(encoded.ids, encoded.mask, strict=True) if m], skip_special_tokens=True)


def test_a_long_text_is_cut_into_parts_that_fit_both_and_join_to_the_whole(both):
    text = " ".join(SPELT[0].split() * 4)
    sample = Sample((), text, "x")
    parts = both.encode([sample], "refuse")
    assert len(parts) > 2 and [p.id for p in parts] == [f"{sample.id}:{k}" for k in range(len(parts))]
    for tokenizer, one in ((both.student.tokenizer, parts), (both.teacher.tokenizer, [both.theirs(p) for p in parts])):
        assert all(len(p.ids) <= 64 for p in one)
        assert "".join(spelt(p, tokenizer) for p in one) == text
    ends = [p.ids[-1] == both.student.tokenizer.eos_token_id for p in parts]
    assert ends == [False] * (len(parts) - 1) + [True]
    assert both.ends(parts) == [both.student.tokenizer.eos_token_id]


def test_a_text_that_fits_keeps_its_id(both):
    sample = Sample((), "one two three", "x")
    assert [p.id for p in both.encode([sample], "refuse")] == [sample.id]


def answered(prompt, response):
    return Sample((Message("user", prompt),), response, "x")


def test_samples_that_are_spelt_differently_are_left_out_and_told(both, capsys):
    odd, plain = answered("what is 1?", "one ÿ"), answered("what is 2?", "two")
    assert [e.id for e in both.encode([odd, plain], "refuse")] == [plain.id]
    assert "1 of 2 samples are left out" in capsys.readouterr().err
    with pytest.raises(DataError, match="none of 1 samples can be used: "):
        both.encode([odd], "refuse")


def test_a_prompt_that_leaves_the_teacher_no_room_is_left_out(both, models, capsys):
    narrow = BothTokenizers(both.student, Language(both.teacher.tokenizer, both.teacher.vocabulary, 8), 64)
    long, short = answered("two three four five six", "one"), answered("2?", "two")
    assert [e.id for e in narrow.encode([long, short], "refuse")] == [short.id]
    assert "left to learn in the teacher's context of 8 tokens" in capsys.readouterr().err


def with_template(tokenizer, template, bos="same"):
    made = copy.deepcopy(tokenizer)
    made.chat_template = template
    if bos is None:
        made.bos_token = None
    return made


def test_a_plain_text_is_learnt_from_its_first_byte_whoever_has_no_opening_token(both):
    chat = "{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"
    bare = Language(with_template(both.teacher.tokenizer, chat, None), both.teacher.vocabulary, 64)
    sample = Sample((), "one two three", "x")
    for pair in (BothTokenizers(both.student, bare, 64), BothTokenizers(bare, both.student, 64)):
        (mine,) = pair.encode([sample], "refuse")
        assert (
            spelt(mine, pair.student.tokenizer) == spelt(pair.theirs(mine), pair.teacher.tokenizer) == sample.response
        )


def test_a_conversation_that_the_teachers_template_refuses_is_left_out(both, capsys):
    strict = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + "".join(
        ["{% for m in messages %}{{ m['content'] }}{{ eos_token }}{% endfor %}"]
    )
    pair = BothTokenizers(both.student, Language(with_template(both.teacher.tokenizer, strict), 128, 64), 64)
    odd = Sample((Message("system", "one"), Message("user", "two")), "three", "x")
    plain = answered("one?", "two")
    assert [e.id for e in pair.encode([odd, plain], "refuse")] == [plain.id]
    assert "for the teacher, " in capsys.readouterr().err


def test_what_a_teacher_wrote_too_long_is_left_out_and_not_refused(both, capsys):
    long, short = (answered("one?", text) for text in ("one two three four five six seven " * 5, "two"))
    written = replace(long, author="teacher")
    assert [e.id for e in both.encode([written, short], "refuse")] == [short.id]
    assert "1 of 1 answers are longer than 64 of the student's tokens: left out" in capsys.readouterr().err


def test_conversations_cut_within_an_earlier_turn_are_aligned_as_far_as_they_go(both):
    turns = [Message("user", "one?"), Message("assistant", "two three four"), Message("user", "five? " * 12)]
    sample = Sample(tuple(turns), "seven eight nine ten", "x")
    pair = BothTokenizers(both.student, Language(both.teacher.tokenizer, 128, 24), 64)
    (mine,) = pair.encode([sample], "truncate")
    v = pair.vocabularies([mine], [2])
    assert len(align(mine, pair.theirs(mine), v)) == len(mine.loss_positions)


def test_how_a_teacher_reads_is_in_what_its_targets_are_known_by(both):
    class Weights:
        fingerprint = "same"

    v = both.vocabularies(both.encode([answered("one?", "two")], "refuse"), [2])
    other = Language(with_template(both.teacher.tokenizer, "{{ messages[0]['content'] }}"), 128, 64)
    known = {AcrossTeacher(Weights(), v, both.theirs, x.identity).fingerprint for x in (both.teacher, other)}
    assert len(known) == 2


def test_an_identity_is_the_same_after_a_tokenizer_was_used(both):
    tokenizer = copy.deepcopy(both.teacher.tokenizer)
    language = Language(tokenizer, 128, 64)
    before = language.identity
    tokenizer("one two", truncation=True, max_length=2, padding="max_length")
    assert language.identity == before


def test_too_long_for_the_student_is_as_everywhere(both):
    long = answered("what is 1?", "one two three four five six seven eight nine ten " * 4)
    with pytest.raises(DataError, match="samples are too long"):
        both.encode([long], "refuse")
    kept = both.encode([long], "truncate")
    assert len(kept) == 1 and len(kept[0].ids) == 64
