"""`tierkv warm`: what is known in advance is computed once, kept where it should be, and nothing is lost to an interruption."""

import json
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.daemon_parts import running
from tests.test_cli import Shell
from tests.warm_parts import contents, ended, result, save_tiny, write_documents
from tierkv.config import Config, DiskConfig
from tierkv.tiers.disk_files import FolderLock
from tierkv.valkey import EmbeddedValkey

SHARED = "You are the keeper of a light. Answer from the handbook. " * 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "docs", count=12, words=12, shared=SHARED)


def tree(documents: list[bytes], *, block_tokens: int = 16) -> int:
    """Different tokens of the whole blocks of some documents."""
    cut = [one[: len(one) // block_tokens * block_tokens] for one in documents]
    return len({one[:end] for one in cut for end in range(1, len(one) + 1)})


def texts(folder: Path) -> list[bytes]:
    return [path.read_bytes() for path in sorted(folder.rglob("*.txt"))]


def options(tiny: Path, *more: str) -> list[str]:
    return ["--model", str(tiny), "--set", "device.kind=cpu", *more]


def test_every_different_token_is_computed_once(shell: Shell, tiny: Path, docs: Path) -> None:
    done = shell.json("warm", "docs", *options(tiny, "--set", "disk.path=kv"))
    assert done["unique_tokens"] == done["computed_tokens"] == tree(texts(docs))
    assert done["tokens"] == sum(map(len, texts(docs))) > 1.5 * done["unique_tokens"]
    assert done["tiers"] == [
        {"tier": "disk", "blocks": done["blocks"], "bytes": done["blocks"] * 6144, "missing": 0, "place": "kv"}
    ]
    assert len(contents(Path("kv"))) == done["blocks"]


def test_a_second_time_there_is_nothing_to_compute(shell: Shell, tiny: Path, docs: Path) -> None:
    first = shell.json("warm", "docs", *options(tiny, "--set", "disk.path=kv"))
    again = shell.json("warm", "docs", *options(tiny, "--set", "disk.path=kv"))
    assert (again["computed_tokens"], again["held_tokens"]) == (0, first["unique_tokens"])


def test_only_what_is_new_is_computed(shell: Shell, tiny: Path, docs: Path) -> None:
    shell.json("warm", "docs", *options(tiny, "--set", "disk.path=kv"))
    before = tree(texts(docs))
    (docs / "new.txt").write_text(SHARED + "Quite another document, which nobody has seen before it came here.")
    (docs / "short.txt").write_text("short")
    done = shell.json("warm", "docs", *options(tiny, "--set", "disk.path=kv"))
    assert done["unique_tokens"] == tree(texts(docs))
    # The block in which it departs is there of another document; all that follows is new.
    assert done["computed_tokens"] == tree(texts(docs)) - before


def test_the_kv_is_that_of_a_request(shell: Shell, tiny: Path, docs: Path) -> None:
    from tierkv import open_engine
    from tierkv.engine import SamplingParams

    shell.json("warm", "docs", *options(tiny, "--set", "disk.path=kv"))
    prompt = (docs / "03.txt").read_text() + "What comes next?"
    cold, warm = Config(), Config(disk=DiskConfig(path=Path("kv")))
    answers = []
    for config in (cold, warm):
        with open_engine(tiny, config) as (engine, _):
            answers.append(engine.generate(prompt, SamplingParams(max_tokens=12))[0])
    assert answers[0].token_ids == answers[1].token_ids
    assert answers[1].stats.sources["disk"] >= len(prompt) - len("What comes next?") - 16


@pytest.mark.parametrize("signals", [(signal.SIGINT, signal.SIGTERM), (signal.SIGKILL, signal.SIGKILL)])
def test_a_run_that_is_ended_twice_leaves_what_an_uninterrupted_one_does(
    shell: Shell, tiny: Path, docs: Path, signals: tuple[int, int]
) -> None:
    small = ("--set", "engine.chunk_tokens=16", "--set", "engine.max_batch_tokens=64", "--set", "device.capacity=1MiB")
    command = ["warm", "docs", *options(tiny, "--json", *small, "--set")]
    whole = json.loads(shell.ok(*command, "disk.path=whole"))
    command.append("disk.path=kv")
    computed = 0
    for number, by in enumerate(signals, 1):
        run = ended(command, after=number * whole["unique_tokens"] // 4, by=by, cwd=Path.cwd())
        assert run.returncode == (-by if by == signal.SIGKILL else 130), run.stderr
        if by != signal.SIGKILL:
            done = result(run)
            assert done["interrupted"]
            computed += done["computed_tokens"]
    last = ended(command, cwd=Path.cwd())
    assert last.returncode == 0, last.stderr
    done = result(last)
    assert done["held_tokens"] > 0
    if by != signal.SIGKILL:
        assert computed + done["computed_tokens"] <= 1.01 * whole["unique_tokens"]
    same_content(Path("kv"), Path("whole"))


def same_content(one: Path, other: Path, *, tolerance: float = 1e-5) -> None:
    """The same keys, and blocks that are equal; where a CPU's matrix products depend on their size, nearly so."""
    ours, theirs = contents(one), contents(other)
    assert ours.keys() == theirs.keys()
    for key, block in ours.items():
        found, expected = (np.frombuffer(data, np.float32) for data in (block, theirs[key]))
        assert np.linalg.norm(found - expected) <= tolerance * np.linalg.norm(expected)


def test_prompts_of_every_kind_become_what_their_requests_will_be(shell: Shell, tiny: Path, tmp_path: Path) -> None:
    lines: list[dict[str, Any]] = [
        {"prompt": "a prompt of some thirty letters"},
        {"messages": [{"role": "system", "content": "be brief " * 4}, {"role": "user", "content": "who?"}]},
        {"tokens": list(range(40))},
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = shell.json("warm", "in.jsonl", *options(tiny, "--set", "disk.path=kv"))
    chat = bytes("<begin>system: " + "be brief " * 4 + "\n<begin>user: who?\n", "utf-8")
    assert done["documents"] == 3
    assert done["tokens"] == 31 + 40 + len(chat) - 2 * (len("<begin>") - 1)


def test_of_conversations_only_the_system_prompt_is_kept_when_asked_so(
    shell: Shell, tiny: Path, tmp_path: Path
) -> None:
    system = {"role": "system", "content": "be brief, and say where it is written " * 3}
    talks = [{"messages": [system, {"role": "user", "content": who}]} for who in ("who?", "what?", "when?")]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in talks))
    done = shell.json("warm", "in.jsonl", "--system-only", *options(tiny, "--set", "disk.path=kv"))
    assert done["documents"] == 3
    assert done["unique_tokens"] == done["computed_tokens"] <= len(system["content"]) + 16
    assert done["unique_tokens"] > len(system["content"]) - 16


def test_a_text_as_a_message_is_what_chats_about_it_begin_with(shell: Shell, tiny: Path) -> None:
    from tierkv import open_engine
    from tierkv.engine import SamplingParams

    text = "The lamp is lit at dusk, and the log is written at eight. " * 2
    Path("handbook.md").write_text(text)
    done = shell.json("warm", "handbook.md", "--chat", *options(tiny, "--set", "disk.path=kv"))
    assert done["computed_tokens"] == done["unique_tokens"] >= len(text) - 16
    for question in ("\n\nWhen?", " Who?", "\n7 what"):
        with open_engine(tiny, Config(disk=DiskConfig(path=Path("kv")))) as (engine, _):
            prompt = engine.chat_prompt([{"role": "user", "content": text + question}])
            output = engine.generate([prompt], SamplingParams(max_tokens=2))[0]
        assert output.stats.sources["disk"] >= done["unique_tokens"]


def test_a_dry_run_tells_what_a_real_one_does_and_changes_nothing(shell: Shell, tiny: Path, docs: Path) -> None:
    asked = options(tiny, "--set", "disk.path=kv", "--set", "disk.capacity=4MiB")
    told = shell.json("warm", "docs", "--dry-run", *asked)
    assert not Path("kv").exists()
    done = shell.json("warm", "docs", *asked)
    assert told["unique_tokens"] == done["computed_tokens"]
    assert [(row["tier"], row["held"], row["lacking"], row["fits"]) for row in told["tiers"]] == [
        ("disk", 0, done["blocks"], True)
    ]
    assert told["tiers"][0]["bytes"] == done["tiers"][0]["bytes"]
    assert told["seconds"] > 0
    again = shell.json("warm", "docs", "--dry-run", *asked)
    assert (again["tiers"][0]["held"], again["tiers"][0]["lacking"], again["seconds"]) == (done["blocks"], 0, 0)
    shell.ok("warm", "docs", "--dry-run", *asked)
    assert "measured on one prompt" in shell.out


def test_what_does_not_fit_is_refused_before_anything_is_computed(shell: Shell, tiny: Path, docs: Path) -> None:
    asked = options(tiny, "--set", "disk.path=kv", "--set", "disk.capacity=1800KiB")
    assert shell.json("warm", "docs", "--dry-run", *asked)["tiers"][0]["fits"] is False
    message = shell.error("warm", "docs", *asked, code=2)
    assert "disk.capacity" in message and "room for" in message


@pytest.mark.redis
def test_redis_gets_it_for_a_time_and_disk_beside_it(
    shell: Shell, tiny: Path, docs: Path, valkey: EmbeddedValkey
) -> None:
    redis = ("--set", f"redis.url={valkey.url}", "--set", "redis.prefix=warm", "--set", "disk.path=kv")
    done = shell.json("warm", "docs", "--into", "redis", "--ttl", "5m", *options(tiny, *redis))
    assert [row["tier"] for row in done["tiers"]] == ["redis"]
    assert not Path("kv").exists()
    report = shell.json("inspect", valkey.url, "--prefix", "warm")
    assert report["blocks"] == done["blocks"]
    assert 0 < report["soonest_expiry_s"] <= 300
    both = shell.json("warm", "docs", *options(tiny, *redis))
    assert {row["tier"]: row["missing"] for row in both["tiers"]} == {"disk": 0, "redis": 0}
    assert (
        both["computed_tokens"] < done["unique_tokens"] / 3
    )  # Redis had it: at most a block of each piece is computed


@pytest.mark.redis
def test_what_a_large_redis_has_is_known_exactly_and_lasts_from_now_on(
    shell: Shell, tiny: Path, tmp_path: Path, valkey: EmbeddedValkey
) -> None:
    write_documents(tmp_path / "many", count=120, words=40)
    redis = ("--set", f"redis.url={valkey.url}", "--set", "redis.prefix=many")
    first = shell.json("warm", "many", "--ttl", "100s", *options(tiny, *redis))
    assert first["blocks"] > 600
    (tmp_path / "many" / "0000.txt").write_text("A first one. " * 6)
    done = shell.json("warm", "many", "--ttl", "12h", *options(tiny, *redis))
    assert done["computed_tokens"] <= 6 * 13
    assert done["held_tokens"] == first["unique_tokens"]
    assert shell.json("inspect", valkey.url, "--prefix", "many")["soonest_expiry_s"] > 40_000


def test_nothing_is_computed_for_a_redis_that_is_away(shell: Shell, tiny: Path, docs: Path) -> None:
    asked = options(tiny, "--set", "redis.url=redis://127.0.0.1:1")
    assert shell.run("warm", "docs", *asked) == 1
    assert "redis" in shell.err and "does not answer" in shell.err
    assert "computed" not in shell.out


def test_a_daemon_that_is_too_small_is_told_of_before_anything_is_computed(
    shell: Shell, tiny: Path, docs: Path, tmp_path: Path
) -> None:
    (tmp_path / "d").mkdir()
    with running(tmp_path / "d", capacity="200KiB") as daemon:
        message = shell.error("warm", "docs", *options(tiny, "--set", f"daemon.url={daemon.urls[0]}"), code=2)
    assert "host.capacity or disk.capacity of the daemon" in message


def test_pins_are_renewed_and_all_or_none(shell: Shell, tiny: Path, docs: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with running(tmp_path / "d", capacity="1MiB") as daemon:
        url = ("--set", f"daemon.url={daemon.urls[0]}")
        few = ("docs/00.txt", "docs/01.txt", "docs/02.txt")
        for _ in range(3):
            done = shell.json("warm", *few, "--into", "daemon", "--pin", "--ttl", "2h", *options(tiny, *url))
            assert done["pinned_blocks"] >= done["blocks"]
        assert len(daemon.service.pins) == 3
        assert shell.run("warm", "docs", "--into", "daemon", "--pin", "--ttl", "2h", *options(tiny, *url)) == 1
        assert "all is warm, and nothing is pinned: pin of" in shell.err and "computed" in shell.out


def test_a_daemon_gets_it_and_pins_it(shell: Shell, tiny: Path, docs: Path, tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    with running(tmp_path / "d", capacity="8MiB") as daemon:
        address = daemon.urls[0]
        url = ("--set", f"daemon.url={address}")
        done = shell.json("warm", "docs", "--into", "daemon", "--pin", "--ttl", "2h", *options(tiny, *url))
        assert [(row["tier"], row["missing"]) for row in done["tiers"]] == [("daemon", 0)]
        assert done["pinned_blocks"] >= done["blocks"]  # what paths share counts for each
        held = shell.json("daemon", "status", "--url", address)["tiers"][0]
        assert held["blocks"] == held["pinned_blocks"] == done["blocks"]
        again = shell.json("warm", "docs", *options(tiny, *url))
        assert again["computed_tokens"] == 0


def test_tenants_do_not_share(shell: Shell, tiny: Path, docs: Path) -> None:
    first = shell.json("warm", "docs", "--tenant", "one", *options(tiny, "--set", "disk.path=kv"))
    second = shell.json("warm", "docs", "--tenant", "two", *options(tiny, "--set", "disk.path=kv"))
    assert first["computed_tokens"] == second["computed_tokens"] > 0
    assert len(contents(Path("kv"))) == 2 * first["blocks"]


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["docs"], 2, "no tier to warm"),
        (["docs", "--into", "tape"], 2, "disk, redis, daemon"),
        (["docs", "--into", "redis"], 2, "redis.url"),
        (["docs", "--pin", "--set", "disk.path=kv"], 2, "--into daemon"),
        (["docs", "--ttl", "5m", "--set", "disk.path=kv"], 2, "--ttl is for Redis"),
        (["docs", "--ttl", "soon", "--set", "disk.path=kv"], 2, "not a time"),
        (["docs", "--max-file-size", "many", "--set", "disk.path=kv"], 2, "a size such as"),
        (["nowhere.txt", "--set", "disk.path=kv"], 1, "nowhere.txt"),
        (["--set", "disk.path=kv"], 1, "no input"),
        (["docs", "--glob", "*.pdf", "--set", "disk.path=kv"], 1, "*.pdf"),
        (["docs", "--set", "daemon.url=unix:///nowhere/d.sock"], 1, "daemon"),
    ],
)
def test_mistakes_are_one_line(
    shell: Shell, tiny: Path, docs: Path, arguments: list[str], code: int, told: str
) -> None:
    assert shell.run("warm", *options(tiny), *arguments) == code
    errors = [line for line in shell.err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and told in errors[0]
    assert "Traceback" not in shell.err
    assert not Path("kv").exists()


def test_a_document_longer_than_the_context_is_skipped_and_said_so(shell: Shell, tiny: Path, docs: Path) -> None:
    (docs / "long.txt").write_text("x" * 300)
    (docs / "picture.bin").write_bytes(bytes(range(256)))
    done = shell.json("warm", "docs", *options(tiny, "--set", "disk.path=kv"))
    reasons = {one["name"]: one["reason"] for one in done["skipped"]}
    assert "255" in reasons["long.txt"] and "not text" in reasons["picture.bin"]
    shell.run("warm", "docs", *options(tiny, "--set", "disk.path=kv"))
    assert "skipped long.txt" in shell.err


def test_large_blocks_have_large_chunks(shell: Shell, tiny: Path, docs: Path) -> None:
    asked = options(tiny, "--set", "disk.path=kv", "--set", "store.block_tokens=128")
    assert shell.json("warm", "docs", *asked)["tiers"][0]["missing"] == 0
    (docs / "short.txt").write_text("x" * 100)
    only = shell.ok("warm", "docs/short.txt", *asked)
    assert "nothing to keep" in only


def test_no_more_pages_than_one_prompt_needs_are_enough(shell: Shell, tiny: Path, docs: Path) -> None:
    tight = ("--set", "device.capacity=96KiB", "--set", "host.capacity=96KiB", "--set", "transfer.save_queue_blocks=4")
    done = shell.json("warm", "docs", *options(tiny, "--set", "disk.path=kv", *tight))
    assert done["tiers"][0]["missing"] == 0


def test_what_is_warmed_now_takes_the_place_of_what_was_not_used_for_long(shell: Shell, tiny: Path, docs: Path) -> None:
    others = write_documents(Path("others"), count=12, words=12, seed=9, shared="Quite another beginning. ")
    asked = options(tiny, "--set", "disk.path=kv", "--set", "disk.capacity=2560KiB")
    first = shell.json("warm", "others", *asked)
    done = shell.json("warm", "docs", *asked)
    assert first["blocks"] + done["blocks"] > len(contents(Path("kv"))) >= done["blocks"]
    assert done["tiers"][0]["missing"] == 0
    (docs / "more.txt").write_text(SHARED + "And what nobody knew of when the others were computed. " * 2)
    again = shell.json("warm", "docs", *asked)
    assert again["tiers"][0]["missing"] == 0
    # The new one sorts first: the piece in which the others' beginning lies is its own now, and begins a chunk.
    assert again["computed_tokens"] <= again["unique_tokens"] - done["unique_tokens"] + 128
    assert others.exists()


def test_a_full_disk_ends_the_run_with_a_reason_and_the_next_goes_on(shell: Shell, tiny: Path, docs: Path) -> None:
    command = ["warm", "docs", *options(tiny, "--json", "--set", "disk.path=kv", "--set", "engine.max_batch_tokens=32")]
    command += ["--set", "engine.chunk_tokens=16", "--set", "engine.max_sequences=1"]
    run = ended(command, cwd=Path.cwd(), most_file_bytes=200_000)
    assert run.returncode == 1
    assert run.stderr.splitlines()[-1].startswith("error: disk (kv) has no room on its disk"), run.stderr
    assert "Traceback" not in run.stderr
    done = json.loads(shell.ok(*command))
    assert done["tiers"][0]["missing"] == 0


def test_a_folder_that_an_engine_has_open_is_told_of(shell: Shell, tiny: Path, docs: Path) -> None:
    shell.json("warm", "docs", *options(tiny, "--set", "disk.path=kv"))
    with locked(Path("kv")):
        assert "is in use by process" in shell.error("warm", "docs", *options(tiny, "--set", "disk.path=kv"), code=1)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    lock = FolderLock(folder)
    try:
        yield
    finally:
        lock.release()


@pytest.mark.model
def test_thirty_documents_of_a_real_model_survive_two_kills(tmp_path: Path) -> None:
    write_documents(
        tmp_path / "docs", count=30, words=60, seed=3, shared="The handbook of a lighthouse, in parts. " * 3
    )
    command = ["warm", "--model", "smollm2", "docs", "--json", "--set", "engine.num_threads=1", "--set"]
    whole = ended([*command, "disk.path=whole"], cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    unique = result(whole)["unique_tokens"]
    assert result(whole)["computed_tokens"] <= 1.01 * unique
    for number in (1, 2):
        run = ended([*command, "disk.path=kv"], after=number * unique // 5, by=signal.SIGKILL, cwd=tmp_path)
        assert run.returncode == -signal.SIGKILL, run.stderr
    last = ended([*command, "disk.path=kv"], cwd=tmp_path)
    assert last.returncode == 0, last.stderr
    assert result(last)["held_tokens"] > 0
    same_content(tmp_path / "kv", tmp_path / "whole")
