"""Options of the command line that are long, or that several commands take."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from pennyweight.errors import RecipeError
from pennyweight.version import __version__

_FORMATS = "int8, int4, int3, ternary, fp8_block, fp8_row, mxfp8, mxfp4, nvfp4, mixed."


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"pennyweight {__version__}")
        raise typer.Exit


def parted(arguments: list[str] | None) -> tuple[str | None, list[str]]:
    """The file that the words of ``run`` name, if any, and the ``a.b=c`` settings among them.

    Raises:
        RecipeError: there is more than one file.
    """
    files = [w for w in arguments or [] if "=" not in w]
    if len(files) > 1:
        raise RecipeError(f"one recipe at a time, not {len(files)} ({', '.join(files)}); settings are written a.b=c")
    return (files[0] if files else None), [w for w in arguments or [] if "=" in w]


def a_page(out: Path | None, makes: bool = False) -> Path | None:
    """Where a page is to be written; ``makes``: with the folders that it is in.

    Raises:
        RecipeError: that is a folder, or in a folder that is not there.
    """
    if out is not None and out.is_dir():
        raise RecipeError(f"--out {out} is a folder; give the page a name in it, as in --out {out / 'page.html'}")
    if out is not None and not makes and not out.parent.is_dir():
        raise RecipeError(f"--out {out} is in a folder that is not there; make {out.parent} first, or choose another")
    return out


def logged(log: list[str] | None) -> list[str]:
    """The recipe setting behind ``--log``."""
    return [f"log={json.dumps(log)}"] if log else []


Version = Annotated[bool, typer.Option("--version", callback=_version, is_eager=True, help="Say which.")]
Lang = Annotated[str, typer.Option(help="Language: en, or ko for Korean.")]
Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Processes = Annotated[
    int, typer.Option(min=1, help="Processes that train together: one a GPU, or each a share of the cores.")
]
Only = Annotated[list[str] | None, typer.Option(help="Of a chain, run this stage alone; may be repeated.")]
Device = Annotated[str, typer.Option(help="auto (cuda, mps, cpu), or a torch device.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
TeacherModel = Annotated[str | None, typer.Option(help="The server's name of the teacher.")]
Log = Annotated[list[str] | None, typer.Option(help="Also log to tensorboard, wandb or trackio; may be repeated.")]

Format = Annotated[str, typer.Option("--format", help=_FORMATS)]
Layout = Annotated[
    str, typer.Option(help="compressed-tensors, deepseek (fp8_block, fp8_block_pow2) or gguf (int8, int4, bf16).")
]
Group = Annotated[int, typer.Option(min=8, help="Weights that share a scale, in int and ternary.")]
Rounding = Annotated[
    str, typer.Option(help="absmax, nearest, awq (scales channels first), or gptq (later roundings make up).")
]
Budget = Annotated[str | None, typer.Option(help="Most bytes, for --format mixed: 1.2GB, 800MB.")]
Recover = Annotated[int, typer.Option(min=0, help="Steps in which the model teaches its copy what it lost.")]
Targets = Annotated[str, typer.Option(help="live: the model stays beside its copy; kept: it labels beforehand.")]
OnPolicy = Annotated[float, typer.Option(help="Share of the steps on texts that the copy writes; the model is live.")]
ChatCache = Annotated[str | None, typer.Option(help="Keep keys and values in int8 or fp8: half the memory.")]
KvCache = Annotated[str | None, typer.Option(help="Also measure with keys and values kept in int8 or fp8.")]
Batch = Annotated[int, typer.Option(min=1, help="Samples per step.")]
MicroBatch = Annotated[int | None, typer.Option(min=1, help="Samples per forward pass. Default: all.")]
Least = Annotated[float | None, typer.Option(help="Least share of tokens, 0 to 1, to agree on.")]
Samples = Annotated[str | None, typer.Option(help="Samples to calibrate, recover and measure with.")]
AtMost = Annotated[int | None, typer.Option(min=8, help="At most so many. Default: as many as help.")]
Tasks = Annotated[list[str] | None, typer.Option(help="reasoning-gym task, NAME or NAME:setting=value,...")]
Plan = Annotated[bool, typer.Option("--plan", help="Only say what it will cost.")]
