"""What a plan is asked for that cannot be: one sentence, code 2, and nothing written; and names that it understands."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
QUICK = ROOT / "recipes" / "quickstart.toml"
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
CONFIG = {"model_type": "llama", "vocab_size": 256, "max_position_embeddings": 128, **SIZES}


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty folder, but for a model of two layers, to be in."""
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "config.json").write_text(json.dumps(CONFIG))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([QUICK, "--price", "-5"], "--price -5 is no price"),
        ([QUICK, "--price", "nan"], "--price nan is no price"),
        (["llama", "--tokens", "1B", "--price", "inf"], "--price inf is no price"),
        ([QUICK, "--length", "100000000"], "--length 100,000,000 is more than the 128 tokens"),
        (["llama", "--tokens", "1B", "--length", "129"], "--length 129 is more than the 128 tokens"),
        ([QUICK, "train.steps=1000000000000000000000"], "train.steps"),
        ([QUICK, "train.steps=1e21"], "train.steps"),
        ([QUICK, "--out", "."], "--out . is a folder"),
        ([QUICK, "--out", "nowhere/plan.html"], "make nowhere first"),
        (["."], "the folder . holds no config.json"),
        ([ROOT / "recipes"], "quickstart.toml"),
        (["r2"], "there is no r2; give a model's folder, the file of a recipe, or the name of one that ships"),
        (["rows.toml", "data.source.path=./rows.jsonl"], "there is no file or folder ./rows.jsonl"),
        (["rows.toml", "data.source.path=rows.jsonl", "--length", "20"], "there is no file or folder rows.jsonl"),
        (["rows.toml", "data.source.path=/rows"], "there is no file or folder /rows"),
    ],
)
def test_what_cannot_be_is_said_in_a_sentence_and_nothing_is_written(typed, here, argv, says):
    (here / "rows.toml").write_text(ROWS)
    before = sorted(here.rglob("*"))
    code, out, err = typed("plan", *argv)
    assert code == 2 and says in err and "\n" not in err.strip() and not out
    assert sorted(here.rglob("*")) == before


ROWS = """
name = "rows"
teacher = { kind = "folder", path = "llama" }
student = { kind = "cut", layers = 1 }
data = { context = 64, source = { kind = "files", path = "org/rows" } }
"""


def test_a_folder_is_no_page_of_memory_either(typed, here):
    code, out, err = typed("memory", "llama", "--out", ".")
    assert code == 2 and "--out . is a folder" in err and not out


@pytest.mark.parametrize("more", [[], ["--length", "20"]])
def test_rows_that_nobody_counted_are_said_to_be_taken(typed, here, more):
    (here / "rows.toml").write_text(ROWS)
    code, out, _ = typed("plan", "rows.toml", "--json", *more)
    assert code == 0 and "rows of org/rows are not counted, 10,000 taken" in json.loads(out)["reasons"]["tokens"]
    code, out, _ = typed("plan", "rows.toml", "--json", "data.source.limit=300", *more)
    assert "300 taken" in json.loads(out)["reasons"]["tokens"] and json.loads(out)["rows"]["train"] == 270


def test_a_recipe_that_ships_goes_by_its_name_unless_something_here_does(typed, here):
    code, out, _ = typed("plan", "quickstart", "train.steps=7", "--json")
    assert code == 0 and json.loads(out)["name"] == "quickstart"
    assert typed("plan", "r1")[0] == 0
    (here / "quickstart").mkdir()
    code, _, err = typed("plan", "quickstart")
    assert code == 2 and "holds no config.json" in err


@pytest.mark.parametrize("place", ["student", "student-int4", "arms/kd-1", "arms/sft-0", "arms/base-0", "teacher"])
def test_a_chain_may_begin_from_whatever_an_earlier_stage_makes(typed, here, place):
    chain = """
name = "c"
[defaults]
data = { context = 64 }
[stages.zero]
seeds = [0, 1]
teacher = { kind = "folder", path = "llama" }
student = { kind = "cut", layers = 1 }
[stages.next]
teacher = { kind = "folder", path = "@zero/PLACE" }
student = { kind = "cut", layers = 1 }
data = { source = { kind = "files", path = "@zero/data/train.jsonl" } }
"""
    (here / "c.toml").write_text(chain.replace("PLACE", place))
    code, out, err = typed("plan", "c.toml", "--json")
    assert code == 0, err
    layers = 2 if place == "teacher" else 1
    zero, made = (json.loads(out)["runs"][stage]["parameters"] for stage in ("zero", "next"))
    assert made["teacher"] == zero["teacher" if layers == 2 else "student"]
    (here / "c.toml").write_text(chain.replace("PLACE", "arms/kd-7"))
    assert typed("plan", "c.toml")[0] == 2
