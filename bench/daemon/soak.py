"""`python -m bench.daemon.soak [--minutes N] [--clients N] [--json PATH]`: crashing clients at one daemon, for long.

A daemon with little memory, so that blocks are evicted and lifted from its disk all the time; clients by shared memory and,
a quarter of them, by TCP. They read what others wrote, compare every byte, and end at random moments (`soak_client.py`). Some
are stopped for seconds; calls meanwhile are not timed. The dead are replaced. At the end all leave, and the daemon must hold
nothing for them any more.

Exit status 1: wrong bytes, something held for nobody, descriptors left over, a defect in the daemon's log, or its exit code.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final

import numpy as np

from bench.daemon.soak_client import CRASHES, Order, SoakClient, Told, be_client
from tierkv.daemon.client import DaemonClient

SAMPLE_EVERY_S: Final = 5.0
LIFE_S: Final = 20.0
"""Until a client crashes, on the average; those that do not leave in good order after twice as long."""
CRASHING: Final = 0.8
"""Of all clients."""
STOP_EVERY_S: Final = 4.0
LEASE_S: Final = 3.0
SETTLE_S: Final = 20.0
LEAK_MIB_PER_MINUTE: Final = 2.0
"""Of private memory over the last half: more is a leak, where that half is long enough to tell."""
TELLING_S: Final = 240.0
HELD: Final = ("leases", "leased_bytes", "quarantined_blocks")
SETTINGS: Final = (
    "host.capacity=48MiB",
    "disk.capacity=160MiB",
    "store.history_blocks=20000",
    f"server.lease_s={LEASE_S}",
    "transfer.load_deadline_s=2",
)
_DAEMON: Final = "import sys; from tierkv.cli import main; sys.exit(main(sys.argv[1:]))"


class Daemon:
    """`tierkv daemon` in a process of its own, seen from outside. Its log is kept."""

    def __init__(self, folder: Path) -> None:
        words = ["daemon", "--listen", f"unix://{folder}/daemon.sock", "--listen", "tcp://127.0.0.1:0", "--http", "off"]
        words += [word for setting in (*SETTINGS, f"disk.path={folder}/disk") for word in ("--set", setting)]
        self.log = folder / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-c", _DAEMON, *words],
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=Path(__file__).parents[2],
            )
        assert self.process.stdout
        said = [next(line for line in self.process.stdout if "listens on" in line) for _ in range(2)]
        self.unix, self.tcp = (line.split()[-1] for line in said)
        self.client = DaemonClient(self.unix, name="soak", connect_s=10.0)

    def memory(self) -> dict[str, float]:
        """MiB by kind, as the kernel tells: private memory apart from the shared slab."""
        status = _proc(self.process.pid, "status")
        rollup = _proc(self.process.pid, "smaps_rollup")
        return {
            "rss": status["VmRSS"] / 1024,
            "private": status["RssAnon"] / 1024,
            "shared": status["RssShmem"] / 1024,
            "pss": rollup["Pss"] / 1024,
        }

    def threads(self) -> int:
        """Threads of its process."""
        return int(_proc(self.process.pid, "status")["Threads"])

    def descriptors(self) -> Counter[str]:
        """Open descriptors by kind: sockets, pidfds, files."""
        found: Counter[str] = Counter()
        for path in Path(f"/proc/{self.process.pid}/fd").iterdir():
            try:
                target = str(path.readlink())
            except FileNotFoundError:  # closed meanwhile
                continue
            kind = target.split(":")[0] if not target.startswith("/") else "file"
            found["pidfd" if "pidfd" in target else kind] += 1
        return found

    def end(self) -> int:
        """Its exit code after SIGTERM."""
        self.client.close()
        self.process.send_signal(signal.SIGTERM)
        try:
            return self.process.wait(60)
        finally:
            self.process.kill()


def _proc(pid: int, name: str) -> dict[str, float]:
    lines = Path(f"/proc/{pid}/{name}").read_text().splitlines()
    pairs = (line.split(":", 1) for line in lines if ":" in line)
    return {key: float(value.split()[0]) for key, value in pairs if value.split() and value.split()[0].isdigit()}


@dataclass
class Crowd:
    """The clients: started, replaced, stopped and continued; and what they told."""

    daemon: Daemon
    clients: int
    end: float
    choose: random.Random
    began: float = field(default_factory=time.monotonic)
    took: dict[str, list[float]] = field(default_factory=dict)
    states: Counter[tuple[str, str]] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)
    errors: Counter[str] = field(default_factory=Counter)
    crashes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    moved_bytes: int = 0
    stops: int = 0
    _next: int = 0

    def __post_init__(self) -> None:
        self._context = get_context("forkserver")  # clients come and go all the time: each a fork of what is imported
        self._context.set_forkserver_preload(["bench.daemon.soak_client"])
        self._alive: dict[Connection, tuple[Any, Order]] = {}
        self._stopped: deque[tuple[float, int]] = deque()
        for _ in range(self.clients):
            self._start("tcp" if self._next % 4 == 3 else "unix")

    def _start(self, way: str) -> None:
        crash = self.choose.choice(CRASHES) if self.choose.random() < CRASHING else None
        life = self.choose.expovariate(1 / LIFE_S)
        end = self.end if crash else min(self.end, time.monotonic() + 2 * life)
        url = self.daemon.unix if way == "unix" else self.daemon.tcp
        order = Order(url, self._next, self.began, end, crash, life)
        self._next += 1
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=be_client, args=(order, theirs), daemon=True)
        process.start()
        theirs.close()
        self._alive[ours] = (process, order)

    def work(self, sample: Callable[[], None]) -> None:
        """Run them until the end. sample: called every few seconds."""
        next_sample, next_stop = time.monotonic(), time.monotonic() + STOP_EVERY_S
        while self._alive:
            now = time.monotonic()
            if now >= next_sample and now < self.end:
                sample()
                next_sample += SAMPLE_EVERY_S
            if now >= next_stop and now < self.end:
                self._stop_one(now)
                next_stop = now + self.choose.expovariate(1 / STOP_EVERY_S)
            self._continue(now)
            for pipe in wait(list(self._alive), timeout=0.2):
                self._take(pipe)  # type: ignore[arg-type]  # all of them are connections
            if now > self.end + SETTLE_S:
                return self._give_up()

    def _stop_one(self, now: float) -> None:
        process, _ = self.choose.choice(list(self._alive.values()))
        if process.pid not in {pid for _, pid in self._stopped}:
            self._signal(process.pid, signal.SIGSTOP)
            self._stopped.append((now + self.choose.uniform(0.5, 3 * LEASE_S), process.pid))
            self.stops += 1

    def _continue(self, now: float) -> None:
        for at, pid in list(self._stopped):
            if at <= now or now >= self.end:
                self._stopped.remove((at, pid))
                self._signal(pid, signal.SIGCONT)

    def _signal(self, pid: int, number: int) -> None:
        if any(
            process.pid == pid for process, _ in self._alive.values()
        ):  # not joined yet: the number is still its own
            os.kill(pid, number)

    def _take(self, pipe: Connection) -> None:
        try:
            told: Told = pipe.recv()
        except (EOFError, OSError):  # its end, maybe in the middle of a word
            self._gone(pipe)
            return
        for name, took in told.took.items():
            self.took.setdefault(name, []).extend(took)
        self.states += told.states
        self.moved_bytes += told.moved_bytes
        self.refused += told.refused
        self.errors += told.errors
        self.wrong += told.wrong

    def _gone(self, pipe: Connection) -> None:
        process, order = self._alive.pop(pipe)
        pipe.close()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            self.crashes[order.crash or "by nobody"] += 1
        elif process.exitcode:
            self.failures.append(f"a client ended with status {process.exitcode}")
        if time.monotonic() < self.end - 1:
            self._start("tcp" if order.url == self.daemon.tcp else "unix")

    def _give_up(self) -> None:
        for _, order in self._alive.values():
            self.failures.append(f"client {order.seed} did not come to its end")

    def kill(self) -> None:
        """End those that are left."""
        for process, _ in self._alive.values():
            process.kill()


@contextmanager
def _running(folder: Path) -> Iterator[Daemon]:
    daemon = Daemon(folder)
    try:
        yield daemon
    finally:
        daemon.process.kill()
        daemon.process.wait()
        if daemon.process.stdout:
            daemon.process.stdout.close()


def soak(*, minutes: float, clients: int, seed: int) -> dict[str, Any]:
    """Run it, and tell: {samples, crowd, faults, ...}. faults: why it has failed, in words."""
    with tempfile.TemporaryDirectory(prefix="tierkv-soak-") as name, _running(Path(name)) as daemon:
        _warm_up(daemon)
        before = daemon.descriptors()
        samples: list[dict[str, Any]] = []
        began = time.monotonic()

        def sample() -> None:
            samples.append({"at_s": time.monotonic() - began} | _look(daemon))
            print(_line(samples[-1], crowd), flush=True)

        crowd = Crowd(daemon, clients, began + 60 * minutes, random.Random(seed))
        try:
            crowd.work(sample)
        finally:
            crowd.kill()
        faults = [f"wrong bytes: {one}" for one in crowd.wrong] + crowd.failures
        if corrupt := sum(count for (_, state), count in crowd.states.items() if state == "CORRUPT"):
            faults.append(f"{corrupt} blocks were found corrupt, and nobody writes where he should not")
        last = _settle(daemon, before)
        samples.append({"at_s": time.monotonic() - began} | last)
        print(_line(last | {"at_s": samples[-1]["at_s"]}, crowd))
        faults += _left_over(last, before)
        flushed, verified = daemon.client.flush(deadline_s=60), daemon.client.verify()
        faults += [f"{tier}: {found['bad']} bad blocks at the end" for tier, found in verified.items() if found["bad"]]
        stats = daemon.client.stats()
        slope = _slope(samples)
        if 30 * minutes >= TELLING_S and slope > LEAK_MIB_PER_MINUTE:
            faults.append(f"private memory grows by {slope:.2f} MiB a minute")
        code = daemon.end()
        if code:
            faults.append(f"the daemon ended with status {code}")
        log = daemon.log.read_text()
        if "Traceback" in log or " ERROR " in log:
            faults.append("the daemon's log has defects")
        return {
            "seconds": samples[-1]["at_s"],
            "samples": samples,
            "crowd": crowd,
            "faults": faults,
            "slope": slope,
            "stats": stats,
            "flushed": flushed,
            "verified": verified,
            "log": log,
        }


def _warm_up(daemon: Daemon) -> None:
    """Open the pool and its files, so that what is open from then on is what clients cause."""
    for url in (daemon.unix, daemon.tcp):
        client = SoakClient(Order(url, 1 << 20, time.monotonic(), 0.0, None, 0.0), None)  # type: ignore[arg-type]  # tells nobody
        client.write()
        client.read()
        client.close()
    daemon.client.flush()


def _look(daemon: Daemon) -> dict[str, Any]:
    stats = daemon.client.stats()
    look = {name: stats[name] for name in HELD}
    look |= {"clients": len(stats["clients"]), "threads": daemon.threads(), "memory": daemon.memory()}
    look["queues"] = {row["queue"]: row["blocks"] for row in stats["queues"] if row["blocks"]}
    return look | {"descriptors": dict(daemon.descriptors())}


def _settle(daemon: Daemon, before: Counter[str]) -> dict[str, Any]:
    """How it stands once all have left and what was under way is over, or ought to be."""
    end = time.monotonic() + SETTLE_S
    while True:
        look = _look(daemon)
        if not _left_over(look, before) or time.monotonic() >= end:
            return look
        time.sleep(0.5)


def _left_over(look: dict[str, Any], before: Counter[str]) -> list[str]:
    found = [f"{name} = {look[name]} when all have left" for name in HELD if look[name]]
    if look["clients"] > 1:  # the one that asks
        found.append(f"{look['clients'] - 1} clients are still listed when all have left")
    for kind, count in look["descriptors"].items():
        if kind != "file" and count > before[kind]:  # files: those of the disk tier, which grows
            found.append(f"{count} descriptors of {kind}: {before[kind]} before")
    return found


def _slope(samples: list[dict[str, Any]]) -> float:
    """MiB of private memory per minute, over the last half: a straight line through the samples."""
    half = [one for one in samples[:-1] if one["at_s"] >= samples[-1]["at_s"] / 2]
    if len(half) < 3:
        return 0.0
    at = [one["at_s"] / 60 for one in half]
    return float(np.polyfit(at, [one["memory"]["private"] for one in half], 1)[0])


def _line(look: dict[str, Any], crowd: Crowd) -> str:
    memory = look["memory"]
    return (
        f"{look['at_s']:6.0f} s  rss {memory['rss']:4.0f} private {memory['private']:4.0f} shared {memory['shared']:3.0f} "
        f"pss {memory['pss']:4.0f} MiB  fds {sum(look['descriptors'].values()):3}  threads {look['threads']:2}  "
        f"clients {look['clients']:2}  leases {look['leases']:3} ({look['leased_bytes'] >> 20} MiB)  "
        f"quarantine {look['quarantined_blocks']:3}  queues {look['queues'] or '-'}  crashes {crowd.crashes.total()}"
    )


def rows(found: dict[str, Any]) -> list[dict[str, Any]]:
    """A row per figure."""
    crowd: Crowd = found["crowd"]

    def row(name: str, value: float, unit: str) -> dict[str, Any]:
        return {"name": f"soak: {name}", "value": value, "unit": unit, "limit_name": "", "limit": None, "ratio": None}

    said = []
    for name, took in sorted(crowd.took.items()):
        for label, value in _latencies(took).items():
            said.append(row(f"{name} {label}", value * 1e6, "us"))
    said.append(row("operations", sum(map(len, crowd.took.values())), ""))
    said.append(row("moved", crowd.moved_bytes / 1e9, "GB"))
    said.append(row("wrong blocks", len(crowd.wrong), ""))
    said.append(row("crashes", crowd.crashes.total(), ""))
    said.append(row("stops", crowd.stops, ""))
    said.append(row("private memory, slope of the last half", found["slope"], "MiB/min"))
    return said + [row(f"fault: {fault}", 1, "") for fault in found["faults"]]


def _latencies(took: list[float]) -> dict[str, float]:
    return {"p50": float(np.percentile(took, 50)), "p99": float(np.percentile(took, 99)), "max": max(took)}


def lines(found: dict[str, Any]) -> list[str]:
    """What came of it, for people."""
    crowd: Crowd = found["crowd"]
    said = [f"{'operation':>10}  {'calls':>8}  {'p50 ms':>8}  {'p99 ms':>8}  {'max ms':>8}  blocks"]
    for name, took in sorted(crowd.took.items()):
        cells = "  ".join(f"{value * 1e3:8.2f}" for value in _latencies(took).values())
        states = ", ".join(
            f"{state.lower()} {count:,}" for (of, state), count in sorted(crowd.states.items()) if of == name
        )
        said.append(f"{name:>10}  {len(took):>8,}  {cells}  {states}")
    operations = sum(map(len, crowd.took.values()))
    said.append(
        f"{operations:,} operations, {crowd.moved_bytes / 1e9:.1f} GB moved and compared in {found['seconds']:.0f} s; "
        f"wrong blocks {len(crowd.wrong)}"
    )
    said.append(f"crashes: {dict(crowd.crashes)}; stopped and continued: {crowd.stops}")
    said += [f"refused {count:>6}: {text}" for text, count in crowd.refused.most_common()]
    said += [f"failed  {count:>6}: {text}" for text, count in crowd.errors.most_common()]
    tiers = {
        tier["tier"]: f"{tier['blocks']} blocks, {tier['evicted_blocks']:,} evicted" for tier in found["stats"]["tiers"]
    }
    said.append(f"tiers: {tiers}; verified: {found['verified']}; corrupt: {found['stats']['corrupt_blocks']}")
    said.append(f"private memory: {found['slope']:+.2f} MiB a minute over the last half")
    if log := found["log"]:
        said.append(f"the daemon's log, last lines:\n{log[-3000:]}")
    return said + [f"FAULT: {fault}" for fault in found["faults"]]


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m bench.daemon.soak", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the rows to a file")
    options = parser.parse_args(arguments)
    if options.clients < 1 or options.minutes <= 0:
        parser.error(f"--clients {options.clients} --minutes {options.minutes:g}: at least one client, and some time")
    found = soak(minutes=options.minutes, clients=options.clients, seed=options.seed)
    print("\n".join(lines(found)))
    if options.json:
        from bench.conftest import machine  # it needs pytest, which a run without --json does not

        options.json.parent.mkdir(parents=True, exist_ok=True)
        samples = {"samples": found["samples"]}
        options.json.write_text(json.dumps({"machine": machine(), "rows": rows(found)} | samples, indent=1) + "\n")
    return 1 if found["faults"] else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
