"""A reward model at work: answers are read whole, and each gets a number, the higher the better.

The number is the logit that the model gives the padding token after the answer's last: a row of the head that
nothing else uses, so a reward model is a checkpoint like any other (stages/preference makes one). The law:
what an answer is worth does not depend on which others are read with it, but to the rounding of products;
`compare` alone weighs a group's answers against each other.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Self

import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.checkpoint import hf
from shoal.data.text import Tokenizer
from shoal.model.transformer import Transformer

PREFERENCE = "preference"  # the name of this reward
AT_ONCE = 16_384  # tokens


class Appraiser:
    def __init__(self, model: Transformer, token: int) -> None:
        self.model, self.token = model.eval().requires_grad_(False), token

    @classmethod
    def load(cls, path: str, policy: Transformer) -> Self:
        """ValueError if it does not count the policy's tokens."""
        head = policy.head_weight()
        model = hf.load(path, device=head.device, dtype=head.dtype, mtp=False)
        if model.config.vocab_size != policy.config.vocab_size:
            raise ValueError(
                f"the reward model {path} has {model.config.vocab_size} tokens, the policy "
                f"{policy.config.vocab_size}; they must share a vocabulary"
            )
        return cls(model, Tokenizer.load(path).pad_id)

    @torch.no_grad()
    def values(self, texts: Sequence[Sequence[int]]) -> Tensor:
        """Of each text, its prompt included: (S,) float32."""
        told: list[Tensor] = []
        ready: list[Sequence[int]] = []
        for text in [*texts, []]:
            if ready and (not text or sum(map(len, ready)) + len(text) > AT_ONCE):
                batch = pack_whole(ready, self.model.head_weight().device)
                told.append(last_logits(self.model, batch, self.token))
                ready = []
            ready.append(text)
        return torch.cat(told)

    def compare(self, texts: Sequence[Sequence[int]], kind: Literal["pointwise", "pairwise"]) -> list[float]:
        """What each of a group's answers is worth, between 0 and 1."""
        values_G = self.values(texts).double()
        if kind == "pointwise":
            return values_G.sigmoid().tolist()
        wins_GG = (values_G.unsqueeze(1) - values_G).sigmoid().fill_diagonal_(0)
        return (wins_GG.sum(1) / (len(values_G) - 1)).tolist()


def pack_whole(texts: Sequence[Sequence[int]], device: torch.device) -> Batch:
    """Texts end to end, every token read; `last_S` is the row of each one's last."""
    lengths = torch.tensor([len(text) for text in texts])
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    return Batch(
        ids_T=torch.tensor([token for text in texts for token in text], device=device),
        positions_T=torch.cat([torch.arange(length) for length in lengths.tolist()]).to(device),
        cu_seqlens_S1=bounds.int().to(device),
        max_seqlen=int(lengths.max()),
        last_S=(bounds[1:] - 1).to(device),
    )


def last_logits(model: Transformer, batch: Batch, token: int) -> Tensor:
    """(S,) float32: the token's logit after each text. Differentiable."""
    assert batch.last_S is not None
    return (model(batch).hidden_TD[batch.last_S] @ model.head_weight()[token]).float()
