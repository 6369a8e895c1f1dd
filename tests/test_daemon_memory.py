"""The memory that a daemon shares: who may change its size, who may write, and what a copy out of it is worth."""

import fcntl
import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.daemon_parts import raw, running
from tierkv.daemon.memory import STEP_BYTES, Region, copy_in, copy_out, create, digest, reader_of
from tierkv.errors import TierError
from tierkv.testing import SMALL

NOBODY = 65534
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="becomes another user")


@pytest.fixture
def fd() -> int:
    return create("test", Region.size_of(4, 5000))


def test_nobody_can_change_the_size_of_the_memory(fd: int) -> None:
    size = os.fstat(fd).st_size
    for other in (0, size - 1, size + 4096):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, other)
    with pytest.raises(PermissionError):
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)  # which would take it from whoever writes
    assert os.fstat(fd).st_size == size
    os.close(fd)


def test_what_a_client_is_given_cannot_be_made_smaller_either(tmp_path: Path) -> None:
    with running(tmp_path) as daemon, raw(daemon.urls[0]) as client:
        client.attach(memory=1)
        (fd,) = client.fds
        for size in (0, os.fstat(fd).st_size // 2):
            with pytest.raises(PermissionError):
                os.ftruncate(fd, size)
        with pytest.raises(PermissionError):
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE)
        assert daemon.pool.slab.num_places * SMALL.block_bytes < os.fstat(fd).st_size


def test_a_readers_mapping_cannot_be_written(fd: int) -> None:
    reader = reader_of(fd)
    region = Region(fd, num_places=4, block_bytes=5000, writable=True)
    seen = Region(reader, num_places=4, block_bytes=5000, writable=False)
    region.rows[2, :5] = np.frombuffer(b"block", np.uint8)
    assert bytes(seen.rows[2, :5]) == b"block"
    with pytest.raises(ValueError, match="read-only"):
        seen.rows[2, 0] = 1
    with pytest.raises(TypeError):
        seen.mapping[0] = 1
    with pytest.raises(PermissionError):
        mmap.mmap(reader, 4096, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    with pytest.raises(TierError, match="cannot be mapped"):
        Region(reader, num_places=4, block_bytes=5000, writable=True)
    os.close(reader)
    os.close(fd)


STRANGER = """
import mmap, os, sys
fd = int(sys.argv[1])
os.setgroups([]), os.setgid(65534), os.setuid(65534)
def refused(call):
    try:
        call()
    except PermissionError:
        return True
    return False
assert refused(lambda: os.open(f"/proc/self/fd/{fd}", os.O_RDWR)), "opened for writing"
assert refused(lambda: os.open(f"/proc/self/fd/{fd}", os.O_WRONLY | os.O_TRUNC)), "opened for writing"
assert refused(lambda: os.fchmod(fd, 0o777)), "made writable"
assert refused(lambda: mmap.mmap(fd, 4096, flags=mmap.MAP_SHARED, prot=mmap.PROT_WRITE)), "mapped for writing"
assert len(mmap.mmap(fd, 4096, flags=mmap.MAP_SHARED, prot=mmap.PROT_READ)) == 4096
print("reads alone")
"""


@needs_root
def test_a_reader_of_another_user_cannot_open_it_for_writing(fd: int) -> None:
    reader = reader_of(fd)
    told = subprocess.run(
        [sys.executable, "-c", STRANGER, str(reader)], pass_fds=[reader], capture_output=True, text=True, check=False
    )
    assert told.stdout.strip() == "reads alone", told.stderr
    os.close(reader)
    os.close(fd)


def test_memory_that_is_too_small_for_its_places_is_not_mapped(fd: int) -> None:
    with pytest.raises(TierError, match="5 places take"):
        Region(fd, num_places=5, block_bytes=5000, writable=False)
    os.close(fd)
    with pytest.raises(TierError):
        Region(fd, num_places=4, block_bytes=5000, writable=False)


def test_places_are_whole_pages_apart_and_after_the_generations(fd: int) -> None:
    region = Region(fd, num_places=4, block_bytes=5000, writable=True)
    region.rows[:, :] = 255
    assert not region.generations.any() and region.stride == 8192 and len(region.places) == 4 * 8192
    region.generations[:] = 1 << 60
    assert (region.rows == 255).all()
    os.close(fd)


def test_the_memory_outlives_the_daemon_as_long_as_it_is_mapped(fd: int) -> None:
    theirs = Region(fd, num_places=4, block_bytes=5000, writable=True)
    ours = Region(fd, num_places=4, block_bytes=5000, writable=False)
    theirs.rows[1, 0] = 7
    row = ours.rows[1]
    theirs.close(), ours.close()
    os.close(fd)
    assert row[0] == 7


# -- what guards a block ----------------------------------------------------------------------------------------------------

SIZES = st.sampled_from([1, 7, 4096, 5120, STEP_BYTES - 1, STEP_BYTES, STEP_BYTES + 1, 2 * STEP_BYTES + 5000])
KEYS = st.binary(min_size=32, max_size=32)


@settings(max_examples=30, deadline=None)
@given(size=SIZES, key=KEYS, seed=st.integers(0, 1000))
def test_copies_are_whole_and_have_the_digest_of_the_block(size: int, key: bytes, seed: int) -> None:
    block = np.random.default_rng(seed).integers(0, 256, size, np.uint8)
    place, out = np.zeros(size, np.uint8), np.zeros(size, np.uint8)
    assert copy_in(block, place, key) == digest(block.data, key) == copy_out(place, out, key)
    assert np.array_equal(out, block)


@settings(max_examples=30, deadline=None)
@given(size=SIZES, key=KEYS, at=st.integers(0, 1 << 30), bit=st.integers(0, 7))
def test_one_bit_of_a_place_changes_the_digest_of_the_copy(size: int, key: bytes, at: int, bit: int) -> None:
    block = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    place = np.zeros(size, np.uint8)
    expected = copy_in(block, place, key)
    place[at % size] ^= 1 << bit
    assert copy_out(place, np.empty(size, np.uint8), key) != expected


@settings(max_examples=50, deadline=None)
@given(first=KEYS, second=KEYS, size=SIZES)
def test_a_block_in_the_place_of_another_key_does_not_verify(first: bytes, second: bytes, size: int) -> None:
    block = np.random.default_rng(size).integers(0, 256, size, np.uint8)
    assert (digest(block.data, first) == digest(block.data, second)) == (first[:8] == second[:8])
