"""What `shoal inspect` costs beside reading the text: the same batches with and without watching, in turns.

    python -m benchmarks.watching [--model EXPORT] [--tokens N] [--rounds N] [--device cuda]

Without EXPORT the quickstart's shape with random weights reads random ids: the work is the same, whatever the
weights are. Plain is analysis/experts.bits_per_byte, watched is analysis/observe.observe, of the same loss.
On a CPU seconds are the process's own, so that others on the machine do not count; on a GPU the clock's.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from shoal.analysis.experts import bits_per_byte
from shoal.analysis.observe import observe
from shoal.batch import Batch
from shoal.checkpoint import hf
from shoal.model.transformer import Transformer
from shoal.stages.quickstart import MODEL

ALLOWED = 0.03  # of the run


@dataclass(frozen=True)
class Result:
    plain: float  # seconds, median
    watched: float
    overhead: float  # median over turns of watched over plain, less 1
    told: float  # the share that observe itself says it took, median


def build(device: str) -> Transformer:
    model = Transformer(MODEL, device=torch.device(device))
    model.init_weights(torch.Generator(device).manual_seed(0))
    return model.eval()


def read(model: Transformer, tokens: int, length: int) -> list[Batch]:
    """Batches of one text each, of random ids, with the next id as target."""
    device, draw = model.head_weight().device, torch.Generator().manual_seed(0)
    found = []
    for start in range(0, tokens, length):
        size = min(length, tokens - start)
        ids = torch.randint(model.config.vocab_size, (size + 1,), generator=draw).to(device)
        found.append(
            Batch(
                ids_T=ids[:-1],
                positions_T=torch.arange(size, device=device),
                cu_seqlens_S1=torch.tensor([0, size], dtype=torch.int32, device=device),
                max_seqlen=size,
                targets_T=ids[1:],
                weights_T=torch.ones(size, device=device),
            )
        )
    return found


@torch.inference_mode()
def measure(model: Transformer, batches: list[Batch], rounds: int) -> Result:
    """A round reads the text twice; which way comes first alternates."""
    clock = time.perf_counter if model.head_weight().is_cuda else time.process_time
    shares: list[float] = []

    def plain() -> None:
        bits_per_byte(model, batches, 1)

    def watched() -> None:
        seen = observe(model, "text", batches, 1)
        shares.append(seen.watching / seen.seconds)

    def timed(work: Callable[[], None]) -> float:
        start = clock()
        work()  # both end with a number read from the device
        return clock() - start

    plain()
    watched()
    pairs = []
    for turn in range(rounds):
        took = {work: timed(work) for work in ((plain, watched) if turn % 2 else (watched, plain))}
        pairs.append((took[plain], took[watched]))
    return Result(
        plain=statistics.median(one for one, _ in pairs),
        watched=statistics.median(other for _, other in pairs),
        overhead=statistics.median(other / one for one, other in pairs) - 1,
        told=statistics.median(shares[1:]),
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.watching", description=__doc__)
    parser.add_argument("--model", type=Path, help="a checkpoint folder")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=2048, help="of each text")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    device = arguments.device
    model = hf.load(arguments.model, device=device, mtp=False).eval() if arguments.model else build(device)
    result = measure(model, read(model, arguments.tokens, arguments.length), arguments.rounds)
    name = torch.cuda.get_device_name() if device != "cpu" else f"cpu, {torch.get_num_threads()} threads"
    what = f"{arguments.model or 'the quickstart, random'} on {name}"
    print(f"{what}: {arguments.tokens:,} tokens, {arguments.rounds} turns")
    times = f"plain {result.plain:.3f} s, watched {result.watched:.3f} s"
    print(f"{times}: {result.overhead:+.1%} ({ALLOWED:.0%} allowed)")
    print(f"of which observe tells {result.told:.1%} itself")


if __name__ == "__main__":
    main()
