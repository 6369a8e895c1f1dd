"""One connection of a client: requests, replies, deadlines, descriptors. Blocking; one thread at a time."""

import array
import os
import select
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, TypeVar

from tierkv.config import TlsFiles
from tierkv.daemon.protocol import MAX_PAYLOAD_BYTES, Incoming, Limits, Message, Op, Sink, encode
from tierkv.daemon.sockets import connect
from tierkv.errors import ProtocolError, RefusedError

MAX_PIECES: Final = 512
"""Views of one sendmsg; the system takes 1,024."""
TLS_BYTES: Final = 1 << 20
"""Sent over TLS before the time is looked at."""
T = TypeVar("T")


@dataclass(slots=True)
class Reply:
    """What the daemon said. fds: descriptors that came with it; the caller's to close."""

    fields: dict[str, Any]  # Any: the daemon's; `number` and the like check it
    payload: bytes | bytearray
    fds: list[int]

    def number(self, name: str, *, most: int = (1 << 63) - 1) -> int:
        """A field that is a number from 0 to `most`. Raises ProtocolError, as the others do."""
        value = self._field(name, int)
        if not 0 <= value <= most:
            raise ProtocolError(f"an answer with {name} = {value}: 0 to {most} expected")
        return value

    def text(self, name: str) -> str:
        """A field that is text."""
        return self._field(name, str)

    def data(self, name: str) -> bytes:
        """A field that is bytes."""
        return self._field(name, bytes)

    def flag(self, name: str) -> bool:
        """A field that says yes or no."""
        return self._field(name, bool)

    def table(self, name: str) -> dict[str, Any]:  # Any: for people, who look at it
        """A field that is a map."""
        return self._field(name, dict)

    def rows(self, name: str) -> list[dict[str, Any]]:  # Any: as above
        """A field that is a list of maps."""
        rows = self._field(name, list)
        if not all(type(row) is dict for row in rows):
            raise ProtocolError(f"an answer with {name} of something else than maps")
        return rows

    def _field(self, name: str, kind: type[T]) -> T:
        value = self.fields.get(name)
        if type(value) is not kind:
            raise ProtocolError(f"an answer with {name} = {value!r:.80}: {kind.__name__} expected")
        return value


class Link:
    """Connected when made. Raises OSError, ProtocolError.

    number: what the daemon is to call it.  hello: its answer to HELLO, once that has come.
    """

    def __init__(self, url: str, *, number: int, tls: TlsFiles, timeout_s: float) -> None:
        self.number = number
        self.hello = Reply({}, b"", [])
        self._sock = connect(url, tls=tls, timeout_s=timeout_s)
        self._incoming = Incoming(Limits(payload=MAX_PAYLOAD_BYTES))
        self._id = 0
        self._come: list[Message] = []
        self._fds: list[int] = []

    @property
    def instance(self) -> bytes:
        """Names the run of the daemon that this leads to: a pool's number and memory are good for that one only."""
        return self.hello.data("instance")

    @property
    def is_quiet(self) -> bool:
        """Nothing has come that nobody asked for; then it may be used again."""
        poll = select.poll()  # select() takes no descriptor above 1,023, and an engine has those
        poll.register(self._sock, select.POLLIN)
        return not self._come and not poll.poll(0)

    def send(
        self, op: Op, fields: Mapping[str, object], payload: Sequence[memoryview] = (), *, timeout_s: float = 5.0
    ) -> int:
        """Send a request, in so many seconds at most; its id."""
        deadline = time.monotonic() + timeout_s
        self._id += 1
        size = sum(view.nbytes for view in payload)
        views = [memoryview(encode(op, self._id, fields, payload_bytes=size)), *(view.cast("B") for view in payload)]
        if isinstance(self._sock, ssl.SSLSocket):
            for view in views:
                for at in range(0, view.nbytes, TLS_BYTES):
                    self._wait_until(deadline)
                    self._sock.sendall(view[at : at + TLS_BYTES])
            return self._id
        at = 0
        while at < len(views):
            self._wait_until(deadline)
            sent = self._sock.sendmsg(views[at : at + MAX_PIECES])
            while at < len(views) and sent >= views[at].nbytes:
                sent -= views[at].nbytes
                at += 1
            if sent:
                views[at] = views[at][sent:]
        return self._id

    def call(
        self,
        op: Op,
        fields: Mapping[str, object],
        payload: Sequence[memoryview] = (),
        *,
        timeout_s: float,
        sink: Sink | None = None,
        told: Callable[[dict[str, Any]], None] | None = None,
        wants_fds: bool = False,
    ) -> Reply:
        """Send a request and wait for its reply. sink: where the reply's payload goes.  told: hears events before it.

        Raises RefusedError when the daemon says no, TimeoutError when it does not say anything in time.
        """
        deadline = time.monotonic() + timeout_s
        id = self.send(op, fields, payload, timeout_s=timeout_s)
        self._incoming.sink = sink
        while True:
            message = self._receive(deadline, wants_fds)
            if message.op is Op.EVENT and message.id == id:
                if told:
                    told(message.fields)
            elif message.op is Op.REFUSED and message.id in (0, id):
                if message.id == 0:
                    raise ProtocolError(str(message.fields["reason"]))
                raise RefusedError(str(message.fields["reason"]), kind=str(message.fields["kind"]))
            elif message.op is Op.REPLY and message.id == id:
                fds, self._fds = self._fds, []
                return Reply(message.fields, message.payload or b"", fds)
            else:
                raise ProtocolError(f"{message.op.name} of request {message.id} where that of {id} was expected")

    def subscribe(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Pool and events, as they come."""
        self.call(Op.SUBSCRIBE, {}, timeout_s=10.0)
        while True:
            message = self._receive(None)
            if message.op is not Op.EVENT:
                raise ProtocolError(f"{message.op.name} where events were expected")
            told = Reply(message.fields, b"", [])
            yield told.number("pool"), told.rows("events")

    def _receive(self, deadline: float | None, wants_fds: bool = False) -> Message:
        while not self._come:
            self._wait_until(deadline)
            with self._incoming.target() as target:
                count = self._recv_fds(target) if wants_fds and self._is_local else self._sock.recv_into(target)
            if not count:
                raise ConnectionError("the daemon closed the connection")
            self._come.extend(self._incoming.advance(count))
        return self._come.pop(0)

    def _wait_until(self, deadline: float | None) -> None:
        """Let the next call of the socket take until then."""
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError("no answer in time")
        self._sock.settimeout(left)

    @property
    def _is_local(self) -> bool:
        return self._sock.family == socket.AF_UNIX

    def _recv_fds(self, target: memoryview) -> int:
        space = socket.CMSG_SPACE(4 * array.array("i").itemsize)
        count, ancillary, _, _ = self._sock.recvmsg_into([target], space, socket.MSG_CMSG_CLOEXEC)
        for level, kind, data in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                fds = array.array("i")
                fds.frombytes(data[: len(data) - len(data) % fds.itemsize])
                self._fds.extend(fds)
        return count

    def close(self) -> None:
        """Close it. Idempotent."""
        self._sock.close()
        for fd in self._fds:
            os.close(fd)
        self._fds = []
