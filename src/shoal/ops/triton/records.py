"""What a step leaves beside its keys and values, in one launch: ids, chosen experts, and counts of them.

Layout: a program is a layer; it goes over the layer's choices in tiles, stores each beside its token's keys
and adds a histogram of the tile to its counts, which it alone owns, so nothing is atomic. The first program
stores the ids. Bound by the launch at the sizes that decode.

Shape letters: T tokens, X slots of the cache, L layers that route, E experts, K experts per token.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

TILE = 1024
MAX_EXPERTS = 1024


@triton.jit(do_not_specialize=["T", "num_slots"])
def _record_kernel(
    slots_ptr,
    ids_ptr,
    choices_ptr,
    ids_at_ptr,
    experts_at_ptr,
    tokens_ptr,
    touched_ptr,
    T,
    num_slots,
    L: tl.constexpr,
    K: tl.constexpr,
    E: tl.constexpr,
    BINS: tl.constexpr,
    TILE: tl.constexpr,
):
    layer = tl.program_id(0)
    if layer == 0:
        for first in range(0, T, TILE):
            token = first + tl.arange(0, TILE)
            slot = tl.load(slots_ptr + token, token < T, 0)
            tl.store(ids_at_ptr + slot, tl.load(ids_ptr + token, token < T, 0).to(tl.int32), token < T)
    counts = tl.zeros((BINS,), tl.int32)
    for first in range(0, T * K, TILE):
        place = first + tl.arange(0, TILE)
        there = place < T * K
        slot = tl.load(slots_ptr + place // K, there, 0)
        choice = tl.load(choices_ptr + layer.to(tl.int64) * T * K + place, there, -1)
        tl.store(experts_at_ptr + (slot * L + layer) * K + place % K, choice.to(tl.int16), there)
        counted = there & (choice >= 0) & (slot < num_slots)
        counts += tl.histogram(tl.where(counted, choice, 0).to(tl.int32), BINS, counted)
    expert = tl.arange(0, BINS)
    tokens = tokens_ptr + layer * E + expert
    tl.store(tokens, tl.load(tokens, expert < E, 0) + counts, expert < E)
    touched = tl.sum((counts > 0).to(tl.int32))
    tl.store(touched_ptr + layer, tl.load(touched_ptr + layer) + touched)


def record_refusal(slots_T: Tensor, ids_T: Tensor, choices_LTK: Tensor, *state: Tensor | int) -> str | None:
    experts = state[2].shape[1] if isinstance(state[2], Tensor) else 0
    if experts > MAX_EXPERTS:
        return f"there are {experts} experts; the kernel is for at most {MAX_EXPERTS}"
    for tensor in (slots_T, ids_T, choices_LTK, *(part for part in state if isinstance(part, Tensor))):
        if not tensor.is_contiguous():
            return "a tensor is not in order"
    return None


def record(
    slots_T: Tensor,
    ids_T: Tensor,
    choices_LTK: Tensor,
    ids_X: Tensor,
    experts_XLK: Tensor,
    tokens_LE: Tensor,
    touched_L: Tensor,
    num_slots: int,
) -> None:
    layers, tokens, top_k = choices_LTK.shape
    experts = tokens_LE.shape[1]
    with torch.cuda.device_of(ids_X):
        _record_kernel[(layers,)](
            *(slots_T, ids_T, choices_LTK, ids_X, experts_XLK, tokens_LE, touched_L, tokens, num_slots),
            L=layers,
            K=top_k,
            E=experts,
            BINS=max(triton.next_power_of_2(experts), 32),
            TILE=TILE,
        )
