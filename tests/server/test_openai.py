"""The official client against a real server: everything it can ask of a language model of this kind.

The model's weights are random, so laws are of form and of agreement: streamed equals whole, scores equal what
was generated, what a grammar allows is what comes.
"""

from __future__ import annotations

import base64
import json
import math
from typing import Any

import httpx
import numpy as np
import openai
import pytest

from shoal.data.text import Tokenizer

ASK: list[Any] = [{"role": "user", "content": "What is 2 + 2?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "The weather of a town.",
        "parameters": {
            "type": "object",
            "properties": {"town": {"enum": ["Bonn", "Ulm"]}, "days": {"type": "integer", "maximum": 9}},
            "required": ["town", "days"],
            "additionalProperties": False,
        },
    },
}


def blanks(tokenizer: Tokenizer) -> Any:
    """JSON allows white space without end, and weights without training have no reason to stop."""
    return {str(i): -100.0 for i, spelled in tokenizer.spelling.bytes_of.items() if not spelled.strip()}


FIXED: Any = {"temperature": 0, "max_tokens": 24}


def test_a_stream_adds_up_to_the_whole(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=ASK, seed=7, max_tokens=40)
    stream = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        seed=7,
        max_tokens=40,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == whole.choices[0].message.content != ""
    finishes = [chunk.choices[0].finish_reason for chunk in chunks if chunk.choices]
    assert finishes[-1] == whole.choices[0].finish_reason
    assert chunks[0].choices[0].delta.role == "assistant"
    usage = chunks[-1].usage
    assert usage is not None and whole.usage is not None
    assert usage.completion_tokens == whole.usage.completion_tokens <= 40
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens


def test_a_seed_repeats_and_choices_differ(client: openai.OpenAI) -> None:
    def ask() -> list[str | None]:
        made = client.chat.completions.create(model="tiny", messages=ASK, seed=3, n=3, max_tokens=12)
        assert made.usage is not None and made.usage.completion_tokens <= 36
        return [choice.message.content for choice in made.choices]

    first = ask()
    assert first == ask()
    assert len(set(first)) == 3


def test_choices_stream_side_by_side(client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(model="tiny", messages=ASK, seed=3, n=3, max_tokens=12)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(
        model="tiny", messages=ASK, seed=3, n=3, max_tokens=12, stream=True
    ):
        texts[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert texts == [choice.message.content for choice in whole.choices]


def test_the_prefix_cache_shows_in_usage(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "Remember this. " * 20}]
    client.chat.completions.create(model="tiny", messages=messages, **FIXED)
    usage = client.chat.completions.create(model="tiny", messages=messages, **FIXED).usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert 0 < (usage.prompt_tokens_details.cached_tokens or 0) < usage.prompt_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_the_text_before_it(client: openai.OpenAI, stream: bool) -> None:
    full = client.completions.create(model="tiny", prompt="def", **FIXED).choices[0].text
    stop = full[5:8]
    made: Any = client.completions.create(model="tiny", prompt="def", stop=[stop], stream=stream, **FIXED)
    choices = [chunk.choices[0] for chunk in made] if stream else made.choices
    assert "".join(choice.text for choice in choices) == full[: full.index(stop)]
    assert choices[-1].finish_reason == "stop"


def test_log_probabilities_are_those_of_the_text(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    made = client.chat.completions.create(
        model="tiny", messages=ASK, logprobs=True, top_logprobs=5, **FIXED
    ).choices[0]
    assert made.logprobs is not None and made.logprobs.content is not None
    for token in made.logprobs.content:
        assert len(token.top_logprobs) == 5
        assert token.logprob == token.top_logprobs[0].logprob, "greedy takes the best"
        assert sum(math.exp(top.logprob) for top in token.top_logprobs) <= 1 + 1e-5
    spelled = b"".join(bytes(token.bytes or ()) for token in made.logprobs.content)
    assert spelled.decode("utf-8", "replace") == made.message.content


def test_completions_score_their_prompt_as_lm_eval_reads_it(
    client: openai.OpenAI, tokenizer: Tokenizer
) -> None:
    """Generate, then score prompt and text together: the same log-probabilities, and all of them greedy."""
    prompts = [tokenizer.encode(text, bos=True) for text in ("def add", "return a")]
    made = client.completions.create(model="tiny", prompt=prompts, temperature=0, max_tokens=6, logprobs=1)
    texts = []
    for choice, prompt in zip(made.choices, prompts, strict=True):
        ids = client.post(
            "../tokenize", cast_to=httpx.Response, body={"prompt": choice.text, "add_special_tokens": False}
        ).json()["tokens"]
        texts.append((prompt, ids, choice))
    for prompt, _, choice in texts:
        assert choice.logprobs is not None and choice.logprobs.token_logprobs is not None
        scored = client.completions.create(
            model="tiny", prompt=prompt, temperature=0, max_tokens=1, logprobs=1, echo=True
        ).choices[0]
        logs = scored.logprobs
        assert logs is not None and logs.token_logprobs is not None and logs.top_logprobs is not None
        assert logs.token_logprobs[0] is None and len(logs.token_logprobs) == len(prompt) + 1
        assert logs.token_logprobs[-1] == pytest.approx(choice.logprobs.token_logprobs[0], abs=1e-4)
        for value, top in zip(logs.token_logprobs[1:], logs.top_logprobs[1:], strict=True):
            assert value <= max(top.values()) and value in top.values()
    only = client.completions.create(model="tiny", prompt=prompts[0], max_tokens=0, logprobs=1, echo=True)
    assert only.choices[0].text == tokenizer.decode(prompts[0])
    assert only.usage is not None and only.usage.completion_tokens == 0


def test_an_answer_follows_a_json_schema(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"enum": ["a", "b"]}, "age": {"type": "integer", "minimum": 0, "maximum": 99}},
        "required": ["name", "age"],
        "additionalProperties": False,
    }
    for seed in range(3):
        made = client.chat.completions.create(
            model="tiny",
            messages=ASK,
            seed=seed,
            max_tokens=100,
            logit_bias=blanks(tokenizer),
            response_format={"type": "json_schema", "json_schema": {"name": "person", "schema": schema}},
        ).choices[0]
        assert made.finish_reason == "stop"
        person = json.loads(made.message.content or "")
        assert person["name"] in "ab" and 0 <= person["age"] <= 99 and len(person) == 2


def test_structured_outputs(client: openai.OpenAI) -> None:
    for wish, fits in (
        ({"choice": ["yes", "no"]}, {"yes", "no"}),
        ({"regex": "[ab]{3}"}, None),
        ({"grammar": 'root ::= "x" | "y"'}, {"x", "y"}),
    ):
        text = (
            client.chat.completions.create(
                model="tiny", messages=ASK, max_tokens=20, extra_body={"structured_outputs": wish}
            )
            .choices[0]
            .message.content
        )
        assert text in fits if fits else set(text or "") <= {"a", "b"} and len(text or "") == 3


@pytest.mark.parametrize("stream", [False, True])
def test_a_named_tool_is_called(client: openai.OpenAI, stream: bool) -> None:
    choice: Any = {"type": "function", "function": {"name": "weather"}}
    made: Any = client.chat.completions.create(
        model="tiny", messages=ASK, tools=[WEATHER], tool_choice=choice, max_tokens=200, stream=stream, seed=1
    )
    if stream:
        chunks = [chunk.choices[0] for chunk in made]
        pieces = [call for chunk in chunks for call in chunk.delta.tool_calls or ()]
        name, arguments = pieces[0].function.name, "".join(each.function.arguments for each in pieces)
        assert pieces[0].id and len({each.index for each in pieces}) == 1
        finish = chunks[-1].finish_reason
    else:
        call = made.choices[0].message.tool_calls[0]
        name, arguments, finish = call.function.name, call.function.arguments, made.choices[0].finish_reason
    assert (name, finish) == ("weather", "tool_calls")
    assert json.loads(arguments)["town"] in ("Bonn", "Ulm")


@pytest.mark.parametrize("stream", [False, True])
def test_some_tool_of_several_is_called(client: openai.OpenAI, tokenizer: Tokenizer, stream: bool) -> None:
    town = {"$defs": {"Town": {"enum": ["Bonn"]}}, "$ref": "#/$defs/Town"}
    parameters = {
        "type": "object",
        "properties": {"at": town},
        "required": ["at"],
        "additionalProperties": False,
    }
    parameters["$defs"] = town.pop("$defs")
    clock: Any = {"type": "function", "function": {"name": "clock", "parameters": parameters}}
    made: Any = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        tools=[WEATHER, clock],
        tool_choice="required",
        max_tokens=200,
        seed=4,
        stream=stream,
        logit_bias=blanks(tokenizer),
    )
    calls = (
        [call for chunk in made for call in chunk.choices[0].delta.tool_calls or ()]
        if stream
        else made.choices[0].message.tool_calls
    )
    assert len(calls) == 1
    arguments = json.loads(calls[0].function.arguments)
    assert calls[0].function.name == ("clock" if "at" in arguments else "weather")


def test_a_conversation_with_tools_goes_back(client: openai.OpenAI) -> None:
    call: Any = {
        "id": "c1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"town": "Ulm"}'},
    }
    messages: Any = [
        *ASK,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c1", "content": "sunny"},
    ]
    made = client.chat.completions.create(model="tiny", messages=messages, tools=[WEATHER], max_tokens=4)
    assert made.choices[0].finish_reason in ("length", "stop")


def test_reasoning_is_told_apart(client: openai.OpenAI) -> None:
    made = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        max_tokens=10,
        extra_body={"chat_template_kwargs": {"thinking": True}, "ignore_eos": True},
    )
    message: Any = made.choices[0].message
    assert message.reasoning_content == message.reasoning != ""
    assert message.content is None, "a model that never ends its reasoning has said nothing"
    assert made.usage is not None and made.usage.completion_tokens_details is not None
    assert made.usage.completion_tokens_details.reasoning_tokens == 10


def test_a_grammar_begins_after_reasoning(client: openai.OpenAI, tokenizer: Tokenizer) -> None:
    """The token that ends reasoning is made likely, so that the answer begins."""
    end = tokenizer.find_id("</think>")
    made = client.chat.completions.create(
        model="tiny",
        messages=ASK,
        max_tokens=30,
        logit_bias={str(end): 9},
        temperature=0.5,
        seed=2,
        extra_body={
            "chat_template_kwargs": {"thinking": True},
            "structured_outputs": {"choice": ["yes", "no"]},
        },
    )
    assert made.choices[0].message.content in ("yes", "no")


def test_responses(client: openai.OpenAI) -> None:
    whole = client.responses.create(
        model="tiny", input="Hello", instructions="Be brief.", max_output_tokens=12
    )
    assert whole.status in ("completed", "incomplete")
    assert whole.usage is not None and whole.usage.output_tokens <= 12
    events = list(client.responses.create(model="tiny", input="Hello", max_output_tokens=12, stream=True))
    assert events[0].type == "response.created"
    last: Any = events[-1]
    assert last.type in ("response.completed", "response.incomplete")
    said = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert said == last.response.output_text != ""
    assert [event.sequence_number for event in events] == list(range(len(events)))


def test_responses_call_tools(client: openai.OpenAI) -> None:
    tool: Any = {"type": "function", "name": "weather", "parameters": WEATHER["function"]["parameters"]}
    made = client.responses.create(
        model="tiny", input="Hello", tools=[tool], tool_choice="required", max_output_tokens=200
    )
    call: Any = made.output[0]
    assert call.type == "function_call" and json.loads(call.arguments)["town"] in ("Bonn", "Ulm")


def test_models_and_tokens(client: openai.OpenAI, http: httpx.Client, tokenizer: Tokenizer) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").id == "tiny"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("huge")
    tokens = http.post("/tokenize", json={"prompt": "add(a, b)"}).json()["tokens"]
    assert tokens == tokenizer.encode("add(a, b)", bos=True)
    assert http.post("/detokenize", json={"tokens": tokens[1:]}).json() == {"prompt": "add(a, b)"}
    chat = http.post("/tokenize", json={"messages": ASK}).json()["tokens"]
    assert chat.count(0) == 1 and chat == tokenizer.chat(ASK)


def test_metrics_agree_with_usage(server: Any, client: openai.OpenAI) -> None:
    server.wait_until(lambda: server.metric("num_requests_running") == 0)
    names = ("prompt_tokens_total", "generation_tokens_total", "expert_tokens_total")
    before = [server.metric(name) for name in names]
    usage = client.completions.create(model="tiny", prompt="def add", max_tokens=9).usage
    assert usage is not None
    after = [server.metric(name) for name in names]
    assert after[0] - before[0] == usage.prompt_tokens
    assert after[1] - before[1] == usage.completion_tokens
    assert after[2] > before[2]


def rows(told: dict[str, Any], what: str) -> np.ndarray:
    kind = "<i2" if what == "experts" else "<f2"
    return np.frombuffer(base64.b64decode(told[what]), kind).reshape(told["shape"])


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_the_experts_of_a_stream_are_those_of_the_whole(http: httpx.Client, path: str) -> None:
    """Each position of prompt and answer but the last token's, from the one asked for on."""
    ask: dict[str, Any] = {"temperature": 0, "max_tokens": 12, "return_routed_experts": True}
    ask |= {"messages": ASK} if "chat" in path else {"prompt": "What is 2 + 2?"}
    answer = http.post(path, json=ask).raise_for_status().json()
    (choice,), usage = answer["choices"], answer["usage"]
    whole = rows(choice["routed_experts"], "experts")
    assert len(whole) == usage["total_tokens"] - 1
    assert choice["routed_experts"]["weights"] is None  # not kept unless the server is told to
    streamed = []
    with http.stream("POST", path, json=ask | {"stream": True, "routed_experts_start_len": 3}) as stream:
        for line in stream.iter_lines():
            if line.startswith("data: {"):
                streamed += [
                    (each["routed_experts"]["start"], rows(each["routed_experts"], "experts"))
                    for each in json.loads(line[6:])["choices"]
                    if "routed_experts" in each
                ]
    assert streamed[0][0] == 3
    assert len(streamed) > 1
    assert np.array_equal(np.concatenate([part for _, part in streamed]), whole[3:])
    for wrong, why in (
        ({"routed_experts_start_len": usage["prompt_tokens"] + 1}, "start within it"),
        ({"routed_experts_start_len": 1, "return_routed_experts": False}, "needs return_routed_experts"),
    ):
        refused = http.post(path, json=ask | wrong)
        assert refused.status_code == 400
        assert why in refused.json()["error"]["message"]
