"""What of a recipe fits where: bytes of each part, what is cut over devices, what makes it fit, which chips hold it."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from pennyweight.plan.hardware import catalogue
from pennyweight.plan.pace import on_this
from pennyweight.plan.published import published
from pennyweight.plan.reckon import pace_on, reckon
from pennyweight.plan.subjects import subjects_of
from pennyweight.plan.work import rows_of
from pennyweight.recipe_file import distillation

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path):
    """name -> a folder with the config.json of a released model."""
    said = tomllib.loads((ROOT / "pennyweight" / "plan" / "models.toml").read_text())

    def of(name: str) -> Path:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(said[name]["config"]))
        return tmp_path / name

    return of


@pytest.fixture
def parts(folder):
    """settings, devices -> bytes of each part of a stage."""

    def of(stage: str, *settings: str, devices: int = 1, chip: str | None = "h100") -> dict[str, float]:
        given = {"teacher": str(folder("llama-3-8b")), "student": str(folder("llama-3.2-1b")), "batch": 64, "seeds": 1}
        recipe = distillation(**given, settings=["data.context=2048", "train.micro_batch=4", *settings])  # type: ignore[arg-type]
        cpu = on_this(None, 1, False)
        pace = pace_on(catalogue().chip(chip), devices, None, published()) if chip else cpu
        found = reckon(recipe, subjects_of(recipe), rows_of(recipe), pace, None)
        row = next(s for s in found["stages"] if s["stage"] == stage)
        assert sum(row["parts"].values()) == pytest.approx(row["memory"]["high"])
        return row["parts"]

    return of


STUDENT, TEACHER = 1_235_814_400, 8_030_261_248


def test_each_part_is_what_it_is_of(parts):
    plain = parts("kd-0", chip=None)
    assert plain["weights"] == 4 * STUDENT == plain["gradients"] and plain["optimizer"] >= 8 * STUDENT
    live = parts("kd-0", "targets.kind=dense")
    assert live["teacher"] == 2 * TEACHER and "teacher" not in parts("kd-0")
    labels = parts("targets")
    assert labels["teacher"] == 2 * TEACHER and "gradients" not in labels
    assert parts("data")["kv_cache"] > 0
    small = parts("kd-0", "train.weights=bfloat16", "train.moments=fp8")
    assert small["weights"] == 2 * STUDENT and small["optimizer"] < 2.3 * STUDENT
    factors = parts("kd-0", "train.lora.rank=8")
    assert factors["gradients"] < 0.05 * plain["gradients"] and "optimizer" in factors
    frozen = parts("kd-0", "train.lora.rank=8", "train.lora.base=int4")
    assert frozen["weights"] < 0.7 * factors["weights"]


def test_training_is_cut_over_devices_and_a_teacher_is_not(parts):
    one, eight = (parts("kd-0", "targets.kind=dense", devices=n) for n in (1, 8))
    assert eight["gradients"] == one["gradients"] / 8 and eight["teacher"] == one["teacher"]
    assert one["weights"] / 8 < eight["weights"] < one["weights"]  # a block and the tables are whole
    assert parts("int4", devices=8) == parts("int4")  # one process alone teaches a copy


def fits(typed, folder, *argv):
    code, out, err = typed("plan", folder / "r.toml", "--json", *argv)
    assert code == 0, err
    return json.loads(out)["fits"]


@pytest.fixture
def recipe(folder, tmp_path):
    text = f"""
name = "r"
control = false
teacher = {{ kind = "folder", path = "{folder("llama-3-8b")}" }}
student = {{ kind = "folder", path = "{folder("llama-3.2-1b")}" }}
quantize = {{ formats = [] }}
train = {{ batch = 64 }}
data = {{ context = 2048 }}
"""
    (tmp_path / "r.toml").write_text(text)
    return tmp_path


def test_what_does_not_fit_is_said_with_the_settings_that_make_it(typed, recipe):
    found = fits(typed, recipe, "--on", "h100")
    assert found["fits"] is False and found["stage"] == "kd-0" and found["most"] > 80e9
    assert found["settings"] and all("=" in s for s in found["settings"])
    assert fits(typed, recipe, "--on", "h100", *found["settings"])["fits"] is True
    assert fits(typed, recipe, "--on", "h200x8", "train.micro_batch=1")["fits"] is True
    lost = fits(typed, recipe, "--on", "l4", "train.batch=4")
    assert lost["fits"] is False and (lost["settings"] or lost["left"]["bytes"] > 0.9 * 24e9)


def test_chips_are_listed_the_cheapest_first_and_only_those_that_hold_it_have_a_count(typed, recipe):
    found = fits(typed, recipe, "--on", "h100", "train.micro_batch=1")
    money = [row["money"]["middle"] for row in found["chips"] if "money" in row]
    assert money == sorted(money) and found["cheapest"] == found["chips"][0]
    assert found["cheapest"]["price"]["low"] <= found["cheapest"]["price"]["high"]
    assert {row["key"] for row in found["chips"]} == set(catalogue().chips)
    assert not any("money" in row for row in found["chips"] if not row["devices"])


def test_on_the_terminal_in_a_line_or_two_and_on_the_page_in_tables(typed, recipe, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    code, out, _ = typed("plan", recipe / "r.toml", "--on", "h100x2", "--out", recipe / "plan.html")
    assert code == 0 and "does not fit: kd-0 takes" in out and "cheapest of the catalogue that holds it" in out
    assert max(map(len, out.splitlines())) <= 80
    page = (recipe / "plan.html").read_text()
    assert "What fits where" in page and "KV cache" in page and "NVIDIA H200 SXM" in page
    code, out, _ = typed("plan", recipe / "r.toml", "train.micro_batch=1")
    assert code == 0 and "fits: " not in out and "cheapest of the catalogue" in out  # of this machine nobody knows
