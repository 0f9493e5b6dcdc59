"""A first student: made from nothing, or cut from its teacher (layers chosen, widths narrowed, the rest copied)."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from pennyweight.errors import RecipeError
from pennyweight.model.loaded import Language, Loaded, blocks_of, refuse_low_bit
from pennyweight.progress import say
from pennyweight.recipe import CutStudent, StudentChoice
from pennyweight.settings import Shape


def from_shape(
    shape: Shape, tokenizer: Any, context: int, seed: int, vocabulary: int | None = None
) -> LlamaForCausalLM:
    """A Llama of the given size with random weights from ``seed``; the global random state is left as it was.

    ``vocabulary`` is the teacher's, where that has more entries than the tokenizer.

    Weights start with deviation sqrt(2 / (5 hidden)) (Nguyen and Salazar, arXiv 1910.05895), which small widths need:
    the usual 0.02 is right near a width of 1,000 and starves a width of 100.
    """
    config = LlamaConfig(
        vocab_size=vocabulary or len(tokenizer),
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads or shape.heads,
        intermediate_size=shape.intermediate,
        max_position_embeddings=context,
        tie_word_embeddings=shape.tie_embeddings,
        initializer_range=math.sqrt(2 / (5 * shape.hidden)),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


_UNDERSTOOD = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "q_norm", "k_norm"}
_UNDERSTOOD |= {"input_layernorm", "post_attention_layernorm"}
_UNDERSTOOD |= {"pre_feedforward_layernorm", "post_feedforward_layernorm"}


def align_vocabulary(model: Any, vocabulary: int) -> bool:
    """Give ``model`` as many output entries as its teacher has; True where that changed it.

    Models of one tokenizer often differ in padding (Qwen2.5 has 151,936 entries in small sizes and 152,064 in large
    ones): rows that no token ever names are dropped, or added at random.
    """
    if model.get_output_embeddings().weight.shape[0] == vocabulary:
        return False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    return True


def first(
    s: StudentChoice,
    language: Language,
    context: int,
    seed: int,
    teacher: Callable[[], Any],
    opened: Callable[[str, bool], Loaded],
) -> Any:
    """A student before training: made from nothing by ``seed``, cut from the model that ``teacher`` gives, or given.

    Args:
        opened: (path, trust_remote_code) -> a folder, in float32 on the run's device.

    Raises:
        ModelError, RecipeError: it cannot be made, or does not suit the run.
    """
    if s.kind == "shape":
        return from_shape(s.shape, language.tokenizer, context, seed, language.vocabulary)
    if s.kind == "cut":
        return cut(teacher(), s).float()
    return fitted(opened(s.path, s.trust_remote_code), s.path, language, context)


def fitted(given: Loaded, path: str, language: Language, context: int) -> Any:
    """The model of a student that was given (at ``path``), with as many vocabulary entries as ``language`` has.

    Raises:
        ModelError: it is a low-bit copy.
        RecipeError: it takes fewer tokens than ``context``.
    """
    refuse_low_bit(given.model)
    if given.context < context:
        raise RecipeError(
            f"the student {path} takes {given.context:,} tokens and data.context is {context:,}; set "
            f"data.context={given.context}"
        )
    before = given.vocabulary
    if align_vocabulary(given.model, language.vocabulary):
        say(f"the student's vocabulary of {before:,} is set to {language.vocabulary:,} (padding)")
    return given.model


def cut(teacher: Any, settings: CutStudent) -> Any:
    """A smaller copy of ``teacher``, which is left untouched.

    Raises:
        ModelError: ``teacher`` is a low-bit copy.
        RecipeError: layers that are not there, a width that is not smaller, or an architecture whose widths are not
            understood.
    """
    refuse_low_bit(teacher)
    prefix, blocks = blocks_of(teacher)
    layers = _layers(settings.layers, len(blocks))
    config = copy.deepcopy(teacher.config)
    text = config.get_text_config()
    text.num_hidden_layers = len(layers)
    for name, value in vars(text).items():  # what is said layer by layer: attention windows, rotary or not, ...
        if isinstance(value, list) and len(value) == len(blocks) > 1 and not name.endswith("token_id"):
            setattr(text, name, [value[i] for i in layers])
    state = _chosen_layers(teacher.state_dict(), prefix, layers)
    if settings.hidden or settings.intermediate:
        state = _narrow(state, teacher, text, prefix, len(layers), settings)
    with torch.random.fork_rng(devices=[]):
        student = type(teacher)(config)
    student.load_state_dict({k: v.clone() for k, v in state.items()}, strict=True)
    student.tie_weights()
    student.generation_config = copy.deepcopy(teacher.generation_config)
    return student.to(next(teacher.parameters()).dtype).eval()


def _layers(asked: int | list[int] | None, depth: int) -> list[int]:
    """Which layers to keep: a list as it is; a number spread evenly from the first to the last."""
    if asked is None:
        return list(range(depth))
    chosen = asked if isinstance(asked, list) else _spread(asked, depth)
    if not chosen or len(set(chosen)) != len(chosen) or any(not 0 <= i < depth for i in chosen):
        raise RecipeError(
            f"student.layers={asked} cannot be cut from {depth} layers (0 to {depth - 1}); choose among them, each once"
        )
    return chosen


def _spread(count: int, depth: int) -> list[int]:
    if not 1 <= count <= depth:
        raise RecipeError(f"student.layers={count} cannot be cut from a teacher of {depth} layers; give 1 to {depth}")
    return [0] if count == 1 else [round(i * (depth - 1) / (count - 1)) for i in range(count)]


def _chosen_layers(state: dict[str, Tensor], prefix: str, layers: list[int]) -> dict[str, Tensor]:
    """The state of the kept layers under their new numbers, and of everything outside the blocks."""
    place = {old: new for new, old in enumerate(layers)}
    pattern = re.compile(rf"^{re.escape(prefix)}\.(\d+)\.(.*)$")
    out = {}
    for key, value in state.items():
        match = pattern.match(key)
        if match is None:
            out[key] = value
        elif int(match[1]) in place:
            out[f"{prefix}.{place[int(match[1])]}.{match[2]}"] = value
    return out


def _narrow(
    state: dict[str, Tensor], teacher: Any, text: Any, prefix: str, depth: int, settings: CutStudent
) -> dict[str, Tensor]:
    """Keep the channels that carry most; changes ``text`` (the student's config) to the new widths.

    Importance is by weight magnitude, needing no data: an intermediate channel by |gate| |up| |down| of its row and
    column, a hidden channel by what the embedding holds in it and what the blocks write to it.
    """
    hidden, inner = text.hidden_size, text.intermediate_size if hasattr(text, "intermediate_size") else 0
    gates = [f"{prefix}.{i}.mlp.gate_proj.weight" for i in range(depth)]
    if not all(g in state and g.replace("gate", "down") in state for g in gates):
        raise RecipeError(
            f"the widths of a {type(teacher).__name__} cannot be narrowed, because its blocks are not the gated kind; "
            "cut layers only, or give a student folder"
        )
    foreign = next((k for k in state if k.startswith(prefix) and k.rsplit(".", 2)[-2] not in _UNDERSTOOD), None)
    if foreign:
        raise RecipeError(
            f"the widths of a {type(teacher).__name__} cannot be narrowed, because it is not known which side of "
            f"{foreign} is which; cut layers only, or give a student folder"
        )
    for name, new, old in (("hidden", settings.hidden, hidden), ("intermediate", settings.intermediate, inner)):
        if new and new > old:
            raise RecipeError(f"student.{name}={new} is wider than the teacher's {old}; give a smaller width")
    embedding = next(k for k, m in teacher.named_modules() if m is teacher.get_input_embeddings())
    writers = [k for k in state if re.search(r"(o_proj|down_proj)\.weight$", k)]
    carried = state[f"{embedding}.weight"].float().square().sum(0)
    carried = carried + sum(state[k].float().square().sum(1) for k in writers)
    keep_hidden = _strongest(carried, settings.hidden or hidden)
    out = {}
    for key, value in state.items():
        block = re.match(rf"^{re.escape(prefix)}\.(\d+)\.mlp\.", key)
        keep_inner = None
        if block:
            names = [f"{prefix}.{block[1]}.mlp.{n}_proj.weight" for n in ("gate", "up", "down")]
            gate, up, down = (state[n].float() for n in names)
            keep_inner = _strongest(
                gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0), settings.intermediate or inner
            )
        out[key] = _sliced(key, value, keep_hidden, keep_inner)
    text.head_dim = getattr(text, "head_dim", None) or hidden // text.num_attention_heads
    text.hidden_size = len(keep_hidden)
    text.intermediate_size = settings.intermediate or inner
    return out


def _sliced(key: str, value: Tensor, hidden: Tensor, inner: Tensor | None) -> Tensor:
    """One tensor with only the kept channels: which of its sides is which is told by its name."""
    leaf = key.rsplit(".", 2)[-2]
    if value.ndim == 1:
        return value if leaf in ("q_norm", "k_norm", "q_proj", "k_proj", "v_proj") else value[hidden]
    if leaf in ("gate_proj", "up_proj") and inner is not None:
        return value[inner][:, hidden]
    if leaf == "down_proj" and inner is not None:
        return value[hidden][:, inner]
    return value[hidden] if leaf == "o_proj" else value[:, hidden]


def _strongest(importance: Tensor, count: int) -> Tensor:
    """Indices of the ``count`` largest, in their old order."""
    return importance.topk(count).indices.sort().values
