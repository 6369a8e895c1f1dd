"""The engine on a GPU: the tokens of the CPU, whatever is replayed, reused or moved to the host and back."""

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import torch

from tests.engine_models import random_prompts, reference, tiny_model
from tierkv.engine import Engine, EngineConfig, SamplingParams
from tierkv.engine.memory import pool_bytes
from tierkv.errors import ConfigError

pytestmark = pytest.mark.gpu

CONFIG = EngineConfig(device="cuda", num_pages=200, max_batch_tokens=24, max_sequences=5)
GREEDY = SamplingParams(max_tokens=12, ignore_eos=True)
PROMPTS = random_prompts([3, 60, 9, 17, 5, 42, 8, 130])


@pytest.fixture(autouse=True)
def exact() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


def model_there() -> Any:
    return tiny_model().to("cuda")


def tokens_of(engine: Engine, prompts: list[list[int]]) -> list[list[int]]:
    return [list(output.token_ids) for output in engine.generate(prompts, GREEDY)]


@pytest.mark.parametrize("graphs", ["auto", "off"])
def test_tokens_are_those_of_the_cpu(graphs: str, caplog: pytest.LogCaptureFixture) -> None:
    with Engine(model_there(), None, replace(CONFIG, cuda_graphs=graphs)) as engine:
        assert tokens_of(engine, PROMPTS) == reference(tiny_model(), PROMPTS, num_tokens=12)
        assert not caplog.records
        assert (engine.stats.graph_steps > 10) == (graphs == "auto")
        assert engine.stats.model_s > 0


def test_samples_do_not_depend_on_graphs() -> None:
    params = SamplingParams(max_tokens=12, ignore_eos=True, temperature=1.0, top_p=0.9, n=3, seed=5, logprobs=2)
    got = []
    for graphs in ("auto", "off"):
        with Engine(model_there(), None, replace(CONFIG, cuda_graphs=graphs)) as engine:
            got.append([sample.token_ids for sample in engine.generate(PROMPTS[:3], params)[1].samples])
    assert got[0] == got[1]


def test_a_step_waits_for_the_device_only_to_read_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(model_there(), None, CONFIG) as engine:
        runner: Any = engine._core._runner
        run, modes = runner.run, []

        def strict(work: Any) -> Any:
            torch.cuda.set_sync_debug_mode("error")
            try:
                modes.append(len(work))
                return run(work)
            finally:
                torch.cuda.set_sync_debug_mode("default")

        tokens_of(engine, PROMPTS)  # what is compiled and measured once may wait
        monkeypatch.setattr(runner, "run", strict)
        assert tokens_of(engine, PROMPTS) == reference(tiny_model(), PROMPTS, num_tokens=12)
        assert modes


def test_preempted_and_forked_sequences_keep_their_tokens() -> None:
    prompts = random_prompts([20, 22, 24, 26], seed=3)
    params = replace(GREEDY, max_tokens=40)
    with Engine(model_there(), None, replace(CONFIG, num_pages=13, block_tokens=4, max_sequences=4)) as engine:
        got = [list(output.token_ids) for output in engine.generate(prompts[:2], params)]
        assert engine.stats.preemptions > 0
    expected = reference(tiny_model(), prompts[:2], num_tokens=40)
    limit = 13 * 4
    assert got == [tokens[: limit - len(prompt)] for tokens, prompt in zip(expected, prompts, strict=False)]


@pytest.mark.parametrize("groups", [1, 3])
def test_kv_comes_back_from_the_host_bit_for_bit(groups: int) -> None:
    pytest.importorskip("cupy", reason="the device tier moves pages with CuPy")
    from tierkv.assembly import open_store
    from tierkv.config import Config, DeviceConfig, HostConfig, TransferConfig
    from tierkv.connectors.engine import EngineConnector

    stores: list[Any] = []
    (prompt,) = random_prompts([200])
    others = random_prompts([190, 195], seed=9)

    def connect(layout: Any, device: torch.device, identity: str) -> EngineConnector:
        config = Config(
            device=DeviceConfig(capacity=16 * layout.block_bytes),
            host=HostConfig(capacity=64 * layout.block_bytes),
            transfer=TransferConfig(layer_groups=groups),
        )
        stores.append(open_store(config, layout=layout, model=identity, device=device))
        return EngineConnector(stores[0])

    expected = reference(tiny_model(), [prompt], num_tokens=12)
    with Engine(model_there(), None, replace(CONFIG, max_batch_tokens=64), connector=connect) as engine:
        (store,) = stores
        assert tokens_of(engine, [prompt]) == expected
        store.mover.drain(10.0)
        for other in others:  # the device holds one prompt
            tokens_of(engine, [other])
            store.mover.drain(10.0)
        (again,) = engine.generate([prompt], GREEDY)
        assert [list(again.token_ids)] == expected
        assert again.stats.sources.get("host", 0) >= 100
    store.close()


def test_pages_take_what_the_card_has_left() -> None:
    with Engine(model_there(), None, replace(CONFIG, num_pages=None, gpu_memory_utilization=0.5)) as engine:
        free, total = torch.cuda.mem_get_info()
        assert engine.connector.pool.nbytes < 0.5 * total
        assert total - free < 0.5 * total + (1 << 30)
        assert total - free > 0.4 * total
        layout = engine.layout
        model = engine._core._runner._model
        with pytest.raises(ConfigError, match=r"leaves -.* raise gpu_memory_utilization"):
            pool_bytes(model, layout, engine.device, replace(CONFIG, num_pages=None, gpu_memory_utilization=0.3))
