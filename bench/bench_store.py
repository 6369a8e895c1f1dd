"""Through the whole store, device to host and back, against a memcpy of the same bytes between the same memory."""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch

from tierkv.assembly import open_store
from tierkv.config import Config, DeviceConfig, HostConfig
from tierkv.keys import token_bytes
from tierkv.layout import Layout
from tierkv.store import Store
from tierkv.transfers import DEVICE, HOST

LAYOUTS = {
    "360 KiB": Layout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16"),
    "2 MiB": Layout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16"),
}
PROMPT_BYTES = 192 << 20


class Prompt:
    """A store with room for one prompt on the device and on the host, and the prompt."""

    def __init__(self, layout: Layout) -> None:
        self.num_blocks = PROMPT_BYTES // layout.block_bytes
        capacity = self.num_blocks * layout.block_bytes
        config = Config(device=DeviceConfig(capacity=capacity), host=HostConfig(capacity=capacity))
        self.store: Store = open_store(config, layout=layout, model="bench")
        self.tokens = token_bytes(np.arange(self.num_blocks * layout.block_tokens, dtype=np.int32))
        self.gigabytes = capacity / 1e9
        self.block_bytes = layout.block_bytes
        self.rows = self.store.places.host.rows
        self.pool = self.store.places.device.pool.view(torch.uint8).view(self.num_blocks, -1).numpy()
        self.pages: list[int] = []

    def allocate(self) -> None:
        """Have the device forget the prompt and take all its pages again."""
        self.store.evict_device()
        self.pages = self.store.allocate(self.num_blocks) or self.pages

    def put(self) -> None:
        """Seal the prompt and wait until the host has all of it."""
        match = self.store.take(self.store.search(self.tokens))
        assert all(self.store.save(match, self.tokens, self.pages))
        self.store.release(match)
        assert self.store.flush(60)

    def get(self) -> None:
        """Find the prompt and load all of it into device pages."""
        match = self.store.take(self.store.search(self.tokens))
        assert match.num_blocks == self.num_blocks and match.shared == 0
        assert self.store.load(match, self.pages).result(60) == (self.num_blocks, 0)
        self.store.settle(match)
        self.store.release(match)


@pytest.fixture(params=LAYOUTS)
def prompt(request: pytest.FixtureRequest) -> Iterator[Prompt]:
    prompt = Prompt(LAYOUTS[request.param])
    prompt.allocate()
    yield prompt
    prompt.store.close()


def test_put(versus: Any, prompt: Prompt) -> None:
    def copy_out() -> None:
        for page in range(prompt.num_blocks):
            np.copyto(prompt.rows[page, : prompt.block_bytes], prompt.pool[page])

    def forget() -> None:
        prompt.allocate()
        prompt.store.index.evict(HOST)

    name = f"host put, {prompt.block_bytes >> 10} KiB blocks"
    versus(name, prompt.put, "memcpy", copy_out, unit="GB/s", amount=prompt.gigabytes, before=forget)


def test_get(versus: Any, prompt: Prompt) -> None:
    def copy_in() -> None:
        for page in range(prompt.num_blocks):
            np.copyto(prompt.pool[page], prompt.rows[page, : prompt.block_bytes])

    prompt.put()
    prompt.allocate()
    assert prompt.store.index.room(DEVICE)[0] == 0
    name = f"host get, {prompt.block_bytes >> 10} KiB blocks"
    versus(name, prompt.get, "memcpy", copy_in, unit="GB/s", amount=prompt.gigabytes)
