"""A server on loopback that answers like an OpenAI-compatible one, and fails as it is told to.

It counts what it has delivered: answers whose whole body went out. ``plan(number, body)`` names what becomes of the
request of that number: a row of FAULTS, or ``ok``.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("429", "429 until", "500", "503", "408", "cut", "slow", "garbage", "schema", "empty")
SLOW = 1.6
"""Seconds that a slow answer takes: let the client's timeout be shorter."""


def reply_to(body: dict) -> str:
    """The text that the server answers a request with: a function of the prompt and the seed."""
    asked = body["messages"][-1]["content"] if "messages" in body else body["prompt"]
    return f"an answer to {asked} by {body.get('seed')}"


class Faulty:
    """The server while the block runs.

    ``key``: what it wants; ``models``: what it lists; ``echo``: it says the key that it got wherever it says anything.
    While ``go`` is not set no answer goes out; raising ``clients`` drops what the client before has asked for.
    """

    def __init__(self, plan=lambda number, body: "ok", key=None, models=("small",), echo=False, wait="0.05"):
        self.plan, self.key, self.models, self.echo, self.wait = plan, key, models, echo, wait
        self.delivered, self.seen, self.times, self._lock = Counter(), [], [], threading.Lock()
        self.go, self.clients = threading.Event(), 0
        self.go.set()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self):
                outer.models_of(self)

            def do_POST(self):
                outer.answer(self)

            def log_message(self, *args):
                pass

        class Server(ThreadingHTTPServer):
            def handle_error(self, request, client_address):
                """A client that has gone is part of the play."""
                if not isinstance(sys.exc_info()[1], ConnectionError):
                    super().handle_error(request, client_address)

        self.http = Server(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/v1"

    def __enter__(self):
        threading.Thread(target=self.http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.go.set()
        self.http.shutdown()
        self.http.server_close()

    def send(self, to, status, body, headers=(), length=None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        to.send_response(status)
        for name, value in headers:
            to.send_header(name, value)
        to.send_header("Content-Length", str(length or len(data)))
        to.end_headers()
        to.wfile.write(data)
        to.wfile.flush()

    def refused(self, to) -> bool:
        if not to.path.startswith("/v1/"):
            self.send(to, 404, b"<html>Not Found</html>")
            return True
        given = to.headers.get("Authorization")
        if self.key is None or given == f"Bearer {self.key}":
            return False
        self.send(to, 401, {"error": {"message": f"Incorrect API key provided: {given}"}})
        return True

    def models_of(self, to) -> None:
        if self.refused(to):
            return
        listed = [{"id": m, "object": "model", "created": time.time(), "owned_by": "tests"} for m in self.models]
        self.send(to, 200, {"object": "list", "data": listed})

    def answer(self, to) -> None:
        body = json.loads(to.rfile.read(int(to.headers["Content-Length"])))
        if self.refused(to):
            return
        with self._lock:
            number = len(self.seen)
            self.seen.append(body)
            self.times.append(time.monotonic())
        fault = self.plan(number, body)
        said = f" {to.headers.get('Authorization')}" if self.echo else ""
        message = {"error": {"message": f"told to: {fault}{said}"}}
        if fault == "429":
            self.send(to, 429, message, [("Retry-After", self.wait)])
        elif fault == "429 until":
            self.send(to, 429, message, [("Retry-After", formatdate(time.time() + 0.2, usegmt=True))])
        elif fault.isdigit():
            self.send(to, int(fault), message)
        elif fault == "garbage":
            self.send(to, 200, b'{"choices": [{"message": {"content": "half an ans')
        elif fault == "schema":
            self.send(to, 200, {"result": "something else"})
        elif fault == "empty":
            self.send(to, 200, {"choices": [], "usage": {"prompt_tokens": 1, "completion_tokens": 0}})
        else:
            self.deliver(to, body, fault, said)

    def deliver(self, to, body, fault, said) -> None:
        client = self.clients
        if fault == "slow":
            time.sleep(SLOW)
        self.go.wait(30)
        if client != self.clients:
            to.close_connection = True
            return
        text = reply_to(body) + said
        what = {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        usage = {"prompt_tokens": 7, "completion_tokens": 5, "total_tokens": 12}
        whole = {"choices": [{"index": 0, "finish_reason": "stop", **what}], "usage": usage, "model": body["model"]}
        data = json.dumps(whole).encode()
        if fault == "cut":
            self.send(to, 200, data[: len(data) // 2], length=len(data))
            to.close_connection = True
            return
        self.send(to, 200, data)
        if fault != "slow":  # whose client has gone by then
            with self._lock:
                self.delivered[json.dumps(body, sort_keys=True)] += 1
