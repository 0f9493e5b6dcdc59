"""Teacher: a model behind any OpenAI-compatible server. It writes; and it labels where the server tells log-probs.

Every answer is kept in a file of the run as soon as it arrives (``paid.py``), by the hash of its request, so that
neither a kill nor a repeated run pays for it twice. What was under way when a process was killed is asked again, since
nobody knows of it. A request does not depend on its place in the data, so rows that are added later change nothing of
what was answered before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from pennyweight.data.thought import OPEN, joined
from pennyweight.errors import EndpointError
from pennyweight.progress import say, stoppable
from pennyweight.recipe import EndpointTeacher
from pennyweight.records import Encoded, Message, Prompt, sha256_json
from pennyweight.teacher.client import Client, Request
from pennyweight.teacher.paid import Paid
from pennyweight.teacher.targets import Keep, Kept
from pennyweight.teacher.token_names import TokenNames
from pennyweight.teacher.told import Line, Telling, asking, find_telling, kept, read_line

_PLAIN = {"top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0, "repetition_penalty": 1.0}
"""What turns off that llama.cpp, vLLM and others change a distribution by default; OpenAI's own server refuses it."""

_PATHS = {"chat": "/chat/completions", "completions": "/completions"}

_FEW = 2
"""Retries where something is only tried out."""

_NOT_THE_FORM = {None, 401, 403, 408, 429}
"""Refusals that asking in another form would not change; None: it was not reached, or said nothing that can be read."""


@dataclass(frozen=True, slots=True)
class Dialect:
    """How a server wants to be asked: which API, what the limit of tokens is called, and what goes into every body."""

    api: str
    limit: str
    always: dict[str, Any]

    def request(self, model: str, messages: Sequence[Message], text: str, tokens: int, how: dict[str, Any]) -> Request:
        """A request for at most so many ``tokens``: of a chat its turns, else the text."""
        what = {"messages": [asdict(m) for m in messages]} if self.api == "chat" else {"prompt": text}
        return Request(_PATHS[self.api], {"model": model, **what, self.limit: tokens, **how, **self.always})

    def read(self, body: Any) -> dict[str, Any]:
        """``text`` and ``ended``, whether it ended by itself."""
        choice = body["choices"][0]
        said = choice["message"] if self.api == "chat" else {"content": choice["text"]}
        text, thought = said.get("content"), said.get("reasoning_content") or said.get("reasoning")
        if not isinstance(text, str | None):  # None: it calls a tool, say, and that is paid for, too
            raise ValueError("no text")
        if isinstance(thought, str) and OPEN not in (text or ""):  # which the server has taken out of the text
            text = joined(thought, text)
        return {"text": text or "", "ended": choice.get("finish_reason") == "stop"}


class Endpoint:
    """A model at a server, with the answers that have been paid for.

    Args:
        model: the server's name of it; None where the server has one only.
    """

    def __init__(self, client: Client, model: str | None, paid: Paid):
        self.client, self.asked_for, self.paid = client, model, paid

    @property
    def model(self) -> str:
        return self.report["model"]

    @cached_property
    def report(self) -> dict[str, Any]:
        """What the server said of the model: ``model``, its name, and ``listed``, what is lasting in its entry."""
        return self.settled({"what": "models"}, lambda: self._now)

    @cached_property
    def _now(self) -> dict[str, Any]:
        """The same as it is now: asked when the first thing of this process has to be asked, and not before."""
        lasting = ("id", "owned_by", "root", "parent", "max_model_len")
        read = lambda body: {str(m["id"]): {k: m[k] for k in lasting if k in m} for m in body["data"]}  # noqa: E731
        listed: dict[str, Any] = {}
        try:
            self.client.ask_all([Request("/models")], read, lambda _, found: listed.update(found), _FEW)
        except EndpointError as e:
            if e.status not in (404, 405, 501) or self.asked_for is None:
                raise  # but a server need not say what it has
        known = ", ".join(list(listed)[:8]) or "none"
        if self.asked_for is None and len(listed) != 1:
            raise EndpointError(
                f"{self.client.host} has {len(listed)} models ({known}); name one with teacher.model or --teacher-model"
            )
        model = self.asked_for or next(iter(listed))
        if listed and model not in listed:
            say(f"{self.client.host} does not list the model {model} (but {known}), and is asked for it all the same")
        return {"model": model, "listed": listed.get(model, {})}

    def settled(self, what: dict[str, Any], find: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Something found out about the server, found out once and kept among its answers."""
        key = sha256_json({"url": self.client.url, "model": self.asked_for, **what})
        if key not in self.paid:
            self.paid.keep(key, find())
        return self.paid[key]

    def ask(
        self,
        requests: Sequence[tuple[Request, int]],
        read: Callable[[Any], dict[str, Any]],
        progress: Callable[[int], None] = lambda n: None,
        retries: int | None = None,
    ) -> list[dict[str, Any]]:
        """Answers to requests, each with the number of its repeat, in order: those paid for, and the others from the
        server.

        Raises:
            EndpointError, RecipeError, KeyboardInterrupt: as ``Client.ask_all``; or the server has another model now.
        """
        hashed = [{"url": self.client.url, "path": r.path, "body": r.body, "repeat": n} for r, n in requests]
        keys = [sha256_json(h) for h in hashed]
        places = {key: i for i, key in enumerate(keys)}
        missing = [i for key, i in places.items() if key not in self.paid]
        progress(len(keys) - len(missing))
        if missing and self._now != self.report:
            raise EndpointError(
                f"{self.client.host} says of its model {self._now}, and said {self.report} when this run began; choose "
                "another --out for another teacher"
            )

        def keep(number: int, found: tuple[dict[str, Any], Any]) -> None:
            self.paid.keep(keys[missing[number]], *found, asked=requests[missing[number]][0].body)
            progress(1)

        if missing:
            both = lambda body: (read(body), body.get("usage"))  # noqa: E731
            self.client.ask_all([requests[i][0] for i in missing], both, keep, retries)
        return [self.paid[key] for key in keys]

    def dialect(self, api: str) -> Dialect:
        """How the server wants to be asked: found out once, by asking for very little.

        Args:
            api: ``chat``, ``completions``, or ``auto``: chat where the server has it.
        """
        return Dialect(**self.settled({"what": "dialect", "api": api}, lambda: asdict(self._try_out(api))))

    def _try_out(self, api: str) -> Dialect:
        tried = [Dialect(a, "max_tokens", always) for a in _PATHS for always in (_PLAIN, {}) if api in (a, "auto")]
        if api != "completions":
            tried.insert(2, Dialect("chat", "max_completion_tokens", {}))
        refused: list[EndpointError] = []
        for dialect in tried:
            request = dialect.request(self.model, (Message("user", "Hi"),), "Hi", 16, {})
            try:
                self.ask([(request, 0)], dialect.read, retries=_FEW)
                return dialect
            except EndpointError as e:
                if e.status in _NOT_THE_FORM:
                    raise
                refused.append(e)
        raise refused[min(1, len(refused) - 1)]


def endpoint_of(t: EndpointTeacher, answers: Path) -> Endpoint:
    """The endpoint that a recipe names, with its answers in that file."""
    return Endpoint(Client(t.url, stoppable, t.key_env, t.concurrency, t.timeout, t.retries), t.model, Paid(answers))


@dataclass(frozen=True)
class ServedTeacher:
    """A model at an endpoint as teacher; ``write_*`` are how it writes, and ``tokenizer`` is its own, where known;
    ``member`` is its name among several."""

    endpoint: Endpoint
    api: str = "auto"
    tokenizer: Any = None
    write_temperature: float = 1.0
    write_top_p: float = 1.0
    write_tokens: int = 256
    member: str = ""

    keeps = True

    @property
    def name(self) -> str:
        """Whom the ledger names as the author: ``model@host``."""
        name = f"{self.endpoint.model}@{self.endpoint.client.host}"
        return f"{name} ({self.member})" if self.member else name

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the host, the model's name there, and what the server says of it: its weights nobody here sees."""
        return sha256_json({"host": self.endpoint.client.host, **self.endpoint.report})

    def facts(self) -> dict[str, Any]:
        """What the ledger and the report keep of it; sizes nobody here knows."""
        listed = self.endpoint.report["listed"]
        unknown = {"params": None, "bytes": None, "context": None, "shape": {}}
        identity = sha256_json([self.fingerprint, self.api])
        return {
            "name": self.name,
            "fingerprint": self.fingerprint,
            "identity": identity,
            "listed": listed,
            **unknown,
        }

    def from_nothing(self, temperature: float, top_p: float, tokens: int) -> ServedTeacher:
        """The same teacher as it writes texts that nobody asked for, which chats do not."""
        how = {"write_temperature": temperature, "write_top_p": top_p, "write_tokens": tokens}
        return replace(self, api="completions", **how)

    def write(
        self, prompts: Sequence[Prompt], seed: int, progress: Callable[[int], None] = lambda n: None
    ) -> list[tuple[str, bool]]:
        """Responses: (text, whether it ended by itself). The same prompt again is another request, with a seed of its
        own."""
        dialect, asked = self.endpoint.dialect(self.api), Counter[Prompt]()
        requests = []
        for p in prompts:
            number = asked[p]
            asked[p] += 1
            how = {"temperature": self.write_temperature, "top_p": self.write_top_p, "seed": (seed + number) % 2**31}
            requests.append((dialect.request(self.endpoint.model, p.messages, p.text, self.write_tokens, how), number))
        return [(_whole(a["text"]), a["ended"]) for a in self.endpoint.ask(requests, dialect.read, progress)]

    def targets(self, samples: Sequence[Encoded], keep: Keep) -> list[Kept]:
        """The ``keep.k`` most probable tokens at each sample's loss positions, as the server tells them.

        Raises:
            EndpointError: it does not, or not of this tokenizer's tokens.
        """
        telling = self.telling(keep.k)
        prompts = [list(s.ids) if telling.by_ids else self._text(s.ids) for s in samples]
        read = lambda body: {"line": read_line(telling.form, body)}  # noqa: E731
        answers = self.endpoint.ask([(self._asking(telling.form, p, telling.asked), 0) for p in prompts], read)
        return [kept(s, a["line"], telling.asked, keep, self._names) for s, a in zip(samples, answers, strict=True)]

    def telling(self, k: int) -> Telling:
        """How the server tells of the ``k`` most probable tokens; found out once.

        Raises:
            EndpointError: it tells of none, or of fewer, or its tokens are not those of the tokenizer.
        """
        find = lambda: asdict(find_telling(self._told, k, self.tokenizer, self._names, self.endpoint.client.host))  # noqa: E731
        of = sha256_json(self.tokenizer.get_vocab())
        return Telling(**self.endpoint.settled({"what": "telling", "k": k, "tokenizer": of}, find))

    def _told(self, form: str, prompt: list[int] | str, k: int) -> Line | str:
        """What the server tells of a prompt; nothing where it passes over the question, or how it refuses."""

        def read(body: Any) -> dict[str, Any]:
            body["choices"][0]  # without which it is no answer at all
            try:
                return {"line": read_line(form, body)}
            except (KeyError, TypeError, IndexError, ValueError, AttributeError):
                return {"line": []}

        try:
            return self.endpoint.ask([(self._asking(form, prompt, k), 0)], read, retries=_FEW)[0]["line"]
        except EndpointError as e:
            if e.status in _NOT_THE_FORM:
                raise
            return e.said

    def _asking(self, form: str, prompt: list[int] | str, k: int) -> Request:
        """A request to be told of a prompt; penalties are off, lest the one token that is generated is another."""
        always = self.endpoint.dialect("completions").always
        return Request(_PATHS["completions"], {"model": self.endpoint.model, **asking(form, prompt, k), **always})

    @cached_property
    def _names(self) -> TokenNames:
        return TokenNames(self.tokenizer)

    def _text(self, ids: Sequence[int]) -> str:
        """The text of ``ids``, less what the server's tokenizer puts in front of a text by itself."""
        first = self.tokenizer("a")["input_ids"][:1]
        own = ids[1:] if [self.tokenizer.bos_token_id] == first == list(ids[:1]) else ids
        return self.tokenizer.decode(list(own), skip_special_tokens=False, clean_up_tokenization_spaces=False)


def _whole(text: str) -> str:
    """``text`` with U+FFFD for each half of a surrogate pair, at which a server cuts an emoji that it counts as two."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
