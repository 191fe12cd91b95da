"""How far the choice of DeepSeek sparse attention in FP8 agrees with float32's.

    python -m benchmarks.index [--positions 32768] [--queries 32] [--seed 0]

V3.2's shape: 64 index heads of 128, the best 2048 positions. Queries and keys are random: Gaussian, which
have no best positions to speak of and are the hardest case, and Gaussian with 4 of 128 channels 20 times as
large, as activations have them. Told is the share of float32's choice that is chosen too, mean and least over
queries.
"""

from __future__ import annotations

import argparse

import torch
from torch import Tensor

from shoal.ops import api as ops
from shoal.ops import quantised

HEADS, DIM, TOP = 64, 128, 2048


def scores(q_TJI: Tensor, w_TJ: Tensor, k_NI: Tensor) -> Tensor:
    heads_TJN = torch.matmul(q_TJI.float(), k_NI.float().t()).relu()
    return torch.matmul(w_TJ.unsqueeze(1), heads_TJN).squeeze(1)


def rounded(x: Tensor) -> Tensor:
    """By the same scales without the rotation."""
    most = x.abs().amax(-1, keepdim=True).clamp(min=1e-4)
    scale = (most / 448).log2().ceil().exp2()
    return (x / scale).to(torch.float8_e4m3fn).float() * scale


def narrowed(x: Tensor) -> Tensor:
    values, scales = quantised.narrow_index(x)
    return values.float() * scales.unsqueeze(-1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.index", description=__doc__)
    parser.add_argument("--positions", type=int, default=32768)
    parser.add_argument("--queries", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    told = parser.parse_args()
    draw = torch.Generator().manual_seed(told.seed)
    q_TJI = torch.randn(told.queries, HEADS, DIM, generator=draw)
    k_NI = torch.randn(told.positions, DIM, generator=draw)
    w_TJ = torch.randn(told.queries, HEADS, generator=draw)
    print(f"the best {TOP} of {told.positions:,} positions, {told.queries} queries: share that float32 chose")
    print(f"{'keys and queries':<56}{'mean':>8}{'least':>8}")
    for name, factor in (("Gaussian", 1.0), ("4 channels 20 times as large", 20.0)):
        q, k = q_TJI.clone(), k_NI.clone()
        q[..., :4] *= factor
        k[..., :4] *= factor
        wanted_TN = torch.zeros(told.queries, told.positions, dtype=torch.bool)
        wanted_TN.scatter_(1, ops.select_top(scores(q, w_TJ, k), TOP), True)
        for way, change in (
            ("bfloat16", lambda x: x.bfloat16().float()),
            ("FP8", narrowed),
            ("FP8 without the rotation", rounded),
        ):
            chosen_TK = ops.select_top(scores(change(q), w_TJ, change(k)), TOP)
            share_T = wanted_TN.gather(1, chosen_TK).double().mean(1)
            print(f"{name + ', ' + way:<56}{share_T.mean():>8.3f}{share_T.min():>8.3f}", flush=True)


if __name__ == "__main__":
    main()
