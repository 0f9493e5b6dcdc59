"""What `import pennyweight` gives, by name, and what it costs. A change here is a decision."""

from __future__ import annotations

import subprocess
import sys

import pennyweight

FACE = [
    *("Chat", "PennyweightError", "__version__", "compare", "distill", "evaluate_model"),
    *("quantize", "run", "show", "verify"),
]


def test_exported_names_are_there():
    assert pennyweight.__all__ == FACE
    for name in FACE:
        assert getattr(pennyweight, name) is not None
    assert not hasattr(pennyweight, "nonsense")


def test_importing_the_package_is_light():
    code = "import sys, pennyweight; sys.exit(any(m in sys.modules for m in ('torch', 'pydantic', 'rich', 'numpy')))"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
