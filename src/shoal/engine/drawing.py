"""Drawing: the tokens of a step that has been launched, or of each step of a burst, which it goes on with.

The law: a token depends on its row's logits, its request's params and seed, and its position. Launches only.

Shape letters: S rows, N ids.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shoal.engine import grammar, sampling
from shoal.engine.runner import Runner, Step
from shoal.engine.sampling import Draw, Drawn, History, Wishes
from shoal.engine.scheduler import Pick
from shoal.engine.sequence import Sequence


def draw(runner: Runner, picks: list[Pick], step: Step) -> Drawn:
    """The next token of each pick that wants one, and one after each draft: a row each."""
    wanted = [
        (at, pick.sequence, place)
        for at, pick in enumerate(picks)
        if pick.samples
        for place in range(1 + pick.num_drafts)
    ]
    sequences = [sequence for _, sequence, _ in wanted]
    draws = [_draw(sequence, place) for _, sequence, place in wanted]
    vocabulary = step.logits_MV.shape[1]
    allowed_SV = grammar.allow([each.matcher for each in sequences], vocabulary, runner.device)
    history = _history(runner, step, sequences, [at for at, *_ in wanted])
    return sampling.draw(step.logits_MV, draws, history, allowed_SV)


def draw_burst(runner: Runner, picks: list[Pick], step: Step, steps: int) -> Drawn:
    """So many tokens of each pick, one step after the other: rows (S, steps)."""
    sequences = [pick.sequence for pick in picks]
    draws = [_draw(sequence, 0) for sequence in sequences]
    wishes = Wishes(draws, runner.device, steps)
    history = _history(runner, step, sequences, list(range(len(picks))))
    drawn: list[Drawn] = []
    for time in range(steps):
        if time:
            step = runner.again(drawn[-1].tokens_S1.squeeze(1))
            if wishes.bends:
                draws = [_draw(sequence, time) for sequence in sequences]
        drawn.append(sampling.draw(step.logits_MV, draws, history, wishes=wishes, time=time))
    return Drawn(*(torch.stack(columns, dim=1) for columns in zip(*drawn, strict=True)))


def _draw(sequence: Sequence, ahead: int) -> Draw:
    position = min(sequence.length + ahead, sequence.max_len - 1)  # past its end a burst's row is dropped
    return Draw(sequence.params, sequence.seed, position, sequence.bans(position))


def _history(runner: Runner, step: Step, sequences: list[Sequence], rows: list[int]) -> History:
    def ids(wanted: list[int], length: int) -> Tensor:
        return runner.records.ids(step.table_SB, [rows[row] for row in wanted], length)

    return History(ids, [each.num_prompt for each in sequences])
