"""The surface by name: commands, their options, recipe fields. A change here is a decision."""

from __future__ import annotations

import subprocess
import sys

import pytest
from pydantic import BaseModel
from typer.main import get_command

import pennyweight
from pennyweight import recipe, settings
from pennyweight.cli import app

COMMANDS = {
    "run": {"arguments", "out", "only", "log", "processes", "as_json"},
    "distill": {
        "teacher", "teacher_model", "data", "student", "cut", "method", "steps", "batch", "lr", "seeds", "settings",
        "trust_remote_code", "out", "log", "processes", "as_json",
    },
    "evaluate": {
        "model", "tasks", "text", "problems", "samples", "max_tokens", "seed", "device", "trust_remote_code", "as_json",
    },
    "compare": {"a", "b", "text", "device", "trust_remote_code", "as_json"},
    "quantize": {
        "model", "out", "fmt", "layout", "group", "method", "budget", "recover", "batch", "micro_batch",
        "targets", "on_policy", "kv_cache", "min_agreement", "data", "samples", "tasks",
        "plan", "seed", "device", "trust_remote_code", "as_json",
    },
    "memory": {"model", "batch", "length", "device", "out", "as_json"},
    "plan": {
        "model", "tokens", "on", "length", "teacher", "precision", "lora", "price", "catalogue", "chips", "claim",
        "claims", "settings", "out", "lang", "as_json",
    },
    "grade": {"file", "verifier", "answer", "gold", "label", "entry", "limit", "show", "out", "as_json"},
    "convert": {"model", "to", "out", "as_json"},
    "chat": {"model", "prompt", "temperature", "max_tokens", "seed", "kv_cache", "device", "trust_remote_code"},
    "report": {"folder", "lang"},
    "show": {"folder", "sample", "as_json"},
    "ledger": set(),
    "targets": set(),
}  # fmt: skip

FIELDS = {
    "Recipe": "name seed seeds compute teacher data targets student method control train tripwires budget quantize "
    "evaluate log",
    "Compute": "device dtype threads",
    "TaskSource": "name size config worked think",
    "TeacherSamples": "kind count max_tokens temperature",
    "FileData": "kind path split prompt response text answer verifier licence limit",
    "TaskData": "kind tasks seed",
    "Responses": "by temperature top_p max_tokens keep samples most language",
    "Data": "source responses context too_long eval_fraction eval_limit train_limit",
    "Shape": "hidden layers heads kv_heads intermediate tie_embeddings",
    "Schedule": "steps batch micro_batch pack lr shape warmup decay floor weight_decay beta1 beta2 clip "
    "precision moments weights lora gradient_checkpointing compile checkpoint_every",
    "Lora": "rank alpha dropout base",
    "RolloutTripwires": "entropy_low entropy_high length_low length_high repeated cut_off stuck reward_low solved "
    "patience hacking held_out_every held_out_problems",
    "Tripwires": "loss_spike entropy_low entropy_high kl_old kl_reference patience rollouts",
    "FolderTeacher": "kind path trust_remote_code licence",
    "TrainedTeacher": "kind tasks shape schedule vocabulary context seed licence",
    "EndpointTeacher": "kind url model api key_env concurrency timeout retries tokenizer usd_sent usd_got licence",
    "Budget": "hours kwh usd usd_per_hour",
    "SeveralTeachers": "kind members route default weights mixture",
    "FolderStudent": "kind path trust_remote_code",
    "ShapeStudent": "kind shape tokenizer",
    "CutStudent": "kind member layers hidden intermediate",
    "SftMethod": "kind",
    "KdMethod": "kind divergence beta alpha temperature cross_entropy hidden",
    "GrpoMethod": "kind group max_tokens reward updates scaled over clip_low clip_high level kl dynamic cut_off",
    "OnPolicyMethod": "kind group max_tokens signal divergence beta alpha temperature first given rewarded reward "
    "updates clip_low clip_high",
    "OfflineMethod": "kind rollouts group max_tokens divergence beta alpha temperature first reward",
    "Reward": "accuracy format language brevity verifier",
    "DenseTargets": "kind",
    "SampledTargets": "kind threshold budget shard precision",
    "TopKTargets": "kind k shard precision",
    "HiddenTargets": "kind shard precision",
    "Quantize": "formats group method recover lr",
    "Evaluate": "problems samples temperature max_tokens text harder shown",
}


def test_commands_and_their_options():
    commands = get_command(app).commands
    assert set(commands) == set(COMMANDS)
    for name, options in COMMANDS.items():
        assert {p.name for p in commands[name].params} - {"help"} == options, name
    assert set(commands["ledger"].commands) == {"verify"}
    assert set(commands["targets"].commands) == {"inspect", "label"}


def test_recipe_fields():
    tables = {
        n: t for n, t in (vars(settings) | vars(recipe)).items()
        if isinstance(t, type) and issubclass(t, BaseModel) and t not in (BaseModel, recipe.Settings)
    }  # fmt: skip
    assert {n: " ".join(t.model_fields) for n, t in tables.items()} == FIELDS


def test_the_version_is_told():
    run = subprocess.run([sys.executable, "-m", "pennyweight.cli", "--version"], capture_output=True, text=True)
    assert run.stdout == f"pennyweight {pennyweight.__version__}\n"


@pytest.mark.parametrize("command", [[], *([c] for c in COMMANDS), ["ledger", "verify"], ["targets", "inspect"]])
def test_help_imports_nothing_heavy_and_shows_examples(command):
    code = (
        "import sys; sys.argv = ['pennyweight', *sys.argv[1:], '--help']\n"
        "from pennyweight.cli import main\n"
        "try: main()\n"
        "finally: print([m for m in ('torch', 'transformers', 'numpy') if m in sys.modules])"
    )
    run = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True)
    assert run.returncode == 0 and run.stdout.rstrip().endswith("[]"), run.stdout[-300:] + run.stderr[-300:]
    if command and command[0] in (
        "run",
        "distill",
        "evaluate",
        "compare",
        "quantize",
        "memory",
        "plan",
        "grade",
        "chat",
    ):
        assert "Example" in run.stdout
