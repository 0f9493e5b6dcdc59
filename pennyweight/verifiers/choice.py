"""Multiple choice: which of the choices a response gives as its answer."""

from __future__ import annotations

import json
import re
from typing import Any

from pennyweight.records import Task, Verdict
from pennyweight.verifiers.exact import final_answer, never_raises, no_answer, normalised

_LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MARKUP = re.compile(r"[*_`$]+|\\(?:text|mathbf|mathrm|textbf|boxed)\b")
_SAID = r"(?:the\s+)?(?:(?:correct|right|final|best)\s+)?(?:answer|option|choice|정답|답)(?:\s+is|은|는)?\s*(?::\s*)?"
_GOES_ON = r"\s+(?:is|because|since|or|and|또는|혹은)\b.*|\s*[-–—=/&].*|\s*(?:입니다|번|이다).*"
_JOINED = r"(?P<by>[\s.:,/;&]*(?:\b(?:or|and)\b|또는|혹은)?)\s*(?:(?:option|choice)\s+)?"
_LONGEST = 2000
_NEGATED = re.compile(r"\bnot\b|n't\b|아니|아닌", re.IGNORECASE)


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
        return no_answer(response)
    found = picked(answer, choices)
    if found is None:
        return Verdict(False, answer, "no one choice in it")
    return Verdict(found == gold, found, "" if found == gold else f"not {gold}")


def picked(answer: str, choices: dict[str, str]) -> str | None:
    """The letter of the one choice that a final answer names; None where it names none, or more than one.

    Taken: ``B``, ``b``, ``(B)``, ``B.``, ``**B**``, ``option B``, ``답: B``, ``B) its text``, ``B is correct``, ``so it
    is (B)``, and the choice's own text. Not taken: ``A or B``, ``A dog``, a letter with another choice's text.
    """
    by_text = {normalised(text): letter for letter, text in choices.items()}
    if len(by_text) < len(choices):
        by_text = {}  # two choices of one text: the text names neither
    whole = by_text.get(normalised(answer)) or by_text.get(normalised(answer).rstrip("."))
    if whole:
        return whole
    if len(answer) > _LONGEST:
        return None
    plain = " ".join(_MARKUP.sub("", answer).split())
    one = f"(?:{'|'.join(re.escape(c) for c in choices) or '[A-Z]'})"
    spelt = {c.upper(): c for c in choices or _LETTERS}
    at_start = re.fullmatch(
        rf"(?:{_SAID})*[(\[{{]?(?P<letter>{one})(?![A-Za-z0-9])(?P<rest>[)\]}}].*|[.:,;].*|{_GOES_ON})?",
        plain,
        re.IGNORECASE,
    )
    if at_start:
        letter, rest = spelt[at_start["letter"].upper()], at_start["rest"] or ""
        rest = rest.lstrip(")]}")
        other = re.match(rf"{_JOINED}[(\[{{]?(?P<letter>{one})\b", rest, re.IGNORECASE)
        if other and _another(other, rest[other.end() :]) and spelt[other["letter"].upper()] != letter:
            return None
        return letter if by_text.get(normalised(rest.lstrip(" .:-–—="))) in (None, letter) else None
    marked = re.findall(rf"\b(?:option|choice|answer)\s+[(\[]?({one})\b|[(\[]({one})[)\]]", plain, re.IGNORECASE)
    letters = {spelt[(a or b).upper()] for a, b in marked}
    return letters.pop() if len(letters) == 1 and not _NEGATED.search(plain) else None


def _another(found: re.Match[str], after: str) -> bool:
    """Whether a second letter is another choice (``A or B``), not a text's first word (``B. A dog``, ``1. 2 km``)."""
    if not re.match(r"\s+\w", after):
        return True
    return bool(re.search(r"[,/;&\w]", found["by"])) and found["letter"].upper() not in "AI"


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
