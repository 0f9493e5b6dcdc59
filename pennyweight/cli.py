"""The command line: argv -> one stage or view; heavy imports are inside."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

import pennyweight.cli_options as opt
import pennyweight.launch as launch
import pennyweight.processes as processes
from pennyweight.cli_grade import grade
from pennyweight.cli_memory import memory
from pennyweight.cli_output import STOPPED, fail, one_sentence, tell
from pennyweight.cli_plan import plan

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


@app.callback()
def _main(version: opt.Version = False) -> None:
    pass


@app.command()
def run(
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="[RECIPE.toml] [a.b=c ...]", help="A recipe, settings on top of it.")
    ] = None,
    out: Annotated[Path | None, typer.Option(help="RUN folder. Default: runs/NAME.")] = None,
    only: opt.Only = None,
    processes: opt.Processes = 1,
    log: opt.Log = None,
    as_json: opt.Json = False,
) -> None:
    """The whole line: teacher, targets, students, low-bit copies, evaluation, ledger, report.

    Without a recipe, the quickstart. The same command again goes on where it stopped. A file with stages is a chain of
    runs; its settings begin with a stage's name, or with defaults for all.

    Examples:

        pennyweight run

        pennyweight run recipes/quickstart.toml train.steps=500 --out runs/longer

        pennyweight run chain.toml --only zero zero.train.steps=50
    """
    from pennyweight.chain_file import load

    _line(load(*opt.parted(arguments), opt.logged(log)), out, as_json, processes, only)


@app.command()
def distill(
    teacher: Annotated[str, typer.Option(help="Hugging Face folder, hub id, or a server: http://HOST:PORT/v1.")],
    teacher_model: opt.TeacherModel = None,
    data: Annotated[str | None, typer.Option(help="JSONL, CSV, Parquet, text, dataset folder or hub name.")] = None,
    student: Annotated[str | None, typer.Option(help="Folder of a student, of any tokenizer.")] = None,
    cut: Annotated[str | None, typer.Option(help="Cut from the teacher: layers=N[,hidden=N][,intermediate=N].")] = None,
    method: Annotated[str, typer.Option(help="kd, sft, grpo, on_policy or offline.")] = "kd",
    steps: Annotated[int, typer.Option(min=1, help="Optimizer steps of each arm.")] = 300,
    batch: Annotated[int, typer.Option(min=1, help="Samples per step.")] = 16,
    lr: Annotated[float, typer.Option(help="Highest learning rate.")] = 1e-3,
    seeds: Annotated[int, typer.Option(min=1, help="Students per arm; 1 is cheapest, 3 give intervals.")] = 3,
    settings: Annotated[list[str] | None, typer.Option("--set", help="Any recipe setting, a.b=c.")] = None,
    trust_remote_code: opt.Remote = False,
    out: Annotated[Path | None, typer.Option(help="RUN folder. Default: runs/distill-TEACHER.")] = None,
    processes: opt.Processes = 1,
    log: opt.Log = None,
    as_json: opt.Json = False,
) -> None:
    """Distil a teacher into a small student, with no recipe to write.

    Without --data, the teacher's own samples are the data.

    Examples:

        pennyweight distill --teacher ./llama --cut layers=8

        pennyweight distill --teacher ./llama --data pairs.jsonl --student ./tiny-llama --steps 1000 --out runs/mine

        pennyweight distill --teacher http://127.0.0.1:8000/v1 --data prompts.jsonl --student ./tiny-llama --method sft

        pennyweight distill --teacher ./llama --cut layers=8 --set train.lora.rank=16 --set train.pack=true
    """
    from pennyweight.recipe_file import distillation

    asked: dict[str, Any] = {"data": data, "student": student, "cut": cut, "method": method, "steps": steps, "lr": lr}
    asked |= {"batch": batch, "seeds": seeds, "teacher_model": teacher_model, "trust_remote_code": trust_remote_code}
    recipe = distillation(teacher=teacher, settings=[*(settings or []), *opt.logged(log)], **asked)
    _line(recipe, out, as_json, processes)


@app.command()
def evaluate(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    tasks: opt.Tasks = None,
    text: Annotated[str | None, typer.Option(help="Text file: bits per byte and calibration.")] = None,
    problems: Annotated[int, typer.Option(min=1, help="Problems per task.")] = 200,
    samples: Annotated[int, typer.Option(min=0, help="Samples per problem for pass@k; 0 leaves it out.")] = 4,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[int, typer.Option(min=0, help="Of the problems and the samples.")] = 1_000_003,
    device: opt.Device = "auto",
    trust_remote_code: opt.Remote = False,
    as_json: opt.Json = False,
) -> None:
    """Accuracy with intervals on verifiable tasks, bits per byte on text.

    Examples:

        pennyweight evaluate runs/quickstart/student --tasks basic_arithmetic:operators=["+"]

        pennyweight evaluate ./llama --text book.txt --json
    """
    import pennyweight.commands as commands

    asked: dict[str, Any] = {"problems_per_task": problems, "samples": samples, "max_tokens": max_tokens, "seed": seed}
    found = commands.evaluate_model(model, tasks, text, **asked, device=device, trust_remote_code=trust_remote_code)
    tell(found, as_json)


@app.command()
def compare(
    a: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    b: Annotated[str, typer.Argument(help="Another, with the same tokenizer.")],
    text: Annotated[str, typer.Option(help="Text file.")],
    device: opt.Device = "auto",
    trust_remote_code: opt.Remote = False,
    as_json: opt.Json = False,
) -> None:
    """KL both ways, top-1 agreement, and bits per byte of both models.

    Example:

        pennyweight compare runs/quickstart/student runs/quickstart/student-int4 --text held_out.txt
    """
    import pennyweight.commands as commands

    tell(commands.compare(a, b, text, device=device, trust_remote_code=trust_remote_code), as_json)


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Model folder.")],
    out: Annotated[str | None, typer.Option(help="Folder to write.")] = None,
    fmt: opt.Format = "int4",
    layout: opt.Layout = "compressed-tensors",
    group: opt.Group = 32,
    method: opt.Rounding = "gptq",
    budget: opt.Budget = None,
    recover: opt.Recover = 0,
    targets: opt.Targets = "kept",
    on_policy: opt.OnPolicy = 0.0,
    batch: opt.Batch = 16,
    micro_batch: opt.MicroBatch = None,
    kv_cache: opt.KvCache = None,
    min_agreement: opt.Least = None,
    data: opt.Samples = None,
    samples: opt.AtMost = None,
    tasks: opt.Tasks = None,
    plan: opt.Plan = False,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    device: opt.Device = "auto",
    trust_remote_code: opt.Remote = False,
    as_json: opt.Json = False,
) -> None:
    """Write a low-bit copy that transformers and vLLM open, and measure it beside its parent.

    Without --data the model writes the samples itself. The same command again goes on where it stopped.

    Examples:

        pennyweight quantize runs/quickstart/student --recover 100 --out student-int4

        pennyweight quantize ./llama --format mixed --budget 1.2GB --min-agreement 0.95 --out llama-small
    """
    from pennyweight.quantizing import quantize

    asked: dict[str, Any] = {"group": group, "method": method, "budget": budget, "recover": recover}
    asked |= {"batch": batch, "micro_batch": micro_batch, "min_agreement": min_agreement, "data": data, "plan": plan}
    asked |= {"targets": targets, "on_policy": on_policy, "kv_cache": kv_cache}
    asked |= {"layout": layout, "samples": samples, "tasks": tasks, "seed": seed, "device": device}
    tell(quantize(model, fmt, out, **asked, trust_remote_code=trust_remote_code), as_json, "print_quantized")


@app.command()
def convert(
    model: Annotated[str, typer.Argument(metavar="FOLDER", help="Folder of safetensors shards.")],
    to: Annotated[str, typer.Option(help="bf16, fp8 (float32 scales) or fp8_ue8m0 (power-of-two scales).")],
    out: Annotated[str, typer.Option(help="Folder to write.")],
    as_json: opt.Json = False,
) -> None:
    """Released shards from one precision to another, without a GPU, in the memory of one tensor.

    From DeepSeek's fp8 (and fp4 experts, which go to fp8 without loss), or from 16 and 32 bits.

    Example:

        pennyweight convert ./DeepSeek-V3 --to bf16 --out ./DeepSeek-V3-bf16
    """
    from pennyweight.progress import counting
    from pennyweight.quant.convert import convert

    tell(convert(model, to, out, counting), as_json)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="Model folder or hub id.")],
    prompt: Annotated[str | None, typer.Option(help="Ask this once and leave.")] = None,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 is greedy.")] = 0.7,
    max_tokens: Annotated[int, typer.Option(min=1)] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
    kv_cache: opt.ChatCache = None,
    device: opt.Device = "auto",
    trust_remote_code: opt.Remote = False,
) -> None:
    """Talk to a model in the terminal; an empty line or Ctrl-D leaves.

    Example:

        pennyweight chat runs/quickstart/student --prompt "Calculate 12 + 34 + 56."
    """
    import pennyweight.commands as commands

    writing: dict[str, Any] = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed, "kv_cache": kv_cache}
    commands.converse(commands.Chat(model, **writing, device=device, trust_remote_code=trust_remote_code), prompt)


@app.command()
def report(folder: Annotated[str, typer.Argument(metavar="RUN")], lang: opt.Lang = "en") -> None:
    """Draw report.html of a finished run again, and say where it is."""
    import pennyweight.commands as commands

    typer.echo(str(commands.redraw(folder, lang)))


@app.command()
def show(
    folder: Annotated[str, typer.Argument(metavar="RUN")],
    sample: Annotated[int | None, typer.Option(min=0, help="Print one training sample's masked token stream.")] = None,
    as_json: opt.Json = False,
) -> None:
    """What a run found; or the exact tokens of one training sample, learnt ones marked."""
    import pennyweight.commands as commands

    if sample is not None:
        typer.echo(commands.show_sample(folder, sample, as_json))
        return
    tell(commands.show(folder), as_json, "print_summary")


@ledger_app.command("verify")
def ledger_verify(folder: Annotated[str, typer.Argument(metavar="RUN")], as_json: opt.Json = False) -> None:
    """Re-derive every hash of the ledger and of what it names; exit 2 names the first row that was tampered with."""
    from pennyweight.commands import verify
    from pennyweight.errors import LedgerError

    found = verify(folder)
    if as_json:
        tell({k: getattr(found, k) for k in found.__dataclass_fields__}, True)
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
    tokens: Annotated[int, typer.Option(min=64, help="Training tokens to measure on, at most.")] = 4096,
    as_json: opt.Json = False,
) -> None:
    """Bytes a token, mass kept, gradient error and calibration of the run's targets, beside top-k at the same bytes.

    Measured on the run's own training samples; the report of a finished run gets the picture.

    Example:

        pennyweight targets inspect runs/quickstart
    """
    from pennyweight.inspection import inspect_targets

    tell(inspect_targets(folder, tokens), as_json, "print_inspection")


@targets_app.command("label")
def targets_label(folder: Annotated[str, typer.Argument(metavar="RUN")], as_json: opt.Json = False) -> None:
    """Help a run to label: take shards that nobody is at. As many processes as you like may do so at once.

    Example, in a second terminal, or on another such machine: pennyweight targets label runs/quickstart
    """
    from pennyweight.inspection import help_to_label

    tell(help_to_label(folder), as_json)


app.command()(memory)
app.command()(plan)
app.command()(grade)


def _line(plan: Any, out: Path | None, as_json: bool, count: int, only: list[str] | None = None) -> None:
    if count > 1 and processes.size() == 1:
        sys.exit(launch.start(count, sys.argv[1:]))
    from pennyweight.chain import go
    from pennyweight.stages import run_line

    folder = out or Path("runs") / plan.name
    found = go(plan, folder, run_line, only or ())
    if processes.rank() > 0:
        return
    tell(found, as_json, "print_summary")
    if not as_json:
        typer.echo(f"report: {folder / 'report.html'}")


def main() -> None:
    """Entry point: runs the command, prints what went wrong in one sentence, and exits with its code."""
    if launch.settled():
        return
    with one_sentence():
        launch.meet()
        code = app(standalone_mode=False)
        if code == 130:  # typer's own answer to Ctrl-C
            fail(STOPPED, 130)
        if processes.rank() == 0:
            launch.settle(code or 0)
    sys.exit(code or 0)


if __name__ == "__main__":
    main()
