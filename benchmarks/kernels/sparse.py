"""Cases of DeepSeek sparse attention: a decoding step at 128k positions, scored, selected and attended.

The shape is V3.2's: 128 heads over latents of 512 + 64, 64 index heads of 128, 2048 positions read, the
indexer's key behind the latent in one row of 704. The peer is our own dense MLA decode over the same cache.
The three parts stand beside it, each alone; `sparse-tiles` has each by other tiles.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.harness import Call, Case
from shoal.ops.triton import cache_attention, index, index_scores, select, sparse

DTYPE = torch.bfloat16
SCALE = (128 + 64) ** -0.5
HEADS, RANK, ROPE, INDEX_HEADS, INDEX_DIM, TOP_K, PAGE = 128, 512, 64, 64, 128, 2048, 64
PLANS = ((128, 1, 4, 2), (128, 4, 4, 3), (128, 8, 4, 5), (64, 8, 4, 3), (64, 16, 4, 5))
TILES = ((64, 64, 8, 2), (64, 64, 8, 3), (64, 32, 8, 5), (16, 64, 8, 4), (16, 32, 4, 5))


class _Step:
    """What a decoding step finds: a cache, queries of both kinds, and what each part makes of them."""

    def __init__(self, batch: int, context: int) -> None:
        self.batch, self.context = batch, context
        width, count = RANK + ROPE + INDEX_DIM, context // PAGE
        pages = torch.randn(batch * count, PAGE, width, device="cuda", dtype=DTYPE)
        table_SB = torch.randperm(batch * count, device="cuda").to(torch.int32).view(batch, count)
        contexts_S = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        cu_S1 = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        self.where = table_SB, contexts_S, context, cu_S1, 1
        self.latents, self.keys = pages[..., : RANK + ROPE], pages[..., RANK + ROPE :]
        self.narrow_keys = index.narrow_index(self.keys.contiguous())
        self.q_THL = torch.randn(batch, HEADS, RANK + ROPE, device="cuda", dtype=DTYPE)
        self.q_TJI = torch.randn(batch, INDEX_HEADS, INDEX_DIM, device="cuda", dtype=DTYPE)
        self.weights_TJ = torch.randn(batch, INDEX_HEADS, device="cuda")

    def score(self, plan: index_scores.Plan | None = None) -> Tensor:
        inputs = self.q_TJI, self.weights_TJ, self.keys
        return index_scores.paged_index_scores(*inputs, *self.where, plan=plan)

    def narrow(self, plan: index_scores.Plan | None = None) -> Tensor:
        q, by = index.narrow_index(self.q_TJI)
        inputs = q, self.weights_TJ * by, *self.narrow_keys
        return index_scores.narrow_index_scores(*inputs, *self.where, plan=plan)

    def choose(self, scores_TN: Tensor, chunk: int | None = None) -> Tensor:
        places_TK = select.select_top(scores_TN, TOP_K, chunk=chunk)
        return select.name_rows(places_TK, self.where[3], self.where[0], PAGE)

    def attend(self, slots_TK: Tensor, tiles: sparse.Tiles | None = None) -> Tensor:
        inputs = self.q_THL, self.latents.flatten(0, 1), slots_TK, RANK, SCALE
        return sparse.sparse_latent_attention(*inputs, tiles=tiles)

    def whole(self, *, narrow: bool) -> Tensor:
        return self.attend(self.choose(self.narrow() if narrow else self.score()))

    def dense(self) -> Tensor:
        return cache_attention.latent_attention(self.q_THL, self.latents, *self.where, RANK, SCALE)

    def case(self, op: str, flops: float, moved: float, calls: Mapping[str, Call], target: str = "") -> Case:
        shape = f"{HEADS} heads, batch {self.batch}, context {self.context // 1024}k"
        return Case(op, shape, flops, moved, {name: [call] for name, call in calls.items()}, target)


def decode(batch: int, context: int) -> Case:
    step = _Step(batch, context)
    scores_TN = step.score()
    slots_TK = step.choose(scores_TN)
    return step.case(
        "DSA decode",
        2.0 * batch * context * INDEX_HEADS * INDEX_DIM + 2.0 * batch * TOP_K * HEADS * (2 * RANK + ROPE),
        2.0 * batch * (context * INDEX_DIM + TOP_K * (RANK + ROPE)),
        {
            "ours": partial(step.whole, narrow=False),
            "dense MLA": step.dense,
            "indexer in FP8": partial(step.whole, narrow=True),
            "scores alone": step.score,
            "scores in FP8": step.narrow,
            "selection alone": partial(step.choose, scores_TN),
            "attention alone": partial(step.attend, slots_TK),
        },
        "3 times dense MLA",
    )


def tiles(batch: int, context: int) -> Iterator[Case]:
    """The parts of a step by other tiles; the first is what is chosen."""
    step = _Step(batch, context)
    scores_TN = step.score()
    slots_TK = step.choose(scores_TN)
    plans = [index_scores.Plan(*words) for words in PLANS]
    yield step.case(
        "index scores", 2.0 * batch * context * INDEX_HEADS * INDEX_DIM, 2.0 * batch * context * INDEX_DIM,
        {"ours": step.score} | {str(plan): partial(step.score, plan) for plan in plans},
    )  # fmt: skip
    yield step.case(
        "index scores in FP8", 2.0 * batch * context * INDEX_HEADS * INDEX_DIM,
        batch * context * (INDEX_DIM + 4.0),
        {"ours": step.narrow} | {str(plan): partial(step.narrow, plan) for plan in plans},
    )  # fmt: skip
    yield step.case(
        "selection", 0.0, 4.0 * batch * context,
        {"ours": partial(step.choose, scores_TN)}
        | {f"{chunk} columns": partial(step.choose, scores_TN, chunk) for chunk in (2048, 4096, 16384)},
    )  # fmt: skip
    shared = [max(1, programs // batch) for programs in (64, 128, 256)]
    options = [
        sparse.Tiles(*words, parts=max(1, parts * words[0] // HEADS))
        for words in TILES for parts in shared
        if parts * words[0] // HEADS <= TOP_K // words[1]
    ]  # fmt: skip
    yield step.case(
        "attention over chosen rows", 2.0 * batch * TOP_K * HEADS * (2 * RANK + ROPE),
        2.0 * batch * TOP_K * (RANK + ROPE),
        {"ours": partial(step.attend, slots_TK)}
        | {str(option): partial(step.attend, slots_TK, option) for option in dict.fromkeys(options)},
    )  # fmt: skip


def tile_cases() -> Iterator[Case]:
    for batch in (1, 8, 32):
        yield from tiles(batch, 131072)


def cases() -> Iterator[Case]:
    for batch in (1, 8, 32):
        yield decode(batch, 131072)
    yield decode(32, 32768)
