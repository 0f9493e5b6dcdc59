"""Tripwires over rounds of rollouts: each trips where it should and nowhere else, success is no collapse, a hacked
reward is named, and what was seen goes through a checkpoint."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import pytest
import torch
from test_train_loop import FLOAT32
from test_train_rollout import CONTEXT, asked, nobody, student

from pennyweight.errors import RecipeError, Stopped, Tripped
from pennyweight.methods.grpo import grpo
from pennyweight.records import Task, Verdict
from pennyweight.report.page import render
from pennyweight.rolling import groups_of, reference_of, steps_of, trained_by
from pennyweight.settings import GrpoMethod, Reward, RolloutTripwires, Schedule, Tripwires
from pennyweight.train.checkpoint import Checkpoints
from pennyweight.train.loop import train
from pennyweight.train.rollout import Roller
from pennyweight.train.rollout_watch import CURES, RolloutWatch
from pennyweight.train.tripwire import Tripwire
from pennyweight.verifiers import VERIFIERS, judge
from pennyweight.watching import lookout

LIMITS = RolloutTripwires(patience=3)
HEALTHY = {
    "reward": 0.4, "reward_accuracy": 0.4, "entropy": 0.5, "length": 40.0, "cut_off": 0.1, "repeated": 0.05,
    "all_alike": 0.3, "stuck": 0.2, "groups": 16.0,
}  # fmt: skip

BEYOND = {
    "entropy_low": ({"entropy": 0.009}, {"entropy": 0.011}, "entropy collapsed"),
    "entropy_high": ({"entropy": 2.6}, {"entropy": 2.4}, "entropy exploded"),
    "length_low": ({"length": 3.9}, {"length": 4.1}, "shrank to almost nothing"),
    "length_high": ({"length": 801.0}, {"length": 799.0}, "keep growing"),
    "repeated": ({"repeated": 0.81}, {"repeated": 0.79}, "81% of what is written is repetition; 5% at the start"),
    "cut_off": ({"cut_off": 0.96}, {"cut_off": 0.94}, "96% of responses are cut off; 10% at the start"),
    "stuck": ({"stuck": 1.0}, {"stuck": 0.97}, "100% of the groups are all alike without being right"),
}
"""What trips, what just does not, and what is said."""


def seen(*rounds, limits=LIMITS, most=1.0, **how):
    watch = RolloutWatch(limits, most, **how)
    for facts in rounds:
        watch.see({**HEALTHY, **facts})
    return watch


@pytest.mark.parametrize("name", BEYOND)
def test_each_trips_once_it_has_held_and_not_below_its_limit(name):
    bad, near, words = BEYOND[name]
    start = [{}] * 6
    assert not seen(*start, *[near] * 50).tripped and not seen(*start, *[near] * 50).armed
    almost = seen(*start, bad, bad)
    assert almost.armed and not almost.tripped  # no checkpoint counts as good meanwhile
    assert not seen(*start, bad, bad, {}, bad, bad).tripped and not seen(*start, bad, bad, {}).armed
    reason, cure = seen(*start, bad, bad, bad).tripped
    assert words in reason and cure.startswith(CURES[name]) and "[tripwires.rollouts]" in cure


@pytest.mark.parametrize("name", BEYOND)
def test_what_has_solved_its_task_has_not_collapsed(name):
    bad = BEYOND[name][0]
    assert not seen(*[{}] * 6, *[{**bad, "reward": 0.95, "reward_accuracy": 0.95}] * 50).tripped
    whole = {**bad, "reward": 1.0, "reward_accuracy": 1.0, "all_alike": 1.0, "entropy": 0.0}
    assert not seen(*[{}] * 6, *[whole] * 50).tripped
    assert seen(*[{}] * 6, *[{**bad, "reward": 0.95}] * 3, most=2.0).tripped  # of two that can be earned


@pytest.mark.parametrize("name", ["repeated", "cut_off"])
def test_what_began_beyond_its_limit_is_not_held_against_the_run(name):
    assert not seen(*[BEYOND[name][0]] * 50).tripped


def test_low_entropy_that_doubles_is_no_explosion():
    assert not seen(*[{"entropy": 0.01}] * 5, *[{"entropy": 0.1}] * 20).tripped


def test_a_reward_that_falls_trips_and_one_that_is_noisy_does_not():
    reason, cure = seen(*[{"reward": 0.6}] * 9, *[{"reward": 0.1}] * 12).tripped
    assert "the reward fell" in reason and "was 0.6 at best" in reason and "train.lr" in cure
    assert not seen(*[{"reward": 0.6}] * 9, *[{"reward": 0.35}] * 50).tripped
    assert not seen(*[{"reward": 0.6}] * 9, {"reward": 0.0}, *[{"reward": 0.6}] * 9).tripped
    few = {"groups": 1.0}  # of one group a round, a lucky beginning proves nothing
    assert not seen(*[{**few, "reward": 0.4}] * 3, *[{**few, "reward": 0.1}] * 12).tripped
    risen = [{"reward": r / 20, "reward_accuracy": r / 20} for r in range(21)]
    assert not seen(*risen, *[{"reward": 1.0, "reward_accuracy": 1.0}] * 20).tripped


def test_nothing_is_held_against_a_reward_that_nothing_is_learnt_from():
    """Of on-policy distillation: with a teacher nothing is stuck, and without a pull no fall is a fall."""
    stuck, fallen = [{"stuck": 1.0}] * 20, [*[{"reward": 0.6}] * 9, *[{"reward": 0.0}] * 20]
    assert seen(*stuck).tripped and not seen(*stuck, limits=LIMITS.model_copy(update={"stuck": 1.0})).tripped
    assert not seen(*stuck, taught=True).tripped and not seen(*stuck, taught=True, pulls=False).tripped
    assert seen(*fallen).tripped and seen(*fallen, taught=True).tripped
    assert not seen(*fallen, taught=True, pulls=False).tripped
    thin = [{"entropy": 0.001}] * 5
    assert seen(*[{}] * 6, *thin, taught=True, pulls=False).tripped  # as it is watched without any reward
    assert not hacked([0.3, 0.3, 0.5, 0.8, 0.9, 0.9], [0.3] * 6, pulls=False)


def hacked(rewards, right, judged=True, most=1.0, accuracy=None, pulls=True, **limits):
    """What is said after a held-out check at every third round."""
    watch = RolloutWatch(RolloutTripwires(**limits), most, judged, pulls)
    for i, (reward, share) in enumerate(zip(rewards, right, strict=True)):
        for _ in range(3):
            watch.see({**HEALTHY, "reward": reward, "reward_accuracy": reward if accuracy is None else accuracy})
        watch.compare([n < round(64 * share) for n in range(64)])
        if watch.tripped:
            return i, watch.tripped
    return None


def test_a_reward_that_rises_while_held_out_accuracy_does_not_is_named():
    rises = [0.3, 0.3, 0.5, 0.8, 0.9, 0.9]
    at, (reason, cure) = hacked(rises, [0.3] * 6)
    assert at == 4 and "the reward is being hacked" in reason and "loophole" in cure
    assert "90% (" in reason and "30% (" in reason and "64 held-out problems" in reason
    assert hacked(rises, [0.3, 0.3, 0.3, 0.2, 0.1, 0.1])  # falls
    for fine in (
        [0.3, 0.3, 0.45, 0.75, 0.85, 0.85],  # rises with it
        [0.3, 0.3, 0.4, 0.5, 0.6, 0.6],  # rises more slowly
        [0.95] * 6,  # answers taken as most likely were right all along
    ):
        assert not hacked(rises, fine), fine
    assert not hacked([0.3, 0.33, 0.36, 0.38, 0.38, 0.39], [0.3, 0.28, 0.3, 0.27, 0.3, 0.3])  # noise
    assert not hacked(rises, [0.3] * 6, hacking=0.7)
    form = {"accuracy": 0.3, "most": 1.0}  # what rises is the reward of something else
    assert not hacked(rises, [0.3] * 6, **form) and hacked(rises, [0.3, 0.3, 0.2, 0.1, 0.05, 0.05], **form)
    assert hacked([2 * r for r in rises], [0.3] * 6, judged=False, most=2.0)


def test_what_was_seen_goes_through_json_at_any_round():
    rounds = [{}] * 6 + [{"reward": 0.6}] * 5 + [{"reward": 0.05, "entropy": 0.4}] * 12
    never = seen(*rounds)
    last = next(i for i in range(len(rounds)) if seen(*rounds[: i + 1]).tripped)
    rounds = rounds[: last + 1]
    never = seen(*rounds)
    for cut in range(last + 1):
        watch = RolloutWatch(LIMITS, 1.0)
        watch.restore(json.loads(json.dumps(seen(*rounds[:cut]).state())))
        for facts in rounds[cut:]:
            watch.see({**HEALTHY, **facts})
        assert watch.tripped == never.tripped and watch.state() == never.state()


def test_kl_trips_above_its_limit_only():
    for name, limit in (("kl_old", 0.5), ("kl_reference", 5.0)):
        wire = Tripwire(**Tripwires(patience=2).model_dump(exclude={"rollouts"}))
        feed = lambda value: wire.check(0.0, 1.0, None, None, spikes=False, kl={name: value})  # noqa: B023, E731
        assert not any(feed(0.9 * limit) for _ in range(20)) and not wire.armed
        assert not feed(1.1 * limit) and wire.armed
        assert "stayed above" in (feed(1.1 * limit) or "")


def starts_with_a_digit(response: str, task: Task) -> Verdict:
    return Verdict(any(c.isdigit() for c in response[:4]), response[:4])


@pytest.fixture
def loophole(monkeypatch):
    monkeypatch.setitem(VERIFIERS, "digit", starts_with_a_digit)


def fit(folder, steps=40, verifier=None, task="exact", stop_at=None, limits=None, form=0.0, every=1):
    loaded, lines = student(7), []
    method = GrpoMethod(group=4, max_tokens=8, reward=Reward(verifier=verifier, format=form))
    schedule = Schedule(steps=steps, batch=32, lr=1e-2, checkpoint_every=every, warmup=0.0)
    samples = [replace(s, task=Task("say", task, "a")) for s in asked(40)]
    groups, by = groups_of(schedule, method), trained_by(method, judge)
    roller = Roller(loaded, samples[8:], groups, method, by, 5, CONTEXT, folder, lambda told: None)
    wires = limits or RolloutTripwires()
    watch = lookout(roller, wires, steps, samples, judge, lines.append, folder, "grpo-0")
    count = iter(range(10**6))
    train(
        loaded.model,
        steps_of(roller, grpo, schedule, nobody(reference_of(loaded, method, FLOAT32)), watch.look),
        schedule=schedule,
        tripwires=Tripwires(rollouts=wires),
        compute=FLOAT32,
        checkpoints=Checkpoints(folder / "checkpoints"),
        seed=3,
        admit=lambda ids: None,
        log=lines.append,
        should_stop=lambda: stop_at is not None and next(count) + 1 == stop_at,
        watch=watch,
    )
    return watch.shown(), lines


def test_a_loophole_is_named_and_the_report_shows_it(tmp_path, loophole):
    with pytest.raises(Tripped, match=r"the reward is being hacked.*last good checkpoint is.*loophole"):
        fit(tmp_path, verifier="digit")
    rows = [json.loads(x) for x in (tmp_path / "rollouts" / "grpo-0.jsonl").read_text().splitlines()]
    assert [r["when"] for r in rows] == ["early"] * 3 + ["late"] * 3
    assert [r["prompt"] for r in rows[:3]] == [r["prompt"] for r in rows[3:]]
    late = [x for r in rows[3:] for x in r["responses"]]
    assert any(x["reward"] == 1 and not x["correct"] for x in late)


@pytest.mark.parametrize("every", [1, 100])
def test_the_last_good_checkpoint_is_the_last_that_a_held_out_check_passed(tmp_path, loophole, every):
    """However often checkpoints are written: those between the onset and the check that saw it do not count."""
    with pytest.raises(Tripped, match="the reward is being hacked") as stopped:
        fit(tmp_path, verifier="digit", every=every)
    at = int(str(stopped.value).split("step ")[1].split(":")[0])
    kept = Checkpoints(tmp_path / "checkpoints")
    good = kept.newest()
    assert good is not None and f"the last good checkpoint is {good};" in str(stopped.value)
    loose = RolloutTripwires(
        hacking=1.0
    )  # checks at every fourth round: two of them failed, and the one before did not
    assert good.name == f"step-{at - 1 - 2 * 4:08d}" and kept.back_to_good() == good
    shown, lines = fit(tmp_path, verifier="digit", every=every, limits=loose)  # goes on from there
    assert shown and min(x["step"] for x in lines if x.get("stage") == "rollout") == at - 2 * 4
    never, whole = fit(tmp_path / "never", verifier="digit", every=every, limits=loose)
    assert [x for x in whole if "reward" in x][at - 1 - 2 * 4 :] == [x for x in lines if "reward" in x]
    assert never == shown


def test_checkpoints_that_are_good_are_not_pruned(tmp_path):
    model, kept = student(1).model, Checkpoints(tmp_path)
    optimizer = torch.optim.AdamW(model.parameters())
    for step, good in ((0, True), (4, False), (5, True), (8, False), (12, False), (16, False)):
        kept.save(step, model, optimizer, {}, good=good)
    assert [p.name[-2:] for p in sorted(tmp_path.iterdir())] == ["05", "12", "16"]
    assert kept.newest() == tmp_path / "step-00000016"
    assert kept.back_to_good() == kept.newest() == tmp_path / "step-00000005"


def test_the_same_reward_that_is_also_what_is_asked_for_is_no_hack(tmp_path, loophole):
    shown, lines = fit(tmp_path, steps=25, task="digit")
    rewards = [x["reward"] for x in lines if "reward" in x]
    assert sum(rewards[-3:]) / 3 > sum(rewards[:3]) / 3 + 0.2 and shown == ["rollouts/grpo-0.jsonl"]
    checks = [x for x in lines if x.get("stage") == "held_out"]
    assert [x["step"] for x in checks] == list(range(1, 26, 2))
    assert checks[-1]["held_out_accuracy"] > checks[0]["held_out_accuracy"] and checks[0]["held_out_problems"] == 40
    page = render({"unfinished": True}, [{"arm": "grpo", "seed": 0, **x} for x in lines], [])
    assert "and held-out accuracy with it" in page


def test_a_stop_in_the_middle_of_something_wrong_does_not_forget_it(tmp_path, loophole):
    """Here entropy need only fall a little, as it does, so that it has to trip; how often that has held so far is known
    to the checkpoint alone."""
    limits = RolloutTripwires(entropy_low=0.7, patience=4, held_out_every=0)
    with pytest.raises(Tripped) as never:
        fit(tmp_path / "a", task="digit", limits=limits, form=1.0)
    at = int(str(never.value).split("step ")[1].split(":")[0])
    kept = Checkpoints(tmp_path / "a" / "checkpoints").newest()
    assert kept is not None and kept.name == f"step-{at - 4:08d}"  # the one before anything was wrong
    for stop_at in (at - 2, at - 3, 2):
        place = tmp_path / f"b{stop_at}"
        with pytest.raises(Stopped):
            fit(place, task="digit", limits=limits, stop_at=stop_at, form=1.0)
        with pytest.raises(Tripped) as again:
            fit(place, task="digit", limits=limits, form=1.0)
        assert str(again.value).split(";")[0] == str(never.value).split(";")[0]
        shutil.rmtree(place)


def test_a_verifier_that_is_not_there_is_refused():
    with pytest.raises(RecipeError, match="method.reward.verifier: no verifier is named 'gut'; use one of exact"):
        trained_by(GrpoMethod(reward=Reward(verifier="gut")), judge)
    assert trained_by(GrpoMethod(), judge) is judge
