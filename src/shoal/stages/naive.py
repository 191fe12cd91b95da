"""Naive: the forward pass with nothing clever in it, in the model's dtype or a wider one, for verification.

One text at a time, whole, without a cache, keys and values made for every head, every op on its reference. A
block is widened while it runs and dropped again, so that the wide pass of a large model needs the memory of
one block more. Recorded choices of experts are replayed; what the router would have chosen there is told
beside the result, so that a near tie, which any rounding may turn, is counted and not confused with an error.

The law: it shares no path with serving but the modules' weights. To say what a cache in e4m3 may change, it
can round what a cache would hold (`fp8_rows`, and an indexer's `fp8_keys`), in a cache of the text alone.
Shape letters: T tokens, L layers that route, K experts per token, V vocabulary.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from itertools import islice
from typing import TypeVar

import torch
from torch import Tensor, nn

from shoal.batch import Batch, KVView
from shoal.config.cost import fp8_cache_shape
from shoal.config.model import MLAConfig, ModelConfig
from shoal.model.moe import LocalDispatcher, MoE, hash_experts
from shoal.model.transformer import Block, Transformer
from shoal.ops import dispatch
from shoal.ops.quantised import FP8

M = TypeVar("M", bound=nn.Module)
WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


@dataclass(frozen=True, eq=False)
class Naive:
    logits_TV: Tensor  # in the dtype asked for
    experts_TLK: Tensor | None  # what each router would have chosen, given the choices replayed before it


def wider(dtype: torch.dtype) -> torch.dtype:
    """The next dtype with more digits. ValueError where there is none."""
    if dtype not in WIDER:
        known = ", ".join(str(each).removeprefix("torch.") for each in WIDER)
        raise ValueError(f"the weights are {dtype}; their rounding can be measured for {known}: give --dtype")
    return WIDER[dtype]


@torch.inference_mode()
def forward(
    model: Transformer,
    ids: list[int],
    dtype: torch.dtype,
    routing_TLK: Tensor | None,
    *,
    fp8_rows: bool = False,
    fp8_keys: bool = False,
) -> Naive:
    """Logits of every position of one text, by weights widened to `dtype`."""
    config, decoder = model.config, model.model
    device = model.head_weight().device
    ids_T = torch.tensor(ids, device=device)
    length_1 = torch.tensor([len(ids)], dtype=torch.int32, device=device)
    kv = _round(config, len(ids), dtype, length_1, fp8_rows, fp8_keys) if fp8_rows or fp8_keys else None
    batch = Batch(
        ids_T=ids_T,
        positions_T=torch.arange(len(ids), device=device),
        cu_seqlens_S1=torch.tensor([0, len(ids)], dtype=torch.int32, device=device),
        max_seqlen=len(ids),
        kv=kv,
    )
    chosen: list[Tensor] = []
    with dispatch.using("reference"):
        x_TD, y_TD = decoder.embed_tokens(ids_T).to(dtype), None
        angles = decoder.rotary(batch.positions_T)
        for layer, narrow in enumerate(islice(decoder.layers, config.num_hidden_layers)):
            block = _widen(narrow, dtype)
            assert isinstance(block, Block)
            x_TD, normal_TD = block.attend(x_TD, y_TD, angles, batch)
            replay_TK = None
            if isinstance(block.mlp, MoE):
                assert config.moe is not None
                block.mlp.dispatcher = LocalDispatcher()
                if config.moe.topk_method == "hash":
                    own_TK = replay_TK = hash_experts(ids_T, layer, config.moe)
                else:
                    own_TK = block.mlp.gate(normal_TD, None).experts_TK
                    if routing_TLK is not None:
                        replay_TK = routing_TLK[:, len(chosen)].to(device)
                chosen.append(own_TK)
            y_TD, _ = block.feed_forward(normal_TD, replay_TK)
        assert y_TD is not None
        hidden_TD = _widen(decoder.norm, dtype).add(x_TD, y_TD)[1]
        logits_TV = nn.functional.linear(hidden_TD, model.head_weight().to(dtype))
    return Naive(logits_TV, torch.stack(chosen, 1) if chosen else None)


def _round(
    config: ModelConfig, length: int, dtype: torch.dtype, length_1: Tensor, fp8_rows: bool, fp8_keys: bool
) -> KVView:
    """One page for the text, one step that begins it."""
    device, layers = length_1.device, config.num_hidden_layers
    index_keys: tuple[tuple[Tensor, Tensor], ...] = ()
    row, kept = config.attention.cache_shape, dtype
    if fp8_keys:
        assert isinstance(config.attention, MLAConfig) and config.attention.indexer is not None
        keys = torch.zeros(1, length, config.attention.indexer.index_head_dim, device=device).to(FP8)
        index_keys = ((keys, torch.zeros(1, length, device=device)),) * layers
        row = (config.attention.latent_dim,)
    if fp8_rows:
        row, kept = fp8_cache_shape(config, "fp8" if fp8_keys else "wide"), torch.uint8
    page = torch.zeros(1, length, *row, dtype=kept, device=device)
    slots_T, first = torch.arange(length, device=device), torch.zeros(1, 1, dtype=torch.int32, device=device)
    return KVView((page,) * layers, slots_T, first, length_1, length, has_prefix=False, index_keys=index_keys)


def count_others(ours_TLK: Tensor | None, theirs_TLK: Tensor | None) -> int:
    """Choices of ours that theirs has not, whatever the order within a token."""
    if ours_TLK is None or theirs_TLK is None:
        return 0
    ours, theirs = ours_TLK.cpu().long(), theirs_TLK.cpu().long()
    return int((~(ours.unsqueeze(-1) == theirs.unsqueeze(-2)).any(-1)).sum())


def _widen(module: M, dtype: torch.dtype) -> M:
    return copy.deepcopy(module).to(dtype)
