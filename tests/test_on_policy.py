"""On-policy distillation, live and offline: nothing to learn from oneself, the same gradient however a step is split,
and a student that comes nearer to its teacher at what it writes itself."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from pydantic import ValidationError
from test_train_loop import FLOAT32
from test_train_rollout import CONTEXT, asked, gradient, judge, roller, student, tokenizer
from truth import fresh

from pennyweight.data.pack import Packer
from pennyweight.data.render import encode_all
from pennyweight.data.store import write_samples
from pennyweight.errors import DataError, MethodError, RecipeError
from pennyweight.methods import METHODS
from pennyweight.methods.on_policy import on_policy
from pennyweight.model.head import forward_hidden, head_of
from pennyweight.recipe import DenseTargets, HiddenTargets, TopKTargets
from pennyweight.recipe_file import parse
from pennyweight.records import Verdict
from pennyweight.rolling import Asked, Written, _logprobs, given_of, groups_of, steps, steps_of
from pennyweight.settings import OfflineMethod, OnPolicyMethod, Schedule, Tripwires
from pennyweight.teacher.local import LocalTeacher
from pennyweight.teacher.refusals import check_teacher
from pennyweight.train import loop
from pennyweight.train.checkpoint import Checkpoints
from pennyweight.train.loop import batch_loss, train
from pennyweight.watching import lookout

WAYS = [{}, {"signal": "token"}, {"divergence": "jsd", "group": 4, "rewarded": 0.3}, {"signal": "token", "updates": 2}]


def asks(teacher) -> Asked:
    local = LocalTeacher(replace(teacher, model=teacher.model.eval()), FLOAT32)
    told = lambda batch: _logprobs(local, batch)  # noqa: E731
    return Asked(told, told, local.dense)


def weighed(loaded, teacher, folder, micro, **settings):
    method = OnPolicyMethod(**{"max_tokens": 8, **settings})
    rolls = replace(roller(folder, loaded), method=method, groups=12 // method.group)
    made = rolls(0, True).first(method.first)
    signal = Written(made.groups, made.of, **vars(asks(teacher)))
    return [on_policy(b, method, signal) for b in made.batches(micro, 0)]


@pytest.mark.parametrize("settings", [w for w in WAYS if "rewarded" not in w])
def test_a_student_that_is_its_teacher_has_nothing_to_learn(tmp_path, settings):
    seed = fresh()
    loaded = student(seed)
    loss, slope = gradient(loaded, weighed(loaded, student(seed), tmp_path, 64, **settings))
    assert abs(loss) < 1e-5 and float(slope.norm()) < 1e-3, f"seed {seed}"


@pytest.mark.parametrize("settings", [*WAYS, {"first": 0.4}])
def test_any_split_gives_the_same_gradient(tmp_path, settings):
    seed = fresh()
    loaded, teacher = student(seed), student(seed + 1)
    loss, whole = gradient(loaded, weighed(loaded, teacher, tmp_path, 64, **settings))
    assert float(whole.norm()) > 1e-3
    for micro in (1, 5):
        again, parts = gradient(loaded, weighed(loaded, teacher, tmp_path, micro, **settings))
        assert again == pytest.approx(loss, rel=1e-4, abs=1e-6), f"seed {seed}"
        torch.testing.assert_close(parts, whole, atol=1e-5 * float(whole.norm()), rtol=0, msg=f"seed {seed}")


@pytest.mark.parametrize("settings", [{"signal": "token"}, {"rewarded": 0.5}, {"signal": "token", "rewarded": 0.5}])
def test_what_no_weight_depends_on_is_not_asked_of_the_head(tmp_path, settings, monkeypatch):
    """While the weights that wrote are those that learn, the ratio is 1 whatever the log-probabilities are."""
    seed = fresh()
    loaded, teacher = student(seed), student(seed + 1)
    batches = weighed(loaded, teacher, tmp_path, 5, group=2, **settings)
    now = [replace(b, policy=replace(b.policy, old=_logprobs(LocalTeacher(loaded, FLOAT32), b))) for b in batches]
    want, slope = gradient(loaded, now)
    monkeypatch.setattr(loop, "label_logprobs", None)
    with pytest.raises(TypeError):
        gradient(loaded, now)
    loss, mine = gradient(loaded, batches)
    assert loss == pytest.approx(want, rel=1e-4, abs=1e-5), f"seed {seed}"
    torch.testing.assert_close(mine, slope, atol=1e-4 * float(slope.norm()), rtol=0, msg=f"seed {seed}")


def test_one_token_of_the_kl_has_its_gradient_in_the_mean():
    """Over all tokens, each with the student's own probability, the policy's pull is the gradient of reverse KL."""
    g = torch.Generator().manual_seed(fresh())
    s, t = (torch.randn(7, generator=g, dtype=torch.float64) for _ in range(2))
    s.requires_grad_()
    log_s, log_t = torch.log_softmax(s, -1), torch.log_softmax(t, -1)
    (want,) = torch.autograd.grad((log_s.exp() * (log_s - log_t)).sum(), s, retain_graph=True)
    advantage = (log_t - log_s).detach()  # what on_policy gives each token that might have been written
    (made,) = torch.autograd.grad(-(log_s.detach().exp() * advantage * log_s).sum(), s)
    torch.testing.assert_close(made, want)


def test_only_the_first_tokens_are_learnt(tmp_path):
    loaded = student(1)
    whole = roller(tmp_path, loaded)(0, True)
    part = whole.first(0.5)
    for name, r in part.of.items():
        before = whole.of[name]
        assert len(r.logprobs) == -(-len(before.logprobs) // 2) == len(r.encoded.loss_positions)
        assert r.encoded.ids == before.encoded.ids[: len(r.encoded.ids)]


@pytest.mark.parametrize(("batch", "given"), [(16, 0.02), (16, 0.25), (9, 0.5), (3, 0.99), (2, 0.1)])
def test_given_samples_and_rollouts_make_one_step_together(batch, given):
    method, schedule = OnPolicyMethod(given=given), Schedule(batch=batch)
    assert given_of(schedule, method) >= 1 and groups_of(schedule, method) >= 1
    assert given_of(schedule, method) + groups_of(schedule, method) == batch
    assert given_of(schedule, OnPolicyMethod()) == 0
    with pytest.raises(RecipeError, match="train.batch=1 has room for one sample; set train.batch=2"):
        groups_of(Schedule(batch=1), method)


def test_given_samples_were_written_by_nobody_and_say_nothing_of_the_kl(tmp_path):
    """In the second step of a round: what is measured of rollouts is theirs, with given samples beside them or not."""
    seed = fresh()
    loaded, teacher = student(seed), student(seed + 1)
    method = OnPolicyMethod(max_tokens=8, group=2, rewarded=0.5, updates=2, given=0.5)
    rolls = replace(roller(tmp_path, loaded), method=method, groups=6)
    made = rolls(0, True)
    with torch.no_grad():
        loaded.model.lm_head.weight.mul_(1.2)
    signal = Written(made.groups, made.of, **vars(asks(teacher)))
    texts = [s.answered(f"now: {i}", "given", True) for i, s in enumerate(asked())]
    given = on_policy(Packer(encode_all(texts, tokenizer(), CONTEXT, "refuse"), 6, 6, 0, 0)(0)[0], method, signal)
    mine = [on_policy(b, method, signal) for b in made.batches(5, 0)]
    assert given.policy is None and given.kd_weight.sum() == given.count

    def measured(batches):
        copied = copy.deepcopy(loaded.model).train()
        forward = lambda b, m: batch_loss(copied, head_of(copied), b, FLOAT32, m)  # noqa: E731
        return loop._step(copied, torch.optim.SGD(copied.parameters(), 0.0), batches, forward, 1.0, True, loop.ALONE)[0]

    alone, beside = measured(mine), measured([given, *mine])
    assert alone["kl_old"] > 0
    for name in ("kl_old", "clipped"):
        assert beside[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-7), f"seed {seed}"


def fit(folder, loaded, next_batch, steps_in_all=30):
    schedule = Schedule(steps=steps_in_all, batch=12, lr=5e-3, warmup=0.1)
    train(
        loaded.model,
        next_batch,
        schedule=schedule,
        tripwires=Tripwires(),
        compute=FLOAT32,
        checkpoints=Checkpoints(folder / "checkpoints"),
        seed=0,
        admit=lambda ids: None,
        log=lambda line: None,
    )


def kl_at_its_own_text(folder, loaded, teacher) -> float:
    """Mean reverse KL at fresh rollouts of the student, in nats."""
    made = replace(roller(folder, loaded, groups=8), seed=99)(0, True)
    (batch,) = made.batches(1000, 0)
    with torch.no_grad():
        logs = [
            torch.log_softmax(
                head_of(m.model).logits(
                    forward_hidden(m.model.eval(), batch.ids, batch.positions).flatten(0, 1)[batch.selected]
                ),
                -1,
            )
            for m in (loaded, teacher)
        ]
    return float((logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean())


@pytest.mark.parametrize("settings", [{}, {"given": 0.5}, {"first": 0.5, "divergence": "forward_kl"}])
def test_the_student_comes_nearer(tmp_path, settings):
    loaded, teacher = student(3), student(4)
    before = kl_at_its_own_text(tmp_path / "before", loaded, teacher)
    method, schedule = OnPolicyMethod(max_tokens=8, **settings), Schedule(batch=12)
    rolls = replace(roller(tmp_path, loaded), method=method, groups=groups_of(schedule, method))
    texts = encode_all(
        [s.answered(f"now: {i}", "given", True) for i, s in enumerate(asked())], tokenizer(), CONTEXT, "refuse"
    )
    others = Packer(texts, 6, 6, 0, 0) if method.given else None
    next_batch = steps_of(rolls, on_policy, schedule, asks(teacher), lambda line: None, others)
    first = next_batch(0)
    own = {e.id for b in first for e in b.placed} - {e.id for e in texts}
    assert len(own) == (6 if method.given else 12) and sum(len(b.placed) for b in first) == 12
    fit(tmp_path, loaded, next_batch)
    after = kl_at_its_own_text(tmp_path / "after", loaded, teacher)
    assert after < 0.7 * before, (before, after)


@pytest.mark.parametrize("targets", [DenseTargets(), HiddenTargets(), TopKTargets(k=16)])
def test_offline_asks_the_teacher_once_and_comes_nearer(tmp_path, targets):
    loaded, teacher = student(3), student(4)
    before = kl_at_its_own_text(tmp_path / "before", loaded, teacher)
    local, lines = LocalTeacher(replace(teacher, model=teacher.model.eval()), FLOAT32), []
    schedule = Schedule(steps=40, batch=12, lr=5e-3)
    (tmp_path / "data").mkdir()
    write_samples(tmp_path / "data" / "train.jsonl", [s.answered("a", "given", True) for s in asked()])
    bench = SimpleNamespace(
        recipe=SimpleNamespace(train=schedule, targets=targets),
        folder=tmp_path,
        group=SimpleNamespace(size=1),
        context=CONTEXT,
        compute=FLOAT32,
        labelling=local,
        local=local,
        language=SimpleNamespace(vocabulary=len(tokenizer())),
    )
    told, written = [], SimpleNamespace(write=lines.append)
    ledger = SimpleNamespace(add_records=lambda samples, split, teacher: told.extend(samples))
    method = OfflineMethod(rollouts=48, max_tokens=8)
    make = lambda who: steps(  # noqa: E731
        bench, METHODS["offline"], method, who, "offline", 5, tmp_path / "work", ledger, written, judge, None
    )[0]
    next_batch = make(loaded)
    assert not told and not lines  # the loop's clock has what is written, and its targets
    fit(tmp_path, loaded, next_batch, 40)
    assert len(told) == 48 and [x["step"] for x in lines] == [1]
    assert kl_at_its_own_text(tmp_path / "after", loaded, teacher) < 0.7 * before
    if targets.kind != "dense":  # gone on with, nobody is asked again
        bench.labelling = SimpleNamespace(fingerprint=local.fingerprint, targets=None)
        again = make(student(9))
        for a, b in zip(next_batch(3), again(3), strict=True):
            assert torch.equal(a.ids, b.ids) and len(told) == 48
    assert [x["step"] for x in lines] == [1]
    shutil.rmtree(tmp_path / "work")
    with pytest.raises(DataError, match="are gone"):  # the weights are no longer those that were to write
        make(loaded)(3)


def test_what_does_not_go_together_is_refused():
    with pytest.raises(ValidationError, match="group=2 or more"):
        OnPolicyMethod(rewarded=0.5)
    with pytest.raises(ValidationError, match="set signal=whole"):
        OnPolicyMethod(signal="token", given=0.2)
    with pytest.raises(RecipeError, match="100 responses .method.rollouts."):
        groups_of(Schedule(), OfflineMethod(rollouts=100, group=8))


@pytest.mark.parametrize("kind", ["grpo", "on_policy", "offline"])
def test_recipes_that_leave_a_student_nothing_to_write_to_or_nobody_to_ask_are_refused_at_once(kind):
    table = {"name": "x", "student": {"kind": "folder", "path": "s"}, "method": {"kind": kind}}
    folder, files = {"kind": "folder", "path": "t"}, {"source": {"kind": "files", "path": "p.jsonl"}}
    with pytest.raises(RecipeError, match="has the student write to prompts, and data.source.kind=teacher_samples"):
        check_teacher(parse(table | {"teacher": folder}))
    check_teacher(parse(table | {"teacher": folder, "data": files}))
    if kind != "grpo":
        served = {"kind": "endpoint", "url": "http://127.0.0.1:8000/v1"}
        with pytest.raises(MethodError, match="behind a server"):
            check_teacher(parse(table | {"teacher": served, "data": files}))


def test_prompts_that_nobody_can_judge_are_looked_at_all_the_same(tmp_path):
    loaded, lines = student(1), []
    untold = [replace(s, task=None) for s in asked()]
    rolls = replace(roller(tmp_path, loaded), samples=untold, method=OnPolicyMethod(max_tokens=8))
    watch = lookout(rolls, Tripwires().rollouts, 4, untold, judge, lines.append, tmp_path, "on_policy-0")
    watch.look({"step": 1, **rolls(0, True).facts()})
    rows = [json.loads(line) for line in (tmp_path / watch.shown()[0]).read_text().splitlines()]
    assert {row["when"] for row in rows} == {"early", "late"} and [x["stage"] for x in lines] == ["rollout"]
    assert all(answer["correct"] is None for row in rows for answer in row["responses"])


@pytest.mark.parametrize("settings", [{}, {"group": 2}, {"group": 2, "rewarded": 0.3}])
@pytest.mark.parametrize("tasks", [True, False])
def test_a_student_that_is_never_right_is_taught_all_the_same(tmp_path, settings, tasks):
    """Nothing is earned in any of ten rounds, so every group is all alike; the teacher has its say at every token."""
    loaded, teacher = student(3), student(4)
    method, schedule = OnPolicyMethod(max_tokens=8, **settings), Schedule(steps=10, batch=12)
    never = lambda response, task: Verdict(False, None)  # noqa: E731
    prompts = asked() if tasks else [replace(s, task=None) for s in asked()]
    groups, limits = groups_of(schedule, method), Tripwires().rollouts
    rolls = replace(roller(tmp_path, loaded), samples=prompts, method=method, groups=groups, judge=never)
    watch = lookout(rolls, limits, 10, prompts, never, lambda line: None, tmp_path, "on_policy-0")
    next_batch = steps_of(rolls, on_policy, schedule, asks(teacher), watch.look)
    for step in range(10):
        assert next_batch(step) and watch.tripped is None, step
        assert not any(watch.watch.seen["bad"].get(rule) for rule in ("stuck", "reward", "hacking")), step
