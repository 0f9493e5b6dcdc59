"""``pennyweight memory``: what a model takes to train and to use, from its config.json alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import pennyweight.cli_options as opt
from pennyweight.records import readable_json


def memory(
    model: Annotated[str, typer.Argument(help="Model folder, or a config.json.")],
    batch: Annotated[int, typer.Option(min=1, help="Rows of a forward pass: train.micro_batch.")] = 1,
    length: Annotated[
        int | None, typer.Option(min=1, help="Tokens in a row. Default: the model's context, 2,048 at most.")
    ] = None,
    device: Annotated[str, typer.Option(help="cuda or cpu: what attention keeps, how many logits at once.")] = "cuda",
    out: Annotated[Path | None, typer.Option(help="Also write a page with pictures: FILE.html.")] = None,
    as_json: opt.Json = False,
) -> None:
    """Bytes of weights, gradients, moments, activations and KV cache, in each precision, before anything is loaded.

    Examples:

        pennyweight memory ./llama

        pennyweight memory ./llama/config.json --batch 8 --length 4096 --out memory.html
    """
    from pennyweight.atomic import write_whole
    from pennyweight.plan.memory import memory as planned
    from pennyweight.report.memory import memory_page, print_memory

    out = opt.a_page(out, makes=True)
    found = planned(model, batch, length, device)
    if out is not None:
        write_whole(out, memory_page(found))
    if as_json:
        typer.echo(readable_json(found))
        return
    print_memory(found)
    if out is not None:
        typer.echo(f"page: {out}")
