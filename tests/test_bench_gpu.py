"""bench/gpu.sh where no GPU is: every benchmark rehearsed, its reference, its rows, and how it ends when something fails."""

import json
import os
import subprocess
from argparse import ArgumentTypeError, Namespace
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Final

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import bench.gpu.__main__ as command
from bench.gpu import sanitize
from bench.gpu.table import is_wrong, lines
from bench.gpu.tune import write
from tierkv.kernels.gpu.tiles import Case, Tiles
from tierkv.measure.inputs import attention
from tierkv.measure.lab import Lab

ROOT: Final = Path(__file__).parent.parent


def gpu_sh(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
    script = ["bash", str(ROOT / "bench" / "gpu.sh"), *arguments]
    return subprocess.run(script, capture_output=True, text=True, env=environment, timeout=200, check=False)


def test_every_benchmark_can_be_rehearsed_and_keeps_nothing() -> None:
    before = command.TILES.read_bytes()
    done = gpu_sh("--rehearse")
    assert done.returncode == 0, done.stderr[-4000:]
    for suite in command.SUITES:
        assert f"copy on the card, at {suite}" in done.stdout
    assert "tune decode 128 x 2 bytes" in done.stdout and "FAILED" not in done.stdout
    assert done.stdout.count("of the cold run's") == 3  # from host, from it by layer groups, and from disk
    assert command.TILES.read_bytes() == before


def test_without_a_device_nothing_is_measured_and_the_exit_code_says_so(tmp_path: Path) -> None:
    done = gpu_sh("--out", str(tmp_path), "decode")
    assert (done.returncode, list(tmp_path.iterdir())) == (3, [])
    assert "no CUDA device was found" in done.stderr


def test_a_suite_that_dies_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")  # of which the suite's process dies
    card = SimpleNamespace(name="NVIDIA H200", total_memory=1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: card)
    assert command.everything({"overhead": 60.0}, tmp_path) == 0
    (path,) = tmp_path.iterdir()
    result = json.loads(path.read_text(encoding="utf-8"))
    assert path.name == f"{result['machine']['date']}-h200.json"
    assert result["rows"] == [{"name": "overhead", "failure": "its process ended with 3"}]


def asked(**given: object) -> Namespace:
    return Namespace(**{"suites": [], "tune": False, "sanitize": False, "soak": None} | given)


def test_all_suites_fit_into_nine_minutes() -> None:
    boxes = command.boxes_of(asked())
    assert list(boxes) == ["tests", *command.SUITES]
    assert sum(boxes.values()) <= 540 and command.SECONDS < 540
    assert boxes["mixed"] >= command.SOAK_SECONDS + command.START_SECONDS


def test_a_suite_that_is_asked_for_has_all_the_time_there_is() -> None:
    assert command.boxes_of(asked(suites=["model"])) == {"model": command.SECONDS}
    assert command.boxes_of(asked(soak=600.0)) == {"mixed": 600.0 + command.START_SECONDS}
    assert command.boxes_of(asked(suites=["decode"], sanitize=True)) == {"decode": command.SECONDS, "sanitize": 300.0}


@pytest.mark.parametrize(("text", "seconds"), [("10m", 600.0), ("90s", 90.0), ("10", None), ("m", None), ("", None)])
def test_times_have_a_unit(text: str, seconds: float | None) -> None:
    with nullcontext() if seconds else pytest.raises(ArgumentTypeError):
        assert command.minutes(text) == seconds


def sanitizer(folder: Path, monkeypatch: pytest.MonkeyPatch, exit_code: int) -> Lab:
    """Rows of a run under a tool that finds what it is told to."""
    tool = folder / "compute-sanitizer"
    tool.write_text(f"#!/bin/sh\nexit {exit_code}\n", encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=":")
    lab = Lab(rehearsing=True)
    lab.rehearsing, lab.device = False, torch.device("cpu")
    sanitize.run(lab)
    return lab


@pytest.mark.parametrize(("exit_code", "wrong"), [(sanitize.FOUND, True), (1, False)])
def test_what_the_sanitizer_finds_is_wrong_and_what_breaks_it_is_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exit_code: int, wrong: bool
) -> None:
    lab = sanitizer(tmp_path, monkeypatch, exit_code)
    assert [is_wrong(row) for row in lab.rows] == [wrong, wrong]
    assert all("failure" in row for row in lab.rows)


def test_a_clean_run_has_no_errors_and_no_tool_is_no_failure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert [row["value"] for row in sanitizer(tmp_path, monkeypatch, 0).rows] == [0, 0]
    monkeypatch.setenv("PATH", "")
    lab = Lab(rehearsing=False)
    sanitize.run(lab)
    assert [row["absent"] for row in lab.rows] == ["it is not on PATH"]


@pytest.mark.parametrize(("queries", "length"), [(1, 7), (3, 7), (7, 7)])
def test_the_reference_is_attention(queries: int, length: int) -> None:
    query = torch.randn((4, queries, 8), dtype=torch.float64)
    key, value = torch.randn((2, 2, length, 8), dtype=torch.float64)
    every = (states.repeat_interleave(2, 0)[None] for states in (key, value))
    mask = torch.ones((queries, length), dtype=torch.bool).tril(length - queries)
    expected = scaled_dot_product_attention(query[None], *every, attn_mask=mask, scale=0.3)[0].transpose(0, 1)
    torch.testing.assert_close(attention(query, key, value, scale=0.3), expected)


def test_what_is_wrong_or_left_unwritten_is_no_figure() -> None:
    lab, truth = Lab(rehearsing=True), torch.randn((3, 4), dtype=torch.float64)
    assert lab.checked(lambda: truth.to(torch.bfloat16), truth) < 1e-2
    for out in (
        truth.bfloat16() * 1.1,
        truth.bfloat16().index_fill(0, torch.tensor(1), torch.nan),
        truth.bfloat16()[:2],
    ):
        with pytest.raises(ArithmeticError):
            lab.checked(lambda out=out: out, truth)


def test_the_table_says_what_met_its_goal_and_what_has_no_figure() -> None:
    lab = Lab(rehearsing=False)
    lab.add("a", 9.0, "GB/s", limit_name="copy", limit=10.0, goal=0.85, error=1e-3)
    lab.add("b", 8.0, "GB/s", limit_name="copy", limit=10.0, goal=0.85)
    lab.add("c", 8.0, "us")
    lab.absent("d", "x is not installed")
    lab.failed("e", ArithmeticError("wrong: 2"))
    told = list(lines(lab.rows))
    for line, said in zip(told, ("goal 0.85 met  error 1.0e-03", "NOT MET", "8 us", "x is not", "FAILED"), strict=True):
        assert said in line
    assert [is_wrong(row) for row in lab.rows] == [False, False, False, False, True]


def test_tuning_keeps_the_entries_of_other_cards(tmp_path: Path) -> None:
    table = tmp_path / "tiles.json"
    table.write_text('{"sm_80": {"decode 128 x 2 bytes": {"rows": 16}}}', encoding="utf-8")
    write(Case(True, 128, 2), Tiles(16, 64, 4, 3, 2), table, tmp_path / "out")
    written = json.loads(table.read_text(encoding="utf-8"))
    assert written.pop("sm_80") == {"decode 128 x 2 bytes": {"rows": 16}}
    (entries,) = written.values()
    assert entries == {"decode 128 x 2 bytes": Tiles(16, 64, 4, 3, 2)._asdict()}
    assert (tmp_path / "out" / "tiles.json").read_bytes() == table.read_bytes()
