"""In what order prefixes are computed, so that nothing is computed twice: pieces of paths, and which waits for which.

    documents, sorted      piece 0  ██████████           computed from token 0
                           piece 1            ████▌      goes on where others branch off
                           piece 2            ▌███       shares all before it, even in the middle of a block

Sorted, documents are the leaves of their prefix tree from left to right. A document is computed from its first token that differs
from the one before it; it waits until the block with that token is there, of which the leading tokens are reused. So the pieces
together are each token of the tree once. Knows no model and no store.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from tierkv.keys import Key, chain
from tierkv.layout import TOKEN_BYTES


@dataclass(frozen=True, slots=True)
class Piece:
    """Tokens [start, end) of a path: what one request computes.

    document: whose path it is, a position in the list that was planned.  after: the piece that must be whole before.
    end: a multiple of the block.
    """

    document: int
    start: int
    end: int
    after: int | None

    @property
    def num_tokens(self) -> int:
        """Tokens to be computed, if nothing of it is there yet."""
        return self.end - self.start


@dataclass(frozen=True, slots=True)
class Plan:
    """Pieces in the order of the tree, depth first.

    paths: of each document, its whole blocks of tokens (int32-LE).
    """

    block_tokens: int
    paths: tuple[bytes, ...]
    pieces: tuple[Piece, ...]

    @property
    def unique_tokens(self) -> int:
        """Tokens of the prefix tree of all paths."""
        return sum(piece.num_tokens for piece in self.pieces)

    @property
    def num_blocks(self) -> int:
        """Different blocks."""
        return sum(len(self.blocks(piece)) for piece in self.pieces)

    def blocks(self, piece: Piece) -> range:
        """Numbers of the blocks of its path that a piece makes whole."""
        return range(piece.start // self.block_tokens, piece.end // self.block_tokens)

    def path(self, piece: Piece) -> bytes:
        """Tokens up to a piece's end."""
        return self.paths[piece.document][: piece.end * TOKEN_BYTES]

    def keys(self, root: Key) -> list[list[Key]]:
        """Keys of the blocks of each piece: each block of the tree once, whatever share of the documents has it."""
        step = self.block_tokens * TOKEN_BYTES
        found: list[list[Key]] = []
        for piece in self.pieces:
            blocks = self.blocks(piece)
            parent = self._key_before(blocks.start, piece.after, found) if blocks.start else root
            tokens = self.paths[piece.document][blocks.start * step : blocks.stop * step]
            found.append(chain(parent, tokens, block_tokens=self.block_tokens))
        return found

    def _key_before(self, block: int, after: int | None, found: Sequence[Sequence[Key]]) -> Key:
        """The key of the block before `block`, of a piece that goes on after another, or branches off within or above it."""
        while after is not None and self.blocks(self.pieces[after]).start >= block:
            after = self.pieces[after].after
        assert after is not None, "what a piece begins with lies in pieces that it waits for"
        return found[after][block - 1 - self.blocks(self.pieces[after]).start]

    def path_keys(self, document: int, root: Key) -> list[Key]:
        """Keys of all whole blocks of a document."""
        return chain(root, self.paths[document], block_tokens=self.block_tokens)


def make_plan(documents: Sequence[bytes], *, block_tokens: int) -> Plan:
    """Plan the whole blocks of these prompts (int32-LE). What is shorter than a block, or there already, has no piece."""
    step = block_tokens * TOKEN_BYTES
    paths = tuple(tokens[: len(tokens) // step * step] for tokens in documents)
    order = sorted((number for number, path in enumerate(paths) if path), key=lambda number: (paths[number], number))
    starts: dict[int, int] = {}
    cuts: dict[int, set[int]] = {}
    waits: dict[int, tuple[int, int]] = {}  # document -> whose blocks, and up to which, it waits for
    before, last = b"", -1
    for number in order:
        path = paths[number]
        shared = _agreeing(before, path)
        before = path
        if shared * TOKEN_BYTES == len(path):
            continue  # the one before has all of it
        if shared:
            # Whose are the last tokens that it shares? Siblings wait for the first of them, not each for the one before.
            needed, owner = -(-shared // block_tokens), last
            while starts[owner] >= shared or starts[owner] // block_tokens >= needed:
                owner = waits[owner][0]
            cuts[owner].add(needed)
            waits[number] = owner, needed
        starts[number], cuts[number] = shared, {len(path) // step}
        last = number
    pieces: list[Piece] = []
    ends: dict[tuple[int, int], int] = {}  # document and blocks -> the piece that ends there
    for number, start in starts.items():
        after = ends[waits[number]] if number in waits else None
        for cut in sorted(cuts[number]):
            pieces.append(Piece(number, start, cut * block_tokens, after))
            after = ends[number, cut] = len(pieces) - 1
            start = cut * block_tokens
    return Plan(block_tokens, paths, tuple(pieces))


def _agreeing(one: bytes, other: bytes) -> int:
    """Leading tokens that two prompts share."""
    size = min(len(one), len(other))
    if one[:size] == other[:size]:
        return size // TOKEN_BYTES
    differ = np.frombuffer(one, "<i4", size // TOKEN_BYTES) != np.frombuffer(other, "<i4", size // TOKEN_BYTES)
    return int(differ.argmax())
