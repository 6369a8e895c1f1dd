"""One connection of a client: its requests, in order, and what it holds. What it holds ends with it.

What is quick is answered at once; what waits for a tier becomes a task, and later replies overtake it.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import TYPE_CHECKING, Any, ClassVar, Final

from tierkv.daemon.access import NEEDS, Peer, Role
from tierkv.daemon.loans import Lent, Writing
from tierkv.daemon.pool import Pool
from tierkv.daemon.protocol import (
    ONE_WAY,
    STRANGER_BYTES,
    Limits,
    Message,
    Op,
)
from tierkv.daemon.stream import Stream
from tierkv.errors import ConfigError, ProtocolError, TierKVError

if TYPE_CHECKING:
    from tierkv.daemon.service import Client, Service

HELLO_S: Final = 10.0
"""Seconds for TLS and the handshake."""
MAX_TASKS: Final = 64
"""Requests of one connection that wait for a tier, or for another client, at a time."""
_TRASH: Final = memoryview(bytearray(1 << 20))
Handler = Callable[[Any, Message], Any]  # Any: a session; fields of the reply, a coroutine of them, or None
log = logging.getLogger("tierkv")


@dataclass(slots=True, eq=False)
class Held:
    """Something that the client must give back. since: on the service's clock."""

    pool: Pool
    what: Lent | Writing
    since: float

    @property
    def num_blocks(self) -> int:
        """Blocks of the slab that it keeps."""
        return self.what.num_blocks if isinstance(self.what, Lent) else len(self.what.places)


@dataclass(slots=True, eq=False)
class Session:
    """The server's side of a connection. number: among the connections of its client."""

    handlers: ClassVar["Mapping[Op, Handler]"] = {}
    """What each operation does: fields of its answer, a coroutine of them, or None; see operations.py."""

    service: "Service"
    stream: Stream = field(init=False)
    peer: Peer
    client: "Client | None" = None
    role: Role | None = None
    token: str = ""
    number: int = 0
    wants_memory: bool = False
    held: dict[int, Held] = field(default_factory=dict)
    _own: dict[int, Held] = field(default_factory=dict)  # what the daemon itself is at: the client cannot give it back
    _timer: asyncio.TimerHandle | None = None
    _moved: tuple[int, float] = 0, -inf  # bytes, as of the last look, and when they were fewer
    _next: int = 1
    _tasks: set["asyncio.Task[None]"] = field(default_factory=set)

    def start(self, stream: Stream) -> None:
        """Begin to listen to it."""
        self.stream = stream
        stream.incoming.limits = Limits(header=STRANGER_BYTES, payload=0, filled=0)
        stream.incoming.sink = self._sink
        self._timer = stream.loop.call_later(HELLO_S, self._expect_hello)
        stream.start()

    def recheck(self) -> None:
        """The tokens are other ones: who has none of them any more goes, and who has another role has that."""
        if self.client is None:
            return
        role = self.service.tokens.role(self.token, self.peer)
        if role is None:
            self.stream.close("its token is not one of ours any more")
        else:
            self.role = role

    def _expect_hello(self) -> None:
        if self.client is None:
            self.stream.close(f"no HELLO within {HELLO_S:g} s")

    # -- requests ---------------------------------------------------------------------------------------------------

    def receive(self, message: Message) -> None:
        """A whole message has come."""
        if message.op >= Op.REPLY:
            raise ProtocolError(f"{message.op.name} from a client: requests are expected")
        if self.client is None and message.op is not Op.HELLO:
            raise ProtocolError(f"{message.op.name} before HELLO")
        if self.role is not None and self.role < NEEDS[message.op]:
            self.stream.refuse(
                message.id,
                f"{message.op.name} needs the role {NEEDS[message.op].name.lower()}: show a token that has it",
            )
            return
        if len(self._tasks) >= MAX_TASKS and message.op not in ONE_WAY:
            self.stream.refuse(
                message.id, f"{MAX_TASKS} requests of this connection wait already: read some answers first"
            )
            return
        start = time.perf_counter()
        try:
            answer = self.handlers[message.op](self, message)
        except ProtocolError:
            raise
        except Exception as error:  # noqa: BLE001  (logged and answered there)
            self._failed(message, start, error)
            return
        if isinstance(answer, dict):
            self._reply(message, start, answer)
        elif answer is not None:
            task = self.stream.loop.create_task(self._later(message, start, answer))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)
        else:
            self._answered(message, start)

    async def _later(self, message: Message, start: float, answer: Coroutine[Any, Any, dict[str, Any] | None]) -> None:
        try:
            fields = await answer
        except Exception as error:  # noqa: BLE001  (logged and answered there)
            self._failed(message, start, error)
            return
        if fields is None:
            self._answered(message, start)
        else:
            self._reply(message, start, fields)

    def _failed(self, message: Message, start: float, error: Exception) -> None:
        self._answered(message, start, failed=True)
        if not isinstance(error, TierKVError):
            log.error("daemon: %s failed", message.op.name, exc_info=error)
            self.stream.refuse(message.id, "the daemon failed; its log says why", kind="defect")
        elif message.op not in ONE_WAY:
            kind = "config" if isinstance(error, ConfigError) else getattr(error, "kind", "refused")
            self.stream.refuse(message.id, str(error), kind=kind)

    def _reply(self, message: Message, start: float, fields: dict[str, Any]) -> None:
        payload = fields.pop("payload", ())
        fds, after = fields.pop("fds", ()), fields.pop("after", None)
        if message.op not in ONE_WAY:
            self.stream.send(Op.REPLY, message.id, fields, payload, fds=fds, after=after)
        self._answered(message, start)

    def _answered(self, message: Message, start: float, *, failed: bool = False) -> None:
        metrics, op = self.service.metrics, message.op.name.lower()
        metrics.daemon_requests.add(1, op, "failed" if failed else "ok")
        metrics.daemon_request_seconds.observe(time.perf_counter() - start, op)

    # -- what is held -----------------------------------------------------------------------------------------------

    def _hold(self, pool: Pool, what: Lent | Writing) -> int:
        number, self._next = self._next, self._next + 1
        self.held[number] = Held(pool, what, self.service.clock())
        return number

    def leased_blocks(self, pool: Pool) -> int:
        """Blocks of a pool that this connection keeps from being forgotten."""
        return sum(held.num_blocks for held in (*self.held.values(), *self._own.values()) if held.pool is pool)

    @property
    def num_writes(self) -> int:
        """Reservations that are not committed yet."""
        return sum(isinstance(held.what, Writing) for held in self.held.values())

    def expire(self, before: float) -> None:
        """Take back what was lent before this time; who should have filled a place by now is shown the door."""
        for number, held in [(n, h) for n, h in self.held.items() if h.since < before]:
            if isinstance(held.what, Writing):
                self.stream.close("a reserved place was not filled in time")
                return
            del self.held[number]
            held.pool.give_back(held.what)
            log.warning(
                "daemon: %s read for too long: its lease is taken back", self.client.name if self.client else "?"
            )
        if self.stream.sent_bytes != self._moved[0]:
            self._moved = self.stream.sent_bytes, self.service.clock()
        stuck = self.stream.is_sending and self._moved[1] < before
        if stuck and any(own.since < before for own in self._own.values()):
            self.stream.close("it does not read the blocks that it asked for")

    def end(self, reason: str) -> None:
        """The connection is over."""
        if self._timer:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()
        late = []
        for held in (*self.held.values(), *self._own.values()):
            if isinstance(held.what, Lent):
                held.pool.give_back(held.what)
            else:
                late.append((held.pool, held.what))
        self.held.clear()
        self._own.clear()
        self.service.ended(self, late, reason)

    def _sink(self, message: Message, size: int) -> Sequence[memoryview] | None:
        """Blocks go straight into the places that were reserved for them; those that come too late go nowhere."""
        if message.op is not Op.FILL:
            return None
        held = self.held.get(message.fields["lease"])
        if held is None or not isinstance(held.what, Writing):
            return [_TRASH[: min(len(_TRASH), size - at)] for at in range(0, size, len(_TRASH))]
        held.since = self.service.clock()  # for the blocks to come: who stops in the middle must not keep the places
        return [held.pool.slab.view(place) for place in held.what.places]
