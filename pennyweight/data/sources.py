"""Files, hub rows and procedural tasks -> samples.

A row is a conversation, a prompt with or without a response, or a text. Columns are known by their usual names;
names given in the recipe come first. Every message names the place of the row and the cure.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from pennyweight.data.columns import ANSWERS, MESSAGES, PROMPTS, RESPONSES, SEVERAL, TEXTS
from pennyweight.data.files import rows
from pennyweight.data.tasks import in_style, problems
from pennyweight.data.thought import CLOSE, joined
from pennyweight.errors import DataError
from pennyweight.recipe import FileData, TaskData
from pennyweight.records import Message, Sample, Task
from pennyweight.verifiers.own import check_judge, made_with
from pennyweight.verifiers.rows import entry_of

Route = Callable[[Mapping[str, Any], str], str]
"""(row, the place it stands at) -> the teacher that it is for"""

_SYSTEMS = ("system", "system_prompt")
_ROLES = {
    **{r: r for r in ("system", "user", "assistant", "tool")},
    "human": "user",
    "gpt": "assistant",
    "bot": "assistant",
    "model": "assistant",
    "chatgpt": "assistant",
    "developer": "system",
    "function": "tool",
    "observation": "tool",
}


def read_tasks(source: TaskData) -> list[Sample]:
    """Problems of all the tasks, in order, without repeated prompts.

    Raises:
        DataError: a task is unknown or refuses its settings.
    """
    out: dict[str, Sample] = {}
    for task in source.tasks:
        for sample in problems(task.name, task.size, source.seed, task.config):
            out.setdefault(sample.prompt_hash, in_style(sample, task.worked, task.think))
    return list(out.values())


def read(source: FileData, route: Route | None = None) -> list[Sample]:
    """Samples of a file, a folder, a saved dataset or a hub dataset, in order; ``route`` says whose each row is.

    ``Sample.source`` is the last part of the declared path (all of a hub name), never where it lies on this machine.
    Rows whose text is blank are passed over; a blank response is no response.

    Raises:
        DataError: what is declared cannot be read, or a row does not fit; the message names file and line.
    """
    check_judge(source.verifier, source.answer)
    name = source.path if not Path(source.path).expanduser().exists() else Path(source.path).expanduser().resolve().name
    form = _Form(source, name)
    samples = []
    for where, row in islice(rows(source.path, source.split), source.limit):
        made = form.samples(row, where)
        samples += [replace(s, teacher=route(row, where)) for s in made] if route else made
    if not samples:
        raise DataError(f"{name} has no rows; give a file with data in it")
    return samples


class _Form:
    """How rows of one source become samples."""

    def __init__(self, source: FileData, name: str):
        self.given, self.name = source, name
        self.own = made_with(source)

    def samples(self, row: Any, where: str) -> list[Sample]:
        """The samples of a row: one, none for a blank text, or one for each of several responses."""
        column = self.given.response or (_first(row, SEVERAL) if isinstance(row, dict) else None)
        value = row.get(column) if isinstance(row, dict) and column else None
        if not (isinstance(value, list) and value and all(isinstance(x, str) for x in value)):
            made = [self.sample(row, where)]
        else:
            one = _Form(self.given.model_copy(update={"response": column}), self.name)
            made = [one.sample({k: v for k, v in row.items() if k != "messages"} | {column: x}, where) for x in value]
        return [s for s in made if s is not None]

    def sample(self, row: Any, where: str) -> Sample | None:
        """The sample of a row with one response or none; None for a blank text."""
        if not isinstance(row, dict):
            raise DataError(f"{where} holds {_shown(row)}, not a row of named columns; write it as {{...}} with names")
        gold_column = self._gold_column(row, where)
        prompt, response = self._turns(row, where, gold_column)
        if not prompt and response is None:
            return None
        task = None
        if gold_column is not None or self.own or self.given.verifier == "code":
            gold = "" if gold_column is None else self._gold(row[gold_column], where, gold_column)
            entry = {"row": row, **self.own} if self.own else entry_of(row, self.given.verifier, where)
            task = Task("file", self.given.verifier or "", gold, json.dumps(entry, sort_keys=True, default=str))
        return Sample(prompt, response, self.name, self.given.licence, task=task)

    def _turns(self, row: dict[str, Any], where: str, gold: str | None) -> tuple[tuple[Message, ...], str | None]:
        """Prompt and response of a row; both empty for a blank text."""
        given = self.given
        if given.text is not None:
            return (), _text(_named(row, given.text, where), where, given.text).strip() or None
        conversation = _first(row, MESSAGES) if given.prompt is None else None
        if conversation is not None:
            return _conversation(row[conversation], where, conversation)
        column = _named_column(row, given.prompt, where) or _first(row, PROMPTS)
        if column is None and _is_turns(row.get("turns")):
            return _prompt(row["turns"][0], where, "turns"), None
        if column is not None:
            return self._asked(row, where, column), self._answered(row, where, gold)
        text = _first(row, TEXTS)
        if text is not None:
            return (), _text(row[text], where, text).strip() or None
        raise DataError(
            f"{where} has no column known as a prompt, messages or text (it has: {_columns(row)}); name one with "
            "data.source.prompt or data.source.text"
        )

    def _asked(self, row: dict[str, Any], where: str, column: str) -> tuple[Message, ...]:
        """The prompt column, after the system column and with the input column, where a row has them."""
        prompt = _prompt(row[column], where, column)
        more = row.get("input") if column == "instruction" else None
        if isinstance(more, str) and more.strip() and len(prompt) == 1:
            prompt = (Message("user", f"{prompt[0].content}\n\n{more}"),)
        system = _first(row, _SYSTEMS)
        if system is not None and prompt[0].role != "system" and (row[system] or ""):
            prompt = (Message("system", _text(row[system], where, system)), *prompt)
        return prompt

    def _answered(self, row: dict[str, Any], where: str, gold: str | None) -> str | None:
        """The response column. A bare gold answer is not taken for one; a worked solution that ends in it is."""
        column = _named_column(row, self.given.response, where)
        if column is None:
            others = [c for c in RESPONSES if c != gold and c in row]
            worked = gold is not None and gold in RESPONSES and "####" in str(row[gold])
            worked = worked and self.given.verifier != "code"  # where it is a comment
            column = gold if worked else next(iter(others), None)
        if column is None or row[column] is None:
            return None
        value = row[column]
        if isinstance(value, list) and len(value) == 1 and isinstance(value[0], Mapping):
            value = _message(value[0], where, column).content
        text = _text(value, where, column)
        return _with_thought(text, row, where, column) if text.strip() else None

    def _gold_column(self, row: dict[str, Any], where: str) -> str | None:
        if self.given.verifier is None:
            return None
        named = _named_column(row, self.given.answer, where)
        if self.given.verifier == "code":  # the tests decide, and a program is there to try them
            return named or _first(row, (*ANSWERS, "code"))
        column = named or _first(row, ANSWERS)
        if column is None and not self.own:
            raise DataError(f"{where} has no answer for the verifier to go by; name the column with data.source.answer")
        return column

    def _gold(self, value: Any, where: str, column: str) -> str:
        if self.given.verifier != "code":
            return _gold(value, where, column)
        return "" if value is None else _text(value, where, column)


def _first(row: dict[str, Any], names: Sequence[str]) -> str | None:
    """The first of ``names`` that the row has something under, else the first it has at all."""
    there = [n for n in names if n in row]
    return next((n for n in there if row[n] is not None), there[0] if there else None)


def _named_column(row: dict[str, Any], name: str | None, where: str) -> str | None:
    if name is not None and name not in row:
        raise DataError(f"{where} has no column {name!r} (it has: {_columns(row)}); correct the name")
    return name


def _columns(row: dict[str, Any]) -> str:
    return ", ".join(map(str, row)) or "none"


def _named(row: dict[str, Any], name: str, where: str) -> Any:
    return row[_named_column(row, name, where) or name]


def _shown(value: Any) -> str:
    text = repr(value)
    return f"{text if len(text) <= 40 else text[:39] + '…'} ({type(value).__name__})"


def _text(value: Any, where: str, column: str) -> str:
    """``value`` as text that can be written as UTF-8."""
    if not isinstance(value, str):
        raise DataError(f"{where}: {column} holds {_shown(value)}, not text; put quotes around it or drop the row")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as e:
        at = f"character {e.start + 1}"
        raise DataError(f"{where}: {column} has half a surrogate pair at {at}, which is no text; correct it") from None
    return value


def _gold(value: Any, where: str, column: str) -> str:
    """The gold answer: after ``####`` where there is one; numbers are written out."""
    if isinstance(value, int | float) and not isinstance(value, bool):
        value = str(value)
    gold = _text(value, where, column).rpartition("####")[2].strip()
    if not gold:
        raise DataError(f"{where}: {column} is blank, so nothing can be verified; fill it in or drop the row")
    return gold


def _prompt(value: Any, where: str, column: str) -> tuple[Message, ...]:
    """A prompt column: one user turn, or a list of turns."""
    if isinstance(value, list):
        prompt, response = _conversation(value, where, column)
        if response is not None:
            raise DataError(
                f"{where}: {column} ends with an assistant turn; name the column data.source.prompt=messages"
            )
        return prompt
    text = _text(value, where, column)
    if not text.strip():
        raise DataError(f"{where}: {column} is blank; fill it in or drop the row")
    return (Message("user", text),)


def _is_turns(value: Any) -> bool:
    """MT-bench's form: what the user says, turn by turn."""
    return isinstance(value, list) and bool(value) and isinstance(value[0], str)


def _conversation(value: Any, where: str, column: str) -> tuple[tuple[Message, ...], str | None]:
    """The turns before the last assistant turn that ends the conversation, and that turn if there is one."""
    if not isinstance(value, list) or not value:
        raise DataError(f"{where}: {column} holds {_shown(value)}, not a list of turns; give role and content of each")
    turns = [_message(m, where, f"{column}[{i}]") for i, m in enumerate(value)]
    response = turns.pop().content if turns[-1].role == "assistant" else None
    if not any(m.role == "user" for m in turns):
        raise DataError(f"{where}: {column} has no user turn to respond to; add one or drop the row")
    return tuple(turns), response if response and response.strip() else None


def _message(value: Any, where: str, column: str) -> Message:
    """One turn, in the OpenAI (role, content) or the ShareGPT (from, value) form; parts of text are joined."""
    if not isinstance(value, Mapping):
        raise DataError(f"{where}: {column} holds {_shown(value)}, not a turn; write it with role and content")
    role, content = (value.get("role", value.get("from")), value.get("content", value.get("value")))
    if role not in _ROLES:
        raise DataError(f"{where}: {column} has the unknown role {role!r}; use system, user, assistant or tool")
    if isinstance(content, list) and all(isinstance(p, Mapping) and p.get("type") == "text" for p in content):
        content = "".join(_text(p.get("text"), where, column) for p in content)
    if content is None and value.get("tool_calls"):
        raise DataError(f"{where}: {column} calls a tool and says nothing, which cannot be learnt yet; drop the row")
    text = _text(content, where, f"{column} content")
    return Message(_ROLES[role], _with_thought(text, value, where, column) if _ROLES[role] == "assistant" else text)


def _with_thought(text: str, of: Mapping[str, Any], where: str, column: str) -> str:
    """A response with the thought that stands beside it, where one does and is not in it already."""
    thought = of.get("reasoning_content")
    if thought is None or CLOSE in text or not _text(thought, where, f"{column} reasoning_content").strip():
        return text
    return joined(thought, text)
