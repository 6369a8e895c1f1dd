"""A plan computes every token of the prefix tree once, in an order in which whatever is reused is there."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.keys import Namespace, token_bytes
from tierkv.layout import Layout
from tierkv.warm.plan import Plan, make_plan

BLOCK = 4
TOKENS = st.lists(st.integers(0, 2), max_size=26)


def tree(documents: list[list[int]]) -> set[tuple[int, ...]]:
    """All prefixes of the whole blocks of the documents: the nodes of their token tree."""
    cut = [document[: len(document) // BLOCK * BLOCK] for document in documents]
    return {tuple(path[:end]) for path in cut for end in range(1, len(path) + 1)}


def planned(documents: list[list[int]]) -> Plan:
    return make_plan([token_bytes(document) for document in documents], block_tokens=BLOCK)


@given(st.lists(TOKENS, max_size=12))
@settings(max_examples=400, deadline=None, derandomize=True)
def test_every_token_of_the_tree_is_computed_once_after_what_it_reuses(documents: list[list[int]]) -> None:
    plan = planned(documents)
    made: set[tuple[int, ...]] = set()  # prefixes that end in a whole, or partly computed, block
    whole: set[tuple[int, ...]] = set()
    for number, piece in enumerate(plan.pieces):
        path = documents[piece.document]
        assert piece.after is None or piece.after < number
        assert piece.end % BLOCK == 0
        assert 0 <= piece.start < piece.end <= len(path)
        if piece.start:
            # What it begins with lies in whole blocks: those of the piece it waits for, or of pieces before that.
            done, at = set(), piece.after
            while at is not None:
                other = plan.pieces[at]
                done |= {tuple(documents[other.document][:end]) for end in range(other.start + 1, other.end + 1)}
                at = other.after
            assert all(tuple(path[:end]) in done for end in range(1, piece.start + 1))
        new = {tuple(path[:end]) for end in range(piece.start + 1, piece.end + 1)}
        assert not new & made
        made |= new
        whole |= {tuple(path[:end]) for end in range(BLOCK, piece.end + 1, BLOCK)}
    assert made == tree(documents)
    assert plan.unique_tokens == len(made)
    assert plan.num_blocks == len(whole)


@given(st.lists(TOKENS, max_size=8), st.randoms(use_true_random=False))
@settings(max_examples=100, deadline=None, derandomize=True)
def test_the_order_of_documents_changes_nothing(documents: list[list[int]], random: object) -> None:
    shuffled = list(documents)
    random.shuffle(shuffled)  # type: ignore[attr-defined]

    def shape(given: list[list[int]]) -> list[tuple[tuple[int, ...], int, int, int | None]]:
        plan = planned(given)
        return [(tuple(given[p.document][: p.end]), p.start, p.end, p.after) for p in plan.pieces]

    assert shape(documents) == shape(shuffled)


def test_a_system_prompt_is_one_piece_and_the_others_follow_it() -> None:
    system = list(range(10, 20))  # two and a half blocks
    plan = planned([system + [number] * 6 for number in (1, 2, 3)])
    assert [(p.start, p.end, p.after) for p in plan.pieces] == [(0, 12, None), (12, 16, 0), (10, 16, 0), (10, 16, 0)]


def test_what_others_contain_and_what_is_shorter_than_a_block_has_no_piece() -> None:
    plan = planned([[1] * 8, [1] * 8, [1] * 3, [1] * 12, [], [1] * 11])
    assert [(p.start, p.end) for p in plan.pieces] == [(0, 8), (8, 12)]
    assert plan.unique_tokens == 12


def test_keys_are_those_of_the_whole_blocks() -> None:
    root = Namespace("m", Layout(1, 1, 4, "float32", block_tokens=BLOCK)).root()
    plan = planned([[1] * 9, [2] * 3])
    assert [len(keys) for keys in plan.keys(root)] == [2]
    assert plan.path_keys(0, root) == plan.keys(root)[0]
    assert plan.path_keys(1, root) == []


@given(st.lists(TOKENS, max_size=10))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_keys_of_pieces_are_those_of_their_paths(documents: list[list[int]]) -> None:
    root = Namespace("m", Layout(1, 1, 4, "float32", block_tokens=BLOCK)).root()
    plan = planned(documents)
    for piece, keys in zip(plan.pieces, plan.keys(root), strict=True):
        blocks = plan.blocks(piece)
        assert keys == plan.path_keys(piece.document, root)[blocks.start : blocks.stop]
