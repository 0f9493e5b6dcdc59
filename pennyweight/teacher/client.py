"""Many requests to one OpenAI-compatible server: so many at a time, and again with patience where one fails.

Async lives only here. A request is asked again after 408, 409, 425, 429 and 5xx, after a time-out, a cut connection and
an answer that cannot be read, each time after a longer wait with chance in it; where the server says how long to wait
(Retry-After, RFC 9110 10.2.3), all requests wait as long. Any other refusal is said at once. Whatever was asked before
a failure or Ctrl-C is still waited for and handed on, since it is paid for.

The key comes from the environment, goes out in one header, and is cut from everything that the server says.
"""

from __future__ import annotations

import asyncio
import json
import os
import random
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any
from urllib.parse import urlsplit

from pennyweight.errors import EndpointError, RecipeError
from pennyweight.version import __version__

_AGAIN = {408, 409, 425, 429}
_FIRST_WAIT, _LONGEST_WAIT = 0.5, 60.0  # seconds: the back-off doubles from one to the other
_PATIENCE = 900.0  # seconds: a server that asks to wait longer is not waited for
_SECRET = 12  # characters: shorter keys are passwords of nobody (EMPTY, none), and words that answers may hold
_KEPT = "what was answered is kept, and the same command asks only for the rest"


Stoppable = Callable[[str], AbstractContextManager[Callable[[], bool]]]
"""What is still finished, for people -> inside, whether the user has asked to stop"""


@dataclass(frozen=True, slots=True)
class Request:
    """One request: the path below the server's url, and its JSON body; without one it is a GET."""

    path: str
    body: dict[str, Any] | None = None


class _Trouble(Exception):
    """A request that may do better later; ``wait`` is how many seconds the server asks for."""

    def __init__(self, what: str, status: int | None = None, wait: float | None = None):
        super().__init__(what)
        self.status, self.wait = status, wait


@dataclass
class Client:
    """A server, and how it is asked.

    ``url`` is the one that paths are put behind (…/v1); ``key_env`` names the environment variable that holds the key;
    ``timeout`` is in seconds, for a whole answer; ``retries`` are tries after the first; ``stoppable`` is
    ``progress.stoppable``, or something like it.
    """

    url: str
    stoppable: Stoppable
    key_env: str | None = None
    concurrency: int = 8
    timeout: float = 300.0
    retries: int = 8
    _open_at: float = field(default=0.0, init=False, repr=False)

    @property
    def host(self) -> str:
        """Host and port."""
        return urlsplit(self.url).netloc

    def ask_all(
        self,
        requests: Sequence[Request],
        read: Callable[[Any], Any],
        keep: Callable[[int, Any], None],
        retries: int | None = None,
    ) -> None:
        """Ask all, in any order.

        Args:
            read: from the JSON of an answer to what is kept of it; a ValueError, KeyError, TypeError or IndexError of
                it says that the answer cannot be used, and the request is made again.
            keep: told the number of a request and what was read, as soon as it is there.
            retries: fewer than the client's.

        Raises:
            EndpointError: a request was refused, or failed too often; those under way were waited for.
            RecipeError: the key is missing.
            KeyboardInterrupt: Ctrl-C or SIGTERM; a first one waits for what is under way, a second one does not.
        """
        with self.stoppable("the answers under way, which are paid for") as should_stop:
            tries = min(self.retries, self.retries if retries is None else retries)
            _run(self._ask_all(requests, read, keep, should_stop, tries))
            if should_stop():
                raise KeyboardInterrupt

    async def _ask_all(
        self,
        requests: Sequence[Request],
        read: Callable[[Any], Any],
        keep: Callable[[int, Any], None],
        should_stop: Callable[[], bool],
        retries: int,
    ) -> None:
        key, failed = self._key(), []
        ended = lambda: bool(failed) or should_stop()  # noqa: E731
        todo = iter(enumerate(requests))

        async def worker(http: Any) -> None:
            for number, request in _until(ended, todo):
                try:
                    answer = await self._patiently(http, key, request, read, ended, retries)
                except EndpointError as e:
                    failed.append(e)
                    return
                if answer is not None:
                    keep(number, answer)

        async with _open(self.url, key, self.timeout, self.concurrency) as http:
            await asyncio.gather(*(worker(http) for _ in range(min(self.concurrency, len(requests)))))
        if failed:
            raise failed[0]

    async def _patiently(
        self, http: Any, key: str, request: Request, read: Callable[[Any], Any], ended: Callable[[], bool], retries: int
    ) -> Any:
        """What was read of the answer, after as many tries as it takes; None where the work ended meanwhile."""
        wait = _FIRST_WAIT
        for left in range(retries, -1, -1):
            await _sleep(self._open_at - time.monotonic(), ended)
            if ended():
                return None
            try:
                return await self._once(http, key, request, read)
            except _Trouble as e:
                if e.wait is not None and e.wait > _PATIENCE:
                    raise EndpointError(
                        f"{self.host} asks to wait for {e.wait:,.0f} seconds ({e}); run the same command then: {_KEPT}",
                        e.status,
                    ) from None
                if not left:
                    raise EndpointError(self._gave_up(e, retries + 1), e.status, str(e)) from None
                if e.wait is not None:  # for everybody: who asks meanwhile is only turned away as well
                    self._open_at = max(self._open_at, time.monotonic() + e.wait)
                await _sleep(wait * random.uniform(0.5, 1.0), ended)
                wait = min(_LONGEST_WAIT, 2 * wait)
        return None

    async def _once(self, http: Any, key: str, request: Request, read: Callable[[Any], Any]) -> Any:
        import httpx2

        try:
            async with asyncio.timeout(self.timeout):
                method = "GET" if request.body is None else "POST"
                response = await http.request(method, f"{self.url}{request.path}", json=request.body)
        except (TimeoutError, httpx2.TimeoutException):
            raise _Trouble(f"no answer within teacher.timeout={self.timeout:g} seconds") from None
        except httpx2.ConnectError as e:
            raise _Trouble(f"nothing answers there: {_clean(str(e), key) or type(e).__name__}") from None
        except httpx2.RequestError as e:
            raise _Trouble(f"the connection was cut, or its body cannot be unpacked ({type(e).__name__})") from None
        status, text = response.status_code, response.text
        if status in _AGAIN or status >= 500:
            raise _Trouble(_said(status, text, key), status, wait_of(response.headers.get("retry-after")))
        if not 200 <= status < 300:
            said = _said(status, text, key)
            raise EndpointError(self._refused(status, said, key, request), status, said)
        try:
            return read(_cleaned(json.loads(text), key))
        except (ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError):
            told = _said(status, text, key)
            raise _Trouble(f"its answers cannot be read as an OpenAI-compatible server's ({told})") from None

    def _refused(self, status: int, said: str, key: str, request: Request) -> str:
        if status in (401, 403):  # what it says may hold a part of the key, so it is not repeated
            if key:
                return f"{self.host} refuses the key ({status}); put a valid one in the environment as {self.key_env}"
            return (
                f"{self.host} wants a key ({status}); put it in an environment variable and name that in "
                "teacher.key_env, for example teacher.key_env=OPENAI_API_KEY"
            )
        if 300 <= status < 400:
            return (
                f"{self.url} sends elsewhere ({status}), which is not followed; give the final address as teacher.url"
            )
        cure = "correct what it names, and the same command goes on"
        if status in (404, 405):
            cure = "check teacher.url, which mostly ends in /v1, and teacher.model"
        return f"{self.host} refuses {request.path}{_about(request)} ({said}); {cure}"

    def _gave_up(self, e: _Trouble, tries: int) -> str:
        cure = "start the server or correct teacher.url" if "nothing answers" in str(e) else "see to the server"
        if e.status == 429:
            cure = "lower teacher.concurrency, or come back later"
        return f"{self.url} failed {tries} times, at last with: {e}; {cure}: {_KEPT}"

    def _key(self) -> str:
        """The key, or nothing where none is named.

        Raises:
            RecipeError: the variable is not set.
        """
        if self.key_env is None:
            return ""
        key = os.environ.get(self.key_env, "").strip()
        if not key or not key.isascii() or not key.isprintable():
            raise RecipeError(
                f"the environment variable {self.key_env} (teacher.key_env) is not set, or holds no key; set it to the "
                f"key of {self.host}"
            )
        return key


def wait_of(header: str | None) -> float | None:
    """Seconds that a Retry-After header asks for, as a number or as an HTTP date; None where it says neither."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        at = parsedate_to_datetime(header)
    except ValueError:
        return None
    return max(0.0, (at.replace(tzinfo=at.tzinfo or UTC) - datetime.now(UTC)).total_seconds())


def _open(url: str, key: str, timeout: float, connections: int) -> Any:
    import httpx2  # here, so that who asks no server needs none of it

    headers = {"User-Agent": f"pennyweight/{__version__}", **({"Authorization": f"Bearer {key}"} if key else {})}
    here = (urlsplit(url).hostname or "") in ("localhost", "127.0.0.1", "::1")  # which no proxy can reach
    limits = httpx2.Limits(max_connections=connections)
    return httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits, trust_env=not here)


def _run(work: Coroutine[Any, Any, None]) -> None:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        asyncio.run(work)
        return
    with ThreadPoolExecutor(1) as pool:  # a notebook runs a loop of its own
        pool.submit(asyncio.run, work).result()


def _until(ended: Callable[[], bool], items: Iterator[Any]) -> Iterator[Any]:
    """Items, as several workers take them from one iterator, until the work has ended."""
    while not ended():
        try:
            yield next(items)
        except StopIteration:
            return


async def _sleep(seconds: float, ended: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while (left := until - time.monotonic()) > 0 and not ended():
        await asyncio.sleep(min(0.2, left))


def _said(status: int, text: str, key: str) -> str:
    """The status and what the server says to it, in one line."""
    try:
        told = json.loads(text)
        told = told.get("error", told) if isinstance(told, dict) else told
        told = (told.get("message") or told.get("detail") or told) if isinstance(told, dict) else told
    except (ValueError, RecursionError):
        told = "" if "<html" in text.lower() else text
    line = _clean(" ".join(str(told).split()), key)
    return f"{status}: {line[:200]}".rstrip(": .")


def _about(request: Request) -> str:
    """The beginning of what was asked, by which it can be found in the data."""
    body = request.body or {}
    asked = body["messages"][-1]["content"] if "messages" in body else body.get("prompt", "")
    words = " ".join(asked.split()) if isinstance(asked, str) else ""
    return f" of {words if len(words) <= 40 else words[:39] + '…'!r}" if words else ""


def _clean(text: str, key: str, least: int = 1) -> str:
    """``text`` without the key, should it have at least so many characters."""
    return text.replace(key, "[key]") if len(key) >= least else text


def _cleaned(body: Any, key: str) -> Any:
    """The JSON of an answer without the key, however its strings were escaped."""
    if isinstance(body, str):
        return _clean(body, key, least=_SECRET)
    if isinstance(body, list):
        return [_cleaned(x, key) for x in body]
    return {_cleaned(k, key): _cleaned(x, key) for k, x in body.items()} if isinstance(body, dict) else body
