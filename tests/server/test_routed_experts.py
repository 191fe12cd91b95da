"""The experts of a request over the API: what is told can be replayed, and gives the answer's own numbers."""

from __future__ import annotations

import base64
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
import torch

from shoal import LLM
from tests.server.test_openai import ASK

WANTED: Any = {"return_routed_experts": True, "return_token_ids": True}
# As in tests/engine: two ways to the same log-probability in float32.
TOLERANCE = 1e-4


def read(told: dict[str, Any]) -> torch.Tensor:
    experts = np.frombuffer(base64.b64decode(told["experts"]), "<i2").reshape(told["shape"])
    return torch.from_numpy(experts.copy())


def test_replayed_experts_give_the_answers_log_probabilities(client: openai.OpenAI, checkpoint: Path) -> None:
    llm = LLM(checkpoint, device="cpu")
    answer: Any = client.chat.completions.create(
        model="tiny", messages=ASK, max_tokens=8, seed=3, n=2, logprobs=True, extra_body=WANTED
    )
    for choice in answer.choices:
        ids, experts = [*answer.prompt_token_ids, *choice.token_ids], read(choice.routed_experts)
        assert len(experts) == len(ids) - 1
        (scores,) = llm.score([ids], [experts])
        told = [token.logprob for token in choice.logprobs.content]
        assert told == pytest.approx(scores[-len(told) :], abs=TOLERANCE)
        # And of other experts the text has other numbers: the record was read.
        (others,) = llm.score([ids], [experts ^ 1])
        assert others != pytest.approx(scores, abs=100 * TOLERANCE)


def test_ids_of_a_stream_are_those_of_the_whole(client: openai.OpenAI, http: httpx.Client) -> None:
    wish: Any = dict(model="tiny", prompt=[5, 6, 7], max_tokens=6, temperature=0, extra_body=WANTED)
    whole: Any = client.completions.create(**wish).choices[0]
    chunks = [chunk.choices[0] for chunk in client.completions.create(**wish, stream=True) if chunk.choices]
    last: Any = next(chunk for chunk in chunks if chunk.finish_reason)
    assert whole.prompt_token_ids == last.prompt_token_ids == [5, 6, 7]
    assert whole.token_ids == last.token_ids
    assert len(whole.token_ids) == 6
    chat: Any = dict(model="tiny", messages=ASK, max_tokens=6, temperature=0, extra_body=WANTED)
    told: Any = client.chat.completions.create(**chat)
    ends: Any = [
        chunk
        for chunk in client.chat.completions.create(**chat, stream=True)
        if chunk.choices and chunk.choices[0].finish_reason
    ]
    assert ends[0].prompt_token_ids == told.prompt_token_ids
    assert ends[0].choices[0].token_ids == told.choices[0].token_ids
    plain = http.post("/v1/completions", json={"prompt": "a", "max_tokens": 2}).json()["choices"][0]
    assert not {"token_ids", "prompt_token_ids"} & plain.keys()
