"""One model measured: accuracy and pass@k by the verifier, token metrics, and text to look at where nothing judges."""

from __future__ import annotations

import pytest
from architectures import make, save_with_tokenizer

from pennyweight.data.render import encode, learnt_bytes, prompt_ids
from pennyweight.evaluate import suite
from pennyweight.evaluate.held_out import HeldOut
from pennyweight.evaluate.suite import Sampling, examine
from pennyweight.model.device import choose
from pennyweight.model.generate import Generated
from pennyweight.model.load import load
from pennyweight.records import Message, Sample, Task, Verdict

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

    def answers(model, prompts, sampling, temperature, seed):
        return [Generated(tuple(loaded.tokenizer(t)["input_ids"]), 2, ()) for t in next(scripts)]

    monkeypatch.setattr(suite, "_answers", answers)
    held_out = HeldOut([], [], rows, [prompt_ids(s, loaded.tokenizer) for s in rows])
    found = examine(loaded, held_out, exact, Sampling(8, 2, 1.0, 0), CPU)
    assert found.metrics["accuracy"].mean == 0.75 and "4 trials" in found.metrics["accuracy"].how
    assert found.metrics["pass_at_k"].mean == 0.5 and found.metrics["pass_at_k"].how.startswith("k=2")
    assert [o["correct"] for o in found.outputs] == [True, True, True, False]
    assert found.outputs[0]["prompt"] == "p0" and found.outputs[0]["gold"] == "a0"


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
