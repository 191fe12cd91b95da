"""Which experts to keep on the device: hit rates of policies, replayed over what a model's routers chose.

    uv run python benchmarks/offload.py EXPORT FILES... [--tokens N] [--texts N]

The model reads texts of the files whole; a decoding step of batch B is then the position t of B texts at
once, and names the experts that any of them goes to. A policy sees the steps of a layer one by one and is
asked how many of the experts named it has. All fetch what is missing, so they differ in what they drop: the
one used longest ago; the one used least, ever or with counts that halve every 32 steps; the one least used in
the whole run; and the one needed last of all, which nobody can know and nobody can beat.
"""

from __future__ import annotations

import argparse
import random
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.checkpoint import hf
from shoal.data.text import Tokenizer

Steps = list[list[int]]  # the experts that each step names


@torch.inference_mode()
def read(folder: Path, files: list[Path], tokens: int, texts: int) -> tuple[Tensor, int]:
    """What the routers chose: (texts, tokens, layers, K); and how many experts there are."""
    model, tokenizer = hf.load(folder, mtp=False).eval(), Tokenizer.load(folder)
    assert model.config.moe is not None, "a model without experts"
    found = []
    for file in random.Random(0).sample(files, len(files)):
        ids = tokenizer.encode(file.read_text("utf-8"), bos=True)[:tokens]
        if len(ids) < tokens:
            continue
        bounds = torch.tensor([0, tokens], dtype=torch.int32)
        output = model(Batch(torch.tensor(ids), torch.arange(tokens), bounds, tokens))
        found.append(torch.stack([routing.experts_TK for routing in output.routing], 1))
        if len(found) == texts:
            break
    return torch.stack(found), model.config.moe.n_routed_experts


def replay(steps: Steps, slots: int, drop: Callable[[list[int], int], int]) -> tuple[int, int]:
    """Hits and queries; `drop` says which of the experts here, not named now, goes."""
    here: list[int] = []  # the one used longest ago first
    hits = queries = 0
    for at, named in enumerate(steps):
        queries += len(named)
        found = [expert for expert in named if expert in here]
        hits += len(found)
        here = [expert for expert in here if expert not in found]
        for _ in range(len(here) - max(0, slots - len(named))):
            here.remove(drop(here, at))
        here += named[-slots:]
    return hits, queries


def policies(steps: Steps, experts: int) -> dict[str, Callable[[list[int], int], int]]:
    counts, recent = [[0.0] * experts], [[0.0] * experts]
    for named in steps:
        counts.append([count + (expert in named) for expert, count in enumerate(counts[-1])])
        recent.append(
            [count * 0.5 ** (1 / 32) + (expert in named) for expert, count in enumerate(recent[-1])]
        )
    following: list[list[int]] = [[len(steps)] * experts]
    for at in range(len(steps) - 1, -1, -1):
        following.append([at if expert in steps[at] else next_ for expert, next_ in enumerate(following[-1])])
    following.reverse()
    return {
        "longest ago": lambda here, at: here[0],
        "least, ever": lambda here, at: min(here, key=counts[at].__getitem__),
        "least, of late": lambda here, at: min(here, key=recent[at].__getitem__),
        "least in the end": lambda here, at: min(here, key=counts[-1].__getitem__),
        "needed last": lambda here, at: max(here, key=following[at + 1].__getitem__),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("export", type=Path)
    parser.add_argument("files", type=Path, nargs="+")
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--texts", type=int, default=64)
    given = parser.parse_args()
    chosen, experts = read(given.export, given.files, given.tokens, given.texts)
    texts, tokens, layers, top_k = chosen.shape
    print(f"{texts} texts of {tokens} tokens, {layers} layers of {experts} experts, {top_k} a token")
    for batch in (1, 4, 16):
        for slots in (experts // 4, experts // 2, 3 * experts // 4):
            totals: dict[str, tuple[int, int]] = {}
            for layer in range(layers):
                steps: Steps = []
                for first in range(0, texts - batch + 1, batch):  # one batch after the other, as served
                    named = chosen[first : first + batch, :, layer].transpose(0, 1).flatten(1)
                    steps += [row.unique().tolist() for row in named]
                for name, drop in policies(steps, experts).items():
                    hits, queries = replay(steps, slots, drop)
                    before = totals.get(name, (0, 0))
                    totals[name] = before[0] + hits, before[1] + queries
            told = ", ".join(f"{name} {hits / queries:.3f}" for name, (hits, queries) in totals.items())
            print(f"batch {batch:2}, {slots:3} slots: {told}", flush=True)


if __name__ == "__main__":
    main()
