"""Which tiles the expert products use: what was measured for the shape on this GPU, or a heuristic for any.

The heuristic is a small table by rows per expert. A plan depends on sizes the host knows (choices, experts,
dtype), never on what was chosen, so nothing waits for the device and a CUDA graph may hold it. The buckets
are fixed: a server warms each once. Every plan adds the products of a row in one order, so a row's result
does not depend on which plan serves it. `plans` keeps what was measured, `expert_tuning` measures.
"""

from __future__ import annotations

import warnings
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from typing import Any

import torch
import triton

from shoal.ops.triton import plans

MAX_SCAN = 64  # choices that a program may scan for its own rows


@dataclass(frozen=True)
class Tile:
    """A program: its rows and columns, the step of the reduction, warps, loads in flight."""

    bm: int
    bn: int
    bk: int
    warps: int
    stages: int
    group: int = 4  # tiles of rows walked before the next tile of columns
    persistent: bool = True  # programs walk tiles; otherwise each has one, and the hardware balances
    flatten: bool = False  # load the next tile under the end of this one: pays where reductions are short


@dataclass(frozen=True)
class Plan:
    """How one call of `grouped_mlp` runs."""

    kind: str  # "scan": few choices, no permutation; "stream": few rows an expert; "tiles": many
    rows: int  # slots of a tile
    tma: bool
    pdl: bool  # each launch is set up while the one before it ends
    gate_up: Tile
    down: Tile
    dh: Tile
    dx: Tile
    dgate_up: Tile
    ddown: Tile


def portable_plan(kind: str, rows: int, *, columns: int = 32, step: int = 16, tma: bool = False) -> Plan:
    """Tiles for any dtype, dims and GPU, and for the interpreter."""
    tile, square = Tile(rows, columns, step, 4, 2), Tile(columns, columns, step, 4, 2)
    return Plan(kind, rows, tma, False, tile, tile, tile, tile, square, square)


_DH = Tile(128, 256, 64, 8, 3, group=8, flatten=True)
_DX = Tile(128, 256, 64, 8, 4, group=8)
_DGATE_UP = Tile(128, 256, 64, 8, 3, group=8)
_DDOWN = Tile(256, 128, 64, 8, 4)

# Measured on an H200, 2026-11-22, on V2-Lite and a slice of V3: most rows per expert, slots, gate-up, down.
_STREAMS = (
    (8, 16, Tile(16, 64, 128, 4, 3), Tile(16, 64, 128, 4, 5)),
    (25, 32, Tile(32, 64, 64, 4, 5), Tile(32, 128, 64, 4, 5)),
    (50, 64, Tile(64, 64, 128, 4, 4), Tile(64, 128, 64, 4, 3)),
)
# With shared experts in the launch, 2026-11-29: 256 tokens of V2-Lite 285 us; 295 in 32 rows, those apart.
_RIDING = Tile(64, 64, 64, 4, 4), Tile(64, 128, 64, 4, 3)
_GATE_UP, _DOWN = Tile(128, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4, flatten=True)
# A tile of 7168 x 64 products takes 80 us: a program of its own costs nothing, and balance is worth 2%.
_LONG, _MANY = 4096, 1000


def choose_plan(
    choices: int, n_experts: int, hidden: int, dtype: torch.dtype, *, tma: bool, training: bool
) -> Plan:
    """The plan for `choices` rows over `n_experts`; `tma`: sizes, strides and device allow it."""
    few = choices <= MAX_SCAN and not training
    if not tma or dtype == torch.float32:
        columns, step = (32, 16) if dtype == torch.float32 else (64, 32)
        return portable_plan("scan" if few else "tiles", 16 if few else 64, columns=columns, step=step)
    backward = (_DH, _DX, _DGATE_UP, _DDOWN)
    for most, rows, gate_up, down in _STREAMS:
        if not training and (few or choices <= most * n_experts):
            return Plan("scan" if few else "stream", rows, True, True, gate_up, down, *backward)
    persistent = hidden < _LONG or choices < _MANY * n_experts
    return Plan("tiles", 128, True, True, replace(_GATE_UP, persistent=persistent), _DOWN, *backward)


def wider(plan: Plan) -> tuple[Plan, ...]:
    """A plan, and one of twice the rows where there is one: for what every tile of rows reads again."""
    gate_up, down = _RIDING
    if plan.kind != "stream" or not plan.tma or 2 * plan.rows != gate_up.bm:
        return (plan,)
    return plan, replace(plan, rows=gate_up.bm, gate_up=gate_up, down=down)


# Choices up to which one plan serves, half octaves apart. Up to MAX_SCAN choices a plan scans; above the last
# bucket the heuristic sees the size itself.
BUCKETS = (MAX_SCAN, 96, *(size for power in range(7, 18) for size in (2**power, 3 * 2 ** (power - 1))))


def bucket_of(choices: int) -> int:
    """The smallest bucket that holds them, or as many where none does."""
    return next((bucket for bucket in BUCKETS if bucket >= choices), choices)


def shape_name(n_experts: int, hidden: int, inner: int, dtype: torch.dtype) -> str:
    """What a measured plan of `grouped_mlp` holds for."""
    return f"grouped_mlp {str(dtype).removeprefix('torch.')} E{n_experts} D{hidden} F{inner}"


def plan_fields(plan: Plan) -> dict[str, Any]:
    """The part of a plan that is measured: the forward pass."""
    return {
        name: value for name, value in asdict(plan).items() if name in ("kind", "rows", "gate_up", "down")
    }


def with_fields(plan: Plan, fields: dict[str, Any]) -> Plan:
    """A plan with the measured part. ValueError if the fields are not those of a plan."""
    try:
        gate_up, down = Tile(**fields["gate_up"]), Tile(**fields["down"])
        kind, rows = fields["kind"], fields["rows"]
    except (KeyError, TypeError) as error:
        raise ValueError(f"these are not the fields of a plan ({error}): {fields}") from None
    sound = kind in ("scan", "stream", "tiles") and (kind == "scan") == (plan.kind == "scan")
    if not sound or not rows == gate_up.bm == down.bm:
        raise ValueError(f"a plan of kind {kind} and {rows} rows does not fit this call: {fields}")
    return replace(plan, kind=kind, rows=rows, gate_up=gate_up, down=down)


@lru_cache(maxsize=4096)
def find_plan(
    index: int | None, choices: int, n_experts: int, hidden: int, inner: int, dtype: torch.dtype
) -> Plan:
    """The plan of a forward pass on a CUDA device with TMA: the measured one of its bucket, or the
    heuristic's for that.
    """
    choices = bucket_of(choices)
    plan = choose_plan(choices, n_experts, hidden, dtype, tma=True, training=False)
    if dtype == torch.float32:
        return plan
    fields = plans.find(plans.tables(index), shape_name(n_experts, hidden, inner, dtype), choices)
    if fields is None:
        return plan
    try:
        return with_fields(plan, fields)
    except ValueError as error:
        warnings.warn(f"a measured plan is left alone, and the heuristic serves: {error}", stacklevel=2)
        return plan


@lru_cache
def num_multiprocessors(index: int | None) -> int:
    """Of the device; a few under the interpreter."""
    return 4 if index is None else torch.cuda.get_device_properties(index).multi_processor_count


def num_programs(tile: Tile, tiles: int, columns: int, multiprocessors: int) -> int:
    """One a multiprocessor if they are persistent, and no more than there are tiles at most."""
    most = max(1, tiles * triton.cdiv(columns, tile.bn))
    return min(multiprocessors, most) if tile.persistent else most
