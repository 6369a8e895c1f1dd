"""The Redis tier when the server is absent, hangs, drips, lies or vanishes: counted misses, in time, and no wrong bytes."""

import logging
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator

import pytest
import redis

from tests.redis_servers import Between, Scripted, Send
from tierkv.codecs import HEADER_BYTES
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.testing import SMALL, block_of, blocks_of, make_run, read_blocks
from tierkv.tiers.base import Miss, Run
from tierkv.tiers.redis import RedisTier
from tierkv.valkey import EmbeddedValkey

pytestmark = pytest.mark.redis

SLACK_S = 1.0  # for a loaded machine; without a bound these tests would take seconds to minutes, or for ever
BIG = Layout(num_layers=8, num_kv_heads=4, head_dim=64, dtype="bfloat16")  # 128 KiB a block: more than a socket buffers


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def own() -> Iterator[EmbeddedValkey]:
    """A server that the test may stop, kill or fill."""
    with EmbeddedValkey(port=0, capacity_bytes=256 << 20) as server:
        yield server


@pytest.fixture
def metrics() -> Metrics:
    return Metrics()


def tier_at(url: str, metrics: Metrics, **options: object) -> RedisTier:
    return RedisTier(url, **({"layout": SMALL, "metrics": metrics} | options))  # type: ignore[arg-type]


def reasons(metrics: Metrics) -> dict[str, float]:
    return {str(reason): number for reason in Miss if (number := metrics.misses.value("redis", reason))}


def within(limit_s: float, call: Callable[[], object]) -> object:
    start = time.monotonic()
    result = call()
    assert time.monotonic() - start < limit_s + SLACK_S
    return result


# -- not there ---------------------------------------------------------------------------------------------------------


def test_server_that_is_not_up_yet_is_down_and_comes_up(own: EmbeddedValkey, caplog: pytest.LogCaptureFixture) -> None:
    metrics, clock = Metrics(), Clock()
    port = own.port
    own.close()
    with caplog.at_level(logging.WARNING, "tierkv"):
        tier = tier_at(f"redis://127.0.0.1:{port}", metrics, clock=clock, down_s=5.0)
    assert len(caplog.records) == 1 and f"127.0.0.1:{port} is left alone for 5 s" in caplog.text
    run = make_run(3, seed=1)
    assert tier.contains(run.keys) == [False] * 3
    assert tier.write(run, blocks_of(run)) == [False] * 3
    assert read_blocks(tier, run.keys) == [None] * 3
    assert reasons(metrics) == {"down": 6} and metrics.saves_dropped.value("redis", Miss.DOWN) == 3
    with EmbeddedValkey(port=port):
        assert not any(tier.contains(run.keys)) and reasons(metrics) == {"down": 9}
        clock.now += 5.1
        assert all(tier.write(run, blocks_of(run)))
        assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]
    assert metrics.tier_down.value("redis") == 1
    tier.close()


def test_missing_socket_is_down(tmp_path: object, metrics: Metrics) -> None:
    tier = tier_at(f"unix://{tmp_path}/none.sock", metrics)
    assert tier.contains(make_run(1, seed=1).keys) == [False] and reasons(metrics) == {"down": 1}
    tier.close()


def test_host_that_does_not_accept_costs_no_more_than_its_bound(metrics: Metrics) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=0) as full:
        port = full.getsockname()[1]
        queued = [socket.socket() for _ in range(4)]
        for waiting in queued:  # the queue is full: the kernel ignores whoever comes next
            waiting.setblocking(False)
            waiting.connect_ex(("127.0.0.1", port))
        tier = within(1.0, lambda: tier_at(f"redis://127.0.0.1:{port}", metrics))
        assert isinstance(tier, RedisTier) and metrics.tier_down.value("redis") == 1
        tier.close()
        for waiting in queued:
            waiting.close()


def test_pause_doubles_and_one_call_at_a_time_probes(own: EmbeddedValkey, metrics: Metrics) -> None:
    clock = Clock()
    tier = tier_at(own.url, metrics, clock=clock, down_after=2, down_s=4.0)
    key = make_run(1, seed=1).keys
    own.kill()
    for _ in range(2):
        tier.contains(key)
    assert reasons(metrics) == {"failed": 2} and metrics.tier_down.value("redis") == 1
    for wait_s, expected in ((3.9, "down"), (0.2, "failed"), (7.8, "down"), (0.3, "failed"), (15.8, "down")):
        before = reasons(metrics).get(expected, 0)
        clock.now += wait_s
        tier.contains(key)
        assert reasons(metrics)[expected] == before + 1, (wait_s, expected)
    assert metrics.tier_down.value("redis") == 1
    tier.close()


# -- hangs and drips ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("link", ["url", "tcp_url"])
def test_server_that_hangs_is_late_by_the_deadline(own: EmbeddedValkey, metrics: Metrics, link: str) -> None:
    tier = tier_at(getattr(own, link), metrics, layout=BIG)
    held, new = make_run(8, seed=1, layout=BIG), make_run(200, seed=2, layout=BIG)
    assert all(tier.write(held, blocks_of(held, BIG)))
    outs = [memoryview(bytearray(BIG.block_bytes)) for _ in held.keys]
    own.pause()
    assert within(0.3, lambda: tier.read(held.keys, outs, deadline_s=0.3)) == [False] * 8
    assert within(0.3, lambda: tier.write(new, blocks_of(new, BIG), deadline_s=0.3)) == [False] * 200
    assert reasons(metrics) == {"late": 8} and metrics.saves_dropped.value("redis", Miss.LATE) == 200
    own.resume()
    assert read_blocks(tier, held.keys, BIG) == [block_of(key, BIG) for key in held.keys]
    tier.close()


def test_hanging_server_is_left_alone_after_three_batches(own: EmbeddedValkey, metrics: Metrics) -> None:
    tier = tier_at(own.url, metrics)
    key = make_run(1, seed=1).keys
    outs = [memoryview(bytearray(SMALL.block_bytes))]
    own.pause()
    for _ in range(3):
        tier.read(key, outs, deadline_s=0.1)
    assert within(0.0, lambda: tier.read(key, outs)) == [False]
    assert reasons(metrics) == {"late": 3, "down": 1}
    own.resume()
    tier.close()


def test_no_deadline_is_too_short_or_too_long(own: EmbeddedValkey) -> None:
    tier = tier_at(own.url, Metrics(), down_after=10_000)
    run = make_run(2, seed=1)
    assert all(tier.write(run, blocks_of(run), deadline_s=float("inf")))
    outs = [memoryview(bytearray(SMALL.block_bytes)) for _ in run.keys]
    assert tier.read(run.keys, outs, deadline_s=float("inf")) == [True, True]
    assert tier.read(run.keys, outs, deadline_s=-1.0) == [False, False]
    own.pause()
    for number in range(300):
        deadline_s = 1e-7 * 1.04**number
        assert within(deadline_s, lambda of=deadline_s: tier.read(run.keys, outs, deadline_s=of)) == [False] * 2  # type: ignore[misc]
    own.resume()
    assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]
    tier.close()


def test_server_that_hangs_at_the_greeting_costs_no_more_than_its_bound(own: EmbeddedValkey, metrics: Metrics) -> None:
    own.pause()
    tier = within(2.0, lambda: tier_at(own.tcp_url, metrics))
    assert isinstance(tier, RedisTier) and metrics.tier_down.value("redis") == 1
    own.resume()
    tier.close()


def test_dripping_server_is_late_by_the_deadline(valkey: EmbeddedValkey, metrics: Metrics) -> None:
    stop = threading.Event()
    drip = threading.Event()

    def spoil(number: int, piece: bytes) -> tuple[bytes, bool]:
        if drip.is_set():
            stop.wait(0.05)
            return piece[:1], True  # what it holds back never comes
        return piece, True

    with Between(valkey.socket_path, spoil) as between:
        tier = tier_at(between.url, metrics, layout=BIG)
        run = make_run(40, seed=3, layout=BIG)
        assert all(tier.write(run, blocks_of(run, BIG)))
        drip.set()
        outs = [memoryview(bytearray(BIG.block_bytes)) for _ in run.keys]
        assert within(0.5, lambda: tier.read(run.keys, outs, deadline_s=0.5)) == [False] * 40
        assert reasons(metrics) == {"late": 40}
        assert metrics.tier_down.value("redis") == 0  # it is slow, not gone
        stop.set()
        tier.close()


def test_server_that_drips_its_greeting_is_bounded(metrics: Metrics) -> None:
    stop = threading.Event()

    def answer(command: list[bytes], send: Send) -> None:
        send(b"$100000\r\n")
        while not stop.wait(0.1):
            send(b"x")

    with Scripted(answer, greet=False) as server:
        tier = within(2.0, lambda: tier_at(server.url, metrics))
        assert isinstance(tier, RedisTier) and metrics.tier_down.value("redis") == 1
        stop.set()
        tier.close()


# -- lies --------------------------------------------------------------------------------------------------------------

SIZE = HEADER_BYTES + SMALL.block_bytes
LIES = {
    "no RESP at all": b"HTTP/1.1 400 Bad Request\r\n\r\n",
    "zeros": bytes(9000),
    "an endless line": b"$" + b"1" * 9000,
    "a negative length": b"$-7\r\n",
    "a length that is none": b"$1_0\r\n0123456789\r\n",
    "a length without end": b"$99999999999999999999999\r\n",
    "a length longer than any block": b"$%d\r\n" % (SIZE + 1) + bytes(SIZE + 1) + b"\r\n",
    "a length that is too short": b"$10\r\n" + bytes(SIZE) + b"\r\n",
    "a value without its line end": b"$%d\r\n" % SIZE + bytes(SIZE) + b"xy",
    "a reply too many": b"$-1\r\n+OK\r\n",
    "a list": b"*1\r\n$1\r\nx\r\n",
    "a push": b">2\r\n+invalidate\r\n*0\r\n$-1\r\n",
    "an integer": b":1\r\n",
    "a status": b"+OK\r\n",
}


@pytest.mark.parametrize("lie", LIES)
def test_what_is_no_answer_to_get_is_a_miss_and_closes_the_connection(lie: str, metrics: Metrics) -> None:
    with Scripted(lambda command, send: send(LIES[lie] if command[0] == b"GET" else b":1\r\n")) as server:
        tier = tier_at(server.url, metrics)
        greeted = server.accepted
        key = make_run(1, seed=1).keys
        assert within(1.0, lambda: read_blocks(tier, key)) == [None]
        assert sum(reasons(metrics).values()) == 1
        assert within(1.0, lambda: read_blocks(tier, key)) == [None]
        assert server.accepted >= greeted + 2  # a new connection for the second read
        tier.close()


@pytest.mark.parametrize(
    "lie", ["no RESP at all", "zeros", "an endless line", "a list", "an integer", "a reply too many"]
)
def test_what_is_no_answer_to_set_is_a_dropped_save(lie: str, metrics: Metrics) -> None:
    with Scripted(lambda command, send: send(LIES[lie])) as server:
        tier = tier_at(server.url, metrics)
        run = make_run(1, seed=1)
        saved = within(1.0, lambda: tier.write(run, blocks_of(run)))
        # nil means present: true as far as anyone can tell, and every read verifies
        assert saved == [lie == "a reply too many"]
        tier.close()


def test_value_of_another_key_is_never_returned(valkey: EmbeddedValkey, metrics: Metrics) -> None:
    tier = tier_at(valkey.url, metrics, prefix="swap")
    run = make_run(2, seed=1)
    tier.write(run, blocks_of(run))
    with redis.Redis.from_url(valkey.url) as client:
        names = [b"swap:" + key for key in run.keys]
        client.copy(names[0], names[1], replace=True)
        assert read_blocks(tier, run.keys) == [block_of(run.keys[0]), None]
        assert client.exists(*names) == 1
    assert reasons(metrics) == {"corrupt": 1}
    tier.close()


@pytest.mark.parametrize("spoilt", [b"", b"x", b"x" * HEADER_BYTES, b"x" * SIZE, b"x" * (SIZE + 1000)])
def test_foreign_value_under_a_key_is_corrupt_and_removed(
    valkey: EmbeddedValkey, metrics: Metrics, spoilt: bytes
) -> None:
    tier = tier_at(valkey.url, metrics, prefix="foreign")
    run = make_run(3, seed=1)
    with redis.Redis.from_url(valkey.url) as client:
        client.set(b"foreign:" + run.keys[1], spoilt)
        assert read_blocks(tier, run.keys[1:2]) == [None]
        assert client.exists(b"foreign:" + run.keys[1]) == 0
    assert reasons(metrics) == {"corrupt": 1} and metrics.corrupt_blocks.value("redis") == 1
    assert all(tier.write(run, blocks_of(run)))
    assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]
    tier.delete(run.keys)
    tier.close()


def test_key_of_another_type_is_corrupt_and_removed(valkey: EmbeddedValkey, metrics: Metrics) -> None:
    tier = tier_at(valkey.url, metrics, prefix="list")
    run = make_run(3, seed=1)
    tier.write(run, blocks_of(run))
    with redis.Redis.from_url(valkey.url) as client:
        client.delete(b"list:" + run.keys[1])
        client.lpush(b"list:" + run.keys[1], b"x")
        assert read_blocks(tier, run.keys) == [block_of(run.keys[0]), None, block_of(run.keys[2])]
    assert tier.contains(run.keys) == [True, False, True]
    tier.close()


def test_block_of_another_layout_is_a_miss_and_stays(valkey: EmbeddedValkey, metrics: Metrics) -> None:
    other = Layout(num_layers=2, num_kv_heads=2, head_dim=20, dtype="float16")
    theirs, ours = (
        tier_at(valkey.url, Metrics(), layout=other, prefix="two"),
        tier_at(valkey.url, metrics, prefix="two"),
    )
    run = make_run(2, seed=1)
    theirs.write(run, blocks_of(run))
    assert read_blocks(ours, run.keys) == [None, None] and reasons(metrics) == {"layout": 2}
    assert read_blocks(theirs, run.keys) == [block_of(key) for key in run.keys]
    theirs.close(), ours.close()


def test_any_flipped_bit_of_a_stored_block_is_found(valkey: EmbeddedValkey, metrics: Metrics) -> None:
    tier = tier_at(valkey.url, metrics, prefix="flip")
    key = make_run(1, seed=1).keys
    run = make_run(1, seed=1)
    harmless = 0
    with redis.Redis.from_url(valkey.url) as client:
        for at in [*range(HEADER_BYTES), *range(HEADER_BYTES, SIZE, 501), SIZE - 1]:
            tier.write(run, blocks_of(run))
            was = client.getrange(b"flip:" + key[0], at, at)
            client.setrange(b"flip:" + key[0], at, bytes([was[0] ^ 1 << at % 8]))
            (found,) = read_blocks(tier, key)
            assert found is None or found == block_of(key[0])
            harmless += found is not None
            tier.delete(key)
    assert harmless <= 34  # the parent's key and the depth, which a read does not need
    tier.close()


# -- vanishes ----------------------------------------------------------------------------------------------------------


def test_connection_cut_after_any_byte_gives_a_prefix_of_right_blocks(valkey: EmbeddedValkey) -> None:
    run = make_run(6, seed=5)
    plain = tier_at(valkey.url, Metrics(), prefix="cut")
    assert all(plain.write(run, blocks_of(run)))
    limit = 0

    def spoil(number: int, piece: bytes) -> tuple[bytes, bool]:
        nonlocal limit
        if number == 1:  # the first connection only says who is there
            return piece, True
        passed, limit = limit, max(0, limit - len(piece))
        return piece[:passed], len(piece) <= passed

    total = 6 * (SIZE + 9)
    for cut in [*range(0, 40), *range(40, total, 997), *range(total - 8, total)]:
        with Between(valkey.socket_path, spoil) as between:
            metrics = Metrics()
            tier = tier_at(between.url, metrics, prefix="cut", deadline_s=2.0)
            limit = cut + 10  # two +OK of the greeting
            found = within(2.0, lambda tier=tier: read_blocks(tier, run.keys))  # type: ignore[misc]
            assert isinstance(found, list)
            whole = sum(block is not None for block in found)
            assert found == [block_of(key) for key in run.keys[:whole]] + [None] * (6 - whole)
            assert whole == min(6, max(0, cut) // (SIZE + 9))
            assert sum(reasons(metrics).values()) == 6 - whole
            tier.close()
    plain.delete(run.keys)
    plain.close()


def test_server_killed_in_mid_load_is_a_miss_and_its_heir_is_used(own: EmbeddedValkey) -> None:
    metrics, clock = Metrics(), Clock()
    tier = tier_at(own.tcp_url, metrics, layout=BIG, clock=clock)
    run = make_run(400, seed=1, layout=BIG)
    blocks = blocks_of(run, BIG)
    assert all(tier.write(run, blocks))
    outs = [memoryview(bytearray(BIG.block_bytes)) for _ in run.keys]
    killer = threading.Timer(0.005, own.kill)
    killer.start()
    for _ in range(50):
        found = within(2.0, lambda: tier.read(run.keys, outs))
        assert isinstance(found, list)
        for key, out, ok in zip(run.keys, outs, found, strict=True):
            assert not ok or bytes(out) == block_of(key, BIG)
        if not any(found):
            break
    killer.join()
    assert not any(found) and sum(reasons(metrics).values()) > 0
    port = own.port
    own.close()
    with EmbeddedValkey(port=port, capacity_bytes=256 << 20):
        clock.now += 1000
        assert all(tier.write(run, blocks))
    tier.close()


def test_interrupt_in_mid_load_closes_the_connection(valkey: EmbeddedValkey, metrics: Metrics) -> None:
    main = threading.main_thread().ident
    assert main is not None
    interrupts = 1

    def spoil(number: int, piece: bytes) -> tuple[bytes, bool]:
        nonlocal interrupts
        if len(piece) > 100 and interrupts and number > 1:
            interrupts -= 1
            signal.pthread_kill(main, signal.SIGINT)
            return piece[:-7], True  # the reader waits for the rest
        return piece, True

    with Between(valkey.socket_path, spoil) as between:
        tier = tier_at(between.url, metrics, prefix="ctrl-c", deadline_s=10.0)
        run = make_run(8, seed=1)
        assert all(tier.write(run, blocks_of(run)))
        before = between.accepted
        with pytest.raises(KeyboardInterrupt):
            read_blocks(tier, run.keys)
        assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]
        assert between.accepted == before + 1
        tier.close()


# -- refuses -----------------------------------------------------------------------------------------------------------


def test_full_server_refuses_blocks_one_by_one(metrics: Metrics, caplog: pytest.LogCaptureFixture) -> None:
    with EmbeddedValkey(capacity_bytes=4 << 20, options={"maxmemory-policy": "noeviction"}) as server:
        tier = tier_at(server.url, metrics, layout=BIG)
        run = make_run(60, seed=1, layout=BIG)
        saved = tier.write(run, blocks_of(run, BIG))
        assert 0 < sum(saved) < 60 and saved == sorted(saved, reverse=True)
        expected = [block_of(key, BIG) if ok else None for key, ok in zip(run.keys, saved, strict=True)]
        assert read_blocks(tier, run.keys, BIG) == expected
        assert metrics.saves_dropped.value("redis", Miss.FAILED) == 60 - sum(saved)
        assert metrics.tier_down.value("redis") == 0
        assert [record.message for record in caplog.records if "OOM" in record.message] == [
            record.message for record in caplog.records
        ] and len(caplog.records) == 1
        tier.close()


def test_server_that_evicts_is_a_plain_miss(metrics: Metrics) -> None:
    with EmbeddedValkey(capacity_bytes=4 << 20) as server:
        tier = tier_at(server.url, metrics, layout=BIG)
        run = make_run(60, seed=1, layout=BIG)
        assert all(tier.write(run, blocks_of(run, BIG)))
        found = read_blocks(tier, run.keys, BIG)
        gone = found.count(None)
        assert 20 < gone < 60 and reasons(metrics) == {"absent": gone}
        assert all(got in (None, block_of(key, BIG)) for key, got in zip(run.keys, found, strict=True))
        tier.close()


@pytest.mark.parametrize("word", [b"LOADING", b"NOPERM", b"MISCONF", b"MOVED", b"READONLY"])
def test_error_replies_are_misses_and_keep_the_connection(word: bytes, metrics: Metrics) -> None:
    with Scripted(lambda command, send: send(b"-%b no\r\n" % word)) as server:
        tier = tier_at(server.url, metrics)
        run = make_run(3, seed=1)
        tier.contains(run.keys)
        connections = server.accepted
        assert read_blocks(tier, run.keys) == [None] * 3
        assert tier.write(run, blocks_of(run)) == [False] * 3
        tier.delete(run.keys)
        assert reasons(metrics) == {"failed": 6} and metrics.saves_dropped.value("redis", Miss.FAILED) == 3
        assert server.accepted == connections
        tier.close()


def test_close_waits_for_a_batch_under_way(valkey: EmbeddedValkey, metrics: Metrics) -> None:
    begun, go_on = threading.Event(), threading.Event()

    def spoil(number: int, piece: bytes) -> tuple[bytes, bool]:
        if len(piece) > SMALL.block_bytes // 2:  # of a block, not of a greeting
            begun.set()
            go_on.wait(5)
        return piece, True

    run: Run = make_run(4, seed=8)
    with Between(valkey.socket_path, spoil) as between:
        tier = tier_at(between.url, metrics, prefix="closing", deadline_s=10.0)
        assert all(tier.write(run, blocks_of(run)))
        found: list[object] = []
        reader = threading.Thread(target=lambda: found.extend(read_blocks(tier, run.keys)))
        reader.start()
        assert begun.wait(5)
        closer = threading.Thread(target=tier.close)
        closer.start()
        go_on.set()
        reader.join(10), closer.join(10)
        assert found == [block_of(key) for key in run.keys]
        assert read_blocks(tier, run.keys) == [None] * 4
