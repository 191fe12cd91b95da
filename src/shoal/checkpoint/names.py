"""What checkpoints call the model's tensors: one list of pieces, read by the loader and the writer alike.

A parameter carries Hugging Face's own name, so most of this is the identity. Four things are not: routed
experts are stacked in memory and published one by one; Mixtral has words of its own; a multi-token-prediction
module is published with copies of the embedding and the head that the model does not keep; a tied head may be
written out or not.

Its one law: every element of every parameter is in exactly one piece that is `own`. Files and dtypes are not
known here.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from shoal.config.model import ModelConfig

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
GATE_UP, DOWN = ".mlp.experts.gate_up_proj", ".mlp.experts.down_proj"


@dataclass(frozen=True)
class Piece:
    """A tensor of a checkpoint, and the part of a parameter (or buffer) it stands for.

    An `own` piece fills that part. A `copy` repeats it and is published; a `tied` one repeats it and is not.
    """

    stored: str
    parameter: str
    expert: int | None = None  # of a stack of experts, only this one
    half: Literal[0, 1] | None = None  # of its rows, only the gate's (0) or the up projection's (1)
    role: Literal["own", "copy", "tied"] = "own"

    def of(self, parameter: Tensor) -> Tensor:
        """The view of the parameter that this piece holds."""
        rows = parameter if self.expert is None else parameter[self.expert]
        return rows if self.half is None else rows.chunk(2)[self.half]


def prediction_prefixes(config: ModelConfig) -> tuple[str, ...]:
    """What the names of all multi-token-prediction tensors begin with."""
    layers = range(config.num_hidden_layers, config.num_hidden_layers + config.num_nextn_predict_layers)
    return tuple(f"model.layers.{layer}." for layer in layers)


def published(config: ModelConfig, parameters: Iterable[str]) -> Iterator[Piece]:
    """The pieces as the released checkpoint of this family names them, in the order of the parameters."""
    for parameter in parameters:
        yield from _published(config, parameter)
    yield from _repeated(config)


def present(config: ModelConfig, parameters: Iterable[str], stored: Container[str]) -> Iterator[Piece]:
    """The same, but a parameter that is stored under its name in memory, experts stacked, is one piece."""
    for parameter in parameters:
        if parameter in stored:
            yield Piece(parameter, parameter)
        else:
            yield from _published(config, parameter)
    yield from (piece for piece in _repeated(config) if piece.stored in stored)


def _published(config: ModelConfig, parameter: str) -> Iterator[Piece]:
    mixtral = config.model_type == "mixtral"
    gate, up, down = ("w1", "w3", "w2") if mixtral else ("gate_proj", "up_proj", "down_proj")
    name = parameter.replace(".mlp.", ".block_sparse_moe.") if mixtral else parameter
    experts = range(config.moe.n_routed_experts if config.moe else 0)
    stack = name.rpartition(".")[0]
    if parameter.endswith(GATE_UP):
        for expert in experts:
            yield Piece(f"{stack}.{expert}.{gate}.weight", parameter, expert, 0)
            yield Piece(f"{stack}.{expert}.{up}.weight", parameter, expert, 1)
    elif parameter.endswith(DOWN):
        for expert in experts:
            yield Piece(f"{stack}.{expert}.{down}.weight", parameter, expert)
    else:
        yield Piece(name, parameter)


def _repeated(config: ModelConfig) -> Iterator[Piece]:
    head = EMBEDDING if config.tie_word_embeddings else HEAD
    if config.tie_word_embeddings:
        yield Piece(HEAD, EMBEDDING, role="tied")
    for prefix in prediction_prefixes(config):
        yield Piece(f"{prefix}embed_tokens.weight", EMBEDDING, role="copy")
        yield Piece(f"{prefix}shared_head.head.weight", head, role="copy")
