"""`bash bench/gpu.sh`: the `gpu` tests, the benchmarks, and last of all a short table.

Exits 1 where a test failed or a result was wrong, 3 where there is no CUDA device. Every suite runs in a process of its own:
a kernel that breaks the device's context, or hangs, takes only its suite with it.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, NamedTuple

from .table import is_wrong, lines

ROOT: Final = Path(__file__).parent.parent.parent
TILES: Final = ROOT / "kernels" / "gpu" / "tiles.json"
SECONDS: Final = 525.0  # of everything; what has not begun by then says so
TUNE_SECONDS: Final = 210.0
SOAK_SECONDS: Final = 120.0
START_SECONDS: Final = 25.0  # of a suite, until its engine runs


class Suite(NamedTuple):
    """A module with `run(lab)`, and its seconds where all suites run; one that is asked for by name gets all there are."""

    module: str
    seconds: float


SUITES: Final = {
    "decode": Suite("bench.gpu.decode", 50),
    "prefill": Suite("bench.gpu.prefill", 20),
    "moves": Suite("tierkv.measure.moves", 25),
    "overhead": Suite("bench.gpu.overhead", 15),
    "transfers": Suite("tierkv.measure.transfers", 25),
    "store": Suite("bench.gpu.store", 50),
    "model": Suite("bench.gpu.model", 100),
    "mixed": Suite("bench.gpu.mixed", 145),  # last: it is content with less
}
OTHERS: Final = {"tests": 110.0, "tune": TUNE_SECONDS + 20, "sanitize": 300.0}


def main() -> int:
    parser = argparse.ArgumentParser(prog="bench/gpu.sh", description=__doc__)
    parser.add_argument(
        "suites", nargs="*", metavar="SUITE", help=f"of: tests {' '.join(SUITES)}; all if none is given"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "out", help="folder for the JSON file")
    parser.add_argument("--tune", action="store_true", help="first measure tile sizes and write kernels/gpu/tiles.json")
    parser.add_argument(
        "--rehearse", action="store_true", help="run every benchmark once on the CPU, tiny; keeps nothing"
    )
    parser.add_argument(
        "--soak", type=minutes, metavar="10m", help="the mixed run, that long; alone if no suite is given"
    )
    parser.add_argument("--sanitize", action="store_true", help="compute-sanitizer; alone if no suite is given")
    parser.add_argument("--child", type=Path, metavar="ROWS", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=SOAK_SECONDS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    unknown = set(given.suites) - {*OTHERS, *SUITES}
    if unknown:
        parser.error(f"no such suite: {', '.join(sorted(unknown))}")
    if given.rehearse:
        return rehearse(given.suites or ("tune", *SUITES))

    import torch

    if not torch.cuda.is_available():
        print(
            "no CUDA device was found: nothing was measured; --rehearse runs the benchmarks on the CPU", file=sys.stderr
        )
        return 3
    if given.child:
        return child(given.suites[0], given.child, given.out, given.seconds)
    longer = (given.soak or 0.0) + (OTHERS["sanitize"] if given.sanitize else 0.0)
    return everything(boxes_of(given), given.out.resolve(), soak=given.soak or SOAK_SECONDS, longer=longer)


def minutes(text: str) -> float:
    """Seconds of "10m" or "90s"."""
    number, unit = text[:-1], {"s": 1, "m": 60}.get(text[-1:])
    if unit is None or not number.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r} is no time: give 10m or 90s")
    return int(number) * float(unit)


def boxes_of(given: argparse.Namespace) -> dict[str, float]:
    """The suites that were asked for, and the seconds of each."""
    boxes = dict.fromkeys(given.suites, SECONDS)
    if not boxes and not given.soak and not given.sanitize:
        boxes = {"tests": OTHERS["tests"]} | {name: suite.seconds for name, suite in SUITES.items()}
    if given.tune:
        boxes = {"tune": OTHERS["tune"]} | boxes
    if given.sanitize:
        boxes["sanitize"] = OTHERS["sanitize"]
    if given.soak:
        boxes["mixed"] = given.soak + START_SECONDS
    return boxes


def rehearse(suites: Sequence[str]) -> int:
    """Every body, on the CPU in Triton's interpreter; what would be written goes to a folder that is deleted."""
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    from tierkv.measure.lab import Lab

    lab = Lab(rehearsing=True)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "tiles.json"
        table.write_text(TILES.read_text(encoding="utf-8"), encoding="utf-8")
        for suite in suites:
            run_suite(lab, suite, table=table, out=Path(folder) / "out", seconds=1.0)
    print("\n".join(lines(lab.rows)))
    print("a rehearsal on the CPU: the figures mean nothing")
    return 0


def run_suite(
    lab: Any, suite: str, *, table: Path, out: Path, seconds: float
) -> None:  # Any: a Lab, which imports torch
    """seconds: of the mixed run, which goes on for as long as one likes."""
    if suite == "tune":
        import_module("bench.gpu.tune").run(lab, table=table, out=out, seconds=TUNE_SECONDS)
        return
    if suite == "sanitize":
        import_module("bench.gpu.sanitize").run(lab)
        return
    lab.add(f"copy on the card, at {suite}", lab.copy_gbps(), "GB/s")
    module = import_module(SUITES[suite].module)
    module.run(lab, seconds=seconds) if suite == "mixed" else module.run(lab)


def child(suite: str, rows: Path, out: Path, seconds: float) -> int:
    """One suite, in this process."""
    from tierkv.measure.lab import Lab

    run_suite(Lab(rehearsing=False, sink=rows), suite, table=TILES, out=out, seconds=seconds)
    return 0


def everything(boxes: Mapping[str, float], out: Path, *, soak: float = SOAK_SECONDS, longer: float = 0.0) -> int:
    """Suites in turn, each stopped when its box of seconds, or all time, is used up. longer: seconds beyond the usual."""
    started, passed, limit = time.monotonic(), True, SECONDS + longer
    with tempfile.TemporaryDirectory() as folder:
        sink = Path(folder) / "rows"
        sink.touch()
        for suite, box in boxes.items():
            left = limit - (time.monotonic() - started)
            print(f"-- {suite}: {min(left, box):.0f} s of {left:.0f} left", flush=True)
            if suite == "tests":
                passed = run_tests(min(left, box))
            else:
                run_child(suite, sink, out, min(left, box), soak)
        rows = [json.loads(line) for line in sink.read_text(encoding="utf-8").splitlines()]
    where = write(rows, out) if rows else "no rows"
    print("\n".join(lines(rows)))
    print(f"{time.monotonic() - started:.0f} s, {where}" + ("" if passed else ", TESTS FAILED"))
    return int(not passed or any(is_wrong(row) for row in rows))


def run_tests(seconds: float) -> bool:
    """Those marked `gpu`, in parallel where that is possible: most of their time goes to compiling."""
    texts = {path: path.read_text(encoding="utf-8") for path in sorted((ROOT / "tests").glob("test_*.py"))}
    files = [str(path) for path, text in texts.items() if "on_each_device" in text or "mark.gpu" in text]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "gpu", *files]
    if find_spec("xdist"):
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    try:
        return subprocess.run(command, cwd=ROOT, timeout=max(1.0, seconds), check=False).returncode == 0
    except subprocess.TimeoutExpired:
        print(f"the tests were stopped after {seconds:.0f} s")
        return False


def run_child(suite: str, sink: Path, out: Path, seconds: float, soak: float) -> None:
    lasting = max(5.0, min(soak, seconds - START_SECONDS))
    command = [sys.executable, "-m", "bench.gpu", suite, "--child", str(sink), "--out", str(out)]
    command += ["--seconds", str(lasting)]
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=max(1.0, seconds), check=False).returncode
        failure = f"its process ended with {code}" if code else None
    except subprocess.TimeoutExpired:
        failure = f"stopped after {seconds:.0f} s, its time; it may take more if asked for alone"
    if failure:
        with sink.open("a", encoding="utf-8") as rows:
            rows.write(json.dumps({"name": suite, "failure": failure}) + "\n")


def write(rows: Sequence[dict[str, Any]], out: Path) -> Path:
    """`{machine, rows}`, in a file named by day and card."""
    import torch
    import triton

    from bench.conftest import machine

    card = torch.cuda.get_device_properties(0)
    versions = {"torch": torch.__version__, "triton": triton.__version__, "cuda": torch.version.cuda}
    facts = machine() | versions | {"gpu": card.name, "gpu_bytes": card.total_memory}
    out.mkdir(parents=True, exist_ok=True)
    path = out / f"{facts['date']}-{card.name.removeprefix('NVIDIA ').replace(' ', '-').lower()}.json"
    path.write_text(json.dumps({"machine": facts, "rows": rows}, indent=1) + "\n", encoding="utf-8")
    return path


if __name__ == "__main__":
    sys.exit(main())
