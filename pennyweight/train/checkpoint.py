"""Atomic checkpoints from which training goes on bit for bit. safetensors and JSON, never pickle.

A checkpoint is a folder ``step-00000100`` holding ``tensors.safetensors`` (parameters, optimizer moments, random
states) and ``state.json``. It is written beside its place and renamed in, so one that exists is whole.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn


@dataclass(frozen=True)
class Checkpoints:
    """The checkpoints of one training run, in ``folder``; the newest ``keep`` are kept."""

    folder: Path
    keep: int = 2

    def save(self, step: int, model: nn.Module, optimizer: torch.optim.Optimizer, facts: dict) -> Path:
        """Write the state after ``step`` finished steps; ``facts`` is whatever else is needed to go on."""
        self.folder.mkdir(parents=True, exist_ok=True)
        place = self.folder / f"step-{step:08d}"
        making = self.folder / f".making-{step:08d}"
        shutil.rmtree(making, ignore_errors=True)
        making.mkdir()
        save_file(_tensors(model, optimizer), making / "tensors.safetensors")
        (making / "state.json").write_text(json.dumps({"step": step, **facts}))
        for file in making.iterdir():
            _sync(file)
        shutil.rmtree(place, ignore_errors=True)
        os.replace(making, place)
        _sync(self.folder)
        for old in self._steps()[: -self.keep]:
            shutil.rmtree(old, ignore_errors=True)
        return place

    def restore(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict | None:
        """Load the newest readable checkpoint into model and optimizer; its facts, or None when there is none."""
        for place in reversed(self._steps()):
            try:
                facts = json.loads((place / "state.json").read_text())
                tensors = load_file(place / "tensors.safetensors")
            except (OSError, ValueError, SafetensorError):
                continue
            _put_back(model, optimizer, tensors)
            return facts
        return None

    def newest(self) -> Path | None:
        """Folder of the newest checkpoint."""
        steps = self._steps()
        return steps[-1] if steps else None

    def _steps(self) -> list[Path]:
        return sorted(self.folder.glob("step-*")) if self.folder.is_dir() else []


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _tensors(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Everything that changes during training. ``named_parameters`` lists tied weights once."""
    names: dict[Tensor, str] = {p: name for name, p in model.named_parameters()}
    out = {f"model.{name}": p.detach() for p, name in names.items()}
    out |= {f"buffer.{name}": b for name, b in model.named_buffers()}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            out[f"optimizer.{key}.{names[parameter]}"] = value if isinstance(value, Tensor) else torch.tensor(value)
    out["random.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        out["random.cuda"] = torch.cuda.get_rng_state()
    return {k: v.detach().to("cpu", copy=True).contiguous() for k, v in out.items()}


def _put_back(model: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(tensors[f"model.{name}"])
        for name, buffer in model.named_buffers():
            buffer.copy_(tensors[f"buffer.{name}"])
    for name, parameter in model.named_parameters():
        suffix = f".{name}"
        state = {
            key.removeprefix("optimizer.").removesuffix(suffix): value
            for key, value in tensors.items()
            if key.startswith("optimizer.") and key.split(".", 2)[2] == name
        }
        if state:
            step_stays_on_cpu = {k: v if v.ndim == 0 else v.to(parameter.device) for k, v in state.items()}
            optimizer.state[parameter] = step_stays_on_cpu
    torch.set_rng_state(tensors["random.cpu"])
    if "random.cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random.cuda"])
