"""Runs whose teacher is behind a server: the line, the ledger and the report; refusals before anything is asked; and
servers that are not ours, started here on loopback."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest
from architectures import make, save_with_tokenizer
from faulty import Faulty

import pennyweight
from pennyweight.commands import show_sample, verify
from pennyweight.errors import EndpointError, MethodError, RecipeError, RunError
from pennyweight.inspection import inspect_targets
from pennyweight.model.load import load, save
from pennyweight.model.student import cut
from pennyweight.recipe import CutStudent

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-very-secret-0123456789abcdef"
QUICK = ["train.batch=4", "data.context=96", "data.responses.max_tokens=24", 'compute.dtype="float32"']
QUICK += ["quantize.formats=[]", "data.eval_fraction=0.3", "evaluate.max_tokens=8", "compute.threads=1"]


TOP_K = ["targets.kind=top_k", "teacher.tokenizer=x"]


@pytest.fixture
def student(tmp_path) -> str:
    return str(save_with_tokenizer(make("llama"), tmp_path / "tiny-student"))


@pytest.fixture
def rows(tmp_path) -> str:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"question {i}"}) + "\n" for i in range(16)))
    return str(file)


def distill(url, out, student, rows, *more):
    """Words of a command line."""
    settings = [w for s in QUICK for w in ("--set", s)]
    chosen = ("--student", student, "--data", rows, "--method", "sft", "--steps", "3", "--seeds", "1")
    return ("distill", "--teacher", url, "--out", str(out), *chosen, *settings, *more)


def test_a_run_from_the_command_line_with_faults_on_the_way(tmp_path, student, rows, typed, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    out = tmp_path / "run"
    with Faulty(lambda number, body: "500" if number == 4 else "ok", key=KEY, echo=True) as server:
        more = ("--teacher-model", "small", "--set", "teacher.key_env=SOME_KEY", "--json")
        code, printed, said = typed(*distill(server.url, out, student, rows, *more))
        assert code == 0, said[-2000:]
        asked = len(server.seen)
        code, _, again = typed(*distill(server.url, out, student, rows, *more))
        assert code == 0 and len(server.seen) == asked and "data: finished before" in again
        sent = [b for b in server.seen if b["messages"][-1]["content"].startswith("question")]
        assert {json.dumps(b["messages"]) for b in sent} == {
            json.dumps([{"role": "user", "content": f"question {i}"}]) for i in range(16)
        }
        assert len(sent) == 17 and set(server.delivered.values()) == {1}
    summary = json.loads(printed)
    name = "small@" + server.url.split("/")[2]
    assert summary["teacher"]["name"] == name and summary["teacher"]["metrics"] == {}
    assert set(summary["data"]["authors"]) == {name} and set(summary["arms"]) == {"base", "sft"}
    assert summary["data"]["usage"]["completion_tokens"] == 5 * 17 and summary["targets"]["kind"] == "text"
    assert set(summary["arms"]["sft"]["metrics"]) == {"bits_per_byte", "ece"}
    sample = json.loads((out / "data" / "train.jsonl").read_text().splitlines()[0])
    assert sample["author"] == name and sample["response"].startswith("an answer to question")
    assert verify(str(out)).ok and "learnt" in show_sample(str(out), 0)
    page = (out / "report.html").read_text()
    assert "The teacher was not measured" in page and name in page and "texts alone" in page
    everything = b"".join(f.read_bytes() for f in out.rglob("*") if f.is_file())
    for text in (printed, said, again):
        assert KEY not in text
    assert KEY.encode() not in everything
    code, shown, _ = typed("show", out)
    assert code == 0 and "sft" in shown and "teacher " not in shown.split("model")[1]
    with pytest.raises(RunError, match="behind a server"):
        inspect_targets(str(out))


def test_a_teacher_that_cannot_be_reached_is_said_in_one_sentence(tmp_path, student, rows, typed):
    with Faulty() as server:
        nobody = server.url
    command = [sys.executable, "-m", "pennyweight.cli", *distill(nobody, tmp_path / "run", student, rows)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert ran.returncode == 2 and ran.stdout == ""
    said = ran.stderr.strip().splitlines()
    assert said[-1].startswith(f"pennyweight: {nobody} failed 3 times") and "Traceback" not in ran.stderr
    code, _, said = typed(*distill("http://me:secret@host/v1", tmp_path / "run", student, rows))
    assert code == 2 and "secret" not in said and "teacher.url" in said


@pytest.mark.parametrize(
    ("options", "settings", "error", "says"),
    [
        ({"cut": "layers=1"}, [], RecipeError, "cannot be cut from an endpoint.*--student FOLDER"),
        ({}, ["student.kind=shape"], RecipeError, "student.shape is missing"),
        ({}, [], MethodError, "targets.kind=sampled needs .*set targets.kind=top_k.*method.kind=sft"),
        ({}, ["targets.kind=top_k"], MethodError, "name a folder or hub id with its tokenizer as teacher.tokenizer"),
        (
            {},
            [*TOP_K, "method.temperature=2"],
            MethodError,
            "method.temperature=1",
        ),
        ({}, [*TOP_K, "targets.precision=int8"], MethodError, "precision=auto"),
        ({"method": "sft"}, ["teacher.api=chat"], RecipeError, "writes nothing from nothing.*--data FILE"),
    ],
)
def test_what_no_server_gives_is_refused_before_anything_is_asked(tmp_path, student, options, settings, error, says):
    with Faulty() as server, pytest.raises(error, match=says):
        chosen = options if "cut" in options else {"student": student, **options}
        pennyweight.distill(server.url, **chosen, settings=settings, out=tmp_path / "run")
    assert server.seen == [] and not (tmp_path / "run").exists()


def test_a_server_that_tells_no_log_probabilities_is_refused_before_it_answers(tmp_path, student, rows):
    settings = [*QUICK, "targets.kind=top_k", "targets.k=4", f"teacher.tokenizer={student}"]
    with Faulty() as server, pytest.raises(EndpointError, match="tells no log-probabilities of a prompt"):
        options = {"data": rows, "student": student, "steps": 2, "seeds": 1}
        pennyweight.distill(server.url, **options, settings=settings, out=tmp_path / "run")
    assert not any("question" in json.dumps(b) for b in server.seen)


def test_a_student_from_nothing_takes_the_tokenizer_that_is_named(tmp_path, student, rows):
    shape = "student.shape={hidden=32, layers=1, heads=2, intermediate=32}"
    settings = [*QUICK, "student.kind=shape", shape, f"teacher.tokenizer={student}"]
    with Faulty() as server:
        options = {"data": rows, "student": student, "method": "sft", "steps": 2, "seeds": 1}
        found = pennyweight.distill(server.url, **options, settings=settings, out=tmp_path / "run")
    assert found["arms"]["sft"]["params"] > 0
    opened = load(str(tmp_path / "run" / "student"))
    assert opened.tokenizer.get_vocab() == load(student).tokenizer.get_vocab() and opened.context == 96


needs_server = pytest.mark.skipif(
    any(
        importlib.util.find_spec(m) is None
        for m in ("llama_cpp", "fastapi", "uvicorn", "sse_starlette", "starlette_context", "pydantic_settings", "gguf")
    ),
    reason='needs llama-cpp-python\'s server; pip install -e ".[servers]"',
)


@needs_server
def test_a_run_with_a_real_server_that_tells_log_probabilities(tmp_path, stories):
    from benchmarks.served import llama_server, serving
    from pennyweight.quant.gguf_file import write_gguf

    teacher = load(str(stories))
    write_gguf(teacher.model, teacher.tokenizer, {}, tmp_path / "m.gguf", "bf16", "stories", {})
    save(cut(teacher.model, CutStudent(layers=1)).float(), teacher.tokenizer, tmp_path / "small")
    settings = [*QUICK, "targets.kind=top_k", "targets.k=8", f"teacher.tokenizer={stories}", "data.source.count=12"]
    settings += ["data.source.max_tokens=24"]
    options = {"student": str(tmp_path / "small"), "steps": 3, "seeds": 1, "out": tmp_path / "run"}
    with serving(llama_server(tmp_path / "m.gguf"), tmp_path / "log") as url:
        found = pennyweight.distill(url, **options, settings=settings)
        with pytest.raises(RecipeError, match="more than the teacher's vocabulary of 512"):
            pennyweight.distill(url, **{**options, "out": tmp_path / "b"}, settings=[*settings, "targets.k=513"])
    assert found["targets"]["entries_per_token"] == 8 and set(found["arms"]) == {"base", "sft", "kd"}
    assert found["data"]["untold"] == 2 and "kl_to_teacher" not in found["arms"]["kd"]["metrics"]
    assert found["gap_recovered"]["bits_per_byte"]["how"] == "the teacher was not measured"
    assert "the teacher was not measured" in (tmp_path / "run" / "report.html").read_text()
    offline = pennyweight.distill(url, **options, settings=[*settings, "train.lr=0.002"])  # all of it is paid for
    assert offline["targets"] == found["targets"]


@pytest.mark.skipif(
    any(importlib.util.find_spec(m) is None for m in ("fastapi", "uvicorn", "openai")),
    reason='needs transformers\' server; pip install -e ".[servers]"',
)
def test_a_real_server_that_only_writes(tmp_path, stories):
    from benchmarks.served import answering, prompts, served_at, serving, transformers_server
    from pennyweight.data.render import prompt_of

    teacher = load(str(stories))
    asked = [prompt_of(s, teacher.tokenizer) for s in prompts()[:4]]
    with serving(transformers_server(stories), tmp_path / "log") as url:
        written = served_at(url, teacher, tmp_path / "a.jsonl").write(asked, 0)
    assert written == answering(teacher).write(asked, 0)
