"""The Redis tier against real servers: the contract of tiers, and what is particular to this one."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import redis

from tierkv.keys import Key
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.testing import SMALL, TierContract, block_of, blocks_of, make_run, read_blocks
from tierkv.tiers.base import Tier
from tierkv.tiers.redis import RedisTier
from tierkv.valkey import EmbeddedValkey

pytestmark = pytest.mark.redis


class RedisContract(TierContract):
    """The contract on one server; subclasses say how to reach it."""

    scans = False
    options: ClassVar[dict[str, Any]] = {}
    server: EmbeddedValkey

    @pytest.fixture(autouse=True)
    def _server(self, valkey: EmbeddedValkey) -> None:
        self.server = valkey

    def url(self) -> str:
        return self.server.url

    def make(self, tmp_path: Path, metrics: Metrics) -> Tier:
        with redis.Redis.from_url(self.server.url) as client:
            client.flushall()
        return self.reopen(tmp_path, metrics)

    def reopen(self, tmp_path: Path, metrics: Metrics) -> Tier:
        return RedisTier(self.url(), layout=SMALL, metrics=metrics, **self.options)

    def corrupt(self, tier: Tier, key: Key) -> None:
        with redis.Redis.from_url(self.server.url) as client:
            name = b"tierkv:" + key
            last = client.getrange(name, -1, -1)
            client.setrange(name, client.strlen(name) - 1, bytes([last[0] ^ 1]))


class TestOverUnixSocket(RedisContract):
    pass


class TestOverTcp(RedisContract):
    def url(self) -> str:
        return self.server.tcp_url


class TestWithLz4(RedisContract):
    options: ClassVar[dict[str, Any]] = {"codec": "lz4"}


class TestWithExpiryAndTouch(RedisContract):
    options: ClassVar[dict[str, Any]] = {"ttl_s": 60.0, "touch": True}


def open_tier(url: str, metrics: Metrics | None = None, **options: Any) -> RedisTier:
    return RedisTier(url, **({"layout": SMALL, "metrics": metrics or Metrics()} | options))


def received_bytes(client: "redis.Redis") -> int:
    return int(client.info("stats")["total_net_input_bytes"])


def test_blocks_expire_and_only_touch_renews_them(valkey: EmbeddedValkey) -> None:
    run = make_run(2, seed=1)
    plain = open_tier(valkey.url, prefix="ttl", ttl_s=1000.0)
    touching = open_tier(valkey.url, prefix="ttl", ttl_s=5000.0, touch=True)
    assert all(plain.write(run, blocks_of(run)))
    with redis.Redis.from_url(valkey.url) as client:
        names = [b"ttl:" + key for key in run.keys]
        assert all(990_000 < client.pttl(name) <= 1_000_000 for name in names)
        read_blocks(plain, run.keys)
        assert all(client.pttl(name) <= 1_000_000 for name in names)
        assert all(touching.write(run, blocks_of(run)))  # present: keeps its age
        assert all(client.pttl(name) <= 1_000_000 for name in names)
        assert read_blocks(touching, run.keys) == [block_of(key) for key in run.keys]
        assert all(4_990_000 < client.pttl(name) <= 5_000_000 for name in names)
        client.pexpire(names[0], 1)
        while client.exists(names[0]):
            pass
    assert read_blocks(plain, run.keys) == [None, block_of(run.keys[1])]
    plain.delete(run.keys)
    plain.close(), touching.close()


def test_rewriting_asks_first_and_sends_only_what_is_absent(valkey: EmbeddedValkey) -> None:
    metrics = Metrics()
    tier = open_tier(valkey.url, metrics, prefix="again")
    run = make_run(200, seed=2)
    blocks = blocks_of(run)
    with redis.Redis.from_url(valkey.url) as client:
        assert all(tier.write(run, blocks))
        assert all(tier.write(run, blocks))  # it could not know yet
        tier.delete(run.keys[50:60])
        before = received_bytes(client)
        assert all(tier.write(run, blocks))
        assert received_bytes(client) - before < 20 * SMALL.block_bytes
    assert metrics.bytes_written.value("redis") == 210 * SMALL.block_bytes
    assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]
    tier.delete(run.keys)
    tier.close()


def test_tiers_of_other_codecs_read_each_other(valkey: EmbeddedValkey) -> None:
    raw, packing = (open_tier(valkey.url, prefix="mixed", codec=codec) for codec in ("raw", "lz4"))
    even, odd = make_run(3, seed=3), make_run(3, seed=4)
    smooth = [memoryview(bytes(range(256)) * (SMALL.block_bytes // 256)) for _ in range(3)]
    assert all(raw.write(even, smooth)) and all(packing.write(odd, smooth))
    with redis.Redis.from_url(valkey.url) as client:
        assert client.strlen(b"mixed:" + odd.keys[0]) < client.strlen(b"mixed:" + even.keys[0]) // 2
    for tier in (raw, packing):
        assert read_blocks(tier, [*even.keys, *odd.keys]) == [bytes(smooth[0])] * 6
    raw.delete([*even.keys, *odd.keys])
    raw.close(), packing.close()


def test_prefixes_keep_tiers_apart(valkey: EmbeddedValkey) -> None:
    one, two = open_tier(valkey.url, prefix="one"), open_tier(valkey.url, prefix="two")
    run = make_run(3, seed=5)
    assert all(one.write(run, blocks_of(run)))
    assert two.contains(run.keys) == [False] * 3
    two.delete(run.keys)
    assert one.contains(run.keys) == [True] * 3
    one.delete(run.keys)
    one.close(), two.close()


@pytest.mark.parametrize("gap", [None, 0, 255, 256, 257, 511, 512, 599, 8191, 8192, 8999])
def test_long_probes_are_exact_up_to_the_first_gap(valkey: EmbeddedValkey, gap: int | None) -> None:
    layout = Layout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float16", block_tokens=1)
    tier = open_tier(valkey.url, layout=layout, prefix="probe", deadline_s=20.0)
    run = make_run(9000, seed=6, layout=layout)
    blank = memoryview(bytes(layout.block_bytes))
    assert all(tier.write(run, [blank] * 9000))
    if gap is None:
        assert tier.contains(run.keys) == [True] * 9000
    else:
        tier.delete(run.keys[gap : gap + 1])
        found = tier.contains(run.keys)
        assert found[: gap + 1] == [True] * gap + [False] and not any(found[gap + 256 :])
        near = run.keys[max(0, gap - 200) : gap + 200]
        assert tier.contains(near) == [key != run.keys[gap] for key in near]
    tier.close()


def test_large_batches_go_in_windows(valkey: EmbeddedValkey) -> None:
    layout = Layout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16")
    tier = open_tier(valkey.url, layout=layout, prefix="large", deadline_s=30.0)
    run = make_run(20, seed=7, layout=layout)  # 40 MiB: three windows
    assert all(tier.write(run, blocks_of(run, layout)))
    assert read_blocks(tier, run.keys, layout) == [block_of(key, layout) for key in run.keys]
    tier.delete(run.keys)
    tier.close()
