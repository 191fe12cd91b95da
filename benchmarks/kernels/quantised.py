"""Cases of quantised arithmetic: FP8 products of a V3 slice, and what V2-Lite decodes with in FP8 and INT4.

The GEMMs alone are the two grouped products without quantising, grouping and summing; the peer is torch's
`scaled_grouped_mm`, scaled by row, and `scaled_mm` of one matrix, by row and by blocks. The layer is held
against our bfloat16 one, and its note says the error against float64 of a few rows. Floors count narrow
bytes, and e4m3's matrix rate where activations are quantised too.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.kernels.experts import V2_LITE, V3_SLICE, Shape, tokens, weights
from benchmarks.kernels.harness import Call, Case
from shoal.ops import api
from shoal.ops import quantised as ops
from shoal.ops.reference import experts as exact
from shoal.ops.triton import fp8, fp8_linear, quantise
from shoal.ops.triton.permutation import group_by_expert

FP8 = torch.float8_e4m3fn
# Linears of a training step, (tokens, columns out, columns in): what one weight of each size multiplies.
LINEARS = {
    "V2-Lite q": (16384, 3072, 2048),
    "V2-Lite kv_a": (16384, 576, 2048),
    "V2-Lite kv_a, gradient": (16384, 2048, 576),
    "V2-Lite kv_b": (16384, 4096, 512),
    "V2-Lite o": (16384, 2048, 2048),
    "V2-Lite shared gate or up": (16384, 2816, 2048),
    "V2-Lite shared down": (16384, 2048, 2816),
    "V3 q_a": (8192, 1536, 7168),
    "V3 q_b": (8192, 24576, 1536),
    "V3 kv_b": (8192, 32768, 512),
    "V3 o": (8192, 7168, 16384),
    "V3 shared gate or up": (8192, 2048, 7168),
    "V3 shared down": (8192, 7168, 2048),
}


def error_of(
    y_TD: Tensor, inputs: tuple[Tensor, ...], matrices: tuple[Tensor, Tensor], rows: int = 16
) -> float:
    """||y - y64|| / ||y64|| over some rows, whose own experts alone become float64."""
    off = size = 0.0
    for t in range(0, y_TD.shape[0], max(1, y_TD.shape[0] // rows)):
        x_TD, experts_TK, weights_TK = (tensor[t : t + 1] for tensor in inputs)
        own = [matrix[experts_TK[0]].double() for matrix in matrices]
        chosen_1K = torch.arange(experts_TK.shape[1], device=x_TD.device).unsqueeze(0)
        wanted = exact.grouped_mlp(x_TD.double(), chosen_1K, weights_TK.double(), *own)
        off += float((y_TD[t].double() - wanted).square().sum())
        size += float(wanted.square().sum())
    return (off / size) ** 0.5


def narrow(matrices: tuple[Tensor, Tensor], scheme: str) -> tuple[ops.Weight, ops.Weight]:
    if scheme == "fp8":
        return ops.quantise_blocks(matrices[0].unflatten(1, (2, -1))), ops.quantise_blocks(matrices[1])
    # A matrix at a time: the reference widens to float32.
    gate_up, down = (
        ops.Int4Weight(*map(torch.stack, zip(*map(ops.quantise_groups, matrix), strict=True)))
        for matrix in (matrices[0].unflatten(1, (2, -1)), matrices[1])
    )
    return gate_up, down


def layer(shape: Shape, count: int) -> Iterator[Case]:
    """FP8 forward of many tokens: the products alone, and the layer."""
    matrices, inputs = weights(shape), tokens(shape, count)
    gate_up, down = narrow(matrices, "fp8")
    x_TD, experts_TK, _ = inputs
    M, K = experts_TK.numel(), experts_TK.shape[1]
    groups = group_by_expert(experts_TK, shape.n_experts, 128)
    rows = quantise.quantise_rows(x_TD)

    def products() -> Tensor:
        h, h_scales, _ = fp8.swiglu(*rows, *gate_up, groups, K, torch.bfloat16, save=False)
        return fp8.product(h, h_scales, *down, torch.bfloat16, groups, choices=M)

    calls: dict[str, Sequence[Call]] = {"ours": [products]}
    if theirs := torch_grouped(shape, count):
        calls["torch scaled_grouped_mm"] = [theirs]
    yield Case(
        "FP8 expert products", f"{shape.name}, {count} tokens", shape.flops(count),
        sum(t.nbytes for t in (*gate_up, *down)), calls, target="800 TFLOP/s", dtype=FP8,
    )  # fmt: skip
    y_TD = ops.quantised_mlp(*inputs, gate_up, down)
    off = error_of(y_TD, inputs, matrices)
    yield Case(
        "FP8 experts forward", f"{shape.name}, {count} tokens", shape.flops(count),
        sum(t.nbytes for t in (*gate_up, *down)) + 2 * x_TD.nbytes,
        {
            "ours": [lambda: ops.quantised_mlp(*inputs, gate_up, down)],
            "ours bf16": [lambda: api.grouped_mlp(*inputs, *matrices)],
            "quantising x": [lambda: quantise.quantise_rows(x_TD)],
            "quantising the weights": [
                lambda: (quantise.quantise_blocks(matrices[0]), quantise.quantise_blocks(matrices[1]))
            ],
        },
        target="1.3 x bf16, error under 7%", dtype=FP8, note=f"relative error {off:.2%}",
    )  # fmt: skip


def torch_grouped(shape: Shape, count: int) -> Call | None:
    """Two grouped products of torch's, scaled by row, tokens spread evenly; None where it has none."""
    E, M = shape.n_experts, count * shape.top_k
    ends_E = torch.arange(1, E + 1, device="cuda", dtype=torch.int32) * (M // E)
    calls = []
    for n, k in ((2 * shape.inner, shape.hidden), (shape.hidden, shape.inner)):
        a, w = torch.randn(M, k, device="cuda").to(FP8), torch.randn(E, n, k, device="cuda").to(FP8)
        scales = torch.ones(M, device="cuda"), torch.ones(E, n, device="cuda")
        calls.append(
            partial(
                torch._scaled_grouped_mm,
                a,
                w.mT,
                *scales,
                offs=ends_E,
                out_dtype=torch.bfloat16,
                use_fast_accum=True,
            )
        )

    def run() -> None:
        for call in calls:
            call()

    return run if _runs("scaled_grouped_mm", run) else None


def _runs(name: str, call: Call) -> bool:
    try:
        call()
        torch.cuda.synchronize()
    except (RuntimeError, ValueError, AttributeError) as error:
        print(f"no {name}: {str(error).splitlines()[0]}")
        return False
    return True


def dense(tokens_: int, n: int, k: int, name: str = "") -> Case:
    """A linear's product, and of cuBLAS what it takes: scaled by row, by DeepSeek's blocks, in bfloat16; the
    gradient of its weight (both operands 1 x 128 along the tokens), quantised operands given; and casts."""
    x, w = torch.randn(tokens_, k, device="cuda").bfloat16(), torch.randn(n, k, device="cuda").bfloat16()
    rows, blocks = quantise.quantise_rows(x), quantise.quantise_blocks(w)
    ones = torch.ones(tokens_, 1, device="cuda"), torch.ones(1, n, device="cuda")
    dy = torch.randn(tokens_, n, device="cuda").bfloat16()
    tall, dy_t, x_t = (quantise.quantise_rows(t, tall=True) for t in (x, dy.mT, x.mT))

    def by_row() -> Tensor:
        return torch._scaled_mm(rows[0], blocks[0].mT, *ones, out_dtype=torch.bfloat16, use_fast_accum=True)

    def of_weight() -> Tensor:
        one = F.ScalingType.BlockWise1x128
        return F.scaled_mm(dy_t[0], x_t[0].mT, dy_t[1], one, x_t[1], one, output_dtype=torch.bfloat16)

    theirs = {
        "cuBLAS by row": by_row,
        "cuBLAS by blocks": lambda: fp8_linear.cublas_product(*tall, *blocks, torch.bfloat16),
        "gradient of the weight, FP8": of_weight,
    }
    own = {
        "bf16": lambda: F.linear(x, w),
        "gradient of the weight, bf16": lambda: dy.mT @ x,
        "quantising x": lambda: quantise.quantise_rows(x, tall=True),
        "quantising W both ways": lambda: quantise.quantise_both(w),
    }
    calls: dict[str, Sequence[Call]] = {"ours": [lambda: fp8.product(*rows, *blocks, torch.bfloat16)]}
    calls |= {peer: [call] for peer, call in theirs.items() if _runs(f"{peer}, {name}", call)}
    calls |= {peer: [call] for peer, call in own.items()}
    return Case(
        "FP8 product", f"{name}: {tokens_} x {n} x {k}" if name else f"{tokens_} x {n} x {k}",
        2.0 * tokens_ * n * k, 0.0, calls, dtype=FP8,
    )  # fmt: skip


def linear_cases() -> Iterator[Case]:
    for name, (tokens_, n, k) in LINEARS.items():
        yield dense(tokens_, n, k, name)


def decode(shape: Shape, matrices: tuple[Tensor, Tensor], count: int, scheme: str) -> Case:
    gate_up, down = narrow(matrices, scheme)
    sets = [tokens(shape, count) for _ in range(8)]
    share = sum(t.nbytes for t in (*gate_up, *down)) / shape.n_experts
    touched = sum(s[1].unique().numel() for s in sets) / len(sets)
    y_TD = ops.quantised_mlp(*sets[0], gate_up, down)
    return Case(
        f"{scheme} experts decoding", f"{shape.name}, {count} tokens", shape.flops(count),
        touched * share + 4 * count * shape.hidden,
        {
            "ours": [partial(ops.quantised_mlp, *s, gate_up, down) for s in sets],
            "ours bf16": [partial(api.grouped_mlp, *s, *matrices) for s in sets],
        },
        target={"fp8": "1.6 x bf16", "int4": "2.6 x bf16"}[scheme] if count == 32 else "",
        note=f"relative error {error_of(y_TD, sets[0], matrices):.2%}",
    )  # fmt: skip


def linears(rows: int, scheme: str) -> Case:
    """The linears of a block of V2-Lite: queries and latents, output, and the shared experts."""
    x, h = (torch.randn(rows, c, device="cuda").bfloat16() for c in (2048, 2816))
    sets: list[list[tuple[Tensor, ...]]] = []
    for _ in range(20):  # whatever the width, more than the L2 holds
        sizes = ((x, (3072, 576)), (x, (2048,)), (x, (2816, 2816)), (h, (2048,)))
        sets.append(
            [tuple(torch.randn(n, a.shape[1], device="cuda").bfloat16() for n in ns) for a, ns in sizes]
        )
    one = ops.quantise_blocks if scheme == "fp8" else ops.quantise_groups
    small = [[[one(w) for w in together] for together in block] for block in sets]

    def ours(block: list[list[ops.Weight]]) -> None:
        for a, together in zip((x, x, x, h), block, strict=True):
            ops.quantised_linears(a, together)

    def wide(block: list[tuple[Tensor, ...]]) -> None:
        for a, together in zip((x, x, x, h), block, strict=True):
            api.linears(a, together, (None,) * len(together))

    flat = [t for together in small[0] for weight in together for t in weight]
    return Case(
        f"{scheme} linears", f"a block of V2-Lite, {rows} rows",
        2.0 * rows * sum(w.numel() for together in sets[0] for w in together),
        sum(t.nbytes for t in flat),
        {"ours": [partial(ours, block) for block in small], "ours bf16": [partial(wide, b) for b in sets]},
        target="4 launches of 5 us" if rows == 32 else "",
    )  # fmt: skip


def cases() -> Iterator[Case]:
    for scheme in ("fp8", "int4"):
        for rows in (1, 32):
            yield linears(rows, scheme)
    matrices = weights(V2_LITE)
    for scheme in ("fp8", "int4"):
        for count in (1, 8, 32):
            yield decode(V2_LITE, matrices, count, scheme)
    yield from layer(V2_LITE, 8192)
    del matrices
    yield from layer(V3_SLICE, 8192)
    yield dense(8192, 7168, 2048)
    yield dense(8192, 8192, 8192)
