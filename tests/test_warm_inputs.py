"""Inputs of warming: which files are read and as what, what is refused and how, and that tokens are those of the engine."""

import io
import json
import os
import socket
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from tests.engine_models import byte_model, byte_tokenizer
from tierkv.engine import Engine, EngineConfig, loading
from tierkv.errors import InputError
from tierkv.keys import token_bytes
from tierkv.warm.inputs import read_inputs
from tierkv.warm.items import Conversation, Inputs, Item, Text, TokenIds
from tierkv.warm.rendering import Document, Rendered, _bounds, render

LIMIT = 1 << 20
SYSTEM = {"role": "system", "content": "You keep the light."}
USER = {"role": "user", "content": "Who keeps it?"}
ANSWER = {"role": "assistant", "content": "You."}


def read(*inputs: str | Path, **options: Any) -> Inputs:
    return read_inputs([str(each) for each in inputs], **{"max_bytes": LIMIT, **options})


def names(inputs: Inputs) -> list[str]:
    return [item.name for item in inputs.items]


def skipped(inputs: Inputs | Rendered) -> dict[str, str]:
    return {each.name: each.reason for each in inputs.skipped}


def fill(folder: Path, *paths: str) -> Path:
    for path in paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        (folder / path).write_text(f"text of {path}")
    return folder


def line(tmp_path: Path, given: object) -> Item:
    """The item of one line of JSON."""
    path = tmp_path / "line.jsonl"
    path.write_bytes(given if isinstance(given, bytes) else json.dumps(given).encode())
    (item,) = read(path).items
    return item


# -- files and folders ----------------------------------------------------------------------------------------------------


def test_file_is_a_text_named_as_it_was_given(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fill(tmp_path, "a/b.md"))
    assert read("./a/b.md").items == (Text("./a/b.md", "text of a/b.md", "a/b.md"),)


def test_byte_order_mark_is_dropped_and_line_ends_are_those_of_text_mode(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\r\ntwo\rthree\n")
    (item,) = read(tmp_path / "a.txt").items
    assert isinstance(item, Text)
    assert item.text == "one\ntwo\nthree\n" == (tmp_path / "a.txt").read_text(encoding="utf-8-sig")


def test_folder_is_read_in_sorted_order_with_names_from_within_it(tmp_path: Path) -> None:
    fill(tmp_path, "b.md", "a/z.md", "a/b/c.md", "a.md", ".hidden.md", ".git/config", "a/.cache/x.md")
    assert names(read(tmp_path)) == ["a/b/c.md", "a/z.md", "a.md", "b.md"]


def test_names_do_not_depend_on_where_a_folder_lies(tmp_path: Path) -> None:
    one, two = (read(fill(tmp_path / where, "a/b.md", "c.md")) for where in ("x", "y/z"))
    assert names(one) == names(two) == ["a/b.md", "c.md"]


@pytest.mark.parametrize(
    ("glob", "found"),
    [
        ("**/*", ["a.md", "a.txt", "d/b.md", "d/e/c.md"]),
        ("*.md", ["a.md", "d/b.md", "d/e/c.md"]),
        ("**/*.md", ["a.md", "d/b.md", "d/e/c.md"]),
        ("d/*.md", ["d/b.md"]),
        ("d/**", ["d/b.md", "d/e/c.md"]),
        ("**/e/*", ["d/e/c.md"]),
        ("**/[ab].*", ["a.md", "a.txt", "d/b.md"]),
        ("a.t?t", ["a.txt"]),
    ],
)
def test_glob_filters_relative_paths(tmp_path: Path, glob: str, found: list[str]) -> None:
    assert names(read(fill(tmp_path, "a.md", "a.txt", "d/b.md", "d/e/c.md"), glob=glob)) == found


def test_pattern_that_the_shell_left_alone_is_expanded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fill(tmp_path, "docs/b.md", "docs/a.md", "docs/.c.md", "docs/d/e.md", "docs/f.txt"))
    assert names(read("docs/*.md")) == ["docs/a.md", "docs/b.md"]
    assert names(read("docs/**/*.md")) == names(read("do*/**/*.md")) == ["docs/a.md", "docs/b.md", "docs/d/e.md"]
    with pytest.raises(InputError, match=r"docs/\*\.rst: no file found; looked for"):
        read("docs/*.rst")


def test_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path: Path) -> None:
    assert len(read(fill(tmp_path, "a[1].md") / "a[1].md").items) == 1


def test_names_are_made_unique_and_printable(tmp_path: Path) -> None:
    for folder in ("x", "y", "z"):
        fill(tmp_path / folder, "a.md", "a.md (2)", "b\x1b[31m\n.md")
    (tmp_path / "x" / os.fsdecode(b"c\xff")).write_text("name that is not UTF-8")
    found = names(read(tmp_path / "x", tmp_path / "y", tmp_path / "z"))
    assert found[:4] == ["a.md", "a.md (2)", "b?[31m?.md", "c?"]
    assert found[4:7] == ["a.md (3)", "a.md (2) (2)", "b?[31m?.md (2)"]
    assert len(set(found)) == len(found) == 10


def test_what_is_only_found_and_of_no_use_is_skipped_with_its_reason(tmp_path: Path) -> None:
    fill(tmp_path, "good.md")
    (tmp_path / "latin.txt").write_bytes("Süd".encode("latin-1"))
    (tmp_path / "wide.txt").write_bytes("wide".encode("utf-16"))
    (tmp_path / "image").write_bytes(b"abc\0")
    (tmp_path / "empty.md").touch()
    (tmp_path / "blank.md").write_text(" \n\t\n")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "large.md").write_text("x" * 65)
    inputs = read(tmp_path, max_bytes=64)
    assert names(read(tmp_path, max_bytes=65)) == ["good.md", "large.md"]
    assert names(inputs) == ["good.md"]
    assert skipped(inputs) == {
        "blank.md": "empty",
        "empty.jsonl": "empty",
        "empty.md": "empty",
        "image": "not text (a zero byte at position 3)",
        "large.md": "too large (65 bytes, the limit is 64)",
        "latin.txt": "not UTF-8 text (byte 0xfc at position 1)",
        "wide.txt": "not text (a zero byte at position 3)",
    }
    for name in skipped(inputs):
        with pytest.raises(InputError, match=f"{name}: (not|too|empty).* is expected"):
            read(tmp_path / "good.md", tmp_path / name, max_bytes=64)


def test_large_sparse_file_is_refused_without_being_read(tmp_path: Path) -> None:
    with (tmp_path / "sparse.md").open("wb") as file:
        file.truncate(1 << 40)  # more than any memory
    with pytest.raises(InputError, match=r"too large \(1,099,511,627,776 bytes"):
        read(tmp_path / "sparse.md")
    assert "too large" in skipped(read(fill(tmp_path, "a.md")))["sparse.md"]


def test_pipes_sockets_and_devices_are_never_opened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fill(tmp_path, "a.md"))
    os.mkfifo("pipe")
    Path("link").symlink_to("pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("socket")  # relative: paths of sockets are short
        inputs = read(".")
    assert names(inputs) == ["a.md"]
    assert skipped(inputs) == dict.fromkeys(("link", "pipe", "socket"), "not a regular file")
    for special in ("pipe", "/dev/zero", "socket"):
        with pytest.raises(InputError, match="not a regular file"):
            read(special)


def test_file_that_may_not_be_read_is_skipped_or_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fill(tmp_path, "a.md", "shut.md", "closed/b.md"))
    tmp_path.chmod(0o755)
    Path("shut.md").chmod(0)
    Path("closed").chmod(0)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # root may read all
        inputs = read(".")
        with pytest.raises(InputError, match=r"shut\.md: not readable \(Permission denied\)"):
            read("shut.md")
        with pytest.raises(InputError, match="closed: Permission denied"):
            read("closed")
    finally:
        os.seteuid(user)
        Path("closed").chmod(0o755)
    assert names(inputs) == ["a.md"]
    assert skipped(inputs) == {
        "closed": "a folder that cannot be listed: Permission denied",
        "shut.md": "not readable (Permission denied)",
    }


def test_links_are_read_within_their_folder_and_lead_nowhere_else(tmp_path: Path) -> None:
    fill(tmp_path, "secret.md")
    folder = fill(tmp_path / "in", "..data/mounted.md", "d/a.md")
    for link, target in {
        "mounted.md": "..data/mounted.md",
        "outside.md": "../secret.md",
        "absolute.md": str(tmp_path / "secret.md"),
        "loop": ".",
        "d/up": "..",
        "self": "self",
        "broken": "nothing",
        "etc": "/etc",
    }.items():
        (folder / link).symlink_to(target)
    inputs = read(folder)
    assert names(inputs) == ["d/a.md", "mounted.md"]
    assert skipped(inputs) == {
        "absolute.md": "a link that leaves the folder",
        "broken": "a link that leads nowhere",
        "d/up": "a link to a folder, which is not followed",
        "etc": "a link that leaves the folder",
        "loop": "a link to a folder, which is not followed",
        "outside.md": "a link that leaves the folder",
        "self": "a link that leads nowhere",
    }
    assert names(read(str(folder / "**/*.md"))) == [f"{folder}/d/a.md", f"{folder}/mounted.md"]
    (tmp_path / "door").symlink_to(folder)
    assert names(read(tmp_path / "door")) == ["d/a.md", "mounted.md"]  # a folder may be named by a link


def test_ten_thousand_files_are_read_in_linear_time(tmp_path: Path) -> None:
    for number in range(10_000):
        if not number % 1000:
            (tmp_path / f"{number:05}").mkdir()
        (tmp_path / f"{number // 1000 * 1000:05}" / f"{number}.md").write_bytes(b"same")
    started = time.process_time()
    inputs = read(tmp_path)
    assert len(inputs.items) == 10_000
    assert time.process_time() - started < 20  # one second is usual; a square of the number would be minutes


def test_nothing_to_read_is_an_error_that_says_what_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no input given"):
        read()
    with pytest.raises(InputError, match=r"no file found; looked for files that match \*\*/\*\.rst and are UTF-8"):
        read(fill(tmp_path, "a.md"), glob="**/*.rst")
    (tmp_path / "a.md").write_bytes(b"\0")
    with pytest.raises(InputError, match=r"nothing that can be used; .* left out: a\.md \(not text"):
        read(tmp_path)
    with pytest.raises(InputError, match="missing: No such file or directory; give"):
        read(tmp_path, tmp_path / "missing")
    with pytest.raises(InputError, match=r"null byte; give|null character"):
        read("a\0b")


# -- standard input -------------------------------------------------------------------------------------------------------


def test_standard_input_is_text_or_lines_of_json_by_its_first_line() -> None:
    assert read("-", stdin=io.BytesIO(b"hello\n")).items == (Text("-", "hello\n", "-"),)
    assert read("-", stdin=io.BytesIO(b'{"prompt":\n')).items == (Text("-", '{"prompt":\n', "-"),)
    assert read("-", stdin=io.BytesIO(b'\xef\xbb\xbf\n \n{"prompt": "a"}\n')).items == (Text("-:3", "a", "-:3"),)
    as_text = read("-", stdin=io.BytesIO(b'{"prompt": "a"}'), stdin_format="text")
    assert as_text.items == (Text("-", '{"prompt": "a"}', "-"),)
    with pytest.raises(InputError, match="-:1: not JSON"):
        read("-", stdin=io.BytesIO(b"hello"), stdin_format="jsonl")


def test_standard_input_that_cannot_be_used_is_an_error(tmp_path: Path) -> None:
    for data, reason in ((b"", "empty"), (b"\xff", "not UTF-8 text"), (b"x" * 99, r"too large \(more than 64 bytes")):
        with pytest.raises(InputError, match=f"-: standard input is {reason}"):
            read("-", stdin=io.BytesIO(data), max_bytes=64)
    with pytest.raises(InputError, match="no standard input"):
        read("-")
    with pytest.raises(InputError, match="give it once"):
        read("-", "-", stdin=io.BytesIO(b"x"))
    with Path("/dev/zero").open("rb") as endless, pytest.raises(InputError, match="too large"):
        read("-", stdin=endless)


# -- lines of JSON --------------------------------------------------------------------------------------------------------


def test_lines_of_json_become_items_in_order(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [
        {"prompt": "one"},
        {"messages": [SYSTEM, USER], "id": 7, "score": 0.5},
        {"token_ids": [1, 2], "name": "ids"},
        {"tokens": [3], "prompt": None, "name": None},
    ]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(json.dumps(row).encode() for row in rows) + b"\r\n")
    assert read(path).items == (
        Text(f"{path}:1", "one", f"{path}:1"),
        Conversation("7", (SYSTEM, USER), None, f"{path}:3"),
        TokenIds("ids", token_bytes([1, 2]), f"{path}:5"),
        TokenIds(f"{path}:7", token_bytes([3]), f"{path}:7"),
    )
    assert names(read(tmp_path)) == ["a.jsonl:1", "7", "ids", "a.jsonl:7"]


def test_lines_end_at_line_feeds_alone(tmp_path: Path) -> None:
    (tmp_path / "a.ndjson").write_text('{"prompt": "one\u2028two\x85three"}\n{"prompt": "x"}')
    assert [item.text for item in read(tmp_path).items if isinstance(item, Text)] == ["one\u2028two\x85three", "x"]


def test_content_in_parts_is_their_text_and_other_fields_stay(tmp_path: Path) -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}
    item = line(tmp_path, {"messages": [{"role": "user", "content": parts}, call], "tools": [{"type": "function"}]})
    assert isinstance(item, Conversation)
    assert item.messages == ({"role": "user", "content": "one\ntwo"}, call | {"content": ""})
    assert item.tools == ({"type": "function"},)


def test_what_json_allows_and_does_no_harm_is_fine(tmp_path: Path) -> None:
    item = line(tmp_path, b'{"prompt": "a", "prompt": "b", "score": NaN, "name": "", "id": [1]}')
    assert (item.name, isinstance(item, Text) and item.text) == (f"{tmp_path}/line.jsonl:1", "b")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (b'{"prompt": "a"', 'not JSON (Expecting \',\' delimiter): {"prompt": "a"; a JSON object with one of prompt,'),
        (b'["a"]', 'not a JSON object: ["a"]; '),
        (b'{"prompt": "\xff"}', "not UTF-8 (byte 0xff); "),
        (b'{"prompt": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", "JSON that is nested too deeply: {"),
        (b'{"tokens": [1' + b"0" * 5000 + b"]}", "not JSON (a number of too many digits)"),
        (b"\x1b[2J", "not JSON (Expecting value): ?[2J; "),
        ({"text": "a", "b": 1}, "a line with text, b; a JSON object with one of prompt, messages, tokens or token_ids"),
        ({}, "a line with nothing; "),
        ({"prompt": "a", "tokens": [1]}, "a line with prompt, tokens; "),
        ({"tokens": [1], "token_ids": [1]}, "a line with tokens, token_ids; "),
        ({"prompt": ["a"]}, "prompt is a list of 1; a text is expected"),
        (b'{"prompt": NaN}', "prompt is NaN; a text is expected"),
        ({"prompt": "a\ud800"}, "prompt has half a surrogate pair, '\\ud800'; whole characters"),
        ({"prompt": "a", "name": "x" * 513}, "name of 513 characters; at most 512 are expected"),
        ({"messages": []}, "messages is a list of 0; a list of objects with role and content is expected"),
        ({"messages": "hi"}, 'messages is "hi"; a list of objects'),
        ({"messages": [USER, "hi"]}, 'message 2 is "hi"; an object with role and content'),
        ({"messages": [{"content": "hi"}]}, 'role of message 1 is null; a text is expected, such as "system"'),
        ({"messages": [{"role": "user"}]}, "content of message 1 is null; a text is expected"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "has the part an object of 1; parts of"),
        ({"messages": [{"role": "user", "content": "", "x": ["\udfff"]}]}, "messages has half a surrogate pair"),
        ({"messages": [USER], "tools": [{"name": "\ud800"}]}, "tools has half a surrogate pair"),
        ({"messages": [USER], "tools": {"a": 1}}, "tools is an object of 1; a list of objects is expected"),
        ({"messages": [USER], "tools": ["f"]}, "tools is a list of 1; a list of objects is expected"),
        ({"tokens": "1 2"}, 'tokens is "1 2"; a list of token ids is expected'),
        ({"tokens": [1, 2.0]}, "tokens has 2.0 at position 1; whole numbers from 0 are expected"),
        ({"tokens": [True]}, "tokens has true at position 0; "),
        (b'{"tokens": [NaN]}', "tokens has NaN at position 0; "),
        ({"token_ids": [0, -1]}, "token_ids has -1 at position 1; "),
        ({"token_ids": [2**31]}, "token_ids has 2147483648 at position 0; "),
        ({"token_ids": [10**100]}, "token_ids has a number of 333 bits at position 0; "),
    ],
)
def test_bad_line_is_an_error_in_one_line_with_its_place(tmp_path: Path, given: object, message: str) -> None:
    path = fill(tmp_path, "good.md") / "bad.jsonl"
    path.write_bytes(b'{"prompt": "fine"}\n\n' + (given if isinstance(given, bytes) else json.dumps(given).encode()))
    for found in (path, tmp_path):  # also when it was only found
        with pytest.raises(InputError) as raised:
            read(found)
        text = str(raised.value)
        assert text.startswith(f"{path}:3: ") and message in text
        assert text.isprintable() and len(text) < 400


# -- tokens ---------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> Iterator[Engine]:
    """An engine over bytes, whose prompts begin with a token of their own, as many models' do."""
    tokenizer = byte_tokenizer()
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<begin> $A <end>", special_tokens=[("<begin>", 257), ("<end>", 256)]
    )
    with Engine(byte_model(), tokenizer, EngineConfig(dtype="float32", num_pages=8)) as engine:
        yield engine


@pytest.fixture(scope="module")
def smollm2() -> Iterator[Engine]:
    with Engine(
        *loading.load("smollm2", EngineConfig(dtype="float32")), EngineConfig(dtype="float32", num_pages=64)
    ) as it:
        yield it


def rendered(engine: Engine, *items: Item, **options: Any) -> Rendered:
    vocab_size = engine._vocabulary
    return render(items, engine.tokenizer, **{"max_tokens": 2000, "vocab_size": vocab_size, **options})


def document(engine: Engine, item: Item, **options: Any) -> Document:
    (only,) = rendered(engine, item, **options).documents
    return only


def talk(*messages: dict[str, str], tools: tuple[dict[str, Any], ...] | None = None) -> Conversation:
    return Conversation("talk", messages, tools, "talk.jsonl:1")


def texts(found: Document, *, block_tokens: int) -> list[str]:
    """The text of each block."""
    assert found.text is not None
    spans = [found.span(at, at + block_tokens) for at in range(0, found.num_tokens - block_tokens + 1, block_tokens)]
    return [found.text[span[0] : span[1]] for span in spans if span]


def check_same_as_engine(engine: Engine) -> None:
    for text in ("hello", "  two spaces\n\n\nlines", "Süd 🙂🙂 字", "<|im_start|>x<begin>y", "x" * 300, "naïve\0zero"):
        found = document(engine, Text("a", text, "a"))
        assert found.tokens == engine._tokens(text).tobytes()
        assert found.text == text
    for messages in ([SYSTEM, USER], [USER], [USER, ANSWER, USER]):
        assert document(engine, talk(*messages)).tokens == token_bytes(engine.chat_prompt(messages))


def test_tokens_are_those_of_the_engine(tiny: Engine) -> None:
    check_same_as_engine(tiny)


@pytest.mark.model
def test_tokens_are_those_of_the_engine_with_a_real_model(smollm2: Engine) -> None:
    check_same_as_engine(smollm2)


@pytest.mark.model
def test_conversation_that_ends_with_an_answer_is_what_its_continuation_begins_with(smollm2: Engine) -> None:
    ended = document(smollm2, talk(SYSTEM, USER, ANSWER))
    assert document(smollm2, talk(SYSTEM, USER, ANSWER, USER)).tokens.startswith(ended.tokens)
    assert (ended.text or "").endswith("You.<|im_end|>\n")


@pytest.mark.model
def test_spans_of_a_real_model_tile_the_text(smollm2: Engine) -> None:
    text = "The light is kept by nobody; it keeps itself. " * 20 + "Süd 🙂🙂 字" * 20
    found = document(smollm2, Text("a", text, "a"))
    spans = [found.span(at, at + 16) for at in range(0, found.num_tokens - 15, 16)]
    told = [span for span in spans if span]
    assert told[0][0] == 0 and len(told) == found.num_tokens // 16 > 10
    assert all(text[then[0] : now[1]] in ("", "🙂", "字") and then[0] <= now[1] for now, then in pairwise(told))
    assert found.span(0, found.num_tokens) == (0, len(text))


def test_special_tokens_stand_for_no_text(tiny: Engine) -> None:
    found = document(tiny, Text("a", "é" * 3, "a"))  # <begin>, two tokens each, <end>
    assert [found.span(at, at + 1) for at in range(8)] == [
        (0, 0),
        (0, 1),
        (0, 1),
        (1, 2),
        (1, 2),
        (2, 3),
        (2, 3),
        (3, 3),
    ]
    assert found.span(0, 8) == (0, 3)
    assert texts(found, block_tokens=4) == ["éé", "éé"]


def test_token_ids_have_no_text(tiny: Engine) -> None:
    found = document(tiny, TokenIds("a", token_bytes([1, 2, 257]), "a"))
    assert (found.tokens, found.text, found.span(0, 3)) == (token_bytes([1, 2, 257]), None, None)


def test_tokenizer_that_knows_no_offsets_gives_the_same_tokens_without_them(tiny: Engine) -> None:
    class Slow:
        """What a tokenizer in pure Python offers."""

        chat_template = tiny.tokenizer.chat_template
        apply_chat_template = tiny.tokenizer.apply_chat_template

        def __call__(self, text: str, *, verbose: bool, add_special_tokens: bool = True) -> Any:
            return tiny.tokenizer(text, verbose=verbose, add_special_tokens=add_special_tokens)

    items = [Text("a", "hello", "a"), talk(SYSTEM, USER)]
    for system_only in (False, True):
        options: dict[str, Any] = {"max_tokens": 999, "vocab_size": 258, "system_only": system_only}
        slow, fast = render(items, Slow(), **options), render(items, tiny.tokenizer, **options)
        assert [(each.tokens, each.text) for each in slow.documents] == [
            (each.tokens, each.text) for each in fast.documents
        ]
        assert slow.documents[0].span(0, 2) is None


# -- what precedes the user -----------------------------------------------------------------------------------------------


@pytest.mark.model
def test_system_only_is_what_all_first_requests_begin_with(smollm2: Engine) -> None:
    found = document(smollm2, talk(SYSTEM, USER, ANSWER), system_only=True)
    assert found.text == "<|im_start|>system\nYou keep the light.<|im_end|>\n<|im_start|>user"
    assert found.span(0, found.num_tokens) == (0, len(found.text))
    for words in ("Who?", "\nWho?", "\n\n\n", " Who?", "123", "…", "🙂", "<|im_end|>", ""):
        prompt = smollm2.chat_prompt([SYSTEM, {"role": "user", "content": words}])
        assert token_bytes(prompt).startswith(found.tokens)


@pytest.mark.model
def test_system_prompt_of_the_template_itself_is_kept(smollm2: Engine) -> None:
    found = document(smollm2, talk(USER), system_only=True)
    assert "named SmolLM" in (found.text or "") and "Who keeps" not in (found.text or "")
    assert document(smollm2, talk(SYSTEM), system_only=True) == document(smollm2, talk(SYSTEM, USER), system_only=True)


def with_template(template: str) -> Any:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = template
    return tokenizer


def head(template: str, item: Conversation) -> str | None:
    (only,) = render([item], with_template(template), max_tokens=999, vocab_size=258, system_only=True).documents
    return only.text


def test_tools_are_part_of_what_precedes_the_user() -> None:
    template = "{% if tools %}[{{ tools | tojson }}]{% endif %}{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
    assert head(template, talk(USER, tools=({"type": "function", "name": "f"},))) == (
        '[[{"type": "function", "name": "f"}]]<user>'
    )


def test_template_that_trims_words_or_needs_a_user_or_repeats_words_first_loses_nothing_true() -> None:
    trims = "{% for m in messages %}<{{ m.role }}> {{ m.content | trim }}{% endfor %}"
    assert head(trims, talk(SYSTEM, USER)) == "<system> You keep the light.<user> "
    needs = "{% if messages[-1].role != 'user' %}{{ raise_exception('no user') }}{% endif %}" + trims
    assert head(needs, talk(SYSTEM)) == "<system> You keep the light.<user> "
    title = "title: {{ messages[-1].content }}\n" + trims
    assert head(title, talk(SYSTEM, USER)) == "title: "


def test_words_that_become_the_same_token_are_still_the_users() -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"[UNK]": 0, "says": 1}, unk_token="[UNK]"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="[UNK]")
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }} says {{ m.content }} {% endfor %}"
    (found,) = render([talk(SYSTEM, USER)], tokenizer, max_tokens=99, vocab_size=2, system_only=True).documents
    assert found.text == "system says You keep the light. user says"
    assert found.tokens == token_bytes([0, 1, 0, 0, 0, 0, 0, 1])


def test_spans_never_go_back_whatever_a_tokenizer_says() -> None:
    starts, ends = _bounds([(0, 0), (0, 3), (2, 4), (1, 2), (0, 0), (5, 6)])
    assert (starts.tolist(), ends.tolist()) == ([0, 0, 2, 2, 4, 5], [0, 3, 4, 4, 4, 6])


def test_texts_and_token_ids_stay_whole_with_system_only(tiny: Engine) -> None:
    items = [Text("a", "hello", "a"), TokenIds("b", token_bytes([1]), "b")]
    assert rendered(tiny, *items, system_only=True) == rendered(tiny, *items)


# -- what a model cannot take ---------------------------------------------------------------------------------------------


def test_too_long_and_empty_items_are_skipped_never_cut(tiny: Engine) -> None:
    done: list[int] = []
    items = [Text("a", "x" * 8, "a"), Text("b", "x" * 9, "b"), Text("c", " \n", "c"), TokenIds("d", b"", "d")]
    found = rendered(tiny, *items, max_tokens=10, progress=done.append)
    assert [(each.name, each.num_tokens) for each in found.documents] == [("a", 10)]
    assert skipped(found) == {"b": "too long (11 tokens, this model takes 10 at most)", "c": "empty", "d": "empty"}
    assert done == [1, 2, 3, 4]


def test_text_needs_a_tokenizer_and_messages_a_template(tiny: Engine) -> None:
    ids = TokenIds("c", token_bytes([5]), "c")
    assert render([ids], None, max_tokens=9, vocab_size=9).documents[0].tokens == ids.tokens
    for item in (Text("a", "hello", "a.md"), talk(USER)):
        with pytest.raises(InputError, match=f"{item.where}: text, and this model has no tokenizer; give token ids"):
            render([item], None, max_tokens=9, vocab_size=9)
    with pytest.raises(InputError, match=r"talk\.jsonl:1: messages, and this model has no chat template; render them"):
        render([talk(USER)], with_template(""), max_tokens=9, vocab_size=9)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('no\nsystem') }}", "{{ messages[0].x.y }}", "{{ 1 / 0 }}", "{{ 'a' + 1 }}", "{% if %}"],
)
@pytest.mark.parametrize("system_only", [False, True])
def test_messages_that_a_template_refuses_are_an_error_in_one_line(template: str, system_only: bool) -> None:
    with pytest.raises(
        InputError, match=r"talk\.jsonl:1: messages that the model's chat template refuses \(.+\); "
    ) as raised:
        render([talk(SYSTEM, USER)], with_template(template), max_tokens=9, vocab_size=9, system_only=system_only)
    assert str(raised.value).isprintable()


def test_ids_outside_the_vocabulary_are_an_error(tiny: Engine) -> None:
    with pytest.raises(InputError, match=r"a:3: token id 258 at position 1; this model knows ids from 0 to 257"):
        rendered(tiny, TokenIds("a", token_bytes([1, 258]), "a:3"))
    with pytest.raises(InputError, match="from 0 to 9"):  # another model's tokenizer
        rendered(tiny, Text("a", "hello", "a"), vocab_size=10)
