"""The Redis tier on a real cluster of three primaries: the contract, redirections, a primary that dies, one that hangs."""

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import redis

from tests.test_redis import RedisContract
from tierkv.errors import ConfigError
from tierkv.keys import Key
from tierkv.metrics import Metrics
from tierkv.testing import SMALL, block_of, blocks_of, make_run, read_blocks
from tierkv.tiers.base import Miss, Tier
from tierkv.tiers.redis import RedisTier
from tierkv.valkey import EmbeddedValkey

pytestmark = pytest.mark.redis

SLOTS = 16384
OPTIONS = {"cluster-enabled": "yes", "cluster-node-timeout": "1000", "cluster-require-full-coverage": "no"}


class Cluster:
    """Three primaries that share the slots."""

    def __init__(self) -> None:
        self.servers = [EmbeddedValkey(port=0, capacity_bytes=128 << 20, options=OPTIONS) for _ in range(3)]
        self.admins = [redis.Redis.from_url(server.url) for server in self.servers]
        self.url = self.servers[0].tcp_url.replace("redis://", "redis+cluster://")
        for number, admin in enumerate(self.admins):
            admin.execute_command("CLUSTER ADDSLOTSRANGE", SLOTS * number // 3, SLOTS * (number + 1) // 3 - 1)
            admin.execute_command("CLUSTER SET-CONFIG-EPOCH", number + 1)
        for server in self.servers[1:]:
            self.admins[0].execute_command("CLUSTER MEET", "127.0.0.1", server.port)
        self.await_state(lambda info: info["cluster_state"] == "ok" and info["cluster_slots_assigned"] == str(SLOTS))

    def await_state(self, met: object, admins: object = None) -> None:
        end = time.monotonic() + 20
        for admin in self.admins if admins is None else admins:  # type: ignore[attr-defined]
            while not met(admin.execute_command("CLUSTER INFO")):  # type: ignore[operator]
                assert time.monotonic() < end, "the cluster does not come together"

    def ids(self) -> list[bytes]:
        return [admin.execute_command("CLUSTER MYID") for admin in self.admins]

    def close(self) -> None:
        for admin in self.admins:
            admin.close()
        for server in self.servers:
            server.close()


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    made = Cluster()
    yield made
    made.close()


@pytest.fixture
def own() -> Iterator[Cluster]:
    """A cluster that the test may break."""
    made = Cluster()
    yield made
    made.close()


class TestOnACluster(RedisContract):
    @pytest.fixture(autouse=True)
    def _cluster(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def url(self) -> str:
        return self.cluster.url

    def make(self, tmp_path: Path, metrics: Metrics) -> Tier:
        for admin in self.cluster.admins:
            admin.flushall()
        return self.reopen(tmp_path, metrics)

    def corrupt(self, tier: Tier, key: Key) -> None:
        with redis.RedisCluster(host="127.0.0.1", port=self.cluster.servers[0].port) as client:
            name = b"tierkv:" + key
            last = client.getrange(name, -1, -1)
            client.setrange(name, client.strlen(name) - 1, bytes([last[0] ^ 1]))


class TestOnAClusterSideBySide(TestOnACluster):
    def reopen(self, tmp_path: Path, metrics: Metrics) -> Tier:
        self.executor = ThreadPoolExecutor(2)
        return RedisTier(self.url(), layout=SMALL, metrics=metrics, executor=self.executor)


def tier_on(cluster: Cluster, metrics: Metrics, **options: object) -> RedisTier:
    return RedisTier(cluster.url, **({"layout": SMALL, "metrics": metrics} | options))  # type: ignore[arg-type]


def held_by(cluster: Cluster, number: int) -> set[bytes]:
    """Keys of the blocks on one node."""
    return {name[-32:] for name in cluster.admins[number].keys("*") if len(name) == 32 + len("tierkv:")}


def test_keys_spread_over_all_nodes(cluster: Cluster) -> None:
    tier = tier_on(cluster, Metrics(), prefix="spread")
    run = make_run(120, seed=1)
    assert all(tier.write(run, blocks_of(run)))
    assert all(admin.dbsize() > 20 for admin in cluster.admins)
    assert (
        tier.contains([*run.keys, *make_run(700, seed=2).keys, *run.keys])
        == [True] * 120 + [False] * 700 + [True] * 120
    )
    tier.delete(run.keys)
    tier.close()


def test_busy_executor_does_not_deadlock(cluster: Cluster) -> None:
    with ThreadPoolExecutor(1) as executor:
        tier = tier_on(cluster, Metrics(), prefix="busy", executor=executor)
        run = make_run(60, seed=1)
        assert all(executor.submit(tier.write, run, blocks_of(run)).result(20))
        assert executor.submit(read_blocks, tier, run.keys).result(20) == [block_of(key) for key in run.keys]
        tier.delete(run.keys)
        tier.close()


def test_node_of_a_cluster_named_as_a_single_server_is_an_error(cluster: Cluster) -> None:
    with pytest.raises(ConfigError, match=r"part of a cluster; write redis\+cluster://"):
        RedisTier(cluster.servers[1].tcp_url, layout=SMALL, metrics=Metrics())


def test_moved_slots_are_followed_and_learned(own: Cluster) -> None:
    metrics = Metrics()
    tier = tier_on(own, metrics, deadline_s=10.0)
    run = make_run(30, seed=3)
    assert all(tier.write(run, blocks_of(run)))
    ids = own.ids()
    source = next(number for number, admin in enumerate(own.admins) if admin.dbsize())
    target = (source + 1) % 3
    names = own.admins[source].keys()
    assert names
    slots = {own.admins[source].execute_command("CLUSTER KEYSLOT", name) for name in names}
    for slot in slots:
        own.admins[target].execute_command("CLUSTER SETSLOT", slot, "IMPORTING", ids[source])
        own.admins[source].execute_command("CLUSTER SETSLOT", slot, "MIGRATING", ids[target])
    # Half of the keys go: now the source answers ASK for them, and serves the others itself.
    moved = names[: len(names) // 2 + 1]
    address = ("127.0.0.1", own.servers[target].port)
    for name in moved:
        own.admins[source].migrate(*address, name, 0, 5000)
    assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]
    assert tier.contains(run.keys) == [True] * 30
    new = make_run(30, seed=4)
    assert all(tier.write(new, blocks_of(new)))
    for name in own.admins[source].keys("*"):
        if own.admins[source].execute_command("CLUSTER KEYSLOT", name) in slots:
            own.admins[source].migrate(*address, name, 0, 5000)
    for slot in slots:
        for number in (target, source, 3 - source - target):
            own.admins[number].execute_command("CLUSTER SETSLOT", slot, "NODE", ids[target])
    # Now the source answers MOVED.
    assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]
    assert read_blocks(tier, new.keys) == [block_of(key) for key in new.keys]
    tier.delete(run.keys)
    assert tier.contains(run.keys) == [False] * 30
    assert metrics.misses.value("redis") == 0 and metrics.tier_down.value("redis") == 0
    tier.close()


def test_dead_primary_is_misses_for_its_keys_only(own: Cluster) -> None:
    metrics = Metrics()
    tier = tier_on(own, metrics)
    run = make_run(60, seed=5)
    assert all(tier.write(run, blocks_of(run)))
    theirs = held_by(own, 1)
    assert 0 < len(theirs) < 60
    own.servers[1].kill()
    for _ in range(10):
        start = time.monotonic()
        found = read_blocks(tier, run.keys)
        assert time.monotonic() - start < 4
        assert found == [None if key in theirs else block_of(key) for key in run.keys]
    reasons = {reason: metrics.misses.value("redis", reason) for reason in Miss}
    assert reasons[Miss.FAILED] + reasons[Miss.DOWN] + reasons[Miss.LATE] == 10 * len(theirs) and reasons[Miss.DOWN]
    assert metrics.tier_down.value("redis") == 1
    tier.close()


def test_hanging_primary_costs_one_deadline_and_then_nothing(own: Cluster) -> None:
    metrics = Metrics()
    tier = tier_on(own, metrics, deadline_s=0.5)
    run = make_run(60, seed=6)
    assert all(tier.write(run, blocks_of(run)))
    theirs = held_by(own, 2)
    own.servers[2].pause()
    took = []
    for _ in range(8):
        start = time.monotonic()
        found = read_blocks(tier, run.keys)
        took.append(time.monotonic() - start)
        # Served in turn, nodes after the one that hangs are late, too; nothing is ever wrong.
        assert all(got in (None, block_of(key)) for key, got in zip(run.keys, found, strict=True))
    assert max(took) < 1.5
    assert found == [None if key in theirs else block_of(key) for key in run.keys]
    own.servers[2].resume()
    tier.close()


def test_cluster_that_is_not_up_yet_is_down_and_comes_up() -> None:
    now = [0.0]
    with EmbeddedValkey(port=0) as placeholder:
        port = placeholder.port
    assert port is not None
    metrics = Metrics()
    url = f"redis+cluster://127.0.0.1:{port}"
    tier = RedisTier(url, layout=SMALL, metrics=metrics, clock=lambda: now[0], down_s=5.0)
    run = make_run(4, seed=7)
    assert tier.write(run, blocks_of(run)) == [False] * 4 and tier.contains(run.keys) == [False] * 4
    assert metrics.saves_dropped.value("redis", Miss.DOWN) == 4 and metrics.misses.value("redis", Miss.DOWN) == 4
    with EmbeddedValkey(port=port, options=OPTIONS) as server, redis.Redis.from_url(server.url) as admin:
        admin.execute_command("CLUSTER ADDSLOTSRANGE", 0, SLOTS - 1)
        end = time.monotonic() + 20
        while admin.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
            assert time.monotonic() < end
        now[0] += 6
        assert all(tier.write(run, blocks_of(run)))
        assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]
    tier.close()


def test_slots_that_nobody_serves_are_misses() -> None:
    with EmbeddedValkey(port=0, options=OPTIONS) as server, redis.Redis.from_url(server.url) as admin:
        admin.execute_command("CLUSTER ADDSLOTSRANGE", 0, SLOTS // 2)
        end = time.monotonic() + 20
        while admin.execute_command("CLUSTER INFO")["cluster_state"] != "ok":
            assert time.monotonic() < end
        metrics = Metrics()
        tier = RedisTier(server.tcp_url.replace("redis://", "redis+cluster://"), layout=SMALL, metrics=metrics)
        run = make_run(40, seed=8)
        saved = tier.write(run, blocks_of(run))
        assert 0 < sum(saved) < 40
        expected = [block_of(key) if ok else None for key, ok in zip(run.keys, saved, strict=True)]
        assert read_blocks(tier, run.keys) == expected
        assert metrics.saves_dropped.value("redis", Miss.FAILED) == metrics.misses.value("redis", Miss.FAILED) > 0
        tier.close()
