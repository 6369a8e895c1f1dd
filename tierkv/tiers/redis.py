"""The Redis tier: blocks as self-contained objects on a Redis or Valkey server or cluster that many processes share.

    <prefix>:<32 bytes of key>  ->  header and payload (tierkv.codecs)

One string per block, fetched whole: a server sends that without copying it. The key already stands for model, layout, tenant
and all tokens before, so equal names mean equal KV, whoever wrote it. Names are binary: a probe of thousands of keys is half
as long as in hex.

Whatever a server does wrong is a miss with a reason, within the deadline. A node that fails several batches in a row is left
alone for a while (`redis_nodes.Health`): its keys are misses at once.
"""

import json
import logging
import threading
import time
from collections import Counter as Tally
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, wait
from dataclasses import asdict
from functools import partial
from typing import ClassVar, Final

from tierkv.errors import LayoutError, TierError
from tierkv.keys import Key, Namespace
from tierkv.layout import Layout
from tierkv.metrics import Counter, Metrics
from tierkv.tiers.base import Miss, Run, Tier
from tierkv.tiers.redis_bulk import Refusal, Wire, command
from tierkv.tiers.redis_client import parse_url, until
from tierkv.tiers.redis_nodes import FAILURES, Cluster, Health, Loan, Node, Server, introduce
from tierkv.tiers.redis_objects import Objects, Outcome, State, layout_name, namespace_name

_EXACT: Final = 512
"""Up to this many keys, `contains` asks for each by itself."""
_PATIENCE_S: Final = 0.05
"""A caller with less time than this learns nothing about a server's health by being late."""

log = logging.getLogger("tierkv")


Work = Callable[[Wire, Sequence[int], list[Outcome]], None]
"""Settles the outcomes at some positions of a batch over the wire to the node that holds them."""
Moved = Callable[[int], Outcome]
"""Does the same for one position that was redirected."""
Share = tuple[Node, Sequence[int]]
"""A node and the positions of a batch that it holds."""


class RedisTier(Tier):
    """Blocks on the server or cluster of `url`.

    ttl_s: seconds until the server forgets a block; with `touch`, since it was last read.  deadline_s: for a batch that
    brings none.  executor: runs the nodes of a cluster side by side.  down_after, down_s: failures in a row that take a node
    out of use, and for how long at first.
    Raises ConfigError or TierError for a URL, password, certificate or kind of server that cannot work; a server that is
    merely not there yet is down.
    """

    name: ClassVar[str] = "redis"
    shared: ClassVar[bool] = True

    def __init__(
        self,
        url: str,
        *,
        layout: Layout,
        metrics: Metrics,
        codec: str = "raw",
        ttl_s: float | None = None,
        touch: bool = False,
        prefix: str = "tierkv",
        deadline_s: float = 2.0,
        executor: Executor | None = None,
        down_after: int = 3,
        down_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        address = parse_url(url)
        self._layout, self._metrics, self._executor = layout, metrics, executor
        self._prefix, self._described, self._ttl_s = prefix, False, ttl_s
        self._namespaces: dict[Key, Namespace] = {}
        self._deadline_s, self._connect_s = deadline_s, address.connect_s
        self._idle, self._busy, self._closed = threading.Condition(), 0, False

        def new_health(of: str) -> Health:
            def on_down() -> None:
                metrics.tier_down.add(1, self.name)

            return Health(of, failures=down_after, first_s=down_s, clock=clock, on_down=on_down)

        self._servers: Server | Cluster = (Cluster if address.cluster else Server)(address, new_health=new_health)
        self._objects = Objects(
            layout=layout,
            metrics=metrics,
            tier=self.name,
            codec=codec,
            prefix=prefix,
            ttl_s=ttl_s,
            touch=touch,
            clustered=address.cluster,
            on_suspect=self._servers.suspect,
        )
        introduce(address, self._servers.health)

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        """Exact for up to 512 keys and on a cluster; else exact up to the first absent key, and mostly False after it.

        That is what a search for the longest known prefix needs, in two trips however many keys.
        """
        names = self._objects.names(keys)
        long_run = len(names) > _EXACT and isinstance(self._servers, Server)
        outcomes = self._batch(
            names,
            time.monotonic() + self._deadline_s,
            partial(self._objects.probe_run if long_run else self._objects.probe, names=names),
            lambda at: State.DONE if self._servers.send("EXISTS", names[at]) else Miss.ABSENT,
        )
        self._count(outcomes, self._metrics.misses, silent=Miss.ABSENT)
        return [outcome is State.DONE for outcome in outcomes]

    def renew(self, keys: Sequence[Key]) -> None:
        """Let `ttl_s` begin anew for what is there; a round trip each."""
        if self._ttl_s is None:
            return
        try:
            for name in self._objects.names(keys):
                self._servers.send("PEXPIRE", name, str(int(self._ttl_s * 1000)))
        except FAILURES as error:
            raise TierError(f"redis: {error}") from error

    def read(self, keys: Sequence[Key], outs: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """Receive into `outs` directly, unless a codec has to unpack. Raises LayoutError for one of another size."""
        if not keys:
            return []
        start = time.monotonic()
        deadline = start + (self._deadline_s if deadline_s is None else deadline_s)
        objects, send = self._objects, self._servers.send
        names, areas = objects.names(keys), self._checked(outs)
        outcomes = self._batch(
            names,
            deadline,
            partial(objects.fetch, keys=keys, names=names, outs=areas),
            lambda at: objects.fetch_moved(send, key=keys[at], name=names[at], out=areas[at]),
        )
        bad = [name for name, outcome in zip(names, outcomes, strict=True) if outcome is Miss.CORRUPT]
        if bad:
            self._metrics.corrupt_blocks.add(len(bad), self.name)
            log.warning("redis: removing %d blocks that were found corrupt", len(bad))
            self._forget(bad, deadline)
        self._count(outcomes, self._metrics.misses)
        self._metrics.load_seconds.observe(time.monotonic() - start, self.name)
        return [outcome is State.DONE for outcome in outcomes]

    def write(self, run: Run, blocks: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """Send what the server does not have; blocks that are there keep their age. Raises LayoutError as `read` does."""
        if not run.keys:
            return []
        start = time.monotonic()
        deadline = start + (self._deadline_s if deadline_s is None else deadline_s)
        objects, send = self._objects, self._servers.send
        names, areas = objects.names(run.keys), self._checked(blocks)
        outcomes = self._batch(
            names,
            deadline,
            partial(objects.store, run=run, names=names, blocks=areas),
            lambda at: objects.store_moved(send, run=run, at=at, name=names[at], block=areas[at]),
        )
        if not self._described and State.DONE in outcomes:
            self._describe(deadline)
        self._count(outcomes, self._metrics.saves_dropped)
        self._metrics.save_seconds.observe(time.monotonic() - start, self.name)
        return [outcome is State.DONE for outcome in outcomes]

    def introduce(self, root: Key, namespace: Namespace) -> None:
        """Leave on the server what a root stands for, with the first blocks: `tierkv explain` tells by it whose they are."""
        self._namespaces[root] = namespace
        self._described = False

    def _describe(self, deadline: float) -> None:
        """Leave the layout on the server, once: headers name its fingerprint only, people want to read tokens."""
        try:
            with until(deadline):
                self._servers.send(
                    "SET", layout_name(self._prefix, self._layout.fingerprint), json.dumps(asdict(self._layout))
                )
                for root, namespace in self._namespaces.items():
                    self._servers.send("SET", namespace_name(self._prefix, root), json.dumps(namespace.fields()))
            self._described = True
        except FAILURES as error:
            log.debug("redis: the layout was not written: %s", error)

    def delete(self, keys: Sequence[Key]) -> None:
        """Forget keys, for everyone."""
        self._forget(self._objects.names(keys), time.monotonic() + self._deadline_s)

    def _forget(self, names: Sequence[bytes], deadline: float) -> None:
        def moved(at: int) -> Outcome:
            self._servers.send("DEL", names[at])
            return State.DONE

        self._batch(names, deadline, partial(self._objects.forget, names=names), moved)

    def scan(self) -> Iterator[Run]:
        """Nothing: what others write is asked for. `redis_inspect` tells what is there."""
        return iter(())

    def close(self) -> None:
        """Wait for batches under way, which their deadlines bound, and close all connections."""
        with self._idle:
            self._closed = True
            self._idle.wait_for(lambda: not self._busy, timeout=self._deadline_s)
        self._servers.close()

    def _checked(self, areas: Sequence[memoryview]) -> list[memoryview]:
        for area in areas:
            if area.nbytes != self._layout.block_bytes:
                raise LayoutError(f"buffer of {area.nbytes} bytes: a block has {self._layout.block_bytes}")
        return [area.cast("B") for area in areas]

    def _count(self, outcomes: Sequence[Outcome], counter: Counter, *, silent: Miss | None = None) -> None:
        if outcomes.count(State.DONE) == len(outcomes):
            return
        for outcome, number in Tally(outcomes).items():
            if isinstance(outcome, Miss) and outcome is not silent:
                counter.add(number, self.name, outcome)

    def _batch(self, names: Sequence[bytes], deadline: float, work: Work, moved: Moved) -> list[Outcome]:
        """Run `work` on every node's share of `names`; outcomes in order, none open."""
        with self._idle:
            if self._closed:
                return [Miss.DOWN] * len(names)
            self._busy += 1
        try:
            with until(deadline):
                return self._settled(names, deadline, work, moved)
        finally:
            with self._idle:
                self._busy -= 1
                self._idle.notify_all()

    def _settled(self, names: Sequence[bytes], deadline: float, work: Work, moved: Moved) -> list[Outcome]:
        try:
            shares = self._servers.group(names) if names else []
        except FAILURES:
            reason = Miss.DOWN if self._servers.health.down else _late_or_failed(deadline)
            return [reason] * len(names)
        outcomes: list[Outcome] = [State.OPEN] * len(names)
        self._run(shares, outcomes, deadline, work)
        if State.MOVED in outcomes:
            self._follow([at for at, end in enumerate(outcomes) if end is State.MOVED], outcomes, deadline, moved)
        if State.OPEN in outcomes:  # keys of slots that no node serves
            return [Miss.FAILED if end is State.OPEN else end for end in outcomes]
        return outcomes

    def _run(self, shares: Sequence[Share], outcomes: list[Outcome], deadline: float, work: Work) -> None:
        def run(share: Share) -> None:
            node, places = share
            with until(deadline):  # a thread of the executor has no bound of its own
                reason = self._converse(node, deadline, lambda wire: work(wire, places, outcomes))
            if reason:
                for at in places:
                    if outcomes[at] is State.OPEN:
                        outcomes[at] = reason

        if self._executor is None or len(shares) < 2:
            for share in shares:
                run(share)
            return
        futures = [self._executor.submit(run, share) for share in shares[1:]]
        try:
            run(shares[0])
            for share, future in zip(shares[1:], futures, strict=True):
                if future.cancel():  # no thread was free: waiting for one could be waiting for ourselves
                    run(share)
                else:
                    future.result()
        finally:
            # Nobody may touch the caller's buffers after the return. A cancelled future is never "done" for `wait`.
            wait([future for future in futures if not future.cancel()])

    def _converse(self, node: Node, deadline: float, talk: Callable[[Wire], None]) -> Miss | None:
        """Run `talk` over a connection to `node`; why it did not come to its end, if so."""
        start, health = time.monotonic(), node.health
        if start >= deadline:
            return Miss.LATE
        if not health.admit():
            return Miss.DOWN
        wire: Wire | None = None
        try:
            if health.down:
                self._ping(node, min(deadline, start + self._connect_s))
            with Loan(node, deadline) as wire:
                talk(wire)
        except FAILURES as error:
            late = time.monotonic() >= deadline
            # A server that is late but talks is slow, not gone; a caller without patience learns nothing.
            if not late or (deadline - start >= _PATIENCE_S and not (wire and wire.received)):
                health.failed(error)
            self._servers.suspect()
            return Miss.LATE if late else Miss.FAILED
        health.passed()
        return None

    def _ping(self, node: Node, deadline: float) -> None:
        with Loan(node, deadline) as wire:
            wire.send([command(b"PING")])
            if isinstance(answer := wire.reply(), Refusal):
                raise ConnectionError(answer)

    def _follow(self, places: Sequence[int], outcomes: list[Outcome], deadline: float, moved: Moved) -> None:
        """Send what was redirected through the library, which repairs its map; once, and only while that works."""
        self._servers.suspect()
        for number, at in enumerate(places):
            try:
                outcomes[at] = moved(at)
            except FAILURES as error:
                log.debug("redis: a redirected command failed: %s", error)
                for rest in places[number:]:  # it sleeps a quarter of a second on some errors: not once per key
                    outcomes[rest] = _late_or_failed(deadline)
                return


def _late_or_failed(deadline: float) -> Miss:
    return Miss.LATE if time.monotonic() >= deadline else Miss.FAILED
