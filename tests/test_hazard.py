"""Hazards: counted as by hand, worth what the best moment to give up says, and sane however little was seen."""

from collections.abc import Iterable
from itertools import pairwise
from math import exp, inf, isfinite, log
from random import Random

import numpy as np
import pytest

from tierkv.policies.hazard import (
    EDGES_S,
    EVIDENCE,
    NUM_AGES,
    PRIOR_PER_S,
    Hazards,
    Table,
    _exposure,
    _gittins,
    age_of,
)

WIDTHS = [hi - lo for lo, hi in pairwise((*EDGES_S, EDGES_S[-1] * 2**0.5))]
Waits = list[tuple[int, int, float]]
"""Kind, blocks and age of those that wait for their next use."""


def learn(hazards: Hazards, waiting: Iterable[tuple[int, int, float]] = ()) -> None:
    kinds, blocks, ages = (list(each) for each in zip(*waiting, strict=True)) if waiting else ([], [], [])
    hazards.learn(np.array(kinds, np.int64), np.array(blocks, np.float64), np.array(ages, np.float64))


def history(random: Random, hazards: Hazards, num_kinds: int) -> tuple[dict[tuple[int, int], int], Waits, Waits]:
    """Tell of random waits; returns events by kind and age, all waits as they ended, and those that go on."""
    events: dict[tuple[int, int], int] = {}
    ended, waiting = [], []
    for _ in range(300):
        kind, blocks = hazards.number((random.randrange(num_kinds),)), random.randrange(1, 50)
        age_s = random.choice((random.randrange(200), random.uniform(0, 200), random.choice(EDGES_S[:14])))
        match random.randrange(3):
            case 0:
                hazards.observe(kind, blocks, age_s)
                events[kind, age_of(age_s)] = events.get((kind, age_of(age_s)), 0) + blocks
                ended.append((kind, blocks, age_s))
            case 1:
                hazards.leave(kind, blocks, age_s)
                ended.append((kind, blocks, age_s))
            case 2:
                waiting.append((kind, blocks, age_s))
    return events, ended, waiting


def table(hazards: Hazards, kept: Iterable[float]) -> Table:
    return np.array(list(kept)).reshape(len(hazards), NUM_AGES)


def test_age_is_the_half_octave_that_a_time_lies_in() -> None:
    assert [age_of(seconds) for seconds in (0.0, 0.99, 1.0, 1.41, 1.42, 2.0, 1e9)] == [0, 0, 1, 1, 2, 3, NUM_AGES - 1]
    assert all(age_of(edge) == at for at, edge in enumerate(EDGES_S))


@pytest.mark.parametrize("seed", range(5))
def test_events_and_exposure_are_those_of_every_block_and_every_second(seed: int) -> None:
    """Against the count: every block is looked at in every sixteenth of a second of its wait."""
    random, hazards = Random(seed), Hazards((3,))
    events, ended, waiting = history(random, hazards, 3)
    found = table(hazards, hazards._events)
    assert {(kind, age): int(found[kind, age]) for kind, age in zip(*found.nonzero(), strict=True)} == events
    exposure: Table = _exposure(table(hazards, hazards._ended), table(hazards, hazards._partial))
    brute = np.zeros_like(exposure)
    for kind, blocks, age_s in ended:
        for at in range(int(age_s * 16)):
            brute[kind, age_of(at / 16)] += blocks / 16
        brute[kind, age_of(age_s)] += blocks * (age_s - int(age_s * 16) / 16)
    # A sixteenth that lies across an edge counts on one side of it alone.
    assert np.abs(exposure - brute).max() <= sum(blocks for _, blocks, _ in ended) / 16
    assert exposure.sum(1) == pytest.approx(
        [sum(b * s for k, b, s in ended if k == kind) for kind in range(len(hazards))]
    )
    assert waiting


@pytest.mark.parametrize("seed", range(3))
def test_who_still_waits_counts_as_if_lost_from_sight_now(seed: int) -> None:
    one, other = Hazards((3,)), Hazards((3,))
    _, _, waiting = history(Random(seed), one, 3)
    history(Random(seed), other, 3)
    for kind, blocks, age_s in waiting:
        other.leave(kind, blocks, age_s)
    learn(one, waiting)
    learn(other)
    assert np.array(one.worth) == pytest.approx(np.array(other.worth), rel=1e-12)


def best_of_all_moments(hazards: list[float]) -> list[float]:
    """The definition: of all ages to give up at, the most uses per second of waiting, from each age on."""
    found = []
    for start in range(len(hazards)):
        best, still, gained, waited = 0.0, 1.0, 0.0, 0.0
        for hazard, width in zip(hazards[start:], WIDTHS[start:], strict=True):
            stay = exp(-hazard * width)
            gained += still * (1 - stay)
            waited += still * (1 - stay) / hazard
            still *= stay
            best = max(best, gained / waited)
        found.append(best)
    return found


@pytest.mark.parametrize("seed", range(20))
def test_worth_is_the_best_over_all_moments_to_give_up_at(seed: int) -> None:
    random = Random(seed)
    rows = [[10 ** random.uniform(-7, random.choice((-3, 1.3))) for _ in range(NUM_AGES)] for _ in range(4)]
    assert _gittins(np.array(rows)) == pytest.approx(np.array([best_of_all_moments(row) for row in rows]), rel=1e-6)


def test_worth_after_an_age_that_hardly_any_block_outlives_is_no_less_exact() -> None:
    """Those that do are judged by what comes then, however few they are."""
    certain, later = age_of(90.0), age_of(400.0)
    hazards = [1e-6] * NUM_AGES
    hazards[certain], hazards[later] = 50.0, 0.5
    assert _gittins(np.array([hazards]))[0] == pytest.approx(best_of_all_moments(hazards), rel=1e-6)
    assert _gittins(np.array([hazards]))[0, later - 1] > 1e-3


def test_wait_for_a_burst_is_worth_the_more_the_nearer_it_is_and_little_once_it_is_over() -> None:
    hazards = Hazards((1,))
    kind = hazards.number((0,))
    for _ in range(1000):
        hazards.observe(kind, 100, 50.0)
    hazards.leave(kind, 100_000, 5000.0)
    learn(hazards)
    before = hazards.worth[kind][: age_of(50.0) + 1]
    assert before == sorted(before) and before[-1] > 10 * hazards.worth[kind][age_of(100.0)]


def told_and_untold(told: Iterable[tuple[int, int]]) -> tuple[Hazards, list[list[float]]]:
    hazards = Hazards((2, 3), told=1)
    for part, answer in told:
        kind = hazards.number((part, answer))
        hazards.observe(kind, 500_000 * (1 + answer), 10.0 * (1 + answer))
        hazards.leave(kind, 500_000, 300.0)
    learn(hazards)
    return hazards, hazards.worth


def test_kind_of_which_nothing_was_told_is_judged_by_all_that_agree_otherwise() -> None:
    hazards, worth = told_and_untold([(0, 1), (0, 2), (0, 0), (1, 1)])
    pooled = Hazards((2, 3))  # where nothing is pooled: one kind that has it all
    for part, answer in ((0, 1), (0, 2), (0, 0)):
        kind = pooled.number((part, 0))
        pooled.observe(kind, 500_000 * (1 + answer), 10.0 * (1 + answer))
        pooled.leave(kind, 500_000, 300.0)
    learn(pooled)
    untold, told = worth[hazards.number((0, 0))], worth[hazards.number((0, 2))]
    assert np.array(untold) == pytest.approx(np.array(pooled.worth[0]), rel=0.05, abs=1e-4)
    assert told[age_of(29.0)] > 1.2 * untold[age_of(29.0)]


def test_kind_that_was_told_of_keeps_its_own_counts() -> None:
    hazards = Hazards((1, 2), told=1)
    never, often = hazards.number((0, 0)), hazards.number((0, 1))
    hazards.observe(often, 100_000, 5.0)
    hazards.leave(never, 100_000, 5000.0)
    learn(hazards)
    assert hazards.worth[often][0] > 1.5 * hazards.worth[never][0]


def samples(hazards: Hazards, kind: tuple[int, ...], count: int, per_s: float) -> None:
    """Let blocks of a kind be used at a constant rate, and be lost from sight after a minute."""
    number = hazards.number(kind)
    for at in range(count):
        age_s = -log((at + 0.5) / count) / per_s
        if age_s < 60:
            hazards.observe(number, 500, age_s)
        else:
            hazards.leave(number, 500, 60.0)


def test_fit_finds_the_factors_behind_the_samples() -> None:
    """Hazards that are products of what each part says, with one pair of parts that was never seen."""
    hazards = Hazards((3, 4))
    first, second = (0.5, 1.0, 3.0), (0.3, 1.0, 2.0, 4.0)
    for a, one in enumerate(first):
        for b, other in enumerate(second):
            if (a, b) != (2, 3):
                samples(hazards, (a, b), 3000, 0.01 * one * other)
    unseen = hazards.number((2, 3))
    learn(hazards)
    for a, one in enumerate(first):
        for b, other in enumerate(second):
            if (a, b) != (2, 3):
                found = np.mean(hazards.worth[hazards.number((a, b))][2:8])
                assert found == pytest.approx(0.01 * one * other, rel=0.15)
    assert np.mean(hazards.worth[unseen][2:8]) == pytest.approx(0.01 * 3.0 * 4.0, rel=0.3)


def test_few_samples_leave_a_kind_near_what_all_are_like() -> None:
    hazards = Hazards((2, 50))
    for part in range(10):
        samples(hazards, (0, part), 500, 0.02)
    rare = hazards.number((1, 40))
    hazards.leave(rare, 5, 100.0)  # five blocks, without a use
    learn(hazards)
    assert np.mean(hazards.worth[rare][2:8]) == pytest.approx(0.02, rel=0.25)


def test_nothing_seen_is_the_prior_which_falls_as_one_over_the_age() -> None:
    hazards = Hazards((2, 2))
    before = list(hazards.worth[hazards.number((1, 1))])
    learn(hazards)
    worth = hazards.worth[0]
    assert worth == pytest.approx(before)
    assert worth == sorted(worth, reverse=True) and worth[0] == pytest.approx(PRIOR_PER_S, rel=0.1)
    for age in range(2, NUM_AGES - 2):  # two half octaves: twice the age
        assert worth[age] == pytest.approx(2 * worth[age + 2])


def test_a_few_blocks_against_a_hundred_of_belief_change_little() -> None:
    hazards = Hazards((1,))
    kind = hazards.number((0,))
    hazards.observe(kind, round(EVIDENCE / 20), 0.5)
    learn(hazards)
    assert hazards.worth[kind][0] < 1.3 * PRIOR_PER_S


def test_kind_that_comes_between_two_rounds_has_the_worth_of_its_parts() -> None:
    hazards = Hazards((2, 3))
    for a, one in enumerate((1.0, 4.0)):
        for b in range(2):
            samples(hazards, (a, b), 2000, 0.01 * one)
    learn(hazards)
    rare, often = (hazards.worth[hazards.number((a, 2))] for a in range(2))
    assert len(hazards) == len(hazards.worth) == 6
    assert np.mean(often[2:8]) > 3 * np.mean(rare[2:8])
    learn(hazards)
    assert np.mean(hazards.worth[5][2:8]) == pytest.approx(np.mean(often[2:8]), rel=0.2)


def test_learning_before_anything_came_is_nothing() -> None:
    hazards = Hazards((2, 2), told=1)
    learn(hazards)
    assert hazards.worth == [] and len(hazards) == 0


@pytest.mark.parametrize("seed", range(30))
def test_worth_is_a_positive_number_whatever_comes(seed: int) -> None:
    """Any warning is an error, too."""
    random, hazards = Random(seed), Hazards((3, 3, 2), told=1)
    ages = [0.0, 1e-300, 1.0, EDGES_S[-1], 1e12, *EDGES_S[::5]]
    largest = random.choice((1, 1000, 10**9, 10**15))
    for _ in range(4):
        waiting = []
        for _ in range(random.choice((0, 1, 30))):
            kind = hazards.number((random.randrange(3), random.randrange(3), random.randrange(2)))
            blocks, age_s = random.randrange(1, largest + 1), random.choice(ages)
            tell = random.choice((hazards.observe, hazards.observe, hazards.leave, None))
            if tell:
                tell(kind, blocks, age_s)
            else:
                waiting.append((kind, blocks, age_s))
        learn(hazards, waiting)
        assert all(0 < each < inf and isfinite(each) for row in hazards.worth for each in row)


def test_uses_at_one_age_to_the_second_make_no_worth_infinite() -> None:
    """No time passes in that age before they come: events without exposure."""
    hazards = Hazards((1,))
    kind = hazards.number((0,))
    hazards.observe(kind, 10**12, 64.0)
    learn(hazards)
    assert all(0 < each < inf for each in hazards.worth[kind])
    assert hazards.worth[kind][age_of(63.0)] > 0.01
