"""How everything here is measured: device events, medians, inputs larger than the caches, rows against a limit.

A *lab* is where the bodies run: on the CUDA device, or in rehearsal on the CPU with tiny shapes in Triton's interpreter, so
that a typo is found where no GPU is. A rehearsal's figures mean nothing and are written nowhere.
"""

import gc
import json
import math
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

Tensor = torch.Tensor
T = TypeVar("T")
Call = Callable[[], Any]
Row = dict[str, Any]

WORST_ERROR = {torch.float32: 1e-3, torch.float16: 5e-3, torch.bfloat16: 2e-2}
"""Relative to the reference's norm; of results of that dtype."""


class Timing(NamedTuple):
    """Seconds of one call; whether a graph replayed it."""

    seconds: float
    rounds: int
    graph: bool


class Lab:
    """Where suites run. Rows go to `sink`, one JSON object a line, as they are measured: what is killed keeps what it had."""

    def __init__(self, *, rehearsing: bool, sink: Path | None = None) -> None:
        self.rehearsing = rehearsing
        self.device = torch.device("cpu" if rehearsing else "cuda")
        self.rows: list[Row] = []
        self._sink = sink
        self._copy_gbps: float | None = None

    def pick(self, real: T, tiny: T) -> T:
        """A size: the real one, or that of a rehearsal."""
        return tiny if self.rehearsing else real

    def kernel(self, module: str, function: str) -> Callable[..., Any]:
        """The Triton side of a public function: in rehearsal the launcher itself, as tensors are on the CPU."""
        where = "tierkv.kernels.gpu" if self.rehearsing else "tierkv.kernels"
        return getattr(import_module(f"{where}.{module}"), function)  # type: ignore[no-any-return]

    # -- time

    def time(self, calls: Sequence[Call], *, rounds: int = 20) -> Timing:
        """Median seconds of one call, over `rounds` turns through all of them; they should touch more memory than L2 has.

        A turn is captured as a graph and replayed, where it can be: launches from Python do not count then.
        """
        if self.rehearsing:
            start = time.perf_counter()
            calls[0]()
            return Timing(time.perf_counter() - start, 1, False)
        for call in calls:  # compiles
            call()
        torch.cuda.synchronize()
        replay = self._captured(calls)
        turn = replay or (lambda: [call() for call in calls])
        turn(), turn()
        taken = []
        for _ in range(rounds):
            before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]  # torch's
            before.record()
            turn()
            after.record()
            after.synchronize()
            taken.append(before.elapsed_time(after) / 1e3 / len(calls))
        return Timing(statistics.median(taken), rounds, replay is not None)

    def _captured(self, calls: Sequence[Call]) -> Call | None:
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in calls:
                    call()
        except Exception:  # noqa: BLE001 - a call that waits for the device cannot be captured, and says so in many ways
            torch.cuda.synchronize()
            return None
        return graph.replay

    def copy_gbps(self) -> float:
        """The card's ceiling: bytes read and written a second by a device-to-device copy, measured in this run."""
        if self._copy_gbps is None:
            size = self.pick(2 << 30, 1 << 16)
            source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=self.device)
            target = torch.empty_like(source)
            timing = self.time([lambda: target.copy_(source)] * 2)
            self._copy_gbps = 2 * size / timing.seconds / 1e9
            del source, target
            self._give_back()
        return self._copy_gbps

    def copy_seconds(self, num_bytes: int, sets: int) -> float:
        """Time of a contiguous copy of as many bytes, where a whole card's bandwidth is not to be had."""
        pairs = [torch.randint(0, 255, (2, num_bytes), dtype=torch.uint8, device=self.device) for _ in range(sets)]
        return self.time([partial(target.copy_, source) for target, source in pairs]).seconds

    # -- truth

    def checked(
        self, call: Callable[[], Tensor], reference: Tensor, *, fault: type[Exception] = ArithmeticError
    ) -> float:
        """‖out − reference‖ / ‖reference‖ of one call, whose fresh memory was poisoned; raises `fault` where it is wrong."""
        self.poison(reference.numel() * 8)
        out = call()
        if out.shape != reference.shape:
            raise fault(f"the result is {tuple(out.shape)}, the reference {tuple(reference.shape)}")
        error = float((out.double() - reference).norm() / reference.norm())
        if not error < WORST_ERROR[out.dtype]:  # NaN is wrong, too
            raise fault(f"wrong: {error:.2g} from the float64 reference")
        return error

    def poison(self, num_bytes: int) -> None:
        """Fill memory that the next allocations get with NaN, so that what is never written shows."""
        blocks = [torch.full((max(1, num_bytes // 4 >> k),), math.nan, device=self.device) for k in range(4)]
        del blocks

    # -- rows

    def add(
        self,
        name: str,
        value: float,
        unit: str,
        *,
        limit_name: str = "",
        limit: float | None = None,
        goal: float | None = None,
        rounds: int = 1,
        **more: Any,  # error, graph: columns of some rows only
    ) -> None:
        """A row as in bench/conftest.py, and the goal of its ratio."""
        ratio = value / limit if limit else None
        row = {"name": name, "value": value, "unit": unit, "limit_name": limit_name, "limit": limit, "ratio": ratio}
        self._keep(row | {"rounds": rounds, "goal": goal} | more)

    def failed(self, name: str, error: Exception) -> None:
        """A row that says why there is no figure; `wrong` where the result was not that of the reference."""
        text = f"{type(error).__name__}: {error}".splitlines()[0][:300]
        self._keep({"name": name, "failure": text, "wrong": isinstance(error, ArithmeticError)})

    def absent(self, name: str, why: str) -> None:
        """A row for a peer that is not on this machine: no failure."""
        self._keep({"name": name, "absent": why})

    def _keep(self, row: Row) -> None:
        self.rows.append(row)
        if self._sink:
            with self._sink.open("a", encoding="utf-8") as lines:
                lines.write(json.dumps(row) + "\n")

    @contextmanager
    def attempt(self, name: str) -> Iterator[None]:
        """Turn what goes wrong inside into a row, and give memory back."""
        try:
            yield
        except Exception as error:
            if self.rehearsing:
                raise
            # A benchmark that fails is a row, and the rest goes on.
            self.failed(name, error)
        finally:
            self._give_back()

    def _give_back(self) -> None:
        gc.collect()
        if not self.rehearsing:
            torch.cuda.empty_cache()
