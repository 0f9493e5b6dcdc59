"""The command line: argv -> one stage or view. The only place that prints an error; heavy imports are inside."""

from __future__ import annotations

import json
import signal
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pennyweight.errors import PennyweightError, RecipeError, in_one_sentence
from pennyweight.records import json_safe
from pennyweight.version import __version__

app = typer.Typer(
    name="pennyweight",
    help="From a large language model to a small, low-bit one, with the proof beside it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
ledger_app = typer.Typer(no_args_is_help=True, help="Look after a run's ledger.")
app.add_typer(ledger_app, name="ledger")
targets_app = typer.Typer(no_args_is_help=True, help="What is kept of a teacher.")
app.add_typer(targets_app, name="targets")

_STOPPED = "stopped; run and distill go on from here with the same command"

Json = Annotated[bool, typer.Option("--json", help="Print JSON on standard output.")]
Device = Annotated[str, typer.Option(help="auto (cuda, mps, cpu), or a torch device.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run code that comes with the model.")]
Log = Annotated[list[str] | None, typer.Option(help="Also log to tensorboard, wandb or trackio; may be repeated.")]


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"pennyweight {__version__}")
        raise typer.Exit


@app.callback()
def _main(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version.")
    ] = False,
) -> None:
    pass


@app.command()
def run(
    arguments: Annotated[
        list[str] | None,
        typer.Argument(metavar="[RECIPE.toml] [a.b=c ...]", help="A recipe and settings on top of it."),
    ] = None,
    out: Annotated[Path | None, typer.Option(help="RUN folder. Default: runs/NAME.")] = None,
    log: Log = None,
    as_json: Json = False,
) -> None:
    """The whole line: teacher, targets, students, low-bit copies, evaluation, ledger, report.

    Without a recipe, the quickstart. The same command again goes on where it stopped.

    Examples:

        pennyweight run

        pennyweight run recipes/quickstart.toml train.steps=500 --out runs/longer
    """
    from pennyweight.recipe_file import load

    words = arguments or []
    files = [w for w in words if "=" not in w]
    if len(files) > 1:
        raise RecipeError(f"one recipe at a time, not {len(files)} ({', '.join(files)}); settings are written a.b=c")
    settings = [w for w in words if "=" in w] + _logged(log)
    recipe = load(files[0] if files else None, settings)
    _line(recipe, out, as_json)


@app.command()
def distill(
    teacher: Annotated[str, typer.Option(help="Hugging Face folder or hub id.")],
    data: Annotated[str | None, typer.Option(help="JSONL, CSV, Parquet, text, dataset folder or hub name.")] = None,
    student: Annotated[str | None, typer.Option(help="Folder of a student with the teacher's tokenizer.")] = None,
    cut: Annotated[str | None, typer.Option(help="Cut from the teacher: layers=N[,hidden=N][,intermediate=N].")] = None,
    method: Annotated[str, typer.Option(help="kd or sft.")] = "kd",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each arm.")] = 300,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 16,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    seeds: Annotated[int, typer.Option(min=1, help="Students per arm; 1 is cheapest, 3 give intervals.")] = 3,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any recipe setting, a.b=c.")] = None,
    trust_remote_code: Remote = False,
    out: Annotated[Path | None, typer.Option(help="RUN folder. Default: runs/distill-TEACHER.")] = None,
    log: Log = None,
    as_json: Json = False,
) -> None:
    """Distil a teacher into a small student, with no recipe to write.

    Without --data, the teacher's own samples are the data.

    Examples:

        pennyweight distill --teacher ./llama --cut layers=8

        pennyweight distill --teacher ./llama --data pairs.jsonl --student ./tiny-llama --steps 1000 --out runs/mine
    """
    from pennyweight.recipe_file import distillation

    asked: dict[str, Any] = {"data": data, "student": student, "cut": cut, "trust_remote_code": trust_remote_code}
    asked |= {"method": method, "steps": steps, "batch": batch, "lr": lr, "seeds": seeds}
    recipe = distillation(teacher=teacher, settings=[*(settings or []), *_logged(log)], **asked)
    _line(recipe, out, as_json)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    tasks: Annotated[list[str] | None, typer.Option(help="reasoning-gym task, NAME or NAME:setting=value,...")] = None,
    text: Annotated[str | None, typer.Option(help="Text file: bits per byte and calibration.")] = None,
    problems: Annotated[int, typer.Option(min=1, help="Problems per task.")] = 200,
    samples: Annotated[int, typer.Option(min=0, help="Samples per problem for pass@k; 0 leaves it out.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the problems and the samples.")] = 1_000_003,
    device: Device = "auto",
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Accuracy with intervals on verifiable tasks, bits per byte on text.

    Examples:

        pennyweight evaluate runs/quickstart/student --tasks basic_arithmetic:operators=["+"]

        pennyweight evaluate ./llama --text book.txt --json
    """
    import pennyweight.commands as commands

    asked: dict[str, Any] = {"problems_per_task": problems, "samples": samples, "max_tokens": max_tokens, "seed": seed}
    found = commands.evaluate_model(model, tasks, text, **asked, device=device, trust_remote_code=trust_remote_code)
    _tell(found, as_json)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    b: Annotated[str, typer.Argument(help="Another, with the same tokenizer.")],
    text: Annotated[str, typer.Option(help="Text file.")],
    device: Device = "auto",
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """KL both ways, top-1 agreement, and bits per byte of both models.

    Example:

        pennyweight compare runs/quickstart/student runs/quickstart/student-int4 --text held_out.txt
    """
    import pennyweight.commands as commands

    _tell(commands.compare(a, b, text, device=device, trust_remote_code=trust_remote_code), as_json)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Model folder.")],
    out: Annotated[str, typer.Option(help="Folder to write.")],
    fmt: Annotated[str, typer.Option("--format", help="int8 or int4.")] = "int4",
    group: Annotated[int, typer.Option(min=8, help="Weights that share a scale.")] = 32,
    trust_remote_code: Remote = False,
    as_json: Json = False,
) -> None:
    """Write a low-bit copy that transformers and vLLM open.

    Example:

        pennyweight quantize runs/quickstart/student --format int4 --out student-int4
    """
    import pennyweight.commands as commands

    _tell(commands.quantize(model, fmt, out, group=group, trust_remote_code=trust_remote_code), as_json)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    prompt: Annotated[str | None, typer.Option(help="Ask this once and leave.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: Device = "auto",
    trust_remote_code: Remote = False,
) -> None:
    """Talk to a model in the terminal; an empty line or Ctrl-D leaves.

    Example:

        pennyweight chat runs/quickstart/student --prompt "Calculate 12 + 34 + 56."
    """
    import pennyweight.commands as commands

    writing: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    talk = commands.Chat(model, **writing, device=device, trust_remote_code=trust_remote_code)
    commands.converse(talk, prompt)


@app.command()
def report(folder: Annotated[str, typer.Argument(metavar="RUN")]) -> None:
    """Draw report.html of a finished run again, and say where it is."""
    import pennyweight.commands as commands

    typer.echo(str(commands.redraw(folder)))


@app.command()
def show(
    folder: Annotated[str, typer.Argument(metavar="RUN")],
    sample: Annotated[int | None, typer.Option(min=0, help="Print one training sample's masked token stream.")] = None,
    as_json: Json = False,
) -> None:
    """What a run found; or the exact tokens of one training sample, learnt ones marked."""
    import pennyweight.commands as commands

    if sample is not None:
        typer.echo(commands.show_sample(folder, sample, as_json))
        return
    _tell(commands.show(folder), as_json, "print_summary")


@ledger_app.command("verify")
def ledger_verify(folder: Annotated[str, typer.Argument(metavar="RUN")], as_json: Json = False) -> None:
    """Re-derive every hash of the ledger and of what it names; exit 2 names the first row that was tampered with."""
    import pennyweight.commands as commands
    from pennyweight.errors import LedgerError

    found = commands.verify(folder)
    if as_json:
        _tell({k: getattr(found, k) for k in found.__dataclass_fields__}, True)
    if not found.ok:
        raise LedgerError(f"the ledger of {folder} does not verify: {found.problem}")
    if not as_json:
        typer.echo(
            f"verified: {found.checked_entries:,} entries, {found.checked_records:,} records, "
            f"{found.checked_artifacts:,} artifacts"
        )


@targets_app.command("inspect")
def targets_inspect(
    folder: Annotated[str, typer.Argument(metavar="RUN")],
    tokens: Annotated[
        int, typer.Option(min=64, help="Training tokens to measure on; fewer where logits take over 1 GiB.")
    ] = 4096,
    as_json: Json = False,
) -> None:
    """Bytes a token, mass kept, gradient error and calibration of the run's targets, beside top-k at the same bytes.

    Measured on the run's own training samples; the report of a finished run gets the picture.

    Example:

        pennyweight targets inspect runs/quickstart
    """
    from pennyweight.inspection import inspect_targets

    _tell(inspect_targets(folder, tokens), as_json, "print_inspection")


@targets_app.command("label")
def targets_label(folder: Annotated[str, typer.Argument(metavar="RUN")], as_json: Json = False) -> None:
    """Help a run to label: take shards that nobody is at. As many processes as you like may do so at once.

    Example, in a second terminal, or on another machine of the same kind that sees the folder:

        pennyweight targets label runs/quickstart
    """
    from pennyweight.inspection import help_to_label

    _tell(help_to_label(folder), as_json)


def _logged(log: list[str] | None) -> list[str]:
    """The recipe setting behind ``--log``."""
    return [f"log={json.dumps(log)}"] if log else []


def _line(recipe: Any, out: Path | None, as_json: bool) -> None:
    from pennyweight.stages import run_line

    folder = out or Path("runs") / recipe.name
    _tell(run_line(recipe, folder), as_json, "print_summary")
    if not as_json:
        typer.echo(f"report: {folder / 'report.html'}")


def _tell(found: dict[str, Any], as_json: bool, shown_by: str = "print_values") -> None:
    """JSON, or as a function of ``report.terminal`` shows it: one line per value, unless another is named."""
    if as_json:
        typer.echo(json.dumps(json_safe(found), indent=2, ensure_ascii=False, allow_nan=False))
        return
    import pennyweight.report.terminal as terminal

    getattr(terminal, shown_by)(found)


def main() -> None:
    """Entry point: runs the command, prints what went wrong in one sentence, and exits with its code."""
    try:
        code = app(standalone_mode=False)
    except PennyweightError as e:
        _fail(str(e), e.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        _fail(_STOPPED, 130)
    except BrokenPipeError:
        sys.exit(0)
    except Exception as e:
        said = in_one_sentence(e)
        if said is None:
            raise
        _fail(said, 2)
    else:
        if code == 130:  # typer's own answer to Ctrl-C
            _fail(_STOPPED, 130)
        sys.exit(code or 0)


def _fail(message: str, code: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a second Ctrl-C would only tear up what is being said
    typer.echo(f"pennyweight: {message}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
