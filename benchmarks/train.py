"""Whole training steps on one GPU: tokens a second, the share of the matrix rate, and peak memory.

`python -m benchmarks.train [CASES] [--pairs [PAIRS]] [--out FILE.md]`. bf16, random ids, sequences of 4096
packed with document masks. FLOPs are config/cost.py's: products with active weights, head included, and
causal attention (a token sees half of its sequence); 16.41 GFLOP a token for V2-Lite. Shares are of the
H200's 797 TFLOP/s in a burst and 666 sustained. `step` is the Trainer's own: loss, backward with the
optimizer inside, clipping, balance, and what it reports. The peer is transformers with grouped_mm, without
optimizer and without document masks. Times are medians of wall-clock between synchronisations. A pair is two
cases in one run: in turns, a step of each, where both fit the device, so that its heat is the same for both;
else one after the other. Python's garbage is collected once a step, ours and the peer's, as the Trainer does.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import gc
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from shoal.batch import Batch
from shoal.config.cost import flops_per_token, params
from shoal.config.families import family
from shoal.config.hf import to_hf
from shoal.config.model import GQAConfig, ModelConfig, MoEConfig
from shoal.config.run import BalanceConfig, OptimConfig, Recompute, TrainConfig
from shoal.model.transformer import Transformer
from shoal.train import garbage
from shoal.train.fp8 import multiply_in_fp8
from shoal.train.loss import NextToken
from shoal.train.objective import Step
from shoal.train.recompute import recompute
from shoal.train.trainer import Trainer

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # a CPU shows that it runs, at a tiny config
BURST, SUSTAINED = 797e12, 666e12
GIB = 1 << 30
V2_LITE = family("deepseek-v2-lite").config
# 1B active, 7B in all: 128 fine experts of width 768, the layer of Qwen3-30B-A3B, eleven of them.
FINE = replace(
    V2_LITE,
    model_type="qwen3_moe",
    num_hidden_layers=11,
    attention=GQAConfig(num_attention_heads=32, num_key_value_heads=4, head_dim=128, qk_norm="head"),
    rope=replace(V2_LITE.rope, interleaved=False, scaling=None),
    moe=MoEConfig(128, 8, 768, norm_topk_prob=True),
    intermediate_size=6144,
)
LEAN = OptimConfig(lr=1e-5, master="bfloat16", moments="int8", in_backward=True)
FULL = OptimConfig(lr=1e-5, master="float32", moments="float32", in_backward=True)


@dataclass(frozen=True)
class Case:
    """What is run: `optim` None is forward and backward alone, gradients kept over a step, at whose end
    weights count as changed."""

    name: str
    config: ModelConfig
    sequences: int = 4
    length: int = 4096
    accumulation: int = 1  # micro-batches a step, of so many sequences each
    optim: OptimConfig | None = None
    recompute: Recompute = "none"
    sequence_loss: float = 1e-4
    fp8: bool = False
    peer: str | None = None  # eager or compiled: transformers


@dataclass(frozen=True)
class Result:
    case: str
    tokens: int
    tokens_per_second: float
    tflops: float
    burst: float
    sustained: float
    weights_gib: float
    peak_gib: float
    ms: float
    note: str = ""


@dataclass(frozen=True)
class Pair:
    """The tokens a second of one case over another's, and how many are wanted."""

    name: str
    case: str
    against: str
    wanted: float
    in_turns: bool = True


PAIRS = {
    pair.name: pair
    for pair in (
        Pair("fp8", "v2-lite-fp8", "v2-lite", 1.1),
        Pair("fp8-4", "v2-lite-fp8-4", "v2-lite-4", 1.1),
        Pair("sequence-loss", "v2-lite", "v2-lite-no-sequence-loss", 0.99),
        Pair("mtp", "v2-lite-mtp-step", "v2-lite-step-selective", 0.85, in_turns=False),
        Pair("compiled-8k", "v2-lite-8k", "peer-compiled-8k", 1.1),
        Pair("compiled", "v2-lite", "peer-compiled", 1.1, in_turns=False),
    )
}


def cases() -> dict[str, Case]:
    mtp = replace(V2_LITE, num_nextn_predict_layers=1)
    plain = Case("", V2_LITE)
    rows = [
        replace(plain, name="v2-lite"),
        replace(plain, name="v2-lite-fp8", fp8=True),
        replace(plain, name="v2-lite-4", accumulation=4),
        replace(plain, name="v2-lite-fp8-4", accumulation=4, fp8=True),
        replace(plain, name="v2-lite-step", optim=LEAN),
        replace(plain, name="v2-lite-fp8-step", optim=LEAN, fp8=True),
        replace(plain, name="v2-lite-step-selective", optim=LEAN, recompute="selective"),
        replace(plain, name="v2-lite-step-full-32k", optim=LEAN, recompute="full", sequences=8),
        replace(plain, name="v2-lite-no-sequence-loss", sequence_loss=0.0),
        replace(plain, name="v2-lite-mtp-step", config=mtp, optim=LEAN, recompute="selective"),
        replace(plain, name="v2-lite-8k", sequences=2),
        replace(plain, name="fine", config=FINE),
        replace(plain, name="fine-step", config=FINE, optim=FULL),
        replace(plain, name="fine-step-32k", config=FINE, optim=FULL, sequences=8),
        replace(plain, name="peer-eager-8k", peer="eager", sequences=2),
        replace(plain, name="peer-eager", peer="eager"),
        replace(plain, name="peer-compiled-8k", peer="compiled", sequences=2),
        replace(plain, name="peer-compiled", peer="compiled"),
    ]
    return {row.name: row for row in rows}


def batch(case: Case, seed: int) -> Batch:
    generator = torch.Generator(DEVICE).manual_seed(seed)
    tokens = case.sequences * case.length
    ids_T = torch.randint(0, case.config.vocab_size, (tokens,), generator=generator, device=DEVICE)
    ends_S1 = torch.arange(0, tokens + 1, case.length, device=DEVICE)
    weights_T = torch.ones(tokens, device=DEVICE).index_fill_(0, ends_S1[1:] - 1, 0.0)
    return Batch(
        ids_T=ids_T,
        positions_T=torch.arange(case.length, device=DEVICE).repeat(case.sequences),
        cu_seqlens_S1=ends_S1.int(),
        max_seqlen=case.length,
        targets_T=ids_T.roll(-1),
        weights_T=weights_T,
    )


def born(config: ModelConfig) -> Transformer:
    model = Transformer(config, device="meta", dtype=torch.bfloat16)
    model.allocate(DEVICE)
    model.init_weights(torch.Generator(DEVICE).manual_seed(0))
    return model


def twin(model: Transformer) -> Transformer:
    """Another model over the same weights, with gradients of its own."""
    return copy.deepcopy(model, {id(p): torch.nn.Parameter(p.detach()) for p in model.parameters()})


def ours(case: Case, model: Transformer, folder: Path) -> Callable[[], object]:
    recompute(model, case.recompute)
    if case.fp8:
        keep = "pass" if case.recompute == "none" else "use"
        multiply_in_fp8(model, "step" if case.accumulation > 1 else keep)
    batches = [batch(case, seed) for seed in range(4)]
    if case.optim is not None:
        balance = BalanceConfig(sequence_loss=case.sequence_loss)
        settings = TrainConfig(steps=1_000_000, optim=case.optim, balance=balance)
        generator = torch.Generator(DEVICE).manual_seed(0)
        return Trainer(model, lambda i: batches[i % 4], settings, folder, generator=generator).train_step
    objective = NextToken(0, mtp_weight=0.0, balance_weight=case.sequence_loss)
    batches = batches[: case.accumulation]

    def forward_backward() -> None:
        step = Step(0, 1, objective.count(batches))
        for each in batches:
            objective.compute(model, each, step).total.backward()
        model.zero_grad()
        torch.autograd.graph.increment_version(model.parameters())

    return forward_backward


def theirs(case: Case) -> Callable[[], object]:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.compiler.reset()  # or a second length would be compiled for any
    fields = to_hf(case.config)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    torch.set_default_device(DEVICE)
    torch.set_default_dtype(torch.bfloat16)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="grouped_mm").train()
    torch.set_default_device("cpu")
    torch.set_default_dtype(torch.float32)
    if case.peer == "compiled":
        for layer in model.model.layers:
            layer.compile()
    ids = torch.randint(0, case.config.vocab_size, (case.sequences, case.length), device=DEVICE)

    def forward_backward() -> None:
        hidden_TD = model.model(ids, use_cache=False).last_hidden_state.flatten(0, 1)
        # Their own loss holds all logits in float32, several times 6.7 GB at 16k tokens. A chunk at a time,
        # its gradient made at once, is kinder to them.
        rows_TD = hidden_TD.detach().requires_grad_()
        for rows, targets in zip(rows_TD.split(4096), ids.roll(-1, 1).flatten().split(4096), strict=True):
            logits = model.lm_head(rows).float()
            (F.cross_entropy(logits, targets, reduction="sum") / ids.numel()).backward()
        hidden_TD.backward(rows_TD.grad)
        model.zero_grad()

    return forward_backward


def measure(chosen: Sequence[Case], steps: int) -> list[Result]:
    """Steps of the cases in turns. Of several, the peak is that of all together."""
    gc.collect()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    with contextlib.ExitStack() as stack:
        stack.enter_context(garbage.by_hand())
        runs, built, first = [], [], []
        models: list[Transformer] = []  # whose weights no step changes: one a config
        for case in chosen:
            before, begun = torch.cuda.memory_allocated(), time.perf_counter()
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
            if case.peer:
                run = theirs(case)
            elif case.optim is not None:
                run = ours(case, born(case.config), folder)
            else:
                same = next((model for model in models if model.config == case.config), None)
                models.append(same or born(case.config))
                run = ours(case, twin(models[-1]), folder)
            torch.cuda.synchronize()
            built.append(((torch.cuda.memory_allocated() - before) / GIB, time.perf_counter() - begun))
            begun = time.perf_counter()
            run()
            torch.cuda.synchronize()
            first.append(time.perf_counter() - begun)
            runs.append(run)
        times: list[list[float]] = [[] for _ in runs]
        for turn in range(2 + steps):
            for run, told in zip(runs, times, strict=True):
                start = time.perf_counter()
                run()
                garbage.collect(turn)  # as the Trainer does, and for the peer too
                torch.cuda.synchronize()
                if turn >= 2:
                    told.append(time.perf_counter() - start)
        peak = torch.cuda.max_memory_allocated() / GIB
    results = []
    for case, told, (weights, building), began in zip(chosen, times, built, first, strict=True):
        seconds = statistics.median(told)
        tokens = case.accumulation * case.sequences * case.length
        mtp = case.config.num_nextn_predict_layers > 0
        rate = tokens * flops_per_token(case.config, case.length, mtp=mtp) / seconds
        note = (
            f"spread {min(told) * 1e3:.0f} to {max(told) * 1e3:.0f} ms; built in {building:.1f} s, "
            f"first step {began:.1f} s" + ("; in turns" if len(chosen) > 1 else "")
        )
        results.append(
            Result(
                case.name, tokens, tokens / seconds, rate / 1e12, rate / BURST, rate / SUSTAINED, weights,
                peak, 1e3 * seconds, note,
            )
        )  # fmt: skip
    return results


def compare(pair: Pair, known: dict[str, Case], steps: int) -> tuple[list[Result], str]:
    """Both sides, and a line that says what is faster."""
    both = [known[pair.case], known[pair.against]]
    results = measure(both, steps) if pair.in_turns else [r for case in both for r in measure([case], steps)]
    ratio = results[0].tokens_per_second / results[1].tokens_per_second
    return results, (
        f"| {pair.name} | {pair.case} | {pair.against} | {ratio:.3f} | {pair.wanted} | "
        f"{'yes' if ratio >= pair.wanted else 'no'} |"
    )


PAIR_HEAD = "| pair | case | over | ratio of tokens/s | wanted | reached |" + "\n" + "|---" * 6 + "|"
HEAD = (
    "| case | tokens | tokens/s | TFLOP/s | of 797 | of 666 | built GiB | peak GiB | ms | note |\n"
    + "|---" * 10
    + "|"
)


def row(r: Result) -> str:
    return (
        f"| {r.case} | {r.tokens} | {r.tokens_per_second:,.0f} | {r.tflops:.0f} | {r.burst:.1%} | "
        f"{r.sustained:.1%} | {r.weights_gib:.1f} | {r.peak_gib:.1f} | {r.ms:.0f} | {r.note} |"
    )


def profile(case: Case) -> str:
    """Where the time of a step goes, by kernel."""
    with tempfile.TemporaryDirectory() as folder:
        run = ours(case, born(case.config), Path(folder))
        for _ in range(3):
            run()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities) as told:
            run()
            torch.cuda.synchronize()
    return told.key_averages().table(sort_by="self_cuda_time_total", row_limit=40, max_name_column_width=70)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.train", description=__doc__)
    known = cases()
    parser.add_argument("cases", nargs="*", choices=[*known, []], help="which; all of them if none is named")
    parser.add_argument("--pairs", nargs="*", choices=[*PAIRS], help="and which pairs; all if none is named")
    parser.add_argument("--out", type=Path, help="Markdown file to append to, with a .jsonl beside it")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument(
        "--profile", type=Path, help="write kernel times of the first case here, in place of all"
    )
    arguments: Any = parser.parse_args()
    chosen = [known[name] for name in arguments.cases or (known if arguments.pairs is None else ())]
    pairs = [PAIRS[name] for name in (PAIRS if arguments.pairs == [] else arguments.pairs or ())]
    if arguments.profile:
        arguments.profile.write_text(profile(chosen[0]))
        return
    device = torch.cuda.get_device_name()
    print(f"{device}, torch {torch.__version__}\n{HEAD}", flush=True)
    lines: list[str] = []
    ratios: list[str] = []

    def tell(results: Sequence[Result]) -> None:
        for result in results:
            lines.append(row(result))
            print(lines[-1], flush=True)
            if arguments.out:
                with arguments.out.with_suffix(".jsonl").open("a") as file:
                    total = params(known[result.case].config).total
                    told = {"device": device, "parameters": total, **asdict(result)}
                    file.write(json.dumps(told) + "\n")

    for job in (*chosen, *pairs):
        try:
            if isinstance(job, Pair):
                results, ratio = compare(job, known, arguments.steps)
                ratios.append(ratio)
            else:
                results = measure([job], arguments.steps)
        except torch.OutOfMemoryError as error:
            lines.append(f"| {job.name} | out of memory: {str(error).splitlines()[0][:120]} |")
            print(lines[-1], flush=True)
        else:
            tell(results)
    table = f"{HEAD}\n" + "\n".join(lines) + "\n"
    if ratios:
        told = f"{PAIR_HEAD}\n" + "\n".join(ratios) + "\n"
        print(f"\n{told}", flush=True)
        table += f"\n{told}"
    if arguments.out:
        with arguments.out.open("a") as file:
            file.write(f"\n## {device}, torch {torch.__version__}\n\n{table}")


if __name__ == "__main__":
    main()
