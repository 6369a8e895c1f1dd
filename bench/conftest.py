"""What every suite here shares: a value is measured against its limit, alternately, in one run, and becomes a row.

A row is `{name, value, unit, limit_name, limit, ratio, rounds}`, with `ratio = value / limit`; `--json PATH` writes all rows
with the machine and the date. Medians: a shared machine drifts, and what both sides see cancels in the ratio.
"""

import datetime
import json
import os
import platform
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROWS: list[dict[str, Any]] = []


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--json", type=Path, default=None, help="write the rows of this run to a file")


class Versus:
    """`versus(name, run, limit_name, limit, unit=..., amount=...)`: time both in turn, report the medians."""

    def __init__(self, benchmark: Any) -> None:
        self._benchmark = benchmark

    def __call__(
        self,
        name: str,
        run: Callable[[], object],
        limit_name: str,
        limit: Callable[[], object],
        *,
        unit: str,
        amount: float,
        rounds: int = 15,
        before: Callable[[], object] | None = None,
    ) -> dict[str, Any]:
        """Add the row of `run` against `limit`.

        unit: a rate ("GB/s", "tok/s": amount per second, where amount is in units) or a time ("us", "ms", "s": per `amount`).
        before: called untimed before each side of each round (to drop caches, say).
        """
        limit_s: list[float] = []
        run_s: list[float] = []

        def measure_limit() -> None:
            if before:
                before()
            start = time.perf_counter()
            limit()
            limit_s.append(time.perf_counter() - start)
            if before:
                before()

        def measure_run() -> None:
            start = time.perf_counter()
            run()
            run_s.append(time.perf_counter() - start)

        measure_limit(), measure_run()  # warm-up: page faults, caches, lazy imports
        limit_s.clear(), run_s.clear()
        self._benchmark.pedantic(measure_run, setup=measure_limit, rounds=rounds, iterations=1, warmup_rounds=0)
        return self.add(name, _value(run_s, unit, amount), unit, limit_name, _value(limit_s, unit, amount), rounds)

    def add(self, name: str, value: float, unit: str, limit_name: str, limit: float, rounds: int = 1) -> dict[str, Any]:
        """Add a row that was measured otherwise."""
        ratio = value / limit if limit else float("nan")
        row = {"name": name, "value": value, "unit": unit, "limit_name": limit_name, "limit": limit, "ratio": ratio}
        ROWS.append(row | {"rounds": rounds})
        return row


def _value(seconds: list[float], unit: str, amount: float) -> float:
    scale = {"us": 1e6, "ms": 1e3, "s": 1.0}.get(unit)
    median = statistics.median(seconds)
    return median * scale / amount if scale else amount / median


@pytest.fixture
def versus(benchmark: Any) -> Iterator[Versus]:
    yield Versus(benchmark)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    cpu = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        "",
    )
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.release()}",
        "load": os.getloadavg()[0],
        "date": datetime.date.today().isoformat(),
    }


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    if not ROWS:
        return
    terminalreporter.section("value against limit, same run")
    width = max(len(row["name"]) for row in ROWS)
    for row in ROWS:
        value = f"{row['name']:<{width}}  {row['value']:>9.4g} {row['unit']:<6}"
        terminalreporter.write_line(f"{value} {row['ratio']:>6.2f} of {row['limit_name']} ({row['limit']:.4g})")
    path = config.getoption("--json")
    if path:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"machine": machine(), "rows": ROWS}, indent=1) + "\n")
