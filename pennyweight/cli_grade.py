"""``pennyweight grade``: a file of answers, judged."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

import pennyweight.cli_options as opt
from pennyweight.records import readable_json


def grade(
    file: Annotated[str, typer.Argument(metavar="FILE.jsonl", help="One answer a line; CSV and Parquet as well.")],
    verifier: Annotated[
        str, typer.Option(help="math, exact, choice, regex, code, reasoning_gym, or FILE.py:FUNCTION.")
    ],
    answer: Annotated[str, typer.Option(help="Field with the answer to judge; a.b reaches into a record.")],
    gold: Annotated[str | None, typer.Option(help="Field with the gold answer, or a solution that ends in it.")] = None,
    label: Annotated[str | None, typer.Option(help="Field that says true or false: does the verifier agree?")] = None,
    entry: Annotated[
        list[str] | None, typer.Option(help="FIELD (or NAME=FIELD, repeated) with choices or tests.")
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="The first so many lines only.")] = None,
    show: Annotated[int, typer.Option(min=0, help="Most wrong answers and disagreements to list.")] = 20,
    out: Annotated[Path | None, typer.Option(help="Also write the rows with their verdicts: GRADED.jsonl.")] = None,
    as_json: opt.Json = False,
) -> None:
    """How many answers are right, with intervals, why the others are not, and whether labels agree.

    Examples:

        pennyweight grade answers.jsonl --verifier math --answer response --gold answer

        pennyweight grade solutions.jsonl --verifier math --answer a.solution --gold truth --label a.is_correct

        pennyweight grade programs.jsonl --verifier code --answer response --entry tests=test --entry entry_point=name
    """
    import pennyweight.grading as grading
    from pennyweight.progress import counting
    from pennyweight.report.graded import print_graded
    from pennyweight.verifiers import VERIFIERS, judge

    fields = grading.Fields(answer, gold, label, tuple(entry or ()))
    found = grading.first(grading.grade(file, verifier, fields, judge, VERIFIERS, counting, limit, out), show)
    if as_json:
        typer.echo(readable_json(found))
        return
    print_graded(found)
    if out is not None:
        typer.echo(f"graded: {out}")
