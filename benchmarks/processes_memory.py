"""What benchmarks.processes runs under torchrun: a training whose memory is measured in its first process.

torchrun --nproc-per-node N -m benchmarks.processes_memory FILE.json
"""

from __future__ import annotations

import ctypes
import json
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import pennyweight.train.loop as loop
from pennyweight.data.pack import Packer
from pennyweight.loss.divergence import Divergence
from pennyweight.model.device import choose
from pennyweight.records import Encoded
from pennyweight.settings import Schedule, Tripwires
from pennyweight.train.checkpoint import Checkpoints
from pennyweight.train.group import join

SHAPE: dict[str, Any] = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 10,
    "num_attention_heads": 8,
}


def resident(what: str) -> int:
    """VmRSS or VmHWM of this process, in bytes."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(next(x for x in status.splitlines() if x.startswith(what)).split()[1])


def bytes_of(tensors: Iterable[Any]) -> int:
    local = [t.to_local() if hasattr(t, "to_local") else t for t in tensors if t is not None]
    return sum(t.numel() * t.element_size() for t in local)


def main(file: Path) -> None:
    torch.set_num_threads(1)
    group, found = join(), {}
    optimizers: list[torch.optim.Optimizer] = []
    adamw = loop.adamw

    def seen(*given: object) -> torch.optim.Optimizer:
        optimizers.append(adamw(*given))  # type: ignore[arg-type]
        return optimizers[-1]

    def measure() -> bool:
        """After each step: what is held, by tensors and by the process."""
        (optimizer,) = optimizers
        parameters = [p for g in optimizer.param_groups for p in g["params"]]
        moments = [t for state in optimizer.state.values() for t in state.values()]
        found["held"] = bytes_of(parameters) + bytes_of(p.grad for p in parameters) + bytes_of(moments)
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim:  # glibc keeps what was freed, up to as much again
            trim(0)
        found["resident"] = resident("VmRSS:") - begun
        return False

    begun = resident("VmRSS:")
    model = LlamaForCausalLM(LlamaConfig(vocab_size=4096, tie_word_embeddings=False, **SHAPE))
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 4096, (32, 64), generator=g).tolist()
    texts = [Encoded(f"{i:064x}", tuple(row), (False, *(True,) * 63)) for i, row in enumerate(ids)]
    packer = Packer(texts, 8, 2, 0, 0, rank=group.rank, ranks=group.size)
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(loop, "adamw", seen), group.together():
        loop.train(
            model,
            lambda step: [b.weighted(1.0, 0.0, Divergence(), None) for b in packer(step)],
            schedule=Schedule(steps=3, batch=8),
            tripwires=Tripwires(),
            compute=choose("cpu", "float32"),
            checkpoints=Checkpoints(Path(folder) if group.size == 1 else file.parent / "steps"),
            seed=0,
            admit=lambda ids: None,
            log=lambda line: None,
            should_stop=measure,
            group=group,
        )
    found["peak"] = resident("VmHWM:") - begun
    if group.first:
        file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
