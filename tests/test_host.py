"""The host slab: usable from the start, touched and pinned piece by piece meanwhile, given back whatever happens."""

import gc
import logging
import mmap
import os
import subprocess
import sys
from collections import deque
from contextlib import ExitStack
from itertools import pairwise, takewhile
from pathlib import Path
from threading import Event, Thread
from threading import enumerate as enumerate_threads

import numpy as np
import pytest

from tierkv.assembly import open_store
from tierkv.config import Config, DiskConfig, HostConfig
from tierkv.errors import ConfigError, TierError, TierKVError
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.mover import LaneSpec, Mover
from tierkv.testing import StepExecutor
from tierkv.tiers import host as host_module
from tierkv.tiers.host import HostSlab
from tierkv.tiers.host_memory import available_memory, populate

BLOCK = 5000  # takes two memory pages of 4,096 bytes
PLACES = 11
GIB = 1 << 30


class Driver:
    """Registers memory as CUDA does: refuses what overlaps, and its n-th call, for the n that a test likes."""

    def __init__(self, slab: HostSlab, *, fails: int | None = None, error: type[Exception] = RuntimeError) -> None:
        self.first, self.size, self.stride = slab.rows.ctypes.data, slab.rows.nbytes, slab.stride
        self.fails, self.error, self.calls = fails, error, 0
        self.live: dict[int, int] = {}
        self.all: list[tuple[int, int]] = []

    def register(self, address: int, size: int) -> None:
        self._call()
        assert size > 0 and self.first <= address and address + size <= self.first + self.size
        assert (address - self.first) % self.stride == size % self.stride == 0, "a place is split"
        assert address % mmap.PAGESIZE == 0
        assert all(address + size <= at or at + length <= address for at, length in self.live.items()), "overlaps"
        self.live[address] = size
        self.all.append((address, size))

    def unregister(self, address: int) -> None:
        del self.live[address]  # KeyError, which nobody catches: never registered, or twice unregistered
        self._call()

    def _call(self) -> None:
        number, self.calls = self.calls, self.calls + 1
        if number == self.fails:
            raise self.error(f"call {number} was refused")

    @property
    def fired(self) -> bool:
        return self.fails is not None and self.calls > self.fails


def small(*, num_places: int = PLACES, pieces_of: int = 3) -> HostSlab:
    return HostSlab(num_places=num_places, block_bytes=BLOCK, piece_bytes=pieces_of * 8192)


# -- places -----------------------------------------------------------------------------------------------------------


def test_places_are_aligned_apart_and_usable_before_anything_is_touched() -> None:
    slab = small()
    assert (slab.stride, slab.rows.shape, slab.rows.ctypes.data % 4096) == (8192, (PLACES, 8192), 0)
    for place in range(PLACES):
        slab.view(place)[:] = bytes([place]) * BLOCK
    assert [set(slab.view(place)) for place in range(PLACES)] == [{place} for place in range(PLACES)]
    slab.close()


def test_touching_leaves_what_is_written_as_it_is() -> None:
    slab = small()
    written = np.random.default_rng(1).integers(0, 256, slab.rows.shape, np.uint8)
    slab.rows[:5] = written[:5]
    steps = slab.touch()
    assert next(steps) == 3 * slab.stride
    slab.rows[5:] = written[5:]
    assert list(steps) == [6 * slab.stride, 9 * slab.stride, 11 * slab.stride]
    assert np.array_equal(slab.rows, written)
    slab.close()


def test_touched_memory_is_present() -> None:
    slab = HostSlab(num_places=4, block_bytes=1 << 20)
    before = resident()
    list(slab.touch())
    assert resident() - before >= 4 << 20
    slab.close()


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE


def test_memory_that_is_not_there_cannot_be_populated(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "tierkv"):
        assert not populate(mmap.PAGESIZE, mmap.PAGESIZE)
    assert "not touched ahead of use" in caplog.text


def test_a_kernel_that_cannot_populate_is_asked_once_and_pinning_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    monkeypatch.setattr(host_module, "populate", lambda address, size: bool(asked.append(address)))
    slab = small()
    driver = Driver(slab)
    list(slab.pin(driver.register, driver.unregister))
    assert len(asked) == 1 and slab.pinned
    slab.close()


def test_a_slab_larger_than_the_machine_is_refused_at_start() -> None:
    with pytest.raises(ConfigError, match=r"host\.capacity: 1048576\.00 GiB asked for, .* are free \(.+\); lower it"):
        HostSlab(num_places=1 << 20, block_bytes=GIB)


# -- pieces -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("num_places", "piece_bytes", "expected"),
    [(11, 8192 * 3, 3), (11, 8192 * 4 - 1, 3), (11, 1, 1), (11, GIB, 11), (1, 8192 * 3, 1)],
)
def test_a_piece_is_whole_places_and_at_least_one(num_places: int, piece_bytes: int, expected: int) -> None:
    slab = HostSlab(num_places=num_places, block_bytes=BLOCK, piece_bytes=piece_bytes)
    assert slab.piece_places == expected
    slab.close()


def test_pieces_end_on_memory_pages_where_those_are_larger_than_a_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmap, "PAGESIZE", 1 << 16)  # as on some aarch64 machines
    slab = small(num_places=40, pieces_of=9)
    assert slab.piece_places == 8
    slab.close()


def test_pinning_covers_every_place_and_counts_as_it_goes() -> None:
    slab = small()
    driver = Driver(slab)
    assert (slab.pinned, slab.pinned_bytes) == (False, 0)
    for done in slab.pin(driver.register, driver.unregister):
        assert slab.pinned_bytes == sum(driver.live.values()) == done
    assert slab.pinned
    ends = [(address, address + size) for address, size in driver.all]
    assert all(end == start for (_, end), (start, _) in pairwise(ends))
    assert all(size == slab.piece_places * slab.stride for _, size in driver.all[:-1])
    slab.close()
    assert not driver.live and slab.pinned_bytes == 0 and driver.calls == 2 * len(driver.all)


def test_a_piece_is_touched_in_steps_and_registered_after_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host_module, "STEP_BYTES", 2 * 8192)
    slab = small(num_places=8)  # pieces of 3, 3 and 2 places
    driver = Driver(slab)
    pinned = [(done // 8192, slab.pinned_bytes // 8192) for done in slab.pin(driver.register, driver.unregister)]
    assert pinned == [(2, 0), (3, 3), (5, 3), (6, 6), (8, 8)]
    slab.close()


@pytest.mark.parametrize("error", [RuntimeError, TierError, OSError])
def test_every_call_to_the_driver_may_fail(error: type[Exception], caplog: pytest.LogCaptureFixture) -> None:
    for number in range(100):
        caplog.clear()
        slab = small()
        driver = Driver(slab, fails=number, error=error)
        places = list(slab.pin(driver.register, driver.unregister))
        refused = driver.fired
        assert places[-1] == slab.rows.nbytes, "what is not pinned is touched all the same"
        assert slab.pinned_bytes == sum(driver.live.values()) == min(number * 3, PLACES) * slab.stride
        assert slab.pinned == (not refused)
        slab.rows[:] = 7
        slab.close()
        slab.close()
        assert not driver.live and slab.pinned_bytes == 0
        warnings = [record for record in caplog.records if record.levelno >= logging.WARNING]
        assert len(warnings) == refused, "one warning, and none at the end, when nobody can do anything about it"
        if not driver.fired:
            assert number == 8  # four pieces
            return


@pytest.mark.parametrize(
    ("limit", "remedy"),
    [(64 << 10, "locked memory is limited to 64 KiB: raise it"), (-1, "locked memory is not limited here")],
)
def test_the_warning_says_what_was_asked_what_is_there_and_the_remedy(
    limit: int, remedy: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("resource.getrlimit", lambda which: (limit, limit))
    slab = HostSlab(num_places=40, block_bytes=1 << 20, piece_bytes=10 << 20)
    driver = Driver(slab, fails=2)
    list(slab.pin(driver.register, driver.unregister))
    assert "0.02 GiB of 0.04 GiB of host memory are pinned" in caplog.text
    assert "0.01 GiB more were refused (call 2 was refused)" in caplog.text and remedy in caplog.text
    slab.close()


# -- the end ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", range(6))
def test_closed_after_any_piece_all_that_was_registered_is_unregistered(steps: int) -> None:
    slab = small()
    driver = Driver(slab)
    pinning = slab.pin(driver.register, driver.unregister)
    for _ in zip(range(steps), pinning, strict=False):
        pass
    registered = len(driver.all)
    slab.close()
    assert list(pinning) == [] and len(driver.all) == registered
    assert not driver.live and slab.pinned_bytes == 0


def test_closed_while_a_piece_is_being_registered_it_waits_for_that_piece_alone() -> None:
    slab = small()
    driver, begun, go_on = Driver(slab), Event(), Event()

    def register(address: int, size: int) -> None:
        begun.set()
        assert go_on.wait(10)
        driver.register(address, size)

    pinning = Thread(target=lambda: list(slab.pin(register, driver.unregister)))
    pinning.start()
    assert begun.wait(10)
    closing = Thread(target=slab.close)
    closing.start()
    closing.join(0.05)
    assert closing.is_alive(), "it waits"
    go_on.set()
    closing.join(10)
    pinning.join(10)
    assert len(driver.all) == 1 and not driver.live


def test_closed_between_touching_and_registering_a_piece_that_piece_is_not_registered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    slab = small()
    driver = Driver(slab)

    def closes(address: int, size: int) -> bool:
        if address > driver.first:
            slab.close()
        return True

    monkeypatch.setattr(host_module, "populate", closes)
    list(slab.pin(driver.register, driver.unregister))
    assert len(driver.all) == 1 and not driver.live


def test_a_slab_that_nobody_closes_is_unregistered_when_it_goes() -> None:
    slab = small()
    driver = Driver(slab)
    list(slab.pin(driver.register, driver.unregister))
    del slab
    gc.collect()
    assert len(driver.all) == 4 and not driver.live


def test_a_store_that_cannot_be_opened_leaves_nothing_pinned() -> None:
    steps = StepExecutor()
    with pytest.raises(TierError, match="no such disk"), ExitStack() as opened:
        slab = small()
        opened.callback(slab.close)
        driver = Driver(slab)
        mover = Mover({"load": LaneSpec(1, 1)}, metrics=Metrics(), executor=lambda name, spec: steps)
        opened.callback(mover.close)
        mover.background("pin", slab.pin(driver.register, driver.unregister))
        steps.step()
        steps.step()
        assert len(driver.live) == 2
        raise TierError("no such disk")
    assert len(driver.all) == 2 and not driver.live and not steps.queue


def test_a_store_that_a_tier_refuses_stops_touching_its_slab(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    layout = Layout(num_layers=2, num_kv_heads=2, head_dim=8, dtype="float32", block_tokens=16)
    config = Config(host=HostConfig(capacity=256 << 20), disk=DiskConfig(path=tmp_path / "file"))
    before = set(enumerate_threads())
    with pytest.raises(TierKVError):
        open_store(config, layout=layout, model="test")
    assert set(enumerate_threads()) <= before


EXITS = {
    "pinned": "",
    "while it is being pinned": "slow = True",
    "with an exception": "raise SystemExit(3)",
}


@pytest.mark.parametrize("how", EXITS)
def test_a_process_that_ends_without_close_unregisters(how: str) -> None:
    code = f"""
import time
from threading import Event
from tierkv.metrics import Metrics
from tierkv.mover import Mover
from tierkv.tiers.host import HostSlab
slab, begun, slow = HostSlab(num_places=400, block_bytes=4096, piece_bytes=4096), Event(), False
def register(address, size):
    print("+", address, flush=True)
    begun.set()
    time.sleep(0.05 if slow else 0)
def unregister(address):
    print("-", address, flush=True)
mover = Mover({{}}, metrics=Metrics())
{EXITS[how] if "slow" in EXITS[how] else ""}
mover.background("pin", slab.pin(register, unregister))
begun.wait()
while not slow and not slab.pinned:
    time.sleep(0.001)
{EXITS[how]}
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stderr == "" and done.returncode == (3 if "raise" in EXITS[how] else 0)
    calls = [line.split() for line in done.stdout.splitlines()]
    came = [address for sign, address in calls if sign == "+"]
    assert sorted(came) == sorted(address for sign, address in calls if sign == "-") and len(set(came)) == len(came)
    assert [sign for sign, _ in takewhile(lambda call: call[0] == "+", calls)] == ["+"] * len(came)
    assert len(came) < 400 if "slow" in EXITS[how] else len(came) == 400


def test_a_forked_child_leaves_its_parents_registrations_alone() -> None:
    slab = small()
    driver = Driver(slab)
    list(slab.pin(driver.register, driver.unregister))
    child = os.fork()
    if child == 0:
        slab.close()
        os._exit(0 if len(driver.live) == 4 else 1)
    assert os.waitpid(child, 0)[1] == 0
    slab.close()
    assert not driver.live


# -- a mapping that is handed in --------------------------------------------------------------------------------------


def test_an_adopted_mapping_is_used_pinned_and_left_mapped() -> None:
    with mmap.mmap(-1, PLACES * 8192 + 4096) as memory:  # shared, as a daemon's
        slab = HostSlab(num_places=PLACES, block_bytes=BLOCK, buffer=memory, piece_bytes=3 * 8192)
        driver = Driver(slab)
        list(slab.pin(driver.register, driver.unregister))
        assert slab.pinned
        slab.view(2)[:3] = b"kv!"
        slab.close()
        assert not driver.live
        assert memory[2 * 8192 : 2 * 8192 + 3] == b"kv!"


def test_an_adopted_mapping_must_be_large_enough() -> None:
    with mmap.mmap(-1, 8192) as memory, pytest.raises(ValueError, match="8192 bytes given, 2 places take 16384"):
        HostSlab(num_places=2, block_bytes=BLOCK, buffer=memory)


# -- what the machine gives -------------------------------------------------------------------------------------------

MEMINFO = "MemTotal: 16777216 kB\nMemFree: 1 kB\nMemAvailable: 8388608 kB\n"
V2 = "31 23 0:28 {root} {top} rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
V1 = "35 31 0:32 {root} {top} rw,relatime shared:9 - cgroup cgroup rw,memory\n36 31 0:33 / /nowhere rw - cgroup cgroup rw,cpu\n"


def proc(root: Path, *, groups: str, mounts: str) -> Path:
    (root / "proc" / "self").mkdir(parents=True)
    (root / "proc" / "meminfo").write_text(MEMINFO)
    (root / "proc" / "self" / "cgroup").write_text(groups)
    (root / "proc" / "self" / "mountinfo").write_text(f"23 1 8:1 / / rw,relatime - ext4 /dev/root rw\n{mounts}")
    return root / "proc"


def group(folder: Path, **files: object) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in files.items():
        (folder / f"memory.{name}").write_text(f"{content}\n")


def test_without_control_groups_the_machine_says_what_is_free(tmp_path: Path) -> None:
    assert available_memory(proc(tmp_path, groups="", mounts="")) == (8 * GIB, "MemAvailable")


def test_without_anything_all_memory_is_taken_for_free(tmp_path: Path) -> None:
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    assert available_memory(tmp_path) == (size, "all memory")


def test_a_container_of_version_2_counts_less_what_it_uses_and_cannot_drop(tmp_path: Path) -> None:
    top = tmp_path / "cgroup"
    group(top, max=4 * GIB, current=2 * GIB, stat=f"anon 5\ninactive_file {GIB}\nactive_file 7")
    at = proc(tmp_path, groups="0::/\n", mounts=V2.format(root="/", top=top))
    assert available_memory(at) == (3 * GIB, str(top / "memory.max"))


def test_every_group_above_counts_too(tmp_path: Path) -> None:
    top = tmp_path / "cgroup"
    group(top / "pod" / "engine", max="max", current=0, stat="")
    group(top / "pod", max=2 * GIB, current=0, stat="")
    at = proc(tmp_path, groups="0::/pod/engine\n", mounts=V2.format(root="/", top=top))
    assert available_memory(at) == (2 * GIB, str(top / "pod" / "memory.max"))


@pytest.mark.parametrize(
    ("path", "root"),
    [("/docker/4f", "/docker/4f"), ("/docker/4f/in", "/docker/4f"), ("/../x", "/"), ("/else", "/docker")],
)
def test_a_container_of_version_1_is_found_whatever_its_path_is_told_from(tmp_path: Path, path: str, root: str) -> None:
    top = tmp_path / "cgroup"
    group(top / "in", limit_in_bytes=9223372036854771712, usage_in_bytes=5, stat="cache 1")
    group(top, limit_in_bytes=4 * GIB, usage_in_bytes=3 * GIB, stat=f"inactive_file 1\ntotal_inactive_file {GIB // 2}")
    groups = f"5:cpu:/other\n4:hugetlb,memory:{path}\n0::/\n"
    at = proc(tmp_path, groups=groups, mounts=V1.format(root=root, top=top))
    assert available_memory(at) == (3 * GIB // 2, str(top / "memory.limit_in_bytes"))


def test_a_group_past_its_limit_has_nothing_left(tmp_path: Path) -> None:
    top = tmp_path / "cgroup"
    group(top, max=GIB, current=2 * GIB, stat="inactive_file 3")
    at = proc(tmp_path, groups="0::/\n", mounts=V2.format(root="/", top=top))
    assert available_memory(at)[0] == 0


def test_a_slab_larger_than_its_container_is_refused_and_told_whose_limit_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    top = tmp_path / "cgroup"
    group(top, max=40 << 20, current=0, stat="")
    at = proc(tmp_path, groups="0::/\n", mounts=V2.format(root="/", top=top))
    monkeypatch.setattr(host_module, "available_memory", lambda: available_memory(at))
    HostSlab(num_places=40, block_bytes=1 << 20).close()
    with pytest.raises(ConfigError, match=r"0\.04 GiB of memory are free \(.*memory\.max\); lower it"):
        HostSlab(num_places=41, block_bytes=1 << 20)


def test_a_closed_slab_gives_its_memory_back_while_somebody_still_holds_it() -> None:
    slab = HostSlab(num_places=64, block_bytes=1 << 20)
    empty = resident_bytes()
    deque(slab.touch(), maxlen=0)
    assert resident_bytes() - empty > 48 << 20
    slab.close()
    assert resident_bytes() - empty < 16 << 20


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
