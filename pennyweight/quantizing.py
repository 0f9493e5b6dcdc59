"""A low-bit copy of a model folder: what it will cost is said first; it is made, recovered where that is asked for,
opened again by transformers, measured beside its parent, and only then put in its place."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from pennyweight.data.prepare import Writer, gather, prepare
from pennyweight.data.render import encode_all, learnt_bytes, prompt_ids
from pennyweight.data.split import split
from pennyweight.data.tasks import problems
from pennyweight.errors import QualityError
from pennyweight.evaluate.held_out import HeldOut
from pennyweight.evaluate.remembering import remembering
from pennyweight.evaluate.suite import Sampling, examine
from pennyweight.ledger.hashing import content_hash
from pennyweight.model.device import Compute, choose, set_threads
from pennyweight.model.load import load
from pennyweight.model.loaded import Loaded
from pennyweight.progress import counting, say, stoppable
from pennyweight.quant import gguf_check
from pennyweight.quant.asked import MIXED, Asked
from pennyweight.quant.export import PROVENANCE, Exported, as_transformers_reads, export, linears_of
from pennyweight.quant.formats import Coded, Format
from pennyweight.quant.gguf_file import code_embeddings
from pennyweight.quant.kv_cache import low_cache
from pennyweight.quant.parity import check_same
from pennyweight.quant.planning import IN_A_MIXTURE, bytes_of, candidates, planned
from pennyweight.quant.recovery import low_bit
from pennyweight.quant.sensitivity import costs
from pennyweight.recipe import FileData, Responses, TeacherSamples
from pennyweight.recipe_file import task_of
from pennyweight.records import Encoded, Interval
from pennyweight.run_folder import write_json
from pennyweight.settings import Schedule, Tripwires
from pennyweight.teacher.local import LocalTeacher
from pennyweight.train.checkpoint import Checkpoints
from pennyweight.train.loop import train
from pennyweight.verifiers import judge, judge_sample
from pennyweight.version import __version__

_CONTEXT, _WRITTEN = 512, 256  # tokens of a sample at most, and of what the model writes itself
_LEARNT, _HELD_OUT = 128, 64  # samples
_LOOKED_AT = {"least": 16, "most": 64, "together": 4_000_000_000}  # samples to predict from, and these times parameters
_ENGINE_KL = 0.005  # nats a token between what was meant and llama.cpp, which reads activations in 8 bits


@dataclass(frozen=True)
class Texts:
    """Samples to learn from and to measure on, UTF-8 bytes of the latter, and where they came from."""

    learnt: list[Encoded]
    held_out: list[Encoded]
    bytes: list[int]
    source: str


def quantize(
    model: str,
    fmt: str = "int4",
    out: str | None = None,
    *,
    budget: str | int | None = None,
    min_agreement: float | None = None,
    tasks: list[str] | None = None,
    plan: bool = False,
    device: str = "auto",
    threads: int = 0,
    trust_remote_code: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Write a low-bit copy of a model folder to ``out`` and prove it; what it cost, and is worth beside its parent.

    Args:
        budget: as a number of bytes, or like ``1.2GB``.
        min_agreement: least share of tokens, 0 to 1, whose most probable next token must be the parent's.
        tasks: reasoning-gym tasks whose accuracy is measured, too.
        plan: only say what it will cost.
        settings: the others of ``Asked``.

    Raises:
        RecipeError: no such format or method, or a budget that nothing fits.
        ModelError: the model cannot be used, holds nothing to quantise, or the copy does not compute what it should.
        QualityError: the copy agrees less than ``min_agreement``, and is not kept.
        RunError: ``out`` is there already.
    """
    asked = Asked(fmt=fmt, budget=bytes_of(budget) if budget is not None else None, **settings)
    asked.check(model, out, min_agreement, plan)
    set_threads(threads)
    compute = choose(device, "auto")
    opened = lambda path: load(str(path), device=compute.device, trust_remote_code=trust_remote_code)  # noqa: E731
    parent = opened(model)
    _check_parent(parent, asked)
    labels = IN_A_MIXTURE if fmt == MIXED else {fmt: (fmt, 1.0)}
    wanted = {} if fmt == "bf16" else candidates(parent.model, labels, asked.group, asked.layout)
    made_from = {"model": parent.identity, "compute": compute.name, "given": asked.data and content_hash(asked.data)}
    with _work(out, {**asdict(asked), **made_from}) as work:
        texts = _texts(parent, compute, asked, work)
        formats, predicted = _planned(parent, wanted, texts, asked)
        if plan:
            return {"format": fmt, "params": parent.params, "parent_bytes": parent.bytes, "predicted": predicted}
        codes, recovered = _made(parent, compute, formats, texts, asked, work)
        made, copy, engine = _written(parent, codes, Path(model), work / "copy", texts, compute, asked, opened)
        parent = opened(model)  # as it was before
        proof = _proof(copy, parent, _held_out(parent, texts, tasks or [], asked), compute, asked)
        _gate(proof["agreement"]["mean"], min_agreement, fmt, work)
        about = (
            _about(made, parent, texts, asked)
            | {"engine": engine, "predicted": predicted, "recovered": recovered}
            | proof
        )
        made_by = {"made_by": f"pennyweight {__version__}", "asked": asdict(asked), "parent_found": about["parent"]}
        write_json(work / "copy" / PROVENANCE, {**about, **made_by, "parent": parent.facts()})
        os.replace(work / "copy", str(out))
        shutil.rmtree(work)
    return {"path": str(out), **about}


def _about(made: Exported, parent: Loaded, texts: Texts, asked: Asked) -> dict[str, Any]:
    return {
        "format": asked.fmt,
        "params": parent.params,
        "bytes": made.bytes,
        "parent_bytes": parent.bytes,
        "linears_by_row": made.per_row,
        "left_in_16_bits": list(made.kept),
        "samples": texts.source,
        "tokens_measured": sum(len(s.loss_positions) for s in texts.held_out),
    }


def _check_parent(parent: Loaded, asked: Asked) -> None:
    """Raise what is wrong with the model for what is asked, before anything is written."""
    if asked.kv_cache is not None:
        low_cache(parent.model.config, asked.kv_cache)
    if asked.layout == "gguf":
        gguf_check.check(parent)


@contextmanager
def _work(out: str | None, made_from: dict[str, Any]) -> Iterator[Path]:
    """The folder beside ``out`` in which a copy is made: gone on with for the same copy, begun anew for another."""
    if out is None:
        with TemporaryDirectory() as scratch:
            yield Path(scratch)
        return
    work = Path(out).with_name(f".{Path(out).name}.making")
    known = None
    with suppress(OSError, ValueError):
        known = json.loads((work / "asked.json").read_text())
    if known != made_from:
        shutil.rmtree(work, ignore_errors=True)
        write_json(work / "asked.json", made_from)
    yield work


def _gate(agreement: float, least: float | None, fmt: str, work: Path) -> None:
    if least is None or agreement >= least:
        return
    shutil.rmtree(work / "copy")
    raise QualityError(
        f"the {fmt} copy agrees with its parent on {100 * agreement:.1f} % of tokens, less than the "
        f"{100 * least:g} % of --min-agreement, so it was not kept; try --recover STEPS, another --format, or a "
        f"smaller --group ({work} holds the samples, and may be removed)"
    )


def _texts(parent: Loaded, compute: Compute, asked: Asked, work: Path) -> Texts:
    """The user's samples, answered by the model where they have no response; or what it writes itself."""
    wanted = asked.samples or _HELD_OUT + max(_LEARNT, min(asked.recover * asked.batch, 4096))
    context = min(parent.context, _CONTEXT)
    most = min(_WRITTEN, context - 1)
    speaker = LocalTeacher(parent, compute, rows=128, write_tokens=most, context=context)
    writer = Writer(speaker, parent.tokenizer, work / "written", asked.seed, counting, context, "drop")
    source = FileData(path=asked.data, limit=wanted) if asked.data else TeacherSamples(count=wanted)
    share = min(0.5, _HELD_OUT / wanted)
    parts = split(gather(source, lambda member: writer), share, _HELD_OUT)
    learnt, held_out, _ = prepare(parts, Responses(max_tokens=most), lambda member: writer, judge_sample)
    sides = [encode_all(side, parent.tokenizer, context, "truncate") for side in (learnt, held_out)]
    return Texts(sides[0], sides[1], learnt_bytes(sides[1], parent.tokenizer), ", ".join({s.source for s in learnt}))


def _planned(
    parent: Loaded, wanted: dict[str, dict[str, Format]], texts: Texts, asked: Asked
) -> tuple[dict[str, Format], dict[str, Any]]:
    """The format of each Linear that is coded, and what the copy will be; said, too."""
    if asked.fmt == "bf16":
        nothing = Interval(0.0, 0.0, 0.0, "16 bits")
        return {}, {"bytes": 2 * parent.params, "kl": nothing.to_json(), "linears": {}, "bits_per_byte": 0.0}
    few = max(_LOOKED_AT["least"], min(_LOOKED_AT["most"], _LOOKED_AT["together"] // parent.params))
    some = texts.learnt[:few]  # a backward pass each
    with counting("predicting", len(some), "samples") as c:
        found = costs(parent.model, wanted, some, parent.pad_id, asked.seed, c.advance)
    formats, predicted = planned(parent.model, wanted, found, asked.budget)
    tokens, spelt = sum(len(s.loss_positions) for s in some), sum(learnt_bytes(some, parent.tokenizer))
    predicted["bits_per_byte"] = predicted["kl"]["mean"] * tokens / max(1, spelt) / math.log(2)
    kl, kinds = predicted["kl"], ", ".join(f"{n} Linears in {label}" for label, n in predicted["linears"].items())
    say(
        f"plan: {predicted['bytes']:,} bytes of {parent.bytes:,} ({kinds}); rounded to nearest about {kl['mean']:.2g} "
        f"nats a token ({kl['low']:.2g} to {kl['high']:.2g}) and {predicted['bits_per_byte']:.2g} bits a byte are lost"
    )
    return formats, predicted


def _made(
    parent: Loaded, compute: Compute, formats: dict[str, Format], texts: Texts, asked: Asked, work: Path
) -> tuple[dict[str, Coded], dict[str, Any] | None]:
    """Codes of every Linear, and how their recovery went; the parent's model becomes what will be written."""
    how: dict[str, Any] = {}

    def fit(model: Any, schedule: Schedule, next_batch: Callable[[int], list[Any]]) -> None:
        with counting("recovering", schedule.steps, "steps") as c, stoppable() as should_stop:
            outcome = train(
                model,
                next_batch,
                schedule=schedule,
                tripwires=Tripwires(),
                compute=compute,
                checkpoints=Checkpoints(work / "recovery"),
                seed=asked.seed,
                admit=lambda ids: None,
                log=lambda line: None,
                progress=c.reach,
                should_stop=should_stop,
            )
        how.update(asdict(outcome), lr=schedule.lr)

    teacher, some = LocalTeacher(parent, compute), texts.learnt
    vectors = torch.float32 if asked.layout == "gguf" else None
    codes = low_bit(teacher, formats, asked.method, some, asked.recovery, work / "targets", fit, counting, vectors)
    if asked.layout == "gguf" and codes:
        codes |= code_embeddings(parent.model)
    return codes, how or None


def _written(
    meant: Loaded,
    codes: dict[str, Coded],
    parent: Path,
    place: Path,
    texts: Texts,
    compute: Compute,
    asked: Asked,
    opened: Callable[[Path], Loaded],
) -> tuple[Exported, Loaded, str | None]:
    """The copy, as it was written, opened again and found to be what was meant; and what llama.cpp says of a GGUF."""
    some = [s.ids for s in texts.held_out[:8]]
    if asked.layout != "gguf":
        made = export(meant.model, codes, parent, place, asked.layout)
        copy = opened(place)
        with as_transformers_reads(meant.model, codes, asked.layout):
            check_same(meant, copy, some)
        return made, copy, None
    file, copy = gguf_check.written(meant, codes, place, asked.fmt)
    check_same(meant, copy, some)
    ids = list(texts.held_out[0].ids)
    logits = meant.model(torch.tensor([ids], device=compute.device), use_cache=False).logits[0].detach().cpu()
    engine = gguf_check.check_by_llama_cpp(file, meant.tokenizer, ids, logits, _ENGINE_KL)
    kept = tuple(name for name in linears_of(meant.model) if name not in codes)
    return Exported(file.stat().st_size, len(codes), 0, kept), copy, engine


def _held_out(parent: Loaded, texts: Texts, tasks: list[str], asked: Asked) -> HeldOut:
    drawn = [problems(name, asked.problems, asked.seed + 1_000_003, config) for name, config in map(task_of, tasks)]
    flat = [s for of_task in drawn for s in of_task]
    return HeldOut(texts.held_out, texts.bytes, flat, [prompt_ids(s, parent.tokenizer) for s in flat])


def _proof(copy: Loaded, parent: Loaded, held_out: HeldOut, compute: Compute, asked: Asked) -> dict[str, Any]:
    """The copy beside its parent: KL to it, top-1 agreement, bits per byte, calibration, accuracy on problems."""
    sampling = Sampling(asked.max_tokens, 0, 1.0, asked.seed)
    with counting("measuring", held_out.passes(0, 2) + held_out.passes(0, 1), "samples") as c:
        of_copy = examine(copy, held_out, judge, sampling, compute, None, parent, progress=c.advance).metrics
        of_parent = examine(parent, held_out, judge, sampling, compute, progress=c.advance).metrics
    told: dict[str, Interval] = {"kl": of_copy.pop("kl_parent"), "agreement": of_copy.pop("agreement_parent")}
    sides = {"copy": of_copy, "parent": of_parent}
    beside = {side: {k: v.to_json() for k, v in metrics.items()} for side, metrics in sides.items()}
    proof: dict[str, Any] = {**{k: v.to_json() for k, v in told.items()}, **beside}
    if asked.kv_cache:
        proof["kv_cache"] = remembering(copy, parent, held_out.encoded, held_out.bytes, compute, asked.kv_cache)
    return proof
