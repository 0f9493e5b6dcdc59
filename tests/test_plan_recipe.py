"""A recipe's plan: what every stage takes, before anything runs."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from pennyweight.errors import ModelError
from pennyweight.plan.hardware import catalogue, own_price, price_range
from pennyweight.plan.pace import on_this
from pennyweight.plan.published import published
from pennyweight.plan.reckon import pace_on, reckon
from pennyweight.plan.subjects import subjects_of
from pennyweight.plan.work import rows_of
from pennyweight.recipe_file import distillation, load, parse

ROOT = Path(__file__).resolve().parents[1]
LLAMA = {
    "model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 300, "hidden_size": 32,
    "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
TASKS = '[{name="basic_arithmetic",size=1000}]'


@pytest.fixture
def llama(tmp_path):
    (tmp_path / "big").mkdir()
    (tmp_path / "big" / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path / "big"


def reckoned(recipe, mean=None, price=None, pace=None):
    return reckon(recipe, subjects_of(recipe), rows_of(recipe, mean), pace or on_this(None, 1, False), price)


def stage(found, name):
    return next(s for s in found["stages"] if s["stage"] == name)


@pytest.mark.parametrize("name", ["quickstart", "r1", "four_ways"])
def test_every_shipped_recipe_is_planned_in_a_second_without_torch_and_within_80_columns(name):
    code = (
        "import sys, time; sys.argv = ['pennyweight', 'plan', *sys.argv[1:]]\n"
        "from pennyweight.cli import main\n"
        "try: main()\n"
        "finally: print(time.process_time(), [m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    command = [sys.executable, "-c", code, str(ROOT / "recipes" / f"{name}.toml")]
    run = subprocess.run(command, capture_output=True, text=True, env={"COLUMNS": "80", "PATH": ""}, cwd=ROOT)
    *lines, last = run.stdout.splitlines()
    seconds, _, heavy = last.partition(" ")
    assert run.returncode == 0 and heavy == "[]", run.stderr
    assert float(seconds) < 3  # of a busy machine; 0.5 on a quiet one
    assert max(map(len, lines)) <= 80 and "together" in run.stdout


def test_ends_are_in_order_and_stages_add_up():
    found = reckoned(load(None), price=own_price(0.05))
    names = [s["stage"] for s in found["stages"]]
    assert names == [
        "teacher",
        "data",
        "targets",
        "sft-0",
        "kd-0",
        "int8",
        "int4",
        "evaluate teacher",
        "evaluate students",
    ]
    for what in ("tokens", "flops", "hours", "kwh", "money"):
        for s in (*found["stages"], found["total"]):
            if s.get("stage") == "data" and what in ("tokens", "flops"):
                continue  # problems are drawn, and nobody writes
            assert 0 < s[what]["low"] <= s[what]["middle"] <= s[what]["high"], (s, what)
        for end in ("low", "middle", "high"):
            assert found["total"][what][end] == pytest.approx(sum(s[what][end] for s in found["stages"]))
    assert found["total"]["memory"]["high"] == max(s["memory"]["high"] for s in found["stages"] if s["memory"])


def test_tokens_are_those_of_the_recipe():
    found = reckoned(load(None, ["train.steps=100", "train.batch=8", "seeds=[0,1]", "control=false"]), mean=30)
    assert stage(found, "kd-1")["tokens"]["middle"] == 100 * 8 * 30
    assert "sft-0" not in [s["stage"] for s in found["stages"]]
    assert stage(found, "teacher")["tokens"]["low"] == 900 * 64 * 30


def test_the_tokens_that_a_run_had_are_those_foretold(tiny_run):
    """Once the mean length is known, which is all that a plan cannot know."""
    out, summary = tiny_run
    recipe = load(Path(__file__).with_name("tiny.toml"))
    data = summary["data"]
    found = reckoned(recipe, mean=data["train_tokens"] / data["train"])
    for arm in ("sft-0", "kd-1"):
        assert stage(found, arm)["tokens"]["middle"] == pytest.approx(summary["stages"][arm]["tokens"], rel=0.05)
    subjects = subjects_of(recipe)
    assert subjects.teacher is not None
    entries = json.loads((out / "teacher" / "config.json").read_text())["vocab_size"]
    missing = (64 - entries) * 32  # of the embedding: its tokenizer found fewer tokens than it might have
    assert subjects.teacher.parameters - missing == summary["teacher"]["params"]
    assert subjects.student.parameters - missing == summary["arms"]["kd"]["params"]


@pytest.mark.parametrize("cut", ["layers=2", "layers=[0,3]", "hidden=16", "layers=1,hidden=16,intermediate=24"])
def test_a_cut_student_has_the_parameters_that_it_gets(llama, cut):
    from transformers import LlamaConfig, LlamaForCausalLM

    from pennyweight.model.student import cut as really_cut

    recipe = distillation(teacher=str(llama), cut=cut)
    student = really_cut(LlamaForCausalLM(LlamaConfig(**LLAMA)), recipe.student)
    assert subjects_of(recipe).student.parameters == sum(p.numel() for p in student.parameters())


def test_a_given_teacher_writes_labels_and_is_not_trained(llama):
    found = reckoned(distillation(teacher=str(llama), cut="layers=2", steps=10, seeds=1))
    names = [s["stage"] for s in found["stages"]]
    assert names[:2] == ["data", "targets"] and "teacher" not in names
    assert "how a given teacher or student was trained" in found["scope"]
    live = reckoned(distillation(teacher=str(llama), cut="layers=2", steps=10, settings=["targets.kind=dense"]))
    assert stage(live, "kd-0")["flops"]["middle"] > stage(live, "sft-0")["flops"]["middle"]
    assert stage(live, "kd-0")["memory"]["middle"] > stage(live, "sft-0")["memory"]["middle"]


def test_targets_on_disk_are_what_their_kind_takes(llama):
    for kind, each in (("targets.kind=hidden", 2 * 32), ("targets.k=8", 8 * (9 + 16) / 8 + 3)):
        settings = [kind] if "hidden" in kind else ["targets.kind=top_k", kind]
        found = reckoned(distillation(teacher=str(llama), cut="layers=2", settings=settings), mean=50)
        assert stage(found, "targets")["disk"]["low"] == pytest.approx(1800 * 50 * each)


def test_rollouts_cost_what_is_written_besides(llama):
    settings = ["method.kind=grpo", "method.group=4", "method.max_tokens=32", "control=false"]
    table = distillation(teacher=str(llama), cut="layers=2", steps=10, settings=settings).model_dump(mode="json")
    table["data"]["source"] = {"kind": "tasks", "tasks": [{"name": "basic_arithmetic"}]}
    found = reckoned(parse(table))
    grpo = stage(found, "grpo-0")
    assert grpo["does"] == "writes and trains by grpo" and grpo["tokens"]["high"] > 2 * grpo["tokens"]["low"]


def test_money_is_left_out_where_nobody_knows_a_price():
    assert "money" not in reckoned(load(None))["total"]
    assert "give one with --price" in reckoned(load(None))["reasons"]["money"]
    rented = reckoned(load(None), price=own_price(2.0))
    for end in ("low", "middle", "high"):
        assert rented["total"]["money"][end] == pytest.approx(2 * rented["total"]["hours"][end])


def served(**price):
    return parse(
        {
            "name": "s",
            "teacher": {"kind": "endpoint", "url": "http://h/v1", "tokenizer": "t", **price},
            "student": {"kind": "folder", "path": "STUDENT"},
            "method": {"kind": "sft"},
            "data": {"source": {"kind": "tasks", "tasks": [{"name": "x"}]}, "responses": {"by": "teacher"}},
        }
    )


def test_a_server_costs_its_tokens_and_is_never_free_for_want_of_a_price(llama):
    dear = served(usd_sent=1.0, usd_got=3.0)
    dear = dear.model_copy(update={"student": dear.student.model_copy(update={"path": str(llama)})})
    found = reckoned(dear, mean=90, price=own_price(0.0))
    data, rows = stage(found, "data"), rows_of(dear, 90)
    a, b = (rows.train + rows.held_out) * 30, (rows.train + rows.held_out) * rows_got()
    assert data["money"]["middle"] == pytest.approx((a * 1 + b * 3) / 1e6)
    unpriced = served().model_copy(update={"student": dear.student})
    assert "money" not in reckoned(unpriced, price=own_price(1.0))["total"]


def rows_got() -> float:
    return 0.45 * 256


def test_on_a_chip_of_the_catalogue(llama):
    recipe, chip = distillation(teacher=str(llama), cut="layers=2"), catalogue().chip("h100")
    from datetime import date

    price = price_range(catalogue().prices_of(chip), date.today())
    found = reckoned(recipe, price=price, pace=pace_on(chip, 8, None, published()))
    assert found["devices"] == 8 and "assumed" in found["reasons"]["hours"]
    assert found["total"]["money"]["low"] < found["total"]["money"]["middle"] < found["total"]["money"]["high"]
    alone = reckoned(recipe, pace=pace_on(chip, 1, None, published()))
    assert alone["total"]["hours"]["middle"] > found["total"]["hours"]["middle"]


def test_a_chain_takes_shapes_of_what_earlier_stages_make_and_adds_up(typed, tmp_path):
    code, out, _ = typed("plan", ROOT / "recipes" / "four_ways.toml", "--json", "--price", "0.1")
    found = json.loads(out)
    assert code == 0 and list(found["runs"]) == ["master", "rl", "sft", "sft_long", "on_policy", "offline"]
    of = {stage: run["parameters"] for stage, run in found["runs"].items()}
    assert of["sft"] == of["on_policy"] == {**of["master"], "student": of["rl"]["student"]}
    assert of["rl"]["student"] < of["master"]["student"]
    for what in ("hours", "money", "flops"):
        sums = sum(run["total"][what]["middle"] for run in found["runs"].values())
        assert found["total"][what]["middle"] == pytest.approx(sums)


def test_the_page_needs_nothing_but_itself_and_is_escaped(typed, tmp_path):
    page = tmp_path / "plan.html"
    code, _, _ = typed("plan", ROOT / "recipes" / "quickstart.toml", "--out", page)
    text = page.read_text()
    assert code == 0 and "Pennyweight plan: quickstart" in text and "<script" not in text
    assert "trains the teacher" in text and "no price of this machine is known" in text


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["r.toml", "--tokens", "3B"], "said by the recipe"),
        (["none.toml"], "no recipe at none.toml"),
        (["config.json", "train.steps=3"], "is for a plan of a recipe"),
        (["--chips", "--out", "x.html"], "--out is for a plan of a recipe"),
        (["recipes/quickstart.toml", "train.stepz=3"], "did you mean 'steps'"),
        (["recipes/quickstart.toml", "--on", "zx81"], "no chip is called"),
        (["recipes/quickstart.toml", "--precision", "foo"], "--precision foo is none of"),
        (["recipes/quickstart.toml", "--on", "h100", "--precision", "foo"], "--precision foo is none of"),
        (["recipes/quickstart.toml", "--precision", "fp8"], "name one with --on"),
        (["recipes/quickstart.toml", "--on", "h100", "compute.dtype=float32"], "fp32 TFLOP/s of h100"),
        (["recipes/quickstart.toml", "teacher.kind=folder", "teacher.path=nowhere"], "there is no nowhere"),
    ],
)
def test_what_cannot_be_planned_is_said_in_a_sentence(typed, monkeypatch, argv, says):
    monkeypatch.chdir(ROOT)
    code, out, err = typed("plan", *argv)
    assert code == 2 and says in err and "\n" not in err.strip() and not out


def test_a_student_of_a_server_needs_a_vocabulary(llama):
    recipe = served()
    shape = {"hidden": 32, "layers": 2, "heads": 2, "intermediate": 64}
    table = recipe.model_dump(mode="json") | {"student": {"kind": "shape", "shape": shape}}
    with pytest.raises(ModelError, match=r"student\.tokenizer"):
        subjects_of(parse(table))


@pytest.fixture
def released(tmp_path):
    """name -> a folder with the config.json of a released model."""
    said = tomllib.loads((ROOT / "pennyweight" / "plan" / "models.toml").read_text())

    def folder(name: str) -> str:
        (tmp_path / name).mkdir(exist_ok=True)
        (tmp_path / name / "config.json").write_text(json.dumps(said[name]["config"]))
        return str(tmp_path / name)

    return folder


def on(chip, recipe, devices=8, precision=None, mean=None):
    return reckoned(recipe, mean=mean, pace=pace_on(catalogue().chip(chip), devices, precision, published()))


@pytest.mark.parametrize(
    ("teacher", "student"),
    [("llama-3-8b", "llama-3.2-1b"), ("qwen3-235b-a22b", "qwen3-8b"), ("qwen3-30b-a3b", "qwen3-30b-a3b")],
)
@pytest.mark.parametrize("devices", [8, 64])
def test_a_recipe_and_its_model_are_foretold_alike(released, teacher, student, devices):
    """Labelling and training of the same tokens, by classes that published runs have."""
    from datetime import date

    from pennyweight.plan.outlook import Asked, outlook

    length, steps, batch = 4096, 2000, 1024
    settings = ["data.context=4096", "control=false", "quantize.formats=[]", f"train.batch={batch}"]
    settings += ["targets.kind=hidden", f"data.source.count={int(steps * batch / 0.9)}", "train.micro_batch=16"]
    recipe = distillation(
        teacher=released(teacher), student=released(student), steps=steps, batch=batch, seeds=1, settings=settings
    )
    found = on("h100", recipe, devices, mean=length)
    chip, tokens = catalogue().chip("h100"), float(steps * batch * length)
    asked = Asked(released(student), tokens, chip, devices, length=4096, teacher=released(teacher))
    labels, trains = outlook(asked, catalogue(), published(), date(2026, 6, 1))["parts"]
    for stage_name, part in (("targets", labels), ("kd-0", trains)):
        ours = stage(found, stage_name)["hours"]
        assert ours["middle"] == pytest.approx(part["hours"]["middle"], rel=0.3), stage_name
        assert part["hours"]["low"] < ours["middle"] < part["hours"]["high"]


def test_learning_a_distribution_takes_a_small_student_longer(released):
    recipe = distillation(
        teacher=released("llama-3-8b"), student=released("llama-3.2-1b"), settings=["data.context=4096"], seeds=1
    )
    found = on("h100", recipe, mean=4000)
    assert stage(found, "kd-0")["hours"]["middle"] > 3 * stage(found, "sft-0")["hours"]["middle"]
    assert "microseconds a token" in found["reasons"]["hours"] and "a mixture of experts" in found["reasons"]["hours"]


def test_precision_is_the_recipes_unless_the_option_says_another(released):
    def hours(*settings, precision=None):
        given = {"teacher": released("llama-3-8b"), "student": released("llama-3-8b"), "method": "sft", "seeds": 1}
        recipe = distillation(**given, settings=["data.context=4096", "targets.kind=dense", *settings])
        return stage(on("h100", recipe, precision=precision, mean=4000), "sft-0")["hours"]["middle"]

    assert hours("train.precision=fp8") < 0.9 * hours() and hours(precision="fp8") < 0.9 * hours()
    assert hours("train.precision=fp8", precision="bf16") == hours()
    assert hours("train.precision=nvfp4") == hours("train.precision=mxfp8")  # which an H100 computes them in


def test_each_micro_batch_starts_the_operations_of_a_layer_anew(llama):
    def hours(*settings, pace=None):
        recipe = distillation(teacher=str(llama), cut="layers=2", steps=2000, batch=64, settings=list(settings))
        return stage(reckoned(recipe, mean=8, pace=pace), "sft-0")["hours"]["middle"]

    chip = pace_on(catalogue().chip("h100"), 8, None, published())
    assert hours("train.micro_batch=1") > 2 * hours()
    assert hours("train.micro_batch=2", pace=chip) > 2 * hours(pace=chip)
    assert hours("train.micro_batch=8", pace=chip) == hours(pace=chip)  # each of 8 devices has 8 rows


def test_disk_has_every_model_as_it_is_stored_and_of_lora_what_is_trained(llama):
    def planned(*settings):
        return reckoned(distillation(teacher=str(llama), cut="layers=2", seeds=2, settings=list(settings)))

    def kept(found, name="kd-0", end="middle"):
        return stage(found, name)["disk"][end]

    plain = planned()
    count = plain["parameters"]["student"]
    assert kept(plain) == 4 * count and kept(plain, end="high") == 4 * count + 2 * 12 * count
    sums = sum(s["disk"]["middle"] for s in plain["stages"] if s["disk"])
    assert plain["total"]["disk"]["middle"] == sums + 2 * 4 * count  # the first student and the chosen one's copy
    factors = planned("train.lora.rank=2")
    assert kept(factors, end="high") < 4 * count + 2 * 12 * count / 3
    low = planned("train.moments=bfloat16", "train.weights=bfloat16")
    assert kept(low, end="high") == 4 * count + 2 * 6 * count
    (llama / "config.json").write_text(json.dumps({**LLAMA, "dtype": "bfloat16"}))
    assert kept(planned()) == 2 * count
    teacher = reckoned(load(None))
    assert kept(teacher, "teacher") == 2 * 4 * teacher["parameters"]["teacher"]


def test_what_one_process_does_alone_takes_as_long_on_many_devices(released):
    settings = ["data.context=2048", "train.micro_batch=1"]
    recipe = distillation(teacher=released("llama-3-8b"), student=released("llama-3.2-1b"), settings=settings, seeds=1)
    one, eight = (on("h100", recipe, devices) for devices in (1, 8))
    for name in ("data", "int4", "evaluate students"):
        assert stage(eight, name)["hours"]["middle"] == pytest.approx(stage(one, name)["hours"]["middle"])
        assert stage(eight, name)["kwh"]["middle"] == pytest.approx(8 * stage(one, name)["kwh"]["middle"])
    for name in ("targets", "kd-0", "sft-0"):
        assert stage(eight, name)["hours"]["middle"] < stage(one, name)["hours"]["middle"] / 4
    assert any("does the other stages alone" in note for note in eight["notes"]) and not one["notes"]
    rolled = recipe.model_copy(update={"method": load(None, ["method.kind=on_policy"]).method})
    assert any("method on_policy runs in one process" in note for note in on("h100", rolled, 8)["notes"])
