"""Lines of JSON that describe prompts: what each of them may say, and one clear error for a line that says something else.

    {"prompt": "text"}    {"messages": [{"role": "user", "content": "text"}], "tools": [...]}    {"token_ids": [1, 2, 3]}

`name` or `id`, a text or a whole number, names the prompt. Other fields are ignored; null is the same as absent.
"""

import json
from collections.abc import Iterator
from typing import Any, Final, NoReturn

from tierkv.errors import InputError
from tierkv.keys import token_bytes
from tierkv.warm.items import Conversation, Item, Message, Text, TokenIds, Tool, printable

Row = dict[str, Any]  # as JSON gives it

_PROMPTS: Final = ("prompt", "messages", "tokens", "token_ids")
_EXPECTED: Final = "a JSON object with one of prompt, messages, tokens or token_ids is expected"
_MARK: Final = "\ufeff".encode()  # a byte order mark
_MAX_NAME: Final = 512
_MAX_TOKEN: Final = 2**31 - 1


def parse_lines(data: bytes, *, where: str, name: str) -> Iterator[Item]:
    """The prompts of a file, in order. where: its path, for errors; name: what names its lines that have no name.

    Raises InputError, `path:line: what is there, what is expected`.
    """
    for number, line in enumerate(data.removeprefix(_MARK).split(b"\n"), 1):
        if line := line.strip():
            yield _Line(f"{where}:{number}").item(line, f"{name}:{number}")


def begins_with_object(data: bytes) -> bool:
    """Whether the first line that is not blank is a JSON object."""
    line, _, _ = data.removeprefix(_MARK).lstrip().partition(b"\n")
    try:
        return type(json.loads(line.decode())) is dict
    except (ValueError, RecursionError):
        return False


class _Line:
    """One line; where it is, is said in all its errors."""

    def __init__(self, where: str) -> None:
        self._where = where

    def item(self, line: bytes, name: str) -> Item:
        row = self._row(line)
        given = [field for field in _PROMPTS if row.get(field) is not None]
        if len(given) != 1:
            there = ", ".join(given) if given else _cut(", ".join(row)) or "nothing"
            self._fail(f"a line with {there}", _EXPECTED)
        name = self._name(row) or name
        if given == ["prompt"]:
            return Text(name, self._text(row["prompt"], "prompt"), self._where)
        if given == ["messages"]:
            return self._conversation(row, name)
        return TokenIds(name, self._tokens(row[given[0]], given[0]), self._where)

    def _row(self, line: bytes) -> Row:
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            self._fail(f"not UTF-8 (byte 0x{line[error.start]:02x})", _EXPECTED)
        except RecursionError:
            self._fail(f"JSON that is nested too deeply: {_short(line)}", _EXPECTED)
        except ValueError as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "a number of too many digits"
            self._fail(f"not JSON ({reason}): {_short(line)}", _EXPECTED)
        if type(row) is not dict:
            self._fail(f"not a JSON object: {_short(line)}", _EXPECTED)
        return row

    def _name(self, row: Row) -> str | None:
        for field in ("name", "id"):
            given = row.get(field)
            if type(given) not in (str, int) or not str(given).strip():
                continue
            if len(str(given)) > _MAX_NAME:
                self._fail(f"{field} of {len(str(given)):,} characters", f"at most {_MAX_NAME} are expected")
            return str(given)
        return None

    def _text(self, given: object, what: str) -> str:
        if type(given) is not str:
            self._fail(f"{what} is {_short(given)}", "a text is expected")
        self._check_unicode(given, what)
        return given

    def _check_unicode(self, text: str, what: str) -> None:
        try:
            text.encode()
        except UnicodeEncodeError as error:  # JSON can escape what UTF-8 cannot hold, and no tokenizer takes
            self._fail(
                f"{what} has half a surrogate pair, {error.object[error.start]!a}", "whole characters are expected"
            )

    def _conversation(self, row: Row, name: str) -> Conversation:
        given = row["messages"]
        if type(given) is not list or not given:
            self._fail(f"messages is {_short(given)}", "a list of objects with role and content is expected")
        messages = tuple(self._message(each, f"message {number}") for number, each in enumerate(given, 1))
        tools = row.get("tools")
        if tools is not None and (type(tools) is not list or not all(type(each) is dict for each in tools)):
            self._fail(f"tools is {_short(tools)}", "a list of objects is expected")
        self._check_all(messages, "messages")
        self._check_all(tools, "tools")
        own: tuple[Tool, ...] | None = tuple(tools) if tools else None
        return Conversation(name, messages, own, self._where)

    def _check_all(self, given: object, what: str) -> None:
        try:
            text = json.dumps(given, ensure_ascii=False)
        except RecursionError:  # the writer's limit is not quite the reader's
            self._fail(f"{what} nested too deeply", "an object as chat templates take it is expected")
        self._check_unicode(text, what)

    def _message(self, given: object, what: str) -> Message:
        if type(given) is not dict:
            self._fail(f"{what} is {_short(given)}", "an object with role and content is expected")
        role = given.get("role")
        if type(role) is not str or not role:
            self._fail(
                f"role of {what} is {_short(role)}", 'a text is expected, such as "system", "user" or "assistant"'
            )
        content = given.get("content")
        if content is None and given.get("tool_calls"):
            content = ""  # so the chat API has it for an assistant that only calls tools
        return given | {"content": self._content(content, f"content of {what}")}

    def _content(self, given: object, what: str) -> str:
        """Plain text, also of text in parts: most chat templates know no parts, and servers join them by line ends."""
        if type(given) is not list:
            return self._text(given, what)
        for part in given:
            if type(part) is not dict or part.get("type") != "text" or type(part.get("text")) is not str:
                self._fail(
                    f"{what} has the part {_short(part)}",
                    'parts of the form {"type": "text", "text": "…"} are expected',
                )
        return "\n".join(part["text"] for part in given)

    def _tokens(self, given: object, what: str) -> bytes:
        if type(given) is not list:
            self._fail(f"{what} is {_short(given)}", "a list of token ids is expected")
        if not set(map(type, given)) <= {int} or (given and not 0 <= min(given) <= max(given) <= _MAX_TOKEN):
            bad = next(at for at, each in enumerate(given) if type(each) is not int or not 0 <= each <= _MAX_TOKEN)
            self._fail(f"{what} has {_short(given[bad])} at position {bad}", "whole numbers from 0 are expected")
        return token_bytes(given)

    def _fail(self, what: str, expected: str) -> NoReturn:
        raise InputError(printable(f"{self._where}: {what}; {expected}"))


def _short(given: object) -> str:
    """What is there, as far as it fits in a line."""
    if isinstance(given, bytes):
        return _cut(given[:240].decode(errors="replace"))
    if isinstance(given, list | dict):
        return f"{'a list' if isinstance(given, list) else 'an object'} of {len(given):,}"
    if isinstance(given, int) and given.bit_length() > 256:
        return f"a number of {given.bit_length():,} bits"
    return _cut(json.dumps(given))


def _cut(text: str) -> str:
    return text if len(text) <= 60 else f"{text[:57]}..."
