"""What a decoder is made of, in shapes: the nouns of a plan. No weights, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tensor:
    """A parameter. ``kind``: ``linear`` (the weight of an nn.Linear, output x input), ``conv1d`` (GPT-2's, input x
    output), ``experts`` (of all experts together), ``router``, ``table`` (embeddings, output head) or ``vector``."""

    kind: str
    shape: tuple[int, ...]

    @property
    def count(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Attention:
    """Heads of queries, and of keys and values; width of a head's keys and values.

    ``window``: tokens that it looks back on, None for all. ``head_norms``: queries and keys are normalised. ``capped``:
    scores go through a tanh, which no fused kernel does. ``as_one``: queries, keys and values are parts of one matrix's
    product. ``latent``: ranks of queries (0: none) and of keys with values, and rotary width, of multi-head latent
    attention (DeepSeek-V2, arXiv 2405.04434).
    """

    heads: int
    kv_heads: int
    key: int
    value: int
    window: int | None = None
    head_norms: bool = False
    capped: bool = False
    as_one: bool = False
    dropout: float = 0.0
    latent: tuple[int, int, int] | None = None

    @property
    def cached(self) -> int:
        """Numbers that the KV cache holds of a token; with latent attention, of all heads together."""
        if self.latent is not None:
            return self.latent[1] + self.latent[2]
        return self.kv_heads * (self.key + self.value)


@dataclass(frozen=True, slots=True)
class Block:
    """A decoder block.

    Attributes:
        inputs: widths that matrices read, and how many Linears and other matrices read the same; without what the
            projection of attention's output reads.
        norms: of the residual stream.
        gated, plain: inner widths of an MLP with a gate (a MoE's shared experts, too), and of one without; 0: none.
        experts, routed: how many there are, and how many a token goes to with their inner width.
        weighed: whether what the shared experts give is weighed by a gate of their own.
    """

    tensors: tuple[Tensor, ...]
    attention: Attention
    inputs: tuple[tuple[int, int, int], ...]
    norms: int = 2
    gated: int = 0
    plain: int = 0
    experts: int = 0
    routed: tuple[int, int] = (0, 0)
    weighed: bool = False


@dataclass(frozen=True, slots=True)
class Shapes:
    """A decoder: ``tensors`` are those outside its blocks; ``head`` is (vocabulary, hidden), its own or the embedding.

    Attributes:
        norm: ``rms``; ``rms32``, which scales in float32, too (Gemma); or ``layer`` (GPT-2).
        activation: name of the MLP's.
        rotary: width of rotary positions times the kinds of them; 0 where positions are learnt.
        dropout: of embeddings and of what blocks add to the residual stream.
        mtp: modules of multi-token prediction that its folder has besides, and that no tensor here is of.
    """

    architecture: str
    vocabulary: int
    hidden: int
    context: int
    tied: bool
    tensors: tuple[Tensor, ...]
    blocks: tuple[Block, ...]
    norm: str
    activation: str
    rotary: int
    dropout: tuple[float, float] = (0.0, 0.0)
    mtp: int = 0

    @property
    def all_tensors(self) -> list[Tensor]:
        return [*self.tensors, *(t for b in self.blocks for t in b.tensors)]

    @property
    def parameters(self) -> int:
        return sum(t.count for t in self.all_tensors)

    @property
    def coded(self) -> list[tuple[int, int, int]]:
        """Matrices that a low-bit copy codes, as (rows, columns, how many): Linears, and three of each expert."""
        out = []
        for block in self.blocks:
            out += [(*t.shape, 1) for t in block.tensors if t.kind == "linear"]
            if block.experts:
                inner = block.routed[1]
                out += [(inner, self.hidden, 2 * block.experts), (self.hidden, inner, block.experts)]
        return out  # type: ignore[return-value]

    def counted(self, *kinds: str) -> int:
        """Parameters of these kinds."""
        return sum(t.count for t in self.all_tensors if t.kind in kinds)
