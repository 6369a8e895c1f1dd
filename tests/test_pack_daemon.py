"""A daemon over packs: its clients find them, whoever they are, and nothing that they do changes one."""

import contextlib
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.daemon_parts import RunningDaemon, config_of
from tests.pack_parts import SHARD, changed, files_of, flip, keys_of, make_keys, make_pack, prompt, signed
from tierkv.config import PackConfig
from tierkv.errors import PackError, TierError
from tierkv.keys import Namespace
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.testing import SMALL, block_of, blocks_of, make_run, read_blocks
from tierkv.tiers.base import Run
from tierkv.tiers.daemon import DaemonTier
from tierkv.zarr_shards import stride_of

TOKENS = prompt(1, 6, layout=SMALL)
READ, WRITE, ADMIN = "r" * 16, "w" * 20, "a" * 32


def pack_of(out: Path, *documents: bytes, model: str = "test", layout: Layout = SMALL) -> Path:
    """A pack with the blocks that tests of tiers use: a function of the key."""

    def content(tokens: bytes, block: int, layout: Layout) -> bytes:
        return block_of(keys_of(tokens, layout=layout)[block], layout)

    return make_pack(out, {f"document {at}": each for at, each in enumerate(documents)}, layout=layout, content=content)


def run_of(tokens: bytes = TOKENS, *, tenant: str = "", secret: bytes = b"", model: str = "test") -> Run:
    root = Namespace(model, SMALL, tenant=tenant).root(secret)
    return Run(root, root, 0, tuple(keys_of(tokens, layout=SMALL, tenant=tenant, secret=secret, model=model)), tokens)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return pack_of(tmp_path / "pack.zip", TOKENS)


@contextlib.contextmanager
def over(folder: Path, *places: Path, signers: Sequence[str] | None = None, **options: Any) -> Iterator[RunningDaemon]:
    given = config_of(folder, **options)
    pack = PackConfig(paths=places, signers=tuple(signers) if signers else None)
    daemon = RunningDaemon(replace(given, pack=pack))
    try:
        yield daemon
    finally:
        daemon.stop()


@pytest.fixture
def client() -> Iterator[Callable[..., DaemonTier]]:
    with contextlib.ExitStack() as opened:

        def connect(
            daemon: RunningDaemon, *, tenant: str = "", secret: bytes = b"", model: str = "test", token: str = ""
        ) -> DaemonTier:
            space = Namespace(model, SMALL, tenant=tenant)
            link = daemon.client(daemon.urls[1], token=token)
            tier = DaemonTier(link, namespace=space, root=space.root(secret), metrics=Metrics())
            opened.callback(tier.close)
            return tier

        yield connect


EXPECTED = [block_of(key) for key in keys_of(TOKENS, layout=SMALL)]


@pytest.mark.parametrize(("tenant", "secret"), [("", b""), ("alice", b""), ("alice", b"secret")])
def test_a_client_finds_and_reads_the_blocks_of_a_pack(
    tmp_path: Path, place: Path, client: Any, tenant: str, secret: bytes
) -> None:
    with over(tmp_path, place) as daemon:
        tier = client(daemon, tenant=tenant, secret=secret)
        run = run_of(tenant=tenant, secret=secret)
        assert tier.seek(run) == 6
        assert read_blocks(tier, run.keys) == EXPECTED
        assert tier.seek(run_of(prompt(9, 2, layout=SMALL), tenant=tenant, secret=secret)) == 0
        metrics = daemon.service.metrics
        assert metrics.daemon_lookup_blocks.value("pack") == 6 and metrics.blocks_loaded.value("pack") == 6
        assert tier.seek(run) == 6 and metrics.daemon_lookup_blocks.value("host") == 6  # it was lifted


def test_a_prompt_that_goes_on_behind_a_pack_is_written_and_found(tmp_path: Path, place: Path, client: Any) -> None:
    more = make_run(3, seed=1)
    with over(tmp_path, place, disk="16MiB") as daemon:
        tier, run = client(daemon), run_of()
        longer = run_of(TOKENS + more.tokens)
        assert tier.seek(longer) == 6
        assert read_blocks(tier, run.keys) == EXPECTED
        rest = Run(run.root, run.keys[-1], 6, longer.keys[6:], more.tokens)
        assert tier.write(rest, blocks_of(rest)) == [True] * 3
        assert tier.seek(longer) == 9
        assert read_blocks(tier, longer.keys) == [*EXPECTED, *(block_of(key) for key in rest.keys)]


def test_who_may_only_read_finds_packs_in_a_namespace_that_no_secret_hides(
    tmp_path: Path, place: Path, client: Any
) -> None:
    token_file = tmp_path / "tokens"
    token_file.write_text(f"read:{READ}\n{WRITE}\n")
    with over(tmp_path, place, token_file=token_file) as daemon:
        for tenant in ("", "reader"):
            reader, run = client(daemon, tenant=tenant, token=READ), run_of(tenant=tenant)
            assert reader.seek(run) == 6
            assert read_blocks(reader, run.keys) == EXPECTED
            with pytest.raises(TierError, match="needs the role write"):
                reader.delete(run.keys)
        hidden = client(daemon, tenant="reader", secret=b"secret", token=READ)
        assert hidden.seek(run_of(tenant="reader", secret=b"secret")) == 0


def test_a_corrupt_block_of_a_pack_ends_the_hit_before_it(tmp_path: Path, place: Path, client: Any) -> None:
    changed(place, lambda files: files.update({SHARD: flip(files[SHARD], 3 * stride_of(SMALL.block_bytes) + 7)}))
    with over(tmp_path, place) as daemon:
        tier, run = client(daemon), run_of()
        assert tier.seek(run) == 6
        assert read_blocks(tier, run.keys) == [*EXPECTED[:3], None, *EXPECTED[4:]]
        assert daemon.service.metrics.corrupt_blocks.value("pack") == 1
        assert tier.seek(run) == 3


def test_forgetting_leaves_a_pack_alone(tmp_path: Path, place: Path, client: Any) -> None:
    before = files_of(place)
    own = make_run(2, seed=1)
    token_file = tmp_path / "tokens"
    token_file.write_text(f"{WRITE}\nadmin:{ADMIN}\n")
    with over(tmp_path, place, token_file=token_file) as daemon:
        tier = client(daemon, token=ADMIN)
        assert tier.seek(run_of()) == 6 and read_blocks(tier, run_of().keys) == EXPECTED
        assert tier.write(own, blocks_of(own)) == [True, True]
        assert tier.blocks.client.forget(model="test") == {"host": 8}
        assert tier.seek(own) == 0
        assert tier.seek(run_of()) == 6 and read_blocks(tier, run_of().keys) == EXPECTED
        assert tier.blocks.client.flush()["complete"]
    assert files_of(place) == before


def test_what_one_client_deletes_others_still_find(tmp_path: Path, place: Path, client: Any) -> None:
    with over(tmp_path, place) as daemon:
        one, other = client(daemon, tenant="alice"), client(daemon, tenant="bob")
        runs = [run_of(tenant=tenant) for tenant in ("alice", "bob")]
        assert one.seek(runs[0]) == other.seek(runs[1]) == 6
        one.delete(runs[0].keys[4:])
        assert one.seek(runs[0]) == 4 and other.seek(runs[1]) == 6
        assert read_blocks(other, runs[1].keys) == EXPECTED


def test_what_a_pack_has_is_not_written_to_the_disk(tmp_path: Path, place: Path, client: Any) -> None:
    own = make_run(2, seed=1)
    with over(tmp_path, place, disk="16MiB") as daemon:
        tier, link = client(daemon), daemon.client()
        assert tier.seek(run_of()) == 6
        assert read_blocks(tier, run_of().keys) == EXPECTED
        assert tier.write(own, blocks_of(own)) == [True, True]
        assert link.flush()["complete"]
        link.close()
        disk = next(below.tier for below in daemon.pool.below if below.name == "disk")
        assert disk.contains([*own.keys, *run_of().keys]) == [True] * 2 + [False] * 6


def test_readers_have_packs_looked_through_for_so_many_namespaces(
    tmp_path: Path, place: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierkv.daemon.mounts.MAX_READERS", 2)
    token_file = tmp_path / "tokens"
    token_file.write_text(f"read:{READ}\n{WRITE}\n")
    with over(tmp_path, place, token_file=token_file) as daemon:
        found = [client(daemon, tenant=name, token=READ).seek(run_of(tenant=name)) for name in ("a", "b", "c")]
        assert found == [6, 6, 0]
        assert client(daemon, tenant="c", token=WRITE).seek(run_of(tenant="c")) == 6


def test_a_reload_mounts_other_packs_while_clients_stay(tmp_path: Path, place: Path, client: Any) -> None:
    other_tokens = prompt(2, 4, layout=SMALL)
    other = pack_of(tmp_path / "other", other_tokens)
    given = config_of(tmp_path)
    configs = [replace(given, pack=PackConfig(paths=(place,)))]
    daemon = RunningDaemon(configs[0], reload=lambda: configs[-1])
    try:
        tier, one, two = client(daemon), run_of(), run_of(other_tokens)
        assert (tier.seek(one), tier.seek(two)) == (6, 0)

        def reload(*paths: Path, said: str) -> None:
            before = len(daemon.told)
            configs.append(replace(given, pack=PackConfig(paths=paths or None)))
            daemon.do(daemon._server._reloaded)
            daemon.until(lambda: any(said in line for line in daemon.told[before:]), said)

        reload(place, other, said="mounted 2 packs")
        assert (tier.seek(one), tier.seek(two)) == (6, 4)
        assert read_blocks(tier, two.keys) == [block_of(key) for key in two.keys]
        reload(other, said="mounted 1 packs")
        assert (tier.seek(one), tier.seek(two)) == (0, 4)
        reload(said="mounted 0 packs")
        assert daemon.pool.packs is None and [below.name for below in daemon.pool.below] == []
        changed(place, lambda files: files.update({"zarr.json": b"{}"}))
        configs.append(replace(given, pack=PackConfig(paths=(place,))))
        daemon.do(daemon._server._reloaded)
        assert tier.seek(two) == 4  # what its memory has of it stays
        assert daemon.pool.packs is None
    finally:
        daemon.stop()


def test_a_pack_that_is_gone_when_the_first_client_comes_is_done_without(
    tmp_path: Path, place: Path, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    own = make_run(2, seed=1)
    with over(tmp_path, place) as daemon:
        place.unlink()
        tier = client(daemon)
        assert tier.seek(run_of()) == 0
        assert "no pack is mounted until the next reload" in caplog.text
        assert tier.write(own, blocks_of(own)) == [True, True]


def test_a_reader_of_a_model_that_no_pack_fits_takes_nobodys_place(
    tmp_path: Path, place: Path, client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tierkv.daemon.mounts.MAX_READERS", 1)
    token_file = tmp_path / "tokens"
    token_file.write_text(f"read:{READ}\n{WRITE}\n")
    with over(tmp_path, place, token_file=token_file) as daemon:
        for model in ("a", "b", "c"):
            assert client(daemon, model=model, token=READ).seek(run_of(model=model)) == 0
        assert client(daemon, token=READ).seek(run_of()) == 6


def test_status_lists_packs_before_and_after_they_are_asked(tmp_path: Path, place: Path, client: Any) -> None:
    with over(tmp_path, place) as daemon, contextlib.closing(daemon.client()) as link:

        def row() -> dict[str, Any]:
            (found,) = [tier for tier in link.stats()["tiers"] if tier["tier"] == "pack"]
            return dict(found)

        assert row()["blocks"] == 0 and row()["place"] == "1 packs, not asked for yet"
        tier = client(daemon)
        assert tier.seek(run_of()) == 6
        told = row()
        assert (told["blocks"], told["bytes"], told["place"]) == (6, 6 * SMALL.block_bytes, str(place))
        assert told["capacity_bytes"] is None and told["down"] is False


def test_a_client_of_another_model_finds_nothing_and_the_daemon_says_why(
    tmp_path: Path, place: Path, client: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with over(tmp_path, place) as daemon:
        tier = client(daemon, model="other")
        assert tier.seek(run_of(model="other")) == 0
    assert "is not for model other: model identity test, here other" in caplog.text


def test_a_pack_of_another_layout_is_left_out(tmp_path: Path, place: Path, client: Any) -> None:
    wide = replace(SMALL, num_kv_heads=4)
    other = pack_of(tmp_path / "other", prompt(1, 2, layout=wide), layout=wide)
    with over(tmp_path, other, place) as daemon:
        tier = client(daemon)
        assert tier.seek(run_of()) == 6 and read_blocks(tier, run_of().keys) == EXPECTED
        assert daemon.pool.packs is not None and daemon.pool.packs.place == str(place)
    with over(tmp_path, other) as daemon:
        assert client(daemon).seek(run_of()) == 0 and daemon.pool.packs is None


# -- what keeps a daemon from starting --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("zarr.json", "its manifest was changed"),
        ("keys/c.0.0", r"keys/c\.0\.0 is not what the manifest says"),
        ("tokens/c.0.0", r"tokens/c\.0\.0 is not what the manifest says"),
    ],
)
def test_a_daemon_with_a_damaged_pack_does_not_start(tmp_path: Path, place: Path, name: str, said: str) -> None:
    def change(files: dict[str, bytes]) -> None:
        files[name] = (
            files[name].replace(b"LlamaForCausalLM", b"LlamaForCausalLN")
            if name == "zarr.json"
            else flip(files[name], len(files[name]) // 2)
        )

    changed(place, change)
    with pytest.raises(PackError, match=rf"{place}: {said}"), over(tmp_path, place):
        pass


def test_a_daemon_that_demands_signers_starts_with_their_packs_alone(tmp_path: Path, place: Path, client: Any) -> None:
    key, public = make_keys(tmp_path)
    with (
        pytest.raises(PackError, match="not signed; this configuration demands"),
        over(tmp_path, place, signers=[public]),
    ):
        pass
    signed(place, key)
    with over(tmp_path, place, signers=[public]) as daemon:
        assert client(daemon).seek(run_of()) == 6


def test_the_command_says_why_in_a_sentence(tmp_path: Path, place: Path) -> None:
    changed(place, lambda files: files.update({"keys/c.0.0": flip(files["keys/c.0.0"], 5)}))
    words = [sys.executable, "-m", "tierkv.cli", "daemon", "--listen", f"unix://{tmp_path}/d.sock"]
    words += ["--set", "host.capacity=16MiB", "--set", "server.http=off", "--set", f"pack.paths={place}"]
    told = subprocess.run(words, capture_output=True, text=True, cwd=Path(__file__).parents[1], timeout=60, check=False)
    assert told.returncode != 0 and "Traceback" not in told.stderr
    assert "is not what the manifest says (SHA-256): fetch the pack again" in " ".join(told.stderr.split())
