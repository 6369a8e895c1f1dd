"""The access log: what it says, what it does not say, and that nothing that goes wrong with it matters to anybody else."""

import base64
import errno
import json
import logging
import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tierkv.errors import ConfigError
from tierkv.hints import Ending, Hints, Next
from tierkv.keys import Key, Namespace, token_bytes
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.record import Access, Recorder
from tierkv.simulate.traces import open_trace

LAYOUT = Layout(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32", block_tokens=4)
ROOT = Namespace("m", LAYOUT).root()
START_S = 1_800_000_000.0


class Logs:
    """Opens recorders on one path; a test reads what they wrote."""

    def __init__(self, folder: Path) -> None:
        self.path, self.metrics, self.now_s = folder / "access.jsonl", Metrics(), START_S
        self._open: list[Recorder] = []

    def open(self, *, root: Key = ROOT, layout: Layout = LAYOUT, max_bytes: int = 1 << 20, **options: Any) -> Recorder:
        recorder = Recorder(
            self.path,
            root=root,
            layout=layout,
            max_bytes=max_bytes,
            metrics=self.metrics,
            now=lambda: self.now_s,
            **options,
        )
        self._open.append(recorder)
        return recorder

    def rows(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.path.read_text().splitlines()]

    def close(self) -> None:
        for recorder in self._open:
            recorder.close()


@pytest.fixture
def logs(tmp_path: Path) -> Any:
    logs = Logs(tmp_path)
    yield logs
    logs.close()


def access(recorder: Recorder, tokens: list[int], at_s: float = START_S, **options: Any) -> Access:
    return Access(at_s, recorder.digests(token_bytes(tokens)), len(tokens), **options)


def blocks(row: dict[str, Any]) -> list[bytes]:
    data = base64.b64decode(row["b"])
    return [data[at : at + 8] for at in range(0, len(data), 8)]


def test_a_line_says_when_how_long_and_what_comes_next(logs: Logs) -> None:
    recorder = logs.open()
    ending = Ending(Next.TOOL, within_s=2.5, output_tokens=9)
    recorder.write(access(recorder, list(range(10)), START_S + 1.25, hints=Hints("chat", 2), ending=ending))
    recorder.write(access(recorder, [1, 2, 3]))
    header, full, bare = logs.rows()
    assert header == {
        "tierkv_log": 1, "block_tokens": 4, "block_bytes": LAYOUT.block_bytes, "started": START_S, "salt": header["salt"],
    }  # fmt: skip
    assert {name: full[name] for name in full if name not in ("b", "session")} == {
        "t": 1.25, "in": 10, "out": 9, "priority": 2, "next": "tool", "within_s": 2.5,
    }  # fmt: skip
    assert len(blocks(full)) == 2
    assert bare == {"t": 0.0, "b": "", "in": 3}


def test_digests_agree_as_far_as_prompts_do(logs: Logs) -> None:
    recorder = logs.open()
    for tokens in (list(range(16)), [*range(8), 99, *range(9, 16)], [*range(15), 99]):
        recorder.write(access(recorder, tokens))
    one, other, last = (blocks(row) for row in logs.rows()[1:])
    assert [a == b for a, b in zip(one, other, strict=True)] == [True, True, False, False]
    assert [a == b for a, b in zip(one, last, strict=True)] == [True, True, True, False]


def test_the_log_tells_no_tokens_and_no_names(logs: Logs) -> None:
    """Whoever knows all but the salt cannot tell whether a prompt they guess is in the log."""
    tokens = token_bytes(list(range(5000, 5008)))
    recorder = logs.open()
    recorder.write(Access(START_S, recorder.digests(tokens), 8, Hints("alice@example.org")))
    text = logs.path.read_bytes()
    assert b"alice" not in text
    row = logs.rows()[1]
    assert tokens[:4] not in base64.b64decode(row["b"])
    other = Logs(logs.path.parent / "other")
    other.path.parent.mkdir()
    same = other.open()
    assert same.digests(tokens) != recorder.digests(tokens), "a salt of its own"
    same.write(Access(START_S, b"", 8, Hints("alice@example.org")))
    assert other.rows()[1]["session"] != row["session"]
    other.close()
    salt = logs.path.with_name("access.jsonl.salt")
    assert stat.S_IMODE(salt.stat().st_mode) == 0o600
    assert salt.read_bytes().hex() not in text.decode()


def test_a_secret_is_the_salt_of_all_logs_of_its_stores(logs: Logs, tmp_path: Path) -> None:
    tokens = token_bytes(list(range(8)))
    one = logs.open(secret=b"s3")
    other = Logs(tmp_path / "b")
    other.path.parent.mkdir()
    assert other.open(secret=b"s3").digests(tokens) == one.digests(tokens)
    other.close()
    assert not logs.path.with_name("access.jsonl.salt").exists()


def test_another_namespace_has_other_digests(logs: Logs) -> None:
    first = logs.open()
    digests = first.digests(token_bytes(list(range(8))))
    first.close()
    assert logs.open(root=Namespace("m", LAYOUT, tenant="t").root()).digests(token_bytes(list(range(8)))) != digests


def test_a_restart_goes_on_with_the_log(logs: Logs) -> None:
    first = logs.open()
    first.write(access(first, [1, 2, 3, 4], START_S + 1))
    first.close()
    logs.now_s += 3600
    second = logs.open()
    second.write(access(second, [1, 2, 3, 4], START_S + 3605))
    rows = logs.rows()
    assert [row.get("t") for row in rows] == [None, 1.0, None, 3605.0]
    assert rows[0] == rows[2], "the beginning stays that of the log"
    assert blocks(rows[1]) == blocks(rows[3]), "reuse over a restart shows"


def test_a_line_that_a_crash_left_unfinished_is_cut_off(logs: Logs) -> None:
    first = logs.open()
    first.write(access(first, [1, 2, 3, 4]))
    first.close()
    whole = logs.path.read_bytes()
    logs.path.write_bytes(whole + b'{"t":3,"b":"' + b"A" * 200_000)
    second = logs.open()
    second.write(access(second, [1, 2, 3, 4]))
    assert logs.path.read_bytes().startswith(whole)
    assert len(logs.rows()) == 4


def test_the_simulator_reads_it(logs: Logs) -> None:
    recorder = logs.open()
    prompts = [list(range(10)), list(range(8)), [*range(4), *range(90, 100)]]
    for at, tokens in enumerate(prompts):  # ended in another order than they came
        ending = Ending(Next.TURN, output_tokens=at)
        recorder.write(access(recorder, tokens, START_S + 10 - at, hints=Hints("s", 1), ending=ending))
    trace = open_trace(logs.path)
    assert trace.block_tokens == 4
    requests = list(trace)
    trace.close()
    assert [request.input_tokens for request in requests] == [14, 8, 10]
    assert [request.output_tokens for request in requests] == [2, 1, 0]
    assert [request.num_blocks for request in requests] == [3, 2, 2]
    assert requests[1].blocks == requests[2].blocks
    assert requests[0].blocks[:8] == requests[1].blocks[:8]
    after = sorted(request.ending.next.value for request in requests)
    assert after == ["ended", "turn", "turn"], "the reader knows that none came after the last"
    assert len({request.hints.session for request in requests}) == 1
    assert {request.hints.priority for request in requests} == {1}


def test_recording_ends_at_its_limit_with_whole_lines(logs: Logs, caplog: pytest.LogCaptureFixture) -> None:
    recorder = logs.open(max_bytes=400)
    with caplog.at_level(logging.WARNING, "tierkv"):
        for _ in range(20):
            recorder.write(access(recorder, list(range(8))))
    assert logs.path.stat().st_size <= 400
    kept = len(logs.rows()) - 1
    assert 0 < kept < 20
    assert logs.metrics.requests_recorded.value() == kept
    assert logs.metrics.records_dropped.value("full") == 20 - kept
    assert logs.metrics.record_bytes.value() == logs.path.stat().st_size
    assert [record.getMessage().count("record.max_bytes") for record in caplog.records] == [1]


def failing(after: int, code: int) -> Callable[[int, bytes], int]:
    """A disk that takes so many bytes, a few at a time, and then fails."""
    left = [after]

    def write(fd: int, data: bytes) -> int:
        if not left[0]:
            raise OSError(code, os.strerror(code))
        done = os.write(fd, data[: min(7, left[0])])
        left[0] -= done
        return done

    return write


@pytest.mark.parametrize(("code", "reason"), [(errno.ENOSPC, "full"), (errno.EIO, "failed")])
@pytest.mark.parametrize("after", [0, 30, 190, 300])
def test_a_disk_that_fails_ends_the_recording_once(
    logs: Logs, caplog: pytest.LogCaptureFixture, code: int, reason: str, after: int
) -> None:
    with caplog.at_level(logging.WARNING, "tierkv"):
        recorder = logs.open(write=failing(after, code))
        for _ in range(8):
            recorder.write(access(recorder, list(range(8))))
    assert len(caplog.records) == 1
    kept = logs.metrics.requests_recorded.value()
    assert kept + logs.metrics.records_dropped.value(reason) == 8
    assert len(logs.rows()) == (1 + kept if after > 130 else 0), "whole lines only"


def test_after_close_lines_are_dropped(logs: Logs) -> None:
    recorder = logs.open()
    line = access(recorder, [1])
    recorder.close()
    recorder.close()
    recorder.write(line)
    assert logs.metrics.records_dropped.value("closed") == 1


def refused(logs: Logs, **options: Any) -> str:
    with pytest.raises(ConfigError) as refusal:
        logs.open(**options)
    message = str(refusal.value)
    assert "\n" not in message
    assert "access.jsonl" in message
    assert ";" in message
    return message


def test_files_that_are_no_log_of_this_store_are_refused_and_left_as_they_are(logs: Logs) -> None:
    logs.open().close()
    wide = Layout(num_layers=1, num_kv_heads=1, head_dim=4, dtype="float32", block_tokens=8)
    assert "4-token blocks" in refused(logs, layout=wide)
    for content in (b"important", b'{"tierkv_log": 2}\n', b"[]\n", b'{"tierkv_log": 1}\n', b"\xff\xfe\n"):
        logs.path.write_bytes(content)
        assert "no access log" in refused(logs)
        assert logs.path.read_bytes() == content
    logs.path.write_bytes(b"")
    salt = logs.path.with_name("access.jsonl.salt")
    salt.write_bytes(b"short")
    assert "5 bytes" in refused(logs)


def test_two_stores_never_write_one_log(logs: Logs) -> None:
    logs.open()
    assert "another store" in refused(logs)


def test_a_path_that_cannot_be_written_is_refused(logs: Logs) -> None:
    logs.path = logs.path.parent / "no" / "access.jsonl"
    assert "No such file" in refused(logs)
    logs.path.parent.mkdir()
    logs.path.mkdir()
    assert "directory" in refused(logs)
