"""What the command line prints: findings on standard output, as JSON or for people; one sentence where it failed.

Of several processes the first prints, and one says what went wrong.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import typer

import pennyweight.launch as launch
import pennyweight.processes as processes
from pennyweight.errors import PennyweightError, first_line, in_one_sentence
from pennyweight.records import readable_json

STOPPED = "stopped; run, distill and quantize go on from here with the same command"


def tell(found: dict[str, Any], as_json: bool, shown_by: str = "print_values") -> None:
    """JSON, or as a function of ``report.terminal`` shows it: one line per value, unless another is named."""
    if as_json:
        typer.echo(readable_json(found))
        return
    import pennyweight.report.terminal as terminal

    getattr(terminal, shown_by)(found)


def fail(message: str, code: int) -> None:
    """Print what went wrong and leave with ``code``."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would only tear up what is being said
    if launch.settle(code):
        typer.echo(f"pennyweight: {message}", err=True)
    sys.exit(code)


@contextmanager
def one_sentence() -> Iterator[None]:
    """Within it, whatever goes wrong is told in one sentence, and ends the command with its code; defects are raised.

    The one boundary of the command line.
    """
    try:
        yield
    except PennyweightError as e:
        fail(str(e), e.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        fail(STOPPED, 130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as e:
        if launch.lost(e):
            if processes.rank() == 0:
                typer.echo(f"pennyweight: another process of this run is gone: {first_line(e)}", err=True)
            sys.exit(launch.LOST)
        said = in_one_sentence(e)
        if said is not None:
            fail(said, 2)
        launch.settle(1)  # a defect would be there again
        raise
