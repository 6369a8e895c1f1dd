"""Reads the facts of a model, and the digests that packs keep of it."""

import hashlib
import json
from typing import Any

import torch

from tierkv.engine.loading import Model, Tokenizer, kv_settings
from tierkv.facts import ModelFacts


def facts_of(model: Model, tokenizer: Tokenizer | None, *, identity: str) -> ModelFacts:
    """The facts of a loaded model. identity: as `loading.identity` tells it."""
    settings: dict[str, Any] = json.loads(json.dumps(kv_settings(model), default=str))  # as they are read back later
    rope = {name: value for name, value in settings.items() if "rope" in name or "rotary" in name}
    rope |= settings.pop("rope_parameters", None) or {}
    rope.pop("rope_parameters", None)
    return ModelFacts(
        identity=identity,
        architecture=type(model).__name__,
        rope=rope,
        config={name: value for name, value in settings.items() if name not in rope},
        tokenizer_sha256=tokenizer_digest(tokenizer),
        chat_template_sha256=_sha256(getattr(tokenizer, "chat_template", None)),
    )


def tokenizer_digest(tokenizer: Tokenizer | None) -> str | None:
    """SHA-256 of what turns text into tokens: the serialised pipeline of a fast tokenizer, the vocabulary of another."""
    if tokenizer is None:
        return None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return _sha256(json.dumps(sorted(tokenizer.get_vocab().items()), ensure_ascii=False))
    pipeline = json.loads(backend.to_str())
    for name in ("truncation", "padding"):  # of the last call, not of the tokenizer
        pipeline.pop(name, None)
    return _sha256(json.dumps(pipeline, sort_keys=True, ensure_ascii=False))


def weights_digest(model: Model) -> str:
    """SHA-256 of every parameter: name, shape, dtype and bytes, by name."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        digest.update(f"{name}{tuple(parameter.shape)}{parameter.dtype}".encode())
        data = parameter.detach().cpu().contiguous().reshape(-1)
        digest.update(memoryview(data.view(torch.uint8).numpy()))
    return digest.hexdigest()


def _sha256(text: object) -> str | None:
    if text is None:
        return None
    if not isinstance(text, str):  # several templates by name
        text = json.dumps(text, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()
