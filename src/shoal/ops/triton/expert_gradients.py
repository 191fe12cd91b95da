"""The gradient of experts' weights on Hopper, copied, multiplied and stored at once: in Gluon.

    dW_e = left^T right over the slots of e       what `expert_products.weight_product_kernel` computes

An expert's reduction is as long as its rows are many, 768 of V2-Lite's at 8k tokens a micro-batch: 12 blocks
of 64. A tile's beginning and end are then a third of it, unless others multiply meanwhile. Here one warpgroup
copies, past the ends of tiles; two multiply, half of a tile's rows each; and what they leave is narrowed into
shared memory, from where it is stored while the next tile begins. Of an expert's last tile the second block
is often padding: it is not multiplied.

    loaded[s]   a block's operands lie in place s      copier -> both
    freed[s]    they are multiplied                    both (2) -> copier

Layout: left (P, R) and right (P, C) by TMA, 64 slots at a time, out (E R, C) by TMA too, so R must be whole
halves of tiles. Both operands lie along what is not summed: the tensor core turns them.

Bound: the matrix rate, 797 TFLOP/s in a burst on an H200. There (2026-11-29), V2-Lite: gate-up 699 and down
670 at 8k tokens, 763 and 740 at 16k, where Triton's has 590, 515, 700 and 660.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from shoal.ops.triton.expert_plan import num_multiprocessors
from shoal.ops.triton.permutation import Groups

SLOTS = gl.constexpr(64)  # of a block
STAGES, GROUP = gl.constexpr(3), gl.constexpr(8)  # places; tiles down before the next column


@gluon.jit
def _place(tile, num_m, num_n):
    """The expert of a tile, and where in its matrix: as `expert_products.walk`."""
    of_expert = num_m * num_n
    expert, tile = tile // of_expert, tile % of_expert
    width = GROUP * num_n
    first = tile // width * GROUP
    height = gl.minimum(num_m - first, GROUP)
    within = tile % width
    return expert, first + within % height, within // height


@gluon.jit
def _slots(choices_ptr, first_tile_ptr, expert, TILE: gl.constexpr):
    """From the first of an expert to the last block that holds any: padding comes last."""
    first = gl.load(first_tile_ptr + expert) * TILE
    last = gl.load(first_tile_ptr + expert + 1) * TILE
    empty = gl.load(choices_ptr + (last - SLOTS), mask=last > first, other=0) < 0
    return first, last - empty.to(gl.int32) * SLOTS


@gluon.jit
def _copier(
    given_to, held,
    E: gl.constexpr, R: gl.constexpr, C: gl.constexpr, TILE: gl.constexpr, HALF: gl.constexpr,
    BN: gl.constexpr,
):  # fmt: skip
    left, right, _, choices_ptr, first_tile_ptr = given_to
    left_s, right_s, _, loaded, freed = held
    num_m: gl.constexpr = (R + 2 * HALF - 1) // (2 * HALF)
    num_n: gl.constexpr = (C + BN - 1) // BN
    it = 0
    for tile in range(gl.program_id(0), E * num_m * num_n, gl.num_programs(0)):
        expert, m, n = _place(tile, num_m, num_n)
        first, last = _slots(choices_ptr, first_tile_ptr, expert, TILE)
        for slot in range(first, last, SLOTS):
            s = it % STAGES
            mbarrier.wait(freed.index(s), (it // STAGES & 1) ^ 1)
            gl.thread_barrier()  # no warp is a round behind
            place = loaded.index(s)
            mbarrier.expect(place, 64 * (2 * HALF + BN) * 2)
            tma.async_copy_global_to_shared(left, [slot, m * 2 * HALF], place, left_s.index(2 * s))
            tma.async_copy_global_to_shared(left, [slot, m * 2 * HALF + HALF], place, left_s.index(2 * s + 1))
            tma.async_copy_global_to_shared(right, [slot, n * BN], place, right_s.index(s))
            it += 1


@gluon.jit
def _multiply(
    given_to, held,
    E: gl.constexpr, R: gl.constexpr, C: gl.constexpr, TILE: gl.constexpr, HALF: gl.constexpr,
    BN: gl.constexpr, SIDE: gl.constexpr,
):  # fmt: skip
    """The warpgroup of one half of a tile's rows."""
    SUMS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BN, 16])
    _, _, out, choices_ptr, first_tile_ptr = given_to
    left_s, right_s, out_s, loaded, freed = held
    out_s = out_s.index(SIDE)
    num_m: gl.constexpr = (R + 2 * HALF - 1) // (2 * HALF)
    num_n: gl.constexpr = (C + BN - 1) // BN
    it = 0
    for tile in range(gl.program_id(0), E * num_m * num_n, gl.num_programs(0)):
        expert, m, n = _place(tile, num_m, num_n)
        first, last = _slots(choices_ptr, first_tile_ptr, expert, TILE)
        acc = gl.zeros([HALF, BN], gl.float32, SUMS)
        for _slot in range(first, last, SLOTS):
            s = it % STAGES
            mbarrier.wait(loaded.index(s), it // STAGES & 1)
            rows = left_s.index(2 * s + SIDE).permute((1, 0))
            acc = warpgroup_mma(rows, right_s.index(s), acc, is_async=True)
            acc = warpgroup_mma_wait(0, deps=[acc])
            gl.thread_barrier()
            mbarrier.arrive(freed.index(s), count=1)
            it += 1
        row = m * 2 * HALF + SIDE * HALF
        if row < R:
            tma.store_wait(0)  # of the tile before
            gl.thread_barrier()
            out_s.store(acc.to(out.dtype))
            fence_async_shared()
            gl.thread_barrier()
            tma.async_copy_shared_to_global(out, [expert * R + row, n * BN], out_s)
    tma.store_wait(0)


@gluon.jit
def weight_gradient_kernel(
    left,
    right,
    out,
    choices_ptr,
    first_tile_ptr,
    E: gl.constexpr,
    R: gl.constexpr,
    C: gl.constexpr,
    TILE: gl.constexpr,
    HALF: gl.constexpr,
    BN: gl.constexpr,
):
    """out (E R, C) = left_e^T right_e: HALF rows of R and BN columns of C a warpgroup; R % HALF is 0."""
    gl.static_assert(R % HALF == 0)
    gl.static_assert(TILE <= 2 * SLOTS)
    dtype: gl.constexpr = left.dtype
    left_s = gl.allocate_shared_memory(dtype, [2 * STAGES, SLOTS, HALF], left.layout)
    right_s = gl.allocate_shared_memory(dtype, [STAGES, SLOTS, BN], right.layout)
    out_s = gl.allocate_shared_memory(dtype, [2, HALF, BN], out.layout)
    loaded = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    freed = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for s in gl.static_range(STAGES):
        mbarrier.init(loaded.index(s), count=1)
        mbarrier.init(freed.index(s), count=2)
    given_to = left, right, out, choices_ptr, first_tile_ptr
    held = left_s, right_s, out_s, loaded, freed
    gl.warp_specialize(
        [
            (_copier, (given_to, held, E, R, C, TILE, HALF, BN)),
            (_multiply, (given_to, held, E, R, C, TILE, HALF, BN, 0)),
            (_multiply, (given_to, held, E, R, C, TILE, HALF, BN, 1)),
        ],
        [4, 4],
        [216, 216],
    )


@dataclass(frozen=True)
class Halves:
    """Rows and columns of a tile that a warpgroup has."""

    rows: int
    columns: int


def weight_gradient_refusal(left_PR: Tensor, right_PC: Tensor, groups: Groups, tile: Halves) -> str | None:
    """Why the kernel does not take this call; None if it does."""
    if not left_PR.is_cuda or torch.cuda.get_device_capability(left_PR.device)[0] != 9:
        return "the kernel is Hopper's"
    if left_PR.dtype.itemsize != 2:
        return f"rows are {left_PR.dtype}; the kernel takes bfloat16 and float16"
    if left_PR.shape[1] % tile.rows:
        return (
            f"{left_PR.shape[1]} rows of a matrix are no multiple of {tile.rows}: a tile would pass its end"
        )
    if groups.tile not in (64, 128):
        return f"experts' rows are tiles of {groups.tile}; the kernel takes 64 or 128"
    if any(x.shape[1] % 8 or x.data_ptr() % 16 for x in (left_PR, right_PC)):
        return "rows do not begin at multiples of 16 bytes, where TMA wants them"
    return None


def weight_gradient(left_PR: Tensor, right_PC: Tensor, groups: Groups, tile: Halves) -> Tensor:
    """left^T right over the rows of each expert: (E, R, C)."""
    R, C, E = left_PR.shape[1], right_PC.shape[1], groups.n_experts
    out_ERC = left_PR.new_empty(E, R, C)
    layout = gl.NVMMASharedLayout(128, 16, 2)

    def blocks(x: Tensor, rows: int, columns: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(x, [rows, columns], layout)

    tiles = E * triton.cdiv(R, 2 * tile.rows) * triton.cdiv(C, tile.columns)
    weight_gradient_kernel[(min(tiles, num_multiprocessors(left_PR.device.index)),)](
        blocks(left_PR, 64, tile.rows),
        blocks(right_PC, 64, tile.columns),
        blocks(out_ERC.flatten(0, 1), tile.rows, tile.columns),
        groups.choices_P,
        groups.first_tile_E1,
        E=E,
        R=R,
        C=C,
        TILE=groups.tile,
        HALF=tile.rows,
        BN=tile.columns,
        num_warps=4,
    )
    return out_ERC
