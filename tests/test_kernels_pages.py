"""Moving KV against oracles that go token by token. Pools are full of noise, and all of it but what is named must stay."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.kernel_cases import kernel, reference, same_bits
from tierkv.kernels.batch import PagedBatch
from tierkv.kernels.layers import LayerPools
from tierkv.kernels.pages import copy_pages, gather_blocks, write_kv, write_latents
from tierkv.kernels.quant import encode_int8

Tensor = torch.Tensor

E4M3 = torch.float8_e4m3fn
LAYERS = 2

everywhere = pytest.mark.parametrize(
    "place",
    [
        "torch",
        pytest.param("cpu", marks=pytest.mark.interpreted),
        pytest.param("cuda", marks=pytest.mark.gpu),
    ],
)
"""The reference has the same oracles as the kernels: it is what the engine runs on a CPU."""


def call(place: str, name: str, *args: Any, **options: Any) -> None:
    function = reference("pages", name) if place == "torch" else kernel("pages", name, place)
    function(*args, **options)


def at(place: str, tensor: Tensor) -> Tensor:
    """A copy where `place` runs, with strides as they were but for gaps."""
    return tensor.detach().clone().to("cuda" if place == "cuda" else "cpu")


def noise(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Any bits at all: NaN with every payload, infinities, subnormals."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.Size(shape).numel() * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).view(shape)


def batch_of(slots: Sequence[int], place: str) -> PagedBatch:
    count = len(slots)
    tensors = [
        torch.tensor(list(slots), dtype=torch.int64),
        torch.zeros((1, 1), dtype=torch.int32),
        torch.tensor([count], dtype=torch.int32),
        torch.tensor([0, count], dtype=torch.int32),
    ]
    return PagedBatch(*(at(place, tensor) for tensor in tensors), spans=[(0, count, count)])


def random_slots(count: int, room: int, *, seed: int, padding: bool) -> list[int]:
    generator = torch.Generator().manual_seed(seed)
    slots: list[int] = torch.randperm(room, generator=generator)[:count].tolist()
    return [-1 - slot if padding and slot % 3 == 0 else slot for slot in slots]


@dataclass(frozen=True)
class Write:
    """Tokens for one layer of a pool. dtype: of K and V.  page: of the pool; None: the same."""

    tokens: int = 5
    heads: int = 2
    dim: int = 64
    block_tokens: int = 4
    dtype: torch.dtype = torch.bfloat16
    page: torch.dtype | None = None
    parts: int = 2
    padding: bool = False
    given_scales: bool = True
    shard: bool = False
    """The pool has more heads than this, as that of another rank's shards would."""
    seed: int = 0

    @property
    def page_dtype(self) -> torch.dtype:
        return self.page or self.dtype

    def states(self) -> list[Tensor]:
        """[tokens, heads, dim] per part, what a projection computes; values that any format has trouble with."""
        if self.page is None:
            return [
                noise(self.tokens, self.heads, self.dim, dtype=self.dtype, seed=self.seed + p)
                for p in range(self.parts)
            ]
        generator = torch.Generator().manual_seed(self.seed)
        states = torch.randn(self.parts, self.tokens, self.heads, self.dim, generator=generator) * 40
        hard = torch.tensor(
            [0.0, -0.0, 1e-40, 2**-10, 3 * 2**-11, 447.9, 464.0, 480.0, -1e30, torch.inf, -torch.inf, torch.nan]
        )
        states[:, 0, 0, : len(hard)] = hard
        states[:, -1, -1] = 0
        return list(states.to(self.dtype).unbind())

    def slots(self) -> list[int]:
        return random_slots(self.tokens, self.room * self.block_tokens, seed=self.seed, padding=self.padding)

    @property
    def room(self) -> int:
        """Pages of the pool."""
        return -(-self.tokens // self.block_tokens) + 2

    def pools(self) -> tuple[Tensor, Tensor | None]:
        """The pool and that of its scales; of fp8, one per head, spread over tokens without taking room."""
        heads = self.heads * (1 + self.shard)
        pool = noise(self.room, LAYERS, self.parts, heads, self.block_tokens, self.dim, dtype=self.page_dtype, seed=7)
        generator = torch.Generator().manual_seed(8)
        if self.page == torch.int8:
            return pool, torch.rand(pool.shape[:5], generator=generator)
        if self.page == E4M3 and self.given_scales:
            return pool, torch.rand(1, LAYERS, self.parts, heads, 1, generator=generator) * 3 + 0.01
        return pool, None

    def layer(self, pool: Tensor) -> Tensor:
        return pool[:, 1, :, self.heads :] if self.shard else pool[:, 1]

    def run(self, place: str) -> tuple[Tensor, Tensor | None]:
        pool, scale_pool = (None if tensor is None else at(place, tensor) for tensor in self.pools())
        assert pool is not None
        pages = self.layer(pool)
        scales = None if scale_pool is None else self.layer(scale_pool).expand(pages.shape[:4])
        states = [at(place, part).transpose(0, 1) for part in self.states()]
        name = "write_kv" if self.parts == 2 else "write_latents"
        call(place, name, *states, pages, batch_of(self.slots(), place), scales=scales)
        return pool.cpu(), None if scale_pool is None else scale_pool.cpu()

    def expected(self) -> tuple[Tensor, Tensor | None]:
        pool, scale_pool = self.pools()
        pages = self.layer(pool)
        scales = None if scale_pool is None else self.layer(scale_pool)
        for part, states in enumerate(self.states()):
            for token, slot in enumerate(self.slots()):
                for head in range(self.heads if slot >= 0 else 0):
                    page, offset = divmod(slot, self.block_tokens)
                    self._put(states[token, head], pages[page, part, head, offset], scales, (page, part, head, offset))
        return pool, scale_pool

    def _put(self, row: Tensor, target: Tensor, scales: Tensor | None, place: tuple[int, int, int, int]) -> None:
        if self.page is None:
            target.view(torch.uint8).copy_(row.view(torch.uint8))
        elif self.page == torch.int8:
            assert scales is not None
            codes, scale = encode_int8(row.view(1, -1))
            target.copy_(codes[0])
            scales[place] = scale[0]
        else:
            scale = torch.ones(()) if scales is None else scales[0, place[1], place[2], 0]
            codes = (row.float() * (1 / scale)).clamp(-448, 448).to(E4M3)
            target.view(torch.uint8).copy_(codes.view(torch.uint8))

    def check(self, place: str) -> None:
        (pool, scales), (expected, expected_scales) = self.run(place), self.expected()
        if self.page == E4M3:
            pool, expected = without_signs_of_nan(pool), without_signs_of_nan(expected)
        assert same_bits(pool, expected)
        assert (scales is None) == (expected_scales is None)
        if scales is not None:
            torch.testing.assert_close(scales, expected_scales, rtol=0, atol=0, equal_nan=True)


def without_signs_of_nan(pages: Tensor) -> Tensor:
    """The one thing on which processors differ."""
    codes = pages.view(torch.uint8)
    return torch.where(codes & 0x7F == 0x7F, 0x7F, codes)


WRITES = {
    "no token": Write(tokens=0),
    "one token": Write(tokens=1),
    "a whole page": Write(tokens=4, dtype=torch.float16),
    "many pages": Write(tokens=37, heads=3, block_tokens=16),
    "padding": Write(tokens=24, padding=True),
    "all padding but one": Write(tokens=2, padding=True, seed=3),
    "float32": Write(dtype=torch.float32, heads=1, dim=256),
    "eight heads": Write(heads=8, dim=128, padding=True),
    "head_dim 80": Write(heads=4, dim=80),
    "a shard": Write(heads=2, shard=True),
    "latents": Write(parts=1, heads=1, dim=576, tokens=3),
    "int8, all padding": Write(page=torch.int8, tokens=1, heads=1, block_tokens=1, padding=True, seed=65),
    "int8": Write(page=torch.int8, tokens=9, padding=True),
    "int8 of float16, head_dim 80": Write(page=torch.int8, dtype=torch.float16, dim=80, heads=3),
    "int8 of float32": Write(page=torch.int8, dtype=torch.float32, dim=128),
    "int8 shard": Write(page=torch.int8, shard=True),
    "int8 latents": Write(page=torch.int8, parts=1, heads=1, dim=96),
    "fp8": Write(page=E4M3, tokens=9, padding=True),
    "fp8 without scales": Write(page=E4M3, given_scales=False, dim=96),
    "fp8 of float32, head_dim 80": Write(page=E4M3, dtype=torch.float32, dim=80, heads=3),
    "fp8 of float16": Write(page=E4M3, dtype=torch.float16, shard=True),
    "fp8 latents": Write(page=E4M3, parts=1, heads=1, dim=576, tokens=3),
}


@everywhere
@pytest.mark.parametrize("case", WRITES.values(), ids=list(WRITES))
def test_tokens_are_written_to_their_slots_and_nowhere_else(case: Write, place: str) -> None:
    case.check(place)


@everywhere
@settings(max_examples=50, deadline=None)
@given(
    case=st.builds(
        Write,
        tokens=st.integers(1, 20),
        heads=st.integers(1, 8),
        dim=st.sampled_from([64, 72, 80, 128]),
        block_tokens=st.sampled_from([1, 2, 8, 16]),
        dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
        page=st.sampled_from([None, torch.int8, E4M3]),
        padding=st.booleans(),
        shard=st.booleans(),
        seed=st.integers(0, 99),
    )
)
def test_any_shape_is_written(case: Write, place: str) -> None:
    case.check(place)


@everywhere
def test_key_and_value_may_have_any_strides(place: str) -> None:
    fused = noise(6, 4, 3, 64, dtype=torch.float16)  # of a projection that computes Q, K and V at once
    apart = noise(2, 64, 6, dtype=torch.float16, seed=1)
    pool, slots = noise(2, 1, 2, 2, 4, 64, dtype=torch.float16, seed=2), [5, 0, 3, 7, 1, 6]
    expected = pool.clone()
    for token, slot in enumerate(slots):
        for head in range(2):
            expected[slot // 4, 0, 0, head, slot % 4] = fused[token, 1 + head, 2]
            expected[slot // 4, 0, 1, head, slot % 4] = apart[head, :, token]
    key, value, pool = at(place, fused)[:, 1:3, 2].transpose(0, 1), at(place, apart).transpose(1, 2), at(place, pool)
    call(place, "write_kv", key, value, pool[:, 0], batch_of(slots, place))
    assert same_bits(pool, expected)


@everywhere
def test_a_batch_serves_all_layers(place: str) -> None:
    case = Write(tokens=6, padding=True)
    pool, batch = at(place, case.pools()[0]), batch_of(case.slots(), place)
    key, value = (at(place, part).transpose(0, 1) for part in case.states())
    for layer in range(LAYERS):
        call(place, "write_kv", key, value, pool[:, layer], batch)
    slots = [slot for slot in case.slots() if slot >= 0]
    for slot in slots:
        assert same_bits(pool[slot // 4, 0, :, :, slot % 4], pool[slot // 4, 1, :, :, slot % 4])


FAR = 2**30 + 4096


def far_apart(*shape: int, place: str) -> Tensor:
    """uint8 of which the first axis strides over 1 GiB, of which next to nothing is ever touched."""
    width = torch.Size(shape[1:]).numel()
    flat = torch.empty((shape[0] - 1) * FAR + width, dtype=torch.uint8, device="cuda" if place == "cuda" else "cpu")
    view = flat.as_strided(shape, (FAR, *torch.empty(shape[1:], device="meta").stride()))
    return view.zero_()


@everywhere
@pytest.mark.parametrize("apart", ["pages", "heads"])
def test_pages_may_lie_beyond_what_32_bits_count(apart: str, place: str) -> None:
    pool = far_apart(3, 3, 2, 4, 64, place=place).view(E4M3)
    pages = pool.transpose(1, 2) if apart == "pages" else pool.permute(1, 2, 0, 3, 4)
    states = torch.randn(2, 3, 2, 64)
    call(place, "write_kv", *at(place, states), pages, batch_of([10, 1], place))
    assert same_bits(pages[2, :, :, 2], states.to(E4M3)[:, :, 0])
    assert same_bits(pages[0, :, :, 1], states.to(E4M3)[:, :, 1])


@everywhere
@pytest.mark.parametrize("apart", ["pages", "heads"])
def test_engine_pages_may_lie_beyond_what_32_bits_count(apart: str, place: str) -> None:
    pool = far_apart(3, 3, 4, 64, place=place)
    view = pool if apart == "pages" else pool.transpose(0, 1)
    block = at(place, noise(1, 1, 1, 3, 4, 64, dtype=torch.uint8))
    layers, slots = LayerPools([(view,)]), at(place, torch.tensor([[1, 11, -1, 6]]))
    call(place, "scatter_blocks", block, layers, slots)
    for token, slot in ((0, 1), (1, 11), (3, 6)):
        assert same_bits(view[slot // 4, :, slot % 4], block[0, 0, 0, :, token])
    out = torch.zeros_like(block)
    call(place, "gather_blocks", layers, slots, out)
    assert same_bits(out[..., [0, 1, 3], :], block[..., [0, 1, 3], :])


@dataclass(frozen=True)
class Copy:
    """Pairs of pages of a pool; the first tokens of each, or None: all. after: what follows the axis of tokens."""

    pairs: Sequence[tuple[int, int]]
    tokens: Sequence[int] | None = None
    block: tuple[int, ...] = (LAYERS, 2, 2, 4)
    after: tuple[int, ...] = (64,)
    dtype: torch.dtype = torch.bfloat16

    def check(self, place: str) -> None:
        pool = noise(max(max(pair) for pair in self.pairs) + 2, *self.block, *self.after, dtype=self.dtype)
        expected, copied = pool.clone(), at(place, pool)
        for number, (source, target) in enumerate(self.pairs):
            count = self.block[3] if self.tokens is None else self.tokens[number]
            for token in range(count):
                bits(expected)[target, :, :, :, token] = bits(pool)[source, :, :, :, token]
        sources, targets = zip(*self.pairs, strict=True)
        call(place, "copy_pages", copied, sources, targets, tokens=self.tokens)
        assert same_bits(copied, expected)


def bits(tensor: Tensor) -> Tensor:
    return tensor.view({1: torch.uint8, 2: torch.int16, 4: torch.int32}[tensor.element_size()])


COPIES = {
    "one page": Copy([(0, 2)]),
    "one page to several": Copy([(1, 0), (1, 2), (1, 4)]),
    "parts of blocks": Copy([(0, 3), (5, 1), (0, 4)], tokens=[1, 3, 4]),
    "none of a block": Copy([(0, 1)], tokens=[0]),
    "more than one program": Copy([(3, 0), (1, 2)], tokens=[5, 16], block=(3, 2, 3, 16), after=(80,)),
    "odd sizes": Copy([(2, 0)], tokens=[2], block=(1, 1, 3, 3), after=(5,), dtype=torch.uint8),
    "odd sizes, whole": Copy([(2, 0)], block=(1, 1, 3, 3), after=(5,), dtype=torch.uint8),
    "fp8": Copy([(0, 1)], tokens=[3], dtype=E4M3),
    "scales": Copy([(2, 1), (0, 3)], tokens=[3, 1], after=(), dtype=torch.float32),
    "whole scales": Copy([(2, 1), (0, 3)], after=(), dtype=torch.float32),
}


@everywhere
@pytest.mark.parametrize("case", COPIES.values(), ids=list(COPIES))
def test_pages_are_copied_and_others_untouched(case: Copy, place: str) -> None:
    case.check(place)


@everywhere
@settings(max_examples=50, deadline=None)
@given(data=st.data())
def test_any_parts_of_any_pages_are_copied(data: st.DataObject, place: str) -> None:
    order = data.draw(st.permutations(range(7)))
    targets = order[: data.draw(st.integers(1, 4))]
    pairs = [(data.draw(st.sampled_from(order[4:])), target) for target in targets]
    block_tokens = data.draw(st.sampled_from([1, 2, 8]))
    tokens = data.draw(st.lists(st.integers(0, block_tokens), min_size=len(pairs), max_size=len(pairs)))
    after = data.draw(st.sampled_from([(), (3,), (64,)]))
    block = (LAYERS, data.draw(st.integers(1, 2)), data.draw(st.integers(1, 3)), block_tokens)
    Copy(pairs, tokens, block, after, data.draw(st.sampled_from([torch.float32, torch.float16, torch.int8]))).check(
        place
    )


@everywhere
def test_nothing_to_copy_is_nothing_done(place: str) -> None:
    pool = noise(2, 1, 2, 1, 4, 64, dtype=torch.float16)
    copied = at(place, pool)
    call(place, "copy_pages", copied, [], [])
    call(place, "copy_pages", copied, [], [], tokens=[])
    assert same_bits(copied, pool)


@dataclass(frozen=True)
class Engine:
    """How an engine lays out KV: what it allocates, what it hands out, and where in the former one token and head lies."""

    shape: Callable[["Sizes"], tuple[int, ...]]
    pools: Callable[[Tensor, "Sizes"], LayerPools]
    cell: Callable[[Tensor, "Cell", "Sizes"], Tensor]
    parts: int = 2
    paged: bool = True


@dataclass(frozen=True)
class Sizes:
    heads: int = 2
    dim: int = 64
    pages: int = 6
    page_tokens: int = 4

    @property
    def num_slots(self) -> int:
        return self.pages * self.page_tokens


@dataclass(frozen=True)
class Cell:
    layer: int
    part: int
    head: int
    slot: int

    def split(self, sizes: Sizes) -> tuple[int, int]:
        return divmod(self.slot, sizes.page_tokens)


def vllm(view: Callable[[Tensor, int], Tensor]) -> Callable[[Tensor, Sizes], LayerPools]:
    return lambda store, s: LayerPools.vllm([view(store, layer) for layer in range(LAYERS)], head_dim=s.dim)


def half(row: Tensor, cell: Cell, sizes: Sizes) -> Tensor:
    return row[cell.part * sizes.dim : (cell.part + 1) * sizes.dim]


ENGINES = {
    "vLLM 0.32, token-major": Engine(
        lambda s: (LAYERS, s.pages, s.page_tokens, s.heads, 2 * s.dim),
        vllm(lambda store, layer: store[layer].transpose(1, 2)),
        lambda store, c, s: half(store[c.layer, c.split(s)[0], c.split(s)[1], c.head], c, s),
    ),
    "vLLM 0.32, head-major": Engine(
        lambda s: (LAYERS, s.pages, s.heads, s.page_tokens, 2 * s.dim),
        vllm(lambda store, layer: store[layer]),
        lambda store, c, s: half(store[c.layer, c.split(s)[0], c.head, c.split(s)[1]], c, s),
    ),
    "vLLM 0.32, all layers of a page together": Engine(
        lambda s: (s.pages, LAYERS, s.heads, s.page_tokens, 2 * s.dim),
        vllm(lambda store, layer: store[:, layer]),
        lambda store, c, s: half(store[c.split(s)[0], c.layer, c.head, c.split(s)[1]], c, s),
    ),
    "vLLM 0.32, pages of a head together": Engine(
        lambda s: (LAYERS, s.heads, s.pages, s.page_tokens, 2 * s.dim),
        vllm(lambda store, layer: store[layer].transpose(0, 1)),
        lambda store, c, s: half(store[c.layer, c.head, c.split(s)[0], c.split(s)[1]], c, s),
    ),
    "vLLM FlashAttention NHD": Engine(
        lambda s: (LAYERS, 2, s.pages, s.page_tokens, s.heads, s.dim),
        vllm(lambda store, layer: store[layer]),
        lambda store, c, s: store[c.layer, c.part, c.split(s)[0], c.split(s)[1], c.head],
    ),
    "vLLM FlashAttention HND": Engine(
        lambda s: (LAYERS, 2, s.pages, s.heads, s.page_tokens, s.dim),
        vllm(lambda store, layer: store[layer].transpose(2, 3)),
        lambda store, c, s: store[c.layer, c.part, c.split(s)[0], c.head, c.split(s)[1]],
    ),
    "vLLM FlashInfer NHD": Engine(
        lambda s: (LAYERS, s.pages, 2, s.page_tokens, s.heads, s.dim),
        vllm(lambda store, layer: store[layer]),
        lambda store, c, s: store[c.layer, c.split(s)[0], c.part, c.split(s)[1], c.head],
    ),
    "vLLM FlashInfer HND": Engine(
        lambda s: (LAYERS, s.pages, 2, s.heads, s.page_tokens, s.dim),
        vllm(lambda store, layer: store[layer].transpose(2, 3)),
        lambda store, c, s: store[c.layer, c.split(s)[0], c.part, c.head, c.split(s)[1]],
    ),
    "vLLM MLA": Engine(
        lambda s: (LAYERS, s.pages, s.page_tokens, s.dim),
        vllm(lambda store, layer: store[layer]),
        lambda store, c, s: store[c.layer, c.split(s)[0], c.split(s)[1]],
        parts=1,
    ),
    "vLLM 0.32 MLA": Engine(
        lambda s: (LAYERS, s.pages, 1, s.page_tokens, s.dim),
        vllm(lambda store, layer: store[layer]),
        lambda store, c, s: store[c.layer, c.split(s)[0], 0, c.split(s)[1]],
        parts=1,
    ),
    "SGLang": Engine(
        lambda s: (2, LAYERS, s.num_slots, s.heads, s.dim),
        lambda store, s: LayerPools.sglang(list(store[0]), list(store[1])),
        lambda store, c, s: store[c.part, c.layer, c.slot, c.head],
    ),
    "SGLang MLA": Engine(
        lambda s: (LAYERS, s.num_slots, 1, s.dim),
        lambda store, s: LayerPools.sglang(list(store)),
        lambda store, c, s: store[c.layer, c.slot, 0],
        parts=1,
    ),
}


@dataclass(frozen=True)
class Move:
    """Blocks from or to an engine. offset: elements by which its pools miss an alignment."""

    engine: Engine
    sizes: Sizes = Sizes()
    block_tokens: int = 8
    blocks: int = 2
    dtype: torch.dtype = torch.bfloat16
    gaps: bool = True
    offset: int = 0
    seed: int = 0

    @property
    def heads(self) -> int:
        return self.sizes.heads if self.engine.parts == 2 else 1

    def store(self) -> Tensor:
        return noise(*self.engine.shape(self.sizes), dtype=self.dtype, seed=self.seed)

    def content(self) -> Tensor:
        shape = (self.blocks, LAYERS, self.engine.parts, self.heads, self.block_tokens, self.sizes.dim)
        return noise(*shape, dtype=self.dtype, seed=self.seed + 1)

    def slots(self) -> Tensor:
        count = self.blocks * self.block_tokens
        slots = random_slots(count, self.sizes.num_slots, seed=self.seed, padding=self.gaps)
        return torch.tensor(slots, dtype=torch.int64).view(self.blocks, self.block_tokens)

    def placed(self, store: Tensor, place: str) -> Tensor:
        """The store where it runs, `offset` elements behind where memory begins."""
        memory = at(place, torch.cat((store.view(-1)[: self.offset], store.view(-1))))
        return memory[self.offset :].view(store.shape)

    def pairs(self, store: Tensor, blocks: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Theirs and ours, of every token that is there."""
        for block, token in (self.slots() >= 0).nonzero().tolist():
            slot = int(self.slots()[block, token])
            for layer in range(LAYERS):
                for part in range(self.engine.parts):
                    for head in range(self.heads):
                        theirs = self.engine.cell(store, Cell(layer, part, head, slot), self.sizes)
                        yield bits(theirs), bits(blocks[block, layer, part, head, token])

    def check_gather(self, place: str) -> None:
        store, blocks = self.store(), self.content()
        placed, out = self.placed(store, place), at(place, blocks)
        call(place, "gather_blocks", self.engine.pools(placed, self.sizes), at(place, self.slots()), out)
        for theirs, ours in self.pairs(store, blocks):
            ours.copy_(theirs)
        assert same_bits(out, blocks)
        assert same_bits(placed, store)

    def check_scatter(self, place: str) -> None:
        store, blocks = self.store(), self.content()
        placed, given = self.placed(store, place), at(place, blocks)
        call(place, "scatter_blocks", given, self.engine.pools(placed, self.sizes), at(place, self.slots()))
        for theirs, ours in self.pairs(store, blocks):
            theirs.copy_(ours)
        assert same_bits(placed, store)
        assert same_bits(given, blocks)

    def check_both(self, place: str) -> None:
        """What was scattered is gathered again, without an oracle between."""
        placed, given = self.placed(self.store(), place), at(place, self.content())
        layers, slots, out = self.engine.pools(placed, self.sizes), at(place, self.slots()), torch.zeros_like(given)
        call(place, "scatter_blocks", given, layers, slots)
        call(place, "gather_blocks", layers, slots, out)
        assert self.gaps or same_bits(out, given)


@everywhere
@pytest.mark.parametrize("engine", ENGINES.values(), ids=list(ENGINES))
def test_blocks_are_gathered_and_scattered(engine: Engine, place: str) -> None:
    Move(engine).check_gather(place)
    Move(engine).check_scatter(place)
    Move(engine, gaps=False).check_both(place)


MOVES = {
    "no block": Move(ENGINES["SGLang"], blocks=0),
    "one token": Move(ENGINES["SGLang"], block_tokens=1, blocks=1, gaps=False),
    "pages larger than blocks": Move(
        ENGINES["vLLM FlashAttention NHD"], Sizes(page_tokens=16, pages=3), block_tokens=4
    ),
    "pages smaller than blocks": Move(
        ENGINES["vLLM 0.32, token-major"], Sizes(page_tokens=2, pages=20), block_tokens=16
    ),
    "head_dim 80, three heads": Move(ENGINES["vLLM 0.32, token-major"], Sizes(heads=3, dim=80)),
    "head_dim 256, more than one program": Move(ENGINES["SGLang"], Sizes(heads=5, dim=256)),
    "latents of 576": Move(ENGINES["vLLM 0.32 MLA"], Sizes(dim=576)),
    "fp8": Move(ENGINES["vLLM FlashInfer HND"], dtype=E4M3),
    "float32": Move(ENGINES["vLLM FlashInfer NHD"], dtype=torch.float32),
    "out of line": Move(ENGINES["SGLang"], offset=3),
}


@everywhere
@pytest.mark.parametrize("case", MOVES.values(), ids=list(MOVES))
def test_blocks_of_any_size_are_moved(case: Move, place: str) -> None:
    case.check_gather(place)
    case.check_scatter(place)


@everywhere
@settings(max_examples=50, deadline=None)
@given(
    engine=st.sampled_from(list(ENGINES)),
    heads=st.integers(1, 8),
    dim=st.sampled_from([64, 72, 128]),
    page_tokens=st.sampled_from([1, 2, 3, 16]),
    block_tokens=st.sampled_from([1, 4, 16]),
    dtype=st.sampled_from([torch.bfloat16, torch.uint8]),
    gaps=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_blocks_are_moved(
    engine: str,
    heads: int,
    dim: int,
    page_tokens: int,
    block_tokens: int,
    dtype: torch.dtype,
    gaps: bool,
    seed: int,
    place: str,
) -> None:
    sizes = Sizes(heads, dim, -(-block_tokens // page_tokens) + 2, page_tokens)
    move = Move(ENGINES[engine], sizes, block_tokens, 1, dtype, gaps, 0, seed)
    move.check_gather(place)
    move.check_scatter(place)
    move.check_both(place)


@everywhere
def test_an_engine_may_call_its_bytes_otherwise(place: str) -> None:
    """fp8 caches of both engines are allocated as uint8."""
    store, slots = noise(1, 6, 2, 64, dtype=torch.uint8), torch.arange(4).view(1, 4)
    blocks = torch.zeros(1, 1, 1, 2, 4, 64, dtype=torch.uint8).view(E4M3)
    out = at(place, blocks)
    call(place, "gather_blocks", LayerPools.sglang(list(at(place, store))), at(place, slots), out)
    assert same_bits(out[0, 0, 0].view(torch.uint8), store[0, :4].transpose(0, 1))


def pages(*, parts: int = 2, heads: int = 2, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(3, 1, parts, heads, 4, 64, dtype=dtype)[:, 0]


def keys(*, heads: int = 2, tokens: int = 1, dim: int = 64, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    return torch.zeros(heads, tokens, dim, dtype=dtype)


def write(
    pages: Tensor, key: Tensor | None = None, value: Tensor | None = None, scales: Tensor | None = None
) -> Callable[[], None]:
    key = keys() if key is None else key
    return lambda: write_kv(key, key if value is None else value, pages, batch_of([0], "cpu"), scales=scales)


def move(*, slots: Tensor | None = None, blocks: Tensor | None = None) -> Callable[[], None]:
    layers = LayerPools.sglang([torch.zeros(8, 2, 64)])
    slots = torch.arange(4).view(1, 4) if slots is None else slots
    return lambda: gather_blocks(layers, slots, torch.zeros(1, 1, 1, 2, 4, 64) if blocks is None else blocks)


POOL = torch.zeros(4, 1, 2, 1, 4, 8)
VIEW = torch.zeros(3, 2, 4, 64)
WRONG: dict[str, tuple[Callable[[], Any], str]] = {
    "heads": (write(pages(), keys(heads=3)), r"\[3, 1, 64\].*expected one tensor of \[2, 1, 64\]"),
    "tokens": (write(pages(), keys(tokens=2)), "expected one tensor"),
    "value unlike key": (write(pages(), keys(), keys(dim=32)), "expected one tensor"),
    "parts": (write(pages(parts=1)), "1 parts"),
    "latents in pages of two parts": (
        lambda: write_latents(keys(), pages(), batch_of([0], "cpu")),
        "for each of the 2 parts",
    ),
    "tiles with gaps": (
        write(torch.zeros(3, 2, 2, 4, 128, dtype=torch.bfloat16)[..., :64]),
        "tiles must be contiguous",
    ),
    "dtypes of key and value": (write(pages(), keys(), keys(dtype=torch.float16)), "must agree"),
    "device": (write(pages(), keys().to("meta")), "must agree"),
    "dtype": (write(pages(dtype=torch.float16)), "same float dtype"),
    "dtype of key": (write(pages(dtype=torch.int8), keys(dtype=torch.float64)), "same float dtype"),
    "int8 without scales": (write(pages(dtype=torch.int8)), "scales missing"),
    "scales of plain pages": (write(pages(), scales=torch.ones(3, 2, 2, 4)), "scales given"),
    "shape of scales": (write(pages(dtype=torch.int8), scales=torch.ones(3, 2, 2)), r"expected float32 \[3, 2, 2, 4\]"),
    "counts of pages": (lambda: copy_pages(POOL, [0, 1], [2]), "2 sources, 1 targets"),
    "counts of tokens": (lambda: copy_pages(POOL, [0], [2], tokens=[1, 1]), "2 token counts"),
    "pool with gaps": (lambda: copy_pages(POOL[..., :4], [0], [1]), "must be contiguous"),
    "target twice": (lambda: copy_pages(POOL, [0, 1], [2, 2]), "named twice"),
    "source as target": (lambda: copy_pages(POOL, [0, 1], [1, 2]), "is a source too"),
    "page past the last": (lambda: copy_pages(POOL, [0], [4]), r"pages \[4\]: the pool has pages 0 to 3"),
    "negative page": (lambda: copy_pages(POOL, [-1], [0]), r"pages \[-1\]"),
    "tokens past a block": (lambda: copy_pages(POOL, [0], [1], tokens=[5]), "axis 4"),
    "no axis of tokens": (lambda: copy_pages(POOL[:, 0, 0].clone(), [0], [1], tokens=[1]), "axis 4"),
    "slots of one axis": (move(slots=torch.arange(4)), "expected"),
    "dtype of slots": (move(slots=torch.zeros(1, 4, dtype=torch.int32)), "expected int64"),
    "device of slots": (move(slots=torch.empty(1, 4, dtype=torch.int64, device="meta")), "must be one device"),
    "shape of blocks": (move(blocks=torch.zeros(1, 1, 2, 2, 4, 64)), r"expected \[1, 1, 1, 2, 4, 64\]"),
    "width of blocks": (move(blocks=torch.zeros(1, 1, 1, 2, 4, 64, dtype=torch.float16)), "of 4 bytes each"),
    "blocks with gaps": (move(blocks=torch.zeros(1, 1, 1, 2, 4, 128)[..., :64]), "contiguous"),
    "no layers": (lambda: LayerPools([]), "of every layer"),
    "layers of unlike parts": (lambda: LayerPools([(VIEW,), (VIEW, VIEW)]), "of every layer"),
    "layers of unlike shape": (lambda: LayerPools([(VIEW,), (VIEW[:2],)]), "layer 1.*for each kind"),
    "layers of unlike strides": (
        lambda: LayerPools([(VIEW,), (VIEW.transpose(1, 2).contiguous().transpose(1, 2),)]),
        "kind",
    ),
    "view of three axes": (lambda: LayerPools([(VIEW[0],)]), r"expected \[num_pages"),
    "elements apart": (lambda: LayerPools([(VIEW.transpose(2, 3),)]), "last stride 1"),
    "elements of 8 bytes": (lambda: LayerPools([(VIEW.double(),)]), "1, 2 or 4 bytes"),
    "no cache of vLLM": (lambda: LayerPools.vllm([VIEW], head_dim=48), "not one of vLLM's"),
    "two pages of two": (lambda: LayerPools.vllm([torch.zeros(2, 2, 4, 1, 64)], head_dim=64), "not one of vLLM's"),
}


@pytest.mark.parametrize(("wrong", "message"), WRONG.values(), ids=list(WRONG))
def test_what_does_not_fit_is_refused(wrong: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        wrong()
