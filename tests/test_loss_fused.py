"""The Triton kernels of the loss: run under Triton's interpreter, on a GPU where there is one, and compiled for one."""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from pennyweight.loss.divergence import DIVERGENCES

HERE = Path(__file__).resolve().parent
POINTERS = {"teacher", "student", "logits", "out", "kd_weight", "ce_weight", "weight", "value", "log_mass", "entropy"}
SIZES = {"V", "teacher_stride", "student_stride", "logits_stride", "out_stride"}

needs_triton = pytest.mark.skipif(
    find_spec("triton") is None, reason="needs Triton, which comes with torch for CUDA, or from pip install triton"
)


def run(*command: str, **environment: str) -> None:
    """In a process of its own: whether kernels are interpreted is settled when Triton is first imported."""
    done = subprocess.run(
        [sys.executable, *command], cwd=HERE.parent, env={**os.environ, **environment}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-5_000:]


on_both = pytest.mark.parametrize("interpret", ["1", "0"], ids=["interpreter", "gpu"])


def run_checks(file: str, interpret: str) -> None:
    """A file of this folder's tests, under Triton's interpreter ("1") or on a GPU ("0")."""
    if interpret == "0" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    quiet = ("-q", "-W", "ignore::RuntimeWarning", "-p", "no:cacheprovider")
    run("-m", "pytest", *quiet, str(HERE / file), TRITON_INTERPRET=interpret)


@needs_triton
@on_both
def test_the_kernels_are_right(interpret):
    run_checks("fused_checks.py", interpret)


def test_without_triton_there_is_only_the_eager_loss_and_products_are_emulated():
    told = "assert not any(fused.available(torch.device(x)) for x in ('cpu', 'cuda')) and not linear.kernels"
    before = "import sys; sys.modules['triton'] = None; import torch"
    run("-c", f"{before}; from pennyweight.loss import fused; from pennyweight.quant import linear; {told}")


@needs_triton
@pytest.mark.parametrize(("kind", "plain"), [*((x, False) for x in (*DIVERGENCES, None)), ("forward_kl", True)])
def test_the_kernels_compile_for_a_gpu_that_is_not_there(kind, plain, tmp_path, monkeypatch):
    """For Hopper, down to machine code, with the compiler that comes with Triton."""
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET is set, so nothing is compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pennyweight.loss import kernels

    fixed = {"CAPPED": not plain, "BLOCK": 128 if plain else 2048}
    kernel = kernels.softmax_kernel
    if kind is not None:
        kernel, fixed = kernels.dense_kernel, {**fixed, "KIND": kind, "WITH_CE": not plain}
    names = kernel.arg_names
    types = {
        x: "*fp32" if x in POINTERS else "i32" if x in SIZES else "constexpr" if x in fixed else "fp32" for x in names
    }
    source = ASTSource(kernel, types, {(names.index(x),): value for x, value in fixed.items()})
    options = {"num_warps": 1 if plain else 8, "enable_fp_fusion": True}
    assert triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["cubin"]
