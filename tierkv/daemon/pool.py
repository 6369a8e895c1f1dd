"""The blocks of one layout: an index, the shared slab, and the tiers at rest below it.

    reserve ─▶ a client fills the places ─▶ commit          write; the index knows the block from the commit on
    lend ─▶ a client copies out of the places ─▶ give_back  read in place; what lies lower is lifted first
    seek                                                    look-up of a request: it counts as a use

All calls are made on the server's loop and do nothing slow; what moves bytes or asks a network is a coroutine that waits for a
job of the mover. The three steps are those of every tier: a client that dies between two of them leaves a miss.
"""

import asyncio
import logging
from collections.abc import Callable, Collection, Sequence
from contextlib import AbstractContextManager
from functools import partial
from math import inf
from queue import SimpleQueue
from typing import Any, Final, cast

import numpy as np

from tierkv.building import below_of, make_index, open_disk, open_packs, open_redis, piece_blocks
from tierkv.config import Config
from tierkv.cost import CostModel
from tierkv.daemon.loans import Lent, Sought, Uses, Writing
from tierkv.daemon.memory import digest
from tierkv.daemon.mounts import Mounts
from tierkv.daemon.protocol import LOANS, State
from tierkv.daemon.relay import Relay, split
from tierkv.daemon.slab import SharedSlab
from tierkv.edges import Edges
from tierkv.errors import ConfigError, RefusedError
from tierkv.explain import Reason, from_index
from tierkv.index import Lease
from tierkv.keys import KEY_BYTES, Key, Namespace, chain
from tierkv.layout import TOKEN_BYTES, Layout
from tierkv.metrics import Metrics
from tierkv.mover import LOAD_LANE, PROBE_LANE, Clock, Mover
from tierkv.names import Listener
from tierkv.policies.base import Use
from tierkv.tiers.base import Miss
from tierkv.tiers.pack import PackTier
from tierkv.transfers import HOST, Below, Places, read_below
from tierkv.values import hide_password

DISK: Final = 2
MIN_ORPHANS: Final = 1024
"""Unknown parents that are remembered before it is asked which of them the index still has."""
MAX_NAMESPACES: Final = 4096
"""Models, adapters and tenants that clients may name to one pool."""
COUNT_EVERY_S: Final = 10.0
"""Counting blocks by namespace visits every strand: not more often than this."""

log = logging.getLogger("tierkv")


class NoDevice:
    """A daemon has no device: nothing is queued on it."""

    def mark(self) -> object:
        """Everything is done."""
        return None


class Pool:
    """Blocks of `layout`. number: what clients call it.  listener: hears what each tier begins and ends to hold.

    Raises ConfigError or TierError when a tier cannot be opened.
    """

    def __init__(
        self,
        number: int,
        layout: Layout,
        *,
        config: Config,
        metrics: Metrics,
        mover: Mover,
        clock: Clock,
        listener: Listener,
    ) -> None:
        self.namespaces: dict[Key, Namespace] = {}
        self._introduced: set[Key] = set()
        self._config = config
        self._lifts: set[asyncio.Future[None]] = set()
        self._listener = Relay(listener, self.namespaces)
        self._counted_s, self._counts = -inf, dict[Key, int]()
        self.number, self.layout, self.metrics, self.clock = number, layout, metrics, clock
        self._mover, self._deadline_s = mover, config.transfer.load_deadline_s
        self._piece = piece_blocks(layout)
        self.mounts = Mounts(lambda given: open_packs(given, layout, metrics, mover, clock, fitting=True))
        parts = config.server.layouts
        num_places = config.host.capacity // parts // layout.block_bytes
        if not num_places:
            raise ConfigError(
                f"host.capacity = {config.host.capacity} bytes in {parts} parts: less than one block of this model "
                f"({layout.block_bytes} bytes); give room for many blocks"
            )
        self.slab = SharedSlab(
            f"pool-{number}", num_places=num_places, block_bytes=layout.block_bytes, on_bad=self._found_bad
        )
        self.below: list[Below] = []
        try:
            self._open_below(config, parts)
            sizes = {"device": 0, "host": num_places}
            disk = next((below.tier for below in self.below if below.number == DISK), None)
            if disk:
                sizes["disk"] = cast(Any, disk).num_slots  # Any: a DiskTier, known to `building` alone
            self._tier_names = tuple(sizes)
            cost = CostModel(block_tokens=layout.block_tokens, block_bytes=layout.block_bytes)
            self.index = make_index(config, layout, cost, sizes, named=True, listener=self._listener)
            places = Places(
                self.index, cast(Any, NoDevice()), self.slab, SimpleQueue(), metrics, cost, clock
            )  # Any: no pages
            self.places = places
            self.edges = Edges(
                places=places,
                below=self.below,
                mover=mover,
                host_copy_down="save",
                watermark=config.transfer.spill_watermark,
                share=1.0,
                piece=self._piece,
            )
            if disk:
                self._recover(disk)
        except BaseException:
            self.close()
            raise
        self._orphans: dict[Key, Key] = {}  # roots that stand for an unknown parent -> the namespace's root
        self._orphans_room = MIN_ORPHANS
        mover.background(f"touch-{number}", self.slab.touch())

    def _open_below(self, config: Config, parts: int) -> None:
        config.check_layout(self.layout)
        folder = config.disk.path / self.layout.fingerprint.hex() if config.disk.path else None
        disk = open_disk(config, self.layout, self.metrics, self._mover, folder=folder, parts=parts)
        if disk:
            self.below.append(below_of(config, self.metrics, self.clock, disk, place=str(disk.path), number=DISK))
        redis = open_redis(config, self.layout, self.metrics, self._mover, self.clock)
        if redis:
            place = hide_password(config.redis.url or "")
            self.below.append(below_of(config, self.metrics, self.clock, redis, place=place, number=None))
        self.mount(self.mounts.open_first(config))

    @property
    def packs(self) -> "PackTier | None":
        """The packs that answer it."""
        return self.mounts.tier

    def mount(self, packs: "PackTier | None") -> "PackTier | None":
        """Answer from these packs from now on; returns those before, to be closed off the loop."""
        old = self.mounts.exchange(packs)
        below = [one for one in self.below if one.tier is not old]
        if packs:
            below.append(below_of(self._config, self.metrics, self.clock, packs, place=packs.place, number=None))
        self.below[:] = below
        return old

    def _recover(self, disk: Any) -> None:  # Any: see above
        for root, fields in disk.namespaces().items():
            model, adapter, tenant = (str(fields.get(name, "")) for name in ("model", "adapter", "tenant"))
            self.namespaces[root] = Namespace(model, self.layout, adapter, tenant)
        orphans = self.index.restore(DISK, disk.scan())
        keys = [key for run in orphans for key in run.keys]
        if keys:
            disk.delete(keys)
            log.warning("disk: %d blocks have no path to them any more and were deleted", len(keys))

    def introduce(self, root: Key, namespace: Namespace) -> None:
        """A client's blocks hang on `root`: remember what that stands for."""
        if root not in self._introduced:
            if len(self._introduced) >= MAX_NAMESPACES:
                raise RefusedError(
                    f"{MAX_NAMESPACES} namespaces are here already: as many as a daemon tells apart; restart it"
                )
            self._introduced.add(root)
            self.namespaces[root] = namespace
            for below in self.below:
                if below.tier is not self.packs:
                    cast(Any, below.tier).introduce(root, namespace)  # Any: both kinds have it
            self.mounts.introduce(root, namespace)

    # -- finding ----------------------------------------------------------------------------------------------------

    def presence(self, keys: bytes) -> bytes:
        """One byte per key: 0, or 1 + the number of the fastest tier that holds it."""
        return self.index.presence(keys)

    def leading(self, keys: bytes) -> int:
        """Leading keys that some tier holds."""
        present = self.presence(keys)
        end = present.find(0)
        return len(present) if end < 0 else end

    def seek(self, root: Key, parent: Key, depth: int, keys: bytes, tokens: bytes, uses: Uses) -> Sought:
        """Look up a request in the tiers of this daemon's own; it counts as a use of its whole path."""
        count = self.leading(keys)
        with self._lease_at(root, parent, depth) as before:
            path = before.tokens(0, before.num_blocks) + tokens
            with self.index.acquire(before.root, path, now_s=self.clock()) as lease:
                if lease.use:
                    uses.note(keys[(count - 1) * KEY_BYTES : count * KEY_BYTES] if count else parent, lease.use)
                self.edges.copy_second_use(lease)
            return Sought(count, before.root, path, before.num_blocks)

    def count_lookup(self, sought: Sought, keys: bytes, shared: int, tier: str) -> None:
        """Count what a look-up found, by tier, and why it found no more. shared: blocks that only `tier`, a shared one, had."""
        present = self.presence(keys[: sought.found * KEY_BYTES])
        for number, name in ((HOST, "host"), (DISK, "disk")):
            if found := present.count(number + 1):
                self.metrics.daemon_lookup_blocks.add(found, name)
        if shared:
            self.metrics.daemon_lookup_blocks.add(shared, tier)
        self.metrics.daemon_lookups.add(1)
        first = sought.before + sought.found + shared
        if first < sought.before + len(keys) // KEY_BYTES:
            for stretch in from_index(self.index.explain(sought.root, sought.path), self._tier_names):
                if (missed := stretch.hi - max(stretch.lo, first)) > 0:
                    self.metrics.missed_blocks.add(missed, stretch.reason or Reason.UNREACHABLE)

    @property
    def shared(self) -> list[Below]:
        """Tiers that are asked, not remembered."""
        return [below for below in self.below if below.number is None]

    async def seek_shared(self, root: Key, parent: Key, depth: int, keys: bytes, tokens: bytes) -> tuple[int, str]:
        """Ask the shared tiers for keys that no tier of this daemon's own holds; how many leading ones which of them has.

        What they have is known from then on, so that `lend` can bring it.
        """
        names = split(keys)
        probe = self._mover.submit(PROBE_LANE, partial(self._probe, parent, names, tokens), blocks=1)
        found, tier = await asyncio.wrap_future(probe) if probe else (0, "")
        if found:
            step = self.layout.block_tokens * TOKEN_BYTES
            with self._lease_at(root, parent, depth) as lease:
                self.index.extend(lease, tokens[: found * step], keys=names[:found])
        return found, tier

    def _probe(self, parent: Key, keys: list[Key], tokens: bytes) -> tuple[int, str]:
        if chain(parent, tokens, block_tokens=self.layout.block_tokens) != keys:
            return 0, ""  # tokens that are not these keys': they would put a lie into the tree
        best = 0, ""
        for below in self.shared:
            ask = partial(below.tier.contains, keys)
            present = below.attempt(ask, count=len(keys), failures=self.metrics.misses) or [False]
            best = max(best, (present.index(False) if False in present else len(present), below.name))
        return best

    # -- reading in place -------------------------------------------------------------------------------------------

    def lend(self, keys: bytes) -> Lent:
        """Lend what lies in the slab; `lacking` says what could be lifted there."""
        table = np.zeros(len(keys) // KEY_BYTES, LOANS)
        table["place"], table["state"] = -1, State.ABSENT
        lent = Lent([], table)
        for position, lease in self.index.trace(keys):
            lent.leases.append(lease)
            at = lease.lo
            for lo, hi in [*self._fill(lent, position, lease), (lease.num_blocks, lease.num_blocks)]:
                if at < lo and self._is_below(lease, at, lo):
                    lent.lacking.append((position, lease, at, lo))
                at = hi
        return lent

    def _is_below(self, lease: Lease, lo: int, hi: int) -> bool:
        """Whether a tier below may have some of these blocks."""
        return any(below.number is None or lease.held(below.number, lo, hi) for below in self.below)

    def _fill(self, lent: Lent, position: int, lease: Lease) -> list[tuple[int, int]]:
        """Write what the slab holds of a lease into the table; the ranges."""
        held = []
        for lo, hi in lease.held(HOST, lease.lo, lease.num_blocks):
            try:
                places = lease.places(HOST, lo, hi)
            except LookupError:  # it went between two looks
                continue
            rows = lent.table[position + lo - lease.lo : position + hi - lease.lo]
            rows["place"], rows["state"] = places, State.HERE
            rows["generation"] = self.slab.region.generations[places]
            rows["checksum"] = self.slab.checksums[places]
            held.append((lo, hi))
        return held

    async def lift(self, lent: Lent, deadline_s: float) -> None:
        """Bring to the slab what lies lower, and lend that, too. What is late is not lent; it comes all the same.

        What is on its way for somebody else is waited for: its places are taken, and it is not brought twice.
        """
        deadline = self.clock() + min(deadline_s, self._deadline_s)
        lacking, lent.lacking = lent.lacking, []
        others, own = list(self._lifts), []
        for _, lease, lo, hi in lacking:
            path = lease.fork()
            job = self._mover.submit(LOAD_LANE, partial(self._lift, path, lo, hi, deadline), blocks=hi - lo)
            if job is None:
                path.release()
                continue
            lift = asyncio.wrap_future(job)
            self._lifts.add(lift)
            lift.add_done_callback(self._lifts.discard)
            own.append(lift)
        late = False
        for lifts in (own, others):
            if lifts and any(lent.table["state"] != State.HERE):
                _, waiting = await asyncio.wait(lifts, timeout=max(0.0, deadline - self.clock()))
                late = late or bool(waiting)
                for position, lease, _, _ in lacking:
                    self._fill(lent, position, lease)
        for position, lease, _, _ in lacking:
            state = lent.table["state"][position : position + lease.num_blocks - lease.lo]
            if late:
                state[state == State.ABSENT] = State.LATE
            if missing := int(np.count_nonzero(state != State.HERE)):
                self.metrics.misses.add(missing, "host", Miss.LATE if late else Miss.ABSENT)

    def _lift(self, lease: Lease, lo: int, hi: int, deadline: float) -> None:
        """Copy those blocks [lo, hi) up that the slab lacks and a tier below has."""
        with lease:
            for below in self.below:
                ranges = [(lo, hi)] if below.number is None else lease.held(below.number, lo, hi)
                for first, last in ranges:
                    for at in range(first, last, self._piece):
                        self._lift_piece(below, lease, at, min(last, at + self._piece), deadline)

    def _lift_piece(self, below: Below, lease: Lease, lo: int, hi: int, deadline: float) -> None:
        copy = self.index.begin_copy(lease, HOST, lo, hi, worth=inf)  # somebody waits for them
        if copy is None:
            return
        came = [False] * len(copy.blocks)
        why: Miss | None = None
        start = self.clock()
        try:
            self.slab.renew(copy.places)
            views = self.places.views(copy.places)
            came, why = read_below(self.places, below, lease, copy.blocks, views, deadline=deadline)
            keys = lease.keys(copy.blocks[0], copy.blocks[-1] + 1)
            good = [(block, place) for block, place, ok in zip(copy.blocks, copy.places, came, strict=True) if ok]
            self.slab.seal([keys[block - copy.blocks[0]] for block, _ in good], [place for _, place in good])
        finally:
            self.index.commit_copy(copy, came, reason=why or Miss.FAILED)
        self.metrics.blocks_loaded.add(sum(came), below.name)
        if below.number is not None:
            self.places.cost.observe_fetch(below.number, sum(came), self.clock() - start)

    @staticmethod
    def give_back(lent: Lent) -> None:
        """Whoever read it has done so."""
        for lease in lent.leases:
            lease.release()
        lent.leases.clear()

    # -- writing ----------------------------------------------------------------------------------------------------

    def reserve(self, root: Key, parent: Key, depth: int, tokens: bytes, uses: Uses) -> Writing:
        """Give out places for those blocks of a run that are not here. Its keys are hashed here: nobody names what is not his."""
        keys = chain(parent, tokens, block_tokens=self.layout.block_tokens)
        lease = self._lease_at(root, parent, depth)
        try:
            lease.use = uses.pop(parent, None) or self._use(lease, tokens)
            first = lease.num_blocks
            self.index.extend(lease, tokens, keys=keys)
            if lease.use:
                uses.note(keys[-1] if keys else parent, lease.use)
            self.edges.copy_ahead(len(keys))
            worth = inf if self.edges.feeds else None
            copy = self.index.begin_copy(lease, HOST, first, lease.num_blocks, worth=worth)
        except BaseException:
            lease.release()
            raise
        table = np.zeros(len(keys), LOANS)
        table["place"], table["state"] = -1, State.BUSY
        for lo, hi in lease.held(HOST, first, lease.num_blocks):
            table["state"][lo - first : hi - first] = State.PRESENT
        for lo, hi in lease.missing(HOST):
            table["state"][max(lo - first, 0) : max(hi - first, 0)] = State.FULL
        if copy:
            rows = [block - first for block in copy.blocks]
            self.slab.renew(copy.places)
            table["state"][rows], table["place"][rows] = State.HERE, copy.places
            table["generation"][rows] = self.slab.region.generations[copy.places]
        return Writing(lease, copy, keys, first, table)

    def _use(self, lease: Lease, tokens: bytes) -> Use | None:
        """What a request counts as that writes and did not look first."""
        path = lease.tokens(0, lease.num_blocks) + tokens
        with self.index.acquire(lease.root, path, now_s=self.clock()) as found:
            return found.use

    def commit(self, writing: Writing, checksums: Sequence[int]) -> None:
        """The places are filled: the blocks are here from now on."""
        copy, lease = writing.copy, writing.lease
        with lease:
            if copy:
                self.slab.checksums[copy.places] = checksums
                self.index.commit_copy(copy, [True] * len(copy.blocks))
                self.edges.copy_arrived(lease, copy.blocks[0], copy.blocks[-1] + 1)

    def abandon(self, writing: Writing) -> None:
        """They will not be filled. To be called once nobody can write to the places any more."""
        with writing.lease:
            if writing.copy:
                self.index.abort(writing.copy)

    def _lease_at(self, root: Key, parent: Key, depth: int) -> Lease:
        """A lease that ends at `parent`. A parent that is not known is the root of a tree of its own."""
        if depth == 0:
            if parent != root:
                raise RefusedError(
                    "a run at depth 0 whose parent is not the root of its namespace: give the root as parent"
                )
            return self.index.keep(root, b"")
        traced = self.index.trace(parent)
        if traced:
            return traced[0].lease
        if len(self._orphans) >= self._orphans_room:
            self._bound_orphans(set(self.index.roots()))
        self._orphans[parent] = root
        return self.index.keep(parent, b"")

    def _bound_orphans(self, roots: Collection[Key]) -> None:
        """Forget what roots of the index stood for that are no more."""
        self._orphans = {orphan: of for orphan, of in self._orphans.items() if orphan in roots}
        self._orphans_room = 2 * len(self._orphans) + MIN_ORPHANS

    async def delete(self, keys: bytes) -> dict[str, Any]:
        """Forget blocks in every tier; what is being read stays where it is until that is over."""
        names = split(keys)
        for _, lease in self.index.trace_all(keys):
            with lease:
                for tier in (HOST, DISK)[: 1 + any(below.number == DISK for below in self.below)]:
                    blocks = [
                        block for lo, hi in lease.held(tier, lease.lo, lease.num_blocks) for block in range(lo, hi)
                    ]
                    self.index.drop(tier, lease, blocks, reason="forgotten")
        jobs = [self._mover.submit(below.name, partial(below.forget, names), blocks=1) for below in self.below]
        for job in jobs:
            if job:
                await asyncio.wrap_future(job)
        return {}

    # -- what is found bad ------------------------------------------------------------------------------------------

    def report(self, keys: bytes) -> int:
        """A reader found these blocks not to be what they should: look, and forget those that are bad. How many were."""
        bad = 0
        for _, lease in self.index.trace_all(keys):
            with lease:
                for lo, hi in lease.held(HOST, lease.lo, lease.num_blocks):
                    try:
                        places = lease.places(HOST, lo, hi)
                    except LookupError:
                        continue
                    names = lease.keys(lo, hi)
                    wrong = [
                        lo + at
                        for at, (key, place) in enumerate(zip(names, places, strict=True))
                        if digest(self.slab.view(place), key) != int(self.slab.checksums[place])
                    ]
                    if wrong:
                        self.index.drop(HOST, lease, wrong, reason=Miss.CORRUPT)
                        bad += len(wrong)
        if bad:
            self.metrics.corrupt_blocks.add(bad, "host")
            self.metrics.misses.add(bad, "host", Miss.CORRUPT)
            log.warning("host: %d blocks were overwritten by somebody who should not have, and are forgotten", bad)
        return bad

    def _found_bad(self, keys: Sequence[Key]) -> None:
        self.report(b"".join(keys))

    def namespace_of(self, root: Key) -> Namespace | None:
        """What a root of the index stands for, if a client said so."""
        return self.namespaces.get(self._orphans.get(root, root))

    def roots_of(self, wanted: Callable[[Namespace | None], bool]) -> list[Key]:
        """Roots of the index whose namespace is wanted."""
        return [root for root in self.index.roots() if wanted(self.namespace_of(root))]

    def capture(self) -> AbstractContextManager[set[Key]]:
        """Note the keys of blocks that tiers cease to hold meanwhile."""
        return self._listener.capture()

    def held_of(self, root: Key) -> int:
        """Blocks of a namespace that this pool holds, in whatever tier."""
        now = self.clock()
        if now >= self._counted_s + COUNT_EVERY_S:
            self._counted_s, self._counts = now, {}
            held = self.index.held_by_root()
            self._bound_orphans(held)
            for of, blocks in held.items():
                of = self._orphans.get(of, of)
                self._counts[of] = self._counts.get(of, 0) + blocks
        return self._counts.get(root, 0)

    def close(self) -> None:
        """Let go of tiers and memory; the mover must have ended."""
        for below in self.below:
            below.tier.close()
        self.slab.close()
