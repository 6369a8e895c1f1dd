"""Tasks on several cores: children of this process, which have all it had when they were made, traces included.

Made by fork and nothing else: a task is any callable, a result anything that pickles. Make them before threads are started.
"""

import os
import pickle
import select
import signal
from collections.abc import Callable, Iterator, Sequence
from struct import Struct
from types import TracebackType
from typing import Final, TypeVar

from tierkv.errors import TierKVError

T = TypeVar("T")
NUMBER: Final = Struct("<I")
FRAME: Final = Struct("<IQ")
"""Number of the task, bytes of what follows."""


class Workers:
    """Does tasks in any order. A context: on leaving it, also by an exception, the children are gone."""

    def __init__(self, tasks: Sequence[Callable[[], T]], *, jobs: int) -> None:
        self._tasks = tasks
        self._children: dict[int, int] = {}  # file that results come by -> process
        if jobs > 1 and len(tasks) > 1:
            self._fork(min(jobs, len(tasks)))

    def _fork(self, jobs: int) -> None:
        numbers, give = os.pipe()
        # Whoever is free takes the next number; a pipe holds 16,000 of them, and nobody has so many cells.
        os.write(give, b"".join(NUMBER.pack(number) for number in range(len(self._tasks))))
        for _ in range(jobs):
            results, answer = os.pipe()
            process = os.fork()
            if not process:
                os.close(give)
                _work(self._tasks, numbers, answer)
            os.close(answer)
            self._children[results] = process
        os.close(give)
        os.close(numbers)

    def __enter__(self) -> "Workers":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for results, process in self._children.items():
            os.kill(process, signal.SIGKILL)  # it holds nothing that needs an orderly end
            os.close(results)
            os.waitpid(process, 0)
        self._children.clear()

    def results(self) -> Iterator[tuple[int, object]]:
        """Number and result of each task, as they come. What a task raises is raised here."""
        if not self._children:
            for number, task in enumerate(self._tasks):
                yield number, task()
            return
        left = set(range(len(self._tasks)))
        waiting = list(self._children)
        while left and waiting:
            for file in select.select(waiting, [], [])[0]:
                head = _read(file, FRAME.size)
                if len(head) < FRAME.size:
                    waiting.remove(file)
                    continue
                number, size = FRAME.unpack(head)
                result = pickle.loads(_read(file, size))
                if isinstance(result, BaseException):
                    raise result
                left.discard(number)
                yield number, result
        if left:
            raise TierKVError(
                f"a worker process ended early, with {len(left)} cells left: is memory short? use --jobs 1"
            )


def _work(tasks: Sequence[Callable[[], object]], numbers: int, answer: int) -> None:
    """Be a child: never returns, and leaves nothing of the parent's to be closed or flushed a second time."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent ends it
    try:
        while given := os.read(numbers, NUMBER.size):
            (number,) = NUMBER.unpack(given)
            try:
                result = pickle.dumps(tasks[number]())
            except Exception as error:  # noqa: BLE001 -- it is raised again in the parent
                result = pickle.dumps(error)
            data = FRAME.pack(number, len(result)) + result
            while data:
                data = data[os.write(answer, data) :]
    finally:
        os._exit(0)


def _read(file: int, size: int) -> bytes:
    parts = []
    while size and (part := os.read(file, size)):
        parts.append(part)
        size -= len(part)
    return b"".join(parts)
