"""A Hugging Face folder or hub id -> an opened model; and back to a folder. safetensors only, never pickle."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, FineGrainedFP8Config

from pennyweight.errors import ModelError, first_line
from pennyweight.ledger.hashing import hash_file
from pennyweight.model.head import check_head
from pennyweight.model.lineage import TAUGHT_BY, lineage_text, read_lineage
from pennyweight.model.loaded import Language, Loaded
from pennyweight.model.projection import detach
from pennyweight.records import Lineage, sha256_json

_NOT_DEFINING = {"_name_or_path", "transformers_version", "torch_dtype", "dtype", "use_cache"}
_OF_CODES = (
    "weight_scale",
    "weight_shape",
    "weight_zero_point",
    "weight_global_scale",
)  # of low-bit layers: no parameters of the model
_TOKENIZER_FILES = ("vocab.json", "vocab.txt", "merges.txt", "added_tokens.json", "special_tokens_map.json")
_TOKENIZER_FILES += ("generation_config.json",)  # says what ends a response


def load(
    path: str,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = torch.float32,
    trust_remote_code: bool = False,
) -> Loaded:
    """Open a causal language model on ``device``, its weights as ``dtype`` (None: as they are stored).

    Raises:
        ModelError: there is no such model, it is not a causal language model, its weights are missing, damaged, or
            not safetensors, it has no tokenizer, or its output head is not understood.
    """
    folder = _folder_of(path, trust_remote_code)
    config = _config(folder, path, trust_remote_code)
    weights = _weight_files(folder, path)
    for file in weights:
        _check_readable(file)
    with quiet():
        model = _open_model(folder, path, dtype, trust_remote_code)
        tokenizer = _open_tokenizer(folder, path, trust_remote_code)
        model.stored_dtype = stored_dtype(str(folder))
        model.low_bit = bool(getattr(config, "quantization_config", None))  # its own config may have lost it
        model = model.to(device).eval()
        check_head(model)
    text = config.get_text_config()
    fingerprint = fingerprint_of(str(folder), trust_remote_code)
    shape = {
        "architecture": type(model).__name__,
        "hidden": getattr(text, "hidden_size", None),
        "layers": getattr(text, "num_hidden_layers", None),
        "vocabulary": getattr(text, "vocab_size", None),
    }
    return Loaded(
        model=model,
        tokenizer=tokenizer,
        name=Path(path.rstrip("/")).name or path,
        fingerprint=fingerprint,
        identity=_identity(folder, fingerprint),
        params=sum(p.numel() for name, p in model.named_parameters() if not name.endswith(_OF_CODES)),
        bytes=sum(f.stat().st_size for f in weights),
        context=_context_of(text),
        shape=shape,
        taught_by=read_lineage(folder),
    )


def taught_by(path: str, trust_remote_code: bool = False) -> Lineage:
    """Whose traces a model folder says that it was tuned on, without its weights; None where it does not.

    Raises:
        ModelError: there is no such folder, or what it says is damaged.
    """
    return read_lineage(_folder_of(path, trust_remote_code, weights=False))


def _context_of(config: Any) -> int:
    return int(getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None) or 1 << 20)


def language_of(path: str, trust_remote_code: bool = False) -> Language:
    """What a model folder's tokenizer and config.json say, without its weights.

    Raises:
        ModelError: they cannot be opened, or it is no causal language model.
    """
    tokenizer = open_tokenizer(path, trust_remote_code)
    folder = _folder_of(path, trust_remote_code, weights=False)
    config = _config(folder, path, trust_remote_code).get_text_config()
    return Language(tokenizer, max(config.vocab_size, len(tokenizer)), _context_of(config))


def fingerprint_of(path: str, trust_remote_code: bool = False) -> str:
    """SHA-256 over the weight files' contents and the architecture; the same wherever the folder lies."""
    folder = _folder_of(path, trust_remote_code)
    files = _weight_files(folder, path)
    config = _json(folder / "config.json")
    defining = {k: v for k, v in config.items() if k not in _NOT_DEFINING}
    return sha256_json([defining, [[f.name, hash_file(f)] for f in files]])


def stored_dtype(path: str) -> torch.dtype:
    """The dtype that a folder says its weights are stored in: bfloat16, float16, or else float32."""
    config = _json(_folder_of(path, False) / "config.json")
    named = str(config.get("dtype") or config.get("torch_dtype"))
    return {"bfloat16": torch.bfloat16, "float16": torch.float16}.get(named, torch.float32)


def identity_of(path: str, trust_remote_code: bool = False) -> str:
    """SHA-256 over the fingerprint and the files that decide how text becomes tokens, the chat template included."""
    return _identity(_folder_of(path, trust_remote_code), fingerprint_of(path, trust_remote_code))


def _identity(folder: Path, fingerprint: str) -> str:
    files = sorted(
        {
            *folder.glob("tokenizer*"),
            *folder.glob("*.jinja"),
            *folder.glob("*.py"),
            *(folder / n for n in _TOKENIZER_FILES),
        }
    )
    return sha256_json([fingerprint, [[f.name, hash_file(f)] for f in files if f.is_file()]])


def save(model: Any, tokenizer: Any, folder: Path, dtype: torch.dtype | None = None, taught_by: Lineage = None) -> None:
    """Write a folder that ``AutoModelForCausalLM.from_pretrained`` opens, tokenizer and generation settings included.

    The weights are stored as ``dtype`` (default: as they are); the model itself becomes that, too. ``taught_by`` is
    whose traces it was tuned on, where that is known.

    It is written beside its place and moved in, so one that exists is whole.
    """
    making = folder.with_name(f".making-{folder.name}")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir(parents=True)
    detach(model)
    with quiet():
        (model.to(dtype) if dtype else model).save_pretrained(making)
        tokenizer.save_pretrained(making)
    if text := lineage_text(taught_by):
        (making / TAUGHT_BY).write_text(text, encoding="utf-8")
    for file in making.iterdir():
        file.chmod(0o644)
        with open(file, "rb") as f:
            os.fsync(f.fileno())
    shutil.rmtree(folder, ignore_errors=True)
    os.replace(making, folder)


def open_tokenizer(path: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a model folder, without its model.

    Raises:
        ModelError: it cannot be opened.
    """
    with quiet():
        return _open_tokenizer(_folder_of(path, trust_remote_code, weights=False), path, trust_remote_code)


def _folder_of(path: str, trust_remote_code: bool, weights: bool = True) -> Path:
    """The folder of a local path, or the snapshot of a hub id; without its weights where nobody asks for them."""
    if Path(path).expanduser().is_dir():
        return Path(path).expanduser()
    looks_local = path.startswith((".", "/", "~")) or path.count("/") != 1 or Path(path).exists()
    if looks_local:
        raise ModelError(
            f"there is no model folder at {path}; give a folder with config.json, or a hub id like owner/name"
        )
    from huggingface_hub import snapshot_download

    patterns = [
        "*.json",
        *(["*.safetensors"] if weights else []),
        "*.model",
        "*.txt",
        "*.jinja",
        *(["*.py"] if trust_remote_code else []),
    ]
    try:
        with quiet():
            return Path(
                snapshot_download(path, allow_patterns=patterns, ignore_patterns=["consolidated*", "original/*"])
            )
    except Exception as e:
        raise ModelError(
            f"{path} is not a folder, and the hub could not give it ({type(e).__name__}); check the name and the "
            "network, or give a folder"
        ) from None


def _config(folder: Path, path: str, trust_remote_code: bool) -> Any:
    file = folder / "config.json"
    if not file.exists():
        raise ModelError(f"{path} has no config.json, so it is not a Hugging Face model folder; give one that has")
    raw = _json(file)
    if raw.get("auto_map") and not trust_remote_code:
        raise ModelError(f"{path} comes with its own code, which runs only if you say so; add --trust-remote-code")
    named = raw.get("architectures") or []
    causal = [a for a in named if a.endswith(("ForCausalLM", "LMHeadModel", "ForConditionalGeneration"))]
    if raw.get("is_encoder_decoder") or (named and not causal):
        raise ModelError(
            f"{path} is a {', '.join(named) or raw.get('model_type')}, not a causal language model; give a "
            "decoder-only model (…ForCausalLM)"
        )
    try:
        with quiet():
            return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as e:
        raise ModelError(
            f"transformers does not understand {file}: {first_line(e)}; check it, or update transformers"
        ) from None


def _json(file: Path) -> dict[str, Any]:
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
        assert isinstance(value, dict)
    except (OSError, ValueError, AssertionError):
        raise ModelError(f"{file} cannot be read as a JSON object; copy the model again") from None
    return value


def _weight_files(folder: Path, path: str) -> list[Path]:
    files = sorted(folder.glob("*.safetensors"))
    if files:
        return _named_weights(folder, files)
    if list(folder.glob("*.bin")) or list(folder.glob("*.pt")) or list(folder.glob("*.pth")):
        raise ModelError(
            f"{path} holds only pickled weights, which can run code when opened; convert them to safetensors where you "
            "trust them: AutoModelForCausalLM.from_pretrained(...).save_pretrained(...)"
        )
    if not (folder / "config.json").exists():
        raise ModelError(f"{path} has no config.json, so it is not a Hugging Face model folder; give one that has")
    raise ModelError(f"{path} holds no weights (*.safetensors); copy the model again")


def _named_weights(folder: Path, files: list[Path]) -> list[Path]:
    """Of all the safetensors files, those that transformers opens; some folders hold the weights in a second form."""
    try:
        index = json.loads((folder / "model.safetensors.index.json").read_text(encoding="utf-8"))
        return sorted({folder / name for name in index["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        single = [f for f in files if f.name == "model.safetensors"]
        return single or files


def _check_readable(file: Path) -> None:
    try:
        with safe_open(file, framework="pt") as f:
            f.keys()
    except (SafetensorError, OSError) as e:
        told = first_line(e)
        raise ModelError(f"{file} is not a whole safetensors file ({told}); copy or download it again") from None


def _open_model(folder: Path, path: str, dtype: torch.dtype | None, trust_remote_code: bool) -> Any:
    try:
        opened: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype or "auto",
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            **_read_whole(folder),
        )
    except Exception as e:
        raise ModelError(
            f"transformers could not open {path} as a causal language model: {first_line(e)}; check the folder"
        ) from None
    model, info = opened
    missing = sorted(info.get("missing_keys") or ()) + sorted(str(k) for k in info.get("mismatched_keys") or ())
    if missing:
        raise ModelError(
            f"{path} lacks weights or has them in another shape ({len(missing)}, the first: {missing[0]}); they would "
            "be random, so copy the model again or correct its config.json"
        )
    compressor = getattr(getattr(model, "hf_quantizer", None), "compressor", None)
    if compressor is not None:  # at once, not in the first forward pass; and free to be moved to another device
        from compressed_tensors.offload import remove_dispatch  # takes a second, and most models need none of it

        compressor.decompress_model(model)
        remove_dispatch(model)
    for p in model.parameters():  # some weights of low-bit copies come in bfloat16 whatever is asked for
        p.data = p.data.to(dtype) if dtype and p.is_floating_point() and p.itemsize > 1 else p.data
    return model


def _read_whole(folder: Path) -> dict[str, Any]:
    """Settings with which DeepSeek's fp8 is read into wider weights on a GPU, too, as it is on a CPU."""
    asked = _json(folder / "config.json").get("quantization_config") or {}
    return {"quantization_config": FineGrainedFP8Config(dequantize=True)} if asked.get("quant_method") == "fp8" else {}


def _open_tokenizer(folder: Path, path: str, trust_remote_code: bool) -> Any:
    if not any((folder / n).exists() for n in ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")):
        raise ModelError(
            f"{path} has no tokenizer (tokenizer.json); copy the tokenizer files of the model beside its weights"
        )
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as e:
        raise ModelError(f"the tokenizer of {path} cannot be opened: {first_line(e)}; copy its files again") from None


@contextmanager
def quiet() -> Iterator[None]:
    """transformers without its bars and notices, and compressed-tensors without its; as before afterwards."""
    level = transformers.logging.get_verbosity()
    bars = transformers.logging.is_progress_bar_enabled()
    disabled = logging.root.manager.disable
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # bars that ask nobody whether they are wanted
            yield
    finally:
        transformers.logging.set_verbosity(level)
        if bars:
            transformers.logging.enable_progress_bar()
        logging.disable(disabled)
