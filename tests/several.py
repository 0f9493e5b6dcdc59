"""What test_train_parallel.py runs in two processes at once: training alone and together, in full and by the options of
training, and what came of it as JSON; and the whole line, as the folder ``whole``.

torchrun --nproc-per-node 2 tests/several.py FOLDER
"""

from __future__ import annotations

import json
import sys
from contextlib import suppress
from functools import partialmethod
from importlib.util import find_spec
from pathlib import Path

import torch
from test_train_loop import FLOAT32, model, samples, weighted
from torch._dynamo.utils import counters

import pennyweight
from pennyweight.data.pack import Packer
from pennyweight.errors import RecipeError, Stopped
from pennyweight.model.adapters import merge
from pennyweight.model.options import ready
from pennyweight.model.projection import attach
from pennyweight.quant.linear import compute_in
from pennyweight.settings import Lora, Schedule, Tripwires
from pennyweight.train.checkpoint import Checkpoints
from pennyweight.train.group import ALONE, Group, join
from pennyweight.train.loop import train

TINY = Path(__file__).with_name("tiny.toml")
LINE_STEPS = 24
LINE = ["seeds=[0]", f"train.steps={LINE_STEPS}", "quantize.formats=[]", "evaluate.problems=2", "evaluate.samples=0"]
STEPS, BATCH, SEED = 10, 7, 5
CASES = {
    "sft": {},
    "kd": {"kind": "jsd"},
    "kd, packed, untied": {"kind": "jsd", "pack": True, "tied": False},
    "hidden states through a map": {"kind": "jsd", "hidden": 0.5},
    "fewer rows than processes": {"batch": 1, "micro": 1},
    "fp8": {"precision": "fp8"},
    "bfloat16": {"weights": "bfloat16", "moments": "bfloat16"},
}
OPTIONS = {
    "LoRA": {"lora": Lora(rank=4)},
    "QLoRA, checkpointing, packed": {"lora": Lora(rank=4, base="int4"), "gradient_checkpointing": True, "pack": True},
    "compile, packed": {"compile": True, "pack": True},
}


def fit(
    folder,
    group: Group,
    stop_at=None,
    steps=STEPS,
    kind="sft",
    hidden=0.0,
    pack=False,
    tied=True,
    batch=BATCH,
    micro=2,
    **more,
):
    """(weights by name, factors merged, and log lines by step) of a training by ``group``, until done or stopped."""
    student, teacher = model(SEED, tied), model(SEED + 1, hidden=48 if hidden else 32)
    if hidden:
        attach(student, 32, 48, SEED)
    schedule = Schedule(steps=steps, batch=batch, lr=3e-3, checkpoint_every=4, warmup=0.1, pack=pack, **more)
    ready(student, schedule, SEED)
    compute_in(student, schedule.precision, schedule.weights)
    packer = Packer(samples(24, SEED), batch, micro, 1, 0, pack, 64, group.rank, group.size)
    lines, asked = [], iter(range(10**6))
    with group.together(), suppress(Stopped):
        train(
            student,
            lambda step: [weighted(b, teacher, kind, hidden) for b in packer(step)],
            schedule=schedule,
            tripwires=Tripwires(),
            compute=FLOAT32,
            checkpoints=Checkpoints(folder),
            seed=SEED,
            admit=lambda ids: None,
            log=lines.append,
            should_stop=lambda: stop_at == next(asked) + 1 and group.first,  # the others hear of it
            group=group,
        )
    merge(student)
    return dict(student.named_parameters()), {x["step"]: x for x in lines}


def apart(a, b):
    """How far two trainings are apart: losses and gradient norms relatively, and weights at most."""
    lines, weights = [], [float((p.detach() - b[0][n].detach()).abs().max()) for n, p in a[0].items()]
    for step in set(a[1]) & set(b[1]):
        x, y = a[1][step], b[1][step]
        assert x["tokens"] == y["tokens"] and x.keys() == y.keys(), (x, y)
        keys = [k for k, v in x.items() if k not in ("step", "tokens", "seconds", "lr") and v is not None]
        lines.append(max(abs(x[k] - y[k]) / max(abs(x[k]), 1e-3) for k in keys))
    return {"steps": len(lines), "losses": max(lines), "weights": max(weights)}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    group, found = join(), {}
    pennyweight.run(TINY, LINE, folder / "whole")
    runs = {name: fit(folder / name / "together", group, **case) for name, case in CASES.items()}
    together = runs["sft"]
    for place, stop_at in (("resumed", 5), ("damaged", 9), ("there and back", 5)):
        fit(folder / place, group, stop_at)
    newest = folder / "damaged" / "step-00000009"
    if group.first:
        for name, case in CASES.items():
            found[name] = apart(fit(folder / name / "alone", ALONE, **case), runs[name])
        next(newest.glob("*.safetensors")).write_bytes(b"torn")
        fit(folder / "there and back", ALONE, stop_at=3)  # from step 5 to 8
    resumed = fit(folder / "resumed", group)
    damaged = fit(folder / "damaged", group)
    back = fit(folder / "there and back", group)
    found |= by_options(folder, group)
    try:  # the last of all, as processes that met an error do not meet again
        fit(folder / "fp8 moments", group, moments="fp8")
    except RecipeError as e:
        found["fp8 moments"] = str(e)
    if group.first:
        found["resumed"] = {**apart(together, resumed), "first": min(resumed[1])}
        found["damaged"] = {**apart(together, damaged), "first": min(damaged[1])}
        found["there and back"] = {**apart(together, back), "first": min(back[1])}
        (folder / "found.json").write_text(json.dumps(found))


def by_options(folder: Path, group: Group) -> dict:
    """How far a training by each option is apart, done together and alone; and how many graphs were compiled for it."""
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="eager")  # needs no compiler
    found = {}
    for name, options in OPTIONS.items():
        if "lora" in options and not find_spec("peft"):
            continue
        before = counters["stats"]["unique_graphs"]
        together = fit(folder / name / "together", group, kind="jsd", **options)
        graphs = counters["stats"]["unique_graphs"] - before
        if group.first:
            alone = fit(folder / name / "alone", ALONE, kind="jsd", **options)
            found[name] = {**apart(alone, together), "graphs": graphs}
            assert together[0].keys() == dict(model(0).named_parameters()).keys()
    return found


if __name__ == "__main__":
    main(Path(sys.argv[1]))
