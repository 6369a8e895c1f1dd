"""What an engine tells of its requests, on its way to the observer of the index."""

from collections.abc import Sequence
from typing import Any

import pytest

from tests.engine_models import random_prompts, tiny_model
from tests.engine_store import MemoryConnector, connect
from tests.store_parts import STEP, Parts, prompt
from tests.test_ahead import taken
from tierkv.connectors.engine import EngineConnector
from tierkv.engine import Engine, EngineConfig, SamplingParams
from tierkv.errors import RequestError
from tierkv.hints import NO_ENDING, NO_HINTS, Ending, Hints, Next
from tierkv.keys import token_bytes
from tierkv.policies.base import Leaf, Observer, Use
from tierkv.sessions import Sessions
from tierkv.transfers import HOST

Path = Sequence[tuple[Leaf, int]]
HINTS = Hints(session="s", priority=2)


class Recorder(Observer):
    """What an observer was told, as blocks of paths."""

    def __init__(self) -> None:
        self.arrived: list[tuple[int, Use]] = []
        self.ended: list[tuple[int, Hints, Ending, float]] = []

    def arrive(self, path: Path, use: Use) -> None:
        self.arrived.append((depth(path), use))

    def extend(self, strand: Leaf, lo: int, hi: int, use: Use) -> None:
        assert use is self.arrived[-1][1]

    def end(self, path: Path, use: Use, ending: Ending, now_s: float) -> None:
        self.ended.append((depth(path), use.hints, ending, now_s))

    def gone(self, strand: Leaf, size: int) -> None:
        pass


def depth(path: Path) -> int:
    return path[-1][0].depth + path[-1][1] if path else 0


@pytest.fixture
def told() -> Recorder:
    return Recorder()


@pytest.fixture
def parts(told: Recorder) -> Parts:
    return Parts(observer=told)


def computed(parts: Parts, connector: EngineConnector, request: str, tokens: bytes, hints: Hints = NO_HINTS) -> None:
    """Match a prompt of which nothing is known, and save all of it."""
    assert connector.match(request, tokens, hints=hints) is None
    parts.steps.run_all()
    assert connector.match(request, tokens, hints=hints) is not None
    pages = connector.allocate(len(tokens) // STEP) or []
    connector.save(request, tokens, pages)


def test_a_request_arrives_once_however_often_it_is_matched(parts: Parts, told: Recorder) -> None:
    connector = EngineConnector(parts.store)
    parts.clock.advance(3.0)
    connector.expect("r", prompt(1))
    computed(parts, connector, "r", prompt(1), HINTS)
    connector.suspend("r", tail=None, num_tokens=8)
    parts.steps.run_all()
    connector.expect("r", prompt(1))
    taken(parts, connector, "r", prompt(1))
    connector.expect("r", prompt(1))
    taken(parts, connector, "r", prompt(1))
    connector.save("r", prompt(1, num_blocks=5), [0, 0, 0, 0, *(connector.allocate(1) or [])])
    ((known, use),) = told.arrived
    assert (known, use.num_blocks, use.num_held, use.hints, use.now_s) == (0, 4, 0, HINTS, 3.0)
    parts.clock.advance(2.0)
    connector.release("r", ending=Ending(Next.TOOL, within_s=1.5, output_tokens=2))
    assert told.ended == [(5, HINTS, Ending(Next.TOOL, 1.5, 2), 5.0)]


def test_looking_copying_and_keeping_are_no_arrivals(parts: Parts, told: Recorder) -> None:
    parts.serve(prompt(1))
    parts.steps.run_all()
    parts.store.evict_device()
    parts.store.index.evict(HOST)
    told.arrived.clear()
    connector = EngineConnector(parts.store)
    connector.expect("r", prompt(1, num_blocks=6))
    parts.store.pin(prompt(1), ttl_s=5.0)
    parts.store.search(prompt(1, num_blocks=6))
    parts.steps.run_all()
    connector.release("r")
    assert told.arrived == told.ended == []


def test_what_follows_a_session_is_told_of_the_path_of_its_last_request(parts: Parts, told: Recorder) -> None:
    connector = EngineConnector(parts.store)
    for request, tokens in (("a", prompt(1)), ("b", prompt(1, num_blocks=6))):
        connector.match(request, tokens, hints=HINTS)
        parts.steps.run_all()
        hit = connector.match(request, tokens, hints=HINTS)
        assert hit is not None
        pages = connector.allocate(len(tokens) // STEP - hit.num_tokens // 2) or []
        connector.save(request, tokens, [*(page for page in hit.pages if page is not None), *pages])
        connector.release(request)
    told.ended.clear()
    parts.clock.advance(7.0)
    connector.follow("s", Ending(Next.TURN))
    connector.follow("nobody", Ending(Next.TURN))
    connector.follow("s", Ending(Next.ENDED))
    connector.follow("s", Ending(Next.TURN))
    assert [(blocks, ending.next, now_s) for blocks, _, ending, now_s in told.ended] == [
        (6, Next.TURN, 7.0),
        (6, Next.ENDED, 7.0),
    ]
    assert parts.store.index.stats().num_leases == len(parts.steps.queue)


def test_a_request_that_ends_its_session_is_the_last_of_it(parts: Parts, told: Recorder) -> None:
    connector = EngineConnector(parts.store)
    computed(parts, connector, "r", prompt(1), HINTS)
    connector.release("r", ending=Ending(Next.ENDED))
    connector.follow("s", Ending(Next.TURN))
    assert [ending.next for _, _, ending, _ in told.ended] == [Next.ENDED]


def test_the_sessions_used_last_are_remembered_as_far_as_there_is_room() -> None:
    sessions, use = Sessions(max_bytes=10), Use(0.0, 1, 0, 0)
    sessions.remember("a", b"1234", use)
    sessions.remember("b", b"1234", use)
    sessions.remember("a", b"12345", use)
    sessions.remember("c", b"1234", use)
    assert sessions.last("b") is None and len(sessions) == 2
    assert sessions.last("a") == (b"12345", use)
    sessions.remember("huge", b"1" * 11, use)
    assert len(sessions) == 0
    sessions.remember("a", b"1234567890", use)
    assert len(sessions) == 1
    sessions.forget("a")
    sessions.forget("a")
    sessions.remember("b", b"1234567890", use)
    assert len(sessions) == 1


# -- from the engine --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


PARAMS = SamplingParams(max_tokens=3, ignore_eos=True)


@pytest.fixture
def opened(model: Any) -> Any:
    made: list[MemoryConnector] = []
    config = EngineConfig(block_tokens=4, num_pages=40, max_batch_tokens=16, max_sequences=2)
    with Engine(model, None, config, connector=connect(made, num_pages=40)) as engine:
        yield engine, made[0]


def test_hints_and_endings_reach_the_connector(opened: tuple[Engine, MemoryConnector]) -> None:
    engine, connector = opened
    prompts = random_prompts((9, 10, 11, 12))
    engine.generate(prompts[0], PARAMS, hints=HINTS)
    engine.generate([prompts[1], prompts[2]], PARAMS, hints=[Hints(priority=1), Hints(priority=-1)])
    list(engine.stream(prompts[3], PARAMS, hints=Hints("t")))
    assert list(connector.hints.values()) == [HINTS, Hints(priority=1), Hints(priority=-1), Hints("t")]
    assert list(connector.endings.values()) == [Ending(output_tokens=3)] * 4
    request = engine.add(prompts[0], PARAMS)
    engine.step()
    engine.abort(request)
    assert connector.hints[f"{request}/4"] == NO_HINTS and connector.endings[f"{request}/4"] == NO_ENDING
    engine.follow("t", Ending(Next.TOOL, within_s=2.0))
    engine.end_session("t")
    assert connector.followed == [("t", Ending(Next.TOOL, 2.0)), ("t", Ending(Next.ENDED))]


def test_a_fork_has_the_hints_of_its_parent(opened: tuple[Engine, MemoryConnector]) -> None:
    engine, connector = opened
    parent = engine.add(random_prompts((9,))[0], PARAMS, hints=HINTS)
    first, second = engine.fork(parent), engine.fork(parent)
    while engine.has_work:
        engine.step()
    assert {name.split("/")[0]: hints for name, hints in connector.hints.items()} == dict.fromkeys(
        (parent, first, second), HINTS
    )


def test_hints_that_are_not_one_for_each_prompt_are_refused(opened: tuple[Engine, MemoryConnector]) -> None:
    with pytest.raises(RequestError, match=r"1 hints for 2 prompts: give one for all, or one for each"):
        opened[0].generate(random_prompts((5, 6)), PARAMS, hints=[HINTS])


def test_requests_that_do_not_run_at_once_are_expected_until_they_are_matched(
    opened: tuple[Engine, MemoryConnector],
) -> None:
    engine, connector = opened
    prompts = random_prompts((9, 10, 11))
    _, second, third = (engine.add(prompt, PARAMS) for prompt in prompts)
    assert [name.split("/")[0] for name in connector.expected] == [second, third]
    assert list(connector.expected.values())[1] == token_bytes(prompts[2][:-1])
    engine.step()
    engine.step()
    assert [name.split("/")[0] for name in connector.expected] == [third]
    engine.abort(third)
    assert connector.expected == {}
    while engine.has_work:
        engine.step()


def test_a_request_that_is_pre_empted_is_expected_again(model: Any) -> None:
    made: list[MemoryConnector] = []
    config = EngineConfig(block_tokens=4, num_pages=9, max_batch_tokens=16, max_sequences=2)
    seen: set[str] = set()
    with Engine(model, None, config, connector=connect(made, num_pages=9)) as engine:
        requests = [
            engine.add(prompt, SamplingParams(max_tokens=12, ignore_eos=True)) for prompt in random_prompts((10, 9))
        ]
        while engine.has_work:
            before = set(made[0].expected)
            outputs = engine.step()
            seen |= {name for name in set(made[0].expected) - before if "suspend" in made[0].log}
            assert all(output.finish_reason != "abort" for output in outputs)
    assert {name.split("/")[0] for name in seen} == {requests[1]}


def test_pages_that_a_waiting_request_has_pinned_go_to_one_that_runs(model: Any) -> None:
    made: list[MemoryConnector] = []
    config = EngineConfig(block_tokens=4, num_pages=9, max_batch_tokens=32, max_sequences=3)
    known, first, more = random_prompts((13, 8, 16))
    with Engine(model, None, config, connector=connect(made, num_pages=9)) as engine:
        engine.generate(known, SamplingParams(max_tokens=1, ignore_eos=True))
        runs = engine.add(first, SamplingParams(max_tokens=20, ignore_eos=True))
        engine.step()
        engine.add([*known[:12], *more], SamplingParams(max_tokens=4, ignore_eos=True))
        waited, ended = 0, []
        for _ in range(100):  # without an end of its own it would not fail, but hang
            outputs = engine.step()
            waited += made[0].num_pinned > 5
            ended += [output for output in outputs if output.stats is not None]
        assert [(output.request == runs, output.stats and output.stats.preemptions) for output in ended] == [
            (True, 0),
            (False, 0),
        ]
    assert waited, "the second request never had pages pinned while it waited"
