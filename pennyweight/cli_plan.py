"""``pennyweight plan``: what a training will take, and whether what others say of theirs can be."""

from __future__ import annotations

import re
from datetime import date
from pathlib import Path
from typing import Annotated, Any

import typer

import pennyweight.cli_options as opt
from pennyweight.errors import RecipeError
from pennyweight.records import readable_json

Model = Annotated[
    str | None, typer.Argument(metavar="[RECIPE.toml | MODEL]", help="A recipe; or a model folder or config.json.")
]
OnTop = Annotated[list[str] | None, typer.Argument(metavar="[a.b=c ...]", help="Settings on top of a recipe.")]
On = Annotated[
    str | None, typer.Option(help="Chips and how many, h100x8; or this: measure this machine. Default: h100.")
]
Length = Annotated[
    int | None, typer.Option(min=1, help="Tokens in a row, or of a recipe's mean sample. Default: 4,096, or less.")
]
Precision = Annotated[
    str | None, typer.Option(help="fp32, bf16, fp8 or fp4: what Linears multiply in. Default: the recipe's, or bf16.")
]
Claim = Annotated[str | None, typer.Option(help="Check what is claimed of a training: FILE.toml, or a name.")]


def plan(
    model: Model = None,
    settings: OnTop = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens to train on: 300M, 15T.")] = None,
    on: On = None,
    length: Length = None,
    teacher: Annotated[str | None, typer.Option(help="Its folder or config.json: it labels all tokens first.")] = None,
    precision: Precision = None,
    lora: Annotated[int, typer.Option(min=0, help="Rank of LoRA's factors; 0 trains all weights.")] = 0,
    price: Annotated[float | None, typer.Option(help="USD for a device and an hour, in place of known prices.")] = None,
    catalogue: Annotated[str | None, typer.Option(help="Chips and prices of your own: FILE.toml.")] = None,
    chips: Annotated[bool, typer.Option("--chips", help="List chips and prices that are known.")] = False,
    claim: Claim = None,
    claims: Annotated[bool, typer.Option("--claims", help="List the claims that come with Pennyweight.")] = False,
    out: Annotated[Path | None, typer.Option(help="HTML page to write, of a recipe.")] = None,
    lang: opt.Lang = "en",
    as_json: opt.Json = False,
) -> None:
    """FLOPs, hours, energy and money before anything runs, as ranges; or a published claim, checked.

    Of a recipe every stage; its default machine is this one, which --on this measures first. From config.json alone: no
    weights are needed. A claim that does not add up ends with code 1.

    Examples:

        pennyweight plan recipes/quickstart.toml train.steps=500 --out plan.html

        pennyweight plan ./llama --tokens 10B --on h100x8 --teacher ./llama-70b

        pennyweight plan --claim deepseek-v3

        pennyweight plan --chips
    """
    import pennyweight.report.bill as bill
    from pennyweight.plan.hardware import catalogue as read_catalogue
    from pennyweight.report.language import in_language

    spoken, known, out = in_language(lang), read_catalogue(catalogue), opt.a_page(out)
    _one_thing(sum((claims, chips, claim is not None, model is not None)), model, settings, out)
    if claims or claim is not None:
        found: Any = _claims(known, claim)
        shown = bill.print_claims if claim is None else bill.print_claim
    elif chips:
        found = _chips(known)
        shown = lambda rows, spoken: bill.print_chips(rows, any((r["price"] or {}).get("stale") for r in rows), spoken)  # noqa: E731
    elif _is_recipe(model):
        from pennyweight.report.recipe_plan import print_recipe_plan as shown

        if tokens is not None or teacher is not None or lora:
            raise RecipeError("--tokens, --teacher and --lora are said by the recipe; leave them out, or set a.b=c")
        found = _recipe(known, str(model), settings or [], on, length, precision, price)
        _write(out, found, spoken)
    else:
        found = _outlook(known, str(model), tokens, on or "h100", length, teacher, precision or "bf16", lora, price)
        shown = bill.print_outlook
    typer.echo(readable_json(found)) if as_json else shown(found, spoken)
    if claim is not None and found["adds_up"] is False:
        raise typer.Exit(1)


def _one_thing(things: int, model: str | None, settings: list[str] | None, out: Path | None) -> None:
    """Raise RecipeError where several things are asked for, or none, or what goes with recipes alone."""
    if things != 1:
        raise RecipeError(
            "plan takes one thing at a time: a recipe, a model's folder or config.json, --claim, --claims or --chips; "
            "name one"
        )
    if not _is_recipe(model) and (settings or out is not None):
        what = f"{settings[0]} is" if settings else "--out is"
        raise RecipeError(f"{what} for a plan of a recipe; give its .toml file first, or leave that out")


def _is_recipe(model: str | None) -> bool:
    from pennyweight.plan.named import is_recipe

    return model is not None and is_recipe(model)


def _write(out: Path | None, found: Any, spoken: Any) -> None:
    from pennyweight.atomic import write_whole
    from pennyweight.report.recipe_plan import recipe_plan_page

    if out is not None:
        write_whole(out, spoken.page(recipe_plan_page(found)))


def _claims(known: Any, name: str | None) -> dict[str, Any]:
    from pennyweight.plan.claim import check
    from pennyweight.plan.claim_file import read_claim, shipped
    from pennyweight.plan.published import published

    if name is not None:
        return check(read_claim(name), known, published())
    return {each: check(read_claim(each), known, published()) for each in shipped()}


def _chips(known: Any) -> list[dict[str, Any]]:
    """Each chip with its figures and their sources, and the range of its prices."""
    from dataclasses import asdict

    from pennyweight.plan.hardware import price_range

    out = []
    for chip in known.chips.values():
        prices = known.prices_of(chip) if known.is_priced(chip) else []
        row: dict[str, Any] = {"key": chip.key, "name": chip.name} | {k: f.value for k, f in chip.figures.items()}
        row["sources"] = {k: f"{f.source}, {f.date}" for k, f in chip.figures.items()}
        row["price"] = asdict(price_range(prices, date.today())) if prices else None
        out.append(row | {"prices": [asdict(p) for p in prices]})
    return out


def _outlook(known: Any, model: str, tokens: str | None, on: str, *others: Any) -> dict[str, Any]:
    from pennyweight.plan.assumed import read_or_assume
    from pennyweight.plan.named import a_model
    from pennyweight.plan.outlook import Asked, outlook
    from pennyweight.plan.published import published
    from pennyweight.plan.serving import SERVED_IN, serving

    a_model(model)
    if tokens is None:
        raise RecipeError("--tokens is missing: say how many are trained on, as in --tokens 10B")
    count = _number(tokens)
    if on.strip().lower() == "this":
        from pennyweight.plan.measure import measure

        chip, devices = measure(), 1
    else:
        chip, devices = known.devices(on)
    length, teacher, precision, rank, price = others
    asked = Asked(model, count, chip, devices, length, teacher, precision, rank, price)
    found = outlook(asked, known, published(), date.today())
    served = serving(read_or_assume(model)[0], SERVED_IN, chip, found["length"], _rented(known, chip, price))
    return found | {"serving": served}


def _recipe(
    known: Any,
    file: str,
    settings: list[str],
    on: str | None,
    length: int | None,
    precision: str | None,
    price: float | None,
) -> dict[str, Any]:
    """Every stage of a recipe; of a chain every recipe, and all together."""
    from pennyweight.chain_file import load
    from pennyweight.plan.asked import looked_at
    from pennyweight.plan.assumed import read_or_assume
    from pennyweight.plan.fits import Planned
    from pennyweight.plan.reckon import reckon, together
    from pennyweight.plan.seen import keep_trial, seen_pace, seen_rows
    from pennyweight.plan.serving import serving
    from pennyweight.plan.subjects import made_by, subjects_of
    from pennyweight.plan.work import rows_of
    from pennyweight.recipe import Recipe

    read = load(file, settings)
    place = Path("runs") / read.name
    recipes = {"": read} if isinstance(read, Recipe) else read.recipes(place)
    device = next(iter(recipes.values())).compute.device
    found, made, machine, plans = {}, {}, _machine(known, on, "cpu" if device.startswith("cpu") else None), []
    tried = _tried(read) if machine.measured else {}
    for stage, recipe in recipes.items():
        looked_at(recipe, length, place)
        seen = tried.get(stage, {})
        of = subjects_of(recipe, made, read_or_assume, seen.get("vocabulary"))
        if machine.measured:
            keep_trial(recipe, of, seen, machine.measured)
        pace, rented = seen_pace(machine(recipe, precision), of, seen), _price_of(known, machine.chip, recipe, price)
        rows = rows_of(recipe, length) if length else seen_rows(rows_of(recipe), seen)
        found[stage] = reckon(recipe, of, rows, pace, rented)
        plans.append(Planned(stage, recipe, of, rows))
        made |= made_by(recipe, of, str(place / stage))
    whole = found[""] if "" in found else together(read.name, found)
    last, served = plans[-1], None
    if machine.chip is not None:
        formats, context = last.recipe.quantize.formats, last.recipe.data.context
        served = serving(last.of.student, formats, machine.chip, context, rented)
    return whole | {"fits": _fits(known, machine, plans, precision, pace.autocast), "serving": served}


def _fits(known: Any, machine: Any, plans: list[Any], precision: str | None, autocast: bool) -> dict[str, Any]:
    """Whether all recipes fit where they are to run, what would make them, and where they are cheapest."""
    from pennyweight.plan.fits import fits
    from pennyweight.plan.hardware import price_range
    from pennyweight.plan.pace import SHIPPED
    from pennyweight.plan.precision import plain
    from pennyweight.plan.published import published
    from pennyweight.plan.reckon import pace_on, reckon, together

    def again(some: Any, chip: Any, devices: int) -> Any:
        price, runs = price_range(known.prices_of(chip), date.today()), {}
        for p in some:
            try:
                pace = pace_on(chip, devices, precision, published(), plain(p.recipe.compute.dtype))
            except RecipeError:
                return {}  # it has not that precision
            runs[p.name] = reckon(p.recipe, p.of, p.rows, pace, price)
        return together("", runs)["total"]

    chip = machine.chip or machine.measured or SHIPPED
    return fits(plans, known, chip, machine.devices, autocast, date.today(), again)


def _tried(read: Any) -> dict[str, Any]:
    """What a rehearsal sees of a recipe, or of each of a chain, in a process of its own; models wait in a folder that
    goes away.

    Raises:
        RecipeError: the recipe cannot be run: what its run would say.
    """
    import json
    import subprocess
    import sys
    from tempfile import TemporaryDirectory

    from pennyweight.progress import say
    from pennyweight.recipe import Recipe

    with TemporaryDirectory() as place:
        recipes = {"": read} if isinstance(read, Recipe) else read.recipes(Path(place))
        asked = {"place": place, "recipes": {k: r.model_dump(mode="json") for k, r in recipes.items()}}
        say("plan: some steps of each kind are tried on this machine ...")
        done = subprocess.run(
            [sys.executable, "-m", "pennyweight.rehearsal"], input=json.dumps(asked).encode(), capture_output=True
        )
    if done.returncode:
        last = done.stderr.decode("utf-8", "replace").strip().splitlines()[-1:] or ["it said nothing"]
        raise RecipeError(f"trying the recipe failed: {last[0]}; leave out --on this to plan without trying")
    reply = json.loads(done.stdout)
    if "refused" in reply:
        raise RecipeError(f"the recipe was tried, and stopped: {reply['refused']}")
    return reply["seen"]


class _machine:
    """recipe, precision -> what it runs on; ``chip`` is None where that is this machine. ``device``: that is measured,
    in place of the GPU that is there."""

    def __init__(self, known: Any, on: str | None, device: str | None = None):
        self.chip, self.devices, self.measured = None, 1, None
        if on is None:
            return
        if on.strip().lower() != "this":
            self.chip, self.devices = known.devices(on)
            return
        from dataclasses import replace

        from pennyweight.plan.measure import measure

        self.measured = measure(device)
        if self.measured.name.startswith("this machine"):
            return
        listed = known.called(self.measured.name)  # power and price are not measured
        if listed is None:
            raise RecipeError(
                f"{self.measured.name} is in no catalogue of chips; give a row of it with --catalogue FILE.toml "
                "(pennyweight plan --chips lists those that are known)"
            )
        self.chip = replace(listed, figures={**listed.figures, **self.measured.figures})

    def __call__(self, recipe: Any, precision: str | None) -> Any:
        from pennyweight.plan.pace import has_bfloat16, on_this, usable_threads
        from pennyweight.plan.precision import checked, plain
        from pennyweight.plan.reckon import pace_on

        asked = precision and checked(precision)
        if self.chip is not None:
            from pennyweight.plan.published import published

            return pace_on(self.chip, self.devices, asked, published(), plain(recipe.compute.dtype))
        if asked in ("fp8", "fp4"):
            raise RecipeError(f"--precision {asked} is for chips that multiply it; name one with --on, as in --on h100")
        low = asked or plain(recipe.compute.dtype, has_bfloat16())
        return on_this(self.measured, recipe.compute.threads or usable_threads(), low == "bf16")


def _price_of(known: Any, chip: Any, recipe: Any, price: float | None) -> Any:
    """Of a device and an hour: as given, as the recipe says, or as the catalogue has it."""
    return _rented(known, chip, price if price is not None else recipe.budget.usd_per_hour)


def _rented(known: Any, chip: Any, given: float | None) -> Any:
    from pennyweight.plan.asked import price_as_given
    from pennyweight.plan.hardware import price_range

    if given is not None:
        return price_as_given(given)
    return price_range(known.prices_of(chip), date.today()) if chip is not None and known.is_priced(chip) else None


def _number(said: str) -> float:
    """``15T``, ``300M``, ``1e9``, ``2,000,000``.

    Raises:
        RecipeError: it is no number above 0.
    """
    found = re.fullmatch(r"([0-9.,_]+(?:e[0-9]+)?)\s*([kmbt]?)", said.strip().lower())
    try:
        value = float(re.sub("[,_]", "", found[1])) if found else 0.0
    except ValueError:
        value = 0.0
    if not found or not 0 < value < 1e24:
        raise RecipeError(f"--tokens {said} is no number of tokens; write it as 300M, 15T or 2,000,000")
    return value * {"": 1, "k": 1e3, "m": 1e6, "b": 1e9, "t": 1e12}[found[2]]
