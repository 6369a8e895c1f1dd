"""Counters, gauges and histograms, and the text a Prometheus server would scrape."""

import re
from collections import defaultdict
from dataclasses import fields
from threading import Thread

import pytest

from tierkv.metrics import LATENCY_BOUNDS_S, Counter, Metrics

NAME = r"[a-zA-Z_:][a-zA-Z0-9_:]*"
SAMPLE = re.compile(rf"({NAME})(?:\{{(.*)\}})? (\S+)")
LABEL = re.compile(r'([a-zA-Z_][a-zA-Z0-9_]*)="((?:[^"\\\n]|\\[\\"n])*)"(,|$)')
ESCAPES = {"\\\\": "\\", '\\"': '"', "\\n": "\n"}

Labels = frozenset[tuple[str, str]]


def parse(text: str) -> dict[str, tuple[str, dict[tuple[str, Labels], float]]]:
    """Type and series of every metric; refuses what the text exposition format 0.0.4 does not allow."""
    metrics: dict[str, tuple[str, dict[tuple[str, Labels], float]]] = {}
    helped: list[str] = []
    family = ""
    assert text.endswith("\n")
    for line in text.splitlines():
        if line.startswith("# HELP "):
            family = line.split(" ", 3)[2]
            assert family not in helped
            assert line.split(" ", 3)[3]
            helped.append(family)
        elif line.startswith("# TYPE "):
            _, _, name, kind = line.split(" ")
            assert name == family, "TYPE follows its HELP, before any sample"
            assert kind in ("counter", "gauge", "histogram")
            metrics[name] = kind, {}
        else:
            sample = SAMPLE.fullmatch(line)
            assert sample, line
            name, labels, value = sample.groups()
            kind, series = metrics[family]
            suffix = name.removeprefix(family)
            assert suffix in (("_bucket", "_sum", "_count") if kind == "histogram" else ("",)), line
            key = suffix, frozenset(labels_of(labels or ""))
            assert key not in series, f"twice: {line}"
            series[key] = float(value)
    return metrics


def labels_of(text: str) -> list[tuple[str, str]]:
    found, at = [], 0
    while at < len(text):
        label = LABEL.match(text, at)
        assert label, text[at:]
        found.append((label[1], re.sub(r"\\.", lambda escape: ESCAPES[escape[0]], label[2])))
        at = label.end()
    assert len({name for name, _ in found}) == len(found)
    return found


def test_fresh_metrics_have_valid_text_with_help_for_each() -> None:
    parsed = parse(Metrics().prometheus())
    assert len(parsed) == len(fields(Metrics))
    assert all(name.startswith("tierkv_") for name in parsed)


def test_counters_end_in_total_and_gauges_do_not() -> None:
    for name, (kind, _) in parse(Metrics().prometheus()).items():
        assert name.endswith("_total") == (kind == "counter"), name


def test_counter_adds_per_label_values() -> None:
    metrics = Metrics()
    metrics.misses.add(2, "disk", "corrupt")
    metrics.misses.add(3, "disk", "late")
    metrics.misses.add(1, "redis", "late")
    assert metrics.misses.value("disk") == 5
    assert metrics.misses.value("disk", "late") == 3
    assert metrics.misses.value() == 6
    kind, series = parse(metrics.prometheus())["tierkv_misses_total"]
    assert kind == "counter"
    assert series["", frozenset({("tier", "disk"), ("reason", "corrupt")})] == 2
    assert len(series) == 3


def test_gauge_is_read_when_asked() -> None:
    metrics, used = Metrics(), [1]
    metrics.blocks_used.read_from(lambda: used[0], "host")
    used[0] = 7
    assert metrics.blocks_used.value("host") == 7
    assert parse(metrics.prometheus())["tierkv_blocks_used"][1]["", frozenset({("tier", "host")})] == 7


@pytest.mark.parametrize("value", ['a"b', "a\\b", "a\nb", "\\n", '\\"', "a,b}=", "ünï ", ""])
def test_label_value_survives_escaping(value: str) -> None:
    metrics = Metrics()
    metrics.blocks_loaded.add(1, value)
    _, series = parse(metrics.prometheus())["tierkv_blocks_loaded_total"]
    assert list(series) == [("", frozenset({("tier", value)}))]


def test_histogram_is_cumulative_and_ends_at_its_count() -> None:
    metrics = Metrics()
    durations = [0.00005, 0.0001, 0.00011, 0.3, 0.3, 5, 31, 1000]
    for seconds in durations:
        metrics.load_seconds.observe(seconds, "disk")
    metrics.load_seconds.observe(1, "redis")
    kind, series = parse(metrics.prometheus())["tierkv_load_seconds"]
    assert kind == "histogram"
    by_tier: dict[str, dict[str, float]] = defaultdict(dict)
    for (suffix, labels), value in series.items():
        tier = dict(labels)["tier"]
        by_tier[tier][dict(labels).get("le", suffix)] = value
    disk = by_tier["disk"]
    counts = [disk[str(bound)] for bound in LATENCY_BOUNDS_S] + [disk["+Inf"]]
    expected = [sum(seconds <= bound for seconds in durations) for bound in (*LATENCY_BOUNDS_S, float("inf"))]
    assert counts == expected == sorted(counts)
    assert disk["_count"] == disk["+Inf"] == metrics.load_seconds.count("disk") == len(durations)
    assert disk["_sum"] == pytest.approx(sum(durations), rel=1e-5)
    assert by_tier["redis"]["_count"] == 1


def test_large_counter_keeps_its_digits() -> None:
    metrics = Metrics()
    metrics.bytes_read.add(123_456_789_012, "disk")
    metrics.bytes_read.add(1, "disk")
    assert (
        parse(metrics.prometheus())["tierkv_bytes_read_total"][1]["", frozenset({("tier", "disk")})] == 123_456_789_013
    )


def test_wrong_number_of_labels_is_noticed() -> None:
    counter = Counter("x", "tier")
    counter.add(1, "disk", "late")
    with pytest.raises(ValueError, match="zip"):
        list(counter.samples())


def test_additions_from_threads_are_all_counted() -> None:
    metrics = Metrics()

    def work() -> None:
        for _ in range(2000):
            metrics.saves_dropped.add(1, "disk", "full")
            metrics.save_seconds.observe(0.01, "disk")

    threads = [Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.saves_dropped.value("disk", "full") == 16_000
    assert metrics.save_seconds.count("disk") == 16_000


def test_tally_notes_what_one_thread_adds_and_nothing_else() -> None:
    counter = Counter("x", "tier", "reason")
    with counter.tally() as outer:
        counter.add(1, "disk", "late")
        with counter.tally() as inner:
            counter.add(2, "disk", "corrupt")
            other = Thread(target=lambda: counter.add(5, "disk", "late"))
            other.start()
            other.join()
        counter.add(3, "disk", "late")
    counter.add(7, "disk", "late")
    assert inner == {("disk", "corrupt"): 2}
    assert outer == {("disk", "late"): 4, ("disk", "corrupt"): 2}
    assert counter.value() == 18
