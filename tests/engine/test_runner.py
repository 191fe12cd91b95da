"""Laws of the runner: the Batch says exactly what was picked, and the cache holds exactly what was computed.

One step is checked number by number; what comes of many steps is for test_engine.py.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shoal.batch import Batch
from shoal.engine.cache import count_page_bytes
from shoal.engine.runner import Runner
from shoal.engine.scheduler import Pick
from shoal.engine.sequence import SamplingParams, Sequence
from shoal.engine.spans import Span
from shoal.model.transformer import Transformer
from tests.engine.conftest import TOLERANCE, Uncached


def placed(ids: list[int], pages: list[int], num_computed: int = 0) -> Sequence:
    sequence = Sequence(ids, SamplingParams(), pages=pages)
    sequence.num_computed = num_computed
    return sequence


def seen_by_the_model(runner: Runner, picks: list[Pick]) -> tuple[Batch, Tensor]:
    """The Batch of a step, and its logits."""
    batches: list[Batch] = []

    def watch(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        batches.append(inputs[0])

    hook = runner.model.register_forward_pre_hook(watch)
    logits = runner.run([runner.span(pick) for pick in picks]).logits_MV
    hook.remove()
    (batch,) = batches
    return batch, logits


def test_a_mixed_step_number_by_number(v3: Transformer) -> None:
    runner = Runner(v3, num_pages=8, page_size=4)
    for pages in runner.pages:
        pages.zero_()
    decode = placed([10, 11, 12, 13, 14, 15], pages=[5, 2], num_computed=5)
    chunk = placed([20, 21, 22, 23, 24, 25, 26, 27, 28], pages=[0, 3, 7], num_computed=4)
    prompt = placed([30, 31], pages=[1])
    batch, logits = seen_by_the_model(runner, [Pick(decode, 1), Pick(chunk, 3), Pick(prompt, 2)])
    kv = batch.kv
    assert kv is not None
    assert batch.last_S is not None
    expected = {
        "ids": (batch.ids_T, torch.int64, [15, 24, 25, 26, 30, 31]),
        "positions": (batch.positions_T, torch.int64, [5, 4, 5, 6, 0, 1]),
        "slots": (kv.slots_T, torch.int64, [9, 12, 13, 14, 4, 5]),
        "last": (batch.last_S, torch.int64, [0, 5]),  # the chunk is not its prompt's last
        "cu_seqlens": (batch.cu_seqlens_S1, torch.int32, [0, 1, 4, 6]),
        "context_lens": (kv.context_lens_S, torch.int32, [6, 7, 2]),
        "block_table": (kv.block_table_SB, torch.int32, [[5, 2], [0, 3], [1, 0]]),
    }
    for name, (tensor, dtype, values) in expected.items():
        assert (name, tensor.dtype, tensor.tolist()) == (name, dtype, values)
        assert tensor.data_ptr() % 16 == 0, f"{name} is not aligned as a tensor of its own would be"
    assert (batch.max_seqlen, kv.max_context_len, kv.has_prefix) == (3, 7, True)
    assert logits.shape == (2, v3.config.vocab_size)


def test_prompts_alone_look_back_on_nothing_and_decodes_want_every_row(v3: Transformer) -> None:
    runner = Runner(v3, num_pages=4, page_size=4)
    first, second = placed([1, 2, 3], pages=[0]), placed([4], pages=[1])
    batch, _ = seen_by_the_model(runner, [Pick(first, 3), Pick(second, 1)])
    assert batch.kv is not None
    assert not batch.kv.has_prefix
    for sequence in (first, second):
        sequence.num_computed = len(sequence.ids)
        sequence.ids.append(5)
    batch, logits = seen_by_the_model(runner, [Pick(first, 1), Pick(second, 1)])
    assert batch.last_S is None
    assert logits.shape[0] == 2


def test_pages_take_the_bytes_that_were_counted(model: Transformer) -> None:
    """Three, and the one that takes what padding writes."""
    runner = Runner(model, num_pages=3, page_size=4)
    assert sum(pages.nbytes for pages in runner.pages) == 4 * count_page_bytes(model.config, 4, torch.float32)


def test_the_cache_is_the_same_however_it_was_filled(model: Transformer, prompts: list[list[int]]) -> None:
    """In pieces on scattered pages or at once, each position holds the same; no other place is touched."""
    ids = prompts[5]
    whole, pieces = Runner(model, 8, 4), Runner(model, 16, 4)
    for pages in whole.pages + pieces.pages:
        pages.fill_(math.nan)
    at_once, bit_by_bit = placed(ids, list(range(8))), placed(ids, [15, 3, 8, 1, 0, 12, 5, 10])
    logits = whole.run([whole.span(Pick(at_once, 31))]).logits_MV
    for num_new in (1, 6, 2, 13, 9):
        last = pieces.run([pieces.span(Pick(bit_by_bit, num_new))]).logits_MV
        bit_by_bit.num_computed += num_new
    torch.testing.assert_close(last, logits, rtol=0, atol=TOLERANCE)
    for layer in range(model.config.num_hidden_layers):
        rows = pieces.pages[layer][bit_by_bit.pages].flatten(0, 1)[:31]
        torch.testing.assert_close(rows, whole.pages[layer].flatten(0, 1)[:31], rtol=0, atol=TOLERANCE)
        assert int(pieces.pages[layer].isfinite().flatten(2).all(-1).sum()) == 31


def test_scores_are_the_log_softmax_of_the_whole_text(
    model: Transformer, prompts: list[list[int]], uncached: Uncached
) -> None:
    ids = prompts[2]
    scores = Runner(model, 4, 8).score(Span([3, 1], 0, ids[:-1], 0), ids[1:])
    exact = uncached(model, ids).log_softmax(-1)[:-1].gather(1, torch.tensor(ids[1:]).unsqueeze(1))
    torch.testing.assert_close(torch.tensor(scores), exact.squeeze(1), rtol=0, atol=TOLERANCE)


def test_a_model_in_training_mode_is_refused(v3: Transformer) -> None:
    runner = Runner(v3, 2, 4)
    v3.train()
    try:
        with pytest.raises(ValueError, match=r"call model.eval\(\) first"):
            runner.run([Span([0], 0, [1], 1)])
    finally:
        v3.eval()
