"""The mover: lanes are bounded, the background holds nobody up, breakers open and close, a gate keeps a late job out."""

import logging
import subprocess
import sys
from collections.abc import Generator
from itertools import count
from threading import Event

import pytest

from tierkv.metrics import Metrics
from tierkv.mover import Breaker, Gate, LaneSpec, Mover
from tierkv.testing import FakeClock, StepExecutor


@pytest.fixture
def steps() -> StepExecutor:
    return StepExecutor()


@pytest.fixture
def mover(steps: StepExecutor) -> Mover:
    return Mover({"save": LaneSpec(threads=1, max_blocks=10)}, metrics=Metrics(), executor=lambda name, spec: steps)


def test_a_full_lane_refuses_and_takes_again_when_it_has_room(mover: Mover, steps: StepExecutor) -> None:
    assert mover.submit("save", lambda: 1, blocks=6) is not None
    assert mover.submit("save", lambda: 2, blocks=5) is None
    assert mover.submit("save", lambda: 3, blocks=4) is not None
    steps.step()
    assert mover.submit("save", lambda: 4, blocks=6) is not None


def test_an_empty_lane_takes_a_job_larger_than_its_limit(mover: Mover) -> None:
    assert mover.submit("save", lambda: None, blocks=1000) is not None
    assert mover.submit("save", lambda: None, blocks=1) is None


def test_a_lane_is_idle_until_a_job_is_queued_and_after_it_ran(mover: Mover, steps: StepExecutor) -> None:
    assert mover.is_idle("save")
    mover.submit("save", lambda: None, blocks=1)
    assert not mover.is_idle("save")
    steps.step()
    assert mover.is_idle("save")


def test_queue_depth_is_a_gauge(steps: StepExecutor) -> None:
    metrics = Metrics()
    mover = Mover({"save": LaneSpec(1, 10)}, metrics=metrics, executor=lambda name, spec: steps)
    mover.submit("save", lambda: None, blocks=7)
    assert metrics.queue_depth.value("save") == 7
    steps.run_all()
    assert metrics.queue_depth.value("save") == 0


def test_a_job_that_raises_is_logged_and_its_room_is_free_again(
    mover: Mover, steps: StepExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    def defect() -> None:
        raise RuntimeError("a defect")

    future = mover.submit("save", defect, blocks=10)
    with caplog.at_level(logging.ERROR, "tierkv"):
        steps.run_all()
    assert future is not None and isinstance(future.exception(), RuntimeError)
    assert "a save job failed" in caplog.text
    assert mover.submit("save", lambda: None, blocks=10) is not None


def test_drain_waits_for_jobs_that_jobs_queue() -> None:
    mover = Mover({"a": LaneSpec(1, 10), "b": LaneSpec(1, 10)}, metrics=Metrics())
    done: list[str] = []

    def first() -> None:
        mover.submit("b", lambda: done.append("b"), blocks=1)
        done.append("a")

    mover.submit("a", first, blocks=1)
    assert mover.drain(10)
    assert sorted(done) == ["a", "b"]
    mover.close()


def test_drain_gives_up_when_the_time_is_up(mover: Mover) -> None:
    mover.submit("save", lambda: None, blocks=1)  # nobody steps it
    assert not mover.drain(0.01)


def test_a_closed_mover_refuses_and_cancels_what_is_queued(mover: Mover) -> None:
    future = mover.submit("save", lambda: None, blocks=1)
    mover.close()
    assert future is not None and future.cancelled()
    assert mover.submit("save", lambda: None, blocks=1) is None


def endless(seen: list[int]) -> Generator[int, None, None]:
    try:
        for number in count():
            seen.append(number)
            yield number
    finally:
        seen.append(-1)


def test_steps_in_the_background_are_taken_between_other_jobs_until_they_end(mover: Mover, steps: StepExecutor) -> None:
    taken: list[str] = []
    mover.background("pin", (taken.append("step") for _ in range(2)))
    mover.submit("save", lambda: taken.append("job"), blocks=1)
    steps.run_all()
    assert taken == ["step", "job", "step"]


def test_drain_does_not_wait_for_the_background(mover: Mover) -> None:
    mover.background("pin", endless([]))
    assert mover.drain(0)


def test_a_closed_mover_takes_no_further_step_and_ends_the_generator(mover: Mover, steps: StepExecutor) -> None:
    seen: list[int] = []
    mover.background("pin", endless(seen))
    steps.step()
    mover.close()
    mover.close()
    assert seen == [0, -1] and not steps.queue
    late: list[int] = []
    mover.background("pin", endless(late))
    assert late == [] and not steps.queue


def test_close_waits_for_the_step_at_hand() -> None:
    mover = Mover({}, metrics=Metrics())
    begun, seen = Event(), []

    def work() -> Generator[None, None, None]:
        begun.set()
        for number in range(1 << 30):
            seen.append(number)
            yield

    mover.background("pin", work())
    assert begun.wait(10)
    mover.close()
    now = len(seen)
    assert now and seen == list(range(now))


def test_a_step_that_raises_is_logged_and_the_last(
    mover: Mover, steps: StepExecutor, caplog: pytest.LogCaptureFixture
) -> None:
    mover.background("pin", (1 // number for number in (1, 0, 1)))
    with caplog.at_level(logging.ERROR, "tierkv"):
        steps.run_all()
    assert "pin ends unfinished" in caplog.text and "ZeroDivisionError" in caplog.text


def test_a_process_can_end_while_something_runs_in_the_background() -> None:
    code = """
import itertools, logging, time
from tierkv.metrics import Metrics
from tierkv.mover import Mover
logging.basicConfig(level=logging.DEBUG)
Mover({}, metrics=Metrics()).background("pin", (time.sleep(0.001) for _ in itertools.count()))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "") and done.stderr == "DEBUG:tierkv:pin ends unfinished\n"


def test_a_breaker_opens_after_failures_in_a_row_for_a_time_that_doubles() -> None:
    clock, metrics = FakeClock(), Metrics()
    breaker = Breaker("disk", metrics=metrics, clock=clock, failures=2, first_s=1)
    breaker.failure(OSError("one"))
    breaker.success()
    breaker.failure(OSError("two"))
    assert not breaker.open, "a success between failures starts the count again"
    breaker.failure(OSError("three"))
    assert breaker.open and metrics.tier_down.value("disk") == 1
    clock.advance(1.01)
    assert not breaker.open
    breaker.failure(OSError("four")), breaker.failure(OSError("five"))
    clock.advance(1.5)
    assert breaker.open, "the second pause is twice as long"
    clock.advance(0.6)
    assert not breaker.open


def test_a_shut_gate_keeps_late_copies_out_and_only_the_first_shuts_it() -> None:
    gate, copies = Gate(), []
    assert gate.enter(lambda: copies.append(1))
    assert gate.shut()
    assert not gate.shut()
    assert not gate.enter(lambda: copies.append(2))
    assert copies == [1]
