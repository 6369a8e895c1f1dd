"""Rows and tables of a run: each figure against its limit, and tierkv against each of the others.

A row is that of `bench/conftest.py`, with the quartiles: `{name, value, unit, limit_name, limit, ratio, rounds, low, high}`.
Who is not installed, or failed, is a row `{name, absent}` or `{name, failure}`.
"""

import statistics
from collections.abc import Iterator, Sequence
from typing import Any, Final

from bench.daemon.parties import PARTIES, Kind
from bench.daemon.rounds import Results

LIMITS: Final = {"GB/s": "shm in place", "ms": "bare unix", "us": "bare unix"}
"""The limit of a figure, by its unit: one copy, the keys over a socket, the round trip of a socket."""


def rows(results: Results) -> list[dict[str, Any]]:
    """All rows of a run."""
    found: list[dict[str, Any]] = []
    for figure, unit in results.units.items():
        here = {party: values for (party, of), values in results.values.items() if of == figure}
        for party, values in here.items():
            found.append(_row(party, figure, unit, values, LIMITS[unit], here.get(LIMITS[unit])))
            if PARTIES[party].kind is Kind.OURS:
                others = [other for other in here if PARTIES[other].kind is not Kind.OURS and other != LIMITS[unit]]
                found += [_row(party, figure, unit, values, other, here[other]) for other in others]
    found += [{"name": f"{party} {measure}", "failure": why} for (party, measure), why in results.failures.items()]
    found += [{"name": party, "absent": why} for party, why in results.absent.items()]
    return found


def _row(
    party: str, figure: str, unit: str, values: Sequence[float], limit_name: str, limits: Sequence[float] | None
) -> dict[str, Any]:
    value, limit = statistics.median(values), statistics.median(limits) if limits else None
    low, high = _quartiles(values)
    return {
        "name": f"{party} {figure}",
        "value": value,
        "unit": unit,
        "limit_name": limit_name,
        "limit": limit,
        "ratio": value / limit if limit else None,
        "rounds": len(values),
        "low": low,
        "high": high,
    }


def _quartiles(values: Sequence[float]) -> tuple[float, float]:
    if len(values) < 2:
        return values[0], values[0]
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, high


def tables(results: Results) -> Iterator[str]:
    """Medians with quartiles; then how fast each is beside its limit; then tierkv beside each of the others."""
    parties = list(dict.fromkeys(party for party, _ in results.values))
    yield "median (quartiles)"
    yield from _table(results, parties, lambda party, figure, unit: _shown(results.values.get((party, figure)), unit))
    yield ""
    yield f"speed as a share of the limit's ({', '.join(f'{unit}: {name}' for unit, name in LIMITS.items())})"
    yield from _table(results, parties, lambda party, figure, unit: _speed(results, party, LIMITS[unit], figure, unit))
    for ours in (party for party in parties if PARTIES[party].kind is Kind.OURS):
        yield ""
        yield f"speed of {ours} as a multiple of each other's"
        others = [party for party in parties if party != ours]
        yield from _table(
            results, others, lambda party, figure, unit, ours=ours: _speed(results, ours, party, figure, unit)
        )
    for (party, measure), why in results.failures.items():
        yield f"{party} {measure}: FAILED: {why}"
    for party, why in results.absent.items():
        yield f"{party}: not installed ({why})"


def _table(results: Results, parties: Sequence[str], cell: Any) -> Iterator[str]:  # Any: (party, figure, unit) -> str
    names = [f"{figure}, {unit}" for figure, unit in results.units.items()]
    lines = [["", *parties]]
    for name, (figure, unit) in zip(names, results.units.items(), strict=True):
        lines.append([name, *(cell(party, figure, unit) for party in parties)])
    widths = [max(len(line[at]) for line in lines) for at in range(len(parties) + 1)]
    for line in lines:
        first, *rest = (f"{text:>{width}}" for text, width in zip(line, widths, strict=True))
        yield "  ".join([f"{line[0]:<{len(first)}}", *rest])


def _shown(values: Sequence[float] | None, unit: str) -> str:
    if not values:
        return "-"
    low, high = _quartiles(values)
    digits = 0 if unit == "us" else 2 if statistics.median(values) < 10 else 1
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def _speed(results: Results, party: str, other: str, figure: str, unit: str) -> str:
    """How fast `party` is beside `other`: more is better, whether the figure is a rate or a time."""
    values, against = results.values.get((party, figure)), results.values.get((other, figure))
    if not values or not against:
        return "-"
    ratio = statistics.median(values) / statistics.median(against)
    return f"{ratio if unit == 'GB/s' else 1 / ratio:.2f}"
