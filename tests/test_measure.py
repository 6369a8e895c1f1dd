"""`tierkv bench device`, and its transfers, where no GPU is: the bodies run on the CPU, whose figures mean nothing."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tierkv.cli import main
from tierkv.errors import ConfigError
from tierkv.measure import device, transfers
from tierkv.measure.lab import Lab
from tierkv.tiers.host import HostSlab

FACTS = {"gpu": "NVIDIA H200", "gpu_bytes": 140 << 30, "compute_capability": "9.0", "torch": "2.11", "cuda": "13.0"}


def test_transfers_have_a_row_for_each_way_size_and_number_of_pages() -> None:
    lab = Lab(rehearsing=True)
    transfers.run(lab)
    names = [row["name"] for row in lab.rows]
    for size in transfers.PAGES:
        assert [name.split(",")[0] for name in names if size in name] == [
            "device to host to device",
            *["H2D", "D2H"] * 2,
            *["both ways at once"] * 2,
        ]
    assert all(row["limit"] > 0 for row in lab.rows)


def test_a_page_that_comes_back_changed_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    lab = Lab(rehearsing=True)
    with transfers.ground(lab, transfers.TINY) as on:
        copy_in = on.pool.copy_in

        def damaged(host: HostSlab, places: Any, pages: Any, **how: Any) -> None:
            host.rows[places[0], 0] ^= np.uint8(1)
            copy_in(host, places, pages, **how)

        monkeypatch.setattr(on.pool, "copy_in", damaged)
        with pytest.raises(ArithmeticError):
            transfers.there_and_back(on, "tiny")
    assert lab.rows == []


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device here")
def test_without_a_device_the_command_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "device"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: bench device: no CUDA device was found") and err.count("\n") == 1


def test_without_cupy_the_command_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def refuse(ordinal: int) -> None:
        raise ConfigError("device.kind = cuda needs CuPy: pip install it")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(device, "open_cuda", refuse)
    assert main(["bench", "device"]) == 1
    assert "needs CuPy" in capsys.readouterr().err


def measured(monkeypatch: pytest.MonkeyPatch, *, wrong: bool = False) -> None:
    """Let the command find a card, on which nothing takes any time."""

    def run(lab: Lab, begin: Any) -> None:
        begin("transfers")
        lab.add("copy on the card", 4300.0, "GB/s")
        lab.add("H2D, 16 pages of 2 MiB", 52.0, "GB/s", limit_name="one copy", limit=54.0, goal=0.95)
        lab.add("D2H, 16 pages of 2 MiB", 40.0, "GB/s", limit_name="one copy", limit=54.0, goal=0.95)
        lab.failed("attention", ArithmeticError("wrong: 2") if wrong else RuntimeError("out of [memory]"))

    monkeypatch.setattr(device, "card", lambda: FACTS)
    monkeypatch.setattr(device, "run", run)


def test_the_table_has_the_limits_beside_the_values(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(monkeypatch)
    assert main(["bench", "device", "--goals"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "NVIDIA H200, 140.00 GiB, compute capability 9.0, torch 2.11, CUDA 13.0"
    assert lines[2].split() == ["copy", "on", "the", "card", "4,300", "GB/s"]
    assert lines[3].split()[-6:] == ["GB/s", "54", "0.96", "one", "copy", "0.95"]
    assert lines[5].split()[:2] == ["attention", "failed"] and "RuntimeError: out of [memory]" in lines[5]


def test_json_is_all_that_is_printed_and_a_wrong_result_is_a_failure(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measured(monkeypatch, wrong=True)
    assert main(["bench", "device", "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["machine"] == FACTS
    assert report["rows"][0]["name"] == "copy on the card"


def test_a_card_is_described_by_what_decides_its_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    card = SimpleNamespace(name="NVIDIA H200", total_memory=140 << 30, major=9, minor=0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda ordinal: card)
    monkeypatch.setattr(device, "open_cuda", lambda ordinal: None)
    assert set(device.card()) == set(FACTS)
