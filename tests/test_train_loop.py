"""The loop: any split of a batch gives the same gradient, stopped and resumed equals never stopped, tripwires hold."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pennyweight.data.pack import IGNORE, Packer, collate, first_fit, order, round_width
from pennyweight.errors import LedgerError, Tripped
from pennyweight.loss.divergence import DIVERGENCES, Divergence
from pennyweight.loss.signals import Dense
from pennyweight.model.device import choose
from pennyweight.model.head import forward_hidden, head_of
from pennyweight.model.projection import attach, detach
from pennyweight.records import Encoded
from pennyweight.settings import Schedule, Tripwires
from pennyweight.train.checkpoint import Checkpoints
from pennyweight.train.loop import batch_loss, train

V = 97
FLOAT32 = choose("cpu", "float32")


def model(seed=0, tied=True, hidden=32, layers=2):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=V,
        hidden_size=hidden,
        num_hidden_layers=layers,
        intermediate_size=48,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=tied,
        initializer_range=0.2,
        max_position_embeddings=128,
    )
    return LlamaForCausalLM(config)


def samples(n=24, seed=0):
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(n):
        length = int(torch.randint(6, 30, (1,), generator=g))
        ids = torch.randint(3, V, (length,), generator=g).tolist()
        prompt = int(torch.randint(1, length - 1, (1,), generator=g))
        out.append(Encoded(f"{i:064x}", tuple(ids), tuple(j >= prompt for j in range(length))))
    return out


def weighted(batch, teacher, kind, hidden=0.0):
    if kind == "sft":
        return batch.weighted(1.0, 0.0, Divergence(), None)
    with torch.no_grad():
        states = forward_hidden(teacher, batch.ids, batch.positions).flatten(0, 1)[batch.selected]
    target = Dense.live(states, head_of(teacher).logits)
    return batch.weighted(0.3, 0.7, Divergence(kind, 0.4, 1.5, 0.2), target, hidden=hidden)


def gradient(student, batches):
    student.zero_grad()
    count = sum(b.count for b in batches)
    for b in batches:
        (batch_loss(student, head_of(student), b, FLOAT32).loss / count).backward()
    return torch.cat([p.grad.flatten().double() for p in student.parameters()])


@pytest.mark.parametrize("kind", ["sft", *(k for k in DIVERGENCES if k != "tvd")])  # tvd's gradient has jumps
@pytest.mark.parametrize("tied", [True, False])
def test_any_split_of_a_batch_gives_the_same_gradient(kind, tied):
    seed = torch.seed() % 10**6
    data, student, teacher = samples(12, seed), model(seed + 1, tied), model(seed + 2)
    ways = {
        "one batch": [collate([[s] for s in data], 0)],
        "one by one": [collate([[s]], 0) for s in data],
        "uneven": [
            collate([[s] for s in data[:5]], 0),
            collate([[s] for s in data[5:6]], 0),
            collate([[s] for s in data[6:]], 0),
        ],
        "packed": [collate(first_fit(data, 64), 0)],
        "packed and split": [collate([row], 0, length=64) for row in first_fit(data, 64)],
    }
    grads = {name: gradient(student, [weighted(b, teacher, kind) for b in way]) for name, way in ways.items()}
    want = grads.pop("one batch")
    for name, got in grads.items():
        error = float((got - want).norm() / want.norm())
        assert error < 1e-6, f"seed {seed}, {name}: {error:.1e}"


@pytest.mark.parametrize("width", [32, 48])
def test_hidden_states_are_matched_position_by_position_however_the_batch_is_split(width):
    """Relative squared distance to the teacher's, through a trained map where the widths differ; against float64."""
    seed = torch.seed() % 10**6
    data, student, teacher = samples(9, seed), model(seed + 1), model(seed + 2, hidden=width)
    attach(student, 32, width, seed)

    def matched(rows):
        batch = collate(rows, 0)
        made = weighted(batch, teacher, "forward_kl")
        return batch.weighted(0.0, 0.0, made.divergence, made.target, hidden=0.5)

    want = gradient(student, [matched([[s] for s in data])])
    got = gradient(student, [matched([[s] for s in data[:4]]), matched(first_fit(data[4:], 64))])
    assert float((got - want).norm() / want.norm()) < 1e-6, f"seed {seed}"
    assert (len([n for n, _ in student.named_parameters() if "projection" in n]) == 1) == (width != 32)
    batch = matched([[s] for s in data])
    totals = batch_loss(student, head_of(student), batch, FLOAT32)
    with torch.no_grad():
        a, b = (
            forward_hidden(m, batch.ids, batch.positions).flatten(0, 1)[batch.selected].double()
            for m in (student, teacher)
        )
        a = a @ student.hidden_projection.weight.double().T if width != 32 else a
        error = float(((a - b).square().sum(-1) / b.square().sum(-1)).sum())
    assert totals.hidden == pytest.approx(error, rel=1e-5), f"seed {seed}"
    assert float(totals.loss.detach()) == pytest.approx(0.5 * error, rel=1e-5), f"seed {seed}"
    detach(student)
    assert not any("projection" in n for n, _ in student.named_parameters())


@pytest.mark.parametrize("kind", DIVERGENCES)
def test_teacher_equal_to_student_gives_loss_and_gradient_zero(kind):
    student = model(5)
    batch = collate([[s] for s in samples(6)], 0)
    same = weighted(batch, student, kind)
    same = same.weighted(0.0, 1.0, same.divergence, same.target)
    totals = batch_loss(student, head_of(student), same, FLOAT32)
    totals.loss.backward()
    assert float(totals.loss.detach()) == 0.0
    assert max(float(p.grad.abs().max()) for p in student.parameters()) < 1e-6


def test_labels_are_the_next_token_of_the_same_sample_only():
    data = samples(9)
    batch = collate(first_fit(data, 70), 0)
    assert batch.count == sum(len(s.loss_positions) for s in data)
    want = [s.ids[t + 1] for s in batch.placed for t in s.loss_positions]
    assert batch.loss_labels.tolist() == want
    assert int((batch.labels != IGNORE).sum()) == len(want)


def test_packer_is_a_function_of_the_step_and_goes_through_every_sample():
    data = samples(10)
    packer = Packer(data, batch=4, micro=2, seed=3, pad_id=0)
    seen = [s.id for step in range(5) for b in packer(step) for s in b.placed]
    assert sorted(seen) == sorted([s.id for s in data] * 2)
    again = [s.id for s in (x for b in Packer(data, 4, 2, 3, 0)(3) for x in b.placed)]
    assert again == [s.id for b in packer(3) for s in b.placed]
    assert all(b.ids.shape[0] <= 2 for b in packer(0))


def fit(folder, steps=12, stop_at=None, admit=lambda ids: None, lr=3e-3, seed=0, wires=None, poison=None):
    student = model(seed)
    packer = Packer(samples(24, seed), 6, 3, 1, 0)
    lines = []

    def next_batch(step):
        if poison is not None and step == poison:
            with torch.no_grad():
                student.model.norm.weight.fill_(float("nan"))
        return [b.weighted(1.0, 0.0, Divergence(), None) for b in packer(step)]

    asked = iter(range(10**6))
    outcome = train(
        student,
        next_batch,
        schedule=Schedule(steps=steps, batch=6, lr=lr, checkpoint_every=4, warmup=0.1),
        tripwires=wires or Tripwires(),
        compute=FLOAT32,
        checkpoints=Checkpoints(folder),
        seed=seed,
        admit=admit,
        log=lines.append,
        rewind=lambda step: lines.append({"rewind": step}),
        should_stop=lambda: stop_at is not None and next(asked) + 1 == stop_at,
    )
    return student, lines, outcome


def test_loss_falls(tmp_path):
    _, lines, _ = fit(tmp_path, steps=60)
    losses = [x["loss"] for x in lines if "loss" in x]
    assert losses[-1] < 0.5 * losses[0]


def test_a_record_that_the_ledger_does_not_know_is_refused(tmp_path):
    def admit(ids):
        if f"{7:064x}" in set(ids):
            raise LedgerError("unknown")

    with pytest.raises(LedgerError):
        fit(tmp_path, admit=admit)


def test_nan_stops_the_run_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(Tripped, match=r"step 7.*step-00000004"):
        fit(tmp_path, poison=6)
    student = model(0)
    optimizer = torch.optim.AdamW(student.parameters())
    assert Checkpoints(tmp_path).restore(student, optimizer)["step"] == 4
    assert all(bool(torch.isfinite(p).all()) for p in student.parameters())


def test_a_loss_spike_stops_the_run(tmp_path):
    with pytest.raises(Tripped, match="running mean"):
        fit(tmp_path, steps=60, lr=30.0, wires=Tripwires(loss_spike=1.5, patience=3))


def test_rows_are_filled_up_to_few_widths_and_by_little():
    widths = [round_width(n) for n in range(1, 5000)]
    assert all(0 <= w - n <= n / 16 for n, w in enumerate(widths, 1))
    for low in (16, 64, 1024):
        assert len({w for w in widths if low < w <= 2 * low}) == 16
    assert [round_width(w) for w in widths] == widths
    fewer = [round_width(n, 4) for n in range(1, 5000)]
    assert all(0 <= w - n <= n / 4 for n, w in enumerate(fewer, 1))
    assert len({w for w in fewer if 64 < w <= 128}) == 4


@pytest.mark.parametrize("context", [10, 64, 100, 250, 1003])
def test_packed_rows_have_few_widths_and_lose_nothing(context):
    data = samples(400)
    pack = Packer(data, 64, 4, 0, 0, pack=True, context=context)
    steps = [pack(step) for step in range(12)]
    for number, step in enumerate(steps):
        asked = [data[int(order(len(data), 0, i // 400)[i % 400])].id for i in range(64 * number, 64 * number + 64)]
        assert sorted(s.id for b in step for s in b.placed) == sorted(asked)
    batches = [b for step in steps for b in step]
    for b in batches:
        width = b.ids.shape[1]
        used = 1 + int((b.labels != IGNORE).nonzero()[:, 1].max())  # a row's last label is its last token
        assert used <= width <= (1.25 * used if used > context else min(context, 1.25 * used))
        learnt = [t for s in b.placed for t, m in zip(s.ids[1:], s.mask[1:], strict=True) if m]
        assert b.loss_labels.tolist() == learnt
    assert len({b.ids.shape[1] for b in batches}) <= 8
