"""English texts of a report or a plan -> another language, by a table of phrases in ``LANGUAGE.toml``.

The English text stays in the code and is the key. A phrase may have places. ``{a}``, a small letter, stands for a
figure, and ``{A}``, a capital, for a single word; ``{time}`` for a text that is translated in its turn, and ``{NAME}``
for one that is kept as it is. ``{time:이}`` puts the Korean particle behind it that its last sound asks for.
``"<dt>teacher"`` is a phrase that counts in that element alone, ``"<thead>teacher"`` in the head of a table. What no
phrase is known of is looked for sentence by sentence, then part by part, and stays English where nothing is found; so
do code, links, and what models and users wrote.
"""

from __future__ import annotations

import html
import re
import tomllib
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

from pennyweight.errors import RecipeError

LANGUAGES = ("en", "ko")

_NUMBER = r"[<+\u2212-]?\d[\d.,/]*(?:e[+\u2212-]?\d+)?"
_FIGURE = rf"{_NUMBER}(?:–{_NUMBER})?(?:[ \u00a0]?%)?"
"""``93.1 %``, ``1/42``, ``2.6–39``."""

_WORD = r"[^\s,;:]*[^\s,;:.]"

_PLACE = re.compile(r"\{(\w+)(?::(\w+))?\}")
_ENGLISH = re.compile(r"\b[A-Za-z]?[a-z]{2,}\b")
_PARTS = (re.compile(r"(?<=[.?])( )"), re.compile("(; )"), re.compile("(: )"), re.compile("(, )"))
_KEPT = {"style", "pre", "code", "a"}
"""Elements whose text is nobody's to translate."""

_THEIRS = {"Data", "Licence of the data", "Teacher", "Licence of the teacher", "recipe"}
"""Facts whose values are the user's words."""

_SHOWN = re.compile(r'(?<= )(aria-label|title|content)="([^"]*)"')
_PARTICLES = {"은": "는", "이": "가", "을": "를", "과": "와", "으로": "로"}
"""Behind a last sound that is a consonant: what stands behind a vowel."""

_LONGEST = 1200  # characters of a sentence of ours; what is longer is somebody else's
_CONSONANTS, _LIKE_L = set("013678LMNRlmnr"), set("178LRlr")  # as digits and letters are read


class Language:
    """A language that texts and pages are put in; English is the one that leaves them as they are."""

    def __init__(self, code: str, phrases: Mapping[str, str]):
        self.code = code
        self._phrases = {k: v for k, v in phrases.items() if not _PLACE.search(k)}
        placed = sorted((k for k in phrases if _PLACE.search(k)), key=lambda k: -len(_PLACE.sub("", k)))
        self._patterns: dict[bool, list[tuple[re.Pattern[str], str]]] = {False: [], True: []}
        for k in placed:
            self._patterns[k.startswith("<")].append((_pattern(k), phrases[k]))
        self._found: dict[str, str] = {}

    def __call__(self, text: str) -> str:
        """A text in this language, as far as it has phrases for it."""
        core = text.strip()
        if self.code == "en" or not core:
            return text
        if core not in self._found:
            self._found[core] = self._translated(core)
        return text.replace(core, self._found[core])

    def page(self, text: str) -> str:
        """An HTML page: its texts, and what it says to who cannot see it."""
        return "".join(self._walked(text)) if self.code != "en" else text

    def _walked(self, text: str) -> Iterator[str]:
        inside, fact = [""], ""
        for i, piece in enumerate(re.split(r"(<[^>]*>)", text)):
            if i % 2 == 0:
                fact = html.unescape(piece) if inside[-1] == "dt" else fact
                kept = _KEPT & set(inside) or ("dd" in inside and fact in _THEIRS)
                yield piece if kept else self._node(piece, "thead" if "thead" in inside else inside[-1])
                continue
            tag = re.match(r"<(/?)([a-zA-Z0-9]+)", piece)
            if tag is None:
                yield piece
                continue
            if tag[1]:
                while len(inside) > 1 and inside.pop() != tag[2]:
                    continue
            elif not piece.endswith("/>"):
                inside.append(tag[2])
            if tag[0] == "<html":
                yield f'<html lang="{self.code}" style="word-break:keep-all">'  # lines break between words
                continue
            yield _SHOWN.sub(lambda m: f'{m[1]}="{html.escape(self(html.unescape(m[2])))}"', piece)

    def _node(self, piece: str, tag: str) -> str:
        plain = html.unescape(piece)
        own, _ = self._whole(f"<{tag}>{plain}")
        return html.escape(own or self(plain)) if plain.strip() else piece

    def _translated(self, text: str) -> str:
        """Sentence by sentence where each has a phrase; or as a whole, unless its parts leave less in English."""
        sentences = _PARTS[0].split(text)
        if len(text) > _LONGEST:
            return "".join(s if len(s) > _LONGEST else self(s) for s in sentences)
        each = [self._whole(s) for s in sentences[::2]] if len(sentences) > 1 else []
        if each and all(said is not None and not left for said, left in each):
            return " ".join(said for said, _ in each if said)
        whole, left = self._whole(text)
        if whole is not None and not left:
            return whole
        parts = self._by_parts(text)
        return parts if whole is None or len(english_words(parts)) < left else whole

    def _whole(self, text: str) -> tuple[str | None, int]:
        """By one phrase, the one that leaves the least in English of those that fit; and how many words it leaves."""
        exact = self._phrases.get(text.replace("\u00a0", " "))
        if exact is not None:
            return exact, 0
        best, least = None, 0
        for pattern, phrase in self._patterns[text.startswith("<")]:
            if (found := pattern.fullmatch(text)) is None:
                continue
            values = {k: self(v) if k.islower() and len(k) > 1 else v for k, v in found.groupdict().items()}
            left = sum(len(english_words(v)) for k, v in values.items() if k.islower())
            if best is None or left < least:
                best, least = _filled(phrase, values), left
            if not left:
                break
        if best is None and text.endswith("."):
            best, least = self._whole(text[:-1])
            return best and f"{best}.", least
        return best, least

    def _by_parts(self, text: str) -> str:
        for between in _PARTS:
            parts = between.split(text)
            said = [self(part) for part in parts] if len(parts) > 1 else parts
            if said != parts:
                return "".join(said)
        return text


ENGLISH = Language("en", {})


def in_language(code: str) -> Language:
    """The language of that code.

    Raises:
        RecipeError: there is none of that code.
    """
    if code not in LANGUAGES:
        raise RecipeError(f"--lang {code} is none of {', '.join(LANGUAGES)}; name one of them")
    return ENGLISH if code == "en" else _read(code)


def english_words(text: str) -> list[str]:
    """What may be words of English in it, or names."""
    return _ENGLISH.findall(text)


@cache
def _read(code: str) -> Language:
    said = tomllib.loads(Path(__file__).with_name(f"{code}.toml").read_text(encoding="utf-8"))
    return Language(code, {k: v for table in said.values() for k, v in table.items()})


def _pattern(key: str) -> re.Pattern[str]:
    out, at = "", 0
    for place in _PLACE.finditer(key):
        name = place[1]
        stands = ".+?" if len(name) > 1 else _FIGURE if name.islower() else _WORD
        out += f"{re.escape(key[at : place.start()])}(?P<{name}>{stands})"
        at = place.end()
    return re.compile((out + re.escape(key[at:])).replace("\\ ", "[ \u00a0]"), re.DOTALL)


def _filled(phrase: str, values: Mapping[str, str]) -> str:
    return _PLACE.sub(lambda m: values[m[1]] + (_particle(values[m[1]], m[2]) if m[2] else ""), phrase)


def _particle(word: str, particle: str) -> str:
    """``particle``, or what stands in its place behind a vowel."""
    told = re.sub(r"(?<=.)\([^()]*\)$", "", word)  # what is in brackets at the end has no say
    last = next((c for c in reversed(told) if c.isalnum() or c == "%"), "")
    behind, like_l = last in _CONSONANTS, last in _LIKE_L
    if "가" <= last <= "힣":
        sound = (ord(last) - ord("가")) % 28
        behind, like_l = sound > 0, sound == 8
    if not behind or (particle == "으로" and like_l):
        return _PARTICLES[particle]
    return particle
