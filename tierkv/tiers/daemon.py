"""The daemon as a tier of an engine's store: one pool of blocks for all engines of a machine.

While the daemon is away everything is a miss, at once: a first failure leaves it alone for a while, and the engine runs on.
When it is back, under the same address, the next call finds it.
"""

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, ClassVar, Final, TypeVar

from tierkv.daemon.blocks import Blocks
from tierkv.daemon.client import DaemonClient, fatal
from tierkv.daemon.protocol import MAX_KEYS, State
from tierkv.errors import ProtocolError, RefusedError, TierError
from tierkv.keys import Key, Namespace
from tierkv.metrics import Metrics
from tierkv.tiers.base import Lending, Miss, Run, Tier

MISSES: Final = {
    State.ABSENT: Miss.ABSENT,
    State.LATE: Miss.LATE,
    State.BUSY: Miss.BUSY,
    State.CORRUPT: Miss.CORRUPT,
}
T = TypeVar("T")
log = logging.getLogger("tierkv")


class DaemonTier(Tier):
    """Blocks of one namespace in the daemon of `client`, which it owns. deadline_s: for a batch that brings none.

    device_bytes: pages of the engine over it. A daemon that is not there yet is down; one that says no, since this
    configuration cannot work with it, is a ConfigError.
    """

    name: ClassVar[str] = "daemon"
    shared: ClassVar[bool] = True
    waits: ClassVar[bool] = True

    def __init__(
        self,
        client: DaemonClient,
        *,
        namespace: Namespace,
        root: Key,
        metrics: Metrics,
        deadline_s: float = 5.0,
        device_bytes: int = 0,
    ) -> None:
        self.blocks = Blocks(client, namespace=namespace, root=root, device_bytes=device_bytes)
        self._client, self._metrics, self._deadline_s = client, metrics, deadline_s
        self._closed = False
        try:
            self.blocks.attach()
        except RefusedError as error:
            client.close()
            raise fatal(error) or TierError(str(error)) from None
        except TierError as error:
            log.warning("daemon: %s (engines run without it until it is there)", error)

    @property
    def url(self) -> str:
        """Where it is."""
        return self._client.url

    def stats(self) -> dict[str, Any]:  # Any: JSON
        """What the daemon tells of itself. Raises TierError while it is away."""
        return self._asked(self._client.stats)

    def pin(self, keys: Sequence[Key], *, ttl_s: float) -> tuple[str, int]:
        """Keep the leading ones of these blocks in the daemon's memory for a time; see `Blocks.pin`. Raises TierError."""
        return self._asked(lambda: self.blocks.pin(keys, ttl_s=ttl_s))

    def unpin(self, name: str) -> None:
        """End a pin before its time. Raises TierError."""
        self._asked(lambda: self._client.unpin(name))

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        """One round trip. Raises TierError while the daemon is away."""
        if self._closed:
            return [False] * len(keys)
        return [tier > 0 for tier in self._asked(lambda: self.blocks.presence(keys, timeout_s=self._deadline_s))]

    def seek(self, run: Run) -> int:
        """One round trip; the daemon's policies learn of the request."""
        if self._closed:
            return 0
        return self._asked(lambda: self.blocks.seek(run, timeout_s=self._deadline_s))

    def wait(self, keys: Sequence[Key], *, known: int, deadline_s: float) -> int:
        """How many leading keys are there, once they are more than `known` or the time is up."""
        if self._closed:
            return 0
        return self._asked(lambda: self.blocks.wait(keys, known=known, deadline_s=deadline_s))

    @staticmethod
    def _asked(ask: Callable[[], T]) -> T:
        """A refusal is a failure of the tier, too, as far as a store is concerned."""
        try:
            return ask()
        except (RefusedError, ProtocolError) as error:
            raise TierError(str(error)) from error

    def read(self, keys: Sequence[Key], outs: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """Copy out of shared memory, or receive. Raises LayoutError for another size, TierError while it is away."""
        if self._closed:
            self._metrics.misses.add(len(keys), self.name, Miss.DOWN)
            return [False] * len(keys)
        start = time.monotonic()
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        states = self._asked(lambda: self.blocks.read(keys, outs, deadline_s=deadline_s))
        for state, miss in MISSES.items():
            if count := states.count(state):
                self._metrics.misses.add(count, self.name, miss)
        if corrupt := states.count(State.CORRUPT):
            self._metrics.corrupt_blocks.add(corrupt, self.name)
        self._metrics.bytes_read.add(states.count(State.HERE) * self.blocks.layout.block_bytes, self.name)
        self._metrics.load_seconds.observe(time.monotonic() - start, self.name)
        return [state is State.HERE for state in states]

    @property
    def lends(self) -> bool:
        """On the daemon's machine."""
        return self.blocks.shares_memory

    @contextmanager
    def lend(self, keys: Sequence[Key], *, deadline_s: float) -> Iterator[Lending | None]:
        """Places in shared memory; None over TCP, and for more than this client may have on lease. Raises as `read` does."""
        with ExitStack() as held:
            start = time.monotonic()
            loan = None
            if len(keys) <= MAX_KEYS:
                try:
                    loan = held.enter_context(self.blocks.borrow(keys, deadline_s=deadline_s))
                except RefusedError as error:
                    log.debug("daemon: %s", error)
                except ProtocolError as error:
                    raise TierError(str(error)) from error
            if loan is None:
                yield None
                return
            if missing := loan.places.count(None):
                late = time.monotonic() - start >= deadline_s
                self._metrics.misses.add(missing, self.name, Miss.LATE if late else Miss.ABSENT)
            self._metrics.bytes_read.add((len(keys) - missing) * self.blocks.layout.block_bytes, self.name)
            self._metrics.load_seconds.observe(time.monotonic() - start, self.name)
            try:
                yield Lending(loan.rows, loan.places, loan.intact)
            finally:
                self._give_back(held)

    @staticmethod
    def _give_back(loan: ExitStack) -> None:
        """A daemon that is gone has taken it back already."""
        try:
            loan.close()
        except TierError as error:
            log.debug("daemon: a loan was not given back: %s", error)

    def write(self, run: Run, blocks: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """Copy into shared memory, or send, what is not there. Raises as `read` does."""
        if self._closed:
            self._metrics.saves_dropped.add(len(blocks), self.name, Miss.DOWN)
            return [False] * len(blocks)
        start = time.monotonic()
        deadline_s = self._deadline_s if deadline_s is None else deadline_s
        states = self._asked(lambda: self.blocks.write(run, blocks, deadline_s=deadline_s))
        for state in (State.BUSY, State.FULL, State.LATE):
            if count := states.count(state):
                self._metrics.saves_dropped.add(count, self.name, state.name.lower())
        self._metrics.bytes_written.add(states.count(State.HERE) * self.blocks.layout.block_bytes, self.name)
        self._metrics.save_seconds.observe(time.monotonic() - start, self.name)
        return [state in (State.HERE, State.PRESENT) for state in states]

    def delete(self, keys: Sequence[Key]) -> None:
        """Forget them there, for everyone."""
        if self._closed:
            return
        self._asked(lambda: self.blocks.delete(keys))

    def scan(self) -> Iterator[Run]:
        """Nothing: what others write is asked for."""
        return iter(())

    def close(self) -> None:
        """Close the connections."""
        self._closed = True
        self.blocks.close()
        self._client.close()
