"""The sequences of one step, packed along one token axis: what a kernel is told about them. Nothing of engines or stores.

First prefill, chunked prefill and decode may be mixed in a step:

    cu_seqlens  0        5   6   7            12        tokens of this step, per sequence
                |aaaaa   |b  |c  |ddddd        |
    lengths     a: 5     b: 40  c: 1001  d: 69          tokens in pages, those of this step included
"""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

Tensor = torch.Tensor
T = TypeVar("T")

Span = tuple[int, int, int]
"""First token of a sequence in the step, the token past its last, and its length."""


class Plans(Protocol):
    """Where the plans of a step lie that is recorded as a CUDA graph, and replayed with other lengths.

    Such a step has one more row of lengths and cu_seqlens than sequences, which has no tokens: items that do nothing are of it.
    """

    def place(self, make: Callable[[list[Span]], np.ndarray[Any, Any]], device: torch.device) -> Tensor:
        """Device memory that holds what `make` (int32, always as long) says of the spans of the step that is run."""


@dataclass(slots=True)
class PagedBatch:
    """Built once per step, shared by all layers.

    slots: [tokens] int64, page * block_tokens + offset, where each token's KV goes.  tables: [num_seqs, max_pages] int32.
    lengths: [num_seqs] int32.  cu_seqlens: [num_seqs + 1] int32.  All on the pool's device.
    spans: one per sequence, on the host: give them where they are known, reading them back waits for the device.
    scratch: reused between steps, grown on demand: a fresh gather target costs its page faults every time.
    plans: given where the step is recorded, to be replayed; then every sequence has one token.
    alike: its maker has seen a step of the same layers pass, which differ in nothing but where they lie: they are not looked at
    again. Looking takes 8 us per layer, in every step (2-core Intel Xeon VM, 2026-11-22).
    """

    slots: Tensor
    tables: Tensor
    lengths: Tensor
    cu_seqlens: Tensor
    spans: list[Span] = field(default_factory=list)
    scratch: list[Tensor] = field(default_factory=list)
    plans: Plans | None = None
    alike: bool = False
    _derived: dict[Hashable, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, dtype in (
            ("slots", torch.int64),
            ("tables", torch.int32),
            ("lengths", torch.int32),
            ("cu_seqlens", torch.int32),
        ):
            given = getattr(self, name)
            if given.dtype != dtype or given.stride(-1) != 1:  # kernels take both for granted
                raise ValueError(
                    f"{name}: {given.dtype} of strides {list(given.stride())}; expected {dtype}, neighbours adjacent"
                )
        if not self.spans:
            bounds = self.cu_seqlens.tolist()
            self.spans = list(zip(bounds[:-1], bounds[1:], self.lengths.tolist(), strict=True))

    def once(self, key: Hashable, derive: Callable[[], T]) -> T:
        """What a kernel derives from the batch: by the first layer that asks, for all that follow."""
        try:
            derived: T = self._derived[key]
        except KeyError:
            derived = self._derived[key] = derive()
        return derived
