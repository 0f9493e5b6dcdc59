"""Writing many responses: ours beside transformers' ``generate`` and its continuous batching, in one run.

    python -m benchmarks.generation [equal] [spread] [continuous] [distribution] [batches] [large]

``equal``: 256 tokens for each of 1, 4 and 128 prompts, greedy. ``spread``: 512 prompts, each with a room of its own
between 40 and 400 tokens (log-uniform), at most 128 rows at once; transformers gets the rooms as a stopping criterion.
``continuous``: 128 prompts of 32 tokens each through ``generate_batch``. All three on stories260K in float32, sides in
turns, medians of the rounds, and the texts compared. ``distribution``: tokens at each of the first positions of 20,000
samples from both, by a chi-square test of homogeneity, and of the first against the model's own probabilities.
``batches``: 96 prompts sampled at temperature 1, in batches of 96, 17 and one by one, in another order the second time.
``large``: a random Llama of 254 M parameters in bfloat16, 32 tokens for each of 1, 4 and 128 prompts, then 64 prompts
with rooms between 8 and 80 tokens, at most 32 rows at once, then continuous batching of 16 prompts.
"""

from __future__ import annotations

import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria

from benchmarks.bars import Bars, real, run_parts
from benchmarks.decode import a_model
from pennyweight.model.generate import generate
from pennyweight.model.load import load

ROUNDS, TOKENS = 5, 256


class Rooms(StoppingCriteria):
    """Ends row i when it has written ``rooms[i]`` tokens."""

    def __init__(self, rooms: list[int], prompt: int):
        self.ends = torch.tensor(rooms) + prompt

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return self.ends <= input_ids.shape[1]


def theirs(model: Any, prompts: list[list[int]], rooms: list[int], sampled: bool = False) -> list[list[int]]:
    """transformers' ``generate`` on one batch of prompts of one length."""
    ids, width = torch.tensor(prompts), len(prompts[0])
    how: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 1.0} if sampled else {"do_sample": False}
    given = {"attention_mask": torch.ones_like(ids), "max_new_tokens": max(rooms), "pad_token_id": 0, **how}
    ends = [] if len(set(rooms)) == 1 else [Rooms(rooms, width)]
    made = model.generate(ids, **given, eos_token_id=None, stopping_criteria=ends)[:, width:].tolist()
    return [row[:room] for row, room in zip(made, rooms, strict=True)]


def ours(model: Any, prompts: list[list[int]], rooms: list[int], **settings: Any) -> list[list[int]]:
    asked = {"temperature": 0.0, "eos_ids": set(), "pad_id": 0, "seed": 1, "batch": 128, **settings}
    return [list(g.ids) for g in generate(model, prompts, max_tokens=rooms, **asked)]


def side_by_side(ways: dict[str, Callable[[], Any]], rounds: int = ROUNDS) -> tuple[dict[str, float], dict[str, Any]]:
    """Median seconds of each way, run in turns after a warm-up, and what each gave."""
    made = {name: way() for name, way in ways.items()}
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            began = time.perf_counter()
            way()
            seconds[name].append(time.perf_counter() - began)
    return {name: statistics.median(s) for name, s in seconds.items()}, made


def the_real_one() -> Any:
    return load(str(real("stories260K"))).model


def some_prompts(count: int, length: int = 8) -> list[list[int]]:
    random = torch.Generator().manual_seed(7)
    return [[1, *torch.randint(3, 512, (length - 1,), generator=random).tolist()] for _ in range(count)]


def told(name: str, tokens: int, seconds: dict[str, float]) -> float:
    first, second = seconds.values()
    rates = ", ".join(f"{side} {tokens / s:,.0f}" for side, s in seconds.items())
    print(f"{name:28} {rates} tokens/s, {second / first:.2f} times", flush=True)
    return second / first


def same(made: dict[str, Any]) -> tuple[int, int]:
    a, b = made.values()
    return sum(x == y for x, y in zip(a, b, strict=True)), len(a)


def equal(bars: Bars) -> None:
    model = the_real_one()
    for count, target in ((1, 2.5), (4, 2.5), (128, 1.4)):
        prompts, rooms = some_prompts(count), [TOKENS] * count
        ways = {
            "ours": lambda p=prompts, r=rooms: ours(model, p, r),
            "generate": lambda p=prompts, r=rooms: theirs(model, p, r),
        }
        seconds, made = side_by_side(ways)
        ratio = told(f"equal lengths, batch {count}", count * TOKENS, seconds)
        bars.check(f"equal_{count}", ratio, f">={target}", ratio >= target)
        alike, of = same(made)
        bars.check(f"equal_{count}_greedy_identical", alike, f"{of} of {of}", alike == of)


def spread(bars: Bars) -> None:
    ratio, alike, of = of_spread(the_real_one(), 512, 40, 128)
    bars.check("spread", ratio, ">=2.5", ratio >= 2.5)
    bars.check("spread_greedy_identical", alike, f"{of} of {of}", alike == of)


def of_spread(model: Any, count: int, shortest: int, batch: int) -> tuple[float, int, int]:
    """Rooms log-uniform between ``shortest`` tokens and ten times that; how much faster ours is, texts that are the
    same, and texts."""
    random = torch.Generator().manual_seed(3)
    prompts = some_prompts(count)
    rooms = [round(shortest * 10 ** float(x)) for x in torch.rand(count, generator=random)]

    def in_batches() -> list[list[int]]:
        parts = (slice(a, a + batch) for a in range(0, count, batch))
        return [row for s in parts for row in theirs(model, prompts[s], rooms[s])]

    seconds, made = side_by_side({"ours": lambda: ours(model, prompts, rooms, batch=batch), "generate": in_batches}, 3)
    ratio = told(f"{count} prompts, {shortest} to {10 * shortest} tokens", sum(rooms), seconds)
    return ratio, *same(made)


def continuous(bars: Bars) -> None:
    ratio, alike, of = of_continuous(the_real_one(), 128)
    bars.check("continuous", ratio, ">=10", ratio >= 10)
    print(f"texts that are the same: {alike} of {of}")


def of_continuous(model: Any, count: int) -> tuple[float, int, int]:
    """32 tokens for each prompt, beside ``generate_batch``; as ``of_spread``."""
    prompts, rooms = some_prompts(count), [32] * count
    asked = GenerationConfig(max_new_tokens=32, do_sample=False, eos_token_id=-1, pad_token_id=0)

    def by_batching() -> list[list[int]]:
        made = model.generate_batch(prompts, generation_config=asked, progress_bar=False)
        by_prompt = {tuple(x.prompt_ids): list(x.generated_tokens) for x in made.values()}
        return [by_prompt[tuple(p)] for p in prompts]

    seconds, made = side_by_side({"ours": lambda: ours(model, prompts, rooms), "generate_batch": by_batching}, 3)
    return told("continuous batching", count * 32, seconds), *same(made)


def distribution(bars: Bars) -> None:
    model, count, length = the_real_one(), 20_000, 4
    mine = ours(model, [[1]] * count, [length] * count, temperature=1.0, batch=2_000)
    torch.manual_seed(11)
    other = [
        row for _ in range(10) for row in theirs(model, [[1]] * (count // 10), [length] * (count // 10), sampled=True)
    ]
    first = torch.bincount(torch.tensor([row[0] for row in mine]), minlength=512).double()
    with torch.no_grad():
        p = torch.softmax(model(input_ids=torch.tensor([[1]])).logits[0, -1].double(), -1)
    worst = normal(*chi_square(torch.stack([first, p * count]), exact=True))
    print(f"first token against the model's probabilities: {worst:.2f} standard deviations")
    for at in range(length):
        counts = torch.stack(
            [torch.bincount(torch.tensor([row[at] for row in side]), minlength=512) for side in (mine, other)]
        )
        z = normal(*chi_square(counts.double()))
        print(f"token {at + 1} against transformers' samples: {z:.2f} standard deviations")
        worst = max(worst, z)
    bars.check("distribution_deviations", worst, "<=4", worst <= 4)


def chi_square(counts: torch.Tensor, exact: bool = False) -> tuple[float, int]:
    """The statistic and degrees of freedom of two rows of counts, ids of few counts taken together; with ``exact`` the
    second row is what is expected of the first."""
    common = counts.min(0).values >= 10
    counts = torch.cat([counts[:, common], counts[:, ~common].sum(1, keepdim=True)], 1)
    if exact:
        return float(((counts[0] - counts[1]) ** 2 / counts[1].clamp(min=1e-9)).sum()), counts.shape[1] - 1
    expected = counts.sum(1, keepdim=True) * counts.sum(0) / counts.sum()
    return float(((counts - expected) ** 2 / expected.clamp(min=1e-9)).sum()), counts.shape[1] - 1


def normal(statistic: float, degrees: int) -> float:
    """A chi-square as standard deviations of a normal (Wilson and Hilferty, 1931)."""
    return ((statistic / degrees) ** (1 / 3) - (1 - 2 / (9 * degrees))) / math.sqrt(2 / (9 * degrees))


def batches(bars: Bars) -> None:
    model, random = the_real_one(), torch.Generator().manual_seed(5)
    lengths = torch.randint(1, 60, (96,), generator=random).tolist()
    prompts = [some_prompts(1, n)[0] for n in lengths]
    rooms = torch.randint(20, 400, (96,), generator=random).tolist()
    whole = ours(model, prompts, rooms, temperature=1.0, batch=96)
    for batch in (17, 1):
        again = ours(model, prompts, rooms, temperature=1.0, batch=batch)
        alike = sum(a == b for a, b in zip(whole, again, strict=True))
        bars.check(f"same_text_batch_{batch}", alike, "96 of 96", alike == 96)


def large(bars: Bars) -> None:
    model = a_model()
    for count in (1, 4, 128):
        prompts, rooms = some_prompts(count, 16), [32] * count
        ways = {
            "ours": lambda p=prompts, r=rooms: ours(model, p, r),
            "generate": lambda p=prompts, r=rooms: theirs(model, p, r),
        }
        seconds, made = side_by_side(ways, 3)
        told(f"254 M bfloat16, batch {count}", count * 32, seconds)
        print("texts that are the same: {} of {}".format(*same(made)))
    print("texts that are the same: {1} of {2}".format(*of_spread(model, 64, 8, 32)))
    print("texts that are the same: {1} of {2}".format(*of_continuous(model, 16)))


PARTS = {f.__name__: f for f in (equal, spread, continuous, distribution, batches, large)}

if __name__ == "__main__":
    torch.set_grad_enabled(False)
    run_parts(PARTS, sys.argv[1:])
