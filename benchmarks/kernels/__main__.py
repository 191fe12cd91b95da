"""Every kernel against its limit and its peers.

    python -m benchmarks.kernels [attention experts routing ...] [--only ROW ...] [--out FILE]

An op is one file here with `cases()`; its name goes into OPS.
"""

from __future__ import annotations

import argparse
import shlex
from pathlib import Path

import torch

from benchmarks.kernels import (
    adamw,
    attention,
    block,
    blocks,
    experts,
    harness,
    invariance,
    layers,
    loss,
    quantised,
    routing,
    sampling,
    sparse,
)

OPS = {
    "adamw": adamw.cases,
    "attention": attention.cases,
    "block": block.cases,
    "experts": experts.cases,
    "quantised": quantised.cases,
    "fp8-linears": quantised.linear_cases,
    "routing": routing.cases,
    "layers": layers.cases,
    "loss": loss.cases,
    "sampling": sampling.cases,
    "blocks": blocks.cases,
    "sparse": sparse.cases,
    "sparse-tiles": sparse.tile_cases,
    "narrow-cache": attention.narrow_cases,
    "latent-tiles": attention.tile_cases,
    "invariance": invariance.cases,
}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__)
    parser.add_argument("ops", nargs="*", choices=[*OPS, []], help="which ops; all of them if none is named")
    parser.add_argument("--only", nargs="+", default=[""], help="rows whose op and shape hold one of these")
    parser.add_argument("--out", type=Path, help="Markdown file to append to, with a .jsonl beside it")
    arguments = parser.parse_args()
    for op in arguments.ops or OPS:
        torch.manual_seed(0)
        results = []
        for case in OPS[op]():
            if not any(part in f"{case.op}, {case.shape}" for part in arguments.only):
                continue
            results.append(harness.measure(case))
            print(harness.table(results[-1:]).splitlines()[-1], flush=True)
        if arguments.out:
            only = " --only " + shlex.join(arguments.only) if any(arguments.only) else ""
            harness.write(results, arguments.out, f"python -m benchmarks.kernels {op}{only}")


if __name__ == "__main__":
    main()
