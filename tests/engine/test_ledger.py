"""Laws of the ledger: it adds up, never exceeds its limit, gives the cache all that is left, and says what it
cut. That it agrees with what a GPU measures is for test_engine_gpu.py.
"""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from shoal.config.cost import step_bytes
from shoal.config.families import family
from shoal.engine import Engine, EngineSettings, SamplingParams
from shoal.engine.ledger import Ledger, draw_up
from shoal.engine.records import count_record_bytes
from tests.engine.conftest import build

LITE = family("deepseek-v2-lite").config
GIB = 2**30
H200: dict[str, Any] = dict(
    limit=126 * GIB,
    weights=int(29.3 * GIB),
    dtype_bytes=2,
    page=64 * 31_420,
    page_size=64,
    num_pages=None,
    max_batch_tokens=8192,
    max_sequences=256,
    graph_sizes=(1, 8, 64, 256),
)


def test_a_published_model_on_a_large_device_has_its_whole_context() -> None:
    ledger = draw_up(LITE, **H200)
    assert ledger.longest == LITE.max_position_embeddings
    assert not ledger.notes
    assert 40 * GIB < ledger.cache < 97 * GIB
    assert f"{ledger.num_pages * 64:,} tokens" in str(ledger)


@given(
    st.integers(1, 200),
    st.integers(16, 1 << 16),
    st.integers(1, 512),
    st.sampled_from([None, 1, 100, 30_000]),
)
def test_it_fits_or_it_is_refused_with_what_would(
    limit: int, tokens: int, sequences: int, num_pages: int | None
) -> None:
    wish: dict[str, Any] = H200 | dict(
        limit=limit * GIB,
        max_batch_tokens=max(tokens, sequences),
        max_sequences=sequences,
        num_pages=num_pages,
        graph_sizes=(),
    )

    def attempt(wish: dict[str, Any]) -> Ledger | str:
        try:
            return draw_up(LITE, **wish)
        except ValueError as error:
            return str(error)

    made = attempt(wish)
    if isinstance(made, str):
        if "smaller model" in made:
            assert limit * GIB < wish["weights"] + step_bytes(LITE, 1, 1, 2) + 2 * wish["page"]
            return
        (value,) = re.findall(r"to (\d+)", made)
        names = re.findall(r"lower (.*) to", made)[0].split(" and ")
        made = attempt(wish | {name: int(value) for name in names})
        if isinstance(made, str):  # what was asked of the cache is a second matter
            assert "lower num_pages" in made
            return
    assert made.total <= made.limit
    assert made.num_pages * 64 >= made.longest
    if num_pages is None and made.longest < LITE.max_position_embeddings:
        assert made.total + made.page > made.limit  # nothing is left over
    assert bool(made.notes) == (made.longest < LITE.max_position_embeddings)


def test_what_is_cut_is_said_with_what_would_hold_it() -> None:
    small: dict[str, Any] = H200 | dict(
        limit=33 * GIB, max_batch_tokens=512, max_sequences=16, graph_sizes=()
    )
    ledger = draw_up(LITE, **small)
    (note,) = ledger.notes
    assert note.startswith(f"the context is cut from 163,840 to {ledger.longest:,} tokens")
    (more,) = re.findall(r"([\d.]+) GiB more would hold it whole", note)
    small["limit"] = int((33.01 + float(more)) * GIB)
    assert draw_up(LITE, **small).longest == 163_840


def test_a_larger_step_takes_more() -> None:
    sizes = [step_bytes(LITE, tokens, min(tokens, 64), 2) for tokens in (1, 64, 1024, 8192)]
    assert sizes == sorted(sizes)
    assert step_bytes(LITE, 8192, 64, 4) > step_bytes(LITE, 8192, 64, 2)


def test_scores_of_an_indexer_over_the_longest_context_are_counted() -> None:
    """A chunk of T tokens at the end of N positions holds T x N float32 scores (V3.2, 163,840 positions)."""
    config = family("deepseek-v3.2").config
    whole = step_bytes(config, 2048, 64, 2)
    half = step_bytes(config, 2048, 64, 2, context=config.max_position_embeddings // 2)
    assert whole - half == 2048 * config.max_position_embeddings // 2 * 4
    short = step_bytes(config, 2048, 64, 2, context=2048)  # all is read, nothing scored
    assert half - short > 2048 * config.max_position_embeddings // 2 * 4
    wish: dict[str, Any] = H200 | dict(weights=80 * GIB, page=64 * 85_888, max_batch_tokens=8192)
    few, many = (draw_up(config, **{**wish, "num_pages": pages}) for pages in (1024, 2560))
    assert few.activations < many.activations


def test_the_engine_takes_what_its_ledger_says() -> None:
    """On a CPU: the pages and records, byte for byte."""
    engine = Engine(build("deepseek-v3"), EngineSettings(page_size=8, num_pages=50))
    pages = sum(tensor.nbytes for tensor in engine.runner.pages)
    assert engine.ledger.cache == pages + 51 * 8 * count_record_bytes(engine.config)
    weights = [*engine.runner.model.parameters(), *engine.runner.model.buffers()]
    assert engine.ledger.weights == sum(tensor.nbytes for tensor in weights)
    assert engine.ledger.longest == min(engine.config.max_position_embeddings, 400)


def test_running_out_of_memory_names_the_setting() -> None:
    """A device that gives out in the middle of a step; nothing of the request is lost."""
    engine = Engine(build("deepseek-v3"), EngineSettings(page_size=8, num_pages=50, max_batch_tokens=64))
    request = engine.add([1] * 40, SamplingParams(temperature=0, max_tokens=4))

    def give_out(module: torch.nn.Module, inputs: tuple[Any, ...]) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory")

    hook = engine.runner.model.register_forward_pre_hook(give_out)
    with pytest.raises(ValueError, match="step of 40 tokens; lower max_batch_tokens from 64 to 20"):
        engine.step()
    hook.remove()
    events = []
    while engine.busy:
        events += engine.step()
    assert len([event for event in events if event.request == request]) == 4
