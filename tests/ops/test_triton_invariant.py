"""Laws of batch-invariant mode on kernels: what the engine draws, the trainer scores, in the same bits, with
gradients or without, in any company.

The interpreter adds as it is told and knows no layouts: that a compiler keeps the order too, the tests marked
gpu show, here and in tests/stages/test_zero_difference.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from shoal.ops import api as ops
from shoal.ops import dispatch
from shoal.ops.triton import cache_attention, likelihood, loss, routing
from shoal.ops.triton.cache_plan import PORTABLE
from tests.ops.parts import DEVICE, GPU, HALF, on_gpu, runs_triton, scalars_in_arrays

pytestmark = [runs_triton, pytest.mark.usefixtures("poison"), scalars_in_arrays]
DTYPES = (torch.float32, HALF)
D = 2048 if GPU else 16


def _draw(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _sample(logits_SV: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    ones_S = torch.ones(len(logits_SV), device=DEVICE)
    uniforms_S = torch.linspace(0, 0.99, len(logits_SV), dtype=torch.float64, device=DEVICE)
    rows = (ones_S * temperature, ones_S.int() * 0, ones_S.double(), ones_S * 0, uniforms_S)
    return tuple(ops.sample(logits_SV, *rows))  # type: ignore[return-value]


# Vocabularies below a tile, odd, of whole tiles and a rest; rows below a tile of the product, odd, above it.
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    ("rows", "vocabulary"),
    [(1, 129_283), (257, 102_401), (70, 4097), (1000, 7)] if GPU else [(1, 1), (17, 7), (2, 99)],
)
def test_what_is_drawn_is_what_is_scored(
    rows: int, vocabulary: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not GPU:  # whole tiles and a rest, at a size for the interpreter
        monkeypatch.setattr(likelihood, "TILE", 32)
    hidden_SD = _draw(rows, D, dtype=dtype)
    head_VD = _draw(vocabulary, D, dtype=dtype, seed=1) / D**0.5
    ones_S = torch.ones(rows, device=DEVICE)
    with dispatch.using("triton"):
        with dispatch.batch_invariant():
            (logits_SV,) = ops.linears(hidden_SD, (head_VD,), (None,))
            for temperature in (0.0, 1.0):
                tokens_S, logprobs_S = _sample(logits_SV, temperature)
                scored = ops.linear_cross_entropy(hidden_SD, head_VD, tokens_S, ones_S)
                assert torch.equal(-scored.nll_T, logprobs_S)
                few = slice(rows // 2, rows // 2 + 1)
                alone = ops.linear_cross_entropy(hidden_SD[few], head_VD, tokens_S[few], ones_S[few])
                assert torch.equal(-alone.nll_T, logprobs_S[few])
                assert torch.equal(_sample(logits_SV[few], 0.0)[1], _sample(logits_SV, 0.0)[1][few])
        chunks = loss.fixed_linear_cross_entropy(
            hidden_SD, head_VD, tokens_S, ones_S, chunk_bytes=5 * vocabulary * dtype.itemsize
        )
    assert torch.equal(-chunks[1], logprobs_S)
    wanted_S = (hidden_SD.double() @ head_VD.double().t()).log_softmax(-1).gather(1, tokens_S.unsqueeze(1))
    # Logits below 8 are rounded to the dtype, in float32 sums of D terms; the rest is float32.
    allowed = 8 * torch.finfo(dtype).eps + D**0.5 * 2.0**-20
    assert (logprobs_S - wanted_S.squeeze(1)).abs().max() <= allowed


def _experts(tokens: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(3)
    experts_TK = torch.rand(300, 5, generator=generator).argsort(1)[:tokens, :2].contiguous()
    return experts_TK.to(DEVICE), _draw(300, 2, seed=4).abs()[:tokens]


OPS: dict[str, Callable[..., Tensor]] = {
    "linears": lambda x, w: torch.cat(ops.linears(x, (w, w[:7].contiguous()), (None, None)), -1),
    "gate": lambda x, w: ops.gate(x, w, 3, scoring_func="softmax", norm_topk_prob=True).weights_TK,
    "gate_logits": lambda x, w: ops.gate_logits(x, w),
    "mixture": lambda x, w: ops.mixture(
        x, *_experts(len(x)), w.expand(5, -1, -1).contiguous(), *_down(x), w[:16].contiguous(),
        w[16:].contiguous(), _draw(x.shape[1], 16, dtype=x.dtype, seed=6) / 4,
    ),
}  # fmt: skip


def _down(x_TD: Tensor) -> tuple[Tensor]:
    return (_draw(5, x_TD.shape[1], 16, dtype=x_TD.dtype, seed=5) / 4,)


@pytest.mark.parametrize("dtype", DTYPES if GPU else DTYPES[:1], ids=str)
@pytest.mark.parametrize("name", OPS)
def test_a_gradient_changes_no_bit_and_is_the_plain_one(name: str, dtype: torch.dtype) -> None:
    tokens = 300 if GPU else 18
    x_TD, weight = _draw(tokens, D, dtype=dtype), _draw(32, D, dtype=dtype, seed=1) / D**0.5
    grads = []
    with dispatch.using("auto" if GPU else "triton"):
        with torch.no_grad(), dispatch.batch_invariant():
            wanted = OPS[name](x_TD, weight)
            assert torch.equal(OPS[name](x_TD[:3], weight), wanted[:3])
        for on in (True, False):
            if not on and dtype == torch.float32 and "gate" in name:
                continue  # the kernels take no float32 outside of the mode
            leaves = [x_TD.clone().requires_grad_(), weight.clone().requires_grad_()]
            with dispatch.batch_invariant(on):
                y = OPS[name](*leaves)
            assert not on or torch.equal(y, wanted)
            grads.append(torch.autograd.grad((y.float() * _draw(*y.shape, seed=8)).sum(), leaves))
    for ours, plain in zip(*grads, strict=True) if len(grads) == 2 else ():
        # Another order of the same sums before some roundings.
        assert (ours - plain).abs().max() <= 8 * torch.finfo(dtype).eps * plain.abs().max()


def test_the_parts_of_a_long_context_are_added_in_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """By steps of few tokens, which take one head and many parts a program, and of many."""
    unit, plan = (2048, None) if GPU else (16, PORTABLE)
    monkeypatch.setattr(cache_attention, "UNIT_POSITIONS", unit)
    new, heads, rank, rope = (600, 16, 512, 64) if GPU else (33, 8, 16, 16)
    context = 10 * unit
    pages = _draw(context // 16, 16, rank + rope)
    table_SB = torch.arange(context // 16, dtype=torch.int32, device=DEVICE).unsqueeze(0)
    q_THL, scale = _draw(new, heads, rank + rope, seed=1) / 4, 0.2

    def attend(rows: slice) -> Tensor:
        q = q_THL[rows]
        seen = torch.tensor([context - new + rows.stop], dtype=torch.int32, device=DEVICE)
        bounds = torch.tensor([0, len(q)], dtype=torch.int32, device=DEVICE)
        where = (table_SB, seen, context, bounds, len(q), rank, scale)
        return cache_attention.latent_attention(q, pages, *where, invariant=True, plan=plan)

    whole = attend(slice(0, new))
    last = slice(new - 1, new)
    assert torch.equal(attend(last), whole[last])


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("experts", "groups"), [(64, 1), (256, 8), (30, 3)])
def test_a_row_of_the_router_has_one_sum(experts: int, groups: int) -> None:
    """Above 1024 tokens a warp takes several rows, and shares out each over fewer lanes."""
    logits_TE = _draw(3000, experts)
    rule = ("softmax", None, groups, max(1, groups // 2), True, 1.0, None)
    whole = routing.route(logits_TE, 6, *rule, invariant=True)
    for rows in (slice(0, 1), slice(1000, 1700), slice(0, 2000)):
        alone = routing.route(logits_TE[rows], 6, *rule, invariant=True)
        assert all(torch.equal(ours, theirs[rows]) for ours, theirs in zip(alone, whole, strict=True))


@on_gpu
@pytest.mark.gpu
def test_what_has_no_form_is_refused() -> None:
    x_TD = torch.randn(3, 8, dtype=torch.float64, device=DEVICE)
    with dispatch.batch_invariant(), pytest.raises(ValueError, match=r"rms_norm: x is torch.float64"):
        ops.rms_norm(x_TD, x_TD[0], 1e-6)
