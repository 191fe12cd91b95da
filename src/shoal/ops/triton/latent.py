"""MLA's absorbed form on either side of the cache: queries that meet latents, and values made of latents.

    q~ = [W_UK^T q_nope | rope(q_rope)],  page[slot] = [rms_norm(c) | rope(k)]     latent_queries, one launch
    o = W_UV z                                                                     latent_values, one launch

W_UK (N, C) and W_UV (V, C) of a head are rows of `kv_b`, read as they lie. Layout: of the first kernel a
program makes BC of the C elements for one head and BT tokens, in one product over N; behind them come those
that turn queries and write the cache, as in `cache`. All write where the next op reads: no slice, transpose
or concatenation is launched. Of the second a program makes BV of the V elements of one head. Bound: at
decoding sizes the launch, then the bytes of `kv_b`. In batch-invariant mode BT is 16, and BV 32
at most, whatever T.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.ops.triton.cache import MAX_LATENT, latent_row, turn_queries
from shoal.ops.triton.launch import bring_near, programmatic, wait_for_previous
from shoal.ops.triton.narrow_rows import NARROW
from shoal.ops.triton.norms import DTYPES
from shoal.ops.triton.quantise import lacks_e4m3
from shoal.ops.triton.rotary import head_block, load_angles, side_by_side

MAX_DIM = 256  # of a head, unrotated: the depth of one product


@triton.jit(do_not_specialize=["T", "eps"])
def _queries_kernel(
    q_ptr,
    kv_ptr,
    norm_ptr,
    cos_ptr,
    sin_ptr,
    kv_b_ptr,
    pages_ptr,
    slots_ptr,
    out_ptr,
    T,
    q_token_stride,
    q_head_stride,
    kv_stride,
    slot_stride,
    eps,
    H: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    BT: tl.constexpr,
    BN: tl.constexpr,
    BC: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NARROW: tl.constexpr,
    ROUND: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    columns: tl.constexpr = (C + BC - 1) // BC
    products = H * columns * ((T + BT - 1) // BT)
    program = tl.program_id(0)
    if program < products:
        head = program % (H * columns) // columns
        n, c = tl.arange(0, BN), program % columns * BC + tl.arange(0, BC)
        at = kv_b_ptr + (head * (N + V) + n).to(tl.int64)[:, None] * C + c[None, :]
        w = tl.load(at, mask=(n < N)[:, None] & (c < C)[None, :], other=0.0)
        wait_for_previous(PDL)
        token = (program // (H * columns) * BT + tl.arange(0, BT)).to(tl.int64)
        kept = token < T
        q = tl.load(
            q_ptr + token[:, None] * q_token_stride + head * q_head_stride + n[None, :],
            mask=kept[:, None] & (n < N)[None, :],
            other=0.0,
        )
        made = tl.dot(q, w, input_precision=PRECISION)
        to = out_ptr + (token * H + head)[:, None] * (C + R) + c[None, :]
        tl.store(to, made.to(out_ptr.dtype.element_ty), mask=kept[:, None] & (c < C)[None, :])
    else:
        bring_near(norm_ptr + tl.arange(0, 1)[:, None], C, BLOCK, PDL)
        wait_for_previous(PDL)
        parts: tl.constexpr = 1 + (H + HEADS - 1) // HEADS
        one = ((program - products) // parts).to(tl.int64)
        part = (program - products) % parts
        cos, sin = load_angles(cos_ptr, sin_ptr, one, R, PAIRS)
        if part == 0:
            latent_row(
                kv_ptr, norm_ptr, cos, sin, pages_ptr, slots_ptr, pages_ptr, one, kv_stride, slot_stride, eps,
                C, R, BLOCK, PAIRS, INTERLEAVED, False, NARROW, ROUND,
            )  # fmt: skip
        else:
            turn_queries(
                q_ptr + N, out_ptr + C, cos, sin, one, part - 1,
                q_token_stride, q_head_stride, H * (C + R), C + R,
                H, R, HEADS, PAIRS, INTERLEAVED,
            )  # fmt: skip


@triton.jit(do_not_specialize=["T"])
def _values_kernel(
    o_ptr,
    kv_b_ptr,
    out_ptr,
    T,
    H: tl.constexpr,
    N: tl.constexpr,
    V: tl.constexpr,
    C: tl.constexpr,
    BT: tl.constexpr,
    BV: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
    PRECISION: tl.constexpr,
):
    pieces: tl.constexpr = (V + BV - 1) // BV
    head = tl.program_id(0) // pieces
    v = tl.program_id(0) % pieces * BV + tl.arange(0, BV)
    rows = kv_b_ptr + (head * (N + V) + N + v).to(tl.int64)[:, None] * C
    real = v < V
    bring_near(tl.where(real[:, None], rows, kv_b_ptr), C, BK, PDL)
    wait_for_previous(PDL)
    token = (tl.program_id(1) * BT + tl.arange(0, BT)).to(tl.int64)
    kept = token < T
    total = tl.zeros((BT, BV), tl.float32)
    for k in range(0, C, BK):
        c = k + tl.arange(0, BK)
        o = tl.load(
            o_ptr + (token * H + head)[:, None] * C + c[None, :],
            mask=kept[:, None] & (c < C)[None, :],
            other=0.0,
        )
        w = tl.load(rows + c[None, :], mask=real[:, None] & (c < C)[None, :], other=0.0)
        total = tl.dot(o, w.T, total, input_precision=PRECISION)
    to = out_ptr + (token * H + head)[:, None] * V + v[None, :]
    tl.store(to, total.to(out_ptr.dtype.element_ty), mask=kept[:, None] & real[None, :])


def tokens_of_program(tokens: int, invariant: bool) -> int:
    """16 to 64: the rows of its products."""
    return 16 if tokens <= 16 or invariant else 32 if tokens <= 32 else 64


def _precision(x: Tensor) -> str:
    return "ieee" if x.dtype == torch.float32 else "tf32"


def _refusal(x: Tensor, kv_b: Tensor, dim: int) -> str | None:
    if x.dtype not in DTYPES:
        return f"rows are {x.dtype}; the kernel takes bfloat16, float16 and float32"
    if kv_b.dtype != x.dtype:
        return f"rows are {x.dtype} but kv_b is {kv_b.dtype}; cast one side"
    if not kv_b.is_contiguous():
        return "kv_b is not contiguous; the kernel does not copy weights"
    if dim > MAX_DIM:
        return f"heads of {dim}; a program holds at most {MAX_DIM}"
    return None


def latent_queries_refusal(
    q_THQ: Tensor,
    kv_TL: Tensor,
    norm_C: Tensor,
    eps: float,
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    kv_b: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    interleaved: bool,
) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    rank = norm_C.shape[0]
    if not q_THQ.dtype == kv_TL.dtype == norm_C.dtype:
        return f"queries are {q_THQ.dtype}, latents {kv_TL.dtype} and the weight {norm_C.dtype}; cast them"
    if rank > MAX_LATENT:
        return f"a latent of {rank}; a program holds at most {MAX_LATENT}"
    if not pages.is_contiguous() or pages.dtype not in (q_THQ.dtype, NARROW):
        return f"the pages are {pages.dtype}, or not contiguous; the kernel writes {q_THQ.dtype} in place"
    if pages.dtype == NARROW and (reason := lacks_e4m3(pages)) is not None:
        return reason
    return _refusal(q_THQ, kv_b, q_THQ.shape[2] - (kv_TL.shape[1] - rank))


@torch.no_grad()
def latent_queries(
    q_THQ: Tensor,
    kv_TL: Tensor,
    norm_C: Tensor,
    eps: float,
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    kv_b: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    interleaved: bool,
    *,
    invariant: bool = False,
) -> Tensor:
    """Queries (T, H, C + R), the cache written, as `ops.api.latent_queries` says."""
    q_THQ, kv_TL = side_by_side(q_THQ), side_by_side(kv_TL)
    (T, H, Q), C = q_THQ.shape, norm_C.shape[0]
    R = kv_TL.shape[1] - C
    N = Q - R
    out_THL = q_THQ.new_empty(T, H, C + R)
    if not T:
        return out_THL
    block, pdl = head_block(H, R), programmatic(q_THQ.device)
    bt = tokens_of_program(T, invariant)
    bc = min(64 if q_THQ.element_size() == 2 else 32, triton.next_power_of_2(C))
    products = H * triton.cdiv(C, bc) * triton.cdiv(T, bt)
    _queries_kernel[(products + T * (1 + triton.cdiv(H, block["HEADS"])),)](
        q_THQ,
        kv_TL,
        norm_C,
        cos_TR2.contiguous(),
        sin_TR2.contiguous(),
        kv_b,
        pages,
        slots_T.contiguous(),
        out_THL,
        T,
        q_THQ.stride(0),
        q_THQ.stride(1),
        kv_TL.stride(0),
        pages.stride(1),
        eps,
        H=H,
        N=N,
        V=kv_b.shape[0] // H - N,
        C=C,
        R=R,
        BT=bt,
        BN=max(16, triton.next_power_of_2(N)),
        BC=max(16, bc),
        BLOCK=triton.next_power_of_2(C),
        INTERLEAVED=interleaved,
        NARROW=pages.dtype == NARROW,
        ROUND=not pages.is_cuda,
        PDL=pdl,
        PRECISION=_precision(q_THQ),
        launch_pdl=pdl,
        **block,
    )
    return out_THL


def latent_values_refusal(o_THC: Tensor, kv_b: Tensor, value_dim: int) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    return _refusal(o_THC, kv_b, 0)


@torch.no_grad()
def latent_values(o_THC: Tensor, kv_b: Tensor, value_dim: int, *, invariant: bool = False) -> Tensor:
    """Values (T, H, V), as `ops.api.latent_values` says."""
    o_THC = o_THC.contiguous()
    (T, H, C), V = o_THC.shape, value_dim
    out_THV = o_THC.new_empty(T, H, V)
    if not T:
        return out_THV
    pdl, bt = programmatic(o_THC.device), tokens_of_program(T, invariant)
    fewest = 32 if invariant else 16 if T <= 64 else 32 if T <= 128 else 64
    bv = min(max(16, triton.next_power_of_2(V)), fewest if H <= 32 else 64)
    bk = max(16, min(128 if o_THC.element_size() == 2 else 64, triton.next_power_of_2(C)))
    _values_kernel[(H * triton.cdiv(V, bv), triton.cdiv(T, bt))](
        o_THC,
        kv_b,
        out_THV,
        T,
        H=H,
        N=kv_b.shape[0] // H - V,
        V=V,
        C=C,
        BT=bt,
        BV=bv,
        BK=bk,
        PDL=pdl,
        PRECISION=_precision(o_THC),
        launch_pdl=pdl,
        num_warps=2 if bv == 16 and bt == 16 else 4,
        num_stages=4,
    )
    return out_THV
