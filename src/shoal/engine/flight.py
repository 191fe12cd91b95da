"""Flight: a step on its way, and what it sends home beside the tokens that are drawn.

Log-probabilities of prompts, and the experts that positions were sent to, are gathered when a step is
launched, travel in parcels, and are opened when it lands: the host waits for none of them in between.

The law: a position is told once, by the step that brings its request a token after it, unless a guess that
was wrong, or a prompt that lost its pages, has to be gone through again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from shoal.engine import staging
from shoal.engine.events import Routed
from shoal.engine.records import Records
from shoal.engine.runner import Runner, Step
from shoal.engine.scheduler import Pick
from shoal.engine.sequence import Scored, Sequence

Scores = list[tuple[Sequence, int, staging.Parcel]]  # of prompts, from a position on


class Drawing(NamedTuple):
    """A pick that gets tokens."""

    pick: Pick
    flown: int  # how many the scheduler counts on
    rows: int  # drawn, one after the other; guesses that may fall are among them


@dataclass(frozen=True, eq=False)
class Flight:
    """A step on its way, or several of the same decodes: who gets what when it comes."""

    picks: list[Pick]
    starts: list[int]  # the position of each pick's first token
    step: Step
    drawn: list[Drawing]  # those that get tokens, in the order of the rows
    samples: staging.Parcel | None  # of those, `sampling.Drawn.pack`, row after row
    scores: Scores
    read: list[Sequence]  # prompts that wanted no more than to be read
    routed: dict[int, tuple[int, staging.Parcel]]  # by request: where its positions from one on were sent


def score_prompts(runner: Runner, picks: list[Pick], step: Step) -> Scores:
    """Log-probabilities of the prompt tokens that follow those in this step, where they are wanted."""
    scores: Scores = []
    if all(pick.sequence.params.prompt_logprobs is None for pick in picks):
        return scores
    row = 0
    for pick in picks:
        sequence, start = pick.sequence, pick.sequence.num_computed
        num_top = sequence.params.prompt_logprobs
        targets = sequence.ids[start + 1 : min(start + pick.num_new, sequence.num_prompt - 1) + 1]
        if num_top is not None and targets and len(sequence.scores) <= start:
            hidden_TD = step.hidden_TD[row : row + len(targets)]
            packed = runner.score_rows(hidden_TD, targets, num_top)
            scores.append((sequence, start, staging.Parcel(packed)))
        row += pick.num_tokens
    return scores


def take_scores(sequence: Sequence, start: int, packed: Tensor) -> None:
    """A prompt gets the scores of its positions from `start` on."""
    if len(sequence.scores) != start:
        return  # its pages were taken meanwhile, and its prompt is read again
    num_top = sequence.params.prompt_logprobs or 0
    for logprob, *tops in packed.tolist():
        top = zip(map(int, tops[:num_top]), tops[num_top:], strict=True)
        sequence.scores.append(Scored(logprob, tuple(top)))


def collect_routed(
    records: Records, picks: list[Pick], ends: list[int]
) -> dict[int, tuple[int, staging.Parcel]]:
    """Send home where positions were sent that have not been told, up to `ends`, of those that get a token
    and ask."""
    parcels = {}
    for pick, end in zip(picks, ends, strict=True):
        sequence, start = pick.sequence, pick.sequence.num_routed
        if sequence.params.routing_from is None or not (pick.samples or pick.reads_all) or start >= end:
            continue
        parcels[sequence.request] = start, staging.Parcel(records.gather([(sequence.pages, start, end)]))
        sequence.num_routed = end
    return parcels


def open_routed(sent: tuple[int, staging.Parcel] | None, end: int) -> Routed | None:
    """Where the positions before `end` were sent."""
    if sent is None:
        return None
    start, parcel = sent
    experts, *weights = parcel.open()[:, : end - start]
    return Routed(start, experts, weights[0].view(torch.float16) if weights else None)
