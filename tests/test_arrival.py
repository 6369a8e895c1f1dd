"""Layers on their way: whoever waits for a layer goes on when its group is there, and never when it will not be."""

import threading

import pytest

from tierkv.arrival import Arrival, layer_bounds
from tierkv.errors import TierError


@pytest.mark.parametrize(
    ("layers", "groups", "bounds"), [(30, 1, [0, 30]), (30, 4, [0, 7, 15, 22, 30]), (3, 3, [0, 1, 2, 3])]
)
def test_groups_are_as_equal_as_can_be(layers: int, groups: int, bounds: list[int]) -> None:
    assert layer_bounds(layers, groups) == bounds


def test_a_layer_is_waited_for_with_its_group() -> None:
    arrival = Arrival([0, 2, 5])
    arrival.arrive(0)
    arrival.wait(0)
    arrival.wait(1)
    passed = threading.Event()
    waiting = threading.Thread(target=lambda: (arrival.wait(2), passed.set()))
    waiting.start()
    assert not passed.wait(0.02)
    arrival.arrive(1)
    assert passed.wait(5)
    waiting.join()
    assert not arrival.finished.done()
    arrival.finish()
    assert arrival.finished.result() is None


def test_whoever_waits_for_a_layer_that_never_comes_fails() -> None:
    arrival = Arrival([0, 1, 2])
    arrival.arrive(0)
    arrival.finish(OSError("the link is gone"))
    assert arrival.finished.done()
    with pytest.raises(TierError, match="a load lost layers on their way to the device: the link is gone"):
        arrival.wait(1)
