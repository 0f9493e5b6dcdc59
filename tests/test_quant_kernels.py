"""The Triton kernels of fp8 tiles: run under Triton's interpreter, on a GPU where one is, and compiled for several."""

from __future__ import annotations

import os
import random

import pytest
from test_loss_fused import needs_triton, on_both, run_checks

SHARED = {"SIDE": 128, "BY_HAND": False}
FLAGS = {
    "tiles_kernel": [
        {"COLUMNS": "none", "POW2": True, "PART": 64},
        {"COLUMNS": "of numbers", "POW2": False, "PART": 32},
        {"COLUMNS": "of codes", "POW2": True, "PART": 32},
    ],
    "blocks_kernel": [{"TURNED": False, "POW2": True}, {"TURNED": True, "POW2": False}],
    "product_kernel": [{"BLOCKS": True}, {"BLOCKS": False}],
}
POINTERS = {
    "x": "bf16", "w": "fp32", "codes": "u8", "scale": "fp32", "turned": "u8", "turned_scale": "fp32",
    "a": "u8", "b": "u8", "a_scale": "fp32", "b_scale": "fp32", "out": "bf16",
}  # fmt: skip


@needs_triton
@on_both
def test_the_kernels_are_right(interpret):
    run_checks("tile_checks.py", interpret)


@needs_triton
@pytest.mark.parametrize("chip", [89, 90, 100, 120])
@pytest.mark.parametrize("name", FLAGS)
def test_the_kernels_compile_for_a_gpu_that_is_not_there(name, chip, tmp_path, monkeypatch):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET is set, so nothing is compiled")
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from pennyweight.quant import kernels

    kernel = getattr(kernels, name)
    chosen = FLAGS[name] if chip == 90 else [random.choice(FLAGS[name])]  # each in time, on every chip
    for flags in chosen:
        names = kernel.arg_names
        types = {n: "constexpr" if n in flags or n in SHARED else "i32" for n in names}
        types |= {n: "*" + POINTERS[n] for n in names if n in POINTERS}
        fixed = {(names.index(n),): value for n, value in {**flags, **SHARED}.items()}
        options = {"num_warps": 8, "enable_fp_fusion": True}
        made = triton.compile(ASTSource(kernel, types, fixed), target=GPUTarget("cuda", chip, 32), options=options)
        assert made.asm["cubin"], flags
