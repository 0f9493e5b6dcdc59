"""A served teacher and the same teacher in process: do they write the same, and give the same targets?

    python -m benchmarks.served [llama] [transformers]

Servers that are not ours, started here on loopback with stories260K, its weights rounded to bfloat16:
llama-cpp-python's, which tells log-probabilities of a prompt, and transformers' own, which only writes. Each is asked
through the endpoint teacher, as a run would ask it: for greedy answers to 24 prompts and, where it tells them, for
top-16 targets of those answers. The teacher in process computes in float32.

transformers' server computes in float32, too, so its texts must be the same. llama.cpp multiplies bfloat16 weights by
activations that it rounds to bfloat16, so what it gives is within its precision where it is no further from float32
than the same weights run in process in bfloat16: by KL, by the largest difference of a probability, and by texts.
"""

from __future__ import annotations

import importlib.util
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.bars import Bars, real, run_parts
from pennyweight.data.render import encode, prompt_of
from pennyweight.errors import EndpointError
from pennyweight.model.device import choose
from pennyweight.model.load import load, save
from pennyweight.model.loaded import Loaded
from pennyweight.quant.gguf_file import write_gguf
from pennyweight.recipe import EndpointTeacher
from pennyweight.records import Message, Sample
from pennyweight.teacher.endpoint import ServedTeacher, endpoint_of
from pennyweight.teacher.local import LocalTeacher
from pennyweight.teacher.targets import Keep, Kept, join

K = 16
TOKENS = 48
KEEP = Keep("top_k", 0.0, K)
BEGINNINGS = ("Once upon a time", "Lily had a dog", "The sun was", "Tom and Ben went", "One day a bird", "In the park")
"""Beginnings of prompts; four endings make each into as many."""
ENDINGS = ("", " and", ", who was sad,", ".")


@contextmanager
def serving(command: Callable[[int], list[str]], log: Path) -> Iterator[str]:
    """Url of a server that the command starts on a port that was free a moment ago; it is ended with the block."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with open(log, "w") as f:
        quiet = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        process = subprocess.Popen(command(port), stdout=f, stderr=subprocess.STDOUT, env=quiet)
    url = f"http://127.0.0.1:{port}/v1"
    try:
        _wait(process, url, log)
        yield url
    finally:
        process.terminate()
        process.wait()


def _wait(process: subprocess.Popen[bytes], url: str, log: Path, seconds: float = 120.0) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        try:
            urllib.request.urlopen(f"{url}/models", timeout=2)
            return
        except OSError:
            if process.poll() is not None:
                break
            time.sleep(0.2)
    raise SystemExit(f"the server did not start:\n{log.read_text()[-2000:]}")


def llama_server(gguf: Path) -> Callable[[int], list[str]]:
    """llama-cpp-python's server; log-probabilities of a prompt need ``logits_all``, and 0 is float32 for its cache."""
    settings = {"model": gguf, "model_alias": "stories", "n_ctx": 512, "logits_all": "true", "n_threads": 1}
    settings |= {"n_threads_batch": 1, "type_k": 0, "type_v": 0, "verbose": "false", "host": "127.0.0.1"}
    words = [str(x) for name, value in settings.items() for x in (f"--{name}", value)]
    return lambda port: [sys.executable, "-m", "llama_cpp.server", *words, "--port", str(port)]


def transformers_server(folder: Path) -> Callable[[int], list[str]]:
    """transformers' own server, in float32."""
    words = ["--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
    start = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(folder), *words]
    return lambda port: [*start, "--port", str(port)]


def teacher_in_bfloat16(root: Path) -> tuple[Loaded, Path]:
    """The real model, its weights rounded to bfloat16, as a folder and opened in float32."""
    given = load(str(real("stories260K")))
    save(given.model.bfloat16().float(), given.tokenizer, root / "teacher")
    return load(str(root / "teacher")), root / "teacher"


def answering(teacher: Loaded) -> LocalTeacher:
    return LocalTeacher(teacher, choose("cpu", "float32"), write_temperature=0.0, write_tokens=TOKENS)


def served_at(url: str, teacher: Loaded, answers: Path) -> ServedTeacher:
    """The endpoint teacher that a run would have."""
    endpoint = endpoint_of(EndpointTeacher(url=url), answers)
    return ServedTeacher(endpoint, "completions", teacher.tokenizer, 0.0, 1.0, TOKENS)


def prompts() -> list[Sample]:
    return [Sample((Message("user", a + b),), None, "") for a in BEGINNINGS for b in ENDINGS]


def coarse(kept: Kept) -> tuple[Tensor, Tensor]:
    """(N, K) ids and (N, K) float64 probabilities."""
    return kept.ids.view(-1, K).long(), kept.probs.view(-1, K).double() / ((1 << KEEP.bits) - 1)


def apart(truth: Kept, other: Kept) -> tuple[Tensor, float]:
    """(N,) KL(truth || other) over the ids that both keep, all others being one outcome; and the largest difference of
    a probability."""
    (ids, p), (ids_q, q) = coarse(truth), coarse(other)
    same = ids.unsqueeze(-1) == ids_q.unsqueeze(-2)
    p, q = p * same.any(-1), (same * q.unsqueeze(-2)).sum(-1)
    p, q = (torch.cat([x, 1.0 - x.sum(-1, keepdim=True)], -1).clamp_min(1e-9) for x in (p, q))
    return (p * (p.log() - q.log())).sum(-1), float((p - q).abs().max())


def heading() -> None:
    print(f"{'':<32} {'same texts':>12}   {'mean KL':>8} {'largest':>10} {'probability':>12}")


def row(name: str, texts: int, compared: tuple[Tensor, float] | None = None) -> None:
    kl = f"{float(compared[0].mean()):.2e} {float(compared[0].max()):>10.2e} {compared[1]:>12.2e}" if compared else ""
    print(f"{name:<32} {f'{texts} of {len(prompts())}':>12}   {kl or '(tells no log-probabilities)'}", flush=True)


def llama(bars: Bars) -> None:
    """llama-cpp-python's server beside float32 and bfloat16 in process."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        teacher, folder = teacher_in_bfloat16(root)
        write_gguf(teacher.model, teacher.tokenizer, {}, root / "teacher.gguf", "bf16", "stories", {})
        truth, rival = answering(teacher), answering(load(str(folder), dtype=torch.bfloat16))
        asked = [prompt_of(s, teacher.tokenizer) for s in prompts()]
        texts, of_rival = truth.write(asked, 0), rival.write(asked, 0)
        samples = [
            encoded
            for s, (text, ended) in zip(prompts(), texts, strict=True)
            if (encoded := encode(s.answered(text, "", ended), teacher.tokenizer))
        ]
        with serving(llama_server(root / "teacher.gguf"), root / "log") as url:
            served = served_at(url, teacher, root / "answers.jsonl")
            of_served, targets = served.write(asked, 0), join(served.targets(samples, KEEP))
        same, same_rival = (sum(a == b for a, b in zip(texts, x, strict=True)) for x in (of_served, of_rival))
        exact = join([t for t in truth.targets(samples, KEEP) if isinstance(t, Kept)])
        found = apart(exact, targets)
        beside = apart(exact, join([t for t in rival.targets(samples, KEEP) if isinstance(t, Kept)]))
        print(f"{len(exact):,} positions of {len(samples)} texts; all beside float32 in process")
        heading()
        row("llama-cpp-python's server", same, found)
        row("in process, in bfloat16", same_rival, beside)
        ratio = float(found[0].mean() / beside[0].mean())
        bars.check("served.llama_kl_over_bfloat16", ratio, "<=1", ratio <= 1)
        bars.check("served.llama_probability_off_by", found[1], f"<={beside[1]:.3g}", found[1] <= beside[1])
        bars.check("served.llama_same_texts", same, f">={same_rival}", same >= same_rival)


def of_transformers(bars: Bars) -> None:
    """transformers' server: it tells no log-probabilities, so texts alone are compared."""
    with tempfile.TemporaryDirectory() as scratch:
        root = Path(scratch)
        teacher, folder = teacher_in_bfloat16(root)
        asked = [prompt_of(s, teacher.tokenizer) for s in prompts()]
        texts = answering(teacher).write(asked, 0)
        with serving(transformers_server(folder), root / "log") as url:
            served = served_at(url, teacher, root / "answers.jsonl")
            of_served = served.write(asked, 0)
            try:
                served.telling(K)
                said = "tells log-probabilities"
            except EndpointError as e:
                said = str(e)
        same = sum(a == b for a, b in zip(texts, of_served, strict=True))
        heading()
        row("transformers' server", same)
        bars.check("served.transformers_same_texts", same, f">={len(texts)}", same == len(texts))
        told = "tells no log-probabilities" in said  # should it learn to, its targets belong in the table above
        bars.check("served.transformers_tells_none", float(told), "1", told)


def main(*parts: str) -> None:
    needs: dict[str, tuple[str, ...]] = {}
    needs["llama"] = ("llama_cpp", "fastapi", "sse_starlette", "starlette_context", "pydantic_settings", "gguf")
    needs["transformers"] = ("fastapi", "uvicorn", "openai")
    known = {}
    for name, part in (("llama", llama), ("transformers", of_transformers)):
        if parts and name not in parts:
            continue
        lacking = next((m for m in needs[name] if importlib.util.find_spec(m) is None), None)
        if lacking is None:
            known[name] = part
        else:
            print(f"skipped {name}: {lacking} is not installed; pip install -e '.[servers]'")
    run_parts(known, [])


if __name__ == "__main__":
    main(*sys.argv[1:])
