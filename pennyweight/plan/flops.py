"""FLOPs of a model, from its shapes alone: arithmetic, no weights, no torch.

A multiply-add is two FLOPs, as torch.utils.flop_counter has it. Counted are matrix products: the Linears of a block,
its router, the experts that a token goes to, the output head, and in attention the scores and the sums of values.
Norms, activations, softmax, rotary positions and the embedding's look-up are not: no published figure has them, and
they are bound by memory. ``tests/test_plan_flops.py`` holds every count to that of torch, exactly.

Attention is where published figures part ways, so a convention is always named:

    none    no attention at all: 6 N D, N being the parameters that a token is multiplied with
    half    each query has half of the row's keys, window or none: "causal" of Megatron-Bridge and of DeepSeek-V3
    full    each query has all of them, as if it saw what comes later: PaLM (arXiv 2204.02311), torchtitan, nanoGPT
    exact   the keys that there are, (T + 1) / 2 on average of T tokens, and no more than a sliding window has

``half`` and ``exact`` differ by 1 / T where there is no window. Training costs three forward passes: the gradient of an
input and that of a weight are a product each. What is frozen has no gradient of its weight, and nothing before the
first thing that is trained has one of its input.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from pennyweight.errors import RecipeError
from pennyweight.plan.shapes import Block, Shapes

CONVENTIONS = ("none", "half", "full", "exact")
"""How attention's keys are counted."""


@dataclass(frozen=True, slots=True)
class Flops:
    """FLOPs of a token, or of all tokens, by where they fall: ``blocks`` are products with weights of decoder blocks,
    ``predictions`` all of multi-token prediction (its blocks, attention and head)."""

    blocks: float
    head: float
    attention: float
    predictions: float = 0.0

    @property
    def total(self) -> float:
        return self.blocks + self.head + self.attention + self.predictions

    def times(self, n: float) -> Flops:
        """The same for ``n`` tokens, or ``n`` passes."""
        return Flops(n * self.blocks, n * self.head, n * self.attention, n * self.predictions)


@dataclass(frozen=True, slots=True)
class Training:
    """What is trained and kept.

    Attributes:
        rank: of LoRA's factors beside every Linear of the blocks, whose own weights are frozen; 0: all weights train.
        recompute: blocks keep their input only and are computed again in the backward pass, but for their last product,
            which nothing needs (``train.gradient_checkpointing``).
        mtp: modules of multi-token prediction that train along.
        learnt: share of tokens whose logits are made.
    """

    rank: int = 0
    recompute: bool = False
    mtp: int = 0
    learnt: float = 1.0


def multiplied(shapes: Shapes, mtp: int = 0) -> int:
    """Parameters that a token is multiplied with: N of 6 N D. The head is among them, the embedding is not, and of a
    mixture's experts those that a token goes to; with ``mtp`` modules of multi-token prediction."""
    blocks = sum(_weights(shapes, block) for block in shapes.blocks)
    head = shapes.vocabulary * shapes.hidden
    each = 2 * shapes.hidden**2 + _weights(shapes, shapes.blocks[-1]) + head
    return blocks + head + mtp * each


def gating(shapes: Shapes, mtp: int = 0) -> int:
    """Those of ``multiplied`` that are routers and gates of experts: Megatron-Bridge leaves them out of its figures."""
    of = [sum(t.count for t in b.tensors if t.kind == "router") for b in shapes.blocks]
    return sum(of) + mtp * of[-1]


def forward(shapes: Shapes, length: int, attention: str = "exact", mtp: int = 0, learnt: float = 1.0) -> Flops:
    """Of a token, on average over a row of ``length``, through the whole model with logits of ``learnt`` of them.

    A module of multi-token prediction is a matrix from two hidden states to one, a block as the last one is, and the
    head again (DeepSeek-V3, arXiv 2412.19437, section 2.2).

    Raises:
        RecipeError: there is no such convention.
    """
    if attention not in CONVENTIONS:
        raise RecipeError(f"attention is counted by {', '.join(CONVENTIONS)}, not by {attention!r}; name one of them")
    head = 2.0 * shapes.vocabulary * shapes.hidden
    last = shapes.blocks[-1]
    predicted = 2.0 * (2 * shapes.hidden**2 + _weights(shapes, last)) + learnt * head
    predicted += _scores(last) * _keys(last, length, attention)
    return Flops(
        blocks=2.0 * sum(_weights(shapes, block) for block in shapes.blocks),
        head=learnt * head,
        attention=sum(_scores(block) * _keys(block, length, attention) for block in shapes.blocks),
        predictions=mtp * predicted,
    )


def prefill(shapes: Shapes, length: int, logits: int = 1) -> Flops:
    """Of a whole prompt of ``length`` tokens: logits of ``logits`` of them (the last, to go on from; all, to label)."""
    return forward(shapes, length, learnt=logits / length).times(length)


def decode(shapes: Shapes, context: int, absorbed: bool = True) -> Flops:
    """Of one more token that sees ``context`` keys, its own among them.

    Args:
        absorbed: multi-head latent attention scores the latents themselves, as serving engines do: the products with
            the matrix that would expand a token's latent are as many, with query and output instead, and a key is as
            wide as latent and rotary part, a value as the latent. Else the latents of the whole context are expanded
            again, as transformers does. Other attention is not affected.
    """
    once = forward(shapes, 1, "none")
    attention = sum(_scores(b, absorbed) * min(context, b.attention.window or context) for b in shapes.blocks)
    again = 0 if absorbed else (context - 1) * sum(_expansion(b) for b in shapes.blocks)
    return Flops(once.blocks + again, once.head, float(attention))


def generation(shapes: Shapes, prompt: int, new: int, absorbed: bool = True) -> Flops:
    """Of ``new`` tokens written after a prompt: its prefill gives the first, and the last is not read again."""
    read = prefill(shapes, prompt)
    steps, expanded = max(0, new - 1), sum(_expansion(b) for b in shapes.blocks)
    attention = 0
    for b in shapes.blocks:
        window = b.attention.window or prompt + steps
        growing = max(0, min(steps, window - prompt))  # steps before the window is full
        seen = growing * prompt + growing * (growing + 1) // 2 + (steps - growing) * window
        attention += _scores(b, absorbed) * seen
    once = decode(shapes, 1)
    if not absorbed:  # a step expands all latents but the one it adds, which is counted with the block
        read = replace(read, blocks=read.blocks + (steps * prompt + steps * (steps - 1) // 2) * expanded)
    return Flops(read.blocks + steps * once.blocks, read.head + steps * once.head, read.attention + attention)


def training(shapes: Shapes, length: int, how: Training = Training(), attention: str = "exact") -> Flops:
    """Of a token that is trained on, forward and backward, on average over a row of ``length``.

    Raises:
        RecipeError: there is no such convention.
    """
    once = forward(shapes, length, attention, how.mtp, how.learnt)
    blocks, head, predictions = 3 * once.blocks, 3 * once.head, 3 * once.predictions
    if how.rank:
        blocks, head, predictions = 2 * once.blocks, 2 * once.head, 2 * once.predictions
        blocks += 6.0 * how.rank * _sides(shapes)
        if not how.recompute:  # which asks for the gradient of the embedding, so that the first block is not left out
            blocks -= _of_the_embedding(shapes, how.rank)
    kept = 3 * once.attention
    if how.recompute:
        blocks += once.blocks + 2.0 * how.rank * _sides(shapes) - sum(_unneeded(shapes, b, how) for b in shapes.blocks)
        kept += once.attention
    return Flops(blocks, head, kept, predictions)


def _weights(shapes: Shapes, block: Block) -> int:
    """Of a block, those that a token is multiplied with."""
    chosen, inner = block.routed
    return sum(t.count for t in block.tensors if t.kind in ("linear", "conv1d", "router")) + (
        3 * chosen * shapes.hidden * inner
    )


def _scores(block: Block, absorbed: bool = False) -> int:
    """FLOPs of a query on one key, all heads: its score, and its value's part of the sum."""
    a = block.attention
    if absorbed and a.latent is not None:
        _, rank, rotary = a.latent
        return 2 * a.heads * (rank + rotary + rank)
    return 2 * a.heads * (a.key + a.value)


def _expansion(block: Block) -> int:
    """FLOPs of a latent's expansion to keys and values of all heads."""
    a = block.attention
    if a.latent is None:
        return 0
    _, rank, rotary = a.latent
    return 2 * rank * a.heads * (a.key - rotary + a.value)


def _keys(block: Block, length: int, attention: str) -> float:
    """Keys that a query has, on average over a row."""
    if attention != "exact":
        return {"none": 0.0, "half": length / 2, "full": float(length)}[attention]
    window = min(length, block.attention.window or length)
    return (window * (window + 1) / 2 + (length - window) * window) / length


def _sides(shapes: Shapes) -> int:
    """Rows and columns of all Linears of the blocks: of LoRA's factors, the parameters at rank 1."""
    return sum(sum(t.shape) for b in shapes.blocks for t in b.tensors if t.kind == "linear")


def _of_the_embedding(shapes: Shapes, rank: int) -> float:
    """FLOPs of the gradient of what the first block reads, which nobody needs of a frozen embedding."""
    first = shapes.blocks[0]
    linears = [t.shape for t in first.tensors if t.kind == "linear" and t.shape[1] == shapes.hidden]
    return 2.0 * sum(rows * columns + rank * columns for rows, columns in linears[: first.inputs[0][1]])


def _unneeded(shapes: Shapes, block: Block, how: Training) -> float:
    """FLOPs of a block's last product, which is not computed again: of the factor B where LoRA adds one; 0 where a
    norm, dropout or a gate keeps the product."""
    if block.norms > 2 or shapes.dropout[1] > 0 or block.weighed:
        return 0.0
    inner = block.gated or block.plain
    return 2.0 * shapes.hidden * (how.rank * bool(inner) if how.rank else inner)
