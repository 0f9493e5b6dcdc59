"""What is asked of a low-bit copy, and what is wrong with that."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pennyweight.errors import DataError, RecipeError, RunError
from pennyweight.quant.export import LAYOUTS
from pennyweight.quant.gguf_file import IN_GGUF
from pennyweight.quant.kv_cache import KV_FORMATS
from pennyweight.quant.packing import IN_DEEPSEEKS, WRITTEN
from pennyweight.quant.rounding import METHODS, Recovery

MIXED = "mixed"
"""The format that is chosen for each Linear, under a byte budget."""

TARGETS = ("kept", "live")


@dataclass(frozen=True)
class Asked:
    """How a copy is made, in full: one in progress is gone on with only for the same.

    Attributes:
        fmt: a row of ``WRITTEN``, or ``mixed`` with a ``budget``: ``planning.IN_A_MIXTURE`` or 16 bits, for each.
        layout: ``compressed-tensors``; ``deepseek`` for fp8_block and fp8_block_pow2; ``gguf`` for int8, int4, bf16.
        group: weights that share a scale, in int and ternary.
        method: ``absmax``, ``nearest``, ``awq`` or ``gptq``.
        budget: most bytes of the weight file.
        recover: steps in which the model teaches its copy.
        lr: learning rate of these; None: in proportion to the step of the codes.
        targets: ``live``: the parent stays in memory beside its copy; ``kept``: it labels the samples beforehand.
        on_policy: share of these steps whose texts the copy writes itself; the parent is then ``live``.
        batch, micro_batch: samples a step, and in one forward pass (None: all).
        kv_cache: ``int8`` or ``fp8``: also measured with its keys and values kept in that; None: as they are.
        data: a file of samples to calibrate, recover and measure with; None: the model writes its own.
        samples: how many of them, at most; None: as many as are of use.
        problems, max_tokens: problems of each task, and tokens of an answer.
    """

    fmt: str = "int4"
    layout: str = LAYOUTS[0]
    group: int = 32
    method: str = "gptq"
    budget: int | None = None
    recover: int = 0
    lr: float | None = None
    targets: str = "kept"
    on_policy: float = 0.0
    batch: int = 16
    micro_batch: int | None = None
    kv_cache: str | None = None
    data: str | None = None
    samples: int | None = None
    problems: int = 200
    max_tokens: int = 256
    seed: int = 0

    @property
    def recovery(self) -> Recovery | None:
        """How the copy is taught, if it is."""
        if not self.recover:
            return None
        live = self.targets == "live" or self.on_policy > 0
        return Recovery(self.recover, self.batch, self.micro_batch, self.lr, self.seed, live, self.on_policy)

    def check(self, model: str, out: str | None, min_agreement: float | None, plan: bool) -> None:
        """Raise what is wrong before a model is opened."""
        if self.layout not in LAYOUTS:
            raise RecipeError(f"no layout is named {self.layout!r}; use {' or '.join(LAYOUTS)}")
        known = {"deepseek": IN_DEEPSEEKS, "gguf": IN_GGUF}.get(self.layout, (*WRITTEN, MIXED))
        if self.fmt not in known:
            raise RecipeError(f"no format in {self.layout} is named {self.fmt!r}; use {', '.join(known)}")
        for what, value, among in (("method", self.method, METHODS), ("kind of targets", self.targets, TARGETS)):
            if value not in among:
                raise RecipeError(f"no {what} is named {value!r}; use {' or '.join(among)}")
        if (self.fmt == MIXED) != (self.budget is not None):
            raise RecipeError(
                "a mixture of formats is chosen under a budget: give both --format mixed and --budget 1.2GB"
            )
        if self.kv_cache is not None and self.kv_cache not in KV_FORMATS:
            raise RecipeError(f"no format of a KV cache is named {self.kv_cache!r}; use {' or '.join(KV_FORMATS)}")
        if not self.recover and (self.on_policy or self.targets != TARGETS[0]):
            raise RecipeError("--targets and --on-policy say how a copy is taught; give --recover STEPS, too")
        for name, share in (("--min-agreement", min_agreement), ("--on-policy", self.on_policy)):
            if share is not None and not 0 <= share <= 1:
                raise RecipeError(f"{name}={share:g} is no share; give a number from 0 to 1")
        if out is None and not plan:
            raise RecipeError("it is not said where to; give --out FOLDER, or --plan to be told only what it will cost")
        if not Path(model).is_dir():
            raise DataError(f"{model} is not a folder; quantize reads a Hugging Face model folder")
        if out is not None and Path(out).exists() and not plan:
            raise RunError(f"{out} is there already; choose another --out, or remove it")
