"""Tensor parallel: of a model each process keeps its heads, its share of every SwiGLU, its rows of the head.

A rank's model is the same Transformer, of a config with heads and widths divided. What it lacks comes in
three places: the outputs of attention are summed over ranks, so are those of a feed-forward (routed and
shared experts together, each expert cut in the middle), and the logits of all ranks are laid side by side.
The latent of MLA, an indexer, the router, norms and the embedding (a tied head is one) are whole everywhere.

The law: after each sum every rank holds the same bits, so ranks never part. The logits are those of one
process but for the order of sums. `split` cuts a model that has weights, or one on the meta device, whose
checkpoint then comes through `cut`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.batch import Batch
from shoal.config.model import GQAConfig, MLAConfig, ModelConfig, NSAConfig
from shoal.model.gqa import GQA
from shoal.model.layers import Linear, RMSNorm
from shoal.model.mla import MLA
from shoal.model.quantised import is_quantised
from shoal.model.rope import Angles
from shoal.model.transformer import Added, Block, Transformer
from shoal.ops import api as ops
from shoal.ops.api import Routing

BY_ROWS = {"q_proj", "q_b_proj", "k_proj", "v_proj", "kv_b_proj", "gate_proj", "up_proj", "lm_head"}
BY_COLUMNS = {"o_proj", "down_proj"}


class Peers(Protocol):
    """The ranks of an engine, as the model meets them."""

    rank: int
    ranks: int

    def sum(self, part: Tensor) -> Tensor:
        """Over all ranks, the same bits on each."""
        ...

    def join(self, part: Tensor) -> Tensor:
        """The parts of all ranks, equal in shape, along the last dimension."""
        ...


def divide(config: ModelConfig, ranks: int) -> ModelConfig:
    """The config of a rank's model. ValueError for a model that does not come out even."""
    attention, moe = config.attention, config.moe
    if isinstance(attention, NSAConfig):
        raise ValueError(
            f"tensor_parallel is {ranks}, but attention of three branches (NSA) is not cut; set it to 1"
        )
    counts = {"num_attention_heads": attention.num_attention_heads}
    if "num_key_value_heads" in vars(attention):
        counts["num_key_value_heads"] = vars(attention)["num_key_value_heads"]
    wide = {"intermediate_size": config.intermediate_size} if config.num_dense_layers else {}
    experts = {} if moe is None else {"moe_intermediate_size": moe.moe_intermediate_size}
    for name, value in (counts | wide | experts).items():
        if value % ranks:
            raise ValueError(f"tensor_parallel is {ranks}, but {name} is {value}; it must divide that")
    return replace(
        config,
        attention=replace(attention, **{name: value // ranks for name, value in counts.items()}),
        moe=None if moe is None else replace(moe, moe_intermediate_size=moe.moe_intermediate_size // ranks),
        **{name: value // ranks for name, value in wide.items()},
    )


class TensorShare:
    """What one rank keeps of a model; known once that has been split."""

    def __init__(self, peers: Peers) -> None:
        self.peers = peers
        self._norms = set[str]()

    def cut(self, parameter: str, whole: Tensor) -> Tensor:
        """Of a parameter, or of a matrix in a stack of experts, this rank's part; itself if that is all."""
        *path, last = parameter.split(".")
        layer = path[-1] if last in ("weight", "bias") else last
        if layer == "gate_up_proj" and whole.dim() == 3:  # gate rows, then up rows
            return torch.cat([self._piece(half, 1) for half in whole.chunk(2, dim=1)], dim=1)
        if layer in BY_ROWS | self._norms or layer == "gate_up_proj":
            return self._piece(whole, max(whole.dim() - 2, 0))
        if layer in BY_COLUMNS and last != "bias":
            return self._piece(whole, whole.dim() - 1)
        return whole

    def expert(self, number: int) -> int | None:
        """Where an expert is in this rank's stack: all have a part here."""
        return number

    def _piece(self, whole: Tensor, dim: int) -> Tensor:
        each = -(-whole.shape[dim] // self.peers.ranks)  # the vocabulary need not come out even
        first = min(self.peers.rank * each, whole.shape[dim])
        return whole.narrow(dim, first, min(each, whole.shape[dim] - first))

    def split(self, model: Transformer) -> Transformer:
        """The model, with this rank's part of its parameters."""
        if is_quantised(model):
            raise ValueError(
                f"tensor_parallel is {self.peers.ranks}, but quantised weights are not cut; leave quant out"
            )
        if ops.is_batch_invariant():
            raise ValueError(
                f"tensor_parallel is {self.peers.ranks}, but sums over processes depend on the size of a "
                f"step; leave SHOAL_BATCH_INVARIANT out"
            )
        config = divide(model.config, self.peers.ranks)
        if vars(config.attention).get("qk_norm") == "all":
            self._norms = {"q_norm", "k_norm"}
        for name, parameter in list(model.named_parameters()):
            part = self.cut(name, parameter.detach())
            if part.shape != parameter.shape:
                *path, last = name.split(".")
                owner = model.get_submodule(".".join(path))
                owner.register_parameter(last, nn.Parameter(part.clone(), parameter.requires_grad))
        summed = _Summed(self.peers)
        for block in model.model.layers:
            assert isinstance(block, Block)
            block.call = summed.call
            attention = block.self_attn
            attention.o_proj.product = summed.product
            if isinstance(attention, MLA):
                assert isinstance(config.attention, MLAConfig)
                attention.mla = config.attention
            else:
                assert isinstance(attention, GQA) and isinstance(config.attention, GQAConfig)
                attention.gqa = config.attention
                if self._norms:
                    for name in self._norms:
                        attention.register_module(name, _NormOfAll(attention.get_submodule(name), self.peers))
        if isinstance(model.lm_head, Linear):
            model.lm_head.product = _Joined(self.peers, config.vocab_size).product
        model.config = config
        return model


class _Summed:
    def __init__(self, peers: Peers) -> None:
        self.peers = peers

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        y = self.peers.sum(F.linear(x, weight))
        return y if bias is None else y + bias

    def call(
        self,
        block: Block,
        x_TD: Tensor,
        y_TD: Added | None,
        angles: Angles,
        batch: Batch,
        replay_TK: Tensor | None,
    ) -> tuple[Tensor, Tensor, Routing | None]:
        x_TD, y_TD, routing = block.run(x_TD, y_TD, angles, batch, replay_TK)
        return x_TD, self.peers.sum(y_TD), routing


class _Joined:
    """The head: logits of each rank's part of the vocabulary, whole on all of them."""

    def __init__(self, peers: Peers, vocabulary: int) -> None:
        self.peers, self.vocabulary = peers, vocabulary
        self.each = -(-vocabulary // peers.ranks)

    def product(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        part = F.pad(F.linear(x, weight, bias), (0, self.each - len(weight)))
        return self.peers.join(part)[..., : self.vocabulary]


class _NormOfAll(nn.Module):
    """RMSNorm over the heads of all ranks, of which `weight` has this one's."""

    def __init__(self, norm: nn.Module, peers: Peers) -> None:
        super().__init__()
        assert isinstance(norm, RMSNorm)
        self.weight, self.eps, self.peers = norm.weight, norm.eps, peers

    def forward(self, x: Tensor) -> Tensor:
        squares = self.peers.sum(x.float().square().sum(-1, keepdim=True))
        scale = (squares / (x.shape[-1] * self.peers.ranks) + self.eps).rsqrt()
        return (x.float() * scale).to(x.dtype) * self.weight
