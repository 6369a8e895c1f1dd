"""Redis (Valkey) as a rival: the embedded server, over its unix socket, through `RedisTier`, the fastest way that we have."""

from collections.abc import Sequence
from typing import Final, cast

from bench.daemon.party import DEADLINE_S, SIZES, Batch, NotInstalled, Party, Refused, key_of
from tierkv.errors import ConfigError
from tierkv.keys import Key
from tierkv.layout import Layout
from tierkv.metrics import Metrics
from tierkv.tiers.base import Run
from tierkv.tiers.redis import RedisTier
from tierkv.valkey import EmbeddedValkey

LAYOUTS: Final = {
    SIZES["2 MiB"]: Layout(num_layers=32, num_kv_heads=8, head_dim=128, dtype="bfloat16"),
    SIZES["360 KiB"]: Layout(num_layers=30, num_kv_heads=3, head_dim=64, dtype="bfloat16"),
}
"""A layout for each size of a block."""
PROBED: Final = Layout(num_layers=1, num_kv_heads=1, head_dim=16, dtype="bfloat16")
"""For blocks that exist only to be asked for: 1 KiB."""


class Redis(Party):
    """Reads and writes carry header, key and checksum, all verified, as the tier always does."""

    def __init__(self) -> None:
        try:
            self._server = EmbeddedValkey(capacity_bytes=1 << 30)
        except ConfigError as error:
            raise NotInstalled(str(error)) from None
        self._tiers = {
            block_bytes: RedisTier(self._server.url, layout=layout, metrics=Metrics(), deadline_s=DEADLINE_S)
            for block_bytes, layout in [*LAYOUTS.items(), (PROBED.block_bytes, PROBED)]
        }
        self._runs: dict[tuple[int, range], Run] = {}
        self._one: list[Key] = []

    def write(self, batch: Batch) -> None:
        _all(self._tiers[batch.block_bytes].write(self._run(batch), batch.block_views), "written")

    def read(self, batch: Batch) -> None:
        _all(self._tiers[batch.block_bytes].read(self._run(batch).keys, batch.out_views), "read")

    def forget(self, batch: Batch) -> None:
        self._tiers[batch.block_bytes].delete(self._run(batch).keys)

    def hold(self, keys: Sequence[bytes]) -> None:
        run, block = _run_of(keys), memoryview(bytes(PROBED.block_bytes))
        _all(self._tiers[PROBED.block_bytes].write(run, [block] * len(keys)), "written")
        self._one = [run.keys[0]]

    def contains(self, keys: Sequence[bytes]) -> Sequence[object]:
        return self._tiers[PROBED.block_bytes].contains(cast(Sequence[Key], keys))

    def ping(self) -> None:
        self._tiers[PROBED.block_bytes].contains(self._one)

    def close(self) -> None:
        for tier in self._tiers.values():
            tier.close()
        self._server.close()

    def _run(self, batch: Batch) -> Run:
        of = batch.block_bytes, batch.numbers
        if of not in self._runs:
            self._runs[of] = _run_of(batch.keys)
        return self._runs[of]


def _run_of(keys: Sequence[bytes]) -> Run:
    root = Key(key_of("root"))
    return Run(root, root, 0, tuple(map(Key, keys)))


def _all(done: Sequence[bool], what: str) -> None:
    if not all(done):
        raise Refused(f"{done.count(False)} of {len(done)} blocks were not {what}")
