"""From items to tokens, exactly those that tierkv's engine computes for the same prompt, and which characters they stand for.

The tokenizer is given, never loaded: no torch and no transformers here.
"""

from array import array
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any, Final, NoReturn

import numpy as np

from tierkv.errors import InputError, TokensError
from tierkv.keys import token_bytes
from tierkv.layout import TOKEN_BYTES
from tierkv.warm.items import Conversation, Item, Message, Skipped, Text, TokenIds, printable

Tokenizer = Any  # a transformers tokenizer, or what behaves like one; transformers is untyped here

# A template is a program of the model's: besides its own errors, these come of messages it was not made for.
_REFUSALS: Final = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError)
# Where users' words may begin, one of each kind that tokenizers cut apart: what these share, any other beginning shares.
_BEGINNINGS: Final = ("A", "7", ".", " x", "\n\nx")


@dataclass(frozen=True, slots=True)
class Document:
    """A prompt as tokens. tokens: int32-LE. text: what they stand for; None for what was given as token ids.

    starts, ends: of each token, in characters of `text`; None where there is no text, or a tokenizer that does not say.
    """

    name: str
    tokens: bytes
    text: str | None = None
    starts: "array[int] | None" = None
    ends: "array[int] | None" = None

    @property
    def num_tokens(self) -> int:
        """How many there are."""
        return len(self.tokens) // TOKEN_BYTES

    def span(self, first: int, end: int) -> tuple[int, int] | None:
        """Characters of `text` that tokens [first, end), at least one, stand for; spans in a row never go back.

        A character that is cut into several tokens belongs to all of them, and so may lie in two spans.
        """
        if self.starts is None or self.ends is None:
            return None
        return self.starts[first], self.ends[end - 1]


@dataclass(frozen=True, slots=True)
class Rendered:
    """Documents in the order of their items, without those that are skipped."""

    documents: tuple[Document, ...]
    skipped: tuple[Skipped, ...]


def render(
    items: Sequence[Item],
    tokenizer: Tokenizer | None,
    *,
    max_tokens: int,
    vocab_size: int,
    system_only: bool = False,
    as_message: bool = False,
    progress: Callable[[int], None] | None = None,
) -> Rendered:
    """Tokenise items as the engine does: `add` for texts, `chat_prompt` for conversations.

    A conversation that ends with an assistant's turn is rendered as it is, others up to where the assistant begins.
    max_tokens: longer documents are skipped, never cut.  tokenizer: may be None if all items are token ids.
    system_only: of conversations, what is the same whatever the user says first; texts and token ids have no turns and stay
    whole.  as_message: a text is what a user's first message begins with, in the model's chat template.
    progress: called with the number of items done, after each.
    Raises InputError for items that this model cannot take: no tokenizer or chat template, or ids it does not know.
    """
    documents: list[Document] = []
    skipped: list[Skipped] = []
    for number, item in enumerate(items, 1):
        if as_message and isinstance(item, Text):
            item = Conversation(item.name, ({"role": "user", "content": item.text},), None, item.where)
            document = _document(item, tokenizer, part=_message)
        else:
            document = _document(item, tokenizer, part=_head if system_only else None)
        if document is None or not document.tokens:
            skipped.append(Skipped(item.name, "empty"))
        elif document.num_tokens > max_tokens:
            reason = f"too long ({document.num_tokens:,} tokens, this model takes {max_tokens:,} at most)"
            skipped.append(Skipped(item.name, reason))
        else:
            _check_vocabulary(document, item, vocab_size)
            documents.append(document)
        if progress:
            progress(number)
    return Rendered(tuple(documents), tuple(skipped))


def _document(
    item: Item, tokenizer: Tokenizer | None, *, part: "Callable[[Conversation, Tokenizer], Document] | None"
) -> Document | None:
    if isinstance(item, TokenIds):
        return Document(item.name, item.tokens)
    if tokenizer is None:
        _fail(item, "text, and this model has no tokenizer", "give token ids, or a model with a tokenizer")
    if isinstance(item, Text):
        return _tokenised(item, item.text, tokenizer) if item.text.strip() else None
    if not getattr(tokenizer, "chat_template", None):
        _fail(
            item, "messages, and this model has no chat template", "render them yourself and give the text as a prompt"
        )
    return part(item, tokenizer) if part else _tokenised(item, _chat(item, item.messages, tokenizer), tokenizer)


def _tokenised(item: Item, text: str, tokenizer: Tokenizer) -> Document:
    # The very calls of Engine, and offsets beside the ids. A chat template writes the special tokens itself.
    own: dict[str, bool] = {"add_special_tokens": False} if isinstance(item, Conversation) else {}
    has_offsets = bool(getattr(tokenizer, "is_fast", False))
    if has_offsets:
        own["return_offsets_mapping"] = True
    encoded = tokenizer(text, verbose=False, **own)
    try:
        tokens = token_bytes(encoded["input_ids"])
    except TokensError as error:
        _fail(item, str(error), "a tokenizer of this model is expected")
    if not has_offsets:
        return Document(item.name, tokens, text)
    return Document(item.name, tokens, text, *_bounds(encoded["offset_mapping"]))


def _bounds(offsets: Iterable[tuple[int, int]]) -> "tuple[array[int], array[int]]":
    """Starts and ends that never go back: special tokens stand for no text and have (0, 0), also at the end of a text."""
    starts, ends = array("q"), array("q")
    last_start = last_end = 0
    for start, end in offsets:
        if start == end:
            start = end = last_end
        last_start, last_end = max(last_start, start), max(last_end, end)
        starts.append(last_start)
        ends.append(last_end)
    return starts, ends


def _chat(item: Conversation, messages: Sequence[Message], tokenizer: Tokenizer) -> str:
    from jinja2 import TemplateError  # of whoever renders templates; without templates nobody needs it

    tools = {"tools": list(item.tools)} if item.tools else {}
    begin_answer = messages[-1]["role"] != "assistant"
    try:
        text = tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=begin_answer, tokenize=False, **tools
        )
    except (TemplateError, *_REFUSALS) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        _fail(
            item,
            f"messages that the model's chat template refuses ({reason})",
            "messages as it takes them are expected",
        )
    return str(text)


def _head(item: Conversation, tokenizer: Tokenizer) -> Document:
    """What the first request of every conversation with these messages before the user's begins with.

    It cannot be had by rendering the messages before the user's alone: templates put in a system prompt of their own where
    there is none, raise without a user, or write tools into the user's turn. Nor can text be cut and then tokenised: the cut
    may lie within a token. So a real request is tokenised, as are requests with other words in the user's place, and those of
    its tokens are kept that all of them have and that end before their texts part.
    """
    users = [at for at, message in enumerate(item.messages) if message["role"] == "user"]
    before = item.messages[: users[0]] if users else item.messages
    user: Message = item.messages[users[0]] if users else {"role": "user", "content": _BEGINNINGS[0]}
    return _common(item, before, [user, *({**user, "content": words} for words in _BEGINNINGS)], tokenizer)


def _message(item: Conversation, tokenizer: Tokenizer) -> Document:
    """What every request begins with whose first message, a user's, begins with this text."""
    text = item.messages[0]["content"]
    turns: list[Message] = [{"role": "user", "content": text + words} for words in _BEGINNINGS]
    return _common(item, (), turns, tokenizer)


def _common(item: Conversation, before: Sequence[Message], turns: Sequence[Message], tokenizer: Tokenizer) -> Document:
    """The tokens of the first of these requests that all others have, too, before their texts part."""
    texts = [_chat(item, [*before, turn], tokenizer) for turn in turns]
    real, *others = (_tokenised(item, text, tokenizer) for text in texts)
    parting = min(_num_shared(texts[0], text) for text in texts[1:])
    num_tokens = min(_num_shared(_ids(real), _ids(other)) for other in others)
    if real.starts is None or real.ends is None:
        return Document(item.name, real.tokens[: num_tokens * TOKEN_BYTES], texts[0][:parting])
    num_tokens = min(num_tokens, bisect_right(real.ends, parting))
    text = texts[0][: real.ends[num_tokens - 1]] if num_tokens else ""
    return Document(
        item.name, real.tokens[: num_tokens * TOKEN_BYTES], text, real.starts[:num_tokens], real.ends[:num_tokens]
    )


def _num_shared(one: Sequence[object], other: Sequence[object]) -> int:
    """Length of the common beginning."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def _ids(document: Document) -> list[int]:
    ids: list[int] = np.frombuffer(document.tokens, "<i4").tolist()
    return ids


def _check_vocabulary(document: Document, item: Item, vocab_size: int) -> None:
    ids = np.frombuffer(document.tokens, "<i4")
    if ids.min() < 0 or ids.max() >= vocab_size:
        at = int(np.argmax((ids < 0) | (ids >= vocab_size)))
        _fail(item, f"token id {ids[at]} at position {at}", f"this model knows ids from 0 to {vocab_size - 1}")


def _fail(item: Item, what: str, expected: str) -> NoReturn:
    raise InputError(printable(f"{item.where}: {what}; {expected}"))
