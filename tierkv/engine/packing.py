"""From the work of a step to index arithmetic: which tokens, where they stand, which pages they read and write."""

from collections.abc import Sequence as List
from typing import Final, Generic, NamedTuple, TypeVar

import numpy as np
import torch

from tierkv.engine.scheduler import Work
from tierkv.engine.sequence import Sequence
from tierkv.engine.staging import Array, Field
from tierkv.kernels.batch import PagedBatch, Plans, Span

T = TypeVar("T")

_COLUMNS: Final = 16  # tables are this wide, or a multiple: kernels are compiled again for other strides


class Inputs(NamedTuple, Generic[T]):
    """Arrays of a step, on the host or on the device, as `PagedBatch` describes them. tokens, positions: [tokens] int64."""

    tokens: T
    positions: T
    slots: T
    lengths: T
    bounds: T
    tables: T


def fields(*, num_sequences: int, num_tokens: int, width: int) -> list[Field]:
    """What `Inputs` are made of, in order."""
    each = ("int64", (num_tokens,))
    return [
        *(each, each, each),
        ("int32", (num_sequences,)),
        ("int32", (num_sequences + 1,)),
        ("int32", (num_sequences, width)),
    ]


def batch_of(
    inputs: Inputs[torch.Tensor], spans: list[Span], *, scratch: list[torch.Tensor], plans: Plans | None = None
) -> PagedBatch:
    """What attention is told of a step; spans may be fewer than the rows that are on the device."""
    return PagedBatch(
        inputs.slots,
        inputs.tables,
        inputs.lengths,
        inputs.bounds,
        spans=spans,
        scratch=scratch,
        plans=plans,
    )


class Packer:
    """Writes inputs. Block tables change once in `block_tokens` steps, and are kept as arrays meanwhile."""

    def __init__(self, block_tokens: int) -> None:
        self._block_tokens = block_tokens
        self._tables: dict[str, tuple[list[int], Array]] = {}

    def width(self, work: List[Work]) -> int:
        """Columns of the step's tables."""
        return columns(max(item.sequence.num_computed + item.num_tokens for item in work), self._block_tokens)

    def fill(self, work: List[Work], into: Inputs[Array]) -> list[Span]:
        """Write the step into the first rows of the arrays; returns what lies in them, per sequence."""
        num_rows, block_tokens = len(work), self._block_tokens
        starts = np.fromiter((item.sequence.num_computed for item in work), np.int64, num_rows)
        counts = np.fromiter((item.num_tokens for item in work), np.int64, num_rows)
        lengths, bounds, tables = into.lengths[:num_rows], into.bounds[: num_rows + 1], into.tables[:num_rows]
        bounds[0] = 0
        np.cumsum(counts, out=bounds[1:])
        np.add(starts, counts, out=lengths, casting="same_kind")
        num_tokens = int(bounds[-1])
        tokens, positions, slots = into.tokens[:num_tokens], into.positions[:num_tokens], into.slots[:num_tokens]
        self._fill_tables([item.sequence for item in work], lengths, tables)
        if num_tokens == num_rows:
            tokens[:] = [item.sequence.tokens[item.sequence.num_computed] for item in work]
            positions[:] = starts
            owner = np.arange(num_rows)
        else:
            for item, first, last in zip(work, bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
                begin = item.sequence.num_computed
                tokens[first:last] = item.sequence.tokens[begin : begin + item.num_tokens]
            owner = np.repeat(np.arange(num_rows), counts)
            np.add(np.arange(num_tokens), (starts - bounds[:-1])[owner], out=positions)
        np.multiply(tables[owner, positions // block_tokens], block_tokens, out=slots, dtype=np.int64)
        slots += positions % block_tokens
        return list(zip(bounds[:-1].tolist(), bounds[1:].tolist(), lengths.tolist(), strict=True))

    def _fill_tables(self, sequences: List[Sequence], lengths: Array, tables: Array) -> None:
        known, self._tables = self._tables, {}
        tables.fill(0)
        for row, (sequence, length) in enumerate(zip(sequences, lengths.tolist(), strict=True)):
            entry = known.get(sequence.id)
            if entry is None or entry[0] != sequence.pages:
                entry = sequence.pages[:], np.asarray(sequence.pages, np.int32)
            self._tables[sequence.id] = entry
            used = -(-length // self._block_tokens)
            tables[row, :used] = entry[1][:used]


def columns(num_tokens: int, block_tokens: int) -> int:
    """Columns of the table of a sequence, and some to spare."""
    return -(-num_tokens // (block_tokens * _COLUMNS)) * _COLUMNS
