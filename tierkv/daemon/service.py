"""What all connections share: clients, pools, pins, waiters, and the calls of whoever runs the daemon. On the server's loop."""

import asyncio
import logging
import os
import secrets
import time
from collections import deque
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final, TypeVar

import numpy as np
import numpy.typing as npt

from tierkv.building import make_mover
from tierkv.config import Config
from tierkv.daemon import upkeep
from tierkv.daemon.access import Tokens
from tierkv.daemon.events import EventLog, batches, encode
from tierkv.daemon.loans import Lent, Uses, Writing
from tierkv.daemon.mounts import layouts_of
from tierkv.daemon.pool import Pool
from tierkv.daemon.popular import MAX_PREFIXES, Popular
from tierkv.daemon.protocol import Op, State
from tierkv.errors import ConfigError, PinError, ProtocolError, RefusedError, TierError
from tierkv.keys import KEY_BYTES, Key
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.mover import AHEAD_LANE, Clock
from tierkv.reuse_distance import ReuseDistances
from tierkv.tiers.disk_files import FolderLock
from tierkv.tiers.host_memory import available_memory
from tierkv.tiers.pack import PackTier

if TYPE_CHECKING:
    from tierkv.daemon.session import Session
    from tierkv.daemon.zmq_events import ZmqPublisher

TICK_S: Final = 0.25
CLOCKS_EVERY_S: Final = 10.0
MAX_CLOCKS: Final = 100_000
"""Notes of logical against real time: what was not used for eleven days can be told from the rest."""
T = TypeVar("T")
log = logging.getLogger("tierkv")


@dataclass(slots=True, eq=False)
class Client:
    """A process, with all its connections. device: bytes of the device pool over each pool.  watched: its pidfd."""

    id: bytes
    name: str
    pid: int | None
    address: str
    since: float
    sessions: set["Session"] = field(default_factory=set)
    uses: dict[int, Uses] = field(default_factory=dict)
    device: dict[int, int] = field(default_factory=dict)
    mapped: bool = False
    watched: int | None = None
    read_blocks: int = 0
    written_blocks: int = 0

    def leased_blocks(self, pool: Pool) -> int:
        """Blocks of a pool that it keeps from being forgotten."""
        return sum(session.leased_blocks(pool) for session in self.sessions)


@dataclass(slots=True, eq=False)
class Pinned:
    """Blocks that somebody wants kept until `expires_s`."""

    pool: Pool
    lent: Lent
    key: Key
    expires_s: float


class Service:
    """One daemon, without its sockets. force: whatever size the device pools over it have."""

    def __init__(self, config: Config, *, metrics: Metrics, clock: Clock = time.monotonic, force: bool = False) -> None:
        self.config, self.metrics, self.clock, self.force = config, metrics, clock, force
        self.tokens = Tokens(config.server.token_file)
        available, source = available_memory()
        if config.host.capacity > available:  # pools find out as well, but only when an engine comes
            raise ConfigError(
                f"host.capacity = {config.host.capacity / 2**30:.2f} GiB: {available / 2**30:.2f} GiB of memory are free "
                f"({source}); lower it"
            )
        self._packed = layouts_of(
            config
        )  # a pack that cannot be mounted is to be heard of now, not when an engine comes
        self._folder: FolderLock | None = None
        self.mover = make_mover(config, metrics)
        self.pools: dict[int, Pool] = {}
        self.logs: dict[int, EventLog] = {}
        self.clients: dict[bytes, Client] = {}
        self.subscribers: dict[Session, int] = {}
        self.publisher: ZmqPublisher | None = None
        self.popular = Popular()
        self.pins: dict[str, Pinned] = {}
        self.draining = False  # no more blocks are taken
        self.ending = False  # nothing long is gone on with
        self.listening: tuple[str, ...] = ()
        self.http: str | None = None
        self.instance = secrets.token_bytes(16)
        self.started = time.time()
        self.began_s = clock()
        self.clocks: dict[int, deque[tuple[float, int]]] = {}
        self._waiting: dict[tuple[int, bytes], set[asyncio.Future[None]]] = {}
        self._quarantine: dict[tuple[bytes, int], list[tuple[Pool, Writing]]] = {}
        self._next_pin = 1
        self._opening = asyncio.Lock()
        self._distances: dict[int, ReuseDistances] = {}
        metrics.daemon_clients.read_from(lambda: float(sum(bool(one.sessions) for one in list(self.clients.values()))))
        metrics.daemon_leases.read_from(lambda: float(sum(len(s.held) for s in self._sessions())))
        metrics.daemon_leased_bytes.read_from(lambda: float(self.leased_bytes()))
        metrics.blocks_pinned.read_from(lambda: float(sum(pin.lent.num_blocks for pin in self.pins.values())))

    def _sessions(self) -> list["Session"]:
        return [session for client in list(self.clients.values()) for session in list(client.sessions)]

    def leased_bytes(self, client: Client | None = None) -> int:
        """Bytes that leases keep from being forgotten: of one client, or of all."""
        clients = [client] if client else list(self.clients.values())
        return sum(
            one.leased_blocks(pool) * pool.layout.block_bytes for one in clients for pool in list(self.pools.values())
        )

    def recheck(self) -> None:
        """The tokens are other ones now."""
        for session in self._sessions():
            session.recheck()

    # -- clients ------------------------------------------------------------------------------------------------------

    def welcome(self, session: "Session", fields: dict[str, Any]) -> Client:  # Any: checked by the protocol
        """A connection has introduced itself."""
        client = self.clients.get(fields["client"])
        if client and any(one.number == session.number for one in client.sessions):
            raise ProtocolError(f"HELLO of connection {session.number}, which is there already: number each anew")
        if client is None:
            peer = session.peer
            pid = peer.pid if peer.address == "unix" else fields["pid"]
            client = Client(fields["client"], fields["name"], pid, peer.address, time.time())
            client.watched = self._watch(client) if peer.pid else None
            self.clients[client.id] = client
            log.info("client %s (%s, pid %s) is here", client.name, client.address, client.pid)
        client.sessions.add(session)
        ended = set(fields["ended"])
        for old in [one for one in client.sessions if one.number in ended]:
            old.stream.close("its client has ended it")  # which has not been heard of here yet
        for number in ended:
            self._clear(client.id, number)
        return client

    def _watch(self, client: Client) -> int | None:
        """Hear of the end of a process, even where a child of it keeps its connections open."""
        assert client.pid
        try:
            fd = os.pidfd_open(client.pid)
        except OSError as error:
            log.debug("the process of client %s cannot be watched: %s", client.name, error)
            return None
        asyncio.get_running_loop().add_reader(fd, self._process_ended, client, fd)
        return fd

    def _process_ended(self, client: Client, fd: int) -> None:
        asyncio.get_running_loop().remove_reader(fd)
        os.close(fd)
        client.watched = client.pid = None
        client.mapped = False
        for session in list(client.sessions):
            session.stream.close("its process has ended")
        for of, number in [place for place in self._quarantine if place[0] == client.id]:
            self._clear(of, number)

    def ended(self, session: "Session", late: list[tuple[Pool, Writing]], reason: str) -> None:
        """A connection is over; `late`: places that it had reserved and not filled."""
        self.subscribers.pop(session, None)
        client = session.client
        if client is None:
            log.debug("a connection from %s ended before its HELLO: %s", session.peer.address, reason)
            return
        client.sessions.discard(session)
        if late and client.mapped:
            # It may be in the middle of a copy. Its places are nobody's until it says that it is not, or is gone.
            self._quarantine[client.id, session.number] = late
        else:
            for pool, writing in late:
                pool.abandon(writing)
        if not client.sessions:
            log.info("client %s is gone: %s", client.name, reason)
        self._let_go(client)

    def _let_go(self, client: Client) -> None:
        """Forget a client that has no connection, and none whose writes may still go on."""
        if client.sessions or any(of == client.id for of, _ in self._quarantine):
            return
        self.clients.pop(client.id, None)
        if client.watched is not None:
            asyncio.get_running_loop().remove_reader(client.watched)
            os.close(client.watched)
            client.watched = None

    def _clear(self, id: bytes, number: int) -> None:
        """Nobody writes to the places of this connection any more."""
        for pool, writing in self._quarantine.pop((id, number), ()):
            pool.abandon(writing)
        if client := self.clients.get(id):
            self._let_go(client)

    @property
    def quarantined(self) -> int:
        """Places that nobody may use until their lost writers are known to be gone."""
        return sum(len(writing.places) for late in self._quarantine.values() for _, writing in late)

    # -- pools --------------------------------------------------------------------------------------------------------

    @staticmethod
    async def off_loop(work: Callable[[], T]) -> T:
        """Run what opens files or asks a network on a thread, while others are served."""
        return await asyncio.get_running_loop().run_in_executor(None, work)

    async def attach(self, client: Client, layout: Layout, *, device_bytes: int, opens: bool) -> Pool:
        """The pool of a layout, made when first asked for. opens: whether this client may have it made, or only reads."""
        pool = self._known(layout)  # who has its pool does not wait for a disk that is opened for another
        opens = opens or any(shard.misfit(packed, layout) is None for shard, packed in self._packed)
        if pool is None and not opens:
            raise RefusedError(
                "nobody has written blocks of this layout here, and this client may only read", kind="config"
            )
        if pool is None:
            async with self._opening:
                pool = await self._pool_of(layout)
        own = client.device | {pool.number: device_bytes}
        above = [of.device.get(pool.number, 0) for of in self.clients.values() if of is not client] + [own[pool.number]]
        slab = pool.slab.num_places * layout.block_bytes
        if sum(above) > slab and not self.force:
            parts = " + ".join(f"{size / 2**20:,.0f}" for size in above if size)
            raise RefusedError(
                f"the device pools over this daemon would be {parts} = {sum(above) / 2**20:,.0f} MiB, its host tier is "
                f"{slab / 2**20:,.0f} MiB: what a device forgets would be gone here, too (pure churn). Raise the daemon's "
                "host.capacity, lower device.capacity of the engines, or start the daemon with --force",
                kind="config",
            )
        client.device = own
        client.uses.setdefault(pool.number, Uses())
        return pool

    async def remount(self, config: Config) -> None:
        """Answer from the packs of another configuration. Raises ConfigError or PackError; then all stays as it was."""
        packed = await self.off_loop(partial(layouts_of, config))
        async with self._opening:
            opened: list[tuple[Pool, PackTier | None]] = []
            with ExitStack() as unused:
                for pool in self.pools.values():
                    packs = await self.off_loop(partial(pool.mounts.open, config))
                    if packs:
                        unused.callback(packs.close)
                    opened.append((pool, packs))
                unused.pop_all()
            self.config, self._packed = replace(self.config, pack=config.pack), packed
            for pool, packs in opened:
                if old := pool.mount(packs):
                    await self.off_loop(old.close)

    def _known(self, layout: Layout) -> Pool | None:
        return next((pool for pool in self.pools.values() if pool.layout == layout), None)

    async def _pool_of(self, layout: Layout) -> Pool:
        pool = self._known(layout)
        if pool is None:
            if len(self.pools) == self.config.server.layouts:
                shapes = ", ".join(f"{p.layout.block_bytes} bytes of {p.layout.dtype}" for p in self.pools.values())
                raise RefusedError(
                    f"blocks of {layout.block_bytes} bytes of {layout.dtype}: this daemon keeps those of {len(self.pools)} "
                    f"layouts ({shapes}); set server.layouts higher, and each gets an equal part of host and disk",
                    kind="config",
                )
            pool = await self._open(layout)
        return pool

    async def _open_kept(self) -> None:
        """Open what an earlier daemon left on disk and no client has asked for yet, as far as server.layouts goes."""
        async with self._opening:
            for layout in await self.off_loop(partial(upkeep.kept_layouts, self.config.disk.path)):
                if self._known(layout) is None and len(self.pools) < self.config.server.layouts:
                    await self._open(layout)

    async def _open(self, layout: Layout) -> Pool:
        number = 1 + max(self.pools, default=0)
        events = EventLog(("device", "host", "disk"))
        events.clear()
        pool = await self.off_loop(
            partial(
                Pool,
                number,
                layout,
                config=self.config,
                metrics=self.metrics,
                mover=self.mover,
                clock=self.clock,
                listener=events,
            )
        )
        self.pools[number], self.logs[number] = pool, events
        self.clocks[number] = deque([(self.clock(), 0)], maxlen=MAX_CLOCKS)
        upkeep.observe(self.metrics, list(self.pools.values()))
        if number == 1:  # what other pools would hold has no name among the metrics
            self._distances[number] = upkeep.what_if_larger(self.metrics, pool)
        log.info(
            "pool %d: blocks of %d bytes (%s), %d in memory", number, layout.block_bytes, layout, pool.slab.num_places
        )
        return pool

    # -- blocks -------------------------------------------------------------------------------------------------------

    def noted(self, pool: Pool, root: Key, keys: bytes, found: int, depth: int) -> None:
        """A request was looked up."""
        self.popular.note(pool, root, keys, found, depth, now=time.time())
        if distances := self._distances.get(pool.number):
            distances.refer(np.frombuffer(keys, "<u8")[:: KEY_BYTES // 8])  # parts of a SHA-256: names as good as any

    def committed(self, pool: Pool, writing: Writing, checksums: npt.NDArray[np.uint64]) -> None:
        """A client has filled its places."""
        keys = writing.filled_keys
        pool.commit(writing, checksums)  # type: ignore[arg-type]  # an array of u64 is a sequence of ints to numpy
        self.metrics.bytes_written.add(len(keys) * pool.layout.block_bytes, "host")
        if self._waiting:
            for key in keys:
                for future in self._waiting.pop((pool.number, key), ()):
                    if not future.done():
                        future.set_result(None)

    async def arrival(self, pool: Pool, key: bytes, timeout_s: float) -> None:
        """Wait until a client has written this block, or the time is up."""
        future = asyncio.get_running_loop().create_future()
        waiters = self._waiting.setdefault((pool.number, key), set())
        waiters.add(future)
        try:
            await asyncio.wait([future], timeout=timeout_s)
        finally:
            waiters.discard(future)
            if not waiters and self._waiting.get((pool.number, key)) is waiters:
                del self._waiting[pool.number, key]

    # -- pins ---------------------------------------------------------------------------------------------------------

    def path_of(self, prefix: str) -> tuple[Pool, bytes]:
        """The keys of the longest hit that began with the block whose key begins so, in hex."""
        found = [one for one in self.popular.top(MAX_PREFIXES) if one.key.hex().startswith(prefix.lower())]
        if len(found) != 1:
            known = (
                f"{len(found)} prefixes have keys that begin so"
                if found
                else "no prefix of that key was asked for lately"
            )
            raise PinError(f"{prefix}: {known}; `tierkv daemon status` lists them")
        keys = b""
        for _, lease in found[0].pool.index.trace(found[0].last):
            with lease:
                keys = b"".join(lease.keys(0, lease.num_blocks))
        return found[0].pool, keys

    async def pin(self, pool: Pool, keys: bytes, ttl_s: float) -> dict[str, Any]:
        """Keep the leading blocks of `keys` that are held in the slab for a time, bringing them there."""
        if not 0 < ttl_s < float("inf"):
            raise PinError(f"pin for {ttl_s} s: give a number of seconds above 0")
        limit = int(self.config.transfer.pin_share * pool.slab.num_places)
        before = next(
            (name for name, pin in self.pins.items() if pin.pool is pool and pin.key == keys[-KEY_BYTES:]), None
        )
        others = (pin for name, pin in self.pins.items() if pin.pool is pool and name != before)
        held = sum(pin.lent.num_blocks for pin in others)
        if held + len(keys) // KEY_BYTES > limit:
            raise PinError(
                f"pin of {len(keys) // KEY_BYTES} blocks: pins may keep {limit} blocks of this pool and keep {held} already; "
                "unpin some, pin fewer tokens, or raise host.capacity"
            )
        lent = pool.lend(keys)
        try:
            await pool.lift(lent, self.config.transfer.load_deadline_s)
        except BaseException:
            pool.give_back(lent)
            raise
        if not lent.num_blocks:
            pool.give_back(lent)
            raise PinError("pin of nothing: none of these blocks is held here; warm them first")
        if before is not None:  # the same again: it lasts from now on
            self.unpin(before)
        name, self._next_pin = f"pin-{self._next_pin}", self._next_pin + 1
        last = int(np.flatnonzero(lent.table["state"] == State.HERE)[-1])
        key = Key(keys[last * KEY_BYTES : (last + 1) * KEY_BYTES])
        self.pins[name] = Pinned(pool, lent, key, self.clock() + ttl_s)
        return {"pin": name, "blocks": lent.num_blocks}

    def unpin(self, prefix: str) -> int:
        """End the pin of this name; with an empty name, all of them. How many ended."""
        names = [name for name in self.pins if not prefix or name == prefix]
        for name in names:
            pin = self.pins.pop(name)
            pin.pool.give_back(pin.lent)
        return len(names)

    # -- for whoever runs it --------------------------------------------------------------------------------------------

    async def forget(self, wanted: dict[str, Any]) -> dict[str, Any]:
        """Forget in every tier what is of a model or a tenant, or was not used for some time. Pinned and leased blocks stay."""
        model, tenant, older_s = wanted["model"], wanted["tenant"], wanted["older_s"]
        if model is None and tenant is None and older_s is None:
            raise RefusedError("forget what? give a model, a tenant, or an age")
        await self._open_kept()
        known = {namespace for pool in self.pools.values() for namespace in pool.namespaces.values()}
        nobodys = any(pool.roots_of(lambda namespace: namespace is None) for pool in self.pools.values())
        for name, value in (("model", model), ("tenant", tenant)):
            if (
                value is not None
                and not nobodys
                and value not in (names := sorted({str(getattr(one, name)) for one in known}))
            ):
                told = ", ".join(repr(one) for one in names[:8]) or "none"
                raise RefusedError(f"nothing is known of {name} {value!r}: the {name}s here are {told}")
        jobs = [
            self._job(partial(upkeep.forget, pool, model=model, tenant=tenant, until=self._until(pool, older_s)))
            for pool in self.pools.values()
        ]
        counts: dict[str, int] = {}
        for job in jobs:
            for tier, blocks in (await job).items():
                counts[tier] = counts.get(tier, 0) + blocks
        return {"forgotten": counts}

    def _until(self, pool: Pool, older_s: float | None) -> float:
        """The logical time of a pool so many seconds ago; -1 if that is before anything that is known."""
        if older_s is None:
            return float("inf")
        before = [clock for at, clock in self.clocks[pool.number] if at <= self.clock() - older_s]
        return pool.index.clock if older_s == 0 else before[-1] if before else -1.0

    async def flush(self, deadline_s: float) -> dict[str, Any]:
        """Write down what only memory holds, as far as the time goes."""
        end = self.clock() + deadline_s
        jobs = [self._job(partial(upkeep.write_all, pool, self.clock, end)) for pool in self.pools.values()]
        done, late = await asyncio.wait(jobs, timeout=deadline_s) if jobs else (set(), set())  # behind a verify, say
        written = sum(job.result() for job in done)
        left = max(0.0, end - self.clock())
        whole = not late and await asyncio.get_running_loop().run_in_executor(None, self.mover.drain, left)
        return {"written": written, "complete": whole and self.clock() < end}

    async def verify(self, told: Callable[[dict[str, Any]], None], gone: Callable[[], bool]) -> dict[str, Any]:
        """Compare every block with its checksum, and forget the bad ones, for as long as whoever asked is not `gone`."""
        await self._open_kept()
        counts: dict[str, dict[str, int]] = {}
        loop = asyncio.get_running_loop()
        for pool in list(self.pools.values()):

            def progress(done: dict[str, Any]) -> None:
                loop.call_soon_threadsafe(told, done)

            check = partial(upkeep.verify, pool, progress, lambda: self.ending or gone())
            for tier, found in (await self._job(check)).items():
                of = counts.setdefault(tier, {"checked": 0, "bad": 0})
                for name, number in found.items():
                    of[name] += number
        return {"tiers": counts}

    def _job(self, work: Callable[[], Any]) -> "asyncio.Future[Any]":
        job = self.mover.submit(AHEAD_LANE, work, blocks=1)
        if job is None:
            raise RefusedError("too much is waiting already: try again soon")
        return asyncio.wrap_future(job)

    def tick(self) -> None:
        """What is due: leases that are too old, pins that end, events to tell, times to note."""
        now = self.clock()
        for session in self._sessions():
            session.expire(now - self.config.server.lease_s)
        for name in [name for name, pin in self.pins.items() if pin.expires_s <= now]:
            self.unpin(name)
        for number, pool in self.pools.items():
            if now - self.clocks[number][-1][0] >= CLOCKS_EVERY_S:
                self.clocks[number].append((now, pool.index.clock))
        self.tell()

    def tell(self) -> None:
        """Hand the events of the pools to whoever subscribed."""
        heard = bool(self.subscribers) or self.publisher is not None
        for number, events in self.logs.items():
            if not heard:
                events.clear()  # whoever comes later is told to forget what he knows
                continue
            told = events.take()
            if self.publisher and told:
                block_tokens = self.pools[number].layout.block_tokens
                self.publisher.publish(told, block_tokens=block_tokens, now=time.time())
            for batch in batches(told) if self.subscribers else ():
                fields = {"pool": number, "events": encode(batch)}
                for session, id in list(self.subscribers.items()):
                    session.stream.send(Op.EVENT, id, fields)

    def stats(self) -> dict[str, Any]:
        """The document that the dashboard, `tierkv top` and `tierkv daemon status` show."""
        return upkeep.stats(self)

    def own_folder(self) -> None:
        """Take the disk folder, each pool has one in it: who starts this is to hear that it is taken, not the first engine.

        Raises TierBusy, TierError.
        """
        path = self.config.disk.path
        if path is None:
            return
        try:
            path.mkdir(parents=True, exist_ok=True)
            self._folder = FolderLock(path)
        except OSError as error:
            raise TierError(
                f"disk folder {path}: {error.strerror}; give a folder that can be written to (disk.path)"
            ) from None

    def close(self) -> None:
        """End what runs, and let go of the pools; connections must be closed."""
        self.unpin("")
        for id, number in list(self._quarantine):
            self._clear(id, number)
        for client in list(self.clients.values()):
            self._let_go(client)
        self.mover.close()
        for pool in self.pools.values():
            pool.close()
        if self._folder:
            self._folder.release()
            self._folder = None
        if self.publisher:
            self.publisher.close()
