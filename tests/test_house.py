"""The house rules, checked over the source: floors, circles, lengths, and what must not import torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "pennyweight"
FILES = sorted(PACKAGE.rglob("*.py"))
FLOORS = 6
FILE_LINES, FUNCTION_LINES = 350, 60


def module_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(p): p for p in FILES}


@cache
def imports_of(module: str) -> frozenset[str]:
    """Every module of ours that ``module`` imports, wherever in the file: at the top, in functions, for types."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import; write it out"
            found |= {node.module or ""} | {f"{node.module}.{a.name}" for a in node.names}
    return frozenset(m for m in found if m in MODULES and m != module)


@cache
def floor_of(module: str, above: tuple[str, ...] = ()) -> int:
    assert module not in above, f"circle: {' -> '.join((*above, module))}"
    return 1 + max((floor_of(m, (*above, module)) for m in imports_of(module)), default=0)


def face(module: str) -> bool:
    """The package's own __init__ is its face: it names what is below for users, and nobody below imports it."""
    return module == "pennyweight"


@pytest.mark.parametrize("module", [m for m in MODULES if not face(m)])
def test_no_circle_and_at_most_six_floors(module):
    assert floor_of(module) <= FLOORS
    assert "pennyweight" not in imports_of(module), "import the module that holds the name, not the package"


def test_stages_know_everybody_and_only_the_two_doors_know_them():
    for module in MODULES:
        if module not in ("pennyweight", "pennyweight.api", "pennyweight.cli"):
            assert "pennyweight.stages" not in imports_of(module)
    assert len(imports_of("pennyweight.stages")) >= 20


def test_the_loop_knows_no_method_teacher_or_ledger():
    rooms = {m.split(".")[1] for m in imports_of("pennyweight.train.loop")}
    assert not rooms & {"methods", "teacher", "ledger", "verifiers", "quant", "report"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_lengths(path):
    text = path.read_text()
    assert len(text.splitlines()) <= FILE_LINES
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= FUNCTION_LINES, f"{node.name} is too long"


def test_no_room_for_odds_and_ends():
    assert not {p.stem for p in FILES} & {"utils", "util", "common", "misc", "helpers"}


def test_every_public_function_and_class_says_what_it_is():
    for path in FILES:
        for node in ast.parse(path.read_text()).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
                assert ast.get_docstring(node), f"{path.name}: {node.name} has no docstring"


@pytest.mark.parametrize(
    "module",
    [
        "recipe",
        "settings",
        "plan.memory",
        "plan.claim",
        "plan.outlook",
        "plan.published",
        "plan.reckon",
        "plan.fits",
        "plan.serving",
        "plan.named",
        "plan.subjects",
        "ledger.store",
        "ledger.environment",
        "report.page",
        "report.summary",
        "report.memory",
        "report.bill",
        "report.recipe_plan",
        "meter.meter",
        "cli",
    ],
)
def test_imports_no_torch(module):
    code = f"import sys, pennyweight.{module}; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=PACKAGE.parent).returncode == 0


def test_nothing_is_unpickled():
    for path in FILES:
        text = path.read_text()
        assert "torch.load(" not in text and "import pickle" not in text, path


@pytest.mark.parametrize("module", ["pennyweight.data.sources", "pennyweight.verifiers.own", "pennyweight.grading"])
def test_a_module_can_be_the_first_to_be_imported(module):
    """Importing one runs the __init__ of its package, which must not need the module that asks."""
    run = subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
