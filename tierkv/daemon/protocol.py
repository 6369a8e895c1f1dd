"""The daemon's wire protocol, sans-IO: bytes in, messages out. Server, client, fuzzers and golden vectors share this parser.

    prelude, 16 bytes     "TK", version, operation, header length (u32), payload length (u64); little endian
    header                msgpack map: "id" and what `FIELDS` lists for the operation
    payload               raw bytes: keys, tokens, blocks, tables

A reply carries the id of its request, so replies may overtake one another. Every length is checked before anything is
allocated for it, and a payload may go straight to where it belongs (`Incoming.sink`). Whatever is not as it must be raises
ProtocolError; the stream is of no use after that. ARCHITECTURE.md documents the operations; golden vectors in
tests/test_daemon_protocol.py pin every byte.
"""

import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Final, cast

import msgpack
import numpy as np

from tierkv.errors import ProtocolError
from tierkv.keys import KEY_BYTES

VERSION: Final = 1
PRELUDE: Final = struct.Struct("<2sBBIQ")
MAGIC: Final = b"TK"
MAX_HEADER_BYTES: Final = 1 << 20
MAX_PAYLOAD_BYTES: Final = 1 << 28
"""Of replies, and of blocks that are sent: what comes goes to memory that is there already."""
MAX_REQUEST_BYTES: Final = 1 << 24
"""Of the payload of any other request: memory is allocated for it."""
STRANGER_BYTES: Final = 1 << 12
"""Of a header before the handshake; payloads have none then."""
MAX_KEYS: Final = 1 << 16
"""Keys of one request."""
MAX_ITEMS: Final = 1 << 12
"""Of any list or map in a header."""
SCRATCH_BYTES: Final = 1 << 16
_MAX_TEXT: Final = 1 << 10
_MAX_DEPTH: Final = 1 << 31
_MAX_SECONDS: Final = 1 << 31


class Op(IntEnum):
    """What a message asks for, or is."""

    HELLO = 1
    ATTACH = 2
    PING = 3
    CONTAINS = 4
    SEEK = 5
    AWAIT = 6
    READ = 7
    LEND = 8
    RELEASE = 9
    RESERVE = 10
    FILL = 11
    COMMIT = 12
    ABORT = 13
    REPORT = 14
    PIN = 15
    UNPIN = 16
    FORGET = 17
    FLUSH = 18
    DRAIN = 19
    VERIFY = 20
    STATS = 21
    SUBSCRIBE = 22
    DELETE = 23
    REPLY = 64
    REFUSED = 65
    EVENT = 66


class State(IntEnum):
    """What became of a block of a request: a byte of its reply."""

    HERE = 0
    """Lent, sent, kept; of RESERVE: there is room, fill it."""
    ABSENT = 1
    PRESENT = 2
    """It is there already: nothing has to be sent."""
    BUSY = 3
    """Another client is writing it."""
    FULL = 4
    """No room, or not worth what would have to go for it."""
    LATE = 5
    CORRUPT = 6
    """Never in a reply: what came is not what its writer vouched for, its reader finds."""


LOANS: Final = np.dtype([("place", "<i4"), ("state", "u1"), ("", "V3"), ("generation", "<u8"), ("checksum", "<u8")])
"""Payload of LEND's reply, and of RESERVE's (without checksums): a row per block; place is -1 where there is none."""

ONE_WAY: Final = frozenset({Op.RELEASE, Op.REPORT})
"""Requests without a reply."""


def _natural(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63


def _number(value: object) -> bool:
    return type(value) in (int, float) and 0 <= cast(float, value) < _MAX_SECONDS


def _text(value: object) -> bool:
    return isinstance(value, str) and len(value) <= _MAX_TEXT


def _key(value: object) -> bool:
    return isinstance(value, bytes) and len(value) == KEY_BYTES


def _depth(value: object) -> bool:
    return type(value) is int and 0 <= value < _MAX_DEPTH


def _naturals(value: object) -> bool:
    return isinstance(value, list) and len(value) <= MAX_ITEMS and all(map(_natural, value))


def _texts(value: object) -> bool:
    return isinstance(value, list) and len(value) <= 64 and all(map(_text, value))


def _bytes(value: object) -> bool:
    return isinstance(value, bytes)


def _table(value: object) -> bool:
    return isinstance(value, dict) and len(value) <= 64 and all(map(_text, value))


def _optional(check: Callable[[object], bool]) -> Callable[[object], bool]:
    return lambda value: value is None or check(value)


_Fields = Mapping[str, Callable[[object], bool]]
_PATH: Final[_Fields] = {"pool": _natural, "root": _key, "parent": _key, "depth": _depth}

FIELDS: Final[Mapping[Op, _Fields]] = {
    Op.HELLO: {
        "client": _key,
        "name": _text,
        "pid": _optional(_natural),
        "connection": _natural,
        "ended": _naturals,
        "token": _text,
        "wants": _texts,
    },
    Op.ATTACH: {"layout": _table, "namespace": _table, "root": _key, "device_bytes": _natural, "memory": _natural},
    Op.PING: {},
    Op.CONTAINS: {"pool": _natural},
    Op.SEEK: _PATH,
    Op.AWAIT: {"pool": _natural, "known": _natural, "deadline_s": _number},
    Op.READ: {"pool": _natural, "deadline_s": _number},
    Op.LEND: {"pool": _natural, "deadline_s": _number},
    Op.RELEASE: {"lease": _natural},
    Op.RESERVE: _PATH,
    Op.FILL: {"lease": _natural, "checksums": _bytes},
    Op.COMMIT: {"lease": _natural, "checksums": _bytes},
    Op.ABORT: {"lease": _natural},
    Op.REPORT: {"pool": _natural},
    Op.PIN: {"pool": _natural, "prefix": _text, "ttl_s": _number},
    Op.UNPIN: {"pin": _text},
    Op.FORGET: {"model": _optional(_text), "tenant": _optional(_text), "older_s": _optional(_number)},
    Op.FLUSH: {"deadline_s": _number},
    Op.DRAIN: {"deadline_s": _number},
    Op.VERIFY: {},
    Op.STATS: {},
    Op.SUBSCRIBE: {},
    Op.DELETE: {"pool": _natural},
    Op.REPLY: {},
    Op.REFUSED: {"reason": _text, "kind": _text},
    Op.EVENT: {},
}
"""Fields of each operation, all of them required. Replies carry others, which their readers check."""


@dataclass(slots=True)
class Message:
    """One frame. payload: None where it went into the views that `Incoming.sink` gave for it, or nowhere."""

    op: Op
    id: int
    fields: dict[str, Any]  # Any: each checked by FIELDS
    payload: bytearray | None = None


def encode(op: Op, id: int, fields: Mapping[str, object], *, payload_bytes: int = 0) -> bytes:
    """Prelude and header of a frame; its payload follows, as it is."""
    header = cast(bytes, msgpack.packb({"id": id, **fields}, use_bin_type=True))
    if len(header) > MAX_HEADER_BYTES:
        raise ProtocolError(f"a header of {len(header)} bytes for {op.name}: {MAX_HEADER_BYTES} at most; ask for less")
    return PRELUDE.pack(MAGIC, VERSION, op, len(header), payload_bytes) + header


Sink = Callable[[Message, int], Sequence[memoryview] | None]
"""Where the payload of a message goes, given its length: views that are exactly as long; None: into a buffer of its own."""


@dataclass(slots=True)
class Limits:
    """What is believed of a length. header, payload: bytes.  filled: bytes of a FILL, which go to memory that is there."""

    header: int = MAX_HEADER_BYTES
    payload: int = MAX_PAYLOAD_BYTES
    filled: int = MAX_PAYLOAD_BYTES

    def of(self, op: Op) -> int:
        """Payload bytes that a message of this operation may have."""
        return self.filled if op is Op.FILL else self.payload


@dataclass(slots=True)
class Incoming:
    """The receiving half of a stream.

        while True:
            count = sock.recv_into(incoming.target())
            for message in incoming.advance(count): …

    sink: asked once per payload, as soon as its header is there.  limits: may be widened while the stream runs.
    """

    limits: Limits = field(default_factory=Limits)
    sink: Sink | None = None
    _scratch: memoryview = field(default_factory=lambda: memoryview(bytearray(SCRATCH_BYTES)))
    _start: int = 0
    _end: int = 0
    _head: tuple[Op, int, int] | None = None
    _long: bytearray | None = None  # a header that does not fit the scratch
    _message: Message | None = None
    _views: list[memoryview] = field(default_factory=list)
    _at: int = 0  # bytes of the first view, or of the long header, that have come

    @property
    def is_filling(self) -> bool:
        """In the middle of a payload?"""
        return bool(self._views)

    def target(self) -> memoryview:
        """Where the next bytes of the stream go; never empty."""
        if self._views:
            return self._views[0][self._at :]
        if self._long is not None:
            return memoryview(self._long)[self._at :]
        return self._scratch[self._end :]

    def advance(self, count: int) -> Iterator[Message]:
        """`count` bytes came into the target: yield the messages that are whole now. Take them all before the next target.

        Raises ProtocolError.
        """
        if self._views:
            self._fill(count)
        elif self._long is not None:
            self._at += count
        else:
            self._end += count
        while (message := self._next()) is not None:
            yield message
        if not self._views and self._long is None:
            self._make_room()

    def _next(self) -> Message | None:
        """The next whole message, from what has come."""
        if self._message is None and not self._parse_head():
            return None
        while self._views and self._start < self._end:
            self._take()
        if self._views:
            return None
        message, self._message = self._message, None
        return message

    def _parse_head(self) -> bool:
        """Read prelude and header, once they are there; then say where the payload goes."""
        if self._head is None:
            if self._end - self._start < PRELUDE.size:
                return False
            self._head = self._prelude()
            self._start += PRELUDE.size
            if self._head[1] > SCRATCH_BYTES - PRELUDE.size:
                self._long, self._at = bytearray(self._head[1]), 0
        op, header_bytes, payload_bytes = self._head
        if self._long is not None:
            held = min(self._end - self._start, header_bytes - self._at)
            self._long[self._at : self._at + held] = self._scratch[self._start : self._start + held]
            self._start, self._at = self._start + held, self._at + held
            if self._at < header_bytes:
                self._start = self._end = 0
                return False
            header, self._long = bytes(self._long), None
        else:
            if self._end - self._start < header_bytes:
                return False
            header = bytes(self._scratch[self._start : self._start + header_bytes])
            self._start += header_bytes
        self._head = None
        self._message = _message(op, header)
        if payload_bytes:
            self._open(self._message, payload_bytes)
        return True

    def _prelude(self) -> tuple[Op, int, int]:
        magic, version, op, header_bytes, payload_bytes = PRELUDE.unpack_from(self._scratch, self._start)
        if magic != MAGIC:
            raise ProtocolError(
                f"bytes {bytes(magic)!r} where a message must begin: this port speaks tierkv's protocol only"
            )
        if version != VERSION:
            raise ProtocolError(
                f"protocol version {version}: this side speaks version {VERSION}; install the same release"
            )
        if op not in FIELDS:
            raise ProtocolError(f"operation {op}: there is none of that number in version {VERSION}")
        if header_bytes > self.limits.header:
            raise ProtocolError(f"a header of {header_bytes} bytes: {self.limits.header} at most are taken now")
        if payload_bytes > self.limits.of(Op(op)):
            raise ProtocolError(f"a payload of {payload_bytes} bytes: {self.limits.of(Op(op))} at most are taken now")
        return Op(op), header_bytes, payload_bytes

    def _open(self, message: Message, size: int) -> None:
        views = self.sink(message, size) if self.sink else None
        if views is None:
            message.payload = bytearray(size)
            views = [memoryview(message.payload)]
        if sum(view.nbytes for view in views) != size:
            raise ProtocolError(
                f"{message.op.name} with a payload of {size} bytes: {sum(v.nbytes for v in views)} expected"
            )
        self._views, self._at = [view for view in views if view.nbytes], 0

    def _take(self) -> None:
        """Move what the scratch holds of a payload to its place."""
        view = self._views[0]
        count = min(view.nbytes - self._at, self._end - self._start)
        view[self._at : self._at + count] = self._scratch[self._start : self._start + count]
        self._start += count
        self._fill(count)

    def _fill(self, count: int) -> None:
        self._at += count
        if self._at == self._views[0].nbytes:
            self._views.pop(0).release()
            self._at = 0

    def _make_room(self) -> None:
        """Let the scratch have room again, whole headers' worth."""
        if self._start == self._end:
            self._start = self._end = 0
        elif self._start:
            rest = bytes(self._scratch[self._start : self._end])
            self._scratch[: len(rest)] = rest
            self._start, self._end = 0, len(rest)


def _message(op: Op, header: bytes) -> Message:
    most = min(MAX_ITEMS, len(header))  # msgpack makes room for as many as are claimed, and deeper down again
    try:
        fields = msgpack.unpackb(
            header,
            raw=False,
            strict_map_key=True,
            max_str_len=4 * _MAX_TEXT,
            max_bin_len=MAX_HEADER_BYTES,
            max_array_len=most,
            max_map_len=most,
            max_ext_len=0,
        )
    except (msgpack.UnpackException, ValueError, TypeError, RecursionError) as error:
        raise ProtocolError(f"{op.name} with a header that is no msgpack map ({type(error).__name__})") from None
    if not isinstance(fields, dict) or not _natural(id := fields.pop("id", None)):
        raise ProtocolError(f"{op.name} without an id: a map with an integer id is expected")
    for name, check in FIELDS[op].items():
        if name not in fields:
            raise ProtocolError(f"{op.name} without {name}")
        if not check(fields[name]):
            raise ProtocolError(
                f"{op.name} with {name} = {str(fields[name])[:80]!r}: of another type or size than expected"
            )
    return Message(op, id, fields)
