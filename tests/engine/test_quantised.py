"""Laws of serving quantised weights: the cache changes nothing, and the ledger counts their bytes."""

from __future__ import annotations

from copy import deepcopy
from typing import get_args

import pytest

from shoal.engine import Engine, EngineSettings, SamplingParams
from shoal.engine.ledger import of_engine
from shoal.model.quantised import Scheme, quantise, scratch_bytes
from tests.engine.conftest import Uncached, build


@pytest.mark.parametrize("scheme", get_args(Scheme))
@pytest.mark.parametrize("family", ["deepseek-v3", "qwen3-30b-a3b"])
def test_cached_equals_uncached(family: str, scheme: Scheme, uncached: Uncached) -> None:
    model = quantise(deepcopy(build(family)), scheme)
    prompt = list(range(3, 40))
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    engine = Engine(model, EngineSettings(num_pages=16, page_size=8, max_batch_tokens=16, max_sequences=4))
    (answer,) = engine.generate([prompt], params)
    ids = prompt + list(answer.ids)
    best = uncached(model, ids)[len(prompt) - 1 : -1].argmax(-1).tolist()
    assert list(answer.ids) == best


def test_the_ledger_counts_narrow_bytes_and_what_is_widened() -> None:
    settings = EngineSettings(num_pages=16)
    plain = build("deepseek-v3")
    wide = of_engine(plain, settings, ())
    for scheme in get_args(Scheme):
        model = quantise(deepcopy(plain), scheme)
        ledger = of_engine(model, settings, ())
        assert ledger.weights == sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        assert ledger.weights < wide.weights / 2
        assert ledger.activations == wide.activations + scratch_bytes(model, 4)
