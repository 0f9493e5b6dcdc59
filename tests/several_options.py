"""What test_options.py runs in two processes at once: students of each option, alone and together, as JSON.

torchrun --nproc-per-node 2 tests/several_options.py FOLDER
"""

from __future__ import annotations

import json
import sys
from functools import partialmethod
from pathlib import Path

import several
import torch
from test_train_loop import model
from torch._dynamo.utils import counters

from pennyweight.model.adapters import merge
from pennyweight.model.options import ready
from pennyweight.settings import Lora, Schedule
from pennyweight.train.group import ALONE, join

CASES = {
    "LoRA": {"lora": Lora(rank=4)},
    "QLoRA, checkpointing, packed": {"lora": Lora(rank=4, base="int4"), "gradient_checkpointing": True},
    "compile, packed": {"compile": True},
}


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    torch.nn.Module.compile = partialmethod(torch.nn.Module.compile, backend="eager")  # needs no compiler
    group, found = join(), {}
    students = []

    def trained(name, members):
        """Weights by name, the factors merged, and log lines by step."""
        where = "together" if members.size > 1 else "alone"
        _, lines = several.fit(folder / name / where, members, kind="jsd", pack="packed" in name)
        merge(students[-1])
        return dict(students[-1].named_parameters()), lines

    for name, options in CASES.items():

        def student(seed, tied=True, hidden=32, options=options):
            made = model(seed, tied, hidden)
            if seed == several.SEED:  # which the teacher does not have
                students.append(made)
                ready(made, Schedule(**options), seed)
            return made

        several.model = student
        together, graphs = trained(name, group), counters["stats"]["unique_graphs"]
        if group.first:
            alone = trained(name, ALONE)
            found[name] = {**several.apart(alone, together), "graphs": graphs}
            assert together[0].keys() == dict(model(0).named_parameters()).keys()
    if group.first:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
