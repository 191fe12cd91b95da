"""Laws of sampling: the support and the frequencies are those asked for, and a row depends on nothing but
itself.

Frequencies are held to chi-square's 99.9% quantile: a fixed seed makes each test pass or fail for good, and a
wrong distribution of thousands of draws exceeds it by far. Supports are held to a literal implementation, one
row at a time.
"""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
import torch
from torch import Tensor

from shoal.engine.sampling import Draw, History, sample, uniform, uniforms
from shoal.engine.sequence import SamplingParams

GREEDY = SamplingParams(temperature=0)


def chi_square(observed: list[int], expected: list[float]) -> float:
    return sum((o - e) ** 2 / e for o, e in zip(observed, expected, strict=True))


def limit(degrees: int) -> float:
    """The 99.9% quantile of chi-square (Wilson and Hilferty's approximation: 1% off at 3 degrees)."""
    return degrees * (1 - 2 / (9 * degrees) + 3.0902 * math.sqrt(2 / (9 * degrees))) ** 3


def spread_logits(size: int, seed: int = 0) -> Tensor:
    return torch.randn(size, generator=torch.Generator().manual_seed(seed))


def draw_many(logits_V: Tensor, params: SamplingParams, count: int) -> list[int]:
    """Tokens drawn from one row at `count` positions of a text."""
    draws = [Draw(params, seed=11, position=position) for position in range(count)]
    return [drawn.token for drawn in sample(logits_V.expand(count, -1), draws)]


def literal_support(logits_V: Tensor, params: SamplingParams) -> set[int]:
    """What SamplingParams says, word by word."""
    probs = (logits_V.double() / params.temperature).softmax(0).tolist()
    ranked = sorted(range(len(probs)), key=lambda token: -probs[token])[: params.top_k]
    total, reached, kept = sum(probs[token] for token in ranked), 0.0, []
    for token in ranked:
        if reached >= params.top_p * total:
            break
        kept.append(token)
        reached += probs[token]
    return {token for token in kept if probs[token] >= params.min_p * probs[ranked[0]]}


def test_numbers_made_together_are_those_made_alone() -> None:
    draw = random.Random(0)
    seeds = [0, 1, 2**63, 2**64 - 1, *(draw.getrandbits(64) for _ in range(200))]
    positions = np.array([[draw.randrange(2**20) for _ in seeds] for _ in range(3)])
    expected = [[uniform(*each) for each in zip(seeds, row, strict=True)] for row in positions.tolist()]
    assert uniforms(seeds, positions).tolist() == expected


def test_greedy_takes_the_lowest_id_among_equals() -> None:
    logits = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0], [-1.0, -2.0, -3.0, 0.0]])
    assert [drawn.token for drawn in sample(logits, [Draw(GREEDY, 0, 0)] * 3)] == [1, 0, 3]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_are_those_of_the_softmax(temperature: float) -> None:
    logits, count = spread_logits(16), 20000
    tokens = draw_many(logits, SamplingParams(temperature=temperature), count)
    expected = ((logits / temperature).softmax(0) * count).tolist()
    assert min(expected) > 5  # or chi-square would not hold
    assert chi_square([tokens.count(token) for token in range(16)], expected) < limit(15)


def test_frequencies_over_seeds_are_those_of_the_softmax() -> None:
    """Requests with seeds 0, 1, 2 ... are as independent as positions of one."""
    logits, count = spread_logits(16), 20000
    draws = [Draw(SamplingParams(), seed, position=5) for seed in range(count)]
    tokens = [drawn.token for drawn in sample(logits.expand(count, -1), draws)]
    expected = (logits.softmax(0) * count).tolist()
    assert chi_square([tokens.count(token) for token in range(16)], expected) < limit(15)


def test_neighbours_in_seed_and_position_are_independent() -> None:
    """Pairs of numbers fall evenly on an 8 x 8 board."""
    for seed_step, position_step in ((0, 1), (1, 0), (1, 1)):
        board = [0] * 64
        for seed in range(100):
            for position in range(64):
                first = uniform(seed, position)
                second = uniform(seed + seed_step, position + position_step)
                board[int(first * 8) * 8 + int(second * 8)] += 1
        assert chi_square(board, [100.0] * 64) < limit(63)


def test_the_numbers_are_a_promise() -> None:
    """A seed published with a text gives that text on every machine and in every later version."""
    promised = [0.6524484863740321, 0.03401170130434639, 0.7229639133003825]
    assert [uniform(0, 0), uniform(0, 1), uniform(2**64 - 1, 10**6)] == promised


def test_numbers_lie_in_the_unit_interval() -> None:
    numbers = [uniform(seed, position) for seed in range(50) for position in range(50)]
    assert min(numbers) >= 0
    assert max(numbers) < 1


def test_zero_draws_no_token_of_probability_zero() -> None:
    """SplitMix64 maps 2^64 less its increment to 0: with it as seed and as position, u is exactly 0."""
    root = 2**64 - 0x9E3779B97F4A7C15
    assert uniform(root, root) == 0
    logits = torch.tensor([[-math.inf, 0.0, 1.0], [0.0, 2.0, 1.0]])
    drawn = sample(logits, [Draw(SamplingParams(top_k=2), root, root)] * 2)
    assert [choice.token for choice in drawn] == [1, 1]


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(top_k=1),
        SamplingParams(top_k=3),
        SamplingParams(top_k=100),
        SamplingParams(top_p=0.01),
        SamplingParams(top_p=0.6),
        SamplingParams(top_p=0.95),
        SamplingParams(min_p=0.2),
        SamplingParams(min_p=1.0),
        SamplingParams(top_k=5, top_p=0.8),
        SamplingParams(top_k=6, top_p=0.9, min_p=0.3, temperature=1.5),
    ],
    ids=str,
)
def test_the_support_is_what_was_asked_for(params: SamplingParams) -> None:
    """3000 draws miss a token of probability 1% with a chance of e^-30: every one of the support appears."""
    for seed in range(4):
        logits = spread_logits(9, seed).tanh() * 1.5
        support = literal_support(logits, params)
        rare = torch.tensor([token in support for token in range(9)]).logical_not()
        probs = (logits / params.temperature).masked_fill(rare, -math.inf).softmax(0)
        assert all(probs[token] > 0.01 for token in support)
        assert set(draw_many(logits, params, 3000)) == support


def test_what_is_left_keeps_its_proportions() -> None:
    logits, params, count = spread_logits(12), SamplingParams(top_k=6, top_p=0.9), 10000
    support = sorted(literal_support(logits, params))
    tokens = draw_many(logits, params, count)
    expected = (logits[support].softmax(0) * count).tolist()
    assert chi_square([tokens.count(token) for token in support], expected) < limit(len(support) - 1)


def test_equals_of_the_last_kept_are_kept() -> None:
    logits = torch.tensor([2.0, 1.0, 1.0, 0.0])
    assert set(draw_many(logits, SamplingParams(top_k=2), 500)) == {0, 1, 2}


def test_a_row_depends_on_itself_alone() -> None:
    """The same bits, because a row's own arithmetic does not change with the company it keeps."""
    draw = random.Random(0)
    logits = torch.randn(40, 300, generator=torch.Generator().manual_seed(0)) * 3
    wishes = [
        SamplingParams(
            temperature=draw.choice([0.0, 0.7, 1.0]),
            top_k=draw.choice([None, 1, 20]),
            top_p=draw.choice([1.0, 0.5, 0.9]),
            min_p=draw.choice([0.0, 0.1]),
            logprobs=draw.choice([0, 3]),
        )
        for _ in range(40)
    ]
    draws = [Draw(wish, draw.getrandbits(64), draw.randrange(1000)) for wish in wishes]
    together = sample(logits, draws)
    alone = [sample(logits[row : row + 1], draws[row : row + 1])[0] for row in range(40)]
    assert together == alone


def test_temperature_goes_to_greedy_without_overflow() -> None:
    logits = spread_logits(50) * 1e4
    params = [SamplingParams(temperature=t) for t in (1e-3, 1e-38, 1e-300)]
    drawn = sample(logits.expand(3, -1), [Draw(wish, 3, 3) for wish in params])
    assert {choice.token for choice in drawn} == {int(logits.argmax())}


def test_log_probabilities_are_the_models_own() -> None:
    """Float32 of the log-softmax, whatever the sampling: 2^-24 of logits up to 8, a few roundings each."""
    logits = torch.randn(5, 1000, generator=torch.Generator().manual_seed(0)) * 2
    exact = logits.double().log_softmax(-1)
    params = SamplingParams(temperature=0.3, top_k=4, min_tokens=1, stop_token_ids=(1,), logprobs=3)
    for row, drawn in enumerate(sample(logits, [Draw(params, 1, at, frozenset({1})) for at in range(5)])):
        assert drawn.logprob == pytest.approx(float(exact[row, drawn.token]), abs=4e-6)
        values, tokens = exact[row].topk(3)
        assert [token for token, _ in drawn.top] == tokens.tolist()
        assert [logprob for _, logprob in drawn.top] == pytest.approx(values.tolist(), abs=4e-6)


def test_each_row_gets_as_many_alternatives_as_it_asked_for() -> None:
    draws = [Draw(SamplingParams(logprobs=count), 0, 0) for count in (0, 4, 1)]
    assert [len(drawn.top) for drawn in sample(torch.zeros(3, 8), draws)] == [0, 4, 1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_ids_are_not_drawn(temperature: float) -> None:
    logits = torch.tensor([9.0, 8.0, 1.0, 0.0]).expand(300, -1)
    params, banned = SamplingParams(temperature=temperature), frozenset({0, 1})
    drawn = sample(logits, [Draw(params, 0, at, banned) for at in range(300)])
    assert {choice.token for choice in drawn} == ({2} if temperature == 0 else {2, 3})


@pytest.mark.parametrize("params", [GREEDY, SamplingParams(), SamplingParams(top_p=0.9, top_k=3)], ids=str)
def test_logits_that_are_not_numbers_show(params: SamplingParams) -> None:
    for poison in (math.nan, math.inf):
        logits = torch.zeros(2, 8)
        logits[0, 3] = poison
        broken, sound = sample(logits, [Draw(params, 0, 0)] * 2)
        assert not math.isfinite(broken.logprob)
        assert sound.logprob == pytest.approx(-math.log(8))


def test_no_rows() -> None:
    assert sample(torch.zeros(0, 8), []) == []


# ----------------------------------------------------------------------------------------------------
# Penalties and biases


def literal_penalties(logits_V: Tensor, params: SamplingParams, prompt: list[int], text: list[int]) -> Tensor:
    """What SamplingParams says, token by token."""
    bent = logits_V.clone()
    for token in range(len(bent)):
        value = float(logits_V[token])
        if token in prompt or token in text:
            factor = params.repetition_penalty
            value = value / factor if value > 0 else value * factor
        value -= params.frequency_penalty * text.count(token)
        value -= params.presence_penalty * (token in text)
        value += dict(params.logit_bias).get(token, 0.0)
        bent[token] = value
    return bent


def test_penalties_and_biases_are_what_they_say() -> None:
    """Greedy of the bent logits, for rows that ask for different things over texts of different lengths."""
    draw = random.Random(0)
    logits = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    wishes, prompts, texts = [], [], []
    for _ in range(30):
        wishes.append(
            SamplingParams(
                temperature=0,
                repetition_penalty=draw.choice([1.0, 0.5, 1.7]),
                frequency_penalty=draw.choice([0.0, 0.6, -0.4]),
                presence_penalty=draw.choice([0.0, 1.5]),
                logit_bias=draw.choice([(), ((3, 2.0), (5, -4.0))]),
            )
        )
        prompts.append([draw.randrange(12) for _ in range(draw.randint(1, 6))])
        texts.append([draw.randrange(12) for _ in range(draw.randint(0, 9))])

    def history(rows: list[int], length: int) -> Tensor:
        """What lies after a text may be anything."""
        return torch.tensor([(prompts[row] + texts[row] + [7] * length)[:length] for row in rows])

    draws = [
        Draw(wish, 0, len(prompt) + len(text))
        for wish, prompt, text in zip(wishes, prompts, texts, strict=True)
    ]
    drawn = sample(logits, draws, History(history, [len(prompt) for prompt in prompts]))
    for row, choice in enumerate(drawn):
        bent = literal_penalties(logits[row], wishes[row], prompts[row], texts[row])
        assert choice.token == int(bent.argmax())
        assert choice.logprob == pytest.approx(float(logits[row].log_softmax(0)[choice.token]), abs=4e-6)
