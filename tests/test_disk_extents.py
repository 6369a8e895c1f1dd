"""Free slots, against a set."""

from hypothesis import given
from hypothesis import strategies as st

from tierkv.tiers.disk_extents import Extents

SLOTS = 60


@given(
    st.lists(
        st.one_of(
            st.tuples(st.just("take"), st.integers(1, 30), st.integers(0, SLOTS)),
            st.tuples(st.just("free"), st.integers(0, SLOTS - 1), st.integers(1, 20)),
        ),
        max_size=60,
    )
)
def test_extents_hand_out_each_free_slot_once(steps: list[tuple[str, int, int]]) -> None:
    extents, free = Extents(), set(range(SLOTS))
    extents.free_all(range(SLOTS))
    for kind, first, second in steps:
        if kind == "take":
            taken = [slot for start, count in extents.take(first, below=second) for slot in range(start, start + count)]
            assert len(taken) == len(set(taken)) == min(first, sum(slot < second for slot in free))
            assert free.issuperset(taken) and all(slot < second for slot in taken)
            free.difference_update(taken)
        else:
            back = set(range(first, min(SLOTS, first + second))) - free
            extents.free_all(back)
            free |= back
        assert extents.free_slots == len(free)


def test_a_run_goes_where_it_fits_best() -> None:
    extents = Extents()
    for start, count in ((0, 10), (20, 4), (30, 6)):
        extents.free(start, count)
    assert extents.take(4, below=100) == [(20, 4)]
    assert extents.take(5, below=100) == [(30, 5)]
    assert extents.take(11, below=100) == [(0, 10), (35, 1)]


def test_neighbours_become_one_extent_again() -> None:
    extents = Extents()
    for slot in (3, 1, 2, 0):
        extents.free(slot, 1)
    assert extents.take(4, below=4) == [(0, 4)]
