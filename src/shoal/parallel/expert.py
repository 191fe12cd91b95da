"""Experts on many processes: each keeps E / R of them, and tokens travel to their experts and back.

A token is sent to a process once, however many of its experts live there, with all its choices and weights:
the receiver adds up its own experts' share, and the sender the shares of the processes. So a token crosses at
most min(K, R) times, and where routing is limited to `topk_group` of `n_group` groups, and groups do not
straddle processes, at most as often as its groups have processes.

Counts go first, so that every buffer has its size: the one wait for the device of a layer. The law: a choice
is computed exactly once, by the process of its expert, and the sum over processes is taken in float32 in the
order of their ranks, so it is the same each time. Shape letters: T tokens here, M rows sent, N rows received,
D hidden, K experts per token, R processes on the expert axis.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from shoal.model.moe import MoE
from shoal.model.transformer import Transformer
from shoal.parallel.mesh import Mesh


def spread_experts(model: Transformer, mesh: Mesh) -> Transformer:
    """The model, each MoE layer with this process's experts alone, and a dispatcher that reaches the rest."""
    places = mesh.degrees.expert
    if places == 1:
        return model
    moe = model.config.moe
    if moe is None or moe.n_routed_experts % places:
        experts = "no experts" if moe is None else f"{moe.n_routed_experts} experts"
        raise ValueError(
            f"parallel.expert is {places}, but the model has {experts}; it must divide their number"
        )
    return ExpertShare(mesh.devices.get_group("expert"), moe.n_routed_experts).split(model)


class ExpertShare:
    """Of a model one process of the group keeps all but the experts of the others (checkpoint.hf.Share)."""

    def __init__(self, group: dist.ProcessGroup, experts: int) -> None:
        assert experts % group.size() == 0
        self.group, self.each = group, experts // group.size()
        self._here = range(group.rank() * self.each, (group.rank() + 1) * self.each)

    def split(self, model: Transformer) -> Transformer:
        dispatcher = ExpertDispatcher(self.group, self.each)
        for _, block in model.model.blocks():
            if isinstance(block.mlp, MoE):
                experts = block.mlp.experts
                for name, p in list(experts.named_parameters()):
                    kept = p.detach()[self._here.start : self._here.stop].clone()
                    experts.register_parameter(name, nn.Parameter(kept, p.requires_grad))
                block.mlp.dispatcher = dispatcher
        return model

    def cut(self, parameter: str, whole: Tensor) -> Tensor:
        stacked = ".mlp.experts." in parameter and whole.dim() > 2
        return whole[self._here.start : self._here.stop] if stacked else whole

    def expert(self, number: int) -> int | None:
        return number - self._here.start if number in self._here else None


@dataclass(frozen=True, eq=False)
class Sent:
    """What went out, to put the answers where they belong."""

    token_M: Tensor  # whose row it is; sorted by process
    sent: list[int]  # rows to each process
    received: list[int]  # and from each
    tokens: int


class ExpertDispatcher:
    """Sends tokens to the processes of their experts, `each` on every one, in the order of the ranks."""

    def __init__(self, group: dist.ProcessGroup, each: int) -> None:
        self.group = group
        self.each = each
        self.place, self.places = group.rank(), group.size()

    def dispatch(
        self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Sent]:
        # 1. Who gets which token. Column 0 takes choices that were dropped (-1).
        place_TK = torch.where(experts_TK < 0, 0, experts_TK // self.each + 1)
        going_TR = torch.zeros(
            len(experts_TK), self.places + 1, dtype=torch.bool, device=x_TD.device
        ).scatter_(1, place_TK.long(), True)[:, 1:]
        # 2. Counts, both ways, in one wait.
        sent_R = going_TR.sum(0)
        received_R = torch.empty_like(sent_R)
        dist.all_to_all_single(received_R, sent_R, group=self.group)
        sent, received = torch.stack((sent_R, received_R)).tolist()
        # 3. The rows, by process, and within it in the order of the tokens.
        token_M = going_TR.T.nonzero()[:, 1]
        plan = Sent(token_M, sent, received, len(x_TD))
        x_ND = self._travel(x_TD[token_M], plan)
        weights_NK = self._travel(weights_TK[token_M], plan)
        experts_NK = self._travel(experts_TK[token_M], plan) - self.place * self.each
        elsewhere_NK = (experts_NK < 0) | (experts_NK >= self.each)
        return x_ND, experts_NK.masked_fill(elsewhere_NK, -1), weights_NK, plan

    def combine(self, y_TD: Tensor, handle: Any) -> Tensor:
        back = Sent(handle.token_M, handle.received, handle.sent, handle.tokens)
        return _Gathered.apply(self._travel(y_TD, back), handle)

    def _travel(self, rows: Tensor, plan: Sent) -> Tensor:
        return _AllToAll.apply(rows.contiguous(), plan.sent, plan.received, self.group)


class _AllToAll(torch.autograd.Function):
    """Rows to each process, and from each; the gradient goes the same way back."""

    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup
    ) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _exchange(rows, sent, received, group)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        return _exchange(grad.contiguous(), ctx.received, ctx.sent, ctx.group), None, None, None


def _exchange(rows: Tensor, sent: list[int], received: list[int], group: dist.ProcessGroup) -> Tensor:
    out = rows.new_empty(sum(received), *rows.shape[1:])
    dist.all_to_all_single(out, rows, received, sent, group=group)
    return out


class _Gathered(torch.autograd.Function):
    """The rows of each token, added up in float32: (T, D). A process has a token at most once, so that each
    addition is of rows that are all different, and its order is given."""

    @staticmethod
    def forward(ctx: Any, y_MD: Tensor, plan: Sent) -> Tensor:
        ctx.token_M = plan.token_M
        total_TD = torch.zeros(plan.tokens, y_MD.shape[1], dtype=torch.float32, device=y_MD.device)
        for token, y in zip(plan.token_M.split(plan.sent), y_MD.split(plan.sent), strict=True):
            total_TD.index_add_(0, token, y.float())
        return total_TD.to(y_MD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, None]:
        return grad_TD[ctx.token_M], None
