"""Warming and packs on a CUDA device: what is computed once there, and the same bytes twice."""

from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("zarr")

from tests.test_cli import Shell
from tests.warm_parts import save_tiny, write_documents


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Shell:
    monkeypatch.chdir(tmp_path)
    save_tiny(Path("tiny"))
    write_documents(Path("docs"), count=12, words=20, shared="You are the keeper of a light. " * 3)
    capsys.readouterr()
    return Shell(capsys)


@pytest.mark.gpu
def test_a_gpu_computes_every_token_once(shell: Shell) -> None:
    asked = ("--model", "tiny", "--set", "device.kind=cuda", "--set", "disk.path=kv")
    done = shell.json("warm", "docs", *asked)
    assert done["computed_tokens"] == done["unique_tokens"]
    assert done["tiers"][0]["missing"] == 0
    assert shell.json("warm", "docs", *asked)["computed_tokens"] == 0


@pytest.mark.gpu
def test_two_builds_on_a_gpu_are_the_same_bytes(shell: Shell) -> None:
    for name in ("one.zip", "two.zip"):
        shell.json("pack", "build", "--model", "tiny", "--out", name, "docs", "--set", "device.kind=cuda")
    assert Path("one.zip").read_bytes() == Path("two.zip").read_bytes()
    assert shell.json("pack", "verify", "one.zip", "--model", "tiny", "--set", "device.kind=cuda")["sound"]
