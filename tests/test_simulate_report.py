"""What a simulation prints, writes and draws: the same figures everywhere, and pages that need nothing else."""

import io
import json
import os
import re
import sys
from array import array
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from rich.console import Console
from rich.table import Table

from tierkv.errors import ConfigError, TierKVError
from tierkv.policies import NAMES
from tierkv.simulate import page, plots
from tierkv.simulate.cells import Cell
from tierkv.simulate.hierarchy import DiskFigures, EdgeFigures, TierFigures, TimedRun
from tierkv.simulate.report import Report, as_json, show_seconds, show_share, show_size, tables
from tierkv.simulate.study import default_policy, parse_policies
from tierkv.simulate.svg import Axis, steps
from tierkv.simulate.workers import Workers

RATES = {"lru": (0.10, 0.20), "lfu": (0.05, 0.22), "belady": (0.30, 0.40)}


def cell(policy: str, capacity: int, rate: float) -> Cell:
    return Cell(policy, capacity, capacity / 1000, rate, rate * 1.1, rate * 0.9, 2.0)


def timed(policy: str, load_factor: float = 1.0) -> TimedRun:
    return TimedRun(
        policy=policy,
        load_factor=load_factor,
        requests=4,
        refused=1,
        block_refs=100,
        computed_blocks=40,
        late_blocks=2,
        unsaved_blocks=1234,
        tiers=tuple(
            TierFigures(name=name, capacity_blocks=10, hit_blocks=hits, evicted_blocks=5, lost_blocks=1)
            for name, hits in (("device", 30), ("host", 20), ("disk", 10))
        ),
        edges=(EdgeFigures(source="device", target="host", bytes=1_260_000_000_000, busy_share=0.25),),
        disk=DiskFigures(written_bytes=300, distinct_bytes=200, read_bytes=150, capacity_bytes=1000, duration_s=8640),
        ttft_s=array("d", [0.1, 0.2, 4.0]),
        wait_s=0.5,
        load_s=0.25,
        compute_s=0.25,
        computing_share=0.5,
        seconds_saved_share=0.4,
        duration_s=8640,
    )


@pytest.fixture
def report() -> Report:
    made = Report("<trace> & co", 512, 60, 5000, 1000, default="lru")
    made.cells = [cell(name, 10 * (at * 9 + 1), rate) for name, rates in RATES.items() for at, rate in enumerate(rates)]
    made.cells.append(Cell("unbounded", 1000, 1.0, 0.5, 0.5, 0.5, 0.1))
    return made


def printed(report: Report) -> str:
    console = Console(width=220, file=io.StringIO())
    for table in tables(report):
        console.print(table)
        console.print()
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def rows(text: str, title: str) -> dict[str, list[str]]:
    """Lines of one table by their first word."""
    lines = text[text.index(title) :].splitlines()[2:]
    found: dict[str, list[str]] = {}
    for line in lines:
        if not line.strip():
            break
        words = line.replace("(default)", "").split()
        found.setdefault(words[0], words[1:])
    return found


# -- words


def test_json_has_what_the_issue_asks_for(report: Report) -> None:
    document = json.loads(json.dumps(as_json([report])))
    assert {"trace", "requests", "block_refs", "unique_blocks", "cells"} <= set(document)
    assert document["cells"][0] == {
        "policy": "lru",
        "capacity_blocks": 10,
        "capacity_share": 0.01,
        "block_hit_rate": 0.1,
        "token_hit_rate": pytest.approx(0.11),
        "seconds_saved_share": pytest.approx(0.09),
        "us_per_ref": 2.0,
    }
    # 10 of 1000 counts as scarce, 100 too: (0.05 - 0.1 + 0.22 - 0.2) / (0.3 - 0.1 + 0.4 - 0.2)
    assert document["gap_closed"]["lfu"] == pytest.approx(-0.03 / 0.4)
    assert "timed" not in document and "interrupted" not in document


def test_json_of_several_traces_has_one_entry_each(report: Report) -> None:
    assert [each["trace"] for each in as_json([report, report])["traces"]] == ["<trace> & co"] * 2
    assert as_json([report], finished=False)["interrupted"] is True


def test_json_of_a_timed_run_has_percentiles_and_the_disk(report: Report) -> None:
    report.timed.append(timed("lru"))
    (run,) = json.loads(json.dumps(as_json([report])))["timed"]
    assert run["ttft_s"] == {"p50": 0.2, "p95": 4.0, "p99": 4.0, "mean": 1.0}
    assert run["disk"]["write_amplification"] == 1.5
    assert run["disk"]["reads_per_write"] == 0.5
    assert run["disk"]["drive_writes_per_day"] == pytest.approx(3.0)
    assert run["block_hit_rate"] == 0.6
    assert [tier["name"] for tier in run["tiers"]] == ["device", "host", "disk"]


def test_tables_show_every_cell_and_the_gap(report: Report) -> None:
    text = printed(report)
    assert "60 requests, 5,000 block references, 1,000 unique blocks of 512 tokens" in text
    hits = rows(text, "block hits")
    assert hits["lru"] == ["10.00%", "20.00%", "+0.0%", "2.00"]
    assert hits["lfu"] == ["5.00%", "22.00%", "-7.5%", "2.00"]
    assert hits["unbounded"][:2] == ["50.00%", "50.00%"]
    assert list(hits) == ["lfu", "lru", "belady", "unbounded"]  # by mean rate, bounds last
    assert rows(text, "prefill seconds saved")["lru"][:2] == ["9.00%", "18.00%"]


def test_a_cell_that_is_missing_is_a_dash_and_nothing_else_changes(report: Report) -> None:
    report.cells = [each for each in report.cells if (each.policy, each.capacity_blocks) != ("lfu", 10)]
    hits = rows(printed(report), "block hits")
    assert hits["lfu"] == ["-", "22.00%", "-", "2.00"]
    assert hits["lru"][:2] == ["10.00%", "20.00%"]


def test_the_best_is_green_what_is_under_lru_red_and_bounds_are_dim(report: Report) -> None:
    _, hits, _ = tables(report)
    assert isinstance(hits, Table)
    policies, *columns = (list(column.cells) for column in hits.columns)
    names = [str(each).removesuffix(" (default)") for each in policies]
    styles = {name: [str(getattr(column[at], "style", "")) for column in columns[:2]] for at, name in enumerate(names)}
    assert styles == {
        "lfu": ["red", "green"],
        "lru": ["green", ""],
        "belady": ["dim", "dim"],
        "unbounded": ["dim", "dim"],
    }


def test_hints_are_named(report: Report) -> None:
    assert "hints" not in printed(report).splitlines()[0]
    report.hints = "queue"
    assert printed(report).splitlines()[0].endswith("; hints: queue")
    assert as_json([report])["hints"] == "queue"


def test_timed_tables_show_hits_by_tier_traffic_and_wear(report: Report) -> None:
    report.cells, report.timed = [], [timed("lru"), timed("lfu", 2.0)]
    text = printed(report)
    assert rows(text, "time to first token")["lfu"] == [
        "x2", "200", "ms", "4.00", "s", "4.00", "s", "1.00", "s", "500", "ms", "250", "ms", "250", "ms",
        "30.0%", "20.0%", "10.0%", "40.0%", "50%",
    ]  # fmt: skip
    assert rows(text, "moved, and how")["lru"] == ["x1", "1.26", "TB", "25%", "1.50", "0.50", "3.00", "1,234", "2"]


@pytest.mark.parametrize(
    ("share", "shown"),
    [(0.05, "5%"), (1 / 3, "33.3%"), (0.0025, "0.25%"), (0.00999, "1%"), (0.125, "12.5%"), (0, "0%")],
)
def test_shares_are_as_short_as_they_can_be(share: float, shown: str) -> None:
    assert show_share(share) == shown


def test_durations_and_sizes_have_units() -> None:
    assert [show_seconds(each) for each in (0.0123, 3.456, 1234.5)] == ["12 ms", "3.46 s", "1,234 s"]
    assert [show_size(each) for each in (0, 999, 1.5e9, 2.5e13)] == ["0 B", "999 B", "1.5 GB", "25.00 TB"]


# -- the page


class Elements(HTMLParser):
    """Opened and closed elements, and every attribute."""

    VOID = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def rendered(report: Report) -> str:
    return page.render([report], command="tierkv simulate <x>", made="today")


def test_the_page_is_whole_and_needs_nothing_else(report: Report) -> None:
    report.timed = [timed("lru"), timed("lru", 2.0), timed("lfu")]
    text = rendered(report)
    elements = Elements(text)
    assert elements.open == []
    assert not {"script", "link", "img", "iframe"} & set(elements.seen)
    assert not {"src", "href", "onload"} & {name for name, _ in elements.attributes}
    assert "http" not in text and "url(" not in text and "@import" not in text
    assert elements.seen.count("figure") == 3
    assert "prefers-color-scheme:dark" in text and "width=device-width" in text


def test_names_of_traces_cannot_break_the_page(report: Report) -> None:
    text = rendered(report)
    assert "&lt;trace&gt; &amp; co" in text and "<trace>" not in text
    assert "<x>" not in text


def test_every_figure_is_sound_svg_with_a_curve_per_policy(report: Report) -> None:
    report.timed = [timed("lru")]
    figures = re.findall(r"<figure>.*?(<svg.*?</svg>)", rendered(report))
    assert len(figures) == 3
    curves = [len(ElementTree.fromstring(each).findall(".//polyline")) for each in figures]
    assert curves == [4, 4, 1]


def test_loads_are_told_apart_by_their_dashes(report: Report) -> None:
    report.timed = [timed("lru"), timed("lru", 2.0)]
    keys = re.findall(r'<li><svg class="([^"]*)"[^>]*>.*?</svg>([^<]*)</li>', rendered(report))
    styles = {name: css for css, name in keys if "load" in name}
    assert set(styles) == {"lru, load x1", "lru, load x2"}
    assert styles["lru, load x1"] != styles["lru, load x2"]


def test_points_lie_where_their_values_are(report: Report) -> None:
    (first, _) = re.findall(r"<figure>.*?(<svg.*?</svg>)", rendered(report))
    places = {
        title.text: (float(mark.get("cx", "0")), float(mark.get("cy", "0")))
        for group in ElementTree.fromstring(first).iter("g")
        for title in group.findall("title")
        for mark in group.findall("circle")
        if title.text
    }
    low, high = places["lru, 1%: 10.00%"], places["lru, 10%: 20.00%"]
    assert low[0] < high[0] and low[1] > high[1]
    best = places["belady, 10%: 40.00%"]
    assert best[0] == high[0]
    assert (low[1] - best[1]) / (low[1] - high[1]) == pytest.approx(3, abs=0.05)  # linear upwards


def test_a_page_of_one_capacity_or_of_nothing_is_still_a_page(report: Report) -> None:
    report.cells = report.cells[:1]
    assert Elements(rendered(report)).seen.count("figure") == 2
    report.cells = []
    assert Elements(rendered(report)).seen.count("figure") == 0


def test_many_policies_have_styles_of_their_own(report: Report) -> None:
    report.cells = [cell(f"policy{number}", 10, 0.1) for number in range(12)]
    keys = re.findall(r'<li><svg class="([^"]*)".*?<(circle|polygon)[^>]*?(?:points="([^"]*)")?/>', rendered(report))
    assert len(set(keys)) == len(keys) / 2 == 12  # both figures


@pytest.mark.parametrize(("low", "high"), [(0, 1), (0, 0.3819), (0, 0.007), (0.2, 17), (0, 1e-9)])
def test_ticks_are_round_and_cover_their_range(low: float, high: float) -> None:
    ticks = steps(low, high, 5)
    assert ticks[0] <= low and ticks[-1] >= high
    assert 2 <= len(ticks) <= 12


def test_a_logarithmic_axis_gives_each_factor_the_same_room() -> None:
    axis = Axis("", 0.01, 1, (), str, is_log=True)
    assert [axis.place(value) for value in (0.001, 0.01, 0.1, 1, 9)] == pytest.approx([0, 0, 0.5, 1, 1])


# -- the picture


@pytest.mark.parametrize(("ending", "magic"), [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_is_written_in_the_format_of_its_ending(
    report: Report, tmp_path: Path, ending: str, magic: bytes
) -> None:
    report.timed = [timed("lru"), timed("lfu", 2.0)]
    plots.plot([report, report], tmp_path / f"out.{ending}")
    assert (tmp_path / f"out.{ending}").read_bytes().startswith(magic)


def test_a_picture_of_a_timed_run_alone(report: Report, tmp_path: Path) -> None:
    report.cells, report.timed = [], [timed("lru")]
    plots.plot([report], tmp_path / "out.png")
    report.timed = []
    plots.plot([report], tmp_path / "empty.png")
    assert (tmp_path / "out.png").stat().st_size > 1000


def test_an_ending_that_nobody_knows_is_one_line(report: Report, tmp_path: Path) -> None:
    with pytest.raises(TierKVError, match=r"--plot .*out\.doc: .*\.png, \.svg or \.pdf"):
        plots.plot([report], tmp_path / "out.doc")


def test_without_matplotlib_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(TierKVError, match=r"pip install 'tierkv\[plot\]'"):
        plots.check_matplotlib()


# -- policies


def test_default_and_all_stand_for_what_they_say() -> None:
    assert parse_policies("default,lru") == tuple(dict.fromkeys((default_policy(), "lru")))
    assert parse_policies("all") == (*NAMES, "belady", "unbounded")
    assert parse_policies("belady, lru,belady") == ("belady", "lru")
    with pytest.raises(ConfigError, match="--policy 'mru': expected names of default, all, "):
        parse_policies("lru,mru")


# -- workers


@pytest.mark.parametrize("jobs", [1, 3])
def test_every_task_is_done_once(jobs: int) -> None:
    with Workers([lambda number=number: number * 10 for number in range(40)], jobs=jobs) as workers:  # type: ignore[misc]
        assert sorted(workers.results()) == [(number, number * 10) for number in range(40)]


def test_large_results_come_whole() -> None:
    with Workers([lambda: bytes(3 << 20), lambda: bytes(1 << 20)], jobs=2) as workers:
        assert {number: len(bytes(result)) for number, result in workers.results()} == {0: 3 << 20, 1: 1 << 20}  # type: ignore[call-overload]


@pytest.mark.parametrize("jobs", [1, 2])
def test_what_a_task_raises_is_raised_here(jobs: int) -> None:
    def fail() -> None:
        raise ConfigError("no such thing")

    with Workers([fail, fail], jobs=jobs) as workers, pytest.raises(ConfigError, match="no such thing"):
        list(workers.results())


def test_a_child_that_dies_is_told_of_and_none_is_left() -> None:
    tasks = [lambda: os._exit(9), lambda: os._exit(9), lambda: 1]
    before = children()  # servers of other tests may be among them
    with Workers(tasks, jobs=2) as workers, pytest.raises(TierKVError, match="ended early"):
        assert len(children() - before) == 2
        list(workers.results())
    assert children() <= before


def children() -> set[str]:
    """Processes whose parent is this one, those that ended and were not waited for among them."""
    found = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue  # gone meanwhile
        if int(fields[1]) == os.getpid():
            found.add(stat.parent.name)
    return found
