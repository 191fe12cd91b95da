"""A grammar that takes long to compile keeps its own request waiting, and nobody else's."""

from __future__ import annotations

import asyncio
import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch

from shoal.config.families import tiny
from shoal.engine import Engine, EngineSettings, Grammar, SamplingParams, Vocabulary
from shoal.model.transformer import Transformer
from shoal.server.errors import ApiError
from shoal.server.process import EngineProcess

SIZE = 40_000  # tokens: what a schema's compilation is as long as


@dataclass(frozen=True)
class Build:
    def __call__(self, report: Any) -> Engine:
        model = Transformer(replace(tiny("deepseek-v3"), vocab_size=SIZE, num_nextn_predict_layers=0))
        model.init_weights(torch.Generator().manual_seed(0))
        single = [chr(at) if 32 <= at < 127 else "" for at in range(128)]
        longer = [chr(33 + at % 90) * (1 + at // 90 % 7) + str(at) for at in range(SIZE - len(single))]
        tokens = (*single, *longer)
        return Engine(model.eval(), EngineSettings(max_sequences=4), Vocabulary(tokens, "raw"))


def schema(depth: int) -> dict[str, Any]:
    inner: Any = {"type": "string", "pattern": "^[a-z]{1,20}[0-9]+(ab|cd)*$"}
    if depth:
        inner = {"type": "array", "items": schema(depth - 1)}
    names = [f"k{place}" for place in range(4)]
    return {"type": "object", "properties": dict.fromkeys(names, inner), "required": names}


async def _serve() -> tuple[int, str]:
    """Tokens that a plain request got while a grammar was compiled, and how a bad grammar was refused."""
    process = EngineProcess(Build())
    process.start()
    try:
        await asyncio.wait_for(process.usable.wait(), 120)
        wish = SamplingParams(temperature=0, max_tokens=2000, ignore_eos=True)
        plain = process.submit([([1, 2, 3], wish)])
        await plain.receive()
        slow = Grammar("json_schema", json.dumps(schema(2)))
        formed = process.submit(
            [([1, 2, 3], replace(wish, max_tokens=2, grammar=slow, ignore_eos=False, stop_token_ids=(0,)))]
        )
        first, got = asyncio.create_task(formed.receive()), 0
        while not first.done():
            more = asyncio.create_task(plain.receive())
            await asyncio.wait({first, more}, return_when=asyncio.FIRST_COMPLETED)
            got += len(more.result()) if more.done() else 0
            more.cancel()
        assert first.result()[0].error is None
        broken = replace(wish, grammar=Grammar("regex", "[a"), ignore_eos=False, stop_token_ids=(0,))
        with pytest.raises(ApiError) as refusal:
            await process.submit([([1, 2, 3], broken)]).receive()
        assert refusal.value.status == 400
        # One that is given up while it is compiled costs nothing more, and the engine goes on.
        slower = Grammar("json_schema", json.dumps(schema(1) | {"title": "again"}))
        process.submit([([1], replace(broken, grammar=slower))]).close()
        plain.close()
        assert (await process.submit([([4], replace(wish, max_tokens=1))]).receive())[0].finish == "length"
        return got, str(refusal.value)
    finally:
        await process.stop()


def test_others_go_on_while_a_grammar_is_compiled() -> None:
    got, refused = asyncio.run(_serve())
    assert got >= 10  # had it been compiled between two steps: at most the one or two on their way
    assert "cannot be compiled" in refused
