"""What the daemon shows over HTTP, asked for by real requests."""

import json
import logging
import re
import socket
from collections.abc import Iterator
from http.client import HTTPConnection
from typing import Any

import pytest

from tests.daemon_stats import document, serving
from tierkv.errors import ConfigError, TierBusy
from tierkv.metrics import Metrics

SECRET = "hunter2"


def ask(
    port: int, path: str, *, method: str = "GET", hosts: tuple[str, ...] | None = None
) -> tuple[int, dict[str, str], str]:
    """Status, headers and body. hosts: the Host headers to send, instead of the one that is right."""
    connection = HTTPConnection("127.0.0.1", port, timeout=30)
    try:
        connection.putrequest(method, path, skip_host=hosts is not None)
        for host in hosts or ():
            connection.putheader("Host", host)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read().decode()
    finally:
        connection.close()


@pytest.fixture(scope="module")
def port() -> Iterator[int]:
    metrics = Metrics()
    metrics.blocks_evicted.add(7, "host")
    with serving(metrics=metrics.prometheus) as port:
        yield port


def test_stats_are_the_document_as_json(port: int) -> None:
    status, headers, body = ask(port, "/stats")
    assert status == 200
    assert headers["Content-Type"] == "application/json; charset=utf-8"
    assert json.loads(body) == document()


def test_metrics_are_prometheus_text_under_its_content_type(port: int) -> None:
    status, headers, body = ask(port, "/metrics")
    assert status == 200
    assert headers["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"
    assert 'tierkv_blocks_evicted_total{tier="host"} 7\n' in body


def test_page_is_html_that_loads_nothing_from_elsewhere(port: int) -> None:
    status, headers, body = ask(port, "/?theme=dark")
    assert status == 200
    assert headers["Content-Type"] == "text/html; charset=utf-8"
    assert not re.findall(r"""(?:src|href|url)\s*[=(]\s*["']?(?:https?:)?//""", body)
    assert "@import" not in body


def test_health_is_ok_and_readiness_tells_why_not() -> None:
    why: list[str | None] = [None, "draining: no new work is taken"]
    with serving(ready=lambda: why.pop(0)) as port:
        assert ask(port, "/healthz")[::2] == (200, "ok\n")
        assert ask(port, "/readyz")[::2] == (200, "ok\n")
        assert ask(port, "/readyz")[::2] == (503, "draining: no new work is taken\n")
        assert ask(port, "/healthz")[0] == 200


@pytest.mark.parametrize("path", ["/", "/stats", "/metrics", "/healthz", "/readyz", "/nothing"])
def test_every_answer_carries_the_security_headers(port: int, path: str) -> None:
    _, headers, _ = ask(port, path)
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Referrer-Policy"] == "no-referrer"
    assert headers["Cache-Control"] == "no-store"
    policy = dict(part.strip().split(" ", 1) for part in headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'"
    assert policy["connect-src"] == "'self'"
    assert policy["frame-ancestors"] == "'none'"
    assert policy["require-trusted-types-for"] == "'script'"
    for kind in ("script-src", "style-src"):
        assert re.fullmatch(r"'sha256-[A-Za-z0-9+/]{43}='", policy[kind])


def test_no_answer_names_the_library_or_lets_other_origins_read(port: int) -> None:
    _, headers, _ = ask(port, "/stats")
    assert headers["Server"] == "tierkv"
    assert not [name for name in headers if name.lower().startswith("access-control-")]


@pytest.mark.parametrize("path", ["/", "/stats", "/metrics", "/readyz"])
def test_head_gives_the_headers_of_get_and_no_body(port: int, path: str) -> None:
    _, got, body = ask(port, path)
    status, headers, empty = ask(port, path, method="HEAD")
    assert (status, empty) == (200, "")
    assert headers["Content-Type"] == got["Content-Type"]
    assert headers["Content-Length"] == str(len(body.encode()))


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS", "PATCH"])
def test_other_methods_are_refused_with_what_is_possible(port: int, method: str) -> None:
    status, headers, body = ask(port, "/stats", method=method)
    assert (status, headers["Allow"]) == (405, "GET, HEAD")
    assert body == f"{method} is not possible here: GET and HEAD are\n"


def test_unknown_path_is_told_what_there_is(port: int) -> None:
    status, headers, body = ask(port, "/<script>%0d%0a" + "a" * 500)
    assert (status, headers["Content-Type"]) == (404, "text/plain; charset=utf-8")
    assert body.endswith("…" + " here; there is /, /stats, /metrics, /healthz, /readyz\n")
    assert body.count("\n") == 1
    assert len(body) < 250


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:9419",
        "tierkv.localhost:80",
        "127.0.0.1:9419",
        "[::1]:9419",
        "[::1]",
        "10.2.3.4",
        "localhost.",
    ],
)
def test_names_of_this_machine_and_addresses_are_served(port: int, host: str) -> None:
    assert ask(port, "/healthz", hosts=(host,))[0] == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "evil.example:9419",
        "localhost.evil.example",
        "notlocalhost",
        "127.0.0.1.evil.example",
        "127.0.0.1@evil",
        "",
    ],
)
@pytest.mark.parametrize("path", ["/", "/stats", "/metrics"])
def test_name_that_a_stranger_points_here_is_refused(port: int, host: str, path: str) -> None:
    status, headers, body = ask(port, path, hosts=(host,))
    assert status in (400, 421)
    assert "tierkv" not in body
    assert headers["Content-Type"].startswith("text/plain")


@pytest.mark.parametrize("hosts", [(), ("localhost", "localhost"), ("localhost", "evil.example")])
def test_request_names_its_host_exactly_once(port: int, hosts: tuple[str, ...]) -> None:
    assert ask(port, "/stats", hosts=hosts)[0] in (400, 421)


def test_request_of_the_old_protocol_without_a_host_is_told_what_to_give(port: int) -> None:
    with socket.create_connection(("127.0.0.1", port), timeout=30) as raw:
        raw.sendall(b"GET /stats HTTP/1.0\r\n\r\n")
        answer = b"".join(iter(lambda: raw.recv(65_536), b""))
    assert b" 421 " in answer.splitlines()[0]
    assert answer.endswith(b"give one Host header\n")


def test_name_the_daemon_was_told_to_listen_on_is_served(port: int) -> None:
    name = "127.1"  # resolves everywhere, and is no address in full
    with serving(host=name) as other:
        assert ask(other, "/healthz", hosts=(f"{name}:{other}",))[0] == 200
    assert ask(port, "/healthz", hosts=(f"{name}:{port}",))[0] == 421


def test_figures_that_fail_are_an_error_without_detail_and_a_log_line(caplog: pytest.LogCaptureFixture) -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError(f"redis://:{SECRET}@cache")

    with caplog.at_level(logging.ERROR, "aiohttp.server"), serving(broken) as port:
        status, _, body = ask(port, "/stats")
        assert ask(port, "/healthz")[0] == 200
    assert status == 500
    assert SECRET not in body
    assert "RuntimeError" in caplog.text


def test_figure_that_json_does_not_know_is_an_error_not_broken_json() -> None:
    with serving(lambda: document() | {"leased_bytes": float("nan")}) as port:
        assert ask(port, "/stats")[0] == 500


def test_port_that_is_taken_is_told_in_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        taken = other.getsockname()[1]
        with (
            pytest.raises(TierBusy, match=f"127.0.0.1:{taken}: .*; stop what listens there") as caught,
            serving(port=taken),
        ):
            pass
    assert "\n" not in str(caught.value)


def test_address_of_another_machine_is_a_configuration_error() -> None:
    with (
        pytest.raises(ConfigError, match=r"192\.0\.2\.1:0: .*; give an address of this machine"),
        serving(host="192.0.2.1"),
    ):
        pass


def test_closed_server_can_start_again_on_its_port() -> None:
    with serving() as port:
        assert ask(port, "/healthz")[0] == 200
    with pytest.raises(ConnectionRefusedError):
        ask(port, "/healthz")
    with serving(port=port) as again:
        assert again == port
        assert ask(port, "/healthz")[0] == 200
