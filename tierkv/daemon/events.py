"""What the daemon tells routers: which blocks a tier holds and forgets, and when they must forget all they were told.

    index -- stored, removed --> EventLog -- take --> encode           subscribers of the daemon's own protocol
                                                  \\-> VllmEncoder      routers that read the KV events of vLLM

A subscriber may know less than is true, never more: a log that had to drop events says `cleared` in their place.
No I/O and no asyncio here; sockets are in zmq_events.py.
"""

from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from threading import Lock
from typing import Any, Final, cast

import msgpack
import numpy as np

from tierkv.errors import ConfigError
from tierkv.keys import KEY_BYTES, Key

MEDIA: Final[Mapping[str, str]] = {
    "device": "GPU",
    "host": "CPU",
    "disk": "DISK",
    "redis": "EXTERNAL",
    "object": "EXTERNAL",
    "daemon": "EXTERNAL",
}
"""What routers call a tier. "CPU" is what vLLM says and all read. vLLM from 0.27 says "STORAGE" for disks, which Dynamo takes
for a GPU before ai-dynamo/dynamo#11571; it reads "DISK", as SGLang says, in every version. llm-d weighs either as it is
configured to (`kvCacheBackendConfigs`)."""

BATCH_BYTES: Final = 1 << 18
"""Keys and tokens of one batch, unless a single event has more."""

MAX_EVENTS: Final = 64
"""Of one message of the daemon's own protocol."""

_EVENT_BYTES: Final = 256  # of memory, beside keys and tokens

_Told = tuple[int, Key | None, int, bytes, bytes]  # tier, parent, depth, keys, tokens


class Kind(Enum):
    """What an event says."""

    STORED = "stored"
    """A tier holds these blocks from now on."""
    REMOVED = "removed"
    """A tier holds them no longer."""
    CLEARED = "cleared"
    """Whatever was told before is void, for every tier; what follows holds."""


@dataclass(frozen=True, slots=True)
class Event:
    """One thing a subscriber must know.

    sequence: numbers of one log rise by one, but before `cleared`, which has the number of the last event it stands for.
    keys: of consecutive blocks of one path, concatenated.  parent, depth, tokens (int32-LE): of `stored` alone; the parent
    at depth 0 is the root of a namespace, which names no block.  tier: None when cleared.
    """

    kind: Kind
    sequence: int
    tier: str | None = None
    parent: Key | None = None
    depth: int = 0
    keys: bytes = b""
    tokens: bytes = b""


class EventLog:
    """What an index told and nobody took yet, in order. Thread-safe; a listener of an index: quick, calls nothing back.

    tiers: their names, by the number the index tells.  capacity_bytes: of memory; past it the oldest events are dropped,
    and the next `take` begins with `cleared`. Raises ConfigError for a capacity below one event.
    """

    def __init__(self, tiers: Sequence[str], *, capacity_bytes: int = 64 << 20) -> None:
        if capacity_bytes < _EVENT_BYTES:
            raise ConfigError(f"{capacity_bytes} bytes for waiting events: at least {_EVENT_BYTES} are needed")
        self._tiers = tuple(tiers)
        self._capacity_bytes = capacity_bytes
        self._lock = Lock()
        self._waiting: deque[_Told] = deque()
        self._waiting_bytes = 0
        self._first = 0  # the sequence of the oldest one waiting
        self._void = False  # what came before the oldest one waiting was not told
        self._num_dropped = 0

    def __len__(self) -> int:
        """Events that wait to be taken."""
        with self._lock:
            return len(self._waiting) + self._void

    @property
    def num_dropped(self) -> int:
        """Events lost for room since the start."""
        return self._num_dropped

    def cleared(self) -> Event:
        """What lets somebody new forget what he knew of it before: what is taken next comes after this."""
        with self._lock:
            return Event(Kind.CLEARED, self._first - 1)

    def stored(self, tier: int, parent: Key, depth: int, keys: bytes, tokens: bytes) -> None:
        """A tier holds these blocks from now on."""
        self._append((tier, parent, depth, keys, tokens))

    def removed(self, tier: int, keys: bytes) -> None:
        """A tier holds these blocks no longer."""
        self._append((tier, None, 0, keys, b""))

    def clear(self) -> None:
        """Let subscribers forget whatever they know: said at a start, for those who knew the daemon before it."""
        with self._lock:
            self._first += len(self._waiting) + (not self._waiting)
            self._waiting.clear()
            self._waiting_bytes = 0
            self._void = True

    def take(self) -> list[Event]:
        """What was told since the last call."""
        with self._lock:
            told, self._waiting = self._waiting, deque()
            first, void = self._first, self._void
            self._first += len(told)
            self._waiting_bytes = 0
            self._void = False
        events = [Event(Kind.CLEARED, first - 1)] if void else []
        tiers = self._tiers
        for sequence, (tier, parent, depth, keys, tokens) in enumerate(told, first):
            kind = Kind.REMOVED if parent is None else Kind.STORED
            events.append(Event(kind, sequence, tiers[tier], parent, depth, keys, tokens))
        return events

    def _append(self, told: _Told) -> None:
        with self._lock:
            waiting = self._waiting
            waiting.append(told)
            self._waiting_bytes += _EVENT_BYTES + len(told[3]) + len(told[4])
            while self._waiting_bytes > self._capacity_bytes:
                oldest = waiting.popleft()
                self._waiting_bytes -= _EVENT_BYTES + len(oldest[3]) + len(oldest[4])
                self._first += 1
                self._num_dropped += 1
                self._void = True


def batches(events: Sequence[Event]) -> Iterator[list[Event]]:
    """Events in order, BATCH_BYTES and MAX_EVENTS of them at a time. Of a larger one come parts, which share its number."""
    batch: list[Event] = []
    num_bytes = 0
    for event in events:
        for part in _parts(event):
            part_bytes = len(part.keys) + len(part.tokens)
            if batch and (num_bytes + part_bytes > BATCH_BYTES or len(batch) == MAX_EVENTS):
                yield batch
                batch, num_bytes = [], 0
            batch.append(part)
            num_bytes += part_bytes
    if batch:
        yield batch


def _parts(event: Event) -> Iterator[Event]:
    num_keys, num_bytes = len(event.keys) // KEY_BYTES, len(event.keys) + len(event.tokens)
    if num_bytes <= BATCH_BYTES:
        yield event
        return
    step, token_bytes = max(1, BATCH_BYTES * num_keys // num_bytes), len(event.tokens) // num_keys
    parent, stored = event.parent, event.kind is Kind.STORED
    for lo in range(0, num_keys, step):
        keys = event.keys[lo * KEY_BYTES : (lo + step) * KEY_BYTES]
        tokens = event.tokens[lo * token_bytes : (lo + step) * token_bytes]
        yield replace(event, parent=parent, depth=event.depth + lo * stored, keys=keys, tokens=tokens)
        parent = Key(keys[-KEY_BYTES:]) if stored else None


def encode(events: Sequence[Event]) -> list[dict[str, Any]]:  # Any: values of several types, for msgpack
    """Events in the form of the daemon's protocol: maps for msgpack, without the fields an event of its kind has not."""
    return [_map(event) for event in events]


def _map(event: Event) -> dict[str, Any]:  # Any: as above
    told: dict[str, Any] = {"kind": event.kind.value, "sequence": event.sequence}  # Any: as above
    if event.kind is Kind.CLEARED:
        return told
    told["tier"] = event.tier
    if event.kind is Kind.STORED:
        told |= {"parent": event.parent, "depth": event.depth}
    told["keys"] = event.keys
    if event.kind is Kind.STORED:
        told["tokens"] = event.tokens
    return told


class VllmForm(Enum):
    """How vLLM puts an event on the wire; a batch is an array in both, [time, events, rank]."""

    MAPS = "maps"
    """{"type": "BlockStored", …}: vLLM 0.24 and later (vllm-project/vllm#42892). Replays as of 0.26: with the topic (#45177)."""
    ARRAYS = "arrays"
    """["BlockStored", …], fields by place: vLLM 0.11 to 0.23. Replays without the topic."""


class HashForm(Enum):
    """What names a block in vLLM's events."""

    KEYS = "keys"
    """All 32 bytes, as vLLM sends with VLLM_KV_EVENTS_USE_INT_BLOCK_HASHES=0."""
    INTS = "ints"
    """The last 8 bytes, big endian, unsigned: what vLLM sends by default, and what every router reads."""


@dataclass(frozen=True, slots=True)
class VllmEncoder:
    """Events in the form of vLLM's KV events (vllm/distributed/kv_events.py), each batch packed.

    media: the names of tiers there; a tier that is not in it is "EXTERNAL". Fields with a default, for none of which tierkv
    has a value (extra_keys, group_idx, kv_cache_spec_*, locality, ownership, session_id), are left out, which readers take for
    it; lora_id and lora_name have none and are null. The rank is 0, as of an engine that is alone.
    """

    form: VllmForm = VllmForm.MAPS
    hashes: HashForm = HashForm.KEYS
    media: Mapping[str, str] = field(default_factory=lambda: MEDIA)

    def batches(self, events: Sequence[Event], *, block_tokens: int, now: float) -> Iterator[bytes]:
        """Events in order, in as few batches as BATCH_BYTES allows. now: seconds since 1970."""
        fields: list[Any] = []  # Any: values of several types, for msgpack
        num_bytes = 0
        for event in events:
            event_bytes = len(event.keys) + len(event.tokens)
            if fields and num_bytes + event_bytes > BATCH_BYTES:
                yield _pack([now, fields, 0])
                fields, num_bytes = [], 0
            fields.append(self._fields(event, block_tokens))
            num_bytes += event_bytes
        if fields:
            yield _pack([now, fields, 0])

    def _fields(self, event: Event, block_tokens: int) -> dict[str, Any] | list[Any]:  # Any: as above
        told: dict[str, Any]  # Any: as above; the order is that of the places
        if event.kind is Kind.CLEARED:
            told = {"type": "AllBlocksCleared"}
        elif event.kind is Kind.REMOVED:
            told = {"type": "BlockRemoved", "block_hashes": self._hashes(event.keys), "medium": self._medium(event)}
        else:
            parent = self._hashes(event.parent)[0] if event.depth and event.parent else None
            told = {
                "type": "BlockStored",
                "block_hashes": self._hashes(event.keys),
                "parent_block_hash": parent,
                "token_ids": np.frombuffer(event.tokens, "<i4").tolist(),
                "block_size": block_tokens,
                "lora_id": None,
                "medium": self._medium(event),
                "lora_name": None,
            }
        return told if self.form is VllmForm.MAPS else list(told.values())

    def _medium(self, event: Event) -> str:
        return self.media.get(event.tier or "", "EXTERNAL")

    def _hashes(self, keys: bytes) -> list[bytes] | list[int]:
        if self.hashes is HashForm.KEYS:
            return [keys[at : at + KEY_BYTES] for at in range(0, len(keys), KEY_BYTES)]
        return cast(list[int], np.frombuffer(keys, ">u8")[KEY_BYTES // 8 - 1 :: KEY_BYTES // 8].tolist())


def _pack(batch: list[Any]) -> bytes:  # Any: as above
    return cast(bytes, msgpack.packb(batch, use_bin_type=True))
