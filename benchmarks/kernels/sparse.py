"""Cases of DeepSeek sparse attention: a decoding step at 128k positions, scored, selected and attended.

The shape is V3.2's: 128 heads over latents of 512 + 64, 64 index heads of 128, 2048 positions read, the
indexer's key behind the latent in one row of 704. The peer is our own dense MLA decode over the same cache.
The three parts stand beside it, each alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.harness import Case
from shoal.ops.triton import cache_attention, index, select, sparse

DTYPE = torch.bfloat16
HEADS, RANK, ROPE, INDEX_HEADS, INDEX_DIM, TOP_K, PAGE = 128, 512, 64, 64, 128, 2048, 64


def _slots(places_TK: Tensor, table_SB: Tensor) -> Tensor:
    page_TK = table_SB.gather(1, places_TK.clamp(min=0) // PAGE).long()
    return (page_TK * PAGE + places_TK % PAGE).masked_fill(places_TK < 0, -1)


def decode(batch: int, context: int) -> Case:
    width, scale = RANK + ROPE + INDEX_DIM, (128 + ROPE) ** -0.5
    count = context // PAGE
    pages = torch.randn(batch * count, PAGE, width, device="cuda", dtype=DTYPE)
    table_SB = torch.randperm(batch * count, device="cuda").to(torch.int32).view(batch, count)
    contexts_S = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    cu_S1 = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    where = table_SB, contexts_S, context, cu_S1, 1
    q_THL = torch.randn(batch, HEADS, RANK + ROPE, device="cuda", dtype=DTYPE)
    q_TJI = torch.randn(batch, INDEX_HEADS, INDEX_DIM, device="cuda", dtype=DTYPE)
    weights_TJ = torch.randn(batch, INDEX_HEADS, device="cuda")
    latents, keys = pages[..., : RANK + ROPE], pages[..., RANK + ROPE :]
    rows_XL = latents.flatten(0, 1)

    score = partial(sparse.paged_index_scores, q_TJI, weights_TJ, keys, *where)
    values, scales = index.narrow_index(keys.contiguous())

    def narrow() -> Tensor:
        q, by = index.narrow_index(q_TJI)
        return sparse.narrow_index_scores(q, weights_TJ * by, values, scales, *where)

    scores_TN = score()
    slots_TK = _slots(select.select_top(scores_TN, TOP_K), table_SB)
    attend = partial(sparse.sparse_latent_attention, q_THL, rows_XL, slots_TK, RANK, scale)

    def ours() -> Tensor:
        slots_TK = _slots(select.select_top(score(), TOP_K), table_SB)
        return sparse.sparse_latent_attention(q_THL, rows_XL, slots_TK, RANK, scale)

    scored = 2.0 * batch * context * INDEX_HEADS * INDEX_DIM
    return Case(
        op="DSA decode",
        shape=f"{HEADS} heads, batch {batch}, context {context // 1024}k",
        flops=scored + 2.0 * batch * TOP_K * HEADS * (2 * RANK + ROPE),
        bytes=2.0 * batch * (context * INDEX_DIM + TOP_K * (RANK + ROPE)),
        calls={
            "ours": [ours],
            "dense MLA": [partial(cache_attention.latent_attention, q_THL, latents, *where, RANK, scale)],
            "scores alone": [score],
            "scores in FP8": [narrow],
            "selection alone": [partial(select.select_top, scores_TN, TOP_K)],
            "attention alone": [attend],
        },
        target="3 times dense MLA",
    )


def cases() -> Iterator[Case]:
    for batch in (1, 8, 32):
        yield decode(batch, 131072)
    yield decode(32, 32768)
