"""What CupyCuda tells CuPy and the driver's bindings: the calls, seen by stand-ins for both (on a GPU: test_device_gpu.py)."""

import sys
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tierkv.errors import TierError
from tierkv.tiers.device_cuda import Copy, Cuda, Priority, open_cuda

DEFAULT_KIND = 4


class CUDARuntimeError(RuntimeError):
    pass


class Runtime:
    """cupy.cuda.runtime, as far as it is used; keeps the calls."""

    CUDARuntimeError, memcpyDefault = CUDARuntimeError, DEFAULT_KIND

    def __init__(self, *, major: int = 9, host_pointers: int = 1) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.fail: str | None = None
        self.answers = {
            "getDeviceCount": 2,
            "driverGetVersion": 13000,
            "getDeviceProperties": {"name": b"NVIDIA H200", "major": major},
            "deviceGetAttribute": host_pointers,
            "memGetInfo": (5, 9),
            "deviceGetPCIBusId": "FFFF:00:00.0",
        }

    def __getattr__(self, name: str) -> Any:
        def call(*args: Any) -> Any:
            self.calls.append((name, *args))
            if self.fail == name:
                raise CUDARuntimeError("cudaErrorIllegalAddress")
            return self.answers.get(name)

        return call


class Stream:
    def __init__(self, *, non_blocking: bool, priority: int) -> None:
        assert non_blocking
        self.ptr, self.priority = 70, priority


class Event:
    def __init__(self, *, block: bool, disable_timing: bool) -> None:
        assert block and disable_timing, "a waiting thread must sleep"
        self.ptr = 80


class Driver:
    """cuda.bindings.driver."""

    CUdeviceptr = staticmethod(lambda address: ("pointer", address))
    CUmemcpyAttributes = SimpleNamespace
    CUmemcpySrcAccessOrder = SimpleNamespace(CU_MEMCPY_SRC_ACCESS_ORDER_STREAM="stream")
    CUmemcpyFlags = SimpleNamespace(CU_MEMCPY_FLAG_PREFER_OVERLAP_WITH_COMPUTE=SimpleNamespace(value=1))
    CUresult = SimpleNamespace(CUDA_SUCCESS=SimpleNamespace(name="CUDA_SUCCESS"))

    def __init__(self) -> None:
        self.batches: list[tuple[Any, ...]] = []
        self.status: Any = self.CUresult.CUDA_SUCCESS

    def cuMemcpyBatchAsync(self, *args: Any) -> tuple[Any, ...]:
        self.batches.append(args)
        if isinstance(self.status, Exception):
            raise self.status
        return (self.status,)


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    driver = Driver()
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", driver)
    monkeypatch.setattr(torch.cuda, "device", lambda ordinal: nullcontext())
    monkeypatch.setattr(torch.cuda, "current_stream", lambda ordinal: SimpleNamespace(cuda_stream=60 + ordinal))
    return driver


def opened(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=runtime, Stream=Stream, Event=Event))
    monkeypatch.setitem(sys.modules, "cupy", cupy)
    cuda = open_cuda(1)
    runtime.calls.clear()
    return cuda


def test_streams_and_events_go_to_the_device_they_are_of(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    cuda = opened(runtime, monkeypatch)
    stream, mark = cuda.new_stream(), cuda.mark()
    cuda.wait(stream, mark)
    cuda.copy(stream, [Copy(1, 2, 3), Copy(4, 5, 6)])
    cuda.record(stream).wait()
    here = ("setDevice", 1)
    assert runtime.calls == [
        here,
        *(here, ("eventRecord", 80, 61)),
        *(here, ("streamWaitEvent", 70, 80)),
        *(here, ("memcpyAsync", 1, 2, 3, DEFAULT_KIND, 70), ("memcpyAsync", 4, 5, 6, DEFAULT_KIND, 70)),
        *(here, ("eventRecord", 80, 70)),
        *(here, ("eventSynchronize", 80)),
    ]


def test_a_stream_that_goes_first_has_the_lower_number(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = opened(Runtime(), monkeypatch)
    assert [cuda.new_stream(priority).priority for priority in (Priority.HIGH, Priority.LOW)] == [-5, 0]
    assert cuda.new_stream().priority == 0  # CUDA's own default


def test_a_batch_is_in_stream_order_and_never_too_large(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = opened(Runtime(), monkeypatch)
    assert cuda.batches
    cuda.copy_batch(cuda.new_stream(), [Copy(3 * at, 3 * at + 1, 7) for at in range(300)])
    (targets, sources, sizes, count, attributes, indices, num_attributes, stream), second = driver.batches
    assert targets[2] == ("pointer", 6) and sources[2] == ("pointer", 7) and sizes == [7] * 256
    assert attributes[0].srcAccessOrder == "stream"
    assert (count, indices, num_attributes, stream) == (256, [0] * 256, 1, 70)
    assert second[3] == 44


@pytest.mark.parametrize("status", [SimpleNamespace(name="CUDA_ERROR_INVALID_VALUE"), RuntimeError("not found")])
def test_a_refused_batch_is_a_tier_error(driver: Driver, monkeypatch: pytest.MonkeyPatch, status: Any) -> None:
    cuda = opened(Runtime(), monkeypatch)
    driver.status = status
    with pytest.raises(TierError, match=r"INVALID_VALUE|not found"):
        cuda.copy_batch(cuda.new_stream(), [Copy(1, 2, 3)])


@pytest.mark.parametrize("runtime", [Runtime(major=10), Runtime(host_pointers=0)])
def test_no_batches_where_they_have_crashed(driver: Driver, monkeypatch: pytest.MonkeyPatch, runtime: Runtime) -> None:
    cuda = opened(runtime, monkeypatch)
    assert not cuda.batches
    with pytest.raises(TierError, match="batched"):
        cuda.copy_batch(cuda.new_stream(), [Copy(1, 2, 3)])


def test_no_batches_without_the_bindings(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cuda.bindings.driver", None)
    assert not opened(Runtime(), monkeypatch).batches


@pytest.mark.parametrize("name", ["memcpyAsync", "eventSynchronize", "hostRegister", "streamWaitEvent", "eventRecord"])
def test_whatever_cuda_refuses_is_a_tier_error(driver: Driver, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    runtime = Runtime()
    cuda = opened(runtime, monkeypatch)
    stream, mark = cuda.new_stream(), cuda.mark()
    runtime.fail = name
    with pytest.raises(TierError, match="cuda:1: cudaErrorIllegalAddress"):
        cuda.copy(stream, [Copy(1, 2, 3)])
        cuda.wait(stream, mark)
        cuda.record(stream)
        mark.wait()
        cuda.host_register(4096, 8192)


def test_pinning_and_what_the_device_says(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    runtime = Runtime()
    cuda = opened(runtime, monkeypatch)
    cuda.host_register(4096, 8192)
    cuda.host_unregister(4096)
    assert runtime.calls[1::2] == [("hostRegister", 4096, 8192, 1), ("hostUnregister", 4096)]
    assert (cuda.name, cuda.free_memory(), cuda.numa_node()) == ("NVIDIA H200, CUDA 13.0", 5, None)


def test_an_event_of_others_is_no_mark(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = opened(Runtime(), monkeypatch)
    with pytest.raises(TypeError, match="mark"):
        cuda.wait(cuda.new_stream(), SimpleNamespace(wait=lambda: None))
