"""kill -9 at random moments during saves: what was promised is there, the rest is whole or absent, the cap holds."""

import random
import signal
import subprocess
import sys
from pathlib import Path

from tests.test_disk import capacity, open_tier
from tierkv.keys import Key
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.testing import block_of, make_run, read_blocks
from tierkv.tiers.disk_inspect import folder_bytes

ROOT = Path(__file__).parent.parent
LAYOUT = Layout(num_layers=8, num_kv_heads=2, head_dim=32, dtype="float32")  # 64 KiB
SLOTS = 200

SAVER = """
import random, sys
from pathlib import Path
from tests.test_disk import open_tier
from tests.test_disk_crash import LAYOUT, SLOTS
from tierkv.testing import blocks_of, make_run
tier = open_tier(Path(sys.argv[1]), SLOTS, LAYOUT)
choose = random.Random(int(sys.argv[2]))
print("open", flush=True)
for seed in range(int(sys.argv[2]), int(sys.argv[2]) + 1000):
    run = make_run(choose.randint(1, 90), seed=seed, layout=LAYOUT)
    saved = tier.write(run, blocks_of(run, LAYOUT))
    print("saved", seed, len(run.keys), "".join("01"[ok] for ok in saved), flush=True)
    held = list(tier.scan())
    for other in choose.sample(held, len(held) // 2):
        keys = other.keys[choose.randint(0, len(other.keys)) :]
        print("deleting", *(key.hex() for key in keys), flush=True)
        tier.delete(keys)
"""


def save_until_killed(folder: Path, seed: int, promised: set[Key], choose: random.Random) -> None:
    """Run a saver and kill it at some moment; keeps track of the keys it called saved and had not begun to delete."""
    command = [sys.executable, "-c", SAVER, str(folder), str(seed)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=ROOT) as saver:
        assert saver.stdout is not None
        assert saver.stdout.readline() == "open\n"
        last = choose.randint(1, 40)
        for number, line in enumerate(saver.stdout, 1):
            if number >= last:
                saver.send_signal(signal.SIGKILL)  # and read on: what it said until then was said
            if not line.endswith("\n"):
                break  # killed while it spoke
            kind, *rest = line.split()
            if kind == "deleting":
                promised -= {Key(bytes.fromhex(key)) for key in rest}
            else:
                run = make_run(int(rest[1]), seed=int(rest[0]), layout=LAYOUT)
                promised |= {key for key, ok in zip(run.keys, rest[2], strict=True) if ok == "1"}
            assert folder_bytes(folder / "disk") <= capacity(SLOTS, LAYOUT)
    assert saver.returncode == -signal.SIGKILL


def test_twenty_kills_during_saves_break_no_promise_and_tell_no_lie(tmp_path: Path) -> None:
    choose = random.Random(0)
    open_tier(tmp_path, SLOTS, LAYOUT).close()
    promised: set[Key] = set()
    checked = 0
    for kill in range(20):
        save_until_killed(tmp_path, 1000 * kill, promised, choose)
        metrics = Metrics()
        tier = open_tier(tmp_path, SLOTS, LAYOUT, metrics=metrics)
        held = [key for run in tier.scan() for key in run.keys]
        assert read_blocks(tier, held, LAYOUT) == [block_of(key, LAYOUT) for key in held]
        assert promised <= set(held)
        # The order of steps did it: there was nothing for the checksum to catch.
        assert metrics.corrupt_blocks.value("disk") == metrics.misses.value("disk") == 0
        assert folder_bytes(tier.path) <= capacity(SLOTS, LAYOUT)
        tier.close()
        checked += len(held)
    assert checked > 500
