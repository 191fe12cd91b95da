"""Laws of native sparse attention's kernels: values and gradients are their references', on odd sizes.

References run in float64 on the same values. With u the unit roundoff of the dtype, weights and results are
each rounded once, by at most u of the norm: 1.5 u, and 4 u holds for small tensors; gradients pass two more
roundings. float32 adds some hundred terms: 1e-5 of the norm.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from shoal.ops import api as ops
from shoal.ops import dispatch
from shoal.ops.api import Blocking
from shoal.ops.triton import block_attention, runs
from tests.ops.parts import DEVICE, GPU, HALF, runs_triton, scalars_in_arrays

pytestmark = [runs_triton, pytest.mark.usefixtures("poison"), scalars_in_arrays]
UNIT = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
LENGTHS = (700, 2, 257) if GPU else (33, 2, 9)
HEADS, GROUPS, Q, V, SCALE = (32, 2, 192, 128, 0.07) if GPU else (4, 2, 24, 16, 0.2)
BLOCKING = Blocking(32, 16, 64, 6, 1, 2) if GPU else Blocking(8, 4, 8, 4, 1, 2)
TOKENS, CU = sum(LENGTHS), torch.tensor([0, *LENGTHS], device=DEVICE).cumsum(0).int()
COUNTS = [max(0, (n - BLOCKING.compress_block) // BLOCKING.compress_stride + 1) for n in LENGTHS]
CU_M = torch.tensor([0, *COUNTS], device=DEVICE).cumsum(0).int()
MOST = max(LENGTHS)
DTYPES = [torch.float32, HALF] if GPU else [HALF]
EXACT = [torch.float32, HALF] if GPU else [torch.float32]


def _draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def _close(got: Tensor, wanted: Tensor, dtype: torch.dtype, roundings: float = 4.0) -> None:
    assert torch.equal(got == -math.inf, wanted == -math.inf)
    got, wanted = got.double().nan_to_num(neginf=0.0, nan=1e9), wanted.double().nan_to_num(neginf=0.0)
    assert (got - wanted).norm() <= roundings * UNIT[dtype] * wanted.norm()


def _compare(op: Any, inputs: list[Tensor], dtype: torch.dtype) -> None:
    """Output and gradients of one call by both sides."""
    leaves = [x.detach().clone().requires_grad_() for x in inputs]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    with dispatch.using("triton"):
        got = op(*leaves)
    with dispatch.using("reference"):
        wanted = op(*exact)
    _close(got, wanted, dtype)
    do = _draw(*got.shape, seed=9, dtype=dtype)
    got.backward(do)
    wanted.backward(do.double())
    for leaf, truth in zip(leaves, exact, strict=True):
        assert leaf.grad is not None
        assert truth.grad is not None
        _close(leaf.grad, truth.grad, dtype, 12.0)


def _qkv(dtype: torch.dtype, keys: int = TOKENS) -> list[Tensor]:
    return [
        _draw(TOKENS, HEADS, Q, dtype=dtype),
        _draw(keys, GROUPS, Q, seed=1, dtype=dtype),
        _draw(keys, GROUPS, V, seed=2, dtype=dtype),
    ]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [2, 7, 40] if GPU else [7])
def test_window_attention_is_its_reference(window: int, dtype: torch.dtype) -> None:
    _compare(lambda q, k, v: ops.window_attention(q, k, v, CU, MOST, SCALE, window), _qkv(dtype), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compressed_attention_is_its_reference(dtype: torch.dtype) -> None:
    """Two entries more than there are, whose gradient is 0."""
    where = CU, CU_M, MOST, BLOCKING.compress_block, BLOCKING.compress_stride, SCALE
    _compare(
        lambda q, k, v: ops.compressed_attention(q, k, v, *where)[0], _qkv(dtype, sum(COUNTS) + 2), dtype
    )
    q, k, v = _qkv(dtype, sum(COUNTS))
    with dispatch.using("triton"):
        got_TH = ops.compressed_attention(q, k, v, *where)[1]
    with dispatch.using("reference"):
        wanted_TH = ops.compressed_attention(q.double(), k.double(), v.double(), *where)[1]
    _close(got_TH, wanted_TH, torch.float32, 10.0)


def _chosen(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = _qkv(dtype, sum(COUNTS))
    with dispatch.using("reference"):
        _, lse_TH = ops.compressed_attention(
            q.double(), k.double(), v.double(), CU, CU_M, MOST, *BLOCKING[:2], SCALE
        )
        return lse_TH.float(), ops.select_blocks(q, k, lse_TH, CU, CU_M, MOST, BLOCKING, SCALE), k


def _agree(got_TGK: Tensor, wanted_TGK: Tensor) -> None:
    """The same blocks but where two values differ by rounding: random ones nearly never do."""
    assert got_TGK.shape == wanted_TGK.shape
    assert (got_TGK != wanted_TGK).any(-1).float().mean() <= (0.002 if GPU else 0.0)


@pytest.mark.parametrize("dtype", [torch.float32])
def test_selection_is_its_reference(dtype: torch.dtype) -> None:
    lse_TH, wanted_TGK, k = _chosen(dtype)
    with dispatch.using("triton"):
        _agree(ops.select_blocks(_qkv(dtype)[0], k, lse_TH, CU, CU_M, MOST, BLOCKING, SCALE), wanted_TGK)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("item", [block_attention.ITEM, 5] if GPU else [5])
def test_block_attention_is_its_reference(
    item: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a block's readers are many items."""
    monkeypatch.setattr(block_attention, "ITEM", item)
    _, blocks_TGK, _ = _chosen()
    where = blocks_TGK, CU, MOST, BLOCKING.select_block, SCALE
    _compare(lambda q, k, v: ops.block_attention(q, k, v, *where), _qkv(dtype), dtype)


@pytest.mark.parametrize("dtype", EXACT)
@pytest.mark.parametrize("parts", [None, 1, 3] if GPU else [3])
def test_runs_over_pages_are_their_reference(parts: int | None, dtype: torch.dtype) -> None:
    """Blocks, a window from before the text, and every fourth position; rows are parts of wider ones."""
    size, new = 16 if GPU else 4, (5, 2, 3)
    cu = torch.tensor([0, *new], device=DEVICE).cumsum(0).int()
    contexts_S = torch.tensor(LENGTHS, device=DEVICE).int()
    width = -(-MOST // size)
    pages = _draw(3 * width + 1, size, 3, GROUPS, Q + V, dtype=dtype)
    order = 1 + torch.randperm(3 * width, generator=torch.Generator().manual_seed(1))
    table_SB = order.view(3, width).int().to(DEVICE)
    for s, length in enumerate(LENGTHS):
        pages[table_SB[s, length // size :].long(), length % size :] = math.nan
        pages[table_SB[s, length // size + 1 :].long()] = math.nan
    pages[0] = math.nan
    q = _draw(sum(new), HEADS, Q, dtype=dtype)
    at_T = torch.tensor(
        [n - k + i for n, k in zip(LENGTHS, new, strict=True) for i in range(k)], device=DEVICE
    )
    where = table_SB, contexts_S, cu, max(new), SCALE
    view = pages[:, :, 1]
    blocks_TGK = torch.stack((at_T // 8, at_T * 0, at_T // 8 - 1), -1).unsqueeze(1).expand(-1, GROUPS, -1)
    for starts_TGK, length, stride in (
        (blocks_TGK * 8, 8, 1),
        ((at_T - 20).view(-1, 1, 1).expand(-1, GROUPS, 1), 21, 1),
        (torch.full((len(at_T), GROUPS, 1), 7, device=DEVICE), COUNTS[0], 4),
    ):
        got = runs.paged_runs_attention(q, view, starts_TGK, length, stride, *where, parts=parts)
        with dispatch.using("reference"):
            wanted = ops.paged_runs_attention(q.double(), view.double(), starts_TGK, length, stride, *where)
        _close(got[0], wanted[0], dtype)
        _close(got[1], wanted[1], torch.float32, 10.0)


def test_selection_over_pages_is_that_of_the_pack() -> None:
    """Entries lie where their last tokens do; what no entry has is NaN."""
    length, stride = BLOCKING[:2]
    lse_TH, wanted_TGK, k_MGQ = _chosen()
    size = 16 if GPU else 4
    width = -(-MOST // size)
    order = 1 + torch.randperm(3 * width, generator=torch.Generator().manual_seed(1))
    table_SB = order.view(3, width).int().to(DEVICE)
    pages = torch.full((3 * width + 1, size, 2, GROUPS, Q + V), math.nan, device=DEVICE)
    for s, count in enumerate(COUNTS):
        places = torch.arange(count, device=DEVICE) * stride + length - 1
        rows = k_MGQ[int(CU_M[s]) : int(CU_M[s]) + count]
        pages[table_SB[s, places // size].long(), places % size, 1, :, :Q] = rows
    new = (5, 2, 3)
    cu = torch.tensor([0, *new], device=DEVICE).cumsum(0).int()
    rows = torch.tensor([int(CU[s + 1]) - n + i for s, n in enumerate(new) for i in range(n)], device=DEVICE)
    where = table_SB, torch.tensor(LENGTHS, device=DEVICE).int(), MOST + 1, cu, max(new), BLOCKING, SCALE
    with dispatch.using("triton"):
        got_TGK = ops.paged_select_blocks(_qkv(torch.float32)[0][rows], pages[:, :, 1], lse_TH[rows], *where)
    _agree(got_TGK, wanted_TGK[rows])
