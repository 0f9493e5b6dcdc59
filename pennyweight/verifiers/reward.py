"""What a response earns: its verdict and its form, each a number between 0 and 1."""

from __future__ import annotations

import re
import unicodedata

from pennyweight.records import Verdict

_THOUGHT = re.compile(r"\s*<think>(.*?)</think>(.*)", re.DOTALL)


def rewards(prompt: str, response: str, tokens: int, most: int, verdict: Verdict) -> dict[str, float]:
    """The parts of a reward, by the names of ``settings.Reward``.

    Args:
        prompt, response: texts, the response with its thought.
        tokens: of the response, its end counted.
        most: tokens that it may have.
        verdict: on its answer.
    """
    return {
        "accuracy": float(verdict.correct),
        "format": float(thinks_first(response)),
        "language": of_the_script(prompt, response),
        "brevity": min(1.0, max(0.0, (most - tokens) / (0.2 * most))),
    }


def thinks_first(response: str) -> bool:
    """Whether a response is one thought in <think></think> that is not empty, and an answer behind it."""
    found = _THOUGHT.fullmatch(response)
    if not found or not found[1].strip() or not found[2].strip():
        return False
    return not any(mark in part for part in found.groups() for mark in ("<think>", "</think>"))


def of_the_script(prompt: str, response: str) -> float:
    """Share of a response's letters that are of the script most of the prompt's letters are of; 1 where either has no
    letters. DeepSeek-R1 (arXiv 2501.12948) rewarded the share of words in the language that was asked for."""
    asked = [s for c in prompt if (s := _script(c))]
    given = [s for c in response if (s := _script(c))]
    if not asked or not given:
        return 1.0
    main = max(sorted(set(asked)), key=asked.count)
    return given.count(main) / len(given)


def _script(character: str) -> str | None:
    """Latin, Hangul, Cyrillic, ...: the first word of a letter's Unicode name; None of what is no letter."""
    if not character.isalpha():
        return None
    return unicodedata.name(character, "").partition(" ")[0]
