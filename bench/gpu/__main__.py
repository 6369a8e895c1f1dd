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
from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from .table import is_wrong, lines

ROOT: Final = Path(__file__).parent.parent.parent
TILES: Final = ROOT / "kernels" / "gpu" / "tiles.json"
SUITES: Final = ("decode", "prefill", "moves", "overhead")
SECONDS: Final = 510.0  # of everything; what has not begun by then says so
TEST_SECONDS: Final = 240.0
TUNE_SECONDS: Final = 210.0


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
    parser.add_argument("--child", type=Path, metavar="ROWS", help=argparse.SUPPRESS)
    given = parser.parse_args()
    unknown = set(given.suites) - {"tests", "tune", *SUITES}
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
        return child(given.suites[0], given.child, given.out)
    suites = given.suites or ["tests", *SUITES]
    return everything(["tune", *suites] if given.tune else suites, given.out.resolve())


def rehearse(suites: Sequence[str]) -> int:
    """Every body, on the CPU in Triton's interpreter; what would be written goes to a folder that is deleted."""
    os.environ["TRITON_INTERPRET"] = "1"
    warnings.filterwarnings("ignore", message="flex_attention called without torch.compile")
    from .lab import Lab

    lab = Lab(rehearsing=True)
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder) / "tiles.json"
        table.write_text(TILES.read_text(encoding="utf-8"), encoding="utf-8")
        for suite in suites:
            run_suite(lab, suite, table=table, out=Path(folder) / "out")
    print("\n".join(lines(lab.rows)))
    print("a rehearsal on the CPU: the figures mean nothing")
    return 0


def run_suite(lab: Any, suite: str, *, table: Path, out: Path) -> None:  # Any: a Lab, which imports torch
    module = import_module(f"{__package__}.{suite}")
    if suite == "tune":
        module.run(lab, table=table, out=out, seconds=TUNE_SECONDS)
        return
    lab.add(f"copy on the card, at {suite}", lab.copy_gbps(), "GB/s")
    module.run(lab)


def child(suite: str, rows: Path, out: Path) -> int:
    """One suite, in this process."""
    from .lab import Lab

    run_suite(Lab(rehearsing=False, sink=rows), suite, table=TILES, out=out)
    return 0


def everything(suites: Sequence[str], out: Path) -> int:
    started, passed = time.monotonic(), True
    with tempfile.TemporaryDirectory() as folder:
        sink = Path(folder) / "rows"
        sink.touch()
        for suite in suites:
            left = SECONDS - (time.monotonic() - started)
            print(f"-- {suite}: {left:.0f} s left", flush=True)
            if suite == "tests":
                passed = run_tests(min(left, TEST_SECONDS))
            else:
                run_child(suite, sink, out, left)
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


def run_child(suite: str, sink: Path, out: Path, seconds: float) -> None:
    command = [sys.executable, "-m", "bench.gpu", suite, "--child", str(sink), "--out", str(out)]
    try:
        code = subprocess.run(command, cwd=ROOT, timeout=max(1.0, seconds), check=False).returncode
        failure = f"its process ended with {code}" if code else None
    except subprocess.TimeoutExpired:
        failure = f"stopped: no time was left after {seconds:.0f} s"
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
