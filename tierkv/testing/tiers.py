# ruff: noqa: D102  (a test's name is its sentence)
"""What every tier at rest promises, and the blocks that its tests use."""

import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest

from tierkv.keys import Key, Namespace, chain
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.tiers.base import Miss, Run, Tier

SMALL: Layout = Layout(num_layers=2, num_kv_heads=2, head_dim=20, dtype="bfloat16")
"""A layout for tests: 5,120 bytes a block, on purpose no multiple of the 4,096 that disks like."""


def make_run(length: int, *, seed: int, layout: Layout = SMALL, after: Run | None = None) -> Run:
    """Return a run of `length` blocks of random tokens, a continuation of `after` or the start of a path."""
    tokens = np.random.default_rng(seed).integers(0, 32000, length * layout.block_tokens, dtype="<i4").tobytes()
    root = after.root if after else Namespace("test", layout).root()
    parent = after.keys[-1] if after else root
    depth = after.depth + len(after.keys) if after else 0
    return Run(root, parent, depth, tuple(chain(parent, tokens, block_tokens=layout.block_tokens)), tokens)


def block_of(key: Key, layout: Layout = SMALL) -> bytes:
    """Return the bytes that tests store under `key`: random, and a function of the key, so any mix-up is seen."""
    return np.random.default_rng(list(key)).bytes(layout.block_bytes)


def blocks_of(run: Run, layout: Layout = SMALL) -> list[memoryview]:
    """Return `block_of` each key of a run, as `Tier.write` takes them."""
    return [memoryview(block_of(key, layout)) for key in run.keys]


def read_blocks(tier: Tier, keys: Sequence[Key], layout: Layout = SMALL) -> list[bytes | None]:
    """Read keys into fresh buffers; None where the tier says no."""
    outs = [bytearray(layout.block_bytes) for _ in keys]
    found = tier.read(keys, [memoryview(out) for out in outs])
    assert len(found) == len(keys)
    return [bytes(out) if ok else None for out, ok in zip(outs, found, strict=True)]


class TierContract:
    """What every tier at rest promises. Hooks: `make`, `corrupt`, and `reopen` where a tier is durable.

    A made tier starts empty, keeps blocks of the layout SMALL and has room for at least 256 of them.
    """

    durable: ClassVar[bool] = True
    """Blocks outlive `close`: `reopen` works and finds them."""
    scans: ClassVar[bool] = True
    """`scan` yields what is held (a shared tier may yield nothing)."""

    def make(self, tmp_path: Path, metrics: Metrics) -> Tier:
        """Open an empty tier, which counts into `metrics`; `tmp_path` is its own to use."""
        raise NotImplementedError

    def reopen(self, tmp_path: Path, metrics: Metrics) -> Tier:
        """Open again what `make` made and the test closed."""
        return self.make(tmp_path, metrics)

    def corrupt(self, tier: Tier, key: Key) -> None:
        """Change one byte of the copy at rest of `key`, behind the tier's back."""
        raise NotImplementedError

    @pytest.fixture
    def metrics(self) -> Metrics:
        """The metrics of the tier under test."""
        return Metrics()

    @pytest.fixture
    def tier(self, tmp_path: Path, metrics: Metrics) -> Iterator[Tier]:
        """The tier under test, closed at the end."""
        tier = self.make(tmp_path, metrics)
        yield tier
        tier.close()

    def test_written_blocks_read_back_equal(self, tier: Tier, metrics: Metrics) -> None:
        run = make_run(40, seed=1)
        assert tier.write(run, blocks_of(run)) == [True] * 40
        assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]
        assert metrics.bytes_written.value(tier.name) == metrics.bytes_read.value(tier.name) == 40 * SMALL.block_bytes
        assert metrics.misses.value(tier.name) == 0
        assert metrics.save_seconds.count(tier.name) == metrics.load_seconds.count(tier.name) == 1

    def test_absent_key_is_false_and_counted(self, tier: Tier, metrics: Metrics) -> None:
        run = make_run(3, seed=2)
        assert tier.contains(run.keys) == [False] * 3
        assert read_blocks(tier, run.keys) == [None] * 3
        assert metrics.misses.value(tier.name, Miss.ABSENT) == 3

    def test_empty_batches_are_fine(self, tier: Tier) -> None:
        run = make_run(1, seed=3)
        assert tier.contains([]) == tier.read([], []) == []
        assert tier.write(Run(run.root, run.root, 0, ()), []) == []
        tier.delete([])

    def test_results_follow_the_order_of_the_keys(self, tier: Tier) -> None:
        held, missing = make_run(20, seed=4), make_run(20, seed=5)
        assert all(tier.write(held, blocks_of(held)))
        keys = [*held.keys, *missing.keys, held.keys[7], held.keys[7]]
        order = np.random.default_rng(0).permutation(len(keys)).tolist()
        keys = [keys[at] for at in order]
        known = set(held.keys)
        assert tier.contains(keys) == [key in known for key in keys]
        assert read_blocks(tier, keys) == [block_of(key) if key in known else None for key in keys]

    def test_a_batch_of_thousands_of_keys_is_served(self, tier: Tier) -> None:
        held, missing = make_run(200, seed=6), make_run(7992, seed=7)
        assert all(tier.write(held, blocks_of(held)))
        assert tier.contains(held.keys + missing.keys) == [True] * 200 + [False] * 7992
        outs = [memoryview(bytearray(SMALL.block_bytes)) for _ in range(200)]
        rest = [memoryview(bytearray(SMALL.block_bytes))] * 7992  # nothing lands there
        assert tier.read(held.keys + missing.keys, outs + rest) == [True] * 200 + [False] * 7992
        assert [bytes(out) for out in outs] == [block_of(key) for key in held.keys]

    def test_writing_a_present_key_is_true_and_changes_nothing(self, tier: Tier) -> None:
        first = make_run(4, seed=8)
        both = make_run(4, seed=9, after=first)
        whole = Run(first.root, first.parent, 0, first.keys + both.keys, first.tokens + both.tokens)
        assert all(tier.write(first, blocks_of(first)))
        assert tier.write(whole, blocks_of(whole)) == [True] * 8
        assert tier.write(whole, blocks_of(whole)) == [True] * 8
        assert read_blocks(tier, whole.keys) == [block_of(key) for key in whole.keys]

    def test_deleted_keys_are_absent_and_may_come_back(self, tier: Tier) -> None:
        run, other = make_run(10, seed=10), make_run(1, seed=11)
        tier.write(run, blocks_of(run))
        tier.delete([*run.keys[5:], *other.keys])
        assert tier.contains(run.keys) == [True] * 5 + [False] * 5
        assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys[:5]] + [None] * 5
        assert all(tier.write(run, blocks_of(run)))
        assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]

    def test_buffers_at_odd_addresses_are_served(self, tier: Tier) -> None:
        size = SMALL.block_bytes
        run = make_run(5, seed=12)
        source = bytearray(1 + 5 * size)
        for number, key in enumerate(run.keys):
            source[1 + number * size : 1 + (number + 1) * size] = block_of(key)
        views = [memoryview(source)[1 + at * size : 1 + (at + 1) * size] for at in range(5)]
        assert all(tier.write(run, views))
        into = bytearray(3 + 5 * (size + 1))
        outs = [memoryview(into)[3 + at * (size + 1) :][:size] for at in range(5)]
        assert all(tier.read(run.keys, outs))
        assert [bytes(out) for out in outs] == [block_of(key) for key in run.keys]
        assert into[:3] == b"\0\0\0" and not any(into[3 + size :: size + 1])

    def test_a_corrupt_copy_is_a_miss_counted_and_removed(self, tier: Tier, metrics: Metrics) -> None:
        run = make_run(6, seed=13)
        tier.write(run, blocks_of(run))
        self.corrupt(tier, run.keys[2])
        expected = [None if at == 2 else block_of(key) for at, key in enumerate(run.keys)]
        assert read_blocks(tier, run.keys) == expected
        assert metrics.misses.value(tier.name, Miss.CORRUPT) == metrics.corrupt_blocks.value(tier.name) == 1
        assert tier.contains([run.keys[2]]) == [False]
        assert tier.write(run, blocks_of(run)) == [True] * 6
        assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]

    def test_a_passed_deadline_is_a_counted_miss(self, tier: Tier, metrics: Metrics) -> None:
        run = make_run(4, seed=14)
        tier.write(run, blocks_of(run))
        outs = [memoryview(bytearray(SMALL.block_bytes)) for _ in run.keys]
        assert tier.read(run.keys, outs, deadline_s=0.0) == [False] * 4
        assert metrics.misses.value(tier.name, Miss.LATE) == 4
        late = make_run(4, seed=15)
        saved = tier.write(late, blocks_of(late), deadline_s=0.0)
        expected = [block_of(key) if ok else None for key, ok in zip(late.keys, saved, strict=True)]
        found = read_blocks(tier, late.keys)
        assert len(saved) == 4 and all(want is None or got == want for got, want in zip(found, expected, strict=True))
        assert read_blocks(tier, run.keys) == [block_of(key) for key in run.keys]

    def test_blocks_outlive_a_restart(self, tmp_path: Path, metrics: Metrics) -> None:
        if not self.durable:
            return
        first = self.make(tmp_path, metrics)
        run = make_run(30, seed=16)
        first.write(run, blocks_of(run))
        first.delete(run.keys[20:])
        first.close()
        second = self.reopen(tmp_path, metrics)
        assert read_blocks(second, run.keys) == [block_of(key) for key in run.keys[:20]] + [None] * 10
        second.close()

    def test_scan_tells_paths_parents_first_with_their_tokens(self, tmp_path: Path, metrics: Metrics) -> None:
        if not (self.scans and self.durable):
            return
        trunk = make_run(10, seed=17)
        left, right = make_run(5, seed=18, after=trunk), make_run(3, seed=19, after=trunk)
        first = self.make(tmp_path, metrics)
        for run in (trunk, left, right):
            assert all(first.write(run, blocks_of(run)))
        first.close()
        second = self.reopen(tmp_path, metrics)
        step = len(trunk.tokens) // 10
        seen: dict[Key, tuple[Key, int, bytes]] = {}
        for run in second.scan():
            assert run.root == trunk.root
            assert run.depth == 0 or run.parent in seen
            parents = (run.parent, *run.keys)
            for at, key in enumerate(run.keys):
                seen[key] = (parents[at], run.depth + at, run.tokens[at * step : (at + 1) * step])
        second.close()
        expected = {
            key: ((run.parent, *run.keys)[at], run.depth + at, run.tokens[at * step : (at + 1) * step])
            for run in (trunk, left, right)
            for at, key in enumerate(run.keys)
        }
        assert seen == expected

    def test_close_is_idempotent_and_later_calls_are_misses(self, tmp_path: Path, metrics: Metrics) -> None:
        tier = self.make(tmp_path, metrics)
        run = make_run(2, seed=20)
        tier.write(run, blocks_of(run))
        tier.close()
        tier.close()
        assert read_blocks(tier, run.keys) == [None, None]
        assert tier.write(run, blocks_of(run)) == [False, False]
        assert tier.contains(run.keys) == [False, False]
        tier.delete(run.keys)

    def test_threads_see_whole_blocks_or_none(self, tier: Tier) -> None:
        runs = [make_run(16, seed=100 + number) for number in range(6)]
        wrong: list[str] = []
        start = threading.Barrier(4)

        def work(seed: int) -> None:
            random = np.random.default_rng(seed)
            start.wait()
            try:
                for _ in range(30):
                    run = runs[random.integers(len(runs))]
                    action = random.integers(4)
                    if action == 0:
                        tier.delete(run.keys[random.integers(16) :])
                    elif action == 1:
                        tier.write(run, blocks_of(run))
                    else:
                        for key, got in zip(run.keys, read_blocks(tier, run.keys), strict=True):
                            if got is not None and got != block_of(key):
                                wrong.append(key.hex())
            except Exception as error:  # noqa: BLE001  a thread's failure must reach the test
                wrong.append(repr(error))

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []
