"""Decoding, one token at a time, from exported copies through engines, beside torch in bfloat16.

    python -m benchmarks.decode

A random Llama of 254 M parameters (hidden 1,024, 16 layers, 8 of 16 heads for keys and values, vocabulary 32,000), 48
tokens after a prompt of 16, batch 1, one thread, CPU time of the process, ways in turns, medians. The GGUF files are
ours and go through llama.cpp; torch runs transformers' model in eager mode, which is also how transformers runs a
compressed-tensors copy once it has read it (into 16 bits). Share of bandwidth: bytes of weights that a token needs,
over what one thread reads from memory in that time by summing a long tensor.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, DynamicCache, LlamaConfig, LlamaForCausalLM

from benchmarks.bars import Bars, machine, real
from benchmarks.exports import coded_for_gguf
from pennyweight.model.cache import cache_argument
from pennyweight.model.load import load, save
from pennyweight.quant.export import export, formats_of
from pennyweight.quant.gguf_file import write_gguf
from pennyweight.quant.rounding import coded_for_storage

PROMPT, NEW, ROUNDS = 16, 48, 5
SIZES: dict[str, Any] = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
}


def a_model() -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=32_000, num_key_value_heads=8, max_position_embeddings=512, **SIZES)
    config.bos_token_id, config.eos_token_id, config.pad_token_id = 1, 2, 0
    return LlamaForCausalLM(config).bfloat16().eval()


def by_torch(model: Any) -> Callable[[list[int]], None]:
    @torch.inference_mode()
    def decode(prompt: list[int]) -> None:
        cache = DynamicCache(config=model.config)
        ids = torch.tensor([prompt])
        for _ in range(NEW):
            logits = model(input_ids=ids, use_cache=True, **{cache_argument(model): cache}).logits
            ids = logits[:, -1].argmax(-1, keepdim=True)

    return decode


def by_llama_cpp(file: Path) -> Callable[[list[int]], None]:
    import llama_cpp  # type: ignore

    engine = llama_cpp.Llama(str(file), n_ctx=512, n_threads=1, n_threads_batch=1, verbose=False)

    def decode(prompt: list[int]) -> None:
        engine.reset()
        tokens = engine.generate(prompt, top_k=1, temp=0.0, repeat_penalty=1.0)
        for _ in range(NEW):
            next(tokens)

    return decode


def bandwidth() -> float:
    """Bytes a second that one thread reads."""
    x = torch.ones(1 << 28)
    seconds = []
    for _ in range(6):
        began = time.thread_time()
        x.sum()
        seconds.append(time.thread_time() - began)
    return 4 * x.numel() / min(seconds)


def ways(folder: Path) -> dict[str, tuple[Callable[[list[int]], None], int]]:
    """Each way to decode, and bytes of weights that it reads for a token: all but the embedding, of which it reads a
    row."""
    tokenizer = AutoTokenizer.from_pretrained(real("stories260K"))
    model = a_model()
    weights = sum(p.numel() for p in model.parameters()) - model.model.embed_tokens.weight.numel()
    made: dict[str, Any] = {"torch bfloat16": (by_torch(model), 2 * weights)}
    made["torch float32"] = (by_torch(a_model().float()), 4 * weights)
    save(a_model(), tokenizer, folder / "parent")
    low = a_model()
    codes = coded_for_storage(low, formats_of(low, "int4", 32), torch.bfloat16, "absmax")
    export(low, codes, folder / "parent", folder / "copy")
    made["int4, transformers"] = (by_torch(load(str(folder / "copy"), dtype=torch.bfloat16).model), 2 * weights)
    for fmt, bits in (("bf16", 16), ("int8", 8.5), ("int4", 4.5)):
        low = a_model()
        codes = coded_for_gguf(low, fmt, "absmax")
        file = folder / f"{fmt}.gguf"
        write_gguf(low, tokenizer, codes, file, fmt, fmt, {})
        head = low.lm_head.weight.numel() * (8.5 if codes else 16)
        read = ((weights - low.lm_head.weight.numel()) * bits + head) / 8
        made[f"{fmt}, llama.cpp"] = (by_llama_cpp(file), int(read))
    return made


def main() -> None:
    try:
        import llama_cpp  # type: ignore # noqa: F401
    except ImportError:
        print("skipped: needs llama-cpp-python; pip install 'pennyweight[llama]'")
        sys.exit(0)
    torch.set_num_threads(1)
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        known = ways(Path(folder))
        seconds: dict[str, list[float]] = {name: [] for name in known}
        prompt = list(range(3, 3 + PROMPT))
        for i in range(ROUNDS + 1):
            for name, (decode, _) in known.items():
                began = time.process_time()
                decode(prompt)
                if i:  # the first is a warm-up
                    seconds[name].append(time.process_time() - began)
    reads = bandwidth()
    print(f"one thread reads {reads / 1e9:.1f} GB/s\n")
    print(f"{'way':<20} {'MB a token':>10} {'tokens/s':>9} {'over torch bfloat16':>20} {'of bandwidth, %':>16}")
    bars, base = Bars(), seconds["torch bfloat16"]
    for name, (_, size) in known.items():
        rate = NEW / statistics.median(seconds[name])
        gain = statistics.median(b / s for b, s in zip(base, seconds[name], strict=True))
        note = "  slower than bfloat16" if gain < 0.97 else ""
        print(f"{name:<20} {size / 1e6:>10.0f} {rate:>9.1f} {gain:>20.2f} {100 * rate * size / reads:>16.0f}{note}")
        if name.startswith("int4, llama"):
            bars.check("decode.int4_over_torch_bfloat16", gain, ">=3.5", gain >= 3.5)
    bars.finish()


if __name__ == "__main__":
    main()
