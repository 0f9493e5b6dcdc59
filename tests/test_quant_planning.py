"""What each Linear may get in a mixture of formats."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from pennyweight.errors import ModelError
from pennyweight.quant.planning import IN_A_MIXTURE, candidates

SIZES = {"vocab_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def groups(hidden: int, intermediate: int, group: int) -> dict[str, set[tuple[str, int]]]:
    """Labels and groups that Linears of each width may get."""
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(hidden_size=hidden, intermediate_size=intermediate, **SIZES))
    found: dict[str, set[tuple[str, int]]] = {}
    for name, of in candidates(model, IN_A_MIXTURE, group, "compressed-tensors").items():
        width = model.get_submodule(name).in_features
        found.setdefault(str(width), set()).update((label, f.tile[1]) for label, f in of.items())
    return found


def test_int4_comes_in_half_and_double_groups_where_they_divide_a_width():
    plain = {("int8", 32), ("int4", 32), ("int3", 32)}
    both = {("int4 in half groups", 16), ("int4 in double groups", 64)}
    assert groups(64, 128, 32) == {"64": plain | both, "128": plain | both}
    assert groups(96, 160, 32) == {  # 64 divides neither, but 48 and 40 are near
        "96": plain | {("int4 in half groups", 16), ("int4 in double groups", 48)},
        "160": plain | {("int4 in half groups", 16), ("int4 in double groups", 80)},
    }


@pytest.mark.parametrize(("hidden", "group"), [(96, 128), (64, 128), (24, 32)])
def test_what_would_be_the_same_again_or_a_scale_a_row_is_left_out(hidden, group):
    for of in groups(hidden, hidden, group).values():
        sizes = [size for label, size in of if label.startswith("int4")]
        assert len(set(sizes)) == len(sizes) and all(sizes)


def test_a_group_that_divides_no_width_is_refused():
    with pytest.raises(ModelError, match="groups of 512 divide none of the widths"):
        groups(64, 64, 512)
