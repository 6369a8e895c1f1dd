"""What an engine's steps need of a device, without one: memory of its own, and copies and replays that run late.

    cuda = FakeCuda(choose)
    link = LateLink(cuda)
    staging = Staging(torch.device("cpu"), link=link)                        or Runner(model, pool, link=link)
    graphs = DecodeGraphs(…, lambda: LateGraph(cuda), link=link)
    cuda.compute(lambda: …)                      a kernel of the step: sees what the device's memory holds when its turn comes

On a CPU the memory that the host writes is the memory that kernels read, so nobody sees a copy that is forgotten, too short, or
made from memory that the host has written again meanwhile. Here the two are apart, and a copy runs when the randomness of
`FakeCuda` lets it.
"""

from collections.abc import Callable

import torch

from tierkv.testing.cuda import FakeCuda, FakeEvent
from tierkv.tiers.device_cuda import Copy


class LateLink:
    """`tierkv.engine.staging.Link` over a fake device, whose memory is full of rubbish at first.

    waits: how often the host waited for a copy that had not been made.
    """

    def __init__(self, cuda: FakeCuda) -> None:
        self.cuda, self.waits = cuda, 0
        self._memory: list[torch.Tensor] = []  # copies know addresses alone

    def on_host(self, num_bytes: int) -> torch.Tensor:
        """As the interface says."""
        return self._full(num_bytes, 0xEE)

    def on_device(self, num_bytes: int) -> torch.Tensor:
        """As the interface says."""
        return self._full(num_bytes, 0xDD)

    def _full(self, num_bytes: int, value: int) -> torch.Tensor:
        memory = torch.full((num_bytes,), value, dtype=torch.uint8)
        self._memory.append(memory)
        return memory

    def copy(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """In two halves, where both are contiguous."""
        if target.shape != source.shape:
            raise RuntimeError(f"{list(source.shape)} do not fit into {list(target.shape)}")
        if target.is_contiguous() and source.is_contiguous() and target.dtype == source.dtype:
            self.cuda.copy(self.cuda.torch, [Copy(target.data_ptr(), source.data_ptr(), source.nbytes)])
        else:

            def kernel() -> None:
                target.copy_(source)

            self.cuda.compute(kernel)

    def passed(self) -> "_LatePassed":
        """As the interface says."""
        return _LatePassed(self)


class _LatePassed:
    def __init__(self, link: LateLink) -> None:
        self._link = link
        self._event: FakeEvent | None = None

    def record(self) -> None:
        """As the interface says."""
        self._event = self._link.cuda.mark()

    def wait(self) -> None:
        """As the interface says."""
        if self._event is not None and not self._event.recorded.passed:
            self._link.waits += 1
            self._event.wait()


class LateGraph:
    """`tierkv.engine.graphs.Graph` that calls what was recorded once more when its turn comes, over the same memory."""

    def __init__(self, cuda: FakeCuda) -> None:
        self._cuda = cuda

    def record(self, run: Callable[[], object]) -> None:
        """As the interface says; `run` is also called at once."""
        self._run = run
        self._cuda.catch_up()
        run()

    def replay(self) -> None:
        """As the interface says."""

        def kernel() -> None:
            self._run()

        self._cuda.compute(kernel)
