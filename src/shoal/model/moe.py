"""The mixture-of-experts layer: gate, dispatcher, routed experts, shared experts.

y = shared(x) + sum over chosen experts of weight * expert(x). The gate runs in float32 whatever the model's
dtype. The dispatcher is the seam for expert parallelism: it moves tokens to where their experts live and
back; on one device it does nothing. The layer returns its routing decisions beside its output; who uses them
is not its business.

Shape letters: T tokens, D hidden, E experts, K experts per token, F expert hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from shoal.config.model import ModelConfig, MoEConfig
from shoal.model.layers import MLP
from shoal.ops import api as ops
from shoal.ops.api import Routing

MIN_CAPACITY = 4  # of an expert, where there is a capacity at all (Switch and GShard's own floor)


class Dispatcher(Protocol):
    """Brings tokens to the device of their experts. Expert ids it returns are local; -1 is an expert
    elsewhere.
    """

    def dispatch(
        self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Any]: ...

    def combine(self, y_TD: Tensor, handle: Any) -> Tensor: ...


class LocalDispatcher:
    """Every expert is here."""

    def dispatch(
        self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        return x_TD, experts_TK, weights_TK, None

    def combine(self, y_TD: Tensor, handle: Any) -> Tensor:
        return y_TD


class Gate(nn.Module):
    """Scores the experts and chooses, by the rule of the config."""

    e_score_correction_bias: Tensor | None

    def __init__(
        self, hidden_size: int, moe: MoEConfig, *, device: torch.device | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.moe = moe
        self.perturb: Callable[[Tensor], Tensor] | None = None  # of the logits, outside evaluation: noise
        self.weight = nn.Parameter(torch.empty(moe.n_routed_experts, hidden_size, device=device, dtype=dtype))
        # Float32 whatever the model's dtype: its values differ by less than bfloat16 can hold, and it is no
        # parameter.
        bias = torch.empty(moe.n_routed_experts, device=device, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias if moe.has_correction_bias else None)

    def forward(self, x_TD: Tensor, replay_TK: Tensor | None) -> Routing:
        moe = self.moe
        logits_TE = ops.gate_logits(x_TD, self.weight)
        if self.perturb is not None and self.training:
            logits_TE = self.perturb(logits_TE)
        routing = ops.route(
            logits_TE,
            moe.num_experts_per_tok,
            scoring_func=moe.scoring_func,
            bias_E=self.e_score_correction_bias,
            n_group=moe.n_group,
            topk_group=moe.topk_group,
            norm_topk_prob=moe.norm_topk_prob,
            routed_scaling_factor=moe.routed_scaling_factor,
            replay_TK=replay_TK,
        )._replace(logits_TE=logits_TE)
        factor = moe.capacity_factor if self.training else moe.eval_capacity_factor
        if factor is None or replay_TK is not None:
            return routing
        share = x_TD.shape[0] * moe.num_experts_per_tok / moe.n_routed_experts
        capacity = max(MIN_CAPACITY, math.ceil(factor * share))
        kept_TK = ops.limit_capacity(routing.experts_TK, moe.n_routed_experts, capacity)
        return routing._replace(
            experts_TK=kept_TK, weights_TK=routing.weights_TK.masked_fill(kept_TK < 0, 0.0)
        )


class Experts(nn.Module):
    """The routed experts, stacked: rows 0..F of `gate_up_proj[e]` are the gate, F..2F the up projection."""

    def __init__(
        self, hidden_size: int, moe: MoEConfig, *, device: torch.device | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        experts, width = moe.n_routed_experts, moe.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(
            torch.empty(experts, 2 * width, hidden_size, device=device, dtype=dtype)
        )
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, width, device=device, dtype=dtype))

    def forward(self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor) -> Tensor:
        return ops.grouped_mlp(x_TD, experts_TK, weights_TK, self.gate_up_proj, self.down_proj)


class MoE(nn.Module):
    def __init__(
        self, config: ModelConfig, moe: MoEConfig, *, device: torch.device | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.gate = Gate(config.hidden_size, moe, device=device, dtype=dtype)
        self.experts = Experts(config.hidden_size, moe, device=device, dtype=dtype)
        self.shared_experts = None
        if moe.n_shared_experts:
            self.shared_experts = MLP(
                config.hidden_size, moe.shared_intermediate_size, device=device, dtype=dtype
            )
        self.dispatcher: Dispatcher = LocalDispatcher()

    def forward(self, x_TD: Tensor, replay_TK: Tensor | None) -> tuple[Tensor, Routing]:
        routing = self.gate(x_TD, replay_TK)
        *rows, handle = self.dispatcher.dispatch(x_TD, routing.experts_TK, routing.weights_TK)
        y_TD = self.dispatcher.combine(self.experts(*rows), handle)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD, routing
