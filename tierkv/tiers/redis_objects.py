"""Blocks as objects of a Redis server: what is said on one wire to fetch, store, find and forget them.

Every command of a batch is settled by its own reply. A reply that is none of those that a command can have raises
ConnectionError: the stream may be out of step, and the borrower closes it.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from enum import Enum, auto
from typing import Final

from tierkv.codecs import HEADER_BYTES, make, seal, unseal
from tierkv.codecs.header import unpack
from tierkv.codecs.raw import Raw
from tierkv.errors import CodecError, ConfigError
from tierkv.keys import KEY_BYTES, Key
from tierkv.layout import DTYPE_BYTES, Layout
from tierkv.metrics import Metrics
from tierkv.tiers.base import Miss, Run
from tierkv.tiers.redis_bulk import WINDOW_BYTES, WINDOW_COMMANDS, Buffer, Refusal, Wire

_PROBES: Final = 1024
"""Keys of one trip when each is asked for by itself: some 80 kB of requests, 4 kB of replies."""
_GROUP: Final = 256
"""Keys of one EXISTS when a long leading run is looked for."""
_GROUPS: Final = 32
"""Such commands of one trip."""
_LIKELY: Final = 0.2
"""Share of recently written blocks that were there already from which `store` asks first."""
_SEND_BYTES: Final = 256 << 10
"""Pieces are gathered up to this: while the kernel passes them on, the next block gets its checksum."""

Send = Callable[..., object]
"""Sends one command through the library, to where its key is now."""

log = logging.getLogger("tierkv")


class State(Enum):
    """Of a key in a batch, besides the reasons of a miss. MOVED: the server named another one."""

    OPEN = auto()
    DONE = auto()
    MOVED = auto()


Outcome = Miss | State


class Objects:
    """Blocks under `<prefix>:<key>`. Thread-safe; a wire and the positions of its share belong to one thread.

    Methods that take a wire settle `outcomes[at]` for every `at` in `places`, or raise and leave the rest open.
    on_suspect: called when a server says that it does not know its cluster any more.
    """

    def __init__(
        self,
        *,
        layout: Layout,
        metrics: Metrics,
        tier: str,
        codec: str,
        prefix: str,
        ttl_s: float | None,
        touch: bool,
        clustered: bool,
        on_suspect: Callable[[], None],
    ) -> None:
        if ttl_s is not None and not 0.001 <= ttl_s < float("inf"):
            raise ConfigError(f"redis.ttl_s = {ttl_s!r}: must be a positive number of seconds")
        if touch and ttl_s is None:
            raise ConfigError("redis.touch: needs ttl_s, the time that begins anew when a block is read")
        if not prefix:
            raise ConfigError("redis.prefix: must not be empty, it keeps blocks apart from other data on the server")
        self._itemsize = DTYPE_BYTES[layout.dtype]
        self._codec = make(codec, itemsize=self._itemsize)
        self._fingerprint, self._metrics, self._tier = layout.fingerprint, metrics, tier
        self._clustered, self._on_suspect = clustered, on_suspect
        self._prefix = prefix.encode() + b":"
        self._window = max(1, min(WINDOW_COMMANDS, WINDOW_BYTES // layout.block_bytes))
        self._present = 0.0  # moving share of written blocks that were there already; a race costs nothing
        self._said: set[str] = set()
        self._expiry = () if ttl_s is None else (b"PX", b"%d" % round(ttl_s * 1000))
        expiry = b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in self._expiry)
        length = len(self._prefix) + KEY_BYTES
        # What stands before the name, and after it, in each command: all names have one length.
        self._name = b"$%d\r\n" % length
        self._exists = b"*2\r\n$6\r\nEXISTS\r\n" + self._name
        self._unlink = b"*2\r\n$6\r\nUNLINK\r\n" + self._name
        self._get = (b"*4\r\n$5\r\nGETEX\r\n" if touch else b"*2\r\n$3\r\nGET\r\n") + self._name
        self._get_end = b"\r\n" + (expiry if touch else b"")
        self._set = b"*%d\r\n$3\r\nSET\r\n" % (4 + len(self._expiry)) + self._name
        self._set_end = b"\r\n$2\r\nNX\r\n" + expiry

    def names(self, keys: Sequence[Key]) -> list[bytes]:
        """What the keys are called on the server."""
        prefix = self._prefix
        return [prefix + key for key in keys]

    def fetch(
        self,
        wire: Wire,
        places: Sequence[int],
        outcomes: list[Outcome],
        *,
        keys: Sequence[Key],
        names: Sequence[bytes],
        outs: Sequence[memoryview],
    ) -> None:
        """Receive blocks into `outs`, verified."""
        head, end = self._get, self._get_end
        header = memoryview(bytearray(HEADER_BYTES))
        for window in _windows(places, self._window):
            wire.send([_repeat(head, [names[at] for at in window], end)])
            for at in window:
                size = wire.value_bytes()
                if size is None:
                    outcomes[at] = Miss.ABSENT
                elif isinstance(size, Refusal):
                    outcomes[at] = self._refused(size)
                elif size > HEADER_BYTES + len(outs[at]):
                    outcomes[at] = Miss.CORRUPT
                    raise ConnectionError(f"a value of {size} bytes: longer than any block, or no length at all")
                else:
                    outcomes[at] = self._take(wire, size, keys[at], header, outs[at])

    def _take(self, wire: Wire, size: int, key: Key, header: memoryview, out: memoryview) -> Outcome:
        if size < HEADER_BYTES:
            wire.value(header[:size])
            return Miss.CORRUPT
        payload = out if size == HEADER_BYTES + len(out) else memoryview(bytearray(size - HEADER_BYTES))
        wire.value(header, payload)
        return self._open(key, header, payload, out)

    def _open(self, key: Key, header: Buffer, payload: memoryview, out: memoryview) -> Outcome:
        """Verify and unpack; meanwhile the server fills the socket with the next block."""
        try:
            known = unpack(header, key=key, fingerprint=self._fingerprint)
            if payload is out and known.codec != Raw.name:  # packed to its full length: not by us, but valid
                payload = memoryview(bytes(payload))
            unseal(known, payload, out, itemsize=self._itemsize)
        except CodecError as error:
            return Miss.LAYOUT if error.reason == Miss.LAYOUT else Miss.CORRUPT
        self._metrics.bytes_read.add(len(payload), self._tier)
        return State.DONE

    def store(
        self,
        wire: Wire,
        places: Sequence[int],
        outcomes: list[Outcome],
        *,
        run: Run,
        names: Sequence[bytes],
        blocks: Sequence[memoryview],
    ) -> None:
        """Send blocks; where others were there already of late, only those that are absent."""
        for window in _windows(places, self._window):
            absent: Sequence[int] = window
            if self._present > _LIKELY:
                self.probe(wire, window, outcomes, names=names)
                absent = [at for at in window if outcomes[at] is Miss.ABSENT]
                for at in absent:
                    outcomes[at] = State.OPEN
            num_present = len(window) - len(absent)
            sizes = self._send_blocks(wire, absent, run, names, blocks)
            for at, size in zip(absent, sizes, strict=True):
                answer = wire.reply()
                if isinstance(answer, Refusal):
                    outcomes[at] = self._refused(answer)
                elif answer is None:
                    outcomes[at] = State.DONE
                    num_present += 1
                elif answer == b"OK":
                    outcomes[at] = State.DONE
                    self._metrics.bytes_written.add(size, self._tier)
                else:
                    raise ConnectionError(f"not an answer to SET: {answer!r}")
            self._present += (num_present / len(window) - self._present) / 4

    def _send_blocks(
        self, wire: Wire, places: Sequence[int], run: Run, names: Sequence[bytes], blocks: Sequence[memoryview]
    ) -> list[int]:
        """Send a SET for each place; returns the bytes of their payloads."""
        sizes: list[int] = []
        pieces: list[Buffer] = []
        waiting = 0
        for at in places:
            header, payload = self._seal(run, at, blocks[at])
            size = HEADER_BYTES + len(payload)
            pieces += (b"%b%b\r\n$%d\r\n%b" % (self._set, names[at], size, header), payload, self._set_end)
            sizes.append(len(payload))
            waiting += size
            if waiting >= _SEND_BYTES:
                wire.send(pieces)
                pieces, waiting = [], 0
        if pieces:
            wire.send(pieces)
        return sizes

    def _seal(self, run: Run, at: int, block: memoryview) -> tuple[bytes, memoryview]:
        return seal(
            block,
            codec=self._codec,
            key=run.keys[at],
            parent=run.keys[at - 1] if at else run.parent,
            depth=run.depth + at,
            fingerprint=self._fingerprint,
        )

    def probe(self, wire: Wire, places: Sequence[int], outcomes: list[Outcome], *, names: Sequence[bytes]) -> None:
        """Ask for each key by itself."""
        for window in _windows(places, _PROBES):
            wire.send([_repeat(self._exists, [names[at] for at in window])])
            for at in window:
                answer = wire.reply()
                if isinstance(answer, Refusal):
                    outcomes[at] = self._refused(answer)
                else:
                    outcomes[at] = State.DONE if answer == 1 else Miss.ABSENT

    def probe_run(self, wire: Wire, places: Sequence[int], outcomes: list[Outcome], *, names: Sequence[bytes]) -> None:
        """Count present keys by groups, then look into the first group that is short; all groups after it count as absent."""
        for trip in _windows(places, _GROUPS * _GROUP):
            groups = list(_windows(trip, _GROUP))
            wire.send(
                [
                    b"*%d\r\n$6\r\nEXISTS\r\n" % (1 + len(group)) + _repeat(self._name, [names[at] for at in group])
                    for group in groups
                ]
            )
            answers = [wire.reply() for _ in groups]
            for group, answer in zip(groups, answers, strict=True):
                if answer == len(group):
                    for at in group:
                        outcomes[at] = State.DONE
                    continue
                rest: Outcome = Miss.ABSENT
                if isinstance(answer, Refusal):
                    rest = self._refused(answer)
                else:
                    self.probe(wire, group, outcomes, names=names)
                for at in places:
                    if outcomes[at] is State.OPEN:
                        outcomes[at] = rest
                return

    def forget(self, wire: Wire, places: Sequence[int], outcomes: list[Outcome], *, names: Sequence[bytes]) -> None:
        """Delete; absent ones are fine."""
        for window in _windows(places, _PROBES):
            wire.send([_repeat(self._unlink, [names[at] for at in window])])
            for at in window:
                answer = wire.reply()
                outcomes[at] = self._refused(answer) if isinstance(answer, Refusal) else State.DONE

    def _refused(self, refusal: Refusal) -> Outcome:
        word = refusal.word
        if word in ("MOVED", "ASK") and self._clustered:
            return State.MOVED
        if word == "WRONGTYPE":
            return Miss.CORRUPT  # under a name that only a block may have
        if word == "CLUSTERDOWN":
            self._on_suspect()
        if word not in self._said:
            self._said.add(word)
            log.warning("redis: the server refuses a command: %s (said once)", refusal)
        return Miss.FAILED

    # The same for one key that a cluster redirected.

    def fetch_moved(self, send: Send, *, key: Key, name: bytes, out: memoryview) -> Outcome:
        """Fetch a block through the library."""
        value = send("GET", name)
        if not isinstance(value, bytes):
            return Miss.ABSENT
        view = memoryview(value)
        return self._open(key, view, view[HEADER_BYTES:], out)

    def store_moved(self, send: Send, *, run: Run, at: int, name: bytes, block: memoryview) -> Outcome:
        """Store a block through the library."""
        header, payload = self._seal(run, at, block)
        if send("SET", name, b"".join((header, payload)), "NX", *self._expiry):
            self._metrics.bytes_written.add(len(payload), self._tier)
        return State.DONE


def layout_name(prefix: str, fingerprint: bytes) -> bytes:
    """Where writers leave the fields of their layout as JSON, for `tierkv inspect`; longer than any block's name."""
    return f"{prefix}:layout:{fingerprint.hex()}".encode()


def namespace_name(prefix: str, root: bytes | str) -> bytes:
    """Where writers leave what a root stands for, as JSON, for `tierkv explain`. root: its bytes, or a pattern."""
    return f"{prefix}:namespace:{root if isinstance(root, str) else root.hex()}".encode()


def _repeat(head: bytes, names: Sequence[bytes], end: bytes = b"\r\n") -> bytes:
    """One command per name, or one argument: three times faster than packing each."""
    return head + (end + head).join(names) + end


def _windows(places: Sequence[int], most: int) -> Iterator[Sequence[int]]:
    return (places[at : at + most] for at in range(0, len(places), most))
