"""What a token leaves in the paged cache, written where it is made.

    latent   page[slot] = [rms_norm(c) | rope(k)],  q <- rope(q)      from kv_a's output, q in place
    heads    page[slot] = [rope(k), v],             q <- rope(q)      the same for keys and values

Layout: program (token, 0) makes the row of the cache (of heads, a block of them), the others turn a block of
query heads each; all read their inputs where the products left them, so no slice, concatenation or copy is
launched. The rows are also returned, for attention among the step's own tokens, of a cache in FP8
(`narrow_rows`) as it has them. No two tokens share a slot.
Bound: at decoding sizes the launch itself, above them bytes. On an H200 (2026-11-24): 3 to 4 us up to 256
tokens, where the ops apart take 26 to 60; 63 to 76% of 4.555 TB/s at 8192.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from shoal.ops.triton.launch import programmatic, wait_for_previous
from shoal.ops.triton.narrow_rows import MAX_HEAD, NARROW, behind_narrow, store_narrow
from shoal.ops.triton.norms import DTYPES, normalise
from shoal.ops.triton.quantise import lacks_e4m3, scale_of, to_e4m3
from shoal.ops.triton.rotary import head_block, load_angles, load_pairs, side_by_side, store_pairs, turn

MAX_LATENT = 8192  # of one program


@triton.jit
def _write_kernel(
    rows_ptr, pages_ptr, slots_ptr, row_stride, slot_stride, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    pieces: tl.constexpr = (WIDTH + BLOCK - 1) // BLOCK
    token = (tl.program_id(0) // pieces).to(tl.int64)
    column = tl.program_id(0) % pieces * BLOCK + tl.arange(0, BLOCK)
    row = tl.load(rows_ptr + token * row_stride + column, mask=column < WIDTH)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    tl.store(pages_ptr + slot * slot_stride + column, row, mask=column < WIDTH)


@triton.jit
def turn_queries(
    q_ptr,
    out_ptr,
    cos,
    sin,
    token,
    block,
    token_stride,
    head_stride,
    out_token_stride,
    out_head_stride,
    H: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
):
    head = block * HEADS + tl.arange(0, HEADS)[:, None]
    a, b = load_pairs(q_ptr + token * token_stride + head * head_stride, head < H, R, PAIRS, INTERLEAVED)
    first, second = turn(a, b, cos, sin)
    out = out_ptr + token * out_token_stride + head * out_head_stride
    store_pairs(out, first, second, head < H, R, PAIRS, INTERLEAVED)


@triton.jit
def latent_row(
    kv_ptr,
    weight_ptr,
    cos,
    sin,
    pages_ptr,
    slots_ptr,
    rows_ptr,
    token,
    kv_stride,
    slot_stride,
    eps,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    RETURN: tl.constexpr,
    NARROW: tl.constexpr,
    ROUND: tl.constexpr,
):
    """The row of a token, to its slot, and if RETURN to `rows` as it is there."""
    dtype: tl.constexpr = kv_ptr.dtype.element_ty
    slot = tl.load(slots_ptr + token).to(tl.int64)
    column = tl.arange(0, BLOCK)[None, :]
    latent = tl.load(kv_ptr + token * kv_stride + column, mask=column < C, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=column < C, other=0.0).to(tl.float32)
    normal, _ = normalise(latent, eps, C, dtype)
    latent = (normal * weight).to(dtype)
    one = tl.arange(0, 1)[:, None]
    a, b = load_pairs(kv_ptr + token * kv_stride + C + one, one < 1, R, PAIRS, INTERLEAVED)
    first, second = turn(a, b, cos, sin)
    at = pages_ptr + slot * slot_stride + one
    if NARROW:
        latent = store_narrow(at, latent.to(tl.float32), one < 1, C, BLOCK, ROUND).to(dtype)
        first, second = first.to(tl.bfloat16), second.to(tl.bfloat16)
        store_pairs(behind_narrow(at, C), first, second, one < 1, R, PAIRS, INTERLEAVED)
        first, second = first.to(tl.float32), second.to(tl.float32)
    else:
        tl.store(at + column, latent, mask=column < C)
        store_pairs(at + C, first, second, one < 1, R, PAIRS, INTERLEAVED)
    if RETURN:
        tl.store(rows_ptr + token * (C + R) + column, latent, mask=column < C)
        store_pairs(rows_ptr + token * (C + R) + C + one, first, second, one < 1, R, PAIRS, INTERLEAVED)


@triton.jit(do_not_specialize=["eps"])
def _write_latent_kernel(
    q_ptr,
    kv_ptr,
    weight_ptr,
    cos_ptr,
    sin_ptr,
    pages_ptr,
    slots_ptr,
    rows_ptr,
    q_token_stride,
    q_head_stride,
    kv_stride,
    slot_stride,
    eps,
    H: tl.constexpr,
    C: tl.constexpr,
    R: tl.constexpr,
    BLOCK: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NARROW: tl.constexpr,
    ROUND: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    cos, sin = load_angles(cos_ptr, sin_ptr, token, R, PAIRS)
    if tl.program_id(1) == 0:
        latent_row(
            kv_ptr, weight_ptr, cos, sin, pages_ptr, slots_ptr, rows_ptr, token, kv_stride, slot_stride, eps,
            C, R, BLOCK, PAIRS, INTERLEAVED, True, NARROW, ROUND,
        )  # fmt: skip
    else:
        turn_queries(
            q_ptr, q_ptr, cos, sin, token, tl.program_id(1) - 1,
            q_token_stride, q_head_stride, q_token_stride, q_head_stride,
            H, R, HEADS, PAIRS, INTERLEAVED,
        )  # fmt: skip


@triton.jit
def _write_heads_kernel(
    q_ptr,
    k_ptr,
    v_ptr,
    cos_ptr,
    sin_ptr,
    pages_ptr,
    slots_ptr,
    turned_q_ptr,
    turned_k_ptr,
    kept_v_ptr,
    q_token_stride,
    q_head_stride,
    k_token_stride,
    k_head_stride,
    v_token_stride,
    v_head_stride,
    H: tl.constexpr,
    G: tl.constexpr,
    R: tl.constexpr,
    HEADS: tl.constexpr,
    PAIRS: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NARROW: tl.constexpr,
    ROUND: tl.constexpr,
    PDL: tl.constexpr,
):
    wait_for_previous(PDL)
    token = tl.program_id(0).to(tl.int64)
    cos, sin = load_angles(cos_ptr, sin_ptr, token, R, PAIRS)
    key_blocks: tl.constexpr = (G + HEADS - 1) // HEADS
    if tl.program_id(1) < key_blocks:
        slot = tl.load(slots_ptr + token).to(tl.int64)
        head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
        inside = head < G
        a, b = load_pairs(
            k_ptr + token * k_token_stride + head * k_head_stride, inside, R, PAIRS, INTERLEAVED
        )
        first, second = turn(a, b, cos, sin)
        width: tl.constexpr = R + 4 if NARROW else R
        key = pages_ptr + (slot * 2 * G + head) * width
        turned = turned_k_ptr + (token * G + head) * R
        column = tl.arange(0, 2 * PAIRS)[None, :]
        real = inside & (column < R)
        value = tl.load(v_ptr + token * v_token_stride + head * v_head_stride + column, mask=real, other=0.0)
        if NARROW:  # R is at most 128: a head has one scale
            dtype: tl.constexpr = turned_k_ptr.dtype.element_ty
            first, second = first.to(dtype).to(tl.float32), second.to(dtype).to(tl.float32)
            top = tl.maximum(tl.max(tl.abs(first), 1), tl.max(tl.abs(second), 1))
            scale, inverse = scale_of(top[:, None])
            first = to_e4m3(first * inverse, ROUND).to(tl.float32)
            second = to_e4m3(second * inverse, ROUND).to(tl.float32)
            bytes_of = key.to(tl.pointer_type(tl.float8e4nv), bitcast=True)
            store_pairs(bytes_of, first, second, inside, R, PAIRS, INTERLEAVED)
            tl.store((key + R).to(tl.pointer_type(tl.float32), bitcast=True), scale, mask=inside)
            first, second = first * scale, second * scale
            wide = store_narrow(key + G * width, value.to(tl.float32), inside, R, 2 * PAIRS, ROUND)
            tl.store(kept_v_ptr + (token * G + head) * R + column, wide.to(dtype), mask=real)
        else:
            store_pairs(key, first, second, inside, R, PAIRS, INTERLEAVED)
            tl.store(key + G * R + column, value, mask=real)
        store_pairs(turned, first, second, inside, R, PAIRS, INTERLEAVED)
    else:
        turn_queries(
            q_ptr, turned_q_ptr, cos, sin, token, tl.program_id(1) - key_blocks,
            q_token_stride, q_head_stride, H * R, R,
            H, R, HEADS, PAIRS, INTERLEAVED,
        )  # fmt: skip


def are_rows(pages: Tensor) -> bool:
    """Whether slots lie at one stride, page after page, the elements of each side by side: a cache, or a view
    of a part of its rows."""
    return pages[0, 0].is_contiguous() and pages.stride(0) == pages.shape[1] * pages.stride(1)


def _pages_refusal(pages: Tensor, row: Tensor, *, narrow: bool = True) -> str | None:
    if not are_rows(pages):
        return "the pages are no rows of one stride; the kernel writes rows in place"
    if narrow and pages.dtype == NARROW:
        return lacks_e4m3(pages)
    if pages.dtype != row.dtype:
        return f"the pages are {pages.dtype} but what they keep is {row.dtype}; cast one side"
    return None


def write_cache_refusal(pages: Tensor, slots_T: Tensor, rows: Tensor) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if rows.shape[1:] != pages.shape[2:]:
        return f"a row is {tuple(rows.shape[1:])} but a slot of the pages is {tuple(pages.shape[2:])}"
    return _pages_refusal(pages, rows, narrow=False)


@torch.no_grad()
def write_cache(pages: Tensor, slots_T: Tensor, rows: Tensor) -> None:
    """Keep rows at their slots, as `ops.api.write_cache` says."""
    if not rows.numel():
        return
    rows_TX = side_by_side(rows.reshape(rows.shape[0], -1))
    width = rows_TX.shape[1]
    block = min(2048, triton.next_power_of_2(width))
    grid = (rows_TX.shape[0] * triton.cdiv(width, block),)
    strides = rows_TX.stride(0), pages.stride(1)
    _write_kernel[grid](rows_TX, pages, slots_T.contiguous(), *strides, WIDTH=width, BLOCK=block)


def write_latent_cache_refusal(
    q_THR: Tensor,
    kv_TL: Tensor,
    weight_C: Tensor,
    eps: float,
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    interleaved: bool,
) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if q_THR.dtype not in DTYPES:
        return f"queries are {q_THR.dtype}; the kernel takes bfloat16, float16 and float32"
    if not q_THR.dtype == kv_TL.dtype == weight_C.dtype:
        return f"queries are {q_THR.dtype}, latents {kv_TL.dtype} and the weight {weight_C.dtype}; cast them"
    if q_THR.stride(-1) != 1:
        return "the elements of a query are not side by side; the kernel turns them where they lie"
    if weight_C.shape[0] > MAX_LATENT:
        return f"a latent of {weight_C.shape[0]}; a program holds at most {MAX_LATENT}"
    return _pages_refusal(pages, kv_TL)


@torch.no_grad()
def write_latent_cache(
    q_THR: Tensor,
    kv_TL: Tensor,
    weight_C: Tensor,
    eps: float,
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    interleaved: bool,
) -> tuple[Tensor, Tensor]:
    """Queries turned where they lie and the rows of the cache, as `ops.api.write_latent_cache` says."""
    (T, H, R), C = q_THR.shape, weight_C.shape[0]
    kv_TL = side_by_side(kv_TL)
    rows_TL = torch.empty(T, C + R, dtype=q_THR.dtype, device=q_THR.device)
    if T:
        block, pdl = head_block(H, R), programmatic(q_THR.device)
        _write_latent_kernel[(T, 1 + triton.cdiv(H, block["HEADS"]))](
            q_THR,
            kv_TL,
            weight_C,
            cos_TR2.contiguous(),
            sin_TR2.contiguous(),
            pages,
            slots_T.contiguous(),
            rows_TL,
            q_THR.stride(0),
            q_THR.stride(1),
            kv_TL.stride(0),
            pages.stride(1),
            eps,
            H=H,
            C=C,
            R=R,
            BLOCK=triton.next_power_of_2(C),
            INTERLEAVED=interleaved,
            NARROW=pages.dtype == NARROW,
            ROUND=not pages.is_cuda,
            PDL=pdl,
            launch_pdl=pdl,
            **block,
        )
    return q_THR, rows_TL


def write_kv_cache_refusal(
    q_THQ: Tensor,
    k_TGQ: Tensor,
    v_TGQ: Tensor,
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    interleaved: bool,
) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if q_THQ.dtype not in DTYPES:
        return f"queries are {q_THQ.dtype}; the kernel takes bfloat16, float16 and float32"
    if not q_THQ.dtype == k_TGQ.dtype == v_TGQ.dtype:
        return f"queries are {q_THQ.dtype}, keys {k_TGQ.dtype} and values {v_TGQ.dtype}; cast them"
    if not pages.is_contiguous():
        return "the pages are not contiguous; the kernel writes rows in place"
    if pages.dtype == NARROW and k_TGQ.shape[2] > MAX_HEAD:
        return f"heads of {k_TGQ.shape[2]} in FP8; the kernel has one scale a head, of at most {MAX_HEAD}"
    return _pages_refusal(pages, k_TGQ)


@torch.no_grad()
def write_kv_cache(
    q_THQ: Tensor,
    k_TGQ: Tensor,
    v_TGQ: Tensor,
    cos_TR2: Tensor,
    sin_TR2: Tensor,
    pages: Tensor,
    slots_T: Tensor,
    interleaved: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Turned queries and keys, and values, as `ops.api.write_kv_cache` says."""
    (T, H, R), G = q_THQ.shape, k_TGQ.shape[1]
    q_THQ, k_TGQ, v_TGQ = (side_by_side(x) for x in (q_THQ, k_TGQ, v_TGQ))
    turned_THQ = torch.empty(T, H, R, dtype=q_THQ.dtype, device=q_THQ.device)
    turned_TGQ = torch.empty(T, G, R, dtype=q_THQ.dtype, device=q_THQ.device)
    kept_TGQ = torch.empty_like(turned_TGQ) if pages.dtype == NARROW else v_TGQ
    if T:
        block, pdl = head_block(H, R), programmatic(q_THQ.device)
        _write_heads_kernel[(T, triton.cdiv(G, block["HEADS"]) + triton.cdiv(H, block["HEADS"]))](
            q_THQ,
            k_TGQ,
            v_TGQ,
            cos_TR2.contiguous(),
            sin_TR2.contiguous(),
            pages,
            slots_T.contiguous(),
            turned_THQ,
            turned_TGQ,
            kept_TGQ,
            *q_THQ.stride()[:2],
            *k_TGQ.stride()[:2],
            *v_TGQ.stride()[:2],
            H=H,
            G=G,
            R=R,
            INTERLEAVED=interleaved,
            NARROW=pages.dtype == NARROW,
            ROUND=not pages.is_cuda,
            PDL=pdl,
            launch_pdl=pdl,
            **block,
        )
    return turned_THQ, turned_TGQ, kept_TGQ
