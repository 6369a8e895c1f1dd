"""KV events over ZeroMQ, as the routers that listen to vLLM expect them: a PUB socket, and a ROUTER socket for what was missed.

    PUB     [topic, sequence, batch]                               sequence: 8 bytes, big endian, from 0, one per batch
    ROUTER  ["", sequence to begin with]  ->  ["", topic, sequence, batch] … ["", "", 2**64 - 1, ""]

(Without the topic in the form of vLLM 0.11 to 0.23.) Nothing here waits: what a subscriber does not fetch is dropped for it.
Needs pyzmq, the extra `events`; importing this module does not.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from tierkv.daemon.events import Event, Kind, VllmEncoder, VllmForm
from tierkv.errors import ConfigError

if TYPE_CHECKING:
    import asyncio

    import zmq

_SEQUENCE_BYTES: Final = 8
_END: Final = b"\xff" * _SEQUENCE_BYTES
_PIECE: Final = 64  # batches, and requests, that are dealt with before the loop may do something else


@dataclass(frozen=True, slots=True)
class PublisherStats:
    """Counts since the start. overflows: queues of subscribers that ran full; ZeroMQ does not tell how many batches each lost.

    replays: requests for what was missed; cut: those that could not be answered to the end; refused: requests of no known form.
    """

    batches: int
    overflows: int
    replays: int
    cut: int
    refused: int


class ZmqPublisher:
    """Batches of events for any number of subscribers. For one thread, that of the daemon's loop; no call blocks.

    endpoint: bound, or connected to if it begins with ">" (a router that binds: ">tcp://router:5557"); the port may be "*".
    replay_endpoint: bound; the last `buffer_batches` batches, of `buffer_bytes` at most, can be asked for again.
    queue_batches: batches that wait for a subscriber; it loses further ones until it has fetched half of them.
    Raises ConfigError without pyzmq, and for endpoints that cannot be used.
    """

    def __init__(
        self,
        endpoint: str,
        *,
        topic: str = "kv-events",
        replay_endpoint: str | None = None,
        buffer_batches: int = 10_000,
        buffer_bytes: int = 64 << 20,
        queue_batches: int = 1_000,
        encoder: VllmEncoder | None = None,
    ) -> None:
        try:
            import zmq
        except ImportError as error:
            raise ConfigError("KV events over ZeroMQ need pyzmq: pip install 'tierkv[events]'") from error
        if min(buffer_batches, queue_batches) < 1:
            raise ConfigError(f"buffer_batches={buffer_batches}, queue_batches={queue_batches}: 1 or more is expected")
        self._encoder = encoder or VllmEncoder()
        self._topic = topic.encode()
        self._kept: deque[bytes] = deque()
        self._kept_bytes = 0
        self._buffer_batches = buffer_batches
        self._buffer_bytes = buffer_bytes
        self._sequence = 0  # of the next batch
        self._now = 0.0
        self._overflows = self._num_replays = self._cut = self._refused = 0
        self._replays: dict[bytes, int] = {}  # who asked -> the sequence to go on from
        self._loop: asyncio.AbstractEventLoop | None = None
        self._again: asyncio.Handle | None = None
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        try:
            self._pub = self._context.socket(zmq.PUB)
            self._pub.setsockopt(zmq.SNDHWM, queue_batches)
            self._pub.setsockopt(zmq.XPUB_NODROP, 1)  # without it PUB drops and tells nobody
            self.endpoint = _open(self._pub, endpoint)
            self._router: zmq.Socket[bytes] | None = None
            self.replay_endpoint: str | None = None
            if replay_endpoint is not None:
                self._router = self._context.socket(zmq.ROUTER)
                # A whole replay, twice: what was fetched is told to the socket once in half a queue.
                self._router.setsockopt(zmq.SNDHWM, 2 * (buffer_batches + 2))
                self._router.setsockopt(zmq.ROUTER_MANDATORY, 1)  # without it ROUTER drops and tells nobody
                self.replay_endpoint = _open(self._router, replay_endpoint)
        except BaseException:
            self._context.destroy(linger=0)
            raise

    def publish(self, events: Sequence[Event], *, block_tokens: int, now: float) -> None:
        """Send events of an index whose blocks have block_tokens tokens. now: seconds since 1970."""
        self._now = now
        for batch in self._encoder.batches(events, block_tokens=block_tokens, now=now):
            self._send([self._topic, self._sequence.to_bytes(_SEQUENCE_BYTES, "big"), batch])
            self._sequence += 1
            if self._router is not None:
                self._keep(batch)

    def attach(self, loop: "asyncio.AbstractEventLoop") -> None:
        """Answer replays on this loop, until `close`."""
        if self._router is not None:
            self._loop = loop
            loop.add_reader(self._router.fileno(), self._on_readable)
            self._on_readable()  # ZeroMQ's descriptor tells of changes, and one may have passed

    def serve_replays(self) -> bool:
        """Answer a piece of what subscribers asked for, without waiting; whether there is more to do now."""
        if self._router is None:
            return False
        self._hear(self._router)
        for client in list(self._replays)[:1]:
            at = self._reply(self._router, client, self._replays.pop(client))
            if at is not None:
                self._replays[client] = at  # behind the others
        # Sending may swallow the change that the descriptor would have told.
        return bool(self._replays) or bool(self._router.poll(0))

    def stats(self) -> PublisherStats:
        """Counts since the start."""
        return PublisherStats(self._sequence, self._overflows, self._num_replays, self._cut, self._refused)

    def close(self) -> None:
        """Close the sockets, with what was not fetched. Nothing else may be called after it; closing twice is allowed."""
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self._loop is not None and self._router is not None:
            self._loop.remove_reader(self._router.fileno())
            self._loop = None
        self._context.destroy(linger=0)

    def _send(self, frames: list[bytes]) -> None:
        import zmq

        try:
            self._pub.send_multipart(frames, zmq.NOBLOCK)
        except zmq.Again:  # a queue has become full, and no subscriber got it: the others shall
            self._overflows += 1
            self._pub.setsockopt(zmq.XPUB_NODROP, 0)
            self._pub.send_multipart(frames, zmq.NOBLOCK)
            self._pub.setsockopt(zmq.XPUB_NODROP, 1)

    def _keep(self, batch: bytes) -> None:
        self._kept.append(batch)
        self._kept_bytes += len(batch)
        while len(self._kept) > self._buffer_batches or self._kept_bytes > self._buffer_bytes:
            self._kept_bytes -= len(self._kept.popleft())

    def _on_readable(self) -> None:
        if self._again is not None:
            self._again.cancel()
            self._again = None
        if self.serve_replays() and self._loop is not None:
            self._again = self._loop.call_soon(self._on_readable)

    def _hear(self, router: "zmq.Socket[bytes]") -> None:
        """Note who wants what; a client that asks again has dropped its former request."""
        import zmq

        for _ in range(_PIECE):
            try:
                frames = router.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return
            if len(frames) != 3 or frames[1] or len(frames[2]) != _SEQUENCE_BYTES:
                self._refused += 1
                continue
            self._num_replays += 1
            self._replays[frames[0]] = int.from_bytes(frames[2], "big")

    def _reply(self, router: "zmq.Socket[bytes]", client: bytes, at: int) -> int | None:
        """Send a piece of a replay: the sequence to go on from, or None after its end.

        What is no longer kept is answered by one batch that lets the subscriber forget all before the oldest kept one.
        """
        import zmq

        oldest = self._sequence - len(self._kept)
        try:
            if at < oldest:
                cleared = self._encoder.batches([Event(Kind.CLEARED, 0)], block_tokens=0, now=self._now)
                self._answer(router, client, oldest - 1, next(cleared))
                at = oldest
            stop = min(at + _PIECE, self._sequence)
            for sequence in range(at, stop):
                self._answer(router, client, sequence, self._kept[sequence - oldest])
            if stop < self._sequence:
                return stop
            self._answer(router, client, None, b"")
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            self._cut += 1  # it does not fetch what it asked for, or is gone
        return None

    def _answer(self, router: "zmq.Socket[bytes]", client: bytes, sequence: int | None, batch: bytes) -> None:
        """Send one batch, or the end."""
        import zmq

        number = _END if sequence is None else sequence.to_bytes(_SEQUENCE_BYTES, "big")
        topic = [] if self._encoder.form is VllmForm.ARRAYS else [b"" if sequence is None else self._topic]
        router.send_multipart([client, b"", *topic, number, batch], zmq.NOBLOCK)


def _open(socket: "zmq.Socket[bytes]", endpoint: str) -> str:
    """Bind or connect; the endpoint with the port that was chosen."""
    import zmq

    address = endpoint.removeprefix(">")
    try:
        socket.setsockopt(zmq.IPV6, int("[" in address))
        if address != endpoint:
            socket.connect(address)
        else:
            socket.bind(address)
    except zmq.ZMQError as error:
        raise ConfigError(
            f"events endpoint {endpoint!r}: {zmq.strerror(error.errno or 0)}; give tcp://address:port or ipc://path of this"
            " machine to listen at, or the same with '>' before it to connect to a router"
        ) from error
    return socket.getsockopt_string(zmq.LAST_ENDPOINT).rstrip("\0")
