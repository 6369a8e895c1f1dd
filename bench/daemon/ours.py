"""tierkv's own daemon as a party: `tierkv daemon` in a process of its own, one `Blocks` per size of a block in the user's.

Keys are chains over tokens, so each batch is a path of its own: its tokens begin with the number of its first block.
"""

import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import numpy as np

from bench.daemon.party import DEADLINE_S, NUM_PROBED, Batch, Party, Refused
from bench.daemon.rivals import LAYOUTS, PROBED
from tierkv.daemon.blocks import Blocks
from tierkv.daemon.client import DaemonClient
from tierkv.daemon.protocol import State
from tierkv.keys import Namespace, chain
from tierkv.layout import Layout
from tierkv.tiers.base import Run

CAPACITY: str = "3GiB"


class Tierkv(Party):
    """Blocks through memory that both map; the socket carries places and checksums. Every read is verified."""

    address: ClassVar[str] = "unix"

    def __init__(self) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="tierkv-bench-")
        url = f"unix://{self._folder.name}/daemon.sock" if self.address == "unix" else "tcp://127.0.0.1:0"
        words = [
            "daemon",
            "--listen",
            url,
            "--http",
            "off",
            "--set",
            f"host.capacity={CAPACITY}",
            "--set",
            "server.layouts=3",
        ]
        code = "import sys; from tierkv.cli import main; sys.exit(main(sys.argv[1:]))"
        self._process = subprocess.Popen(
            [sys.executable, "-c", code, *words],
            cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout
        said = iter(self._process.stdout.readline, "")
        self.url = next(line.split()[-1] for line in said if "listens on" in line)
        self._client = DaemonClient(self.url, connect_s=DEADLINE_S)
        self._blocks = {layout.block_bytes: self._attach(layout) for layout in [*LAYOUTS.values(), PROBED]}
        self._runs: dict[tuple[int, range], Run] = {}
        self._probed = self._run_of(PROBED, 0, NUM_PROBED)

    def _attach(self, layout: Layout) -> Blocks:
        namespace = Namespace("bench", layout)
        blocks = Blocks(self._client, namespace=namespace, root=namespace.root())
        blocks.attach()
        return blocks

    def write(self, batch: Batch) -> None:
        blocks = self._blocks[batch.block_bytes]
        _all(blocks.write(self._run(batch), batch.block_views, deadline_s=DEADLINE_S), State.HERE)

    def read(self, batch: Batch) -> None:
        blocks = self._blocks[batch.block_bytes]
        _all(blocks.read(self._run(batch).keys, batch.out_views, deadline_s=DEADLINE_S), State.HERE)

    def forget(self, batch: Batch) -> None:
        self._blocks[batch.block_bytes].delete(self._run(batch).keys)

    def hold(self, keys: Sequence[bytes]) -> None:
        block = memoryview(bytes(PROBED.block_bytes))
        states = self._blocks[PROBED.block_bytes].write(self._probed, [block] * len(keys), deadline_s=DEADLINE_S)
        _all(states, State.HERE)

    def contains(self, keys: Sequence[bytes]) -> Sequence[object]:
        return self._blocks[PROBED.block_bytes].presence(self._probed.keys, timeout_s=DEADLINE_S)

    def ping(self) -> None:
        self._client.ping()

    def close(self) -> None:
        self._client.close()
        self._process.terminate()
        self._process.wait(DEADLINE_S)
        self._folder.cleanup()

    def _run(self, batch: Batch) -> Run:
        of = batch.block_bytes, batch.numbers
        if of not in self._runs:
            layout = next(layout for layout in LAYOUTS.values() if layout.block_bytes == batch.block_bytes)
            self._runs[of] = self._run_of(layout, batch.numbers.start * 1000 + len(batch.numbers), len(batch.numbers))
        return self._runs[of]

    @staticmethod
    def _run_of(layout: Layout, first: int, length: int) -> Run:
        tokens = (np.arange(length * layout.block_tokens, dtype="<i4") + first * 1024).tobytes()
        root = Namespace("bench", layout).root()
        return Run(root, root, 0, tuple(chain(root, tokens, block_tokens=layout.block_tokens)), tokens)


class TierkvTcp(Tierkv):
    """The same through a loopback TCP socket, as from another machine: blocks go through the socket, too."""

    address: ClassVar[str] = "tcp"


def _all(states: Sequence[State], wanted: State) -> None:
    if any(state is not wanted for state in states):
        raise Refused(f"{len(states) - states.count(wanted)} of {len(states)} blocks were not {wanted.name.lower()}")
