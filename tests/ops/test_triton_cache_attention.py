"""Laws of the kernels over a paged cache: equal to the reference, whatever the lengths, pages and tiles.

The reference runs in float64 on the same values. With u the unit roundoff of the dtype, weights and result
are each rounded once, by at most u, independently: 1.5 u of the norm, and 4 u holds for tensors too small to
average; float32 adds sums of n terms, each good to sqrt(n) 2^-24, through an exponential of scores up to 20.
Caches are hostile: pages lie in scrambled order, and whatever was never written, page 0 included, is NaN.

On a GPU the sizes are real; elsewhere Triton's interpreter (TRITON_INTERPRET=1) runs the same on small ones.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from shoal.ops import dispatch
from shoal.ops.reference import attention as reference
from shoal.ops.triton import cache_attention
from shoal.ops.triton.cache_plan import PORTABLE, TURNS, Plan, pieces
from tests.ops.parts import DEVICE, GPU, HALF, on_gpu, runs_triton, scalars_in_arrays

pytestmark = [
    runs_triton,
    pytest.mark.usefixtures("poison"),
    scalars_in_arrays,
]
LATENT_DTYPES, PAGED_DTYPES = ((HALF, torch.float32),) * 2 if GPU else ((HALF,), (torch.float32,))


class Step(NamedTuple):
    """New tokens of each sequence, and the positions it then has; 0 positions: an empty place of a graph."""

    new: list[int]
    contexts: list[int]


SCALES = 7 if GPU else 1
STEPS = {
    "one": Step([1], [1]),
    "decode": Step([1, 1, 1, 1], [1, 63 * SCALES, 7, 257 * SCALES]),
    "verify drafts": Step([3, 3, 3], [3, 16, 33 * SCALES]),
    "ragged": Step([1, 5, 9, 0, 2], [9, 5, 20, 12, 18 * SCALES]),
    "a chunk beside decodes": Step([1, 63, 1] if GPU else [1, 9, 1], [90 * SCALES, 63 * SCALES, 2]),
    "places of a graph": Step([1, 1, 1], [5, 0, 0]),
}


class Dims(NamedTuple):
    heads: int
    rank: int
    rope: int


class Call(NamedTuple):
    q: Tensor
    pages: Tensor
    table_SB: Tensor
    contexts_S: Tensor
    longest: int
    cu_S1: Tensor
    most: int

    def double(self) -> Call:
        return self._replace(q=self.q.double(), pages=self.pages.double())


def _call(step: Step, heads: int, row: tuple[int, ...], page: int, dtype: torch.dtype) -> Call:
    generator = torch.Generator(DEVICE).manual_seed(0)
    counts = [-(-length // page) for length in step.contexts]
    pages = torch.full((1 + sum(counts) + 3, page, *row), math.nan, dtype=dtype, device=DEVICE)
    order = 1 + torch.randperm(sum(counts) + 3, generator=torch.Generator().manual_seed(0))
    table_SB = torch.zeros(len(counts), max(*counts, 1) + 2, dtype=torch.int32)
    for s, (count, length) in enumerate(zip(counts, step.contexts, strict=True)):
        mine, order = order[:count], order[count:]
        table_SB[s, :count] = mine
        rows = torch.randn(length, *row, generator=generator, device=DEVICE).to(dtype)
        at = torch.arange(length)
        if length:
            pages[mine[at // page].to(DEVICE), (at % page).to(DEVICE)] = rows
    width = row[-1]
    q = torch.randn(sum(step.new), heads, width, generator=generator, device=DEVICE).to(dtype)
    cu_S1 = torch.tensor([0, *step.new]).cumsum(0).to(DEVICE, torch.int32)
    contexts_S = torch.tensor(step.contexts, dtype=torch.int32, device=DEVICE)
    where = (table_SB.to(DEVICE), contexts_S, max(step.contexts), cu_S1, max(step.new))
    return Call(q, pages, *where)


def _wanted(call: Call, step: Step, scale: float, rank: int | None = None) -> Tensor:
    """The reference, sequence by sequence in float64; latents if they have a `rank`."""
    wide = call.double()
    outputs = []
    for s, (q, new, context) in enumerate(zip(wide.q.split(step.new), step.new, step.contexts, strict=True)):
        cu_S1 = torch.tensor([0, new], dtype=torch.int32, device=DEVICE)
        where = (wide.pages, wide.table_SB[s : s + 1], wide.contexts_S[s : s + 1], context, cu_S1, 2)
        outputs.append(
            reference.paged_attention(q, *where, scale)
            if rank is None
            else reference.latent_attention(q, *where, rank, scale)
        )
    return torch.cat(outputs)


def _assert_close(got: Tensor, wanted: Tensor, dtype: torch.dtype) -> None:
    limit = 4 * torch.finfo(dtype).eps / 2 + 20 * 32 * 2.0**-24
    assert got.shape == wanted.shape
    error = (got.double() - wanted).norm() / wanted.norm().clamp(min=1e-30)
    assert error <= limit, f"relative error {error:.2e}, limit {limit:.2e}"


def _latent(call: Call, rank: int, plan: Plan | None = None, *, invariant: bool = False) -> Tensor:
    scale = call.q.shape[2] ** -0.5
    return cache_attention.latent_attention(*call, rank, scale, plan=plan, invariant=invariant)


LATENTS = (Dims(16, 512, 64), Dims(128, 512, 64), Dims(24, 256, 64)) if GPU else (Dims(3, 20, 8),)


@pytest.mark.parametrize("page", [16, 64] if GPU else [4])
@pytest.mark.parametrize("dtype", LATENT_DTYPES, ids=str)
@pytest.mark.parametrize("dims", LATENTS, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_latent_attention_equals_reference(name: str, dims: Dims, dtype: torch.dtype, page: int) -> None:
    step = STEPS[name]
    call = _call(step, dims.heads, (dims.rank + dims.rope,), page, dtype)
    wanted = _wanted(call, step, (dims.rank + dims.rope) ** -0.5, dims.rank)
    for invariant in (False, True):
        _assert_close(_latent(call, dims.rank, invariant=invariant), wanted, dtype)


PAGED = ((16, 4, 128), (8, 8, 64), (12, 4, 80)) if GPU else ((4, 2, 12),)


@pytest.mark.parametrize("page", [16, 64] if GPU else [4])
@pytest.mark.parametrize("dtype", PAGED_DTYPES, ids=str)
@pytest.mark.parametrize("shape", PAGED, ids=str)
@pytest.mark.parametrize("name", STEPS)
def test_paged_attention_equals_reference(
    name: str, shape: tuple[int, int, int], dtype: torch.dtype, page: int
) -> None:
    step, (heads, groups, dim) = STEPS[name], shape
    call = _call(step, heads, (2, groups, dim), page, dtype)
    wanted = _wanted(call, step, dim**-0.5)
    for invariant in (False, True):
        got = cache_attention.paged_attention(*call, dim**-0.5, invariant=invariant)
        _assert_close(got, wanted, dtype)


PLANS = {
    "16 rows": PORTABLE,
    "more rows": Plan(32, 32, 4, 2),
    "two an SM": Plan(16, 16, 4, 2, resident=2),
}


@pytest.mark.parametrize("page", [1, 8, 32] if GPU else [8])
@pytest.mark.parametrize("name", PLANS)
def test_every_plan_serves_every_page(name: str, page: int) -> None:
    step = STEPS["a chunk beside decodes"]
    call = _call(step, 5, (24 + 8,), page, HALF)
    wanted = _wanted(call, step, 32**-0.5, 24)
    for invariant in (False, True):
        _assert_close(_latent(call, 24, PLANS[name], invariant=invariant), wanted, HALF)


def test_rows_may_be_parts_of_wider_ones() -> None:
    """Behind a latent an indexer keeps its key; what lies there touches nothing."""
    step = STEPS["a chunk beside decodes"]
    call = _call(step, 5, (24 + 8,), 8, HALF)
    wide = torch.full((*call.pages.shape[:2], 24 + 8 + 16), math.nan, dtype=HALF, device=DEVICE)
    wide[..., :32] = call.pages
    for invariant in (False, True):
        got = _latent(call._replace(pages=wide[..., :32]), 24, invariant=invariant)
        assert torch.equal(got, _latent(call, 24, invariant=invariant))


TURNS_STEPS = STEPS | {
    "few tiles": Step([1, 1, 1, 1], [64, 65, 128, 129]),
    "alone": Step([1], [9000]),
    "long beside short": Step([2, 1, 4, 1], [20000, 3, 2048, 6001]),
}


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize(("heads", "page"), [(128, 64), (64, 32), (24, 16)])
def test_warpgroups_that_take_turns_equal_reference(heads: int, page: int, invariant: bool) -> None:
    for step in TURNS_STEPS.values():
        call = _call(step, heads, (576,), page, HALF)
        wanted = _wanted(call, step, 576**-0.5, 512)
        _assert_close(_latent(call, 512, TURNS, invariant=invariant), wanted, HALF)


@on_gpu
@pytest.mark.gpu
def test_warpgroups_that_take_turns_serve_more_sequences_than_programs() -> None:
    step = Step([1] * 128, [1 + 37 * s % 700 for s in range(128)])
    call = _call(step, 128, (576,), 64, HALF)
    _assert_close(_latent(call, 512, TURNS), _wanted(call, step, 576**-0.5, 512), HALF)


@on_gpu
@pytest.mark.gpu
def test_warpgroups_that_take_turns_give_the_same_bits() -> None:
    """Again and again, with rows that are parts of wider ones, and alone."""
    step = TURNS_STEPS["long beside short"]
    call = _call(step, 128, (576,), 64, HALF)
    wide = torch.full((*call.pages.shape[:2], 576 + 128), math.nan, dtype=HALF, device=DEVICE)
    wide[..., :576] = call.pages
    got = _latent(call, 512, TURNS, invariant=True)
    for _ in range(20):
        assert torch.equal(_latent(call, 512, TURNS, invariant=True), got)
    assert torch.equal(_latent(call._replace(pages=wide[..., :576]), 512, TURNS, invariant=True), got)
    for s, rows in enumerate(got.split(step.new)):
        assert torch.equal(_latent(_only(call, step, s), 512, TURNS, invariant=True), rows)


def test_turns_refuse_what_they_do_not_take() -> None:
    call = _call(Step([1], [5]), 4, (24 + 8,), 8, HALF)
    with pytest.raises(ValueError, match="does not take this call"):
        _latent(call, 24, TURNS)


def test_pieces_hold_sequences_of_one_length_whole() -> None:
    assert [pieces(66, sequences, 64) for sequences in (1, 4, 32, 64, 65, 66)] == [66, 64, 64, 64, 65, 66]
    assert pieces(66, 128, 64) == 64, "two each, 128 tiles for 124 or 125"
    assert pieces(66, 128, 512) == 66, "31 tiles more take longer than a part"
    assert pieces(66, 127, 64) == 66, "sequences do not divide"


def test_long_contexts_are_cut_alike_and_merged() -> None:
    """More positions than one fixed piece of 2048, beside short ones."""
    step = Step([1, 1, 2], [4100, 3, 2048])
    call = _call(step, 2, (16 + 16,), 16, HALF)
    wanted = _wanted(call, step, 32**-0.5, 16)
    plan = Plan(16, 512, 4, 2) if not GPU else PORTABLE
    for invariant in (False, True):
        _assert_close(_latent(call, 16, plan, invariant=invariant), wanted, HALF)


def _only(call: Call, step: Step, s: int) -> Call:
    rows = slice(sum(step.new[:s]), sum(step.new[: s + 1]))
    return call._replace(
        q=call.q[rows],
        table_SB=call.table_SB[s : s + 1],
        contexts_S=call.contexts_S[s : s + 1],
        longest=step.contexts[s],
        cu_S1=torch.tensor([0, step.new[s]], dtype=torch.int32, device=DEVICE),
        most=step.new[s],
    )


@pytest.mark.parametrize("dims", LATENTS, ids=str)
def test_batch_invariant_mode_gives_a_row_the_same_bits_in_any_batch(dims: Dims) -> None:
    step = Step([1, 2, 1, 5], [40 * SCALES, 150 * SCALES, 1, 20])
    call = _call(step, dims.heads, (dims.rank + dims.rope,), 16, HALF)
    whole = _latent(call, dims.rank, invariant=True)
    for s, rows in enumerate(whole.split(step.new)):
        alone = _only(call, step, s)
        assert torch.equal(_latent(alone, dims.rank, invariant=True), rows)
        # Its last token alone, as if the ones before had come in steps of their own.
        last = alone._replace(q=alone.q[-1:], cu_S1=torch.tensor([0, 1], dtype=torch.int32, device=DEVICE))
        assert torch.equal(_latent(last._replace(most=1), dims.rank, invariant=True), rows[-1:])


def test_the_longest_context_may_be_an_upper_bound() -> None:
    step = STEPS["ragged"]
    call = _call(step, 2, (24 + 8,), 8, HALF)
    wider = torch.zeros(call.table_SB.shape[0], 500, dtype=torch.int32, device=DEVICE)
    wider[:, : call.table_SB.shape[1]] = call.table_SB
    loose = call._replace(longest=4000, table_SB=wider, most=18)
    wanted = _wanted(call, step, 32**-0.5, 24)
    for invariant in (False, True):
        _assert_close(_latent(loose, 24, PORTABLE, invariant=invariant), wanted, HALF)


def test_no_tokens_and_no_gradient() -> None:
    call = _call(Step([0], [5]), 4, (24 + 8,), 8, HALF)
    assert _latent(call, 24).shape == (0, 4, 24)
    call = _call(Step([1], [5]), 4, (24 + 8,), 8, HALF)
    assert not _latent(call._replace(q=call.q.requires_grad_()), 24).requires_grad


def test_refusals_name_the_value() -> None:
    call = _call(Step([1], [5]), 4, (24 + 8,), 8, HALF)
    assert cache_attention.latent_attention_refusal(*call, 24, 1.0) is None
    assert "float64" in str(cache_attention.latent_attention_refusal(*call.double(), 24, 1.0))
    narrow = call._replace(pages=call.pages.float())
    assert "cast one side" in str(cache_attention.latent_attention_refusal(*narrow, 24, 1.0))
    turned = call._replace(pages=call.pages.transpose(0, 1))
    assert "one stride" in str(cache_attention.latent_attention_refusal(*turned, 24, 1.0))


def test_batch_invariant_mode_is_a_setting_of_the_dispatcher() -> None:
    call = _call(Step([1, 1], [5, 30]), 4, (24 + 8,), 8, HALF)
    rest = (*call[1:], 24, 0.2)
    with dispatch.using("triton"):
        assert "triton/splits" in dispatch.explain("latent_attention", call.q, *rest)
        with dispatch.batch_invariant():
            assert "batch-invariant" in dispatch.explain("latent_attention", call.q, *rest)
            got = dispatch.call("latent_attention", call.q, *rest)
    assert torch.equal(got, cache_attention.latent_attention(*call, 24, 0.2, invariant=True))


def test_many_rows_are_merged_where_they_lie_in_parts() -> None:
    """More rows than the merge has small programs for, most of them whole, some in two or more parts."""
    step = Step([1] * 72, [2 + 5 * s % 7 + 150 * (s % 24 == 5) for s in range(72)])
    call = _call(step, 16, (16 + 8,), 16, HALF)
    _assert_close(_latent(call, 16), _wanted(call, step, 24**-0.5, 16), HALF)


@on_gpu
@pytest.mark.gpu
@pytest.mark.parametrize(("heads", "batch", "context"), [(16, 1, 32768), (16, 33, 4096), (128, 8, 5000)])
def test_real_shapes_in_a_graph_that_serves_other_lengths(heads: int, batch: int, context: int) -> None:
    """Captured once at the longest lengths, replayed at others: the device alone knows them."""
    step = Step([1] * batch, [context] * batch)
    call = _call(step, heads, (576,), 64, HALF)
    out = _latent(call, 512)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = _latent(call, 512)
    shorter = [max(1, context - 37 * s * 7) if s % 3 else s for s in range(batch)]
    for contexts in (step.contexts, shorter):
        call.contexts_S.copy_(torch.tensor(contexts, dtype=torch.int32))
        graph.replay()
        _assert_close(out, _wanted(call, Step(step.new, contexts), 576**-0.5, 512), HALF)


@on_gpu
@pytest.mark.gpu
def test_a_cache_past_two_billion_elements() -> None:
    page, context = 64, 1000
    pages = torch.zeros(2**31 // (page * 576) + 40, page, 576, dtype=HALF, device=DEVICE)
    high = torch.arange(pages.shape[0] - 16, pages.shape[0], dtype=torch.int32, device=DEVICE)
    pages[-16:] = torch.randn(16, page, 576, device=DEVICE).to(HALF)
    one = torch.tensor([0, 1], dtype=torch.int32, device=DEVICE)
    contexts_S = torch.tensor([context], dtype=torch.int32, device=DEVICE)
    q = torch.randn(1, 16, 576, device=DEVICE).to(HALF)
    call = Call(q, pages, high.unsqueeze(0), contexts_S, context, one, 1)
    low = call._replace(
        pages=pages[-16:].clone(), table_SB=torch.arange(16, dtype=torch.int32, device=DEVICE).unsqueeze(0)
    )
    assert torch.equal(_latent(call, 512), _latent(low, 512))
