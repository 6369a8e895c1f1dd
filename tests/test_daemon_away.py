"""Daemons that fail a client: not there, killed, stopped, come back as another, or with answers that are none."""

import os
import resource
import signal
import socket
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.daemon_parts import (
    NAMESPACE,
    PATIENCE_S,
    ROOT,
    DaemonProcess,
    process,
    running,
)
from tierkv.daemon.blocks import GRACE_S, Blocks
from tierkv.daemon.client import MAX_ENDED, DaemonClient
from tierkv.daemon.protocol import LOANS, ONE_WAY, Incoming, Op, State, encode
from tierkv.errors import TierError
from tierkv.keys import Namespace
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.testing import SMALL, FakeClock, block_of, blocks_of, make_run, read_blocks
from tierkv.tiers.daemon import DaemonTier

SLACK_S = 2.0
"""Beyond a deadline and its grace, on a machine that may be busy."""


# -- daemons that go --------------------------------------------------------------------------------------------------------


def tier_of(
    url: str, *, clock: Callable[[], float] = time.monotonic, connect_s: float = PATIENCE_S, **options: Any
) -> DaemonTier:
    client = DaemonClient(url, connect_s=connect_s, clock=clock)
    return DaemonTier(client, namespace=NAMESPACE, root=ROOT, metrics=Metrics(), **options)


def test_a_daemon_that_is_not_there_yet_is_a_miss_until_it_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    clock = FakeClock()
    run = make_run(3, seed=1)
    tier = tier_of(f"unix://{tmp_path}/d.sock", clock=clock)
    assert "is `tierkv daemon` running there?" in caplog.text
    clock.advance(5.0)
    with pytest.raises(TierError, match="No such file"):
        read_blocks(tier, run.keys)
    with running(tmp_path):
        clock.advance(5.0)
        assert all(tier.write(run, blocks_of(run)))
        assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]
    tier.close()


def test_after_a_failure_calls_fail_at_once_for_a_while_that_doubles(tmp_path: Path) -> None:
    clock = FakeClock()
    url = f"unix://{tmp_path}/d.sock"
    client = DaemonClient(url, down_s=1.0, clock=clock, connect_s=PATIENCE_S)
    for pause in (1.0, 2.0, 4.0, 8.0, 16.0, 30.0, 30.0):
        with pytest.raises(TierError, match="No such file"):
            client.ping()
        clock.advance(pause - 0.01)
        with pytest.raises(TierError, match="left alone for a while"):
            client.ping()
        clock.advance(0.02)
    with running(tmp_path):
        assert client.ping() > 0
    with pytest.raises(TierError):
        client.ping()
    clock.advance(1.01)  # not half a minute: it was there in between
    with running(tmp_path):
        assert client.ping() > 0
    client.close()


@pytest.mark.parametrize("scheme", ["unix", "tcp"])
def test_a_daemon_that_is_killed_under_way_is_a_miss_and_its_successor_serves_on(tmp_path: Path, scheme: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    listen = [f"unix://{tmp_path}/d.sock" if scheme == "unix" else f"tcp://127.0.0.1:{port}"]
    clock = FakeClock()
    first = DaemonProcess(tmp_path, listen=listen)
    tier = tier_of(first.urls[0], clock=clock)
    runs = [make_run(40, seed=seed) for seed in range(8)]
    wrong: list[str] = []
    going, killed = threading.Event(), threading.Event()

    def work(writes: bool) -> None:
        turn = 0
        while not killed.is_set() or turn < 20:
            run = runs[turn % len(runs)]
            turn += 1
            try:
                if writes:
                    tier.write(run, blocks_of(run))
                for key, got in zip(run.keys, read_blocks(tier, run.keys), strict=True):
                    if got not in (None, block_of(key)):
                        wrong.append(key.hex())
            except TierError:
                clock.advance(1.0)
            except BaseException as error:  # noqa: BLE001  a thread's failure must reach the test
                wrong.append(repr(error))
                return
            if turn == 4:
                going.set()

    threads = [threading.Thread(target=work, args=(writes,)) for writes in (True, True, False)]
    for thread in threads:
        thread.start()
    going.wait(PATIENCE_S)
    first.kill()
    first.end()
    killed.set()
    for thread in threads:
        thread.join()
    assert not wrong
    with process(tmp_path, listen=listen):
        clock.advance(60.0)
        assert tier.contains(runs[0].keys) == [False] * 40
        assert all(tier.write(runs[0], blocks_of(runs[0])))
        assert read_blocks(tier, runs[0].keys) == [block_of(key) for key in runs[0].keys]
    tier.close()


@pytest.mark.parametrize("number", [0, 1], ids=["unix", "tcp"])
def test_a_daemon_that_stands_still_costs_a_deadline_and_a_grace(tmp_path: Path, number: int) -> None:
    clock = FakeClock()
    urls = (f"unix://{tmp_path}/d.sock", "tcp://127.0.0.1:0")
    held, run = make_run(6, seed=1), make_run(3000, seed=2)
    with process(tmp_path, listen=urls) as daemon:
        tier = tier_of(daemon.urls[number], clock=clock, connect_s=0.3)
        assert all(tier.write(held, blocks_of(held)))
        outs = [memoryview(bytearray(SMALL.block_bytes)) for _ in held.keys]
        some = blocks_of(run)
        calls: list[Callable[[], object]] = [
            lambda: tier.read(held.keys, outs, deadline_s=0.2),
            lambda: tier.write(run, some, deadline_s=0.2),
            lambda: tier.wait(run.keys, known=0, deadline_s=0.2),
        ]
        for call in calls:
            assert tier.contains(held.keys) == [True] * 6  # a connection waits to be used
            daemon.signal(signal.SIGSTOP)
            for first in (True, False):  # by that connection, and by a new one
                start = time.monotonic()
                with pytest.raises(TierError):
                    call()
                took = time.monotonic() - start
                assert took < (0.2 if first else 2 * 0.3) + GRACE_S + SLACK_S
            daemon.signal(signal.SIGCONT)
            clock.advance(60.0)
            until_there(tier, clock)
        assert read_blocks(tier, held.keys) == [block_of(key) for key in held.keys]
        tier.close()


def until_there(tier: DaemonTier, clock: FakeClock) -> None:
    """Until a daemon that goes on after a stop has answered once; 0.3 s may be too short for that on a busy machine."""
    end = time.monotonic() + PATIENCE_S
    while time.monotonic() < end:
        try:
            tier.contains([])
            return
        except TierError:
            clock.advance(60.0)
    raise AssertionError("it did not go on")


def test_pool_and_memory_of_a_daemon_are_not_used_with_its_successor(tmp_path: Path) -> None:
    other = Namespace("test", Layout(num_layers=3, num_kv_heads=2, head_dim=20, dtype="bfloat16"))
    run, theirs = make_run(3, seed=1), make_run(3, seed=1, layout=other.layout)
    client = DaemonClient(f"unix://{tmp_path}/d.sock", connect_s=PATIENCE_S)
    ours, second = (Blocks(client, namespace=of, root=of.root()) for of in (NAMESPACE, other))
    with running(tmp_path, layouts=2):
        ours.attach(), second.attach()
        assert ours._attached and second._attached
        old, old_region = ours._attached, ours._attached.region
        assert (old.pool, second._attached.pool) == (1, 2)
        assert set(ours.write(run, blocks_of(run))) == {State.HERE}
    with running(tmp_path, layouts=2):
        assert set(second.write(theirs, blocks_of(theirs, other.layout))) == {State.HERE}
        assert ours.presence(run.keys) == bytes(3)
        new = ours._attached
        assert (second._attached.pool, new.pool) == (1, 2)
        assert new.instance != old.instance and new.region is not old_region
        assert set(ours.write(run, blocks_of(run))) == {State.HERE}
        outs = [memoryview(bytearray(SMALL.block_bytes)) for _ in run.keys]
        assert set(ours.read(run.keys, outs, deadline_s=5.0)) == {State.HERE}
        assert [bytes(out) for out in outs] == [block_of(key) for key in run.keys]
    client.close()


def test_memory_is_mapped_once_for_all_connections(tmp_path: Path) -> None:
    run = make_run(3, seed=1)
    with running(tmp_path) as daemon, daemon.blocks() as blocks:
        blocks.write(run, blocks_of(run))
        region = blocks._attached and blocks._attached.region
        with blocks.client.link(), blocks.client.link():  # the idle one and another are taken: a third is made
            assert blocks.presence(run.keys) == bytes([2] * 3)
        assert blocks._attached and blocks._attached.region is region
        assert len(daemon.service._sessions()) == 3


def test_a_client_that_lost_its_last_connection_is_attached_again(tmp_path: Path) -> None:
    run = make_run(3, seed=1)
    with running(tmp_path) as daemon, daemon.blocks() as blocks:
        blocks.write(run, blocks_of(run))
        for session in daemon.service._sessions():
            daemon.do(lambda session=session: session.stream.close("a test says so"))
        daemon.until(lambda: not daemon.service.clients, "it is forgotten")
        assert blocks.seek(run) == 3
        assert set(blocks.write(run, blocks_of(run))) == {State.PRESENT}
        assert daemon.do(lambda: [client.mapped for client in daemon.service.clients.values()]) == [True]


def test_a_client_is_of_one_process(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, daemon.blocks() as blocks:
        blocks.attach()
        child = os.fork()
        if not child:
            try:
                blocks.client.ping()
            except TierError as error:
                os._exit(0 if "make one after the fork" in str(error) else 2)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        assert blocks.client.ping() > 0


def test_descriptors_beyond_a_thousand_are_served(tmp_path: Path) -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 4096), hard))
    spare = [os.dup(0) for _ in range(1100)]
    try:
        with running(tmp_path) as daemon, daemon.blocks() as blocks:
            assert blocks.client.ping() > 0 and blocks.client.ping() > 0
    finally:
        for fd in spare:
            os.close(fd)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_connections_that_ended_are_all_told_sooner_or_later(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        client = daemon.client()
        client._next = 5000
        client._ended = set(range(1, MAX_ENDED + 100))
        with client.link(), client.link():
            assert len(client._ended) == 0
        client.close()
        assert client._ended <= {5000, 5001}


def test_a_closed_client_says_so(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        client = daemon.client()
        with client.link() as link:
            client.close()
            assert link.call(Op.PING, {}, timeout_s=5.0).fields == {}
        with pytest.raises(TierError, match="closed"):
            client.ping()
        client.close()
        daemon.until(lambda: not daemon.service.clients, "its last connection has ended, too")


# -- answers that are none --------------------------------------------------------------------------------------------------


def table_of(place: int, state: int) -> bytes:
    table = np.zeros(3, LOANS)
    table["place"], table["state"] = place, state
    return table.tobytes()


SOUND: dict[Op, tuple[dict[str, Any], bytes]] = {
    Op.HELLO: ({"instance": b"i" * 16, "memory": False}, b""),
    Op.ATTACH: (
        {
            "pool": 1,
            "places": 4,
            "lease_blocks": 400,
            "block_bytes": SMALL.block_bytes,
            "writable": True,
            "memory": False,
        },
        b"",
    ),
    Op.CONTAINS: ({}, b"\x02\x00\x03"),
    Op.SEEK: ({"found": 2}, b""),
    Op.AWAIT: ({"found": 2}, b""),
    Op.READ: ({"table": table_of(-1, State.ABSENT)}, b""),
    Op.RESERVE: ({"lease": 0}, table_of(-1, State.PRESENT)),
    Op.PIN: ({"pin": "pin-1"}, b""),
    Op.UNPIN: ({"ended": 1}, b""),
    Op.STATS: ({}, b"{}"),
}


class Scripted:
    """Answers one connection after the other with SOUND, and one operation with something else. stream: instead of its frame."""

    def __init__(
        self, op: Op, fields: dict[str, Any] | None = None, payload: bytes = b"", stream: bytes | None = None
    ) -> None:
        self._answers = {**SOUND, op: (fields if fields is not None else SOUND[op][0], payload)}
        self._op, self._stream = op, stream
        self._listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"tcp://127.0.0.1:{self._listening.getsockname()[1]}"
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        while True:
            try:
                sock, _ = self._listening.accept()
            except OSError:
                return
            with sock:
                self._serve(sock)

    def _serve(self, sock: socket.socket) -> None:
        incoming = Incoming()
        while True:
            with incoming.target() as target:
                count = sock.recv_into(target)
            if not count:
                return
            for message in incoming.advance(count):
                if message.op is self._op and self._stream is not None:
                    sock.sendall(self._stream)
                    return
                if message.op in ONE_WAY:
                    continue
                fields, payload = self._answers[message.op]
                sock.sendall(encode(Op.REPLY, message.id, fields, payload_bytes=len(payload)) + payload)

    def close(self) -> None:
        self._listening.shutdown(socket.SHUT_RDWR)
        self._listening.close()
        self._thread.join()


TABLE = table_of(0, State.HERE)
STRANGE_STATE = table_of(0, 6)
LIES: list[tuple[str, Op, dict[str, Any]]] = [
    ("no instance", Op.HELLO, {"fields": {"memory": False}}),
    ("instance of another type", Op.HELLO, {"fields": {"instance": 5, "memory": False}}),
    ("no memory field", Op.HELLO, {"fields": {"instance": b"i"}}),
    ("nothing attached", Op.ATTACH, {"fields": {}}),
    ("memory without a descriptor", Op.ATTACH, {"fields": {**SOUND[Op.ATTACH][0], "memory": True}}),
    ("pool below 0", Op.ATTACH, {"fields": {**SOUND[Op.ATTACH][0], "pool": -1}}),
    ("few answers", Op.CONTAINS, {"payload": b"\x01"}),
    ("found more than asked for", Op.SEEK, {"fields": {"found": 4}}),
    ("found less than none", Op.SEEK, {"fields": {"found": -1}}),
    ("nothing found", Op.SEEK, {"fields": {}}),
    ("waited for more than there is", Op.AWAIT, {"fields": {"found": 4}}),
    ("no table", Op.READ, {"fields": {}}),
    ("no table but blocks", Op.READ, {"fields": {}, "payload": bytes(SMALL.block_bytes)}),
    ("table of another length", Op.READ, {"fields": {"table": TABLE[1:]}, "payload": bytes(3 * SMALL.block_bytes)}),
    ("table of another type", Op.READ, {"fields": {"table": "x"}, "payload": bytes(3 * SMALL.block_bytes)}),
    ("table of another state", Op.READ, {"fields": {"table": STRANGE_STATE}}),
    ("blocks too short", Op.READ, {"fields": {"table": TABLE}, "payload": bytes(SMALL.block_bytes)}),
    (
        "blocks missing",
        Op.READ,
        {"fields": {"table": TABLE}, "stream": encode(Op.REPLY, 3, {"table": TABLE}, payload_bytes=5)},
    ),
    ("no lease", Op.RESERVE, {"fields": {}, "payload": TABLE}),
    ("another state of a place", Op.RESERVE, {"fields": {"lease": 1}, "payload": STRANGE_STATE}),
    ("statistics that are none", Op.STATS, {"payload": b"x"}),
    ("an answer to nothing", Op.SEEK, {"stream": encode(Op.REPLY, 77, {"found": 1})}),
    ("an event nobody wants", Op.SEEK, {"stream": encode(Op.EVENT, 77, {})}),
    ("a request", Op.SEEK, {"stream": encode(Op.PING, 3, {})}),
    ("another protocol", Op.SEEK, {"stream": b"HTTP/1.1 400 Bad Request\r\n\r\n"}),
    ("a huge payload", Op.SEEK, {"stream": encode(Op.REPLY, 3, {"found": 1}, payload_bytes=1 << 60)}),
    ("nothing", Op.SEEK, {"stream": b""}),
    ("half a frame", Op.SEEK, {"stream": encode(Op.REPLY, 3, {"found": 1})[:20]}),
    ("a reason", Op.SEEK, {"stream": encode(Op.REFUSED, 0, {"reason": "so it is", "kind": "protocol"})}),
]


@pytest.mark.parametrize(("op", "answer"), [(op, answer) for _, op, answer in LIES], ids=[what for what, *_ in LIES])
def test_an_answer_that_is_none_is_a_failure_of_the_tier_and_nothing_else(op: Op, answer: dict[str, Any]) -> None:
    daemon = Scripted(op, **answer)
    run = make_run(3, seed=1)
    tier = tier_of(daemon.url)
    calls: dict[Op, Callable[[], object]] = {
        Op.CONTAINS: lambda: tier.contains(run.keys),
        Op.SEEK: lambda: tier.seek(run),
        Op.AWAIT: lambda: tier.wait(run.keys, known=0, deadline_s=1.0),
        Op.READ: lambda: read_blocks(tier, run.keys),
        Op.RESERVE: lambda: tier.write(run, blocks_of(run)),
        Op.STATS: lambda: tier.blocks.client.stats(),
    }
    with pytest.raises(TierError):
        calls.get(op, calls[Op.SEEK])()
    tier.close()
    daemon.close()


def test_blocks_that_are_not_what_was_asked_for_are_a_counted_miss() -> None:
    run = make_run(3, seed=1)
    daemon = Scripted(Op.READ, {"table": TABLE}, b"".join(block_of(key) for key in run.keys))
    metrics = Metrics()
    client = DaemonClient(daemon.url, connect_s=PATIENCE_S)
    tier = DaemonTier(client, namespace=NAMESPACE, root=ROOT, metrics=metrics)
    assert read_blocks(tier, run.keys) == [None] * 3  # whole, and vouched for with another digest
    assert metrics.corrupt_blocks.value("daemon") == 3
    tier.close()
    daemon.close()
