"""Cases of native sparse attention: its three branches against our full attention, 8k to 64k, and decoding.

The shape is the paper's: 64 heads of 192 and 128 in 4 groups, blocks of 32 every 16, 16 blocks of 64
selected, a window of 512 (arXiv 2502.11089, section 4.1). Keys and values are given, the compressed ones
too: projections, the MLP that compresses and the gates are products like any other. The peer is what
`ops.attention` chooses for the same queries and one set of keys. Decoding is over pages, against the same
kernel over all positions.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from benchmarks.kernels.attention import _cache, _step
from benchmarks.kernels.harness import Call, Case
from shoal.ops.api import Blocking
from shoal.ops.triton import attention, block_attention, blocks, runs

DTYPE = torch.bfloat16
HEADS, GROUPS, Q, V, WINDOW = 64, 4, 192, 128, 512
BLOCKING = Blocking(32, 16, 64, 16, 1, 2)
SCALE = Q**-0.5


def _read(context: float) -> float:
    """Keys that the last token reads."""
    return context / BLOCKING.compress_stride + BLOCKING.top_k * BLOCKING.select_block + WINDOW


def pack(tokens: int, *, backward: bool) -> Case:
    def draw(rows: int, heads: int, dim: int) -> Tensor:
        return torch.randn(rows, heads, dim, device="cuda", dtype=DTYPE)

    entries = (tokens - BLOCKING.compress_block) // BLOCKING.compress_stride + 1
    q = draw(tokens, HEADS, Q)
    selected, window = ((draw(tokens, GROUPS, Q), draw(tokens, GROUPS, V)) for _ in range(2))
    compressed = draw(entries, GROUPS, Q), draw(entries, GROUPS, V)
    cu_S1, cu_M = (torch.tensor([0, rows], dtype=torch.int32, device="cuda") for rows in (tokens, entries))

    def compress(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return attention.compressed_attention(q, k, v, cu_S1, cu_M, tokens, *BLOCKING[:2], SCALE)

    def choose(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        return blocks.select_blocks(q, k, lse, cu_S1, cu_M, tokens, BLOCKING, SCALE)

    def read(q: Tensor, k: Tensor, v: Tensor, chosen: Tensor) -> Tensor:
        return block_attention.block_attention(q, k, v, chosen, cu_S1, tokens, BLOCKING.select_block, SCALE)

    def near(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.window_attention(q, k, v, cu_S1, tokens, SCALE, WINDOW)

    def ours(*leaves: Tensor) -> Tensor:
        q, kc, vc, ks, vs, kw, vw = leaves
        o_THV, lse_TH = compress(q, kc, vc)
        chosen = choose(q.detach(), kc.detach(), lse_TH)
        return o_THV + read(q, ks, vs, chosen) + near(q, kw, vw)

    def full(*leaves: Tensor) -> Tensor:
        return attention.attention(leaves[0], leaves[3], leaves[4], cu_S1, tokens, SCALE)

    leaves = q, *compressed, *selected, *window
    with torch.no_grad():
        lse_TH = compress(q, *compressed)[1]
        chosen = choose(q, compressed[0], lse_TH)
    parts = {
        "compression": (lambda *x: compress(*x)[0], (q, *compressed)),
        "selected": (partial(read, chosen=chosen), (q, *selected)),
        "window": (near, (q, *window)),
    }
    calls: dict[str, Sequence[Call]]
    if backward:
        for leaf in leaves:
            leaf.requires_grad_()
        do = draw(tokens, HEADS, V)
        calls = {"ours": [_step(ours, leaves, do)], "full": [_step(full, leaves, do)]}
        calls |= {name: [_step(run, inputs, do)] for name, (run, inputs) in parts.items()}
    else:
        calls = {"ours": [partial(ours, *leaves)], "full": [partial(full, *leaves)]}
        calls |= {name: [partial(run, *inputs)] for name, (run, inputs) in parts.items()}
        calls["choice"] = [partial(choose, q, compressed[0], lse_TH)]
    seen = tokens * (tokens / 2 / BLOCKING.compress_stride + BLOCKING.top_k * BLOCKING.select_block + WINDOW)
    flops = 2.0 * HEADS * (Q + V) * seen
    return Case(
        op="NSA, forward + backward" if backward else "NSA, forward",
        shape=f"{tokens // 1024}k, {HEADS} / {GROUPS} heads of {Q} and {V}",
        flops=3.5 * flops if backward else flops,
        bytes=2.0 * tokens * (HEADS + 3 * GROUPS) * (Q + V) * (3 if backward else 1),
        calls=calls,
        target="6.0 times" if backward and tokens == 65536 else "9.0 times" if tokens == 65536 else "",
        note=f"full by {attention.choose(q, *selected, cu_S1, tokens, SCALE)[0]}",
        graph=False,
    )


def decode(batch: int, context: int) -> Case:
    pages, table_SB, contexts_S, _, cu_S1, _ = _cache(batch, context, (4, GROUPS, Q + V), 64)
    q = torch.randn(batch, HEADS, Q, device="cuda", dtype=DTYPE)
    where = table_SB, contexts_S, cu_S1, 1
    entries = (context - BLOCKING.compress_block) // BLOCKING.compress_stride + 1

    def starts(first: int) -> Tensor:
        return torch.full((batch, GROUPS, 1), first, device="cuda")

    ends, back = starts(BLOCKING.compress_block - 1), starts(context - WINDOW)

    def ours() -> None:
        read = partial(runs.paged_runs_attention, q)
        _, lse_TH = read(pages[:, :, 3], ends, entries, BLOCKING.compress_stride, *where, SCALE)
        chosen = blocks.paged_select_blocks(
            q, pages[:, :, 3], lse_TH, table_SB, contexts_S, context, cu_S1, 1, BLOCKING, SCALE
        )
        read(pages[:, :, 1], chosen * BLOCKING.select_block, BLOCKING.select_block, 1, *where, SCALE)
        read(pages[:, :, 2], back, WINDOW, 1, *where, SCALE)

    def full() -> None:
        runs.paged_runs_attention(q, pages[:, :, 1], starts(0), context, 1, *where, SCALE)

    return Case(
        op="NSA decode",
        shape=f"{HEADS} / {GROUPS} heads, batch {batch}, context {context // 1024}k",
        flops=2.0 * batch * HEADS * (Q + V) * _read(context),
        bytes=2.0 * batch * GROUPS * ((Q + V) * _read(context) + Q * context / BLOCKING.compress_stride),
        calls={
            "ours": [ours],
            "full": [full],
        },
        target="11.6 times" if context == 65536 else "",
    )


def cases() -> Iterator[Case]:
    for backward in (False, True):
        for tokens in (8192, 16384, 32768, 65536):
            yield pack(tokens, backward=backward)
    for batch, context in ((1, 65536), (8, 65536), (32, 65536), (32, 8192)):
        yield decode(batch, context)
