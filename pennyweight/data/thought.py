"""A reasoning trace: one thought in ``<think></think>``, and the answer behind it.

Where it is opened differs. Data and most templates have all of it in the response; some chat templates (DeepSeek-R1's,
Qwen3-Thinking's) open the thought themselves, so that what is generated begins inside it; APIs hand it over apart.
"""

from __future__ import annotations

import re

OPEN, CLOSE = "<think>", "</think>"
_OPENED = re.compile(rf"{OPEN}\s*\Z")


def joined(thought: str, answer: str | None) -> str:
    """The trace of a thought and an answer that came apart; without an answer the thought is not closed."""
    begun = f"{OPEN}\n{thought.strip()}"
    return begun if answer is None else f"{begun}\n{CLOSE}\n\n{answer.lstrip()}"


def parted(text: str) -> tuple[str, str] | None:
    """Thought and answer, without the space around them; None of what is not one closed thought and all else behind it.
    The opening mark may be missing, as it is in what is generated after a template that opens the thought."""
    before, closed, answer = text.partition(CLOSE)
    head, opened, thought = before.partition(OPEN)
    thought = thought if opened else before
    if not closed or (opened and head.strip()) or any(mark in x for mark in (OPEN, CLOSE) for x in (thought, answer)):
        return None
    return thought.strip(), answer.strip()


def behind(text: str) -> str | None:
    """What stands behind the last thought; all of a text without a thought, None where a thought is not closed."""
    after = text.rpartition(CLOSE)[2]
    return None if OPEN in after else after


def opened_by(prompt: str) -> str:
    """The opening of a thought that a rendered prompt ends in, with the space behind it; mostly nothing."""
    found = _OPENED.search(prompt)
    return found[0] if found else ""


def same(rendered: str, response: str) -> bool:
    """Whether a response stands in what a template made of it, with nothing but space around its parts changed."""
    mine = parted(response)
    if mine is not None:
        return parted(rendered) == mine and rendered.count(OPEN) == 1
    if OPEN in response or CLOSE in response:  # an unfinished thought, say, which a template would take for an answer
        return rendered.strip() == response.strip()
    return response.strip() in rendered


def continued(response: str, opening: str, complete: bool) -> str:
    """What is generated after a prompt that ends in ``opening``, for a response that stands as it was written.

    A thought is opened once, by the prompt or here. Where the prompt opens one and a complete response has none, it is
    closed at once, as it is for models that are asked not to think.
    """
    if not opening:
        begun = CLOSE in response and OPEN not in response.partition(CLOSE)[0]
        return f"{OPEN}\n{response.lstrip()}" if begun else response
    if response.lstrip().startswith(OPEN):
        return response.lstrip().removeprefix(OPEN).removeprefix(opening.removeprefix(OPEN))
    return response if CLOSE in response or not complete else f"\n{CLOSE}\n\n{response}"
