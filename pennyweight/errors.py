"""Everything Pennyweight raises on purpose.

    PennyweightError            exit 2: the message says what is wrong, where, and what to do next
    ├── RecipeError             a recipe that cannot be read, or asks for what cannot be done
    ├── DataError               rows, files or prompts that cannot be used
    ├── ModelError              a model folder or tokenizer that cannot be used
    ├── EndpointError           a server that refuses, cannot be reached, or does not give what is asked of it
    ├── MethodError             a method asked of a teacher signal that cannot carry it
    ├── QualityError            a low-bit copy that is worse than was asked for; nothing is left of it
    ├── RunError                a RUN folder that is taken, foreign, or cannot be written
    ├── LedgerError             a ledger that does not verify, or a record it does not know
    ├── MissingExtra            an optional dependency; the message holds the install line
    ├── Tripped                 exit 3: training stopped by a tripwire, last good checkpoint kept
    ├── Overspent               exit 3: the budget is spent; what was done is kept, and goes on once it is raised
    └── Stopped                 exit 130: the user asked; a checkpoint was written first

One boundary prints them: ``cli_output.one_sentence``. An exception carries values, never objects of a higher floor.
"""

from __future__ import annotations

import errno


class PennyweightError(Exception):
    """Base of all expected failures. ``exit_code`` is what the command line returns."""

    exit_code = 2


class RecipeError(PennyweightError):
    """The recipe cannot be read, or asks for something that cannot be done."""


class DataError(PennyweightError):
    """Rows, files or prompts that cannot be used."""


class ModelError(PennyweightError):
    """A model folder or tokenizer that cannot be used."""


class EndpointError(PennyweightError):
    """A server refuses, cannot be reached, or does not give what is asked of it.

    ``status`` is HTTP's and ``said`` what came with it, if there was an answer. Neither holds the key.
    """

    def __init__(self, message: str, status: int | None = None, said: str = ""):
        super().__init__(message)
        self.status, self.said = status, said


class MethodError(PennyweightError):
    """A method was asked of a teacher signal that cannot carry it."""


class QualityError(PennyweightError):
    """A low-bit copy came out worse than was asked for."""


class RunError(PennyweightError):
    """A RUN folder that is taken, foreign, or cannot be written."""


class LedgerError(PennyweightError):
    """The ledger does not verify, or does not know a record it was asked about."""


class MissingExtra(PennyweightError):
    """An optional dependency is missing."""

    def __init__(self, package: str, extra: str, purpose: str):
        super().__init__(f"{purpose} needs {package}, which is not installed; run: pip install 'pennyweight[{extra}]'")


class Tripped(PennyweightError):
    """A tripwire stopped training. The last good checkpoint is kept."""

    exit_code = 3


class Overspent(PennyweightError):
    """The budget of a run is spent. What was done is kept."""

    exit_code = 3


class Stopped(PennyweightError):
    """The user asked to stop; a checkpoint after ``step`` steps was written."""

    exit_code = 130

    def __init__(self, step: int):
        super().__init__(f"stopped after step {step:,}, with a checkpoint; the same command goes on from there")
        self.step = step


def in_one_sentence(e: Exception) -> str | None:
    """What a failure that is not ours means and what to do; None where that is not known, so that it is a defect."""
    kind, said = type(e).__name__, str(e)
    if isinstance(e, OSError):
        return _of_the_system(e)
    if hasattr(e, "format_message") and hasattr(e, "exit_code"):  # usage errors of the command line
        return f"{e.format_message()}; see pennyweight --help"  # type: ignore[attr-defined]
    if kind == "SafetensorError" and "os error" in said.lower():
        return f"could not write a weight file: {e}; free some space or check permissions, then run the command again"
    if kind in ("OutOfMemoryError", "MemoryError") or "can't allocate memory" in said:
        return (
            "the memory is full; use a smaller train.micro_batch, a shorter data.context or a smaller model, and the "
            "same command goes on from here"
        )
    return None


def _of_the_system(e: OSError) -> str:
    where = f" at {e.filename}" if e.filename else ""
    if e.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"the disk is full{where}; free some space, and the same command goes on from here"
    if e.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"not allowed to write or read{where} ({e.strerror}); choose another --out, or change its permissions"
    return f"the system refused{where}: {e.strerror or e}; check the path, then run the same command again"


def first_line(e: Exception) -> str:
    """The first line of what an exception says, at most 200 characters of it."""
    if isinstance(e, KeyError):
        return f"{e} is missing in it"
    return (str(e).strip().splitlines() or [type(e).__name__])[0][:200]
