"""A plan of what was seen: rows as they are, the recipe's own steps as they took, and the rest of a run told anew."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace

import pytest
import torch

from pennyweight.data.sources import read
from pennyweight.errors import RecipeError
from pennyweight.model.device import choose
from pennyweight.plan.hardware import Chip, catalogue
from pennyweight.plan.pace import GROWS, SHIPPED, Pace, on_this
from pennyweight.plan.passes import Pass, Subjects, Work
from pennyweight.plan.published import published
from pennyweight.plan.reckon import foretell, pace_on, reckon
from pennyweight.plan.seen import keep_trial, peak_retold, retold, seen_pace, seen_rows, trial_of
from pennyweight.plan.subjects import subjects_of
from pennyweight.plan.work import Rows, rows_of, works
from pennyweight.recipe import Recipe
from pennyweight.recipe_file import load
from pennyweight.records import Encoded

TINY = Path(__file__).parent / "tiny.toml"
SEEN = {"rows": 100, "samples": 50.0, "length": 40.0, "learnt": 0.5, "padded": 1.25, "kept": 0.9}


def timed(what: str, seconds: float, **of) -> dict:
    return {"what": what, "seconds": seconds, "memory": 7e8, "rows": 8, "length": 40.0, "learnt": 0.5, **of}


def parts() -> tuple[Recipe, Subjects, Rows, Pace]:
    recipe = load(TINY)
    return recipe, subjects_of(recipe), rows_of(recipe), on_this(None, 1, False)


def test_rows_are_those_that_were_read_windows_and_what_is_left_out_counted():
    rows = replace(parts()[2], train=200.0, held_out=20.0)
    seen = {
        "rows": SEEN,
        "timed": [timed("train teacher", 1.0) | {"length": 30.0, "padded": 2.0}],
        "bytes_per_token": 12.5,
    }
    found = seen_rows(rows, seen)
    assert found.train == pytest.approx(200 * 0.9 * 2) and found.held_out == pytest.approx(20 * 0.9 * 2)
    assert found.length == (40.0, 40.0, 40.0) and found.response == 20.0 and found.prompt == (20.0, 20.0, 20.0)
    taught = works(parts()[0], parts()[1], found)[0].passes[0]  # rows of its own, filled up as they are
    assert (taught.length, taught.padded, taught.learnt) == ((30.0, 30.0, 30.0), 2.0, 0.5)
    assert found.bytes_of_a_token == 12.5 and found.written(15.0) == (15.0,) * 3
    assert seen_rows(rows, {}) is rows
    counted = seen_rows(rows, seen | {"rows": SEEN | {"train": 171.0, "held_out": 19.0}})
    assert (counted.train, counted.held_out) == (171.0, 19.0)  # where all were read, nothing is carried over


@pytest.mark.parametrize("limit,whole", [(None, True), (700, True), (5000, True), (6000, False)])
def test_where_all_rows_are_read_they_are_counted_as_a_run_counts_them(tmp_path, monkeypatch, limit, whole):
    from pennyweight.data.split import split
    from pennyweight.timing import Timing

    rows = [{"prompt": f"{i} and {i + 1}?", "response": "1 " * (1 + i % 7)} for i in range(900)]
    file = tmp_path / "rows.jsonl"
    blank = {"text": " "}  # which is passed over
    file.write_text("".join(json.dumps(r) + "\n" for r in [blank, *rows] * (7 if limit == 6000 else 1)))
    source = {"kind": "files", "path": str(file), "limit": limit}
    recipe = Recipe.model_validate(load(TINY).model_dump(mode="json") | {"data": {"context": 64, "source": source}})
    bench = SimpleNamespace(
        recipe=recipe,
        folder=tmp_path,
        compute=choose("cpu", "float32"),
        encode=lambda samples: [row_of(s) for s in samples],
    )
    known = Timing(bench).counted(recipe.data)
    if not whole:
        assert known["rows"] > 600 and "train" not in known  # repeats apart, of the first rows alone
        few = recipe.data.model_copy(update={"train_limit": 50})
        assert Timing(bench).counted(few)["train"] == 50  # however many more there are
        return
    parts = split(read(recipe.data.source, None), recipe.data.eval_fraction, recipe.data.eval_limit)
    assert (known["train"], known["held_out"]) == (len(parts.train), len(parts.evaluation))
    assert known["length"] == pytest.approx(fmean(len(s.response) for s in parts.train))


def row_of(sample) -> Encoded:
    return Encoded(sample.id, tuple(range(len(sample.response))), (True,) * len(sample.response))


def test_a_pace_takes_as_long_as_what_was_tried_took():
    _, of, _, pace = parts()
    each = [
        timed("train sft", 2.0),
        timed("score", 3.0, both=True),
        timed("write student", 4.0, new=10.0),
    ]
    found = seen_pace(pace, of, {"timed": each})
    assert set(found.factors) == {"train sft", "score", "write student"} and found.peak == 7e8
    step = Pass("train", of.student, (1.0,) * 3, 8, (40.0,) * 3, learnt=0.5)
    assert found.factor("sft-0", step) * pace.seconds(step, 1) == pytest.approx(2.0)
    assert found.factor("kd-0", step) == found.factors["train sft"]  # what is nearest to it
    hours = found.ends(Work("sft-0", "", (step,), opens=0))
    assert [3600 * h for h in hours] == pytest.approx([1.6, 2.0, 2.6])
    assert seen_pace(pace, of, {}) is pace


def test_the_rest_of_a_run_goes_by_the_rate_of_its_training_and_by_the_stages_that_are_over():
    recipe, of, rows, pace = parts()
    lengths = {"rows": 40, "samples": 40.0, "length": 20.0, "learnt": 0.5, "padded": 1.0}
    stage = f"sft-{recipe.seeds[0]}"
    once, twice = (
        retold(recipe, of, rows, pace, lengths, stage, s, {"teacher": 1.0, "data": 0.1}) for s in (5.0, 10.0)
    )
    assert twice > 1.5 * once  # others are trained and measured at the same rate
    over = {w.stage: 0.1 for w in works(recipe, of, rows) if w.stage != stage}
    assert retold(recipe, of, rows, pace, lengths, stage, 5.0, over) == 0
    slow = {"targets": 60.0, "teacher": 1.0, "data": 0.1}
    assert retold(recipe, of, rows, pace, lengths, stage, 5.0, slow) != once


def test_where_a_recipe_was_tried_the_rest_goes_by_that_and_other_trainings_are_half_as_far_off():
    recipe, of, rows, pace = parts()
    lengths = {"rows": 40, "samples": 40.0, "length": 20.0, "learnt": 0.5, "padded": 1.0, "train": 40.0}
    each = [timed("train sft", 2.0), timed("train kd", 3.0), timed("score", 1.0, both=True), timed("targets", 1.0)]
    tried, stage = seen_pace(pace, of, {"timed": each}), f"sft-{recipe.seeds[0]}"
    over = {w.stage: 0.1 for w in works(recipe, of, rows) if w.stage != stage and not w.stage.startswith("evaluate")}
    sft = next(w for w in works(recipe, of, seen_rows(rows, {"rows": lengths, "timed": [], "bytes_per_token": None})))
    assert sft.stage == "teacher"  # which is over
    as_tried = retold(recipe, of, rows, tried, lengths, stage, 1.0, over)
    assert as_tried == pytest.approx(
        retold(recipe, of, rows, tried, lengths, stage, 9.0, over)
    )  # evaluations go by trial
    del over[f"kd-{recipe.seeds[0]}"]
    slow, slower = (retold(recipe, of, rows, tried, lengths, stage, s, over) - as_tried for s in (1.0, 2.0))
    assert slower == pytest.approx(2**0.5 * slow, rel=0.2)  # but for what a model takes to be opened


def test_memory_told_anew_adds_what_a_training_takes_more_than_it_did_in_the_trial():
    pace = replace(parts()[3], peaks={"train sft": 5e8, "train kd": 6e8, "write teacher": 8e8, "train teacher": 2e9})
    assert peak_retold(pace, "sft-0", 5.5e8, 4e8) == pytest.approx(GROWS["training"] + 8.5e8)
    assert peak_retold(pace, "sft-0", 4e8, 9e8) == 9e8  # a stage before took more
    assert peak_retold(replace(pace, peaks={}), "sft-0", 5.5e8, 4e8) == 5.5e8


def test_a_live_teacher_is_timed_with_the_steps_and_counted_once():
    recipe = load(TINY, ["targets.kind=dense"])
    of, pace = subjects_of(recipe), on_this(None, 1, False)
    rows = replace(rows_of(recipe), length=(40.0,) * 3, learnt=0.5, padded=1.0)
    work = next(w for w in works(recipe, of, rows) if w.stage.startswith("kd"))
    step = timed("train kd", 0.25, live=True) | {"rows": float(recipe.train.batch), "micro": 0, "padded": 1.0}
    found = seen_pace(pace, of, {"timed": [step, timed("score", 1.0, both=True)]})
    hours = found.ends(replace(work, opens=0))[1]
    assert len(work.passes) == 2 and 3600 * hours == pytest.approx(0.25 * recipe.train.steps)
    gpu = pace_on(catalogue().chip("h100"), 1, None, published())  # where a distilled token takes a time of its own
    again = seen_pace(gpu, of, {"timed": [step, timed("score", 1.0, both=True)]}).ends(replace(work, opens=0))[1]
    assert 3600 * again == pytest.approx(0.25 * recipe.train.steps)


@pytest.mark.parametrize("drew,start", [([(512, 1.5), (5000, 2.5)], 1.386), ([(512, 2.5), (5000, 1.5)], 1.5)])
@pytest.mark.parametrize("size", [300, 9000])
def test_the_start_of_drawing_is_told_apart_from_what_each_row_takes(tmp_path, monkeypatch, drew, start, size):
    from pennyweight.timing import Timing

    task = {"name": "basic_arithmetic", "size": size}
    source = {"kind": "tasks", "tasks": [task]}
    recipe = Recipe.model_validate(load(TINY).model_dump(mode="json") | {"data": {"context": 64, "source": source}})
    encode = lambda samples: [row_of(s) for s in samples]  # noqa: E731
    by = Timing(SimpleNamespace(recipe=recipe, folder=tmp_path, compute=choose("cpu", "float32"), encode=encode))
    by.gathered.append((10, 1.0))
    real = by._gathered

    def gathered(d):
        samples = real(d)
        by.gathered[:] = drew if size > 512 else [(size, s) for _, s in drew]
        return samples

    monkeypatch.setattr(by, "_gathered", gathered)
    by.counted(recipe.data)
    told = {t["what"]: t for t in by.timed}
    assert told["draw"]["seconds"] == pytest.approx(start if size > 512 else 1.2, abs=1e-3)
    assert told["prepare teacher"]["seconds"] > drew[1][1] - told["draw"]["seconds"] - 1e-6
    assert told["draw"]["tasks"] == 1 and told["prepare"]["seconds"] >= 0


def test_a_trial_meets_the_largest_batch_first_and_then_each_shape_once():
    from pennyweight.timing import _of_each_shape

    sizes = [[(8, 32), (2, 16)], [(8, 32)], [(8, 64), (8, 32)], [(2, 16)], [(3, 16), (8, 32)], [(3, 16), (8, 64)], []]
    steps = [[SimpleNamespace(ids=torch.empty(shape)) for shape in step] for step in sizes]
    assert _of_each_shape(steps.__getitem__, len(steps)) == [2, 0, 4]


@pytest.mark.parametrize(
    "seconds,limit,written", [(4.0, 1000, [[5, 7], 64]), (0.0, 1000, [[5, 7]]), (4.0, 7, [[5, 7]])]
)
def test_rows_are_written_up_to_the_limit_where_that_takes_seconds(tmp_path, monkeypatch, seconds, limit, written):
    from pennyweight import timing

    asked = []
    monkeypatch.setattr(timing, "_TO_THE_LIMIT", seconds)
    monkeypatch.setattr(timing, "generate", lambda model, prompts, max_tokens, **how: asked.append(max_tokens))
    monkeypatch.setattr(timing, "read_samples", lambda file: [SimpleNamespace(prompt="?")] * 9)
    monkeypatch.setattr(timing, "prompt_ids", lambda sample, tokenizer: [1, 2, 3])
    rows = [SimpleNamespace(loss_positions=range(n)) for n in (5, 7)]
    by = timing.Timing(SimpleNamespace(folder=tmp_path, compute=choose("cpu", "float32"), encoded=rows, context=64))
    by.written("student", SimpleNamespace(model=None, tokenizer=None, writes=True, pad_id=0), 2, limit)
    assert asked == written
    assert [(t["rows"], t["length"], t["new"]) for t in by.timed] == [(2, 3.0, 6.0)]


def test_rows_take_as_long_to_prepare_as_those_that_were_timed():
    pace, of = parts()[3], parts()[1]
    work = Work("data", "reads rows", opens=0, prepared=(1000.0, 50.0))
    plain = 3600 * pace.ends(work)[1]
    each = [timed("prepare", 2.0) | {"rows": 500, "length": 50.0}]
    assert 3600 * seen_pace(pace, of, {"timed": each}).ends(work)[1] == pytest.approx(4.0) != pytest.approx(plain)
    each += [{"what": "draw", "seconds": 3.0, "memory": 7e8, "tasks": 1}]
    each += [timed("prepare teacher", 1.0) | {"rows": 500, "length": 50.0}]
    drawn = replace(work, tasks=2)  # each by a process, which takes 3 s to begin
    assert 3600 * seen_pace(pace, of, {"timed": each}).ends(drawn)[1] == pytest.approx(10.0)
    written = [timed("data", 1.0, new=10.0)]  # which are judged and divided in that time
    assert seen_pace(pace, of, {"timed": each + written}).ends(work)[1] == 0
    taught = replace(work, stage="teacher", prepared=(0.55 * 1000.0, 50.0))  # neither judged nor divided
    assert 3600 * seen_pace(pace, of, {"timed": each}).ends(taught)[1] == pytest.approx(2.0)


def test_energy_is_what_the_trial_took_by_its_counter():
    recipe, of, rows, pace = parts()
    tried = seen_pace(pace, of, {"timed": [timed("train sft", 2.0)], "watts": 50.0})
    found = reckon(recipe, of, rows, tried, None)
    hours, kwh = found["total"]["hours"], found["total"]["kwh"]
    assert list(kwh.values()) == pytest.approx([0.05 * h for h in hours.values()])
    assert found["reasons"]["kwh"].startswith("50 W, which counters told")


def test_on_a_gpu_a_trial_s_bytes_are_the_run_s():
    on = replace(parts()[3], threads=0, peaks={"train sft": 5e8, "write teacher": 8e8})
    assert on.grown(8e8, "before") == 8e8 and parts()[3].grown(8e8, "before") == 8e8 + GROWS["before"]
    assert peak_retold(on, "sft-0", 5e8, 4e8) == 8e8


def test_a_run_is_foretold_by_the_trial_of_its_plan(tmp_path, monkeypatch):
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path))
    recipe, of, _, _ = parts()
    here = Chip("this", "this machine, 1 threads", SHIPPED.figures)
    seen = {"rows": SEEN, "timed": [timed("train sft", 2.0)], "bytes_per_token": None, "vocabulary": None}
    untried = foretell(recipe, "cpu float32", 1, 1, False, tuple, trial_of(recipe))
    keep_trial(recipe, of, seen, here)
    assert trial_of(recipe).seen["timed"] == seen["timed"] and trial_of(recipe).chip == here
    tried = foretell(recipe, "cpu float32", 1, 1, False, tuple, trial_of(recipe))
    assert tried.found["rows"]["length"]["middle"] == 40.0 and "tried here" in tried.found["reasons"]["hours"]
    assert "tried here" not in untried.found["reasons"]["hours"]
    same = load(TINY, ["name=other", "budget.hours=5"])  # neither of which is work
    assert trial_of(same) and trial_of(load(TINY, ["train.steps=3"])) is None
    two = foretell(recipe, "cpu float32", 2, 1, False, tuple, trial_of(recipe))
    assert "tried here" not in two.found["reasons"]["hours"]  # one process was tried
    keep_trial(recipe, of.__class__(of.teacher, of.teacher), seen, here)  # of another student
    assert (
        "tried here"
        not in foretell(recipe, "cpu float32", 1, 1, False, tuple, trial_of(recipe)).found["reasons"]["hours"]
    )
    next(tmp_path.glob("trials/*.json")).write_text("{")
    assert trial_of(recipe) is None


def test_a_trial_is_of_files_as_they_are_and_of_folders_wherever_they_lie(tmp_path, monkeypatch):
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "cache"))
    file, (_, of, _, _) = tmp_path / "rows.jsonl", parts()
    file.write_text('{"prompt": "a", "response": "b"}\n')

    def recipe(place: str) -> Recipe:
        whole = load(TINY).model_dump(mode="json")
        whole["data"]["source"] = {"kind": "files", "path": str(file)}
        whole["teacher"] = {"kind": "folder", "path": f"{place}/cold/student"}
        return Recipe.model_validate(whole)

    keep_trial(recipe("/tmp/one"), of, {"timed": []}, SHIPPED)
    assert trial_of(recipe("runs/r1")) is not None
    file.write_text('{"prompt": "a", "response": "bb"}\n')
    assert trial_of(recipe("runs/r1")) is None


@pytest.mark.parametrize("chain", [False, True])
def test_a_recipe_is_tried_by_its_own_code_and_the_plan_says_so(capfd, chain):
    from typer.testing import CliRunner

    from pennyweight.cli import app

    file = TINY.with_name("tiny_chain.toml") if chain else TINY
    done = CliRunner().invoke(app, ["plan", str(file), "--on", "this", "--json"])
    assert done.exit_code == 0, done.output
    found = json.loads(done.stdout[done.stdout.index("{") :])
    runs = list(found.get("runs", {"": found}).values())
    for run in runs:
        assert "were looked at" in run["reasons"]["tokens"] and "tried here" in run["reasons"]["hours"]
        assert run["total"]["memory"]["middle"] > 2e8
        ends = run["rows"]["length"]
        assert ends["low"] == ends["high"] > 3


def test_problems_that_a_teacher_at_hand_answers_are_fewer_and_still_a_recipe(tmp_path):
    from pennyweight.fewer import some_of

    whole = load(TINY).model_dump(mode="json")
    whole["teacher"] = {"kind": "folder", "path": str(tmp_path)}
    whole["data"]["responses"] |= {"by": "teacher", "samples": 3}
    for t in whole["data"]["source"]["tasks"]:
        t["size"] = 5000
    recipe = Recipe.model_validate(whole)
    sizes = {made: [t.size for t in some_of(recipe, made).data.source.tasks] for made in (False, True)}
    assert set(sizes[False]) == {256} and set(sizes[True]) == {512}
    assert some_of(recipe, False).data.responses.by == "teacher" and some_of(recipe, True).data.responses.by == "auto"


def test_what_a_run_would_refuse_its_trial_does():
    from typer.testing import CliRunner

    from pennyweight.cli import app

    done = CliRunner().invoke(app, ["plan", str(TINY), "data.context=9", "--on", "this"])
    assert isinstance(done.exception, RecipeError)
    assert "the recipe was tried, and stopped: " in str(done.exception) and "data.context" in str(done.exception)


@pytest.mark.parametrize("name,known", [("NVIDIA H100 80GB HBM3", True), ("NVIDIA GeForce GTX 970", False)])
def test_a_gpu_here_is_planned_by_the_catalogue_and_by_what_was_tried(monkeypatch, name, known):
    from pennyweight import cli_plan
    from pennyweight.plan import measure
    from pennyweight.plan.hardware import Chip, Figure, catalogue

    monkeypatch.setattr(
        measure, "measure", lambda device: Chip("this", name, {"fp32": Figure(50.0, "measured here", "2026-11-27")})
    )
    if not known:
        with pytest.raises(RecipeError, match="in no catalogue of chips; give a row of it with --catalogue"):
            cli_plan._machine(catalogue(), "this")
        return
    machine = cli_plan._machine(catalogue(), "this")
    assert machine.chip.key == "h100" and machine.measured and not machine(load(TINY), None).on_cpu


ROWS = {
    "a prompt alone": ({"prompt": "a"}, {}, True),
    "a prompt and no answer": ({"prompt": "a", "response": None}, {}, True),
    "a prompt and its answer": ({"prompt": "a", "response": "b"}, {}, False),
    "a gold answer": ({"question": "a", "answer": "b"}, {"verifier": "exact"}, True),
    "a worked solution": ({"question": "a", "answer": "1 + 1 #### 2"}, {"verifier": "exact"}, False),
    "a text": ({"text": "a"}, {}, False),
}


@pytest.mark.parametrize("row,source,writes", ROWS.values(), ids=ROWS)
def test_the_teacher_writes_what_rows_have_no_answer_to(tmp_path, row, source, writes):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps(row) + "\n")
    settings = [f"data.source.{k}={v}" for k, v in {"kind": "files", "path": str(file), **source}.items()]
    whole = load(TINY).model_dump(mode="json")
    whole["data"]["source"] = {"kind": "files", "path": str(file), **source}
    recipe = Recipe.model_validate(whole)
    data = next(w for w in works(recipe, subjects_of(recipe), rows_of(recipe)) if w.stage == "data")
    assert bool(data.passes) is writes and data.does == ("the teacher writes" if writes else "reads rows"), settings
    assert writes or data.prepared == (1.0 + 1.0, rows_of(recipe).length[1])  # at least a row of each side


@pytest.mark.parametrize(
    ("settings", "writes", "answers"),
    [
        (["tripwires.rollouts.held_out_every=0"], 1, 0),
        ([], 2, 10 * 64),
        (["tripwires.rollouts.held_out_every=7"], 2, 15 * 64),
        (["tripwires.rollouts.held_out_problems=32"], 2, 10 * 32),
        (["method.kl=0.1", "tripwires.rollouts.held_out_every=0"], 1, 0),
    ],
)
def test_an_arm_that_writes_is_looked_at_now_and_then_and_held_to_its_start(settings, writes, answers):
    whole = ["method.kind=grpo", "method.group=4", "method.max_tokens=32", "control=false", "train.steps=100"]
    recipe = load(TINY, [*whole, "train.batch=32", *settings])
    rows = replace(rows_of(recipe), train=500.0, held_out=200.0)
    arm = next(w for w in works(recipe, subjects_of(recipe), rows) if w.stage.startswith("grpo"))
    written = [p for p in arm.passes if p.kind == "write"]
    assert len(written) == writes and sum(p.kind == "forward" for p in arm.passes) == any("kl" in s for s in settings)
    if answers:
        assert written[1].steps[1] * written[1].rows == pytest.approx(answers)
