"""What a disk folder remembers besides its blocks: of every owner, of what left, across restarts and within its cap."""

import sqlite3
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.test_disk import capacity, flip, open_tier
from tierkv.errors import TierError
from tierkv.keys import Key, Namespace
from tierkv.testing import SMALL, blocks_of, make_run, read_blocks
from tierkv.tiers.disk import DiskTier
from tierkv.tiers.disk_history import MAX_NAMESPACES, MAX_NOTE_BYTES, PREFIX_BYTES, History, read_history
from tierkv.tiers.disk_inspect import folder_bytes
from tierkv.tiers.disk_manifest import NAME

RUN = make_run(30, seed=1)
NOW_S = 1_800_000_000.0


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    tier = open_tier(tmp_path, now=lambda: NOW_S)
    assert all(tier.write(RUN, blocks_of(RUN)))
    yield tier
    tier.close()


def history(tier: DiskTier) -> History:
    return read_history(tier.path / NAME)


def departed(tier: DiskTier) -> dict[bytes, tuple[float, str]]:
    return history(tier).departed


def test_what_is_deleted_for_room_leaves_its_name_and_the_time(tmp_path: Path, tier: DiskTier) -> None:
    tier.delete([*RUN.keys[20:], Key(b"x" * 32)])
    expected = {key[:PREFIX_BYTES]: (NOW_S, "evicted") for key in RUN.keys[20:]}
    assert departed(tier) == expected, "read beside its owner"
    tier.close()
    assert departed(open_tier(tmp_path)) == expected


def test_a_corrupt_block_leaves_as_such(tier: DiskTier) -> None:
    flip(tier.path, RUN.keys[5])
    assert read_blocks(tier, RUN.keys[5:6]) == [None]
    tier.delete(RUN.keys[5:6])  # what a store does with a block that did not come
    assert departed(tier) == {RUN.keys[5][:PREFIX_BYTES]: (NOW_S, "corrupt")}


def test_a_block_that_was_never_written_whole_has_not_left(tier: DiskTier) -> None:
    other = make_run(300, seed=2)  # more than there is room for
    written = tier.write(other, blocks_of(other))
    assert not all(written)
    assert departed(tier) == {}


def test_only_so_many_departures_are_remembered_as_there_are_slots(tmp_path: Path) -> None:
    tier = open_tier(tmp_path, 20)
    runs = [make_run(15, seed=seed) for seed in range(40)]
    for run in runs:
        assert all(tier.write(run, blocks_of(run)))
        tier.delete(run.keys)
    last = [key for run in runs for key in run.keys][-20:]
    assert list(departed(tier)) == [key[:PREFIX_BYTES] for key in last]
    assert folder_bytes(tier.path) <= capacity(20)
    tier.close()
    small = open_tier(tmp_path, 8)
    assert len(departed(small)) == 8
    small.close()


def test_namespaces_are_remembered_across_owners_the_last_ones(tmp_path: Path, tier: DiskTier) -> None:
    named = {
        (one := Namespace(f"model {at}", SMALL, tenant="t", adapter="a")).root(): one
        for at in range(MAX_NAMESPACES + 3)
    }
    for root, namespace in named.items():
        tier.introduce(root, namespace)
    first, *rest = list(named.items())[3:]
    tier.introduce(*first)  # used again: the last to be forgotten
    tier.close()
    again = open_tier(tmp_path)
    known = history(again).namespaces
    assert list(known) == [root for root, _ in [*rest, first]]
    assert known[first[0]] == first[1].fields()
    assert again.namespaces() == known
    assert known[first[0]]["tenant"] == "t" and known[first[0]]["num_layers"] == SMALL.num_layers
    again.close()


def test_notes_are_replaced_kept_and_limited(tmp_path: Path, tier: DiskTier) -> None:
    tier.note("reuse", "old")
    tier.note("reuse", "new")
    with pytest.raises(ValueError, match="at most"):
        tier.note("reuse", "x" * (MAX_NOTE_BYTES + 1))
    tier.close()
    tier.note("reuse", "too late")
    assert history(tier).notes == {"reuse": "new"}


def test_a_folder_of_an_older_version_is_brought_up_to_date(tmp_path: Path, tier: DiskTier) -> None:
    tier.close()
    connection = sqlite3.connect(tier.path / NAME)
    with connection:
        for table in ("namespaces", "departed", "notes"):
            connection.execute(f"DROP TABLE {table}")
    connection.close()
    assert history(tier) == History()
    again = open_tier(tmp_path)
    assert all(again.contains(RUN.keys))
    again.delete(RUN.keys[:1])
    again.introduce(RUN.root, Namespace("m", SMALL))
    assert len(departed(again)) == len(history(again).namespaces) == 1
    again.close()


def test_a_manifest_that_cannot_be_read_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / NAME).write_bytes(b"no database" * 1000)
    with pytest.raises(TierError, match="cannot be read"):
        read_history(tmp_path / NAME)


def test_a_disk_that_fails_costs_the_note_and_nothing_else(tier: DiskTier, caplog: pytest.LogCaptureFixture) -> None:
    reader = sqlite3.connect(tier.path / NAME, isolation_level=None)
    reader.execute("BEGIN IMMEDIATE")  # the owner's writes fail for as long
    tier.note("reuse", "new")
    tier.introduce(RUN.root, Namespace("m", SMALL))
    reader.execute("ROLLBACK")
    reader.close()
    assert caplog.text.count("note failed") == 2
    assert history(tier).notes == {}
    assert all(tier.contains(RUN.keys))
