"""What `tierkv inspect redis://…` finds."""

import pytest
import redis

from tests.redis_servers import Scripted
from tests.test_redis_cluster import Cluster, cluster  # noqa: F401  a fixture
from tierkv.errors import ConfigError, TierError
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.testing import SMALL, blocks_of, make_run
from tierkv.tiers.redis import RedisTier
from tierkv.tiers.redis_inspect import inspect_blocks, inspect_server
from tierkv.valkey import EmbeddedValkey

pytestmark = pytest.mark.redis


def fill(url: str, prefix: str, layout: Layout = SMALL, **options: object) -> None:
    """A trunk of ten blocks, two branches of five and three, and a path of its own of two: four runs."""
    tier = RedisTier(url, **({"layout": layout, "metrics": Metrics(), "prefix": prefix} | options))  # type: ignore[arg-type]
    trunk = make_run(10, seed=1, layout=layout)
    branches = [make_run(5, seed=2, layout=layout, after=trunk), make_run(3, seed=3, layout=layout, after=trunk)]
    for run in (trunk, *branches, make_run(2, seed=4, layout=layout)):
        assert all(tier.write(run, blocks_of(run, layout)))
    tier.close()


def test_report_counts_runs_blocks_tokens_and_bytes(valkey: EmbeddedValkey) -> None:
    fill(valkey.url, "look", ttl_s=500.0)
    with redis.Redis.from_url(valkey.url) as client:
        client.set("look:something else", b"x")
        client.set(b"look:" + bytes(32), b"damaged")
    report = inspect_server(valkey.url, prefix="look")
    assert (report.runs, report.blocks, report.tokens, report.damaged) == (4, 20, 20 * SMALL.block_tokens, 1)
    assert report.payload_bytes == 20 * SMALL.block_bytes and report.stored_bytes == 20 * (SMALL.block_bytes + 192)
    assert report.codecs == {"raw": 20} and report.servers == 1
    assert report.layouts[SMALL.fingerprint.hex()]["head_dim"] == SMALL.head_dim
    assert report.soonest_expiry_s is not None and 400 < report.soonest_expiry_s <= 500
    assert report.used is not None and report.idle_s is not None and report.idle_s < 100


def test_two_layouts_and_special_characters_in_the_prefix(valkey: EmbeddedValkey) -> None:
    other = Layout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32", block_tokens=4)
    prefix = "odd[*]?^{tag}\\"
    fill(valkey.url, prefix)
    fill(valkey.url, prefix, other)
    report = inspect_server(valkey.url, prefix=prefix)
    assert (report.blocks, report.tokens) == (40, 20 * SMALL.block_tokens + 20 * 4)
    assert len(report.layouts) == 2 and inspect_server(valkey.url, prefix="odd").blocks == 0


def test_without_a_layout_tokens_are_unknown(valkey: EmbeddedValkey) -> None:
    fill(valkey.url, "bare")
    with redis.Redis.from_url(valkey.url) as client:
        for name in client.keys("bare:layout:*"):
            client.delete(name)
    assert inspect_server(valkey.url, prefix="bare").tokens is None


def test_looking_is_not_use_and_comes_in_batches(valkey: EmbeddedValkey) -> None:
    layout = Layout(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float16", block_tokens=1)
    tier = RedisTier(valkey.url, layout=layout, metrics=Metrics(), prefix="many", deadline_s=20.0)
    run = make_run(3000, seed=9, layout=layout)
    assert all(tier.write(run, blocks_of(run, layout)))
    batches = list(inspect_blocks(valkey.url, prefix="many"))
    assert sum(map(len, batches)) == 3000 and max(map(len, batches)) < 1500
    assert {block.key for batch in batches for block in batch} == set(run.keys)
    tier.delete(run.keys)
    tier.close()


def test_a_cluster_is_looked_at_whole(cluster: Cluster) -> None:  # noqa: F811  as above
    fill(cluster.url, "whole")
    report = inspect_server(cluster.url, prefix="whole")
    assert (report.servers, report.runs, report.blocks, report.tokens) == (3, 4, 20, 20 * SMALL.block_tokens)


def test_server_that_is_not_there_is_a_one_line_error() -> None:
    with EmbeddedValkey(port=0) as server:
        url = server.tcp_url
    with pytest.raises(TierError, match="does not answer: start the server") as raised:
        inspect_server(url.replace("redis://", "redis://me:hidden@"))
    assert "hidden" not in str(raised.value)


def test_server_that_makes_no_sense_is_an_error() -> None:
    with Scripted(lambda command, send: send(b"-ERR no\r\n")) as server, pytest.raises(TierError, match="refuses: no"):
        inspect_server(server.url)


def test_empty_prefix_is_an_error(valkey: EmbeddedValkey) -> None:
    with pytest.raises(ConfigError, match="--prefix is empty"):
        inspect_server(valkey.url, prefix="")
