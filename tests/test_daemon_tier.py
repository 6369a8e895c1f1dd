"""The daemon as a tier: the contract of tiers over every transport, and what is particular to a pool that many share."""

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest

from tests.daemon_parts import NAMESPACE, PATIENCE_S, ROOT, RunningDaemon, config_of, running
from tierkv.daemon.blocks import Blocks
from tierkv.errors import ConfigError, LayoutError, TierError
from tierkv.keys import Key, Namespace
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.testing import SMALL, TierContract, block_of, blocks_of, make_run, read_blocks
from tierkv.tiers.base import Miss, Run, Tier
from tierkv.tiers.daemon import DaemonTier

HOST, DISK = 1, 2


def tier_of(
    daemon: RunningDaemon, *, url: str | None = None, metrics: Metrics | None = None, **options: Any
) -> DaemonTier:
    client = daemon.client(url)
    return DaemonTier(client, namespace=NAMESPACE, root=ROOT, metrics=metrics or Metrics(), **options)


def place_of(daemon: RunningDaemon, key: Key) -> int:
    ((_, lease),) = daemon.pool.index.trace(key)
    with lease:
        (place,) = lease.places(HOST, lease.lo, lease.num_blocks)
        return place


def flip(daemon: RunningDaemon, key: Key, *, at: int = 100) -> None:
    """What a stray writer does, behind the daemon's back."""
    daemon.pool.slab.view(place_of(daemon, key))[at] ^= 1


class DaemonContract(TierContract):
    """The contract, with a daemon of its own for every test; subclasses say how to reach it."""

    durable = False
    scans = False
    number: ClassVar[int] = 0
    options: ClassVar[dict[str, Any]] = {}
    daemon: RunningDaemon

    @pytest.fixture(autouse=True)
    def _daemon(self, tmp_path: Path) -> Iterator[None]:
        self.daemon = RunningDaemon(config_of(tmp_path, **self.options))
        yield
        self.daemon.until(self.daemon.at_rest, "all that was lent and reserved has come back")
        for pool in self.daemon.service.pools.values():
            pool.index.check()
        self.daemon.stop()

    def make(self, tmp_path: Path, metrics: Metrics) -> Tier:
        return tier_of(self.daemon, url=self.daemon.urls[self.number], metrics=metrics)

    def corrupt(self, tier: Tier, key: Key) -> None:
        flip(self.daemon, key)


class TestOverSharedMemory(DaemonContract):
    def test_blocks_go_through_memory(self, tier: Tier) -> None:
        assert isinstance(tier, DaemonTier) and tier.blocks.shares_memory


class TestOverTcp(DaemonContract):
    number = 1

    def test_blocks_go_through_the_socket(self, tier: Tier) -> None:
        assert isinstance(tier, DaemonTier) and not tier.blocks.shares_memory


class TestOverUnixSocketAlone(DaemonContract):
    def make(self, tmp_path: Path, metrics: Metrics) -> Tier:
        tier = tier_of(self.daemon, metrics=metrics)
        tier.blocks = Blocks(tier.blocks.client, namespace=NAMESPACE, root=ROOT, shares=False)
        tier.blocks.attach()
        return tier

    def test_blocks_go_through_the_socket(self, tier: Tier) -> None:
        assert isinstance(tier, DaemonTier) and not tier.blocks.shares_memory


class TestOverADisk(DaemonContract):
    durable = True
    options: ClassVar[dict[str, Any]] = {"disk": "64MiB", "copy_down": "spill"}

    def reopen(self, tmp_path: Path, metrics: Metrics) -> Tier:
        self.daemon.stop()
        self.daemon = RunningDaemon(config_of(tmp_path, **self.options))
        return self.make(tmp_path, metrics)


# -- one pool for all -------------------------------------------------------------------------------------------------------


def test_what_one_writes_all_read_whatever_their_transport(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        tiers = [tier_of(daemon, url=url) for url in (*daemon.urls, daemon.urls[0])]
        for seed, writer in enumerate(tiers):
            run = make_run(5, seed=seed)
            assert all(writer.write(run, blocks_of(run)))
            for reader in tiers:
                assert read_blocks(reader, run.keys) == [block_of(key) for key in run.keys]
        for tier in tiers:
            tier.close()


def test_blocks_of_another_layout_are_refused_with_what_to_set(tmp_path: Path) -> None:
    other = Namespace("test", Layout(num_layers=3, num_kv_heads=2, head_dim=20, dtype="bfloat16"))
    with running(tmp_path) as daemon:
        tier_of(daemon).close()
        with pytest.raises(ConfigError, match=r"server\.layouts"):
            DaemonTier(daemon.client(), namespace=other, root=other.root(), metrics=Metrics())


def test_a_layout_too_large_for_the_host_is_a_configuration_error(tmp_path: Path) -> None:
    huge = Namespace("test", Layout(num_layers=1 << 20, num_kv_heads=1 << 20, head_dim=1 << 20, dtype="float32"))
    with running(tmp_path) as daemon:
        with pytest.raises(ConfigError, match=r"host\.capacity"):
            DaemonTier(daemon.client(), namespace=huge, root=huge.root(), metrics=Metrics())
        tier_of(daemon).close()  # and has taken nobody's place


def test_device_pools_larger_than_the_host_are_a_configuration_error(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, pytest.raises(ConfigError, match="pure churn"):
        tier_of(daemon, device_bytes=32 << 20)


def test_layouts_with_a_share_each_do_not_mix(tmp_path: Path) -> None:
    other = Namespace("test", Layout(num_layers=3, num_kv_heads=2, head_dim=20, dtype="bfloat16"))
    with running(tmp_path, layouts=2) as daemon:
        one = tier_of(daemon)
        two = DaemonTier(daemon.client(), namespace=other, root=other.root(), metrics=Metrics())
        run, alike = make_run(4, seed=1), make_run(4, seed=1, layout=other.layout)
        assert all(one.write(run, blocks_of(run))) and all(two.write(alike, blocks_of(alike, other.layout)))
        assert read_blocks(one, run.keys) == [block_of(key) for key in run.keys]
        assert read_blocks(two, alike.keys, other.layout) == [block_of(key, other.layout) for key in alike.keys]
        assert one.contains(alike.keys) == two.contains(run.keys) == [False] * 4
        one.close(), two.close()


def test_a_batch_larger_than_what_may_be_on_lease_is_served_in_parts(tmp_path: Path) -> None:
    with running(tmp_path, capacity="1MiB") as daemon:  # 204 places, 102 of them on lease at most
        for url in daemon.urls:
            tier = tier_of(daemon, url=url)
            run = make_run(180, seed=1)
            assert all(tier.write(run, blocks_of(run)))
            assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]
            tier.close()


def test_more_blocks_than_there_is_room_for_are_dropped_and_counted(tmp_path: Path) -> None:
    metrics = Metrics()
    with running(tmp_path, capacity="1MiB") as daemon:
        tier = tier_of(daemon, metrics=metrics)
        run = make_run(300, seed=1)
        kept = tier.write(run, blocks_of(run))
        assert 100 <= kept.count(True) <= 204
        assert metrics.saves_dropped.value("daemon", "full") == kept.count(False)
        found = read_blocks(tier, run.keys)
        assert found == [block_of(key) if ok else None for key, ok in zip(run.keys, kept, strict=True)]
        tier.close()


def test_a_run_without_its_tokens_is_refused(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        tier = tier_of(daemon)
        run = make_run(2, seed=1)
        with pytest.raises(LayoutError, match="the daemon needs them"):
            tier.write(Run(run.root, run.parent, 0, run.keys), blocks_of(run))
        with pytest.raises(LayoutError, match="a block has 5120"):
            tier.read(run.keys[:1], [memoryview(bytearray(10))])
        tier.close()


def test_a_run_whose_beginning_nobody_knows_is_kept_and_found(tmp_path: Path) -> None:
    trunk = make_run(8, seed=1)
    rest = make_run(4, seed=2, after=trunk)
    with running(tmp_path) as daemon:
        tier = tier_of(daemon)
        assert tier.seek(rest) == 0
        assert all(tier.write(rest, blocks_of(rest)))
        assert tier.seek(rest) == 4 and tier.seek(trunk) == 0
        assert all(tier.write(trunk, blocks_of(trunk)))
        whole = Run(trunk.root, trunk.parent, 0, trunk.keys + rest.keys, trunk.tokens + rest.tokens)
        assert tier.seek(whole) == 12
        assert read_blocks(tier, whole.keys) == [block_of(key) for key in whole.keys]
        tier.close()


def test_wait_answers_when_another_client_has_written(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        reader, writer = tier_of(daemon), tier_of(daemon, url=daemon.urls[1])
        run = make_run(6, seed=1)
        assert reader.wait(run.keys, known=0, deadline_s=0.0) == 0
        found: list[int] = []
        waiting = threading.Thread(target=lambda: found.append(reader.wait(run.keys, known=0, deadline_s=30.0)))
        waiting.start()
        daemon.until(lambda: bool(daemon.service._waiting), "the wait has come there")
        assert all(writer.write(run, blocks_of(run)))
        waiting.join()
        assert found[0] >= 1
        assert not daemon.service._waiting
        reader.close(), writer.close()


# -- durable ----------------------------------------------------------------------------------------------------------------


def test_blocks_that_only_the_disk_holds_are_lifted(tmp_path: Path) -> None:
    run = make_run(30, seed=1)
    with running(tmp_path, disk="16MiB") as daemon, daemon.blocks() as blocks:
        blocks.write(run, blocks_of(run))
    with running(tmp_path, disk="16MiB") as daemon:
        for url in daemon.urls:
            tier = tier_of(daemon, url=url)
            assert daemon.pool.presence(b"".join(run.keys)) == bytes([1 + DISK] * 30)
            assert tier.seek(run) == 30
            assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]
            assert daemon.pool.presence(b"".join(run.keys)) == bytes([1 + HOST] * 30)
            tier.close()
            daemon.until(daemon.at_rest, "the loads have ended")
            daemon.pool.index.evict(HOST, 30)


def test_what_is_being_lifted_for_one_is_lent_to_others_too(tmp_path: Path) -> None:
    run = make_run(30, seed=1)
    with running(tmp_path, disk="16MiB") as daemon, daemon.blocks() as blocks:
        blocks.write(run, blocks_of(run))
        blocks.client.flush()
        daemon.pool.index.evict(HOST)

        async def both() -> list[int]:
            pool, keys = daemon.pool, b"".join(run.keys)
            lent = [pool.lend(keys), pool.lend(keys), pool.lend(keys[: 32 * 5])]
            await asyncio.gather(*[pool.lift(one, PATIENCE_S) for one in lent])
            for one in lent:
                pool.give_back(one)
            return [one.num_blocks for one in lent]

        assert daemon._loop
        assert asyncio.run_coroutine_threadsafe(both(), daemon._loop).result(PATIENCE_S) == [30, 30, 5]
        assert daemon.service.metrics.blocks_loaded.value("disk") == 30


def test_a_block_damaged_on_disk_is_a_miss(tmp_path: Path) -> None:
    run = make_run(3, seed=1)
    with running(tmp_path, disk="16MiB") as daemon, daemon.blocks() as blocks:
        blocks.write(run, blocks_of(run))
    needle = block_of(run.keys[1])
    damaged = 0
    for path in (tmp_path / "disk").rglob("*"):
        if path.is_file() and (at := (held := path.read_bytes()).find(needle)) >= 0:
            path.write_bytes(held[:at] + bytes([held[at] ^ 1]) + held[at + 1 :])
            damaged += 1
    assert damaged == 1
    with running(tmp_path, disk="16MiB") as daemon:
        tier = tier_of(daemon)
        assert read_blocks(tier, run.keys) == [block_of(run.keys[0]), None, block_of(run.keys[2])]
        assert tier.contains(run.keys) == [True, False, True]
        assert daemon.service.metrics.corrupt_blocks.value("disk") == 1
        tier.close()


# -- a stray writer ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("number", [0, 1], ids=["memory", "tcp"])
def test_an_overwritten_place_is_a_miss_that_is_reported_dropped_and_counted(tmp_path: Path, number: int) -> None:
    metrics = Metrics()
    with running(tmp_path) as daemon:
        tier = tier_of(daemon, url=daemon.urls[number], metrics=metrics)
        run = make_run(5, seed=1)
        assert all(tier.write(run, blocks_of(run)))
        flip(daemon, run.keys[0], at=0)
        flip(daemon, run.keys[4], at=SMALL.block_bytes - 1)
        expected = [None, *(block_of(key) for key in run.keys[1:4]), None]
        assert read_blocks(tier, run.keys) == expected
        assert tier.contains(run.keys) == [False, True, True, True, False]
        assert metrics.corrupt_blocks.value("daemon") == metrics.misses.value("daemon", Miss.CORRUPT) == 2
        theirs = daemon.service.metrics
        assert theirs.corrupt_blocks.value("host") == theirs.misses.value("host", Miss.CORRUPT) == 2
        tier.close()


def test_another_whole_block_in_its_place_is_a_miss(tmp_path: Path) -> None:
    with running(tmp_path) as daemon:
        tier = tier_of(daemon)
        run = make_run(2, seed=1)
        assert all(tier.write(run, blocks_of(run)))
        first, second = (place_of(daemon, key) for key in run.keys)
        daemon.pool.slab.view(first)[:] = bytes(daemon.pool.slab.view(second))
        daemon.pool.slab.checksums[first] = daemon.pool.slab.checksums[second]  # were that lost, too
        assert read_blocks(tier, run.keys) == [None, block_of(run.keys[1])]
        tier.close()


def test_what_a_stray_writer_left_never_reaches_the_disk(tmp_path: Path) -> None:
    metrics = Metrics()
    run = make_run(6, seed=1)
    with running(tmp_path, disk="16MiB", copy_down="spill") as daemon:
        tier = tier_of(daemon, metrics=metrics)
        assert all(tier.write(run, blocks_of(run)))
        flip(daemon, run.keys[3])
        assert tier.blocks.client.flush(deadline_s=20.0)["complete"]
        assert daemon.service.metrics.saves_dropped.value("disk", Miss.CORRUPT) >= 1
        assert daemon.service.metrics.corrupt_blocks.value("host") == 1
        tier.close()
    with running(tmp_path, disk="16MiB", copy_down="spill") as daemon:
        tier = tier_of(daemon)
        found = read_blocks(tier, run.keys)
        assert found[3] is None
        assert all(got in (None, block_of(key)) for key, got in zip(run.keys, found, strict=True))
        tier.close()


def test_verify_finds_and_forgets_what_was_overwritten(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, daemon.blocks() as blocks:
        run = make_run(100, seed=1)
        blocks.write(run, blocks_of(run))
        flip(daemon, run.keys[7])
        flip(daemon, run.keys[90])
        progress: list[dict[str, Any]] = []
        assert blocks.client.verify(progress.append) == {"host": {"checked": 100, "bad": 2}}
        assert progress[-1] == {"tier": "host", "blocks": 100, "checked": 100, "bad": 2}
        assert [at for at, tier in enumerate(blocks.presence(run.keys)) if not tier] == [7, 90]


# -- loans ------------------------------------------------------------------------------------------------------------------


def test_a_loan_shows_blocks_in_place_and_is_given_back(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, daemon.blocks() as blocks:
        run, other = make_run(4, seed=1), make_run(1, seed=2)
        blocks.write(run, blocks_of(run))
        flip(daemon, run.keys[2])
        with blocks.borrow([*run.keys, *other.keys], deadline_s=5.0) as loan:
            assert loan and not daemon.do(daemon.at_rest)
            assert [place is None for place in loan.places] == [False, False, True, False, True]
            for key, place in zip(run.keys, loan.places, strict=False):
                if place is not None:
                    assert bytes(loan.rows[place, : SMALL.block_bytes]) == block_of(key)
            assert loan.intact()
        daemon.until(daemon.at_rest, "the loan is given back")
        assert blocks.presence(run.keys)[2] == 0


def test_a_loan_over_tcp_is_none(tmp_path: Path) -> None:
    keys = make_run(1, seed=1).keys
    with (
        running(tmp_path) as daemon,
        daemon.blocks(daemon.urls[1]) as blocks,
        blocks.borrow(keys, deadline_s=5.0) as loan,
    ):
        assert loan is None


def test_a_loan_whose_place_got_another_block_is_not_intact(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, daemon.blocks() as blocks:
        run = make_run(3, seed=1)
        blocks.write(run, blocks_of(run))
        with blocks.borrow(run.keys, deadline_s=5.0) as loan:
            assert loan and loan.intact()
            daemon.do(lambda: daemon.pool.slab.renew([loan.places[1]]))
            assert not loan.intact()
        with blocks.borrow(run.keys, deadline_s=5.0) as loan:
            assert loan and loan.intact()


class Turning:
    """A clock that, while a test says so, does something each time it is asked: after a loan was made out, before it is told."""

    def __init__(self) -> None:
        self.then: Callable[[], None] | None = None

    def __call__(self) -> float:
        if self.then:
            self.then()
        return time.monotonic()


def test_a_generation_that_rises_before_the_copy_has_ended_is_late_and_no_block(tmp_path: Path) -> None:
    metrics, clock = Metrics(), Turning()
    with running(tmp_path, clock=clock) as daemon:
        tier = tier_of(daemon, metrics=metrics)
        run = make_run(3, seed=1)
        assert all(tier.write(run, blocks_of(run)))
        place = place_of(daemon, run.keys[1])
        clock.then = lambda: daemon.pool.slab.renew([place])
        assert read_blocks(tier, run.keys) == [block_of(run.keys[0]), None, block_of(run.keys[2])]
        clock.then = None
        assert metrics.misses.value("daemon", Miss.LATE) == 1
        assert metrics.corrupt_blocks.value("daemon") == 0  # nobody wrote where he should not
        assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]
        tier.close()


def test_tier_errors_are_all_that_a_dead_daemon_raises(tmp_path: Path) -> None:
    run = make_run(2, seed=1)
    with running(tmp_path) as daemon:
        tier = tier_of(daemon)
        assert all(tier.write(run, blocks_of(run)))
    for call in (
        lambda: tier.contains(run.keys),
        lambda: tier.seek(run),
        lambda: tier.wait(run.keys, known=0, deadline_s=1.0),
        lambda: read_blocks(tier, run.keys),
        lambda: tier.write(run, blocks_of(run)),
        lambda: tier.delete(run.keys),
    ):
        with pytest.raises(TierError):
            call()
    tier.close()
