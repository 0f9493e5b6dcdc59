"""The options of training change nothing but time and memory: each beside the plain run, and what is refused.

That two processes train as one by them, too, is asked in test_train_parallel.py.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from architectures import make, save_with_tokenizer
from test_train_loop import FLOAT32, model, samples
from transformers import BloomConfig, BloomForCausalLM
from truth import fresh, off

import pennyweight
from pennyweight.bench import Bench
from pennyweight.data.pack import Packer, collate, first_fit
from pennyweight.errors import RecipeError, Stopped
from pennyweight.loss.divergence import Divergence
from pennyweight.model import options
from pennyweight.model.device import choose
from pennyweight.model.head import forward_hidden, head_of
from pennyweight.model.options import check_options, ready
from pennyweight.recipe_file import load, parse
from pennyweight.settings import Lora, Schedule, Tripwires
from pennyweight.train.checkpoint import Checkpoints
from pennyweight.train.loop import batch_loss, train

TINY = str(Path(__file__).resolve().with_name("tiny.toml"))


def gradient(student, batch, compute=FLOAT32, seed=0):
    """Loss a token and gradient of one batch, in training mode, its dropout drawn from ``seed``."""
    student.train().zero_grad()
    torch.manual_seed(seed)
    loss = batch_loss(student, head_of(student), batch.weighted(1.0, 0.0, Divergence(), None), compute).loss
    (loss / batch.count).backward()
    grads = [p.grad.flatten() for p in student.parameters() if p.grad is not None]
    return float(loss.detach()) / batch.count, torch.cat(grads)


def kept(student, batch):
    """Bytes that autograd keeps of a forward pass, parameters left out."""
    own, found = {p.untyped_storage().data_ptr() for p in student.parameters()}, {}

    def pack(t):
        if t.untyped_storage().data_ptr() not in own:
            found[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes(), t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        forward_hidden(student.train(), batch.ids, batch.positions)
    return sum(n for n, _ in found.values())


def with_factors(student, lora, seed):
    """``student`` with factors away from where they begin."""
    ready(student, Schedule(lora=lora), seed)
    g = torch.Generator().manual_seed(seed)
    for p in student.parameters():
        if p.requires_grad:
            p.data += 0.05 * torch.randn(p.shape, generator=g)
    return student


def fit(folder, schedule, stop_at=None, seed=3):
    """Weights after a training in that way, and the loss of each step that was taken."""
    student, losses = model(seed), []
    ready(student, schedule, seed)
    packer = Packer(samples(24, seed), schedule.batch, schedule.micro_batch or 9, 1, 0, schedule.pack, 64)
    train(
        student,
        lambda step: [b.weighted(1.0, 0.0, Divergence(), None) for b in packer(step)],
        schedule=schedule,
        tripwires=Tripwires(),
        compute=FLOAT32,
        checkpoints=Checkpoints(folder),
        seed=seed,
        admit=list,
        log=lambda line: losses.append(line["loss"]),
        should_stop=lambda: len(losses) == stop_at,
    )
    return {n: p.detach() for n, p in student.named_parameters()}, losses


def stopped_and_resumed(folder, schedule):
    """Weights and losses of a training that was never stopped, and of one that was, after half of the steps."""
    whole = fit(folder / "whole", schedule)
    with pytest.raises(Stopped):
        fit(folder / "parts", schedule, stop_at=schedule.steps // 2)
    return whole, fit(folder / "parts", schedule)


# Gradient checkpointing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["llama", "gemma3-window", "qwen3-moe", "deepseek-v3", "gpt2"])
def test_checkpointing_computes_the_same_and_keeps_less(name, dtype):
    """Bit for bit that of the plain run where attention is the same kernel; gpt2 drops out, the same numbers again."""
    seed = fresh()
    plain, alike, saving = (make(name, seed) for _ in range(3))
    ready(saving, Schedule(gradient_checkpointing=True), seed)
    alike.plain_attention = True
    batch, compute = collate([[s] for s in samples(6, seed)], 0), choose("cpu", dtype)
    (near, nearly), (want, wanted), (got, gotten) = (gradient(m, batch, compute, seed) for m in (plain, alike, saving))
    assert got == want and torch.equal(gotten, wanted), f"seed {seed}"
    if dtype == "float32":
        assert got == pytest.approx(near, rel=1e-5) and off(gotten, nearly) < 1e-5, f"seed {seed}"
    assert kept(saving, batch) < 0.5 * kept(plain, batch)


@pytest.mark.parametrize("base", ["full", "int4"])
def test_checkpointing_draws_the_dropout_of_factors_again(base):
    pytest.importorskip("peft", reason="needs peft: pip install 'pennyweight[lora]'")
    seed = fresh()
    plain, saving = (with_factors(model(seed), Lora(rank=4, dropout=0.4, base=base), seed) for _ in range(2))
    ready(saving, Schedule(gradient_checkpointing=True), seed)
    batch = collate([[s] for s in samples(6, seed)], 0)
    (want, wanted), (got, gotten) = (gradient(m, batch, seed=seed) for m in (plain, saving))
    assert got == pytest.approx(want, rel=1e-5) and off(gotten, wanted) < 1e-5, f"seed {seed}"
    assert off(gradient(plain, batch, seed=seed + 1)[1], wanted) > 0.01  # dropout is there


def test_all_that_needs_no_compiler_stopped_and_resumed_is_never_stopped_bit_for_bit(tmp_path):
    pytest.importorskip("peft", reason="needs peft: pip install 'pennyweight[lora]'")
    lora = Lora(rank=4, base="int8", dropout=0.3)
    settings = {"steps": 6, "batch": 9, "micro_batch": 2, "lora": lora, "gradient_checkpointing": True, "pack": True}
    whole, again = stopped_and_resumed(tmp_path, Schedule(**settings))
    assert whole[1][3:] == again[1] and all(torch.equal(p, again[0][n]) for n, p in whole[0].items())


# Packing


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-biases", "gemma3-window", "deepseek-v3"])
def test_packed_rows_give_the_loss_and_gradient_of_rows_of_one_sample(name):
    seed = fresh()
    student, data = make(name, seed), samples(10, seed)
    packed = collate(first_fit(data, 64), 0)
    assert len(packed.ids) < len(data)
    (want, wanted), (got, gotten) = (gradient(student, b) for b in (collate([[s] for s in data], 0), packed))
    assert got == pytest.approx(want, rel=1e-5) and off(gotten, wanted) < 1e-5, f"seed {seed}"


@pytest.mark.parametrize("name", ["llama", "gemma2-softcap-and-window"])
def test_no_token_reads_another_sample_of_its_row(name):
    """The derivative of one sample's states with respect to the embeddings of all others is zero, and not its own."""
    seed = fresh()
    student, data = make(name, seed), samples(3, seed)
    batch = collate([data], 0)
    table = student.get_input_embeddings()
    seen = []
    table.register_forward_hook(lambda module, given, out: seen.append(out.requires_grad_()) or out)
    states, ends = forward_hidden(student, batch.ids, batch.positions)[0], []
    for s in data:
        ends.append((ends[-1] if ends else 0) + len(s.ids) - 1)
    for start, end in zip([0, *ends], ends, strict=False):
        (to,) = torch.autograd.grad(states[start:end].square().sum(), seen[0], retain_graph=True)
        outside = torch.cat([to[0, :start], to[0, end:]])
        assert float(outside.abs().max()) == 0.0 and float(to[0, start:end].norm()) > 0, f"seed {seed}"


def test_packing_is_looked_at_again_when_a_student_is_to_be_trained(tmp_path):
    """Its start may have been made, and a stage of it finished, when the recipe did not pack."""
    torch.manual_seed(0)
    bloom = BloomForCausalLM(BloomConfig(vocab_size=113, hidden_size=32, n_layer=2, n_head=4, bos_token_id=1))
    folder = str(save_with_tokenizer(bloom, tmp_path / "bloom", chat=False))
    asked = {"name": "x", "teacher": {"kind": "folder", "path": folder}, "student": {"kind": "folder", "path": folder}}
    assert Bench(parse(asked), tmp_path).to_train(folder, 0).params
    with pytest.raises(RecipeError, match="samples in one row of a BloomForCausalLM would see each other"):
        Bench(parse({**asked, "train": {"pack": True}}), tmp_path).to_train(folder, 0)


# torch.compile


@pytest.fixture(scope="module")
def compiler():
    try:
        check_options(model(), Schedule(compile=True))
    except RecipeError as e:
        pytest.skip(str(e))


def test_compiled_blocks_compute_the_same_and_are_shared(compiler, tmp_path):
    """Packed rows, so that what keeps samples apart is compiled, too; stopped and resumed is never stopped."""
    from torch._dynamo.utils import counters

    settings = {"steps": 4, "batch": 9, "pack": True}
    _, plain = fit(tmp_path / "plain", Schedule(**settings))
    before = counters["stats"]["unique_graphs"]
    whole, again = stopped_and_resumed(tmp_path, Schedule(**settings, compile=True))
    assert counters["stats"]["unique_graphs"] == before + 1  # of three students of two blocks each
    assert whole[1] == pytest.approx(plain, rel=1e-5)
    assert whole[1][2:] == again[1] and all(torch.equal(p, again[0][n]) for n, p in whole[0].items())


@pytest.fixture
def not_yet_asked():
    options._check_compiler.cache_clear()
    yield
    options._check_compiler.cache_clear()


def test_without_a_compiler_the_run_ends_before_anything_is_written(not_yet_asked, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CXX", raising=False)
    with pytest.raises(RecipeError) as refused:
        pennyweight.run(TINY, ["train.compile=true"], tmp_path / "run")
    said = str(refused.value)
    assert "needs a C++ compiler, and there is no" in said and said.endswith("or set train.compile=false")
    assert not (tmp_path / "run" / "data").exists() and not (tmp_path / "run" / "arms").exists()


def test_a_compiler_that_does_not_work_is_refused_with_what_it_said(not_yet_asked, monkeypatch):
    def broken(function):
        raise RuntimeError("fatal error: Python.h is not there\nand much more")

    monkeypatch.setenv("CXX", sys.executable)  # it is there
    monkeypatch.setattr(torch, "compile", broken)
    with pytest.raises(RecipeError, match=r"does not work here \(fatal error: Python.h is not there\); install"):
        check_options(model(), Schedule(compile=True))


# What cannot be


def no_checkpointing(student):
    student.supports_gradient_checkpointing = False


def no_blocks(student):
    student.config.num_hidden_layers = 7


@pytest.mark.parametrize(
    ("spoil", "asked", "said"),
    [
        (no_checkpointing, {"gradient_checkpointing": True}, "LlamaForCausalLM has no gradient checkpointing; set"),
        (no_blocks, {"lora": Lora()}, "which train.lora works on, could not be found; leave train.lora out"),
        (no_blocks, {"compile": True}, "which train.compile works on, could not be found; leave train.compile out"),
        (vars, {"lora": Lora(rank=49)}, "train.lora.rank=49 is more than .* which is 32 at most; set a smaller"),
    ],
)
def test_what_a_student_cannot_is_said_and_leaves_it_as_it_was(spoil, asked, said):
    pytest.importorskip("peft", reason="needs peft: pip install 'pennyweight[lora]'")
    student = model()
    spoil(student)
    before = dict(student.named_modules())
    for refuse in (lambda: check_options(student, Schedule(**asked)), lambda: ready(student, Schedule(**asked), 0)):
        with pytest.raises(RecipeError, match=said):
            refuse()
    assert dict(student.named_modules()) == before and all(p.requires_grad for p in student.parameters())


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            [
                "student.kind=shape",
                *(f"student.shape.{k}" for k in ("hidden=8", "layers=1", "heads=1", "intermediate=8")),
            ],
            "student.kind=shape makes them at random; leave train.lora out",
        ),
        (["teacher.schedule.gradient_checkpointing=true"], "leave them out of teacher.schedule"),
        (["train.precision=fp8"], "lora trains in compute.dtype only; set precision=full"),
        (["train.lora=true"], "train.lora is a table of settings"),
    ],
)
def test_recipes_that_mean_nothing_are_refused_in_one_sentence(settings, said):
    with pytest.raises(RecipeError) as refused:
        load(TINY, ["train.lora.rank=4", *settings])
    assert said in str(refused.value) and "\n" not in str(refused.value)
