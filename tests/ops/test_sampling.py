"""Laws of sampling: what is drawn is what the contract says, word by word, on either side.

The literal side works in float64, a row at a time. The op's probabilities are float32: they, and what is
added up of them, are good to some 2^-19 of the total (the kernel's bound), so a token may stand in another's
place where u or a bound falls that close to an edge: it must then be the token of u, top_p and min_p a little
off.
"""

from __future__ import annotations

import itertools
import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from shoal.ops import api as ops
from shoal.ops import dispatch
from tests.ops.parts import DEVICE, GPU, on_gpu, runs_triton, scalars_in_arrays

pytestmark = [
    pytest.mark.usefixtures("poison"),
    scalars_in_arrays,
    pytest.mark.filterwarnings("ignore:.* encountered in:RuntimeWarning"),  # its NaN and infinities are meant
]
SIDES = [
    "reference",
    pytest.param(
        "triton",
        marks=runs_triton,
    ),
]
CLOSE = 2.0**-19
VOCABS = (1, 63, 257, 20_011, 129_280) if GPU else (1, 257, 9000)


class Row(NamedTuple):
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    uniform: float = 0.5


WISHES = [
    Row(temperature=0.0),
    Row(),
    Row(temperature=0.3),
    Row(top_k=1),
    Row(top_k=20),
    Row(top_k=10**6),
    Row(top_p=0.5),
    Row(top_p=0.95, temperature=1.5),
    Row(top_p=1e-6),
    Row(min_p=0.1),
    Row(min_p=1.0),
    Row(top_k=40, top_p=0.9),
    Row(top_k=50, top_p=0.8, min_p=0.05, temperature=0.7),
]


def _columns(rows: list[Row]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    temperature, top_k, top_p, min_p, uniform = zip(*rows, strict=True) if rows else ((),) * 5
    return (
        torch.tensor(temperature, dtype=torch.float32, device=DEVICE),
        torch.tensor(top_k, dtype=torch.int32, device=DEVICE),
        torch.tensor(top_p, dtype=torch.float64, device=DEVICE),
        torch.tensor(min_p, dtype=torch.float32, device=DEVICE),
        torch.tensor(uniform, dtype=torch.float64, device=DEVICE),
    )


def _sample(
    side: dispatch.Side, logits_SV: Tensor, rows: list[Row], scores_SV: Tensor | None = None
) -> ops.Sampled:
    with dispatch.using(side):
        return ops.sample(logits_SV.to(DEVICE), *_columns(rows), scores_SV=scores_SV)


def _literal(scores_V: Tensor, row: Row) -> int:
    """The contract, step by step."""
    scores = scores_V.double()
    if row.temperature == 0:
        return int(scores.argmax())
    probs = (scores / row.temperature).softmax(0)
    ranked = probs.sort(descending=True).values
    inside = ranked[: row.top_k] if row.top_k else ranked
    before = inside.cumsum(0) - inside
    kept = inside[before < row.top_p * inside.sum()]
    least = max(float(kept[-1]), row.min_p * float(ranked[0]))
    cumulative = probs.where(probs >= least, 0.0).cumsum(0)
    return int((cumulative > row.uniform * cumulative[-1]).nonzero()[0])


def _nearby(scores_V: Tensor, row: Row) -> set[int]:
    """The tokens of numbers that rounding cannot tell from the row's own."""
    signs = itertools.product(
        (-1, 0, 1), (-1, 0, 1) if row.top_p < 1 else (0,), (-1, 0, 1) if row.min_p else (0,)
    )
    return {
        _literal(
            scores_V,
            row._replace(
                uniform=min(max(row.uniform + u * CLOSE, 0.0), 1 - 2.0**-40),
                top_p=row.top_p * (1 + p * CLOSE),
                min_p=min(row.min_p * (1 + m * CLOSE), 1.0),
            ),
        )
        for u, p, m in signs
    }


def _logits(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (3 * torch.randn(rows, vocab, generator=torch.Generator().manual_seed(vocab))).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("vocab", VOCABS)
@pytest.mark.parametrize("side", SIDES)
def test_a_token_is_the_one_the_contract_draws(side: dispatch.Side, vocab: int, dtype: torch.dtype) -> None:
    """bfloat16 logits are full of equals."""
    uniforms = (0.0, 0.37, 0.999_999) if GPU or side == "reference" else (0.37,)
    rows = [wish._replace(uniform=u) for wish in WISHES for u in uniforms]
    logits_SV = _logits(len(rows), vocab, dtype)
    tokens_S, logprobs_S = _sample(side, logits_SV, rows)
    exact_SV = logits_SV.double().log_softmax(-1)
    edges = 0
    for row, token, logits_V in zip(rows, tokens_S.tolist(), logits_SV, strict=True):
        if token != _literal(logits_V, row):
            edges += 1
            assert token in _nearby(logits_V, row), row
    assert edges <= 2
    # Float32 of logits up to 16 and a sum of V terms.
    wanted_S = exact_SV.gather(1, tokens_S.cpu().unsqueeze(1)).squeeze(1)
    assert (logprobs_S.cpu().double() - wanted_S).abs().max() <= 16 * 2.0**-21


@pytest.mark.parametrize("cap", [4, 64])
@runs_triton
def test_a_search_ends_whatever_it_can_hold(cap: int) -> None:
    """All equal, two values, one value but for the best: more in the range than fit, down to the last bit."""
    from shoal.ops.triton import sampling

    logits_SV = torch.zeros(12, 300, device=DEVICE)
    logits_SV[4:8, ::2] = 1.0
    logits_SV[8:, 17] = 5.0
    rows = [Row(top_k=3), Row(top_p=0.5), Row(top_k=3, top_p=0.5), Row(min_p=0.5)] * 3
    tokens_S, _ = sampling.sample(logits_SV, *_columns(rows), None, cap=cap)
    for logits_V, row, token in zip(logits_SV.cpu(), rows, tokens_S.tolist(), strict=True):
        assert token in _nearby(logits_V, row)


@pytest.mark.parametrize("side", SIDES)
def test_a_row_depends_on_itself_alone(side: dispatch.Side) -> None:
    rows = [wish._replace(uniform=0.1 + 0.06 * i) for i, wish in enumerate(WISHES)]
    logits_SV = _logits(len(rows), 4999 if GPU else 500)
    together = _sample(side, logits_SV, rows)
    for i, row in enumerate(rows):
        alone = _sample(side, logits_SV[i : i + 1], [row])
        assert torch.equal(alone.tokens_S, together.tokens_S[i : i + 1])
        if side == "triton":
            assert torch.equal(alone.logprobs_S, together.logprobs_S[i : i + 1])


@pytest.mark.parametrize("side", SIDES)
def test_equals_go_to_the_lowest_id_and_are_kept_together(side: dispatch.Side) -> None:
    logits_SV = torch.tensor([[0.0, 3.0, 3.0, 1.0], [5.0, 5.0, 5.0, 5.0]])
    assert _sample(side, logits_SV, [Row(temperature=0.0)] * 2).tokens_S.tolist() == [1, 0]
    many_SV = torch.tensor([2.0, 1.0, 1.0, 0.0]).expand(20, -1).contiguous()
    drawn = _sample(side, many_SV, [Row(top_k=2, uniform=i / 20) for i in range(20)]).tokens_S
    assert set(drawn.tolist()) == {0, 1, 2}


@pytest.mark.parametrize("side", SIDES)
def test_zero_draws_no_token_of_probability_zero(side: dispatch.Side) -> None:
    logits_SV = torch.tensor([[-math.inf, 0.0, 1.0, -math.inf]] * 3)
    rows = [Row(uniform=0.0), Row(uniform=1 - 2.0**-52), Row(top_k=3, uniform=0.0)]
    assert _sample(side, logits_SV, rows).tokens_S.tolist() == [1, 2, 1]


@pytest.mark.parametrize("side", SIDES)
def test_temperature_goes_to_greedy_without_overflow(side: dispatch.Side) -> None:
    logits_SV = (1e4 * _logits(1, 50)).expand(4, -1).contiguous()
    rows = [Row(temperature=t, uniform=0.9, top_p=p) for t in (1e-3, 1e-38) for p in (1.0, 0.9)]
    assert set(_sample(side, logits_SV, rows).tokens_S.tolist()) == {int(logits_SV[0].argmax())}


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("poison_with", [math.nan, math.inf])
def test_logits_that_are_not_numbers_show(side: dispatch.Side, poison_with: float) -> None:
    logits_SV = torch.zeros(8, 9)
    logits_SV[:4, 3] = poison_with
    rows = [Row(temperature=0.0), Row(), Row(top_k=3), Row(top_p=0.9)] * 2
    tokens_S, logprobs_S = _sample(side, logits_SV, rows)
    assert logprobs_S.isfinite().tolist() == [False] * 4 + [True] * 4
    assert int(tokens_S.min()) >= 0
    assert int(tokens_S.max()) < 9


@pytest.mark.parametrize("side", SIDES)
def test_no_rows(side: dispatch.Side) -> None:
    tokens_S, logprobs_S = _sample(side, torch.zeros(0, 9), [])
    assert tokens_S.shape == logprobs_S.shape == (0,)


def test_a_column_of_another_dtype_or_length_is_refused() -> None:
    row = torch.zeros(2)
    with pytest.raises(ValueError, match=r"sample: top_k is \(2,\) torch.float32; give one torch.int32"):
        ops.sample(torch.zeros(2, 5), row, row, row, row, row)


# --------------------------------------------------------------------------------------------------
# Penalties


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("longest", [0, 1, 300])
def test_penalties_are_their_formulas(side: dispatch.Side, longest: int, dtype: torch.dtype) -> None:
    """What lies past a row's length is no id at all."""
    generator = torch.Generator().manual_seed(0)
    S, V = 5, 97
    logits_SV = _logits(S, V, dtype)
    lengths_S = torch.randint(0, longest + 1, (S,), generator=generator)
    num_prompt_S = (lengths_S * torch.rand(S, generator=generator)).long()
    ids_SN = torch.randint(0, V, (S, longest), generator=generator)
    ids_SN.masked_fill_(torch.arange(longest) >= lengths_S.unsqueeze(1), 10**9)
    frequency_S, presence_S = (torch.randn(S, generator=generator) for _ in range(2))
    repetition_S = 0.5 + torch.rand(S, generator=generator)
    arguments = (ids_SN, lengths_S, num_prompt_S, repetition_S, frequency_S, presence_S)
    with dispatch.using(side):
        scores_SV = ops.penalise(logits_SV.to(DEVICE), *(x.to(DEVICE) for x in arguments)).cpu()
    wanted = logits_SV.double()
    for s in range(S):
        ids = ids_SN[s, : lengths_S[s]].tolist()
        text = ids[int(num_prompt_S[s]) :]
        for v in set(ids):
            x, factor = float(wanted[s, v]), float(repetition_S[s])
            x = x / factor if x > 0 else x * factor
            wanted[s, v] = x - text.count(v) * float(frequency_S[s]) - (v in text) * float(presence_S[s])
    assert scores_SV.dtype == torch.float32
    # Four float32 operations on numbers below 64.
    torch.testing.assert_close(scores_SV.double(), wanted, atol=4 * 64 * 2.0**-24, rtol=0)


@pytest.mark.parametrize("side", SIDES)
def test_penalised_scores_are_drawn_from_and_the_models_own_are_reported(side: dispatch.Side) -> None:
    logits_SV = _logits(3, 11).to(DEVICE)
    scores_SV = logits_SV.roll(1, -1)
    rows = [Row(temperature=0.0), Row(top_k=2, uniform=0.01), Row(top_p=0.4)]
    tokens_S, logprobs_S = _sample(side, logits_SV, rows, scores_SV)
    own_SV = logits_SV.double().log_softmax(-1)
    for i, row in enumerate(rows):
        assert int(tokens_S[i]) == _literal(scores_SV[i].cpu(), row)
        assert float(logprobs_S[i]) == pytest.approx(float(own_SV[i, tokens_S[i]]), abs=1e-5)


@pytest.mark.gpu
@on_gpu
def test_it_runs_in_a_graph_without_the_host() -> None:
    rows = [WISHES[i % len(WISHES)] for i in range(64)]
    logits_SV = _logits(64, 129_280).to(DEVICE)
    columns = _columns(rows)
    eager = ops.sample(logits_SV, *columns)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.sample(logits_SV, *columns)
    graph.replay()
    assert torch.equal(captured.tokens_S, eager.tokens_S)
    assert torch.equal(captured.logprobs_S, eager.logprobs_S)
