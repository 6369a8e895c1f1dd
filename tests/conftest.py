"""Fixtures that several areas share."""

from collections.abc import Iterator

import pytest

from tierkv.valkey import EmbeddedValkey


@pytest.fixture(scope="session")
def valkey() -> Iterator[EmbeddedValkey]:
    """A real server for the whole session, by unix socket and TCP: use a prefix of your own, or flush it first."""
    with EmbeddedValkey(port=0, capacity_bytes=512 << 20) as server:
        yield server
