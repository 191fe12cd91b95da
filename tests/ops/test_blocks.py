"""Laws of native sparse attention's ops: each is its formula, token by token, in a pack and over pages.

The formulas stand here once more, as loops over single numbers (arXiv 2502.11089, section 3; positions and
blocks count from 0). In float64 sums of some tens of terms are good to 1e-14; EXACT leaves a hundred times
that.
"""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from shoal.ops import api as ops
from shoal.ops.api import Blocking

EXACT = 1e-12
LENGTHS = (23, 3, 1, 40)
CU = torch.tensor([0, *LENGTHS]).cumsum(0).int()
TOKENS, HEADS, GROUPS, Q, V, SCALE = sum(LENGTHS), 4, 2, 6, 4, 0.6
BLOCKING = Blocking(compress_block=8, compress_stride=4, select_block=8, top_k=3, first=1, local=1)


def _draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def _entries(length: int) -> int:
    return max(0, (length - BLOCKING.compress_block) // BLOCKING.compress_stride + 1)


COUNTS = [_entries(length) for length in LENGTHS]
CU_M = torch.tensor([0, *COUNTS]).cumsum(0).int()
q_THQ, k_TGQ, v_TGV = (
    _draw(TOKENS, HEADS, Q),
    _draw(TOKENS, GROUPS, Q, seed=1),
    _draw(TOKENS, GROUPS, V, seed=2),
)
k_MGQ, v_MGV = _draw(sum(COUNTS) + 2, GROUPS, Q, seed=3), _draw(sum(COUNTS) + 2, GROUPS, V, seed=4)
k_MGQ[-2:], v_MGV[-2:] = math.nan, math.nan  # past the entries of all


def _literal(q_Q: Tensor, keys: list[Tensor], values: list[Tensor]) -> tuple[Tensor, list[float]]:
    """Attention of one query over a list, and its probabilities."""
    logits = [SCALE * sum(float(a) * float(b) for a, b in zip(q_Q, key, strict=True)) for key in keys]
    total = sum(map(math.exp, logits))
    shares = [math.exp(logit) / total for logit in logits]
    o_V = sum((share * value for share, value in zip(shares, values, strict=True)), torch.zeros(V).double())
    return o_V, shares


def _seen(t: int) -> list[int]:
    """The entries that are complete at t."""
    length, stride = BLOCKING.compress_block, BLOCKING.compress_stride
    return [j for j in range(_entries(LENGTHS[-1])) if j * stride + length - 1 <= t]


def _tokens() -> list[tuple[int, int, int]]:
    """Sequence, its first row, position."""
    return [(s, int(CU[s]), t) for s, length in enumerate(LENGTHS) for t in range(length)]


def test_compressed_attention_is_softmax_over_what_is_complete() -> None:
    o_THV, lse_TH = ops.compressed_attention(q_THQ, k_MGQ, v_MGV, CU, CU_M, 40, 8, 4, SCALE)
    for s, row, t in _tokens():
        for h in range(HEADS):
            rows = [int(CU_M[s]) + j for j in _seen(t)]
            keys, values = ([x[m, h // 2] for m in rows] for x in (k_MGQ, v_MGV))
            wanted_V, _ = _literal(q_THQ[row + t, h], keys, values)
            assert (o_THV[row + t, h] - wanted_V).abs().max() <= EXACT
            logits = [SCALE * float(q_THQ[row + t, h] @ key) for key in keys]
            wanted = math.log(sum(map(math.exp, logits))) if logits else -math.inf
            assert float(lse_TH[row + t, h]) == pytest.approx(wanted, abs=EXACT)


def _literal_blocks(s: int, row: int, t: int, group: int) -> list[int]:
    size, stride, length = BLOCKING.select_block, BLOCKING.compress_stride, BLOCKING.compress_block
    own, seen = t // size, _seen(t)
    value = dict.fromkeys(range(own + 1), 0.0)
    for h in (2 * group, 2 * group + 1):
        keys = [k_MGQ[int(CU_M[s]) + j, group] for j in seen]
        _, shares = _literal(q_THQ[row + t, h], keys, [torch.zeros(V)] * len(keys))
        for j, share in zip(seen, shares, strict=True):
            for part in range(length // stride):  # each stride of the entry lies in one block
                if (block := (j * stride + part * stride) // size) <= own:
                    value[block] += share
    forced = {*range(BLOCKING.first), *range(own - BLOCKING.local + 1, own + 1)} & set(value)
    best = sorted(value, key=lambda block: (block not in forced, -value[block], block))
    return sorted(best[: BLOCKING.top_k])


def test_blocks_are_chosen_by_overlap_forced_ones_first() -> None:
    _, lse_TH = ops.compressed_attention(q_THQ, k_MGQ, v_MGV, CU, CU_M, 40, 8, 4, SCALE)
    blocks_TGK = ops.select_blocks(q_THQ, k_MGQ, lse_TH, CU, CU_M, 40, BLOCKING, SCALE)
    assert blocks_TGK.shape == (TOKENS, GROUPS, 3)
    for s, row, t in _tokens():
        for group in range(GROUPS):
            got = blocks_TGK[row + t, group].tolist()
            wanted = _literal_blocks(s, row, t, group)
            assert got == wanted + [-1] * (3 - len(wanted))
            assert {0, t // 8} <= set(got)


def _chosen() -> Tensor:
    _, lse_TH = ops.compressed_attention(q_THQ, k_MGQ, v_MGV, CU, CU_M, 40, 8, 4, SCALE)
    return ops.select_blocks(q_THQ, k_MGQ, lse_TH, CU, CU_M, 40, BLOCKING, SCALE)


def test_block_attention_reads_the_named_blocks() -> None:
    blocks_TGK = _chosen()
    o_THV = ops.block_attention(q_THQ, k_TGQ, v_TGV, blocks_TGK, CU, 40, 8, SCALE)
    for _, row, t in _tokens():
        for h in range(HEADS):
            named = [n for n in blocks_TGK[row + t, h // 2].tolist() if n >= 0]
            read = [row + n for block in named for n in range(block * 8, block * 8 + 8) if n <= t]
            wanted_V, _ = _literal(
                q_THQ[row + t, h], [k_TGQ[n, h // 2] for n in read], [v_TGV[n, h // 2] for n in read]
            )
            assert (o_THV[row + t, h] - wanted_V).abs().max() <= EXACT


@pytest.mark.parametrize("window", [1, 5, 8, 39])
def test_a_window_is_the_last_positions(window: int) -> None:
    o_THV = ops.window_attention(q_THQ, k_TGQ, v_TGV, CU, 40, SCALE, window)
    for _, row, t in _tokens():
        read = range(row + max(0, t + 1 - window), row + t + 1)
        for h in range(HEADS):
            wanted_V, _ = _literal(
                q_THQ[row + t, h], [k_TGQ[n, h // 2] for n in read], [v_TGV[n, h // 2] for n in read]
            )
            assert (o_THV[row + t, h] - wanted_V).abs().max() <= EXACT


def test_a_window_as_long_as_the_text_is_none() -> None:
    whole_THV = ops.attention(q_THQ, k_TGQ, v_TGV, CU, 40, SCALE)
    o_THV = ops.window_attention(q_THQ, k_TGQ, v_TGV, CU, 40, SCALE, 40)
    assert (o_THV - whole_THV).abs().max() <= EXACT
    with pytest.raises(ValueError, match="window is 0"):
        ops.window_attention(q_THQ, k_TGQ, v_TGV, CU, 40, SCALE, 0)


def test_gradients_are_those_of_the_formulas() -> None:
    cu, cu_m, blocks = (
        torch.tensor([0, 9, 11]).int(),
        torch.tensor([0, 3, 3]).int(),
        torch.tensor([[[0, 2], [1, -1]]]),
    )
    q, k, v = (_draw(11, n, 4, seed=s).requires_grad_() for n, s in ((4, 0), (2, 1), (2, 2)))
    blocks_TGK = blocks.expand(11, 2, 2)
    assert torch.autograd.gradcheck(
        lambda q, k, v: ops.block_attention(q, k, v, blocks_TGK, cu, 9, 2, 0.7), (q, k, v), fast_mode=True
    )
    assert torch.autograd.gradcheck(
        lambda q, k, v: ops.window_attention(q, k, v, cu, 9, 0.7, 3), (q, k, v), fast_mode=True
    )
    entries = [_draw(4, 2, 4, seed=s).requires_grad_() for s in (3, 4)]
    assert torch.autograd.gradcheck(
        lambda q, k, v: ops.compressed_attention(q, k, v, cu, cu_m, 9, 4, 2, 0.7)[0],
        (q, *entries),
        fast_mode=True,
    )


SIZE = 4
NEW = (5, 3, 1, 1)  # rows of each sequence that are new


def _pages(rows: list[tuple[int, int, Tensor]]) -> tuple[Tensor, Tensor]:
    """A cache with these (sequence, position, (G, X)) in it, a part of wider rows; NaN elsewhere."""
    order = (1 + torch.randperm(40, generator=torch.Generator().manual_seed(5))).tolist()
    table_SB = torch.zeros(len(LENGTHS), 10, dtype=torch.int32)
    for s, length in enumerate(LENGTHS):
        for b in range(-(-length // SIZE)):
            table_SB[s, b] = order.pop()
    pages = torch.full((41, SIZE, 3, GROUPS, Q + V), math.nan, dtype=torch.float64)
    for s, position, row in rows:
        pages[table_SB[s, position // SIZE], position % SIZE, 1] = row
    return pages[:, :, 1], table_SB


def test_the_cache_says_what_the_pack_says() -> None:
    """Compressed entries, chosen blocks and the window, over scrambled pages, NaN where nobody wrote."""
    contexts_S, cu_new = torch.tensor(LENGTHS, dtype=torch.int32), torch.tensor([0, *NEW]).cumsum(0).int()
    new_T = torch.tensor([int(CU[s + 1]) - n + i for s, n in enumerate(NEW) for i in range(n)])
    at_T = torch.tensor([LENGTHS[s] - n + i for s, n in enumerate(NEW) for i in range(n)]).view(-1, 1, 1)
    where, q = (contexts_S, cu_new, max(NEW), SCALE), q_THQ[new_T]
    done = [
        (s, 4 * j + 7, torch.cat((k_MGQ[int(CU_M[s]) + j], v_MGV[int(CU_M[s]) + j]), -1))
        for s, count in enumerate(COUNTS)
        for j in range(count)
    ]
    pages, table_SB = _pages(done)
    starts_TGK = torch.full((len(new_T), GROUPS, 1), 7)
    o_THV, lse_TH = ops.paged_runs_attention(q, pages, starts_TGK, 9, 4, table_SB, *where)
    wanted_THV, wanted_TH = ops.compressed_attention(q_THQ, k_MGQ, v_MGV, CU, CU_M, 40, 8, 4, SCALE)
    assert (o_THV - wanted_THV[new_T]).abs().max() <= EXACT
    assert torch.equal(lse_TH == -math.inf, wanted_TH[new_T] == -math.inf)
    assert (lse_TH - wanted_TH[new_T]).nan_to_num().abs().max() <= EXACT
    blocks_TGK = ops.paged_select_blocks(
        q, pages, lse_TH, table_SB, contexts_S, 43, cu_new, max(NEW), BLOCKING, SCALE
    )
    assert torch.equal(blocks_TGK, _chosen()[new_T])

    rows = [(s, t, torch.cat((k_TGQ[row + t], v_TGV[row + t]), -1)) for s, row, t in _tokens()]
    pages, table_SB = _pages(rows)
    o_THV, _ = ops.paged_runs_attention(q, pages, blocks_TGK * 8, 8, 1, table_SB, *where)
    wanted_THV = ops.block_attention(q_THQ, k_TGQ, v_TGV, _chosen(), CU, 40, 8, SCALE)
    assert (o_THV - wanted_THV[new_T]).abs().max() <= EXACT
    o_THV, _ = ops.paged_runs_attention(q, pages, (at_T - 4).expand(-1, GROUPS, 1), 5, 1, table_SB, *where)
    wanted_THV = ops.window_attention(q_THQ, k_TGQ, v_TGV, CU, 40, SCALE, 5)
    assert (o_THV - wanted_THV[new_T]).abs().max() <= EXACT


def test_nothing_is_no_trouble() -> None:
    empty, none, cu = torch.zeros(0, 4, 6), torch.zeros(0, 2, 6), torch.zeros(1, dtype=torch.int32)
    o_THV, lse_TH = ops.compressed_attention(empty, none, none, cu, cu, 0, 8, 4, 1.0)
    assert o_THV.shape == (0, 4, 6)
    blocks_TGK = ops.select_blocks(empty, none, lse_TH, cu, cu, 0, BLOCKING, 1.0)
    assert ops.block_attention(empty, none, none, blocks_TGK, cu, 0, 8, 1.0).shape == (0, 4, 6)
    assert ops.window_attention(empty, none, none, cu, 9, 1.0, 2).shape == (0, 4, 6)
    pages, table_SB, contexts_S = (
        torch.full((1, 4, 2, 12), math.nan),
        torch.zeros(1, 1).int(),
        torch.zeros(1).int(),
    )
    starts_TGK, cu = torch.zeros(1, 2, 1).long(), torch.tensor([0, 1]).int()
    where = table_SB, contexts_S, cu, 1, 1.0
    o_THV, lse_TH = ops.paged_runs_attention(torch.ones(1, 4, 6), pages, starts_TGK, 4, 1, *where)
    assert not o_THV.any()  # an empty place of a CUDA graph
    assert torch.equal(lse_TH, torch.full((1, 4), -math.inf))
