"""The Redis tier against real servers: the contract of tiers, and what is particular to this one."""

from pathlib import Path
from typing import Any, ClassVar

import pytest
import redis

from tierkv.keys import Key
from tierkv.metrics import Metrics
from tierkv.testing import SMALL, TierContract
from tierkv.tiers.base import Tier
from tierkv.tiers.redis import RedisTier
from tierkv.valkey import EmbeddedValkey

pytestmark = pytest.mark.redis


class RedisContract(TierContract):
    """The contract on one server; subclasses say how to reach it."""

    scans = False
    options: ClassVar[dict[str, Any]] = {}
    server: EmbeddedValkey

    @pytest.fixture(autouse=True)
    def _server(self, valkey: EmbeddedValkey) -> None:
        self.server = valkey

    def url(self) -> str:
        return self.server.url

    def make(self, tmp_path: Path, metrics: Metrics) -> Tier:
        with redis.Redis.from_url(self.server.url) as client:
            client.flushall()
        return self.reopen(tmp_path, metrics)

    def reopen(self, tmp_path: Path, metrics: Metrics) -> Tier:
        return RedisTier(self.url(), layout=SMALL, metrics=metrics, **self.options)

    def corrupt(self, tier: Tier, key: Key) -> None:
        with redis.Redis.from_url(self.server.url) as client:
            name = b"tierkv:" + key
            last = client.getrange(name, -1, -1)
            client.setrange(name, client.strlen(name) - 1, bytes([last[0] ^ 1]))


class TestOverUnixSocket(RedisContract):
    pass


class TestOverTcp(RedisContract):
    def url(self) -> str:
        return self.server.tcp_url


class TestWithLz4(RedisContract):
    options: ClassVar[dict[str, Any]] = {"codec": "lz4"}


class TestWithExpiryAndTouch(RedisContract):
    options: ClassVar[dict[str, Any]] = {"ttl_s": 60.0, "touch": True}
