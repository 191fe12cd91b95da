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
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.config.model import ModelConfig, MoEConfig
from shoal.model.layers import MLP, RMSNorm
from shoal.ops import api as ops
from shoal.ops.api import OpenSum, Routing

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


def max_violation(load_LE: Tensor) -> Tensor:
    """MaxVio of each layer: its largest load over the mean, less 1; (L,) float64, 0 where no token came."""
    if load_LE.numel() == 0:
        return torch.zeros(0, dtype=torch.float64)
    mean_L = load_LE.double().mean(-1)
    return (load_LE.amax(-1) - mean_L) / mean_L.clamp(min=1e-9)


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
        self.generator: torch.Generator | None = None  # of what is drawn while the gate trains
        self.noise_weight = None  # of the spread of its noise
        if moe.noisy_gate:
            self.noise_weight = nn.Parameter(
                torch.empty(moe.n_routed_experts, hidden_size, device=device, dtype=dtype)
            )
        self.expert_weight = None  # of the gate over experts, where `weight` is that over their segments
        if moe.topk_method == "segments":
            self.expert_weight = nn.Parameter(
                torch.empty(moe.n_group, hidden_size, device=device, dtype=dtype)
            )
        # Float32 whatever the model's dtype: its values differ by less than bfloat16 can hold, and it is no
        # parameter.
        bias = torch.empty(moe.n_routed_experts, device=device, dtype=torch.float32)
        self.register_buffer("e_score_correction_bias", bias if moe.has_correction_bias else None)

    def forward(self, x_TD: Tensor, replay_TK: Tensor | None) -> Routing:
        moe, given_TK = self.moe, replay_TK
        assert replay_TK is not None or moe.topk_method != "hash", "the model hashes ids, and hands that in"
        if self._is_plain():
            routing = ops.gate(x_TD, self.weight, **self._rule(given_TK))
        else:
            logits_TE = ops.gate_logits(x_TD, self.weight)
            if self.perturb is not None and self.training:
                logits_TE = self.perturb(logits_TE)
            if self.noise_weight is not None and self.training:
                spread_TE = F.softplus(ops.gate_logits(x_TD, self.noise_weight))
                logits_TE = logits_TE + spread_TE * torch.randn(
                    logits_TE.shape, generator=self._generator(), device=logits_TE.device
                )
            if self.expert_weight is not None:
                logits_TE = join_segments(ops.gate_logits(x_TD, self.expert_weight), logits_TE)
            if replay_TK is None and moe.topk_method == "expert_choice":
                given_TK = choose_tokens(logits_TE.detach(), moe.num_experts_per_tok)
            elif replay_TK is None and moe.topk_method == "segments":
                given_TK = choose_segments(logits_TE.detach(), moe)
            routing = ops.route(logits_TE, **self._rule(given_TK))._replace(logits_TE=logits_TE)
        return self._kept(routing, replay_TK)

    def after(
        self, norm: RMSNorm, x_TD: Tensor, y_TD: Tensor, replay_TK: Tensor | None
    ) -> tuple[Tensor, Tensor, Routing]:
        """x + y, its norm, and what the gate makes of that."""
        if not self._is_plain():
            total_TD, normal_TD = norm.add(x_TD, y_TD)
            return total_TD, normal_TD, self(normal_TD, replay_TK)
        rule = self._rule(replay_TK)
        total_TD, normal_TD, routing = ops.add_norm_gate(
            x_TD, y_TD, norm.weight, norm.eps, self.weight, **rule
        )
        return total_TD, normal_TD, self._kept(routing, replay_TK)

    def _kept(self, routing: Routing, replay_TK: Tensor | None) -> Routing:
        """What chance and capacity leave of a choice."""
        moe = self.moe
        if moe.random_second and self.training and replay_TK is None:
            routing = self._leave_second_to_chance(routing)
        factor = moe.capacity_factor if self.training else moe.eval_capacity_factor
        if factor is None or replay_TK is not None:
            return routing
        share = routing.experts_TK.shape[0] * moe.num_experts_per_tok / moe.n_routed_experts
        capacity = max(MIN_CAPACITY, math.ceil(factor * share))
        kept_TK = ops.limit_capacity(routing.experts_TK, moe.n_routed_experts, capacity)
        return routing._replace(
            experts_TK=kept_TK, weights_TK=routing.weights_TK.masked_fill(kept_TK < 0, 0.0)
        )

    def _leave_second_to_chance(self, routing: Routing) -> Routing:
        """Second choices of weight w kept with probability 2 w: where the first is sure they are a waste."""
        second_T = routing.weights_TK[:, 1]
        chance_T = torch.rand(second_T.shape, generator=self._generator(), device=second_T.device)
        left_TK = torch.zeros_like(routing.experts_TK, dtype=torch.bool)
        left_TK[:, 1] = 2 * second_T.detach() <= chance_T
        return routing._replace(
            experts_TK=routing.experts_TK.masked_fill(left_TK, -1),
            weights_TK=routing.weights_TK.masked_fill(left_TK, 0.0),
        )

    def _generator(self) -> torch.Generator:
        if self.generator is None:
            raise ValueError(
                "this router draws while it trains, and has nothing to draw from; train it by a Trainer, "
                "give its gates a generator, or call model.eval()"
            )
        return self.generator

    def _is_plain(self) -> bool:
        """Whether the choice is a function of x W^T by one of the rules of `ops.route`."""
        own_rule = self.moe.topk_method in ("expert_choice", "segments")
        noisy = self.perturb is not None or self.noise_weight is not None
        return not own_rule and not (noisy and self.training)

    def _rule(self, given_TK: Tensor | None) -> dict[str, Any]:
        moe = self.moe
        return {
            "top_k": moe.num_experts_per_tok if given_TK is None else given_TK.shape[1],
            "scoring_func": moe.scoring_func,
            "bias_E": self.e_score_correction_bias,
            "n_group": moe.n_group if given_TK is None else 1,
            "topk_group": moe.topk_group if given_TK is None else 1,
            "norm_topk_prob": moe.norm_topk_prob,
            "routed_scaling_factor": moe.routed_scaling_factor,
            "replay_TK": given_TK,
        }


def hash_experts(ids_T: Tensor, layer: int, moe: MoEConfig) -> Tensor:
    """Experts (T, K) of tokens by their ids alone, another shuffle in each layer (arXiv 2106.04426, random
    hashing). With K > 1 they lie E // K apart."""
    mask, experts, top_k = (1 << 31) - 1, moe.n_routed_experts, moe.num_experts_per_tok
    # Products of 31 and 31 bits stay within int64. Odd factors, each followed by a fold of the high bits.
    mixed_T = (ids_T + 1) * 0x9E3779B1 + (layer + 1) * 0x85EBCA77 & mask
    for factor in (0x2C1B3C6D, 0x297A2D39):
        mixed_T = (mixed_T ^ (mixed_T >> 15)) * factor & mask
    first_T1 = ((mixed_T ^ (mixed_T >> 16)) % experts).unsqueeze(1)
    return (first_T1 + torch.arange(top_k, device=ids_T.device) * (experts // top_k)) % experts


def choose_tokens(logits_TE: Tensor, top_k: int) -> Tensor:
    """Each expert's T * K / E best tokens (at least one), as experts of tokens (T, E), -1 where not chosen.

    By softmax over experts (arXiv 2202.09368); ties go to the earlier token. The tokens of a pack compete,
    whatever their sequence.
    """
    tokens, experts = logits_TE.shape
    places = min(tokens, max(1, tokens * top_k // experts))
    best_CE = logits_TE.softmax(-1).sort(dim=0, descending=True, stable=True).indices[:places]
    chosen_TE = torch.zeros_like(logits_TE, dtype=torch.bool).scatter_(0, best_CE, True)
    return torch.arange(experts, device=logits_TE.device).where(chosen_TE, -1)


def join_segments(experts_TG: Tensor, segments_TE: Tensor) -> Tensor:
    """Logits (T, E) whose softmax is that of the experts times that of the segments within each."""
    within_TGM = segments_TE.unflatten(-1, (experts_TG.shape[-1], -1)).log_softmax(-1)
    return (experts_TG.log_softmax(-1).unsqueeze(-1) + within_TGM).flatten(-2)


def choose_segments(logits_TE: Tensor, moe: MoEConfig) -> Tensor:
    """Segments (T, K): the best of each of the best experts, by joined logits; ties to the smaller index."""
    joined_TGM = logits_TE.unflatten(-1, (moe.n_group, -1))
    size, each = joined_TGM.shape[-1], moe.num_experts_per_tok // moe.topk_group
    order = {"dim": -1, "descending": True, "stable": True}
    experts_TX = joined_TGM.logsumexp(-1).sort(**order).indices[:, : moe.topk_group]
    chosen_TXM = joined_TGM.take_along_dim(experts_TX.unsqueeze(-1), 1)
    segments_TXY = chosen_TXM.sort(**order).indices[..., :each]
    return (experts_TX.unsqueeze(-1) * size + segments_TXY).flatten(1)


GroupedProduct = Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]  # as ops.grouped_mlp


class Experts(nn.Module):
    """The routed experts, stacked: rows 0..F of `gate_up_proj[e]` are the gate, F..2F the up projection.

    `product` is the seam of `Linear`: a transform swaps it for an FP8 one.
    """

    def __init__(
        self, hidden_size: int, moe: MoEConfig, *, device: torch.device | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        experts, width = moe.n_routed_experts, moe.moe_intermediate_size
        self.gate_up_proj = nn.Parameter(
            torch.empty(experts, 2 * width, hidden_size, device=device, dtype=dtype)
        )
        self.down_proj = nn.Parameter(torch.empty(experts, hidden_size, width, device=device, dtype=dtype))
        self.product: GroupedProduct = ops.grouped_mlp
        self.add_up = ops.sum_choices  # of the product's rows, one a choice

    def forward(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        shared: MLP | None = None,
        *,
        leave_open: bool = False,
    ) -> Tensor | OpenSum:
        """The routed experts; where it `takes` them, with those of all tokens, and then the last sums may be
        left open."""
        stacks = (self.gate_up_proj, self.down_proj)
        if shared is None:
            return self.product(x_TD, experts_TK, weights_TK, *stacks)
        matrices = shared.matrices()
        assert self.product is ops.grouped_mlp and matrices is not None, "see `takes`"
        mixture = ops.open_mixture if leave_open else ops.mixture
        return mixture(x_TD, experts_TK, weights_TK, *stacks, *matrices)

    def takes(self, shared: MLP) -> bool:
        """Whether the product has a form with shared experts: the op's own has, of plain products."""
        return self.product is ops.grouped_mlp and shared.matrices() is not None


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
        return self._mix(x_TD, routing), routing

    def open(
        self, norm: RMSNorm, x_TD: Tensor, y_TD: Tensor, replay_TK: Tensor | None
    ) -> tuple[Tensor, Tensor | OpenSum, Routing]:
        """x + y, and what forward gives for its norm, but the last sums may be left to who reads it."""
        total_TD, normal_TD, routing = self.gate.after(norm, x_TD, y_TD, replay_TK)
        shared, experts = self._taken(), self.experts
        if shared is None or type(experts) is not Experts:
            return total_TD, self._mix(normal_TD, routing), routing
        rows_TK = routing.experts_TK, routing.weights_TK
        return total_TD, experts(normal_TD, *rows_TK, shared, leave_open=True), routing

    def _mix(self, x_TD: Tensor, routing: Routing) -> Tensor:
        if (taken := self._taken()) is not None:
            return self.experts(x_TD, routing.experts_TK, routing.weights_TK, taken)
        *rows, handle = self.dispatcher.dispatch(x_TD, routing.experts_TK, routing.weights_TK)
        y_TD = self.dispatcher.combine(self.experts(*rows), handle)
        if self.shared_experts is not None:
            y_TD = y_TD + self.shared_experts(x_TD)
        return y_TD

    def _taken(self) -> MLP | None:
        """The shared experts, if the routed ones take them along."""
        shared, local = self.shared_experts, type(self.dispatcher) is LocalDispatcher
        return shared if shared is not None and local and self.experts.takes(shared) else None
