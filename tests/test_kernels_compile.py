"""Every kernel, compiled ahead of time for three architectures: it compiles, it fits, it does not spill."""

import ast
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

import pytest

ROOT: Final = Path(__file__).parent.parent
ARCHITECTURES: Final = (80, 90, 100)
REGISTERS: Final = 64 << 10  # of a processor, in words; a warp takes them for 32 threads, 8 a thread at a time
SHARED_BYTES: Final = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # what one program may ask for

ALLOWED_SPILLS: Final[dict[tuple[str, str], tuple[int, str]]] = {
    ("_attend", "decode latents fp8"): (
        8,
        "on sm_90: tiles of 16 rows spill nothing, and read every latent twice as often",
    ),
}
"""(kernel, variant) -> bytes that may be spilled, and why that is worth having."""


@pytest.fixture(scope="module")
def compiled(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[int, list[dict[str, Any]]]:
    """What compile_kernels.py says of each architecture; shown below the results of the run."""
    caches = [tmp_path_factory.mktemp(f"sm_{arch}") for arch in ARCHITECTURES]
    with ThreadPoolExecutor(2) as pool:
        rows = dict(zip(ARCHITECTURES, pool.map(compile_for, ARCHITECTURES, caches), strict=True))
    request.config.pluginmanager.register(Report(rows))
    return rows


def compile_for(arch: int, cache: Path) -> list[dict[str, Any]]:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TRITON_")}
    environment |= {"PYTHONPATH": str(ROOT), "TRITON_CACHE_DIR": str(cache), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "compile_kernels.py"), str(arch)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def resident(row: dict[str, Any]) -> int:
    """Programs one processor can hold, as far as registers and shared memory go."""
    by_registers = REGISTERS // (-(-row["registers"] // 8) * 8 * 32 * row["num_warps"])
    return int(min(by_registers, SHARED_BYTES[row["arch"]] // max(1, row["shared_bytes"])))


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_no_kernel_spills(compiled: dict[int, list[dict[str, Any]]], arch: int) -> None:
    spilled = {(row["name"], row["variant"]): row["spill_bytes"] for row in compiled[arch] if row["spill_bytes"]}
    assert {case: count for case, count in spilled.items() if count > ALLOWED_SPILLS.get(case, (0, ""))[0]} == {}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_fits_a_processor(compiled: dict[int, list[dict[str, Any]]], arch: int) -> None:
    assert [row for row in compiled[arch] if resident(row) < 1] == []


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_every_kernel_that_is_launched_was_compiled(compiled: dict[int, list[dict[str, Any]]], arch: int) -> None:
    assert launched() <= {row["name"] for row in compiled[arch]}


def launched() -> set[str]:
    """Names that are called as `kernel[grid](...)` in kernels/gpu."""
    trees = [ast.parse(path.read_text(encoding="utf-8")) for path in (ROOT / "kernels" / "gpu").glob("*.py")]
    calls = [node.func for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {call.value.id for call in calls if isinstance(call, ast.Subscript) and isinstance(call.value, ast.Name)}


class Report:
    """A section of pytest's summary: the most that any variant of a kernel takes."""

    def __init__(self, rows: dict[int, list[dict[str, Any]]]) -> None:
        self._rows = rows

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        count = sum(map(len, self._rows.values()))
        terminalreporter.section(f"{count} kernels compiled ahead of time; the most that any variant takes")
        for line in self.lines():
            terminalreporter.write_line(line)

    def lines(self) -> Iterator[str]:
        every = [row for rows in self._rows.values() for row in rows]
        names = sorted({row["name"] for row in every})
        width = max(map(len, names))
        for arch in self._rows:
            seconds = sum(row["seconds"] for row in self._rows[arch])
            yield f"sm_{arch:<{width - 3}}  registers  spilled bytes  shared KiB  variants" + f"   ({seconds:.0f} s)"
            for name in names:
                own = [row for row in every if row["name"] == name and row["arch"] == arch]
                most = {
                    key: max((row[key] for row in own), default=0)
                    for key in ("registers", "spill_bytes", "shared_bytes")
                }
                shared = most["shared_bytes"] / 1024
                yield f"{name:<{width}}  {most['registers']:>9}  {most['spill_bytes']:>13}  {shared:>10.1f}  {len(own):>8}"
