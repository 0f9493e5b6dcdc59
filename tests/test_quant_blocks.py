"""What goes into the blocks: seen without the head, whose logits would be the most that is there."""

from __future__ import annotations

import torch
from architectures import make

from pennyweight.model.trunk import trunk_of
from pennyweight.quant.blocks import inputs_of


def test_the_head_is_not_run_for_what_goes_into_the_blocks():
    model = make("llama")
    ran = []
    hook = model.get_output_embeddings().register_forward_hook(lambda *_: ran.append(1))
    ids = torch.randint(3, model.config.vocab_size, (2, 7))
    inputs, others = inputs_of(trunk_of(model), model.model.layers, [{"input_ids": ids}])
    assert not ran
    hook.remove()
    assert torch.equal(inputs[0], model.model.embed_tokens(ids)) and len(others) == len(model.model.layers)
