"""Distillation end to end beside TRL's GKD trainer: the same students, tokens, batches, steps and optimizer.

    python -m benchmarks.end_to_end [STEPS] [ROUNDS]

stories260K cut to 2 of its 5 layers, the teacher's own samples at temperature 1 as data, written once for both sides,
one CPU thread. TRL runs off-policy (lmbda=0) with beta=0, which is its KL(teacher || student): summed over positions
whose label is not -100, divided by their number. It gets what was the fastest for it here: tokens and labels ready
made, the whole batch at once, fused AdamW, and no padding mask (padding is on the right, where causal attention never
looks); no checkpointing, evaluation, logging or saving. Compiling it gains nothing over eager, liger needs a GPU.

Both sides begin at the same folders and end with a trained student in memory; ours tokenises, keeps its ledger, its
checkpoints and its log, and saves the student within its time, as a run does. Round r trains on data order r, so that
rounds are seeds; sides take turns within a round, in turned order from one round to the next. That both sides have the
same objective, schedule and optimizer is checked first, on a few steps with live targets: the losses must be equal.
"""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import shutil
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.bars import Bars, machine, real
from pennyweight.bench import Bench
from pennyweight.evaluate.agreement import as_scorer, score
from pennyweight.evaluate.intervals import over_seeds, ratio
from pennyweight.model.device import peak
from pennyweight.recipe import Recipe
from pennyweight.recipe_file import distillation
from pennyweight.records import Encoded, Interval
from pennyweight.run_folder import Run
from pennyweight.stages import Line, an_arm, the_data, the_starts, the_targets, the_teacher
from pennyweight.train.journal import Journal
from pennyweight.train.optim import lr_at

BATCH = 32
STEPS = 120  # about 4 epochs
ROUNDS = 3
CHECKED = 3  # steps of the check that both sides do the same
SAMPLES, HELD_OUT = 1200, 0.2  # written by the teacher; share of them kept for measuring
BUSY = 1.1  # seconds by the clock to one of the processor, above which seconds by the clock mean little
KL_TOLERANCE = 0.002
"""How far above 1 the ratio of held-out KLs may lie and still count as equal: both sides take the same batches, so the
difference is what sampling the targets costs."""


@dataclass
class Spent:
    """Seconds by the clock and of the processor, all threads."""

    wall: float = 0.0
    cpu: float = 0.0


@dataclass
class Trained:
    """What one side did in one round. ``labelling`` is zero where the teacher runs live; ``loss`` is the mean over the
    steps that were logged, ``kl`` (held-out samples,) their KL(teacher || student), its mean being nats a token."""

    folder: Path
    labelling: Spent
    training: Spent
    loss: float
    tokens: int
    loss_tokens: int
    kl: np.ndarray = field(default_factory=lambda: np.zeros(0))


@contextmanager
def spending() -> Iterator[Spent]:
    gc.collect()
    out, wall, cpu = Spent(), time.perf_counter(), time.process_time()
    yield out
    out.wall, out.cpu = time.perf_counter() - wall, time.process_time() - cpu


def recipe_of(steps: int, seeds: int, dtype: str = "float32", targets: str = "sampled") -> Recipe:
    settings = [f"data.source.count={SAMPLES}", f"data.eval_fraction={HELD_OUT}", "data.source.temperature=1.0"]
    settings += ["compute.threads=1", "compute.device=cpu", f"compute.dtype={dtype}", f"targets.kind={targets}"]
    return distillation(
        teacher=str(real("stories260K")),
        cut="layers=2",
        steps=steps,
        batch=BATCH,
        seeds=seeds,
        settings=[*settings, "quantize.formats=[]"],
    )


def prepare(folder: Path, seeds: int) -> None:
    """Teacher, untouched student and data: what every side starts from."""
    recipe = recipe_of(1, seeds)
    bench = Bench(recipe, folder)
    with Run(folder, recipe, partial(peak, bench.compute.device)) as run, Line(run, bench) as line:
        teacher = the_teacher(line)
        the_starts(line, teacher)
        the_data(line, teacher)


def order_of(prepared: Path, steps: int, seed: int, seeds: int) -> list[Encoded]:
    """The samples of all steps, one after the other, in the order in which ours trains on them."""
    recipe = recipe_of(steps, seeds)
    batches = Bench(recipe, prepared).batches(recipe.train, seed)
    return [sample for step in range(steps) for batch in batches(step) for sample in batch.placed]


def ours(
    prepared: Path, place: Path, steps: int, seed: int, seeds: int, dtype: str = "float32", targets: str = "sampled"
) -> Trained:
    """The stages of a run: label the training tokens, train one arm on them."""
    shutil.copytree(prepared, place)
    recipe = recipe_of(steps, seeds, dtype, targets)
    bench = Bench(recipe, place)
    with Run(place, recipe, partial(peak, bench.compute.device)) as run, Line(run, bench) as line:
        teacher = the_teacher(line)
        start, data = the_starts(line, teacher)[seed], the_data(line, teacher)
        with spending() as labelling:
            labelled = the_targets(line, teacher, data)
        with spending() as training:
            arm = an_arm(line, "kd", seed, start, teacher, data, labelled)
        losses = [x["loss"] for x in Journal(place / "metrics.jsonl").read()]
    samples = order_of(prepared, steps, seed, seeds)
    counted = sum(len(s.loss_positions) for s in samples)
    student = place / next(iter(arm.outputs))
    return Trained(student, labelling, training, statistics.fmean(losses), arm.facts["tokens"], counted)


class Collate:
    """Rows of ready tokens -> a padded batch as TRL's trainer wants it; counts what it hands over."""

    def __init__(self, pad_id: int):
        self.pad_id, self.tokens, self.loss_tokens = pad_id, 0, 0

    def __call__(self, rows: list[dict[str, list[int]]]) -> dict[str, Tensor]:
        width = max(len(r["input_ids"]) for r in rows)
        ids = torch.full((len(rows), width), self.pad_id)
        labels = torch.full((len(rows), width), -100)
        for i, r in enumerate(rows):
            size = len(r["input_ids"])
            ids[i, :size] = torch.tensor(r["input_ids"])
            labels[i, :size] = torch.tensor(r["labels"])
            self.tokens += size
        self.loss_tokens += int((labels[:, 1:] != -100).sum())
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}


def trl(prepared: Path, place: Path, steps: int, seed: int, seeds: int, dtype: str = "float32") -> Trained:
    """TRL's GKDTrainer, off-policy, on the very batches of ours."""
    gkd, transformers = importlib.import_module("trl.experimental.gkd"), importlib.import_module("transformers")
    dataset = importlib.import_module("datasets").Dataset
    s = recipe_of(steps, seeds).train
    samples = order_of(prepared, steps, seed, seeds)
    # The first token is predicted by nothing; the trainer would still count it when it divides.
    labels = [[i if m and n else -100 for n, (i, m) in enumerate(zip(x.ids, x.mask, strict=True))] for x in samples]
    start = prepared / "arms" / "base-0"
    with spending() as training:
        student = transformers.AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32)
        teacher = transformers.AutoModelForCausalLM.from_pretrained(real("stories260K"), dtype=torch.float32)
        tokenizer = transformers.AutoTokenizer.from_pretrained(start)
        collate = Collate(student.config.pad_token_id or 0)
        settings = gkd.GKDConfig(
            output_dir=str(place),
            lmbda=0.0,
            beta=0.0,
            temperature=1.0,
            per_device_train_batch_size=BATCH,
            max_steps=steps,
            train_sampling_strategy="sequential",
            learning_rate=s.lr,
            weight_decay=s.weight_decay,
            adam_beta1=s.beta1,
            adam_beta2=s.beta2,
            max_grad_norm=s.clip,
            bf16=dtype == "bfloat16",
            gradient_checkpointing=False,
            max_length=None,
            use_cpu=True,
            dataloader_pin_memory=False,
            dataloader_num_workers=0,
            eval_strategy="no",
            logging_strategy="no",
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        )
        trainer = gkd.GKDTrainer(
            model=student,
            teacher_model=teacher,
            args=settings,
            data_collator=collate,
            train_dataset=dataset.from_dict({"input_ids": [list(x.ids) for x in samples], "labels": labels}),
            processing_class=tokenizer,
        )
        trainer.remove_callback(transformers.PrinterCallback)
        trainer.create_optimizer()
        share = partial(lr_at, steps=s.steps, lr=1.0, shape=s.shape, warmup=s.warmup, decay=s.decay, floor=s.floor)
        trainer.lr_scheduler = torch.optim.lr_scheduler.LambdaLR(trainer.optimizer, share)
        loss = trainer.train().training_loss
    student.save_pretrained(place)
    tokenizer.save_pretrained(place)
    return Trained(place, Spent(), training, loss, collate.tokens, collate.loss_tokens)


Side = Callable[[Path, Path, int, int, int], Trained]
PEER, OURS = "TRL, float32", "ours, float32"
SIDES: dict[str, tuple[Side, bool]] = {
    PEER: (trl, True),
    OURS: (ours, True),
    "ours, float32, live": (partial(ours, targets="dense"), False),
    "TRL, bfloat16": (partial(trl, dtype="bfloat16"), False),
    "ours, bfloat16": (partial(ours, dtype="bfloat16"), False),
}
"""Name -> how it trains, and whether it takes part in every round or in the first alone."""


def check_equal(prepared: Path, scratch: Path) -> None:
    """Warm up, and stop unless a few steps with live targets give both sides the same losses."""
    theirs = trl(prepared, scratch / "trl", CHECKED, 0, 1)
    mine = ours(prepared, scratch / "ours", CHECKED, 0, 1, targets="dense")
    ours(prepared, scratch / "warm", CHECKED, 0, 1)
    off = abs(theirs.loss / mine.loss - 1)
    print(f"mean loss of {CHECKED} steps: TRL {theirs.loss:.6f}, ours with live targets {mine.loss:.6f}", flush=True)
    assert off < 1e-4, f"the two sides do not do the same: their losses differ by {off:.2e}"


def measure(prepared: Path, folder: Path, sides: list[Trained]) -> None:
    """Held-out KL(teacher || student) of every student, in float32."""
    bench = Bench(recipe_of(1, 1), folder)
    held_out, teacher = bench.held_out, as_scorer(bench.teacher, bench.compute.measuring)
    for side in sides:
        student = as_scorer(bench.opened(side.folder), bench.compute.measuring)
        scored = score(held_out.encoded, held_out.bytes, student, teacher, bench.teacher.pad_id)
        side.kl = scored.kl_to * (len(scored.tokens) / scored.tokens.sum())


def table(rounds: dict[str, list[Trained]]) -> None:
    """Medians over rounds; ratios to TRL in float32 of the same rounds: labelling and training, training alone."""
    heads = ["rounds", "labelling, s", "training, s", "both / TRL", "training / TRL"]
    heads += ["processor, s", "both / TRL", "training / TRL"]
    print(f"{'':<20} {'  '.join(heads)}  {'KL, nats':<25} KL / TRL")
    for name, all_of in rounds.items():
        cells = [
            str(len(all_of)),
            f"{statistics.median(x.labelling.wall for x in all_of):.1f}",
            f"{statistics.median(x.training.wall for x in all_of):.1f}",
            *(f"{x:.3f}" for x in against(rounds, name, "wall")),
            f"{statistics.median(x.labelling.cpu + x.training.cpu for x in all_of):.1f}",
            *(f"{x:.3f}" for x in against(rounds, name, "cpu")),
        ]
        row = "  ".join(f"{cell:>{len(head)}}" for cell, head in zip(cells, heads, strict=True))
        kl = ratio(np.mean([x.kl for x in all_of], 0), np.ones(len(all_of[0].kl)), 0)
        print(f"{name:<20} {row}  {kl.mean:.4f} ({kl.low:.4f} to {kl.high:.4f}) {over_peer(rounds, name).mean:>8.4f}")
    waited = max(x.training.wall / x.training.cpu for all_of in rounds.values() for x in all_of)
    if waited > BUSY:
        print(f"others had the machine too: the clock ran up to {waited:.2f} times the processor; measure again")


def over_peer(rounds: dict[str, list[Trained]], name: str) -> Interval:
    """Held-out KL of a side over TRL's in float32 on the same rounds; bootstrap over samples, paired."""
    pairs = list(zip(rounds[name], rounds[PEER], strict=False))
    return ratio(np.sum([a.kl for a, _ in pairs], 0), np.sum([b.kl for _, b in pairs], 0), 0)


def against(rounds: dict[str, list[Trained]], name: str, clock: str) -> tuple[float, float]:
    """Median over rounds of a side's seconds over TRL's in float32, with labelling and without."""
    pairs = list(zip(rounds[name], rounds[PEER], strict=False))
    seconds = [[getattr(x, clock) for x in (a.labelling, a.training, b.training)] for a, b in pairs]
    return statistics.median((a + b) / c for a, b, c in seconds), statistics.median(b / c for _, b, c in seconds)


def judge(rounds: dict[str, list[Trained]]) -> None:
    by_seed = [float(a.kl.sum() / b.kl.sum()) for a, b in zip(rounds[OURS], rounds[PEER], strict=True)]
    kl, of_seeds = over_peer(rounds, OURS), over_seeds(by_seed) if len(by_seed) > 1 else None
    told = f"; {of_seeds.low:.5f} to {of_seeds.high:.5f}, {of_seeds.how}" if of_seeds else ""
    print(f"held-out KL of ours over TRL's: {kl.mean:.5f} ({kl.low:.5f} to {kl.high:.5f}, {kl.how}, paired{told})")
    both, alone = against(rounds, OURS, "wall")
    print("KL by data order: " + ", ".join(f"{a.kl.mean():.4f}" for a in rounds[OURS]))
    bars = Bars()
    bars.check("end_to_end.wall_with_labelling", both, "<=0.55", both <= 0.55)
    bars.check("end_to_end.wall_without_labelling", alone, "<=0.45", alone <= 0.45)
    target = f"<=1.0, up to {KL_TOLERANCE:.1%} above counting as equal"
    bars.check("end_to_end.kl_ours_over_trl", kl.mean, target, kl.mean <= 1 + KL_TOLERANCE)
    bars.finish()


def main(steps: str = str(STEPS), rounds: str = str(ROUNDS)) -> None:
    if importlib.util.find_spec("trl") is None:
        print("skipped: needs TRL, which is not installed; pip install -e .[peers]")
        sys.exit(0)
    real("stories260K")
    os.environ |= {"TRL_EXPERIMENTAL_SILENCE": "1", "RAYON_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    warnings.filterwarnings("ignore", category=FutureWarning)
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    torch.set_num_threads(1)
    found: dict[str, list[Trained]] = {name: [] for name in SIDES}
    with tempfile.TemporaryDirectory() as scratch:
        root, prepared = Path(scratch), Path(scratch) / "prepared"
        prepare(prepared, int(rounds))
        (root / "check").mkdir()
        check_equal(prepared, root / "check")
        for r in range(int(rounds)):
            chosen = [n for n, (_, always) in SIDES.items() if always or r == 0]
            for name in chosen if r % 2 == 0 else reversed(chosen):
                place = root / f"{name}-{r}".replace(", ", "-")
                made = SIDES[name][0](prepared, place, int(steps), r, int(rounds))
                found[name].append(made)
                print(f"round {r}, {name}: labelling {made.labelling.wall:.1f} s, training {made.training.wall:.1f} s, "
                      f"processor {made.labelling.cpu + made.training.cpu:.1f} s", flush=True)  # fmt: skip
            seen = {(x.tokens, x.loss_tokens) for all_of in found.values() for x in all_of[r:]}
            assert len(seen) == 1, f"the sides saw different numbers of tokens: {seen}"
        measure(prepared, prepared, [x for all_of in found.values() for x in all_of])
    peer = found[PEER][0]
    print(f"{machine()}, trl {importlib.import_module('trl').__version__}; one thread")
    print(
        f"{steps} steps of {BATCH} samples, {peer.tokens:,} tokens, {peer.loss_tokens:,} of them with loss, both sides"
    )
    table(found)
    judge(found)


if __name__ == "__main__":
    main(*sys.argv[1:])
