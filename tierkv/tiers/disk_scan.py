"""Rows of the manifest put together to runs again, for recovery and inspection."""

from collections.abc import Iterator, Sequence

from tierkv.keys import Key
from tierkv.tiers.base import Run
from tierkv.tiers.disk_manifest import Row


def runs_of(rows: Sequence[Row]) -> Iterator[Run]:
    """Chains of parent and child as runs, parents first; what lost its parent comes last.

    rows: in order of depth. A run ends where its path branches or the next block says it belongs elsewhere.
    """
    by_key = {row.key: row for row in rows}
    children: dict[Key, list[Row]] = {}
    starts, orphans = [], []
    for row in by_key.values():
        parent = by_key.get(row.parent)
        if parent is not None and parent.depth == row.depth - 1 and parent.root == row.root:
            children.setdefault(row.parent, []).append(row)
        elif row.depth == 0 and row.parent == row.root:
            starts.append(row)
        else:
            orphans.append(row)
    for first in (*starts, *orphans):
        waiting = [first]
        while waiting:
            chain = [waiting.pop()]
            while len(after := children.get(chain[-1].key, [])) == 1 and bool(after[0].tokens) == bool(chain[0].tokens):
                chain.append(after[0])
            waiting += reversed(after)
            yield Run(
                chain[0].root,
                chain[0].parent,
                chain[0].depth,
                tuple(row.key for row in chain),
                b"".join(row.tokens for row in chain),
            )
