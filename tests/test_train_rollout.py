"""Rollouts and what is learnt from them: deterministic, resumed bit for bit, split as one likes, and they do teach."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import replace
from functools import lru_cache

import pytest
import torch
from test_train_loop import FLOAT32
from transformers import LlamaConfig, LlamaForCausalLM
from truth import fresh

from pennyweight.errors import DataError, RecipeError, Stopped
from pennyweight.loss.chunked import label_logprobs
from pennyweight.loss.policy import advantages
from pennyweight.methods.grpo import grpo, response_weights
from pennyweight.model.head import forward_hidden, head_of
from pennyweight.model.loaded import Loaded
from pennyweight.model.tokenizer import train_tokenizer
from pennyweight.records import Message, Sample, Task, Verdict
from pennyweight.rolling import Asked, Written, askable, groups_of, reference_of, steps_of
from pennyweight.settings import GrpoMethod, Reward, Schedule, Tripwires
from pennyweight.train.checkpoint import Checkpoints
from pennyweight.train.loop import batch_loss, train
from pennyweight.train.rollout import Roller, alike, repeated
from pennyweight.verifiers.reward import of_the_script, rewards, thinks_first

CONTEXT = 40


@lru_cache(maxsize=1)
def tokenizer():
    return train_tokenizer([f"say {i} now: a b c d" for i in range(100)], 96, CONTEXT)


def asked(count: int = 12) -> list[Sample]:
    task = Task("say", "exact", "a")
    return [Sample((Message("user", f"say {i}"),), None, "tests", task=task) for i in range(count)]


def judge(response: str, task: Task) -> Verdict:
    """Responses whose first four characters hold a digit are right, so that most groups differ."""
    return Verdict(any(c.isdigit() for c in response[:4]), response[:4])


def student(seed: int) -> Loaded:
    t = tokenizer()
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(t),
        hidden_size=32,
        num_hidden_layers=2,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.2,
        max_position_embeddings=CONTEXT,
        bos_token_id=t.bos_token_id,
        eos_token_id=t.eos_token_id,
    )
    return Loaded(LlamaForCausalLM(config).train(), t, "tiny", "", "", 0, 0, CONTEXT)


def roller(folder, loaded, told=None, groups=4, **settings) -> Roller:
    method = GrpoMethod(**{"group": 4, "max_tokens": 8, **settings})
    record = told.extend if told is not None else lambda samples: None
    return Roller(loaded, asked(), groups, method, judge, 5, CONTEXT, folder, record)


def test_a_round_is_a_function_of_its_number_and_the_weights_and_is_kept(tmp_path):
    told: list[Sample] = []
    first = roller(tmp_path / "a", student(1), told)(3, True)
    assert roller(tmp_path / "b", student(1))(3, True) == first
    changed = student(2)  # what is kept is read, whatever the weights are by now
    assert roller(tmp_path / "a", changed)(3, False) == first
    assert roller(tmp_path / "c", changed)(3, True) != first != roller(tmp_path / "d", student(1))(4, True)
    with pytest.raises(DataError, match="are gone.*delete that checkpoint"):
        roller(tmp_path / "e", student(1))(3, False)
    rollouts = [r for group in first.every for r in group]
    assert {r.encoded.id.partition(":")[0] for r in rollouts} == {s.id for s in told}
    assert len({r.encoded.id for r in rollouts}) == len(rollouts) and all(s.author == "student" for s in told)


def test_a_thought_that_the_prompt_opened_is_part_of_the_response_that_is_judged(tmp_path):
    loaded = student(1)
    own = copy.deepcopy(loaded.tokenizer)
    own.chat_template = own.chat_template + "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}"
    seen: list[str] = []
    looks = lambda text, task: (seen.append(text), judge(text, task))[1]  # noqa: E731
    told: list[Sample] = []
    made = replace(roller(tmp_path, replace(loaded, tokenizer=own), told), judge=looks)(0, True)
    assert seen and all(text.startswith("<think>") and text.count("<think>") == 1 for text in seen)
    for r in (r for group in made.every for r in group):
        own_ids = r.encoded.ids[-len(r.logprobs) :]
        assert r.text.removeprefix("<think>") == own.decode(own_ids, skip_special_tokens=True)
    assert {s.response for s in told} == set(seen)


def test_log_probabilities_are_the_models_own(tmp_path):
    loaded = student(fresh())
    made = roller(tmp_path, loaded)(0, True)
    loaded.model.eval()
    for r in made.of.values():
        ids = torch.tensor([r.encoded.ids])
        with torch.no_grad():
            logits = torch.log_softmax(loaded.model(input_ids=ids[:, :-1]).logits[0], -1)
        start = len(r.encoded.ids) - len(r.logprobs)
        want = logits[start - 1 :].gather(-1, ids[0, start:, None]).squeeze(-1)
        torch.testing.assert_close(torch.tensor(r.logprobs), want, atol=1e-4, rtol=0)
        assert r.cut_off == (r.encoded.ids[-1] != loaded.tokenizer.eos_token_id) and len(r.logprobs) <= 8


def test_groups_that_differ_are_learnt_from_and_others_asked_in_place_of_the_rest(tmp_path):
    told: list[Sample] = []
    made = roller(tmp_path, student(fresh()), told, groups=6, dynamic=2.0)(0, True)
    assert len(made.groups) == 6 and 6 <= made.asked <= 12 and len(told) == 4 * made.asked
    differ = sum(not alike(g) for g in made.every)
    assert sum(not alike(g) for g in made.groups) == min(6, differ)
    assert made.asked == 12 or differ == 6
    assert made.left_out == made.asked - differ == round(made.facts()["all_alike"] * made.asked)
    assert Counter(len(g) for g in made.every) == {4: made.asked}
    plain = roller(tmp_path / "once", student(1), dynamic=1.0)(0, True)
    assert plain.asked == 4 == len(plain.groups)


def test_advantages_are_what_was_earned_above_the_group():
    earned = torch.tensor([[1.0, 0.0, 0.0, 1.0], [0.0, 0.0, 0.0, 1.0], [1.0, 1.0, 1.0, 1.0]])
    made = advantages(earned)
    assert made.mean(1).abs().max() < 1e-6 and made[2].abs().max() == 0
    torch.testing.assert_close(made[0].std(), torch.tensor(1.0), atol=1e-3, rtol=0)
    torch.testing.assert_close(advantages(earned, scaled=False)[1], torch.tensor([-0.25, -0.25, -0.25, 0.75]))


@pytest.mark.parametrize("over", ["token", "response", "constant"])
def test_weights_give_the_mean_that_is_asked_for(over):
    lengths, loss = (3, 1, 6), (torch.rand(3), torch.rand(1), torch.rand(6))
    weights = response_weights(lengths, over, 8)
    made = sum((w * x.sum() for w, x in zip(weights, loss, strict=True)), torch.zeros(())) / sum(lengths)
    want = {
        "token": torch.cat(loss).mean(),
        "response": torch.stack([x.mean() for x in loss]).mean(),
        "constant": torch.cat(loss).sum() / (3 * 8),
    }[over]
    torch.testing.assert_close(made, want)


def nobody(reference) -> Asked:
    """There is no teacher."""
    return Asked(reference, reference, reference)


def weighed(loaded, made, micro, **settings):
    method = GrpoMethod(**{"group": 4, "max_tokens": 8, **settings})
    signal = Written(made.groups, made.of, **vars(nobody(reference_of(loaded, method, FLOAT32))))
    return [grpo(b, method, signal) for b in made.batches(micro, 0, method.cut_off == "learnt")]


def gradient(loaded, batches):
    loaded.model.zero_grad()
    count = sum(b.count for b in batches)
    loss = 0.0
    for b in batches:
        part = batch_loss(loaded.model, head_of(loaded.model), b, FLOAT32).loss / count
        part.backward()
        loss += float(part.detach())
    return loss, torch.cat([p.grad.flatten().double() for p in loaded.model.parameters()])


LEFT_OUT = [{"cut_off": "left_out", "over": over} for over in ("token", "response", "constant")]


@pytest.mark.parametrize(
    "settings", [{}, {"over": "response", "scaled": False}, {"level": "sequence", "updates": 2}, *LEFT_OUT]
)
def test_any_split_gives_the_same_gradient_and_it_is_reinforces(tmp_path, settings):
    seed = fresh()
    loaded = student(seed)
    made = roller(tmp_path, loaded, **settings)(0, True)
    made = replace(made, groups=[[replace(r, cut_off=i % 3 == 1) for i, r in enumerate(g)] for g in made.groups])
    loss, whole = gradient(loaded, weighed(loaded, made, 16, **settings))
    for micro in (1, 3, 7):
        again, parts = gradient(loaded, weighed(loaded, made, micro, **settings))
        assert again == pytest.approx(loss, abs=1e-6), f"seed {seed}"
        torch.testing.assert_close(parts, whole, atol=1e-6 * float(whole.norm()), rtol=0, msg=f"seed {seed}")
    loaded.model.zero_grad()
    total = torch.zeros(())
    earned = torch.tensor([[r.reward for r in g] for g in made.groups], dtype=torch.float64)
    above = advantages(earned, settings.get("scaled", True)).flatten()
    worth = list(zip((r for g in made.groups for r in g), above, strict=True))
    if "cut_off" in settings:  # as if they were not there, once the groups' means are taken
        worth = [(r, a) for r, a in worth if not r.cut_off]
        assert len(worth) == 12
    rollouts = [r for r, _ in worth]
    weights = response_weights([len(r.logprobs) for r in rollouts], settings.get("over", "token"), 8)
    for (r, a), w in zip(worth, weights, strict=True):
        ids = torch.tensor([r.encoded.ids])
        logp = torch.log_softmax(loaded.model(input_ids=ids[:, :-1]).logits[0], -1)
        start = len(r.encoded.ids) - len(r.logprobs)
        total = total - a * w * logp[start - 1 :].gather(-1, ids[0, start:, None]).sum()
    (total / sum(len(r.logprobs) for r in rollouts)).backward()
    want = torch.cat([p.grad.flatten().double() for p in loaded.model.parameters()])  # the ratio is 1 at this point
    torch.testing.assert_close(whole, want, atol=2e-5 * float(want.norm()), rtol=0, msg=f"seed {seed}")


@pytest.mark.parametrize("over", ["token", "response", "constant"])
def test_responses_that_were_cut_off_can_be_left_out(tmp_path, over):
    loaded = student(1)
    made = roller(tmp_path, loaded)(0, True)
    kept = {name for name, r in made.of.items() if not r.cut_off}
    assert 0 < len(kept) < len(made.of)
    (batch,) = weighed(loaded, made, 64, cut_off="left_out", over=over)
    assert {e.id for e in batch.placed} == kept and batch.count == sum(len(made.of[n].logprobs) for n in kept)
    none = replace(made, groups=[[replace(r, cut_off=True) for r in g] for g in made.groups])
    (batch,) = weighed(loaded, none, 64, cut_off="left_out", over=over)  # a step is a step
    assert len(batch.placed) == len(made.of) and not batch.policy.weight.any()
    loss, slope = gradient(loaded, [batch])
    assert loss == 0 and not slope.any()


def test_the_reference_is_the_model_as_it_was(tmp_path):
    loaded = student(1)
    before = reference_of(loaded, GrpoMethod(kl=0.1), FLOAT32)
    (batch,) = roller(tmp_path, loaded)(0, True).batches(64, 0)
    first = before(batch)
    with torch.no_grad():
        own = forward_hidden(loaded.model.eval(), batch.ids, batch.positions).flatten(0, 1)[batch.selected]
        torch.testing.assert_close(first, label_logprobs(own, head_of(loaded.model), batch.loss_labels))
        loaded.model.lm_head.weight.mul_(2)
    assert torch.equal(before(batch), first)


def fit(folder, seed, steps, stop_at=None, lr=5e-3, **settings):
    loaded, lines = student(seed), []
    schedule = Schedule(steps=steps, batch=16, lr=lr, checkpoint_every=4, warmup=0.0, micro_batch=8)
    rolls = roller(folder, loaded, groups=groups_of(schedule, GrpoMethod(group=4, **settings)), **settings)
    asks = nobody(reference_of(loaded, rolls.method, FLOAT32))
    count = iter(range(10**6))
    train(
        loaded.model,
        steps_of(rolls, grpo, schedule, asks, lines.append),
        schedule=schedule,
        tripwires=Tripwires(),
        compute=FLOAT32,
        checkpoints=Checkpoints(folder / "checkpoints"),
        seed=seed,
        admit=lambda ids: None,
        log=lambda line: None,
        should_stop=lambda: stop_at is not None and next(count) + 1 == stop_at,
    )
    return loaded.model, lines


@pytest.mark.parametrize("stop_at", [2, 5, 7])
def test_stopped_and_resumed_is_never_stopped_bit_for_bit(tmp_path, stop_at):
    """With three steps to a round: stopped at its beginning, in its middle and at its end."""
    settings = {"updates": 3, "kl": 0.01}
    never, lines = fit(tmp_path / "a", 3, 9, **settings)
    with pytest.raises(Stopped):
        fit(tmp_path / "b", 3, 9, stop_at=stop_at, **settings)
    torch.manual_seed(999)  # what happened meanwhile must not matter
    resumed, more = fit(tmp_path / "b", 3, 9, **settings)
    for (name, a), (_, b) in zip(never.state_dict().items(), resumed.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert more == lines[len(lines) - len(more) :]


def test_what_is_rewarded_becomes_more(tmp_path):
    _, lines = fit(tmp_path, 7, 30, lr=1e-2, updates=1)
    earned = [x["reward"] for x in lines]
    assert sum(earned[-5:]) / 5 > sum(earned[:5]) / 5 + 0.2, earned


def test_what_cannot_be_done_is_said():
    with pytest.raises(RecipeError, match="not a whole number of groups"):
        groups_of(Schedule(batch=10), GrpoMethod(group=4))
    with pytest.raises(DataError, match="can be judged"):
        askable([replace(s, task=None) for s in asked()], tokenizer(), CONTEXT)
    assert len(askable([*asked(), *asked()], tokenizer(), CONTEXT)) == 12


def test_the_parts_of_a_reward():
    good = "<think>1 + 1 is 2</think> 2"
    assert thinks_first(good) and thinks_first(f"\n{good}\n")
    for bad in (
        "2",
        "<think></think>2",
        "<think>x</think>",
        f"so {good}",
        f"{good}<think>y</think>",
        "<think>a<think>b</think>c",
    ):
        assert not thinks_first(bad), bad
    assert of_the_script("What is it?", "it is это") == pytest.approx(4 / 7)
    assert of_the_script("무엇입니까?", "답은 2") == 1.0 and of_the_script(
        "무엇입니까?", "the answer 답"
    ) == pytest.approx(1 / 10)
    assert of_the_script("1 + 1", "two") == 1.0 and of_the_script("What?", "2") == 1.0
    parts = rewards("What?", good, 90, 100, Verdict(True, "2"))
    assert parts == {"accuracy": 1.0, "format": 1.0, "language": 1.0, "brevity": pytest.approx(0.5)}
    assert rewards("What?", "", 10, 100, Verdict(False, None))["brevity"] == 1.0
    assert set(parts) | {"verifier"} == set(Reward.model_fields)


def test_repetition_is_told_from_text():
    assert repeated([1, 2, 3, 4, 5, 6]) == 0.0 and repeated([1, 2]) == 0.0
    assert repeated([1, 2] * 20) > 0.9
