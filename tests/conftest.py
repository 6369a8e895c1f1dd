"""Fixtures that several areas share, and where kernels run: on the CUDA device, or without one in Triton's interpreter."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tierkv.valkey import EmbeddedValkey

HAS_CUDA = torch.cuda.is_available()
if not HAS_CUDA:
    os.environ["TRITON_INTERPRET"] = "1"  # read by triton at its import

ABSENT = {
    "gpu": "torch sees no CUDA device; bench/gpu.sh runs these on a machine with one",
    "interpreted": "kernels run on the CUDA device here; CUDA_VISIBLE_DEVICES= runs them in the interpreter",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    marker = "interpreted" if HAS_CUDA else "gpu"
    for item in items:
        if item.get_closest_marker(marker):
            item.add_marker(pytest.mark.skip(reason=ABSENT[marker]))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for marker, reason in ABSENT.items():
        count = sum(reason in str(report.longrepr) for report in terminalreporter.stats.get("skipped", []))
        if count:
            terminalreporter.write_line(f"{count} tests marked {marker!r} skipped: {reason}")


@pytest.fixture(scope="session")
def valkey() -> "Iterator[EmbeddedValkey]":
    """A real server for the whole session, by unix socket and TCP: use a prefix of your own, or flush it first."""
    from tierkv.valkey import EmbeddedValkey  # not on a machine that runs the kernels' tests alone

    with EmbeddedValkey(port=0, capacity_bytes=512 << 20) as server:
        yield server
