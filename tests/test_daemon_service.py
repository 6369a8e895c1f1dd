"""The daemon for those who run it: pins, forgetting, flushing, Redis below it, events, figures, its page in a browser."""

import asyncio
import json
import re
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import msgpack
import pytest

from tests import browser
from tests.browser import chromium, page
from tests.daemon_parts import PATIENCE_S, RunningDaemon, config_of, running
from tests.daemon_stats import document, figures
from tierkv.cli import main
from tierkv.config import Config, HostConfig, RedisConfig
from tierkv.daemon.blocks import Blocks
from tierkv.daemon.protocol import State
from tierkv.errors import RefusedError
from tierkv.keys import Namespace, chain
from tierkv.metrics import Metrics
from tierkv.mover import AHEAD_LANE
from tierkv.testing import SMALL, FakeClock, block_of, blocks_of, make_run
from tierkv.tiers.base import Run
from tierkv.valkey import EmbeddedValkey

HOST, DISK = 1, 2


def written(blocks: Blocks, length: int, *, seed: int) -> Run:
    run = make_run(length, seed=seed)
    assert set(blocks.write(run, blocks_of(run))) == {State.HERE}
    return run


def read(blocks: Blocks, run: Run) -> list[bytes | None]:
    outs = [bytearray(SMALL.block_bytes) for _ in run.keys]
    states = blocks.read(run.keys, [memoryview(out) for out in outs], deadline_s=10.0)
    return [bytes(out) if state is State.HERE else None for out, state in zip(outs, states, strict=True)]


def named(daemon: RunningDaemon, namespace: Namespace) -> Blocks:
    return Blocks(daemon.client(), namespace=namespace, root=namespace.root())


def run_in(namespace: Namespace, length: int) -> Run:
    tokens, root = make_run(length, seed=5).tokens, namespace.root()
    return Run(root, root, 0, tuple(chain(root, tokens, block_tokens=namespace.layout.block_tokens)), tokens)


# -- pins -------------------------------------------------------------------------------------------------------------------


def test_a_pinned_prefix_survives_what_would_push_it_out(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    daemon = RunningDaemon(replace(config, host=HostConfig(capacity="512KiB", policy="lru")))
    with daemon.blocks() as blocks:
        kept = written(blocks, 20, seed=1)
        assert blocks.pin(kept.keys, ttl_s=100.0)[1] == len(kept.keys)
        for seed in range(2, 20):
            run = make_run(20, seed=seed)
            blocks.write(run, blocks_of(run))
        assert read(blocks, kept) == [block_of(key) for key in kept.keys]
        assert daemon.pool.index.stats().tiers[HOST].evicted > 100
    daemon.stop()


def test_a_pin_ends_when_its_time_is_over(tmp_path: Path) -> None:
    clock = FakeClock()
    with running(tmp_path, clock=clock) as daemon, daemon.blocks() as blocks:
        blocks.pin(written(blocks, 4, seed=1).keys, ttl_s=5.0)
        clock.advance(4.9)
        daemon.do(daemon.service.tick)
        assert len(daemon.service.pins) == 1
        clock.advance(0.2)
        daemon.do(daemon.service.tick)
        assert not daemon.service.pins and daemon.at_rest()


def test_a_prefix_is_pinned_by_the_key_that_status_shows(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, daemon.blocks() as blocks:
        run = written(blocks, 6, seed=1)
        assert blocks.seek(run) == 6
        client = blocks.client
        shown = client.stats()["prefixes"][0]["key"]
        assert client.pin(shown, ttl_s=60.0)["blocks"] == 6
        (pin,) = client.stats()["pins"]
        assert pin["blocks"] == 6 and pin["key"] == run.keys[-1].hex()[:16] and 50 < pin["expires"] - time.time() <= 60
        assert client.unpin() == 1 and daemon.at_rest()
        with pytest.raises(RefusedError, match="no prefix of that key"):
            client.pin("00" * 8, ttl_s=60.0)


@pytest.mark.parametrize(("blocks_wanted", "ttl_s", "said"), [(2000, 10.0, "pins may keep"), (3, 0.0, "above 0")])
def test_a_pin_that_cannot_be_is_refused(tmp_path: Path, blocks_wanted: int, ttl_s: float, said: str) -> None:
    with running(tmp_path) as daemon, daemon.blocks() as blocks:
        with pytest.raises(RefusedError, match=said):
            blocks.pin(make_run(blocks_wanted, seed=1).keys, ttl_s=ttl_s)
        with pytest.raises(RefusedError, match="pin of nothing"):
            blocks.pin(make_run(3, seed=2).keys, ttl_s=1.0)
        assert daemon.at_rest()


# -- forgetting and writing down --------------------------------------------------------------------------------------------


def test_a_tenants_blocks_are_forgotten_in_every_tier_and_no_others(tmp_path: Path) -> None:
    spaces = [Namespace(model, SMALL, tenant=tenant) for model in ("a", "b") for tenant in ("x", "y")]
    with running(tmp_path, disk="16MiB") as daemon:
        every = [named(daemon, space) for space in spaces]
        runs = [run_in(space, 5) for space in spaces]
        for blocks, run in zip(every, runs, strict=True):
            blocks.write(run, blocks_of(run))
        client = every[0].client
        client.flush()
        assert client.forget(tenant="x", model="a") == {"host": 5, "disk": 5}
        found = [blocks.seek(run) for blocks, run in zip(every, runs, strict=True)]
        assert found == [0, 5, 5, 5]
        assert client.forget(model="b") == {"host": 10, "disk": 10}
        assert [blocks.seek(run) for blocks, run in zip(every, runs, strict=True)] == [0, 5, 0, 0]
        for blocks in every:
            blocks.close()
            blocks.client.close()
    with running(tmp_path, disk="16MiB") as daemon:
        again = named(daemon, spaces[1])
        again.attach()
        assert daemon.pool.index.stats().tiers[DISK].held == 5
        again.close()
        again.client.close()


def test_what_was_not_used_for_some_time_is_forgotten(tmp_path: Path) -> None:
    clock = FakeClock()
    with running(tmp_path, clock=clock) as daemon, daemon.blocks() as blocks:
        old = written(blocks, 4, seed=1)
        clock.advance(3600.0)
        daemon.do(daemon.service.tick)  # notes which uses were before
        young = written(blocks, 4, seed=2)
        clock.advance(60.0)
        assert blocks.client.forget(older_s=7200.0) == {"host": 0}
        assert blocks.client.forget(older_s=60.0) == {"host": 4}
        assert (blocks.seek(old), blocks.seek(young)) == (0, 4)
        assert blocks.client.forget(older_s=0.0) == {"host": 4}
        with pytest.raises(RefusedError, match="forget what"):
            blocks.client.forget()


def test_what_a_daemon_before_left_on_disk_is_forgotten_by_tenant_too(tmp_path: Path) -> None:
    theirs, ours = Namespace("test", SMALL, tenant="theirs"), Namespace("test", SMALL, tenant="ours")
    runs = [run_in(namespace, 6) for namespace in (theirs, ours)]
    with running(tmp_path, disk="16MiB") as daemon:
        for namespace, run in zip((theirs, ours), runs, strict=True):
            blocks = named(daemon, namespace)
            assert set(blocks.write(run, blocks_of(run))) == {State.HERE}
            blocks.client.close()
    with running(tmp_path, disk="16MiB") as daemon:
        blocks = named(daemon, ours)
        blocks.attach()  # theirs never comes back
        assert blocks.client.forget(tenant="theirs") == {"host": 0, "disk": 6}
        assert blocks.presence(runs[0].keys) == bytes(6) and blocks.presence(runs[1].keys) == bytes([DISK + 1]) * 6
        blocks.client.close()
    with running(tmp_path, disk="16MiB") as daemon:
        blocks = named(daemon, theirs)
        assert blocks.presence(runs[0].keys) == bytes(6)
        blocks.client.close()


def test_blocks_of_nobody_that_is_known_are_forgotten_with_any_tenants(tmp_path: Path) -> None:
    run, step = make_run(6, seed=1), SMALL.block_tokens * 4
    rest = Run(run.root, run.keys[2], 3, run.keys[3:], run.tokens[3 * step :])
    with running(tmp_path, disk="16MiB") as daemon, daemon.blocks() as blocks:
        assert set(blocks.write(rest, blocks_of(rest))) == {State.HERE}
    with running(tmp_path, disk="16MiB") as daemon, daemon.blocks() as blocks:
        assert blocks.presence(rest.keys) == bytes([DISK + 1]) * 3
        assert blocks.client.forget(tenant="whoever") == {"host": 0, "disk": 3}
        assert blocks.presence(rest.keys) == bytes(3)


def test_a_pinned_block_is_not_forgotten(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, daemon.blocks() as blocks:
        run = written(blocks, 4, seed=1)
        blocks.pin(run.keys[:2], ttl_s=60.0)
        assert blocks.client.forget(older_s=0.0) == {"host": 2}
        assert blocks.seek(run) == 2
        blocks.client.unpin()


def test_a_flush_writes_down_what_spill_would_have_left_in_memory(tmp_path: Path) -> None:
    with running(tmp_path, disk="16MiB", copy_down="spill") as daemon, daemon.blocks() as blocks:
        run = written(blocks, 30, seed=1)
        assert daemon.pool.index.stats().tiers[DISK].held == 0
        assert blocks.client.flush() == {"written": 30, "complete": True}
        assert daemon.pool.index.stats().tiers[DISK].held == 30
        assert blocks.client.drain()["complete"] is True
        with pytest.raises(RefusedError, match="about to stop"):
            blocks.write(make_run(1, seed=2), blocks_of(make_run(1, seed=2)))
        assert read(blocks, run) == [block_of(key) for key in run.keys]


def test_a_flush_does_not_wait_beyond_its_time_for_what_runs_before_it(tmp_path: Path) -> None:
    with running(tmp_path, disk="16MiB") as daemon, daemon.blocks() as blocks:
        written(blocks, 3, seed=1)
        over = threading.Event()
        assert daemon.service.mover.submit(AHEAD_LANE, over.wait, blocks=1)
        try:
            assert blocks.client.flush(deadline_s=0.1) == {"written": 0, "complete": False}
        finally:
            over.set()
        assert blocks.client.flush()["complete"] is True


def test_a_verify_ends_when_nobody_waits_for_it(tmp_path: Path) -> None:
    with running(tmp_path, disk="16MiB") as daemon, daemon.blocks() as blocks:
        written(blocks, 3, seed=1)
        assert daemon._loop
        for gone, checked in ((True, 0), (False, 3)):
            told: list[dict[str, Any]] = []
            verify = daemon.service.verify(told.append, lambda gone=gone: gone)
            found = asyncio.run_coroutine_threadsafe(verify, daemon._loop).result(PATIENCE_S)
            assert found["tiers"]["host"] == {"checked": checked, "bad": 0}
            assert bool(told) is not gone


@pytest.mark.parametrize(
    "words",
    [
        ("status", "--url", "nonsense"),
        ("status", "--url", "tcp://127.0.0.1"),
        ("forget",),
        ("flush", "--within", "0s"),
        ("pin", "no key"),
        ("forget", "--older-than", "-5"),
    ],
)
def test_what_is_asked_wrongly_is_one_line_and_exit_code_2(
    words: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["daemon", *words]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and said.err.count("\n") == 1 and not said.out


def test_what_a_daemon_before_left_is_verified_and_forgotten_before_any_client_comes(tmp_path: Path) -> None:
    with running(tmp_path, disk="16MiB") as daemon, daemon.blocks() as blocks:
        written(blocks, 5, seed=1)
        blocks.client.flush()
    with running(tmp_path, disk="16MiB") as daemon, closing(daemon.client()) as client:
        assert client.verify() == {"host": {"checked": 0, "bad": 0}, "disk": {"checked": 5, "bad": 0}}
        with pytest.raises(RefusedError, match="the models here are 'test'"):
            client.forget(model="tset")
        assert client.forget(model="test") == {"host": 0, "disk": 5}


def test_only_so_many_namespaces_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tierkv.daemon.pool.MAX_NAMESPACES", 3)
    with running(tmp_path) as daemon:
        every = [named(daemon, Namespace(str(number), SMALL)) for number in range(4)]
        for blocks in every[:3]:
            blocks.attach()
        with pytest.raises(RefusedError, match="as many as a daemon tells apart"):
            every[3].attach()
        for blocks in every:
            blocks.close()
            blocks.client.close()


# -- Redis below it ---------------------------------------------------------------------------------------------------------


@contextmanager
def over_redis(folder: Path, server: EmbeddedValkey) -> Iterator[tuple[RunningDaemon, Blocks]]:
    config = config_of(folder)
    daemon = RunningDaemon(
        Config(host=config.host, server=config.server, redis=RedisConfig(url=server.url), disk=config.disk)
    )
    try:
        with daemon.blocks() as blocks:
            yield daemon, blocks
    finally:
        daemon.stop()


@pytest.mark.redis
def test_what_another_machine_left_in_redis_is_found_and_lifted(tmp_path: Path) -> None:
    with EmbeddedValkey() as server:
        with over_redis(tmp_path, server) as (_, blocks):
            run = written(blocks, 12, seed=1)
            blocks.client.flush()
        with over_redis(tmp_path, server) as (daemon, blocks):
            longer = make_run(3, seed=2, after=run)
            asked = Run(run.root, run.parent, 0, run.keys + longer.keys, run.tokens + longer.tokens)
            assert blocks.seek(asked) == 12
            assert read(blocks, run) == [block_of(key) for key in run.keys]
            assert blocks.presence(run.keys) == bytes([HOST + 1]) * 12
            metrics = daemon.service.metrics
            assert metrics.daemon_lookup_blocks.value("redis") == 12 and metrics.missed_blocks.value("never_seen") == 3
            server.kill()
            assert blocks.seek(make_run(2, seed=9)) == 0
            assert read(blocks, run) == [block_of(key) for key in run.keys]


@pytest.mark.redis
def test_keys_that_are_not_those_of_their_tokens_are_not_taken_from_redis(tmp_path: Path) -> None:
    with EmbeddedValkey() as server:
        with over_redis(tmp_path, server) as (_, blocks):
            run = written(blocks, 4, seed=1)
            blocks.client.flush()
        with over_redis(tmp_path, server) as (daemon, blocks):
            lie = Run(run.root, run.parent, 0, run.keys, make_run(4, seed=2).tokens)
            assert blocks.seek(lie) == 0
            assert daemon.pool.leading(b"".join(run.keys)) == 0


# -- events and figures -----------------------------------------------------------------------------------------------------


def test_subscribers_hear_what_is_stored_and_removed(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, daemon.blocks() as blocks, closing(daemon.client()) as other:
        events = other.events()
        blocks.attach()
        assert [event["kind"] for event in next(events)[1]] == ["cleared"]
        written(blocks, 1, seed=9)
        first = next(events)[1]
        run = written(blocks, 3, seed=1)
        seen = [event for _ in range(1) for event in next(events)[1]]
        assert [event["kind"] for event in first] == ["cleared", "stored"]
        assert [(e["kind"], e["tier"], e["keys"], e["tokens"]) for e in seen] == [
            ("stored", "host", b"".join(run.keys), run.tokens)
        ]
        blocks.client.forget(older_s=0.0)
        gone = next(events)[1]
        assert {event["kind"] for event in gone} == {"removed"}
        assert b"".join(run.keys) in [event["keys"] for event in gone]
        events.close()


def test_who_subscribes_beside_others_is_told_to_forget_what_he_knew(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, daemon.blocks() as blocks, closing(daemon.client()) as other:
        blocks.attach()
        with closing(other.events()) as first, closing(other.events()) as second:
            assert [event["kind"] for event in next(first)[1]] == ["cleared"]
            written(blocks, 1, seed=1)
            while "stored" not in [event["kind"] for event in next(first)[1]]:
                pass
            before = daemon.do(lambda: daemon.service.logs[1].cleared().sequence)
            assert next(second) == (1, [{"kind": "cleared", "sequence": before}])
            run = written(blocks, 2, seed=3)
            (stored,) = next(second)[1]
            assert (stored["keys"], stored["sequence"]) == (b"".join(run.keys), before + 1)


def test_no_block_is_told_to_begin_a_prompt_that_does_not(tmp_path: Path) -> None:
    run, step = make_run(6, seed=1), SMALL.block_tokens * 4
    rest = Run(run.root, run.keys[2], 3, run.keys[3:], run.tokens[3 * step :])
    with running(tmp_path) as daemon, daemon.blocks() as blocks, closing(daemon.client()) as other:
        blocks.attach()
        with closing(other.events()) as events:
            next(events)
            assert set(blocks.write(rest, blocks_of(rest))) == {State.HERE}
            told: list[dict[str, Any]] = []
            while "stored" not in [event["kind"] for event in told]:
                told = next(events)[1]
            assert (told[-1]["parent"], told[-1]["keys"]) == (run.keys[2], b"".join(rest.keys))
            assert told[-1]["depth"] > 0, "its parent is a block, not the root of a namespace"


def test_routers_hear_of_blocks_as_vllm_tells_them(tmp_path: Path) -> None:
    zmq = pytest.importorskip("zmq", reason="pyzmq is not installed")
    with running(tmp_path, events="tcp://127.0.0.1:*") as daemon, daemon.blocks() as blocks:
        assert daemon.service.publisher
        with zmq.Context() as context, context.socket(zmq.SUB) as router:
            router.setsockopt(zmq.RCVTIMEO, int(1000 * PATIENCE_S))
            router.subscribe(b"kv-events")
            router.connect(daemon.service.publisher.endpoint)
            told: list[dict[str, Any]] = []
            seed = 0
            while not any(event["type"] == "BlockStored" for event in told):  # it hears nothing before it has joined
                seed += 1
                run = written(blocks, 2, seed=seed)
                if router.poll(1000):
                    _, _, batch = router.recv_multipart()
                    told += msgpack.unpackb(batch)[1]
        (stored, *_) = [event for event in told if event["type"] == "BlockStored"]
        assert (
            len(stored["block_hashes"]) == 2
            and stored["medium"] == "CPU"
            and stored["block_size"] == SMALL.block_tokens
        )
        assert stored["block_hashes"][0] in [int.from_bytes(key[-8:], "big") for key in run.keys]
        assert stored["parent_block_hash"] is None and len(stored["token_ids"]) == 2 * SMALL.block_tokens


def test_the_document_has_what_its_page_expects(tmp_path: Path) -> None:
    with running(tmp_path, disk="16MiB") as daemon, daemon.blocks() as blocks:
        run = written(blocks, 6, seed=1)
        blocks.seek(run)
        blocks.pin(run.keys, ttl_s=60.0)
        stats, wanted = blocks.client.stats(), document()
        assert set(wanted) <= set(stats)
        for name in ("tiers", "requests", "clients", "prefixes", "namespaces", "what_if", "pins", "queues"):
            assert stats[name] and set(wanted[name][0]) <= set(stats[name][0]), name
        assert stats["namespaces"][0]["blocks"] == 6 and stats["lookups"] == {"count": 1, "blocks": 6, "hit_blocks": 6}
        blocks.client.unpin()


def test_figures_of_two_pools_are_added_up(tmp_path: Path) -> None:
    with running(tmp_path, layouts=2) as daemon, daemon.blocks() as blocks:
        written(blocks, 3, seed=1)
        other = Namespace("other", make_layout())
        twin = named(daemon, other)
        run = run_in(other, 2)
        twin.write(run, [memoryview(bytes(other.layout.block_bytes))] * 2)
        assert daemon.service.metrics.blocks_used.value("host") == 5
        assert {space["model"]: space["blocks"] for space in twin.client.stats()["namespaces"]} == {
            "test": 3,
            "other": 2,
        }
        twin.close()
        twin.client.close()


def make_layout() -> Any:
    return type(SMALL)(num_layers=1, num_kv_heads=1, head_dim=8, dtype="float32")


@pytest.mark.skipif(browser.PROGRAM is None, reason=browser.ABSENT)
def test_the_page_of_a_daemon_at_work_equals_its_metrics(tmp_path: Path) -> None:
    async def look(address: str, port: int) -> dict[str, str]:
        async with page(address) as tab:
            await tab.open(f"http://127.0.0.1:{port}/")
            await tab.until("!!document.querySelector('article')")
            script = "JSON.stringify([...document.querySelectorAll('[data-figure]')].map((a) => [a.dataset.figure, a.value]))"
            assert tab.console == []
            return dict(json.loads(await tab.run(script)))

    with running(tmp_path, disk="16MiB", http="127.0.0.1:0") as daemon, daemon.blocks() as blocks:
        run = written(blocks, 30, seed=1)
        read(blocks, run)
        assert blocks.seek(run) == 30 and blocks.seek(make_run(4, seed=2)) == 0
        blocks.client.flush()
        port = int(str(daemon.service.http).rpartition(":")[2])
        with chromium(tmp_path / "profile") as address:
            shown = asyncio.run(look(address, port))
        text = urlopen(f"http://127.0.0.1:{port}/metrics").read().decode()
        stats = json.loads(urlopen(f"http://127.0.0.1:{port}/stats").read())

    def metric(name: str) -> float:
        return float(re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)[1])  # type: ignore[index]  # it must be there

    assert float(shown["tier.host.blocks"]) == metric('tierkv_blocks_used{tier="host"}') == 30
    assert float(shown["tier.disk.blocks"]) == metric('tierkv_blocks_used{tier="disk"}') == 30
    assert float(shown["tier.host.hit_blocks"]) == metric('tierkv_daemon_lookup_blocks_total{tier="host"}') == 30
    assert metric('tierkv_missed_blocks_total{reason="never_seen"}') == 4
    assert float(shown["hit_rate"]) == 30 / 34
    told = {name: value for name, value in figures(stats).items() if name.startswith(("tier.", "lookups"))}
    assert len(told) > 10
    for name, value in told.items():
        assert (float(shown[name]) if shown[name] else None) == value, name


def test_quantiles_lie_in_their_buckets() -> None:
    histogram = Metrics().daemon_request_seconds
    assert histogram.quantile(0.5, "ping") is None
    for seconds in (0.00003, 0.00003, 0.00003, 0.002):
        histogram.observe(seconds, "ping")
    low, high = histogram.quantile(0.5, "ping"), histogram.quantile(0.99, "ping")
    assert low and high and 0.000025 <= low <= 0.00005 and 0.001 <= high <= 0.0025
    histogram.observe(1e6, "ping")
    assert histogram.quantile(1.0, "ping") == 30
