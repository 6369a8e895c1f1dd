"""Rounds: every party does one operation in turn, then the next operation, and all again, the first one changing each round.

What disturbs a shared machine for a while disturbs all parties; medians over rounds are compared, never figures of
different runs.
"""

import json
import os
import select
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from bench.daemon.parties import ROOT, Entry
from bench.daemon.party import DEADLINE_S, MAX_BATCH, SIZES

_PINGS: Final = 1000
_LOG_TAIL: Final = 2000


@dataclass(frozen=True, slots=True)
class Measure:
    """One operation and its figures. request: what the user is told.  figures: (name, unit, value from the answer)."""

    name: str
    operation: str
    request: dict[str, Any]
    figures: tuple[tuple[str, str, Callable[[dict[str, Any]], float]], ...]


def measures() -> list[Measure]:
    """All that is measured: both sizes one by one and in batches, then the small calls."""
    found = []
    for size in SIZES:
        for batch in (MAX_BATCH, 1):
            for operation in ("write", "read"):
                name = f"{operation} {batch} x {size}"
                request = {"do": operation, "size": size, "batch": batch}
                found.append(Measure(name, operation, request, ((name, "GB/s", _rate),)))
    found.append(Measure("contains", "contains", {"do": "contains"}, (("contains 8,192", "ms", _ms),)))
    pings = (
        ("ping p50", "us", lambda answer: answer["p50"] * 1e6),
        ("ping p99", "us", lambda answer: answer["p99"] * 1e6),
    )
    found.append(Measure("ping", "ping", {"do": "ping", "times": _PINGS}, pings))
    return found


def _rate(answer: dict[str, Any]) -> float:
    return float(answer["bytes"]) / float(answer["seconds"]) / 1e9


def _ms(answer: dict[str, Any]) -> float:
    return float(answer["seconds"]) * 1e3


class UserProcess:
    """The process of a party's user; absent or failed is a value, for the table."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.absent: str | None = None
        self.failure: str | None = None
        self.does: Sequence[str] = ()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  closed by `close`
        self._process: subprocess.Popen[bytes] | None = None
        if not entry.python.exists():
            self.absent = entry.install
            return
        self._process = subprocess.Popen(
            [str(entry.python), "-m", "bench.daemon.user", entry.name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._log,
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        first = self._answer()
        self.absent, self.failure, self.does = first.get("absent"), first.get("failure"), first.get("does", ())

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """Have it do something; `{"failure": why}` when that did not work."""
        process = self._process
        if process is None or process.stdin is None or process.poll() is not None:
            return self._ended()
        process.stdin.write(json.dumps(request).encode() + b"\n")
        process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        process = self._process
        assert process is not None and process.stdout is not None
        if not select.select([process.stdout], [], [], DEADLINE_S)[0]:
            process.kill()
            process.wait()
            return {"failure": f"no answer within {DEADLINE_S:g} s"}
        line = process.stdout.readline()
        if not line:
            return self._ended()
        return dict(json.loads(line))

    def _ended(self) -> dict[str, Any]:
        status = self._process.wait() if self._process else None
        self._log.seek(0)
        said = self._log.read().decode(errors="replace")[-_LOG_TAIL:]
        sys.stderr.write(f"{self.entry.name}: ended with status {status}; its last words:\n{said}\n")
        return {"failure": f"its process ended with status {status}"}

    def close(self) -> None:
        """End it, and with it its owner."""
        process = self._process
        if process is not None and process.stdin is not None and process.stdout is not None:
            if process.poll() is None:
                process.stdin.close()
                try:
                    process.wait(DEADLINE_S)
                except subprocess.TimeoutExpired:
                    sys.stderr.write(f"{self.entry.name}: did not end within {DEADLINE_S:g} s, killed\n")
                    process.kill()
                    process.wait()
            process.stdout.close()
        self._log.close()


@dataclass
class Results:
    """What a run has found. values: by party and figure, one per round.  units: of each figure, in order."""

    units: dict[str, str] = field(default_factory=dict)
    values: dict[tuple[str, str], list[float]] = field(default_factory=dict)
    failures: dict[tuple[str, str], str] = field(default_factory=dict)
    absent: dict[str, str] = field(default_factory=dict)


def run(entries: Sequence[Entry], *, rounds: int) -> Results:
    """Measure all parties in turn. A party is verified before the first round and after the last, outside of the clock."""
    results, users = Results(), list[UserProcess]()
    try:
        for entry in entries:
            user = UserProcess(entry)
            users.append(user)
            if user.absent:
                results.absent[entry.name] = user.absent
            if user.failure:
                results.failures[entry.name, "start"] = user.failure
        present = [user for user in users if user.does and _verify(user, results)]
        for number in range(-1, rounds if present else -1):  # the first one is a warm-up
            first = max(number, 0) % len(present)
            _round([*present[first:], *present[:first]], results, kept=number >= 0)
            if number >= 0:
                sys.stderr.write(f"round {number + 1} of {rounds}, load {os.getloadavg()[0]:.1f}\n")
        for user in present:
            _verify(user, results)
    finally:
        for user in users:
            user.close()
    return results


def _round(users: Sequence[UserProcess], results: Results, *, kept: bool) -> None:
    for measure in measures():
        for user in users:
            if measure.operation not in user.does or (user.entry.name, measure.name) in results.failures:
                continue
            answer = user.ask(measure.request)
            if "failure" in answer:
                results.failures[user.entry.name, measure.name] = answer["failure"]
                continue
            for figure, unit, value in measure.figures:
                results.units[figure] = unit
                if kept:
                    results.values.setdefault((user.entry.name, figure), []).append(value(answer))


def _verify(user: UserProcess, results: Results) -> bool:
    failure = user.ask({"do": "verify"}).get("failure")
    if failure:
        results.failures[user.entry.name, "verify"] = failure
    return not failure
