"""What is to be warmed, as it was given: texts, conversations and token ids, with their names. Nothing is read here."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

Message = Mapping[str, Any]  # role, content, and whatever else a chat template reads
Tool = Mapping[str, Any]  # a function's description, as chat templates take it


@dataclass(frozen=True, slots=True)
class Text:
    """A prompt, or the beginning of prompts. where: the place to name in errors, `path` or `path:line`."""

    name: str
    text: str
    where: str


@dataclass(frozen=True, slots=True)
class Conversation:
    """Messages with contents of plain text. tools: None where there are none. where: as in Text."""

    name: str
    messages: tuple[Message, ...]
    tools: tuple[Tool, ...] | None
    where: str


@dataclass(frozen=True, slots=True)
class TokenIds:
    """A prompt that is tokenised already. tokens: int32-LE, none negative. where: as in Text."""

    name: str
    tokens: bytes
    where: str


Item = Text | Conversation | TokenIds


@dataclass(frozen=True, slots=True)
class Skipped:
    """Something that was found and left out, and why."""

    name: str
    reason: str


@dataclass(frozen=True, slots=True)
class Inputs:
    """All that was given, in the order it was given in. Names of items are unique and printable."""

    items: tuple[Item, ...]
    skipped: tuple[Skipped, ...]


class Names:
    """Hands out unique, printable names; the same names in the same order always come out the same."""

    def __init__(self) -> None:
        self._taken: set[str] = set()
        self._numbers: dict[
            str, int
        ] = {}  # the last one given to a name: ten thousand of one name take no square of time

    def take(self, wanted: str) -> str:
        """The name, or with a number behind it if it is taken."""
        wanted = name = printable(wanted)
        while name in self._taken:
            number = self._numbers[wanted] = self._numbers.get(wanted, 1) + 1
            name = f"{wanted} ({number})"
        self._taken.add(name)
        return name


def printable(text: str) -> str:
    """Text without anything that would move a terminal's cursor, turn its direction or not encode as UTF-8."""
    return text if text.isprintable() else "".join(each if each.isprintable() else "?" for each in text)
