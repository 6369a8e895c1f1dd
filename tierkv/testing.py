# ruff: noqa: D102  (a test's name is its sentence)
"""Contract suites that every implementation inherits, and the small things their tests share.

A suite is a class of pytest tests with hooks: subclass it in a test file, name the subclass `Test…`, fill in the hooks.
Shipped, so that tiers, policies and codecs of others can be held to it. Each contract lives in its own class; what is
particular to one implementation stays in that one's tests.
"""

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import xxhash

from tierkv.codecs.base import Codec
from tierkv.errors import CodecError
from tierkv.index import Index, TierSpec
from tierkv.keys import Key, Namespace, chain
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.policies.base import Policy
from tierkv.tiers.base import Miss, Run, Tier

SMALL: Layout = Layout(num_layers=2, num_kv_heads=2, head_dim=20, dtype="bfloat16")
"""A layout for tests: 5,120 bytes a block, on purpose no multiple of the 4,096 that disks like."""


PROMPTS: Key = Key(b"prompts." * 4)
"""The namespace that PolicyContract uses."""


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


def floats(dtype: str, count: int, *, seed: int = 0) -> bytes:
    """Return `count` values like those of KV: Gaussian, in one of the dtypes of a layout."""
    values = np.random.default_rng(seed).normal(0, 1, count).astype(np.float32)
    if dtype == "bfloat16":
        return (values.view(np.uint32) >> 16).astype(np.uint16).tobytes()
    return values.astype(dtype).tobytes()


class CodecContract:
    """What every lossless codec promises. Hook: `make`."""

    def make(self, itemsize: int) -> Codec:
        """Return the codec for elements of `itemsize` bytes."""
        raise NotImplementedError

    def stored(self, codec: Codec, block: bytes) -> bytes | None:
        """Encode, and check that what is packed is smaller."""
        stored = codec.encode(memoryview(block))
        assert stored is None or len(stored) < len(block)
        return stored

    @pytest.mark.parametrize("itemsize", [1, 2, 4])
    @pytest.mark.parametrize("length", [4, 8, 64, 5120, 368640])
    @pytest.mark.parametrize("kind", ["zeros", "random", "ramp"])
    def test_blocks_come_back_bit_identical(self, itemsize: int, length: int, kind: str) -> None:
        block = {
            "zeros": bytes(length),
            "random": np.random.default_rng(length).bytes(length),
            "ramp": (np.arange(length) // 97).astype(np.uint8).tobytes(),
        }[kind]
        self.round_trip(block, itemsize)

    @pytest.mark.parametrize(("dtype", "itemsize"), [("bfloat16", 2), ("float16", 2), ("float32", 4)])
    def test_gaussian_floats_come_back_bit_identical(self, dtype: str, itemsize: int) -> None:
        self.round_trip(floats(dtype, 90000), itemsize)

    def round_trip(self, block: bytes, itemsize: int) -> None:
        """Encode, and decode into a buffer full of something else."""
        codec = self.make(itemsize)
        stored = self.stored(codec, block)
        if stored is not None:
            out = bytearray(b"\xa5" * len(block))
            codec.decode(memoryview(stored), memoryview(out))
            assert bytes(out) == block

    def test_hostile_bytes_raise_codec_errors_only(self) -> None:
        """A cut must be seen; a flip may decode to something else, which the checksum before the codec excludes."""
        codec = self.make(2)
        good = self.stored(codec, bytes(5000) + floats("bfloat16", 2500))
        if good is None:
            return
        out = memoryview(bytearray(10000))
        random = np.random.default_rng(7)
        for cut in [0, 1, 5, 9, 10, len(good) // 2, len(good) - 1]:
            with pytest.raises(CodecError):
                codec.decode(memoryview(good)[:cut], out)
        for _ in range(500):
            bad = bytearray(good)
            place = random.integers(12) if random.integers(2) else random.integers(len(bad))
            bad[place] ^= 1 << int(random.integers(8))
            self.decode_or_refuse(codec, bytes(bad), out)
        for _ in range(200):
            self.decode_or_refuse(codec, random.bytes(int(random.integers(400))), out)

    def decode_or_refuse(self, codec: Codec, stored: bytes, out: memoryview) -> None:
        """Decode; only CodecError may come of it."""
        try:
            codec.decode(memoryview(stored), out)
        except CodecError:
            return

    @pytest.mark.parametrize("size", [0, 2, 9998, 10002, 20000])
    def test_an_out_of_another_size_is_refused(self, size: int) -> None:
        codec = self.make(2)
        block = bytes(5000) + floats("bfloat16", 2500)
        stored = self.stored(codec, block)
        with pytest.raises(CodecError):
            codec.decode(memoryview(block if stored is None else stored), memoryview(bytearray(size)))


class PolicyContract:
    """What every eviction policy promises, driven by the index as a tier's own; a token is a block. Hook: `make`."""

    def make(self, tier: int) -> Policy:
        """Return a policy that knows nothing yet, for the tier of this number."""
        raise NotImplementedError

    def fill(self, prompts: Sequence[Sequence[int]], *, capacity: int = 500) -> Index:
        """Return an index of one tier that has saved `prompts` in order."""
        index = Index(block_tokens=1, tiers=[TierSpec("host", capacity, True, self.make(0))])
        for prompt in prompts:
            self.save(index, prompt)
        return index

    def save(self, index: Index, prompt: Sequence[int]) -> None:
        """Use a prompt, and save what is missing of it as far as there is room."""
        tokens = np.array(prompt, "<i4").tobytes()
        with index.acquire(PROMPTS, tokens) as lease:
            lo = lease.num_blocks
            room = index.reserve(0, len(prompt) - lo, at_least=0)
            assert room
            index.extend(lease, tokens[4 * lo : 4 * (lo + room.count)], tier=0, places=room.places)

    def holds(self, index: Index, prompt: Sequence[int]) -> int:
        """Leading blocks of a prompt that are held; asking is no use of them."""
        return index.match(PROMPTS, np.array(prompt, "<i4").tobytes()).num_blocks

    @pytest.fixture
    def prompts(self) -> list[list[int]]:
        """Prompts that branch and come back, the same in every run."""
        random = np.random.default_rng(11)
        prompts: list[list[int]] = [[1]]
        for _ in range(100):
            old = prompts[random.integers(len(prompts))]
            prompts.append(
                old[: random.integers(1, len(old) + 1)] + random.integers(2, 9, random.integers(1, 6)).tolist()
            )
        return prompts

    def test_nothing_to_forget_is_none(self) -> None:
        policy = self.make(0)
        assert policy.pop() is None and policy.pop() is None

    def test_everything_unpinned_is_forgotten_in_the_end(self, prompts: list[list[int]]) -> None:
        index = self.fill(prompts)
        held = index.stats().tiers[0].held
        assert held > 100 and index.evict(0).evicted == held
        assert index.stats().num_strands == 0 and index.evict(0).evicted == 0

    def test_prefix_outlives_its_branches(self, prompts: list[list[int]]) -> None:
        index = self.fill(prompts)
        for left in range(index.stats().tiers[0].held - 1, -1, -1):
            assert index.evict(0, 1).evicted == 1
            reachable = {tuple(prompt[: at + 1]) for prompt in prompts for at in range(self.holds(index, prompt))}
            assert len(reachable) == left, "a block outlived its prefix"

    def test_pinned_path_survives(self, prompts: list[list[int]]) -> None:
        index = self.fill(prompts)
        kept = max(prompts, key=len)
        with index.acquire(PROMPTS, np.array(kept, "<i4").tobytes()) as lease:
            index.evict(0)
            assert index.stats().tiers[0].held == lease.num_blocks == self.holds(index, kept) == len(kept)
        assert index.evict(0).evicted == len(kept)

    def test_room_is_made_whenever_it_can_be(self, prompts: list[list[int]]) -> None:
        index = self.fill([], capacity=40)
        for prompt in prompts:
            self.save(index, prompt)
            assert self.holds(index, prompt) == min(len(prompt), 40)
            index.check([])

    def test_same_uses_give_the_same_order(self, prompts: list[list[int]]) -> None:
        one, other = self.fill(prompts, capacity=60), self.fill(prompts, capacity=60)
        for _ in range(60):
            assert one.evict(0, 1).evicted == other.evict(0, 1).evicted
            assert [self.holds(one, prompt) for prompt in prompts] == [self.holds(other, prompt) for prompt in prompts]

    def test_looking_ahead_changes_nothing(self, prompts: list[list[int]]) -> None:
        """`Index.spill` pops victims and offers them back."""
        specs = [[TierSpec(name, 60, True, self.make(at)) for at, name in enumerate(("host", "far"))] for _ in "ab"]
        one, other = (Index(block_tokens=1, tiers=each) for each in specs)
        for prompt in prompts:
            self.save(one, prompt)
            self.save(other, prompt)
            for lease in one.spill(0, 1, 5):
                lease.release()
            assert [self.holds(one, each) for each in prompts] == [self.holds(other, each) for each in prompts]

    def test_scan_passes_through(self) -> None:
        """What is used once must make room for what is used once later."""
        index = self.fill([[9, at] for at in range(100)], capacity=20)
        assert self.holds(index, [9, 99]) == 2 and self.holds(index, [9, 10]) == 1


class StepExecutor(Executor):
    """Runs jobs when a test says so, in the order it says: a mover without threads, so that every interleaving can be tried."""

    def __init__(self) -> None:
        self.queue: list[tuple[Future[Any], Callable[[], Any]]] = []

    def submit(self, job: Callable[..., Any], /, *args: Any, **options: Any) -> "Future[Any]":
        """Queue a job."""
        future: Future[Any] = Future()
        self.queue.append((future, lambda: job(*args, **options)))
        return future

    def step(self, number: int = 0) -> None:
        """Run one queued job."""
        future, job = self.queue.pop(number)
        if future.set_running_or_notify_cancel():
            try:
                future.set_result(job())
            except BaseException as error:  # noqa: BLE001  it is the future's, as with any executor
                future.set_exception(error)

    def run_all(self) -> None:
        """Run until nothing is queued."""
        while self.queue:
            self.step()

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Drop what is queued."""
        for future, _ in self.queue:
            future.cancel()
        self.queue.clear()


class FakeClock:
    """Seconds that pass when a test says so."""

    def __init__(self, now: float = 0.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        self.now += seconds


class MemoryTier(Tier):
    """Blocks in a dict: a real tier, for tests of what stands above tiers, and the shortest example of the contract.

    stored: the tests' to damage. Not thread-safe beyond what a dict is; forgets everything at `close`.
    """

    name = "memory"

    def __init__(self, *, metrics: Metrics, capacity_blocks: int = 1 << 20) -> None:
        self._metrics, self._capacity = metrics, capacity_blocks
        self.stored: dict[Key, bytes] = {}
        self._known: dict[Key, tuple[int, Run]] = {}  # checksum, and the block as a run of its own

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        """As the interface says."""
        return [key in self.stored for key in keys]

    def read(self, keys: Sequence[Key], outs: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """As the interface says."""
        if deadline_s is not None and deadline_s <= 0:
            self._metrics.misses.add(len(keys), self.name, Miss.LATE)
            return [False] * len(keys)
        start = time.monotonic()
        came = [self._read(key, out) for key, out in zip(keys, outs, strict=True)]
        self._metrics.load_seconds.observe(time.monotonic() - start, self.name)
        return came

    def _read(self, key: Key, out: memoryview) -> bool:
        block = self.stored.get(key)
        if block is None:
            self._metrics.misses.add(1, self.name, Miss.ABSENT)
            return False
        out[: len(block)] = (
            block  # before the check, as from a disk: where the answer is False, anything may be in `out`
        )
        if xxhash.xxh3_64_intdigest(block) != self._known[key][0]:
            self.delete([key])
            self._metrics.corrupt_blocks.add(1, self.name)
            self._metrics.misses.add(1, self.name, Miss.CORRUPT)
            return False
        self._metrics.bytes_read.add(len(block), self.name)
        return True

    def write(self, run: Run, blocks: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """As the interface says."""
        start = time.monotonic()
        size = len(run.tokens) // max(1, len(run.keys))
        parents = (run.parent, *run.keys)
        for at, (key, block) in enumerate(zip(run.keys, blocks, strict=True)):
            if key not in self.stored and len(self.stored) < self._capacity:
                alone = Run(run.root, parents[at], run.depth + at, (key,), run.tokens[at * size : (at + 1) * size])
                self.stored[key] = bytes(block)
                self._known[key] = (xxhash.xxh3_64_intdigest(self.stored[key]), alone)
                self._metrics.bytes_written.add(len(block), self.name)
        self._metrics.save_seconds.observe(time.monotonic() - start, self.name)
        return self.contains(run.keys)

    def delete(self, keys: Sequence[Key]) -> None:
        """As the interface says."""
        for key in keys:
            self.stored.pop(key, None)
            self._known.pop(key, None)

    def scan(self) -> Iterator[Run]:
        """As the interface says: every block a run of its own, in the order of writing."""
        return iter([run for _, run in self._known.values()])

    def close(self) -> None:
        """As the interface says."""
        self._capacity = 0
        self.delete(list(self.stored))


class SharedMemoryTier(MemoryTier):
    """A MemoryTier that is asked and not remembered, as Redis is."""

    name = "shared"
    shared = True


class FaultyTier(Tier):
    """A tier whose n-th call fails, for every n a test likes: a seeded fault, in front of a real tier.

    `fail_after` counts calls down; at 0 the call raises OSError, before or after the real one as `late` says.
    """

    name = "faulty"

    def __init__(self, tier: Tier) -> None:
        self._tier = tier
        self.name, self.shared = tier.name, tier.shared  # type: ignore[misc]  # of the tier it stands for
        self.fail_after: int | None = None
        self.late = False
        self.fired = 0

    def _call(self, call: Callable[[], Any]) -> Any:
        failing = self.fail_after == 0
        if self.fail_after is not None:
            self.fail_after -= 1
        if failing and not self.late:
            self.fired += 1
            raise OSError("a seeded fault")
        answer = call()
        if failing:
            self.fired += 1
            raise OSError("a seeded fault, after the fact")
        return answer

    def contains(self, keys: Sequence[Key]) -> list[bool]:
        """As the interface says, or OSError."""
        return list(self._call(lambda: self._tier.contains(keys)))

    def read(self, keys: Sequence[Key], outs: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """As the interface says, or OSError."""
        return list(self._call(lambda: self._tier.read(keys, outs, deadline_s=deadline_s)))

    def write(self, run: Run, blocks: Sequence[memoryview], *, deadline_s: float | None = None) -> list[bool]:
        """As the interface says, or OSError."""
        return list(self._call(lambda: self._tier.write(run, blocks, deadline_s=deadline_s)))

    def delete(self, keys: Sequence[Key]) -> None:
        """As the interface says, or OSError."""
        self._call(lambda: self._tier.delete(keys))

    def scan(self) -> Iterator[Run]:
        """As the interface says."""
        return self._tier.scan()

    def close(self) -> None:
        """As the interface says."""
        self._tier.close()
