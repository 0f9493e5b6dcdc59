"""Shared fixtures: one thread, no network, the real inputs where they are, and tiny models made on the spot."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    import torch

    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("PENNYWEIGHT_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def stories() -> Path:
    """The real tiny Llama."""
    if not (REAL / "stories260K").is_dir():
        pytest.skip("needs the real model stories260K, which lies beside a full checkout only")
    return REAL / "stories260K"
