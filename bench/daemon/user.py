"""`python -m bench.daemon.user NAME`: the measured process of one party. Told what to do in JSON lines, it answers in JSON lines.

    {"do": "write" | "read", "size": "2 MiB", "batch": 32}    -> {"seconds": …, "bytes": …}
    {"do": "contains"}                                        -> {"seconds": …}
    {"do": "ping", "times": 1000}                             -> {"p50": …, "p99": …}     seconds
    {"do": "verify"}                                          -> {}

Its first line is `{"does": […]}` when it is ready, or `{"absent": why}`; an operation that fails is `{"failure": why}`, and
the next may come. It ends when its standard input does.
"""

import contextlib
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from typing import Any, Final, TextIO

import numpy as np

from bench.daemon.parties import PARTIES
from bench.daemon.party import (
    AREA_BYTES,
    MAX_BATCH,
    NUM_PROBED,
    SIZES,
    Batch,
    NotInstalled,
    Party,
    Refused,
    cut,
    key_of,
)

_CALLS: Final = 4
"""`contains` calls in one turn: enough to see past clock and scheduler."""


class User:
    """The user's memory, its batches, and the clock around the party's calls."""

    def __init__(self, party: Party) -> None:
        self.party = party
        self._blocks, self._outs = party.allocate(AREA_BYTES), party.allocate(AREA_BYTES)
        self._blocks[:] = np.frombuffer(np.random.default_rng(7).bytes(AREA_BYTES), np.uint8)
        party.prepare(self._blocks, self._outs)
        self._batches: dict[tuple[str, int], list[Batch]] = {}
        self._keys = [key_of(f"probed {number}") for number in range(NUM_PROBED)]
        self._held = False

    def do(self, request: dict[str, Any]) -> dict[str, Any]:
        """Do one request; see the top of this file."""
        operation = request["do"]
        if operation in ("write", "read"):
            return self._move(operation, self._cut(request["size"], request["batch"]))
        return {"contains": self._contains, "ping": lambda: self._ping(request["times"]), "verify": self._verify}[
            operation
        ]()

    def _cut(self, size: str, length: int) -> list[Batch]:
        if (size, length) not in self._batches:
            self._batches[size, length] = cut(self._blocks, self._outs, block_bytes=SIZES[size], length=length)
        return self._batches[size, length]

    def _move(self, operation: str, batches: list[Batch]) -> dict[str, Any]:
        call: Callable[[Batch], None] = getattr(self.party, operation)
        if operation == "write":
            for batch in batches:
                self.party.forget(batch)
        with _undisturbed():
            start = time.perf_counter()
            for batch in batches:
                call(batch)
            seconds = time.perf_counter() - start
        return {"seconds": seconds, "bytes": sum(batch.block_bytes * len(batch.keys) for batch in batches)}

    def _contains(self) -> dict[str, Any]:
        self._hold()
        with _undisturbed():
            start = time.perf_counter()
            answers = [self.party.contains(self._keys) for _ in range(_CALLS)]
            seconds = time.perf_counter() - start
        for answer in answers:
            if len(answer) != NUM_PROBED or not all(answer):
                raise Refused(f"{sum(map(bool, answer))} of {NUM_PROBED} keys were found: all are held")
        return {"seconds": seconds / _CALLS}

    def _ping(self, times: int) -> dict[str, Any]:
        self._hold()
        took = []
        with _undisturbed():
            for _ in range(times):
                start = time.perf_counter()
                self.party.ping()
                took.append(time.perf_counter() - start)
        cuts = statistics.quantiles(took, n=100)
        return {"p50": cuts[49], "p99": cuts[98]}

    def _verify(self) -> dict[str, Any]:
        """Write all, read all into memory that was cleared, compare."""
        for size in SIZES:
            batches = self._cut(size, MAX_BATCH)
            self._move("write", batches)
            self._outs.fill(0)
            self._move("read", batches)
            for batch in batches:
                for name, block, out in zip(batch.names, batch.blocks, batch.outs, strict=True):
                    if not np.array_equal(block, out):
                        raise Refused(f"the block read as {name[:16]}… ({size}) is not the one that was written")
        return {}

    def _hold(self) -> None:
        if not self._held and "contains" in self.party.does:
            self.party.hold(self._keys)
            self._held = True


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def serve(party: Party, requests: TextIO, answers: TextIO) -> None:
    """Answer each line of `requests` until there is none."""
    user = User(party)
    _say(answers, {"does": party.does})
    for line in requests:
        try:
            answer = user.do(json.loads(line))
        except Exception as error:  # noqa: BLE001  whatever it is, it is this party's result
            traceback.print_exc()
            answer = {"failure": f"{type(error).__name__}: {error}"}
        _say(answers, answer)


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    answers.write(json.dumps(answer) + "\n")
    answers.flush()


def main(name: str) -> None:
    """Be the user of a party."""
    answers = os.fdopen(os.dup(1), "w")  # a library that prints must not talk in between
    os.dup2(2, 1)
    try:
        party = PARTIES[name].load()()
    except (NotInstalled, NotImplementedError) as error:
        _say(answers, {"absent": str(error)})
        return
    try:
        serve(party, sys.stdin, answers)
    finally:
        party.close()


if __name__ == "__main__":
    main(sys.argv[1])
