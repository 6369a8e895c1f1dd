"""The command line as a user meets it: what it prints, what it exits with, and that no mistake ends in a traceback."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tierkv import __version__
from tierkv.cli import main
from tierkv.config import OPTIONS
from tierkv.keys import Namespace, chain, token_bytes
from tierkv.metrics import Metrics
from tierkv.testing import SMALL
from tierkv.tiers.base import Run

LLAMA_3_8B = {
    "model_type": "llama", "hidden_size": 4096, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_hidden_layers": 32, "torch_dtype": "bfloat16",
}  # fmt: skip
COMMANDS = ("demo", "generate", "config", "inspect", "size", "simulate", "explain", "stats", "warm")


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("TIERKV_")]:
        monkeypatch.delenv(name)


class Shell:
    """Runs commands in this process and keeps what the last one printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def run(self, *arguments: str) -> int:
        code = main(arguments)
        self.out, self.err = self._capsys.readouterr()
        return code

    def ok(self, *arguments: str) -> str:
        assert self.run(*arguments) == 0, self.err
        assert self.err == ""
        return self.out

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments, "--json"))

    def error(self, *arguments: str, code: int) -> str:
        assert self.run(*arguments) == code
        assert self.out == ""
        assert self.err.startswith("error: ")
        assert self.err.count("\n") == 1
        return self.err


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def test_version_is_printed(shell: Shell) -> None:
    assert shell.ok("--version") == f"tierkv {__version__}\n"


@pytest.mark.parametrize("arguments", [(), ("--help",), ("-h",)])
def test_help_names_every_command(shell: Shell, arguments: tuple[str, ...]) -> None:
    text = shell.ok(*arguments)
    assert all(command in text for command in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_can_print_json(shell: Shell, command: str) -> None:
    text = shell.ok(command, "--help")
    assert "--json" in text
    assert len(text) > 300


# --- config


def test_config_lists_every_option_with_its_origin(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("tierkv.toml").write_text('[host]\ncapacity = "3GiB"\n')
    monkeypatch.setenv("TIERKV_ENGINE_SEED", "5")
    lines = {line.split()[0]: line for line in shell.ok("config", "--set", "disk.path=kv").splitlines() if line.strip()}
    assert set(OPTIONS) <= set(lines)
    assert lines["host.capacity"].split()[1:3] == ["3GiB", "tierkv.toml:2"]
    assert lines["engine.seed"].split()[1:3] == ["5", "$TIERKV_ENGINE_SEED"]
    assert lines["disk.path"].split()[1:4] == ["kv", "--set", "disk.path"]
    assert lines["redis.url"].split()[1:3] == ["off", "default"]


def test_config_as_json_has_values_as_numbers(shell: Shell) -> None:
    options = shell.json("config", "--set", "host.capacity=2KiB", "-s", "redis.url=redis://u:geheim@h")
    assert set(options) == set(OPTIONS)
    assert options["host.capacity"]["value"] == 2048
    assert options["host.capacity"]["from"] == "--set host.capacity"
    assert options["disk.path"]["value"] is None
    assert options["redis.url"]["value"] == "redis://u:***@h"
    assert "geheim" not in shell.out


def test_brackets_in_a_value_are_not_markup(shell: Shell) -> None:
    assert "[bold]kv[/bold]" in shell.ok("config", "--set", "store.tenant=[bold]kv[/bold]")


# --- size


def test_size_tells_bytes_per_token_and_in_all(shell: Shell) -> None:
    Path("config.json").write_text(json.dumps(LLAMA_3_8B))
    size = shell.json("size", ".", "--context", "1000", "--batch", "3")
    assert (size["token_bytes"], size["total_bytes"], size["attention"]) == (131_072, 393_216_000, "GQA")
    text = shell.ok("size", "config.json", "--context", "1000", "--batch", "3")
    assert "131,072 bytes" in text
    assert "393,216,000 bytes = 375.00 MiB" in text


def test_size_tells_windowed_from_whole(shell: Shell) -> None:
    Path("config.json").write_text(json.dumps(LLAMA_3_8B | {"sliding_window": 4096}))
    size = shell.json("size", ".", "--context", "8192")
    assert (size["total_bytes"], size["whole_bytes"]) == (131_072 * 4096, 131_072 * 8192)
    assert "32 of them keep 4,096 tokens" in shell.ok("size", ".", "--context", "8192")


def test_size_takes_a_dtype_and_says_when_it_assumed_one(shell: Shell) -> None:
    Path("config.json").write_text(json.dumps({**LLAMA_3_8B, "torch_dtype": None}))
    assert "assumed" in shell.ok("size", ".")
    assert shell.json("size", ".", "--dtype", "fp8")["token_bytes"] == 65_536


# --- inspect


def stored(folder: Path) -> None:
    from tierkv.tiers.disk import DiskTier

    tier = DiskTier(folder, layout=SMALL, capacity_bytes=4 << 20, metrics=Metrics())
    root = Namespace("test", SMALL).root()
    tokens = token_bytes(list(range(3 * SMALL.block_tokens)))
    keys = tuple(chain(root, tokens, block_tokens=SMALL.block_tokens))
    blocks = [memoryview(bytearray(SMALL.block_bytes)) for _ in keys]
    assert tier.write(Run(root, root, 0, keys, tokens), blocks) == [True] * 3
    tier.close()


def test_inspect_tells_what_a_disk_folder_holds(shell: Shell, tmp_path: Path) -> None:
    stored(tmp_path / "kv")
    report = shell.json("inspect", "kv")
    assert (report["runs"], report["blocks"], report["tokens"]) == (1, 3, 3 * SMALL.block_tokens)
    assert report["payload_bytes"] == 3 * SMALL.block_bytes
    text = shell.ok("inspect", "kv")
    for name in ("runs", "tokens", "payload bytes", "codec", "newest"):
        assert name in text
    assert " s ago (" in text


@pytest.mark.redis
def test_inspect_tells_what_a_server_holds(shell: Shell) -> None:
    from tierkv.tiers.redis import RedisTier
    from tierkv.valkey import EmbeddedValkey

    with EmbeddedValkey() as server:
        tier = RedisTier(server.url, layout=SMALL, metrics=Metrics(), codec="raw")
        root = Namespace("test", SMALL).root()
        tokens = token_bytes(list(range(3 * SMALL.block_tokens)))
        keys = tuple(chain(root, tokens, block_tokens=SMALL.block_tokens))
        blocks = [memoryview(bytearray(SMALL.block_bytes)) for _ in keys]
        assert tier.write(Run(root, root, 0, keys, tokens), blocks) == [True] * 3
        report = shell.json("inspect", server.url)
        assert report["blocks"] == 3
        assert "blocks" in shell.ok("inspect", server.url)
        assert shell.json("inspect", server.url, "--prefix", "other")["blocks"] == 0
        tier.close()


# --- mistakes


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("sizes",), "No such command"),
        (("config", "--bad"), "No such option"),
        (("size",), "Missing argument"),
        (("size", "x", "--context", "0"), "--context"),
        (("size", "x", "--batch", "many"), "--batch"),
        (("config", "--set", "host.capcity=1"), "did you mean host.capacity?"),
        (("config", "--set", "host.capacity=0"), "host.capacity"),
        (("config", "--config", "absent.toml"), "absent.toml: No such file"),
        (("generate",), "give MODEL and PROMPT"),
        (("generate", "smollm2"), "give both"),
        (("generate", "smollm2", "two", "words"), "3 words given"),
        (("inspect", "absent"), "no folder and no URL"),
        (("inspect", "."), "no disk folder of tierkv"),
        (("inspect", "ftp://x"), "redis://"),
    ],
)
def test_misuse_is_one_line_and_exit_code_2(shell: Shell, arguments: tuple[str, ...], told: str) -> None:
    assert told in shell.error(*arguments, code=2)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("size", "absent"), "does not exist: give a model folder"),
        (("size", "."), "is not a model folder"),
        (("generate", "smollm2", " "), "the prompt is empty"),
        (("generate", "smollm2", "--file", "absent.txt"), "absent.txt: No such file"),
        (("generate", "smollm2", "--file", "."), "Is a directory"),
        (("inspect", "redis://127.0.0.1:1"), "127.0.0.1"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_exit_code_1(shell: Shell, arguments: tuple[str, ...], told: str) -> None:
    assert told in shell.error(*arguments, code=1)


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--temperature", "-1"), "temperature=-1"),
        (("--top-p", "0"), "top_p=0"),
        (("--top-k", "0"), "top_k=0"),
        (("--n", "0"), "n=0"),
        (("--n", "2"), "temperature"),
        (("--seed", "-1"), "seed=-1"),
        (("--stop", ""), "stop="),
    ],
)
def test_impossible_sampling_is_refused_before_the_model_is_loaded(
    shell: Shell, flags: tuple[str, ...], told: str
) -> None:
    assert told in shell.error("generate", "absent-model", "hello", *flags, code=2)


def test_text_file_that_is_not_text_is_refused(shell: Shell) -> None:
    Path("binary").write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in shell.error("generate", "smollm2", "--file", "binary", code=1)


def test_model_that_is_none_is_refused_by_generate(shell: Shell) -> None:
    assert "absent-model" in shell.error("generate", "./absent-model", "hello", code=1)


# --- as a process


def start(*arguments: str, **options: Any) -> "subprocess.Popen[str]":
    return subprocess.Popen(
        [sys.executable, "-m", "tierkv.cli", *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent, **options,
    )  # fmt: skip


@pytest.mark.parametrize("arguments", [("config",), ("config", "--json"), ("--help",)])
def test_reader_that_goes_away_is_no_error(arguments: tuple[str, ...]) -> None:
    read, write = os.pipe()
    os.close(read)
    closed = subprocess.run(
        [sys.executable, "-m", "tierkv.cli", *arguments],
        stdout=write, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parent.parent,
    )  # fmt: skip
    os.close(write)
    assert closed.stderr == ""
    assert closed.returncode == 1


def test_interrupt_is_a_short_word_and_code_130(tmp_path: Path) -> None:
    # Blocked in reading its prompt from standard input when the signal comes.
    os.mkfifo(tmp_path / "prompt")
    process = start("generate", "smollm2", "--file", str(tmp_path / "prompt"))
    with (tmp_path / "prompt").open("w"):  # opens once the other side reads
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    assert (process.returncode, out, err) == (130, "", "interrupted\n")


def test_output_without_a_terminal_is_plain(tmp_path: Path) -> None:
    out, err = start("config").communicate()
    assert "\x1b" not in out
    assert err == ""


# --- with a model


@pytest.mark.model
def test_generate_prints_an_answer_and_where_its_prompt_came_from(shell: Shell) -> None:
    kept = ("--set", "disk.path=kv", "--set", "device.capacity=64MiB", "--set", "host.capacity=64MiB")
    asked = ("generate", "smollm2", "What is the capital of France? " * 8, "--max-tokens", "8", *kept)
    assert shell.run(*asked) == 0, shell.err
    answer, figures = shell.out, shell.err
    assert answer.strip()
    assert "prompt tokens" in figures
    assert shell.run(*asked, "--json") == 0, shell.err
    report = json.loads(shell.out)
    assert report["samples"][0]["text"].strip() == answer.strip()
    assert report["samples"][0]["finish_reason"] in ("length", "stop")
    assert report["stats"]["sources"]["disk"] >= 48
    assert sum(report["stats"]["sources"].values()) == report["stats"]["prompt_tokens"]


@pytest.mark.model
def test_raw_prompt_and_several_answers(shell: Shell) -> None:
    sampled = ("--raw", "--n", "2", "--temperature", "1", "--seed", "3", "--max-tokens", "6", "--quiet")
    assert shell.run("generate", "smollm2", "Once upon a time", *sampled) == 0, shell.err
    assert shell.err == ""
    assert "\n\n[2] " in shell.out
