"""Traces of prompts themselves, as tokens or as text: cut into blocks and named by their keys, as a store does."""

from collections.abc import Callable, Iterator
from typing import Any, Final

from tierkv.errors import TokensError
from tierkv.hints import NO_HINTS, Ending, Hints
from tierkv.keys import Key, chain, token_bytes
from tierkv.simulate.blocks import hashed
from tierkv.simulate.formats import Options, Source
from tierkv.simulate.request import ID_BYTES, Request
from tierkv.simulate.rows import Row, Rows
from tierkv.simulate.spool import session_name

BLOCK_TOKENS: Final = 16
TOKENS: Final = ("tokens", "token_ids", "prompt_token_ids", "input_ids")
TEXTS: Final = ("prompt", "text", "messages")
TIMES: Final = ("timestamp", "time_s", "time", "t")
SESSIONS: Final = ("session", "session_id", "conversation_id")
PERIOD_S: Final = 1.0
"""Between two requests of a trace without times."""
ROOT: Final = Key(b"prompts of a trace".ljust(32, b"\0"))

Tokenize = Callable[[Any], list[int]]  # a text, or messages as a chat template takes them


def prompts(rows: Rows, options: Options) -> Source:
    """One prompt per row: token ids, a text, or messages. Times are seconds; without them, one request a second."""
    block_tokens = options.block_tokens or BLOCK_TOKENS
    tokenize = _tokenizer(rows, options.tokenizer) if options.tokenizer else None

    def requests() -> Iterator[Request]:
        timed = next((field for field in TIMES if field in rows.first()), None)
        for number, row in enumerate(rows):
            time_s = rows.time(row, timed) if timed else number * PERIOD_S
            tokens = _tokens(rows, row, tokenize)
            keys = chain(ROOT, tokens, block_tokens=block_tokens)
            outputs = rows.count(row, "output_length", default=0)
            session = next((row[field] for field in SESSIONS if row.get(field) is not None), None)
            hints = NO_HINTS if session is None else Hints(session_name(hashed(f"session {session}")))
            blocks = b"".join(key[:ID_BYTES] for key in keys)
            yield Request(time_s, blocks, len(tokens) // 4, outputs, hints, Ending(output_tokens=outputs))

    return Source(block_tokens, requests())


def _tokens(rows: Rows, row: Row, tokenize: Tokenize | None) -> bytes:
    field = next((name for name in (*TOKENS, *TEXTS) if name in row), None)
    if field is None:
        rows.fail(
            f"no prompt (there is {', '.join(row) or 'nothing'})", f"one of {', '.join((*TOKENS, *TEXTS))} is expected"
        )
    given = row[field]
    if field in TEXTS and not (field == "prompt" and type(given) is list):
        expected = "a list of messages, objects with role and content," if field == "messages" else "a text"
        if not (_are_messages(given) if field == "messages" else type(given) is str):
            rows.fail(f"{field} is not {expected.split(',')[0]}", f"{expected} is expected")
        if tokenize is None:
            rows.fail(f"{field} is text", "say whose tokenizer reads it by --tokenizer: a model's folder or name")
        try:
            given = tokenize(given)
        except ValueError as error:
            rows.fail(f"{field}: {error}", "messages as the model's chat template takes them are expected")
    elif type(given) is not list:
        rows.fail(f"{field} is not a list", "a list of token ids is expected")
    try:
        return token_bytes(given)
    except TokensError as error:
        rows.fail(f"{field}: {error}", "a list of whole numbers is expected")


def _are_messages(given: object) -> bool:
    return type(given) is list and all(type(each) is dict for each in given)


def _tokenizer(rows: Rows, name: str) -> Tokenize:
    """The tokenizer of a transformers model."""
    try:
        from jinja2 import TemplateError
        from transformers import AutoTokenizer
    except ImportError:
        rows.fail("text needs a tokenizer", "pip install 'tierkv[engine]'")
    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(name)  # untyped in transformers
    except (OSError, ValueError) as error:
        rows.fail(
            f"tokenizer {name!r} cannot be loaded ({str(error).splitlines()[0]})",
            "a model's folder or name is expected",
        )

    def tokenize(given: Any) -> list[int]:
        templated = type(given) is list
        if templated:
            try:
                given = tokenizer.apply_chat_template(given, tokenize=False, add_generation_prompt=True)
            except TemplateError as error:
                raise ValueError(f"refused by the chat template ({error})") from None
        return list(tokenizer(given, add_special_tokens=not templated)["input_ids"])

    return tokenize
