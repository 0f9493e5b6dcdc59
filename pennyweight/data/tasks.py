"""Procedural problems from reasoning-gym (Stojanovski et al., arXiv 2505.24760), with worked solutions of our own.

Some of its tasks draw from Python's global random state, and some walk over sets of strings, whose order changes
from process to process. Problems are therefore drawn in a process of its own with a fixed hash seed, so that a seed
names the same problems everywhere.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import Any

from pennyweight.errors import DataError
from pennyweight.records import Message, Sample, Task, canonical_json

LICENCE = "Apache-2.0"
"""reasoning-gym's own licence, which its problems are under."""


def problems(name: str, size: int, seed: int, config: dict[str, Any]) -> list[Sample]:
    """Problems of one task, in the order drawn, without repeated prompts: at most ``size``.

    Problems whose gold answer is blank are left out. The response is a worked solution where ``TRACES`` has one, else
    the bare answer, and None where reasoning-gym accepts many answers and gives none. Same arguments, same problems,
    in any process.

    Raises:
        DataError: the task is unknown, or refuses its settings.
    """
    out: dict[str, Sample] = {}
    for frozen in _drawn_elsewhere(name, size, seed, config):
        entry = thaw(frozen)
        answer = entry["answer"] if isinstance(entry["answer"], str) else ""
        if entry["answer"] is not None and not answer.strip():
            continue  # nothing can be right: base_conversion writes zero as no digits at all
        task = Task(name, "reasoning_gym", answer, canonical_json({"config": config, "entry": frozen}))
        prompt = (Message("user", entry["question"].strip()),)
        sample = Sample(prompt, solution(name, entry), f"reasoning-gym/{name}", LICENCE, task=task)
        out.setdefault(sample.prompt_hash, sample)
    return list(out.values())


def in_style(sample: Sample, worked: float, think: bool) -> Sample:
    """A problem whose worked solution is left as it is, put into ``<think></think>`` before its answer, or given up for
    the bare answer; the last, by the hash of the prompt, for all but the share ``worked`` of problems."""
    work, mark, answer = (sample.response or "").rpartition("#### ")
    if not mark or not work.strip():
        return sample
    if int(sample.prompt_hash[15:30], 16) / 16**15 >= worked:  # other digits than the split goes by
        return dataclasses.replace(sample, response=f"#### {answer}")
    return dataclasses.replace(sample, response=f"<think>\n{work}</think>\n#### {answer}") if think else sample


def solution(name: str, entry: dict[str, Any]) -> str | None:
    """The worked solution of an entry, or its bare answer, or None; an answer of many lines goes into a block."""
    if name in TRACES:
        return TRACES[name](entry)
    answer = entry["answer"]
    if not isinstance(answer, str) or not answer.strip():
        return None
    return f"<answer>\n{answer}\n</answer>" if "\n" in answer.strip() or "####" in answer else f"#### {answer}"


def draw(name: str, size: int, seed: int, config: dict[str, Any]) -> list[dict[str, Any]]:
    """reasoning-gym's entries as it gives them: question, answer, metadata. Leaves the global random state alone.

    Raises:
        DataError: the task is unknown, or refuses its settings.
    """
    import numpy as np
    import reasoning_gym

    _check(name, config)
    python_state, numpy_state = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        dataset = reasoning_gym.create_dataset(name, size=size, seed=seed, **config)
        return [dataset[i] for i in range(size)]
    except Exception as e:
        said = str(e) or type(e).__name__
        named = [k for k in config if k in said] or list(config)
        settings = ", ".join(f"{k}={config[k]!r}" for k in named) or "its defaults"
        raise DataError(f"task {name} refuses {settings}: {said}; correct the config of that task") from None
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)


def _check(name: str, config: dict[str, Any]) -> None:
    """Refuse unknown tasks and settings, with the nearest known names."""
    from reasoning_gym.factory import DATASETS

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=3, cutoff=0.4) or sorted(TRACES)
        raise DataError(f"reasoning-gym has no task {name!r}; the nearest names are {', '.join(near)}")
    known = {f.name for f in dataclasses.fields(DATASETS[name][1])} - {"size", "seed"}
    for key in config:
        if key in ("size", "seed"):
            raise DataError(f"{key} of task {name} does not go into its config; set {key} beside it")
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"it has {', '.join(sorted(known))}"
            raise DataError(f"task {name} has no setting {key!r}; {hint}")


def _drawn_elsewhere(name: str, size: int, seed: int, config: dict[str, Any]) -> list[Any]:
    """Frozen entries, drawn by ``draw`` in a process of its own."""
    path = os.pathsep.join(p or os.getcwd() for p in sys.path)
    done = subprocess.run(
        [sys.executable, "-m", "pennyweight.data.tasks"],
        input=json.dumps([name, size, seed, config]).encode(),
        capture_output=True,
        env={**os.environ, "PYTHONHASHSEED": "0", "PYTHONPATH": path, "PYTHONIOENCODING": "utf-8"},
    )
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise DataError(f"drawing problems of task {name} failed: {last[0]}; try other settings or a smaller size")
    reply = json.loads(done.stdout)
    if "refused" in reply:
        raise DataError(reply["refused"])
    return reply["entries"]


def _serve() -> None:
    """The other side of ``_drawn_elsewhere``: arguments on stdin, entries or a refusal on stdout."""
    with contextlib.redirect_stdout(sys.stderr):  # some tasks print while they draw
        try:
            reply = {"entries": [freeze(e) for e in draw(*json.load(sys.stdin))]}
        except DataError as e:
            reply = {"refused": str(e)}
    sys.stdout.write(json.dumps(reply))


def freeze(value: Any) -> Any:
    """JSON that ``thaw`` turns back into the same value: tuples, and dicts with keys other than text, are tagged.

    Raises:
        TypeError: the value is of a kind that entries do not hold.
    """
    if isinstance(value, tuple):
        return {"__tuple__": [freeze(v) for v in value]}
    if isinstance(value, list):
        return [freeze(v) for v in value]
    if isinstance(value, dict):
        if all(isinstance(k, str) for k in value):
            return {k: freeze(v) for k, v in value.items()}
        return {"__pairs__": [[freeze(k), freeze(v)] for k, v in value.items()]}
    if value is None or isinstance(value, str | bool | int | float):
        return value
    if hasattr(value, "item"):  # a number of numpy's
        return value.item()
    raise TypeError(f"a reasoning-gym entry holds a {type(value).__name__}, which cannot be written down")


def thaw(value: Any) -> Any:
    """The inverse of ``freeze``."""
    if isinstance(value, list):
        return [thaw(v) for v in value]
    if isinstance(value, dict):
        if value.keys() == {"__tuple__"}:
            return tuple(thaw(v) for v in value["__tuple__"])
        if value.keys() == {"__pairs__"}:
            return {thaw(k): thaw(v) for k, v in value["__pairs__"]}
        return {k: thaw(v) for k, v in value.items()}
    return value


def _finish(lines: Sequence[str], answer: object) -> str:
    return "\n".join([*lines, f"#### {answer}"])


def _chain_sum(entry: dict[str, Any]) -> str:
    """``42 - 25 = 17``, ``17 - 73 = -56``: each partial sum on its own line."""
    first, *rest = entry["metadata"]["expression"].split()
    total, lines = int(first), []
    for sign, term in zip(rest[::2], rest[1::2], strict=True):
        after = total + int(term) if sign == "+" else total - int(term)
        lines.append(f"{total} {sign} {term} = {after}")
        total = after
    return _finish(lines, total)


def _basic_arithmetic(entry: dict[str, Any]) -> str:
    """One operation a line, products and quotients before sums.

    The bare answer where there are parentheses or signs, and where reasoning-gym's answer is not that of the
    expression it shows (it leaves parentheses out of the text, not out of the sum, when they are not allowed).
    """
    terms, bare = entry["metadata"]["expression"].split(), f"#### {entry['answer']}"
    if not all(t.isdigit() for t in terms[::2]) or len(terms) % 2 == 0:
        return bare
    lines: list[str] = []
    for operators in ("*/", "+-"):
        i = 1
        while i < len(terms):
            if terms[i] not in operators:
                i += 2
                continue
            a, sign, b = int(terms[i - 1]), terms[i], int(terms[i + 1])
            after = {"*": a * b, "/": a // b if b else 0, "+": a + b, "-": a - b}[sign]
            lines.append(f"{a} {sign} {b} = {after}")
            terms[i - 1 : i + 2] = [str(after)]
    return _finish(lines, int(terms[0])) if terms[0] == entry["answer"] else bare


def _products(entry: dict[str, Any]) -> str:
    """Long multiplication: one partial product for each digit that is not zero, then their running sum."""
    total, *factors = (int(f) for f in entry["metadata"]["expression"].split(" * "))
    lines: list[str] = []
    for factor in factors:
        digits = str(abs(factor))
        places = [int(d) * 10 ** (len(digits) - 1 - i) for i, d in enumerate(digits) if d != "0"] or [0]
        parts = [total * place * (-1 if factor < 0 else 1) for place in places]
        sign = "-" if factor < 0 else ""
        lines += [f"{total} * {sign}{place} = {part}" for place, part in zip(places, parts, strict=True)]
        total = parts[0]
        for part in parts[1:]:
            lines.append(f"{total} + {part} = {total + part}")
            total += part
    return _finish(lines, total)


def _euclid(a: int, b: int) -> tuple[int, list[str]]:
    """Greatest common divisor by remainders, and the steps."""
    lines = []
    while b:
        lines.append(f"{a} mod {b} = {a % b}")
        a, b = b, a % b
    return a, lines


def _gcd(entry: dict[str, Any]) -> str:
    """Euclid's algorithm, number by number."""
    result, *rest = entry["metadata"]["numbers"]
    lines: list[str] = []
    for number in rest:
        before = result
        result, steps = _euclid(before, number)
        lines += [*steps, f"gcd({before}, {number}) = {result}"]
    return _finish(lines, result)


def _lcm(entry: dict[str, Any]) -> str:
    """lcm(a, b) = a / gcd(a, b) * b, number by number."""
    result, *rest = entry["metadata"]["numbers"]
    lines: list[str] = []
    for number in rest:
        divisor, steps = _euclid(result, number)
        lines += [*steps, f"{result} / {divisor} = {result // divisor}"]
        lines.append(f"{result // divisor} * {number} = {math.lcm(result, number)}")
        result = math.lcm(result, number)
    return _finish(lines, result)


def _spell_backward(entry: dict[str, Any]) -> str:
    """The letters apart, then apart from the end, then together."""
    word = entry["metadata"]["word"]
    return _finish([" ".join(word), " ".join(reversed(word))], word[::-1])


def _number_sorting(entry: dict[str, Any]) -> str:
    """The next number in order and how many are left, until none is."""
    numbers, falling = entry["metadata"]["original_numbers"], entry["metadata"]["direction"] == "descending"
    ordered = sorted(numbers, key=float, reverse=falling)
    pick = "largest" if falling else "smallest"
    lines = [f"{pick} of {len(ordered) - i}: {number}" for i, number in enumerate(ordered)]
    return _finish(lines, ordered)


def _letter_counting(entry: dict[str, Any]) -> str:
    """Word by word with the running total."""
    letter, total, lines = entry["metadata"]["target_letter"].lower(), 0, []
    for word in entry["metadata"]["span"]:
        here = word.lower().count(letter)
        total += here
        lines.append(f"{word}: {here}, total {total}")
    return _finish(lines, total)


def _count_bits(entry: dict[str, Any]) -> str:
    """Four bits at a time, as remainders of division by 16."""
    number, total, lines = entry["metadata"]["number"], 0, []
    while number:
        quotient, digit = divmod(number, 16)
        total += digit.bit_count()
        lines.append(f"{number} = 16 * {quotient} + {digit}: {digit:04b}, total {total}")
        number = quotient
    return _finish(lines, total)


def _base_conversion(entry: dict[str, Any]) -> str:
    """Into base 10 digit by digit, then remainders of division by the target base, read from the last."""
    m, figures = entry["metadata"], "0123456789abcdefghijklmnopqrstuvwxyz"
    source, target, value, lines = m["source_base"], m["target_base"], 0, []
    for figure in m["source_repr"].lower():
        digit = figures.index(figure)
        if source != 10:
            lines.append(f"{value} * {source} + {digit} = {value * source + digit}")
        value = value * source + digit
    if target == 10:
        return _finish(lines, value)
    written = ""
    while value or not written:
        quotient, digit = divmod(value, target)
        lines.append(f"{value} = {target} * {quotient} + {digit}: {figures[digit]}")
        value, written = quotient, figures[digit] + written
    return _finish(lines, written)


TRACES: dict[str, Callable[[dict[str, Any]], str]] = {
    "base_conversion": _base_conversion,
    "basic_arithmetic": _basic_arithmetic,
    "chain_sum": _chain_sum,
    "count_bits": _count_bits,
    "gcd": _gcd,
    "lcm": _lcm,
    "letter_counting": _letter_counting,
    "number_sorting": _number_sorting,
    "products": _products,
    "spell_backward": _spell_backward,
}
"""Task name -> worked solution of an entry, ending with a line ``#### ANSWER``."""


if __name__ == "__main__":
    _serve()
