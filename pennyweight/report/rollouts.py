"""The report's part on methods that learn from what the student writes: curves over its rounds of rollouts, and
responses to the same prompts at the beginning and at the end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pennyweight.report.charts import Panel, curves
from pennyweight.report.markup import Html, element, figure, judged, pre, section
from pennyweight.report.view import View
from pennyweight.report.wording import count, finite, number

_PARTS = {
    "accuracy": "Credited as right",
    "format": "Form: thought, answer",
    "language": "Prompt’s language",
    "brevity": "Brevity",
}
_STEADY = 0.1  # change that is not worth a word, as a share of the larger of the two values

Line = Mapping[str, Any]
Curve = tuple[list[float], list[float]]


@dataclass(frozen=True, slots=True)
class _Quantity:
    """One small chart: the name of its values in the journal, its title, and whether they are shares of a whole."""

    key: str
    title: str
    share: bool = False
    whole: bool = False  # numbers that are counted, so that digits behind the point mean nothing

    def text(self, value: float) -> str:
        if self.share:
            return f"{100 * value:.0f}\u00a0%"
        return count(value) if self.whole else number(value)


def learning(view: View, metrics: Sequence[Line], shown: Sequence[Line] = ()) -> Html | None:
    """Curves and responses of each arm that learnt from rollouts.

    Args:
        metrics: lines of metrics.jsonl; those of the stages ``rollout``, ``held_out`` and ``train`` are used.
        shown: responses as ``rollouts/ARM-SEED.jsonl`` has them, each with its ``arm`` and ``seed``.
    """
    arms = dict.fromkeys(str(x["arm"]) for x in metrics if x.get("stage") == "rollout" and x.get("arm") is not None)
    parts = [part for arm in arms for part in _arm(view, arm, metrics, shown)]
    return section("rollouts", "What did it learn from its own writing?", *parts) if parts else None


def _arm(view: View, arm: str, metrics: Sequence[Line], shown: Sequence[Line]) -> list[Html]:
    mine = [x for x in metrics if x.get("arm") == arm]
    found = {q: c for q in _quantities(view) if (c := _curves(mine, q.key))}
    panels = [_panel(view, arm, q, seeds) for q, seeds in found.items() if q.key[:3] != "kl_" or _moves(seeds)]
    if not panels:
        return []
    described = "; ".join(f"{p.label}: {p.text}" for p in panels)
    several = any(len(p.seeds) > 1 for p in panels)
    note = "Each point is a round of rollouts, or a check on held-out problems with the most likely answers. "
    if several:
        note += "Thin lines are single seeds, the thick line is their mean. "
    by_key = {q.key: (q, seeds) for q, seeds in found.items()}
    chart = curves(f"rollouts-{_anchor(arm)}", panels, "training step", "", f"{view.label(arm)}. {described}.")
    rows = [x for x in shown if x.get("arm") == arm]
    return [figure(_finding(view, arm, by_key, _may_be_noise(mine)), chart, note), *_responses(rows)]


def _anchor(arm: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in arm)


def _quantities(view: View) -> list[_Quantity]:
    reward = ((view.summary.get("recipe") or {}).get("method") or {}).get("reward") or {}
    weighed = [k for k in _PARTS if finite(reward.get(k))]
    return [
        _Quantity("reward", "Reward"),
        _Quantity("held_out_accuracy", "Held-out accuracy", share=True),
        *(_Quantity(f"reward_{k}", _PARTS[k], share=True) for k in (weighed if len(weighed) > 1 else [])),
        _Quantity("entropy", "Entropy, nats"),
        _Quantity("length", "Response, tokens"),
        _Quantity("cut_off", "Cut off", share=True),
        _Quantity("repeated", "Repetition", share=True),
        _Quantity("all_alike", "Groups all alike", share=True),
        _Quantity("kl_reference", "KL to the start"),
        _Quantity("kl_old", "KL to who wrote"),
        _Quantity("generated", "Tokens a round", whole=True),
    ]


def _curves(lines: Iterable[Line], key: str) -> dict[str, Curve]:
    """Seed -> steps in order and values; the last word on a step counts."""
    points: dict[str, dict[float, float]] = {}
    for x in lines:
        step, value = finite(x.get("step")), finite(x.get(key))
        # Entropy is measured by the loop, too, over the tokens that are learnt from: one of both is enough.
        if step is not None and value is not None and not (key == "entropy" and x.get("stage") != "rollout"):
            points.setdefault(str(x.get("seed", 0)), {})[step] = value
    ordered = {seed: sorted(p.items()) for seed, p in sorted(points.items())}
    return {seed: ([s for s, _ in p], [v for _, v in p]) for seed, p in ordered.items()}


def _moves(seeds: Mapping[str, Curve]) -> bool:
    return any(abs(v) > 1e-9 for _, values in seeds.values() for v in values)


def _panel(view: View, arm: str, q: _Quantity, seeds: Mapping[str, Curve]) -> Panel:
    scale = 100 if q.share else 1
    scaled = {seed: (steps, [scale * v for v in values]) for seed, (steps, values) in seeds.items()}
    title = f"{q.title}, %" if q.share else q.title
    most = max(v for _, values in scaled.values() for v in values)
    top = 100.0 if q.share else 1.05 * most or 1.0
    return Panel(view.role(arm), title, scaled, _course(q, seeds), top)


def _ends(seeds: Mapping[str, Curve]) -> tuple[float, float]:
    """Mean over seeds of the first and of the last tenth of their points."""
    first, last = 0.0, 0.0
    for _, values in seeds.values():
        n = max(1, len(values) // 10)
        first, last = first + sum(values[:n]) / n / len(seeds), last + sum(values[-n:]) / n / len(seeds)
    return first, last


def _course(q: _Quantity, seeds: Mapping[str, Curve]) -> str:
    """``up, 31 % to 97 %``."""
    first, last = _ends(seeds)
    way = _way(first, last)
    if way == "steady" or q.text(first) == q.text(last):
        return f"steady, {q.text(last)}"
    return f"{way}, {q.text(first)} to {q.text(last)}"


def _way(first: float, last: float) -> str:
    if abs(last - first) <= _STEADY * max(abs(first), abs(last)):
        return "steady"
    return "up" if last > first else "down"


def _may_be_noise(lines: Sequence[Line]) -> bool:
    """Whether the 95 % intervals of the first and the last held-out check overlap, in the mean over seeds."""
    low, high = _curves(lines, "held_out_low"), _curves(lines, "held_out_high")
    if not low or low.keys() != high.keys():
        return False
    first, last = ([sum(v[i] for _, v in side.values()) / len(side) for side in (low, high)] for i in (0, -1))
    return first[0] <= last[1] and last[0] <= first[1]


def _finding(view: View, arm: str, found: Mapping[str, tuple[_Quantity, Mapping[str, Curve]]], noise: bool) -> str:
    """The reward beside held-out accuracy, in one sentence."""
    name = view.label(arm)
    if "reward" not in found:
        return f"{name}: what its rollouts were like"
    (q, seeds), held_out = found["reward"], found.get("held_out_accuracy")
    first, last = _ends(seeds)
    way, says = _way(first, last), {"up": "rose", "down": "fell", "steady": "stayed as it was"}
    said = f"{name}: reward {says[way]}, {q.text(first)} to {q.text(last)}"
    if not held_out:
        return f"{said}."
    q, seeds = held_out
    first, last = _ends(seeds)
    other, numbers = _way(first, last), f"{q.text(first)} to {q.text(last)}"
    if noise and other != "steady":
        return f"{said}; held-out accuracy went {numbers}, which may be noise."
    if way == other:
        return f"{said}, and held-out accuracy with it, {numbers}."
    if way == "up":
        return f"{said}, but held-out accuracy did not, {numbers}: what is rewarded is not what is asked for."
    return f"{said}; held-out accuracy {says[other]}, {numbers}."


def _responses(rows: Sequence[Line]) -> list[Html]:
    """Responses to each prompt early and late, of the first seed."""
    seeds = sorted({str(r.get("seed", 0)) for r in rows})
    first = [r for r in rows if str(r.get("seed", 0)) == seeds[0]] if seeds else []
    prompts = dict.fromkeys(str(r.get("prompt")) for r in first)
    if not prompts:
        return []
    intro = element(
        "p",
        "The first prompts that were asked, with responses drawn as in training, early and late. Whether they are "
        "right is said by the task’s own verifier, whatever was rewarded.",
        class_="small",
    )
    return [
        element("h3", "What it wrote, early and late"),
        intro,
        *(_prompt([r for r in first if str(r.get("prompt")) == p]) for p in prompts),
    ]


def _prompt(rows: Sequence[Line]) -> Html:
    asked = [(element("dt", "Prompt"), element("dd", pre(rows[0].get("prompt")), dir="auto"))]
    if rows[0].get("gold") is not None:
        asked.append((element("dt", "Right answer"), element("dd", pre(rows[0]["gold"]), dir="auto")))
    answers = [
        element(
            "li",
            element("p", element("b", _when(r)), " ", judged(x.get("correct")), class_="who"),
            pre(x.get("text")),
            element("p", _earned(x), class_="note"),
        )
        for r in rows
        for x in r.get("responses") or ()
    ]
    return element(
        "article",
        element("dl", *(part for pair in asked for part in pair), class_="asked"),
        element("ul", *answers, class_="outputs pairs") if answers else None,
        class_="sample",
    )


def _when(row: Line) -> str:
    if row.get("when") == "early":
        return "Before the first step"
    return f"At step {count(row.get('step'))}"


def _earned(answer: Line) -> str:
    return f"reward {number(answer.get('reward'))}{', cut off' if answer.get('cut_off') else ''}"


def stopped(metrics: Sequence[Line]) -> list[str]:
    """What each tripped arm was stopped by, and what to do next, in the words of the journal."""
    return [
        f"Training of {x.get('arm')}, seed {x.get('seed')}, was stopped at step {count(x.get('step'))}: "
        f"{x['tripped']}. To go on: {x.get('cure')}."
        for x in metrics
        if x.get("tripped")
    ]
