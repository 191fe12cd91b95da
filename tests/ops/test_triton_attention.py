"""Laws of attention over packs on a GPU: equal to the reference, values and gradients, whoever runs it.

The reference runs in float64 on the same values. With u the unit roundoff of the dtype, weights, their
gradients and each result are rounded once, by at most u: 4 u of the norm holds for tensors too small to
average; float32 adds sums of n terms, each good to sqrt(n) 2^-24, through an exponential of scores up to 20.

On a GPU the sizes are real; elsewhere Triton's interpreter (TRITON_INTERPRET=1) runs the same on small ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from shoal.ops import dispatch
from shoal.ops.reference import attention as reference
from shoal.ops.triton import attention
from shoal.ops.triton.attention import HOPPER, PORTABLE, Plan, Tile
from tests.ops.parts import DEVICE, GPU, HALF, on_gpu, runs_triton, scalars_in_arrays

pytestmark = [
    runs_triton,
    pytest.mark.usefixtures("poison"),
    pytest.mark.filterwarnings("ignore:cuDNN Attention defaults to a non-deterministic"),
    scalars_in_arrays,
]
DTYPES = (HALF, torch.float32)
PACKS = {
    "one token": [1],
    "odd": [63],
    "equal": [257, 257] if GPU else [33, 33],
    "ragged": [257, 1, 700, 0, 63, 64] if GPU else [63, 1, 0, 20],
}


class Heads(NamedTuple):
    H: int
    G: int
    Q: int
    V: int


HEADS = {
    "latent": Heads(4, 4, 192, 128) if GPU else Heads(2, 2, 24, 16),
    "grouped": Heads(8, 2, 128, 128) if GPU else Heads(4, 2, 16, 16),
    "odd": Heads(6, 2, 80, 56) if GPU else Heads(2, 1, 5, 7),
}


def _pack(lengths: list[int], heads: Heads, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator(DEVICE).manual_seed(0)
    tokens = sum(lengths)
    shapes = ((tokens, heads.H, heads.Q), (tokens, heads.G, heads.Q), (tokens, heads.G, heads.V))
    q, k, v = (torch.randn(shape, generator=generator, device=DEVICE).to(dtype) for shape in shapes)
    return q, k, v


def _boundaries(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0).to(DEVICE, torch.int32)


def _assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype, floor: float = 1e-30) -> None:
    limit = 4 * torch.finfo(dtype).eps / 2 + 20 * 32 * 2.0**-24
    assert got.shape == wanted.shape
    error = (got.double() - wanted).norm() / wanted.norm().clamp(min=floor)
    assert error <= limit, f"relative error {error:.2e}, limit {limit:.2e}"


def _results(
    side: Callable[..., Tensor], tensors: tuple[Tensor, ...], lengths: list[int], **settings: Any
) -> list[Tensor]:
    """The output and every gradient, for one random gradient of the output."""
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    scale = tensors[0].shape[2] ** -0.5
    o_THV = side(*leaves, _boundaries(lengths), max(lengths, default=0), scale, **settings)
    generator = torch.Generator(DEVICE).manual_seed(1)
    o_THV.backward(torch.randn(o_THV.shape, generator=generator, device=DEVICE).to(HALF).to(o_THV.dtype))
    gradients = [leaf.grad for leaf in leaves]
    assert all(gradient is not None for gradient in gradients)
    return [o_THV.detach(), *(gradient for gradient in gradients if gradient is not None)]


def _assert_equals_reference(lengths: list[int], heads: Heads, dtype: torch.dtype, **settings: Any) -> None:
    tensors = _pack(lengths, heads, dtype)
    wide = tuple(tensor.double() for tensor in tensors)
    got = _results(attention.attention, tensors, lengths, **settings)
    for ours, theirs in zip(got, _results(reference.attention, wide, lengths), strict=True):
        # A token alone has weight 1 whatever its score: q and k have no gradient, but for what do v - do o,
        # of order one, leaves of its rounding.
        _assert_close(ours, theirs, dtype, floor=theirs.numel() ** 0.5 if max(lengths) == 1 else 1e-30)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("pack", PACKS)
def test_values_and_gradients_equal_reference(pack: str, heads: str, dtype: torch.dtype) -> None:
    _assert_equals_reference(PACKS[pack], HEADS[heads], dtype)


@pytest.mark.parametrize("name", ["portable", "hopper", "wide keys"])
@pytest.mark.parametrize("heads", HEADS)
def test_the_last_tokens_over_all_equal_reference(heads: str, name: str) -> None:
    """Queries that are the last of their sequence: from all of it down to none of it."""
    seen = [257, 700, 64, 0, 130] if GPU else [35, 17, 40, 0, 20]
    lengths = [257, 1, 30, 0, 0] if GPU else [35, 1, 18, 0, 0]
    q, _, _ = _pack(lengths, HEADS[heads], HALF)
    _, k, v = _pack(seen, HEADS[heads], HALF)
    keys = {"cu_keys_S1": _boundaries(seen)}
    got = _results(attention.attention, (q, k, v), lengths, **keys, most_keys=max(seen), plan=PLANS[name])
    wide = (q.double(), k.double(), v.double())
    wanted = _results(reference.attention, wide, lengths, **keys, max_keys=max(seen))
    for ours, theirs in zip(got, wanted, strict=True):
        _assert_close(ours, theirs, HALF)


PLANS = {
    "portable": PORTABLE,
    "hopper": HOPPER if GPU else Plan(Tile(32, 16, 4, 2), Tile(16, 16, 4, 2), Tile(32, 16, 4, 2)),
    "wide keys": Plan(Tile(16, 32, 4, 2), Tile(16, 32, 4, 2), Tile(16, 32, 4, 2)),
}


@pytest.mark.parametrize("heads", ["latent", "grouped"])
@pytest.mark.parametrize("name", PLANS)
def test_every_plan_of_ours_gives_the_gradients(name: str, heads: str) -> None:
    _assert_equals_reference(PACKS["ragged"], HEADS[heads], HALF, plan=PLANS[name])


@pytest.mark.parametrize("lengths", [[0], []], ids=str)
def test_no_tokens_give_no_rows_and_zero_gradients(lengths: list[int]) -> None:
    o_THV, *gradients = _results(attention.attention, _pack(lengths, HEADS["latent"], HALF), lengths)
    assert o_THV.shape == (0, HEADS["latent"].H, HEADS["latent"].V)
    assert len(gradients) == 3


def test_a_sequence_is_untouched_by_its_neighbours() -> None:
    """Not even by a NaN of theirs; in batch-invariant mode its bits are those it has alone."""
    lengths = PACKS["ragged"]
    q, k, v = _pack(lengths, HEADS["latent"], HALF)
    whole = attention.attention(q, k, v, _boundaries(lengths), max(lengths), 0.1, invariant=True)
    first = lengths[0]
    for tensor in (q, k, v):
        tensor[first : first + 1] = float("nan")
    again = attention.attention(q, k, v, _boundaries(lengths), max(lengths), 0.1, invariant=True)
    assert torch.equal(whole[:first], again[:first])
    assert torch.equal(whole[first + 1 :], again[first + 1 :])
    alone = attention.attention(
        q[:first], k[:first], v[:first], _boundaries([first]), first, 0.1, invariant=True
    )
    assert torch.equal(alone, whole[:first])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "N"), [(1, 1), (19, 63), (63, 63), (257, 1000)] if GPU else [(1, 1), (19, 41)])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", HEADS)
def test_a_part_equals_reference(heads: str, causal: bool, n: int, N: int, dtype: torch.dtype) -> None:
    q, k, v = _pack([max(n, N)], HEADS[heads], dtype)
    q, k, v = q[:n], k[:N], v[:N]
    got = attention.attention_part(q, k, v, 0.2, causal)
    wanted = reference.attention_part(q.double(), k.double(), v.double(), 0.2, causal)
    _assert_close(got[0], wanted[0], dtype)
    torch.testing.assert_close(got[1].double(), wanted[1], rtol=1e-4, atol=1e-4)


def test_parts_merge_to_the_whole() -> None:
    """Each part is rounded once, and so is their sum."""
    q, k, v = _pack([63], HEADS["latent"], HALF)
    q = q[:20]
    cuts = ((0, 1, False), (1, 30, False), (30, 43, False), (43, 63, True))
    o = lse = None
    for first, last, causal in cuts:
        part = attention.attention_part(q, k[first:last], v[first:last], 0.2, causal)
        o, lse = part if o is None or lse is None else attention.merge_attention(o, lse, *part)
    assert o is not None
    assert lse is not None
    wanted = reference.attention_part(q.double(), k.double(), v.double(), 0.2, True)
    _assert_close(o.to(HALF), wanted[0], HALF)
    torch.testing.assert_close(lse.double(), wanted[1], rtol=1e-4, atol=1e-4)


def test_a_part_that_sees_nothing_weighs_nothing() -> None:
    q, k, v = _pack([20], HEADS["latent"], HALF)
    o, lse = attention.attention_part(q, k[:4], v[:4], 0.2, True)
    assert not o[:16].any()
    assert (lse[:16] == -torch.inf).all()
    other = attention.attention_part(q, k, v, 0.2, False)
    merged, total = attention.merge_attention(o, lse, *other)
    assert torch.equal(merged[:16], other[0][:16].float())
    assert torch.equal(total[:16], other[1][:16])


def test_the_dispatcher_says_who_runs_it() -> None:
    q, k, v = _pack([5, 4], HEADS["latent"], HALF)
    arguments = (q, k, v, _boundaries([5, 4]), 5, 0.1)
    with dispatch.using("triton"):
        said = dispatch.explain("attention", *arguments)
        assert ("several lengths" if GPU else "flash (cuDNN's fast kernels are for Hopper") in said
        if GPU:
            equal = _pack([512, 512], HEADS["latent"], HALF)
            assert "cudnn" in dispatch.explain("attention", *equal, _boundaries([512, 512]), 512, 0.1)
        keys = (_boundaries([5, 4]), 5)
        assert "last of more keys" in dispatch.explain("attention", *arguments, *keys)
        with dispatch.batch_invariant():
            assert "batch-invariant" in dispatch.explain("attention", *arguments)


def test_refusals_name_the_value() -> None:
    q, k, v = _pack([5], HEADS["latent"], HALF)
    assert attention.attention_refusal(q, k, v) is None
    assert "float64" in str(attention.attention_refusal(q.double(), k, v))
    assert "cast them to one" in str(attention.attention_refusal(q, k.float(), v))


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("plan", [None, HOPPER], ids=["chosen", "ours"])
@pytest.mark.parametrize("lengths", [[4096], [2048, 2048], [3000, 1096, 17, 2001]], ids=str)
def test_real_shapes(lengths: list[int], plan: Plan | None) -> None:
    _assert_equals_reference(lengths, Heads(16, 16, 192, 128), HALF, plan=plan)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("plan", [None, HOPPER], ids=["chosen", "ours"])
def test_packs_past_two_billion_elements(plan: Plan | None) -> None:
    heads = Heads(128, 128, 192, 128)
    lengths = [400] * 218 + [300, 200]
    tokens = sum(lengths)
    assert tokens * heads.H * heads.Q > 2**31
    q = torch.randn(tokens, heads.H, heads.Q, device=DEVICE, dtype=HALF)
    k = q.roll(1, 0)
    v = q[..., : heads.V].contiguous()
    got = attention.attention(q, k, v, _boundaries(lengths), 400, 0.1, plan=plan)[-200:]
    wanted = attention.attention(q[-200:], k[-200:], v[-200:], _boundaries([200]), 200, 0.1, plan=HOPPER)
    torch.testing.assert_close(got, wanted, rtol=2.0**-6, atol=2.0**-7)
