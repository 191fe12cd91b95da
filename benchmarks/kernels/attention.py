"""Cases of attention: MLA decode over the paged cache, GQA decode, and training or prefill over packs.

Decode: contexts of 4k and 32k, batch 1, 32 and 128, pages of 64, in a CUDA graph; the peer is torch's two
batched products over a cache that lies in the open (no pages, no ragged lengths). `narrow-cache` has decoding
over a cache in FP8, whose peer is the wide one. Packs: 4k to 32k, one
sequence or ragged, forward in a graph and forward with backward; the peer is SDPA by cuDNN, sequence by
sequence, and ours is what the dispatcher chooses, with our own Triton kernels beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.harness import Call, Case
from shoal.ops.triton import attention, cache_attention
from shoal.ops.triton.cache_plan import TURNS, Plan

DTYPE = torch.bfloat16
RANK, ROPE, PAGE = 512, 64, 64
TARGETS = {
    (16, 1, 4096): "16 us",
    (16, 1, 32768): "30 us",
    (16, 32, 32768): "90%",
    (16, 128, 4096): "90%",
    (16, 128, 32768): "90%",
    (128, 32, 4096): "450 TFLOP/s",
    (128, 32, 32768): "450 TFLOP/s",
    (128, 128, 4096): "450 TFLOP/s",
    (128, 128, 32768): "450 TFLOP/s",
}
DECODE = tuple(
    (heads, batch, context) for heads in (16, 128) for batch in (1, 32, 128) for context in (4096, 32768)
)
WIDE_PLANS = {
    16: (Plan(16, 64, 8, 5), Plan(16, 32, 4, 5, resident=2), Plan(16, 64, 8, 4, resident=2)),
    128: (Plan(64, 64, 8, 2), TURNS),
}
NARROW_PLANS = {
    16: (Plan(16, 64, 8, 5), Plan(16, 32, 4, 4, resident=2), Plan(16, 32, 4, 5)),
    128: (Plan(64, 32, 8, 2), Plan(64, 64, 8, 3)),
}
NARROW_PAGED_PLANS = Plan(16, 64, 4, 4, resident=2), Plan(16, 128, 4, 2), Plan(16, 128, 8, 3)
PACKS = {
    "4k": [4096],
    "16k": [16384],
    "32k": [32768],
    "4 of 4k": [4096] * 4,
    "ragged 20k": [4096, 3000, 1500, 700, 2500, 4096, 492, 4097],
}


def _cache(
    batch: int, context: int, row: tuple[int, ...], page: int
) -> tuple[Tensor, Tensor, Tensor, int, Tensor, int]:
    count = -(-context // page)
    pages = torch.randn(batch * count, page, *row, device="cuda", dtype=DTYPE)
    table_SB = torch.randperm(batch * count, device="cuda").to(torch.int32).view(batch, count)
    contexts_S = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    return pages, table_SB, contexts_S, context, torch.arange(batch + 1, dtype=torch.int32, device="cuda"), 1


def _products(q_SHL: Tensor, rows_SNL: Tensor, scale: float) -> Tensor:
    """Absorbed attention as two batched products over rows in the open."""
    scores_SHN = torch.bmm(q_SHL, rows_SNL.mT).mul_(scale)
    return torch.bmm(scores_SHN.softmax(-1), rows_SNL[..., :RANK])


def latent(heads: int, batch: int, context: int) -> Case:
    scale = (RANK + ROPE) ** -0.5
    cache_bytes = 2.0 * batch * context * (RANK + ROPE)
    sets = max(1, min(8, int(4e8 / cache_bytes)))  # several times the L2
    calls: dict[str, list[Call]] = {"ours": [], "ours, batch-invariant": [], "torch bmm": []}
    for _ in range(sets):
        where = _cache(batch, context, (RANK + ROPE,), PAGE)
        q = torch.randn(batch, heads, RANK + ROPE, device="cuda", dtype=DTYPE)
        calls["ours"].append(partial(cache_attention.latent_attention, q, *where, RANK, scale))
        calls["ours, batch-invariant"].append(
            partial(cache_attention.latent_attention, q, *where, RANK, scale, invariant=True)
        )
        calls["torch bmm"].append(partial(_products, q, where[0].view(batch, context, -1), scale))
    return Case(
        op="MLA decode",
        shape=f"{heads} heads, batch {batch}, context {context // 1024}k",
        flops=2.0 * batch * context * heads * (2 * RANK + ROPE),
        bytes=cache_bytes + 2.0 * batch * heads * (2 * RANK + ROPE),
        calls=dict(calls),
        target=TARGETS.get((heads, batch, context), ""),
    )


def narrow_rows(rows: Tensor, numbers: int, pages: tuple[int, ...]) -> Tensor:
    """Wide rows as a cache in FP8 keeps them, scales of 1: numbers, scales, what stands behind, in bytes."""
    scales = torch.ones(*rows.shape[:-1], numbers // 128, device="cuda")
    parts = rows[..., :numbers].to(torch.float8_e4m3fn), scales, rows[..., numbers:].contiguous()
    return torch.cat([part.view(torch.uint8) for part in parts], dim=-1).view(*pages, -1)


def narrow_latent(heads: int, batch: int, context: int) -> Case:
    """MLA decode over a cache in FP8, against the same over the wide cache."""
    scale = (RANK + ROPE) ** -0.5
    wide, *where = _cache(batch, context, (RANK + ROPE,), PAGE)
    narrow = narrow_rows(wide, RANK, wide.shape[:2])
    q = torch.randn(batch, heads, RANK + ROPE, device="cuda", dtype=DTYPE)
    return Case(
        op="MLA decode, FP8 cache",
        shape=f"{heads} heads, batch {batch}, context {context // 1024}k",
        flops=2.0 * batch * context * heads * (2 * RANK + ROPE),
        bytes=float(batch * context * narrow.shape[-1]) + 2.0 * batch * heads * (2 * RANK + ROPE),
        calls={
            name: [partial(cache_attention.latent_attention, q, pages, *where, RANK, scale)]
            for name, pages in (("ours", narrow), ("bf16 cache", wide))
        },
    )


def narrow_paged(heads: int, groups: int, batch: int, context: int) -> Case:
    wide, *where = _cache(batch, context, (2, groups, 128), 16)
    narrow = narrow_rows(wide, 128, wide.shape[:-1])
    q = torch.randn(batch, heads, 128, device="cuda", dtype=DTYPE)
    attend = partial(cache_attention.paged_attention, q)
    calls: dict[str, list[Call]] = {"ours": [partial(attend, narrow, *where, 128**-0.5)]}
    calls["bf16 cache"] = [partial(attend, wide, *where, 128**-0.5)]
    for plan in NARROW_PAGED_PLANS:
        calls[str(plan)[4:]] = [partial(attend, narrow, *where, 128**-0.5, plan=plan)]
    return Case(
        op="GQA decode, FP8 cache",
        shape=f"{heads} / {groups} heads, batch {batch}, context {context // 1024}k, pages of 16",
        flops=4.0 * batch * context * heads * 128,
        bytes=2.0 * batch * context * groups * 132,
        calls=dict(calls),
    )


def paged(heads: int, groups: int, batch: int, context: int) -> Case:
    where = _cache(batch, context, (2, groups, 128), 16)
    q = torch.randn(batch, heads, 128, device="cuda", dtype=DTYPE)
    return Case(
        op="GQA decode",
        shape=f"{heads} / {groups} heads, batch {batch}, context {context // 1024}k, pages of 16",
        flops=4.0 * batch * context * heads * 128,
        bytes=4.0 * batch * context * groups * 128,
        calls={
            "ours": [partial(cache_attention.paged_attention, q, *where, 128**-0.5)]
            * (10 if batch == 1 else 2)
        },
    )


def _by_sequence(lengths: list[int], q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """SDPA by cuDNN, one call a sequence."""
    outputs = []
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        for parts in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
            dq, dk, dv = (part.transpose(0, 1).unsqueeze(0) for part in parts)
            outputs.append(
                F.scaled_dot_product_attention(dq, dk, dv, is_causal=True, scale=scale)[0].transpose(0, 1)
            )
    return torch.cat(outputs)


def _step(side: Callable[..., Tensor], leaves: tuple[Tensor, ...], do: Tensor) -> Call:
    def step() -> None:
        for leaf in leaves:
            leaf.grad = None
        side(*leaves).backward(do)

    return step


def pack(name: str, lengths: list[int], heads: int, *, backward: bool) -> Case:
    tokens, scale = sum(lengths), 192**-0.5
    q, k = (torch.randn(tokens, heads, 192, device="cuda", dtype=DTYPE) for _ in range(2))
    v = torch.randn(tokens, heads, 128, device="cuda", dtype=DTYPE)
    cu_S1 = torch.tensor([0, *lengths]).cumsum(0).to("cuda", torch.int32)
    where = (cu_S1, max(lengths), scale)

    def ours(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.attention(q, k, v, *where)

    def triton(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attention.attention(q, k, v, *where, plan=attention.HOPPER)

    def peer(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return _by_sequence(lengths, q, k, v, scale)

    sides = {"ours": ours, "our Triton": triton, "SDPA cuDNN a sequence": peer}
    flops = float(sum(length * length for length in lengths)) * heads * (192 + 128)
    if backward:
        leaves = tuple(tensor.requires_grad_() for tensor in (q, k, v))
        calls = {side: [_step(run, leaves, torch.randn_like(v))] * 2 for side, run in sides.items()}
    else:
        calls = {side: [partial(run, q, k, v)] * 2 for side, run in sides.items()}
    return Case(
        op="attention, forward + backward" if backward else "attention, forward",
        shape=f"{name}, {heads} heads of 192 and 128",
        flops=3.5 * flops if backward else flops,
        bytes=2.0 * tokens * heads * (2 * 192 + 2 * 128) * (3 if backward else 1),
        calls=dict(calls),
        target=("340 TFLOP/s" if backward else "420 TFLOP/s") if "ragged" in name else "cuDNN",
        note=attention.choose(q, k, v, *where)[0],
        graph=not backward,
    )


def latent_tiles(heads: int, batch: int, context: int) -> Iterator[Case]:
    """MLA decode by other tiles, over a wide cache and one in FP8; the first is what is chosen."""
    scale = (RANK + ROPE) ** -0.5
    wide, *where = _cache(batch, context, (RANK + ROPE,), PAGE)
    q = torch.randn(batch, heads, RANK + ROPE, device="cuda", dtype=DTYPE)
    for kind, pages in (("", wide), (", FP8 cache", narrow_rows(wide, RANK, wide.shape[:2]))):
        plans = (NARROW_PLANS if kind else WIDE_PLANS)[heads]
        attend = partial(cache_attention.latent_attention, q, pages, *where, RANK, scale)
        calls: dict[str, list[Call]] = {"ours": [attend]}
        calls |= {str(plan)[4:]: [partial(attend, plan=plan)] for plan in plans}
        yield Case(
            op="MLA decode by tiles" + kind,
            shape=f"{heads} heads, batch {batch}, context {context // 1024}k",
            flops=2.0 * batch * context * heads * (2 * RANK + ROPE),
            bytes=float(batch * context * pages.shape[-1] * pages.element_size()),
            calls=dict(calls),
        )


def tile_cases() -> Iterator[Case]:
    for heads in (16, 128):
        for batch, context in ((32, 32768), (128, 4096)):
            yield from latent_tiles(heads, batch, context)


def narrow_cases() -> Iterator[Case]:
    for heads in (16, 128):
        for batch, context in ((1, 32768), (32, 32768), (128, 4096)):
            yield narrow_latent(heads, batch, context)
    yield narrow_paged(32, 8, 32, 32768)


def cases() -> Iterator[Case]:
    for heads, batch, context in DECODE:
        yield latent(heads, batch, context)
    for batch, context in ((1, 4096), (32, 4096), (32, 32768)):
        yield paged(32, 8, batch, context)
    for backward in (False, True):
        for name, lengths in PACKS.items():
            yield pack(name, lengths, 16, backward=backward)
        yield pack("4k", [4096], 128, backward=backward)
