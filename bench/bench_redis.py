"""Redis put and get against a bare socket that says the same SET and GET, and against redis-py's own path.

The bare socket sends the same blocks, and receives into one preallocated area as long as the batch without parsing; it
verifies nothing. The tier checks every length, key and checksum. What the checksum alone costs is a row of its own.
"""

import socket
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import redis

from tierkv.codecs import HEADER_BYTES
from tierkv.codecs.header import checksum
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.testing import make_run
from tierkv.tiers.base import Run
from tierkv.tiers.redis import RedisTier
from tierkv.valkey import EmbeddedValkey

LAYOUTS = {
    "360 KiB": Layout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16"),
    "2 MiB": Layout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16"),
}
CALLS = {1: 16, 8: 4, 32: 2}  # gets in one round, by blocks in a batch: enough to see past clock and scheduler


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedValkey]:
    with EmbeddedValkey(port=0, capacity_bytes=1 << 30) as server:
        yield server


class Bare:
    """SET and GET of objects as long as the tier's, by socket calls alone."""

    def __init__(self, server: EmbeddedValkey, link: str, names: Sequence[bytes], blocks: Sequence[memoryview]) -> None:
        if link == "unix":
            self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            self.sock.connect(str(server.socket_path))
        else:
            self.sock = socket.create_connection(("127.0.0.1", server.port))
            self.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        size = HEADER_BYTES + len(blocks[0])
        self.gets = b"".join(b"*2\r\n$3\r\nGET\r\n$%d\r\n%b\r\n" % (len(name), name) for name in names)
        self.heads = [b"*3\r\n$3\r\nSET\r\n$%d\r\n%b\r\n$%d\r\n" % (len(name), name, size) for name in names]
        self.pad = memoryview(bytes(HEADER_BYTES))
        self.blocks = blocks
        self.count = len(names)
        self.area = memoryview(bytearray((len(b"$%d\r\n" % size) + size + 2) * self.count))

    def get(self) -> None:
        self.sock.sendall(self.gets)
        left = self.area
        while left:
            left = left[self.sock.recv_into(left) :]

    def set(self) -> None:
        for head, block in zip(self.heads, self.blocks, strict=True):
            pieces = [memoryview(head), self.pad, block, memoryview(b"\r\n")]
            while pieces:
                sent = self.sock.sendmsg(pieces)
                while pieces and sent >= len(pieces[0]):
                    sent -= len(pieces.pop(0))
                if pieces:
                    pieces[0] = pieces[0][sent:]
        left = 5 * self.count
        while left:
            left -= len(self.sock.recv(left))


class Bench:
    """A tier, a bare socket and a library client on `count` blocks of a layout, all on one server."""

    def __init__(self, server: EmbeddedValkey, link: str, layout: Layout, count: int) -> None:
        self.admin = redis.Redis.from_url(server.url)
        self.admin.flushall()
        url = server.url if link == "unix" else server.tcp_url
        self.tier = RedisTier(url, layout=layout, metrics=Metrics(), deadline_s=60.0)
        self.client = redis.Redis.from_url(url)
        self.run = make_run(count, seed=count, layout=layout)
        self.area = np.random.default_rng(2).integers(0, 256, (count, layout.block_bytes), dtype=np.uint8)
        self.blocks = [memoryview(row) for row in self.area]
        self.outs = [memoryview(row) for row in np.zeros_like(self.area) + np.uint8(1)]
        self.bare = Bare(server, link, [b"bare:" + key for key in self.run.keys], self.blocks)
        self.theirs = [b"library:" + key for key in self.run.keys]

    def put(self) -> None:
        assert all(self.tier.write(self.run, self.blocks))

    def get(self) -> None:
        assert all(self.tier.read(self.run.keys, self.outs))

    def forget(self) -> None:
        self.admin.unlink(*[prefix + key for prefix in (b"tierkv:", b"bare:") for key in self.run.keys])

    def theirs_put(self) -> None:
        with self.client.pipeline(transaction=False) as pipe:
            for name, block in zip(self.theirs, self.blocks, strict=True):
                pipe.set(name, block)
            pipe.execute()

    def theirs_get(self) -> None:
        with self.client.pipeline(transaction=False) as pipe:
            for name in self.theirs:
                pipe.get(name)
            for value, out in zip(pipe.execute(), self.outs, strict=True):
                out[:] = value

    def close(self) -> None:
        self.tier.close()
        self.client.close()
        self.admin.close()
        self.bare.sock.close()


CASES = [(link, size, count) for link in ("unix", "tcp") for size in LAYOUTS for count in CALLS]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request: pytest.FixtureRequest, server: EmbeddedValkey) -> Iterator[tuple[Bench, str, float]]:
    link, size, count = request.param
    bench = Bench(server, link, LAYOUTS[size], count)
    yield bench, f"{count} x {size}, {link}", count * LAYOUTS[size].block_bytes / 1e9
    bench.close()


def repeat(call: Callable[[], None], times: int) -> Callable[[], None]:
    def run() -> None:
        for _ in range(times):
            call()

    return run


def test_get(versus: Any, case: tuple[Bench, str, float]) -> None:
    bench, name, gigabytes = case
    bench.put(), bench.bare.set()
    times = CALLS[len(bench.blocks)]
    limit = repeat(bench.bare.get, times)
    amount = gigabytes * times
    versus(f"redis get {name}", repeat(bench.get, times), "bare socket", limit, unit="GB/s", amount=amount, rounds=30)


def test_put(versus: Any, case: tuple[Bench, str, float]) -> None:
    bench, name, gigabytes = case
    versus(
        f"redis put {name}",
        bench.put,
        "bare socket",
        bench.bare.set,
        unit="GB/s",
        amount=gigabytes,
        rounds=CALLS[len(bench.blocks)] * 10,
        before=bench.forget,  # both sides make the server allocate
    )


@pytest.mark.parametrize("size", list(LAYOUTS))
@pytest.mark.parametrize("way", ["get", "put"])
def test_library(versus: Any, server: EmbeddedValkey, size: str, way: str) -> None:
    """What redis-py's own pipelines reach, without header or checksum."""
    bench = Bench(server, "unix", LAYOUTS[size], 8)
    bench.theirs_put(), bench.bare.set()
    call, limit = {"get": (bench.theirs_get, bench.bare.get), "put": (bench.theirs_put, bench.bare.set)}[way]
    amount = 8 * 8 * LAYOUTS[size].block_bytes / 1e9
    name = f"redis-py {way} 8 x {size}, unix"
    versus(name, repeat(call, 8), "bare socket", repeat(limit, 8), unit="GB/s", amount=amount, rounds=15)
    bench.close()


@pytest.mark.parametrize("size", list(LAYOUTS))
def test_checksum(versus: Any, server: EmbeddedValkey, size: str) -> None:
    """What verification alone takes, on blocks that a get has just brought in."""
    bench = Bench(server, "unix", LAYOUTS[size], 8)
    bench.bare.set()
    amount = 8 * 8 * LAYOUTS[size].block_bytes / 1e9
    verify = repeat(lambda: [checksum(out) for out in bench.outs].clear(), 8)
    limit = repeat(bench.bare.get, 8)
    versus(f"checksum of 8 x {size}", verify, "bare socket get", limit, unit="GB/s", amount=amount, rounds=15)
    bench.close()


@pytest.mark.parametrize("held", [0, 4000, 8192])
def test_contains(versus: Any, server: EmbeddedValkey, held: int) -> None:
    layout = Layout(num_layers=1, num_kv_heads=1, head_dim=16, dtype="bfloat16")
    bench = Bench(server, "unix", layout, 8192)
    run = bench.run
    present = Run(run.root, run.parent, 0, run.keys[:held])
    assert all(bench.tier.write(present, bench.blocks[:held]))
    assert bench.tier.contains(run.keys) == [True] * held + [False] * (8192 - held)

    def library() -> None:
        with bench.client.pipeline(transaction=False) as pipe:
            for key in run.keys:
                pipe.exists(b"tierkv:" + key)
            pipe.execute()

    name = f"redis contains, {held} of 8,192"
    versus(name, lambda: bench.tier.contains(run.keys), "redis-py pipeline", library, unit="ms", amount=1, rounds=15)
    bench.close()
