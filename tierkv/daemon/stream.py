"""One connection's bytes on the server's loop: frames in, frames out, payloads straight from and to where they belong."""

import asyncio
import socket
import ssl
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final

from tierkv.daemon.protocol import Incoming, Message, Op, encode
from tierkv.errors import ProtocolError

TURN_BYTES: Final = 2 << 20
"""Received or sent in one turn of the loop, before others have theirs."""
MAX_PIECES: Final = 64
"""Views of one sendmsg."""
CROWDED_BYTES: Final = 64 << 20
"""Not sent yet: no further request is read from a client that does not read its replies."""
_AGAIN: Final = (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError)


@dataclass(slots=True)
class _Outgoing:
    views: deque[memoryview]
    fds: Sequence[int] = ()
    after: Callable[[], None] | None = None


@dataclass(slots=True, eq=False)
class Stream:
    """A non-blocking socket, TLS or not.

    on_message: each whole message, in order; may raise ProtocolError.  on_end: once, with the reason, when the stream is over.
    sent_bytes: so far.
    """

    loop: asyncio.AbstractEventLoop
    sock: socket.socket
    incoming: Incoming
    on_message: Callable[[Message], None]
    on_end: Callable[[str], None]
    closed: bool = False
    sent_bytes: int = 0
    _outbox: deque[_Outgoing] = field(default_factory=deque)
    _unsent: int = 0
    _reading: bool = False
    _writing: bool = False
    _secured: bool = False
    _closing: str | None = None

    def start(self) -> None:
        """Begin to read."""
        self._secured = not isinstance(self.sock, ssl.SSLSocket)
        self._read(True)

    # -- in -----------------------------------------------------------------------------------------------------------

    def _readable(self) -> None:
        try:
            if self._secured or self._handshake():
                self._receive()
        except ProtocolError as error:
            self.refuse(0, str(error), kind="protocol")
            self.finish(str(error))
        except OSError as error:
            self.close(f"connection lost: {error.strerror or error}")

    def _handshake(self) -> bool:
        assert isinstance(self.sock, ssl.SSLSocket)
        try:
            self.sock.do_handshake()
        except ssl.SSLWantReadError:
            self._write(False)
            return False
        except ssl.SSLWantWriteError:
            self._write(True)
            return False
        self._secured = True
        return True

    def _receive(self) -> None:
        left = TURN_BYTES
        plain = not isinstance(self.sock, ssl.SSLSocket)
        while left > 0 and self._reading and not self.closed:
            target = self.incoming.target()
            room = len(target)
            try:
                count = self.sock.recv_into(target)
            except _AGAIN:
                return
            finally:
                target.release()
            if count == 0:
                self.close("the client closed the connection")
                return
            for message in self.incoming.advance(count):
                if not self._deliver(message):
                    return
            if plain and count < room and not self.incoming.is_filling:
                return  # nothing is left; the loop says when there is more. Of a payload more has come by now.
            left -= count
        if not plain and self._reading and not self.closed:
            self.loop.call_soon(self._readable)  # TLS may hold bytes that the loop knows nothing of

    def _deliver(self, message: Message) -> bool:
        """Whether there is anybody left to take the next one for: what that one would take, nobody would give back."""
        self.on_message(message)
        return not self.closed

    @property
    def is_sending(self) -> bool:
        """Something waits until the other side reads."""
        return bool(self._outbox)

    # -- out ----------------------------------------------------------------------------------------------------------

    def send(
        self,
        op: Op,
        id: int,
        fields: Mapping[str, object],
        payload: Sequence[memoryview] = (),
        *,
        fds: Sequence[int] = (),
        after: Callable[[], None] | None = None,
    ) -> None:
        """Queue a message. fds: handed over with it.  after: called once it is sent, or never will be."""
        if self.closed:
            if after:
                after()
            return
        size = sum(view.nbytes for view in payload)
        head = encode(op, id, fields, payload_bytes=size)
        self._outbox.append(_Outgoing(deque([memoryview(head), *payload]), fds, after))
        self._unsent += len(head) + size
        if op is Op.EVENT and self._unsent > CROWDED_BYTES:
            self.close("it subscribed to events and does not read them")
            return
        if len(self._outbox) == 1:
            self._flush()
        if self._unsent > CROWDED_BYTES and not self.closed:
            self._read(False)

    def refuse(self, id: int, reason: str, *, kind: str = "refused") -> None:
        """Answer a request with no."""
        self.send(Op.REFUSED, id, {"reason": reason[:1000], "kind": kind})

    def _flush(self) -> None:
        left = TURN_BYTES
        try:
            while self._outbox and left > 0:
                left -= self._send_some(self._outbox[0])
        except _AGAIN:
            pass
        except OSError as error:
            self.close(f"connection lost: {error.strerror or error}")
            return
        self._write(bool(self._outbox))
        if not self._reading and self._unsent < CROWDED_BYTES // 2 and self._closing is None:
            self._read(True)
        if not self._outbox and self._closing is not None:
            self.close(self._closing)

    def _send_some(self, outgoing: _Outgoing) -> int:
        views = outgoing.views
        if outgoing.fds:
            sent = socket.send_fds(self.sock, [views[0]], list(outgoing.fds))
            outgoing.fds = ()
        elif isinstance(self.sock, ssl.SSLSocket):
            sent = self.sock.send(views[0])
        else:
            sent = self.sock.sendmsg([view for view, _ in zip(views, range(MAX_PIECES), strict=False)])
        left = sent
        while views and left >= views[0].nbytes:
            left -= views.popleft().nbytes
        if left:
            views[0] = views[0][left:]
        self._unsent -= sent
        self.sent_bytes += sent
        if not views:
            self._outbox.popleft()
            if outgoing.after:
                outgoing.after()
        return sent

    # -- end ----------------------------------------------------------------------------------------------------------

    def finish(self, reason: str) -> None:
        """Send what is queued, then end."""
        self._closing = reason
        self._read(False)
        if not self._outbox:
            self.close(reason)
        else:
            self.loop.call_later(1.0, self.close, reason)

    def close(self, reason: str) -> None:
        """End at once. Idempotent."""
        if self.closed:
            return
        self.closed = True
        self._read(False)
        self._write(False)
        self.sock.close()
        while self._outbox:
            after = self._outbox.popleft().after
            if after:
                after()
        self.on_end(reason)

    def _read(self, wanted: bool) -> None:
        if wanted != self._reading:
            self._reading = wanted
            if wanted:
                self.loop.add_reader(self.sock, self._readable)
            else:
                self.loop.remove_reader(self.sock)

    def _write(self, wanted: bool) -> None:
        if wanted != self._writing:
            self._writing = wanted
            if wanted:
                self.loop.add_writer(self.sock, self._writable)
            else:
                self.loop.remove_writer(self.sock)

    def _writable(self) -> None:
        if self._secured:
            self._flush()
        else:
            self._readable()
