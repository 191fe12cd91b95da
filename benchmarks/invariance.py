"""What batch-invariant mode costs on this CPU: the quickstart's model, with the mode and without, in turns.

    uv run python benchmarks/invariance.py [--threads N] [--rounds N]

Rows: decoding by the engine at batch 1 and 8, prompts alone, the trainer's scoring, and a training step's
forward and backward pass. The last rows are what is bought: how far engine and trainer are apart on the same
tokens. Ratios are within a turn; the figure is their median.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch

from shoal.batch import Batch
from shoal.engine import Completion, Engine, EngineSettings, SamplingParams
from shoal.model.transformer import Transformer
from shoal.ops import api as ops
from shoal.ops import dispatch
from shoal.stages.quickstart import MODEL
from shoal.train.policy import log_probs

SEQUENCES, LENGTH = 8, 256  # of a pack
PROMPT, NEW = 64, 32  # of a decoded sequence


def tokens(*shape: int) -> torch.Tensor:
    return torch.randint(8, MODEL.vocab_size, shape, generator=torch.Generator().manual_seed(0))


def pack(ids_SN: torch.Tensor) -> Batch:
    sequences, length = ids_SN.shape
    return Batch(
        ids_T=ids_SN.flatten(),
        positions_T=torch.arange(length).repeat(sequences),
        cu_seqlens_S1=torch.arange(0, sequences * length + 1, length, dtype=torch.int32),
        max_seqlen=length,
        targets_T=ids_SN.roll(-1, 1).flatten(),
    )


def generate(model: Transformer, prompts: list[list[int]], new: int) -> list[Completion]:
    engine = Engine(model, EngineSettings(num_pages=256, prefix_cache=False, max_sequences=len(prompts)))
    return engine.generate(prompts, SamplingParams(temperature=1.0, seed=1, max_tokens=new, ignore_eos=True))


def score(model: Transformer, batch: Batch) -> torch.Tensor:
    assert batch.targets_T is not None
    with torch.no_grad():
        return log_probs(model(batch).hidden_TD, model.head_weight(), batch.targets_T)


def train(model: Transformer, batch: Batch) -> None:
    assert batch.targets_T is not None
    ones_T = torch.ones(batch.num_tokens)
    ops.linear_cross_entropy(
        model(batch).hidden_TD, model.head_weight(), batch.targets_T, ones_T
    ).total.backward()
    model.zero_grad()


def gap(model: Transformer) -> tuple[float, float]:
    """The largest and the mean |log p - log p| of what the engine draws, in nats."""
    prompts = tokens(SEQUENCES, PROMPT).tolist()
    done = generate(model, prompts, NEW)
    texts = torch.tensor([[*prompt, *one.ids] for prompt, one in zip(prompts, done, strict=True)])
    ours = score(model, pack(texts)).view(texts.shape)[:, PROMPT - 1 : -1]
    apart = (ours - torch.tensor([one.logprobs for one in done])).abs()
    return float(apart.max()), float(apart.mean())


def clock(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=3)
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    model = Transformer(MODEL)
    model.init_weights(torch.Generator().manual_seed(0))
    model.eval()
    batch, prompts = pack(tokens(SEQUENCES, LENGTH)), tokens(SEQUENCES, PROMPT).tolist()
    rows: dict[str, tuple[int, Callable[[], object]]] = {
        "engine, decoding, batch 1": (NEW, lambda: generate(model, prompts[:1], NEW)),
        "engine, decoding, batch 8": (SEQUENCES * NEW, lambda: generate(model, prompts, NEW)),
        "engine, 8 prompts of 256": (
            SEQUENCES * LENGTH,
            lambda: generate(model, tokens(SEQUENCES, LENGTH).tolist(), 1),
        ),
        "trainer, scoring": (SEQUENCES * LENGTH, lambda: score(model, batch)),
        "trainer, forward and backward": (SEQUENCES * LENGTH, lambda: train(model, batch)),
    }
    print(f"{torch.get_num_threads()} threads, float32, torch {torch.__version__}, {chosen.rounds} rounds\n")
    print(f"{'tokens/s':32} {'plain':>10} {'invariant':>10} {'slower by':>10}")
    for name, (count, work) in rows.items():
        turns: list[tuple[float, float]] = []
        for turn in range(-1, chosen.rounds):  # the first warms up
            plain = clock(work)
            with dispatch.batch_invariant():
                fixed = clock(work)
            if turn >= 0:
                turns.append((plain, fixed))
        plain, fixed = (count / statistics.median(side) for side in zip(*turns, strict=True))
        ratio = statistics.median(fixed / plain for plain, fixed in turns)
        print(f"{name:32} {plain:10,.0f} {fixed:10,.0f} {ratio:9.1f}x", flush=True)
    print(f"\n{'|log p - log p|, nats':32} {'most':>10} {'mean':>10}")
    for name, on in (("plain", False), ("invariant", True)):
        with dispatch.batch_invariant(on):
            most, mean = gap(model)
        print(f"{name:32} {most:10.2g} {mean:10.2g}")


if __name__ == "__main__":
    main()
