"""The scorer of the reasoning-gym task that a problem came from.

Some scorers evaluate the answer as Python or as an expression of sympy's, and a model wrote it: it may take for ever
(``factorial(10**8)``), all of the memory, or whatever else a program can. So they score in a process that is kept for
it, with limits of time and memory and shut in where the system can (``sandbox/kept.py``). In this process only what
cannot do any of that is scored: texts that are compared as they are, and short numbers.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import lru_cache
from typing import Any

from pennyweight.data.tasks import thaw
from pennyweight.records import Task, Verdict, canonical_json
from pennyweight.sandbox.kept import Kept, NoAnswer, TookTooLong
from pennyweight.verifiers.exact import final_answer, never_raises, no_answer

SECONDS = 5
_FULL = 1 - 1e-9
_LONGEST = 100_000

_CODE = re.compile(
    r"__[A-Za-z]|\b(?:exec|eval|compile|open|input|breakpoint|exit|quit|(?:get|set|del)attr|globals|locals|vars)\s*\("
    r"|\b(?:sympify|lambdify|parse_expr|preview)\s*\("
    r"|\*\*\s*(?:\d{4,}|(?:\(\s*)?\d+\s*\*\*)"
)
_ON_ONE_LINE = (re.compile(r"[A-Za-z_]\("), re.compile(r"['\"]")), (re.compile(r"\blambda\b"), re.compile(":"))
"""A call and behind it a quotation mark, a lambda and behind it a colon."""
_PLAIN_NUMBER = re.compile(r"[^eE]{1,100}")

_scorers = Kept("pennyweight.verifiers.reasoning_gym:scoring", SECONDS, shut_in=True)


@never_raises
def verify_reasoning_gym(response: str, task: Task) -> Verdict:
    """Correct when the task's own ``score_answer`` gives the final answer full marks; at once wrong is what looks like
    a program, and what takes longer than five seconds to score."""
    answer = final_answer(response)
    if answer is None:
        return no_answer(response)
    if len(answer) > _LONGEST:
        return Verdict(False, None, f"a final answer of {len(answer):,} characters; at most {_LONGEST:,} are scored")
    if looks_like_a_program(answer):
        return Verdict(False, answer, "not scored: the answer looks like a program, and some scorers would run it")
    compare = _comparison(task.name)
    try:
        if compare and compare[1](answer):
            score = compare[0](None, answer, thaw(json.loads(task.entry)["entry"]))
        else:
            score = _scorers.ask([task.name, task.entry, answer])
    except TookTooLong:
        return Verdict(False, answer, f"stopped: scoring it took longer than {SECONDS} seconds")
    except NoAnswer as e:
        return Verdict(False, answer, f"the verifier failed: {e}")
    if score >= _FULL:
        return Verdict(True, answer)
    return Verdict(False, answer, f"{task.name} scores it {score:.3g} of 1")


def looks_like_a_program(answer: str) -> bool:
    """Whether an answer need not be scored, since it is more of a program than of an answer."""
    if _CODE.search(answer):
        return True
    for line in answer.split("\n"):
        for first, then in _ON_ONE_LINE:
            found = first.search(line)
            if found and then.search(line, found.end()):
                return True
    return False


@lru_cache(maxsize=256)
def _comparison(name: str) -> tuple[Callable[..., float], Callable[[str], Any]] | None:
    """A scorer that only compares, and for which answers it does no more than that; None where it may do other things.

    That of most tasks compares texts; another compares decimal numbers, quickly where there is no large exponent.
    """
    import reasoning_gym  # noqa: F401 - it fills the table
    from reasoning_gym.dataset import ProceduralDataset
    from reasoning_gym.factory import DATASETS

    scorer: Any = DATASETS[name][0].score_answer if name in DATASETS else None
    if scorer is ProceduralDataset.score_answer:
        return scorer, bool
    if scorer and set(scorer.__code__.co_names) == {"utils", "compute_decimal_reward"}:
        return scorer, _PLAIN_NUMBER.fullmatch
    return None


def scoring() -> Callable[[list[str]], float]:
    """What scores, in a process of its own: name of the task, its entry as JSON and an answer -> from 0 to 1."""
    import reasoning_gym  # noqa: F401 - before the process is shut in

    def score(asked: list[str]) -> float:
        name, entry, answer = asked
        problem = json.loads(entry)
        return float(_data_set(name, canonical_json(problem["config"])).score_answer(answer, thaw(problem["entry"])))

    return score


@lru_cache(maxsize=256)
def _data_set(name: str, config: str) -> Any:
    """Kept, since making one can read word lists and the like."""
    import reasoning_gym

    return reasoning_gym.create_dataset(name, size=1, seed=0, **json.loads(config))
