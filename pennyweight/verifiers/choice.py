"""Multiple choice: which of the choices a response gives as its answer."""

from __future__ import annotations

import json
import re
from typing import Any

from pennyweight.records import Task, Verdict
from pennyweight.verifiers.exact import final_answer, never_raises, normalised

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MARKUP = re.compile(r"[*_`$]+|\\(?:text|mathbf|mathrm|textbf|boxed)\b")
_SAID = r"(?:the\s+)?(?:(?:correct|right|final|best)\s+)?(?:answer|option|choice|정답|답)(?:\s+is|은|는)?\s*:?\s*"
_OTHER = re.compile(
    r"\s*(?:[,/;&]|\b(?:or|and)\b|또는|혹은|와|과)\s*(?:(?:option|choice)\s+)?[(\[{]?([A-Z]|\d)\b", re.I
)


@never_raises
def verify_choice(response: str, task: Task) -> Verdict:
    """Correct when the final answer names the gold choice, by its letter or by its own text.

    ``task.answer`` is the letter (or label) of the gold choice, its text, or a solution that ends in one.
    ``task.entry`` may list ``choices``: a list of texts, an object ``{letter: text}``, or
    ``{"label": [...], "text": [...]}``. Without it, any letter goes.
    """
    choices = _choices(json.loads(task.entry))
    gold = picked(task.answer, choices) or picked(final_answer(task.answer) or "", choices)
    if gold is None:
        return Verdict(False, None, f"the gold answer {task.answer!r} is none of the choices")
    answer = final_answer(response)
    if answer is None:
        return Verdict(False, None, "the response is empty")
    found = picked(answer, choices)
    if found is None:
        return Verdict(False, answer, "no one choice in it")
    return Verdict(found == gold, found, "" if found == gold else f"not {gold}")


def picked(answer: str, choices: dict[str, str]) -> str | None:
    """The letter of the one choice that a final answer names; None where it names none, or more than one.

    Taken: ``B``, ``b``, ``(B)``, ``B.``, ``**B**``, ``option B``, ``답: B``, ``B) its text``, ``B is correct``, and the
    choice's own text.
    """
    by_text = {normalised(text): letter for letter, text in choices.items()}
    if len(by_text) < len(choices):
        by_text = {}  # two choices of one text: the text names neither
    whole = by_text.get(normalised(answer)) or by_text.get(normalised(answer).rstrip("."))
    if whole:
        return whole
    plain = " ".join(_MARKUP.sub("", answer).split())
    letters = "|".join(re.escape(c) for c in choices) if choices else "[A-Z]"
    form = rf"(?:{_SAID})*(?P<open>[(\[{{]?)(?P<letter>{letters})(?P<rest>(?![A-Za-z0-9가-힣]).*|(?:입니다|번|이다).*)?"
    found = re.fullmatch(form, plain, re.IGNORECASE)
    if not found:
        return None
    rest = (found["rest"] or "").lstrip(")]}")
    closed = rest != (found["rest"] or "")
    said_so = closed or re.match(r"[.:]|\s*$|\s*[-–—=]|\s+(?:is|because|since)\b|입니다|번|이다", rest)
    other = _OTHER.match(rest)
    if not said_so or (other and other[1].upper() != found["letter"].upper()):
        return None  # "A dog" is no letter, "A or B" no choice
    letter = next((c for c in choices or _LETTERS if c.upper() == found["letter"].upper()), None)
    text = by_text.get(normalised(rest.lstrip(" .:-–—=")))
    return letter if text in (None, letter) else None


def _choices(entry: Any) -> dict[str, str]:
    """Letter -> text, in order; empty where the entry lists none."""
    given = entry.get("choices") if isinstance(entry, dict) else None
    if not given:
        return {}
    if isinstance(given, list) and len(given) <= len(_LETTERS):
        return {letter: str(text) for letter, text in zip(_LETTERS, given, strict=False)}
    if isinstance(given, dict) and isinstance(given.get("label"), list) and isinstance(given.get("text"), list):
        return {str(a): str(b) for a, b in zip(given["label"], given["text"], strict=True)}
    if isinstance(given, dict):
        return {str(a): str(b) for a, b in given.items()}
    raise ValueError("the entry's choices are a list of at most 26 texts, or an object of letters and texts")
