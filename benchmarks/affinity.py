"""Batches by affinity: does admitting alike requests together touch fewer experts, and does that pay?

    uv run python benchmarks/affinity.py --data DATA [--model EXPORT] [--rounds N]

DATA holds pretrain/en-000.jsonl.zst and zh-000.jsonl.zst (or as .jsonl); Python's standard library is the
third domain. Without EXPORT a small model with V2-Lite's 64 experts, 6 a token, is trained first, by
`stages.pretrain`. Then a queue of requests of all domains, mixed, is served by two engines that differ in
`affinity` alone, in turns, and each ratio is taken within a turn. Distinct experts are the engine's own
count, a step and layer. Latency is from arrival (all at once) to the last token. With one thread seconds are
the process's own, so that others on the machine do not count; with more they are the clock's.

What fewer experts would be worth on an H200 at V2-Lite's shape is derived by analysis/planner, not measured:
the step's bytes with the routed part scaled by the measured ratio.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.analysis import planner
from shoal.checkpoint import hf
from shoal.config import cost
from shoal.config.families import family
from shoal.config.hardware import gpu
from shoal.config.run import BalanceConfig, DataConfig, OptimConfig, RunConfig, SourceConfig, TrainConfig
from shoal.data.read import read_documents, standard_library
from shoal.data.text import Tokenizer
from shoal.engine import Engine, EngineSettings, SamplingParams
from shoal.engine.order import Affinity
from shoal.engine.sequence import Sequence as Request
from shoal.model.transformer import Transformer
from shoal.stages import pretrain
from shoal.stages.quickstart import MODEL

DOMAINS = ("en", "zh", "py")
TEXT = 600_000  # characters of a domain, of which a share is held out
PROMPT, NEW = 48, 32  # tokens of a request
PATIENCE = 64


def texts(data: Path, domain: str) -> list[str]:
    """Documents of a domain, up to `TEXT` characters."""
    if domain == "py":
        documents = standard_library()
    else:
        documents = read_documents((str(data / "pretrain" / f"{domain}-000.jsonl*"),))
    found, total = [], 0
    for document in documents:
        found.append(document.text[:20_000])
        total += len(found[-1])
        if total > TEXT:
            break
    return found


def write_domains(data: Path, folder: Path) -> dict[str, list[str]]:
    """Nine documents in ten of each domain as a file to train on; the tenth is kept to ask with."""
    held_out = {}
    for domain in DOMAINS:
        documents = texts(data, domain)
        held_out[domain] = documents[::10]
        lines = (json.dumps({"text": text}) for at, text in enumerate(documents) if at % 10)
        (folder / f"{domain}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    return held_out


def train(folder: Path, steps: int) -> Path:
    assert MODEL.moe is not None
    moe = replace(MODEL.moe, n_routed_experts=64, num_experts_per_tok=6)
    config = RunConfig(
        model=replace(MODEL, moe=moe, num_nextn_predict_layers=0),
        data=DataConfig(
            sources={name: SourceConfig((str(folder / f"{name}.jsonl"),), 1.0) for name in DOMAINS},
            tokens_per_batch=1024,
            seq_len=256,
        ),
        train=TrainConfig(
            steps=steps,
            evaluate_every=steps,
            checkpoint_every=steps,
            optim=OptimConfig(optimizer="muon", lr=1e-2, warmup_steps=10, schedule="linear"),
            balance=BalanceConfig(bias_update_speed=0.01),
        ),
    )
    pretrain.run(config, folder / "run")
    return folder / "run" / "export"


@dataclass(frozen=True)
class Asked:
    domain: str
    ids: list[int]
    params: SamplingParams


def requests(held_out: dict[str, list[str]], tokenizer: Tokenizer, count: int, seed: int) -> list[Asked]:
    """Prompts from held-out text, a place of its own each, mixed; answers of unlike lengths."""
    draw, asked = random.Random(seed), []
    for domain in DOMAINS:
        ids = [token for text in held_out[domain] for token in tokenizer.encode(text)]
        for _ in range(count):
            start = draw.randrange(len(ids) - PROMPT)
            params = SamplingParams(max_tokens=draw.randint(NEW // 2, 3 * NEW // 2), ignore_eos=True, seed=0)
            asked.append(Asked(domain, ids[start : start + PROMPT], params))
    draw.shuffle(asked)
    return asked


@dataclass(frozen=True)
class Round:
    """What serving a queue took: distinct experts a step and layer, and seconds of each request."""

    experts: float
    rate: float
    latencies: list[float]
    tokens: dict[int, list[int]]  # by place in the queue: the same whoever ran beside it


def now() -> float:
    return time.process_time() if torch.get_num_threads() == 1 else time.perf_counter()


def serve(engine: Engine, asked: Sequence[Asked]) -> Round:
    before, start = engine.stats(), now()
    places = {engine.add(each.ids, each.params): place for place, each in enumerate(asked)}
    latencies, tokens = [], {place: [] for place in places.values()}
    while engine.busy:
        for event in engine.step():
            if event.token is not None:
                tokens[places[event.request]].append(event.token)
            if event.finish:
                latencies.append(now() - start)
    seconds, after = now() - start, engine.stats()
    assert before.experts_touched is not None and after.experts_touched is not None
    touched = (after.experts_touched - before.experts_touched).double().mean().item()
    return Round(
        experts=touched / (after.steps - before.steps),
        rate=(after.generated - before.generated) / seconds,
        latencies=latencies,
        tokens=tokens,
    )


def open_engine(model: Transformer, most: int, affinity: int) -> Engine:
    return Engine(
        model,
        EngineSettings(
            page_size=16, cache_bytes=1 << 25, max_sequences=most, prefix_cache=False, affinity=affinity
        ),
    )


def foresight(model: Transformer, first: Sequence[Asked], then: Sequence[Asked]) -> dict[str, Any]:
    """What is guessed of `then` after `first` has finished, against where they went: Pearson's correlation
    over (layer, expert), median over requests. "of the mean": of a guess that is the same for all."""
    assert model.config.moe is not None
    order = Affinity(model.config.moe.n_routed_experts, PATIENCE)
    told = []
    for each, done in zip(
        [*first, *then],
        open_engine(model, 16, 0).generate(
            [each.ids for each in [*first, *then]],
            [replace(each.params, routing=True) for each in [*first, *then]],
        ),
        strict=True,
    ):
        assert done.routing is not None
        told.append((Request(each.ids, each.params), done.routing))
    for sequence, routing in told[: len(first)]:
        order.learn(sequence, lambda routing=routing: routing)
    actual = [order.count(routing).ravel() for _, routing in told[len(first) :]]
    mean = np.mean([order.count(routing).ravel() for _, routing in told[: len(first)]], axis=0)
    guesses = [order.predict(sequence) for sequence, _ in told[len(first) :]]
    pairs = [(guess.ravel(), real) for guess, real in zip(guesses, actual, strict=True) if guess is not None]
    return {
        "what": "guess of a request's experts against where they went, correlation",
        "of its group": round(statistics.median(correlate(a, b) for a, b in pairs), 3),
        "of the mean": round(statistics.median(correlate(mean, b) for _, b in pairs), 3),
        "both less the mean": round(statistics.median(correlate(a - mean, b - mean) for a, b in pairs), 3),
    }


def percentile(served: Round, at: float) -> float:
    return float(np.percentile(served.latencies, at))


def correlate(a: np.ndarray, b: np.ndarray) -> float:
    return float(np.corrcoef(a, b)[0, 1])


def measure(
    model: Transformer, most: int, first: Sequence[Asked], asked: Sequence[Asked], rounds: int
) -> dict[str, Any]:
    """By arrival, by affinity, and by arrival in a queue sorted by domain, which no
    server gets: the most that a perfect guess without a bound could give."""
    arranged = sorted(asked, key=lambda each: each.domain)
    sides = {
        "arrival": (open_engine(model, most, 0), asked),
        "affinity": (open_engine(model, most, PATIENCE), asked),
        "sorted": (open_engine(model, most, 0), arranged),
    }
    for engine, _ in sides.values():
        serve(engine, first)  # what is compiled is compiled, and the order has learned
    turns: dict[str, list[Round]] = {name: [] for name in sides}
    for turn in range(rounds):
        for name in sorted(sides, reverse=bool(turn % 2)):
            turns[name].append(serve(*sides[name]))
    same = sum(turns["arrival"][0].tokens[at] == turns["affinity"][0].tokens[at] for at in range(len(asked)))

    def ratio(name: str, of: str) -> float:
        pairs = zip(turns[name], turns["arrival"], strict=True)
        if of in ("experts", "rate"):
            return round(statistics.median(getattr(a, of) / getattr(b, of) for a, b in pairs), 3)
        at = float(of)
        return round(
            statistics.median(percentile(a, at) / percentile(b, at) for a, b in pairs),
            3,
        )

    base = turns["arrival"]
    row: dict[str, Any] = {
        "what": f"{len(asked)} requests, {most} at once",
        "experts by arrival": round(statistics.median(each.experts for each in base), 1),
        "tok/s by arrival": round(statistics.median(each.rate for each in base)),
        "p50 s by arrival": round(statistics.median(percentile(r, 50) for r in base), 2),
        "p99 s by arrival": round(statistics.median(percentile(r, 99) for r in base), 2),
        "same texts": f"{same} of {len(asked)}",
    }
    for name in ("affinity", "sorted"):
        row |= {f"{name} experts": ratio(name, "experts"), f"{name} tok/s": ratio(name, "rate")}
    return row | {"affinity p50": ratio("affinity", "50"), "affinity p99": ratio("affinity", "99")}


def derive(row: dict[str, Any], most: int) -> dict[str, Any]:
    """Derived, not measured: V2-Lite on an H200 at 1K of context, its routed bytes times the ratio."""
    config = family("deepseek-v2-lite").config
    assert config.moe is not None
    gpu_, load = gpu("h200"), planner.Load()
    point = planner.decode_point(config, gpu_, 1, load, most)
    routed = sum(
        weight.count * cost.stored_bytes(weight, load.weights)
        for weight in cost.weights(config, mtp=False)
        if weight.part == "routed"
    )
    read = routed * point.experts / config.moe.n_routed_experts
    saved = read * (1 - row["affinity experts"]) / gpu_.read
    return {
        "what": f"derived: V2-Lite on an H200, batch {most}, same ratio of experts",
        "routed share of bytes": round(read / (point.weight_bytes + point.cache_bytes), 2),
        "floor ms": round(1e3 * point.floor_s, 2),
        "predicted ms": round(1e3 * point.predicted_s, 2),
        "tok/s": round(point.predicted_s / (point.predicted_s - saved), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--model", type=Path, help="an export of an earlier run; without, one is trained")
    parser.add_argument("--save", type=Path, help="where to keep what is trained")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=32, help="of each domain")
    parser.add_argument("--at-once", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as scratch:
        folder = arguments.save or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        held_out = write_domains(arguments.data, folder)
        export = arguments.model or train(folder, arguments.steps)
        model, tokenizer = hf.load(export).eval(), Tokenizer.load(export)
    first, asked = (requests(held_out, tokenizer, arguments.requests, seed) for seed in (1, 2))
    rows = [foresight(model, first, asked)]
    print(json.dumps(rows[-1]))
    for most in arguments.at_once:
        rows.append(measure(model, most, first, asked, arguments.rounds))
        print(json.dumps(rows[-1]), flush=True)
        rows.append(derive(rows[-1], most))
        print(json.dumps(rows[-1]), flush=True)
    name = f"{datetime.now(UTC):%Y-%m-%d}-cpu-{arguments.threads}-threads-affinity.jsonl"
    where = Path(__file__).parent / "results" / name
    with where.open("a") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    main()
