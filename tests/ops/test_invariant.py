"""Laws of batch-invariant mode on a CPU: a row has the same bits in any batch, the values are the reference's
to rounding, and so are the gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shoal.ops import api as ops
from shoal.ops import dispatch
from shoal.ops.reference import fixed

T, D, E, K, F = 83, 48, 8, 2, 24  # more than two tiles of rows, and not whole ones
DTYPES = [torch.float32, torch.bfloat16, torch.float64]
# Sums of at most 64 products of numbers about 1, in two orders: a few roundings of their largest partial sum.
TOLERANCE = {torch.float32: 2e-5, torch.bfloat16: 0.15, torch.float64: 1e-12}


def _draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def _angles() -> tuple[Tensor, Tensor]:
    turns = _draw(T, 4, seed=9)
    return turns.cos(), turns.sin()


def _rule() -> dict[str, object]:
    return {"scoring_func": "sigmoid", "bias_E": _draw(E, seed=5), "n_group": 4, "topk_group": 2}


def _experts() -> Tensor:
    experts_TK = torch.stack(
        [torch.randperm(E, generator=torch.Generator().manual_seed(t))[:K] for t in range(T)]
    )
    experts_TK[3, 1] = -1
    return experts_TK


def _weights(dtype: torch.dtype) -> tuple[Tensor, ...]:
    return tuple(_draw(*shape, dtype=dtype, seed=i) / 4 for i, shape in enumerate(SHAPES))


SHAPES = [(E, 2 * F, D), (E, D, F), (F, D), (F, D), (D, F)]

# Of the first rows of x, by name. Every row-wise argument is cut to as many rows.
OPS: dict[str, Callable[[Tensor], Tensor]] = {
    "linears": lambda x: torch.cat(
        ops.linears(
            x, (_draw(7, D, dtype=x.dtype), _draw(65, D, dtype=x.dtype)), (None, _draw(65, dtype=x.dtype))
        ),
        -1,
    ),
    "rms_norm": lambda x: ops.rms_norm(x, _draw(D, dtype=x.dtype), 1e-6),
    "add_rms_norm": lambda x: torch.cat(ops.add_rms_norm(x, x * 2, _draw(D, dtype=x.dtype), 1e-6), -1),
    "swiglu": lambda x: ops.swiglu(x, x.flip(-1)),
    "rope": lambda x: ops.rope(x.view(-1, 6, 8), *(a[: len(x)] for a in _angles()), interleaved=True).flatten(
        1
    ),
    "rope by halves": lambda x: ops.rope(
        x.view(-1, 6, 8), *(a[: len(x)] for a in _angles()), interleaved=False
    ).flatten(1),
    "gate": lambda x: ops.gate(x, _draw(E, D), K, norm_topk_prob=True, **_rule()).weights_TK,  # type: ignore[arg-type]
    "gate by softmax": lambda x: ops.gate(x, _draw(E, D), K, scoring_func="softmax").weights_TK,
    "grouped_mlp": lambda x: ops.grouped_mlp(
        x, _experts()[: len(x)], _draw(T, K).sigmoid()[: len(x)], *_weights(x.dtype)[:2]
    ),
    "mixture": lambda x: ops.mixture(
        x, _experts()[: len(x)], _draw(T, K).sigmoid()[: len(x)], *_weights(x.dtype)
    ),
    "linear_cross_entropy": lambda x: ops.linear_cross_entropy(
        x, _draw(101, D, dtype=x.dtype) / 4, torch.arange(len(x)), torch.ones(len(x))
    ).nll_T.unsqueeze(1),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", OPS)
def test_a_row_has_the_same_bits_in_any_batch(name: str, dtype: torch.dtype) -> None:
    x_TD = _draw(T, D, dtype=dtype, seed=7)
    with dispatch.batch_invariant():
        whole = OPS[name](x_TD)
        for rows in (1, 2, 3, 31, 33, 64):
            assert torch.equal(OPS[name](x_TD[:rows].clone()), whole[:rows]), rows
    plain = OPS[name](x_TD)
    allowed = max(TOLERANCE[dtype], TOLERANCE[plain.dtype]) * (1 if "gate" in name else 2 + plain.abs().max())
    assert (whole - plain).abs().max() <= allowed


@pytest.mark.parametrize("name", [name for name in OPS if name != "linear_cross_entropy"])
def test_gradients_are_the_reference_s_and_do_not_change_a_bit_of_the_values(name: str) -> None:
    x_TD = _draw(T, D, dtype=torch.float64, seed=7)
    grads: list[Tensor] = []
    for on in (False, True):
        x = x_TD.clone().requires_grad_()
        with dispatch.batch_invariant(on):
            y = OPS[name](x)
            (y * _draw(*y.shape, dtype=y.dtype)).sum().backward()
            if on:
                with torch.no_grad():
                    assert torch.equal(OPS[name](x_TD), y)
        assert x.grad is not None
        grads.append(x.grad)
    # The gate is float32 whatever comes in.
    torch.testing.assert_close(grads[1], grads[0], rtol=1e-4 if "gate" in name else 1e-9, atol=1e-5)


def test_the_loss_has_its_gradients_in_hidden_and_head() -> None:
    grads = []
    for on in (False, True):
        hidden, head = _draw(T, D).requires_grad_(), _draw(101, D, seed=1).requires_grad_()
        with dispatch.batch_invariant(on):
            loss = ops.linear_cross_entropy(hidden, head, torch.arange(T), torch.ones(T))
        assert not loss.nll_T.requires_grad
        grads.append(torch.autograd.grad(loss.total, (hidden, head)))
    torch.testing.assert_close(grads[0], grads[1])


@pytest.mark.parametrize(("depth", "columns"), [(33, 7), (33, 128), (64, 1), (256, 512)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_product_does_not_know_where_in_a_tile_a_row_lies(
    depth: int, columns: int, dtype: torch.dtype
) -> None:
    """33 by 7 and 33 by 128 are shapes for which MKL has two orders within one tile, in some dtypes."""
    weight, row = _draw(columns, depth, dtype=dtype), _draw(1, depth, dtype=dtype, seed=1)
    alone = fixed.product(row, weight)
    for place in range(fixed.ROWS + 2):
        x = _draw(fixed.ROWS + 2, depth, dtype=dtype, seed=2)
        x[place] = row
        assert torch.equal(fixed.product(x, weight)[place], alone[0]), place
    torch.testing.assert_close(
        alone, row @ weight.t(), rtol=TOLERANCE[dtype], atol=TOLERANCE[dtype] * depth**0.5
    )


def test_a_sum_of_any_length_is_the_sum() -> None:
    for length in (1, 2, 3, 17, 100):
        x = torch.arange(2.0 * length).view(2, length)
        assert torch.equal(fixed.add_up(x), x.sum(-1))


def test_a_drawn_token_s_log_probability_is_its_score_s() -> None:
    hidden_SD, head_VD = _draw(40, D), _draw(101, D, seed=1)
    zeros = torch.zeros(40)
    with dispatch.batch_invariant():
        (logits_SV,) = ops.linears(hidden_SD, (head_VD,), (None,))
        drawn = ops.sample(logits_SV, zeros, zeros.int(), zeros.double() + 1, zeros, zeros.double())
        for rows in (slice(0, 40), slice(5, 6)):
            tokens = drawn.tokens_S[rows]
            scored = ops.linear_cross_entropy(hidden_SD[rows], head_VD, tokens, torch.ones(len(tokens)))
            assert torch.equal(-scored.nll_T, drawn.logprobs_S[rows])


def test_explain_says_so() -> None:
    x = _draw(2, D)
    assert "batch-invariant" not in dispatch.explain("rms_norm", x, x[0], 1e-6)
    with dispatch.batch_invariant():
        assert dispatch.explain("rms_norm", x, x[0], 1e-6).endswith("in batch-invariant form")
