"""Decoding of Llama-like models in few operations: what a step costs beyond its arithmetic is what small models and
small batches pay for.

Rows lie in slots of a cache that grows, and each begins at its own position 0: a row is computed the same whatever lies
beside it, and rows come and go at any step. transformers works through the prompts; what it leaves in its cache is
taken over.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

Prefill = Callable[[Tensor], Any]
"""(k, T) token ids, padded on the right -> transformers' cache after them"""

_FUSED = 1 << 30  # bytes: larger models keep their weights as they are, since copies would double them
_EVEN = 8  # rows of a product go in multiples of this: a CPU's kernels then add up each row in the same order
_WINDOW = 32  # tokens of the cache that are looked at go in multiples of this, for the same reason
_SMALL = 20_000_000  # parameters: from here on a CPU gains more from less padding than from fewer passes
_ROPES = ("default", "linear", "llama3", "yarn")  # whose angles depend on nothing but the position
_AHEAD = 8192  # prompt tokens worked through at once
_PACKED: WeakKeyDictionary[nn.Module, tuple[list[int], LlamaRows]] = WeakKeyDictionary()  # for as long as a model lives


class LlamaRows:
    """Rows of a Llama-like model in decoding. Make one with ``of``.

    Shape letters: n rows, H heads, K key-value heads, D width of a head.
    """

    mixes = True

    def __init__(self, model: Any, prefill: Prefill, rows: int):
        trunk = model.get_decoder()
        attention = trunk.layers[0].self_attn
        self.d, self.prefill, self.rows = attention.head_dim, prefill, rows
        self.h, self.k = (x.out_features // self.d for x in (attention.q_proj, attention.k_proj))
        self.embedding, self.scale = trunk.embed_tokens.weight, attention.scaling
        self.device = self.embedding.device
        # In float32 on a CPU a product per head beats the fused attention, three times on 128 rows.
        self.plain = self.embedding.device.type == "cpu" and self.embedding.dtype == torch.float32
        self.plain &= not hasattr(attention, "q_norm")
        fuse, pack = sum(p.nbytes for p in trunk.layers.parameters()) <= _FUSED, _packs(model)
        self.even = 1 if pack else _EVEN
        self.blocks = [_Block(layer, fuse, self.plain, pack) for layer in trunk.layers]
        self.norm, self.head = _Norm(trunk.norm, False), _Product([model.lm_head], pack, pack=pack)
        self.rotary = trunk.rotary_emb
        self.work = sum(p.numel() for p in trunk.layers.parameters()) + model.lm_head.weight.numel()
        self.lengths, self.room = torch.zeros(0, dtype=torch.long), 0
        self._make_room(2 * _WINDOW)

    @staticmethod
    @torch.inference_mode()
    def of(model: Any, prefill: Prefill, rows: int) -> LlamaRows | None:
        """For up to ``rows`` rows; None where the model is not built like a Llama, or computes anything else."""
        if not _is_alike(model):
            return None
        now = _sums(model) if _packs(model) else []
        before, kept = _PACKED.get(model, ([], None))
        if kept and before == now:
            return kept.another(rows, prefill)
        made = LlamaRows(model, prefill, rows)
        if not made._agrees(model):
            return None
        if now:
            _PACKED[model] = now, made.another(1)
            del _PACKED[model][1].prefill  # it would keep the model alive
        return made

    def another(self, rows: int, prefill: Prefill | None = None) -> LlamaRows:
        """The same model for other rows, which may be worked through in another thread."""
        made = copy.copy(self)
        made.prefill = prefill or self.prefill
        made.rows, made.room, made.lengths = rows, 0, torch.zeros(0, dtype=torch.long)
        made._make_room(2 * _WINDOW)
        return made

    def admit(self, prompts: Sequence[Sequence[int]]) -> None:
        """New rows behind the others: all but the last token of each prompt goes into the cache."""
        first = len(self.lengths)
        self.lengths = torch.cat([self.lengths, torch.tensor([len(p) - 1 for p in prompts])])
        self._make_room(int(self.lengths.max()) + 1)
        device, size = self.embedding.device, self.lengths[first:].to(self.embedding.device)
        known = torch.arange(self.room, device=device) < size.view(-1, 1, 1, 1)
        self.bias[first : first + len(prompts)] = torch.where(known, 0.0, -torch.inf).to(self.bias.dtype)
        unit = _EVEN if device.type == "cpu" and self.work > _SMALL else _WINDOW
        widths = [-(-(len(p) - 1) // unit) * unit for p in prompts]  # a row's own, whatever comes with it
        for width in sorted(set(widths) - {0}):
            alike = [i for i, w in enumerate(widths) if w == width]
            for some in (alike[a : a + max(1, _AHEAD // width)] for a in range(0, len(alike), max(1, _AHEAD // width))):
                ids = torch.tensor([[*prompts[i][:-1], *[0] * (width + 1 - len(prompts[i]))] for i in some])
                slots = torch.tensor(some, device=device) + first
                for stored, made in zip(self.cache, self.prefill(ids.to(device)).layers, strict=True):
                    stored[0, slots, :, :width], stored[1, slots, :, :width] = made.keys, made.values

    def keep(self, order: np.ndarray) -> None:
        """The rows are now these of the old ones; none takes the place of one that is still to be moved."""
        moved = np.flatnonzero(order != np.arange(len(order)))
        if len(moved):
            to, i = (torch.from_numpy(x).to(self.embedding.device) for x in (moved, order[moved]))
            for stored in (self.bias, *(part for s in self.cache for part in s.unbind())):
                stored[to] = stored[i]
        self.lengths = self.lengths[torch.from_numpy(order)]

    def step(self, tokens: Tensor, is_done: Any = None) -> Tensor:
        """(n,) tokens that the rows go on with -> (n, V) float32 logits of the next ones."""
        n, at = len(tokens), self.lengths.to(tokens.device)
        longest = int(self.lengths.max()) + 1
        self._make_room(longest)
        self._look_at(n, min(self.room, -(-longest // _WINDOW) * _WINDOW))
        self.bias[:n].scatter_(-1, at.view(n, 1, 1, 1).expand(n, self.bias.shape[1], 1, 1), 0.0)
        places = (self.places[:n] + at.view(n, 1)).view(-1)
        cos, sin = self.cos[at].unsqueeze(1), self.sin[at].unsqueeze(1)
        x = F.embedding(F.pad(tokens, (0, -n % self.even)), self.embedding)
        if self.desk:
            self.desk.cos_qk.copy_(cos)
            self.desk.sin_qk.copy_(sin)
        for block, stored, seen in zip(self.blocks, self.cache, self.views, strict=True):
            attend = self._attend_plainly if self.desk else self._attend
            attend(block, block.norm(x), stored.view(-1, self.d), places, *seen, cos, sin)
            x = block.out(self.mixed, x)
            x = block.mlp(x)
        self.lengths = self.lengths + 1
        return self.head(self.norm(x))[:n].float()

    def _attend(
        self, block: _Block, x: Tensor, kept: Tensor, places: Tensor, keys: Tensor, values: Tensor, cos: Any, sin: Any
    ) -> None:
        """Attention of each row over what it has in its slot; the result lies in ``mixed``."""
        n, h, k = len(keys), self.h, self.k
        qkv = block.qkv(x)[:n].view(n, -1, self.d)
        qk = block.heads_normed(qkv, h, k)
        qk = torch.addcmul(qk * cos, qk.roll(self.d // 2, -1), sin)
        kept.index_copy_(0, places, torch.cat([qk[:, h:], qkv[:, h + k :]], 1).view(-1, self.d))
        q = qk[:, :h].reshape(n, k, -1, self.d)
        made = F.scaled_dot_product_attention(q, keys, values, attn_mask=self.hidden, scale=self.scale)
        self.into.copy_(made)

    def _attend_plainly(
        self, block: _Block, x: Tensor, kept: Tensor, places: Tensor, keys: Tensor, values: Tensor, cos: Any, sin: Any
    ) -> None:
        """The same in products, into tensors that are there already: of few rows most of the time goes into making and
        cutting tensors."""
        desk = self.desk
        assert desk is not None
        desk.turn(block.qkv.into(x, desk.qkv))
        kept.index_copy_(0, places, desk.new.copy_(desk.turned_kv).view(-1, self.d))
        torch.mul(desk.turned_q, self.scale, out=desk.q)
        scores = torch.bmm(desk.queries, keys).add_(self.hidden)
        torch.bmm(torch.softmax(scores, -1), values, out=self.into)

    def _look_at(self, n: int, window: int) -> None:
        """Views of the first ``window`` tokens of ``n`` slots; made anew only when they change."""
        if (n, window) == self.looked_at:
            return
        if not self.looked_at or self.looked_at[0] != n:
            self.desk = _Desk(n, self.h, self.k, self.d, self.embedding) if self.plain else None
        self.looked_at = (n, window)
        self.mixed = self.embedding.new_zeros((n + -n % self.even, self.h * self.d))
        self.into, self.hidden = self.mixed[:n].view(n, self.k, -1, self.d), self.bias[:n, :, :, :window]
        self.views = [(s[0, :n, :, :window], s[1, :n, :, :window]) for s in self.cache]
        if self.plain:
            self.into, self.hidden = self.into.flatten(0, 1), self.hidden.flatten(0, 1)
            self.views = [(keys.flatten(0, 1).transpose(1, 2), values.flatten(0, 1)) for keys, values in self.views]

    def _make_room(self, tokens: int) -> None:
        """At least so many tokens a row. Products on a CPU read slots without gaps in half the time, which pays for a
        copy at every window; elsewhere room doubles, so that few copies are made."""
        old, asked = self.room, -(-tokens // _WINDOW) * _WINDOW
        if asked == old or (asked < old and not self.plain):
            return
        self.room = asked if self.plain else max(asked, 2 * old)
        like, shape, kept = self.embedding, (2, self.rows, self.k, self.room, self.d), min(old, self.room)
        bias = like.new_full((self.rows, self.k if self.plain else 1, 1, self.room), -torch.inf)
        if old:
            bias[..., :kept] = self.bias[..., :kept]
        self.bias, self.looked_at, self.views = bias, (), []  # views would keep all old layers until the last is copied
        self.cache = self.cache if old else [like.new_zeros(2, self.rows, self.k, 0, self.d)] * len(self.blocks)
        for i, now in enumerate(self.cache):
            self.cache[i] = like.new_zeros(shape)
            self.cache[i][..., :kept, :] = now[..., :kept, :]
        self.cos, self.sin = _angles(self.rotary, self.room, like)
        slots = torch.arange(2 * self.rows * self.k, device=like.device).view(2, self.rows, self.k) * self.room
        self.places = slots.transpose(0, 1).flatten(1)  # (rows, 2 K): where each row's keys, then its values, begin

    def _agrees(self, model: Any) -> bool:
        """Whether a prompt and two steps give the model's own logits."""
        ids = torch.arange(3, 13, device=self.embedding.device) % len(self.embedding)
        want = model(input_ids=ids.unsqueeze(0), use_cache=False).logits.float()[0, -2:]
        self.admit([ids[:-1].tolist()])
        got = torch.cat([self.step(i) for i in ids[-2:].split(1)])
        self.keep(np.zeros(0, np.int64))
        return bool((got - want).norm() <= (1e-4 if self.embedding.dtype == torch.float32 else 0.05) * want.norm())


class _Block:
    """The weights of one block: query, key and value side by side, gate and up likewise."""

    def __init__(self, layer: Any, fuse: bool, fold: bool, pack: bool):
        a, m = layer.self_attn, layer.mlp
        fold = fuse and fold
        norm, norm_mlp = (x.weight if fold else None for x in (layer.input_layernorm, layer.post_attention_layernorm))
        self.norm, self.norm_mlp = _Norm(layer.input_layernorm, fold), _Norm(layer.post_attention_layernorm, fold)
        self.qkv = _Product([a.q_proj, a.k_proj, a.v_proj], fuse, norm, pack)
        self.gate_up = _Product([m.gate_proj, m.up_proj], fuse, norm_mlp, pack)
        self.out, self.down = (_Product([x], fold or pack, pack=pack) for x in (a.o_proj, m.down_proj))
        self.act = F.silu if m.act_fn(torch.ones(1)) == F.silu(torch.ones(1)) else m.act_fn
        self.norms_qk = (_Norm(a.q_norm, False), _Norm(a.k_norm, False)) if hasattr(a, "q_norm") else None

    def heads_normed(self, qkv: Tensor, h: int, k: int) -> Tensor:
        """(n, H + K, D) queries and keys of (n, H + 2 K, D), each head normed where the model does so."""
        if self.norms_qk is None:
            return qkv[:, : h + k]
        return torch.cat([self.norms_qk[0](qkv[:, :h]), self.norms_qk[1](qkv[:, h : h + k])], 1)

    def mlp(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(self.norm_mlp(x)).chunk(2, -1)
        return self.down(self.act(gate).mul_(up), x)


class _Desk:
    """Tensors that every block of a step writes into, and views of them, for n rows.

    ``q`` (n, H, D) and ``queries`` (n K, H/K, D) are the same; ``new`` (n, 2 K, D) are keys and values.
    """

    def __init__(self, n: int, h: int, k: int, d: int, like: Tensor):
        heads, half = h + 2 * k, d // 2
        self.qkv = like.new_zeros(n + -n % _EVEN, heads * d)
        made, turned = self.qkv[:n].view(n, heads, d), like.new_zeros(n, heads, d)
        self.cos, self.sin = like.new_ones(n, heads, d), like.new_zeros(n, heads, d)  # values are not turned
        self.cos_qk, self.sin_qk = self.cos[:, : h + k], self.sin[:, : h + k]
        self.made, self.turned, self.turned_q, self.turned_kv = made, turned, turned[:, :h], turned[:, h:]
        halves = slice(0, half), slice(half, d)
        self.parts = [(turned[..., a], made[..., b], self.sin[..., a]) for a, b in (halves, halves[::-1])]
        self.q, self.new = like.new_zeros(n, h, d), like.new_zeros(n, 2 * k, d)
        self.queries = self.q.view(n * k, -1, d)

    def turn(self, _: Tensor) -> None:
        """Rotary embedding of what lies in ``qkv``."""
        torch.mul(self.made, self.cos, out=self.turned)
        for to, other, sin in self.parts:
            to.addcmul_(other, sin)


class _Norm:
    """A root-mean-square norm; its weight may have been folded into the product that follows."""

    def __init__(self, norm: Any, folded: bool):
        self.weight, self.eps, self.folded = norm.weight, norm.variance_epsilon, folded
        self.epsilon = torch.tensor(self.eps)

    def __call__(self, x: Tensor) -> Tensor:
        if not self.folded:
            return F.rms_norm(x, x.shape[-1:], self.weight, self.eps)
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        return x * torch.addcmul(self.epsilon, size, size, value=1 / x.shape[-1]).rsqrt_()


class _Product:
    """Linears of one input, their outputs side by side; ``weight`` of a norm before them may be folded in, and weights
    be packed in the order in which a kernel reads them."""

    def __init__(self, layers: list[nn.Linear], fuse: bool, weight: Tensor | None = None, pack: bool = False):
        self.parts: list[tuple[Tensor, Tensor | None]] = [(x.weight.T, x.bias) for x in layers]
        self.pack = pack
        if fuse:
            biases = [x.weight.new_zeros(len(x.weight)) if x.bias is None else x.bias for x in layers]
            whole = torch.cat([x.weight if weight is None else x.weight * weight for x in layers])
            whole = torch.ops.mkldnn._reorder_linear_weight(whole, _EVEN) if pack else whole.T.contiguous()
            self.parts = [(whole, torch.cat(biases) if any(x.bias is not None for x in layers) else None)]

    def into(self, x: Tensor, made: Tensor) -> Tensor:
        """x W^T + b of one Linear, or several side by side, written into ``made``."""
        if len(self.parts) > 1:
            return made.copy_(self(x))
        w, b = self.parts[0]
        return torch.mm(x, w, out=made) if b is None else torch.addmm(b, x, w, out=made)

    def __call__(self, x: Tensor, added_to: Tensor | None = None) -> Tensor:
        """x W^T + b, and ``added_to`` besides."""
        if self.pack:
            y = torch.ops.mkldnn._linear_pointwise(x, *self.parts[0], "none", [], "")
            return y if added_to is None else y.add_(added_to)
        made = [torch.mm(x, w) if b is None else torch.addmm(b, x, w) for w, b in self.parts[1:]]
        w, b = self.parts[0]
        if b is None:
            first = torch.mm(x, w) if added_to is None else torch.addmm(added_to, x, w)
        else:
            first = torch.addmm(b, x, w) if added_to is None else torch.addmm(added_to, x, w).add_(b)
        return torch.cat([first, *made], -1) if made else first


def _packs(model: Any) -> bool:
    """Whether products read packed weights: in bfloat16 on a CPU they then take half the time, and add up a row alike
    however many rows there are. torch's compiler packs its weights with the same two operations."""
    ops, trunk = torch.ops.mkldnn, model.get_decoder()
    here = trunk.embed_tokens.weight.device.type == "cpu" and model.lm_head.weight.dtype == torch.bfloat16
    known = hasattr(ops, "_reorder_linear_weight") and hasattr(ops, "_linear_pointwise")
    return (
        here
        and known
        and ops._is_mkldnn_bf16_supported()
        and sum(p.nbytes for p in trunk.layers.parameters()) <= _FUSED
    )


def _sums(model: Any) -> list[int]:
    """What changes whenever a weight does, in a hundredth of the time that packing takes."""
    flat = [p.detach().flatten() for p in model.parameters()]
    wide = [torch.int64 if p.numel() % 4 == 0 == p.storage_offset() % 4 else torch.int16 for p in flat]
    return [int(p.view(w).sum()) for p, w in zip(flat, wide, strict=True)]


def _angles(rotary: Any, positions: int, like: Tensor) -> tuple[Tensor, Tensor]:
    """(P, D) cosines and sines of every position, the first half of the sines negative: x cos + (x rolled by half) sin
    turns pairs of numbers half a head apart."""
    cos, sin = (x[0] for x in rotary(like.new_zeros(1), torch.arange(positions, device=like.device).unsqueeze(0)))
    sin[:, : sin.shape[1] // 2].neg_()
    return cos, sin


def _is_alike(model: Any) -> bool:
    """Whether a model has a Llama's parts, and nothing known that would make it compute otherwise further on."""
    try:
        trunk, config = model.get_decoder(), model.config.get_text_config()
        for layer in trunk.layers:
            a, m = layer.self_attn, layer.mlp
            linears = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj, model.lm_head)
            if any(type(x) is not nn.Linear or x._forward_pre_hooks or x._forward_hooks for x in linears):
                return False
            norms = (layer.input_layernorm, layer.post_attention_layernorm, trunk.norm)
            norms += (a.q_norm, a.k_norm) if hasattr(a, "q_norm") else ()
            if not all(x.weight.ndim == 1 and x.variance_epsilon for x in norms) or not (a.scaling and m.act_fn):
                return False
        kinds = set(getattr(config, "layer_types", None) or [])
        windows = not kinds and bool(getattr(config, "sliding_window", None))
        rope = (config.rope_parameters or {}).get("rope_type", "default")
        whole = trunk.rotary_emb.inv_freq.numel() * 2 == trunk.layers[0].self_attn.head_dim
        return not (kinds - {"full_attention"} or windows) and rope in _ROPES and whole
    except (AttributeError, IndexError):
        return False
