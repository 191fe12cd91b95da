"""Block and Transformer: the model, whole. Read this first.

A step is one call: ids of a Batch go in, hidden states of every token and the routers' choices come out.
Training hands the hidden states to the loss, serving asks for the logits of the rows it needs; nothing here
knows which. Modules carry Hugging Face's names, so a published checkpoint is this model's state dict but for
stacked experts. A model may keep a part of its blocks alone (`keep`), and be run part by part.

Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2) adds modules after the last block: module
k joins the hidden state of a token with the embedding of the one k+1 places on, and predicts the next.
Embedding and head are the model's own. The hidden state that enters is the one after the norm, as in
transformers, Megatron and vLLM (the paper leaves it open), and the join is [embedding | hidden], the order of
the released weights.

Shape letters: T tokens, S sequences, D hidden, V vocabulary, K experts per token.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from copy import copy
from dataclasses import dataclass, replace
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shoal.batch import Batch
from shoal.config.model import GQAConfig, MLAConfig, ModelConfig, NSAConfig
from shoal.model.few_rows import few_rows
from shoal.model.gqa import GQA
from shoal.model.layers import MLP, Embedding, Linear, RMSNorm
from shoal.model.mla import MLA
from shoal.model.moe import Gate, MoE, hash_experts
from shoal.model.nsa import NSA
from shoal.model.rope import Angles, RotaryEmbedding
from shoal.ops import api as ops
from shoal.ops.api import OpenSum, Routing

Added = Tensor | OpenSum  # what goes to a stream (T, D)


def _attention(
    config: ModelConfig, layer: int, *, device: torch.device | None, dtype: torch.dtype
) -> MLA | NSA | GQA:
    match config.attention:
        case MLAConfig() as mla:
            return MLA(config, mla, layer, device=device, dtype=dtype)
        case NSAConfig() as nsa:
            return NSA(config, nsa, layer, device=device, dtype=dtype)
        case GQAConfig() as gqa:
            return GQA(config, gqa, layer, device=device, dtype=dtype)


@dataclass(frozen=True, eq=False)
class Output:
    # After the final norm: what the head, and the next prediction module, reads. Of a part that ends before
    # it, the stream that the next part takes.
    hidden_TD: Tensor
    routing: tuple[Routing, ...]  # of each layer that routes, in order
    ends: bool = True  # whether the last block is among those that ran
    before: int = 0  # layers that route before the first of them


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x)).

    The second sum is left to whoever comes next, because a sum and the norm of it are one pass: a block is
    given the stream x and what the block before has yet to add (None before the first), and returns the like.
    That may be a mixture's rows that nobody has added up.
    How it runs is `call`'s business: inside it, so that whoever gathers a block's weights as it is entered,
    and drops them as it is left, does so once.
    """

    def __init__(
        self, config: ModelConfig, layer: int, *, device: torch.device | None, dtype: torch.dtype
    ) -> None:
        super().__init__()
        self.call: CallBlock = call_block

        def norm() -> RMSNorm:
            return RMSNorm(config.hidden_size, config.rms_norm_eps, device=device, dtype=dtype)

        self.input_layernorm = norm()
        self.self_attn = _attention(config, layer, device=device, dtype=dtype)
        self.post_attention_layernorm = norm()
        self.mlp = (
            MoE(config, config.moe, device=device, dtype=dtype)
            if config.moe is not None and config.is_moe_layer(layer)
            else MLP(config.hidden_size, config.intermediate_size, device=device, dtype=dtype)
        )

    def forward(
        self, x_TD: Tensor, y_TD: Added | None, angles: Angles, batch: Batch, replay_TK: Tensor | None
    ) -> tuple[Tensor, Added, Routing | None]:
        return self.call(self, x_TD, y_TD, angles, batch, replay_TK)

    def run(
        self, x_TD: Tensor, y_TD: Added | None, angles: Angles, batch: Batch, replay_TK: Tensor | None
    ) -> tuple[Tensor, Tensor, Routing | None]:
        x_TD, normal_TD = self.attend(x_TD, y_TD, angles, batch)
        return x_TD, *self.feed_forward(normal_TD, replay_TK)

    def attend(self, x_TD: Tensor, y_TD: Added | None, angles: Angles, batch: Batch) -> tuple[Tensor, Tensor]:
        """The stream after attention, and the norm of it."""
        return self.post_attention_layernorm.add(*self.look(x_TD, y_TD, angles, batch))

    def look(self, x_TD: Tensor, y_TD: Added | None, angles: Angles, batch: Batch) -> tuple[Tensor, Tensor]:
        """The stream before attention, and what that has yet to add."""
        if y_TD is None:
            normal_TD = self.input_layernorm(x_TD)
        else:
            x_TD, normal_TD = self.input_layernorm.add(x_TD, y_TD)
        return x_TD, self.self_attn(normal_TD, angles, batch)

    def feed_forward(self, normal_TD: Tensor, replay_TK: Tensor | None) -> tuple[Tensor, Routing | None]:
        if isinstance(self.mlp, MoE):
            return self.mlp(normal_TD, replay_TK)
        return self.mlp(normal_TD), None


class CallBlock(Protocol):
    """Runs a block: as it is, or by a transform that saves less of it for the backward pass."""

    def __call__(
        self,
        block: Block,
        x_TD: Tensor,
        y_TD: Added | None,
        angles: Angles,
        batch: Batch,
        replay_TK: Tensor | None,
    ) -> tuple[Tensor, Added, Routing | None]: ...


def call_block(
    block: Block,
    x_TD: Tensor,
    y_TD: Added | None,
    angles: Angles,
    batch: Batch,
    replay_TK: Tensor | None,
) -> tuple[Tensor, Added, Routing | None]:
    """As `Block.run`, but where nothing learns, what a mixture has to add up may be left open. Not of a
    prediction module, whose parts are called whole (parallel/shard.py)."""
    if torch.is_grad_enabled() or not isinstance(block.mlp, MoE) or isinstance(block, PredictionModule):
        return block.run(x_TD, y_TD, angles, batch, replay_TK)
    stream = block.look(x_TD, y_TD, angles, batch)
    return block.mlp.open(block.post_attention_layernorm, *stream, replay_TK)


class SharedHead(nn.Module):
    """The norm before the output head of a prediction module. The head itself is the model's."""

    def __init__(self, config: ModelConfig, *, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device=device, dtype=dtype)


class PredictionModule(Block):
    """One multi-token-prediction module: join, a block, a norm."""

    def __init__(
        self, config: ModelConfig, layer: int, *, device: torch.device | None, dtype: torch.dtype
    ) -> None:
        super().__init__(config, layer, device=device, dtype=dtype)
        self.enorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device=device, dtype=dtype)
        self.hnorm = RMSNorm(config.hidden_size, config.rms_norm_eps, device=device, dtype=dtype)
        self.eh_proj = Linear(2 * config.hidden_size, config.hidden_size, device=device, dtype=dtype)
        self.shared_head = SharedHead(config, device=device, dtype=dtype)

    def join(self, embedding_TD: Tensor, hidden_TD: Tensor) -> Tensor:
        return self.eh_proj(torch.cat((self.enorm(embedding_TD), self.hnorm(hidden_TD)), dim=-1))


class Absent(nn.Module):
    """The place of what a part of a model does not keep."""


class Decoder(nn.Module):
    """What the names `model.*` hold: embedding, blocks, prediction modules, final norm."""

    def __init__(self, config: ModelConfig, *, device: torch.device | None, dtype: torch.dtype) -> None:
        super().__init__()
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, device=device, dtype=dtype)
        blocks, ahead = config.num_hidden_layers, config.num_nextn_predict_layers
        self.layers = nn.ModuleList(
            (Block if layer < blocks else PredictionModule)(config, layer, device=device, dtype=dtype)
            for layer in range(blocks + ahead)
        )
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, device=device, dtype=dtype)
        self.rotary = RotaryEmbedding(config.rope, config.attention.rope_dim, device=device)

    def blocks(self) -> Iterator[tuple[int, Block]]:
        """Those that are here, prediction modules last, each with its number."""
        for layer, block in enumerate(self.layers):
            if isinstance(block, Block):
                yield layer, block


class Transformer(nn.Module):
    """A model of any family. Parameters are empty until `init_weights` or a checkpoint fills them.

    On the meta device it costs nothing; `allocate` gives it memory elsewhere, and is the only way off that
    device. Its dtype is chosen when it is made: `.to(dtype)` would narrow the routers' correction biases and
    the rotary frequencies too, which are float32 always.
    """

    def __init__(
        self,
        config: ModelConfig,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        device = None if device is None else torch.device(device)
        self.config = config
        self.model = Decoder(config, device=device, dtype=dtype)
        self.lm_head = None
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, device=device, dtype=dtype)

    def allocate(self, device: torch.device | str) -> None:
        """Leave the meta device: empty parameters and the true rotary frequencies on `device`. What has
        memory already (offloaded.py) keeps it."""

        # What `to_empty` does, without the 2 s in which it makes torch import its symbolic shapes.
        def place(tensor: Tensor) -> Tensor:
            return torch.empty(tensor.shape, dtype=tensor.dtype, device=device) if tensor.is_meta else tensor

        if torch.device(device).type == "cuda":
            for _, block in self.model.blocks():
                if isinstance(block.self_attn, MLA):
                    block.self_attn.lay(device)
        self._apply(place)
        self.model.rotary.reset()

    @torch.no_grad()
    def init_weights(self, generator: torch.Generator) -> None:
        """DeepSeek's initialisation: every matrix normal with std `initializer_range`, norms 1, biases 0."""
        for module in self.modules():
            for name, tensor in (
                *module.named_parameters(recurse=False),
                *module.named_buffers(recurse=False),
            ):
                if isinstance(module, RotaryEmbedding):
                    module.reset()
                elif name in ("bias", "e_score_correction_bias", "noise_weight"):
                    tensor.zero_()
                elif isinstance(module, RMSNorm | nn.LayerNorm):
                    tensor.fill_(1.0)
                else:
                    tensor.normal_(std=self.config.initializer_range, generator=generator)

    def keep(self, layers: Collection[int]) -> None:
        """Drop all blocks but these, and what goes with those that are dropped.

        The embedding goes with the first block, and with whoever else reads it: prediction modules, a tied
        head. Those, the final norm and the head go with the last.
        """
        blocks, decoder = self.config.num_hidden_layers, self.model
        begins, ends = 0 in layers, blocks - 1 in layers
        for layer in range(len(decoder.layers)):
            if not (layer in layers if layer < blocks else ends):
                decoder.layers[layer] = Absent()
        if not begins and not (ends and self.reads_embedding_twice):
            decoder.register_module("embed_tokens", Absent())
        if not ends:
            decoder.register_module("norm", Absent())
            if self.lm_head is not None:
                self.register_module("lm_head", Absent())

    @property
    def reads_embedding_twice(self) -> bool:
        """Whether the embedding serves behind the last block, too."""
        return self.config.tie_word_embeddings or self.config.num_nextn_predict_layers > 0

    def beginning(self) -> Transformer:
        """The first blocks, until there is one of each kind, as a model of its own, of the same modules."""
        kinds = [
            (type(block.self_attn), type(block.mlp))
            for layer, block in self.model.blocks()
            if layer < self.config.num_hidden_layers
        ]
        blocks = 1 + max(map(kinds.index, kinds))
        config = replace(self.config, num_hidden_layers=blocks, num_nextn_predict_layers=0)
        short = Transformer(config, device="meta", dtype=self.head_weight().dtype)
        short.model, short.lm_head = copy(self.model), self.lm_head
        short.model._modules = {**self.model._modules, "layers": nn.ModuleList(self.model.layers[:blocks])}
        return short.train(self.training)

    def forward(self, batch: Batch, stream_TD: Tensor | None = None, layers: range | None = None) -> Output:
        """The whole, or the blocks `layers`: then from the stream that the part before gave."""
        blocks = self.config.num_hidden_layers
        x_TD, y_TD = self.model.embed_tokens(batch.ids_T) if stream_TD is None else stream_TD, None
        angles = self.model.rotary(batch.positions_T)
        if layers is None:
            layers = range(blocks)
            if (done := few_rows(self, x_TD, angles, batch)) is not None:
                return Output(*done)
        before = sum(map(self.config.is_moe_layer, range(layers.start)))
        routings: list[Routing] = []
        for layer in layers:
            replay_TK = (
                self.hashed(batch.ids_T, layer)
                if batch.routing is None
                else batch.routing[:, before + len(routings)]
            )
            x_TD, y_TD, routing = self.model.layers[layer](x_TD, y_TD, angles, batch, replay_TK)
            if routing is not None:
                routings.append(routing)
        assert y_TD is not None
        ends = layers.stop == blocks
        if ends:
            hidden_TD = self.model.norm.add(x_TD, y_TD)[1]
        else:
            hidden_TD = x_TD + (ops.close(y_TD) if isinstance(y_TD, OpenSum) else y_TD)
        return Output(hidden_TD, tuple(routings), ends, before)

    def predict_ahead(self, hidden_TD: Tensor, next_ids_T: Tensor, batch: Batch, depth: int = 0) -> Output:
        """Run prediction module `depth` on the hidden states of the one before it (the model's own for depth
        0).

        `next_ids_T[t]` is the token depth + 1 places after token t; the result predicts the one after that.
        """
        module = self.model.layers[self.config.num_hidden_layers + depth]
        assert isinstance(module, PredictionModule)
        x_TD = module.join(self.model.embed_tokens(next_ids_T), hidden_TD)
        angles = self.model.rotary(batch.positions_T)
        replay_TK = self.hashed(next_ids_T, self.config.num_hidden_layers + depth)
        x_TD, y_TD, routing = module(x_TD, None, angles, batch, replay_TK)
        hidden_TD = module.shared_head.norm.add(x_TD, y_TD)[1]
        return Output(hidden_TD, () if routing is None else (routing,))

    def hashed(self, ids_T: Tensor, layer: int) -> Tensor | None:
        """The experts of a layer that goes by ids alone: the choice is then given to the gate."""
        moe = self.config.moe
        return hash_experts(ids_T, layer, moe) if moe is not None and moe.topk_method == "hash" else None

    def head_weight(self) -> Tensor:
        """The output matrix (V, D): the embedding where it is tied."""
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    @property
    def has_plain_head(self) -> bool:
        """Whether logits are products with `head_weight`, all of them."""
        return self.lm_head is None or self.lm_head.product is F.linear

    def logits(self, hidden_TD: Tensor, batch: Batch, out: Tensor | None = None) -> Tensor:
        """(S, V) for the rows the batch asks for, or (T, V) for all; the first rows of `out` where given."""
        rows = hidden_TD if batch.last_S is None else hidden_TD.index_select(0, batch.last_S)
        as_one = len(rows) > 1 and self.has_plain_head and not ops.is_batch_invariant()
        if out is not None and as_one:
            return torch.mm(rows, self.head_weight().t(), out=out[: len(rows)])
        made = self._logits(rows)
        return made if out is None else out[: len(made)].copy_(made)

    def _logits(self, rows_XD: Tensor) -> Tensor:
        if ops.is_batch_invariant():
            return ops.linears(rows_XD, (self.head_weight(),), (None,))[0]
        logits = ops.head_step(rows_XD, self.head_weight()) if self.has_plain_head else None
        return self.project(rows_XD) if logits is None else logits

    def project(self, rows_XD: Tensor) -> Tensor:
        """Logits (X, V) of rows, whatever made them."""
        if len(rows_XD) == 1 and self.has_plain_head:
            return ops.linears(rows_XD, (self.head_weight(),), (None,))[0]
        if self.lm_head is not None:
            return self.lm_head.product(rows_XD, self.lm_head.weight, None)
        return F.linear(rows_XD, self.head_weight())

    def gates(self) -> list[Gate]:
        """The gate of each layer here that routes, in order: blocks first, then prediction modules."""
        return [block.mlp.gate for _, block in self.model.blocks() if isinstance(block.mlp, MoE)]
