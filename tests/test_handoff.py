"""Prefill there, decode here: KV comes while it is computed, and whatever breaks, the tokens are those of a cold run."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.daemon_parts import PATIENCE_S, RunningDaemon, process, running, until
from tests.engine_models import int32, random_prompts
from tests.handoff_parts import CHUNK, GREEDY, LAYERED, compute, in_host, opened_store, prompt, serving
from tierkv import ahead
from tierkv.handoff import WAITERS
from tierkv.store import Store
from tierkv.tiers.daemon import DaemonTier

BLOCKS = 30
TOKENS = prompt(BLOCKS)
PIECE = len(TOKENS) // 3
LONG_S = 10 * PATIENCE_S
"""A deadline that no test waits for."""
(LONG, OTHER, SHORT) = random_prompts([75, 50, 9])
ROOT = Path(__file__).parents[1]


@pytest.fixture
def daemon(tmp_path: Path) -> Iterator[RunningDaemon]:
    with running(tmp_path, capacity="1MiB") as daemon:
        yield daemon


@pytest.fixture
def url(daemon: RunningDaemon) -> str:
    return daemon.urls[0]


def at_rest(store: Store) -> bool:
    """Nobody waits, and nothing is kept for anybody."""
    return not store.index.stats().num_leases and not store.index._tree.wants and not store._handoffs._awaited


def waits(daemon: RunningDaemon) -> int:
    """How many blocks somebody waits for just now."""
    return daemon.do(lambda: len(daemon.service._waiting))


# -- a store ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("transport", [0, 1], ids=["memory", "tcp"])
def test_blocks_come_while_the_rest_is_computed(daemon: RunningDaemon, transport: int) -> None:
    with opened_store(daemon.urls[0]) as there, opened_store(daemon.urls[transport]) as here:
        waiting = here.await_prefix(TOKENS, deadline_s=LONG_S)
        for part in (1, 2):
            compute(there, TOKENS[: part * PIECE])
            until(lambda part=part: in_host(here, TOKENS) == part * BLOCKS // 3, "a part has come")  # type: ignore[misc]  # the default binds
            assert not waiting.done()
        compute(there, TOKENS)
        assert waiting.result(PATIENCE_S) == in_host(here, TOKENS) == BLOCKS
        assert here.metrics.blocks_prefetched.value("daemon") == BLOCKS
        until(lambda: at_rest(here), "nothing is kept")


def test_what_is_here_already_is_not_waited_for(url: str) -> None:
    with opened_store(url) as here:
        compute(here, TOKENS)
        assert here.await_prefix(TOKENS, deadline_s=LONG_S).result(PATIENCE_S) == BLOCKS
        assert here.await_prefix(TOKENS[: 4 * 3], deadline_s=LONG_S).result(PATIENCE_S) == 0, "not one whole block"


def test_what_begins_here_goes_on_there(url: str) -> None:
    with opened_store(url) as there, opened_store(url) as here:
        compute(here, TOKENS[:PIECE])
        assert here.flush(PATIENCE_S)
        waiting = here.await_prefix(TOKENS, deadline_s=LONG_S)
        compute(there, TOKENS)
        assert waiting.result(PATIENCE_S) == in_host(here, TOKENS) == BLOCKS
        assert here.metrics.blocks_prefetched.value() == BLOCKS - BLOCKS // 3


def test_at_the_deadline_it_is_what_has_come(url: str) -> None:
    with opened_store(url) as there, opened_store(url) as here:
        compute(there, TOKENS[:PIECE])
        assert there.flush(PATIENCE_S)
        assert here.await_prefix(TOKENS, deadline_s=1.0).result(PATIENCE_S) == BLOCKS // 3
        until(lambda: at_rest(here), "nothing is kept")


def test_without_a_daemon_nobody_is_waited_for() -> None:
    with opened_store(None) as here:
        assert here.await_prefix(TOKENS, deadline_s=LONG_S).result(0) == 0


def test_whoever_cancels_gets_nothing_more(daemon: RunningDaemon, url: str) -> None:
    with opened_store(url) as there, opened_store(url) as here:
        waiting = here.await_prefix(TOKENS, deadline_s=LONG_S)
        compute(there, TOKENS[:PIECE])
        until(lambda: in_host(here, TOKENS) == BLOCKS // 3, "a part has come")
        assert waiting.cancel() and waiting.cancelled()
        until(lambda: at_rest(here), "nothing is kept")
        until(lambda: not waits(daemon), "the last turn is over")
        compute(there, TOKENS)
        assert there.flush(PATIENCE_S) and here.flush(PATIENCE_S)
        assert here.metrics.blocks_prefetched.value() == BLOCKS // 3


def test_a_daemon_that_ends_is_not_waited_for(daemon: RunningDaemon, url: str) -> None:
    with opened_store(url) as there, opened_store(url) as here:
        waiting = here.await_prefix(TOKENS, deadline_s=LONG_S)
        compute(there, TOKENS[:PIECE])
        until(lambda: in_host(here, TOKENS) == BLOCKS // 3, "a part has come")
        daemon.stop()
        assert waiting.result(PATIENCE_S) == BLOCKS // 3
        until(lambda: at_rest(here), "nothing is kept")


def test_a_store_that_closes_lets_go_of_whoever_waits(url: str) -> None:
    with opened_store(url) as here:
        waiting = here.await_prefix(TOKENS, deadline_s=LONG_S)
    assert waiting.cancelled() and at_rest(here)


def test_more_prompts_than_threads_take_turns(url: str) -> None:
    prompts = [prompt(4, number=number) for number in range(3 * WAITERS)]
    with opened_store(url) as there, opened_store(url) as here:
        waiting = [here.await_prefix(tokens, deadline_s=LONG_S) for tokens in prompts]
        for tokens in reversed(prompts):  # the last first: those before it must not be in its way
            compute(there, tokens)
        assert [one.result(PATIENCE_S) for one in waiting] == [4] * len(prompts)


def test_what_has_no_room_is_left_to_the_load(url: str) -> None:
    with opened_store(url) as there, opened_store(url, host=40, ahead_share=0.25) as here:
        waiting = here.await_prefix(TOKENS, deadline_s=LONG_S)
        compute(there, TOKENS)
        assert waiting.result(PATIENCE_S) == 10


def test_a_block_that_is_lost_on_its_way_is_left_to_the_load(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def lose(*args: Any, **how: Any) -> int:
        return 0

    monkeypatch.setattr(ahead, "copy_up", lose)
    with opened_store(url) as there, opened_store(url) as here:
        waiting = here.await_prefix(TOKENS, deadline_s=LONG_S)
        compute(there, TOKENS)
        assert waiting.result(PATIENCE_S) == 0


# -- engines ----------------------------------------------------------------------------------------------------------


def test_each_chunk_of_a_prompt_is_there_once_it_is_computed(url: str) -> None:
    """Not with the end of the request, and not with so many blocks more."""
    with serving(url) as there:
        name = there.engine.add(LONG, GREEDY)
        (tier,) = [below.tier for below in there.store.below]
        assert isinstance(tier, DaemonTier)
        whole = len(LONG[:-1]) // LAYERED.block_tokens
        for done in range(CHUNK, len(LONG) + CHUNK, CHUNK):
            while there.engine.stats.tokens < min(done, len(LONG)):
                there.engine.step()
            assert there.store.flush(PATIENCE_S)
            with there.store.index.keep(there.store.root, int32(LONG[:-1])) as lease:
                keys = lease.keys(0, lease.num_blocks)
            assert tier.contains(keys).count(True) == min(whole, done // LAYERED.block_tokens)
        there.engine.abort(name)


def test_an_engine_runs_others_while_it_waits_and_then_computes_next_to_nothing(url: str) -> None:
    with serving(url) as there, serving(url) as here:
        waiting = here.engine.add(LONG, GREEDY, await_prefix_s=LONG_S)
        here.ask(OTHER)
        assert here.engine.has_work
        there.ask(LONG)
        assert here.finish({waiting: LONG})[waiting] == {"host": 72, "computed": 3}
        assert here.ask(LONG)["device"] >= 72


def test_a_prompt_that_nobody_computes_is_computed_here(url: str) -> None:
    with serving(url) as here:
        assert here.ask(LONG, await_prefix_s=0.1) == {"computed": len(LONG)}


def test_a_prompt_of_less_than_a_block_is_not_waited_for(url: str) -> None:
    with serving(url) as here:
        assert here.ask(SHORT[:4], await_prefix_s=LONG_S) == {"computed": 4}


def test_a_request_that_is_aborted_while_it_waits_leaves_nothing_behind(url: str) -> None:
    with serving(url) as here:
        here.engine.abort(here.engine.add(LONG, GREEDY, await_prefix_s=LONG_S))
        assert not here.engine.has_work
        until(lambda: at_rest(here.store), "nothing is kept")
        here.ask(LONG)


@pytest.mark.parametrize("groups", [1, 3])
def test_what_came_before_the_others_end_is_used_and_the_rest_computed(
    daemon: RunningDaemon, url: str, groups: int
) -> None:
    with serving(url) as there, serving(url, layer_groups=groups) as here:
        waiting = here.engine.add(LONG, GREEDY, await_prefix_s=LONG_S)
        there.engine.add(LONG, GREEDY)
        while there.engine.stats.tokens < 2 * CHUNK:
            there.engine.step()
        assert there.store.flush(PATIENCE_S)
        until(lambda: here.store.metrics.blocks_prefetched.value() == 8, "two chunks have come")
        daemon.stop()
        assert here.finish({waiting: LONG})[waiting] == {"host": 32, "computed": 43}


# -- processes --------------------------------------------------------------------------------------------------------


PREFILL = """
import sys
import tierkv
from tierkv.config import Config, DaemonConfig, DeviceConfig, EngineConfig, HostConfig
from tierkv.engine import SamplingParams

config = Config(
    device=DeviceConfig(kind="cpu", capacity="128MiB"),
    host=HostConfig(capacity="256MiB"),
    daemon=DaemonConfig(url=sys.argv[1]),
    engine=EngineConfig(dtype="float32", num_threads=1, max_batch_tokens=64),
)
with tierkv.open_engine("smollm2", config) as (engine, store):
    engine.add(sys.argv[2], SamplingParams(max_tokens=1))
    print("ready", flush=True)
    for _ in sys.stdin:
        before = engine.stats.tokens
        while engine.stats.tokens == before:
            engine.step()
        store.flush()
        print("done" if not engine.has_work else "more", flush=True)
"""
TEXT = "The keeper of the light writes down each ship that passes, the wind, and the hour. " * 24


@contextmanager
def prefilling(url: str) -> "Iterator[subprocess.Popen[str]]":
    """An engine in a process of its own that computes a chunk for each line it gets."""
    child = subprocess.Popen(
        [sys.executable, "-c", PREFILL, url, TEXT], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    try:
        assert child.stdout and child.stdout.readline() == "ready\n"
        yield child
    finally:
        child.kill()
        child.communicate()


def step(child: "subprocess.Popen[str]") -> bool:
    """Let it compute a chunk; whether there is more."""
    assert child.stdin and child.stdout
    child.stdin.write("go\n")
    child.stdin.flush()
    return child.stdout.readline() == "more\n"


@pytest.mark.model
@pytest.mark.parametrize("fault", ["none", "prefill killed", "daemon killed"])
def test_tokens_of_a_real_model_are_those_of_one_process(tmp_path: Path, fault: str) -> None:
    import tierkv
    from tierkv.config import Config, DaemonConfig, DeviceConfig, EngineConfig, HostConfig, TransferConfig
    from tierkv.engine import SamplingParams

    params = SamplingParams(max_tokens=8, ignore_eos=True)
    options = {
        "device": DeviceConfig(kind="cpu", capacity="128MiB"),
        "host": HostConfig(capacity="512MiB"),
        "engine": EngineConfig(dtype="float32", num_threads=1, max_batch_tokens=64),
    }
    with tierkv.open_engine("smollm2", Config(**options)) as (engine, _):
        (alone,) = engine.generate(TEXT, params)
    with process(tmp_path, host__capacity="512MiB") as daemon, prefilling(daemon.urls[0]) as there:
        config = Config(daemon=DaemonConfig(url=daemon.urls[0]), transfer=TransferConfig(layer_groups=6), **options)
        with tierkv.open_engine("smollm2", config) as (engine, store):
            engine.add(TEXT, params, await_prefix_s=LONG_S if fault != "prefill killed" else 10.0)
            prefetched, chunks = store.metrics.blocks_prefetched, 0
            while step(there):
                chunks += 1
                until(lambda n=4 * chunks: engine.step() == [] and prefetched.value() == n, "a chunk has come")  # type: ignore[misc]
                if chunks == 3 and fault == "prefill killed":
                    there.kill()
                    break
                if chunks == 3 and fault == "daemon killed":
                    daemon.kill()
                    break
            tokens: list[int] = []
            sources: dict[str, int] = {}
            while engine.has_work:
                for output in engine.step():
                    tokens += output.token_ids
                    sources = dict(output.stats.sources) if output.stats else sources
    assert tokens == list(alone.token_ids)
    if fault == "none":
        assert sources["host"] == (alone.stats.prompt_tokens - 1) // 16 * 16
    else:
        assert sources["host"] == 3 * 64
