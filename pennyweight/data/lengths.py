"""How long rows are, and how far they are filled up: what a plan needs to know of data that is there."""

from __future__ import annotations

from collections.abc import Sequence

from pennyweight.data.pack import packer
from pennyweight.records import Encoded
from pennyweight.settings import Schedule

_LOOKED_AT = 512  # rows, of which padding is told


def mean_row(encoded: Sequence[Encoded]) -> dict[str, float]:
    """``rows``, their mean ``length`` in tokens, and the share of tokens that is ``learnt``."""
    tokens = sum(len(e.ids) for e in encoded)
    learnt = sum(len(e.loss_positions) for e in encoded) / max(1, tokens)
    return {"rows": len(encoded), "length": tokens / max(1, len(encoded)), "learnt": learnt}


def padding(encoded: Sequence[Encoded], s: Schedule) -> dict[str, float]:
    """``padded``: how many times its tokens a training computes, rows being filled up to the longest beside them."""
    if s.pack or not encoded:
        return {"padded": 1.0}
    batches = packer(list(encoded), s, 0, 0, max(len(e.ids) for e in encoded))
    some = [b for step in range(max(4, min(50, _LOOKED_AT // s.batch))) for b in batches(step)]
    return {"padded": sum(b.ids.numel() for b in some) / max(1, sum(b.tokens for b in some))}


def lengths(encoded: Sequence[Encoded], s: Schedule) -> dict[str, float]:
    """All of that, and how many ``samples`` the rows are of: a long text is several."""
    return mean_row(encoded) | padding(encoded, s) | {"samples": float(len({e.id.partition(":")[0] for e in encoded}))}
