"""The endpoint teacher against a server that fails: nothing paid is lost or paid twice, no key is told, errors help."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from pathlib import Path

import pytest
from faulty import FAULTS, SLOW, Faulty
from truth import fresh

import pennyweight.teacher.client as client
from pennyweight.errors import EndpointError, RecipeError
from pennyweight.recipe import EndpointTeacher
from pennyweight.recipe_file import parse
from pennyweight.records import Message, Prompt
from pennyweight.teacher.endpoint import ServedTeacher, endpoint_of
from pennyweight.teacher.paid import Paid

ROOT = Path(__file__).resolve().parents[1]
KEY = "sk-very-secret-0123456789abcdef"


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """Back-off in hundredths of a second."""
    monkeypatch.setattr(client, "_FIRST_WAIT", 0.01)
    monkeypatch.setattr(client, "_LONGEST_WAIT", 0.05)


def teacher(url: str, answers: Path, **settings) -> ServedTeacher:
    return ServedTeacher(endpoint_of(EndpointTeacher(url=url, **settings), answers), settings.get("api", "auto"))


def prompts(count: int) -> list[Prompt]:
    return [Prompt((Message("user", f"question {i}"),), f"question {i}\n", (i,)) for i in range(count)]


def expected(count: int, seed: int) -> list[tuple[str, bool]]:
    return [(f"an answer to question {i} by {seed}", True) for i in range(count)]


@pytest.mark.parametrize("trial", range(10))
def test_random_faults_lose_no_answer_and_pay_none_twice(tmp_path, trial):
    seed = fresh()
    draw = random.Random(seed)
    plan = lambda number, body: draw.choice(FAULTS) if number and draw.random() < 0.4 else "ok"  # noqa: E731
    with Faulty(plan) as server:
        asked = teacher(server.url, tmp_path / "a.jsonl", timeout=SLOW / 2, retries=60, concurrency=8)
        assert asked.write(prompts(30), 3) == expected(30, 3), f"seed {seed}"
        assert set(server.delivered.values()) == {1} and len(server.delivered) == 31, f"seed {seed}"
        count = len(server.seen)
        again = teacher(server.url, tmp_path / "a.jsonl")
        assert again.write(prompts(30), 3) == expected(30, 3) and len(server.seen) == count, f"seed {seed}"
    after = teacher(server.url, tmp_path / "a.jsonl")  # nothing listens any more, and nothing has to
    assert after.write(prompts(30), 3) == expected(30, 3) and after.name.startswith("small@127.0.0.1")


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_gone_through(tmp_path, fault):
    with Faulty(lambda number, body: fault if number in (1, 2) else "ok") as server:
        asked = teacher(server.url, tmp_path / "a.jsonl", timeout=SLOW / 2)
        assert asked.write(prompts(1), 0) == expected(1, 0)
        assert len(server.seen) == 4 and set(server.delivered.values()) == {1}


_CLIENT = """
import sys
from pathlib import Path
from pennyweight.recipe import EndpointTeacher
from pennyweight.records import Message, Prompt
from pennyweight.teacher.endpoint import ServedTeacher, endpoint_of
t = ServedTeacher(endpoint_of(EndpointTeacher(url=sys.argv[1], concurrency=4), Path(sys.argv[2])))
asked = [Prompt((Message("user", f"question {i}"),), "", (i,)) for i in range(40)]
print(len(t.write(asked, 3)))
"""


def start(server: Faulty, answers: Path) -> subprocess.Popen:
    command = [sys.executable, "-c", _CLIENT, server.url, str(answers)]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(what, seconds: float = 60.0) -> None:
    until = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < until, "it never came"
        time.sleep(0.02)


def lines_of(file: Path) -> int:
    return file.read_bytes().count(b"\n") if file.exists() else 0


@pytest.mark.parametrize("trial", range(3))
def test_a_killed_client_goes_on_and_pays_for_nothing_twice(tmp_path, trial):
    seed = fresh()
    draw, answers = random.Random(seed), tmp_path / "a.jsonl"
    held = draw.randrange(3, 30)

    def plan(number, body):
        if number == held:
            server.go.clear()
        return draw.choice(("429", "500", "garbage", "cut")) if number and draw.random() < 0.3 else "ok"

    with Faulty(plan) as server:
        process = start(server, answers)
        wait_for(lambda: not server.go.is_set())
        settled = lambda: lines_of(answers) == sum(server.delivered.values()) + 2  # noqa: E731
        wait_for(lambda: settled() and (time.sleep(0.3) or settled()))
        process.send_signal(signal.SIGKILL)
        process.wait()
        server.clients += 1  # what was under way comes to nothing
        server.go.set()
        with open(answers, "ab") as f:
            f.write(b'{"key": "torn off by the ki')
        asked = [Prompt((Message("user", f"question {i}"),), "", (i,)) for i in range(40)]  # as the client's
        assert teacher(server.url, answers, concurrency=4).write(asked, 3) == expected(40, 3), f"seed {seed}"
        assert set(server.delivered.values()) == {1} and len(server.delivered) == 41, f"seed {seed}"
        count = len(server.seen)
        assert teacher(server.url, answers).write(asked, 3) == expected(40, 3) and len(server.seen) == count


def test_a_first_ctrl_c_waits_for_what_is_under_way(tmp_path):
    answers = tmp_path / "a.jsonl"
    with Faulty() as server:
        server.plan = lambda number, body: server.go.clear() or "ok" if number == 9 else "ok"
        process = start(server, answers)
        wait_for(lambda: len(server.seen) >= 12)
        process.send_signal(signal.SIGINT)
        wait_for(lambda: "paid for" in (process.stderr.readline() if process.stderr else ""))
        under_way = len(server.seen)
        server.go.set()
        process.wait(30)
        assert process.returncode != 0 and len(server.seen) == under_way
        assert lines_of(answers) == sum(server.delivered.values()) + 2 and sum(server.delivered.values()) == under_way


def test_answers_with_their_usage_and_a_torn_last_line(tmp_path):
    paid = Paid(tmp_path / "a.jsonl")
    paid.keep(
        "a", {"text": "한국어 \ud800"}, {"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": None}
    )
    paid.keep("b", {"text": ""}, None)
    with open(tmp_path / "a.jsonl", "ab") as f:
        f.write('{"key": "c", "usage": null, "answer": {"text": "안'.encode()[:-1])
    again = Paid(tmp_path / "a.jsonl")
    assert again["a"] == {"text": "한국어 \ud800"} and again["b"] == {"text": ""} and "c" not in again
    again.keep("c", {"text": "whole"}, {"prompt_tokens": 1, "completion_tokens": 1})
    third = Paid(tmp_path / "a.jsonl")
    assert third["c"] == {"text": "whole"} and third["a"] == {"text": "한국어 \ud800"}
    assert third.usage == {"answers": 3, "prompt_tokens": 4, "completion_tokens": 5, "estimated": 1}


def test_an_answer_that_no_tokens_are_counted_of_is_estimated_by_its_text_and_findings_cost_nothing(tmp_path):
    paid = Paid(tmp_path / "a.jsonl")
    paid.keep("found", {"model": "m", "listed": {}})
    asked = {"model": "m", "messages": [{"role": "user", "content": "x" * 41}], "max_tokens": 9}
    paid.keep("said nothing", {"text": "y" * 9, "ended": True}, None, asked)
    paid.keep("said half", {"text": "y" * 9, "ended": True}, {"prompt_tokens": 5, "completion_tokens": None}, asked)
    paid.keep("labelled", {"line": []}, None, {"prompt": [1, 2, 3]})
    paid.keep("said all", {"text": "y"}, {"prompt_tokens": 7, "completion_tokens": 1}, asked)
    for known in (paid, Paid(tmp_path / "a.jsonl")):
        assert known.usage == {
            "answers": 4, "prompt_tokens": 11 + 5 + 3 + 7, "completion_tokens": 3 + 3 + 1 + 1, "estimated": 3,
        }  # fmt: skip


def test_the_same_prompt_again_is_another_request_and_later_rows_change_nothing(tmp_path):
    with Faulty() as server:
        asked = teacher(server.url, tmp_path / "a.jsonl")
        twice = asked.write([prompts(1)[0]] * 2, 5)
        assert [t for t, _ in twice] == ["an answer to question 0 by 5", "an answer to question 0 by 6"]
        count = len(server.seen)
        assert asked.write([*prompts(2), prompts(1)[0]], 5)[::2] == twice
        assert len(server.seen) == count + 1


def test_waits_as_long_as_it_is_asked_to(tmp_path):
    now = datetime.now(UTC)
    assert client.wait_of("7") == 7.0 and client.wait_of("0.5") == 0.5 and client.wait_of("-3") == 0.0
    assert 58 < client.wait_of(format_datetime(now + timedelta(seconds=60), usegmt=True)) <= 60
    assert client.wait_of(format_datetime(now - timedelta(seconds=60), usegmt=True)) == 0.0
    assert client.wait_of("soon") is None and client.wait_of(None) is None
    with Faulty(lambda number, body: "429" if number == 1 else "ok", wait="1") as server:
        teacher(server.url, tmp_path / "a.jsonl").write(prompts(1), 0)
        assert server.times[2] - server.times[1] >= 1.0


def test_a_server_that_asks_for_an_hour_is_not_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(client, "_PATIENCE", 0.01)
    with Faulty(lambda number, body: "429" if number else "ok") as server:
        asked = teacher(server.url, tmp_path / "a.jsonl")
        with pytest.raises(EndpointError, match="asks to wait for 0 seconds.*what was answered is kept"):
            asked.write(prompts(1), 0)


def test_other_refusals_are_said_at_once_and_what_was_under_way_is_kept(tmp_path):
    def plan(number, body):
        return "400" if body["messages"][-1]["content"] == "question 5" else "ok"

    with Faulty(plan) as server:
        asked = teacher(server.url, tmp_path / "a.jsonl", concurrency=3)
        with pytest.raises(EndpointError, match=r"completions of 'question 5' \(400: told to: 400\); correct"):
            asked.write(prompts(20), 0)
        assert sum(b["messages"][-1]["content"] == "question 5" for b in server.seen) == 1
        assert len(server.seen) < 12 and lines_of(tmp_path / "a.jsonl") == sum(server.delivered.values()) + 2


def test_auto_takes_chat_and_else_completions(tmp_path):
    with Faulty(lambda number, body: "404" if "messages" in body else "ok") as server:
        asked = teacher(server.url, tmp_path / "a.jsonl")
        assert asked.write(prompts(1), 2) == [("an answer to question 0\n by 2", True)]
        assert server.seen[-1]["prompt"] == "question 0\n" and server.seen[-1]["top_k"] == 0
    with Faulty(lambda number, body: "400" if "top_k" in body or "max_tokens" in body else "ok") as server:
        asked = teacher(server.url, tmp_path / "b.jsonl")
        assert asked.write(prompts(1), 2) == expected(1, 2)
        assert server.seen[-1]["max_completion_tokens"] == 256 and "top_k" not in server.seen[-1]


def sentence(e: pytest.ExceptionInfo) -> str:
    text = str(e.value)
    assert "\n" not in text and KEY not in text and KEY not in repr(e.value)
    return text


def test_what_is_said_when_the_server_is_not_as_hoped(tmp_path):
    with Faulty() as server:
        nobody = server.url
    with pytest.raises(EndpointError) as e:
        teacher(nobody, tmp_path / "a").write(prompts(1), 0)
    assert "nothing answers there" in sentence(e) and "start the server or correct teacher.url" in sentence(e)
    with Faulty() as server, pytest.raises(EndpointError) as e:
        teacher(server.url.replace("/v1", ""), tmp_path / "b").write(prompts(1), 0)
    assert "refuses /models (404); check teacher.url, which mostly ends in /v1" in sentence(e)
    with Faulty(models=("one", "two")) as server, pytest.raises(EndpointError) as e:
        teacher(server.url, tmp_path / "c").write(prompts(1), 0)
    assert "has 2 models (one, two); name one with teacher.model" in sentence(e)
    with Faulty(lambda number, body: "404") as server, pytest.raises(EndpointError) as e:
        teacher(server.url, tmp_path / "d", model="nope").write(prompts(1), 0)
    assert "check teacher.url, which mostly ends in /v1, and teacher.model" in sentence(e)


def test_a_server_with_another_model_behind_the_same_address_is_refused(tmp_path):
    with Faulty() as server:
        teacher(server.url, tmp_path / "a", model="small").write(prompts(1), 0)
        server.models = ("large",)
        again = teacher(server.url, tmp_path / "a", model="small")
        assert again.write(prompts(1), 0) == expected(1, 0)
        with pytest.raises(EndpointError, match="choose another --out for another teacher"):
            again.write(prompts(2), 0)


@pytest.mark.parametrize("fault", ["ok", "400", "500", "429", "404"])
def test_the_key_is_told_to_nobody(tmp_path, monkeypatch, fault, caplog):
    caplog.set_level("DEBUG")
    monkeypatch.setenv("SOME_KEY", KEY)
    with Faulty(lambda number, body: fault if number else "ok", key=KEY, echo=True) as server:
        asked = teacher(server.url, tmp_path / "a.jsonl", key_env="SOME_KEY", retries=1)
        try:
            said = str(asked.write(prompts(1), 0))
        except EndpointError as e:
            said = f"{e} {e!r} {e.said}"
        assert KEY not in said and "[key]" in said
        assert KEY not in (tmp_path / "a.jsonl").read_text() + repr(asked) + repr(asked.endpoint.client) + caplog.text


class Saying(Faulty):
    """A server whose answers all have one body."""

    def __init__(self, body: str, **settings):
        super().__init__(**settings)
        self.body = body.encode()

    def deliver(self, to, body, fault, said):
        self.send(to, 200, self.body)


def says(content: str, usage: str = "null") -> str:
    return f'{{"choices": [{{"message": {{"content": "{content}"}}, "finish_reason": "stop"}}], "usage": {usage}}}'


@pytest.mark.parametrize("key", [KEY, "sk-very/secret/0123"])
def test_a_key_that_comes_back_escaped_is_told_to_nobody(tmp_path, monkeypatch, key):
    monkeypatch.setenv("SOME_KEY", key)
    for number, escaped in enumerate([key.replace("/", "\\/"), "".join(f"\\u{ord(c):04x}" for c in key)]):
        with Saying(says(f"it is {escaped}"), key=key) as server:
            asked = teacher(server.url, tmp_path / f"{number}", key_env="SOME_KEY")
            assert asked.write(prompts(1), 0) == [("it is [key]", True)]
            assert key not in (tmp_path / f"{number}").read_text()


def test_odd_numbers_in_the_usage_and_half_an_emoji_lose_no_answer(tmp_path):
    with Saying(says("so \\ud83d", '{"completion_tokens": 3, "cost": NaN, "rates": [Infinity]}')) as server:
        asked = teacher(server.url, tmp_path / "a")
        assert asked.write(prompts(2), 0) == [("so \ufffd", True)] * 2
        made = len(server.seen)
        again = teacher(server.url, tmp_path / "a")
        assert again.write(prompts(2), 0) == [("so \ufffd", True)] * 2 and len(server.seen) == made
        assert again.endpoint.paid.usage["completion_tokens"] == 3 * made


def test_an_answer_that_is_too_deep_to_be_read_is_no_answer(tmp_path):
    with (
        Saying("[" * 100_000) as server,
        pytest.raises(EndpointError, match="cannot be read as an OpenAI-compatible server's"),
    ):
        teacher(server.url, tmp_path / "a", retries=1).write(prompts(1), 0)


def test_a_missing_or_wrong_key(tmp_path, monkeypatch):
    monkeypatch.setenv("SOME_KEY", KEY)
    with Faulty(key="another") as server:
        with pytest.raises(EndpointError) as e:
            teacher(server.url, tmp_path / "a", key_env="SOME_KEY").write(prompts(1), 0)
        assert "refuses the key (401); put a valid one in the environment as SOME_KEY" in sentence(e)
        with pytest.raises(EndpointError, match=r"wants a key \(401\).*teacher.key_env=OPENAI_API_KEY"):
            teacher(server.url, tmp_path / "b").write(prompts(1), 0)
        monkeypatch.delenv("SOME_KEY")
        with pytest.raises(RecipeError, match="SOME_KEY .teacher.key_env. is not set"):
            teacher(server.url, tmp_path / "c", key_env="SOME_KEY").write(prompts(1), 0)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("url", f"http://me:{KEY}@host/v1"),
        ("url", f"http://host/v1?key={KEY}"),
        ("url", f"ftp://{KEY}"),
        ("key_env", KEY),
    ],
)
def test_a_key_in_the_wrong_place_is_refused_and_not_repeated(field, value):
    table = {"name": "x", "teacher": {"kind": "endpoint", "url": "http://host/v1"}, "student": {"kind": "cut"}}
    table["teacher"][field] = value
    with pytest.raises(RecipeError) as e:
        parse(table)
    assert field in sentence(e)


def test_patience_changes_no_stage():
    def recipe(**more):
        endpoint = {"kind": "endpoint", "url": "http://host/v1/", **more}
        return parse({"name": "x", "teacher": endpoint, "student": {"kind": "folder", "path": "s"}}).hash_of("teacher")

    assert recipe() == recipe(concurrency=3, timeout=1.0, retries=0, key_env="A_KEY") != recipe(model="m")


def test_works_where_a_loop_is_running_already(tmp_path):
    import asyncio

    async def in_a_notebook(url):
        return teacher(url, tmp_path / "a").write(prompts(2), 0)

    with Faulty() as server:
        assert asyncio.run(in_a_notebook(server.url)) == expected(2, 0)
