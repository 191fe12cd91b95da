"""What the routers of a model do with texts, domain by domain, from the records that the model returns.

One pass a batch, as in evaluation; the records are added up and thrown away, so a text of any length takes
the same memory. The law: watching changes nothing, and what is counted is what was chosen: a layer's loads
sum to its tokens' choices, its pairs to K (K - 1) a token.

Shape letters: T tokens, L layers that route, E experts, K experts per token, N tokens of the sample.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from shoal.batch import Batch
from shoal.model.moe import Dispatcher, MoE, max_violation
from shoal.model.transformer import Output, Transformer
from shoal.ops import api as ops
from shoal.ops.api import Routing


@dataclass(frozen=True, eq=False)
class Sample:
    """Tokens one by one: what each layer's router chose, best first, and the weights it gave."""

    ids_N: Tensor
    experts_NLK: Tensor
    weights_NLK: Tensor


@dataclass(frozen=True, eq=False)
class Observation:
    """Of one domain. Counts are int64, sums float64, all on the CPU."""

    name: str
    tokens: int
    bits_per_byte: float
    load_LE: Tensor  # choices
    weight_LE: Tensor  # sum of the weights that came with them
    pairs_LEE: Tensor  # tokens that chose both; the diagonal is the load
    entropy_L: Tensor  # of the scores as a distribution over experts, mean over tokens, in bits
    norms_L2: Tensor  # of what routed and shared experts put out, mean over the first batch; NaN where none
    sample: Sample
    seconds: float  # of the passes and the watching
    watching: float  # of which adding up the records

    @property
    def max_violation_L(self) -> Tensor:
        return max_violation(self.load_LE)

    @property
    def load_entropy_L(self) -> Tensor:
        """Of where the choices went, in bits; log2(E) where all experts work alike."""
        return entropy(self.load_LE.double())

    def experts_for(self, share: float) -> Tensor:
        """(L,) the fewest experts that take this share of the choices: the skew of a narrow domain."""
        sorted_LE = self.load_LE.double().sort(1, descending=True).values.cumsum(1)
        return (sorted_LE < share * sorted_LE[:, -1:]).sum(1) + 1


@torch.inference_mode()
def observe(
    model: Transformer, name: str, batches: Iterable[Batch], num_bytes: int, *, sample: int = 128
) -> Observation:
    """Run a domain through the model and add up what its routers did. ValueError if nothing routes."""
    if model.config.moe is None:
        raise ValueError("this model routes nothing, so there is nothing to inspect")
    totals: _Totals | None = None
    was, nats, tokens, watching, start = model.training, 0.0, 0, 0.0, time.perf_counter()
    norms_L2 = torch.empty(0)
    model.eval()
    try:
        for batch in batches:
            assert batch.targets_T is not None and batch.weights_T is not None
            if totals is None:
                output, norms_L2 = _with_norms(model, batch)
            else:
                output = model(batch)
            loss = ops.linear_cross_entropy(
                output.hidden_TD, model.head_weight(), batch.targets_T, batch.weights_T
            )
            nats += loss.total.item()  # waits for the device, so what follows is the watching alone
            begun = time.perf_counter()
            totals = _Totals.begin(output.routing, batch, sample) if totals is None else totals
            totals.add(output.routing)
            _wait(batch.ids_T.device)
            watching += time.perf_counter() - begun
            tokens += batch.num_tokens
    finally:
        model.train(was)
    if totals is None:
        raise ValueError(f"{name} holds no text")
    return Observation(
        name=name,
        tokens=tokens,
        bits_per_byte=nats / math.log(2) / num_bytes,
        load_LE=totals.pairs_LEE.diagonal(dim1=1, dim2=2).round().long().cpu(),
        weight_LE=totals.weight_LE.cpu(),
        pairs_LEE=totals.pairs_LEE.round().long().cpu(),
        entropy_L=(totals.entropy_L / tokens).cpu(),
        norms_L2=norms_L2.cpu(),
        sample=totals.sample,
        seconds=time.perf_counter() - start,
        watching=watching,
    )


def entropy(weights: Tensor) -> Tensor:
    """Of the last axis as a distribution, in bits."""
    wide = weights.double()
    share = wide / wide.sum(-1, keepdim=True).clamp(min=1e-300)
    return torch.special.entr(share).sum(-1) / math.log(2)


def divergence(loads_DLE: Tensor) -> Tensor:
    """(L,) how far domains part: the Jensen-Shannon divergence of their loads, in bits, each domain alike.

    0 where all use the same experts; log2 of the domains where none shares one.
    """
    share_DLE = loads_DLE.double() / loads_DLE.double().sum(-1, keepdim=True).clamp(min=1e-300)
    return entropy(share_DLE.mean(0)) - entropy(share_DLE).mean(0)


def specialists(loads_DLE: Tensor, lift: float = 2.0) -> list[list[tuple[int, int, float]]]:
    """For each domain the experts (layer, expert, lift) whose share of its choices is `lift` times their mean
    share over all domains or more, the strongest first.
    """
    share_DLE = loads_DLE.double() / loads_DLE.double().sum(-1, keepdim=True).clamp(min=1e-300)
    lift_DLE = share_DLE / share_DLE.mean(0).clamp(min=1e-300)
    found = []
    for lift_LE in lift_DLE:
        places = (lift_LE >= lift).nonzero().tolist()
        rows = [(layer, expert, float(lift_LE[layer, expert])) for layer, expert in places]
        found.append(sorted(rows, key=lambda row: -row[2]))
    return found


def together(pairs_EE: Tensor, tokens: int) -> Tensor:
    """(E, E) how much oftener two experts are chosen together than if each were chosen on its own; the
    diagonal is NaN. Experts are never independent: a token has only K choices, so the mean lies below 1.
    """
    load_E = pairs_EE.diagonal().double()
    expected_EE = load_E.unsqueeze(0) * load_E.unsqueeze(1) / tokens
    return (pairs_EE.double() / expected_EE.clamp(min=1e-300)).fill_diagonal_(math.nan)


@torch.inference_mode()
def similarity(model: Transformer) -> Tensor:
    """(L, E, E) cosine of each two experts' weights, laid out as they are: neurons are not matched up, so
    experts that differ by their order alone count as unlike.
    """
    layers = []
    for block in list(model.model.layers)[: model.config.num_hidden_layers]:
        if not isinstance(block.mlp, MoE):
            continue
        gram_EE: Tensor | None = None
        for stack in (block.mlp.experts.gate_up_proj, block.mlp.experts.down_proj):
            for part in stack.flatten(1).split(1 << 20, dim=1):  # a piece in float32 at a time
                wide = part.float()
                gram_EE = wide @ wide.T if gram_EE is None else gram_EE + wide @ wide.T
        assert gram_EE is not None
        norm_E = gram_EE.diagonal().clamp(min=1e-30).sqrt()
        layers.append((gram_EE / norm_E.unsqueeze(0) / norm_E.unsqueeze(1)).cpu())
    return torch.stack(layers)


@dataclass(eq=False)
class _Totals:
    """The sums of a domain so far, on the model's device."""

    weight_LE: Tensor
    pairs_LEE: Tensor
    entropy_L: Tensor
    sample: Sample

    @classmethod
    def begin(cls, routing: tuple[Routing, ...], batch: Batch, sample: int) -> _Totals:
        layers, experts = len(routing), routing[0].scores_TE.shape[1]
        device = batch.ids_T.device
        sums = torch.zeros(layers, experts, dtype=torch.float64, device=device)
        first = Sample(
            batch.ids_T[:sample].cpu(),
            torch.stack([layer.experts_TK[:sample] for layer in routing], 1).cpu(),
            torch.stack([layer.weights_TK[:sample] for layer in routing], 1).cpu(),
        )
        pairs = torch.zeros(layers, experts, experts, dtype=torch.float64, device=device)
        return cls(sums, pairs, sums.new_zeros(layers), first)

    def add(self, routing: tuple[Routing, ...]) -> None:
        for layer, (experts_TK, weights_TK, scores_TE, _) in enumerate(routing):
            kept_TK = experts_TK >= 0  # capacity drops choices
            index_TK = experts_TK.clamp(min=0)
            # A token's choices as a row of ones: its product with itself is who was chosen with whom.
            chosen_TE = torch.zeros_like(scores_TE).scatter_add_(1, index_TK, kept_TK.to(scores_TE.dtype))
            self.pairs_LEE[layer] += chosen_TE.T @ chosen_TE  # whole numbers, exact in float32 below 2^24
            given = (weights_TK * kept_TK).double()
            self.weight_LE[layer].index_add_(0, index_TK.flatten(), given.flatten())
            share_TE = scores_TE / scores_TE.sum(1, keepdim=True).clamp(min=1e-30)
            self.entropy_L[layer] += torch.special.entr(share_TE).sum() / math.log(2)


class _Watched:
    """A layer's dispatcher, and the mean norm of what it brings back from the routed experts.

    Under another dispatcher than the local one a layer calls its shared experts by themselves, so that they
    can be watched too.
    """

    def __init__(self, dispatcher: Dispatcher) -> None:
        self.dispatcher, self.routed, self.shared = dispatcher, math.nan, math.nan

    def dispatch(
        self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Any]:
        return self.dispatcher.dispatch(x_TD, experts_TK, weights_TK)

    def combine(self, y_TD: Tensor, handle: Any) -> Tensor:
        combined_TD = self.dispatcher.combine(y_TD, handle)
        self.routed = _mean_norm(combined_TD)
        return combined_TD

    def hear(self, module: nn.Module, given: Any, out_TD: Tensor) -> None:
        self.shared = _mean_norm(out_TD)


def _with_norms(model: Transformer, batch: Batch) -> tuple[Output, Tensor]:
    """The output, and (L, 2) the mean norm of what routed and shared experts put out."""
    blocks = list(model.model.layers)[: model.config.num_hidden_layers]
    layers = [block.mlp for block in blocks if isinstance(block.mlp, MoE)]
    watched, hooks = [_Watched(layer.dispatcher) for layer in layers], list[RemovableHandle]()
    for layer, watch in zip(layers, watched, strict=True):
        layer.dispatcher = watch
        if layer.shared_experts is not None:
            hooks.append(layer.shared_experts.register_forward_hook(watch.hear))
    try:
        output = model(batch)
    finally:
        for hook in hooks:
            hook.remove()
        for layer, watch in zip(layers, watched, strict=True):
            layer.dispatcher = watch.dispatcher
    norms = [(watch.routed, watch.shared) for watch in watched]
    return output, torch.tensor(norms, dtype=torch.float64)


def _mean_norm(rows_TD: Tensor) -> float:
    return rows_TD.float().norm(dim=-1).mean().item()


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
