"""KV events: what a log keeps and gives up, their bytes in both forms, and real subscribers over real sockets."""

import asyncio
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgpack
import msgspec
import numpy as np
import pytest
import zmq
import zmq.asyncio
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.daemon.events import BATCH_BYTES, Event, EventLog, HashForm, Kind, VllmEncoder, VllmForm, encode
from tierkv.daemon.zmq_events import ZmqPublisher
from tierkv.errors import ConfigError
from tierkv.keys import Key

ROOT = Key(bytes(range(32)))
A, B, C = (
    bytes([letter]) * 24 + number.to_bytes(8, "big") for letter, number in ((0xA0, 1), (0xB0, 2), (0xC0, 1 << 63))
)
TOKENS = np.array([1, 2, 3, 70_000], "<i4").tobytes()
TIERS = ("host", "disk")
NOW = 1764492000.5
TIMEOUT_MS = 10_000

EVENTS = [
    Event(Kind.CLEARED, 6),
    Event(Kind.STORED, 7, "host", ROOT, 0, A + B, TOKENS),
    Event(Kind.STORED, 8, "disk", Key(B), 2, C, TOKENS[:8]),
    Event(Kind.REMOVED, 9, "disk", keys=A),
]


# -- what a subscriber of vLLM declares: the structs it decodes with -------------------------------------------------------


class Batch(msgspec.Struct, array_like=True, omit_defaults=True):
    ts: float
    events: list[Any]
    data_parallel_rank: int | None = None


class StoredMap(msgspec.Struct, tag="BlockStored", omit_defaults=True):
    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None
    extra_keys: list[tuple[Any, ...] | None] | None = None
    group_idx: int | None = None
    kv_cache_spec_kind: str | None = None
    kv_cache_spec_sliding_window: int | None = None
    locality: str | None = None
    ownership: str | None = None
    session_id: str | None = None


class RemovedMap(msgspec.Struct, tag="BlockRemoved", omit_defaults=True):
    block_hashes: list[bytes | int]
    medium: str | None
    group_idx: int | None = None
    locality: str | None = None
    ownership: str | None = None


class ClearedMap(msgspec.Struct, tag="AllBlocksCleared"):
    pass


class StoredArray(msgspec.Struct, tag="BlockStored", array_like=True):
    """As of vLLM 0.14; what was added later comes after these."""

    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None
    lora_name: str | None


class RemovedArray(msgspec.Struct, tag="BlockRemoved", array_like=True):
    block_hashes: list[bytes | int]
    medium: str | None


class ClearedArray(msgspec.Struct, tag="AllBlocksCleared", array_like=True):
    pass


class LastStored(StoredMap, tag="BlockStored", array_like=True):
    """As of vLLM 0.23, or later if there had been more arrays."""


class LastRemoved(RemovedMap, tag="BlockRemoved", array_like=True):
    pass


class FirstStored(msgspec.Struct, tag="BlockStored", array_like=True):
    """As of vLLM 0.11, before lora_name."""

    block_hashes: list[bytes | int]
    parent_block_hash: bytes | int | None
    token_ids: list[int]
    block_size: int
    lora_id: int | None
    medium: str | None


class MapBatch(Batch, array_like=True, omit_defaults=True):
    events: list[StoredMap | RemovedMap | ClearedMap]


class ArrayBatch(Batch, array_like=True, omit_defaults=True):
    events: list[StoredArray | RemovedArray | ClearedArray]


class FirstBatch(Batch, array_like=True, omit_defaults=True):
    events: list[FirstStored | RemovedArray | ClearedArray]


class LastBatch(Batch, array_like=True, omit_defaults=True):
    events: list[LastStored | LastRemoved | ClearedArray]


BATCHES = {VllmForm.MAPS: MapBatch, VllmForm.ARRAYS: ArrayBatch}


def as_vllm_says(form: VllmForm) -> Batch:
    """EVENTS as vLLM would have them."""
    maps = form is VllmForm.MAPS
    stored = StoredMap if maps else StoredArray
    removed = RemovedMap if maps else RemovedArray
    return BATCHES[form](
        NOW,
        [
            ClearedMap() if maps else ClearedArray(),
            stored([A, B], None, [1, 2, 3, 70_000], 2, None, "CPU", None),
            stored([C], B, [1, 2], 2, None, "DISK", None),
            removed([A], "DISK"),
        ],
        0,
    )


# -- the log ---------------------------------------------------------------------------------------------------------------


def test_events_come_in_order_with_rising_numbers_and_names_of_tiers() -> None:
    log = EventLog(TIERS)
    assert log.take() == [] and len(log) == 0
    log.stored(0, ROOT, 0, A + B, TOKENS)
    log.removed(1, A)
    assert len(log) == 2
    assert log.take() == [
        Event(Kind.STORED, 0, "host", ROOT, 0, A + B, TOKENS),
        Event(Kind.REMOVED, 1, "disk", keys=A),
    ]
    log.stored(1, Key(B), 2, C, TOKENS[:8])
    assert log.take() == [Event(Kind.STORED, 2, "disk", Key(B), 2, C, TOKENS[:8])]
    assert log.num_dropped == 0


def test_overflow_drops_the_oldest_and_says_cleared_in_its_place() -> None:
    log = EventLog(TIERS, capacity_bytes=1024)  # three events of one key
    for number in range(5):
        log.removed(0, number.to_bytes(32, "big"))
    events = log.take()
    assert events[0] == Event(Kind.CLEARED, 1)
    assert [(event.kind, event.sequence, event.keys[-1]) for event in events[1:]] == [
        (Kind.REMOVED, 2, 2),
        (Kind.REMOVED, 3, 3),
        (Kind.REMOVED, 4, 4),
    ]
    assert log.num_dropped == 2
    log.removed(0, A)
    assert log.take() == [Event(Kind.REMOVED, 5, "host", keys=A)]


def test_event_that_is_larger_than_the_log_is_a_gap_alone() -> None:
    log = EventLog(TIERS, capacity_bytes=1024)
    log.removed(0, A)
    log.stored(0, ROOT, 0, A * 100, TOKENS)
    assert log.take() == [Event(Kind.CLEARED, 1)]
    assert log.num_dropped == 2


def test_clear_voids_what_waits_and_what_was_taken() -> None:
    log = EventLog(TIERS)
    log.clear()
    log.removed(0, A)
    assert [(event.kind, event.sequence) for event in log.take()] == [(Kind.CLEARED, 0), (Kind.REMOVED, 1)]
    log.removed(0, A)
    log.removed(0, B)
    log.clear()
    log.removed(0, C)
    assert len(log) == 2
    assert log.take() == [Event(Kind.CLEARED, 3), Event(Kind.REMOVED, 4, "host", keys=C)]
    assert log.num_dropped == 0


def test_log_that_holds_no_event_is_refused() -> None:
    with pytest.raises(ConfigError, match="at least 256"):
        EventLog(TIERS, capacity_bytes=255)


def keys_of(event: Event) -> list[bytes]:
    return [event.keys[at : at + 32] for at in range(0, len(event.keys), 32)]


def follow(known: set[tuple[str | None, bytes]], events: Sequence[Event]) -> None:
    for event in events:
        told = {(event.tier, key) for key in keys_of(event)}
        if event.kind is Kind.CLEARED:
            known.clear()
        elif event.kind is Kind.STORED:
            known |= told
        else:
            known -= told


steps = st.lists(
    st.one_of(
        st.tuples(st.just("block"), st.integers(0, 1), st.integers(0, 5)),
        st.tuples(st.sampled_from(["take", "clear"]), st.just(0), st.just(0)),
    ),
    max_size=60,
)


@settings(max_examples=200)
@given(steps=steps, capacity=st.sampled_from([256, 700, 1500, 1 << 20]))
def test_subscriber_never_knows_more_than_is_true(steps: list[tuple[str, int, int]], capacity: int) -> None:
    log = EventLog(TIERS, capacity_bytes=capacity)
    held: set[tuple[str | None, bytes]] = set()
    known: set[tuple[str | None, bytes]] = set()
    told: list[Event] = []
    lossless = True
    for step, tier, number in [*steps, ("take", 0, 0)]:
        block = (TIERS[tier], number.to_bytes(32, "big"))
        if step == "clear":
            log.clear()
            lossless = False
        elif step == "take":
            events = log.take()
            told += events
            follow(known, events)
            assert known <= held
        elif block in held:
            held.remove(block)
            log.removed(tier, block[1])
        else:
            held.add(block)
            log.stored(tier, ROOT, 0, block[1], TOKENS[:8])
    if lossless and not log.num_dropped:
        assert known == held
    numbers = [event.sequence for event in told]
    for at, event in enumerate(told):
        before = numbers[at - 1] if at else -1
        assert event.sequence == before + 1 or (event.kind is Kind.CLEARED and event.sequence > before)


# -- bytes -----------------------------------------------------------------------------------------------------------------

GOLDEN_NATIVE = (
    "9482a46b696e64a7636c6561726564a873657175656e63650687a46b696e64a673746f726564a873657175656e636507a474696572a4686f"
    "7374a6706172656e74c420000102030405060708090a0b0c0d0e0f101112131415161718191a1b1c1d1e1fa5646570746800a46b657973c4"
    "40a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a00000000000000001b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0"
    "b00000000000000002a6746f6b656e73c4100100000002000000030000007011010087a46b696e64a673746f726564a873657175656e6365"
    "08a474696572a46469736ba6706172656e74c420b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b00000000000000002a5646570"
    "746802a46b657973c420c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c08000000000000000a6746f6b656e73c4080100000002"
    "00000084a46b696e64a772656d6f766564a873657175656e636509a474696572a46469736ba46b657973c420a0a0a0a0a0a0a0a0a0a0a0a0"
    "a0a0a0a0a0a0a0a0a0a0a0a00000000000000001"
)
GOLDEN_MAPS = (
    "93cb41da4b00b82000009481a474797065b0416c6c426c6f636b73436c656172656488a474797065ab426c6f636b53746f726564ac626c6f"
    "636b5f68617368657392c420a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a00000000000000001c420b0b0b0b0b0b0b0b0b0b0"
    "b0b0b0b0b0b0b0b0b0b0b0b0b0b00000000000000002b1706172656e745f626c6f636b5f68617368c0a9746f6b656e5f69647394010203ce"
    "00011170aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da3435055a96c6f72615f6e616d65c088a474797065ab426c"
    "6f636b53746f726564ac626c6f636b5f68617368657391c420c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c080000000000000"
    "00b1706172656e745f626c6f636b5f68617368c420b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b00000000000000002a9746f"
    "6b656e5f696473920102aa626c6f636b5f73697a6502a76c6f72615f6964c0a66d656469756da44449534ba96c6f72615f6e616d65c083a4"
    "74797065ac426c6f636b52656d6f766564ac626c6f636b5f68617368657391c420a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0"
    "a00000000000000001a66d656469756da44449534b00"
)
GOLDEN_ARRAYS = (
    "93cb41da4b00b82000009491b0416c6c426c6f636b73436c656172656498ab426c6f636b53746f72656492c420a0a0a0a0a0a0a0a0a0a0a0"
    "a0a0a0a0a0a0a0a0a0a0a0a0a00000000000000001c420b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b00000000000000002c0"
    "94010203ce0001117002c0a3435055c098ab426c6f636b53746f72656491c420c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0c0"
    "8000000000000000c420b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0b0000000000000000292010202c0a44449534bc093ac42"
    "6c6f636b52656d6f76656491c420a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a0a00000000000000001a44449534b00"
)


def test_native_form_is_pinned() -> None:
    assert encode(EVENTS) == [
        {"kind": "cleared", "sequence": 6},
        {
            "kind": "stored",
            "sequence": 7,
            "tier": "host",
            "parent": ROOT,
            "depth": 0,
            "keys": A + B,
            "tokens": TOKENS,
        },
        {"kind": "stored", "sequence": 8, "tier": "disk", "parent": B, "depth": 2, "keys": C, "tokens": TOKENS[:8]},
        {"kind": "removed", "sequence": 9, "tier": "disk", "keys": A},
    ]
    assert msgpack.packb(encode(EVENTS)).hex() == GOLDEN_NATIVE


@pytest.mark.parametrize(("form", "golden"), [(VllmForm.MAPS, GOLDEN_MAPS), (VllmForm.ARRAYS, GOLDEN_ARRAYS)])
def test_vllm_forms_are_pinned_and_equal_what_msgspec_makes_of_its_structs(form: VllmForm, golden: str) -> None:
    (batch,) = VllmEncoder(form=form).batches(EVENTS, block_tokens=2, now=NOW)
    assert batch.hex() == golden
    assert batch == msgspec.msgpack.encode(as_vllm_says(form))
    assert msgspec.msgpack.decode(batch, type=BATCHES[form]) == as_vllm_says(form)


def test_arrays_are_read_by_the_first_and_the_last_subscriber_of_arrays() -> None:
    (batch,) = VllmEncoder(form=VllmForm.ARRAYS).batches(EVENTS, block_tokens=2, now=NOW)
    first, last = (msgspec.msgpack.decode(batch, type=kind).events for kind in (FirstBatch, LastBatch))
    assert first[1] == FirstStored([A, B], None, [1, 2, 3, 70_000], 2, None, "CPU")
    assert last[1] == LastStored([A, B], None, [1, 2, 3, 70_000], 2, None, "CPU", None)
    assert last[3] == LastRemoved([A], "DISK")


def test_hashes_as_ints_are_the_last_eight_bytes_as_vllm_takes_them() -> None:
    (batch,) = VllmEncoder(hashes=HashForm.INTS).batches(EVENTS, block_tokens=2, now=NOW)
    events = msgspec.msgpack.decode(batch, type=MapBatch).events
    assert [events[1].block_hashes, events[2].block_hashes, events[3].block_hashes] == [[1, 2], [1 << 63], [1]]
    assert [events[1].parent_block_hash, events[2].parent_block_hash] == [None, 2]
    assert events[2].block_hashes == [int.from_bytes(C, "big") & ((1 << 64) - 1)]


def test_media_can_be_named_otherwise_and_unknown_tiers_are_external() -> None:
    events = [Event(Kind.REMOVED, 0, "disk", keys=A), Event(Kind.REMOVED, 1, "tape", keys=A)]
    (batch,) = VllmEncoder(media={"disk": "STORAGE"}).batches(events, block_tokens=2, now=NOW)
    assert [event.medium for event in msgspec.msgpack.decode(batch, type=MapBatch).events] == ["STORAGE", "EXTERNAL"]


def test_many_events_become_several_batches_in_order() -> None:
    large = [Event(Kind.REMOVED, n, "host", keys=n.to_bytes(32, "big") * (BATCH_BYTES // 64)) for n in range(5)]
    batches = list(VllmEncoder().batches(large, block_tokens=2, now=NOW))
    decoded = [msgspec.msgpack.decode(batch, type=MapBatch).events for batch in batches]
    assert [len(events) for events in decoded] == [2, 2, 1]
    assert [event.block_hashes[0][-1] for events in decoded for event in events] == [0, 1, 2, 3, 4]
    assert list(VllmEncoder().batches([], block_tokens=2, now=NOW)) == []


# -- sockets ---------------------------------------------------------------------------------------------------------------


@contextmanager
def sockets(*kinds: tuple[int, str | None]) -> Iterator[list["zmq.Socket[bytes]"]]:
    with zmq.Context() as context:
        opened = []
        for kind, endpoint in kinds:
            socket = context.socket(kind)
            socket.linger = 0
            socket.rcvtimeo = TIMEOUT_MS
            if kind == zmq.SUB:
                socket.subscribe(b"kv-events")
            if endpoint is not None:
                socket.connect(endpoint)
            opened.append(socket)
        try:
            yield opened
        finally:
            for socket in opened:
                socket.close()


def publish_one(publisher: ZmqPublisher, number: int) -> None:
    publisher.publish([Event(Kind.REMOVED, number, "host", keys=number.to_bytes(32, "big"))], block_tokens=2, now=NOW)


def numbers(batch: bytes, kind: type[Batch] = MapBatch) -> list[int | str]:
    events = msgspec.msgpack.decode(batch, type=kind).events
    return [
        int.from_bytes(event.block_hashes[0], "big") if hasattr(event, "block_hashes") else "cleared"
        for event in events
    ]


def await_first(publisher: ZmqPublisher, subscriber: "zmq.Socket[bytes]") -> list[bytes]:
    """Publish, from 0, until the subscriber is known to the publisher: what it gets first."""
    for number in range(TIMEOUT_MS // 10):
        publish_one(publisher, number)
        if subscriber.poll(10):
            return subscriber.recv_multipart()
    raise AssertionError("the subscriber got nothing")


def ask(dealer: "zmq.Socket[bytes]", sequence: int) -> None:
    dealer.send_multipart([b"", sequence.to_bytes(8, "big")])


def replay(publisher: ZmqPublisher, dealer: "zmq.Socket[bytes]", form: VllmForm = VllmForm.MAPS) -> list[list[bytes]]:
    """What a subscriber gets, without the marker that ends it."""
    got: list[list[bytes]] = []
    for _ in range(TIMEOUT_MS // 10):
        publisher.serve_replays()
        while dealer.poll(10):
            empty, *frames = dealer.recv_multipart()
            assert empty == b""
            if frames[-1] == b"":
                assert frames == [*([b""] if form is VllmForm.MAPS else []), b"\xff" * 8, b""]
                return got
            got.append(frames)
    raise AssertionError(f"no end after {len(got)} batches")


@pytest.mark.parametrize("form", VllmForm)
@pytest.mark.parametrize("transport", ["tcp", "ipc"])
def test_subscriber_receives_and_decodes_as_one_of_vllm(transport: str, form: VllmForm, tmp_path: Path) -> None:
    endpoint = "tcp://127.0.0.1:*" if transport == "tcp" else f"ipc://{tmp_path}/events"
    with closing(ZmqPublisher(endpoint, encoder=VllmEncoder(form=form))) as publisher:
        assert not publisher.endpoint.endswith("*")
        with sockets((zmq.SUB, publisher.endpoint)) as (subscriber,):
            topic, sequence, batch = await_first(publisher, subscriber)
            first = int.from_bytes(sequence, "big")
            assert (topic, len(sequence), numbers(batch, BATCHES[form])) == (b"kv-events", 8, [first])
            last = publisher.stats().batches
            publisher.publish(EVENTS, block_tokens=2, now=NOW)
            while int.from_bytes(sequence, "big") < last:
                topic, sequence, batch = subscriber.recv_multipart()
            assert msgspec.msgpack.decode(batch, type=BATCHES[form]) == as_vllm_says(form)
        assert publisher.stats().overflows == 0


def test_subscriber_of_another_topic_gets_nothing() -> None:
    with (
        closing(ZmqPublisher("tcp://127.0.0.1:*", topic="kv@pod@model")) as publisher,
        sockets((zmq.SUB, publisher.endpoint), (zmq.SUB, publisher.endpoint)) as (stranger, subscriber),
    ):
        subscriber.subscribe(b"kv@pod")
        assert await_first(publisher, subscriber)[0] == b"kv@pod@model"
        assert not stranger.poll(50)


def test_publisher_can_connect_to_a_router_that_binds() -> None:
    with sockets((zmq.SUB, None)) as (router,):
        router.bind("tcp://127.0.0.1:*")
        endpoint = router.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
        with closing(ZmqPublisher(f">{endpoint}")) as publisher:
            assert numbers(await_first(publisher, router)[2])


@pytest.mark.parametrize("form", VllmForm)
def test_what_was_missed_is_replayed_from_where_it_is_asked_for(form: VllmForm) -> None:
    encoder = VllmEncoder(form=form)
    publisher = ZmqPublisher("tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*", encoder=encoder)
    with closing(publisher), sockets((zmq.DEALER, publisher.replay_endpoint)) as (dealer,):
        for number in range(200):  # several pieces
            publish_one(publisher, number)
        ask(dealer, 3)
        got = replay(publisher, dealer, form)
        assert [int.from_bytes(frames[-2], "big") for frames in got] == list(range(3, 200))
        assert [numbers(frames[-1], BATCHES[form]) for frames in got] == [[number] for number in range(3, 200)]
        assert all(frames[:-2] == ([b"kv-events"] if form is VllmForm.MAPS else []) for frames in got)
        for beyond in (200, 10_000):
            ask(dealer, beyond)
            assert replay(publisher, dealer, form) == []
        assert publisher.stats().replays == 3


@pytest.mark.parametrize("limit", [{"buffer_batches": 5}, {"buffer_bytes": 5 * 80}])
def test_replay_of_what_is_no_longer_kept_begins_with_cleared(limit: dict[str, int]) -> None:
    publisher = ZmqPublisher("tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*", **limit)
    with closing(publisher), sockets((zmq.DEALER, publisher.replay_endpoint)) as (dealer,):
        for number in range(20):
            publish_one(publisher, number)
        ask(dealer, 2)
        got = [(int.from_bytes(sequence, "big"), numbers(batch)) for _, sequence, batch in replay(publisher, dealer)]
        kept = len(got) - 1
        assert kept >= 3 and got == [(19 - kept, ["cleared"]), *((number, [number]) for number in range(20 - kept, 20))]
        ask(dealer, 20 - kept)
        assert [int.from_bytes(sequence, "big") for _, sequence, _ in replay(publisher, dealer)] == list(
            range(20 - kept, 20)
        )


def test_request_of_no_known_form_is_refused_and_disturbs_nobody() -> None:
    publisher = ZmqPublisher("tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*")
    with closing(publisher), sockets((zmq.DEALER, publisher.replay_endpoint)) as (dealer,):
        publish_one(publisher, 0)
        for wrong in ([b""], [b"", b"short"], [b"x", b"12345678"], [b"", b"12345678", b""], [b"12345678"]):
            dealer.send_multipart(wrong)
        ask(dealer, 0)
        assert len(replay(publisher, dealer)) == 1
        assert (publisher.stats().refused, publisher.stats().replays) == (5, 1)


def test_requests_that_wait_behind_a_piece_are_told_to_be_waiting() -> None:
    publisher = ZmqPublisher("tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*")
    with closing(publisher), sockets((zmq.DEALER, publisher.replay_endpoint)) as (dealer,):
        for _ in range(TIMEOUT_MS // 10):  # until more than a piece of them has come before the call
            for _ in range(200):
                dealer.send_multipart([b"wrong"])
            dealer.poll(10)
            if publisher.serve_replays():
                break
        else:
            raise AssertionError(f"nothing waits after {publisher.stats()}")


def test_slow_subscriber_is_counted_sees_a_gap_and_the_others_miss_nothing() -> None:
    publisher = ZmqPublisher("tcp://127.0.0.1:*", queue_batches=20)
    with closing(publisher), sockets((zmq.SUB, None), (zmq.SUB, publisher.endpoint)) as (slow, quick):
        slow.rcvhwm = 1
        slow.connect(publisher.endpoint)
        await_first(publisher, slow)
        seen = int.from_bytes(await_first(publisher, quick)[1], "big")
        large = [Event(Kind.REMOVED, 0, "host", keys=A * (1 << 15))]

        def publish() -> None:
            nonlocal seen
            publisher.publish(large, block_tokens=2, now=NOW)
            while seen < publisher.stats().batches - 1:
                sequence = int.from_bytes(quick.recv_multipart()[1], "big")
                assert sequence == seen + 1
                seen = sequence

        while not publisher.stats().overflows and publisher.stats().batches < 2_000:
            publish()
        assert publisher.stats().overflows == 1
        lost = publisher.stats().batches
        for _ in range(5):
            publish()  # not to be had by the slow one
        got = [-1]
        while got[-1] < lost and publisher.stats().batches < 3_000:
            while slow.poll(10):
                got.append(int.from_bytes(slow.recv_multipart()[1], "big"))
            publish()
        gaps = [(before, after) for before, after in pairwise(got[1:]) if after != before + 1]
        assert gaps and gaps[0][0] < lost <= gaps[0][1]


def test_client_that_does_not_fetch_its_replay_is_cut() -> None:
    publisher = ZmqPublisher("tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*", buffer_batches=8)
    with closing(publisher), sockets((zmq.DEALER, None), (zmq.DEALER, publisher.replay_endpoint)) as (idle, dealer):
        idle.rcvhwm = 1
        idle.connect(publisher.replay_endpoint or "")
        for number in range(8):
            publisher.publish([Event(Kind.REMOVED, number, "host", keys=A * (1 << 15))], block_tokens=2, now=NOW)
        for asked in range(50):
            ask(idle, 0)
            for _ in range(TIMEOUT_MS // 10):
                publisher.serve_replays()
                if publisher.stats().replays > asked:
                    break
                dealer.poll(10)
            if publisher.stats().cut:
                break
        assert publisher.stats().cut == 1
        ask(dealer, 0)
        assert len(replay(publisher, dealer)) == 8


def test_loop_answers_replays_beside_its_other_work() -> None:
    async def fetch(context: zmq.asyncio.Context, endpoint: str) -> list[int]:
        with context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.connect(endpoint)
            got = []
            for start in (0, 150):  # the second finds the loop idle
                await dealer.send_multipart([b"", start.to_bytes(8, "big")])
                while (frames := await dealer.recv_multipart())[-1]:
                    got.append(int.from_bytes(frames[-2], "big"))
            return got

    async def run() -> list[list[int]]:
        publisher = ZmqPublisher("tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*")
        with closing(publisher), zmq.asyncio.Context() as context:
            for number in range(200):
                publish_one(publisher, number)
            publisher.attach(asyncio.get_running_loop())
            endpoint = publisher.replay_endpoint or ""
            return await asyncio.wait_for(asyncio.gather(*(fetch(context, endpoint) for _ in range(3))), 30)

    assert asyncio.run(run()) == [[*range(200), *range(150, 200)]] * 3


def test_loop_goes_on_with_a_replay_that_was_begun_before_it() -> None:
    async def run() -> list[bytes]:
        publisher = ZmqPublisher("tcp://127.0.0.1:*", replay_endpoint="tcp://127.0.0.1:*")
        with closing(publisher), zmq.asyncio.Context() as context, context.socket(zmq.DEALER) as dealer:
            dealer.linger = 0
            dealer.connect(publisher.replay_endpoint or "")
            for number in range(1_000):
                publish_one(publisher, number)
            await dealer.send_multipart([b"", bytes(8)])
            async with asyncio.timeout(30):
                while not publisher.serve_replays():
                    await asyncio.sleep(0)
            publisher.attach(asyncio.get_running_loop())  # nothing new comes in
            frames = [b"?"]
            while frames[-1]:
                frames = await asyncio.wait_for(dealer.recv_multipart(), 30)
            return frames

    assert asyncio.run(run()) == [b"", b"", b"\xff" * 8, b""]


def test_publisher_without_a_replay_endpoint_serves_none() -> None:
    with closing(ZmqPublisher("tcp://127.0.0.1:*")) as publisher:
        publish_one(publisher, 0)
        assert publisher.replay_endpoint is None and publisher.serve_replays() is False
        publisher.close()


@pytest.mark.parametrize(
    "endpoint", ["", "5557", "carrier://pigeon", "tcp://127.0.0.1", ">", "ipc:///no/such/folder/events"]
)
def test_bad_endpoint_is_one_line_that_names_it(endpoint: str) -> None:
    for arguments in ((endpoint, None), ("tcp://127.0.0.1:*", endpoint)):
        with pytest.raises(ConfigError) as raised:
            ZmqPublisher(arguments[0], replay_endpoint=arguments[1])
        assert repr(endpoint) in str(raised.value) and "\n" not in str(raised.value)


def test_endpoint_in_use_is_an_error_that_says_so() -> None:
    with (
        closing(ZmqPublisher("tcp://127.0.0.1:*")) as publisher,
        pytest.raises(ConfigError, match="Address already in use"),
    ):
        ZmqPublisher(publisher.endpoint)


def test_queues_of_no_length_are_refused() -> None:
    for wrong in ({"buffer_batches": 0}, {"queue_batches": 0}):
        with pytest.raises(ConfigError, match="1 or more"):
            ZmqPublisher("tcp://127.0.0.1:*", **wrong)  # type: ignore[arg-type]  # of one type each


def test_without_pyzmq_the_extra_is_named_and_the_rest_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "zmq", None)
    with pytest.raises(ConfigError, match=r"pip install 'tierkv\[events\]'"):
        ZmqPublisher("tcp://127.0.0.1:*")


def test_import_of_the_publisher_loads_neither_zmq_nor_asyncio() -> None:
    code = "import sys, tierkv.daemon.zmq_events; print(*{'zmq', 'asyncio'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == ""
