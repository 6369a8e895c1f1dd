"""Tiny random models of many families, and what transformers itself generates with them."""

import copy
from array import array
from collections.abc import Sequence
from typing import Any

import torch
import transformers

VOCABULARY = 96

_SHAPE = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
_IDS = {"bos_token_id": 1, "eos_token_id": None, "pad_token_id": 0}
_ALL = {**_SHAPE, **_HEADS, **_IDS}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama, GQA, tied": ("Llama", {**_ALL, "tie_word_embeddings": True}),
    "llama, MHA, untied": ("Llama", {**_ALL, "num_key_value_heads": 4, "tie_word_embeddings": False}),
    "llama, MQA, RoPE scaling": (
        "Llama",
        {
            **_ALL,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0},
        },
    ),
    "qwen2": ("Qwen2", _ALL),
    "qwen2, window in later layers": (
        "Qwen2",
        {**_ALL, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1},
    ),
    "qwen3": ("Qwen3", {**_ALL, "head_dim": 16}),
    "mistral, sliding window": ("Mistral", {**_ALL, "sliding_window": 11, "head_dim": 8}),
    "gemma2, softcap, alternating window": ("Gemma2", {**_ALL, "head_dim": 8, "sliding_window": 9}),
    "gemma3, alternating window": (
        "Gemma3Text",
        {**_ALL, "head_dim": 8, "sliding_window": 9, "sliding_window_pattern": 2},
    ),
    "gpt-neox, partial rotary": (
        "GPTNeoX",
        {**_SHAPE, **_IDS, "num_attention_heads": 4, "max_position_embeddings": 256},
    ),
    "phi, partial rotary": ("Phi", {**_ALL, "num_key_value_heads": 4}),
    "phi3": ("Phi3", _ALL),
    "gpt2, learned positions": (
        "GPT2",
        {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": 256, **_IDS},
    ),
    "mixtral, experts": ("Mixtral", {**_ALL, "num_local_experts": 4, "sliding_window": None}),
    "gpt-oss, sinks, experts, alternating window": (
        "GptOss",
        {**_ALL, "head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 10},
    ),
    "olmo2": ("Olmo2", _ALL),
    "cohere": ("Cohere", _ALL),
}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "mamba": ("Mamba", {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}, "recurrent"),
    "linear attention": (
        "Qwen3Next",
        {**_ALL, "head_dim": 8, "num_experts": 4, "linear_num_value_heads": 4, "linear_num_key_heads": 2},
        "recurrent",
    ),
    "MLA": (
        "DeepseekV3",
        {**_ALL, "num_key_value_heads": 4, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8},
        "MLA",
    ),
    "ALiBi": ("Bloom", {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}, "attention"),
}


def make_model(family: str, options: dict[str, Any], *, seed: int = 0) -> Any:
    """A model with random weights, large enough that greedy choices are clear."""
    torch.manual_seed(seed)
    config = getattr(transformers, f"{family}Config")(**options)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.4 / parameter.shape[-1] ** 0.25)
    return model


def tiny_model(*, seed: int = 0) -> Any:
    """The first family."""
    return make_model(*next(iter(FAMILIES.values())), seed=seed)


def reference(model: Any, prompts: Sequence[Sequence[int]], *, num_tokens: int) -> list[list[int]]:
    """What transformers' own `generate` says, greedy, one prompt at a time. Leaves the model alone."""
    model = copy.deepcopy(model)
    model.set_attn_implementation("eager")
    return [generate(model, prompt, num_tokens=num_tokens) for prompt in prompts]


def generate(model: Any, prompt: Sequence[int], *, num_tokens: int, eos: bool = True) -> list[int]:
    """Greedy tokens after one prompt, by transformers; eos=False goes on after the model's own end."""
    model.generation_config.eos_token_id = model.generation_config.eos_token_id if eos else None
    ids = torch.tensor([list(prompt)])
    with torch.inference_mode():
        out = model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=num_tokens, do_sample=False, pad_token_id=0
        )
    return list(out[0, len(prompt) :].tolist())


def random_prompts(lengths: Sequence[int], *, seed: int = 0) -> list[list[int]]:
    """Random token ids."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(2, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]


def int32(tokens: Sequence[int]) -> bytes:
    """Tokens as connectors get them."""
    return array("i", tokens).tobytes()


def byte_tokenizer() -> Any:
    """One token per byte, and two special ones: 256 ends a text, 257 begins one."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE

    alphabet = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    backend = Tokenizer(BPE(alphabet, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<end>", "<begin>"])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>", bos_token="<begin>")
    tokenizer.chat_template = "{% for m in messages %}<begin>{{ m.role }}: {{ m.content }}\n{% endfor %}"
    return tokenizer


def byte_model(*, seed: int = 0) -> Any:
    """A tiny model over the tokens of `byte_tokenizer`."""
    return make_model("Llama", {**_ALL, "vocab_size": 258, "eos_token_id": 256, "bos_token_id": 257}, seed=seed)
