"""Laws of what a step records: every side leaves the same ids, experts and counts, to the last one."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from shoal.ops import api as ops
from shoal.ops import dispatch
from tests.ops.parts import DEVICE, runs_triton, scalars_in_arrays

SLOTS, PADDING = 40, 8  # the last PADDING slots are padding's


class State(NamedTuple):
    """What is written to; the counts stand where an earlier step left them."""

    ids_X: Tensor
    experts_XLK: Tensor
    tokens_LE: Tensor
    touched_L: Tensor


def fresh(layers: int, top_k: int, experts: int) -> State:
    return State(
        torch.full((SLOTS,), -7, dtype=torch.int32),
        torch.full((SLOTS, layers, top_k), -7, dtype=torch.int16),
        torch.arange(layers * experts).view(layers, experts),
        torch.arange(layers),
    )


def drawn(tokens: int, layers: int, top_k: int, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """Slots, each once, ids, and choices of which some were dropped."""
    generator = torch.Generator().manual_seed(tokens)
    slots_T = torch.randperm(SLOTS, generator=generator)[:tokens]
    choices_LTK = torch.rand(layers, tokens, experts, generator=generator).argsort(-1)[..., :top_k]
    dropped = torch.rand(choices_LTK.shape, generator=generator) < 0.2
    return (
        slots_T,
        torch.randint(1 << 17, (tokens,), generator=generator),
        choices_LTK.masked_fill(dropped, -1),
    )


def expected(state: State, slots_T: Tensor, ids_T: Tensor, choices_LTK: Tensor) -> State:
    state = State(*(part.clone() for part in state))
    for token, slot in enumerate(slots_T.tolist()):
        state.ids_X[slot] = ids_T[token]
        state.experts_XLK[slot] = choices_LTK[:, token]
    for layer, choices_TK in enumerate(choices_LTK):
        given = [
            expert
            for slot, row in zip(slots_T.tolist(), choices_TK.tolist(), strict=True)
            for expert in row
            if expert >= 0 and slot < SLOTS - PADDING
        ]
        for expert in given:
            state.tokens_LE[layer, expert] += 1
        state.touched_L[layer] += len(set(given))
    return state


@torch.inference_mode()
def record(*arguments: Tensor | int) -> None:
    """As the engine calls it."""
    if not ops.record_step(*arguments):  # pyright: ignore[reportArgumentType]
        ops.record(*arguments)  # pyright: ignore[reportArgumentType]


@scalars_in_arrays
@pytest.mark.parametrize("side", ["auto", "reference", pytest.param("triton", marks=runs_triton)])
@pytest.mark.parametrize("shape", [(1, 3, 2, 8), (7, 1, 6, 33), (16, 2, 8, 256), (40, 3, 4, 32)], ids=str)
def test_every_side_leaves_the_same(side: dispatch.Side, shape: tuple[int, int, int, int]) -> None:
    tokens, *dims = shape
    device = DEVICE if side == "triton" else "cpu"
    step = drawn(tokens, *dims)
    start = fresh(*dims)
    wanted = expected(start, *step)
    found = State(*(part.to(device) for part in start))
    with dispatch.using(side):
        record(*(part.to(device) for part in step), *found, SLOTS - PADDING)
    for ours, theirs in zip(found, wanted, strict=True):
        assert torch.equal(ours.cpu(), theirs)


@torch.inference_mode()
def test_the_kernel_of_few_rows_refuses_what_lies_outside() -> None:
    if not dispatch.explain_fused("greedy_step", torch.zeros(1, 4), torch.zeros(1, 4)).endswith("cpu"):
        pytest.skip("this machine has no CPU kernels")
    slots_T, ids_T, choices_LTK = drawn(4, 2, 2, 8)
    with pytest.raises(IndexError, match="slot"):
        record(slots_T + SLOTS, ids_T, choices_LTK, *fresh(2, 2, 8), SLOTS)
    with pytest.raises(IndexError, match="expert"):
        record(slots_T, ids_T, choices_LTK + 8, *fresh(2, 2, 8), SLOTS)


@pytest.mark.parametrize("shape", [(1, 1), (1, 2048), (3, 5), (8, 513), (16, 1000)], ids=str)
@torch.inference_mode()
def test_the_best_token_of_few_rows_is_that_of_sample(shape: tuple[int, int]) -> None:
    rows, vocabulary = shape
    logits_SV = 5 * torch.randn(shape, generator=torch.Generator().manual_seed(vocabulary))
    logits_SV[0, vocabulary // 2 :] = logits_SV[0].max()  # equals: the lowest id wins
    if rows > 2:
        logits_SV[1, 0] = -torch.inf
        logits_SV[2, 1] = torch.nan
    done = ops.greedy_step(logits_SV, logits_SV)
    if done is None:
        pytest.skip(dispatch.explain_fused("greedy_step", logits_SV, logits_SV))
    zeros = torch.zeros(rows)
    exact = (zeros, zeros.int(), zeros.double() + 1, zeros, zeros.double())
    with dispatch.using("reference"):
        wanted = ops.sample(logits_SV, *exact)
    numbers = ~logits_SV.isnan().any(1)
    assert torch.equal(done.tokens_S[numbers], wanted.tokens_S[numbers])
    # Sums of up to 2048 terms of float32, each exponential within 2 units in the last place.
    torch.testing.assert_close(done.logprobs_S[numbers], wanted.logprobs_S[numbers], atol=5e-6, rtol=1e-6)
    assert not done.logprobs_S[~numbers].isfinite().any()
