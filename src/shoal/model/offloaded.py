"""Routed experts in host memory, the hot ones in slots on the device; and `offload`, which puts them there.

A layer keeps all its experts in (pinned) host memory and some in slots, which to the product are a smaller
stack: ids become slots by a table, and the op never knows. Before it runs, what the routing names and no
slot has is copied, over those least used of late. So the ids must reach the host in every layer of every
step: there is no graph over a step, and the host waits for each gate.

The law: the output is, bit for bit, that of the same ops over all experts. A step that names more experts
than there are slots goes in rounds: each choice's row of output is made by itself, and the rows are weighed
and added in one sum, as without rounds.

Why the least used of late: of what was replayed (benchmarks/offload.py, LOG.md) it hits most at every size;
and a prompt, whose step names all alike, says nothing of what is hot. `offload` is f(model, settings) ->
model, after `quantise`. Shape letters: T tokens, M = T K choices, K experts a token, D hidden, E experts.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn

from shoal.model.layers import MLP
from shoal.model.moe import Experts, LocalDispatcher, MoE
from shoal.model.quantised import QuantisedExperts
from shoal.model.transformer import Transformer

_GIB = 2**30
HALF_LIFE = 32  # steps


class Slots:
    """Which expert is in which slot, and which has to make room. Integers on the host alone."""

    def __init__(self, count: int, experts: int) -> None:
        self.count = count
        self.slot_of: dict[int, int] = {}
        self._used_E = np.zeros(experts)  # steps that named each, halved every `HALF_LIFE` steps
        self.queries = self.hits = 0

    def rounds(self, named: list[int]) -> list[list[int]]:
        """The experts that a step names, as many at a time as there are slots, those that are here first."""
        self._used_E *= 0.5 ** (1 / HALF_LIFE)
        self._used_E[named] += 1
        order = sorted(named, key=lambda expert: expert not in self.slot_of)
        return [order[first : first + self.count] for first in range(0, len(order), self.count)]

    def bring(self, wanted: list[int]) -> list[tuple[int, int]]:
        """Give each of these a slot, no more of them than slots: the (expert, slot) that are to be copied."""
        assert len(wanted) <= self.count
        missing = [expert for expert in wanted if expert not in self.slot_of]
        self.queries += len(wanted)
        self.hits += len(wanted) - len(missing)
        free = list(range(len(self.slot_of), self.count))
        others = sorted(self.slot_of.keys() - set(wanted), key=lambda expert: (self._used_E[expert], expert))
        room = max(0, len(missing) - len(free))
        free += [self.slot_of.pop(expert) for expert in others[:room]]
        copies = list(zip(missing, free, strict=False))
        self.slot_of.update(copies)
        return copies


class OffloadedExperts(nn.Module):
    """As the experts it is made of, whose parameters it has under their names in host memory."""

    def __init__(self, experts: Experts | QuantisedExperts, slots: int, device: torch.device) -> None:
        super().__init__()
        stacks = dict(experts.named_parameters(recurse=False))
        self.count = stacks["down_proj"].shape[0]
        self.slots = Slots(slots, self.count)
        self.hot = copy.copy(experts)  # the same product, over fewer
        self.hot._parameters = {
            name: _frozen(torch.empty(slots, *stack.shape[1:], dtype=stack.dtype, device=stack.device))
            for name, stack in stacks.items()
        }
        for name, stack in stacks.items():
            self.register_parameter(name, _frozen(_on_host(stack.detach(), pin=device.type == "cuda")))

    def takes(self, shared: MLP) -> bool:
        return self.hot.takes(shared)

    def forward(
        self,
        x_TD: Tensor,
        experts_TK: Tensor,
        weights_TK: Tensor,
        shared: MLP | None = None,
    ) -> Tensor:
        """As `Experts.forward`."""
        named_E1 = torch.zeros(self.count + 1, dtype=torch.bool, device=experts_TK.device)
        named_E1[experts_TK.flatten()] = True  # -1 is the last
        rounds = self.slots.rounds(named_E1[:-1].nonzero().flatten().tolist())
        if len(rounds) <= 1:
            self._bring(rounds[0] if rounds else [])
            slots_TK = self._find(self.slots.slot_of)[experts_TK]
            return self.hot(x_TD, slots_TK, weights_TK, shared)
        # One row a choice: a token's experts may come in different rounds.
        x_MD = x_TD.repeat_interleave(experts_TK.shape[1], 0)
        experts_M1, ones_M1 = experts_TK.reshape(-1, 1), weights_TK.new_ones(weights_TK.numel(), 1)
        rows_MD = torch.zeros_like(x_MD)
        for wanted in rounds:
            self._bring(wanted)
            rows_MD += self.hot(x_MD, self._find(wanted)[experts_M1], ones_M1)  # zeros, but in its own round
        y_TD = self.hot.add_up(rows_MD, experts_TK, weights_TK)
        if shared is None:
            return y_TD
        return y_TD + self.hot(x_TD, torch.full_like(experts_TK, -1), weights_TK, shared)

    def reset_counts(self) -> None:
        self.slots.queries = self.slots.hits = 0

    def _bring(self, wanted: list[int]) -> None:
        copies = self.slots.bring(wanted)
        for name, stack in self.named_parameters(recurse=False):
            hot = self.hot.get_parameter(name)
            for expert, slot in copies:
                hot[slot].copy_(stack[expert], non_blocking=True)

    def _find(self, experts: Iterable[int]) -> Tensor:
        """The slots of these experts (E + 1,), on the device; -1 for others, and for -1, the last."""
        table = [-1] * (self.count + 1)
        for expert in experts:
            table[expert] = self.slots.slot_of[expert]
        return torch.tensor(table, device=self.hot.get_parameter("down_proj").device)


def offload(model: Transformer, gib: float, device: torch.device | str | None = None) -> Transformer:
    """The model with `gib` GiB of its routed experts off the device: all of them in host memory, and as many
    of a layer in slots as the rest has room for.

    A model on the meta device gets its host memory now, and the rest by `allocate`; `device` is where that
    will be. ValueError for what cannot leave, with what can.
    """
    device = torch.device(device or model.head_weight().device)
    layers = [block.mlp for block in model.model.layers if isinstance(block.mlp, MoE)]
    if not layers or model.config.moe is None:
        raise ValueError(f"offload is {gib:g} GiB, but this model routes nothing; leave it out")
    for moe in layers:
        if not isinstance(moe.dispatcher, LocalDispatcher) or type(moe.experts) not in (
            Experts,
            QuantisedExperts,
        ):
            raise ValueError(
                "this model's experts are spread over processes, adapted, or offloaded already; offload what "
                "is loaded anew, on one process"
            )
    moe, of_all = model.config.moe, sum(_nbytes(each.experts) for each in layers)
    an_expert = of_all // moe.n_routed_experts  # in all layers
    most = (moe.n_routed_experts - moe.num_experts_per_tok) * an_expert
    if not 0 < gib * _GIB <= most:
        raise ValueError(
            f"offload is {gib:g} GiB; it must be above 0 and at most {most / _GIB:.4g}: of "
            f"{of_all / _GIB:.4g} GiB of routed experts a layer keeps the {moe.num_experts_per_tok} on the "
            f"device that one token needs"
        )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if of_all > memory:
        raise ValueError(
            f"offloaded experts take {of_all / _GIB:.2f} GiB of host memory, and there are "
            f"{memory / _GIB:.2f}; hold them narrower (quant, --quant), or take more devices"
        )
    slots = int((of_all - gib * _GIB) // an_expert)
    for each in layers:
        each.add_module("experts", OffloadedExperts(each.experts, slots, device))
    return model


def offloaded(model: nn.Module) -> Iterator[OffloadedExperts]:
    """The layers whose experts are in host memory."""
    return (module for module in model.modules() if isinstance(module, OffloadedExperts))


def host_bytes(model: nn.Module) -> int:
    return sum(_nbytes(module) for module in offloaded(model))


def rounds_bytes(model: Transformer, tokens: int) -> int:
    """What a step in rounds holds beside its activations: three rows a choice, of one layer at a time."""
    if model.config.moe is None or next(offloaded(model), None) is None:
        return 0
    choices = tokens * model.config.moe.num_experts_per_tok
    return 3 * choices * model.config.hidden_size * model.head_weight().itemsize


def _nbytes(module: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in module.parameters(recurse=False))


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)


def _on_host(stack: Tensor, *, pin: bool) -> Tensor:
    """A stack in host memory, without values if it had none."""
    if stack.is_meta:
        return torch.empty(stack.shape, dtype=stack.dtype, pin_memory=pin)
    stack = stack.cpu()
    return stack.pin_memory() if pin else stack
