"""`tierkv daemon`: listeners, signals, the tick, and an end in good order. asyncio lives here and around here, nowhere else."""

import asyncio
import contextlib
import logging
import signal
import socket
import sys
from collections.abc import Callable
from dataclasses import fields, replace
from pathlib import Path
from typing import Final
from urllib.parse import unquote, urlsplit

from tierkv.config import Config, ServerConfig, default_socket, notify_socket
from tierkv.daemon.access import Tokens, peer_of
from tierkv.daemon.events import HashForm, VllmEncoder
from tierkv.daemon.http import HttpServer
from tierkv.daemon.operations import Operations
from tierkv.daemon.protocol import Incoming
from tierkv.daemon.service import TICK_S, Service
from tierkv.daemon.sockets import is_loopback, listen, server_context, tune
from tierkv.daemon.stream import Stream
from tierkv.errors import ConfigError, TierKVError
from tierkv.metrics import Metrics
from tierkv.values import hide_secrets

SWITCH_S: Final = 0.0005
"""How long a thread may keep the interpreter: movers must not hold up the loop for 5 ms at a time."""
RELOADED: Final = ("token_file", "tls_certificate", "tls_key", "tls_ca", "lease_s", "lease_share", "drain_s")
"""Of [server], what SIGHUP takes; all else stays as it was until a restart."""
CROWDED_S: Final = 0.25
"""Without new connections, once there were no descriptors for them."""
log = logging.getLogger("tierkv")


class Server:
    """A daemon in this process. `run` returns when it was told to stop.

    insecure: listen beyond this machine without tokens or client certificates.  force: serve device pools larger than the host.
    told: hears lines for people.  reload: the configuration as it is now, for SIGHUP.
    Raises ConfigError, TierError or TierBusy before anything is served.
    """

    def __init__(
        self,
        config: Config,
        *,
        force: bool = False,
        insecure: bool = False,
        told: Callable[[str], None] = log.info,
        reload: Callable[[], Config] | None = None,
    ) -> None:
        self.config, self._told, self._reload = config, told, reload
        self._insecure = insecure
        self.urls = config.server.listen or (default_socket(),)
        self._check_exposure(config.server)
        self._tls = server_context(config.server.tls()) if any(url.startswith("tls:") for url in self.urls) else None
        self.service = Service(config, metrics=Metrics(), force=force)
        self._stop: asyncio.Event | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._sockets: list[tuple[str, socket.socket]] = []
        self._streams: set[Stream] = set()

    def _check_exposure(self, options: ServerConfig) -> None:
        if self._insecure:
            return
        for url in self.urls:
            guarded = options.token_file or (url.startswith("tls:") and options.tls_ca)
            if not is_loopback(url) and not guarded:
                raise ConfigError(
                    f"{url} can be reached from other machines, and whoever reaches it could read all KV: set "
                    "server.token_file, or a tls:// listener with server.tls_ca, or say --insecure"
                )
        for endpoint in (options.events, options.events_replay):
            if endpoint and endpoint.startswith("tcp:") and not is_loopback(endpoint):
                raise ConfigError(
                    f"KV events on {endpoint} can be heard from other machines, with the tokens of all prompts, and ZeroMQ asks "
                    "nobody who he is: use tcp://127.0.0.1:port, or say --insecure"
                )

    def serve(self) -> None:
        """Run in this thread until told to stop."""
        asyncio.run(self.run())

    async def run(self, *, started: Callable[[], None] | None = None) -> None:
        """Serve until SIGTERM, SIGINT or `stop`; then write down what only memory holds. started: called once it listens."""
        usual = sys.getswitchinterval()
        sys.setswitchinterval(SWITCH_S)
        self._loop, self._stop = asyncio.get_running_loop(), asyncio.Event()
        options, service = self.config.server, self.service
        http: HttpServer | None = None
        try:
            service.own_folder()
            for url in self.urls:
                sock = listen(url, mode=int(options.socket_mode, 8))
                self._sockets.append((url, sock))
                sock.setblocking(False)
            service.listening = tuple(_bound(url, sock) for url, sock in self._sockets)
            if options.events:
                from tierkv.daemon.zmq_events import ZmqPublisher

                service.publisher = ZmqPublisher(
                    options.events,
                    topic=options.events_topic,
                    replay_endpoint=options.events_replay,
                    encoder=VllmEncoder(hashes=HashForm(options.events_hashes)),
                )
                service.publisher.attach(self._loop)
            if options.http:
                http = HttpServer(stats=service.stats, metrics=service.metrics.prometheus, ready=self._ready)
                parts = urlsplit(f"//{options.http}")
                port = await http.start(parts.hostname or "127.0.0.1", parts.port or 0)
                service.http = f"{parts.hostname}:{port}"
            for url, sock in self._sockets:
                self._loop.add_reader(sock, self._accept, url, sock)
            for number, react in (
                (signal.SIGTERM, self.stop),
                (signal.SIGINT, self.stop),
                (signal.SIGHUP, self._reloaded),
            ):
                with contextlib.suppress(ValueError, RuntimeError):  # not the main thread: whoever runs us stops us
                    self._loop.add_signal_handler(number, react)
            self._introduce()
            _notify("READY=1")
            if started:
                started()
            while not self._stop.is_set():
                service.tick()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._stop.wait(), TICK_S)
        finally:
            _notify("STOPPING=1")
            await self._end(http)
            sys.setswitchinterval(usual)

    def stop(self) -> None:
        """End in good order. Thread-safe."""
        assert self._loop and self._stop
        self._loop.call_soon_threadsafe(self._stop.set)

    def _ready(self) -> str | None:
        if self._stop is not None and self._stop.is_set():
            return "stopping"
        return "draining: no more blocks are taken" if self.service.draining else None

    def _introduce(self) -> None:
        config, service = self.config, self.service
        parts = [f"host {config.host.capacity / 2**30:.2f} GiB of shared memory"]
        if config.disk.path:
            parts.append(f"disk {config.disk.path} up to {config.disk.capacity / 2**30:.2f} GiB")
        if config.redis.url:
            parts.append(f"redis {hide_secrets(config.redis.url)}")
        if config.pack.paths:
            parts.append(f"packs {hide_secrets(', '.join(map(str, config.pack.paths)))}")
        layouts = config.server.layouts
        self._told(f"owns: {', '.join(parts)}; for {layouts} block layout{'s' if layouts > 1 else ''}")
        for url in service.listening:
            self._told(f"listens on {url}")
        if service.http:
            self._told(f"dashboard: http://{service.http}/")
        if service.publisher:
            self._told(f"KV events on {service.publisher.endpoint}")

    def _accept_again(self, url: str, listener: socket.socket) -> None:
        assert self._loop
        if listener.fileno() >= 0:
            self._loop.add_reader(listener, self._accept, url, listener)

    def _accept(self, url: str, listener: socket.socket) -> None:
        assert self._loop
        for _ in range(64):
            try:
                sock, _ = listener.accept()
            except (BlockingIOError, ConnectionAbortedError):
                return
            except OSError as error:  # out of descriptors: those who are here are served on
                log.warning("daemon: connections cannot be taken for %g s: %s", CROWDED_S, error.strerror)
                self._loop.remove_reader(listener)  # which would call again at once, and again
                self._loop.call_later(CROWDED_S, self._accept_again, url, listener)
                return
            try:
                peer = peer_of(sock)
                if sock.family != socket.AF_UNIX:
                    tune(sock)
                sock.setblocking(False)
                if url.startswith("tls:"):
                    assert self._tls
                    sock = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
            except OSError as error:
                log.debug("daemon: a connection ended as it began: %s", error)
                sock.close()
                continue
            session = Operations(self.service, peer)
            stream = Stream(self._loop, sock, Incoming(), session.receive, session.end)
            self._streams = {one for one in self._streams if not one.closed} | {stream}
            session.start(stream)

    def _reloaded(self) -> None:
        """SIGHUP: take what can be taken while connections stay."""
        _notify("RELOADING=1")
        try:
            if self._reload is None:
                return
            config = self._reload()
            self._check_exposure(config.server)
            tokens = Tokens(config.server.token_file)
            tls = server_context(config.server.tls()) if self._tls else None
        except TierKVError as error:
            log.warning("reload: %s; everything stays as it was", error)
            return
        finally:
            _notify("READY=1")
        self.service.tokens, self._tls = tokens, tls
        self.service.recheck()
        old, given = self.config, config.server
        server = replace(old.server, **{name: getattr(given, name) for name in RELOADED})
        self.config = self.service.config = replace(old, server=server)
        if old.pack != config.pack and self._loop:
            self._remounting = self._loop.create_task(self._remount(config))
        sections = ("store", "host", "disk", "redis", "transfer")
        fixed = [name for name in sections if getattr(old, name) != getattr(config, name)]
        names = [option.name for option in fields(server)]
        fixed += [f"server.{name}" for name in names if getattr(server, name) != getattr(given, name)]
        self._told("reloaded: tokens, certificates, leases" + (f"; {', '.join(fixed)} need a restart" if fixed else ""))

    async def _remount(self, config: Config) -> None:
        try:
            await self.service.remount(config)
        except TierKVError as error:
            log.warning("reload: %s; the packs stay as they were", error)
            return
        self.config = self.service.config
        self._told(f"mounted {len(config.pack.paths or ())} packs")

    async def _end(self, http: HttpServer | None) -> None:
        """No new clients; write down; then close."""
        assert self._loop
        service, drain_s = self.service, self.config.server.drain_s
        service.draining = service.ending = True
        for url, sock in self._sockets:
            self._loop.remove_reader(sock)
            sock.close()
            if url.startswith("unix:"):
                Path(unquote(urlsplit(url).path)).unlink(missing_ok=True)
        try:
            if service.pools:
                flushed = await service.flush(drain_s)
                left = "" if flushed["complete"] else f"; not all within {drain_s:g} s"
                self._told(f"stopping: {flushed['written']} more blocks written down{left}")
        finally:
            for stream in list(self._streams):
                stream.close("the daemon stops")
            if http:
                await http.close()
            service.close()


def _bound(url: str, sock: socket.socket) -> str:
    """A URL with the port that the system chose, where it was 0."""
    if sock.family == socket.AF_UNIX:
        return url
    host, port = sock.getsockname()[:2]
    return f"{urlsplit(url).scheme}://{f'[{host}]' if ':' in host else host}:{port}"


def _notify(state: str) -> None:
    """Tell systemd, if it is what started us (sd_notify(3))."""
    where = notify_socket()
    if where is None:
        return
    address = "\0" + where[1:] if where.startswith("@") else where
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(state.encode(), address)
    except OSError as error:
        log.debug("sd_notify: %s", error)
