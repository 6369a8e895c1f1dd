"""KV sizes of models whose configs are public, against sums done by hand, and of small models against a real cache."""

import json
import struct
from pathlib import Path
from typing import Any

import pytest

from tierkv.errors import ModelError
from tierkv.model_files import model_config
from tierkv.sizes import KVSize, LayerGroup, kv_size

Json = dict[str, Any]

LLAMA_2_7B: Json = {
    "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "torch_dtype": "float16",
}  # fmt: skip
LLAMA_3_8B: Json = {
    "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_hidden_layers": 32, "torch_dtype": "bfloat16",
}  # fmt: skip
MISTRAL_7B: Json = LLAMA_3_8B | {"model_type": "mistral", "sliding_window": 4096}
FALCON_7B: Json = {
    "model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "num_hidden_layers": 32, "num_kv_heads": 71,
    "multi_query": True, "new_decoder_architecture": False, "torch_dtype": "bfloat16",
}  # fmt: skip
FALCON_40B: Json = FALCON_7B | {
    "hidden_size": 8192, "num_attention_heads": 128, "num_hidden_layers": 60, "num_kv_heads": 8, "new_decoder_architecture": True,
}  # fmt: skip
STARCODER: Json = {
    "model_type": "gpt_bigcode", "n_embd": 6144, "n_head": 48, "n_layer": 40, "multi_query": True, "torch_dtype": "float16",
}  # fmt: skip
GPT2: Json = {"model_type": "gpt2", "n_embd": 768, "n_head": 12, "n_layer": 12}
QWEN2_7B: Json = {
    "model_type": "qwen2", "hidden_size": 3584, "num_attention_heads": 28, "num_key_value_heads": 4, "num_hidden_layers": 28,
    "use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 28, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_06B: Json = {
    "model_type": "qwen3", "hidden_size": 1024, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    "num_hidden_layers": 28, "sliding_window": None, "torch_dtype": "bfloat16",
}  # fmt: skip
DEEPSEEK_V3: Json = {
    "model_type": "deepseek_v3", "hidden_size": 7168, "num_attention_heads": 128, "num_key_value_heads": 128,
    "num_hidden_layers": 61, "kv_lora_rank": 512, "qk_rope_head_dim": 64, "qk_nope_head_dim": 128, "v_head_dim": 128,
    "torch_dtype": "bfloat16",
}  # fmt: skip
GEMMA_2_9B: Json = {
    "model_type": "gemma2", "hidden_size": 3584, "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256,
    "num_hidden_layers": 42, "sliding_window": 4096, "torch_dtype": "bfloat16",
}  # fmt: skip
GEMMA_3_27B: Json = {
    "model_type": "gemma3", "torch_dtype": "bfloat16", "vision_config": {"num_hidden_layers": 27, "hidden_size": 1152},
    "text_config": {
        "model_type": "gemma3_text", "hidden_size": 5376, "num_attention_heads": 32, "num_key_value_heads": 16,
        "head_dim": 128, "num_hidden_layers": 62, "sliding_window": 1024,
    },
}  # fmt: skip
GEMMA_3_4B: Json = {  # its file leaves the heads to the code
    "model_type": "gemma3", "torch_dtype": "bfloat16",
    "text_config": {"model_type": "gemma3_text", "hidden_size": 2560, "num_hidden_layers": 34, "sliding_window": 1024},
}  # fmt: skip
GPT_OSS_20B: Json = {
    "model_type": "gpt_oss", "hidden_size": 2880, "num_attention_heads": 64, "num_key_value_heads": 8, "head_dim": 64,
    "num_hidden_layers": 24, "sliding_window": 128, "layer_types": ["sliding_attention", "full_attention"] * 12,
    "dtype": "bfloat16",
}  # fmt: skip
CHATGLM3: Json = {
    "model_type": "chatglm", "hidden_size": 4096, "num_attention_heads": 32, "kv_channels": 128, "num_layers": 28,
    "multi_query_attention": True, "multi_query_group_num": 2, "torch_dtype": "float16",
}  # fmt: skip
DBRX: Json = {
    "model_type": "dbrx", "d_model": 6144, "n_heads": 48, "n_layers": 40, "attn_config": {"kv_n_heads": 8},
    "torch_dtype": "bfloat16",
}  # fmt: skip
JAMBA: Json = {
    "model_type": "jamba", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_hidden_layers": 32, "attn_layer_period": 8, "attn_layer_offset": 4, "torch_dtype": "bfloat16",
}  # fmt: skip
QWEN3_NEXT: Json = {
    "model_type": "qwen3_next", "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 2, "head_dim": 256,
    "num_hidden_layers": 48, "full_attention_interval": 4, "torch_dtype": "bfloat16",
}  # fmt: skip
MLLAMA_11B: Json = {
    "model_type": "mllama",
    "text_config": {
        "model_type": "mllama_text_model", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
        "num_hidden_layers": 40, "cross_attention_layers": [3, 8, 13, 18, 23, 28, 33, 38], "torch_dtype": "bfloat16",
    },
}  # fmt: skip
GEMMA_3N: Json = {
    "model_type": "gemma3n_text", "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256, "hidden_size": 2048,
    "num_hidden_layers": 35, "num_kv_shared_layers": 15, "sliding_window": 512, "torch_dtype": "bfloat16",
    "layer_types": (["sliding_attention"] * 4 + ["full_attention"]) * 7,
}  # fmt: skip
OPEN_ELM: Json = {
    "model_type": "openelm", "model_dim": 1280, "head_dim": 64, "num_transformer_layers": 4, "num_kv_heads": [3, 3, 4, 5],
    "num_query_heads": [12, 12, 16, 20],
    "torch_dtype": "float16",
}  # fmt: skip

# Layers that keep KV x (K and V) x heads x width x bytes, by hand.
KNOWN = [
    ("Llama 2 7B", LLAMA_2_7B, 524_288, "MHA"),  # 32 x 2 x 32 x 128 x 2
    ("Llama 3 8B", LLAMA_3_8B, 131_072, "GQA"),  # 32 x 2 x 8 x 128 x 2
    ("Mistral 7B v0.1", MISTRAL_7B, 131_072, "GQA"),
    ("Falcon 7B", FALCON_7B, 8_192, "MQA"),  # 32 x 2 x 1 x 64 x 2
    ("Falcon 40B", FALCON_40B, 122_880, "GQA"),  # 60 x 2 x 8 x 64 x 2
    ("StarCoder", STARCODER, 20_480, "MQA"),  # 40 x 2 x 1 x 128 x 2
    ("GPT-2, bf16 assumed", GPT2, 36_864, "MHA"),  # 12 x 2 x 12 x 64 x 2
    ("Qwen2 7B", QWEN2_7B, 57_344, "GQA"),  # 28 x 2 x 4 x 128 x 2
    ("Qwen3 0.6B", QWEN3_06B, 114_688, "GQA"),  # 28 x 2 x 8 x 128 x 2
    ("DeepSeek V3", DEEPSEEK_V3, 70_272, "MLA"),  # 61 x (512 + 64) x 2
    ("Gemma 2 9B", GEMMA_2_9B, 344_064, "GQA"),  # 42 x 2 x 8 x 256 x 2
    ("Gemma 3 27B", GEMMA_3_27B, 507_904, "GQA"),  # 62 x 2 x 16 x 128 x 2
    ("Gemma 3 4B", GEMMA_3_4B, 139_264, "GQA"),  # 34 x 2 x 4 x 256 x 2
    ("gpt-oss 20B", GPT_OSS_20B, 49_152, "GQA"),  # 24 x 2 x 8 x 64 x 2
    ("ChatGLM3 6B", CHATGLM3, 28_672, "GQA"),  # 28 x 2 x 2 x 128 x 2
    ("DBRX", DBRX, 163_840, "GQA"),  # 40 x 2 x 8 x 128 x 2
    ("Jamba v0.1", JAMBA, 16_384, "GQA"),  # 4 of 32 layers: 4 x 2 x 8 x 128 x 2
    ("Qwen3-Next 80B", QWEN3_NEXT, 24_576, "GQA"),  # 12 of 48 layers: 12 x 2 x 2 x 256 x 2
    ("Llama 3.2 11B Vision", MLLAMA_11B, 131_072, "GQA"),  # 40 - 8 layers
    ("Gemma 3n E4B", GEMMA_3N, 40_960, "GQA"),  # (35 - 15) x 2 x 2 x 256 x 2
    ("OpenELM, cut", OPEN_ELM, 3_840, "GQA"),  # 2 x (3 + 3 + 4 + 5) x 64 x 2
]


@pytest.mark.parametrize(("name", "config", "token_bytes", "attention"), KNOWN, ids=[row[0] for row in KNOWN])
def test_bytes_per_token_of_known_model(name: str, config: Json, token_bytes: int, attention: str) -> None:
    size = kv_size(config)
    assert size.token_bytes == token_bytes
    assert size.attention == attention
    assert size.sequence_bytes(1) == token_bytes


@pytest.mark.parametrize(
    ("dtype", "factor"), [("fp32", 2), ("float16", 1), ("bf16", 1), ("fp8", 0.5), ("int8", 0.5), ("FP8_E4M3", 0.5)]
)
def test_dtype_can_be_given(dtype: str, factor: float) -> None:
    size = kv_size(LLAMA_3_8B, dtype=dtype)
    assert size.token_bytes == 131_072 * factor
    assert not size.dtype_assumed


def test_dtype_that_a_config_does_not_say_is_assumed_and_said_so() -> None:
    assert kv_size(GPT2).dtype_assumed
    assert kv_size(GPT2).dtype == "bfloat16"
    assert kv_size(GEMMA_3_27B).dtype == "bfloat16"
    assert not kv_size(GEMMA_3_27B).dtype_assumed  # it stands outside text_config


def test_window_bounds_what_a_sequence_keeps() -> None:
    size = kv_size(MISTRAL_7B)
    assert size.groups == (LayerGroup(32, 2048, 4096),)
    assert size.sequence_bytes(1000) == 1000 * 131_072
    assert size.sequence_bytes(32_768) == 4096 * 131_072


@pytest.mark.parametrize(
    ("config", "sliding", "full"),
    [(GEMMA_2_9B, 21, 21), (GEMMA_3_27B, 52, 10), (GEMMA_3_4B, 29, 5), (GPT_OSS_20B, 12, 12), (GEMMA_3N, 16, 4)],
    ids=["gemma2", "gemma3 27B", "gemma3 4B", "gpt-oss", "gemma3n"],
)
def test_layers_alternate_as_the_model_says(config: Json, sliding: int, full: int) -> None:
    counts = {group.window is not None: group.num_layers for group in kv_size(config).groups}
    assert counts == {True: sliding, False: full}


def test_alternating_windows_add_up() -> None:
    # 52 layers keep 1,024 tokens, 10 keep all: (52 x 1,024 + 10 x 131,072) x 2 x 16 x 128 x 2 bytes
    assert kv_size(GEMMA_3_27B).sequence_bytes(131_072) == (52 * 1024 + 10 * 131_072) * 8192


def test_pattern_of_letters_is_read() -> None:
    config = LLAMA_3_8B | {"sliding_window": 4096, "sliding_window_pattern": "LLLG"}
    assert kv_size(config).groups == (LayerGroup(24, 2048, 4096), LayerGroup(8, 2048))


def test_first_layers_may_be_whole() -> None:
    config = QWEN2_7B | {"use_sliding_window": True, "max_window_layers": 20, "sliding_window": 4096}
    assert kv_size(config).groups == (LayerGroup(20, 1024), LayerGroup(8, 1024, 4096))


def test_chunked_attention_is_bounded_by_its_chunk() -> None:
    scout = LLAMA_3_8B | {"model_type": "llama4_text", "num_hidden_layers": 48, "attention_chunk_size": 8192}
    assert kv_size(scout).groups == (LayerGroup(36, 2048, 8192), LayerGroup(12, 2048))


def test_recurrent_layers_are_counted_but_keep_no_kv() -> None:
    assert (kv_size(JAMBA).num_layers, kv_size(JAMBA).state_layers) == (4, 28)
    nemotron = LLAMA_3_8B | {"num_hidden_layers": 8, "hybrid_override_pattern": "M-M*M-M*"}
    assert (kv_size(nemotron).num_layers, kv_size(nemotron).state_layers) == (2, 6)


def test_full_layers_may_have_other_heads() -> None:
    config = GEMMA_2_9B | {
        "model_type": "gemma4_text", "num_hidden_layers": 6, "sliding_window_pattern": 6, "global_head_dim": 512,
        "attention_k_eq_v": True, "num_global_key_value_heads": 2,
    }  # fmt: skip
    assert kv_size(config).groups == (LayerGroup(5, 8 * 512, 4096), LayerGroup(1, 2 * 1024))


@pytest.mark.parametrize(
    ("config", "told"),
    [
        ({"model_type": "mamba2", "num_hidden_layers": 48}, "state-space model"),
        ({"model_type": "x", "layer_types": ["linear_attention"] * 2}, "no layer attends"),
        ({"model_type": "t5", "is_encoder_decoder": True, "num_layers": 12}, "encoder-decoder"),
        ({"model_type": "bert", "num_hidden_layers": 12, "hidden_size": 768}, "an encoder"),
        ({"architectures": ["UNet"], "in_channels": 4}, "not the config of a language model"),
        ({}, "not the config of a language model"),
        (LLAMA_3_8B | {"layer_types": ["quantum_attention"] * 32}, "quantum_attention"),
        (LLAMA_3_8B | {"num_hidden_layers": "32"}, "num_hidden_layers = '32'"),
        (LLAMA_3_8B | {"num_hidden_layers": True}, "num_hidden_layers = True"),
        (LLAMA_3_8B | {"num_key_value_heads": 0}, "num_key_value_heads = 0"),
        (LLAMA_3_8B | {"hidden_size": -4096}, "hidden_size = -4096"),
        (LLAMA_3_8B | {"hidden_size": 16}, "hidden_size = 16"),
        (LLAMA_3_8B | {"layer_types": 7}, "layer_types = 7"),
        (LLAMA_3_8B | {"sliding_window": 10, "sliding_window_pattern": -1}, "sliding_window_pattern = -1"),
        (LLAMA_3_8B | {"attn_layer_period": "x"}, "attn_layer_period = 'x'"),
        (LLAMA_3_8B | {"num_kv_shared_layers": "x"}, "num_kv_shared_layers = 'x'"),
        (LLAMA_3_8B | {"cross_attention_layers": 3}, "cross_attention_layers = 3"),
        ({"model_type": "llama", "num_hidden_layers": 32, "num_attention_heads": 4}, "no hidden_size"),
        ({"model_type": "llama", "num_hidden_layers": 32, "hidden_size": 64}, "no num_attention_heads"),
        (DEEPSEEK_V3 | {"qk_rope_head_dim": None}, "no qk_rope_head_dim"),
    ],
)
def test_what_has_no_kv_of_known_size_is_refused(config: Json, told: str) -> None:
    with pytest.raises(ModelError) as caught:
        kv_size(config)
    assert told in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_dtype_is_refused() -> None:
    with pytest.raises(ModelError, match=r"dtype 'fp7': expected one of .*bfloat16"):
        kv_size(LLAMA_3_8B, dtype="fp7")


# --- against transformers' own cache


TINY = {
    "vocab_size": 32, "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "sliding_window": 8, "pad_token_id": 0,
}  # fmt: skip


@pytest.mark.parametrize(
    "model_type", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "gpt_neox", "phi3"]
)
def test_size_equals_the_cache_of_a_real_model(model_type: str, tmp_path: Path) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = TINY if model_type != "gpt_neox" else TINY | {"num_key_value_heads": 4, "rotary_pct": 1.0}
    config = AutoConfig.for_model(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.inference_mode():
        cache = model(torch.ones((1, 5), dtype=torch.long), use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    config.save_pretrained(tmp_path)
    assert kv_size(model_config(str(tmp_path)), dtype="float32").sequence_bytes(5) == held


# --- where configs are found


def gguf(**values: Any) -> bytes:
    def text(value: str) -> bytes:
        return struct.pack("<Q", len(value.encode())) + value.encode()

    def one(value: Any) -> bytes:
        if isinstance(value, str):
            return struct.pack("<I", 8) + text(value)
        if isinstance(value, list):
            return struct.pack("<IIQ", 9, 4, len(value)) + struct.pack(f"<{len(value)}I", *value)
        return struct.pack("<II", 4, value)

    body = b"".join(text(key.replace("__", ".")) + one(value) for key, value in values.items())
    return b"GGUF" + struct.pack("<IQQ", 3, 0, len(values)) + body


def sized(path: Path) -> KVSize:
    return kv_size(model_config(str(path)))


def test_model_is_a_folder_or_its_config(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3_8B))
    assert sized(tmp_path) == sized(tmp_path / "config.json") == kv_size(LLAMA_3_8B)


def test_model_is_a_gguf_file(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(
        gguf(
            general__architecture="llama",
            llama__block_count=32,
            llama__embedding_length=4096,
            llama__attention__head_count=32,
            llama__attention__head_count_kv=8,
        )
    )
    assert sized(path).token_bytes == 131_072


def test_gguf_of_alternating_windows_and_latents_is_understood(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    path.write_bytes(
        gguf(
            general__architecture="gemma3",
            gemma3__block_count=34,
            gemma3__attention__head_count=8,
            gemma3__attention__head_count_kv=4,
            gemma3__attention__key_length=256,
            gemma3__attention__value_length=256,
            gemma3__attention__sliding_window=1024,
        )
    )
    assert sized(path).groups == kv_size(GEMMA_3_4B).groups
    path.write_bytes(
        gguf(
            general__architecture="deepseek2",
            deepseek2__block_count=61,
            deepseek2__attention__head_count=128,
            deepseek2__attention__head_count_kv=128,
            deepseek2__attention__key_length=192,
            deepseek2__attention__value_length=128,
            deepseek2__attention__kv_lora_rank=512,
            deepseek2__rope__dimension_count=64,
        )
    )
    assert (sized(path).token_bytes, sized(path).attention) == (70_272, "MLA")


@pytest.mark.model
def test_smollm2_is_found_in_its_wheel() -> None:
    size = kv_size(model_config("smollm2"))
    assert (size.token_bytes, size.num_layers, size.attention) == (23_040, 30, "GQA")


def test_truncated_or_senseless_gguf_is_refused(tmp_path: Path) -> None:
    whole = gguf(general__architecture="llama", llama__block_count=32, llama__heads=[1, 2, 3])
    path = tmp_path / "model.gguf"
    broken = [whole[:cut] for cut in range(4, len(whole), 3)]
    broken += [b"GGUF" + b"\xff" * 64, whole[:24] + b"\xff" * 8 + whole[32:]]
    for data in broken:
        path.write_bytes(data)
        with pytest.raises(ModelError, match="damaged GGUF"):
            model_config(str(path))


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"", "neither JSON nor GGUF"), (b"\x00\xff", "neither"), (b"[]", "holds list"), (b"[" * 100_000, "neither")],
)
def test_file_that_is_no_config_is_refused(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "config.json"
    path.write_bytes(content)
    with pytest.raises(ModelError, match=told):
        model_config(str(path))


def test_path_that_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"is not a model folder: it has no config\.json"):
        model_config(str(tmp_path))
    with pytest.raises(ModelError, match="does not exist: give a model folder"):
        model_config(str(tmp_path / "absent"))
