"""A recipe, or a chain of them, run to its end: each stage of a chain is an ordinary run in RUN/STAGE.

What a stage begins from is content that its run depends on, so it runs again when an earlier one made something else.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pennyweight.chain_file import Chain
from pennyweight.errors import DataError, MethodError, ModelError, RecipeError, RunError
from pennyweight.meter.allowance import check_forecast
from pennyweight.meter.rates import check_prices, check_stopped
from pennyweight.methods import check
from pennyweight.model.device import choose, set_threads
from pennyweight.plan.assumed import read_or_assume
from pennyweight.plan.published import published
from pennyweight.plan.reckon import foretell, together
from pennyweight.plan.seen import trial_of
from pennyweight.plan.subjects import made_by as shapes_made_by
from pennyweight.plan.subjects import subjects_of
from pennyweight.progress import say
from pennyweight.recipe import Recipe
from pennyweight.records import CHAIN
from pennyweight.report.chain_summary import made_by, note_begun, write_chain
from pennyweight.run_folder import read_object, write_json
from pennyweight.settings import Budget
from pennyweight.teacher.refusals import check_teacher
from pennyweight.train.group import Group, join
from pennyweight.verifiers import check_verifiers

RunLine = Callable[..., dict[str, Any]]
"""Runs a recipe in a folder; where a third is given, as a part of a chain that has a budget (``line.Chain``)"""


def go(plan: Recipe | Chain, out: Path, run_line: RunLine, only: Sequence[str] = ()) -> dict[str, Any]:
    """Run a recipe, or the stages of a chain, in the folder ``out``; what its summary.json holds.

    Args:
        run_line: runs one recipe.
        only: names of the stages to run, of a chain; all of them when there is none.

    Raises:
        PennyweightError: whatever a run raises; ``only`` names what is no stage, or stages that begin from what has not
            been made; or the folder belongs to something else.
    """
    if isinstance(plan, Recipe):
        if only:
            raise RecipeError(f"--only {only[0]} names a stage of a chain, and {plan.name} is one run; leave it out")
        return run_line(plan, out)
    recipes, chosen, group = plan.recipes(out), _chosen(plan, only), join()
    for stage in chosen:
        _refuse(stage, recipes[stage])
        for reference, other in plan.needs(stage).items():
            if other not in chosen:
                _look_for(reference, stage, other, out)
                _say_if_changed(stage, other, recipes[other], out)
    _hold(plan, recipes, chosen, out, group.size)
    if group.first:
        _claim(plan, out)
    order = list(recipes)
    summary: dict[str, Any] = {}
    for stage in chosen:
        say(f"stage {order.index(stage) + 1} of {len(order)}: {stage}, {recipes[stage].method.kind}, in {out / stage}")
        for reference, other in plan.needs(stage).items() if group.first else ():
            _look_for(reference, stage, other, out)
        _together(group, stage)
        begun = made_by(out, plan.needs(stage)) if group.first else {}
        others = [(recipe, out / other) for other, recipe in recipes.items() if other != stage]
        run_line(recipes[stage], out / stage, *([(plan.budget, others)] if plan.budget.limits else []))
        gc.collect()  # models of a finished run that something in a circle still holds
        if group.first:
            note_begun(out, stage, begun)
            summary = write_chain(out, read_object)
    return summary


def _together(group: Group, stage: str) -> None:
    """Begin a stage in all processes, once what it begins from is written: the others leave a run before its student
    is, and do not hear what the first one tells of that."""
    if group.first:
        group.tell({"next": stage})
        return
    while group.hear().get("next") != stage:
        pass


def _chosen(chain: Chain, only: Sequence[str]) -> list[str]:
    """The stages to run, in the order of the chain."""
    for stage in only:
        if stage not in chain.tables:
            raise RecipeError(f"--only {stage} is no stage of {chain.origin}; its stages: {', '.join(chain.tables)}")
    return [stage for stage in chain.tables if not only or stage in only]


def _refuse(stage: str, recipe: Recipe) -> None:
    """What a run refuses before it writes anything, found before the stages ahead of it have taken their hours."""
    try:
        check(recipe.method, frozenset({recipe.targets.kind}))
        check_teacher(recipe)
        check_verifiers(recipe)
    except (DataError, MethodError, RecipeError) as e:
        raise type(e)(f"stages.{stage}: {e}") from None


def _hold(chain: Chain, recipes: Mapping[str, Recipe], chosen: Sequence[str], out: Path, processes: int) -> None:
    """Hold what the stages are foretold to take against their budgets, and all of them against the chain's, before the
    first one runs; and say what can be held against no forecast. A stage that was finished before is to take nothing.

    Raises:
        RecipeError: the low end of one is above its budget, or of all above the chain's; or a price is not known.
        Overspent: the chain's budget is spent.
    """
    if not chain.budget.limits and not any(recipes[stage].budget.limits for stage in chosen):
        return
    check_stopped((out / stage for stage in recipes), chain.budget)
    made: dict[str, Any] = {}
    found: dict[str, dict[str, Any]] = {}
    unknown: dict[str, str] = {}
    for stage, recipe in recipes.items():
        c, threads = choose(recipe.compute.device, recipe.compute.dtype), set_threads(recipe.compute.threads)
        try:
            where = (c.hardware, processes, threads, c.autocast is not None)
            told = foretell(recipe, *where, published, trial_of(recipe), made)
            of = told.of if told else subjects_of(recipe, made, read_or_assume)
            made |= shapes_made_by(recipe, of, str(chain.place(out) / stage))
            finished = (out / stage / "summary.json").exists()
            found |= {stage: told.found} if told and stage in chosen and not finished else {}
        except (DataError, ModelError) as e:
            unknown |= {stage: f"nothing can be foretold, since {e}"} if stage in chosen else {}
        if stage in chosen:
            _held(recipe.budget, found.get(stage), f"stages.{stage}", unknown.get(stage, ""))
            check_prices(recipe.budget, recipe.teacher, c.hardware)
            check_prices(chain.budget, recipe.teacher, c.hardware, recipe.budget)
    whole = together(chain.name, found) if found else None
    _held(chain.budget, whole, "the chain", next(iter(unknown.values()), ""))


def _held(budget: Budget, foretold: dict[str, Any] | None, whose: str, why: str) -> None:
    if warning := check_forecast(budget, foretold and foretold["total"], whose, why):
        say(warning)
    elif why and budget.limits and foretold:
        say(f"{whose}'s budget is held against a forecast of some of its stages only: {why}")


def _look_for(reference: str, stage: str, other: str, out: Path) -> None:
    """Raise RunError where what a stage begins from is not there."""
    place = out / reference.removeprefix("@")
    if place.exists():
        return
    if not (out / other / "summary.json").exists():
        raise RunError(
            f"{stage} begins from {reference}, which is not there: {other} has not been run to its end; run it first "
            f"(--only {other}), or the whole chain"
        )
    made = ", ".join(sorted(p.name for p in (out / other).iterdir() if not p.name.startswith(".")))
    raise RunError(
        f"{stage} begins from {reference}, and {other} has made no such thing; refer to what is in {out / other}: "
        f"{made}"
    )


def _say_if_changed(stage: str, other: str, recipe: Recipe, out: Path) -> None:
    file = out / other / "recipe.json"
    if file.exists() and read_object(file) != recipe.model_dump(mode="json"):
        say(f"{other} was run with other settings than it has now; {stage} begins from what is there")


def _claim(chain: Chain, out: Path) -> None:
    """Make ``out`` the folder of this chain.

    Raises:
        RunError: it cannot be written, or holds something else.
    """
    file = out / CHAIN
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not file.exists() and any(not p.name.startswith(".making-") for p in out.iterdir()):
            raise RunError(f"{out} is not empty and holds no chain; choose another --out")
    except FileExistsError:
        raise RunError(f"{out} is a file; choose another --out") from None
    except OSError as e:
        raise RunError(f"cannot write the folder {out}: {e.strerror}; choose another with --out") from None
    owner = read_object(file).get("name") if file.exists() else chain.name
    if owner != chain.name and any(out.glob("*/ledger.sqlite")):
        raise RunError(
            f"{out} holds the chain {owner!r}, not {chain.name!r}; choose another --out, or remove that folder"
        )
    stages = {stage: {"recipe": table, "needs": chain.needs(stage)} for stage, table in chain.tables.items()}
    budget = {"budget": chain.budget.limits} if chain.budget.limits else {}
    write_json(file, {"name": chain.name, "stages": stages, **budget})
