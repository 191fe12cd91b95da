"""The law of a decoding step's length: what a layer calls, op by op.

On a GPU an op is a launch or two, and at batch 1 launches cost as much as the weights. So one more op a layer
is a choice that shows here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from shoal.config.families import tiny
from shoal.model.transformer import Transformer
from shoal.ops import dispatch
from tests.model.parts import Cache, draw_ids, fill

LATENT = ["linears", "latent_queries", "latent_attention", "linears"]
LOW_RANK = ["linears", "rms_norm", "linears", *LATENT[1:]]
GROUPED = ["linears", "write_kv_cache", "paged_attention", "linears"]
MIXED, DENSE = ["add_norm_gate", "open_mixture"], ["add_rms_norm", "linears", "swiglu", "linears"]


@pytest.mark.parametrize(
    ("family", "layer"),
    [
        ("deepseek-v2-lite", [*LATENT, *MIXED]),
        ("deepseek-v3", [*LOW_RANK, *MIXED]),
        ("llama-3-8b", [*GROUPED, *DENSE]),
    ],
)
def test_a_layer_of_a_decoding_step(family: str, layer: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny(family)
    model = Transformer(config)
    fill(model)
    model.model.rotary.reset()
    cache, ids = Cache(config, sequences=2), draw_ids(config.vocab_size, 8)
    called: list[str] = []

    def told(op: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            called.append(op)
            return run(*arguments)

        return call

    with torch.inference_mode(), dispatch.using("reference"):
        model.eval()(cache.feed({0: ids[:5], 1: ids[:3]}))
        for op, run in dispatch.REFERENCE.items():
            monkeypatch.setitem(dispatch.REFERENCE, op, told(op, run))
        model(cache.feed({0: ids[5:6], 1: ids[3:4]}))
    last = ["add_rms_norm", *layer, "add_rms_norm"]  # from the norm before it to the model's own
    assert called[-len(last) :] == last
