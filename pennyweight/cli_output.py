"""What the command line prints: findings on standard output, as JSON or for people; one sentence where it failed."""

from __future__ import annotations

import signal
import sys
from typing import Any

import typer

from pennyweight.records import readable_json


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
    typer.echo(f"pennyweight: {message}", err=True)
    sys.exit(code)
