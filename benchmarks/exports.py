"""Greedy text of exported copies: ours, from the codes, beside that of the engine which opens the file.

    python -m benchmarks.exports [transformers|llama ...]

stories260K, 20 prompts of 8 tokens from its own samples, 200 tokens each, float32, ends of text ignored. Ours is the
model in memory whose weights are what the codes stand for (and which reads in fp8 where the format says so). The engine
is transformers' own ``generate`` on the folder, and llama.cpp on the GGUF. llama.cpp rounds what a product reads
to 8 bits, and transformers NVFP4 weights to 16, so where two tokens are all but equally probable they may take the
other. What tells that from an error is the widest gap: the most that any token of the engine's text is behind ours.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.bars import Bars, real, run_parts
from pennyweight.model.device import choose
from pennyweight.model.generate import generate
from pennyweight.model.load import load
from pennyweight.model.loaded import Loaded
from pennyweight.quant import gguf_check
from pennyweight.quant.export import as_transformers_reads, export, formats_of
from pennyweight.quant.formats import Coded
from pennyweight.quant.gguf_file import code_embeddings
from pennyweight.quant.rounding import coded_for_storage
from pennyweight.teacher.local import LocalTeacher
from pennyweight.teacher.own_samples import own_samples

PROMPTS, PROMPT, NEW = 20, 8, 200
IN_16_BITS, IN_8_BITS = 0.05, 0.15  # nats that an engine's own rounding may move two logits apart
STORED = ("int8", "int4", "int3", "ternary", "fp8_row", "mxfp8", "mxfp4", "nvfp4")
Texts = list[list[int]]


def a_model() -> Loaded:
    return load(str(real("stories260K")))


def prompts(parent: Loaded) -> Texts:
    with tempfile.TemporaryDirectory() as folder:
        speaker = LocalTeacher(parent, choose("cpu", "float32"), rows=32, write_tokens=64, context=512)
        written = own_samples(speaker, parent.tokenizer, PROMPTS, 0, Path(folder), "its own")
    return [parent.tokenizer(s.response)["input_ids"][:PROMPT] for s in written]


def ours(side: Loaded, given: Texts) -> Texts:
    """One at a time, as the engines go: with fp8 activations another batch is another rounding."""
    settings: dict[str, Any] = {"max_tokens": NEW, "temperature": 0, "eos_ids": set(), "pad_id": 0, "seed": 0}
    return [list(generate(side.model, [ids], **settings)[0].ids) for ids in given]


def by_transformers(folder: str, given: Texts) -> Texts:
    model = load(folder).model
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "pad_token_id": 0}
    return [model.generate(torch.tensor([ids]), **settings)[0, len(ids) :].tolist() for ids in given]


def by_llama_cpp(file: str, given: Texts) -> Texts:
    import llama_cpp  # type: ignore

    engine = llama_cpp.Llama(file, n_ctx=512, n_threads=1, verbose=False)
    out = []
    for ids in given:
        engine.reset()
        tokens = engine.generate(ids, top_k=1, temp=0.0, repeat_penalty=1.0)
        out.append([next(tokens) for _ in range(NEW)])
    return out


@torch.no_grad()
def gap(side: Loaded, prompt: list[int], theirs: list[int]) -> float:
    """The most that a token of theirs is behind our most probable one in its place, after their own text; nats."""
    logits = side.model(torch.tensor([prompt + theirs]), use_cache=False).logits[0, len(prompt) - 1 : -1].float()
    return float((logits.amax(-1) - logits.gather(-1, torch.tensor(theirs)[:, None])[:, 0]).max())


def told(bars: Bars, name: str, side: Loaded, given: Texts, mine: Texts, theirs: Texts, noise: float | None) -> None:
    widest = max(gap(side, prompt, text) for prompt, text in zip(given, theirs, strict=True))
    same = sum(a == b for a, b in zip(mine, theirs, strict=True))
    alike = sum(x == y for a, b in zip(mine, theirs, strict=True) for x, y in zip(a, b, strict=True))
    print(f"{name:<20} {same:>5} of {PROMPTS} {100 * alike / NEW / PROMPTS:>10.1f} {widest:>11.4f}", flush=True)
    bars.check(f"exports.{name.replace(' ', '_')}.equal_texts", same, f">={PROMPTS}", same == PROMPTS)
    if noise is not None:
        bars.check(f"exports.{name.replace(' ', '_')}.widest_gap_nats", widest, f"<={noise}", widest <= noise)


def heads() -> None:
    print(f"\n{'copy':<20} {'equal texts':>11} {'tokens, %':>10} {'widest gap':>11}")


def of_transformers(bars: Bars) -> None:
    given = prompts(a_model())
    heads()
    for fmt in STORED:
        side = a_model()
        codes = coded_for_storage(side.model, formats_of(side.model, fmt, 32), torch.bfloat16)
        with tempfile.TemporaryDirectory() as folder:
            export(side.model, codes, real("stories260K"), Path(folder) / "copy")
            with as_transformers_reads(side.model, codes):
                told(
                    bars,
                    fmt,
                    side,
                    given,
                    ours(side, given),
                    by_transformers(f"{folder}/copy", given),
                    IN_16_BITS if fmt == "nvfp4" else None,
                )


def of_llama_cpp(bars: Bars) -> None:
    try:
        import llama_cpp  # type: ignore # noqa: F401
    except ImportError:
        print("skipped: needs llama-cpp-python; pip install 'pennyweight[llama]'")
        return
    given = prompts(a_model())
    heads()
    for fmt in ("bf16", "int8", "int4"):
        side = a_model()
        codes = coded_for_gguf(side.model, fmt, "nearest")
        with tempfile.TemporaryDirectory() as folder:
            file, _ = gguf_check.written(side, codes, Path(folder) / "copy", fmt)
            told(bars, f"{fmt} by llama.cpp", side, given, ours(side, given), by_llama_cpp(str(file), given), IN_8_BITS)


@torch.no_grad()
def coded_for_gguf(model: Any, fmt: str, method: str) -> dict[str, Coded]:
    """Codes of a GGUF in int8, int4 or bf16 (none); the model becomes what they stand for."""
    formats = formats_of(model, fmt, 32, "gguf") if fmt != "bf16" else {}
    codes = coded_for_storage(model, formats, torch.bfloat16, method, vectors=torch.float32)
    return codes | code_embeddings(model) if codes else codes


def main(*parts: str) -> None:
    known: dict[str, Callable[[Bars], None]] = {"transformers": of_transformers, "llama": of_llama_cpp}
    torch.set_num_threads(1)
    run_parts(known, parts)


if __name__ == "__main__":
    main(*sys.argv[1:])
