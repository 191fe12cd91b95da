"""Experts taken apart: pruned, merged, duplicated; and what it costs, in bits per byte of a text.

Each is a function of a model and gives a model. Routers are adjusted with the experts: a router keeps the
rows, and the biases, of the experts that stay. The laws: pruning nobody, merging a model with
itself, and duplicating leave the function as it was; duplicating up to the rounding of its sums.

Prediction modules have no record of their own in a main pass: pruning leaves them out, and says so.

Shape letters: L layers that route, E experts, N experts kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.config.model import ModelConfig, MoEConfig
from shoal.model.transformer import Transformer
from shoal.ops import api as ops

STACKS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")
ROUTER = ("mlp.gate.weight", "mlp.gate.e_score_correction_bias")
Change = Callable[[str, Tensor], Tensor]  # of a name and what it was


@torch.inference_mode()
def bits_per_byte(model: Transformer, batches: Iterable[Batch], num_bytes: int) -> float:
    """Of the text that the batches are, of so many bytes."""
    was, nats = model.training, 0.0
    model.eval()
    try:
        for batch in batches:
            assert batch.targets_T is not None and batch.weights_T is not None
            hidden_TD = model(batch).hidden_TD
            nats += ops.linear_cross_entropy(
                hidden_TD, model.head_weight(), batch.targets_T, batch.weights_T
            ).total.item()
    finally:
        model.train(was)
    return nats / math.log(2) / num_bytes


def routed(config: ModelConfig) -> tuple[int, ...]:
    """The blocks that route, by number, prediction modules left out."""
    return tuple(layer for layer in range(config.num_hidden_layers) if config.is_moe_layer(layer))


def choose_best(scores_LE: Tensor, keep: int, moe: MoEConfig) -> Tensor:
    """(L, N) the experts to keep, in order: the best by score, of each group of the router equally many."""
    if not moe.num_experts_per_tok <= keep <= moe.n_routed_experts:
        raise ValueError(
            f"{keep} experts cannot be kept of {moe.n_routed_experts}: a token goes to "
            f"{moe.num_experts_per_tok}, so keep that many or more, and no more than there are"
        )
    if keep % moe.n_group:
        near = -(-keep // moe.n_group) * moe.n_group
        raise ValueError(
            f"{keep} experts are not {moe.n_group} equal groups, as this router has; keep {near}"
        )
    layers, experts = scores_LE.shape
    size = experts // moe.n_group
    grouped = scores_LE.view(layers, moe.n_group, size)
    best = grouped.sort(dim=-1, descending=True, stable=True).indices[..., : keep // moe.n_group]
    first = size * torch.arange(moe.n_group, device=best.device).view(1, -1, 1)
    return (best + first).flatten(1).sort(dim=-1).values


def prune(model: Transformer, kept_LN: Tensor) -> Transformer:
    """The model with these experts alone, its routers with their rows. Prediction modules are left out.

    A token whose choices were all kept goes where it went. Where weights are a softmax over all experts and
    not renormalised (V2), those of the rest grow by what the others had.
    """
    moe = _moe(model)
    moe = replace(moe, n_routed_experts=kept_LN.shape[1])
    config = replace(model.config, moe=moe, num_nextn_predict_layers=0)
    rows = {f"model.layers.{layer}.": kept for layer, kept in zip(routed(config), kept_LN, strict=True)}

    def cut(name: str, tensor: Tensor) -> Tensor:
        kept = rows[name.partition(".mlp.")[0] + "."].to(tensor.device)
        return tensor.index_select(0, kept)

    return _rebuild(model, config, cut)


def duplicate(model: Transformer, times: int) -> Transformer:
    """Every expert `times` over, side by side, and as many times the choices: a larger model that computes
    the same, to be trained apart from there (upcycling).

    Each copy gets its share of the weight: by the softmax or the renormalisation, else by the scaling factor.
    ValueError for V3's groups, whose score is of two different experts and would be of one twice.
    """
    moe = _moe(model)
    if times < 2:
        raise ValueError(f"times is {times}; 2 doubles the experts")
    if moe.topk_method == "noaux_tc" and moe.n_group > 1:
        raise ValueError(
            f"this router scores a group by its two best experts; two copies would change which of its "
            f"{moe.n_group} groups are chosen, so its experts are not duplicated"
        )
    shared = moe.norm_topk_prob or moe.scoring_func == "softmax"
    moe = replace(
        moe,
        n_routed_experts=moe.n_routed_experts * times,
        num_experts_per_tok=moe.num_experts_per_tok * times,
        routed_scaling_factor=moe.routed_scaling_factor / (1 if shared else times),
    )
    config = replace(model.config, moe=moe)
    return _rebuild(model, config, lambda name, tensor: tensor.repeat_interleave(times, 0))


@torch.no_grad()
def merge(first: Transformer, second: Transformer, share_LE: Tensor | None = None) -> Transformer:
    """`first`, its experts the mean of both's, or `share` of its own and the rest of the other's.

    In place. All but the experts stays as `first` has it: who calls has seen that both have it alike.
    """
    if first.config.moe != second.config.moe or first.config.hidden_size != second.config.hidden_size:
        raise ValueError("the two models have experts of other shapes or numbers; only like can be merged")
    theirs = second.state_dict()
    for number, layer in enumerate(routed(first.config)):
        for stack in STACKS:
            name = f"model.layers.{layer}.{stack}"
            ours = first.get_parameter(name)
            share = (
                0.5 if share_LE is None else share_LE[number].view(-1, 1, 1).to(ours.device, torch.float32)
            )
            other = theirs[name].to(ours.device).float()
            ours.copy_(other + share * (ours.float() - other))
    return first


def shares(ours_LE: Tensor, theirs_LE: Tensor) -> Tensor:
    """(L, E) our part of both scores; half where neither model uses the expert."""
    both = ours_LE + theirs_LE
    return torch.where(both > 0, ours_LE / both.clamp(min=1e-300), 0.5)


def _moe(model: Transformer) -> MoEConfig:
    if model.config.moe is None:
        raise ValueError("this model has no routed experts")
    return model.config.moe


def _rebuild(model: Transformer, config: ModelConfig, change: Change) -> Transformer:
    """A model of `config`: the old one's tensors, those of experts and routers changed."""
    old = model.state_dict()
    embedding = model.model.embed_tokens.weight
    new = Transformer(config, device="meta", dtype=embedding.dtype)
    new.allocate(embedding.device)
    with torch.no_grad():
        for name, tensor in new.state_dict().items():
            changed = name.endswith((*STACKS, *ROUTER))
            tensor.copy_(change(name, old[name]) if changed else old[name])
    return new.train(model.training)
