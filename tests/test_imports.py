"""What must never import what: the rules of the house, checked on the source, and that importing tierkv stays light.

All imports count, also those inside functions and under TYPE_CHECKING. The three source folders are walked apart: tierkv's
links to the other two are not followed, so a rule cannot pass because a folder was not seen.
"""

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FOLDERS = {"tierkv": "tierkv", "connectors": "tierkv.connectors", "kernels": "tierkv.kernels"}
IO_MODULES = (
    "os",
    "io",
    "pathlib",
    "socket",
    "ssl",
    "subprocess",
    "shutil",
    "tempfile",
    "mmap",
    "sqlite3",
    "selectors",
)
CLOCKS = ("time", "datetime")
COMPUTE = ("torch", "triton", "cupy", "transformers")
THREADS = (
    "threading.Thread", "threading.Timer", "concurrent.futures.ThreadPoolExecutor", "concurrent.futures.ProcessPoolExecutor",
    "multiprocessing", "_thread",
)  # fmt: skip


@dataclass(frozen=True)
class Use:
    """A dotted name that a module imports, or reaches through a module it imports."""

    module: str
    name: str
    line: int

    def of(self, *names: str) -> bool:
        return any(self.name == name or self.name.startswith(f"{name}.") for name in names)


def modules(root: Path) -> Iterator[tuple[str, Path]]:
    for folder, package in FOLDERS.items():
        for path in sorted((root / folder).rglob("*.py")):
            parts = path.relative_to(root / folder).with_suffix("").parts
            yield ".".join([package, *parts]).removesuffix(".__init__"), path


def uses(module: str, path: Path) -> Iterator[Use]:
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    package = module.split(".") if path.name == "__init__.py" else module.split(".")[:-1]
    bound: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                bound[alias.asname or alias.name.split(".")[0]] = (
                    alias.name if alias.asname else alias.name.split(".")[0]
                )
                yield Use(module, alias.name, node.lineno)
        elif isinstance(node, ast.ImportFrom):
            base = ".".join(package[: len(package) - node.level + 1]) if node.level else ""
            base = ".".join(filter(None, (base, node.module)))
            for alias in node.names:
                bound[alias.asname or alias.name] = f"{base}.{alias.name}"
                yield Use(module, f"{base}.{alias.name}", node.lineno)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in bound:
            yield Use(module, f"{bound[node.value.id]}.{node.attr}", node.lineno)


def within(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def foreign(use: Use, *allowed: str) -> bool:
    """Neither of the standard library nor allowed."""
    return use.name.split(".")[0] not in sys.stdlib_module_names and not use.of(*allowed)


def other_tier(use: Use) -> bool:
    """A tier may have parts (`disk`, `disk_manifest`); base is everybody's."""
    if not use.of("tierkv.tiers") or use.of("tierkv.tiers.base"):
        return False
    theirs, ours = use.name.split(".")[2:3], use.module.split(".")[2:3]
    return bool(theirs and ours) and theirs[0].split("_")[0] != ours[0].split("_")[0]


INDEX = tuple(
    f"tierkv.{part}"
    for part in (
        "index",
        "strands",
        "paths",
        "tree",
        "lease",
        "rooms",
        "wants",
        "fates",
        "recovery",
        "audit",
        "names",
        "purge",
        "walks",
    )
)
STORE = tuple(
    f"tierkv.{part}"
    for part in (
        "store",
        "transfers",
        "assembly",
        "building",
        "edges",
        "ahead",
        "pins",
        "handoff",
        "lending",
        "load",
        "match",
    )
)  # and its parts
TORCH = (
    "tierkv.assembly",
    "tierkv.tiers.device",
    "tierkv.tiers.device_cuda",
    "tierkv.engine",
    "tierkv.kernels",
    "tierkv.connectors",
    "tierkv.codecs",
    "tierkv.demo",
    "tierkv.measure",
)
TOP = ("tierkv.cli", "tierkv.demo")

RULES: dict[str, Callable[[Use], bool]] = {
    "errors, layout and values: standard library only": lambda use: (
        within(use.module, "tierkv.errors", "tierkv.layout", "tierkv.values", "tierkv.config")
        and foreign(use, "tierkv.errors", "tierkv.layout", "tierkv.values")
    ),
    "policies: no I/O, no clock, no torch": lambda use: (
        within(use.module, "tierkv.policies") and use.of(*IO_MODULES, *CLOCKS, *COMPUTE, "threading", "random")
    ),
    "index: no I/O, no clock, no torch": lambda use: (
        within(use.module, *INDEX) and use.of(*IO_MODULES, *CLOCKS, *COMPUTE, "logging", "random")
    ),
    "tiers: never each other": lambda use: within(use.module, "tierkv.tiers") and other_tier(use),
    "tiers: never the index or the store": lambda use: (
        within(use.module, "tierkv.tiers") and use.of(*INDEX, *STORE, "tierkv.mover")
    ),
    "index and mover: known to the store alone": lambda use: (
        use.of("tierkv.index", "tierkv.mover")
        and not within(
            use.module,
            *STORE,
            *INDEX,
            "tierkv.daemon",
            "tierkv.mover",
            "tierkv.testing",
            "tierkv.measure",
            "tierkv.simulate",
        )
    ),
    "kernels: torch and triton only": lambda use: (
        within(use.module, "tierkv.kernels") and foreign(use, "torch", "triton", "numpy", "tierkv.kernels")
    ),
    "connectors: public API only": lambda use: (
        within(use.module, "tierkv.connectors")
        and use.of(*INDEX, *TOP, "tierkv.mover", "tierkv.tiers", "tierkv.engine")
    ),
    "torch: only where tensors are": lambda use: (
        use.of(*COMPUTE[:2]) and not within(use.module, *TORCH, "tierkv.testing")
    ),
    "asyncio: only in the daemon": lambda use: use.of("asyncio", "uvloop") and not within(use.module, "tierkv.daemon"),
    "threads: only in the mover": lambda use: (
        use.of(*THREADS) and not within(use.module, "tierkv.mover", "tierkv.daemon", "tierkv.testing")
    ),
    "environment: only in config": lambda use: (
        use.of("os.environ", "os.environb", "os.getenv", "os.putenv") and not within(use.module, "tierkv.config")
    ),
    "nobody imports cli, bench, tests, examples": lambda use: (
        use.of("tierkv.cli", "bench", "tests", "examples") and not use.module.startswith("tierkv.cli")
    ),
}


def breaches(root: Path) -> list[str]:
    return [
        f"{use.module}:{use.line} uses {use.name}: {rule}"
        for module, path in modules(root)
        for use in uses(module, path)
        for rule, broken in RULES.items()
        if broken(use)
    ]


def test_no_module_imports_what_it_must_not() -> None:
    assert breaches(ROOT) == []


def test_all_three_source_folders_are_walked() -> None:
    seen = {module for module, _ in modules(ROOT)}
    assert {"tierkv", "tierkv.tiers.base", "tierkv.connectors.base", "tierkv.kernels.attention"} <= seen
    assert all("connectors" not in path.relative_to(ROOT / "tierkv").parts for path in (ROOT / "tierkv").rglob("*.py"))


PLANTED = [
    ("tierkv/errors.py", "import numpy", "errors, layout and values: standard library only"),
    ("tierkv/layout.py", "from tierkv import store", "errors, layout and values: standard library only"),
    ("tierkv/config.py", "import msgpack", "errors, layout and values: standard library only"),
    ("tierkv/policies/lru.py", "def f():\n    from time import monotonic", "policies: no I/O, no clock, no torch"),
    ("tierkv/policies/lru.py", "import os.path", "policies: no I/O, no clock, no torch"),
    ("tierkv/index.py", "import time as t", "index: no I/O, no clock, no torch"),
    ("tierkv/index.py", "if True:\n    import torch.nn", "index: no I/O, no clock, no torch"),
    ("tierkv/tiers/disk.py", "from tierkv.tiers import host", "tiers: never each other"),
    ("tierkv/tiers/disk.py", "from .host import HostSlab", "tiers: never each other"),
    ("tierkv/tiers/disk_scan.py", "import tierkv.tiers.redis_bulk", "tiers: never each other"),
    ("tierkv/tiers/host.py", "from ..store import Store", "tiers: never the index or the store"),
    ("tierkv/engine/engine.py", "from tierkv.mover import Mover", "index and mover: known to the store alone"),
    ("connectors/vllm.py", "from tierkv.tiers.disk import DiskTier", "connectors: public API only"),
    ("kernels/attention.py", "from tierkv.layout import Layout", "kernels: torch and triton only"),
    ("kernels/attention.py", "import transformers", "kernels: torch and triton only"),
    ("tierkv/store.py", "def f():\n    import torch", "torch: only where tensors are"),
    ("tierkv/tiers/redis.py", "from asyncio import run", "asyncio: only in the daemon"),
    ("tierkv/store.py", "import threading\nthreading.Thread()", "threads: only in the mover"),
    ("tierkv/store.py", "from concurrent.futures import ThreadPoolExecutor", "threads: only in the mover"),
    ("tierkv/valkey.py", "import os\nx = os.environ['A']", "environment: only in config"),
    ("tierkv/valkey.py", "from os import getenv as g", "environment: only in config"),
    ("tierkv/store.py", "from tierkv.cli import main", "nobody imports cli, bench, tests, examples"),
    ("connectors/vllm.py", "import bench", "nobody imports cli, bench, tests, examples"),
]


@pytest.mark.parametrize(("path", "source", "rule"), PLANTED)
def test_planted_breach_is_found(tmp_path: Path, path: str, source: str, rule: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    found = breaches(tmp_path)
    assert any(line.endswith(rule) for line in found), found


def test_every_rule_has_a_planted_breach() -> None:
    assert {rule for _, _, rule in PLANTED} == set(RULES)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("tierkv/index.py", "from threading import Lock"),
        ("tierkv/tiers/disk.py", "from tierkv.tiers.base import Tier\nfrom tierkv.tiers.disk_files import Files"),
        ("tierkv/valkey.py", "import os\nos.getpid()"),
        ("tierkv/store.py", "from concurrent.futures import Future"),
        ("connectors/engine.py", "from tierkv.store import Store"),
        ("kernels/attention.py", "import math\nimport torch\nimport triton.language as tl"),
    ],
)
def test_what_is_allowed_is_no_breach(tmp_path: Path, path: str, source: str) -> None:
    (tmp_path / path).parent.mkdir(parents=True)
    (tmp_path / path).write_text(source)
    assert breaches(tmp_path) == []


@pytest.mark.parametrize(
    ("code", "absent"),
    [
        ("import tierkv", {"torch", "numpy", "zarr", "redis", "asyncio", "transformers"}),
        (
            "import tierkv.config, tierkv.metrics, tierkv.keys, tierkv.layout",
            {"torch", "numpy", "zarr", "redis", "asyncio"},
        ),
        ("import tierkv.cli", {"torch", "numpy", "zarr", "redis", "asyncio", "transformers"}),
    ],
)
def test_import_in_a_fresh_process_loads_nothing_heavy(code: str, absent: set[str]) -> None:
    code += "; import sys; print(*sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert not absent & set(result.stdout.split())
