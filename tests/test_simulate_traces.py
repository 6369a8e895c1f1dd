"""Traces as they come: every format, compressed or not, and every way to be wrong, each in one line."""

import base64
import gzip
import io
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.traces import ids, trace
from tierkv.errors import TraceError
from tierkv.hints import Next
from tierkv.keys import chain
from tierkv.simulate.blocks import chained, numbers
from tierkv.simulate.prompts import ROOT
from tierkv.simulate.request import Request
from tierkv.simulate.spool import PIECE_BYTES, Spool
from tierkv.simulate.traces import READERS, open_trace

Row = dict[str, Any]


def mooncake(time_ms: float, hash_ids: Sequence[object], **more: object) -> Row:
    return {"timestamp": time_ms, "input_length": 512 * len(hash_ids), "output_length": 9, "hash_ids": hash_ids} | more


def bailian(time_s: float, hash_ids: Sequence[int], chat: int = 0, parent: int = -1) -> Row:
    return {
        "chat_id": chat,
        "parent_chat_id": parent,
        "timestamp": time_s,
        "input_length": 16 * len(hash_ids) - 5,
        "output_length": 9,
        "type": "text",
        "turn": 1,
        "hash_ids": hash_ids,
    }


def session(*requests: Row, **more: object) -> Row:
    return {"id": "x", "models": [], "block_size": 64, "hash_id_scope": "local", "requests": requests} | more


def asked(time_s: float, hash_ids: Sequence[int], **more: object) -> Row:
    return {"t": time_s, "type": "s", "in": 64 * len(hash_ids) + 7, "out": 5, "hash_ids": hash_ids, "stop": ""} | more


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*rows: Row | str, name: str = "trace.jsonl") -> Path:
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(f"{row if isinstance(row, str) else json.dumps(row)}\n" for row in rows))
        return path

    return write


def blocks(request: Request) -> list[int]:
    return np.frombuffer(request.blocks, dtype="<u8").tolist()


# -- formats ---------------------------------------------------------------------------------------------------------


def test_mooncake_rows_are_requests_with_their_full_blocks(write: Callable[..., Path]) -> None:
    path = write(
        mooncake(5000, [7, 8, 9], input_length=3 * 512 - 1),
        mooncake(6500.5, [7, 8, 1], tool_use=True),
        mooncake(6500.5, [4], tool_use=False, input_length=100),
    )
    first, second, short = found = list(opened := open_trace(path))
    assert [each.time_s for each in found] == [0, 1.5005, 1.5005]
    assert blocks(first) == blocks(second)[:2] and len(set(blocks(second))) == 3 and not short.blocks
    assert (first.input_tokens, first.output_tokens, first.num_blocks) == (1535, 9, 2)
    assert [each.ending.next for each in found] == [Next.UNKNOWN, Next.TOOL, Next.TURN]
    assert all(each.ending.output_tokens == 9 and each.hints.session is None for each in found)
    assert (opened.name, opened.block_tokens) == ("trace", 512)
    assert opened.totals.num_requests == 2 and opened.totals.num_short == 1 and opened.totals.block_refs == 5
    assert opened.totals.input_tokens == 1535 + 1536 and opened.totals.max_blocks == 3


def test_bailian_blocks_are_chained_to_what_is_before_them(write: Callable[..., Path]) -> None:
    path = write(bailian(1.5, [5, 6, 7, 0]), bailian(2.0, [9, 6, 7, 0]), bailian(3.0, [5, 6, 8, 0]))
    one, other, third = map(blocks, open_trace(path))
    assert len(one) == 3 and not set(one) & set(other) and one[:2] == third[:2] and one[2] != third[2]


def test_chats_of_one_conversation_are_one_session_that_ends_once(write: Callable[..., Path]) -> None:
    turns = [(10, -1), (11, 10), (20, -1), (12, 11), (13, 10), (31, 30), (32, 30)]
    found = list(open_trace(write(*(bailian(at, [1, 2], chat, up) for at, (chat, up) in enumerate(turns)))))
    names = [each.hints.session for each in found]
    assert names[0] == names[1] == names[3] == names[4] and names[5] == names[6] and len(set(names)) == 3
    assert [at for at, each in enumerate(found) if each.ending.next is Next.ENDED] == [2, 4, 6]


def test_sessions_are_overlaid_each_with_its_own_blocks(write: Callable[..., Path]) -> None:
    inner = {"t": 10, "requests": [asked(0, [1, 50]), asked(25, [1, 50, 51], stop="tool_use")]}
    path = write(
        session(asked(0, [1, 2]), inner, asked(20, [1, 2, 3], stop="end_turn"), block_size=64),
        session(asked(0, [1, 2]), asked(15, [1, 2, 4], output_types=["text", "tool_use"])),
    )
    opened = open_trace(path)
    found = list(opened)
    assert opened.block_tokens == 64
    assert [each.time_s for each in found] == [0, 0, 10, 15, 20, 35]
    main, other, agent = blocks(found[0]), blocks(found[1]), blocks(found[2])
    assert not set(main) & set(other) and agent[0] == main[0]
    assert [each.hints.session for each in found].count(found[0].hints.session) == 2
    assert len({each.hints.session for each in found}) == 3
    assert [each.ending.next for each in found] == [Next.UNKNOWN] * 3 + [Next.ENDED] * 3
    assert [each.num_blocks for each in found] == [2, 2, 2, 3, 3, 3]


def test_sub_agent_without_a_time_begins_with_its_session(write: Callable[..., Path]) -> None:
    path = write(session(asked(5, [1]), {"requests": [asked(3, [1, 2])]}))
    assert [(each.time_s, each.num_blocks) for each in open_trace(path)] == [(3, 2), (5, 1)]


def test_sessions_of_global_scope_share_their_blocks(write: Callable[..., Path]) -> None:
    one, other = open_trace(write(*(session(asked(0, [1, 2]), hash_id_scope="global") for _ in range(2))))
    assert one.blocks == other.blocks


def test_more_sessions_than_users_come_one_after_another(write: Callable[..., Path]) -> None:
    path = write(*(session(asked(0, [1]), asked(100, [1, 2])) for _ in range(16)), session(asked(0, [1])))
    assert [each.time_s for each in open_trace(path)] == [0.0] * 16 + [100.0] * 17


def test_folder_of_sessions_is_one_trace_whatever_their_layout(tmp_path: Path, write: Callable[..., Path]) -> None:
    write(session(asked(0, [1, 2])), name="agents/b.json")
    write(json.dumps(session(asked(0, [1, 2]), asked(5, [1, 2, 3])), indent=2), name="agents/a.json")
    (tmp_path / "agents" / "c.json.gz").write_bytes(gzip.compress(json.dumps(session(asked(0, [4]))).encode()))
    (tmp_path / "agents" / "README.md").write_text("not a trace")
    opened = open_trace(tmp_path / "agents")
    assert opened.name == "agents" and [each.num_blocks for each in opened] == [2, 2, 1, 3]


def test_files_of_a_folder_come_by_name_and_are_named_in_errors(tmp_path: Path, write: Callable[..., Path]) -> None:
    for at in random.Random(1).sample(range(20), 20):
        write(mooncake(2 * at, [1]), mooncake(2 * at + 1, list(range(at + 1))), name=f"days/{at:02}.jsonl")
    assert [each.num_blocks for each in open_trace(tmp_path / "days")][1::2] == list(range(1, 21))
    write(mooncake(99, [1]), mooncake(99, [1]), "{", name="days/20.jsonl")
    with pytest.raises(TraceError, match=r"20\.jsonl:3: not JSON"):
        open_trace(tmp_path / "days")


def test_tokens_are_cut_into_blocks_and_named_by_their_keys(write: Callable[..., Path]) -> None:
    path = write({"tokens": list(range(40))}, {"prompt": [0, 1, 2, 3], "session": "a", "output_length": 3})
    first, second = open_trace(path)
    keys = chain(ROOT, np.arange(32, dtype="<i4").tobytes(), block_tokens=16)
    assert first.blocks == b"".join(key[:8] for key in keys) and first.input_tokens == 40
    assert (second.time_s, second.input_tokens, second.output_tokens) == (1.0, 4, 3)
    assert second.ending.next is Next.ENDED
    first, second = open_trace(path, block_tokens=4)
    assert first.num_blocks == 10 and second.blocks == first.blocks[:8]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Of words a, b and anything else, with a chat template."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({"a": 0, "b": 1, "?": 2}, unk_token="?"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="?")
    said = "{% if each['content'] is string %}a {{ each['content'] }} {% else %}{{ raise_exception('no text') }}{% endif %}"
    tokenizer.chat_template = "{% for each in messages %}" + said + "{% endfor %}b"
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save_pretrained(folder)
    return str(folder)


def test_text_is_read_by_the_tokenizer_of_a_model(write: Callable[..., Path], tokenizer: str) -> None:
    path = write(
        {"prompt": "a b a b", "timestamp": 3.5},
        {"text": "a b c b", "timestamp": 4},
        {"messages": [{"role": "user", "content": "b a"}], "timestamp": 4},
    )
    first, second, third = open_trace(path, tokenizer=tokenizer, block_tokens=2)
    assert first.blocks == third.blocks and blocks(first)[0] == blocks(second)[0] and first.blocks != second.blocks
    assert [each.time_s for each in (first, second, third)] == [0, 0.5, 0.5]


def test_own_access_log_is_read_as_it_was_written(write: Callable[..., Path]) -> None:
    digests = base64.b64encode(bytes(range(24))).decode()
    path = write(
        {"tierkv_log": 1, "block_tokens": 16},
        {"t": 9.5, "b": digests, "in": 50, "out": 7, "session": "s", "next": "tool", "priority": 9},
        {
            "t": 4.25,
            "b": base64.b64encode(bytes(16)).decode(),
            "in": 40,
            "session": "s",
            "next": None,
        },
        {"tierkv_log": 1, "block_tokens": 16},
        {"t": 11.0, "b": "", "in": 3, "out": 1, "within_s": 2.5},
        '{"t": 12.0, "b": "',
    )
    path.write_text(path.read_text().rstrip("\n"))
    opened = open_trace(path)
    early, late, short = opened
    assert (early.time_s, late.time_s) == (4.25, 9.5) and late.blocks == bytes(range(24))
    assert late.hints.session == early.hints.session is not None and late.hints.priority == 4
    assert short.ending.within_s == 2.5 and short.hints.session is None


# -- reading ---------------------------------------------------------------------------------------------------------


PACKED = {
    "gz": gzip.compress,
    "zst": zstandard.ZstdCompressor().compress,
    "plain": lambda data: data,
    "two.gz": lambda data: gzip.compress(data[:30]) + gzip.compress(data[30:]),
    "two.zst": lambda data: b"".join(zstandard.ZstdCompressor().compress(part) for part in (data[:30], data[30:])),
}


@pytest.mark.parametrize("ending", PACKED)
def test_compression_is_told_by_content(tmp_path: Path, ending: str) -> None:
    data = "".join(json.dumps(mooncake(at, [1, at])) + "\n" for at in range(50)).encode()
    (tmp_path / "trace").write_bytes(PACKED[ending](data))
    assert [each.num_blocks for each in open_trace(tmp_path / "trace")] == [2] * 50


def test_standard_input_is_read_to_its_end(monkeypatch: pytest.MonkeyPatch) -> None:
    data = gzip.compress(json.dumps(mooncake(0, [1, 2])).encode())
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(data))))
    opened = open_trace("-")
    assert opened.name == "stdin" and [each.num_blocks for each in opened] == [2]


def test_name_of_a_trace_is_its_files_without_endings(tmp_path: Path) -> None:
    (tmp_path / "v1.5.trace.jsonl.gz").write_bytes(gzip.compress(json.dumps(mooncake(0, [1])).encode()))
    assert open_trace(tmp_path / "v1.5.trace.jsonl.gz").name == "v1.5.trace"


@pytest.mark.parametrize("fault", ["cut off", "zeros", "ones"])
@pytest.mark.parametrize("ending", ["gz", "zst"])
def test_damaged_archive_is_one_line(tmp_path: Path, ending: str, fault: str) -> None:
    rng = np.random.default_rng(1)
    rows = [json.dumps(mooncake(at, rng.integers(0, 2**40, 50).tolist())) + "\n" for at in range(2000)]
    data = bytearray(PACKED[ending]("".join(rows).encode()))
    if fault == "cut off":
        del data[len(data) // 2 :]
    else:
        at, fill = (10, b"\xff") if fault == "ones" else (len(data) // 2, b"\0")
        data[at : at + 64] = fill * 64
    path = tmp_path / "trace.gz"
    path.write_bytes(data)
    with pytest.raises(TraceError, match=r"trace\.gz:\d+: [^\n]*$"):
        open_trace(path)


def test_zstandard_without_its_package_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trace.zst").write_bytes(PACKED["zst"](b"{}"))
    monkeypatch.setitem(sys.modules, "zstandard", None)
    with pytest.raises(TraceError, match=r"trace\.zst: .*pip install 'tierkv.simulate.' to read it, or decompress"):
        open_trace(tmp_path / "trace.zst")


# -- what is wrong ---------------------------------------------------------------------------------------------------

GOOD = mooncake(10, [1, 2])
WRONG: dict[str, tuple[list[Row | str], str]] = {
    "bad JSON": ([GOOD, '{"timestamp": 1, '], r":2: not JSON \(.*\): \{\"timestamp\".*one JSON object per line"),
    "no object": ([GOOD, "[1, 2]"], r":2: not a JSON object: \[1, 2\]; one JSON object per line"),
    "deep": ([GOOD, "[" * 100000], r":2: not JSON \(.*recursion"),
    "binary": ([GOOD, "\x1b[31m\x00\x89PNG\r"], r":2: not JSON \(.*\): \?\[31m\?.PNG; one JSON object"),
    "field of two lines": ([{"a\nb": 1}], r":1: a row with a\?b, of no format known"),
    "time without end": ([mooncake(10**400, [1])], ":1: timestamp is 10000.*0{50}"),
    "no time": (
        [GOOD, {"input_length": 5, "hash_ids": [1]}],
        r":2: no timestamp \(there is input_length, hash_ids\); a number",
    ),
    "time is text": ([GOOD, mooncake("11", [1])], r':2: timestamp is "11"; a number is expected'),  # type: ignore[arg-type]
    "time is NaN": ([GOOD, mooncake(float("nan"), [1])], ":2: timestamp is NaN; a number is expected"),
    "negative time": ([mooncake(-1, [1])], ":1: timestamp is -1, which is negative; shift all times"),
    "falling time": ([GOOD, mooncake(9, [1])], r":2: timestamp is 9, after 10 of an earlier request; sort the trace"),
    "ids no list": ([GOOD, GOOD | {"hash_ids": 7}], ":2: hash_ids is 7; a list of block ids"),
    "ids absent": ([GOOD, {"timestamp": 11, "input_length": 1024}], ":2: no hash_ids"),
    "ids nested": ([GOOD, mooncake(11, [1, [2]])], r":2: hash_ids has \[2\] at position 1; whole numbers or texts"),
    "ids not whole": ([GOOD, mooncake(11, [1, 2.5])], r":2: hash_ids has 2\.5 at position 1"),
    "ids true": ([GOOD, mooncake(11, [True, 2])], ":2: hash_ids has true at position 0"),
    "ids null": ([GOOD, mooncake(11, [None, 2])], ":2: hash_ids has null at position 0"),
    "length absent": ([{"timestamp": 1, "hash_ids": [1]}], ":1: no input_length"),
    "length negative": ([GOOD | {"input_length": -4}], ":1: input_length is -4; a whole number from 0"),
    "length text": ([GOOD | {"input_length": "many"}], ':1: input_length is "many"; a whole number'),
    "length huge": ([GOOD | {"input_length": 10**12}], ":1: input_length is 1000000000000; a whole number from 0"),
    "mixed sizes": (
        [GOOD, mooncake(11, [1] * 64, input_length=1024)],
        ":2: 64 block ids for 1024 tokens, about 16 each",
    ),
    "too few ids": ([GOOD, mooncake(11, [1], input_length=2048)], ":2: 1 block ids for 2048 tokens"),
    "no ids for much": ([GOOD, mooncake(11, [], input_length=2048)], ":2: 0 block ids for 2048 tokens, in a trace"),
    "empty": ([], ":1: no requests; one JSON object per line"),
    "blank": (["", "  "], ":[123]: no requests"),
    "of no format": (
        [{"a": 1, "b": 2}],
        ":1: a row with a, b, of no format known; say which by --format: mooncake, bailian",
    ),
    "short prompts": ([mooncake(1, [3], input_length=100)], "none of 1 requests has a full block of 512 tokens"),
    "chat is text": ([bailian(0, [1]) | {"chat_id": "x"}], ':1: chat_id is "x"; a whole number'),
    "session sizes": (
        [session(asked(0, [1])), session(block_size=128)],
        ":2: a session of 128-token blocks after one of 64",
    ),
    "session without": ([session(), session(requests=3)], ":2: requests is not a list"),
    "session of texts": ([session("x")], ":1: request 0 of session 1 is not an object"),  # type: ignore[arg-type]
    "session time": ([session(asked(-2, [1]))], ":1: t is -2, which is negative"),
    "tokens": ([{"tokens": [1] * 16}, {"tokens": [2**40]}], ":2: tokens: list of tokens"),
    "tokens are text": ([{"tokens": "a b"}], ":1: tokens is not a list; a list of token ids"),
    "text": ([{"prompt": "a b"}], ":1: prompt is text; say whose tokenizer reads it by --tokenizer"),
    "prompt is a number": ([{"prompt": 4}], ":1: prompt is not a text"),
    "no prompt": ([{"tokens": [1]}, {"session": 3}], r":2: no prompt \(there is session\)"),
    "log version": ([{"tierkv_log": 7, "block_tokens": 16}], ":1: an access log of version 7; version 1 is expected"),
    "log sizes": (
        [{"tierkv_log": 1, "block_tokens": size} for size in (16, 32)],
        ":2: 32-token blocks after those of 16",
    ),
    "log digests": ([{"tierkv_log": 1, "block_tokens": 16}, {"t": 0, "b": "!", "in": 1}], ":2: b is not base64"),
    "log bytes": ([{"tierkv_log": 1, "block_tokens": 16}, {"t": 0, "b": "AAAA", "in": 1}], ":2: b has 3 bytes"),
    "log next": (
        [{"tierkv_log": 1, "block_tokens": 16}, {"t": 0, "b": "", "in": 1, "next": "x"}],
        ":2: next is 'x'; one of unknown, ended, tool, turn",
    ),
    "log line": (
        [{"tierkv_log": 1, "block_tokens": 16}, '{"t": 1, "b": "'],
        r":2: not JSON \(.*one JSON object per line",
    ),
    "log of nothing": ([{"tierkv_log": 1, "block_tokens": 16}], "none of 0 requests has a full block"),
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_wrong_is_said_in_one_line_with_its_place(write: Callable[..., Path], what: str) -> None:
    rows, message = WRONG[what]
    with pytest.raises(TraceError, match=rf"trace\.jsonl.*{message}") as error:
        open_trace(write(*rows))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400


def test_what_cannot_be_opened_is_said_in_one_line(tmp_path: Path, write: Callable[..., Path], tokenizer: str) -> None:
    with pytest.raises(TraceError, match="none: No such file or directory; give a trace file"):
        open_trace(tmp_path / "none")
    with pytest.raises(TraceError, match="no trace in this folder"):
        open_trace(tmp_path)
    with pytest.raises(TraceError, match="format 'x': must be one of mooncake, bailian, sessions, prompts, tierkv"):
        open_trace(write(GOOD), format="x")
    with pytest.raises(TraceError, match="block_tokens 0: must be at least 1"):
        open_trace(write(GOOD), block_tokens=0)
    with pytest.raises(TraceError, match="jsonl:1: tokenizer '/nowhere' cannot be loaded"):
        open_trace(write({"text": "a"}), tokenizer="/nowhere")
    with pytest.raises(TraceError, match="jsonl:1: messages: refused by the chat template"):
        open_trace(write({"messages": [{"role": "user"}]}), tokenizer=tokenizer)
    with pytest.raises(TraceError, match="jsonl:1: messages is not a list of messages"):
        open_trace(write({"messages": "a"}), tokenizer=tokenizer)


@pytest.mark.parametrize("rows", [[GOOD, mooncake(11, [1], input_length=2048)], [GOOD, "{"], []])
def test_refused_trace_leaves_nothing_behind(
    write: Callable[..., Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rows: list[Row | str]
) -> None:
    path = write(*rows)
    (scratch := tmp_path / "scratch").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(TraceError):
        open_trace(path)
    assert not list(scratch.iterdir()) and len(list(Path("/proc/self/fd").iterdir())) == before


# -- ids -------------------------------------------------------------------------------------------------------------

PATHS = st.lists(st.lists(st.integers(0, 2), max_size=6).map(tuple), max_size=20)


@settings(max_examples=200, deadline=None)
@given(PATHS)
def test_ids_are_equal_where_prompts_are_and_only_there(paths: list[tuple[int, ...]]) -> None:
    names: dict[tuple[int, ...], int] = {}
    for path in paths:
        for end, name in enumerate(np.frombuffer(ids(path), dtype="<u8").tolist(), 1):
            assert names.setdefault(path[:end], name) == name
    assert len(set(names.values())) == len(names)


def test_chaining_ids_that_are_chained_changes_nothing_but_names() -> None:
    prompts = [[1, 2, 3], [1, 2, 4], [5], [1, 2, 3, 6]]
    once = [np.frombuffer(ids(prompt), dtype="<u8") for prompt in prompts]
    twice = [np.frombuffer(chained(each.astype(np.uint64)), dtype="<u8") for each in once]
    pairs = {(int(a), int(b)) for one, two in zip(once, twice, strict=True) for a, b in zip(one, two, strict=True)}
    assert len(pairs) == len({a for a, _ in pairs}) == len({b for _, b in pairs}) == 6


def test_ids_of_a_trace_keep_their_names_across_versions() -> None:
    assert ids([1, 2, 3]).hex() == "d981067429ab97039aa9b6ade8e85d7c16f5373221d0dc8c"


def test_numbers_of_any_size_and_texts_are_ids() -> None:
    given: Iterable[object] = [0, 2**31, 2**62, 2**64 - 5, 2**64, 2**70, -3, "0", "a", "2147483648", "\ud800"]
    assert len(set(numbers(list(given)).tolist())) == 11
    assert numbers([2**31, "a"]).tolist()[0] == 2**31 == numbers([2**31]).tolist()[0]


# -- the spool -------------------------------------------------------------------------------------------------------


def test_trace_may_be_read_again_and_by_several_at_once() -> None:
    made = trace([[1, 2], [1, 3], [4]])
    whole = list(made)
    one, other = iter(made), iter(made)
    assert [next(one), next(one)] == [next(other), next(other)] == whole[:2] and list(made) == whole
    assert [each.time_s for each in whole] == [0, 1, 2]


def test_request_larger_than_what_is_read_at_a_time_comes_whole() -> None:
    long = Request(0.0, bytes(PIECE_BYTES + 800), 10**6, 1)
    made = Spool(name="long", block_tokens=1)
    starts = [made.add(each) for each in (long, long, Request(1.0, b"8 bytes!", 1, 1), long)]
    assert [len(each.blocks) for each in made] == [PIECE_BYTES + 800] * 2 + [8, PIECE_BYTES + 800]
    made.arrange([starts[2], starts[0]])
    assert [len(each.blocks) for each in made] == [8, PIECE_BYTES + 800]


def test_trace_is_read_in_a_process_that_was_forked_while_it_was_read() -> None:
    made = trace([[at] for at in range(5)])
    reader = iter(made)
    next(reader)
    child = os.fork()
    if not child:
        os._exit(0 if len(list(made)) == 5 == 1 + len(list(reader)) else 1)
    assert os.waitpid(child, 0)[1] == 0 and len(list(reader)) == 4


def test_trace_is_whole_in_a_process_that_was_forked_before_it_was_read(write: Callable[..., Path]) -> None:
    made = open_trace(write(*(mooncake(at, [at]) for at in range(5))))
    child = os.fork()
    if not child:
        os._exit(0 if len(list(made)) == 5 else 1)
    assert os.waitpid(child, 0)[1] == 0 and len(list(made)) == 5
    assert os.fstat(made._file.fileno()).st_size == made._size


ENDLESS = """
import itertools, json, signal, sys, tempfile
from tierkv.simulate.traces import open_trace
tempfile.tempdir = sys.argv[1]
try:
    open_trace("-", progress=lambda count: print(count, flush=True))
except KeyboardInterrupt:
    print("interrupted", flush=True)
"""


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_process_that_is_stopped_leaves_no_file(tmp_path: Path, how: signal.Signals) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", ENDLESS, tmp_path], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin and process.stdout
        for at in range(1100):
            process.stdin.write(json.dumps(mooncake(at, list(range(20)))) + "\n")
        process.stdin.flush()
        assert process.stdout.readline() == "1024\n"
        process.send_signal(how)
        assert process.stdout.read() == ("interrupted\n" if how == signal.SIGINT else "")
        process.stdin.close()
    assert not list(tmp_path.iterdir())


def test_memory_does_not_grow_with_the_trace(tmp_path: Path) -> None:
    """5 MB of JSON, then 10: neither parsing nor reading may take more than a few MB, or more for the second half."""
    rng = np.random.default_rng(1)
    rows = [json.dumps(mooncake(0, rng.integers(0, 2**31, 1000).tolist())) + "\n" for _ in range(100)]
    peaks = []
    for times in (5, 10):
        (path := tmp_path / "trace.jsonl").write_text("".join(rows * times))
        tracemalloc.start()
        assert sum(each.num_blocks for each in open_trace(path)) == times * 100 * 1000
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 4 << 20 and peaks[1] < peaks[0] + (256 << 10)


def test_every_format_can_be_named() -> None:
    assert set(READERS) == {"mooncake", "bailian", "sessions", "prompts", "tierkv"}
