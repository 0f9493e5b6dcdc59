"""What can be done with models outside a run: evaluate, compare, chat; and looking into a RUN folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pennyweight.data.both_tokenizers import BothTokenizers
from pennyweight.data.render import encode_all, learnt_bytes, prompt_ids
from pennyweight.data.store import read_samples
from pennyweight.data.tasks import problems
from pennyweight.data.token_stream import shown
from pennyweight.errors import DataError, RunError
from pennyweight.evaluate.agreement import as_scorer, score
from pennyweight.evaluate.held_out import HeldOut, windows
from pennyweight.evaluate.suite import Sampling, examine
from pennyweight.ledger.store import Ledger, Verification
from pennyweight.model.cache import NewCache, whole_cache
from pennyweight.model.device import choose, set_threads
from pennyweight.model.generate import stream
from pennyweight.model.load import language_of, load
from pennyweight.model.loaded import Language, Loaded
from pennyweight.model.student import align_vocabulary
from pennyweight.model.token_bytes import difference, same_tokenizer
from pennyweight.progress import counting, say
from pennyweight.quant.kv_cache import low_cache
from pennyweight.recipe import CutStudent, Recipe, TrainedTeacher
from pennyweight.recipe_file import task_of
from pennyweight.records import Encoded, Message, Sample
from pennyweight.report.chain_summary import is_chain, stages_of, summarise_chain, write_chain
from pennyweight.report.draw import draw, draw_unfinished
from pennyweight.report.language import in_language
from pennyweight.report.rollouts import stopped
from pennyweight.run_folder import a_run, read_object, recipe_of
from pennyweight.settings import TEXT_ONLY
from pennyweight.train.journal import Journal
from pennyweight.verifiers import judge

WINDOW = 1024
"""Tokens a text is cut into at most, for measuring; bits per byte of other windows cannot be compared."""


def evaluate_model(
    model: str,
    tasks: list[str] | None = None,
    text: str | None = None,
    *,
    problems_per_task: int = 200,
    samples: int = 4,
    temperature: float = 1.0,
    max_tokens: int = 256,
    seed: int = 1_000_003,
    device: str = "auto",
    threads: int = 0,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Accuracy and pass@k on reasoning-gym tasks, bits per byte and calibration on a text file.

    Args:
        tasks: names, or ``name:setting=value,setting=value``.
        text: a file, measured in windows of up to 1,024 tokens.

    Raises:
        DataError: neither tasks nor text were given, or one of them cannot be used.
        ModelError: the model cannot be used.
    """
    if not tasks and not text:
        raise DataError("nothing to evaluate on; give --tasks NAME or --text FILE")
    loaded, compute = _open(model, device, threads, trust_remote_code)
    sampling = Sampling(max_tokens, samples, temperature, seed)
    out: dict[str, Any] = {"model": loaded.facts(), "tasks": {}}
    for task in tasks or []:
        name, settings = task_of(task)
        asked = problems(name, problems_per_task, seed, settings)
        held_out = HeldOut([], [], asked, [prompt_ids(s, loaded.tokenizer) for s in asked])
        with counting(name, held_out.passes(samples, 0), "answers") as c:
            found = examine(loaded, held_out, judge, sampling, compute, progress=c.advance)
        out["tasks"][task] = {k: v.to_json() for k, v in found.metrics.items()}
        out["tasks"][task]["decode_tokens_per_second"] = found.decode_tokens_per_second
    if text:
        encoded = windows(text, loaded.tokenizer, min(WINDOW, loaded.context))
        held_out = HeldOut(encoded, learnt_bytes(encoded, loaded.tokenizer), [], [])
        with counting("text", len(encoded), "windows") as c:
            found = examine(loaded, held_out, judge, sampling, compute, progress=c.advance)
        out["text"] = {k: v.to_json() for k, v in found.metrics.items()}
    return out


def compare(
    a: str, b: str, text: str, *, device: str = "auto", threads: int = 0, trust_remote_code: bool = False
) -> dict[str, Any]:
    """KL both ways, top-1 agreement and bits per byte of both models on a text file.

    Raises:
        ModelError: a model cannot be used, or their tokenizers differ.
        DataError: the text cannot be used.
    """
    first, compute = _open(a, device, threads, trust_remote_code)
    second, _ = _open(b, device, threads, trust_remote_code)
    same_tokenizer(first.tokenizer, second.tokenizer)
    common = min(first.vocabulary, second.vocabulary)  # rows of padding that only one has would be given mass
    for path, side in ((a, first), (b, second)):
        before = side.vocabulary
        if align_vocabulary(side.model, common):
            say(f"{path}: the last {before - common:,} of a vocabulary of {before:,} are padding, left out here")
    encoded = windows(text, first.tokenizer, min(WINDOW, first.context, second.context))
    spelt = learnt_bytes(encoded, first.tokenizer)
    sides = as_scorer(first, compute), as_scorer(second, compute)
    with counting("comparing", 2 * len(encoded), "windows") as c:
        of_b = score(encoded, spelt, sides[1], sides[0], first.pad_id, progress=c.advance)
        of_a = score(encoded, spelt, sides[0], None, first.pad_id, progress=c.advance)
    return {
        "a": first.facts(),
        "b": second.facts(),
        "tokens": int(of_b.tokens.sum()),
        "kl_a_to_b": of_b.per_token("kl_to").to_json(),
        "kl_b_to_a": of_b.per_token("kl_from").to_json(),
        "agreement": of_b.per_token("same").to_json(),
        "bits_per_byte_a": of_a.bits_per_byte().to_json(),
        "bits_per_byte_b": of_b.bits_per_byte().to_json(),
        "ece_a": of_a.ece().to_json(),
        "ece_b": of_b.ece().to_json(),
    }


class Chat:
    """A conversation with a model: ``say`` yields the reply piece by piece."""

    def __init__(
        self,
        model: str,
        *,
        temperature: float = 0.7,
        max_tokens: int = 256,
        seed: int = 0,
        kv_cache: str | None = None,
        device: str = "auto",
        trust_remote_code: bool = False,
    ):
        self.loaded, _ = _open(model, device, 0, trust_remote_code)
        self.temperature, self.max_tokens, self.seed = temperature, max_tokens, seed
        self.new_cache: NewCache = whole_cache if kv_cache is None else lambda config: low_cache(config, kv_cache)
        self.new_cache(self.loaded.model.config)  # so that what it cannot keep is said before anything is typed
        self.turns: list[Message] = []

    def say(self, text: str) -> Iterator[str]:
        """The reply to ``text``, as it is written; afterwards both are part of the conversation."""
        tokenizer = self.loaded.tokenizer
        self.turns.append(Message("user", text))
        prompt = prompt_ids(Sample(tuple(self.turns), None, "chat"), tokenizer)
        ids: list[int] = []
        told = ""
        pieces = stream(
            self.loaded.model,
            prompt,
            max_tokens=self.max_tokens,
            temperature=self.temperature,
            eos_ids=self.loaded.eos_ids,
            seed=self.seed + len(self.turns),
            context=self.loaded.context,
            new_cache=self.new_cache,
        )
        for token in pieces:
            ids.append(token)
            whole = tokenizer.decode(ids, skip_special_tokens=True)
            if whole.endswith("\ufffd"):  # a character whose other bytes are still to come
                continue
            yield whole[len(told) :]
            told = whole
        self.turns.append(Message("assistant", told))


def converse(talk: Chat, prompt: str | None) -> None:
    """Print the reply to ``prompt``; without one, to each line that is typed, until an empty one."""
    while True:
        try:
            line = input("> ") if prompt is None else prompt
        except EOFError:
            return
        if not line.strip():
            return
        for piece in talk.say(line):
            print(piece, end="", flush=True)
        print()
        if prompt is not None:
            return


def show(folder: str) -> dict[str, Any]:
    """The summary of a RUN folder, or, of an unfinished one, its recipe and the stages so far; of a chain, of all its
    runs as they are now.

    Raises:
        RunError: the folder is neither, or something in it is damaged.
    """
    if is_chain(Path(folder)):
        return summarise_chain(Path(folder), read_object)
    root = a_run(folder)
    if (root / "summary.json").exists():
        return read_object(root / "summary.json")
    with Ledger.open(root / "ledger.sqlite", create=False) as ledger:
        known = {"recipe": read_object(root / "recipe.json"), "unfinished": True, "stages": ledger.finished_stages()}
    lines = Journal(root / "metrics.jsonl").read() if (root / "metrics.jsonl").exists() else []
    return known | ({"stopped": why} if (why := stopped(lines)) else {})


def show_sample(folder: str, number: int, as_json: bool = False) -> str:
    """The exact masked token stream of one training sample, as training sees it; several where a text is cut up."""
    root = a_run(folder)
    file = root / "data" / "train.jsonl"
    if not file.exists():
        raise RunError(f"{root} has no training samples yet; let the run get past its data stage")
    samples = read_samples(file)
    if not 0 <= number < len(samples):
        raise RunError(f"{root} has training samples 0 to {len(samples) - 1}, not {number}; choose one of them")
    recipe = recipe_of(root)
    chosen = recipe.teacher if isinstance(recipe.student, CutStudent) else recipe.student
    student = str(root / "arms" / f"base-{recipe.seeds[0]}")
    shared = language_of(student, getattr(chosen, "trust_remote_code", False))
    tokenizer = shared.tokenizer
    with Ledger.open(root / "ledger.sqlite", create=False) as ledger:
        teacher, data = ((ledger.stage_finished(name) or {"facts": {}})["facts"] for name in ("teacher", "data"))
    context = min(recipe.data.context, teacher.get("context") or shared.context, shared.context)
    encoded = _encoded(samples[number], recipe, root, shared, context)
    streams = [e.learnt_from(data.get("untold", 0)) for e in encoded]
    if not as_json:
        return "\n\n".join(shown(e, tokenizer) for e in streams)
    names = tokenizer.convert_ids_to_tokens
    rows = [{"ids": e.ids, "tokens": names(list(e.ids)), "learnt": e.mask} for e in streams]
    return json.dumps(rows, ensure_ascii=False)


def _encoded(sample: Sample, recipe: Recipe, root: Path, student: Language, context: int) -> list[Encoded]:
    """A training sample in the student's tokens, cut as the run cuts it where the teacher's are others."""
    t = recipe.teacher
    path = str(root / "teacher") if isinstance(t, TrainedTeacher) else getattr(t, "path", None)
    teacher = language_of(path, getattr(t, "trust_remote_code", False)) if path else None
    if teacher and difference(student.tokenizer, teacher.tokenizer):
        context = min(recipe.data.context, student.context)
        if recipe.method.kind not in TEXT_ONLY:
            return BothTokenizers(student, teacher, context).encode([sample], recipe.data.too_long)
    return encode_all([sample], student.tokenizer, context, recipe.data.too_long)


def redraw(folder: str, lang: str = "en") -> Path:
    """Draw report.html again from what the run has measured, of an unfinished one from what it has so far; of a chain
    its own, from its runs as they are now. ``lang``: en or ko.

    Raises:
        RunError: the folder is neither, or nothing of the run is finished.
        RecipeError: there is no such language.
    """
    in_language(lang)
    if is_chain(Path(folder)):
        write_chain(Path(folder), read_object, lang)
        return Path(folder) / "report.html"
    root = a_run(folder)
    if (root / "summary.json").exists():
        return draw(root, lang)
    if not (root / "metrics.jsonl").exists() or not (known := show(folder))["stages"]:
        raise RunError(f"{root} is not finished, so there is no report yet; run it again to go on")
    return draw_unfinished(root, known, lang)


def verify(folder: str) -> Verification:
    """Re-derive every hash of a RUN folder's ledger and of the artifacts it names; of a chain, of each of its runs.

    Raises:
        RunError: the folder is neither.
    """
    if is_chain(Path(folder)):
        return _verify_each(Path(folder))
    root = a_run(folder)
    expected = None
    if (root / "summary.json").exists():
        head = read_object(root / "summary.json").get("ledger", {})
        expected = (head["seq"], head["head"]) if "seq" in head and "head" in head else None
    with Ledger.open(root / "ledger.sqlite", create=False) as ledger:
        return ledger.verify(root, expected)


def _verify_each(root: Path) -> Verification:
    """The ledgers of a chain's runs, up to the first that does not verify."""
    entries = records = artifacts = 0
    for stage in stages_of(root, read_object):
        found = verify(str(root / stage))
        entries += found.checked_entries
        records += found.checked_records
        artifacts += found.checked_artifacts
        if not found.ok:
            return Verification(False, entries, records, artifacts, f"{stage}: {found.problem}", found.first_bad_seq)
    return Verification(True, entries, records, artifacts)


def _open(model: str, device: str, threads: int, trust_remote_code: bool) -> tuple[Loaded, Any]:
    set_threads(threads)
    compute = choose(device, "auto")
    return load(model, device=compute.device, trust_remote_code=trust_remote_code), compute
