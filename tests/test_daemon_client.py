"""Clients that fail a daemon: leases that are too large or too old, writers that die or are cut off, crowds."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.daemon_parts import (
    HELLO,
    NAMESPACE,
    PATIENCE_S,
    ROOT,
    Raw,
    connected,
    process,
    raw,
    running,
)
from tierkv.daemon.blocks import Blocks
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.events import Event, Kind, batches
from tierkv.daemon.protocol import LOANS, Message, Op, State, encode
from tierkv.keys import Key, Namespace
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.testing import SMALL, FakeClock, block_of, blocks_of, make_run, read_blocks
from tierkv.tiers.base import Run
from tierkv.tiers.daemon import DaemonTier

ME = bytes(range(32))


def reserve(client: Raw, run: Run, pool: int) -> Message:
    fields = {"pool": pool, "root": run.root, "parent": run.parent, "depth": run.depth}
    return client.ask(Op.RESERVE, fields, run.tokens)


def lend(client: Raw, run: Run, pool: int) -> Message:
    return client.ask(Op.LEND, {"pool": pool, "deadline_s": 1.0}, b"".join(run.keys))


def states_of(message: Message) -> list[State]:
    return [State(row) for row in np.frombuffer(message.payload or b"", LOANS)["state"].tolist()]


def num_fds() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


# -- what may be on lease ---------------------------------------------------------------------------------------------------


def test_a_client_has_at_most_its_share_on_lease_over_all_its_connections(tmp_path: Path) -> None:
    run = make_run(128, seed=1)
    with running(tmp_path, capacity=str(128 * SMALL.block_bytes)) as daemon, daemon.blocks() as blocks:
        assert set(blocks.write(run, blocks_of(run))) == {State.HERE}

        def part(lo: int, hi: int) -> Run:
            return Run(run.root, run.parent, lo, run.keys[lo:hi])

        with (
            raw(daemon.urls[0]) as one,
            raw(daemon.urls[0], connection=2) as two,
            raw(daemon.urls[0], client=bytes(32)) as other,
        ):
            pools = [client.attach() for client in (one, two, other)]
            assert lend(one, part(0, 65), pools[0]).op is Op.REFUSED
            first = lend(one, part(0, 40), pools[0])
            assert states_of(first) == [State.HERE] * 40
            assert lend(two, part(40, 65), pools[1]).op is Op.REFUSED
            assert states_of(lend(two, part(40, 64), pools[1])) == [State.HERE] * 24
            refused = lend(one, part(0, 1), pools[0])
            assert refused.op is Op.REFUSED and "lease_share" in refused.fields["reason"]
            assert states_of(lend(other, part(0, 64), pools[2])) == [State.HERE] * 64
            one.send(Op.RELEASE, {"lease": first.fields["lease"]})
            assert states_of(lend(two, part(0, 40), pools[1])) == [State.HERE] * 40
        daemon.until(daemon.at_rest, "what was lent comes back with the connections")


def test_what_holds_nothing_is_not_held(tmp_path: Path) -> None:
    absent = make_run(50, seed=1)
    with running(tmp_path) as daemon, raw(daemon.urls[0]) as client:
        pool = client.attach()
        for run in (absent, Run(ROOT, ROOT, 0, ())):
            assert lend(client, run, pool).fields["lease"] == 0
            assert client.ask(Op.READ, {"pool": pool, "deadline_s": 1}, b"".join(run.keys)).op is Op.REPLY
        assert daemon.do(daemon.at_rest)


def test_a_lease_that_is_too_old_is_taken_back(tmp_path: Path) -> None:
    clock = FakeClock(1000.0)
    run, next_run = make_run(4, seed=1), make_run(8, seed=2)
    options: dict[str, Any] = {"capacity": str(8 * SMALL.block_bytes)}
    with running(tmp_path, clock=clock, **options) as daemon, daemon.blocks() as blocks, daemon.blocks() as other:
        blocks.write(run, blocks_of(run))
        with blocks.borrow(run.keys, deadline_s=5.0) as loan:
            assert loan and loan.intact()
            assert other.write(next_run, blocks_of(next_run)).count(State.FULL) == 4
            clock.advance(59.0)
            daemon.do(daemon.service.tick)
            assert not daemon.do(daemon.at_rest)
            clock.advance(2.0)
            daemon.do(daemon.service.tick)
            assert daemon.do(daemon.at_rest) and loan.intact()
            assert set(other.write(next_run, blocks_of(next_run))) == {State.PRESENT, State.HERE}
            assert not loan.intact()
        assert blocks.client.ping() > 0  # giving back what was taken back harms nobody
        outs = [memoryview(bytearray(SMALL.block_bytes)) for _ in next_run.keys]
        assert set(blocks.read(next_run.keys, outs, deadline_s=5.0)) == {State.HERE}


@pytest.mark.parametrize("half", [False, True], ids=["nothing sent", "half sent"])
def test_a_place_that_is_not_filled_in_time_costs_its_writer_the_connection(tmp_path: Path, half: bool) -> None:
    clock = FakeClock(1000.0)
    run = make_run(4, seed=1)
    with running(tmp_path, clock=clock) as daemon, raw(daemon.urls[1]) as client:
        lease = reserve(client, run, client.attach()).fields["lease"]
        if half:
            frame = encode(Op.FILL, 9, {"lease": lease, "checksums": bytes(32)}, payload_bytes=4 * SMALL.block_bytes)
            client.sock.sendall(frame + bytes(2 * SMALL.block_bytes + 5))
        clock.advance(61.0)
        daemon.do(daemon.service.tick)
        if half:  # it may have begun to come after the clock was set
            clock.advance(61.0)
            daemon.do(daemon.service.tick)
        assert client.receive() is None
        daemon.until(daemon.at_rest, "the places are free")
        assert daemon.pool.presence(b"".join(run.keys)) == bytes(4)


def test_a_lease_is_ended_by_nobody_but_its_connection(tmp_path: Path) -> None:
    run, more = make_run(2, seed=1), make_run(2, seed=2)
    with running(tmp_path) as daemon, daemon.blocks() as blocks:
        blocks.write(run, blocks_of(run))
        with raw(daemon.urls[0]) as one, raw(daemon.urls[0], connection=2) as two:
            pool, _ = one.attach(), two.attach()
            lease = lend(one, run, pool).fields["lease"]
            written = reserve(one, more, pool).fields["lease"]
            for op in (Op.COMMIT, Op.FILL):
                answer = two.ask(op, {"lease": written, "checksums": bytes(16)})
                assert answer.op is Op.REFUSED and "reserve again" in answer.fields["reason"]
            two.send(Op.RELEASE, {"lease": lease})
            two.ask(Op.ABORT, {"lease": written})
            one.send(Op.RELEASE, {"lease": written})  # a reservation is no loan
            assert one.ask(Op.ABORT, {"lease": lease}).op is Op.REPLY  # nor the other way round
            assert daemon.do(lambda: len(daemon.service.clients[ME].sessions)) == 2
            assert daemon.do(lambda: sum(len(session.held) for session in daemon.service._sessions())) == 2
            assert one.ask(Op.COMMIT, {"lease": written, "checksums": bytes(16)}).op is Op.REPLY
        daemon.until(daemon.at_rest, "all is given back")


def test_what_is_committed_with_a_wrong_checksum_is_no_block(tmp_path: Path) -> None:
    run = make_run(3, seed=1)
    with running(tmp_path) as daemon:
        for url in daemon.urls:
            with raw(url) as client:
                pool = client.attach()
                lease = reserve(client, run, pool).fields["lease"]
                blocks = b"".join(block_of(key) for key in run.keys)
                assert client.ask(Op.FILL, {"lease": lease, "checksums": bytes(24)}, blocks).op is Op.REPLY
            tier = DaemonTier(daemon.client(url), namespace=NAMESPACE, root=ROOT, metrics=Metrics())
            assert read_blocks(tier, run.keys) == [None] * 3
            assert all(tier.write(run, blocks_of(run)))
            assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]
            tier.delete(run.keys)
            tier.close()


# -- clients that die -------------------------------------------------------------------------------------------------------

DOOMED = """
import os, signal, sys
from tests.daemon_parts import *
from tests.test_daemon_client import lend, reserve
from tierkv.testing import SMALL, make_run
url, step = sys.argv[1:]
client = Raw(connected(url))
client.hello(client=b"d" * 32)
pool = client.attach(memory=1)
held, run = make_run(6, seed=1), make_run(4, seed=2)
if "reserve" in step:
    assert reserve(client, run, pool).fields["lease"]
if "fill" in step:
    lease = reserve(client, run, pool).fields["lease"]
    frame = encode(Op.FILL, 9, {"lease": lease, "checksums": bytes(32)}, payload_bytes=4 * SMALL.block_bytes)
    client.sock.sendall(frame + bytes(2 * SMALL.block_bytes))
if "lend" in step:
    assert lend(client, held, pool).fields["lease"]
if "read" in step:
    for _ in range(1000):  # more than sockets hold
        client.send(Op.READ, {"pool": pool, "deadline_s": 5}, b"".join(held.keys))
if "lose" in step:
    client.close()
child = os.fork() if "fork" in step else 0
if child or "fork" not in step:
    print(child, flush=True)
signal.pause()
"""


@contextmanager
def doomed(url: str, step: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has come as far as `step`; where it has forked, its child keeps all that was open."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    words = [sys.executable, "-c", DOOMED, url, step]
    child = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment)
    assert child.stdout
    forked = 0
    try:
        forked = int(child.stdout.readline())
        yield child
    finally:
        child.kill()
        if forked:
            os.kill(forked, signal.SIGKILL)
        child.stdout.close()
        child.wait()


@pytest.mark.parametrize(
    ("number", "step"),
    [
        (0, "reserve"),
        (0, "reserve, lend"),
        (0, "reserve, lend, fork"),
        (0, "read"),
        (0, "fill"),
        (1, "fill"),
        (1, "read"),
        (1, "reserve"),
    ],
)
def test_a_client_that_is_killed_leaves_nothing_behind(tmp_path: Path, number: int, step: str) -> None:
    held = make_run(6, seed=1)
    with running(tmp_path) as daemon, daemon.blocks() as blocks:
        blocks.write(held, blocks_of(held))
        before = num_fds()
        with doomed(daemon.urls[number], step) as child:
            daemon.until(lambda: not daemon.at_rest(), "it has something on lease")
            child.kill()
            child.wait()
            daemon.until(daemon.at_rest, "all that it had comes back")
            daemon.until(lambda: len(daemon.service.clients) == 1, "it is forgotten")
        daemon.pool.index.check()
        assert num_fds() <= before
        outs = [memoryview(bytearray(SMALL.block_bytes)) for _ in held.keys]
        assert set(blocks.read(held.keys, outs, deadline_s=5.0)) == {State.HERE}
        torn = make_run(4, seed=2)
        assert blocks.presence(torn.keys) == bytes(4)
        assert set(blocks.write(torn, blocks_of(torn))) == {State.HERE}


def test_a_writer_that_lost_its_connection_keeps_its_places_until_it_ends(tmp_path: Path) -> None:
    with running(tmp_path, capacity=str(4 * SMALL.block_bytes)) as daemon, daemon.blocks() as blocks:
        blocks.attach()
        before = num_fds()
        with doomed(daemon.urls[0], "reserve, lose") as child:
            daemon.until(lambda: daemon.service.quarantined == 4, "its places are in quarantine")
            run = make_run(4, seed=3)
            assert set(blocks.write(run, blocks_of(run))) == {State.FULL}
            daemon.do(daemon.service.tick)
            assert daemon.service.quarantined == 4
            child.kill()
            child.wait()
            daemon.until(lambda: daemon.service.quarantined == 0, "they are free when it is dead")
            assert set(blocks.write(run, blocks_of(run))) == {State.HERE}
        assert num_fds() <= before


def test_a_writer_that_lost_its_connection_keeps_its_places_until_it_says_that_it_has_ended(tmp_path: Path) -> None:
    run = make_run(4, seed=1)
    with running(tmp_path, capacity=str(4 * SMALL.block_bytes)) as daemon, daemon.blocks() as blocks:
        blocks.attach()
        before = num_fds()
        for turn in range(20):
            with raw(daemon.urls[0], connection=10 * turn + 1) as client:
                assert states_of(reserve(client, run, client.attach(memory=1))) == [State.HERE] * 4
            daemon.until(lambda: daemon.service.quarantined == 4, "its places are in quarantine")
            with raw(daemon.urls[0], connection=10 * turn + 2, ended=[10 * turn]) as client:  # of another one
                assert daemon.service.quarantined == 4
            assert set(blocks.write(run, blocks_of(run))) <= {State.FULL, State.BUSY}
            with raw(daemon.urls[0], connection=10 * turn + 3, ended=[10 * turn + 1, 10 * turn + 2]):
                assert daemon.service.quarantined == 0
        daemon.until(lambda: len(daemon.service.clients) == 1, "it has gone")
        assert num_fds() <= before
        assert set(blocks.write(run, blocks_of(run))) == {State.HERE}


def test_what_a_client_says_has_ended_is_over_even_if_its_end_was_not_heard_yet(tmp_path: Path) -> None:
    run = make_run(4, seed=1)
    with running(tmp_path) as daemon, raw(daemon.urls[0]) as lost:
        pool = lost.attach(memory=1)
        assert states_of(reserve(lost, run, pool)) == [State.HERE] * 4
        with raw(daemon.urls[0], connection=2, ended=[1]) as client:
            assert daemon.do(daemon.at_rest)
            assert lost.receive() is None
            pool = client.attach()
            assert states_of(reserve(client, run, pool)) == [State.HERE] * 4


def test_quarantine_does_not_end_while_its_writer_lives(tmp_path: Path) -> None:
    clock = FakeClock(1000.0)
    with running(tmp_path, clock=clock) as daemon:
        with raw(daemon.urls[0]) as client:
            reserve(client, make_run(4, seed=1), client.attach(memory=1))
        daemon.until(lambda: daemon.service.quarantined == 4, "its places are in quarantine")
        clock.advance(1e6)
        daemon.do(daemon.service.tick)
        assert daemon.service.quarantined == 4
        with raw(daemon.urls[0], connection=2, ended=[1]):
            assert daemon.do(daemon.at_rest)


def test_a_process_that_cannot_be_watched_does_not_write_in_memory_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(pid: int) -> int:
        raise OSError(errno.EMFILE, "no descriptor is left")

    monkeypatch.setattr(os, "pidfd_open", full)
    run = make_run(4, seed=1)
    with running(tmp_path) as daemon:
        with daemon.blocks() as blocks:
            assert set(blocks.write(run, blocks_of(run))) == {State.HERE}
            outs = [bytearray(SMALL.block_bytes) for _ in run.keys]
            assert set(blocks.read(run.keys, [memoryview(out) for out in outs], deadline_s=10.0)) == {State.HERE}
            assert [bytes(out) for out in outs] == [block_of(key) for key in run.keys]
            assert blocks._attached and blocks._attached.region and not blocks._attached.writable
        with raw(daemon.urls[0]) as client:
            reserve(client, make_run(4, seed=2), client.attach(memory=1))
        daemon.until(daemon.at_rest, "its places are free at once")


def test_who_has_no_memory_mapped_cannot_write_late(tmp_path: Path) -> None:
    for number in (0, 1):
        with running(tmp_path) as daemon:
            with raw(daemon.urls[number]) as client:
                reserve(client, make_run(4, seed=1), client.attach())
            daemon.until(lambda: not daemon.service.clients, "it has gone")
            assert daemon.do(daemon.at_rest)


# -- clients that ask for too much ------------------------------------------------------------------------------------------


def test_requests_that_wait_are_few_on_one_connection(tmp_path: Path) -> None:
    keys = b"".join(make_run(1, seed=1).keys)
    with running(tmp_path) as daemon, raw(daemon.urls[0]) as client:
        pool = client.attach()
        for _ in range(100):
            client.send(Op.AWAIT, {"pool": pool, "known": 0, "deadline_s": 1e6}, keys)
        answer = client.receive()
        assert answer and answer.op is Op.REFUSED and "wait already" in answer.fields["reason"]
        assert daemon.do(lambda: len(daemon.service._waiting)) == 1
        client.close()
        daemon.until(lambda: not daemon.service._waiting, "they end with the connection")


def test_statistics_of_many_clients_and_namespaces_are_told(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, daemon.blocks() as blocks:
        blocks.attach()
        names = {b"%032d" % number: Namespace("m" * 200, SMALL, tenant=str(number)) for number in range(10_000)}
        daemon.do(lambda: daemon.pool.namespaces.update(names))
        assert len(blocks.client.stats()["namespaces"]) == 10_001


def test_a_daemon_without_descriptors_serves_those_who_are_there(tmp_path: Path) -> None:
    with process(tmp_path, before=["prlimit", "--nofile=60"]) as daemon:
        client = DaemonClient(daemon.urls[0], connect_s=PATIENCE_S)
        assert client.ping() > 0
        crowd = [Raw(connected(daemon.urls[0])) for _ in range(100)]
        for one in crowd:
            one.send(Op.HELLO, {**HELLO, "client": os.urandom(32)})
        assert all(client.ping() > 0 for _ in range(200))
        for one in crowd:
            one.close()
        late = DaemonClient(daemon.urls[0], connect_s=PATIENCE_S)
        assert late.ping() > 0
        client.close(), late.close()
        errors = daemon.end()
        assert 1 <= errors.count("connections cannot be taken") < 100


def test_who_subscribes_and_does_not_read_is_shown_the_door(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, raw(daemon.urls[0]) as client, daemon.blocks() as blocks:
        assert client.ask(Op.SUBSCRIBE, {}).op is Op.REPLY
        (session,) = daemon.service.subscribers
        blocks.attach()

        def tell() -> None:
            for _ in range(2000):
                session.stream.send(Op.EVENT, 1, {"pool": 1, "events": [{"kind": "stored", "tokens": bytes(100_000)}]})

        daemon.do(tell)
        assert session.stream.closed and not daemon.service.subscribers


def test_events_of_large_runs_reach_subscribers(tmp_path: Path) -> None:
    layout = Layout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float16", block_tokens=64)
    names = Namespace("test", layout)
    run = make_run(8000, seed=1, layout=layout)  # 2.3 MB of keys and tokens
    with running(tmp_path, capacity="64MiB") as daemon:
        client, reader = daemon.client(), daemon.client()
        heard: list[dict[str, Any]] = []
        subscribed = threading.Event()

        def listen() -> None:
            for _, events in reader.events():
                heard.extend(events)
                subscribed.set()
                if sum(len(event.get("keys", b"")) for event in heard) >= 32 * len(run.keys):
                    return

        blocks = Blocks(client, namespace=names, root=names.root())
        blocks.attach()
        listener = threading.Thread(target=listen)
        listener.start()
        daemon.until(lambda: bool(daemon.service.subscribers), "it has subscribed")
        blank = memoryview(bytes(layout.block_bytes))
        assert blocks.write(run, [blank] * len(run.keys)).count(State.HERE) == 8000
        listener.join(PATIENCE_S)
        assert not listener.is_alive()
        told = [event for event in heard if event["kind"] == "stored"]
        assert b"".join(event["keys"] for event in told) == b"".join(run.keys)
        assert b"".join(event["tokens"] for event in told) == run.tokens
        assert [event["depth"] for event in told] == [
            sum(len(before["keys"]) for before in told[:at]) // 32 for at in range(len(told))
        ]
        parents = [run.root, *(event["keys"][-32:] for event in told)]
        assert [event["parent"] for event in told] == parents[:-1]
        client.close(), reader.close()


def test_events_that_are_too_large_for_a_message_come_in_parts_that_say_the_same() -> None:
    keys, tokens = os.urandom(32 * 5000), os.urandom(64 * 5000)
    large = Event(Kind.STORED, 7, "host", Key(ROOT), 3, keys, tokens)
    gone = Event(Kind.REMOVED, 8, "host", keys=keys)
    small = [Event(Kind.REMOVED, 9 + at, "disk", keys=keys[:32]) for at in range(200)]
    told = list(batches([Event(Kind.CLEARED, 6), large, gone, *small]))
    assert all(len(batch) <= 64 and sum(len(one.keys) + len(one.tokens) for one in batch) <= 1 << 18 for batch in told)
    parts = [one for batch in told for one in batch]
    stored = [one for one in parts if one.sequence == 7]
    assert b"".join(one.keys for one in stored) == keys and b"".join(one.tokens for one in stored) == tokens
    assert [one.depth for one in stored] == [3 + keys.index(one.keys) // 32 for one in stored]
    assert [one.parent for one in stored[1:]] == [one.keys[-32:] for one in stored[:-1]] and stored[0].parent == ROOT
    removed = [one for one in parts if one.sequence == 8]
    assert b"".join(one.keys for one in removed) == keys and {one.parent for one in removed} == {None}
    assert [one for one in parts if one.sequence > 8] == small
