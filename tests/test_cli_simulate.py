"""`tierkv simulate` as a user meets it: figures, files, and mistakes that end in one line."""

import gzip
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tierkv.cli import main
from tierkv.policies import NAMES
from tierkv.simulate.study import default_policy

BLOCK = 512
TIERS = "device=30blocks,host=50%,disk=100%:copy_down=spill"


def row(time_ms: int, ids: list[int], **more: Any) -> str:
    return json.dumps(
        {"timestamp": time_ms, "input_length": len(ids) * BLOCK, "output_length": 20, "hash_ids": ids} | more
    )


def conversations(count: int, turns: int = 3) -> list[list[int]]:
    """Prompts that grow by turns, interleaved; each has three new blocks a turn after a common first one."""
    return [
        [0, *(1 + number * 100 + block for block in range(3 * turn))]
        for turn in range(1, turns + 1)
        for number in range(count)
    ]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("TIERKV_")]:
        monkeypatch.delenv(name)
    lines = [row(1000 * at, ids) for at, ids in enumerate(conversations(20))]
    (tmp_path / "talk.jsonl.gz").write_bytes(gzip.compress("\n".join(lines).encode()))
    return tmp_path


class Shell:
    """Runs commands in this process and keeps what the last one printed."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self._capsys = capsys
        self.out = self.err = ""

    def run(self, *arguments: str) -> int:
        code = main(("simulate", *arguments))
        self.out, self.err = self._capsys.readouterr()
        return code

    def ok(self, *arguments: str) -> str:
        assert self.run(*arguments) == 0, self.err
        assert self.err == ""
        return self.out

    def json(self, *arguments: str) -> Any:
        return json.loads(self.ok(*arguments, "--json"))

    def error(self, *arguments: str) -> str:
        assert self.run(*arguments) in (1, 2)
        assert self.out == ""
        assert self.err.startswith("error: ") and self.err.count("\n") == 1
        return self.err


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


def rates(document: Any, policy: str) -> list[float]:
    return [each["block_hit_rate"] for each in document["cells"] if each["policy"] == policy]


def test_figures_are_those_of_the_trace(shell: Shell) -> None:
    found = shell.json("talk.jsonl.gz", "-p", "lru,belady,unbounded", "--capacity", "10%,100%")
    assert (found["trace"], found["requests"], found["block_tokens"]) == ("talk", 60, BLOCK)
    assert (found["block_refs"], found["unique_blocks"]) == (20 * (4 + 7 + 10), 1 + 20 * 9)
    ideal = (20 - 1 + 20 * 4 + 20 * 7) / 420  # what was seen before: the common block, then the turns before
    assert rates(found, "unbounded") == [pytest.approx(ideal)]
    low, high = rates(found, "lru")
    assert low < high == pytest.approx(ideal)
    assert low <= rates(found, "belady")[0] <= ideal
    assert [each["capacity_blocks"] for each in found["cells"][:2]] == [18, 181]


def test_the_default_is_what_a_store_uses_beside_lru_and_the_bounds(shell: Shell) -> None:
    found = shell.json("talk.jsonl.gz")
    names = {each["policy"] for each in found["cells"]}
    assert names == {"lru", default_policy(), "belady", "unbounded"}
    assert len({each["capacity_blocks"] for each in found["cells"] if each["policy"] == "lru"}) == 6


def test_all_are_all(shell: Shell) -> None:
    found = shell.json("talk.jsonl.gz", "-p", "all", "--capacity", "20%")
    assert {each["policy"] for each in found["cells"]} == {*NAMES, "belady", "unbounded"}
    assert all(rate <= rates(found, "belady")[0] for each in NAMES for rate in rates(found, each))


def test_several_processes_find_what_one_does(shell: Shell) -> None:
    arguments = ("talk.jsonl.gz", "-p", "all", "--capacity", "5%,20%", "--tiers", TIERS)
    one, three = shell.json(*arguments), shell.json(*arguments, "--jobs", "3")
    for document in (one, three):
        for each in document["cells"]:
            del each["us_per_ref"]
    assert one == three
    assert one["cells"] and one["timed"]


def test_bytes_are_blocks_of_the_model(shell: Shell) -> None:
    def blocks(*arguments: str) -> int:
        (only,) = shell.json("talk.jsonl.gz", "-p", "lru", *arguments)["cells"]
        return int(only["capacity_blocks"])

    assert blocks("--capacity", "1GiB") == 2**30 // (BLOCK * 131_072)
    assert blocks("--capacity", "1GiB", "--block-bytes", "32MiB") == 32
    Path("config.json").write_text(
        json.dumps({"model_type": "llama", "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 8,
                    "num_hidden_layers": 16, "torch_dtype": "bfloat16"})
    )  # fmt: skip
    assert blocks("--capacity", "1GiB", "--model", ".") == 2**30 // (BLOCK * 16 * 2 * 8 * 64 * 2)
    assert blocks("--capacity", "7blocks") == 7


def test_tiers_are_run_in_time(shell: Shell) -> None:
    found = shell.json(
        "talk.jsonl.gz", "-p", "lru", "--tiers", TIERS, "--load-factor", "1,20", "--prefill-rate", "4000"
    )
    assert found["cells"] == []
    usual, loaded = found["timed"]
    assert (usual["load_factor"], loaded["load_factor"]) == (1, 20)
    assert usual["ttft_s"]["p50"] < loaded["ttft_s"]["p50"]
    assert [tier["name"] for tier in usual["tiers"]] == ["device", "host", "disk"]
    assert usual["tiers"][0]["capacity_blocks"] == 30 and usual["tiers"][1]["capacity_blocks"] == 90
    text = shell.ok("talk.jsonl.gz", "-p", "lru", "--tiers", TIERS, "--capacity", "10%")
    assert "time to first token" in text and "block hits" in text


def test_the_tiers_of_the_configuration_are_run(shell: Shell) -> None:
    Path("tierkv.toml").write_text(
        '[device]\ncapacity = "2GiB"\n[host]\ncapacity = "4GiB"\ncopy_down = "second_use"\n'
        '[disk]\npath = "kv"\ncapacity = "8GiB"\n[redis]\nurl = "redis://nowhere"\n'
    )
    (run,) = shell.json("talk.jsonl.gz", "-p", "lru", "--tiers", "config")["timed"]
    assert {tier["name"]: tier["capacity_blocks"] for tier in run["tiers"]} == {
        "device": 32, "host": 64, "disk": 128, "redis": 181,
    }  # fmt: skip
    assert not Path("kv").exists()
    assert "device.capacity is off" in shell.error("talk.jsonl.gz", "--tiers", "config", "--set", "device.capacity=off")


def test_a_tier_may_have_a_policy_of_its_own(shell: Shell) -> None:
    # Five prompts in turn on a device of four, and one of them every other time: recency keeps the wrong ones.
    prompts = [[9] if at % 2 else [at // 2 % 5] for at in range(100)]
    Path("round.jsonl").write_text("\n".join(row(1000 * at, ids, output_length=0) for at, ids in enumerate(prompts)))

    def hits(own: str) -> int:
        (run,) = shell.json("round.jsonl", "-p", "lru", "--tiers", f"device=4blocks{own}")["timed"]
        assert run["policy"] == "lru"
        return int(run["tiers"][0]["hit_blocks"])

    assert hits("") == hits(":policy=lru") == 49
    assert hits(":policy=fifo") < 49


def test_hints_change_what_is_found(shell: Shell) -> None:
    arguments = ("talk.jsonl.gz", "-p", "lru", "--capacity", "20%")
    without, queue = shell.json(*arguments), shell.json(*arguments, "--hints", "queue")
    assert (without["hints"], queue["hints"]) == ("none", "queue")
    assert rates(queue, "lru")[0] > rates(without, "lru")[0]
    assert "hints: queue" in shell.ok(*arguments, "--hints", "queue")


def test_the_objective_is_the_configurations_unless_it_is_given(shell: Shell) -> None:
    arguments = ("talk.jsonl.gz", "-p", "adaptive,cost", "--capacity", "20%")
    assert shell.json(*arguments)["objective"] == "hits"
    given, configured = (
        shell.json(*arguments, "--objective", "seconds"),
        shell.json(*arguments, "-s", "store.objective=seconds"),
    )
    assert given["objective"] == configured["objective"] == "seconds"
    assert rates(given, "adaptive") == rates(given, "cost") == rates(configured, "cost")
    (run,) = shell.json("talk.jsonl.gz", "-p", "adaptive", "--tiers", TIERS, "--objective", "seconds")["timed"]
    (cost,) = shell.json("talk.jsonl.gz", "-p", "cost", "--tiers", TIERS)["timed"]
    assert run["ttft_s"] == cost["ttft_s"]


def test_several_traces_are_told_apart(shell: Shell) -> None:
    Path("other.jsonl").write_text("\n".join(row(at, [at % 3]) for at in range(30)))
    found = shell.json("talk.jsonl.gz", "other.jsonl", "-p", "lru", "--capacity", "50%")
    assert [each["trace"] for each in found["traces"]] == ["talk", "other"]
    text = shell.ok("talk.jsonl.gz", "other.jsonl", "-p", "lru", "--capacity", "50%")
    assert text.index("talk: 60 requests") < text.index("other: 30 requests")


def test_a_page_and_a_picture_are_written(shell: Shell) -> None:
    shell.ok("talk.jsonl.gz", "--capacity", "5%,20%", "--html", "out.html", "--plot", "out.png")
    page = Path("out.html").read_text()
    assert "<svg" in page and "tierkv simulate talk.jsonl.gz --policy=" in page
    assert str(Path.cwd()) not in page
    assert Path("out.png").read_bytes().startswith(b"\x89PNG")


# -- mistakes


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["talk.jsonl.gz", "-p", "best"], "--policy 'best': expected names of default, all, "),
        (["talk.jsonl.gz", "-p", ""], "--policy ''"),
        (["talk.jsonl.gz", "--capacity", "much"], "--capacity: capacity 'much': expected a share"),
        (["talk.jsonl.gz", "--capacity", "5%,"], "--capacity: capacity ''"),
        (["talk.jsonl.gz", "--capacity", "1MiB"], "less than one block (67108864 bytes)"),
        (["talk.jsonl.gz", "--tiers", "device=1MiB"], "less than one block"),
        (["talk.jsonl.gz", "--tiers", "disk=1TiB"], "device always"),
        (["talk.jsonl.gz", "--load-factor", "2"], "give --tiers as well"),
        (["talk.jsonl.gz", "--prefill-rate", "9"], "give --tiers as well"),
        (["talk.jsonl.gz", "--tiers", "device=50%", "--load-factor", "fast"], "--load-factor 'fast': expected numbers"),
        (["talk.jsonl.gz", "--tiers", "device=50%", "--load-factor", "0"], "from 0.001"),
        (["talk.jsonl.gz", "--tiers", "device=50%", "--prefill-rate", "-3"], "more than 0"),
        (["talk.jsonl.gz", "--tiers", "device=50%", "--token-time", "20"], "--token-time: time '20'"),
        (["talk.jsonl.gz", "--objective", "fame"], "--objective 'fame': expected one of hits, seconds"),
        (["talk.jsonl.gz", "--hints", "stars"], "must be none, all"),
        (["talk.jsonl.gz", "--model", ".", "--block-bytes", "1MiB"], "give one of them"),
        (["talk.jsonl.gz", "--block-bytes", "big"], "--block-bytes 'big': expected a size"),
        (["talk.jsonl.gz", "--model", "nothing-here"], "nothing-here"),
        (["talk.jsonl.gz", "--html", "no/such/out.html"], "there is no folder"),
        (["talk.jsonl.gz", "--jobs", "0"], "--jobs"),
        (["talk.jsonl.gz", "--format", "yours"], "format 'yours'"),
        (["absent.jsonl"], "absent.jsonl: No such file"),
        ([], "Missing argument"),
    ],
)
def test_a_mistake_is_one_line_that_says_what_was_expected(shell: Shell, arguments: list[str], says: str) -> None:
    assert says in shell.error(*arguments)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("{", "not JSON"),
        ("[1]", "not a JSON object"),
        (row(-5, [1]), "negative"),
        (row(500, [1], hash_ids="1"), "a list of block ids is expected"),
        (row(500, [1], hash_ids=[1.5]), "whole numbers or texts"),
        (row(500, [1], input_length=100_000), "one size "),
        (row(5, [1]), "sort the trace"),
    ],
)
def test_a_bad_line_is_named_with_its_number(shell: Shell, line: str, says: str) -> None:
    Path("bad.jsonl").write_text(f"{row(100, [1])}\n{row(200, [2])}\n{line}\n")
    message = shell.error("bad.jsonl")
    assert "bad.jsonl:3: " in message and says in message


@pytest.mark.parametrize(("text", "says"), [("", "no requests"), (row(0, [], input_length=100), "a full block")])
def test_a_trace_without_blocks_is_no_trace(shell: Shell, text: str, says: str) -> None:
    Path("empty.jsonl").write_text(text)
    assert says in shell.error("empty.jsonl")


def test_an_option_without_its_package_names_the_remedy(shell: Shell, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'tierkv[plot]'" in shell.error("talk.jsonl.gz", "--plot", "out.png")


# -- as a process


@pytest.mark.parametrize("jobs", ["1", "2"])
def test_control_c_prints_what_is_done_and_leaves_nothing(folder: Path, jobs: str) -> None:
    lines = (row(10 * at, ids) for at, ids in enumerate(conversations(200, turns=8)))
    (folder / "long.jsonl").write_text("\n".join(lines))
    sizes = ",".join(f"{number}blocks" for number in range(100, 3100))
    command = ["simulate", "long.jsonl", "-p", "lru", "--capacity", sizes, "--json", "--jobs", jobs]
    screen, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm", "COLUMNS": "100"}
    process = subprocess.Popen(
        [sys.executable, "-m", "tierkv.cli", *command],
        stdout=subprocess.PIPE,
        stderr=terminal,
        cwd=folder,
        env=environment | {"PYTHONPATH": str(Path(__file__).parent.parent)},
    )
    os.close(terminal)
    seen = b""
    while not re.search(rb" [1-9]\d* of 3000", seen):  # the bar says that some cells are done
        assert select.select([screen], [], [], 60)[0], seen
        seen = seen[-4000:] + os.read(screen, 4000)
    process.send_signal(signal.SIGINT)
    out, _ = process.communicate(timeout=60)
    os.close(screen)
    document = json.loads(out)
    assert process.returncode == 130
    assert document["interrupted"] is True
    assert 1 <= len(document["cells"]) < 3000


def test_a_trace_comes_through_a_pipe(folder: Path) -> None:
    command = [sys.executable, "-m", "tierkv.cli", "simulate", "-", "-p", "lru", "--capacity", "50%", "--json"]
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    result = subprocess.run(
        command, input=(folder / "talk.jsonl.gz").read_bytes(), capture_output=True, env=environment, check=True
    )
    assert json.loads(result.stdout)["trace"] == "stdin"
    assert result.stderr == b""
