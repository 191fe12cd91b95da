"""Laws of a request: nonsense is refused with the value and the rule, and a sequence ends for the reason it
says.

What is drawn from params is for test_sampling.py; that an engine keeps to them is for test_engine.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shoal.engine.sequence import SamplingParams, Sequence


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_p", 0.0),
        ("top_p", 1.01),
        ("top_k", 0),
        ("min_p", -0.1),
        ("min_p", 1.1),
        ("seed", -1),
        ("seed", 2**64),
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("logprobs", -1),
    ],
)
def test_nonsense_is_refused(field: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{field} is {value}; it must be "):
        SamplingParams(**{field: value})


def test_more_tokens_at_least_than_at_most_are_refused() -> None:
    with pytest.raises(ValueError, match="min_tokens is 5; it must be at least 0, at most max_tokens 4"):
        SamplingParams(min_tokens=5, max_tokens=4)
    assert SamplingParams(min_tokens=4, max_tokens=4).min_tokens == 4


def test_a_sequence_ends_by_a_stop_token_or_by_length() -> None:
    def finish(*tokens: int) -> str | None:
        sequence = Sequence([1, 2], SamplingParams(), stop_ids=frozenset({9}), max_len=5)
        together = Sequence([1, 2], SamplingParams(), stop_ids=frozenset({9}), max_len=5)
        for token in tokens:
            assert sequence.finish is None
            assert sequence.take([token]) == [token]
        assert together.take([*tokens, 9, 3, 9]) == list(tokens) + ([] if sequence.finish else [9])
        return sequence.finish

    assert finish(3, 4) is None
    assert finish(3, 4, 5) == "length"
    assert finish(3, 9) == "stop"
    assert finish(3, 4, 9) == "stop"  # a text that was complete is not called cut off


def test_stop_tokens_are_banned_until_the_least_number_is_there() -> None:
    sequence = Sequence([1, 2], SamplingParams(min_tokens=2), stop_ids=frozenset({9}), max_len=9)
    banned = []
    for _ in range(4):
        banned.append(sequence.banned_ids)
        sequence.take([0])
    assert banned == [{9}, {9}, set(), set()]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        (dict(frequency_penalty=float("nan")), "frequency_penalty is nan; it must be finite"),
        (dict(repetition_penalty=0.0), "repetition_penalty is 0.0; it must be finite and above 0"),
        (dict(logit_bias=((1, 2.0), (1, 3.0))), "logit_bias is .* one finite number an id"),
        (dict(think_end_id=3), "think_end_id is 3; it must be None where there is no grammar"),
        (dict(max_tokens=0, prompt_logprobs=-1), "prompt_logprobs is -1; it must be at least 0"),
    ],
)
def test_wishes_that_contradict_themselves_are_refused(params: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingParams(**params)


def test_a_prompt_may_be_read_for_its_log_probabilities_alone() -> None:
    assert SamplingParams(max_tokens=0, prompt_logprobs=0).max_tokens == 0


def test_another_seed_is_all_that_differs() -> None:
    wish = SamplingParams(temperature=0.5, frequency_penalty=1.0, stop_token_ids=(3,))
    assert wish.penalises
    assert wish.seeded(7) == replace(wish, seed=7)
    assert wish.seeded(7).penalises
    assert wish.seed is None
    with pytest.raises(ValueError, match="seed is -1; it must be between 0 and"):
        wish.seeded(-1)
