"""The blocking client of a daemon: for tiers, tools and notebooks. Thread-safe: each call borrows a connection of its own.

    blocks = Blocks(DaemonClient("unix:///run/tierkv/daemon.sock"), namespace=namespace, root=namespace.root())
    blocks.write(run, views);  blocks.read(keys, outs, deadline_s=1.0)

On the daemon's machine blocks go through memory that both map; the socket carries places and checksums. Elsewhere they go
through the socket, straight from and to the caller's memory. Nothing is believed that is not verified: a block counts as
read when the copy in the caller's memory has the checksum that its writer gave it.
"""

import json
import os
import secrets
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final

from tierkv.config import TlsFiles
from tierkv.daemon.link import Link, Reply
from tierkv.daemon.protocol import Op
from tierkv.errors import ConfigError, ProtocolError, RefusedError, TierError
from tierkv.mover import Clock
from tierkv.values import DAEMON_URL

MAX_IDLE: Final = 8
"""Connections kept for the next call."""
MAX_ENDED: Final = 1024
"""Connections of which one HELLO says that they have ended; the next one tells of the others."""
MAX_PAUSE_S: Final = 30.0
_FATAL: Final = ("config", "token")


class DaemonClient:
    """A process's access to one daemon. It connects when it is first used, and again when that was lost.

    name: for people.  connect_s: for a connection and its handshake.  down_s: after a failure the daemon is left alone for so
    long, then for twice as long, up to half a minute: calls fail at once meanwhile.
    Raises ConfigError for what is no address; calls raise TierError when the daemon cannot be reached or fails, RefusedError when
    it says no.
    """

    def __init__(
        self,
        url: str,
        *,
        name: str = "",
        token: str = "",
        tls: TlsFiles = TlsFiles(None, None, None),  # noqa: B008  (a frozen value)
        connect_s: float = 1.0,
        down_s: float = 1.0,
        clock: Clock = time.monotonic,
    ) -> None:
        try:
            DAEMON_URL.parse(url)
        except ValueError:
            raise ConfigError(f"{url}: not an address of a daemon; give {DAEMON_URL.expected}") from None
        self.url = url
        self._name = name or Path(sys.argv[0] or "python").name
        self._token, self._tls, self._connect_s, self._clock = token, tls, connect_s, clock
        self._id, self._process = secrets.token_bytes(32), os.getpid()
        self._lock = threading.Lock()
        self._idle: list[Link] = []
        self._next, self._ended = 1, set[int]()
        self._down_s, self._pause_s, self._down_until = down_s, down_s, float("-inf")
        self._closed = False

    # -- connections --------------------------------------------------------------------------------------------------

    @contextmanager
    def link(self) -> Iterator[Link]:
        """Borrow a connection. It is closed when what is done with it fails."""
        link = self._take()
        try:
            yield link
        except RefusedError:
            self._give(link)
            raise
        except (OSError, ProtocolError) as error:
            self._drop(link)
            raise TierError(f"{self.url}: {_why(error)}") from error
        except BaseException:
            self._drop(link)  # in the middle of a message, who knows
            raise
        self._give(link)

    def _take(self) -> Link:
        if os.getpid() != self._process:
            raise TierError(f"{self.url}: this client is another process's: make one after the fork")
        with self._lock:
            if self._closed:
                raise TierError(f"{self.url}: this client is closed")
            if self._clock() < self._down_until:
                raise TierError(f"{self.url}: left alone for a while after it could not be reached")
            while self._idle:
                link = self._idle.pop()
                if link.is_quiet:
                    return link
                self._end(link)  # its daemon has gone, and maybe come back
            number, self._next = self._next, self._next + 1
            ended = sorted(self._ended)[-MAX_ENDED:]
        try:
            link = Link(self.url, number=number, tls=self._tls, timeout_s=self._connect_s)
        except (OSError, ProtocolError) as error:
            self._failed()
            raise TierError(f"{self.url}: {_why(error)}; is `tierkv daemon` running there?") from None
        try:
            hello = {
                "client": self._id,
                "name": self._name,
                "pid": os.getpid(),
                "connection": number,
                "ended": ended,
                "token": self._token,
                "wants": ["memory"],
            }
            link.hello = link.call(Op.HELLO, hello, timeout_s=self._connect_s)
            link.hello.data("instance")
        except RefusedError:
            link.close()
            raise
        except (OSError, ProtocolError) as error:
            link.close()
            self._failed()
            raise TierError(f"{self.url}: {_why(error)}") from None
        with self._lock:
            self._ended.difference_update(ended)
            self._pause_s = self._down_s
        return link

    def _give(self, link: Link) -> None:
        with self._lock:
            if self._closed or len(self._idle) == MAX_IDLE:
                self._end(link)
            else:
                self._idle.append(link)

    def _drop(self, link: Link) -> None:
        with self._lock:
            self._end(link)

    def _end(self, link: Link) -> None:
        """Close a connection whose borrower is done with it: nothing of it is written to shared memory any more."""
        link.close()
        self._ended.add(link.number)

    def _failed(self) -> None:
        with self._lock:
            self._down_until = self._clock() + self._pause_s
            self._pause_s = min(MAX_PAUSE_S, 2 * self._pause_s)

    # -- calls --------------------------------------------------------------------------------------------------------

    def call(
        self,
        op: Op,
        fields: Mapping[str, object],
        payload: Sequence[memoryview] = (),
        *,
        timeout_s: float = 30.0,
        told: Callable[[dict[str, Any]], None] | None = None,
    ) -> Reply:
        """Make one request. told: hears events of it that come before its reply."""
        with self.link() as link:
            return link.call(op, fields, payload, timeout_s=timeout_s, told=told)

    def ping(self) -> float:
        """Seconds of the smallest round trip."""
        start = time.perf_counter()
        self.call(Op.PING, {})
        return time.perf_counter() - start

    def stats(self) -> dict[str, Any]:
        """What the daemon tells of itself."""
        reply = self.call(Op.STATS, {})
        try:
            return dict(json.loads(reply.payload))
        except ValueError as error:
            raise TierError(f"{self.url}: statistics that are none: {error}") from None

    def forget(
        self, *, model: str | None = None, tenant: str | None = None, older_s: float | None = None
    ) -> dict[str, int]:
        """Forget blocks in all tiers of the daemon; how many in each."""
        fields = {"model": model, "tenant": tenant, "older_s": older_s}
        return self.call(Op.FORGET, fields, timeout_s=600.0).table("forgotten")

    def flush(self, *, deadline_s: float = 30.0) -> dict[str, Any]:
        """Let it write down what only memory holds: {written, complete}."""
        return self.call(Op.FLUSH, {"deadline_s": deadline_s}, timeout_s=deadline_s + 30).fields

    def drain(self, *, deadline_s: float = 30.0) -> dict[str, Any]:
        """As `flush`, and from then on no more blocks are taken."""
        return self.call(Op.DRAIN, {"deadline_s": deadline_s}, timeout_s=deadline_s + 30).fields

    def verify(self, told: Callable[[dict[str, Any]], None] | None = None) -> dict[str, dict[str, int]]:
        """Let it compare every block with its checksum: {tier: {checked, bad}}."""
        return self.call(Op.VERIFY, {}, timeout_s=86_400.0, told=told).table("tiers")

    def pin(self, prefix: str, *, ttl_s: float) -> dict[str, Any]:
        """Keep the longest hit that begins with the block whose key begins so, in hex: {pin, blocks}."""
        return self.call(Op.PIN, {"pool": 0, "prefix": prefix, "ttl_s": ttl_s}, timeout_s=60.0).fields

    def unpin(self, pin: str = "") -> int:
        """End a pin, or all; how many ended."""
        return self.call(Op.UNPIN, {"pin": pin}).number("ended")

    def events(self) -> Iterator[tuple[int, list[dict[str, Any]]]]:
        """Blocks that the daemon's tiers begin and cease to hold: pool and events, for as long as the caller iterates."""
        with self.link() as link:
            yield from link.subscribe()

    def close(self) -> None:
        """Close all connections. Idempotent."""
        with self._lock:
            self._closed = True
            idle, self._idle = self._idle, []
        for link in idle:
            link.close()


def fatal(error: RefusedError) -> ConfigError | None:
    """The refusal as a mistake of whoever configured this, if it is one."""
    return ConfigError(str(error)) if error.kind in _FATAL else None


def _why(error: BaseException) -> str:
    return getattr(error, "strerror", None) or str(error) or type(error).__name__
