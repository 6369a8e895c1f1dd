"""The blocks of one layout in a daemon, as a client sees them: read, write, look up, borrow, pin."""

import os
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Final
from weakref import WeakKeyDictionary

import numpy as np
import numpy.typing as npt

from tierkv.daemon.client import DaemonClient
from tierkv.daemon.link import Link
from tierkv.daemon.memory import Bytes, Region, bytes_of, copy_in, copy_out, digest
from tierkv.daemon.protocol import LOANS, MAX_KEYS, Message, Op, State
from tierkv.errors import LayoutError, ProtocolError
from tierkv.keys import KEY_BYTES, Key, Namespace
from tierkv.tiers.base import Run

PIECE_BYTES: Final = 32 << 20
"""Of blocks in one request: little enough that the leases of a slow reader are few."""
SHARES: Final = 4
"""Parts of what this client may have on lease: so many of its threads may read at a time."""
TOUCHED_BYTES: Final = 1 << 30
"""Of shared memory whose pages are mapped when a client attaches."""
GRACE_S: Final = 0.5
"""Beyond a deadline that the daemon was told, before its silence is a failure."""
ATTACH_S: Final = 30.0
"""For a daemon that opens a folder first."""
WRITE_S: Final = 60.0
MAX_WAIT_S: Final = 86_400.0
"""What a longer deadline counts as."""
MAX_PLACES: Final = 1 << 31

Table = npt.NDArray[np.void]


@dataclass(slots=True)
class _Attached:
    """What one instance of the daemon calls this pool, and its memory if it is shared. most: blocks of one request."""

    instance: bytes
    pool: int
    region: Region | None
    writable: bool
    most: int


@dataclass(slots=True, eq=False)
class Loan:
    """Blocks in the daemon's memory, pinned there: one place per key, None where there is no sound block.

    rows: [num_places, stride] uint8; a block is the first `block_bytes` of its row.
    """

    rows: Bytes
    places: list[int | None]
    _generations: npt.NDArray[np.uint64] = field(repr=False)
    _expected: list[int] = field(repr=False)

    def intact(self) -> bool:
        """Whether nothing was taken back while it was read: to be asked after the last copy, and believed only then."""
        return all(
            place is None or int(self._generations[place]) == expected
            for place, expected in zip(self.places, self._expected, strict=True)
        )


class Blocks:
    """Blocks of `namespace` under `root`. Thread-safe. device_bytes: pages over it in this process, for the daemon's arithmetic.

    shares: False sends blocks through the socket even where memory could be shared.
    Calls raise TierError when the daemon cannot be reached, RefusedError when it says no; single blocks are values.
    """

    def __init__(
        self, client: DaemonClient, *, namespace: Namespace, root: Key, device_bytes: int = 0, shares: bool = True
    ) -> None:
        self.client, self.layout = client, namespace.layout
        self._namespace, self._root, self._device_bytes, self.shares = namespace, root, device_bytes, shares
        self._lock = threading.Lock()
        self._attached: _Attached | None = None  # the latest
        self._by_link: WeakKeyDictionary[Link, _Attached] = WeakKeyDictionary()
        self._most = max(1, min(PIECE_BYTES // self.layout.block_bytes, MAX_KEYS))

    # -- attaching ----------------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Attach now, to hear of a refusal: calls do it by themselves."""
        with self._link(ATTACH_S):
            pass

    @contextmanager
    def _link(self, timeout_s: float) -> "Iterator[tuple[Link, _Attached]]":
        """A connection that is attached. timeout_s: for attaching, if need be.

        Each is, since a daemon forgets a client that has lost its last one; memory of the same instance is mapped once.
        """
        with self.client.link() as link:
            attached = self._by_link.get(link)
            if attached is None:
                attached = self._attach(link, min(ATTACH_S, max(GRACE_S, timeout_s)))
                with self._lock:
                    self._attached = self._by_link[link] = attached
            yield link, attached

    def _attach(self, link: Link, timeout_s: float) -> _Attached:
        fields = {
            "layout": asdict(self.layout),
            "namespace": {
                "model": self._namespace.model,
                "adapter": self._namespace.adapter,
                "tenant": self._namespace.tenant,
            },
            "root": self._root,
            "device_bytes": self._device_bytes,
            "memory": int(link.hello.flag("memory") and self.shares),
        }
        reply = link.call(Op.ATTACH, fields, timeout_s=timeout_s, wants_fds=True)
        try:
            region, writable, pool = None, reply.flag("writable"), reply.number("pool")
            known = self._attached
            if reply.flag("memory"):
                size = reply.number("block_bytes")
                if len(reply.fds) != 1 or size != self.layout.block_bytes:
                    raise ProtocolError(f"shared memory with {len(reply.fds)} descriptors, blocks of {size} bytes")
                places = reply.number("places", most=MAX_PLACES)
                if known and (known.instance, known.pool, known.writable) == (link.instance, pool, writable):
                    region = known.region
                if region is None:
                    region = Region(reply.fds[0], num_places=places, block_bytes=size, writable=writable)
                    region.touch(TOUCHED_BYTES)
            most = max(1, min(self._most, reply.number("lease_blocks") // SHARES))
            return _Attached(link.instance, pool, region, writable, most)
        finally:
            for fd in reply.fds:
                os.close(fd)

    @property
    def shares_memory(self) -> bool:
        """Whether blocks go through memory that both map, as far as is known now."""
        return self._attached is not None and self._attached.region is not None

    # -- finding ------------------------------------------------------------------------------------------------------

    def presence(self, keys: Sequence[Key], *, timeout_s: float = 5.0) -> bytes:
        """One byte per key: 0, or 1 + the number of the fastest tier of the daemon that holds it (host 1, disk 2)."""
        found = b""
        for at in range(0, len(keys), MAX_KEYS):
            with self._link(timeout_s) as (link, attached):
                part = keys[at : at + MAX_KEYS]
                payload = [memoryview(b"".join(part))]
                reply = link.call(Op.CONTAINS, {"pool": attached.pool}, payload, timeout_s=timeout_s)
            if len(reply.payload) != len(part):
                raise ProtocolError(f"{len(reply.payload)} answers for {len(part)} keys")
            found += reply.payload
        return found

    def seek(self, run: Run, *, timeout_s: float = 5.0) -> int:
        """How many leading blocks of `run` the daemon has, in any tier; it counts as a use."""
        count = min(len(run.keys), MAX_KEYS, (1 << 24) // (KEY_BYTES + 4 * self.layout.block_tokens))
        if not count:
            return 0
        tokens = run.tokens[: count * 4 * self.layout.block_tokens]
        with self._link(timeout_s) as (link, attached):
            fields = {"pool": attached.pool, "root": run.root, "parent": run.parent, "depth": run.depth}
            payload = [memoryview(b"".join(run.keys[:count])), memoryview(tokens)]
            return link.call(Op.SEEK, fields, payload, timeout_s=timeout_s).number("found", most=count)

    def wait(self, keys: Sequence[Key], *, known: int, deadline_s: float) -> int:
        """How many leading keys the daemon has: once they are more than `known`, or the time is up."""
        deadline_s = min(deadline_s, MAX_WAIT_S)
        with self._link(deadline_s) as (link, attached):
            fields = {"pool": attached.pool, "known": known, "deadline_s": deadline_s}
            payload = [memoryview(b"".join(keys[:MAX_KEYS]))]
            return link.call(Op.AWAIT, fields, payload, timeout_s=deadline_s + GRACE_S).number("found", most=len(keys))

    def pin(self, keys: Sequence[Key], *, ttl_s: float) -> tuple[str, int]:
        """Keep the leading ones of these blocks in the daemon's memory for a time; the name of the pin, and how many.

        A pin that ends with the same block is replaced.
        """
        with self._link(ATTACH_S) as (link, attached):
            fields = {"pool": attached.pool, "prefix": "", "ttl_s": ttl_s}
            reply = link.call(Op.PIN, fields, [memoryview(b"".join(keys))], timeout_s=60.0)
            return reply.text("pin"), reply.number("blocks", most=len(keys))

    def delete(self, keys: Sequence[Key], *, timeout_s: float = 30.0) -> None:
        """Let every tier of the daemon forget these blocks, for everyone."""
        for at in range(0, len(keys), MAX_KEYS):
            with self._link(timeout_s) as (link, attached):
                payload = [memoryview(b"".join(keys[at : at + MAX_KEYS]))]
                link.call(Op.DELETE, {"pool": attached.pool}, payload, timeout_s=timeout_s)

    # -- reading ------------------------------------------------------------------------------------------------------

    def read(self, keys: Sequence[Key], outs: Sequence[memoryview], *, deadline_s: float) -> list[State]:
        """Fill `outs` with blocks, verified. Raises LayoutError for an `out` of another size."""
        targets = self._arrays(keys, outs)
        end = time.monotonic() + min(deadline_s, MAX_WAIT_S)
        states: list[State] = []
        while (at := len(states)) < len(keys):
            if time.monotonic() >= end:
                return states + [State.LATE] * (len(keys) - at)
            with self._link(end - time.monotonic()) as (link, attached):
                part = slice(at, at + attached.most)
                if attached.region:
                    states += self._copy(link, attached, attached.region, keys[part], targets[part], end)
                else:
                    states += self._fetch(link, attached, keys[part], targets[part], end)
        return states

    def _copy(
        self, link: Link, attached: _Attached, region: Region, keys: Sequence[Key], outs: Sequence[Bytes], end: float
    ) -> list[State]:
        table, lease = self._lend(link, attached, keys, end)
        states = [State(row) for row in table["state"].tolist()]
        bad = []
        for at, (place, state) in enumerate(zip(table["place"].tolist(), states, strict=True)):
            if state is not State.HERE:
                continue
            if time.monotonic() >= end:
                states[at] = State.LATE
                continue
            came = copy_out(self._row(region, place), outs[at], keys[at])
            if int(region.generations[place]) != int(table["generation"][at]):
                states[at] = State.LATE  # the lease was taken back
            elif came != int(table["checksum"][at]):
                states[at] = State.CORRUPT
                bad.append(keys[at])
        self._release(link, attached, lease, bad)
        return states

    def _lend(self, link: Link, attached: _Attached, keys: Sequence[Key], end: float) -> tuple[Table, int]:
        left = max(0.0, end - time.monotonic())
        fields, payload = {"pool": attached.pool, "deadline_s": left}, [memoryview(b"".join(keys))]
        reply = link.call(Op.LEND, fields, payload, timeout_s=left + GRACE_S)
        return _table(reply.payload, len(keys)), reply.number("lease")

    def _row(self, region: Region, place: int) -> Bytes:
        if not 0 <= place < region.num_places:
            raise ProtocolError(f"place {place} of {region.num_places}")
        return region.rows[place, : self.layout.block_bytes]

    @staticmethod
    def _release(link: Link, attached: _Attached, lease: int, bad: Sequence[Key]) -> None:
        if lease:
            link.send(Op.RELEASE, {"lease": lease}, timeout_s=GRACE_S)
        Blocks._report(link, attached, bad)

    @staticmethod
    def _report(link: Link, attached: _Attached, bad: Sequence[Key]) -> None:
        if bad:
            link.send(Op.REPORT, {"pool": attached.pool}, [memoryview(b"".join(bad))], timeout_s=GRACE_S)

    def _fetch(
        self, link: Link, attached: _Attached, keys: Sequence[Key], outs: Sequence[Bytes], end: float
    ) -> list[State]:
        def sink(message: Message, size: int) -> list[memoryview]:
            if message.op is not Op.REPLY:
                raise ProtocolError(f"{message.op.name} with {size} bytes where blocks were expected")
            here = _table(message.fields.get("table"), len(keys))["state"] == State.HERE
            return [out.data for out, ok in zip(outs, here.tolist(), strict=True) if ok]

        left = max(0.0, end - time.monotonic())
        fields, payload = {"pool": attached.pool, "deadline_s": left}, [memoryview(b"".join(keys))]
        reply = link.call(Op.READ, fields, payload, timeout_s=left + GRACE_S, sink=sink)
        table = _table(reply.data("table"), len(keys))
        states = [State(row) for row in table["state"].tolist()]
        bad = []
        for at, state in enumerate(states):
            if state is State.HERE and digest(outs[at].data, keys[at]) != int(table["checksum"][at]):
                states[at] = State.CORRUPT
                bad.append(keys[at])
        self._report(link, attached, bad)
        return states

    @contextmanager
    def borrow(self, keys: Sequence[Key], *, deadline_s: float) -> Iterator[Loan | None]:
        """Blocks to copy out of the daemon's memory oneself, verified there; None where that is not shared."""
        end = time.monotonic() + min(deadline_s, MAX_WAIT_S)
        with self._link(deadline_s) as (link, attached):
            region = attached.region
            if region is None:
                yield None
                return
            table, lease = self._lend(link, attached, keys, end)
            places: list[int | None] = [None] * len(keys)
            bad = []
            for at, (place, state) in enumerate(zip(table["place"].tolist(), table["state"].tolist(), strict=True)):
                if state != State.HERE:
                    continue
                if digest(self._row(region, place).data, keys[at]) == int(table["checksum"][at]):
                    places[at] = place
                else:
                    bad.append(keys[at])
            try:
                yield Loan(region.rows, places, region.generations, table["generation"].tolist())
            finally:
                self._release(link, attached, lease, bad)

    # -- writing ------------------------------------------------------------------------------------------------------

    def write(self, run: Run, blocks: Sequence[memoryview], *, deadline_s: float = WRITE_S) -> list[State]:
        """Keep the blocks of `run`: HERE and PRESENT are kept. Raises LayoutError for a block of another size."""
        sources = self._arrays(run.keys, blocks)
        end = time.monotonic() + min(deadline_s, MAX_WAIT_S)
        step = self.layout.block_tokens * 4
        if len(run.tokens) != len(run.keys) * step:
            raise LayoutError(
                f"{len(run.tokens)} bytes of tokens for {len(run.keys)} blocks of {step}: the daemon needs them"
            )
        states: list[State] = []
        for lo in range(0, len(run.keys), self._most):
            if time.monotonic() >= end:
                return states + [State.LATE] * (len(run.keys) - lo)
            hi = min(len(run.keys), lo + self._most)
            parent = run.keys[lo - 1] if lo else run.parent
            part = Run(run.root, parent, run.depth + lo, run.keys[lo:hi], run.tokens[lo * step : hi * step])
            with self._link(end - time.monotonic()) as (link, attached):
                states += self._write(link, attached, part, sources[lo:hi], end)
        return states

    def _write(self, link: Link, attached: _Attached, run: Run, sources: Sequence[Bytes], end: float) -> list[State]:
        fields = {"pool": attached.pool, "root": run.root, "parent": run.parent, "depth": run.depth}
        reply = link.call(Op.RESERVE, fields, [memoryview(run.tokens)], timeout_s=_left(end))
        table, lease = _table(reply.payload, len(run.keys)), reply.number("lease")
        states = [State(row) for row in table["state"].tolist()]
        if not lease:
            return states
        wanted = [(at, place) for at, place in enumerate(table["place"].tolist()) if states[at] is State.HERE]
        checksums = np.zeros(len(wanted), "<u8")
        if attached.region and attached.writable:
            for number, (at, place) in enumerate(wanted):
                checksums[number] = copy_in(sources[at], self._row(attached.region, place), run.keys[at])
            op, payload = Op.COMMIT, []
        else:
            for number, (at, _) in enumerate(wanted):
                checksums[number] = digest(sources[at].data, run.keys[at])
            op, payload = Op.FILL, [sources[at].data for at, _ in wanted]
        link.call(op, {"lease": lease, "checksums": checksums.tobytes()}, payload, timeout_s=_left(end))
        return states

    def _arrays(self, keys: Sequence[Key], views: Sequence[memoryview]) -> list[Bytes]:
        if len(keys) != len(views):
            raise LayoutError(f"{len(views)} buffers for {len(keys)} keys")
        for view in views:
            if view.nbytes != self.layout.block_bytes:
                raise LayoutError(f"buffer of {view.nbytes} bytes: a block has {self.layout.block_bytes}")
        return bytes_of(views)

    def close(self) -> None:
        """Let go of the daemon's memory."""
        with self._lock:
            self._attached = None  # the mapping goes with its last reader


def _left(end: float) -> float:
    return max(GRACE_S, end - time.monotonic())


def _table(given: object, count: int) -> Table:
    if not isinstance(given, bytes | bytearray) or len(given) != count * LOANS.itemsize:
        raise ProtocolError(f"no table of {count} blocks, {LOANS.itemsize} bytes each")
    table = np.frombuffer(given, LOANS)
    if count and int(table["state"].max()) > State.LATE:
        raise ProtocolError("a table with a state that there is not")
    return table
