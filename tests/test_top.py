"""`tierkv top` against a real server: once, as JSON, in a terminal; and what it says when no daemon answers."""

import io
import json
import os
import pty
import signal
import socket
import subprocess
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from tests.daemon_stats import document, empty_document, later, serving
from tierkv.cli_top import read_stats, render, show_latency, top
from tierkv.errors import ConfigError, TierError

ROOT = Path(__file__).parent.parent
PROGRAM = "import typer; from tierkv.cli_top import top; app = typer.Typer(); app.command()(top); app()"


def printed(*arguments: str) -> str:
    """What the command writes where the output is no terminal."""
    app = typer.Typer()
    app.command()(top)
    out = io.StringIO()
    with redirect_stdout(out):
        app(args=list(arguments), standalone_mode=False)
    return out.getvalue()


def screen(stats: dict[str, Any], **more: Any) -> str:
    out = io.StringIO()
    Console(file=out, width=200).print(render(stats, **more))
    return out.getvalue()


def rows(text: str) -> dict[str, list[str]]:
    """Words of each line, under its first one."""
    return {line.split()[0]: line.split() for line in text.splitlines() if line.strip()}


def test_output_that_is_no_terminal_gets_one_table() -> None:
    with serving() as port:
        said = printed("--url", f"http://127.0.0.1:{port}")
    line = rows(said)["host"]
    assert {"141,206", "186,413", "11,875", "4,810,233", "76"} <= set(line)
    assert "hit rate 75.3 % of 8,120,440 blocks in 71,904 lookups" in said
    assert "out of use" in said
    assert rows(said)["engine-0"][1] == "4711"
    assert rows(said)["never"][2] == "1,790,211"
    assert "18.4 ms" in said
    assert "\x1b" not in said


def test_json_is_the_document() -> None:
    with serving() as port:
        assert json.loads(printed("--url", f"http://127.0.0.1:{port}/", "--json")) == document()


def test_daemon_that_has_just_started_says_how_to_connect() -> None:
    said = screen(empty_document())
    assert '[daemon] url = "unix:///run/tierkv/tierkv.sock"' in said
    assert "hit rate – of 0 blocks" in said
    assert "nothing was missing" in said


def test_rates_come_from_two_documents() -> None:
    before = document()
    after = later(before, seconds=4.0, blocks=30, evicted_blocks=10)
    after["requests"] = [row | {"count": row["count"] + 2} for row in after["requests"]]
    assert {"10.0", "2.5"} <= set(rows(screen(after, before=before))["host"])
    assert "0.5" in screen(after, before=before)
    purged = later(before, seconds=2.0, blocks=-50)
    assert {"0.0", "25.0"} <= set(rows(screen(purged, before=before))["host"])


def test_rates_do_not_span_a_restart() -> None:
    restarted = later(document(), seconds=4.0, blocks=40) | {"started": document()["started"] + 9}
    assert screen(restarted, before=document()) == screen(restarted)


def test_names_of_strangers_cannot_steer_the_terminal() -> None:
    stats = document()
    stats["clients"][0] |= {"name": "\x1b]0;owned\x07\x1b[2J[bold red]", "address": "\u202eevil"}
    stats["prefixes"][0] |= {"model": "\x9b31m\r\n", "tenant": "\x1b[31m"}
    stats |= {"name": "\x1b[5m", "misses": {"\x1b[7m": 3}, "state": "\x1b[8m"}
    stats["tiers"][0]["tier"] = "host\x1b[9m"
    said = screen(stats, trouble="\x1b[1mtrouble")
    assert "[bold red]" in said, "a name is text, not markup"
    assert [letter for letter in said if not letter.isprintable() and letter != "\n"] == []


@pytest.mark.parametrize(
    ("seconds", "said"), [(None, "–"), (0.0000614, "61 µs"), (0.0184, "18.4 ms"), (0.25, "250 ms"), (1.724, "1.72 s")]
)
def test_latency_is_said_in_three_digits(seconds: float | None, said: str) -> None:
    assert show_latency(seconds) == said


def test_absent_daemon_is_told_in_one_line_with_what_to_do() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(
        TierError, match=f"no daemon at http://127.0.0.1:{port}/stats: .*refused; start one with"
    ) as caught:
        printed("--url", f"http://127.0.0.1:{port}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "url", ["127.0.0.1:9419", "ftp://127.0.0.1", "file:///etc/passwd", "http://", "http://[", "unix:///x"]
)
def test_what_is_no_address_is_told_before_anything_is_asked(url: str) -> None:
    with pytest.raises(ConfigError, match=r"not an address; give one like http://127\.0\.0\.1:9419"):
        read_stats(url)


def test_error_never_shows_the_password_of_an_address() -> None:
    with pytest.raises(TierError) as caught:
        read_stats("http://me:hunter2@127.0.0.1:1")
    assert "hunter2" not in str(caught.value)


def test_error_of_the_daemon_is_told_with_its_status() -> None:
    def broken() -> dict[str, Any]:
        raise RuntimeError("planted")

    with serving(broken) as port, pytest.raises(TierError, match=r"it answers 500 .*; is that a tierkv daemon\?"):
        read_stats(f"http://127.0.0.1:{port}")


@pytest.mark.parametrize("answer", [{}, {"data": []}])
def test_other_server_is_not_taken_for_a_daemon(answer: dict[str, Any]) -> None:
    with serving(lambda: answer) as port, pytest.raises(TierError, match="what answers is not a tierkv daemon"):
        read_stats(f"http://127.0.0.1:{port}")


def test_daemon_of_another_version_is_told_by_what_is_absent() -> None:
    other = {name: value for name, value in document().items() if name not in ("leases", "queues")}
    with serving(lambda: other) as port, pytest.raises(TierError, match="says nothing of leases, queues; take"):
        read_stats(f"http://127.0.0.1:{port}")


def test_proxy_of_the_environment_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "")
    with serving() as port:
        assert read_stats(f"http://127.0.0.1:{port}") == document()


def test_terminal_is_redrawn_shows_a_silent_daemon_and_ctrl_c_ends_quietly() -> None:
    ours, theirs = pty.openpty()
    with serving() as port:
        command = [sys.executable, "-c", PROGRAM, "--url", f"http://127.0.0.1:{port}", "--every", "0.1"]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            stdin=theirs,
            stdout=theirs,
            stderr=subprocess.PIPE,
            env=os.environ | {"TERM": "xterm", "COLUMNS": "160"},
        )
        os.close(theirs)
        seen = read_until(ours, b"hit rate", times=3)
    try:
        seen = read_until(ours, b"no daemon at")
        read_until(ours, b"figures are", after=seen)
        process.send_signal(signal.SIGINT)
        drain(ours)
        assert process.stderr is not None
        said = process.stderr.read()
        assert process.wait(60) == 0
        assert said == b""
    finally:
        process.kill()
        process.wait()
        process.stderr.close()
        os.close(ours)


def read_until(terminal: int, wanted: bytes, *, times: int = 1, after: bytes = b"") -> bytes:
    """All that was written to a terminal until something was there so many times."""
    seen = after
    while seen.count(wanted) < times:
        seen += os.read(terminal, 65_536)
    return seen


def drain(terminal: int) -> None:
    """Read until the other side has closed, which Linux tells as an I/O error."""
    while True:
        try:
            if not os.read(terminal, 65_536):
                return
        except OSError:
            return
