"""Cases of DeepSeek sparse attention: a decoding step at 128k positions, scored, selected and attended.

The shape is V3.2's: 128 heads over latents of 512 + 64, 64 index heads of 128, 2048 positions read, the
indexer's key behind the latent in one row of 704. The peer is dense MLA decode as the engine runs it, over
rows of 576. Each piece has its own row, held against its own bytes; `sparse-tiles` has each by other tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.harness import Call, Case
from shoal.ops.triton import cache_attention, index, index_scores, select, sparse

DTYPE = torch.bfloat16
SCALE = (128 + 64) ** -0.5
HEADS, RANK, ROPE, INDEX_HEADS, INDEX_DIM, TOP_K, PAGE = 128, 512, 64, 64, 128, 2048, 64
PLANS = ((64, 16, 4, 3), (128, 4, 4, 3), (128, 8, 4, 4), (128, 16, 4, 3), (256, 4, 8, 3), (128, 8, 8, 3))
TILES = ((64, 64, 8, 2), (64, 64, 8, 3), (64, 32, 8, 5), (16, 64, 8, 4), (16, 32, 4, 5))
CALLS = 4  # in a graph at least, whose own start takes some 8 us
CACHED = 50e6  # bytes that a GPU keeps: fewer are read from other places by each call


class _Step:
    """What decoding steps find: a cache, queries of both kinds, what each part makes of them. Those of few
    sequences each find their own."""

    def __init__(self, batch: int, context: int) -> None:
        self.batch, self.context = batch, context
        self.sets = max(1, round(3 * CACHED / (batch * context * INDEX_DIM)))
        width, count = RANK + ROPE + INDEX_DIM, context // PAGE
        held = self.sets * batch * count
        pages = torch.empty(held, PAGE, width, device="cuda", dtype=DTYPE).normal_()
        tables = torch.randperm(held, device="cuda").to(torch.int32).view(self.sets, batch, count)
        contexts_S = torch.full((batch,), context, dtype=torch.int32, device="cuda")
        cu_S1 = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        self.where = [(table_SB, contexts_S, context, cu_S1, 1) for table_SB in tables]
        self.latents, self.keys = pages[..., : RANK + ROPE], pages[..., RANK + ROPE :]
        self.dense_latents = self.latents[: batch * count].contiguous()
        dense_SB = torch.randperm(batch * count, device="cuda").to(torch.int32).view(batch, count)
        self.dense_where = (dense_SB, *self.where[0][1:])
        self.narrow_keys = index.narrow_index(self.keys.contiguous())
        self.q_THL = torch.randn(batch, HEADS, RANK + ROPE, device="cuda", dtype=DTYPE)
        self.q_TJI = torch.randn(batch, INDEX_HEADS, INDEX_DIM, device="cuda", dtype=DTYPE)
        self.weights_TJ = torch.randn(batch, INDEX_HEADS, device="cuda")
        self.scores_TN = self.score(0)
        # Rows that no other call reads.
        rows = torch.randperm(held * PAGE, device="cuda")
        self.slots = [
            rows[at : at + batch * TOP_K].view(batch, TOP_K).sort().values
            for at in range(0, min(24, held * PAGE // (batch * TOP_K)) * batch * TOP_K, batch * TOP_K)
        ]

    def score(self, at: int, plan: index_scores.Plan | None = None) -> Tensor:
        inputs = self.q_TJI, self.weights_TJ, self.keys
        return index_scores.paged_index_scores(*inputs, *self.where[at], plan=plan)

    def narrow(self, at: int, plan: index_scores.Plan | None = None) -> Tensor:
        inputs = *index.narrow_index(self.q_TJI), self.weights_TJ, *self.narrow_keys
        return index_scores.narrow_index_scores(*inputs, *self.where[at], plan=plan)

    def choose(self, at: int, scores_TN: Tensor | None = None, chunk: int | None = None) -> Tensor:
        scores_TN = self.scores_TN if scores_TN is None else scores_TN
        places_TK = select.select_top(scores_TN, TOP_K, chunk=chunk)
        return select.name_rows(places_TK, self.where[at][3], self.where[at][0], PAGE)

    def attend(self, slots_TK: Tensor, tiles: sparse.Tiles | None = None) -> Tensor:
        inputs = self.q_THL, self.latents.flatten(0, 1), slots_TK, RANK, SCALE
        return sparse.sparse_latent_attention(*inputs, tiles=tiles)

    def as_pages(self, slots_TK: Tensor) -> Tensor:
        return sparse.attend_as_pages(self.q_THL, self.latents.flatten(0, 1), slots_TK, RANK, SCALE)

    def whole(self, at: int, *, narrow: bool) -> Tensor:
        return self.attend(self.choose(at, self.narrow(at) if narrow else self.score(at)))

    def dense(self) -> Tensor:
        return cache_attention.latent_attention(
            self.q_THL, self.dense_latents, *self.dense_where, RANK, SCALE
        )

    def each(self, call: Callable[[int], object]) -> list[Call]:
        """A call a set, and CALLS at least."""
        return [partial(call, at % self.sets) for at in range(max(CALLS, self.sets))]

    def case(
        self, op: str, flops: float, moved: float, calls: Mapping[str, Sequence[Call]], *, fp8: bool = False,
        target: str = "",
    ) -> Case:  # fmt: skip
        shape = f"{HEADS} heads, batch {self.batch}, context {self.context // 1024}k"
        dtype = torch.float8_e4m3fn if fp8 else torch.bfloat16
        return Case(op, shape, flops, moved, dict(calls), target, dtype=dtype)

    def pieces(self) -> dict[str, tuple[float, float, list[Call]]]:
        """FLOPs, bytes and calls of each piece by itself."""
        positions, chosen = self.batch * self.context, self.batch * TOP_K
        scores = 2.0 * positions * INDEX_HEADS * INDEX_DIM
        return {
            "index scores": (scores, 2.0 * positions * INDEX_DIM, self.each(self.score)),
            "index scores in FP8": (scores, positions * (INDEX_DIM + 4.0), self.each(self.narrow)),
            "selection": (0.0, 4.0 * positions, self.each(self.choose)),
            "attention over chosen rows": (
                2.0 * chosen * HEADS * (2 * RANK + ROPE),
                2.0 * chosen * (RANK + ROPE),
                [partial(self.attend, slots_TK) for slots_TK in self.slots],
            ),
        }


def decode(batch: int, context: int) -> Iterator[Case]:
    step = _Step(batch, context)
    pieces = step.pieces()
    dense: list[Call] = [step.dense] * CALLS
    attended = pieces["attention over chosen rows"]
    for scores in ("index scores", "index scores in FP8"):
        fp8 = scores != "index scores"
        flops, moved = (a + b for a, b in zip(pieces[scores][:2], attended[:2], strict=True))
        calls = {"ours": step.each(partial(step.whole, narrow=fp8)), "dense MLA": dense}
        name = "DSA decode, FP8 keys" if fp8 else "DSA decode"
        yield step.case(name, flops, moved, calls, fp8=fp8, target="3 times dense MLA")
    for name, (flops, moved, calls) in pieces.items():
        yield step.case(name, flops, moved, {"ours": calls}, fp8=name.endswith("FP8"))


def tiles(batch: int, context: int) -> Iterator[Case]:
    """The parts of a step by other tiles; the first is what is chosen."""
    step = _Step(batch, context)
    for name, (flops, moved, calls) in step.pieces().items():
        others: dict[str, list[Call]] = {}
        if name.startswith("index"):
            call = step.narrow if name.endswith("FP8") else step.score
            plans = [index_scores.Plan(*words) for words in PLANS]
            others = {str(plan): step.each(partial(call, plan=plan)) for plan in plans}
        elif name == "selection":
            others = {f"{n} columns": step.each(partial(step.choose, chunk=n)) for n in (2048, 8192)}
        else:
            shared = [max(1, programs // batch) for programs in (64, 128, 256)]
            options = [
                sparse.Tiles(*words, parts=max(1, parts * words[0] // HEADS))
                for words in TILES for parts in shared
                if parts * words[0] // HEADS <= TOP_K // words[1]
            ]  # fmt: skip
            others = {
                str(option): [partial(step.attend, slots_TK, option) for slots_TK in step.slots]
                for option in dict.fromkeys(options)
            }
            others["in turns"] = [partial(step.as_pages, slots_TK) for slots_TK in step.slots]
        yield step.case(name, flops, moved, {"ours": calls, **others}, fp8=name.endswith("FP8"))


def tile_cases() -> Iterator[Case]:
    for batch in (1, 8, 32):
        yield from tiles(batch, 131072)


def cases() -> Iterator[Case]:
    for batch in (1, 8, 32):
        yield from decode(batch, 131072)
    yield from decode(32, 32768)
