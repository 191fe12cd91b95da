"""A step of few rows over the cache, by ops that take half a block at a time; or nothing, where they do not.

On a CPU a decoding step of a small model costs what its calls into PyTorch cost, some 90 a layer, and not
what its weights do. Here a block is two calls. The modules stay the specification: the result equals theirs
to rounding, and whatever these ops do not take (a narrower dtype, a Linear with another product, another
dispatcher or rule of choice, sparse attention, capacity, replayed routing, training mode, gradients) is left
to them by returning None.

Shape letters: T tokens, D hidden.
"""

from __future__ import annotations

from itertools import islice
from typing import TYPE_CHECKING, Any

import torch.nn.functional as F
from torch import Tensor, nn

from shoal.batch import Batch, KVView
from shoal.model.gqa import GQA
from shoal.model.layers import MLP, Linear, RMSNorm
from shoal.model.mla import MLA
from shoal.model.moe import Experts, Gate, LocalDispatcher, MoE
from shoal.model.nsa import NSA
from shoal.model.rope import Angles
from shoal.ops import api as ops
from shoal.ops.api import ExpertWeights, GroupedWeights, LatentWeights, Routing

if TYPE_CHECKING:
    from shoal.model.transformer import Transformer

_FEED = ("gate_proj", "up_proj", "down_proj")
_ROUTED_BY = ("greedy", "group_limited_greedy", "noaux_tc")  # the rules of choice that the kernel knows


def few_rows(
    model: Transformer, x_TD: Tensor, angles: Angles, batch: Batch
) -> tuple[Tensor, tuple[Routing, ...]] | None:
    """Hidden states after the final norm and the routing, as `Transformer.forward` has them, or None.

    `x_TD` are the embedded tokens; they are left as they were.
    """
    if batch.kv is None or batch.kv.between is not None or batch.routing is not None or model.training:
        return None
    decoder = model.model
    routings: list[Routing] = []
    for block in islice(decoder.layers, model.config.num_hidden_layers):
        parts = _parts(block)
        attention, mlp = parts["self_attn"], parts["mlp"]
        before, between = parts["input_layernorm"], parts["post_attention_layernorm"]
        assert isinstance(before, RMSNorm)
        assert isinstance(between, RMSNorm)
        if isinstance(attention, NSA):
            return None
        if isinstance(attention, MLA):
            y_TD = _latent(attention, x_TD, before, angles, batch, batch.kv)
        else:
            assert isinstance(attention, GQA)
            y_TD = _grouped(attention, x_TD, before, angles, batch, batch.kv)
        if y_TD is None:
            return None
        if isinstance(mlp, MoE):
            done = _mix(mlp, y_TD, between)
        else:
            assert isinstance(mlp, MLP)
            done = _feed(mlp, y_TD, between)
        if done is None:
            return None
        x_TD, routing = done
        if routing is not None:
            routings.append(routing)
    hidden_TD = ops.norm_step(x_TD, _weight(decoder.norm), decoder.norm.eps)
    return None if hidden_TD is None else (hidden_TD, tuple(routings))


def _parts(module: nn.Module) -> dict[str, Any]:
    """Its modules by name. nn.Module's own look-up takes ten times as long, and a step has hundreds."""
    return module._modules


def _weight(module: nn.Module | None) -> Any:
    return None if module is None else module._parameters["weight"]


def _bias(module: nn.Module | None) -> Any:
    return None if module is None else module._parameters.get("bias")


def _are_plain(*linears: nn.Module | None) -> bool:
    """Whether each is x W^T + b, and nothing that a transform has put there: an adapter changes the class."""
    return all(
        linear is None or (type(linear) is Linear and linear.product is F.linear) for linear in linears
    )


def _latent(
    attention: MLA, x_TD: Tensor, norm: RMSNorm, angles: Angles, batch: Batch, kv: KVView
) -> Tensor | None:
    mla = attention.mla
    parts = _parts(attention)
    q_a, q_norm, q_b = None, None, parts.get("q_proj")
    if mla.q_lora_rank is not None:
        q_a, q_norm, q_b = parts["q_a_proj"], parts["q_a_layernorm"], parts["q_b_proj"]
    kv_a, kv_norm, kv_b = parts["kv_a_proj_with_mqa"], parts["kv_a_layernorm"], parts["kv_b_proj"]
    o = parts["o_proj"]
    if mla.indexer is not None or not _are_plain(q_a, q_b, kv_a, kv_b, o):
        return None
    return ops.latent_step(
        x_TD,
        _weight(norm),
        norm.eps,
        LatentWeights(
            *(_weight(q_a), _bias(q_a), _weight(q_norm), _weight(q_b)),
            *(_weight(kv_a), _bias(kv_a), _weight(kv_norm), _weight(kv_b)),
            *(_weight(o), _bias(o)),
        ),
        kv_norm.eps,
        (mla.num_attention_heads, mla.qk_nope_head_dim, mla.qk_rope_head_dim, mla.v_head_dim),
        *angles,
        kv.pages[attention.layer],
        kv.slots_T,
        kv.block_table_SB,
        kv.context_lens_S,
        kv.max_context_len,
        batch.cu_seqlens_S1,
        attention.scale,
        interleaved=attention.interleaved,
    )


def _grouped(
    attention: GQA, x_TD: Tensor, norm: RMSNorm, angles: Angles, batch: Batch, kv: KVView
) -> Tensor | None:
    parts = _parts(attention)
    q, k, v, o = parts["q_proj"], parts["k_proj"], parts["v_proj"], parts["o_proj"]
    if not _are_plain(q, k, v, o):
        return None
    q_norm, k_norm = attention.q_norm, attention.k_norm
    return ops.grouped_step(
        x_TD,
        _weight(norm),
        norm.eps,
        GroupedWeights(
            *(_weight(q), _weight(k), _weight(v), _bias(q), _bias(k), _bias(v)),
            *(_weight(o), _bias(o), _weight(q_norm), _weight(k_norm)),
        ),
        *angles,
        kv.pages[attention.layer],
        kv.slots_T,
        kv.block_table_SB,
        kv.context_lens_S,
        kv.max_context_len,
        batch.cu_seqlens_S1,
        attention.scale,
        interleaved=attention.interleaved,
    )


def _feed(mlp: MLP, x_TD: Tensor, norm: RMSNorm) -> tuple[Tensor, None] | None:
    gate, up, down = map(_parts(mlp).get, _FEED)
    if not _are_plain(gate, up, down):
        return None
    y_TD = ops.mlp_step(x_TD, _weight(norm), norm.eps, _weight(gate), _weight(up), _weight(down))
    return None if y_TD is None else (y_TD, None)


def _mix(mlp: MoE, x_TD: Tensor, norm: RMSNorm) -> tuple[Tensor, Routing] | None:
    parts = _parts(mlp)
    gate, experts, shared = parts["gate"], parts["experts"], parts.get("shared_experts")
    moe = gate.moe
    plain = type(gate) is Gate and type(experts) is Experts and type(mlp.dispatcher) is LocalDispatcher
    plain = plain and experts.product is ops.grouped_mlp
    if not plain or moe.eval_capacity_factor is not None or moe.topk_method not in _ROUTED_BY:
        return None
    of_shared = None
    if shared is not None:
        linears = tuple(map(_parts(shared).get, _FEED))
        if not _are_plain(*linears):
            return None
        of_shared = tuple(map(_weight, linears))
    stacks: Any = experts._parameters
    return ops.moe_step(
        x_TD,
        _weight(norm),
        norm.eps,
        ExpertWeights(
            *(_weight(gate), gate._buffers["e_score_correction_bias"]),
            *(stacks["gate_up_proj"], stacks["down_proj"], of_shared),
        ),
        moe.num_experts_per_tok,
        scoring_func=moe.scoring_func,
        n_group=moe.n_group,
        topk_group=moe.topk_group,
        norm_topk_prob=moe.norm_topk_prob,
        routed_scaling_factor=moe.routed_scaling_factor,
    )
