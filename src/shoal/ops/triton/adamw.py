"""AdamW in one pass over memory, weight and moments kept as narrow as asked.

    m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,  w = (1 - lr d) w - lr m^ / (sqrt(v^) + eps)

Layout: a program owns 1024 consecutive elements, four blocks of 256 that have a scale each; all is float32 in
registers, read once and written once. Random bits are a hash of (key, step, index) made in place, so they
cost no traffic. Bound: bytes. A bfloat16 weight and gradient with 8-bit moments move 10.06 bytes an element,
37 ms for the 15.7 billion of V2-Lite at 4.3 TB/s; float32 moments and a float32 master move 28. On an H200
(2026-11-24) the wider kinds reach 92 to 93% of the read rate; 8 bits 56%, bound by some 100 instructions an
element of hash, codes and conversions.

An update whose factor is not finite writes nothing.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl
from torch import Tensor

TILE = 1024


@triton.jit
def _mix(x):
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def _to_bfloat16(x, bits):
    """Rounded up or down by 16 random bits."""
    wide = x.to(tl.uint32, bitcast=True) + bits
    return (wide & 0xFFFF0000).to(tl.float32, bitcast=True).to(tl.bfloat16)


@triton.jit
def _log2(x):
    """Of x > 0, to 1.5e-4: it sets odds. Exponent, and a polynomial of the fraction, exact at both ends."""
    word = x.to(tl.int32, bitcast=True)
    t = ((word & 0x7FFFFF) | 0x3F800000).to(tl.float32, bitcast=True) - 1.0
    log = t * (1.4380732 + t * (-0.6747667 + t * (0.3170007 - t * 0.0803073)))
    return (word >> 23).to(tl.float32) - 127.0 + log


@triton.jit
def _load(values, scales, at, block, inside, in_blocks):
    """Float32 of a tile of (BLOCKS, 256), whatever it is kept in."""
    stored = tl.load(values + at, mask=inside, other=0)
    kind: tl.constexpr = values.dtype.element_ty
    if kind == tl.int8:
        return stored.to(tl.float32) * tl.load(scales + block, mask=in_blocks, other=0.0)[:, None]
    if kind == tl.uint8:
        largest = tl.load(scales + block, mask=in_blocks, other=0.0)[:, None]
        return tl.where(stored == 255, 0.0, tl.exp2(stored.to(tl.float32) * (-1.0 / 12)) * largest)
    return stored.to(tl.float32)


@triton.jit
def _store(values, scales, x, bits, at, block, inside, in_blocks):
    """The same, put back; `bits` are random, 16 for bfloat16 and 8 for a code."""
    kind: tl.constexpr = values.dtype.element_ty
    if kind == tl.float32:
        tl.store(values + at, x, mask=inside)
    elif kind == tl.bfloat16:
        tl.store(values + at, _to_bfloat16(x, bits), mask=inside)
    else:
        # (bits + 1/2) / 256, less 1: written into the fraction of a float, which costs no conversion.
        chance = ((bits << 15) | 0x3F804000).to(tl.float32, bitcast=True) - 1.0
        x = tl.where(inside, x, 0.0)
        if kind == tl.int8:
            step = tl.max(tl.abs(x), 1) * (1.0 / 127)
            tl.store(scales + block, step, mask=in_blocks)
            codes = tl.floor(x * (1.0 / tl.where(step > 0, step, 1.0))[:, None] + chance)
            tl.store(values + at, tl.minimum(tl.maximum(codes, -127.0), 127.0).to(tl.int8), mask=inside)
        else:
            largest = tl.max(x, 1)
            tl.store(scales + block, largest, mask=in_blocks)
            place = tl.floor(chance + 12.0 * (_log2(largest)[:, None] - _log2(x)))
            code = tl.where(x > 0, tl.minimum(tl.maximum(place, 0.0), 254.0), 255.0)
            tl.store(values + at, code.to(tl.int32).to(tl.uint8), mask=inside)


@triton.jit(do_not_specialize=["key"])
def _adamw_kernel(
    weight,
    grad,
    first,
    second,
    first_scale,
    second_scale,
    master,
    factor,
    step,
    N,
    lr,
    log2_beta1,
    log2_beta2,
    beta1,
    beta2,
    eps,
    weight_decay,
    key,
    HAS_MASTER: tl.constexpr,
    HAS_FACTOR: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    scale = 1.0
    if HAS_FACTOR:
        scale = tl.load(factor)
    if tl.abs(scale) < float("inf"):  # neither infinite nor NaN
        block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
        at = block[:, None] * 256 + tl.arange(0, 256)[None, :]
        inside, in_blocks = at < N, block * 256 < N
        count = tl.load(step)
        # 1. The gradient, clipped.
        g = tl.load(grad + at, mask=inside, other=0.0).to(tl.float32) * scale
        # 2. The moments, 3. without the bias of their start at 0.
        m = beta1 * _load(first, first_scale, at, block, inside, in_blocks) + (1.0 - beta1) * g
        v = beta2 * _load(second, second_scale, at, block, inside, in_blocks) + (1.0 - beta2) * g * g
        m_hat = m * (1.0 / (1.0 - tl.exp2(count * log2_beta1)))
        v_hat = v * (1.0 / (1.0 - tl.exp2(count * log2_beta2)))
        # 4. The weight: decay, then the step.
        old = tl.load((master if HAS_MASTER else weight) + at, mask=inside, other=0.0).to(tl.float32)
        new = old * (1.0 - lr * weight_decay) - lr * m_hat / (tl.sqrt(v_hat) + eps)
        # 5. Put back.
        stream = _mix(count.to(tl.uint32) * 0x9E3779B9 + key.to(tl.uint32))
        bits = _mix(at.to(tl.uint32) ^ stream)
        coded: tl.constexpr = first.dtype.element_ty == tl.int8
        if coded:
            for_first, for_second = (bits >> 16) & 0xFF, bits >> 24
        else:
            for_first, for_second = bits >> 16, _mix(bits + 0x68E31DA4) & 0xFFFF
        if HAS_MASTER:
            tl.store(master + at, new, mask=inside)
            if weight.dtype.element_ty == tl.bfloat16:  # to nearest even, which the interpreter's cast is not
                even = (new.to(tl.uint32, bitcast=True) >> 16) & 1
                tl.store(weight + at, _to_bfloat16(new, even + 0x7FFF), mask=inside)
            else:
                tl.store(weight + at, new, mask=inside)
        else:
            _store(weight, weight, new, bits & 0xFFFF, at, block, inside, in_blocks)
        _store(first, first_scale, m, for_first, at, block, inside, in_blocks)
        _store(second, second_scale, v, for_second, at, block, inside, in_blocks)


def adamw(
    weight: Tensor,
    grad: Tensor,
    moments: tuple[Tensor, Tensor, Tensor | None, Tensor | None],
    master: Tensor | None,
    factor: Tensor | None,
    step: Tensor,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    key: int,
) -> None:
    first, second, first_scale, second_scale = moments
    logs = [math.log2(beta) if beta else -1e30 for beta in betas]
    _adamw_kernel[(triton.cdiv(weight.numel(), TILE),)](
        weight,
        grad,
        first,
        second,
        first_scale if first_scale is not None else first,
        second_scale if second_scale is not None else second,
        master if master is not None else weight,
        factor if factor is not None else step,
        step,
        weight.numel(),
        lr,
        *logs,
        *betas,
        eps,
        weight_decay,
        key,
        HAS_MASTER=master is not None,
        HAS_FACTOR=factor is not None,
        BLOCKS=TILE // 256,
        num_warps=4,
    )


def adamw_refusal(weight: Tensor, grad: Tensor, *_: object) -> str | None:
    if weight.numel() == 0:
        return "there is nothing to update"
    if not (weight.is_contiguous() and grad.is_contiguous()):
        return "weight and gradient must be contiguous"
    return None
