"""Burst: several steps of the same decodes, launched in a row without the host in between.

A small model's step is over before the host has made up the next one. But a decode needs nothing of the host
but its last token, which is on the device, and numbers that can be known ahead: so the pages of k tokens are
reserved, the u of all k draws made, and what a step reads goes on by itself, one position at a time
(`advance`). k tokens of a sequence come home in one parcel.

Who comes to the end of its room on the way goes on as a row that writes to the scratch page; what was drawn
for a text after its end is dropped. What a burst costs is that who waits, waits for its end. As a step that
reads prompts is alone, places that come free one after the other are filled once a burst. A grammar needs
each token on the host, so a step with one is alone.

The law: a request gets, bit for bit, what it gets step by step, to the rounding of products whose shapes
differ.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.engine.scheduler import Pick
from shoal.engine.spans import Inputs


def can_follow(picks: list[Pick]) -> bool:
    """Whether other steps of these picks, of which all get a token, may follow without the host."""
    return all(num_new == 1 and sequence.matcher is None for sequence, num_new, _ in picks)


def hand(inputs: Inputs, tokens_S: Tensor | None) -> None:
    """The tokens that were drawn go through the model next (None: they are somewhere else)."""
    if tokens_S is not None:
        inputs.codes_T[: len(tokens_S)].copy_(tokens_S)


def advance(inputs: Inputs, page_size: int, scratch: int) -> None:
    """In place: each row one position further. One that is at its end stays there and writes to the slot
    `scratch`."""
    assert inputs.ends_S is not None
    last_S, positions_S = inputs.ends_S - 1, inputs.positions_T
    ended_S = positions_S >= last_S
    torch.minimum(positions_S + 1, last_S, out=positions_S)
    pages_S1 = inputs.table_SB.gather(1, (positions_S // page_size).unsqueeze(1))
    slots_S = pages_S1.squeeze(1).long() * page_size + positions_S % page_size
    inputs.slots_T.copy_(slots_S.masked_fill(ended_S, scratch))
    inputs.contexts_S.copy_(positions_S + 1)
