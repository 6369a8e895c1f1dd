"""A Llama model straight from a GGUF file: weights and byte-level tokenizer, with nothing converted twice.

transformers takes 13 s for SmolLM2's 98 MB, this takes 2-3 s (2-core Intel Xeon VM, 1 thread, 2026-11-22). Only what is
certain to come out the same is done here; for any other architecture, tokenizer or option `read` returns None, and
transformers' own loader does it.
"""

import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch

from tierkv.errors import ModelError

_MAGIC: Final = b"GGUF"
_SCALARS: Final = {0: "<B", 1: "<b", 2: "<H", 3: "<h", 4: "<I", 5: "<i", 6: "<f", 7: "<?", 10: "<Q", 11: "<q", 12: "<d"}
_STRING, _ARRAY, _CONTROL, _USER_DEFINED = 8, 9, 3, 4

_NAMES: Final = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_REQUIRED: Final = frozenset(
    f"llama.{name}"
    for name in (
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.head_count_kv",
        "attention.layer_norm_rms_epsilon",
        "rope.freq_base",
        "rope.dimension_count",
    )
)
"""What a file must say about a Llama to be read here; one that says more (experts, rope scaling) is transformers' business."""


@dataclass(frozen=True, slots=True)
class _TensorInfo:
    name: str
    shape: tuple[int, ...]
    kind: int
    offset: int


class _Reader:
    def __init__(self, data: memoryview) -> None:
        self._data, self._at = data, 0

    def scalar(self, form: str) -> Any:  # Any: the file says which type
        (value,) = struct.unpack_from(form, self._data, self._at)
        self._at += struct.calcsize(form)
        return value

    def string(self) -> str:
        size = self.scalar("<Q")
        self._at += size
        return str(self._data[self._at - size : self._at], "utf-8")

    def value(self, kind: int) -> Any:  # Any: the file says which type
        if kind == _STRING:
            return self.string()
        if kind != _ARRAY:
            return self.scalar(_SCALARS[kind])
        element, count = self.scalar("<I"), self.scalar("<Q")
        if element in (_STRING, _ARRAY):
            return [self.value(element) for _ in range(count)]
        form = f"<{count}{_SCALARS[element][1]}"
        self._at += struct.calcsize(form)
        return list(struct.unpack_from(form, self._data, self._at - struct.calcsize(form)))

    def tensor(self) -> _TensorInfo:
        name, num_dims = self.string(), self.scalar("<I")
        shape = tuple(self.scalar("<Q") for _ in range(num_dims))
        return _TensorInfo(name, shape[::-1], self.scalar("<I"), self.scalar("<Q"))

    def position(self) -> int:
        return self._at


def read(path: Path, *, dtype: torch.dtype) -> tuple[Any, Any] | None:  # Any: transformers' model and tokenizer
    """Model and tokenizer of the file, or None if it is of a kind that only transformers' loader knows.

    Raises ModelError if it is no GGUF file, or ends early.
    """
    with path.open("rb") as file:
        if file.read(4) != _MAGIC:
            raise ModelError(f"{path}: no GGUF file (it does not begin with {_MAGIC.decode()})")
    data = np.memmap(path, mode="r", dtype=np.uint8)
    reader = _Reader(data.data)
    try:
        reader.scalar("<I")
        version, num_tensors, num_fields = reader.scalar("<I"), reader.scalar("<Q"), reader.scalar("<Q")
        fields = {reader.string(): reader.value(reader.scalar("<I")) for _ in range(num_fields)}
        tensors = [reader.tensor() for _ in range(num_tensors)]
    except (struct.error, KeyError, UnicodeDecodeError, OverflowError) as error:
        raise ModelError(f"{path}: its header is damaged or cut short; fetch the file again") from error
    if version < 2 or not _is_plain_llama(fields, tensors):
        return None
    alignment = fields.get("general.alignment", 32)
    start = -(-reader.position() // alignment) * alignment
    try:
        weights = _weights(path, data[start:], tensors, fields)
    except (ValueError, NotImplementedError):  # a kind of quantisation that is new to the gguf package
        return None
    return _model(fields, weights, dtype), _tokenizer(fields)


def _is_plain_llama(fields: dict[str, Any], tensors: list[_TensorInfo]) -> bool:
    said = {name for name in fields if name.startswith("llama.")}
    return (
        fields.get("general.architecture") == "llama"
        and _REQUIRED <= said <= _REQUIRED | {"llama.vocab_size"}
        and fields.get("tokenizer.ggml.model") == "gpt2"
        and fields.get("tokenizer.ggml.pre") == "smollm"
        and all(_name(info.name) is not None for info in tensors)
    )


def _name(name: str) -> str | None:
    match = re.fullmatch(r"(?:blk\.(\d+)\.)?(\w+)\.weight", name)
    if match is None or match[2] not in _NAMES:
        return None
    return f"model.layers.{match[1]}.{_NAMES[match[2]]}.weight" if match[1] else f"{_NAMES[match[2]]}.weight"


def _weights(
    path: Path, data: "np.ndarray[Any, Any]", tensors: list[_TensorInfo], fields: dict[str, Any]
) -> dict[str, torch.Tensor]:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    heads = {"attn_q": fields["llama.attention.head_count"], "attn_k": fields["llama.attention.head_count_kv"]}
    weights = {}
    for info in tensors:
        kind = GGMLQuantizationType(info.kind)
        per_block, block_bytes = GGML_QUANT_SIZES[kind]
        rows, row_bytes = int(np.prod(info.shape[:-1])), info.shape[-1] // per_block * block_bytes
        raw = data[info.offset : info.offset + rows * row_bytes]
        if raw.size < rows * row_bytes:
            raise ModelError(f"{path}: ends in the middle of {info.name}; fetch the file again")
        values = dequantize(raw.reshape(rows, row_bytes), kind).reshape(info.shape)
        part = info.name.split(".")[-2]
        if part in heads:  # rows are interleaved for the other form of RoPE
            halves = values.reshape(heads[part], values.shape[0] // heads[part] // 2, 2, -1)
            values = halves.swapaxes(1, 2).reshape(values.shape)
        name = _name(info.name)
        assert name is not None, "checked by _is_plain_llama"
        weights[name] = torch.from_numpy(np.array(values, dtype=np.float32))
    return weights


def _model(fields: dict[str, Any], weights: dict[str, torch.Tensor], dtype: torch.dtype) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    tied = "lm_head.weight" not in weights
    config = LlamaConfig(
        vocab_size=weights["model.embed_tokens.weight"].shape[0],
        hidden_size=fields["llama.embedding_length"],
        intermediate_size=fields["llama.feed_forward_length"],
        num_hidden_layers=fields["llama.block_count"],
        num_attention_heads=fields["llama.attention.head_count"],
        num_key_value_heads=fields["llama.attention.head_count_kv"],
        head_dim=fields["llama.rope.dimension_count"],
        max_position_embeddings=fields["llama.context_length"],
        rms_norm_eps=fields["llama.attention.layer_norm_rms_epsilon"],
        rope_parameters={"rope_type": "default", "rope_theta": fields["llama.rope.freq_base"]},
        tie_word_embeddings=tied,
        bos_token_id=fields.get("tokenizer.ggml.bos_token_id"),
        eos_token_id=fields.get("tokenizer.ggml.eos_token_id"),
        pad_token_id=fields.get("tokenizer.ggml.padding_token_id"),
    )
    return LlamaForCausalLM.from_pretrained(None, config=config, state_dict=weights, dtype=dtype)


def _tokenizer(fields: dict[str, Any]) -> Any:
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    tokens, kinds = fields["tokenizer.ggml.tokens"], fields["tokenizer.ggml.token_type"]
    merges = [tuple(merge.split(" ")) for merge in fields["tokenizer.ggml.merges"]]
    backend = Tokenizer(BPE({token: number for number, token in enumerate(tokens)}, merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == _CONTROL]
    )
    backend.add_tokens(
        [AddedToken(t, normalized=False) for t, k in zip(tokens, kinds, strict=True) if k == _USER_DEFINED]
    )
    named = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {role: fields.get(f"tokenizer.ggml.{name}_token_id") for role, name in named.items()}
    return PreTrainedTokenizerFast(  # type: ignore[no-untyped-call]  # transformers'
        tokenizer_object=backend,
        chat_template=fields.get("tokenizer.chat_template"),
        model_max_length=fields["llama.context_length"],
        **{role: tokens[number] for role, number in ids.items() if number is not None},
    )
