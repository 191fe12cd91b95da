"""Whole training steps on several GPUs: tokens a second by degrees, beside one GPU of the same machine.

`python -m benchmarks.parallel DATAxEXPERTxCONTEXT ... [--out FILE.md]`, such as `1x1x1 2x1x1 1x1x2`; each
starts its own processes. The model is a slice of V2-Lite, its dense layer and the first mixture layers, bf16
with float32 masters and moments; a step is the Trainer's own, of as many tokens as 2 sequences of 4096 have
for each GPU, so the work of a GPU is the same in every row. Times are wall-clock between synchronisations, of
rank 0.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from benchmarks.train import DEVICE, GIB, V2_LITE, Case, batch
from shoal.config.cost import flops_per_token, params
from shoal.config.families import tiny
from shoal.config.run import OptimConfig, ParallelConfig, TrainConfig
from shoal.model.transformer import Transformer
from shoal.parallel.mesh import leave, make_mesh
from shoal.stages.team import make_team
from shoal.train.team import Team
from shoal.train.trainer import Trainer

SLICE = replace(V2_LITE, num_hidden_layers=6)
WARM, STEPS = 3, 8


def work(rank: int, degrees: ParallelConfig, folder: str) -> None:
    case = Case("slice", SLICE, sequences=2 * degrees.context)
    if DEVICE == "cpu":  # to show that it runs
        case = Case("tiny", tiny("deepseek-v2-lite"), sequences=2 * degrees.context, length=64)
    device = torch.device(DEVICE, rank) if DEVICE == "cuda" else torch.device("cpu")
    if DEVICE == "cuda":
        torch.cuda.set_device(device)
    generator = torch.Generator(device).manual_seed(0)
    model = Transformer(case.config, device="meta", dtype=torch.bfloat16)
    model.allocate(device)
    model.init_weights(generator)
    team, mesh = Team(), None
    if degrees.ranks > 1:
        backend = "cpu:gloo,cuda:nccl" if DEVICE == "cuda" else "gloo"
        dist.init_process_group(
            backend, init_method=f"file://{folder}/meeting", rank=rank, world_size=degrees.ranks
        )
        mesh = make_mesh(degrees, device)
        team = make_team(model, mesh)
    batches = [batch(case, seed) for seed in range(4)]
    settings = TrainConfig(
        steps=WARM + STEPS,
        accumulation=degrees.readers,
        optim=OptimConfig(lr=1e-5, schedule="constant"),
    )
    trainer = Trainer(model, lambda i: batches[i % 4], settings, Path(folder), generator=generator, team=team)
    times, loss = list[float](), 0.0
    model.train()
    for _ in range(WARM + STEPS):
        start = time.perf_counter()
        report, _ = trainer.train_step()
        if DEVICE == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
        loss = report.terms["loss"]
    seconds = statistics.median(times[WARM:])
    tokens = case.sequences * case.length * degrees.readers
    rate = tokens * flops_per_token(case.config, case.length, mtp=False) / seconds / degrees.ranks
    if rank == 0:
        told = {
            "degrees": f"{degrees.data}x{degrees.expert}x{degrees.context}",
            "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
            "parameters": params(case.config).total,
            "tokens": tokens,
            "tokens_per_second": tokens / seconds,
            "tflops_per_gpu": rate / 1e12,
            "ms": 1e3 * seconds,
            "peak_gib": torch.cuda.max_memory_allocated() / GIB if DEVICE == "cuda" else 0.0,
            "loss": loss,
            "spread_ms": f"{1e3 * min(times[WARM:]):.1f} to {1e3 * max(times[WARM:]):.1f}",
        }
        Path(folder, "told.json").write_text(json.dumps(told))
    if mesh is not None:
        mesh.gather("all have told")
        leave(0)


def measure(degrees: ParallelConfig) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(work, (degrees, folder), nprocs=degrees.ranks)
        return json.loads(Path(folder, "told.json").read_text())


HEAD = (
    "| degrees | tokens | tokens/s | a GPU, of one alone | TFLOP/s a GPU | ms | spread ms | peak GiB | "
    "loss |\n" + "|---" * 9 + "|"
)


def row(told: dict[str, Any], one: float | None) -> str:
    degrees = str(told["degrees"])
    ranks = math.prod(map(int, degrees.split("x")))
    share = "" if one is None else f"{told['tokens_per_second'] / ranks / one:.1%}"
    return (
        f"| {degrees} | {told['tokens']} | {told['tokens_per_second']:,.0f} | {share} | "
        f"{told['tflops_per_gpu']:.0f} | {told['ms']:.1f} | {told['spread_ms']} | {told['peak_gib']:.1f} | "
        f"{told['loss']:.4f} |"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.parallel", description=__doc__)
    parser.add_argument("degrees", nargs="+", help="such as 1x1x1 2x1x1 1x1x2")
    parser.add_argument("--out", type=Path, help="Markdown file to append to, with a .jsonl beside it")
    arguments = parser.parse_args()
    lines, one = [HEAD], None
    print(HEAD, flush=True)
    for degrees in arguments.degrees:
        data, expert, context = map(int, degrees.split("x"))
        told = measure(mesh := ParallelConfig(data, expert, context=context))
        if mesh.ranks == 1:
            one = told["tokens_per_second"]
        lines.append(row(told, one))
        print(lines[-1], flush=True)
        if arguments.out:
            with arguments.out.with_suffix(".jsonl").open("a") as file:
                file.write(json.dumps(told) + "\n")
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
