"""Chains of runs: the form, what a stage begins from, what runs again, what a kill leaves, and what is told of it."""

from __future__ import annotations

import copy
import json
import re
import shutil
import signal
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_line import stages

import pennyweight
from pennyweight.chain import _together
from pennyweight.chain_file import Chain, chain_of, load
from pennyweight.errors import Overspent, RecipeError, RunError
from pennyweight.ledger.hashing import hash_folder
from pennyweight.recipe import Recipe
from pennyweight.report.chain_page import chain_bill, chain_headline, compared_on, leading
from pennyweight.report.chain_page import finished as finished_stages

CHAIN = Path(__file__).with_name("tiny_chain.toml").resolve()
STAGES = ("base", "zero", "sft")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(RUN folder, its summary) of tiny_chain.toml; to be copied. Paths in it are relative, so a copy is as good."""
    home = tmp_path_factory.mktemp("chain")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENNYWEIGHT_CACHE", str(home / "cache"))
        patch.chdir(home)
        return home / "r1", pennyweight.run(CHAIN, out="r1")


@pytest.fixture
def out(finished, tmp_path, monkeypatch, no_charts) -> Path:
    """A copy of the finished chain, in the working directory."""
    shutil.copytree(finished[0], tmp_path / "r1")
    monkeypatch.chdir(tmp_path)
    return Path("r1")


def started(out: Path) -> dict[str, int]:
    return {stage: len(stages(out / stage)) for stage in STAGES}


def again(out: Path, before: dict[str, int]) -> dict[str, set[str]]:
    """What each stage's run has started since."""
    return {stage: set(stages(out / stage)[n:]) for stage, n in before.items()}


def test_each_stage_is_a_run_and_begins_from_what_the_one_before_made(finished):
    out, summary = finished
    assert {p.name for p in out.iterdir()} == {"chain.json", "summary.json", "report.html", *STAGES}
    assert hash_folder(out / "zero" / "arms" / "base-0") == hash_folder(out / "base" / "student")
    recipe = json.loads((out / "zero" / "recipe.json").read_text())
    assert recipe["name"] == "r1-zero" and recipe["student"]["path"] == "r1/base/student"
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))


def test_the_summary_sets_the_stages_side_by_side(finished):
    out, summary = finished
    assert summary["chain"] == list(summary["stages"]) == list(STAGES)
    for name, s in summary["stages"].items():
        own = json.loads((out / name / "summary.json").read_text())
        assert s["state"] == "finished" and s["recipe_hash"] == own["recipe_hash"]
        assert set(own["arms"]) == {"base", s["method"]}  # no control
        assert s["metrics"]["accuracy"] == own["arms"][s["method"]]["metrics"]["accuracy"]
        assert set(s["metrics"]) == {"accuracy", "pass_at_k", "bits_per_byte"}
        assert s["seconds"] > 0 and s["tokens_trained"] > 0 and s["peak_memory_bytes"] > 1e6
        assert s["measured_on"] == summary["stages"]["base"]["measured_on"] and s["measured_on"]["problems"] == 8
    lines = [json.loads(x) for x in (out / "zero" / "metrics.jsonl").read_text().splitlines()]
    written = sum(x["generated"] for x in lines if x["stage"] == "rollout")
    generated = {name: s["tokens_generated"] for name, s in summary["stages"].items()}
    assert generated == {"base": None, "zero": written, "sft": None} and summary["tokens_generated"] == written
    assert summary["stages"]["sft"]["params"] < summary["stages"]["zero"]["params"]
    assert summary["stages"]["zero"]["needs"] == ["@base/student"]


def test_the_page_needs_nothing_but_itself_and_links_to_each_stage(finished):
    page = (finished[0] / "report.html").read_text()
    assert re.findall(r'href="([^"#]*)"', page) == ["data:,", *(f"{s}/report.html" for s in STAGES)]
    assert "<script" not in page and "http" not in page.replace("http-equiv", "").replace("http://www.w3.org", "")
    assert "All stages were asked the same problems." in page and "not finished" not in page
    assert "is a draw with base on the same 8" in page


def test_a_run_without_a_control_speaks_of_none(finished, typed):
    zero = finished[0] / "zero"
    page = (zero / "report.html").read_text().partition("<body>")[2]
    assert "ontrol" not in page and "each arm" not in page and "One seed of the student was trained." in page
    assert json.loads((zero / "summary.json").read_text())["gap_recovered"] == {}
    told = typed("show", zero)[1]
    assert "control" not in told and "sft" not in told and "before training" in told


def test_a_second_call_runs_nothing(out):
    before = started(out)
    summary = pennyweight.run(CHAIN, out=out.resolve())  # the same folder under another name
    assert not any(again(out, before).values())
    assert summary["stages"]["zero"]["metrics"] == pennyweight.show("r1")["stages"]["zero"]["metrics"]


def test_killed_in_a_later_stage_it_goes_on_there_and_ends_alike(finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished[0] / "base", tmp_path / "r1" / "base")
    shutil.copy(finished[0] / "chain.json", tmp_path / "r1")
    command = [sys.executable, "-m", "pennyweight", "run", str(CHAIN), "--out", "r1"]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=_environment()) as process:
        assert process.stderr is not None
        told = []
        for line in process.stderr:
            told.append(line)
            if line.startswith("start-0: done"):
                break
        process.send_signal(signal.SIGKILL)
    assert any(x.startswith("stage 1 of 3: base, sft") for x in told), told
    shown = pennyweight.show("r1")
    assert [s["state"] for s in shown["stages"].values()] == ["finished", "unfinished", "not run"]
    pennyweight.run(CHAIN, out="r1")
    said = capsys.readouterr().err.partition("stage 2 of 3: zero, grpo")
    assert "sft-0: finished before, skipped" in said[0] and "start-0: finished before, skipped" in said[2]
    for stage in STAGES:
        assert hash_folder(tmp_path / "r1" / stage / "student") == hash_folder(finished[0] / stage / "student"), stage
    assert pennyweight.verify("r1").ok


def _environment() -> dict[str, str]:
    import os

    return {**os.environ, "PYTHONPATH": str(Path(pennyweight.__file__).parents[1])}


def test_of_several_processes_the_others_wait_for_the_stage_and_pass_over_what_they_left():
    words = iter([{"stage": "student", "facts": {}}, {"stage": "evaluate-teacher"}, {"next": "zero"}, {"open": "r1"}])
    _together(SimpleNamespace(first=False, hear=lambda: next(words)), "zero")
    assert next(words) == {"open": "r1"}


def test_a_chain_of_which_nothing_is_finished_says_so(out, typed):
    for stage in STAGES:
        shutil.rmtree(out / stage)
    told = typed("show", "r1")[1].splitlines()
    assert told == [
        "0 of 3\u00a0stages run so far; nothing has been measured yet.",
        "To be run: base (not run), zero (not run), sft (not run). Start the chain again to go on.",
    ]
    page = typed("report", "r1")[1].strip()
    assert "<table" in Path(page).read_text() and "What did each stage take?" not in Path(page).read_text()
    assert "verified: 0 entries" in typed("ledger", "verify", "r1")[1]


def test_a_stage_runs_again_when_what_it_begins_from_has_changed(out, capsys, typed):
    before = started(out)
    pennyweight.run(CHAIN, ["base.train.lr=1e-3"], "r1", only=["base"])
    assert "sft-0" in again(out, before)["base"] and not again(out, before)["zero"]
    assert "zero (began from @base/student of an earlier run)" in typed("show", "r1")[1]
    assert "This chain is not finished." in (out / "report.html").read_text()
    pennyweight.run(CHAIN, out="r1", only=["zero"])
    outdated = {name: s["outdated"] for name, s in pennyweight.show("r1")["stages"].items()}
    assert outdated == {"base": [], "zero": [], "sft": ["@zero/student"]}
    ran = again(out, before)
    assert {"teacher", "data", "start-0", "grpo-0"} <= ran["zero"] and not ran["sft"]
    assert "base was run with other settings than it has now" in capsys.readouterr().err
    pennyweight.run(CHAIN, ["base.train.lr=1e-3"], "r1", only=["sft"])
    assert {"teacher", "data", "start-0", "sft-0"} <= again(out, before)["sft"]
    assert pennyweight.verify("r1").ok


def test_data_that_an_earlier_stage_made_is_looked_at_too(out):
    # A prompt's hash decides on which side it is, so what is left of the same share to hold out of is nothing.
    settings = ['sft.data.source={kind="files", path="@base/data/train.jsonl"}', "sft.data.eval_fraction=0.6"]
    pennyweight.run(CHAIN, settings, "r1", only=["sft"])
    before = started(out)
    pennyweight.run(CHAIN, ["base.data.eval_fraction=0.4", *settings], "r1", only=["base", "sft"])
    assert "data" in again(out, before)["base"] and "data" in again(out, before)["sft"]
    assert not again(out, before)["zero"]


def test_only_needs_what_is_there(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(RunError, match=r"zero begins from @base/student, which is not there.*--only base"):
        pennyweight.run(CHAIN, only=["zero"])
    with pytest.raises(RecipeError, match=r"--only nil is no stage of .*; its stages: base, zero, sft"):
        pennyweight.run(CHAIN, only=["nil"])
    assert not list(tmp_path.glob("runs"))
    with pytest.raises(RecipeError, match="names a stage of a chain, and tiny is one run"):
        pennyweight.run(CHAIN.with_name("tiny.toml"), only=["zero"])


def test_a_reference_to_what_a_stage_does_not_make(out):
    with pytest.raises(RunError, match=r"sft begins from @zero/studnt, and zero has made no such thing; .*student"):
        pennyweight.run(CHAIN, ["sft.teacher.path=@zero/studnt"], "r1", only=["sft"])


def test_what_a_stage_would_refuse_is_refused_before_the_first(tmp_path):
    with pytest.raises(pennyweight.PennyweightError, match=r"stages.sft: method kd.* needs"):
        pennyweight.run(CHAIN, ["sft.method.kind=kd", "sft.method.divergence=jsd"], tmp_path / "r")
    assert not (tmp_path / "r").exists()


def test_folders_of_others_are_left_alone(out, tmp_path):
    with pytest.raises(RunError, match="holds the chain 'r1', not 'r2'"):
        pennyweight.run(CHAIN, ["name=r2"], "r1")
    with pytest.raises(RunError, match="is not empty and holds no chain"):
        pennyweight.run(CHAIN, out="r1/base")
    with pytest.raises(RunError, match="r1 holds a chain of runs; give the folder of one of them"):
        pennyweight.commands.show_sample("r1", 0)


def test_the_commands_know_a_chain(out, typed, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, told, _ = typed("show", "r1")
    table = told[told.index("r1: 3 stages") :].splitlines()
    assert code == 0 and all(len(x) <= 80 and "…" not in x for x in table)
    assert [x.split()[0] for x in table[2:8:2]] == list(STAGES) == [x.split()[0] for x in table[9:12]]
    assert json.loads(typed("show", "r1", "--json")[1])["chain"] == list(STAGES)
    (out / "report.html").unlink()
    assert typed("report", "r1")[1] == "r1/report.html\n" and (out / "report.html").exists()
    assert "verified: " in typed("ledger", "verify", "r1")[1]
    config = out / "zero" / "student" / "config.json"
    config.write_text(config.read_text() + " ")
    code, _, said = typed("ledger", "verify", "r1")
    assert code == 2 and "does not verify: zero: the artifact student has changed" in said
    code, told, _ = typed("run", CHAIN, "--out", "r1", "--only", "zero", "--json")
    assert code == 0 and json.loads(told)["stages"]["zero"]["state"] == "finished"
    code, _, said = typed("run", CHAIN, "train.steps=5")
    assert code == 2 and said.count("\n") == 1 and "defaults.train.steps=5" in said


def told_of(*accuracies, **changes) -> dict:
    """A summary of as many stages, a, b, ... asked the same problems; a change is of the last one."""
    stages = {}
    for name, accuracy in zip("abc", accuracies, strict=False):
        found = {"mean": accuracy, "low": accuracy - 0.02, "high": accuracy + 0.02}
        stages[name] = {
            "state": "finished",
            "needs": [],
            "outdated": [],
            "method": "sft",
            "params": 1000,
            "metrics": {},
        }
        stages[name] |= {"metrics": {"accuracy": found}, "measured_on": {"problems": 500, "sha256": "x"}}
    stages[name] |= changes
    return {"name": "c", "chain": list(stages), "stages": stages}


@pytest.mark.parametrize(
    ("summary", "lead", "verdict"),
    [
        (told_of(0.1, 0.2, 0.5), "went from 10.0 % after a to 50.0 % after c.", "c is better than a on the same 500"),
        (told_of(0.5, 0.1, params=250), "; the student of b is 1/4 of the size of a’s.", "b is worse than a on the"),
        (told_of(0.5, 0.51), "from 50.0 % after a to 51.0 % after b.", "b is a draw with a"),
        (told_of(0.1, 0.5, measured_on=None), "went from", "a and b were not asked the same problems"),
        (told_of(0.3), "1 stage run: after a the student answers 30.0 % of the held-out problems right.", None),
        (told_of(0.3, 0.4, state="not run"), "1 of 2 stages run so far: after a the", None),
        (told_of(0.3, metrics={}), "1 stage run; nothing has been measured yet.", None),
    ],
)
def test_the_headline_says_what_came_of_it(summary, lead, verdict):
    done = finished_stages(summary)
    metric = leading(done)
    said = compared_on(done, metric) if metric else None
    assert lead in chain_headline(summary).replace("\u00a0", " ")
    assert (said is None) == (verdict is None) and (verdict or "") in (said or "").replace("\u00a0", " ")


def table() -> dict:
    return tomllib.loads(CHAIN.read_text())


def test_defaults_are_below_the_stages_and_settings_above():
    own = table()
    own["stages"]["zero"]["train"] = {"steps": 9}
    own["stages"]["sft"]["data"] = {"context": 32}

    def steps(*settings):
        return [r.train.steps for r in chain_of(copy.deepcopy(own), list(settings)).recipes(Path("r")).values()]

    assert steps() == [4, 9, 4]
    assert steps("zero.train.steps=2") == [4, 2, 4]
    assert steps("zero.train.steps=2", "defaults.train.steps=7") == [7, 2, 7]
    recipes = chain_of(own, []).recipes(Path("r"))
    assert recipes["sft"].data.context == 32 and recipes["sft"].data.eval_fraction == 0.2
    assert recipes["sft"].data.source == recipes["base"].data.source


def test_a_stage_of_another_kind_takes_the_place_of_the_default():
    own = table()
    own["defaults"]["method"] = {"temperature": 2.0}  # of kd, as a recipe has it
    own["stages"]["sft"]["method"] = {"kind": "kd", "divergence": "forward_kl"}
    recipes = chain_of(own, []).recipes(Path("r"))
    assert recipes["zero"].method.kind == "grpo" and recipes["sft"].method.temperature == 2.0


def test_a_file_without_stages_is_a_recipe():
    assert isinstance(load(None), Recipe) and isinstance(load(CHAIN.with_name("tiny.toml")), Recipe)
    chain = load(CHAIN, None, ['log=["tensorboard"]'])
    assert all(r.log == ["tensorboard"] for r in chain.recipes(Path("r")).values())


def changed(key: str, value) -> dict:
    out = table()
    at = out
    *keys, last = key.split(".")
    for k in keys:
        at = at.setdefault(k, {})
    at[last] = value
    return out


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("stages", {}, "stages is empty; give at least one recipe"),
        ("stages", 3, "stages is a table of settings"),
        ("stages.zero", 3, "stages.zero is a table of settings"),
        ("defalts", {}, "unknown key 'defalts' beside the stages; did you mean 'defaults'?"),
        ("name", "a/b", "name is not a plain name"),
        ("name", None, "name is missing"),
        ("stages.a/b", {}, "'a/b' cannot be the name of a stage"),
        ("stages.defaults", {}, "'defaults' cannot be the name of a stage"),
        ("stages.zero.name", "x", "stages.zero is named by its key"),
        ("defaults.name", "x", "stages.base is named by its key"),
        ("stages.zero.train.stepz", 5, "stages.zero: unknown key 'train.stepz'; did you mean 'steps'?"),
        ("stages.base.train.steps", 0, "stages.base: train.steps: "),
        ("stages.zero.student.path", "@bse/student", "refers to no stage of this chain; did you mean 'base'?"),
        ("stages.zero.student.path", "@sft/student", "refers to a later stage"),
        ("stages.zero.student.path", "@zero/student", "refers to itself"),
        ("stages.zero.student.path", "@base", "names no file; write it as @STAGE/PATH"),
        ("stages.zero.student.path", "@base/../sft", "nothing inside that stage's folder"),
        ("stages.zero.evaluate.text", "@nil/x", "refers to no stage of this chain"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(key, value, says):
    with pytest.raises(RecipeError) as e:
        chain_of(changed(key, value), []).recipes(Path("r"))
    assert says in str(e.value) and "\n" not in str(e.value)


@pytest.mark.parametrize("setting", ["train.steps=5", "zero=5", "zerro.train.steps=5", "steps"])
def test_a_setting_that_names_no_stage(setting):
    with pytest.raises(RecipeError, match="begin with a stage's name"):
        chain_of(table(), [setting])


def test_a_chain_has_a_budget_of_its_own_beside_those_of_its_stages():
    assert load(CHAIN).budget.limits == {}  # type: ignore[union-attr]
    read = load(CHAIN, ["budget.hours=3", "sft.budget.hours=1"])
    assert isinstance(read, Chain) and read.budget.limits == {"hours": 3}
    assert {s: r.budget.limits for s, r in read.recipes(Path("x")).items()} == {
        "base": {}, "zero": {}, "sft": {"hours": 1},
    }  # fmt: skip
    with pytest.raises(RecipeError, match=r"unknown key 'budget.hour'; did you mean 'hours'\?"):
        load(CHAIN, ["budget.hour=3"])
    with pytest.raises(RecipeError, match="set it in defaults.budget"):
        load(CHAIN, ["budget.usd_per_hour=1"])
    with pytest.raises(RecipeError, match="budget.kwh: .* correct that value"):
        load(CHAIN, ["budget.kwh=-1"])


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("sft.budget.hours=1e-9", "stages.sft is foretold to take .* more than budget.hours=1e-09; raise budget.hours"),
        ("budget.hours=1e-9", "the chain is foretold to take .* more than budget.hours=1e-09; raise budget.hours"),
        ("budget.usd=1", "budget.usd=1 needs prices that nothing says here; set budget.usd_per_hour"),
    ],
)
def test_what_a_later_stage_and_all_together_are_foretold_is_held_against_budgets_first(tmp_path, setting, says):
    with pytest.raises(RecipeError, match=says):
        pennyweight.run(CHAIN, [setting], tmp_path / "r1")
    assert not (tmp_path / "r1").exists()


def test_a_chain_whose_budget_its_stages_have_spent_stops_at_once_and_goes_on_under_a_larger_one(out):
    summary = pennyweight.show("r1")
    bill = summary["bill"]
    each = [json.loads((out / s / "summary.json").read_text())["bill"] for s in STAGES]
    assert bill["seconds"] == pytest.approx(sum(b["whole"] for b in each), abs=1e-6)
    assert bill["kwh"] == pytest.approx(sum(b["spent"]["kwh"] for b in each)) and bill["usd"] is None
    assert bill["foretold"]["hours"]["low"] == pytest.approx(sum(b["foretold"]["hours"]["low"] for b in each))
    said = chain_bill(summary)
    assert said and "foretold" in said and "devices only" in said
    before = {s: (out / s / "meter.jsonl").read_bytes() for s in STAGES}
    limit = f"budget.hours={0.9 * bill['seconds'] / 3600}"
    for _ in range(2):
        with pytest.raises(Overspent, match=r"the chain's budget.hours=.*; raise budget.hours, and the same command"):
            pennyweight.run(CHAIN, [limit], "r1")
        assert {s: (out / s / "meter.jsonl").read_bytes() for s in STAGES} == before
    found = pennyweight.run(CHAIN, ["budget.hours=1"], "r1")
    assert found["bill"]["budget"] == {"hours": 1} and "The budget of the chain: " in (chain_bill(found) or "")
