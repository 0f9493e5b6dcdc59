"""The nouns that cross folders: frozen, and importing nothing of ours.

Shape letters used throughout: B rows of a batch, T positions in a row, N positions that carry loss,
V vocabulary, K kept vocabulary entries, D hidden width.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Protocol

CHAIN = "chain.json"
"""The file that makes a folder that of a chain of runs: its name, each stage's recipe, and what that begins from."""

ROUNDED = "-rounded"
"""Ends the name of a low-bit copy that was rounded only, beside one of the same format that was taught as well."""


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces: one text for one value, so that its hash is a name for it."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)


def json_safe(value: Any) -> Any:
    """``value`` with None in place of NaN and infinity, which JSON does not have, at any depth."""
    if isinstance(value, dict):
        return {k: json_safe(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [json_safe(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def readable_json(value: Any) -> str:
    """JSON of several lines, for people and programs; NaN and infinity as null."""
    return json.dumps(json_safe(value), indent=2, ensure_ascii=False, allow_nan=False)


def sha256_text(text: str) -> str:
    """Hex SHA-256 of the UTF-8 bytes of ``text``."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def sha256_json(value: Any) -> str:
    """Hex SHA-256 of the canonical JSON of ``value``."""
    return sha256_text(canonical_json(value))


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation; ``role`` is system, user, assistant or tool."""

    role: str
    content: str


@dataclass(frozen=True, slots=True)
class Task:
    """What a verifier needs to judge a response.

    ``name`` is the task (``chain_sum``), ``verifier`` the row of VERIFIERS, ``answer`` the gold answer, and
    ``entry`` the canonical JSON of whatever else the verifier wants (a reasoning-gym entry, say).
    """

    name: str
    verifier: str
    answer: str
    entry: str = "{}"


@dataclass(frozen=True, slots=True)
class Sample:
    """One prompt, and its response once there is one; or a plain text with no prompt.

    ``prompt`` is empty for plain text. ``response`` is None until somebody has written it. ``author`` is
    ``given`` when it came with the data, else the teacher's name. ``complete`` is False for a response or text
    that was cut off, so that no end-of-text token is taught after it. ``source`` and ``licence`` are as declared.
    ``teacher`` is the one of several that it is for, by its name in the recipe; None where there is one only.
    """

    prompt: tuple[Message, ...]
    response: str | None
    source: str
    licence: str = "undeclared"
    author: str = "given"
    complete: bool = True
    task: Task | None = None
    teacher: str | None = None

    @property
    def prompt_hash(self) -> str:
        """What the train/eval split goes by: the prompt, or the text itself where there is no prompt."""
        if not self.prompt:
            return sha256_text(self.response or "")
        return sha256_json([[m.role, m.content] for m in self.prompt])

    @property
    def response_hash(self) -> str:
        return sha256_text(self.response or "")

    @property
    def id(self) -> str:
        """Content hash of prompt and response: the record's name in the ledger."""
        return sha256_text(f"{self.prompt_hash}:{self.response_hash}:{int(self.complete)}")

    @property
    def messages(self) -> tuple[Message, ...]:
        """The whole conversation, the response as its last turn."""
        return (*self.prompt, Message("assistant", self.response or ""))

    def answered(self, response: str, author: str, complete: bool) -> Sample:
        """This sample with a response written by ``author``."""
        return replace(self, response=response, author=author, complete=complete)

    def to_json(self) -> dict[str, Any]:
        row = asdict(self)
        return row if self.teacher else {k: v for k, v in row.items() if k != "teacher"}

    @staticmethod
    def from_json(row: dict[str, Any]) -> Sample:
        task = row.get("task")
        return Sample(
            prompt=tuple(Message(**m) for m in row["prompt"]),
            response=row["response"],
            source=row["source"],
            licence=row["licence"],
            author=row["author"],
            complete=row["complete"],
            task=Task(**task) if task else None,
            teacher=row.get("teacher"),
        )


@dataclass(frozen=True, slots=True)
class Prompt:
    """What a teacher is to answer, in the forms that one or another takes: the turns; the text they make, less what a
    tokenizer puts in front of a text by itself; and its token ids. A text begun from nothing has no turns."""

    messages: tuple[Message, ...]
    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Encoded:
    """A sample as token ids. ``mask[i]`` is True where token i is to be learnt (predicted from the ones before)."""

    id: str
    ids: tuple[int, ...]
    mask: tuple[bool, ...]
    _token_hash: list[str] = field(default_factory=list, init=False, repr=False, compare=False)

    @property
    def loss_positions(self) -> list[int]:
        """Positions t whose *next* token is learnt: the ones a target is kept for, in order."""
        return [t for t in range(len(self.ids) - 1) if self.mask[t + 1]]

    def learnt_from(self, first: int) -> Encoded:
        """The same tokens, of which those before ``first`` are not learnt."""
        if True not in self.mask[:first]:
            return self
        return replace(self, mask=tuple(m and t >= first for t, m in enumerate(self.mask)))

    @property
    def token_hash(self) -> str:
        """Hash of ids and mask: what cached teacher targets are addressed by."""
        if not self._token_hash:  # asked for at every step
            self._token_hash.append(sha256_json([list(self.ids), [int(m) for m in self.mask]]))
        return self._token_hash[0]


@dataclass(frozen=True, slots=True)
class Verdict:
    """A verifier's judgement. A verifier that fails gives ``correct=False`` and says why in ``reason``."""

    correct: bool
    answer: str | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Interval:
    """A value with its 95 % interval and how that interval was made (``how``)."""

    mean: float
    low: float
    high: float
    how: str = ""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Artifact:
    """A file or folder of a run: path relative to the run, SHA-256 of its contents, size in bytes."""

    path: str
    sha256: str
    bytes: int
    facts: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Taught:
    """One tuning on somebody's traces, or to somebody's distribution.

    ``fingerprint`` is the teacher's; None where the traces came with the data, so that nobody knows who wrote them
    (``name`` is then their source). ``served`` says that the teacher was behind a server, whose fingerprint is not that
    of its weights; ``method`` and ``run`` are what it was done by.
    """

    name: str
    fingerprint: str | None
    method: str
    run: str
    served: bool = False


Lineage = tuple[Taught, ...] | None
"""In order; None of a model that says nothing of it, empty of one that is known to have been tuned by nobody."""


class Verifier(Protocol):
    """Judges one response. Never raises: what goes wrong becomes a Verdict."""

    def __call__(self, response: str, task: Task) -> Verdict: ...


class Teacher(Protocol):
    """A model that can be asked.

    ``fingerprint`` is the SHA-256 of its weights, or of what is known of them; ``name`` is for people; ``keeps`` says
    whether it keeps what it has written by itself, so that nobody else needs to, and takes all prompts at once;
    ``tokenizer`` is its own, None where that is not known.
    """

    @property
    def name(self) -> str: ...

    @property
    def fingerprint(self) -> str: ...

    @property
    def keeps(self) -> bool: ...

    @property
    def tokenizer(self) -> Any: ...

    def write(self, prompts: Sequence[Prompt], seed: int, progress: Callable[[int], None]) -> list[tuple[str, bool]]:
        """Responses: (text, whether it ended by itself). ``progress`` is told how many more are written."""
        ...

    def targets(self, samples: Sequence[Encoded], keep: Any) -> list[Any]:
        """What is kept of the distribution at each sample's loss positions (``teacher.targets.Keep`` and ``Kept``)."""
        ...


@dataclass(frozen=True, slots=True)
class Metric:
    """A measured quantity: its label, whether more is better, and its unit (percent, nats or bits)."""

    label: str
    higher_is_better: bool
    unit: str


METRICS: dict[str, Metric] = {
    "accuracy": Metric("accuracy (pass@1)", True, "percent"),
    "pass_at_k": Metric("pass@k", True, "percent"),
    "accuracy_harder": Metric("accuracy on harder problems (pass@1)", True, "percent"),
    "pass_at_k_harder": Metric("pass@k on harder problems", True, "percent"),
    "agreement": Metric("top-1 agreement with the teacher", True, "percent"),
    "kl_to_teacher": Metric("KL(teacher || model)", False, "nats"),
    "kl_from_teacher": Metric("KL(model || teacher)", False, "nats"),
    "bits_per_byte": Metric("bits per byte", False, "bits"),
    "ece": Metric("expected calibration error", False, "percent"),
    "agreement_parent": Metric("top-1 agreement with the full-precision student", True, "percent"),
    "kl_parent": Metric("KL(full-precision student || copy)", False, "nats"),
}
