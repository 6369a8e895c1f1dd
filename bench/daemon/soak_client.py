"""One client of the soak: a mixed load, each block a function of its key, every read compared byte for byte; and its end.

What it does is told through a pipe once a second, so that a crash loses a second of figures at most; bytes that are not the
key's are told at once.
"""

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from multiprocessing.connection import Connection
from typing import Final

import numpy as np
import numpy.typing as npt

from tierkv.daemon.blocks import Blocks
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.link import Link
from tierkv.daemon.protocol import LOANS, Op, State, encode
from tierkv.errors import RefusedError, TierError
from tierkv.keys import Key, Namespace, chain
from tierkv.layout import Layout
from tierkv.tiers.base import Run

LAYOUT: Final = Layout(num_layers=8, num_kv_heads=2, head_dim=64, dtype="bfloat16")
BLOCK_BYTES: Final = LAYOUT.block_bytes
MAX_RUN: Final = 32
PATH_BLOCKS: Final = 48
NUM_STEMS: Final = 40
"""Stems in use at a time; a new one comes, and an old one goes, every two seconds."""
NUM_FORKS: Final = 4
DEADLINE_S: Final = 5.0
TELL_EVERY_S: Final = 1.0
NAMESPACE: Final = Namespace("soak", LAYOUT)
_RAMP: Final = np.arange(BLOCK_BYTES // 8, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)

WEIGHTS: Final = {
    "read": 30,
    "borrow": 6,
    "write": 25,
    "presence": 12,
    "seek": 10,
    "ping": 8,
    "wait": 3,
    "pin": 3,
    "delete": 2,
    "cut": 1,
}


@dataclass(frozen=True, slots=True)
class Order:
    """What a client is to do. crash: how it ends, when `crash_s` have passed; None: it works until `end`, a monotonic time."""

    url: str
    seed: int
    began: float
    end: float
    crash: str | None
    crash_s: float


@dataclass
class Told:
    """What a client did since it told last. took: seconds of each call, by operation.  states: of blocks, by operation.

    refused, errors: by text.  wrong: what was read and was not the key's.
    """

    took: dict[str, list[float]] = field(default_factory=dict)
    states: Counter[tuple[str, str]] = field(default_factory=Counter)
    moved_bytes: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


def content(key: Key, out: npt.NDArray[np.uint64]) -> None:
    """Write the block of a key: no two keys agree in any word."""
    np.bitwise_xor(_RAMP, np.frombuffer(key, "<u8", 1), out=out)


@lru_cache(256)
def path(stem: int, fork: int) -> Run:
    """A whole path; forks of a stem share its beginning."""
    at = np.arange(PATH_BLOCKS)
    tokens = np.zeros((PATH_BLOCKS, LAYOUT.block_tokens), "<i4")
    tokens[:, 0], tokens[:, 1] = stem, at
    tokens[4 + (stem * 7 + fork * 11) % 40 :, 2] = fork
    root = NAMESPACE.root()
    return Run(root, root, 0, tuple(chain(root, tokens.tobytes(), block_tokens=LAYOUT.block_tokens)), tokens.tobytes())


def part(run: Run, lo: int, hi: int) -> Run:
    """Blocks [lo, hi) of a path."""
    step = 4 * LAYOUT.block_tokens
    return Run(run.root, run.keys[lo - 1] if lo else run.root, lo, run.keys[lo:hi], run.tokens[lo * step : hi * step])


class SoakClient:
    """The load and its verification. One thread."""

    def __init__(self, order: Order, tell: Connection) -> None:
        self.order, self._tell = order, tell
        self._choose = np.random.default_rng(order.seed)
        self.client = DaemonClient(order.url, name=f"soak-{order.seed}", connect_s=DEADLINE_S)
        self.blocks = Blocks(self.client, namespace=NAMESPACE, root=NAMESPACE.root())
        self._area = np.zeros((MAX_RUN, BLOCK_BYTES // 8), np.uint64)
        self._views = [row.data.cast("B") for row in self._area]
        self._right = np.zeros(BLOCK_BYTES // 8, np.uint64)
        self.told = Told()
        self._continued = 0.0  # when it was last stopped and continued: such calls took as long as somebody wanted

    def run(self) -> None:
        """Work until the end, or the crash."""
        names, shares = list(WEIGHTS), np.array(list(WEIGHTS.values())) / sum(WEIGHTS.values())
        crash_at = time.monotonic() + self.order.crash_s
        if self.order.crash == "anywhere":
            killer = threading.Timer(self.order.crash_s, os.kill, (os.getpid(), signal.SIGKILL))
            killer.daemon = True
            killer.start()
        last = time.monotonic()
        while (now := time.monotonic()) < self.order.end:
            if self.order.crash and now >= crash_at:
                self._attempt("crash", lambda: _CRASHES[self.order.crash or ""](self))
                crash_at = now + 0.1  # refused: there was no room; again soon
            name = names[self._choose.choice(len(names), p=shares)]
            self._attempt(name, getattr(self, name))
            if now - last >= TELL_EVERY_S:
                self._send()
                last = now
        self._send()
        self.close()

    def close(self) -> None:
        """Leave in good order."""
        self.blocks.close()
        self.client.close()

    def _attempt(self, name: str, call: Callable[[], object]) -> None:
        try:
            call()
        except RefusedError as error:
            self.told.refused[f"{name}: {_plain(error)}"] += 1
        except TierError as error:
            self.told.errors[f"{name}: {_plain(error)}"] += 1

    def _send(self) -> None:
        told, self.told = self.told, Told()
        self._tell.send(told)

    def _time(self, name: str, start: float) -> None:
        if self._continued < start:
            self.told.took.setdefault(name, []).append(time.perf_counter() - start)

    def note_continued(self, *_: object) -> None:
        """Handle SIGCONT."""
        self._continued = time.perf_counter()

    def _some(self) -> tuple[Run, int, int]:
        """A path, and a stretch of it."""
        first = int((time.monotonic() - self.order.began) / 2)
        run = path(first + int(self._choose.integers(NUM_STEMS)), int(self._choose.integers(NUM_FORKS)))
        lo = int(self._choose.integers(PATH_BLOCKS))
        return run, lo, min(PATH_BLOCKS, lo + int(self._choose.integers(1, MAX_RUN + 1)))

    def _count(self, name: str, states: Sequence[State], moved: State) -> None:
        self.told.states.update((name, state.name) for state in states)
        self.told.moved_bytes += states.count(moved) * BLOCK_BYTES

    # -- operations ---------------------------------------------------------------------------------------------------

    def write(self) -> None:
        """Go on where the daemon's knowledge of a path ends; sometimes elsewhere, whether it knows the parent or not."""
        run, lo, hi = self._some()
        if self._choose.random() < 0.8:
            lo = min(self.blocks.seek(run), PATH_BLOCKS - 1)
            hi = min(PATH_BLOCKS, lo + int(self._choose.integers(1, MAX_RUN + 1)))
        stretch = part(run, lo, hi)
        for key, row in zip(stretch.keys, self._area, strict=False):
            content(key, row)
        start = time.perf_counter()
        states = self.blocks.write(stretch, self._views[: hi - lo], deadline_s=DEADLINE_S)
        self._time("write", start)
        self._count("write", states, State.HERE)

    def read(self) -> None:
        """Read a stretch that somebody may have written, from its beginning or anywhere."""
        run, lo, hi = self._some()
        if self._choose.random() < 0.5:
            lo, hi = 0, hi - lo
        keys = run.keys[lo:hi]
        self._area[: hi - lo] = 0
        start = time.perf_counter()
        states = self.blocks.read(keys, self._views[: hi - lo], deadline_s=DEADLINE_S)
        self._time("read", start)
        self._count("read", states, State.HERE)
        for key, row, state in zip(keys, self._area, states, strict=False):
            if state is State.HERE:
                self._verify("read", key, row)

    def borrow(self) -> None:
        """Copy out of the daemon's memory by oneself."""
        run, lo, hi = self._some()
        keys = run.keys[lo:hi]
        start = time.perf_counter()
        with self.blocks.borrow(keys, deadline_s=DEADLINE_S) as loan:
            if loan is None:
                return
            for row, place in zip(self._area, loan.places, strict=False):
                if place is not None:
                    row[:] = loan.rows[place, :BLOCK_BYTES].view(np.uint64)
            intact = loan.intact()
        self._time("borrow", start)
        states = [State.ABSENT if place is None else State.HERE if intact else State.LATE for place in loan.places]
        self._count("borrow", states, State.HERE)
        for key, row, state in zip(keys, self._area, states, strict=False):
            if state is State.HERE:
                self._verify("borrow", key, row)

    def _verify(self, name: str, key: Key, row: npt.NDArray[np.uint64]) -> None:
        content(key, self._right)
        if not np.array_equal(row, self._right):
            differs = np.flatnonzero(row != self._right)
            self.told.wrong.append(
                f"{name} {key.hex()[:16]}: {len(differs)} of {len(row)} words from {differs[0]} on, there {row[differs[0]]:x}"
            )
            self._send()

    def presence(self) -> None:
        """Ask for a whole path."""
        run, _, _ = self._some()
        start = time.perf_counter()
        self.blocks.presence(run.keys, timeout_s=DEADLINE_S)
        self._time("presence", start)

    def seek(self) -> None:
        """Look a whole path up, as a request does."""
        run, _, _ = self._some()
        start = time.perf_counter()
        self.blocks.seek(run, timeout_s=DEADLINE_S)
        self._time("seek", start)

    def ping(self) -> None:
        """The smallest round trip."""
        start = time.perf_counter()
        self.client.ping()
        self._time("ping", start)

    def wait(self) -> None:
        """Wait for what may come."""
        run, _, _ = self._some()
        self.blocks.wait(run.keys, known=8, deadline_s=float(self._choose.uniform(0, 0.2)))

    def pin(self) -> None:
        """Keep something for a moment."""
        run, lo, hi = self._some()
        start = time.perf_counter()
        self.blocks.pin(run.keys[lo:hi], ttl_s=float(self._choose.uniform(0.1, 2)))
        self._time("pin", start)

    def delete(self) -> None:
        """Let something be forgotten everywhere."""
        run, lo, hi = self._some()
        start = time.perf_counter()
        self.blocks.delete(run.keys[lo : min(hi, lo + 4)])
        self._time("delete", start)

    def cut(self) -> None:
        """Lose the connection in the middle of a message, and go on."""
        with self._begun_fill() as (link, half):
            link._sock.sendall(half)  # what no client of ours does
            raise TierError("cut")

    # -- ends ---------------------------------------------------------------------------------------------------------

    def crash_reserved(self) -> None:
        """Die between RESERVE and COMMIT, half the places filled."""
        with self.blocks._link(DEADLINE_S) as (link, attached):
            table, _, keys = self._reserve(link, attached.pool)
            for row, key in list(zip(table, keys, strict=True))[: len(keys) // 2 + 1]:
                if attached.region and row["state"] == State.HERE:
                    content(key, attached.region.rows[row["place"], :BLOCK_BYTES].view(np.uint64))
            self._die()

    def crash_lent(self) -> None:
        """Die with a loan."""
        run, lo, hi = self._some()
        with self.blocks._link(DEADLINE_S) as (link, attached):
            self.blocks._lend(link, attached, run.keys[lo:hi], time.monotonic() + DEADLINE_S)
            self._die()

    def crash_filling(self) -> None:
        """Die in the middle of a FILL."""
        with self._begun_fill() as (link, half):
            link._sock.sendall(half)
            self._die()

    def _die(self) -> None:
        self._send()
        os.kill(os.getpid(), signal.SIGKILL)

    def _reserve(self, link: Link, pool: int) -> "tuple[npt.NDArray[np.void], int, tuple[Key, ...]]":
        run, lo, hi = self._some()
        run = part(run, lo, hi)
        fields = {"pool": pool, "root": run.root, "parent": run.parent, "depth": run.depth}
        reply = link.call(Op.RESERVE, fields, [memoryview(run.tokens)], timeout_s=DEADLINE_S)
        if not reply.number("lease"):
            raise RefusedError("nothing was reserved")
        return np.frombuffer(reply.payload, LOANS), reply.number("lease"), run.keys

    def _begun_fill(self) -> "_Begun":
        return _Begun(self)


class _Begun:
    """A connection with a reservation, and the first half of its FILL."""

    def __init__(self, client: SoakClient) -> None:
        self._client = client
        self._link = client.blocks._link(DEADLINE_S)

    def __enter__(self) -> tuple[Link, bytes]:
        link, attached = self._link.__enter__()
        try:
            table, lease, keys = self._client._reserve(link, attached.pool)
        except BaseException as error:
            self._link.__exit__(type(error), error, error.__traceback__)
            raise
        wanted = [key for key, row in zip(keys, table, strict=True) if row["state"] == State.HERE]
        for key, row in zip(wanted, self._client._area, strict=False):
            content(key, row)
        payload = self._client._area[: len(wanted)].tobytes()
        fields = {"lease": lease, "checksums": bytes(8 * len(wanted))}
        frame = encode(Op.FILL, 1 << 20, fields, payload_bytes=len(payload)) + payload
        return link, frame[: int(self._client._choose.integers(1, len(frame)))]

    def __exit__(self, *raised: object) -> bool | None:
        return self._link.__exit__(*raised)  # type: ignore[arg-type]  # as it came


_CRASHES: Final[dict[str, Callable[[SoakClient], None]]] = {
    "anywhere": lambda client: None,
    "reserved": SoakClient.crash_reserved,
    "lent": SoakClient.crash_lent,
    "filling": SoakClient.crash_filling,
}
CRASHES: Final = tuple(_CRASHES)


def _plain(error: Exception) -> str:
    """An error without its figures, so that equal ones are counted together."""
    text = str(error).rsplit(": ", 1)[-1] if isinstance(error, TierError) else str(error)
    return "".join("#" if letter.isdigit() else letter for letter in text)[:100].replace("##", "#").replace("##", "#")


def be_client(order: Order, tell: Connection) -> None:
    """The process of a client."""
    client = SoakClient(order, tell)
    signal.signal(signal.SIGCONT, client.note_continued)
    client.run()
