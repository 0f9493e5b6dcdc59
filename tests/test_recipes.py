"""Recipes: every shipped one parses and round-trips; overrides; what is wrong is said in one sentence with the cure."""

from __future__ import annotations

from pathlib import Path

import pytest

from pennyweight import chain_file
from pennyweight.errors import RecipeError
from pennyweight.recipe import Recipe
from pennyweight.recipe_file import _models_in, distillation, load, parse, shipped

SHIPPED = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.toml"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda p: p.stem)
def test_every_shipped_recipe_parses_and_round_trips_through_json(path):
    read = chain_file.load(path)
    assert read.name == path.stem
    for recipe in [read] if isinstance(read, Recipe) else read.recipes(Path("runs")).values():
        assert Recipe.model_validate_json(recipe.model_dump_json()) == recipe
    assert shipped(path.stem) == path
    assert path.read_text().startswith("#"), "its cost and result belong in its header"


def test_the_default_is_the_quickstart():
    assert load(None).name == "quickstart"


def test_settings_go_on_top():
    recipe = load(None, ["train.steps=7", "targets.kind=dense", "teacher.shape.layers=2", "seeds=[1,2]", "name=mine"])
    assert recipe.train.steps == 7 and recipe.targets.kind == "dense" and recipe.seeds == [1, 2]
    assert recipe.teacher.kind == "trained" and recipe.teacher.shape.layers == 2 and recipe.name == "mine"


def test_a_new_kind_drops_the_settings_of_the_old_one():
    student = load(None, ["student.kind=cut", "student.layers=2"]).student
    assert student.kind == "cut" and student.layers == 2
    method = load(None, ["method.divergence=jsd", "method.kind=kd", "targets.kind=dense"]).method
    assert method.divergence == "jsd"  # kd is what it was anyway


@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("train.stepz=5", "unknown key 'train.stepz'; did you mean 'steps'?"),
        ("tran.steps=5", "did you mean 'train'?"),
        ("teacher.shape.hiddn=3", "unknown key 'teacher.shape.hiddn'; did you mean 'hidden'?"),
        ('teacher.tasks=[{name="a",sise=3}]', "did you mean 'size'?"),
        ("zzz=1", "known here: budget, compute, control, data"),
        ("train.steps=x", "train.steps: "),
        ("train.steps=0", "greater than or equal to 1"),
        ("student.kind=nope", "'folder', 'shape', 'cut'"),
        ("teacher.shape.heads=5", "even head width"),
        ("seeds=[1,1]", "name one seed twice"),
        ("seeds=[20251231235959]", "seeds.0: Input should be less than 2147483648"),
        ("train.lr=inf", "train.lr: Input should be a finite number"),
        ("train.batch=1000000000", "less than or equal to 1000000"),
        ("train.steps", "write it as a.b=value"),
        ("train.steps.x=1", "steps is a value, not a table"),
        ("name=a/b", "name"),
    ],
)
def test_what_is_wrong_is_said_with_the_cure(setting, says):
    with pytest.raises(RecipeError) as e:
        load(None, [setting])
    assert says in str(e.value)
    assert "\n" not in str(e.value)


def variants(model, path=()):
    """(place of a tagged table, one of its models) for all of a model's."""
    for name, field in model.model_fields.items():
        below = _models_in(field.annotation)
        for one in below:
            if len(below) > 1:
                yield (*path, name), one
            yield from variants(one, (*path, name))


KINDS = {(".".join(place), one.model_fields["kind"].default): one for place, one in variants(Recipe)}


@pytest.mark.parametrize(("place", "kind"), KINDS)
def test_a_message_does_not_name_the_kind_of_a_table_as_if_somebody_had_written_it(place, kind):
    """For every kind there is, so that one more is not forgotten."""
    where = place.replace("members", "members.one")
    table: dict = {"kind": kind, "zzzzzz": 1}
    for key in reversed(where.split(".")):
        table = {key: table} | ({"kind": "several"} if key == "members" else {})
    whole = load(None).model_dump()
    whole |= {key: (whole[key] if key == "data" else {}) | value for key, value in table.items()}
    with pytest.raises(RecipeError) as e:
        parse(whole, "")
    known = KINDS[place, kind].model_fields
    told = [f"{where}.{field} is missing; add it" for field in known]
    told += [f"unknown key '{where}.zzzzzz'; known here: {', '.join(sorted(known))}"]
    assert str(e.value) in told


def test_files_that_cannot_be_read(tmp_path):
    with pytest.raises(RecipeError, match="no recipe at .*shipped ones: .*quickstart"):
        load(tmp_path / "none.toml")
    (tmp_path / "bad.toml").write_text("name = \n")
    with pytest.raises(RecipeError, match="not valid TOML.*line 1"):
        load(tmp_path / "bad.toml")
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(RecipeError, match="is missing; add it"):
        load(tmp_path / "empty.toml")
    (tmp_path / "bytes.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(RecipeError, match="cannot read"):
        load(tmp_path / "bytes.toml")


def test_distill_needs_no_recipe():
    recipe = distillation(teacher="models/big-one/", cut="layers=2,hidden=64", steps=9, settings=["train.lr=0.5"])
    assert recipe.name == "distill-big-one" and recipe.seeds == [0, 1, 2] and recipe.train.steps == 9
    assert recipe.student.layers == 2 and recipe.student.hidden == 64 and recipe.train.lr == 0.5
    assert recipe.data.source.kind == "teacher_samples"
    assert distillation(teacher="t", student="s", data="d.jsonl").data.source.path == "d.jsonl"
    assert distillation(teacher="HTTP://host/v1", student="s", data="d.jsonl").teacher.kind == "endpoint"
    for both in ({}, {"student": "s", "cut": "layers=1"}):
        with pytest.raises(RecipeError, match="not both"):
            distillation(teacher="t", **both)
    assert distillation(teacher="t", cut="layers=[0,2],hidden=64").student.layers == [0, 2]
    with pytest.raises(RecipeError, match="did you mean 'layers'"):
        distillation(teacher="t", cut="layrs=2")
    with pytest.raises(RecipeError, match=r"write it as layers=N\[,hidden=N\]"):
        distillation(teacher="t", cut="layers")
    with pytest.raises(RecipeError, match="--data is empty"):
        distillation(teacher="t", cut="layers=2", data="")
