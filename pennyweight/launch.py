"""A command in several processes: started by torchrun's elastic agent, which starts all again when one is lost.

A process that ends for a reason (done, stopped by the user, an error that would come again) leaves word of it in a file
before it goes. The agent knows only exit codes and would start it again; what it starts then finds the word, and goes
at once. So only what dies without a word is repeated: a kill, a machine's fault, a connection that broke.
"""

from __future__ import annotations

import logging
import os
import sys
import tempfile
import time
import uuid
from contextlib import suppress
from pathlib import Path

import pennyweight.processes as processes
from pennyweight.errors import RunError
from pennyweight.progress import say

RESTARTS = 10
"""How often all processes are started again before the command gives up."""

LOST = 75
"""Exit code of a process that lost another one (EX_TEMPFAIL): it says nothing, and is started again."""

_WORD = "PENNYWEIGHT_ENDED"  # names the file
_COURTESY = 1.0  # seconds in which the first process may say itself what ended all
_TO_STOP = 300  # seconds to finish a step and write a checkpoint after Ctrl-C
_LOST_KINDS = ("DistNetworkError", "DistStoreError", "DistBackendError", "DistError", "DistQueueEmptyError")
_LOST_WORDS = ("gloo", "closed by peer", "connection reset", "broken pipe", "process group")


def start(count: int, words: list[str]) -> int:
    """Run ``pennyweight WORDS`` in ``count`` processes of this machine; the exit code of the whole.

    Each gets its share of the cores, unless OMP_NUM_THREADS says otherwise.

    Raises:
        RunError: processes were lost so often that it gave up.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with tempfile.TemporaryDirectory(prefix="pennyweight-") as room:
        word = Path(room) / "ended"
        os.environ[_WORD] = str(word)
        # In the store of the agent's own rendezvous a restart may find the addresses of the dead (pytorch#135712,
        # pytorch#167288); so each start has a store of its own.
        os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
        os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(_TO_STOP)
        os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // count)))
        os.environ.setdefault("LOGLEVEL", "CRITICAL")  # of the agent, whose reports are for those who write agents
        os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        given_up = _agent(count, words, Path(room))
        if word.exists():
            return int(word.read_text() or 1)
    if given_up:
        raise RunError(
            f"a process was lost {RESTARTS + 1} times (killed, or out of memory?); see what is written above, then run "
            "the same command again, which goes on from the last checkpoint"
        )
    return 130


def _agent(count: int, words: list[str], room: Path) -> bool:
    """Start the agent and wait for it; whether it gave up."""
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed.elastic").setLevel(os.environ["LOGLEVEL"])
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        local_addr="localhost",
        max_restarts=RESTARTS,
        logs_specs=DefaultLogsSpecs(log_dir=str(room)),
    )
    try:
        elastic_launch(config, sys.executable)("-m", "pennyweight", *words)
    except ChildFailedError:
        return True
    except (SignalException, KeyboardInterrupt):
        return False
    return False


def meet() -> None:
    """Meet the others, so that whatever happens next is told once; nothing for one process."""
    if processes.size() > 1:
        from pennyweight.train.group import join

        join()
        if processes.restarts():
            say("a process was lost; all have been started again, and go on from the last checkpoint")


def settled() -> bool:
    """Whether the command has ended already, so that a process that was started again has nothing to do."""
    return processes.size() > 1 and _WORD in os.environ and Path(os.environ[_WORD]).exists()


def settle(code: int) -> bool:
    """Leave word that the command has ended with ``code``; whether this process is the one to say why.

    Of several that end for the same reason one says so, the first one if it is among them.
    """
    if processes.size() == 1:
        return True
    from pennyweight.train.group import join

    group = join()
    if not group.first:
        time.sleep(_COURTESY)
    mine = group.first
    with suppress(RuntimeError):  # the first process, which keeps the store, has gone: it has said what there was
        mine = group.store.add("ended", 1) == 1
        if mine and _WORD in os.environ:
            Path(os.environ[_WORD]).write_text(str(code))
        if group.first:
            group.tell({"over": code})
    return mine


def lost(e: BaseException) -> bool:
    """Whether this is what a process meets when another one of its group is gone."""
    if processes.size() == 1 or not isinstance(e, RuntimeError):
        return False
    said = str(e).lower()
    return type(e).__name__ in _LOST_KINDS or any(word in said for word in _LOST_WORDS)
