"""The device tier: what is copied, in which copies, at which pace, and how it says no."""

import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from random import Random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tests.device_parts import SMALL, Slab, bytes_of, content, cuda_pool
from tierkv.errors import ConfigError, TierError
from tierkv.testing import FakeClock
from tierkv.testing.cuda import FakeCuda, FakeStream
from tierkv.tiers.device import PACED_BYTES, PagePool, _pieces, page_pool
from tierkv.tiers.device_calibration import choose_batches, measure
from tierkv.tiers.device_cuda import Copy, Priority, open_cuda

SIZE = SMALL.block_bytes
CPU = torch.device("cpu")


@pytest.fixture
def cuda() -> FakeCuda:
    return FakeCuda(Random(7).randrange)


def slab(cuda: FakeCuda, *, stride: int = SIZE, piece_places: int = 12) -> Slab:
    return Slab(cuda, num_places=12, block_bytes=SIZE, stride=stride, piece_places=piece_places)


def filled(pool: PagePool) -> Any:
    """Bytes of all pages, each page different."""
    rows = pool.pool.view(torch.uint8).view(pool.num_places, SIZE).numpy()
    for page, row in enumerate(rows):
        row[:] = content(page, SIZE)
    return rows


@pytest.fixture(params=["cpu", "cuda"])
def pool(request: pytest.FixtureRequest, cuda: FakeCuda) -> PagePool:
    if request.param == "cpu":
        return PagePool(layout=SMALL, num_pages=8, device=CPU)
    return cuda_pool(cuda)


# -- both pools ---------------------------------------------------------------------------------------------------------


def test_pages_come_back_as_they_were(pool: PagePool, cuda: FakeCuda) -> None:
    host, before = slab(cuda), filled(pool).copy()
    pool.copy_out([3, 4, 1], host, [0, 1, 7], after=pool.mark())
    pool.copy_in(host, [7, 0], [6, 5], after=pool.mark())
    pool.copy_within([2], [0], after=pool.mark())
    assert (filled_now(pool) == before[[2, 1, 2, 3, 4, 3, 1, 7]]).all()


def filled_now(pool: PagePool) -> Any:
    return pool.pool.view(torch.uint8).view(pool.num_places, SIZE).numpy()


def test_a_span_moves_and_the_rest_stays(pool: PagePool, cuda: FakeCuda) -> None:
    host, before = slab(cuda, stride=SIZE + 32), filled(pool).copy()
    lo, hi = SIZE // 4, SIZE // 2
    pool.copy_out([1, 2], host, [1, 2], after=pool.mark(), span=(lo, hi))
    assert (host.rows[1:3, lo:hi] == before[1:3, lo:hi]).all()
    assert (host.rows[:, :lo] == 0xEE).all() and (host.rows[:, hi:] == 0xEE).all()
    pool.copy_in(host, [1, 2], [5, 6], after=pool.mark(), span=(lo, hi))
    assert (filled_now(pool)[5:7, lo:hi] == before[1:3, lo:hi]).all()
    assert (filled_now(pool)[5:7, :lo] == before[5:7, :lo]).all()
    assert (filled_now(pool)[5:7, hi:] == before[5:7, hi:]).all()


def test_pages_and_places_of_different_number_are_refused(pool: PagePool, cuda: FakeCuda) -> None:
    with pytest.raises(ValueError):
        pool.copy_out([1, 2], slab(cuda), [1], after=pool.mark())


# -- which copies -------------------------------------------------------------------------------------------------------


class Recorder(FakeCuda):
    """Keeps the sizes of copies, and how they were handed over."""

    def __init__(self) -> None:
        super().__init__(Random(1).randrange)
        self.calls: list[tuple[str, list[int]]] = []

    def copy(self, stream: FakeStream, copies: Iterable[Copy]) -> None:
        copies = list(copies)
        self.calls.append(("each", [copy.size for copy in copies]))
        super().copy(stream, copies)

    def copy_batch(self, stream: FakeStream, copies: Sequence[Copy]) -> None:
        self.calls.append(("batch", [copy.size for copy in copies]))
        super().copy_batch(stream, copies)


@pytest.mark.parametrize(
    ("pages", "places", "piece", "blocks"),
    [
        ([0, 1, 2, 3], [4, 5, 6, 7], 12, [4]),
        ([0, 1, 2, 3], [4, 5, 6, 7], 3, [2, 2]),
        ([0, 1, 2, 3], [4, 5, 6, 7], 1, [1, 1, 1, 1]),
        ([0, 1, 3, 4], [4, 5, 6, 7], 12, [2, 2]),
        ([0, 1, 2, 3], [4, 5, 7, 8], 12, [2, 2]),
        ([3, 2, 1], [3, 2, 1], 12, [1, 1, 1]),
        ([0, 1, 2, 3, 4], [5, 6, 7, 8, 9], 6, [1, 4]),
    ],
)
def test_what_is_adjacent_on_both_sides_and_registered_together_is_one_copy(
    pages: list[int], places: list[int], piece: int, blocks: list[int]
) -> None:
    cuda = Recorder()
    pool, host = cuda_pool(cuda), slab(cuda, piece_places=piece)
    cuda.calls.clear()
    pool.batches = False
    pool.copy_out(pages, host, places, after=pool.mark())
    pool.copy_in(host, places, pages, after=pool.mark())
    assert cuda.calls == [("each", [count * SIZE for count in blocks])] * 2


def test_padding_and_spans_keep_blocks_apart() -> None:
    cuda = Recorder()
    pool, host, padded = cuda_pool(cuda), slab(cuda), slab(cuda, stride=SIZE + 64)
    cuda.calls.clear()
    pool.copy_out([0, 1], padded, [0, 1], after=pool.mark())
    pool.copy_out([0, 1], host, [0, 1], after=pool.mark(), span=(0, SIZE // 2))
    pool.copy_out([0, 1], host, [0, 1], after=pool.mark(), span=(0, SIZE))
    assert [sizes for _, sizes in cuda.calls] == [[SIZE] * 2, [SIZE // 2] * 2, [2 * SIZE]]


def test_scattered_pages_go_in_a_batch_where_that_was_faster() -> None:
    cuda = Recorder()
    pool, host = cuda_pool(cuda), slab(cuda)
    pool.batches = True
    cuda.calls.clear()
    pages, places = [7, 6, 5, 4, 3, 2, 1, 0], [0, 1, 2, 3, 4, 5, 6, 7]
    pool.copy_out(pages, host, places, after=pool.mark())
    assert cuda.calls == [
        ("each", [SIZE] * 4),
        ("batch", [SIZE] * 4),
    ]  # the device has work while the batch is prepared
    cuda.calls.clear()
    pool.lead = 1
    pool.copy_out([5, 3], host, [5, 3], after=pool.mark())
    assert cuda.calls == [("each", [SIZE]), ("each", [SIZE])]
    cuda.calls.clear()
    host.pinned = False  # not yet
    pool.copy_in(host, places, pages, after=pool.mark())
    assert cuda.calls == [("each", [SIZE] * 8)]


def test_nothing_to_copy_is_no_work(cuda: FakeCuda) -> None:
    pool, host = cuda_pool(cuda), slab(cuda)
    streams = len(cuda.streams)
    pool.copy_out([], host, [], after=pool.mark())
    pool.copy_in(host, [], [], after=pool.mark())
    pool.copy_within([], [], after=pool.mark())
    assert len(cuda.streams) == streams


# -- streams and events -------------------------------------------------------------------------------------------------


def test_a_stream_is_used_again_and_goes_with_its_pool(cuda: FakeCuda) -> None:
    pool, host = cuda_pool(cuda), slab(cuda)
    others = len(cuda.streams)
    for page in range(8):
        pool.copy_out([page], host, [page], after=pool.mark())
        pool.copy_in(host, [page], [page], after=pool.mark())
    assert len(cuda.streams) == others + 2
    pool.close()
    assert (len(cuda.streams), cuda.num_events) == (others, 0)


def test_loads_go_before_saves(cuda: FakeCuda) -> None:
    pool, host = cuda_pool(cuda), slab(cuda)

    def carried() -> dict[Priority, int]:
        return {stream.priority: stream.num_copies for stream in cuda.streams[1:] if stream.num_copies}

    pool.copy_out([0, 2], host, [0, 3], after=pool.mark())
    pool.copy_out([0, 2], host, [0, 3], after=pool.mark(), share=0.5)
    assert carried() == {Priority.LOW: 4}
    pool.copy_in(host, [0, 3], [1, 5], after=pool.mark())
    assert carried() == {Priority.LOW: 4, Priority.HIGH: 2}
    pool.copy_within([1], [6], after=pool.mark())  # a load, too
    assert carried() == {Priority.LOW: 4, Priority.HIGH: 3}


def test_a_call_waits_for_nothing_queued_after_its_mark(cuda: FakeCuda) -> None:
    pool, host = cuda_pool(cuda), slab(cuda)
    filled(pool)
    after = pool.mark()
    never = cuda.new_stream()
    late = cuda.record(never)
    never.queue.clear()  # the compute stream goes no further
    cuda.wait(cuda.torch, late)
    pool.copy_out([0], host, [0], after=after)
    pool.copy_in(host, [0], [1], after=after)
    assert (bytes_of(pool)[1] == content(0, SIZE)).all()


def test_what_is_no_mark_is_refused(cuda: FakeCuda) -> None:
    pool = cuda_pool(cuda)
    with pytest.raises(TypeError, match="mark"):
        pool.copy_in(slab(cuda), [0], [0], after=None)


def test_a_failing_copy_is_a_tier_error_and_leaves_nothing_under_way(cuda: FakeCuda) -> None:
    pool, host = cuda_pool(cuda), slab(cuda, piece_places=1)
    for batches in (False, True):
        pool.batches = batches
        cuda.fail_after = 2
        with pytest.raises(TierError, match="seeded"):
            pool.copy_out([0, 1, 2, 3], host, [0, 1, 2, 3], after=pool.mark())
        assert cuda.idle
        pool.copy_out([0, 1, 2, 3], host, [0, 1, 2, 3], after=pool.mark())


def test_a_page_has_no_view(cuda: FakeCuda) -> None:
    with pytest.raises(TierError, match="no view"):
        cuda_pool(cuda).view(0)


# -- a share of the link ------------------------------------------------------------------------------------------------


class Link(FakeCuda):
    """Copies take a second per block."""

    def __init__(self, clock: FakeClock) -> None:
        super().__init__(Random(2).randrange)
        self.clock = clock

    def copy(self, stream: FakeStream, copies: Iterable[Copy]) -> None:
        copies = list(copies)
        self.clock.advance(sum(copy.size for copy in copies) / SIZE)
        super().copy(stream, copies)


def test_paced_copies_use_their_share_and_the_pause_outlives_the_call() -> None:
    clock, pauses = FakeClock(), list[float]()
    cuda = Link(clock)

    def wait(seconds: float) -> None:
        pauses.append(seconds)
        clock.advance(seconds)

    pool, host = cuda_pool(cuda, clock=clock, wait=wait), slab(cuda)
    pool.copy_out([0, 1], host, [0, 1], after=pool.mark(), share=0.25)
    assert pauses == []  # the pause comes when there is more to copy
    pool.copy_out([2], host, [2], after=pool.mark(), share=0.25)
    assert pauses == [6.0]  # 2 s of copying are a quarter of 8 s
    clock.advance(3)
    pool.copy_out([3], host, [3], after=pool.mark())
    pool.copy_in(host, [3], [4], after=pool.mark())
    assert pauses == [6.0]  # what is not paced does not wait
    clock.advance(100)
    pool.copy_out([4], host, [4], after=pool.mark(), share=0.5)
    assert pauses == [6.0]


def test_a_pause_has_an_end_however_small_the_share() -> None:
    clock, pauses = FakeClock(), list[float]()
    cuda = Link(clock)
    pool, host = cuda_pool(cuda, clock=clock, wait=pauses.append), slab(cuda)
    for page in (0, 1):
        pool.copy_out([page], host, [page], after=pool.mark(), share=1e-9)
    assert pauses == [10.0]


def test_the_time_until_the_mark_is_not_the_link_s() -> None:
    clock, pauses = FakeClock(), list[float]()
    cuda = Link(clock)
    pool, host = cuda_pool(cuda, clock=clock, wait=pauses.append), slab(cuda)
    cuda.compute(lambda: clock.advance(50))
    pool.copy_out([0], host, [0], after=pool.mark(), share=0.5)
    pool.copy_out([1], host, [1], after=pool.mark(), share=0.5)
    assert pauses == [1.0]


def test_a_large_copy_is_cut_so_that_pauses_stay_short() -> None:
    copies = [Copy(0, 1 << 40, 2 * PACED_BYTES + 5), Copy(1 << 30, 1 << 41, 7)]
    pieces = list(_pieces(copies, PACED_BYTES))
    assert [sum(copy.size for copy in piece) for piece in pieces] == [PACED_BYTES, PACED_BYTES, 12]
    assert pieces[2] == [Copy(2 * PACED_BYTES, (1 << 40) + 2 * PACED_BYTES, 5), copies[1]]


def test_no_share_at_all_is_refused(cuda: FakeCuda) -> None:
    pool = cuda_pool(cuda)
    with pytest.raises(ValueError, match="share"):
        pool.copy_out([0], slab(cuda), [0], after=pool.mark(), share=0)


# -- which way is faster ------------------------------------------------------------------------------------------------


class Timed(FakeCuda):
    """Each call takes as long as it is told."""

    def __init__(self, clock: FakeClock, *, each_s: float, batch_s: float) -> None:
        super().__init__(Random(3).randrange)
        self.clock, self.each_s, self.batch_s = clock, each_s, batch_s
        self.measured = 0

    def copy(self, stream: FakeStream, copies: Iterable[Copy]) -> None:
        self.measured += 1
        self.clock.advance(self.each_s)
        super().copy(stream, copies)

    def copy_batch(self, stream: FakeStream, copies: Sequence[Copy]) -> None:
        self.clock.advance(self.batch_s)
        super().copy_batch(stream, copies)


@pytest.mark.parametrize(("each_s", "batch_s", "batches"), [(2.0, 1.0, True), (1.0, 2.0, False)])
def test_the_faster_way_is_taken_and_remembered(tmp_path: Path, each_s: float, batch_s: float, batches: bool) -> None:
    file, clock = tmp_path / "cache" / "device.json", FakeClock()
    cuda = Timed(clock, each_s=each_s, batch_s=batch_s)
    assert cuda_pool(cuda, clock=clock, calibration=file).batches is batches
    assert json.loads(file.read_text())["timings"] == {
        f"fake, blocks of {SIZE} bytes": {"one_by_one_s": 2 * each_s, "batched_s": 2 * batch_s}
    }
    again = Timed(clock, each_s=batch_s, batch_s=each_s)
    assert cuda_pool(again, clock=clock, calibration=file).batches is batches
    assert again.measured == 0
    again.name = "another card"
    assert cuda_pool(again, clock=clock, calibration=file).batches is not batches
    assert len(json.loads(file.read_text())["timings"]) == 2
    assert [path.name for path in file.parent.iterdir()] == ["device.json"]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        '{"format": 2}',
        '{"format": 1}',
        '{"format": 1, "timings": []}',
        '{"format": 1, "timings": {"KEY": {}}}',
        '{"format": 1, "timings": {"KEY": {"one_by_one_s": "1", "batched_s": 2}}}',
        '{"format": 1, "timings": {"KEY": {"one_by_one_s": NaN, "batched_s": 2}}}',
        '{"format": 1, "timings": {"KEY": {"one_by_one_s": 1, "batched_s": -2, "more": 1}}}',
        "\x00\xff",
    ],
)
def test_a_broken_file_is_measured_again_and_replaced(tmp_path: Path, text: str) -> None:
    file, clock = tmp_path / "device.json", FakeClock()
    file.write_bytes(text.replace("KEY", f"fake, blocks of {SIZE} bytes").encode("latin-1"))
    assert cuda_pool(Timed(clock, each_s=2, batch_s=1), clock=clock, calibration=file).batches
    assert json.loads(file.read_text())["format"] == 1


def test_a_file_that_cannot_be_written_is_none(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    clock = FakeClock()
    assert cuda_pool(Timed(clock, each_s=2, batch_s=1), clock=clock, calibration=tmp_path / "file" / "x.json").batches


def test_measuring_leaves_pages_as_they_are_and_nothing_pinned(cuda: FakeCuda) -> None:
    pool = cuda_pool(cuda, num_pages=8)
    before = filled(pool).copy()
    measure(cuda, pool=pool.pool.data_ptr(), num_pages=8, block_bytes=SIZE, clock=FakeClock())
    assert (bytes_of(pool) == before).all()
    assert cuda.pinned == {} and cuda.idle


def test_what_cannot_be_measured_is_copied_one_by_one(cuda: FakeCuda, caplog: pytest.LogCaptureFixture) -> None:
    cuda.fail_after = 0
    assert not cuda_pool(cuda).batches
    assert "not batched" in caplog.text
    assert cuda.pinned == {}
    cuda.batches = False
    assert not choose_batches(cuda, pool=0, num_pages=8, block_bytes=SIZE, clock=FakeClock(), path=None)


# -- refusals -----------------------------------------------------------------------------------------------------------


def test_a_pool_that_does_not_fit_says_what_is_free_and_what_to_set(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 80.00 GiB.\nSee the documentation")

    cuda.memory = 3 << 30
    monkeypatch.setattr(torch, "zeros", refuse)
    with pytest.raises(ConfigError) as caught:
        cuda_pool(cuda, num_pages=(5 << 30) // SIZE)
    message = str(caught.value)
    assert "5.00 GiB" in message and "3.00 GiB are free" in message and "\n" not in message
    assert "device.capacity" in message and "device.gpu_memory_utilization" in message


def fake_cupy(**runtime: Any) -> Any:
    """As much of CuPy as is asked before a device is opened."""

    class CUDARuntimeError(RuntimeError):
        pass

    def missing() -> int:
        raise CUDARuntimeError("cudaErrorInsufficientDriver: CUDA driver version is insufficient")

    parts: dict[str, Any] = {
        "getDeviceCount": missing,
        "runtimeGetVersion": lambda: 13020,
        "CUDARuntimeError": CUDARuntimeError,
    }
    return SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(**(parts | runtime))))


@pytest.mark.parametrize(
    ("cupy", "says"),
    [
        (None, "pip install 'tierkv"),
        (fake_cupy(driverGetVersion=lambda: 0), "no NVIDIA driver"),
        (fake_cupy(driverGetVersion=lambda: 12040), "the driver is of CUDA 12.4, CuPy was built for CUDA 13.2"),
        (fake_cupy(getDeviceCount=lambda: 2), "sees 2 devices"),
    ],
)
def test_without_cupy_or_driver_the_device_is_refused_with_the_remedy(
    cupy: Any, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    with pytest.raises(ConfigError, match=says):
        open_cuda(2)
    with pytest.raises(ConfigError, match=says):
        page_pool(layout=SMALL, num_pages=1, device=torch.device("cuda", 2))


def test_the_device_decides_which_pool_it_is(cuda: FakeCuda) -> None:
    assert type(page_pool(layout=SMALL, num_pages=1, device=CPU)) is PagePool
    assert type(page_pool(layout=SMALL, num_pages=1, device=CPU, cuda=cuda)) is PagePool


# -- the fake -----------------------------------------------------------------------------------------------------------


def test_the_fake_refuses_what_cuda_refuses(cuda: FakeCuda) -> None:
    memory = np.zeros(64, np.uint8)
    start = memory.ctypes.data
    cuda.host_register(start, 32)
    with pytest.raises(TierError, match="already"):
        cuda.host_register(start + 16, 32)
    cuda.host_register(start + 32, 32)
    other = np.zeros(64, np.uint8)
    with pytest.raises(TierError, match="leave"):
        cuda.copy(cuda.new_stream(), [Copy(start + 16, other.ctypes.data, 32)])
    cuda.host_unregister(start)
    with pytest.raises(TierError, match="not registered"):
        cuda.host_unregister(start)
    cuda.copy(cuda.torch, [Copy(start + 32, other.ctypes.data, 32)])
    with pytest.raises(AssertionError, match="under a copy"):
        cuda.host_unregister(start + 32)


def test_the_fake_forgets_streams_and_events_that_nobody_holds_and_does_their_work(cuda: FakeCuda) -> None:
    held = (cuda.new_stream(), cuda.mark())
    done: list[int] = []
    cuda.compute(lambda: done.append(1))
    cuda.record(cuda.new_stream())
    assert (len(cuda.streams), cuda.num_events) == (2, 1)
    del held
    assert (len(cuda.streams), cuda.num_events) == (1, 0)
    cuda.run_all()
    assert done == [1]


def test_the_fake_says_when_a_host_would_wait_for_ever(cuda: FakeCuda) -> None:
    event = cuda.record(cuda.new_stream())
    cuda.run_all()
    event.wait()
    stuck, never = cuda.new_stream(), cuda.new_stream()
    late = cuda.record(never)
    never.queue.clear()  # what the event was recorded behind is never queued
    cuda.wait(stuck, late)
    with pytest.raises(TierError, match="for ever"):
        cuda.run_all()


def test_a_fake_batch_runs_in_many_orders() -> None:
    seen = set()
    for seed in range(40):
        cuda = FakeCuda(Random(seed).randrange)
        source, target = np.arange(1, 9, dtype=np.uint8), np.zeros(8, np.uint8)
        stream = cuda.new_stream()
        cuda.copy_batch(stream, [Copy(target.ctypes.data + at, source.ctypes.data + at, 2) for at in (0, 2, 4, 6)])
        cuda.step()
        cuda.step()
        seen.add(tuple(target.nonzero()[0]))
    assert len(seen) > 10
