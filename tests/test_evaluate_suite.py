"""One model measured: accuracy and pass@k by the verifier, token metrics, and text to look at where nothing judges."""

from __future__ import annotations

from functools import partial

import pytest
from architectures import make, save_with_tokenizer

from pennyweight.data.render import encode, encode_all, learnt_bytes, prompt_ids
from pennyweight.data.store import write_samples
from pennyweight.data.tasks import problems as drawn
from pennyweight.errors import DataError
from pennyweight.evaluate import suite
from pennyweight.evaluate.held_out import HeldOut, hold_out
from pennyweight.evaluate.suite import Sampling, examine
from pennyweight.model.device import choose
from pennyweight.model.generate import Generated
from pennyweight.model.load import load
from pennyweight.records import Message, Sample, Task, Verdict
from pennyweight.settings import Evaluate, TaskSource

CPU = choose("cpu", "float32")


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    return load(str(save_with_tokenizer(make("llama", 3), tmp_path_factory.mktemp("m") / "m")))


def problems(count):
    return [
        Sample((Message("user", f"p{i}"),), f"a{i}", "test", task=Task("t", "exact", f"a{i}")) for i in range(count)
    ]


def exact(text, task):
    return Verdict(text == task.answer, text)


def test_accuracy_and_pass_at_k_count_what_the_verifier_accepts(loaded, monkeypatch):
    """Scripted answers: greedy right for 3 of 4; of two samples each, at least one right for 2 of 4."""
    rows = problems(4)
    scripts = iter([["a0", "a1", "a2", "x"], ["a0", "x", "x", "x"], ["x", "a1", "x", "x"]])

    def answers(model, prompts, sampling, temperature, seed, progress):
        return [Generated(tuple(loaded.tokenizer(t)["input_ids"]), 2, ()) for t in next(scripts)]

    monkeypatch.setattr(suite, "_answers", answers)
    held_out = HeldOut([], [], rows, [prompt_ids(s, loaded.tokenizer) for s in rows])
    found = examine(loaded, held_out, exact, Sampling(8, 2, 1.0, 0), CPU)
    assert found.metrics["accuracy"].mean == 0.75 and "4 trials" in found.metrics["accuracy"].how
    assert found.metrics["pass_at_k"].mean == 0.5 and found.metrics["pass_at_k"].how.startswith("k=2")
    assert [o["correct"] for o in found.outputs] == [True, True, True, False]
    assert found.outputs[0]["prompt"] == "p0" and found.outputs[0]["gold"] == "a0"


def test_it_is_asked_between_rows_and_tokens_and_counts_each_sample_once(loaded):
    """So a bar moves, and a budget or Ctrl-C stops it finely."""
    rows = problems(5)
    encoded = encode_all(rows, loaded.tokenizer, 64, "refuse")
    asked = [prompt_ids(s, loaded.tokenizer) for s in rows]
    held_out = HeldOut(encoded, learnt_bytes(encoded, loaded.tokenizer), rows, asked, harder=[(rows[0], asked[0])])
    told: list[int] = []
    examine(loaded, held_out, exact, Sampling(8, 2, 1.0, 0), CPU, loaded, loaded, progress=told.append)
    assert sum(told) == held_out.passes(2, 2) and told.count(0) >= 8

    class Enough(Exception):
        pass

    def stop(n):
        if len(told) > 6:
            raise Enough
        told.append(n)

    told.clear()
    with pytest.raises(Enough):
        examine(loaded, held_out, exact, Sampling(8, 2, 1.0, 0), CPU, progress=stop)


def test_token_metrics_are_there_and_a_model_is_its_own_twin(loaded):
    rows = problems(5)
    encoded = [encode(s, loaded.tokenizer) for s in rows]
    held_out = HeldOut(encoded, learnt_bytes(encoded, loaded.tokenizer), [], [])
    found = examine(loaded, held_out, exact, Sampling(8, 0, 1.0, 0), CPU, teacher=loaded, parent=loaded)
    for name in ("kl_to_teacher", "kl_from_teacher", "kl_parent"):
        assert found.metrics[name].mean == 0
    assert found.metrics["agreement"].mean == found.metrics["agreement_parent"].mean == 1
    assert found.metrics["bits_per_byte"].mean > 0 and 0 <= found.metrics["ece"].mean <= 1
    alone = examine(loaded, held_out, exact, Sampling(8, 0, 1.0, 0), CPU)
    assert set(alone.metrics) == {"bits_per_byte", "ece"}


def test_without_problems_it_writes_on_and_nobody_judges(loaded):
    rows = problems(2)
    encoded = [encode(s, loaded.tokenizer) for s in rows]
    held_out = HeldOut(encoded, learnt_bytes(encoded, loaded.tokenizer), [], [], [(list(encoded[0].ids[:3]), "p0")])
    found = examine(loaded, held_out, exact, Sampling(6, 2, 1.0, 0), CPU)
    assert found.outputs[0]["prompt"] == "p0"
    assert len(found.outputs) == 1 and found.outputs[0]["correct"] is None and "accuracy" not in found.metrics


def test_harder_problems_are_judged_apart(loaded, monkeypatch):
    """Scripted answers: greedy and one sample of the held-out problems, then of the harder ones."""
    rows, hard = problems(2), problems(4)[2:]
    scripts = iter([["a0", "a1"], ["a0", "x"], ["a2", "x"], ["x", "a3"]])

    def answers(model, prompts, sampling, temperature, seed, progress):
        return [Generated(tuple(loaded.tokenizer(t)["input_ids"]), 2, ()) for t in next(scripts)]

    monkeypatch.setattr(suite, "_answers", answers)
    prompts, harder = ([prompt_ids(s, loaded.tokenizer) for s in some] for some in (rows, hard))
    held_out = HeldOut([], [], rows, prompts, harder=list(zip(hard, harder, strict=True)))
    found = examine(loaded, held_out, exact, Sampling(8, 1, 1.0, 0), CPU)
    means = {name: interval.mean for name, interval in found.metrics.items()}
    assert means == {"accuracy": 1, "pass_at_k": 0.5, "accuracy_harder": 0.5, "pass_at_k_harder": 0.5}
    assert [o["prompt"] for o in found.outputs] == ["p0", "p1"] and held_out.passes(1, 1) == 8


def test_harder_problems_are_new_and_fit(loaded, tmp_path):
    """Prompts of the run are left out; where none is left, the message says what to do."""
    tasks = [TaskSource(name="gcd", size=6), TaskSource(name="lcm", size=6)]
    known = drawn("gcd", 6, 3, {})
    write_samples(tmp_path / "train.jsonl", known[:2])
    write_samples(tmp_path / "eval.jsonl", known[2:3])

    def held_out(context, **asked):
        wanted = Evaluate(**asked)
        encode = partial(encode_all, tokenizer=loaded.tokenizer, context=1000, too_long="drop")
        return hold_out(tmp_path, wanted, 3, loaded.tokenizer, context, encode)

    found = [s for s, _ in held_out(1000, harder=tasks).harder]
    assert {s.prompt_hash for s in known[3:]} < {s.prompt_hash for s in found}
    assert not {s.prompt_hash for s in known[:3]} & {s.prompt_hash for s in found}
    assert [s.task.name for s in found if s.task][:2] == ["gcd", "lcm"]
    assert len(held_out(1000, harder=tasks, problems=4).harder) == 4 and not held_out(1000).harder
    with pytest.raises(DataError, match=r"none of the problems of evaluate.harder .* data.context"):
        held_out(2, harder=tasks)
