"""Atomic checkpoints from which training goes on bit for bit. safetensors and JSON, never pickle.

A checkpoint is a folder ``step-00000100`` holding ``state.json`` and the tensors (parameters, optimizer moments, random
states): in ``tensors.safetensors`` where one process wrote it, and where several did, in a file of safetensors by each
(``torch.distributed.checkpoint`` with its Hugging Face storage). Either is gone on from by any number of processes;
bit for bit by as many. It is written beside its place and renamed in, so one that exists is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pennyweight.train.group import ALONE, Group

_ONE_FILE = "tensors.safetensors"
_GOOD = "good"  # empty file in a checkpoint whose weights were looked at and found good


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training run, in ``folder``; the newest ``keep`` are kept, and the newest that is good."""

    folder: Path
    keep: int = 2

    def save(
        self,
        step: int,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        facts: dict,
        group: Group = ALONE,
        good: bool = False,
    ) -> Path:
        """Write the state after ``step`` finished steps; ``facts`` is whatever else is needed to go on. ``good``: these
        weights were looked at and found so.

        Where the model is cut over a group, all its processes call this, and each writes what it holds.
        """
        place = self.folder / f"step-{step:08d}"
        making = self.folder / f".making-{step:08d}"
        if group.first:
            shutil.rmtree(making, ignore_errors=True)
            making.mkdir(parents=True)
        group.wait()
        tensors = _tensors(model, optimizer, group)
        if group.size > 1:
            _write_parts(tensors, making)
        else:
            save_file(tensors, making / _ONE_FILE)
        if group.first:
            (making / "state.json").write_text(json.dumps({"step": step, **facts}))
            if good:
                (making / _GOOD).touch()
            for file in making.iterdir():
                _sync(file)
            shutil.rmtree(place, ignore_errors=True)
            os.replace(making, place)
            _sync(self.folder)
            for old in self._steps()[: -self.keep]:
                if old != self._good():
                    shutil.rmtree(old, ignore_errors=True)
        group.wait()
        return place

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer, group: Group = ALONE) -> dict | None:
        """Load the newest readable checkpoint into model and optimizer; its facts, or None when there is none."""
        for place in reversed(self._steps()):
            try:
                facts = json.loads((place / "state.json").read_text())
                one_file = group.size == 1 and (place / _ONE_FILE).exists()
                tensors = load_file(place / _ONE_FILE) if one_file else _read_parts(place, model, group)
            except (OSError, ValueError, KeyError, AssertionError, SafetensorError):
                tensors = None
            if not group.any(tensors is None):
                assert tensors is not None
                _put_back(model, optimizer, tensors, group)
                return facts
        return None

    def newest(self) -> Path | None:
        """Folder of the newest checkpoint."""
        steps = self._steps()
        return steps[-1] if steps else None

    def back_to_good(self) -> Path | None:
        """Folder of the newest checkpoint that was found good, with all later ones removed, so that training goes on
        from it; where none was looked at, of the newest."""
        good = self._good()
        for later in [p for p in self._steps() if good and p > good]:
            shutil.rmtree(later, ignore_errors=True)
        return good or self.newest()

    def _good(self) -> Path | None:
        return next((p for p in reversed(self._steps()) if (p / _GOOD).exists()), None)

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _random(group: Group) -> str:
    """What the random states of this process are called: the first one's as if it were alone."""
    return "random" if group.first else f"random.{group.rank}"


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer, group: Group) -> dict[str, Tensor]:
    """Everything that changes during training: what is frozen, or made anew with the model, does not."""
    names: dict[Tensor, str] = {p: name for name, p in _trained(model)}
    out = {f"model.{name}": p.detach() for p, name in names.items()}
    out |= {f"buffer.{name}": b for name, b in _buffers(model)}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            out[f"optimizer.{key}.{names[parameter]}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    out[f"{_random(group)}.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        out[f"{_random(group)}.cuda"] = torch.cuda.get_rng_state()
    if group.size > 1:
        return {k: v.detach() for k, v in out.items()}
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in out.items()}


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters that are trained; ``named_parameters`` lists tied ones once."""
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _buffers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Buffers that belong to a model's state."""
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix, recurse=False):
            if name.rpartition(".")[2] not in module._non_persistent_buffers_set:
                yield name, buffer


def _put_back(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], group: Group) -> None:
    with torch.no_grad():
        for name, parameter in _trained(model):
            parameter.copy_(tensors[f"model.{name}"])
        for name, buffer in _buffers(model):
            buffer.copy_(tensors[f"buffer.{name}"])
    for name, parameter in _trained(model):
        suffix = f".{name}"
        state = {
            key.removeprefix("optimizer.").removesuffix(suffix): value
            for key, value in tensors.items()
            if key.startswith("optimizer.") and key.split(".", 2)[2] == name
        }
        if state:
            step_stays_on_cpu = {k: v if v.ndim == 0 else v.to(parameter.device) for k, v in state.items()}
            optimizer.state[parameter] = step_stays_on_cpu
    mine = _random(group)
    if f"{mine}.cpu" in tensors:  # not of a process that was not there: it draws as it was seeded
        torch.set_rng_state(tensors[f"{mine}.cpu"])
    if f"{mine}.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors[f"{mine}.cuda"])


def _write_parts(tensors: dict[str, Tensor], folder: Path) -> None:
    """Write this process's part of ``tensors``, into a file of its own; all processes call it."""
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageWriter
    from torch.distributed.checkpoint.state_dict_saver import save

    with _plain_errors():
        save(tensors, storage_writer=HuggingFaceStorageWriter(str(folder), save_distributed=True))


def _read_parts(folder: Path, model: nn.Module, group: Group) -> dict[str, Tensor]:
    """A checkpoint's tensors, as far as this process holds them, cut as ``model``'s parameters are.

    Raises:
        OSError, ValueError, KeyError, AssertionError, SafetensorError: the checkpoint cannot be read.
    """
    from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
    from torch.distributed.checkpoint.state_dict_loader import load

    stored: dict[str, Any] = HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata
    parameters = dict(model.named_parameters())
    out: dict[str, Tensor] = {}
    for key, kept in stored.items():
        room, _, name = key.partition(".")
        of = parameters.get(name.partition(".")[2] if room == "optimizer" else name)
        if room == "random" and key not in (f"{_random(group)}.cpu", f"{_random(group)}.cuda"):
            continue
        dtype = kept.properties.dtype
        if of is not None and room in ("model", "optimizer") and kept.size == of.shape:
            out[key] = torch.empty_like(of, dtype=dtype, requires_grad=False)
        else:
            out[key] = torch.empty(kept.size, dtype=dtype)
    with _plain_errors():
        load(out, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=group.size == 1)
    return out


@contextmanager
def _plain_errors() -> Iterator[None]:
    """What went wrong in any of the processes, in place of a ``CheckpointException``, which is no Exception."""
    from torch.distributed.checkpoint.api import CheckpointException

    try:
        yield
    except CheckpointException as e:
        error, _ = next(iter(e.failures.values()))
        raise error from None
