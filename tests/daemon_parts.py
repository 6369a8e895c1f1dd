"""Daemons for tests: one on a thread of this process, whose insides can be looked at, and one in a process that can be killed."""

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tierkv.config import Config, DiskConfig, HostConfig, ServerConfig
from tierkv.daemon.blocks import Blocks
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.pool import Pool
from tierkv.daemon.protocol import Incoming, Message, Op, encode
from tierkv.daemon.server import Server
from tierkv.daemon.service import Service
from tierkv.keys import Namespace
from tierkv.testing import SMALL

T = TypeVar("T")
NAMESPACE = Namespace("test", SMALL)
ROOT = NAMESPACE.root()
PATIENCE_S = 30.0
"""For what must happen soon, on a machine that may be busy."""
_ROOT = Path(__file__).parents[1]


def until(holds: Callable[[], bool], what: str) -> None:
    """Ask until it holds: for what another thread or process does in its own time."""
    end = time.monotonic() + PATIENCE_S
    while not holds():
        assert time.monotonic() < end, f"{what}: not within {PATIENCE_S:g} s"
        os.sched_yield()


def config_of(
    folder: Path,
    *,
    listen: Sequence[str] | None = None,
    capacity: str = "16MiB",
    disk: str | None = None,
    copy_down: str = "save",
    **server: Any,
) -> Config:
    """A daemon under `folder`, by unix socket and TCP. disk: the capacity of one."""
    urls = listen or (f"unix://{folder}/d.sock", "tcp://127.0.0.1:0")
    return Config(
        host=HostConfig(capacity=capacity),
        disk=DiskConfig(path=folder / "disk", capacity=disk, copy_down=copy_down) if disk else DiskConfig(),
        server=ServerConfig(**({"http": None} | server), listen=",".join(urls)),
    )


class RunningDaemon:
    """A server on a thread of this process. clock: of its leases and pins."""

    def __init__(self, config: Config, *, clock: Callable[[], float] | None = None, **options: Any) -> None:
        self.told: list[str] = []
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server = Server(config, told=self.told.append, **options)
        if clock:
            self._server.service.clock = clock
        self._failed: BaseException | None = None
        up = threading.Event()
        self._thread = threading.Thread(target=self._run, args=(up,))
        self._thread.start()
        up.wait()
        if self._failed:
            self._thread.join()
            raise self._failed

    def _run(self, up: threading.Event) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.run(started=up.set)

        try:
            asyncio.run(serve())
        except BaseException as error:  # noqa: BLE001  raised in the test's thread
            self._failed = error
        finally:
            up.set()

    @property
    def service(self) -> Service:
        return self._server.service

    @property
    def urls(self) -> tuple[str, ...]:
        return self.service.listening

    @property
    def pool(self) -> Pool:
        return self.service.pools[1]

    def do(self, call: Callable[[], T]) -> T:
        """Call something on the server's loop."""

        async def run() -> T:
            return call()

        assert self._loop
        return asyncio.run_coroutine_threadsafe(run(), self._loop).result(PATIENCE_S)

    def until(self, holds: Callable[[], bool], what: str) -> None:
        """As `until`, asked on the loop."""
        until(lambda: self.do(holds), what)

    def client(self, url: str | None = None, **options: Any) -> DaemonClient:
        return DaemonClient(url or self.urls[0], **({"connect_s": PATIENCE_S} | options))

    @contextlib.contextmanager
    def blocks(self, url: str | None = None, *, shares: bool = True, **options: Any) -> Iterator[Blocks]:
        client = self.client(url, **options)
        blocks = Blocks(client, namespace=NAMESPACE, root=ROOT, shares=shares)
        try:
            yield blocks
        finally:
            blocks.close()
            client.close()

    def at_rest(self) -> bool:
        """Nothing is on lease, reserved, or in quarantine, and no lease of the index lives."""
        if not self.service.pools:
            return True
        stats = self.pool.index.stats()
        host = stats.tiers[1]
        leases = sum(len(session.held) + len(session._own) for session in self.service._sessions())
        return (
            leases == self.service.quarantined == stats.num_leases == 0
            and host.used == host.held
            and host.available == host.capacity
        )

    def stop(self) -> None:
        """Stop it; raises what ended it, if it was not this."""
        if self._thread.is_alive():
            self._server.stop()
        self._thread.join(PATIENCE_S)
        assert not self._thread.is_alive()
        if self._failed:
            raise self._failed


@contextlib.contextmanager
def running(folder: Path, *, clock: Callable[[], float] | None = None, **options: Any) -> Iterator[RunningDaemon]:
    """A daemon for as long as the block runs; options of `config_of`."""
    daemon = RunningDaemon(config_of(folder, **options), clock=clock)
    try:
        yield daemon
    finally:
        daemon.stop()


class DaemonProcess:
    """`tierkv daemon` as a process. settings: as after --set.

    before: words of the command line before the interpreter; flags: after `daemon`.
    """

    def __init__(
        self,
        folder: Path,
        *,
        listen: Sequence[str] | None = None,
        before: Sequence[str] = (),
        flags: Sequence[str] = (),
        **settings: object,
    ) -> None:
        urls = listen or (f"unix://{folder}/d.sock",)
        plain = {"host.capacity": "16MiB", "server.http": "off"} | {
            name.replace("__", "."): value for name, value in settings.items()
        }
        words = [*before, sys.executable, "-m", "tierkv.cli", "daemon", *flags]
        words += [word for url in urls for word in ("--listen", url)]
        words += [word for name, value in plain.items() for word in ("--set", f"{name}={value}")]
        environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": "1"}
        self.process = subprocess.Popen(
            words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=folder, env=environment
        )
        assert self.process.stdout
        self.urls: list[str] = []
        while len(self.urls) < len(urls):
            line = self.process.stdout.readline()
            if not line:
                self.process.wait()
                raise AssertionError(f"the daemon did not start: {self.end()}")
            if "listens on" in line:
                self.urls.append(line.split()[-1])

    @property
    def pid(self) -> int:
        return self.process.pid

    def rss_bytes(self) -> int:
        """Memory of its own: without what it shares with clients."""
        for line in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) << 10
        raise AssertionError("no RssAnon")

    def num_fds(self) -> int:
        return len(list(Path(f"/proc/{self.pid}/fd").iterdir()))

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """End it at once, as a crash would."""
        self.process.kill()
        self.process.wait()

    def end(self) -> str:
        """Stop it in good order; what it wrote to stderr."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.terminate()
        _, errors = self.process.communicate(timeout=PATIENCE_S)
        return errors


@contextlib.contextmanager
def process(folder: Path, **options: Any) -> Iterator[DaemonProcess]:
    daemon = DaemonProcess(folder, **options)
    try:
        yield daemon
    finally:
        daemon.end()


# -- whoever speaks the protocol by hand ------------------------------------------------------------------------------------


def connected(url: str) -> socket.socket:
    """A plain socket to a daemon."""
    if url.startswith("unix:"):
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(PATIENCE_S)
        sock.connect(url.removeprefix("unix://"))
        return sock
    host, _, port = url.rpartition("//")[2].rpartition(":")
    return socket.create_connection((host, int(port)), timeout=PATIENCE_S)


HELLO: Mapping[str, Any] = {
    "client": bytes(range(32)),
    "name": "by hand",
    "pid": None,
    "connection": 1,
    "ended": [],
    "token": "",
    "wants": ["memory"],
}


@dataclass
class Raw:
    """A client that sends what a test likes. sock: closed with it."""

    sock: socket.socket

    def __post_init__(self) -> None:
        self._incoming = Incoming()
        self._come: list[Message] = []
        self._id = 0
        self.fds: list[int] = []

    def send(self, op: Op, fields: Mapping[str, object], payload: bytes = b"") -> int:
        self._id += 1
        self.sock.sendall(encode(op, self._id, fields, payload_bytes=len(payload)) + payload)
        return self._id

    def receive(self) -> Message | None:
        """The next message; None at the end of the connection."""
        while not self._come:
            with self._incoming.target() as target:
                try:
                    piece, fds, _, _ = socket.recv_fds(self.sock, len(target), 4)
                except ConnectionResetError:
                    return None
                count = len(piece)
                target[:count] = piece
                self.fds += fds
            if not count:
                return None
            self._come += self._incoming.advance(count)
        return self._come.pop(0)

    def ask(self, op: Op, fields: Mapping[str, object], payload: bytes = b"") -> Message:
        """Send a request; its answer."""
        id = self.send(op, fields, payload)
        message = self.receive()
        assert message is not None and message.id in (0, id), message
        return message

    def hello(self, **fields: object) -> Message:
        return self.ask(Op.HELLO, {**HELLO, **fields})

    def attach(self, *, memory: int = 0) -> int:
        """Attach to the pool of NAMESPACE; its number."""
        names = {"model": NAMESPACE.model, "adapter": "", "tenant": ""}
        layout = {name: getattr(SMALL, name) for name in SMALL.__dataclass_fields__}
        fields = {"layout": layout, "namespace": names, "root": ROOT, "device_bytes": 0, "memory": memory}
        answer = self.ask(Op.ATTACH, fields)
        assert answer.op is Op.REPLY, answer.fields
        return int(answer.fields["pool"])

    def close(self) -> None:
        self.sock.close()
        for fd in self.fds:
            os.close(fd)
        self.fds = []


@contextlib.contextmanager
def raw(url: str, **hello: object) -> Iterator[Raw]:
    """A connection that has said HELLO."""
    client = Raw(connected(url))
    try:
        answer = client.hello(**hello)
        assert answer.op is Op.REPLY, answer.fields
        yield client
    finally:
        client.close()
