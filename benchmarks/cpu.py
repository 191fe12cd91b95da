"""The quickstart's model on this CPU: training and cached decoding, beside transformers and the machine's own
limit.

    uv run python benchmarks/cpu.py [--threads N] [--rounds N] [--only training|decoding]

Same shape, weights of the same birth, same random tokens, float32 on both sides. Transformers runs with each
of its `experts_implementation`s and the fastest counts. Ours and theirs take turns and each ratio is taken
within a turn, since the clock of a shared machine wanders. The limit is the time that the FLOPs of
`config.cost` take at the rate of a large float32 product, measured in the same turn. Peak memory is of a
process of its own for each side, less what it has after imports. MTP is off in the comparison, which
transformers does not train; its cost is a row of its own.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from shoal.batch import Batch
from shoal.config import cost
from shoal.config.hf import to_hf
from shoal.config.model import ModelConfig
from shoal.engine.engine import Engine, EngineSettings
from shoal.engine.sequence import SamplingParams
from shoal.model.transformer import Transformer
from shoal.stages.quickstart import MODEL
from shoal.train.loss import NextToken
from shoal.train.objective import Step

SEQUENCES, LENGTH = 8, 512  # of a training step
PROMPT, NEW = 64, 48  # of a decoded sequence
IMPLEMENTATIONS = ("eager", "grouped_mm")
DECODING = (*IMPLEMENTATIONS, "batched_mm")  # which copies weights: 50 times slower in training
CONFIG = replace(MODEL, num_nextn_predict_layers=0)


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(8, CONFIG.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def our_model(config: ModelConfig = CONFIG) -> Transformer:
    model = Transformer(config)
    model.init_weights(torch.Generator().manual_seed(0))
    return model


def their_model(experts: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields = to_hf(CONFIG)
    config = AutoConfig.for_model(fields.pop("model_type"), **fields)
    return AutoModelForCausalLM.from_config(config, experts_implementation=experts)


def our_training(config: ModelConfig = CONFIG) -> Callable[[], None]:
    model = our_model(config)
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    objective = NextToken(config.num_nextn_predict_layers, mtp_weight=0.3, balance_weight=1e-4)
    ids = tokens(SEQUENCES, LENGTH)
    weights = torch.ones(SEQUENCES, LENGTH)
    weights[:, -1] = 0
    batch = Batch(
        ids_T=ids.flatten(),
        positions_T=torch.arange(LENGTH).repeat(SEQUENCES),
        cu_seqlens_S1=torch.arange(0, ids.numel() + 1, LENGTH, dtype=torch.int32),
        max_seqlen=LENGTH,
        targets_T=ids.roll(-1, 1).flatten(),
        weights_T=weights.flatten(),
    )

    def step() -> None:
        objective.compute(model, batch, Step(0, 1, objective.count([batch]))).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def their_training(experts: str) -> Callable[[], None]:
    model = their_model(experts).train()
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)
    ids = tokens(SEQUENCES, LENGTH)

    def step() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def our_decoding(sequences: int) -> Callable[[], float]:
    """Seconds a step of decoding, the prompt's step apart."""
    engine = Engine(our_model().eval(), EngineSettings(cache_bytes=1 << 26, prefix_cache=False))
    params = SamplingParams(temperature=0, max_tokens=NEW, ignore_eos=True)

    def run() -> float:
        for prompt in tokens(sequences, PROMPT).tolist():
            engine.add(prompt, params)
        engine.step()
        start = time.perf_counter()
        while engine.busy:
            engine.step()
        return (time.perf_counter() - start) / (NEW - 1)

    return run


def their_decoding(sequences: int, experts: str) -> Callable[[], float]:
    """The same through generate(), the prompt's step taken off by a second run that makes one token."""
    model = their_model(experts).eval()
    ids = tokens(sequences, PROMPT)

    def generate(new: int) -> float:
        start = time.perf_counter()
        model.generate(ids, max_new_tokens=new, min_new_tokens=new, do_sample=False, pad_token_id=2)
        return time.perf_counter() - start

    return lambda: (generate(NEW) - generate(1)) / (NEW - 1)


def timed(step: Callable[[], None]) -> Callable[[], float]:
    def run() -> float:
        start = time.perf_counter()
        step()
        return time.perf_counter() - start

    return run


def matmul_rate() -> float:
    """FLOP/s of a float32 product of 1024 x 1024 matrices."""
    a, b = torch.randn(1024, 1024), torch.randn(1024, 1024)
    start = time.perf_counter()
    for _ in range(8):
        torch.mm(a, b)
    return 8 * 2 * 1024**3 / (time.perf_counter() - start)


def compare(sides: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each side, a value a round; the first round warms up and is dropped."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(rounds + 1):
        for name, run in sides.items():
            value = run()
            if turn:
                seconds[name].append(value)
    return seconds


def row(
    what: str, work: int, flops: float, sides: dict[str, Callable[[], float]], rounds: int
) -> dict[str, Any]:
    """`work` tokens and `flops` a call; the side named "shoal" against the fastest other."""
    rate = statistics.median(matmul_rate() for _ in range(5))
    seconds = compare(sides, rounds)
    middle = {name: statistics.median(values) for name, values in seconds.items()}
    peer = min((name for name in sides if name != "shoal"), key=middle.__getitem__)
    return {
        "what": what,
        "shoal tok/s": round(work / middle["shoal"]),
        "transformers tok/s": round(work / middle[peer]),
        "peer": peer,
        "ratio": round(
            statistics.median(b / a for a, b in zip(seconds["shoal"], seconds[peer], strict=True)), 2
        ),
        "of matmul rate": round(flops / rate / middle["shoal"], 2),
        "matmul GFLOP/s": round(rate / 1e9),
    }


def peak_memory(side: str) -> int:
    """Bytes a process of its own grows by to train or decode."""
    command = [sys.executable, __file__, "--memory", side, "--threads", str(torch.get_num_threads())]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def print_peak_memory(side: str) -> None:
    who, what, *rest = side.split()
    if who == "transformers":
        import transformers.models.deepseek_v3.modeling_deepseek_v3  # noqa: F401  its imports are not its work
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts over from what is resident now
    before = resident_peak()
    if what == "training":
        step = our_training() if who == "shoal" else their_training(*rest)
        for _ in range(3):
            step()
    else:
        run = our_decoding(8) if who == "shoal" else their_decoding(8, *rest)
        run()
    print(resident_peak() - before)


def resident_peak() -> int:
    """Bytes, from Linux: getrusage would count the parent's peak too."""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(status.split("VmHWM:")[1].split()[0])


def measure_training(rounds: int) -> list[dict[str, Any]]:
    step_tokens = SEQUENCES * LENGTH
    flops = step_tokens * cost.flops_per_token(CONFIG, LENGTH, "training")
    theirs = {f"transformers {name}": timed(their_training(name)) for name in IMPLEMENTATIONS}
    result = row("training step", step_tokens, flops, {"shoal": timed(our_training()), **theirs}, rounds)
    with_mtp = compare({"without": timed(our_training()), "with": timed(our_training(MODEL))}, rounds)
    slower = statistics.median(b / a for a, b in zip(with_mtp["without"], with_mtp["with"], strict=True))
    mtp = {"what": "training step with MTP, time against without", "ratio": round(slower, 2)}
    return [result | compare_memory("training", result["peer"]), mtp]


def measure_decoding(rounds: int) -> list[dict[str, Any]]:
    rows = []
    for sequences in (1, 8):
        flops = sequences * cost.flops_per_token(CONFIG, PROMPT + NEW // 2, "decode")
        theirs = {f"transformers {name}": their_decoding(sequences, name) for name in DECODING}
        sides = {"shoal": our_decoding(sequences), **theirs}
        rows.append(row(f"decoding, batch {sequences}", sequences, flops, sides, rounds))
    return [*rows[:-1], rows[-1] | compare_memory("decoding", rows[-1]["peer"])]


def compare_memory(what: str, peer: str) -> dict[str, int]:
    ours, theirs = peak_memory(f"shoal {what}"), peak_memory(f"transformers {what} {peer.split()[1]}")
    return {"shoal MiB": ours >> 20, "transformers MiB": theirs >> 20}


MEASURES = {"training": measure_training, "decoding": measure_decoding}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--only", choices=tuple(MEASURES))
    parser.add_argument("--memory", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    if arguments.memory:
        print_peak_memory(arguments.memory)
        return
    names = [arguments.only] if arguments.only else list(MEASURES)
    rows = [result for name in names for result in MEASURES[name](arguments.rounds)]
    for result in rows:
        print(json.dumps(result))
    where = (
        Path(__file__).parent
        / "results"
        / f"{datetime.now(UTC):%Y-%m-%d}-cpu-{arguments.threads}-threads.jsonl"
    )
    where.parent.mkdir(exist_ok=True)
    with where.open("a") as file:
        file.writelines(json.dumps(result) + "\n" for result in rows)


if __name__ == "__main__":
    main()
