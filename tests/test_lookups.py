"""What is noted of every lookup: counted reasons, distances, the access log; over an index that the test answers for."""

import json
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

from tierkv.explain import Reason
from tierkv.fates import Fate, Known
from tierkv.hints import NO_ENDING, NO_HINTS, Ending, Hints
from tierkv.keys import Key, Namespace
from tierkv.layout import Layout
from tierkv.lookups import MAX_WAITING, NOTE_EVERY_S, Lookups, Sources
from tierkv.metrics import Metrics
from tierkv.record import Recorder
from tierkv.testing import FakeClock
from tierkv.tiers.base import Miss

LAYOUT = Layout(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32", block_tokens=2)
OURS = Namespace("m", LAYOUT, tenant="a")
ROOT, OTHER = OURS.root(), Namespace("m", LAYOUT, tenant="b").root()


class Notes:
    """Lookups, and everything around them in the test's hands."""

    def __init__(self, folder: Path | None = None) -> None:
        self.clock, self.metrics = FakeClock(1000.0), Metrics()
        self.known: dict[Key, list[Known]] = {}
        self.asked = 0
        self.jobs: list[Callable[[], None]] = []
        self.full = False
        self.down: str | None = None
        self.noted: list[dict[str, Any]] = []
        self.path = folder / "log" if folder else None
        recorder = (
            Recorder(self.path, root=ROOT, layout=LAYOUT, max_bytes=1 << 20, metrics=self.metrics, now=self.clock)
            if self.path
            else None
        )
        self.lookups = Lookups(
            root=ROOT,
            block_tokens=2,
            sources=Sources(
                explain=self._explain,
                roots=lambda: list(self.known),
                tier_names=("device", "host", "disk"),
                fields=OURS.fields(),
                namespaces={OTHER: Namespace("m", LAYOUT, tenant="b").fields()},
                down=lambda: self.down,
            ),
            capacities={"device": 4, "host": 8, "disk": 100},
            metrics=self.metrics,
            submit=self._submit,
            recorder=recorder,
            note=lambda name, text: self.noted.append(json.loads(text)),
            now=self.clock,
        )

    def _explain(self, root: Key, tokens: bytes) -> Sequence[Known]:
        self.asked += 1
        return self.known.get(root, [Known(0, len(tokens) // 8, known=False)])

    def _submit(self, job: Callable[[], None]) -> bool:
        if not self.full:
            self.jobs.append(job)
        return not self.full

    def work(self) -> None:
        while self.jobs:
            self.jobs.pop(0)()

    def begin(self, blocks: int, loadable: int = 0, *, extra: int = 0, hints: Hints = NO_HINTS) -> Any:
        return self.lookups.begin(tokens(blocks, extra), num_loadable=loadable, hints=hints)

    def missed(self) -> dict[str, float]:
        return {labels[0][1]: value for _, labels, value in self.metrics.missed_blocks.samples()}


def tokens(blocks: int, extra: int = 0) -> bytes:
    return array("i", range(blocks * 2 + extra)).tobytes()


def test_a_full_hit_asks_nothing_and_counts_nothing() -> None:
    notes = Notes()
    assert notes.begin(5, 5).missing == []
    assert notes.asked == 0
    assert notes.missed() == {}


def test_reasons_are_counted_per_block_from_the_first_that_cannot_be_had() -> None:
    notes = Notes()
    lru, bad = Fate(2, 990.0, "lru"), Fate(1, 5.0, Miss.CORRUPT)
    notes.known[ROOT] = [
        Known(0, 3, (0, 1)), Known(3, 5, (), (lru, bad)), Known(5, 6, (), (bad,)), Known(6, 8, (2,)), Known(8, 9),
        Known(9, 12, known=False),
    ]  # fmt: skip
    lookup = notes.begin(12, 3, extra=1)
    assert notes.missed() == {
        "evicted": 2, "corrupt": 1, "unreachable": 2, "not_kept": 1, "never_seen": 3, "partial_tail": 1,
    }  # fmt: skip
    said = [stretch.say(block_tokens=2, now_s=1000.0) for stretch in lookup.missing]
    assert said == [
        "blocks 3-4 (tokens 6-9): evicted from disk by lru, 10 s ago",
        "block 5 (tokens 10-11): found corrupt in host, and removed, 17 min ago",
        "blocks 6-7 (tokens 12-15): in disk, but not to be reached: blocks before are missing",
        "block 8 (tokens 16-17): computed before, but not kept: no room, or the save was dropped",
        "blocks 9-11 (tokens 18-23): never seen",
        "block 12 (tokens 24-25): part of a block, which no tier keeps",
    ]


def test_what_a_shared_tier_gave_beyond_the_index_is_not_missing() -> None:
    notes = Notes()
    notes.known[ROOT] = [Known(0, 2, (0,)), Known(2, 10, known=False)]
    assert [(one.lo, one.hi) for one in notes.begin(10, 7).missing] == [(7, 10)]
    assert notes.missed() == {"never_seen": 3}


def test_a_shared_tier_that_is_down_may_have_had_it() -> None:
    notes = Notes()
    notes.down = "redis"
    assert notes.begin(4).missing[0].why() == "redis is out of use"
    assert notes.missed() == {"down": 4}


def test_blocks_that_another_tenant_computed_are_told_apart() -> None:
    notes = Notes()
    notes.known[OTHER] = [Known(0, 3, (2,)), Known(3, 6, known=False)]
    first, rest = notes.begin(6).missing
    assert (first.lo, first.hi, rest.lo, rest.hi) == (0, 3, 3, 6)
    assert first.why() == "in disk for others: the key differs in tenant ('a' here, 'b' there)"
    assert notes.missed() == {"key_differs": 3, "never_seen": 3}


def test_others_do_not_matter_where_the_own_namespace_knows_as_much() -> None:
    notes = Notes()
    notes.known[OTHER] = [Known(0, 2, (2,))]
    notes.known[ROOT] = [Known(0, 2, (0,)), Known(2, 4, known=False)]
    notes.begin(4, 2)
    assert notes.missed() == {"never_seen": 2}


def test_a_load_that_came_short_counts_with_its_reason() -> None:
    notes = Notes()
    lookup = notes.begin(5, 5)
    notes.lookups.short(lookup, 0, Miss.LATE, lo=5)
    notes.lookups.short(lookup, 2, Miss.LATE, lo=3, tier="disk")
    assert notes.missed() == {"late": 2}
    assert lookup.missing[0].say(block_tokens=2) == "blocks 3-4 (tokens 6-9): did not come in time from disk"


def test_every_reason_has_words_and_every_miss_is_a_reason() -> None:
    from tierkv.explain import Stretch

    said = {reason: Stretch(0, 1, ("disk",), reason, differs=(("tenant", 1, 2),)).why() for reason in Reason}
    assert len(set(said.values())) == len(Reason)
    assert {miss.value for miss in Miss} <= {reason.value for reason in Reason}


def test_requests_are_recorded_when_they_end_and_their_answers_are_used(tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    first = notes.begin(3, hints=Hints("s"))
    notes.clock.advance(5)
    second = notes.begin(4)
    notes.lookups.end(second, NO_ENDING)
    notes.lookups.end(first, Ending(output_tokens=6), written=array("i", range(100, 106)).tobytes())
    notes.work()
    assert notes.path
    _, one, other = map(json.loads, notes.path.read_text().splitlines())
    assert (one["t"], one["in"], other["t"], other["in"], other["out"]) == (5.0, 8, 0.0, 6, 6)
    distances = notes.lookups.distances
    before = distances.hit_shares([6, 7])
    # Its prompt's three blocks are the last used, then the answer's three; the second prompt's fourth block is behind them.
    notes.begin(3, 3)
    notes.work()
    assert [share * distances.num_refs for share in distances.hit_shares([2, 3])] == pytest.approx([4.0, 6.0])
    again = array("i", [*range(6), *range(100, 106)]).tobytes()
    notes.lookups.begin(again, num_loadable=6, hints=NO_HINTS)
    notes.work()
    assert [share * distances.num_refs for share in distances.hit_shares([5, 6])] == pytest.approx([11.0, 12.0])
    assert [share * 7 for share in before] == pytest.approx([3.0, 3.0])


def test_a_full_lane_costs_the_note_only(tmp_path: Path) -> None:
    notes = Notes(tmp_path)
    notes.full = True
    lookup = notes.begin(3)
    notes.full = False
    notes.lookups.end(lookup, NO_ENDING)  # of a request whose beginning is not known
    other = notes.begin(3)
    notes.full = True
    notes.lookups.end(other, NO_ENDING)
    notes.work()
    assert notes.metrics.records_dropped.value("queue") == 2
    assert notes.metrics.requests_recorded.value() == 0
    assert notes.missed() == {"never_seen": 6}
    assert MAX_WAITING > 100


def test_shares_at_other_capacities_are_metrics_and_notes() -> None:
    notes = Notes()
    for _ in range(10):
        lookup = notes.begin(12, 12)
        notes.lookups.end(lookup, NO_ENDING)
    notes.work()
    share = notes.metrics.capacity_hit_share
    # Twelve blocks over and over: nine of ten times, as many as fit.
    assert share.value("device", "1") == pytest.approx(0.9 * 4 / 12)
    assert share.value("device", "2") == pytest.approx(0.9 * 8 / 12)
    assert share.value("host", "2") == share.value("disk", "1") == pytest.approx(0.9)
    assert share.value("host", "0.5") == share.value("device", "1"), "no tier holds less than a faster one"
    assert notes.noted == []
    notes.clock.advance(NOTE_EVERY_S)
    notes.lookups.end(notes.begin(12, 12), NO_ENDING)
    notes.lookups.end(notes.begin(12, 12), NO_ENDING)
    notes.work()
    assert len(notes.noted) == 1
    notes.lookups.close()
    note = notes.noted[-1]
    assert note["refs"] == 12 * 12
    assert [tier["tier"] for tier in note["tiers"]] == ["device", "host", "disk"]
    assert note["tiers"][1]["found"]["2"] == pytest.approx(11 / 12, abs=1e-5)


def test_figures_without_any_lookup_are_zero() -> None:
    notes = Notes()
    assert notes.metrics.capacity_hit_share.value("disk", "4") == 0.0
    assert notes.lookups.stats()["refs"] == 0
