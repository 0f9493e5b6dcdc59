"""A teacher that is a function of the tokens and no model, and a process that labels with it beside another.

python labeller.py FOLDER beside     settle thresholds and label, at the same time as another process
python labeller.py FOLDER holds      label slow/, its first shard when it is told to; then take one of held/ for good
"""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from pennyweight.records import Encoded
from pennyweight.teacher.cache import TargetCache, settled
from pennyweight.teacher.targets import Keep, draw, top, uniforms

V, D, SHARD = 97, 12, 3
DATA_SEED, DATA_COUNT = 5, 40


def samples(count=14, seed=1, vocabulary=V):
    """Token sequences of 4 to 19 tokens; a third of their tokens is prompt."""
    g = torch.Generator().manual_seed(seed)
    out = []
    for i in range(count):
        length = int(torch.randint(4, 20, (1,), generator=g))
        ids = torch.randint(3, vocabulary, (length,), generator=g).tolist()
        out.append(Encoded(f"{i:064x}", tuple(ids), tuple(j >= max(1, length // 3) for j in range(length))))
    return out


def states_of(sample: Encoded):
    """(P, D) hidden states at the sample's loss positions."""
    g = torch.Generator().manual_seed(int(sample.token_hash[:12], 16))
    return torch.randn(len(sample.loss_positions), D, generator=g)


HEAD = torch.randn(V, D, generator=torch.Generator().manual_seed(0))


def label(group, keep: Keep):
    """What a TargetCache asks for."""
    out = []
    for sample in group:
        states = states_of(sample)
        u, logits = uniforms(len(states), int(sample.token_hash[:15], 16)), states @ HEAD.T
        if keep.kind == "hidden":
            out.append(states)
        elif keep.kind == "top_k":
            out.append(top(logits, keep.k, keep.temperature, u, keep.bits))
        else:
            out.append(draw(logits, keep.threshold, keep.temperature, u))
    return out


def cache(folder: Path, asked=label, fingerprint="f" * 64, keep=None, vocabulary=V, shard=SHARD) -> TargetCache:
    return TargetCache(folder, fingerprint, keep or Keep("sampled", 0.05), vocabulary, shard, asked)


def noted(folder: Path, asked=label):
    """``label`` that writes a line into labelled.txt beside the folder for every shard it is asked for."""

    def note(group, keep):
        line = f"{os.getpid()} {group[0].token_hash} {len(group)}\n"
        with open(folder.parent / "labelled.txt", "a") as f:
            f.write(line)
        return asked(group, keep)

    return note


def meet(folder: Path, name: str, of: int = 2, seconds: float = 60.0):
    """Wait until so many processes have come here."""
    (folder.parent / f"{name}-{os.getpid()}").touch()
    end = time.monotonic() + seconds
    while len(list(folder.parent.glob(f"{name}-*"))) < of:
        assert time.monotonic() < end, "the other process never came"
        time.sleep(0.01)


def together(folder: Path, asked=label):
    """A noted label whose first call waits for the other process to have a shard too."""

    def wait(group, keep):
        meet(folder, "has-a-shard")
        return asked(group, keep)

    return noted(folder, wait)


def when_released(folder: Path):
    """A noted label that says when it has a shard, and gives it a while after it was told to."""

    def hold(group, keep):
        (folder.parent / f"{folder.name}-holding").touch()
        end = time.monotonic() + 120
        while not (folder.parent / f"{folder.name}-release").exists():
            assert time.monotonic() < end, "nobody released this process"
            time.sleep(0.01)
        time.sleep(0.3)  # so that the other has come to wait for it
        return label(group, keep)

    return noted(folder, hold)


def settle(folder: Path) -> list[float] | str:
    """A hundred thresholds, each found anew by whoever comes first; or what went wrong."""
    meet(folder, "settles")
    try:
        file = folder.parent / "labelling.json"
        return [settled(file, {"from": i // 2}, lambda i=i: 0.1 + i // 2) for i in range(100)]
    except OSError as error:
        return repr(error)


def main(folder: Path, mode: str):
    torch.set_num_threads(1)
    data = samples(DATA_COUNT, DATA_SEED)
    if mode == "beside":
        thresholds = settle(folder)
        print(json.dumps([thresholds, asdict(cache(folder, together(folder)).fill(data))]))
    else:
        for name in ("slow", "held"):
            cache(folder / name, when_released(folder / name)).fill(data)


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
