"""Real parts for the tests of training: the smallest V3 that has every feature, and packed batches of random
ids.

Everything is a pure function of its arguments, so a test can build the same thing twice.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from shoal.batch import Batch
from shoal.config.families import tiny
from shoal.config.model import MLAConfig, ModelConfig
from shoal.model.transformer import Transformer
from shoal.train.auxiliary import Sequences

LENGTHS = (7, 1, 20, 4)  # of the sequences of a batch: one of a single token, some shorter than MTP looks


def config(**changes: object) -> ModelConfig:
    """Latent attention, a dense layer, two that route (4 of 16 experts in groups, one shared), one MTP
    module."""
    v3 = replace(
        tiny("deepseek-v3"),
        vocab_size=50,
        hidden_size=32,
        intermediate_size=48,
        attention=MLAConfig(2, 16, 8, 8, 8, q_lora_rank=12),
        max_position_embeddings=64,
        initializer_range=0.1,
    )
    assert v3.moe is not None
    return replace(v3, moe=replace(v3.moe, moe_intermediate_size=16), **changes)


def model(
    cfg: ModelConfig | None = None, *, seed: int = 0, dtype: torch.dtype = torch.float32
) -> Transformer:
    built = Transformer(cfg or config(), dtype=dtype)
    built.init_weights(torch.Generator().manual_seed(seed))
    return built


def batch(index: int, lengths: tuple[int, ...] = LENGTHS, vocab_size: int = 50) -> Batch:
    """Random ids in sequences of these lengths; the last of each has nothing to predict, and weighs 0."""
    generator = torch.Generator().manual_seed(1000 + index)
    ids_T = torch.randint(0, vocab_size, (sum(lengths),), generator=generator)
    ends_S = torch.tensor(lengths).cumsum(0)
    weights_T = torch.ones(len(ids_T)).index_fill_(0, ends_S - 1, 0.0)
    return Batch(
        ids_T=ids_T,
        positions_T=torch.cat([torch.arange(n) for n in lengths]),
        cu_seqlens_S1=torch.cat([torch.zeros(1, dtype=torch.long), ends_S]).int(),
        max_seqlen=max(lengths),
        targets_T=ids_T.roll(-1),
        weights_T=weights_T,
    )


def sequences(lengths: tuple[int, ...]) -> Sequences:
    """Where the tokens of a pack of sequences of these lengths stand."""
    return Sequences(
        torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths)), torch.tensor(lengths)
    )


def alone(packed: Batch, sequence: int) -> Batch:
    """One sequence of a pack, as a batch of its own."""
    start, end = packed.cu_seqlens_S1[sequence : sequence + 2].tolist()
    assert packed.targets_T is not None
    assert packed.weights_T is not None
    return Batch(
        ids_T=packed.ids_T[start:end],
        positions_T=packed.positions_T[start:end],
        cu_seqlens_S1=torch.tensor([0, end - start], dtype=torch.int32),
        max_seqlen=end - start,
        targets_T=packed.targets_T[start:end],
        weights_T=packed.weights_T[start:end],
    )
