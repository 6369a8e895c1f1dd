"""The bulk wire of the Redis tier: RESP2 straight between a borrowed socket and the caller's buffers, under one deadline.

redis-py makes and owns the connection; this borrows its socket for one batch. Its own path copies every value twice, gives
each receive a time-out of its own (a server that drips holds it for ever), and believes any length. A batch of 8 x 2 MiB comes
at 4.2 GB/s here, checksums included, and at 2.3 GB/s there, without (unix socket, 2-core AMD EPYC VM, 2026-11-22,
bench/bench_redis.py).

Failures are exceptions of the standard library: TimeoutError, the deadline; ConnectionError, the peer went or does not speak
the protocol. Either way the stream is out of step and the connection must be closed. An error *reply* is a value.
"""

import math
import socket
import ssl
import struct
import sys
from collections.abc import Callable, Sequence
from typing import Any, Final, Protocol

Buffer = bytes | bytearray | memoryview

SCRATCH_BYTES: Final = 4096
WINDOW_BYTES: Final = 16 << 20
"""Payload asked for or sent before replies are read: a server holds all of it, counted against its memory."""
WINDOW_COMMANDS: Final = 256
"""So that requests, or their replies, fit into the socket buffers while the other side is not reading: no deadlock."""
_GATHER: Final = 512  # IOV_MAX is 1024
_LINE_END: Final = b"\r\n"

# On Linux a blocking receive with MSG_WAITALL and SO_RCVTIMEO is one call for a whole value, and waits no longer than that in
# all. Elsewhere, and with TLS, Python polls before each piece. 8 x 360 KiB by unix socket, and nothing else done: 9.0 against
# 8.0 GB/s (2-core AMD EPYC VM, 2026-11-22).
_KERNEL_WAITS: Final = sys.platform == "linux" and struct.calcsize("l") == 8
_TIMEVAL: Final = struct.Struct("@ll")
_SLACK_S: Final = 0.005
"""A receive may be this late: so the time-out is not set anew for each."""
_LEAST_S: Final = 0.001
"""In the kernel's terms, no time at all is for ever."""
_MOST_S: Final = 86400.0


class Refusal(str):
    """An error reply, such as `OOM command not allowed …`: one command failed, the stream is in step."""

    __slots__ = ()

    @property
    def word(self) -> str:
        """Its first word: the kind of error."""
        return self.partition(" ")[0]


class Wire(Protocol):
    """Commands out, replies in, in order. Single-threaded; valid until the batch ends."""

    received: int
    """Bytes that came; 0 after a timeout: the peer is deaf, not slow."""

    def send(self, pieces: Sequence[Buffer]) -> None:
        """Send packed commands."""

    def reply(self) -> int | bytes | Refusal | None:
        """The next reply, to a command without a bulk value: an integer, a status, nil or an error."""

    def value_bytes(self) -> int | Refusal | None:
        """Length of the next reply, a bulk value that `value` must take; None: there is none."""

    def value(self, *parts: memoryview) -> None:
        """Receive the value into `parts`, whose lengths add up to `value_bytes`."""

    def finish(self) -> None:
        """Check that nothing is left over. Raises ConnectionError."""


def command(*arguments: bytes) -> bytes:
    """A packed command."""
    parts = [b"*%d\r\n" % len(arguments)]
    parts += [b"$%d\r\n%b\r\n" % (len(argument), argument) for argument in arguments]
    return b"".join(parts)


class SocketWire:
    """A wire on a plain or TLS socket."""

    def __init__(self, sock: socket.socket, *, deadline: float, clock: Callable[[], float]) -> None:
        self._sock, self._deadline, self._clock = sock, deadline, clock
        self._tls = isinstance(sock, ssl.SSLSocket)  # it has no sendmsg and no recvmsg_into
        self._scratch = bytearray(SCRATCH_BYTES)
        self._view = memoryview(self._scratch)
        self._end = bytearray(len(_LINE_END))
        self._end_view = memoryview(self._end)
        self._low = self._high = 0  # what has come but was not asked for yet: scratch[low:high]
        self._usual, self._usual_bytes = b"?", 0  # the last head of a value: the next one is probably the same
        self._armed_s = math.inf  # seconds that a receive may wait; infinite: the socket is not set to block
        self.received = 0

    def _left(self) -> float:
        left = self._deadline - self._clock()
        if left <= 0:
            raise TimeoutError("the batch is past its deadline")
        return min(left, _MOST_S)

    def send(self, pieces: Sequence[Buffer]) -> None:
        """Send, without copying a piece unless TLS encrypts it."""
        left = [memoryview(piece).cast("B") for piece in pieces]
        first = 0
        while first < len(left):
            self._sock.settimeout(self._left())
            self._armed_s = math.inf
            sent = self._sock.send(left[first]) if self._tls else self._sock.sendmsg(left[first : first + _GATHER])
            while first < len(left) and sent >= len(left[first]):
                sent -= len(left[first])
                first += 1
            if sent:
                left[first] = left[first][sent:]

    def _receive(self, into: list[memoryview], *, flags: int = 0) -> int:
        """Receive something into the first buffers; with MSG_WAITALL all of it, unless the deadline comes first."""
        left = self._left()
        if self._tls:
            self._sock.settimeout(left)
            got = self._sock.recv_into(into[0])
        elif not _KERNEL_WAITS:
            self._sock.settimeout(left)
            got = self._sock.recvmsg_into(into)[0]
        else:
            if left < self._armed_s - _SLACK_S:
                if self._armed_s == math.inf:
                    self._sock.settimeout(None)
                wait_s = max(left, _LEAST_S)
                self._sock.setsockopt(
                    socket.SOL_SOCKET, socket.SO_RCVTIMEO, _TIMEVAL.pack(int(wait_s), int(wait_s % 1 * 1e6))
                )
                self._armed_s = left
            try:
                got = self._sock.recvmsg_into(into, 0, flags)[0]
            except BlockingIOError:
                raise TimeoutError("the batch is past its deadline") from None
        if not got:
            raise ConnectionResetError("the server closed the connection")
        self.received += got
        return got

    def _line(self) -> bytes:
        while (at := self._scratch.find(_LINE_END, self._low, self._high)) < 0:
            if self._low:
                held = self._high - self._low
                self._view[:held] = self._view[self._low : self._high]
                self._low, self._high = 0, held
            if self._high == SCRATCH_BYTES:
                raise ConnectionError(f"not RESP: a reply line longer than {SCRATCH_BYTES} bytes")
            self._high += self._receive([self._view[self._high :]])
        line = bytes(self._view[self._low : at])
        self._low = at + len(_LINE_END)
        return line

    def reply(self) -> int | bytes | Refusal | None:
        """The next reply without a bulk value."""
        line = self._line()
        kind = line[:1]
        if kind == b":":
            return _integer(line)
        if kind == b"+":
            return line[1:]
        if kind == b"-":
            return Refusal(line[1:].decode(errors="replace"))
        if line == b"$-1":
            return None
        raise ConnectionError(f"not the expected RESP reply: {line[:32]!r}")

    def value_bytes(self) -> int | Refusal | None:
        """Length of the next bulk value."""
        after = self._low + len(self._usual)
        if after <= self._high and self._scratch.startswith(self._usual, self._low):
            self._low = after
            return self._usual_bytes
        line = self._line()
        if line[:1] == b"-":
            return Refusal(line[1:].decode(errors="replace"))
        if line == b"$-1":
            return None
        if line[:1] != b"$" or (size := _integer(line)) < 0:
            raise ConnectionError(f"not the expected RESP reply: {line[:32]!r}")
        self._usual, self._usual_bytes = line + _LINE_END, size
        return size

    def value(self, *parts: memoryview) -> None:
        """Receive into the parts, first what came along with the line before them."""
        todo = [*parts, self._end_view]
        low, high = self._low, self._high
        first = 0
        while low < high and first < len(todo):
            have = min(high - low, len(todo[first]))
            todo[first][:have] = self._view[low : low + have]
            low += have
            if have == len(todo[first]):
                first += 1
            else:
                todo[first] = todo[first][have:]
        self._low = low
        del todo[:first]
        while todo:
            got = self._receive(todo, flags=socket.MSG_WAITALL)
            while todo and got >= len(todo[0]):
                got -= len(todo.pop(0))
            if todo:
                todo[0] = todo[0][got:]
        if self._end != _LINE_END:
            raise ConnectionError("not RESP: a value that does not end where its length says")

    def finish(self) -> None:
        """Check that nothing is left over."""
        if self._low != self._high:
            raise ConnectionError(f"{self._high - self._low} bytes after the last reply")


class LibraryWire:
    """The same through the library's public calls, where a connection shows no socket. Twice the time; same results."""

    def __init__(self, connection: Any) -> None:  # Any: redis-py's interface class lacks these methods' types
        self._connection = connection
        self._value = memoryview(b"")
        self.received = 0

    def send(self, pieces: Sequence[Buffer]) -> None:
        """Send packed commands."""
        self._connection.send_packed_command([bytes(piece) for piece in pieces])

    def _read(self) -> Any:  # Any: whatever a server may answer
        from redis.exceptions import AskError, ClusterDownError, MovedError, ResponseError

        words = {MovedError: "MOVED", AskError: "ASK", ClusterDownError: "CLUSTERDOWN"}
        try:
            answer = self._connection.read_response(disable_decoding=True)
        except (MovedError, AskError, ClusterDownError) as error:  # the library strips the word of errors it knows
            answer = Refusal(f"{words.get(type(error), 'CLUSTERDOWN')} {error}")
        except ResponseError as error:
            answer = Refusal(str(error))
        self.received += 1
        return answer

    def reply(self) -> int | bytes | Refusal | None:
        """The next reply without a bulk value."""
        answer = self._read()
        if answer is None or isinstance(answer, int | bytes | Refusal):
            return answer
        raise ConnectionError(f"not the expected reply: {type(answer).__name__}")

    def value_bytes(self) -> int | Refusal | None:
        """Length of the next bulk value."""
        answer = self._read()
        if answer is None or isinstance(answer, Refusal):
            return answer
        if not isinstance(answer, bytes):
            raise ConnectionError(f"not the expected reply: {type(answer).__name__}")
        self._value = memoryview(answer)
        return len(answer)

    def value(self, *parts: memoryview) -> None:
        """Copy it out."""
        at = 0
        for part in parts:
            part[:] = self._value[at : at + len(part)]
            at += len(part)

    def finish(self) -> None:
        """The pool looks for leftovers itself when it lends the connection again."""


def _integer(line: bytes) -> int:
    digits = line[1:]
    if not digits.removeprefix(b"-").isdigit() or len(digits) > 20:  # int() also takes b" 1_0"
        raise ConnectionError(f"not RESP: {line[:32]!r}")
    return int(digits)
