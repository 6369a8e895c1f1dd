"""What is known of a model besides its identity: enough to say in which respect two models differ.

The identity alone decides whether KV fits. These are for packs, which carry them to machines that have another model at hand.
Standard library only; `engine.facts` reads them off a model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, slots=True)
class ModelFacts:
    """A model and what turns text into its tokens. Digests are SHA-256 in hex.

    identity: of the weights and all settings that decide KV; part of every key.  rope: settings of the rotary embedding, as
    the model's config has them.  config: all settings that decide KV, `rope` among them.
    tokenizer_sha256, chat_template_sha256: None where there is none.
    """

    identity: str
    architecture: str
    rope: Mapping[str, Any] = field(default_factory=dict)  # Any: JSON
    config: Mapping[str, Any] = field(default_factory=dict)  # Any: JSON
    tokenizer_sha256: str | None = None
    chat_template_sha256: str | None = None


def differing(theirs: ModelFacts, ours: ModelFacts) -> list[str]:
    """What differs between two models, for people, the most telling first; empty when nothing does."""
    found = []
    if theirs.architecture != ours.architecture:
        found.append(f"architecture {theirs.architecture}, here {ours.architecture}")
    for prefix, one, other in (("rope ", theirs.rope, ours.rope), ("", theirs.config, ours.config)):
        for name in sorted(one.keys() | other.keys()):
            if one.get(name) != other.get(name) and not any(line.startswith(f"rope {name} ") for line in found):
                found.append(f"{prefix}{_shown(name)} {_shown(one.get(name))}, here {_shown(other.get(name))}")
    if theirs.identity != ours.identity and not found:
        found.append(f"weights (model identity {theirs.identity}, here {ours.identity})")
    for name in ("tokenizer", "chat_template"):
        one, other = getattr(theirs, f"{name}_sha256"), getattr(ours, f"{name}_sha256")
        if one != other:
            label = name.replace("_", " ")
            found.append(f"{label} {one[:12] if one else 'none'}, here {other[:12] if other else 'none'}")
    return found


def _shown(value: object) -> str:
    """A value for a terminal: it may be a stranger's."""
    text = "not set" if value is None else str(value)[:80]
    return text if text.isprintable() else "".join(each if each.isprintable() else "?" for each in text)
