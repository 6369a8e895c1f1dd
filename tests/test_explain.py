"""`tierkv explain` and `tierkv stats` over real folders and a real server: what is held where, and why not."""

import json
import os
from array import array
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.test_cli import Shell
from tests.test_disk import capacity
from tierkv.explain import Reason, Stock, differences, from_index, from_stocks
from tierkv.fates import Fate, Known
from tierkv.hints import NO_ENDING, NO_HINTS
from tierkv.keys import Key, Namespace, chain
from tierkv.lookups import NOTE, Lookups, Sources
from tierkv.metrics import Metrics
from tierkv.record import Access, Recorder
from tierkv.testing import SMALL
from tierkv.tiers.base import Run
from tierkv.tiers.disk import DiskTier

STEP = SMALL.block_tokens
OURS = Namespace("f" * 32, SMALL)
THEIRS = Namespace("f" * 32, SMALL, tenant="acme")
SECRET = b"s3cret"


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in [name for name in os.environ if name.startswith("TIERKV_")]:
        monkeypatch.delenv(name)


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def tier(tmp_path: Path) -> Iterator[DiskTier]:
    tier = DiskTier(tmp_path / "kv", layout=SMALL, capacity_bytes=capacity(64), metrics=Metrics())
    tier.introduce(OURS.root(), OURS)
    yield tier
    tier.close()


def prompt(blocks: int, *, extra: int = 0, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).integers(0, 1000, blocks * STEP + extra, dtype="<i4").tobytes()


def run_of(tokens: bytes, namespace: Namespace = OURS, secret: bytes = b"") -> Run:
    root = namespace.root(secret)
    keys = tuple(chain(root, tokens, block_tokens=STEP))
    return Run(root, root, 0, keys, tokens[: len(keys) * STEP * 4])


def keep(tier: Any, tokens: bytes, namespace: Namespace = OURS, secret: bytes = b"") -> Run:
    run = run_of(tokens, namespace, secret)
    assert all(tier.write(run, [memoryview(bytearray(SMALL.block_bytes)) for _ in run.keys]))
    return run


def ask(shell: Shell, tokens: bytes, *options: str) -> dict[str, Any]:
    Path("ids").write_text(json.dumps(array("i", tokens).tolist()))
    store = "--set", f"store.block_tokens={STEP}", "--set", "disk.policy=lru"
    report: dict[str, Any] = shell.json("explain", "--tokens", "ids", "--set", "disk.path=kv", *store, *options)
    return report


def said(report: dict[str, Any]) -> list[tuple[int, int, str | None]]:
    return [(one["lo"], one["hi"], one["reason"]) for one in report["stretches"]]


# -- explain


def test_each_stretch_says_where_it_is_or_why_not_beside_its_owner(shell: Shell, tier: DiskTier) -> None:
    tokens = prompt(12, extra=3)
    run = keep(tier, tokens)
    tier.delete(run.keys[4:7])
    report = ask(shell, tokens)
    assert said(report) == [(0, 4, None), (4, 7, "evicted"), (7, 12, "unreachable"), (12, 13, "partial_tail")]
    assert report["stretches"][0]["tiers"] == ["disk"]
    assert report["stretches"][1]["tier"] == "disk" and report["stretches"][1]["policy"] == "lru"
    assert report["usable_tokens"] == 4 * STEP
    assert [one["end_token"] for one in report["stretches"]] == [4 * STEP, 7 * STEP, 12 * STEP, 12 * STEP + 3]
    table = shell.ok(
        "explain", "--tokens", "ids", "-s", "disk.path=kv", "-s", "disk.policy=lru", "-s", f"store.block_tokens={STEP}"
    )
    assert "evicted from disk by lru, 0 s ago" in table
    assert f"{4 * STEP} of {12 * STEP + 3} tokens" in table
    assert sorted(path.name for path in tier.path.iterdir() if "manifest" not in path.name) == [
        "blocks", "lock", "slot_keys", "zarr.json",
    ]  # fmt: skip


def test_a_prompt_nobody_sent_was_never_seen(shell: Shell, tier: DiskTier) -> None:
    keep(tier, prompt(3))
    assert said(ask(shell, prompt(5, seed=9))) == [(0, 5, "never_seen")]


def test_a_block_of_another_beginning_is_another_block(shell: Shell, tier: DiskTier) -> None:
    tokens = prompt(6)
    keep(tier, tokens)
    changed = bytearray(tokens)
    changed[2 * STEP * 4] ^= 1
    assert said(ask(shell, bytes(changed))) == [(0, 2, None), (2, 6, "never_seen")]


@pytest.mark.parametrize(
    ("theirs", "secret", "field"),
    [
        (replace(OURS, tenant="acme"), b"", "tenant ('' here, 'acme' there)"),
        (replace(OURS, adapter="lora-7"), b"", "adapter ('' here, 'lora-7' there)"),
        (replace(OURS, model="0" * 32), b"", "model"),
        (replace(OURS, layout=replace(SMALL, dtype="float16")), b"", "dtype"),
        (OURS, SECRET, "secret"),
    ],
)
def test_a_key_that_differs_names_the_field(
    shell: Shell, tier: DiskTier, theirs: Namespace, secret: bytes, field: str
) -> None:
    tokens = prompt(6)
    keep(tier, tokens[: 4 * STEP * 4], theirs, secret)
    tier.introduce(theirs.root(secret), theirs)
    tier.introduce(OURS.root(), OURS)  # the last to open it: what is asked about
    report = ask(shell, tokens)
    assert said(report) == [(0, 4, "key_differs"), (4, 6, "never_seen")]
    assert field in report["stretches"][0]["said"]


def test_another_block_size_is_a_field_too(shell: Shell, tier: DiskTier) -> None:
    tokens = prompt(6)
    keep(tier, tokens)
    report = ask(shell, tokens, "--set", f"store.block_tokens={2 * STEP}")
    assert said(report) == [(0, 3, "key_differs")]
    assert f"block_tokens ({2 * STEP} here, {STEP} there)" in report["stretches"][0]["said"]


def test_the_configured_tenant_and_secret_decide_who_asks(shell: Shell, tier: DiskTier) -> None:
    tokens = prompt(4)
    Path("secret").write_bytes(SECRET)
    keep(tier, tokens, THEIRS, SECRET)
    assert said(ask(shell, tokens)) == [(0, 4, "never_seen")], "its owner did not introduce itself"
    acme = ("--set", "store.tenant=acme", "--set", "store.secret_file=secret")
    assert said(ask(shell, tokens, *acme)) == [(0, 4, None)]
    assert said(ask(shell, tokens, *acme[:2])) == [(0, 4, "never_seen")]


def test_a_corrupt_block_is_remembered_as_such(shell: Shell, tier: DiskTier) -> None:
    tokens = prompt(3)
    run = keep(tier, tokens)
    shard = next((tier.path / "blocks").glob("c.*"))
    with shard.open("r+b") as file:
        file.write(b"\1")  # of the first slot, which was all zeros
    assert tier.read(run.keys, [memoryview(bytearray(SMALL.block_bytes)) for _ in run.keys]) == [False, True, True]
    report = ask(shell, tokens)
    assert said(report) == [(0, 1, "corrupt"), (1, 3, "unreachable")]
    assert "found corrupt in disk" in report["stretches"][0]["said"]


def test_an_identity_picks_the_model(shell: Shell, tier: DiskTier) -> None:
    other = replace(OURS, model="e" * 32)
    tokens = prompt(3)
    keep(tier, tokens)
    tier.introduce(other.root(), other)
    assert said(ask(shell, tokens)) == [(0, 3, "key_differs")]
    assert said(ask(shell, tokens, "--identity", OURS.model)) == [(0, 3, None)]


@pytest.mark.redis
def test_a_server_is_asked_too_and_one_that_is_down_is_named(shell: Shell, tier: DiskTier) -> None:
    from tierkv.tiers.redis import RedisTier
    from tierkv.valkey import EmbeddedValkey

    tokens = prompt(6)
    keep(tier, tokens[: 2 * STEP * 4])
    with EmbeddedValkey() as server:
        url = ("--set", f"redis.url={server.url}")
        shared = RedisTier(server.url, layout=SMALL, metrics=Metrics())
        shared.introduce(OURS.root(), OURS)
        keep(shared, tokens[: 4 * STEP * 4])
        report = ask(shell, tokens, *url)
        assert [one["tiers"] for one in report["stretches"]] == [["disk", "redis"], ["redis"], []]
        assert said(ask(shell, tokens, *url, "--set", "disk.path=off")) == [(0, 4, None), (4, 6, "never_seen")]
        acme = ("--set", "store.tenant=acme", "--set", "disk.path=off")
        assert said(ask(shell, tokens, *url, *acme)) == [(0, 4, "key_differs"), (4, 6, "never_seen")]
        assert said(ask(shell, tokens, *url, "--set", "redis.prefix=other")) == [(0, 2, None), (2, 6, "never_seen")]
        shared.close()
    report = ask(shell, tokens, *url)
    assert said(report) == [(0, 2, None), (2, 6, "down")]
    assert list(report["down"]) == ["redis"]
    assert "redis could not be asked" in shell.ok(
        "explain", "--tokens", "ids", "-s", "disk.path=kv", "-s", f"store.block_tokens={STEP}", *url
    )


@pytest.mark.parametrize("content", ["1 2 3", "[1, 2, 3]", "1,2,3\n", " 1\n2\n3 "])
def test_token_files_come_in_many_forms(shell: Shell, tier: DiskTier, content: str) -> None:
    Path("ids").write_text(content)
    assert shell.json("explain", "--tokens", "ids", "--set", "disk.path=kv")["tokens"] == 3


KV = ("--set", "disk.path=kv")


@pytest.mark.parametrize(
    ("arguments", "told", "code"),
    [
        (("explain", "hi"), "set disk.path, redis.url or pack.paths", 2),
        (("explain", *KV), "there is no prompt", 2),
        (("explain", "hi", *KV), "name a model", 2),
        (("explain", "hi", "--tokens", "good", *KV), "both given", 2),
        (("explain", "--tokens", "absent", *KV), "absent: No such file", 1),
        (("explain", "--tokens", "bad", *KV), "'two' is no token id", 1),
        (("explain", "--tokens", "large", *KV), "int32", 1),
        (("explain", "--tokens", "empty", *KV), "no token ids", 1),
        (("explain", "--tokens", "binary", *KV), "not text", 1),
        (("explain", "--tokens", "good", *KV, "--identity", "abc"), "by a model of identity abc", 2),
        (("explain", "--tokens", "good", "--set", "disk.path=other"), "no disk folder of tierkv", 2),
        (("explain", "hi", "--model", "./absent", *KV), "./absent: no tokenizer", 1),
        (("stats",), "set disk.path or record.path", 2),
        (("stats", *KV), "no store has left figures", 1),
        (("stats", "--set", "disk.path=other"), "no disk folder of tierkv", 2),
        (("stats", "--log", "absent"), "absent: No such file", 2),
        (("stats", "--log", "good"), "no access log", 2),
    ],
)
def test_mistakes_are_one_line(shell: Shell, tier: DiskTier, arguments: tuple[str, ...], told: str, code: int) -> None:
    for name, content in {"good": "1 2", "bad": "1 two 3", "large": f"{1 << 40}", "empty": "[]"}.items():
        Path(name).write_text(content)
    Path("binary").write_bytes(b"\xff\xfe")
    Path("other").mkdir()
    assert told in shell.error(*arguments, code=code)


def test_a_folder_that_tells_nothing_of_its_owners_is_refused(shell: Shell) -> None:
    DiskTier(Path("kv"), layout=SMALL, capacity_bytes=capacity(64), metrics=Metrics()).close()
    Path("ids").write_text("1 2 3")
    assert "open a store of this version" in shell.error("explain", "--tokens", "ids", *KV, code=2)


def test_the_nearest_of_several_namespaces_is_named() -> None:
    tokens = prompt(4)
    far = replace(OURS, tenant="x", adapter="y")
    held = {*run_of(tokens, far).keys, *run_of(tokens, THEIRS).keys}
    stock = Stock(
        "disk",
        contains=lambda keys: [key in held for key in keys],
        namespaces={far.root(): far.fields(), THEIRS.root(): THEIRS.fields(), Key(b"k" * 32): {"model": 1}},
    )
    (stretch,) = from_stocks(tokens, root=OURS.root(), fields=OURS.fields(), stocks=[stock])
    assert stretch.reason is Reason.KEY_DIFFERS and stretch.differs == differences(OURS.fields(), THEIRS.fields())
    assert stretch.differs == (("tenant", "", "acme"),)


def test_what_left_several_tiers_is_told_of_the_last() -> None:
    tokens = prompt(2)
    stocks = [
        Stock("disk", departed=lambda key: (5.0, "corrupt")),
        Stock("object", departed=lambda key: (9.0, "evicted"), policy="lru"),
        Stock("redis", departed=lambda key: (7.0, "evicted")),
    ]
    (stretch,) = from_stocks(tokens, root=OURS.root(), fields=OURS.fields(), stocks=stocks)
    assert (stretch.tier, stretch.at_s, stretch.policy, stretch.reason) == ("object", 9.0, "lru", Reason.EVICTED)


def test_an_index_is_told_in_words_of_its_own() -> None:
    known = [
        Known(0, 2, (0, 1)), Known(2, 3, (1,)), Known(3, 4, (), (Fate(1, 3.0, "arc"), Fate(0, 1.0, "lru"))), Known(4, 5, (1,)),
        Known(5, 6, (), (Fate(1, 4.0, "arc"),)), Known(6, 7, (), (Fate(1, 8.0, "arc"),)),
    ]  # fmt: skip
    assert [(one.lo, one.hi, one.reason, one.policy, one.at_s) for one in from_index(known, ("device", "host"))] == [
        (0, 2, None, None, None),
        (2, 3, None, None, None),
        (3, 4, Reason.EVICTED, "arc", 3.0),
        (4, 5, Reason.UNREACHABLE, None, None),
        (5, 7, Reason.EVICTED, "arc", 8.0),
    ]


@pytest.mark.model
def test_text_is_read_as_generate_reads_it(shell: Shell) -> None:
    kept = ("--set", "disk.path=kv", "--set", "device.capacity=64MiB", "--set", "host.capacity=64MiB")
    asked = ("What is the capital of France? " * 8, *kept)
    assert shell.run("generate", "smollm2", *asked, "--max-tokens", "2", "--quiet") == 0, shell.err
    report = shell.json("explain", *asked, "--model", "smollm2")
    assert report["stretches"][0]["reason"] is None
    assert report["usable_tokens"] == report["tokens"] // 16 * 16
    assert report["namespace"]["model"]
    assert shell.json("stats", *kept)["refs"] > 0


# -- stats


def looked_up(tier: DiskTier) -> None:
    """Figures of a store that had the same twelve blocks ten times."""
    sources = Sources(explain=lambda root, tokens: [], roots=lambda: [], tier_names=(), fields=OURS.fields())
    lookups = Lookups(
        root=OURS.root(), block_tokens=STEP, sources=sources, capacities={"host": 6, "disk": 64}, metrics=Metrics(),
        submit=lambda job: job() is None, note=tier.note,
    )  # fmt: skip
    for _ in range(10):
        lookups.end(lookups.begin(prompt(12, extra=1), num_loadable=12, hints=NO_HINTS), NO_ENDING)
    lookups.close()


def test_stats_tell_what_larger_tiers_would_add(shell: Shell, tier: DiskTier) -> None:
    looked_up(tier)
    report = shell.json("stats", *KV)
    host, disk = report["tiers"]
    assert host["found"]["1"] == pytest.approx(0.45) and host["found"]["2"] == disk["found"]["1"] == pytest.approx(0.9)
    text = shell.ok("stats", *KV)
    assert "+45.0 points" in text and "same" in text and "-22.5 points" in text
    assert "of 120 blocks of prompts from the store's start to 0 s ago" in text
    assert "partial tail" in text


def test_stats_are_the_same_from_an_access_log(shell: Shell) -> None:
    recorder = Recorder(
        Path("log"), root=OURS.root(), layout=SMALL, max_bytes=1 << 20, metrics=Metrics(), now=lambda: 0.0
    )
    for at in range(10):
        recorder.write(Access(float(at), recorder.digests(prompt(12)), 12 * STEP))
    recorder.close()
    sizes = ("--set", f"host.capacity={6 * SMALL.block_bytes}", "--set", f"disk.capacity={64 * SMALL.block_bytes}")
    report = shell.json("stats", "--log", "log", *sizes, "--set", "disk.path=unused")
    assert [row["tier"] for row in report["tiers"]] == ["host", "disk"]
    assert report["tiers"][0]["found"] == {"0.5": 0.225, "1": 0.45, "2": 0.9, "4": 0.9}
    assert shell.json("stats", "--set", "record.path=log", *sizes)["tiers"] == report["tiers"][:1]
    assert "+45.0 points" in shell.ok("stats", "--log", "log", *sizes)


def test_the_note_fits_whatever_is_counted(tier: DiskTier) -> None:
    from tierkv.tiers.disk_history import MAX_NOTE_BYTES, read_history
    from tierkv.tiers.disk_manifest import NAME

    metrics = Metrics()
    for reason in Reason:
        metrics.missed_blocks.add(1e15, reason)
    sources = Sources(explain=lambda root, tokens: [], roots=lambda: [], tier_names=(), fields=OURS.fields())
    capacities = dict.fromkeys(("device", "host", "disk", "object"), 10**12)
    lookups = Lookups(
        root=OURS.root(), block_tokens=STEP, sources=sources, capacities=capacities, metrics=metrics,
        submit=lambda job: True, note=tier.note,
    )  # fmt: skip
    lookups.close()
    assert len(read_history(tier.path / NAME).notes[NOTE]) < MAX_NOTE_BYTES / 2


def test_another_model_at_hand_is_told_by_the_field_that_differs(tier: DiskTier) -> None:
    """A model that never stored anything there: what others stored of the same tokens is under another key."""
    from tierkv.config import load
    from tierkv.explain import from_stocks
    from tierkv.stocks import namespace_of, open_stocks

    tokens = prompt(2)
    keep(tier, tokens)
    config = load(environ={}, overrides=(f"disk.path={tier.path}", f"store.block_tokens={SMALL.block_tokens}")).config
    with open_stocks(config) as stocks:
        root, fields = namespace_of(config, stocks, loaded="e" * 32)
        (stretch,) = from_stocks(tokens, root=root, fields=fields, stocks=stocks)
    assert fields["model"] == "e" * 32
    assert (stretch.lo, stretch.hi) == (0, 2) and "model" in str(stretch)
