"""The loss in FP8 beside bfloat16: one model, one text, one order; all that differs is the products.

    python -m benchmarks.precision run SHARD --precision fp8 --out fp8.jsonl
    python -m benchmarks.precision run SHARD --precision bfloat16 --out bfloat16.jsonl
    python -m benchmarks.precision compare bfloat16.jsonl fp8.jsonl [OF-ANOTHER-SEED.jsonl ...]

V2-Lite's shape with all of its layers, from its first weights (deviation 0.006, as DeepSeek-V2 was born), by
the Trainer's own steps: bfloat16 weights rounded at random, 8-bit moments, gradients clipped to a norm of 1
as a whole, a linear warm-up, then a cosine. Inside backward, which clips by the norm before, gradients of 36
to 177 times the usual come through in the first 40 steps, and chance decides a run (LOG, 2026-11-29). A seed
is that of the weights; the order of the text is the same for all. What is compared is the mean loss of the
last 50 steps: both sides read the same tokens there, so what is left is how far two runs part that differ by
roundings alone. Runs of another seed say how far chance takes them.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.train import DEVICE, LEAN
from shoal.config.families import family, tiny
from shoal.config.run import BalanceConfig, TrainConfig
from shoal.data.pack import Packer
from shoal.data.shard import Shard
from shoal.model.transformer import Transformer
from shoal.train.fp8 import multiply_in_fp8
from shoal.train.trainer import Trainer

LAST = 50  # steps whose mean loss is compared
WANTED = 0.0025  # of the loss, at most


def run(arguments: Any) -> None:
    shard = Shard.open(arguments.shard)
    config = tiny(arguments.model) if arguments.tiny else family(arguments.model).config
    vocab_size = max(config.vocab_size, shard.vocab_size)
    config = replace(config, vocab_size=vocab_size, initializer_range=0.006)
    model = Transformer(config, device="meta", dtype=torch.bfloat16)
    model.allocate(DEVICE)
    generator = torch.Generator(DEVICE).manual_seed(arguments.seed)
    model.init_weights(generator)
    if arguments.precision == "fp8":
        multiply_in_fp8(model)
    warmed = {"lr": arguments.lr, "warmup_steps": arguments.warmup, "schedule": "cosine"}
    optim = replace(LEAN, in_backward=False, **warmed)
    settings = TrainConfig(arguments.steps, optim=optim, balance=BalanceConfig(sequence_loss=1e-3))
    packer = Packer(shard, arguments.tokens, arguments.length, 0)
    with tempfile.TemporaryDirectory() as folder, arguments.out.open("w") as file:
        trainer = Trainer(model.train(), packer.batch, settings, Path(folder), generator=generator)
        begun = time.perf_counter()
        for _ in range(arguments.steps):
            report, _ = trainer.train_step()
            told = {"precision": arguments.precision, "seed": arguments.seed, "step": report.step}
            told |= {"loss": report.terms["loss"], "grad_norm": report.grad_norm, "lr": report.lr}
            told |= {"seconds": round(time.perf_counter() - begun, 3), "peak_bytes": report.peak_bytes}
            file.write(json.dumps(told) + "\n")
            file.flush()


def compare(first: list[float], other: list[float]) -> tuple[float, float]:
    """How much larger the other's mean loss is in the last steps that both have, as a share of the first's,
    and the standard deviation of a step's difference, as the same share."""
    steps = min(len(first), len(other))
    pairs = list(zip(first[:steps], other[:steps], strict=True))[-LAST:]
    mean = statistics.fmean(loss for loss, _ in pairs)
    apart = [(theirs - ours) / mean for ours, theirs in pairs]
    return statistics.fmean(apart), statistics.pstdev(apart)


def table(paths: list[Path]) -> str:
    runs = [[json.loads(line) for line in path.read_text().splitlines()] for path in paths]
    names = [f"{rows[0]['precision']}, seed {rows[0]['seed']}" for rows in runs]
    losses = [[row["loss"] for row in rows] for rows in runs]
    steps = min(map(len, losses))
    lines = ["| mean loss of steps | " + " | ".join(names) + " |", "|---" * (1 + len(runs)) + "|"]
    for first in range(steps % LAST, steps, LAST):
        means = " | ".join(f"{statistics.fmean(run[first : first + LAST]):.4f}" for run in losses)
        lines.append(f"| {first + 1} to {first + LAST} | {means} |")
    lines.append("| ms a step | " + " | ".join(f"{pace(rows):.0f}" for rows in runs) + " |")
    lines += [f"\n| last {LAST} of {steps} steps | against | loss | spread of a step's |", "|---" * 4 + "|"]
    for place, name in enumerate(names):
        for against in range(place):
            off, spread = compare(losses[against], losses[place])
            lines.append(f"| {name} | {names[against]} | {off:+.3%} | {spread:.3%} |")
    lines.append(f"\nWanted: fp8 within {WANTED:.2%} of bfloat16 of the same seed.")
    return "\n".join(lines)


def pace(rows: list[dict[str, Any]]) -> float:
    """Milliseconds a step, of the second half."""
    half = rows[len(rows) // 2 :]
    return 1e3 * (half[-1]["seconds"] - half[0]["seconds"]) / max(1, len(half) - 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.precision",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    verbs = parser.add_subparsers(required=True)
    one = verbs.add_parser("run", help="train, a line a step")
    one.set_defaults(do=run)
    one.add_argument("shard", type=Path, help="of `shoal data pack`")
    one.add_argument("--precision", choices=["bfloat16", "fp8"], required=True)
    one.add_argument("--out", type=Path, required=True)
    one.add_argument("--model", default="deepseek-v2-lite")
    one.add_argument("--tiny", action="store_true", help="its twin, to see that it runs")
    one.add_argument("--seed", type=int, default=0)
    one.add_argument("--steps", type=int, default=300)
    one.add_argument("--tokens", type=int, default=4096, help="a step")
    one.add_argument("--length", type=int, default=4096, help="of a sequence, at most")
    one.add_argument("--lr", type=float, default=1e-4)
    one.add_argument("--warmup", type=int, default=60)
    several = verbs.add_parser("compare", help="what runs came to, against the first")
    several.set_defaults(do=lambda arguments: print(table(arguments.runs)))
    several.add_argument("runs", nargs="+", type=Path)
    arguments: Any = parser.parse_args()
    arguments.do(arguments)


if __name__ == "__main__":
    main()
