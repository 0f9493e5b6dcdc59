"""The report's part on rollouts: curves with their findings, responses early and late, and runs that were stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from test_report_page import EVIL, Page, summary

from pennyweight.commands import redraw, show
from pennyweight.errors import RunError
from pennyweight.recipe_file import load
from pennyweight.report.page import render
from pennyweight.report.rollouts import learning
from pennyweight.report.terminal import print_summary
from pennyweight.report.view import view
from pennyweight.run_folder import Made, Run

TINY = Path(__file__).with_name("tiny.toml")


def line(step: int, arm: str = "grpo", seed: int = 0, **values: float) -> dict[str, Any]:
    return {"stage": "rollout", "arm": arm, "seed": seed, "step": step, **values}


def metrics(last: float = 0.9, held_out: float = 0.85, seeds: int = 1) -> list[dict]:
    out = []
    for seed in range(seeds):
        for i in range(11):
            reward = 0.3 + (last - 0.3) * i / 10
            out.append(
                line(
                    1 + i, seed=seed, reward=reward, reward_accuracy=reward, reward_format=1.0, entropy=0.5 - i / 25,
                    length=40.0, cut_off=0.1, repeated=0.02, all_alike=i / 10, generated=5120.0,
                )
            )  # fmt: skip
            out.append({**line(1 + i, seed=seed, loss=0.0, clipped=0.0, kl_old=0.0, entropy=9.0), "stage": "train"})
        for step, value in ((1, 0.3), (6, (0.3 + held_out) / 2), (11, held_out)):
            out.append({**line(step, seed=seed, held_out_accuracy=value), "stage": "held_out"})
    return out


def responses() -> list[dict[str, Any]]:
    def row(when: str, step: int, text: str, reward: float, correct: bool) -> dict[str, Any]:
        answer = {"text": text, "reward": reward, "correct": correct, "cut_off": not correct}
        return {
            "when": when,
            "step": step,
            "prompt": "2 + 2",
            "gold": "4",
            "responses": [answer],
            "arm": "grpo",
            "seed": 0,
        }

    return [row("early", 1, "A: 5", 0.0, True), row("late", 11, EVIL, 1.0, False)]


def part(lines: list[dict], shown: list[dict] | None = None, **more: Any) -> str:
    """The part of the page alone."""
    return str(learning(view({**summary(), **more}), lines, shown or []) or "")


def few(lines: list[dict]) -> list[dict]:
    """With reward and held-out accuracy only, which is quicker to draw."""
    labels = ("stage", "arm", "seed", "step", "reward", "reward_accuracy", "reward_format", "held_out_accuracy")
    return [{k: v for k, v in x.items() if k in labels} for x in lines if x["stage"] != "train"]


def test_each_quantity_has_a_chart_with_its_finding() -> None:
    moved = [{**x, "kl_reference": 0.01} if "kl_old" in x else x for x in metrics()]
    page = render(summary(), moved, [])
    assert "What did it learn from its own writing?" in page and "training step" in page
    found = {
        "Reward": "up, 0.300 to 0.900",
        "Held-out accuracy, %": "up, 30\u00a0% to 85\u00a0%",
        "Entropy, nats": "down, 0.500 to 0.1",
        "Response, tokens": "steady, 40.0",
        "Cut off, %": "steady, 10\u00a0%",
        "Repetition, %": "steady, 2\u00a0%",
        "Groups all alike, %": "up, 0\u00a0% to 100\u00a0%",
        "KL to the start": "steady, 0.0100",
        "Tokens a round": "steady, 5,120",
    }
    for title, finding in found.items():
        assert f">{title}" in page and f">{finding}" in page, title
    assert "KL to who wrote" not in page  # 0 throughout: nothing to see
    assert "A policy’s loss is near zero" in page


def test_a_reward_that_held_out_accuracy_follows_and_one_that_it_does_not() -> None:
    plain = lambda lines: part(few(lines)).replace("\u00a0", " ")  # noqa: E731
    assert "reward rose, 0.300 to 0.900, and held-out accuracy with it, 30 % to 85 %." in plain(metrics())
    words = plain(metrics(held_out=0.3))
    assert "reward rose, 0.300 to 0.900, but held-out accuracy did not, 30 % to 30 %" in words
    assert "what is rewarded is not what is asked for" in words
    checks = [x | {"held_out_low": 0.2, "held_out_high": 0.5} if "held_out_accuracy" in x else x for x in metrics()]
    wide = part([x for x in checks if x["stage"] != "train"]).replace("\u00a0", " ")
    assert "held-out accuracy went 30 % to 85 %, which may be noise." in wide
    assert "reward fell, 0.300 to 0.00" in plain(metrics(last=0.0))


def test_parts_are_shown_where_several_are_weighed() -> None:
    recipe = lambda **reward: {"recipe": {"method": {"reward": reward}}}  # noqa: E731
    assert "Credited as right" not in part(few(metrics()), **recipe(accuracy=1.0, format=0.0))
    both = part(few(metrics()), **recipe(accuracy=1.0, format=0.5, brevity=0.0))
    assert "Credited as right, %" in both and "Form: thought, answer" in both and "Brevity" not in both


def test_seeds_are_lines_of_their_own_and_arms_charts_of_their_own() -> None:
    one, three = part(few(metrics())), part(few(metrics(seeds=3)))
    assert three.count("<path") > one.count("<path") and "Thin lines are single seeds" in three
    other = [{**x, "arm": "other"} for x in metrics()]
    both = part(few([*metrics(), *other]))
    assert 'id="rollouts-grpo-wide-' in both and 'id="rollouts-other-wide-' in both


def test_responses_early_and_late_are_shown_and_not_trusted() -> None:
    text = part(few(metrics()), responses())
    page = Page(text)
    assert "Before the first step" in page.text and "At step 11" in page.text and "reward 1.00, cut off" in page.text
    assert "✓ correct" in page.text and "✗ wrong" in page.text
    assert "<script>alert(1)" not in text and "<script>alert(1)" in page.text
    assert part([], responses()) == ""


def test_runs_without_rollouts_have_no_such_part() -> None:
    assert part([x for x in metrics() if x["stage"] == "train"]) == ""


@pytest.mark.parametrize("broken", [{}, {"reward": None}, {"reward": float("nan")}, {"step": None}, {"seed": None}])
def test_lines_that_lack_something_do_no_harm(broken: dict[str, Any]) -> None:
    part([{**line(1), **broken}, {**line(2, length=3.0), **broken}], [{"arm": "grpo"}])


def a_stopped_run(folder: Path) -> Path:
    with Run(folder, load(TINY)) as run:
        run.stage("teacher", {}, lambda work: Made())
    stop = {
        **line(12),
        "stage": "train",
        "tripped": "the reward fell: it is 0",
        "cure": "lower train.lr or [tripwires]",
    }
    lines = [json.dumps(x) for x in [*few(metrics()), stop]]
    (folder / "metrics.jsonl").write_text("\n".join([*lines, '{"stage": "rollo']))
    (folder / "rollouts").mkdir()
    (folder / "rollouts" / "grpo-0.jsonl").write_text("".join(json.dumps(r) + "\n" for r in responses()))
    return folder


def test_a_run_that_was_stopped_has_a_report_and_says_why(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = a_stopped_run(tmp_path / "run")
    why = (
        "Training of grpo, seed 0, was stopped at step 12: the reward fell: it is 0. To go on: lower train.lr or [trip"
    )
    assert show(str(folder))["stopped"][0].startswith(why)
    page = Page(redraw(str(folder)).read_text())
    assert "This run is not finished." in page.text and why in page.text and "Stages done so far: teacher." in page.text
    assert "What it wrote, early and late" in page.text
    print_summary(show(str(folder)))
    assert why in capsys.readouterr().out


def test_a_run_that_has_nothing_yet_has_no_report(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with Run(folder, load(TINY)):
        pass
    with pytest.raises(RunError, match="not finished"):
        redraw(str(folder))
