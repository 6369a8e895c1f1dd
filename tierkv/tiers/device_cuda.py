"""What the device tier asks of CUDA: streams, events, copies, pinning. `Cuda` says what, `CupyCuda` does it through CuPy.

Nothing here knows of pages or places. CuPy is imported when a device is opened and nowhere else, so a machine without one
loads nothing of it; `tierkv.testing.FakeCuda` stands in for it in tests. Whatever CUDA refuses is a TierError: for the caller a
miss, never a crash.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from enum import Enum
from importlib import import_module
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import torch

from tierkv.errors import ConfigError, TierError

INSTALL: Final = "pip install 'tierkv[cuda13]', or 'tierkv[cuda12]' for a driver of CUDA 12"
_BLACKWELL: Final = 10
_HOST_POINTERS: Final = 91  # cudaDevAttrCanUseHostPointerForRegisteredMem
_PORTABLE: Final = 1  # cudaHostRegisterPortable: pinned for every context of the process
_MAX_BATCH: Final = 256


class Priority(Enum):
    """Which of two streams with work goes first, as CUDA counts: lower numbers first, 0 is the last and everybody's default.

    What lies outside a device's range is taken for the nearest in it. CUDA's manual calls this a hint, and one for kernels only:
    copies by the DMA engines know no priority, so it counts where a driver copies by a kernel.
    """

    HIGH = -5
    LOW = 0


class Copy(NamedTuple):
    """`size` bytes from address `source` to address `target`; either may be of the device or of the host."""

    target: int
    source: int
    size: int


class Event(Protocol):
    """A point in a stream, recorded once."""

    def wait(self) -> None:
        """Block the calling thread until all before this point is done; sleeps, does not spin. Raises TierError."""


class Cuda(Protocol):
    """One device. Thread-safe, as CUDA is; a stream belongs to one thread at a time. Every method raises TierError.

    name: device and driver, what a measurement is valid for.
    batches: `copy_batch` works here.
    """

    name: str
    batches: bool

    def new_stream(self, priority: Priority = Priority.LOW) -> Any:
        """Return a stream that runs beside all others, also beside the legacy default stream. It goes with its last reference."""

    def mark(self) -> Event:
        """Record an event on torch's current stream."""

    def record(self, stream: Any) -> Event:
        """Record an event on a stream."""

    def wait(self, stream: Any, event: Event) -> None:
        """Let what is queued on the stream from now on wait for the event. Does not block."""

    def copy(self, stream: Any, copies: Iterable[Copy]) -> None:
        """Queue copies, one call each, as they come. When one is refused, those before it stay queued.

        A copy must not leave the registration (or the allocation) it begins in.
        """

    def copy_batch(self, stream: Any, copies: Sequence[Copy]) -> None:
        """Queue copies in one call; they run in any order among themselves, in stream order with the rest."""

    def host_register(self, address: int, size: int) -> None:
        """Pin host memory. Slow by the GiB: never on the engine's thread.

        It is the process's: of one that is killed, the kernel unmaps the memory and closes the driver's files, at which the
        driver lets go of the pages that it held. Nobody has to clean up.
        """

    def host_unregister(self, address: int) -> None:
        """Undo `host_register` of the same address."""

    def free_memory(self) -> int:
        """Bytes of device memory that nobody has."""

    def numa_node(self) -> int | None:
        """Number of the NUMA node the device hangs on; None where the machine does not say."""


def open_cuda(ordinal: int) -> Cuda:
    """Open a device by its number. Raises ConfigError, with the remedy, where CuPy or the driver is missing or too old."""
    try:
        import cupy
    except ImportError as error:
        raise ConfigError(f"device.kind = cuda needs CuPy, which cannot be imported ({error}): {INSTALL}") from error
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
    except runtime.CUDARuntimeError as error:
        driver, wanted = _version(runtime.driverGetVersion()), _version(runtime.runtimeGetVersion())
        has = f"the driver is of CUDA {driver}" if driver else "there is no NVIDIA driver"
        raise ConfigError(
            f"device.kind = cuda: {has}, CuPy was built for CUDA {wanted} ({error}): "
            f"update the driver, install CuPy for it ({INSTALL}), or set device.kind = cpu"
        ) from error
    if not 0 <= ordinal < count:
        raise ConfigError(f"device cuda:{ordinal}: this process sees {count} devices, numbered from 0")
    return CupyCuda(cupy, ordinal)


def _version(number: int) -> str:
    """13020 is 13.2; nothing for 0, which stands for no driver."""
    return f"{number // 1000}.{number % 1000 // 10}" if number else ""


class _CupyEvent:
    """An event that a waiting thread sleeps on."""

    def __init__(self, cuda: "CupyCuda", event: Any) -> None:
        self.cuda, self.event = cuda, event

    def wait(self) -> None:
        """As the interface says."""
        with self.cuda.current() as runtime:
            runtime.eventSynchronize(self.event.ptr)


class CupyCuda:
    """`Cuda` through CuPy, and batches through cuda.bindings, which torch brings along for CUDA 13 (CuPy has no such call)."""

    def __init__(self, cupy: Any, ordinal: int) -> None:
        self._cupy, self._ordinal, self._runtime = cupy, ordinal, cupy.cuda.runtime
        with self.current() as runtime:
            properties = runtime.getDeviceProperties(ordinal)
            self.name = f"{properties['name'].decode()}, CUDA {_version(runtime.driverGetVersion())}"
            # A batch has crashed the process on Blackwell (vllm-project/vllm#49276, InternLM/lmdeploy#4838), and where
            # registered memory has another address on the device (sgl-project/sglang#40232): a crash is no miss.
            fit = properties["major"] < _BLACKWELL and runtime.deviceGetAttribute(_HOST_POINTERS, ordinal) == 1
        self._driver = _bindings() if fit else None
        self.batches = self._driver is not None
        if self._driver is not None:
            self._attributes = self._driver.CUmemcpyAttributes()
            self._attributes.srcAccessOrder = self._driver.CUmemcpySrcAccessOrder.CU_MEMCPY_SRC_ACCESS_ORDER_STREAM
            self._attributes.flags = self._driver.CUmemcpyFlags.CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE.value

    @contextmanager
    def current(self) -> Iterator[Any]:
        """Make the device current on this thread, then what was before; torch knows how to do that without waking the other."""
        try:
            with torch.cuda.device(self._ordinal):
                self._runtime.setDevice(self._ordinal)  # a new thread has no context yet
                yield self._runtime
        except self._runtime.CUDARuntimeError as error:
            raise TierError(f"cuda:{self._ordinal}: {error}") from error

    def new_stream(self, priority: Priority = Priority.LOW) -> Any:
        """As the interface says."""
        with self.current():
            return self._cupy.cuda.Stream(non_blocking=True, priority=priority.value)

    def mark(self) -> Event:
        """As the interface says."""
        return self._record(torch.cuda.current_stream(self._ordinal).cuda_stream)

    def record(self, stream: Any) -> Event:
        """As the interface says."""
        return self._record(stream.ptr)

    def _record(self, pointer: int) -> Event:
        with self.current() as runtime:
            event = self._cupy.cuda.Event(block=True, disable_timing=True)
            runtime.eventRecord(event.ptr, pointer)
        return _CupyEvent(self, event)

    def wait(self, stream: Any, event: Event) -> None:
        """As the interface says."""
        if not isinstance(event, _CupyEvent):
            raise TypeError(f"{type(event).__name__}: copies wait for what `mark` returned")
        with self.current() as runtime:
            runtime.streamWaitEvent(stream.ptr, event.event.ptr)

    def copy(self, stream: Any, copies: Iterable[Copy]) -> None:
        """As the interface says."""
        with self.current() as runtime:
            for target, source, size in copies:  # which of them is the device's, CUDA sees by the address
                runtime.memcpyAsync(target, source, size, runtime.memcpyDefault, stream.ptr)

    def copy_batch(self, stream: Any, copies: Sequence[Copy]) -> None:
        """As the interface says. At most 256 at a time: single calls with tens of thousands have crashed (vllm#49276)."""
        driver = self._driver
        if driver is None:
            raise TierError(f"{self.name}: copies cannot be batched here")
        with self.current():
            for at in range(0, len(copies), _MAX_BATCH):
                targets, sources, sizes = zip(*copies[at : at + _MAX_BATCH], strict=True)
                count = len(sizes)
                try:
                    status, *_ = driver.cuMemcpyBatchAsync(
                        [driver.CUdeviceptr(target) for target in targets],
                        [driver.CUdeviceptr(source) for source in sources],
                        list(sizes),
                        count,
                        [self._attributes],
                        [0]
                        * count,  # one is enough by the manual; peers were bitten by drivers that read `count` of them
                        1,
                        stream.ptr,
                    )
                except RuntimeError as error:  # the driver has no such function
                    raise TierError(f"{self.name}: copies cannot be batched here ({error})") from error
                if status != driver.CUresult.CUDA_SUCCESS:
                    raise TierError(f"{self.name}: a batch of {count} copies was refused: {status.name}")

    def host_register(self, address: int, size: int) -> None:
        """As the interface says."""
        with self.current() as runtime:
            runtime.hostRegister(address, size, _PORTABLE)

    def host_unregister(self, address: int) -> None:
        """As the interface says."""
        with self.current() as runtime:
            runtime.hostUnregister(address)

    def free_memory(self) -> int:
        """As the interface says."""
        with self.current() as runtime:
            return int(runtime.memGetInfo()[0])

    def numa_node(self) -> int | None:
        """As the interface says."""
        with self.current() as runtime:
            address = runtime.deviceGetPCIBusId(self._ordinal).lower()
        try:
            node = int(Path(f"/sys/bus/pci/devices/{address}/numa_node").read_text(encoding="ascii"))
        except (OSError, ValueError):
            return None
        return node if node >= 0 else None


def _bindings() -> Any:
    """The driver's functions, or None: batches are then done copy by copy."""
    try:
        driver = import_module("cuda.bindings.driver")
    except ImportError:
        return None
    return driver if hasattr(driver, "cuMemcpyBatchAsync") else None
