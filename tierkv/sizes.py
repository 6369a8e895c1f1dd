"""How many bytes of KV a model keeps: per token, per sequence, per batch, from its config alone. No weights, no torch.

elements per token and layer = (key width + value width) x KV heads      MHA, GQA, MQA
                             = latent width + rotary key width, once     MLA
a layer with a window keeps at most that many tokens; a recurrent layer keeps a state, which is not KV
"""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from tierkv.errors import ModelError
from tierkv.layout import DTYPE_BYTES

ASSUMED_DTYPE: Final = "bfloat16"
_DTYPES: Final = {name: name for name in DTYPE_BYTES} | {
    "fp32": "float32",
    "float": "float32",
    "fp16": "float16",
    "half": "float16",
    "bf16": "bfloat16",
    "fp8": "float8_e4m3",
    "float8": "float8_e4m3",
    "fp8_e4m3": "float8_e4m3",
    "float8_e4m3fn": "float8_e4m3",
}

# One meaning, many names: the first that a config has is taken.
_LAYERS: Final = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_transformer_layers")
_HEADS: Final = ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_query_heads")
_KV_HEADS: Final = ("num_key_value_heads", "num_kv_heads", "multi_query_group_num", "kv_n_heads", "n_head_kv")
_HIDDEN: Final = ("hidden_size", "n_embd", "d_model", "model_dim")
_HEAD_DIM: Final = ("head_dim", "kv_channels", "attention_head_dim")
_LAYER_KINDS: Final = ("layer_types", "layers_block_type", "hybrid_override_pattern")
_SHARED: Final = ("num_kv_shared_layers",)
_PERIOD: Final = ("attn_layer_period", "full_attention_interval")
_PATTERNS: Final = ("sliding_window_pattern", "_sliding_window_pattern")
_WINDOW: Final = ("sliding_window", "attention_window_size", "attention_chunk_size")

_KINDS: Final = {
    "full": "full attention attention indexed_attention deepseek_sparse_attention minimax_m3_sparse hybrid global *",
    "window": "sliding sliding_attention chunked_attention hybrid_sliding local",
    "state": "linear_attention mamba mamba2 recurrent conv mlp moe M E -",  # keeps no KV
}
_KIND_OF: Final = {"full_attention": "full"} | {name: kind for kind, names in _KINDS.items() for name in names.split()}

# Every n-th layer attends to everything, where a config does not say so.
_PATTERN: Final = {"gemma2": 2, "gpt_oss": 2, "llama4_text": 4, "cohere2": 4, "gemma3_text": 6, "gemma3": 6}
# Values that published configs leave to the code.
_LEFT_OUT: Final[Mapping[str, Mapping[str, Any]]] = {
    "gemma3_text": {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "sliding_window": 4096},
}
_STATE_ONLY: Final = ("mamba", "mamba2", "falcon_mamba", "rwkv", "rwkv5", "rwkv6", "rwkv7", "xlstm")
_ENCODERS: Final = (
    "bert",
    "roberta",
    "xlm-roberta",
    "distilbert",
    "albert",
    "electra",
    "deberta",
    "deberta-v2",
    "mpnet",
)
_ENCODERS_TOO: Final = ("modernbert", "nomic_bert", "vit", "clip", "siglip", "dinov2", "wav2vec2", "hubert")


@dataclass(frozen=True, slots=True)
class LayerGroup:
    """Layers that keep equally much. elements: per token and layer.  window: tokens a layer keeps at most."""

    num_layers: int
    elements: int
    window: int | None = None


@dataclass(frozen=True, slots=True)
class KVSize:
    """What a model keeps. `attention` is MHA, GQA, MQA or MLA; `state_layers` keep a recurrent state that is not counted."""

    model_type: str
    attention: str
    dtype: str
    dtype_assumed: bool
    groups: tuple[LayerGroup, ...]
    state_layers: int = 0

    @property
    def token_bytes(self) -> int:
        """Bytes of one token in all layers."""
        return sum(group.num_layers * group.elements for group in self.groups) * DTYPE_BYTES[self.dtype]

    @property
    def num_layers(self) -> int:
        """Layers that keep KV."""
        return sum(group.num_layers for group in self.groups)

    def sequence_bytes(self, context: int) -> int:
        """Bytes a sequence of `context` tokens attends to: layers with a window keep no more than it."""
        tokens = sum(group.num_layers * group.elements * min(context, group.window or context) for group in self.groups)
        return tokens * DTYPE_BYTES[self.dtype]


def kv_size(config: Mapping[str, Any], *, dtype: str | None = None) -> KVSize:
    """Size the KV of the model that a `config.json` describes.

    dtype: of the KV, where it is not the config's. Raises ModelError for what is no decoder or what is not understood:
    a guess here would become somebody's order for memory.
    """
    text = _language(config)
    model_type = str(text.get("model_type") or config.get("model_type") or "unknown")
    text = {**_LEFT_OUT.get(model_type, {}), **{key: value for key, value in text.items() if value is not None}}
    _refuse_other_than_decoders(config, text, model_type)
    kinds = _kinds(text, model_type)
    groups: Counter[tuple[int, int | None]] = Counter()
    window = _window(text)
    for layer, kind in enumerate(kinds):
        if kind != "state":
            groups[_elements(text, layer, kind), window if kind == "window" else None] += 1
    if not groups:
        raise ModelError(
            f"model type {model_type}: no layer attends, so it keeps no KV; there is nothing for tierkv to store"
        )
    name, assumed = _dtype(config, text, dtype)
    return KVSize(
        model_type=model_type,
        attention=_attention(text),
        dtype=name,
        dtype_assumed=assumed,
        groups=tuple(LayerGroup(count, elements, window) for (elements, window), count in groups.items()),
        state_layers=kinds.count("state"),
    )


def _language(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """The part of a multimodal config that generates text."""
    for name in ("text_config", "llm_config", "language_config", "thinker_config"):
        inner = config.get(name)
        if isinstance(inner, Mapping) and any(key in inner for key in (*_LAYERS, "model_type", "text_config")):
            return _language(inner)
    return config


def _refuse_other_than_decoders(config: Mapping[str, Any], text: Mapping[str, Any], model_type: str) -> None:
    if model_type in _STATE_ONLY:
        raise ModelError(
            f"model type {model_type}: a state-space model keeps a state of fixed size and no KV per token"
        )
    if config.get("is_encoder_decoder") or text.get("is_encoder_decoder"):
        raise ModelError(
            f"model type {model_type}: encoder-decoder models are not supported; give a decoder-only model"
        )
    if model_type in (*_ENCODERS, *_ENCODERS_TOO) and not text.get("is_decoder"):
        raise ModelError(f"model type {model_type}: an encoder keeps no KV between tokens; give a decoder-only model")
    if not any(key in text for key in (*_LAYERS, *_LAYER_KINDS)):
        raise ModelError(f"no {_LAYERS[0]} in it: this is not the config of a language model; give its config.json")


def _kinds(text: Mapping[str, Any], model_type: str) -> list[str]:
    """`full`, `window` or `state` for every layer with a KV of its own."""
    named = next((text[key] for key in _LAYER_KINDS if text.get(key)), None)
    if named is not None:
        if not isinstance(named, list | str):
            raise ModelError(f"layer_types = {named!r} in the model's config: expected a list of names")
        unknown = [name for name in named if name not in _KIND_OF]
        if unknown:
            raise ModelError(f"model type {model_type}: layers of type {unknown[0]!r} are not known to tierkv")
        kinds = [_KIND_OF[name] for name in named]
    else:
        kinds = _kinds_by_rule(text, model_type, _number(text, _LAYERS))
    if _window(text) is None:
        kinds = ["full" if kind == "window" else kind for kind in kinds]
    crossing = text.get("cross_attention_layers") or []  # keep the KV of an image, not of tokens
    if not isinstance(crossing, list):
        raise ModelError(f"cross_attention_layers = {crossing!r} in the model's config: expected a list of layers")
    kinds = [kind for layer, kind in enumerate(kinds) if layer not in crossing]
    # The last layers may read the KV of earlier ones.
    return kinds[: -_number(text, _SHARED)] if any(text.get(key) for key in _SHARED) else kinds


def _kinds_by_rule(text: Mapping[str, Any], model_type: str, num_layers: int) -> list[str]:
    if any(text.get(key) for key in _PERIOD):
        period = _number(text, _PERIOD)
        offset = text.get("attn_layer_offset", period - 1)
        return ["full" if layer % period == offset else "state" for layer in range(num_layers)]
    pattern = next((text[key] for key in _PATTERNS if text.get(key)), _PATTERN.get(model_type))
    if isinstance(pattern, str):  # "LLLG", repeated
        return ["full" if pattern[layer % len(pattern)] == "G" else "window" for layer in range(num_layers)]
    if isinstance(pattern, list):  # of a GGUF: one truth value per layer
        return ["window" if pattern[layer % len(pattern)] else "full" for layer in range(num_layers)]
    if pattern is not None:
        every = _number({_PATTERNS[0]: pattern}, _PATTERNS)
        return ["full" if (layer + 1) % every == 0 else "window" for layer in range(num_layers)]
    if text.get("use_sliding_window") and text.get("max_window_layers"):
        whole = _number(text, ("max_window_layers",))
        return ["window" if layer >= whole else "full" for layer in range(num_layers)]
    return ["window"] * num_layers  # all alike; full when there is no window


def _window(text: Mapping[str, Any]) -> int | None:
    if text.get("use_sliding_window") is False:
        return None
    return _number(text, _WINDOW) if any(text.get(key) for key in _WINDOW) else None


def _elements(text: Mapping[str, Any], layer: int, kind: str) -> int:
    if text.get("kv_lora_rank"):  # MLA: one latent and one rotary key for all heads
        return _number(text, ("kv_lora_rank",)) + _number(text, ("qk_rope_head_dim",))
    heads = _kv_heads(text, layer)
    if any(key in text for key in _HEAD_DIM):
        key_width = _number(text, _HEAD_DIM)
    else:
        hidden, query_heads = _number(text, _HIDDEN), _number(text, _HEADS)
        if hidden < query_heads:
            raise ModelError(f"hidden_size = {hidden} in the model's config is less than its {query_heads} heads")
        key_width = hidden // query_heads
    if kind == "full" and "global_head_dim" in text:
        key_width = _number(text, ("global_head_dim",))
        if text.get("attention_k_eq_v") and "num_global_key_value_heads" in text:
            heads = _number(text, ("num_global_key_value_heads",))
    value_width = _number(text, ("v_head_dim",)) if "v_head_dim" in text else key_width
    return heads * (key_width + value_width)


def _kv_heads(text: Mapping[str, Any], layer: int) -> int:
    inner = text.get("attn_config")  # MPT, DBRX
    sources = [inner, text] if isinstance(inner, Mapping) else [text]
    if text.get("multi_query") and not text.get("new_decoder_architecture"):  # Falcon 7B, StarCoder
        return 1
    for source in sources:
        for key in _KV_HEADS:
            if isinstance(per_layer := source.get(key), list) and layer < len(per_layer):
                return _number({key: per_layer[layer]}, (key,))
            if source.get(key) is not None:
                return _number(source, (key,))
    return _number(text, _HEADS)


def _attention(text: Mapping[str, Any]) -> str:
    if text.get("kv_lora_rank"):
        return "MLA"
    heads = next((text[key] for key in _HEADS if key in text), None)
    heads = heads[0] if isinstance(heads, list) and heads else heads
    kv_heads = _kv_heads(text, 0)
    if kv_heads == 1 and heads != 1:
        return "MQA"
    return "MHA" if heads in (None, kv_heads) else "GQA"


def _number(text: Mapping[str, Any], keys: tuple[str, ...]) -> int:
    for key in keys:
        value = text.get(key)
        if value is None:
            continue
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ModelError(f"{key} = {value!r} in the model's config: expected an integer of at least 1")
        return value
    raise ModelError(f"no {keys[0]} in the model's config: give the config.json of a language model")


def _dtype(config: Mapping[str, Any], text: Mapping[str, Any], given: str | None) -> tuple[str, bool]:
    if given is not None:
        if given.lower() not in _DTYPES:
            raise ModelError(f"dtype {given!r}: expected one of {', '.join(_DTYPES)}")
        return _DTYPES[given.lower()], False
    for source in (text, config):
        for key in ("dtype", "torch_dtype"):
            name = str(source.get(key) or "").removeprefix("torch.")
            if name in _DTYPES:
                return _DTYPES[name], False
    return ASSUMED_DTYPE, True
