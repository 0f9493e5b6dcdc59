"""``pennyweight plan``: what a training will take, and whether what others say of theirs can be."""

from __future__ import annotations

import re
from datetime import date
from typing import Annotated, Any

import typer

import pennyweight.cli_options as opt
from pennyweight.errors import RecipeError
from pennyweight.records import readable_json


def plan(
    model: Annotated[str | None, typer.Argument(help="Model folder, or a config.json.")] = None,
    tokens: Annotated[str | None, typer.Option(help="Tokens to train on: 300M, 15T.")] = None,
    on: Annotated[str, typer.Option(help="Chips and how many, h100x8; or this: measure this machine.")] = "h100",
    length: Annotated[int | None, typer.Option(min=1, help="Tokens in a row. Default: 4,096, or all it takes.")] = None,
    teacher: Annotated[str | None, typer.Option(help="Its folder or config.json: it labels all tokens first.")] = None,
    precision: Annotated[str, typer.Option(help="fp32, bf16, fp8 or fp4: what Linears multiply in.")] = "bf16",
    lora: Annotated[int, typer.Option(min=0, help="Rank of LoRA's factors; 0 trains all weights.")] = 0,
    price: Annotated[float | None, typer.Option(help="USD for a device and an hour, in place of known prices.")] = None,
    catalogue: Annotated[str | None, typer.Option(help="Chips and prices of your own: FILE.toml.")] = None,
    chips: Annotated[bool, typer.Option("--chips", help="List chips and prices that are known.")] = False,
    claim: Annotated[
        str | None, typer.Option(help="Check what is claimed of a training: FILE.toml, or a name.")
    ] = None,
    claims: Annotated[bool, typer.Option("--claims", help="List the claims that come with Pennyweight.")] = False,
    as_json: opt.Json = False,
) -> None:
    """FLOPs, hours, energy and money before anything runs, as ranges; or a published claim, checked.

    From config.json alone: no weights are needed. A claim that does not add up ends with code 1.

    Examples:

        pennyweight plan ./llama --tokens 10B --on h100x8 --teacher ./llama-70b

        pennyweight plan --claim deepseek-v3

        pennyweight plan --chips
    """
    import pennyweight.report.bill as bill
    from pennyweight.plan.hardware import catalogue as read_catalogue

    known = read_catalogue(catalogue)
    if sum((claims, chips, claim is not None, model is not None)) != 1:
        raise RecipeError(
            "plan takes one thing at a time: a model's folder or config.json, --claim, --claims or --chips; name one"
        )
    if claims or claim is not None:
        found: Any = _claims(known, claim)
        shown = bill.print_claims if claim is None else bill.print_claim
    elif chips:
        found = _chips(known)
        shown = lambda rows: bill.print_chips(rows, any((r["price"] or {}).get("stale") for r in rows))  # noqa: E731
    else:
        found = _outlook(known, str(model), tokens, on, length, teacher, precision, lora, price)
        shown = bill.print_outlook
    if as_json:
        typer.echo(readable_json(found))
    else:
        shown(found)
    if claim is not None and not found["adds_up"]:
        raise typer.Exit(1)


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
    from pennyweight.plan.outlook import Asked, outlook
    from pennyweight.plan.published import published

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
    return outlook(asked, known, published(), date.today())


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
