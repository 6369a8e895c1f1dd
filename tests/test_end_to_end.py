"""Prompts through the bundled engine over a real store: the same tokens and the same KV from every tier, whatever breaks."""

import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import redis
import torch

from tests.engine_models import FAMILIES, make_model, random_prompts, reference
from tierkv.assembly import open_store
from tierkv.config import Config, DeviceConfig, DiskConfig, HostConfig, RedisConfig, TransferConfig
from tierkv.connectors.engine import EngineConnector
from tierkv.engine import Engine, EngineConfig, SamplingParams, loading
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.store import Store
from tierkv.valkey import EmbeddedValkey

NUM_TOKENS = 8
GREEDY = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
TIERS = ("device", "host", "disk", "redis")
LENGTHS = (5, 16, 17, 60, 128)


@dataclass
class Setup:
    """An engine over a store."""

    engine: Engine
    store: Store

    def run(self, prompts: Sequence[Sequence[int]], params: SamplingParams = GREEDY) -> list[list[int]]:
        return [list(output.token_ids) for output in self.engine.generate([list(p) for p in prompts], params)]

    def reused(self, source: str) -> int:
        return self.engine.stats.sources.get(source, 0)

    def came_from(self, tier: str) -> int:
        """As `reused`, with what came from the tier to the host while its request waited."""
        ahead = int(self.store.metrics.blocks_prefetched.value(tier)) * self.store.layout.block_tokens
        return self.reused(tier) + min(ahead, self.reused("host"))

    def kv(self, prompt: Sequence[int]) -> list[bytes]:
        """The bytes of the prompt's whole blocks, as attention would read them."""
        store = self.store
        with store.index.acquire(store.root, torch.tensor(prompt, dtype=torch.int32).numpy().tobytes()) as lease:
            assert lease.num_blocks == len(prompt) // store.layout.block_tokens
            pages = lease.places(0, 0, lease.num_blocks)
            return [bytes(store.places.device.view(page)) for page in pages]


@contextmanager
def opened(
    model: Any,
    *,
    disk: Path | None = None,
    url: str | None = None,
    chunk: int = 512,
    pages: int = 200,
    host: int = 200,
    disk_bytes: int = 16 << 20,
    transfer: TransferConfig | None = None,
    codec: str = "raw",
) -> Iterator[Setup]:
    stores: list[Store] = []
    metrics = Metrics()

    def connect(layout: Layout, device: torch.device, identity: str) -> EngineConnector:
        config = Config(
            device=DeviceConfig(capacity=pages * layout.block_bytes),
            host=HostConfig(capacity=host * layout.block_bytes),
            disk=DiskConfig(path=disk, capacity=disk_bytes),
            redis=RedisConfig(url=url, deadline_s=1.0, codec=codec),
            transfer=transfer or TransferConfig(),
        )
        stores.append(open_store(config, layout=layout, model=identity, device=device, metrics=metrics))
        return EngineConnector(stores[0])

    options = EngineConfig(dtype="float32", max_batch_tokens=chunk, max_sequences=8)
    with Engine(model, None, options, connector=connect, metrics=metrics) as engine:
        try:
            yield Setup(engine, stores[0])
            stores[0].flush()
            stores[0].index.check()
        finally:
            stores[0].close()


@pytest.fixture(scope="module")
def model() -> Any:
    torch.set_num_threads(1)
    return make_model(*FAMILIES["llama, GQA, tied"])


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    return random_prompts(LENGTHS)


@pytest.fixture(scope="module")
def expected(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    return reference(model, prompts, num_tokens=NUM_TOKENS)


@contextmanager
def warm(
    tier: str, model: Any, prompts: Any, folder: Path, server: EmbeddedValkey, **options: Any
) -> Iterator[tuple[Setup, list[list[bytes]]]]:
    """An engine that finds the prompts in `tier` and nowhere faster; and the KV of those prompts when it was computed."""
    disk = folder / "disk" if tier == "disk" else None
    url = server.url if tier == "redis" else None
    if tier == "redis":
        with redis.Redis.from_url(server.url) as client:
            client.flushall()
    with opened(model, disk=disk, url=url, **options) as setup:
        setup.run(prompts)
        setup.store.flush()
        kv = [setup.kv(prompt) for prompt in prompts]
        if tier in ("device", "host"):
            if tier == "host":
                setup.store.evict_device()
            yield setup, kv
            return
    with opened(model, disk=disk, url=url, **options) as setup:
        yield setup, kv


@pytest.mark.redis
@pytest.mark.parametrize("chunk", [16, 512])
@pytest.mark.parametrize("tier", TIERS)
def test_tokens_and_kv_are_those_of_a_cold_run(
    tier: str, chunk: int, model: Any, prompts: Any, expected: Any, tmp_path: Path, valkey: EmbeddedValkey
) -> None:
    with opened(model, chunk=chunk) as cold:
        assert cold.run(prompts) == expected
    with warm(tier, model, prompts, tmp_path, valkey, chunk=chunk) as (setup, kv):
        before = setup.came_from(tier)
        assert setup.run(prompts) == expected
        assert setup.came_from(tier) - before >= sum(map(_found, prompts))
        for prompt, first in zip(prompts, kv, strict=True):
            found = _found(prompt) // 16  # the block of a last token is computed again, in another batch
            assert setup.kv(prompt)[:found] == first[:found]


def _found(prompt: Sequence[int]) -> int:
    """Tokens in whole blocks that need not be computed to go on from the prompt."""
    return (len(prompt) - 1) // 16 * 16


@pytest.mark.redis
def test_lz4_in_redis_gives_the_same_kv(
    model: Any, prompts: Any, expected: Any, tmp_path: Path, valkey: EmbeddedValkey
) -> None:
    with warm("redis", model, prompts, tmp_path, valkey, codec="lz4") as (setup, _):
        assert setup.run(prompts) == expected
        assert setup.came_from("redis") > 0


def test_part_of_a_block_is_reused(model: Any, prompts: Any) -> None:
    base = prompts[-1]
    fork = [*base[:55], *[3] * 30]
    with opened(model) as setup:
        setup.run([base])
        assert setup.run([fork]) == reference(model, [fork], num_tokens=NUM_TOKENS)
        assert setup.reused("device") == 55


def test_the_last_token_of_a_known_prompt_is_the_only_one_computed(model: Any, prompts: Any) -> None:
    with opened(model) as setup:
        setup.run([prompts[-1]])
        setup.engine.stats.sources.clear()
        setup.run([prompts[-1]])
        assert setup.engine.stats.sources == {"device": len(prompts[-1]) - 1, "computed": 1}


def test_what_was_generated_is_reused_by_the_next_turn(model: Any, prompts: Any) -> None:
    with opened(model) as setup:
        answer = setup.run([prompts[-1]], SamplingParams(max_tokens=40, ignore_eos=True))[0]
        turn = [*prompts[-1], *answer, 7, 8, 9]
        setup.engine.stats.sources.clear()
        assert setup.run([turn]) == reference(model, [turn], num_tokens=NUM_TOKENS)
        assert setup.reused("device") >= (len(turn) - 4) // 16 * 16


def test_a_pool_too_small_for_all_preempts_and_still_answers(model: Any) -> None:
    prompts = random_prompts([40] * 6, seed=5)
    params = SamplingParams(max_tokens=60, ignore_eos=True)
    with opened(model, pages=16) as setup:
        outputs = setup.engine.generate(prompts, params)
        assert [list(output.token_ids) for output in outputs] == reference(model, prompts, num_tokens=60)
        assert sum(output.stats.preemptions for output in outputs) > 0
        assert setup.engine.stats.tokens < sum(len(prompt) for prompt in prompts) + 60 * len(prompts), "nothing twice"


def test_samples_of_one_prompt_share_its_pages(model: Any, prompts: Any) -> None:
    params = SamplingParams(max_tokens=20, n=4, temperature=1.0, seed=1, ignore_eos=True)
    with opened(model, pages=30) as setup:
        outputs = setup.engine.generate([prompts[-1]], params)
        alone = [list(sample.token_ids) for sample in outputs[0].samples]
    with opened(model, pages=200) as setup:
        setup.run(prompts)
        outputs = setup.engine.generate([prompts[-1]], params)
        assert [list(sample.token_ids) for sample in outputs[0].samples] == alone


@pytest.mark.model
@pytest.mark.redis
@pytest.mark.parametrize("chunk", [192, 4096])
def test_smollm2_says_the_same_from_every_tier(chunk: int, tmp_path: Path, valkey: EmbeddedValkey) -> None:
    """Cold tokens are transformers' own: tests/test_engine_model.py. Here: eight at a time, cold and from each tier."""
    model, tokenizer = loading.load("smollm2", EngineConfig(dtype="float32"))
    text = tokenizer((Path(__file__).parents[1] / "LICENSE").read_text()).input_ids
    lengths = [5, 9, 16, 17, 33, 64, 100, 257, 700, 1500]
    prompts = [text[31 * number : 31 * number + length] for number, length in enumerate(lengths)]
    with redis.Redis.from_url(valkey.url) as client:
        client.flushall()
    room: dict[str, Any] = {"chunk": chunk, "pages": 300, "host": 300, "disk_bytes": 512 << 20}
    with opened(model, disk=tmp_path / "disk", url=valkey.url, **room) as setup:
        cold = setup.run(prompts)
        setup.store.flush()
        assert setup.run(prompts) == cold
        setup.store.flush()
        setup.store.evict_device()
        assert setup.run(prompts) == cold
        assert setup.reused("device") > 2000 and setup.reused("host") > 2000
    with opened(model, disk=tmp_path / "disk", **room) as setup:
        assert setup.run(prompts) == cold
        assert setup.came_from("disk") > 2000
    with opened(model, url=valkey.url, **room) as setup:
        assert setup.run(prompts) == cold
        assert setup.came_from("redis") > 2000


# -- when things break ------------------------------------------------------------------------------------------------


def _shards(folder: Path) -> list[Path]:
    return sorted((folder / "disk" / "blocks").glob("c.*"))


def _flip(folder: Path) -> None:
    for path in _shards(folder):
        with path.open("r+b") as file:
            for at in range(100, 40 * 8192, 3000):
                file.seek(at)
                byte = file.read(1)
                file.seek(at)
                file.write(bytes([byte[0] ^ 255]))


def _truncate(folder: Path) -> None:
    for path in _shards(folder):
        os.truncate(path, 5000)


def _delete(folder: Path) -> None:
    for path in _shards(folder):
        path.unlink()


@pytest.mark.parametrize("harm", [_flip, _truncate, _delete])
@pytest.mark.parametrize("running", [False, True])
def test_a_damaged_disk_gives_cold_tokens_and_a_counted_reason(
    harm: Callable[[Path], None], running: bool, model: Any, prompts: Any, expected: Any, tmp_path: Path
) -> None:
    disk = tmp_path / "disk"
    with opened(model, disk=disk) as setup:
        setup.run(prompts)
    assert _shards(tmp_path), "the damage must hit something"
    if not running:
        harm(tmp_path)
    with opened(model, disk=disk) as setup:
        if running:
            harm(tmp_path)
        assert setup.run(prompts) == expected
        assert setup.store.metrics.misses.value("disk") > 0
        setup.store.flush()
        setup.store.evict_device()
        assert setup.run(prompts) == expected


@pytest.mark.redis
@pytest.mark.parametrize("harm", ["garbage", "killed", "stopped", "killed while loading"])
def test_a_broken_redis_gives_cold_tokens_and_no_hang(
    harm: str, model: Any, prompts: Any, expected: Any, tmp_path: Path
) -> None:
    transfer = TransferConfig(load_deadline_s=3.0)
    with EmbeddedValkey(capacity_bytes=64 << 20) as server:
        with opened(model, url=server.url) as setup:
            setup.run(prompts)
        with opened(model, url=server.url, transfer=transfer) as setup:
            if harm == "garbage":
                with redis.Redis.from_url(server.url) as client:
                    for key in client.scan_iter(count=1000):
                        client.set(key, b"x" * 1000)
            elif harm == "killed":
                os.kill(server.pid, signal.SIGKILL)
            elif harm == "stopped":
                os.kill(server.pid, signal.SIGSTOP)
            else:
                for prompt in prompts:
                    setup.engine.add(prompt, GREEDY)
                setup.engine.step()  # the probes are on their way
                os.kill(server.pid, signal.SIGKILL)
                while setup.engine.has_work:
                    setup.engine.step()
            assert setup.run(prompts) == expected
            assert setup.store.metrics.misses.value("redis") > 0
        if harm == "stopped":
            os.kill(server.pid, signal.SIGCONT)
