"""Formats of traces: what their rows say, as requests. Blocks are chained here, whatever they were.

Only full blocks count, as in an engine: a prompt's ids are cut to its length // block_tokens.
"""

import base64
import binascii
import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Final

from tierkv.hints import NO_HINTS, PRIORITIES, Ending, Hints, Next
from tierkv.simulate.blocks import chained, hashed
from tierkv.simulate.request import ID_BYTES, Request
from tierkv.simulate.rows import Row, Rows
from tierkv.simulate.spool import session_name

MOONCAKE_TOKENS: Final = 512
BAILIAN_TOKENS: Final = 16
USERS: Final = 16
"""Recorded sessions have no common clock: they are replayed as if so many users had them, each one after another."""
CHATS: Final = 1 << 18
"""Latest chats whose beginning is remembered: a chat that goes on after more than these begins anew. At most 30 MB."""
LOG_VERSION: Final = 1


@dataclass(frozen=True, slots=True)
class Options:
    """What the caller knows better than the trace. block_tokens: tokens that an id stands for, or to cut tokens into."""

    block_tokens: int | None = None
    tokenizer: str | None = None


@dataclass(frozen=True, slots=True)
class Source:
    """Requests of a trace. in_order: by the time of their arrival."""

    block_tokens: int
    requests: Iterator[Request]
    in_order: bool = True


Reader = Callable[[Rows, Options], Source]


def mooncake(rows: Rows, options: Options) -> Source:
    """Mooncake's release with FAST'25: milliseconds, `hash_ids` of 512 tokens. `tool_use` is an addition of tierkv's."""
    block_tokens = options.block_tokens or MOONCAKE_TOKENS

    def requests() -> Iterator[Request]:
        for row in rows:
            time_s = rows.time(row, "timestamp", unit_s=1e-3)
            inputs, blocks = _blocks(rows, row, block_tokens)
            outputs = rows.count(row, "output_length", default=0)
            tool = row.get("tool_use")
            following = Next.TOOL if tool is True else Next.TURN if tool is False else Next.UNKNOWN
            yield Request(time_s, blocks, inputs, outputs, NO_HINTS, Ending(following, None, outputs))

    return Source(block_tokens, requests())


def bailian(rows: Rows, options: Options) -> Source:
    """Qwen-Bailian: seconds, `hash_ids` of 16 tokens that do not tell what is before them, chats by parent."""
    block_tokens = options.block_tokens or BAILIAN_TOKENS

    def requests() -> Iterator[Request]:
        begun: dict[int, int] = {}  # chat -> the first chat of its conversation
        for row in rows:
            time_s = rows.time(row, "timestamp")
            inputs, blocks = _blocks(rows, row, block_tokens)
            outputs = rows.count(row, "output_length", default=0)
            chat, parent = rows.whole(row, "chat_id"), rows.whole(row, "parent_chat_id", default=-1)
            first = begun.get(parent, parent) if parent >= 0 else chat
            begun[chat] = first
            if len(begun) > CHATS:
                del begun[next(iter(begun))]
            hints = Hints(session_name(hashed(f"chat {first}")))
            yield Request(time_s, blocks, inputs, outputs, hints, Ending(output_tokens=outputs))

    return Source(block_tokens, requests())


def sessions(rows: Rows, options: Options) -> Source:
    """kv-cache-tester: a session per row, with times from its start; sub-agents within, with times from theirs.

    Ids are the session's own unless it says `hash_id_scope: "global"`.
    """
    first = rows.first()
    block_tokens = rows.count(first, "block_size", default=options.block_tokens or 64)

    def requests() -> Iterator[Request]:
        free_s = [0.0] * USERS
        for number, row in enumerate(rows, 1):
            size = rows.count(row, "block_size", default=block_tokens)
            if size != block_tokens:
                rows.fail(
                    f"a session of {size}-token blocks after one of {block_tokens}",
                    "simulate them as traces of their own",
                )
            start_s = end_s = heapq.heappop(free_s)
            seed = 0 if row.get("hash_id_scope") == "global" else hashed(f"session {number}")
            for request in _session(rows, row, f"{number}", start_s, seed, block_tokens):
                end_s = max(end_s, request.time_s)
                yield request
            heapq.heappush(free_s, end_s)

    return Source(block_tokens, requests(), in_order=False)


def _session(rows: Rows, row: Row, name: str, start_s: float, seed: int, block_tokens: int) -> Iterator[Request]:
    given = rows.field(row, "requests", "a list of requests")
    if type(given) is not list:
        rows.fail("requests is not a list", "a list of requests is expected")
    hints = Hints(session_name(hashed(f"session {name}")))
    for at, each in enumerate(given):
        if type(each) is not dict:
            rows.fail(
                f"request {at} of session {name} is not an object", "an object with t, in, out and hash_ids is expected"
            )
        time_s = start_s + rows.seconds(each, "t", default=0.0)
        if "requests" in each:  # what a sub-agent asked, as a session of its own
            yield from _session(rows, each, f"{name}.{at}", time_s, seed, block_tokens)
            continue
        inputs, outputs, ids = rows.count(each, "in"), rows.count(each, "out", default=0), rows.ids(each, "hash_ids")
        check_size(rows, len(ids), inputs, block_tokens)
        blocks = chained(ids[: inputs // block_tokens], seed=seed)
        yield Request(time_s, blocks, inputs, outputs, hints, Ending(_stopped(each), None, outputs))


def _stopped(row: Row) -> Next:
    stop = row.get("stop")
    if stop == "tool_use" or "tool_use" in (row.get("output_types") or ()):
        return Next.TOOL
    return Next.TURN if stop == "end_turn" else Next.UNKNOWN


def log(rows: Rows, options: Options) -> Source:
    """tierkv's own access log (tierkv/record.py): digests of the full blocks that are chained and salted, no tokens."""
    header = rows.first()
    version = rows.count(header, "tierkv_log")
    if version != LOG_VERSION:
        rows.fail(f"an access log of version {version}", f"version {LOG_VERSION} is expected: update tierkv")
    block_tokens = rows.count(header, "block_tokens")

    def requests() -> Iterator[Request]:
        rows.may_end_early = True  # a store may be writing it
        for row in rows:
            if "tierkv_log" in row:
                if (size := rows.count(row, "block_tokens")) != block_tokens:
                    rows.fail(
                        f"{size}-token blocks after those of {block_tokens}", "simulate them as traces of their own"
                    )
                continue
            inputs, outputs = rows.count(row, "in"), rows.count(row, "out", default=0)
            blocks = _digests(rows, rows.field(row, "b", "base64 of block digests"))
            check_size(rows, len(blocks) // ID_BYTES, inputs, block_tokens)
            session, given = row.get("session"), row.get("next") or Next.UNKNOWN.value
            if given not in {each.value for each in Next}:
                rows.fail(f"next is {given!r}", f"one of {', '.join(each.value for each in Next)} is expected")
            within_s = rows.seconds(row, "within_s") if row.get("within_s") is not None else None
            hints = Hints(
                session_name(hashed(f"session {session}")) if session is not None else None, _priority(rows, row)
            )
            yield Request(
                rows.seconds(row, "t"), blocks, inputs, outputs, hints, Ending(Next(given), within_s, outputs)
            )

    return Source(block_tokens, requests(), in_order=False)


def _digests(rows: Rows, given: Any) -> bytes:
    try:
        blocks = base64.b64decode(given, validate=True)
    except (TypeError, ValueError, binascii.Error) as error:
        rows.fail(f"b is not base64 ({error})", f"base64 of {ID_BYTES}-byte digests is expected")
    if len(blocks) % ID_BYTES:
        rows.fail(f"b has {len(blocks)} bytes", f"base64 of {ID_BYTES}-byte digests is expected")
    return blocks


def _priority(rows: Rows, row: Row) -> int:
    return min(max(rows.whole(row, "priority", default=0), PRIORITIES.start), PRIORITIES.stop - 1)


def _blocks(rows: Rows, row: Row, block_tokens: int) -> tuple[int, bytes]:
    """Length of a prompt, and its full blocks."""
    inputs, ids = rows.count(row, "input_length"), rows.ids(row, "hash_ids")
    check_size(rows, len(ids), inputs, block_tokens)
    return inputs, chained(ids[: inputs // block_tokens])


def check_size(rows: Rows, count: int, inputs: int, block_tokens: int) -> None:
    """Refuse ids that cannot be those of blocks of this size; a part of a block, or a little padding, may be there or not."""
    blocks = inputs / block_tokens
    if abs(count - blocks) > 1 + 0.02 * blocks:
        each = f", about {round(inputs / count)} each" if count else ""
        rows.fail(
            f"{count} block ids for {inputs} tokens{each}, in a trace of {block_tokens}-token blocks",
            "one size for all requests is expected; say which by --block-tokens if it is not the format's usual one",
        )
