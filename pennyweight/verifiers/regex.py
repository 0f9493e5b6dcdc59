"""The gold answer as a regular expression, which the whole final answer has to match.

Python's ``re`` can take longer than anybody waits (``(a+)+$``), and does not let go of the interpreter meanwhile. So it
runs in a process of its own, which can be stopped.
"""

from __future__ import annotations

import json
import subprocess
import sys

from pennyweight.records import Task, Verdict
from pennyweight.verifiers.exact import final_answer, never_raises, no_answer

SECONDS = 2
_LONGEST = 100_000

_MATCH = """
import json, re, resource, sys
pattern, text, seconds = json.load(sys.stdin)
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))  # should nobody be left to stop it
try:
    found = bool(re.fullmatch(pattern, text))
except (re.error, OverflowError, RecursionError) as e:
    found = f"the gold answer is no regular expression: {e}"
print(json.dumps(found))
"""


@never_raises
def verify_regex(response: str, task: Task) -> Verdict:
    """Correct when ``task.answer``, a regular expression as Python's ``re`` has it, matches all of the final answer.

    A match that takes longer than two seconds is none.
    """
    answer = final_answer(response)
    if answer is None:
        return no_answer(response)
    if len(answer) > _LONGEST:
        return Verdict(False, None, f"a final answer of {len(answer):,} characters; at most {_LONGEST:,} are matched")
    found = matches(task.answer, answer)
    if isinstance(found, str):
        return Verdict(False, answer, found)
    return Verdict(found, answer, "" if found else f"not {task.answer!r}")


def matches(pattern: str, text: str) -> bool | str:
    """Whether the pattern matches all of the text; or a sentence, where that cannot be told."""
    try:
        done = subprocess.run(
            [sys.executable, "-I", "-S", "-c", _MATCH],
            input=json.dumps([pattern, text, 2 * SECONDS]),
            capture_output=True,
            text=True,
            timeout=SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"stopped: matching took longer than {SECONDS} seconds"
    if done.returncode:
        return f"matching stopped: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}"
    return json.loads(done.stdout)
