"""What a store notes of requests that do not simply come, load and end: each is one line of the log, whatever becomes of it."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.store_parts import TINY, Parts, at_rest, prompt
from tests.test_ahead import taken
from tierkv import open_store
from tierkv.config import Config, DeviceConfig, HostConfig, RecordConfig, StoreConfig
from tierkv.connectors.engine import EngineConnector
from tierkv.hints import Ending, Hints
from tierkv.transfers import HOST

LOG = "log.jsonl"


@pytest.fixture
def connector(tmp_path: Path) -> Iterator[EngineConnector]:
    config = Config(
        store=StoreConfig(block_tokens=TINY.block_tokens),
        device=DeviceConfig(capacity=16 * TINY.block_bytes),
        host=HostConfig(capacity=16 * TINY.block_bytes),
        record=RecordConfig(path=tmp_path / LOG),
    )
    store = open_store(config, layout=TINY, model="m")
    yield EngineConnector(store)
    store.close()


def computed(connector: EngineConnector, request: str) -> None:
    assert connector.match(request, prompt(1), hints=Hints("s")) is not None
    connector.save(request, prompt(1), connector.allocate(4) or [])


def lines(connector: EngineConnector, folder: Path) -> list[int | None]:
    """Output tokens of what the log has, without its header."""
    assert connector.store.flush(10)
    return [json.loads(line).get("out") for line in (folder / LOG).read_text().splitlines()[1:]]


def suspended(connector: EngineConnector) -> None:
    connector.suspend("r", tail=None, num_tokens=8).result(10)


def again(connector: EngineConnector) -> None:
    suspended(connector)
    connector.expect("r", prompt(1))
    assert connector.match("r", prompt(1), hints=Hints("s")) is not None


def forked(connector: EngineConnector) -> None:
    connector.fork("r", "child")
    connector.release("child", ending=Ending(output_tokens=9))


@pytest.mark.parametrize(("happens", "told"), [(suspended, None), (again, 5), (forked, 5)])
def test_a_request_is_one_line_of_the_log(
    connector: EngineConnector, happens: Callable[[EngineConnector], None], told: int | None, tmp_path: Path
) -> None:
    computed(connector, "r")
    happens(connector)
    connector.release("r", ending=Ending(output_tokens=5))
    connector.release("r")
    assert lines(connector, tmp_path) == [told]


def test_a_request_that_was_never_matched_is_none(connector: EngineConnector, tmp_path: Path) -> None:
    connector.expect("r", prompt(1))
    connector.release("r")
    assert lines(connector, tmp_path) == []


def fates(parts: Parts, tokens: bytes, tier: int) -> set[str]:
    """Why blocks of the prompt left a tier."""
    known = parts.store.index.explain(parts.store.root, tokens)
    return {fate.why for one in known for fate in one.fates if fate.tier == tier}


@pytest.mark.parametrize("ahead", [False, True])
def test_the_index_remembers_why_a_tier_has_a_block_no_more(ahead: bool) -> None:
    tokens = prompt(1)
    parts = at_rest(tokens, history=20)
    for key in list(parts.own.stored)[2:]:
        parts.own.stored[key] = bytes([parts.own.stored[key][0] ^ 1]) + parts.own.stored[key][1:]
    parts.shared.delete(list(parts.shared.stored))
    connector = EngineConnector(parts.store)
    if ahead:
        connector.expect("r", tokens)
    else:
        hit = taken(parts, connector, "r", tokens)
        connector.load("r", connector.allocate(len(hit.pages)) or [])
    parts.steps.run_all()
    connector.release("r")
    assert fates(parts, tokens, 2) == {"corrupt"}
    assert "corrupt" in fates(parts, tokens, HOST), "a copy that did not come"
