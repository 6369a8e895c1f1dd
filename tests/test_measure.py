"""`tierkv bench device`, and its transfers, where no GPU is: the bodies run on the CPU, whose figures mean nothing."""

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from tierkv.cli import main
from tierkv.errors import ConfigError
from tierkv.measure import device, reuse, steps, transfers
from tierkv.measure.lab import Lab
from tierkv.measure.serving import TINY, Shape, llama
from tierkv.tiers.device import PagePool
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


ENGINE_ROWS = {
    "decode": ["tiny, decode 1 x 24", "tiny, decode 3 x 24"],
    "prefix": ["tiny, first token after 48 tokens from host", "tiny, first token after 48 tokens from disk"],
    "store": ["tiny, 2 x (20 + 3) tokens, never reused", "tiny, decode 2 x 20 while spilling at"],
    "identity": [
        f"{what} from {way}"
        for way in ("host", "host in 2 layer groups", "disk")
        for what in ("KV back", "greedy tokens after KV")
    ],
}


@pytest.mark.parametrize("part", ENGINE_ROWS)
def test_rows_of_an_engine_stand_beside_their_limits(part: str) -> None:
    lab, begun = Lab(rehearsing=True), list[str]()
    device.run(lab, [part], device.SMALL, begun.append)
    first, *rows = lab.rows
    assert first["name"].startswith("copy on the card") and begun[1:] == [device.PARTS[part].about]
    assert [row["name"] for row in rows if not row["name"].startswith(tuple(ENGINE_ROWS[part]))] == []
    assert len(rows) == len(ENGINE_ROWS[part])
    assert all(row["limit"] > 0 and row["limit_name"] for row in rows)
    if part == "identity":
        assert all(row["ratio"] == row["goal"] == 1 for row in rows)


def test_kv_that_comes_back_changed_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    copy_in = PagePool.copy_in

    def damaged(self: PagePool, host: HostSlab, places: Any, pages: Any, **how: Any) -> None:
        copy_in(self, host, places, pages, **how)
        self.pool[pages[0], 0, 0, 0, 0, 0] = 1.5

    monkeypatch.setattr(PagePool, "copy_in", damaged)
    lab = Lab(rehearsing=True)
    with pytest.raises(ArithmeticError):
        reuse.identity(lab, None)
    assert lab.rows == []


def test_prompts_that_begin_alike_by_chance_are_new_and_those_that_are_known_are_no_figure(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lab = Lab(rehearsing=True)
    model = llama(lab, TINY, torch.bfloat16)
    draw = steps.prompts
    monkeypatch.setattr(steps, "prompts", lambda *sizes: [[5, *prompt[1:]] for prompt in draw(*sizes)])
    steps.no_reuse(lab, model, TINY)
    assert len(lab.rows) == 1
    given = draw(TINY, 2, 20)
    monkeypatch.setattr(steps, "prompts", lambda *sizes: given)
    with pytest.raises(RuntimeError, match="prompts should have been computed, and came from"):
        steps.no_reuse(lab, model, TINY)


def test_a_prefix_that_came_from_elsewhere_is_no_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reuse, "leave_only", lambda store, tier: None)  # so that it lies on the device
    lab = Lab(rehearsing=True)
    with pytest.raises(RuntimeError, match="48 tokens should have come from host, and came from"):
        reuse.prefix(lab, llama(lab, TINY, torch.bfloat16), TINY, None)
    assert lab.rows == []


def test_a_model_that_does_not_fit_is_a_row_and_the_other_parts_are_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any) -> None:
        raise RuntimeError("CUDA out of memory")

    monkeypatch.setattr(device, "llama", refuse)
    lab = Lab(rehearsing=True)
    lab.copy_gbps()
    monkeypatch.setattr(lab, "_give_back", lambda: None)
    lab.rehearsing = False  # where a failure is a row
    monkeypatch.setattr(reuse, "identity", lambda *_, **__: lab.add("reached", 1, ""))
    device.run(lab, ["decode", "identity"], device.SMALL, lambda about: None)
    assert lab.rows[1] == {
        "name": "decode steps",
        "failure": "RuntimeError: CUDA out of memory",
        "wrong": False,
    }
    assert {row["name"] for row in lab.rows[2:]} == {"reached"}


def test_parts_are_measured_in_their_order_however_they_are_asked_for() -> None:
    assert device.chosen(None) == list(device.PARTS)
    assert device.chosen("identity, transfers") == ["transfers", "identity"]


def measured(monkeypatch: pytest.MonkeyPatch, *, wrong: bool = False, asked: list[Any] | None = None) -> None:
    """Let the command find a card, on which nothing takes any time."""

    def run(lab: Lab, names: list[str], shape: Shape, begin: Any) -> None:
        if asked is not None:
            asked.append((names, shape.name))
        begin("transfers")
        lab.add("copy on the card", 4300.0, "GB/s")
        lab.add("H2D, 16 pages of 2 MiB", 52.0, "GB/s", limit_name="one copy", limit=54.0, goal=0.95)
        lab.add("D2H, 16 pages of 2 MiB", 40.0, "GB/s", limit_name="one copy", limit=54.0, goal=0.95)
        lab.absent("prefix from disk", "zarr is not installed")
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
    assert lines[5].split() == ["prefix", "from", "disk", "not", "here", "zarr", "is", "not", "installed"]
    assert lines[6].split()[:2] == ["attention", "failed"] and "RuntimeError: out of [memory]" in lines[6]


def test_parts_and_size_are_those_that_were_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[Any] = []
    measured(monkeypatch, asked=asked)
    for options in ([], ["--full"], ["--parts", "store,decode"]):
        assert main(["bench", "device", *options]) == 0
    assert asked == [
        (list(device.PARTS), "Llama 3.2 1B"),
        (list(device.PARTS), "Llama 3 8B"),
        (["decode", "store"], "Llama 3.2 1B"),
    ]


@pytest.mark.parametrize("names", ["decode,nonsense", "", "decode,"])
def test_a_part_that_there_is_not_is_one_clear_line(names: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "device", "--parts", names]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert f"--parts {names}: there is no part" in err and ",".join(device.PARTS) in err


def test_the_help_names_the_parts(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "device", "--help"]) == 0
    said = capsys.readouterr().out
    assert all(f"{name}," in said or f"{name};" in said for name in device.PARTS)


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
