"""Programmatic launch: a kernel is set up while the one before it still runs, and waits for it inside.

In a CUDA graph of small kernels the gap between two of them costs as much as they do. From Hopper on a kernel
launched with `launch_pdl` may begin before its predecessor has ended. The law: every program waits, before it
reads what that one wrote and whether it has work or not, so the order is that of plain launches, also two
kernels on. What is older than that one may be read before the wait, past the L1: it is whole, since that one
let nobody in before it had waited itself.

A kernel lets its successor in as soon as it has waited. The device does so once all of its programs have said
it, so none that is still to begin loses its place.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def wait(PDL: tl.constexpr):
    """With programmatic launch: from here on, what ran before is visible and done with its memory."""
    if PDL:
        gdc_wait()


@triton.jit
def let_next_in(PDL: tl.constexpr):
    """With programmatic launch: what follows may be set up, once all programs say so."""
    if PDL:
        gdc_launch_dependents()


@triton.jit
def wait_for_previous(PDL: tl.constexpr):
    """Both, as nearly every kernel does."""
    wait(PDL)
    let_next_in(PDL)


@triton.jit
def bring_near(rows, WIDTH: tl.constexpr, STEP: tl.constexpr, PDL: tl.constexpr):
    """With programmatic launch: rows of WIDTH elements, at pointers (N, 1), are asked for as far as the L2,
    STEP elements at a time. For what is read after the wait: it holds what is true by then."""
    if PDL:
        LINE: tl.constexpr = 1024 // rows.dtype.element_ty.primitive_bitwidth
        LINES: tl.constexpr = STEP // LINE if STEP > LINE else 1
        for first in tl.static_range(0, WIDTH, LINES * LINE):
            at = tl.minimum(first + tl.arange(0, LINES) * LINE, WIDTH - 1)[None, :]
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; mov.u32 $0, 0;", "=r,l", [(rows + at).to(tl.int64, bitcast=True)],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


@lru_cache
def _capable(index: int | None) -> bool:
    return torch.cuda.get_device_capability(index)[0] >= 9


def programmatic(device: torch.device) -> bool:
    """Whether kernels on this device are launched so."""
    return device.type == "cuda" and _capable(device.index)
