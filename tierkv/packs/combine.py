"""Two packs beside each other: what differs, and one pack with what both have."""

import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from tierkv.errors import PackError
from tierkv.facts import differing
from tierkv.keys import Key
from tierkv.packs.manifest import Document
from tierkv.packs.pack import Pack
from tierkv.packs.write import Model, Source, Writer, held_place, rows_of, write
from tierkv.warm.plan import make_plan


@dataclass(frozen=True, slots=True)
class Difference:
    """model: what their models and layouts differ in; blocks have nothing in common then. Documents are told by name.

    shared, left, right: blocks of both, and of one alone.  unequal: blocks of both whose bytes differ.
    """

    model: tuple[str, ...]
    added: tuple[str, ...]
    removed: tuple[str, ...]
    changed: tuple[str, ...]
    shared: int
    left: int
    right: int
    unequal: int

    @property
    def none(self) -> bool:
        """Do they say the same?"""
        return not (self.model or self.added or self.removed or self.changed or self.left or self.right or self.unequal)


def diff(left: Pack, right: Pack) -> Difference:
    """What changes from `left` to `right`. No block is read: their digests are compared."""
    before = {one.name: one for one in left.manifest.documents}
    after = {one.name: one for one in right.manifest.documents}
    rows = ({key.tobytes(): row for row, key in enumerate(pack.keys)} for pack in (left, right))
    ours, theirs = rows
    sums = left.array("digests"), right.array("digests")
    both = ours.keys() & theirs.keys()
    return Difference(
        model=tuple(_misfits(left, right)),
        added=tuple(sorted(after.keys() - before.keys())),
        removed=tuple(sorted(before.keys() - after.keys())),
        changed=tuple(
            sorted(
                name
                for name in before.keys() & after.keys()
                if _content(left, before[name]) != _content(right, after[name])
            )
        ),
        shared=len(both),
        left=len(ours) - len(both),
        right=len(theirs) - len(both),
        unequal=sum(bytes(sums[0][ours[key]]) != bytes(sums[1][theirs[key]]) for key in both),
    )


def _content(pack: Pack, document: Document) -> tuple[str, int, bytes]:
    """What must be equal for two documents to be one; the last key stands for all of its blocks, whatever else is said."""
    last = b"" if document.last is None else pack.keys[document.last].tobytes()
    return document.sha256, document.num_tokens, last


def _misfits(left: Pack, right: Pack) -> list[str]:
    one, other = left.manifest, right.manifest
    sizes = ("num_layers", "parts", "num_kv_heads", "block_tokens", "head_dim", "dtype")
    pairs = [(name, getattr(one.layout, name), getattr(other.layout, name)) for name in sizes]
    found = [f"{name} {ours}, the other {theirs}" for name, ours, theirs in pairs if ours != theirs]
    found += [line.replace(", here ", ", the other ") for line in differing(one.facts, other.facts)]
    if one.adapter != other.adapter:
        found.append(f"adapter {one.adapter or 'none'}, the other {other.adapter or 'none'}")
    return found


def merge(packs: Sequence[Pack], out: Path, *, progress: Callable[[int], None] = lambda blocks: None) -> int:
    """Write a pack with all blocks of these, which must be of one model; how many. Of a block of several, the first counts.

    Documents keep their names; of two of one name, the first counts where they are equal, and otherwise it is a PackError.
    """
    if out.exists():
        raise PackError(f"{out} exists already: give another name, or remove it")
    first = packs[0]
    for pack in packs[1:]:
        if misfits := _misfits(first, pack):
            raise PackError(f"{pack.place} cannot be merged with {first.place}: {', '.join(misfits)}")
    step = first.layout.block_tokens
    named: dict[str, tuple[str, int, bytes]] = {}
    sources: list[Source] = []
    paths: list[bytes] = []
    for pack in packs:
        spans, tokens = pack.array("spans"), pack.tokens
        for number, document in enumerate(pack.manifest.documents):
            content = _content(pack, document)
            if document.name in named:
                if named[document.name] != content:
                    raise PackError(
                        f"{pack.place}: document {document.name} is another than the one of that name before; rename one"
                    )
                continue
            named[document.name] = content
            rows = [] if document.last is None else pack.path(document.last)
            paths.append(tokens[rows].tobytes())
            sources.append(
                Source(
                    document.name,
                    document.sha256,
                    document.num_tokens,
                    document.num_characters,
                    _spans(spans, rows, number),
                )
            )
    plan = make_plan(paths, block_tokens=step)
    table = rows_of(plan, first.manifest.root())
    where: dict[Key, tuple[Pack, int]] = {}
    for pack in reversed(packs):
        where |= {Key(key.tobytes()): (pack, row) for row, key in enumerate(pack.keys)}

    def read(numbers: Sequence[int], views: Sequence[memoryview]) -> None:
        for pack in packs:
            own = [
                (at, where[table.keys[row]][1]) for at, row in enumerate(numbers) if where[table.keys[row]][0] is pack
            ]
            for (_, row), wrong in zip(
                own, pack.read([row for _, row in own], [views[at] for at, _ in own]), strict=True
            ):
                if wrong is not None:
                    raise PackError(f"{pack.place}: row {row}: {wrong.why}: fetch that pack again, and merge then")

    one = first.manifest
    model = Model(one.model_name, one.weights_sha256, one.facts, one.layout, one.adapter)
    with held_place(out) as work:
        try:
            write(out, Writer(model, plan, table, sources, read, built={"merged": len(packs)}, progress=progress))
        finally:
            if [path.name for path in work.iterdir()] == ["lock"]:  # else a build of this name is to go on some time
                shutil.rmtree(work, ignore_errors=True)
    return plan.num_blocks


def _spans(spans: object, rows: Sequence[int], document: int) -> Callable[[int], tuple[int, int] | None]:
    """Where a pack knows the text of this document's blocks; those it shares with others are told as theirs."""

    def span(number: int) -> tuple[int, int] | None:
        of, start, end = spans[rows[number]]  # type: ignore[index]  # an array of rows of three
        return (int(start), int(end)) if int(of) == document and start >= 0 else None

    return span
