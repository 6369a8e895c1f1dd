"""Choosing tokens: what can be asked for, what comes out, and that it does not depend on the batch."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tierkv.engine.sampling import Draw, SamplingParams, derived_seed, sample, uniform
from tierkv.errors import RequestError

GOLDEN = [0.9941808189160931, 0.1644916199295252]
GOLDEN_SEED = 1838892488238495364
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0, 3.0])


def draws(params: SamplingParams, count: int, *, seed: int = 7) -> list[int]:
    """Tokens of the first `count` positions, all from the same logits."""
    rows = [Draw(params, seed, 0, position) for position in range(count)]
    return [token for token, _ in sample(LOGITS.expand(count, -1), rows)]


def frequencies(params: SamplingParams, count: int = 4000) -> torch.Tensor:
    return torch.bincount(torch.tensor(draws(params, count)), minlength=5) / count


def test_temperature_zero_takes_the_likeliest() -> None:
    assert draws(SamplingParams(), 3) == [4, 4, 4]


def test_frequencies_follow_the_distribution() -> None:
    got = frequencies(SamplingParams(temperature=1.0))
    torch.testing.assert_close(got, torch.softmax(LOGITS, -1), atol=0.03, rtol=0)


def test_temperature_flattens() -> None:
    got = frequencies(SamplingParams(temperature=2.0))
    torch.testing.assert_close(got, torch.softmax(LOGITS / 2, -1), atol=0.03, rtol=0)


def test_top_k_keeps_the_k_likeliest() -> None:
    got = frequencies(SamplingParams(temperature=1.0, top_k=2))
    expected = torch.zeros(5)
    expected[[4, 0]] = torch.softmax(LOGITS[[4, 0]], -1)
    torch.testing.assert_close(got, expected, atol=0.03, rtol=0)


def test_top_p_keeps_the_fewest_that_reach_it() -> None:
    # Sorted: 0.636, 0.234, 0.086, ...: 0.8 needs the first two.
    got = frequencies(SamplingParams(temperature=1.0, top_p=0.8))
    assert set(got.nonzero().flatten().tolist()) == {4, 0}


def test_a_tiny_top_p_still_keeps_one() -> None:
    assert set(draws(SamplingParams(temperature=1.0, top_p=1e-9), 50)) == {4}


def test_min_p_is_relative_to_the_likeliest() -> None:
    got = frequencies(SamplingParams(temperature=1.0, min_p=0.2))  # 0.234 / 0.636 passes, 0.086 / 0.636 does not
    assert set(got.nonzero().flatten().tolist()) == {4, 0}


@pytest.mark.parametrize(
    "params", [{"top_p": 0.95}, {"top_k": 3000}, {"min_p": 1e-6}, {"top_p": 0.999}, {"top_p": 0.9999999}]
)
def test_large_vocabularies_are_cut_at_the_same_place_as_by_a_full_sort(params: dict[str, Any]) -> None:
    logits = torch.randn(20000, generator=torch.Generator().manual_seed(1)) * 2
    p, order = torch.softmax(logits.double(), -1).sort(descending=True)
    keep = torch.ones_like(p, dtype=torch.bool)
    if "top_k" in params:
        keep[params["top_k"] :] = False
    if "top_p" in params:
        keep &= p.cumsum(0) - p < params["top_p"]
    if "min_p" in params:
        keep &= p >= params["min_p"] * p[0]
    cumulated = (p * keep).cumsum(0)
    rows = [Draw(SamplingParams(temperature=1.0, **params), 3, 0, position) for position in range(60)]
    for (token, _), draw in zip(sample(logits.expand(60, -1), rows), rows, strict=True):
        place = torch.searchsorted(cumulated, uniform(3, 0, draw.position) * cumulated[-1], right=True)
        assert token == order[place]


def row_by_row(logits: torch.Tensor, draw: Draw) -> int:
    """The token of one row, as plainly as it can be said."""
    params = draw.params
    if params.temperature == 0:
        return int(logits.argmax())
    probabilities, order = torch.softmax(logits.double() / params.temperature, -1).sort(descending=True, stable=True)
    if params.top_k is not None:
        probabilities = probabilities[: params.top_k] / probabilities[: params.top_k].sum()
    if params.top_p < 1:
        probabilities = probabilities[probabilities.cumsum(0) - probabilities < params.top_p]
    if params.min_p > 0:
        probabilities = probabilities[probabilities >= params.min_p * probabilities[0]]
    if params.top_k is None and params.top_p == 1 and params.min_p == 0:  # by id, not by likelihood
        probabilities, order = torch.softmax(logits.double() / params.temperature, -1), torch.arange(len(logits))
    cumulated = probabilities.cumsum(0)
    target = uniform(draw.seed, draw.index, draw.position) * cumulated[-1]
    return int(order[min(int(torch.searchsorted(cumulated, target, right=True)), len(cumulated) - 1)])


PARAMS = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.none() | st.sampled_from([1, 7, 1500, 10_000]),
    top_p=st.sampled_from([1.0, 0.999, 0.9, 0.2]),
    min_p=st.sampled_from([0.0, 1e-5, 0.1]),
    logprobs=st.none() | st.integers(0, 3),
)


@settings(deadline=None, derandomize=True)
@given(params=st.lists(PARAMS, min_size=1, max_size=6), seed=st.integers(0, 99), size=st.sampled_from([5, 90, 3000]))
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16]
)  # bfloat16 has few values: many tokens are equally likely
def test_a_batch_gets_the_tokens_of_its_rows(
    params: list[SamplingParams], seed: int, size: int, dtype: torch.dtype
) -> None:
    logits = (torch.randn(len(params), size, generator=torch.Generator().manual_seed(seed)) * 2).to(dtype)
    rows = [Draw(own, seed, 0, number) for number, own in enumerate(params)]
    got = sample(logits, rows)
    assert [token for token, _ in got] == [row_by_row(logits[row], draw) for row, draw in enumerate(rows)]
    for row, ((token, reported), draw) in enumerate(zip(got, rows, strict=True)):
        assert (reported is None) == (draw.params.logprobs is None)
        if reported is not None:
            expected = torch.log_softmax(logits[row].float(), -1)
            assert reported.logprob == pytest.approx(expected[token].item(), abs=1e-5)
            top = expected.sort(descending=True).values[: draw.params.logprobs].tolist()
            assert [value for _, value in reported.top] == pytest.approx(top, abs=1e-5)
            assert [value for _, value in reported.top] == pytest.approx(
                [expected[number].item() for number, _ in reported.top], abs=1e-5
            )


def test_a_token_does_not_depend_on_its_neighbours() -> None:
    params = SamplingParams(temperature=0.9, top_p=0.9)
    logits = torch.randn(4, 300, generator=torch.Generator().manual_seed(0))
    rows = [Draw(params, seed, 0, 5) for seed in range(4)]
    together = sample(logits, rows)
    alone = [sample(logits[row : row + 1], [rows[row]])[0] for row in (3, 1, 0, 2)]
    assert [together[row] for row in (3, 1, 0, 2)] == alone


def test_random_numbers_never_change_between_versions() -> None:
    assert [uniform(0, 0, 0), uniform(1, 2, 3)] == GOLDEN
    assert derived_seed(0, "request-0") == GOLDEN_SEED


def test_samples_of_a_request_meet_different_numbers() -> None:
    numbers = {uniform(5, index, position) for index in range(20) for position in range(20)}
    assert len(numbers) == 400
    assert all(0 <= number < 1 for number in numbers)


def test_logprobs_are_of_the_unmodified_distribution() -> None:
    ((token, reported),) = sample(LOGITS[None], [Draw(SamplingParams(temperature=0.1, logprobs=2), 0, 0, 0)])
    expected = torch.log_softmax(LOGITS, -1)
    assert reported is not None
    assert reported.token == token
    assert reported.logprob == pytest.approx(expected[token].item(), abs=1e-6)
    assert [number for number, _ in reported.top] == [4, 0]
    assert [value for _, value in reported.top] == pytest.approx(expected[[4, 0]].tolist(), abs=1e-6)


def test_logprobs_of_zero_are_of_the_sampled_token_alone() -> None:
    ((_, reported),) = sample(LOGITS[None], [Draw(SamplingParams(logprobs=0), 0, 0, 0)])
    assert reported is not None
    assert reported.top == ()


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_tokens": 0},
        {"max_tokens": 1.5},
        {"max_tokens": True},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"temperature": "hot"},
        {"top_k": 0},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"min_p": -0.1},
        {"seed": -1},
        {"n": 0},
        {"n": 2},
        {"stop": ""},
        {"stop": ["a", ""]},
        {"stop": [3]},
        {"stop_token_ids": [-1]},
        {"logprobs": -1},
        {"logprobs": 10**6},
    ],
    ids=str,
)
def test_impossible_values_are_refused_in_one_line(wrong: dict[str, Any]) -> None:
    with pytest.raises(RequestError) as refused:
        SamplingParams(**wrong)
    assert next(iter(wrong)) in str(refused.value)
    assert "\n" not in str(refused.value)
