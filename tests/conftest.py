"""Shared fixtures: one thread, no network, the real inputs where they are, and tiny models made on the spot."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start, too

REAL = Path(__file__).resolve().parents[2] / "shared" / "real"


@pytest.fixture(autouse=True)
def _one_thread():
    """Before each test: a command that is run in this process takes a thread per core, and leaves it so."""
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


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory):
    """(RUN folder, its summary) of tiny.toml, finished; to be read, or copied."""
    import pennyweight

    out = tmp_path_factory.mktemp("tiny") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PENNYWEIGHT_CACHE", str(out.parent / "cache"))
        return out, pennyweight.run(Path(__file__).with_name("tiny.toml"), out=out)


@pytest.fixture(autouse=True, scope="session")
def _drawn_once():
    """Problems of the same arguments are drawn in a process of their own once, not in each test: it starts slowly."""
    from pennyweight.data import tasks

    draw, drawn = tasks._drawn_elsewhere, {}

    def once(*asked):
        key = json.dumps(asked)
        if key not in drawn:
            drawn[key] = json.dumps(draw(*asked))
        return json.loads(drawn[key])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "_drawn_elsewhere", once)
        yield


@pytest.fixture
def no_charts(monkeypatch):
    """Pages are written without their charts, which take longer than all else where little of a run runs again."""
    for module in ("charts", "scatter"):
        monkeypatch.setattr(f"pennyweight.report.{module}.both", lambda *_: "")


@pytest.fixture
def typed(monkeypatch, capsys):
    """Run a command line in this process; gives its exit code, what it printed, and what it said beside that."""

    def run(*argv) -> tuple[int, str, str]:
        from pennyweight import cli

        monkeypatch.setattr(sys, "argv", ["pennyweight", *map(str, argv)])
        monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)  # of one core, one thread
        capsys.readouterr()
        before = signal.getsignal(signal.SIGINT)
        try:
            with pytest.raises(SystemExit) as stopped:
                cli.main()
        finally:
            signal.signal(signal.SIGINT, before)  # a command that fails is deaf to Ctrl-C from then on
        return (stopped.value.code, *capsys.readouterr())

    return run
