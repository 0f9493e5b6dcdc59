"""The final answer of a response, and equality with the gold answer as text."""

from __future__ import annotations

import functools
import re
import unicodedata

from pennyweight.data.thought import behind
from pennyweight.records import Task, Verdict, Verifier

_SAID = re.compile(r"(?:answer\s+is|answer\s*:|답\s*:|^A:)[ \t:*]*(\S[^\n]*)", re.IGNORECASE | re.MULTILINE)
_WITH_COMMAS = re.compile(r"(?<!\d)(?<!\d[.,])\d{1,3}(?:,\d{3})+(?!,?\d)")


def final_answer(response: str) -> str | None:
    r"""What a response gives as its answer, or None where it gives none.

    What stands in ``<think></think>`` is no part of it: the answer is behind the last thought, and where a thought is
    not closed there is none. In order: the rest of the line after the last ``####``; inside the last ``\boxed{}`` with
    balanced braces; inside the last ``<answer></answer>``; the rest of the line after the last "answer is", "Answer:"
    or "A:" at the start of a line; the last line that is not empty. A ``####`` inside an ``<answer>`` block, as drawn
    boards have, is part of that answer.
    """
    response = behind(response) or ""
    block_start, block = _block(response)
    hashes = response.rfind("####")
    if hashes >= 0 and not (block is not None and block_start <= hashes < block_start + len(block)):
        line = response[hashes + 4 :].split("\n", 1)[0].strip()
        if line:
            return line
    boxed = _boxed(response)
    if boxed:
        return boxed
    if block is not None and block.strip():
        return block.strip()
    said = _SAID.findall(response)
    if said:
        return said[-1].rstrip(" \t*").removesuffix(".").rstrip(" \t*")
    lines = response.split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), None)


def no_answer(response: str) -> Verdict:
    """The verdict on a response without a final answer."""
    if not response.strip():
        return Verdict(False, None, "the response is empty")
    closed = behind(response) is not None
    return Verdict(False, None, "nothing stands behind the thought" if closed else "the thought is not closed")


def _block(response: str) -> tuple[int, str | None]:
    """Where the inside of the last ``<answer>`` block starts, and what is in it."""
    end = response.rfind("</answer>")
    start = response.rfind("<answer>", 0, max(end, 0))
    if start < 0:
        return -1, None
    start += len("<answer>")
    return start, response[start:end]


def _boxed(response: str) -> str | None:
    r"""The inside of the last ``\boxed{}`` that is closed."""
    start = response.rfind(r"\boxed{")
    if start < 0:
        return None
    depth, i = 0, start + len(r"\boxed")
    while i < len(response):
        if response[i] == "\\":
            i += 1  # an escaped brace is text
        elif response[i] == "{":
            depth += 1
        elif response[i] == "}":
            depth -= 1
            if depth == 0:
                return response[start + len(r"\boxed{") : i].strip()
        i += 1
    return None


def normalised(answer: str) -> str:
    """One spelling: NFC, case folded, single spaces, no thousands commas (``1,234`` is ``1234``, ``1,23,456`` is not
    ``123456``)."""
    spelt = " ".join(unicodedata.normalize("NFC", answer).casefold().split())
    return _WITH_COMMAS.sub(lambda number: number[0].replace(",", ""), spelt)


def never_raises(verifier: Verifier) -> Verifier:
    """A verifier whose failures are verdicts, with the exception as the reason."""

    @functools.wraps(verifier)
    def guarded(response: str, task: Task) -> Verdict:
        try:
            return verifier(response, task)
        except (Exception, SystemExit) as e:
            return Verdict(False, None, f"the verifier failed: {type(e).__name__}: {e}"[:300])

    return guarded


@never_raises
def verify_exact(response: str, task: Task) -> Verdict:
    """Correct when the final answer equals the gold answer once both are ``normalised``."""
    answer = final_answer(response)
    if answer is None:
        return no_answer(response)
    if normalised(answer) == normalised(task.answer):
        return Verdict(True, answer)
    return Verdict(False, answer, f"not {task.answer!r}")
