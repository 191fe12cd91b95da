"""From a request to a Job: what the engine is to do, and all that can be refused before it does.

Every bound that the models of protocol.py cannot express stands here: the context's length, ids beyond the
vocabulary, grammars. The law: what is refused here costs the engine nothing, and the message has both
numbers.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from typing import Any

from shoal.data.text import Tokenizer
from shoal.engine import SamplingParams
from shoal.engine.grammar import Grammar
from shoal.server.answers import Job
from shoal.server.errors import ApiError, invalid
from shoal.server.parsers import ReplyParser
from shoal.server.prompts import Prompter
from shoal.server.protocol import (
    ChatRequest,
    CompletionRequest,
    NamedTool,
    ResponseFormat,
    Sampling,
    StructuredOutputs,
    Told,
    Tool,
)
from shoal.server.worker import EngineInfo

MAX_GRAMMAR_BYTES, MAX_SCHEMA_DEPTH = 64 * 1024, 32
MAX_PARTS = 2048


def chat_job(request: ChatRequest, prompter: Prompter, info: EngineInfo) -> Job:
    tools, choice = request.tools or [], request.tool_choice
    if choice not in (None, "none", "auto") and not tools:
        raise invalid("tool_choice asks for a call, but there are no tools; give some", "tool_choice")
    settings = dict(request.chat_template_kwargs or {})
    if request.reasoning_effort is not None and prompter.switches_thinking:
        settings.setdefault("thinking", request.reasoning_effort not in ("none", "minimal"))
    prompt = prompter.chat(request.messages, [] if choice == "none" else tools, settings)
    forced, schema = _force(tools, choice)
    chosen = schema is not None and forced is None
    if schema is not None and (request.response_format or request.structured_outputs):
        raise invalid("a tool call that is forced leaves no room for another format; leave one out")
    grammar = schema or _grammar(request.response_format, request.structured_outputs)
    think_end_id = None
    if grammar is not None and prompt.opened:
        think_end_id = prompter.think_end_id
        if think_end_id is None:
            raise invalid("this model's reasoning has no token that ends it; turn thinking off here")
    if request.top_logprobs is not None and not request.logprobs:
        raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
    n = request.n or 1
    if request.max_tokens is not None and request.max_completion_tokens is not None:
        raise invalid("max_tokens and max_completion_tokens are one setting; give one", "max_tokens")
    params = _params(
        request,
        prompter.tokenizer,
        info,
        n,
        len(prompt.ids),
        max_tokens=request.max_tokens or request.max_completion_tokens,
        logprobs=request.top_logprobs or 0,
        grammar=grammar,
        think_end_id=think_end_id,
    )
    return Job(
        parts=[(prompt.ids, each) for each in params],
        n=n,
        stops=_stops(request.stop),
        parser=partial(
            ReplyParser,
            opened=prompt.opened,
            calls=prompter.call_syntax if tools and choice != "none" else None,
            forced=forced,
            chosen=chosen,
        ),
        shown_ids=prompter.shown_ids,
    )


def completion_job(request: CompletionRequest, prompter: Prompter, info: EngineInfo) -> Job:
    prompts = encode_prompts(request, prompter)
    n = request.n or 1
    if request.best_of not in (None, n):
        raise invalid(f"best_of is {request.best_of}; here it must equal n, {n}", "best_of")
    if len(prompts) * n > MAX_PARTS:
        raise invalid(f"{len(prompts)} prompts times n {n} are more than {MAX_PARTS}; send fewer", "prompt")
    grammar = _grammar(None, request.structured_outputs)
    max_tokens = 16 if request.max_tokens is None else request.max_tokens
    scores = bool(request.echo and request.logprobs is not None) or max_tokens == 0
    parts = []
    for ids in prompts:
        params = _params(
            request,
            prompter.tokenizer,
            info,
            n,
            len(ids),
            max_tokens=max_tokens,
            logprobs=request.logprobs or 0,
            grammar=grammar,
            prompt_logprobs=(request.logprobs or 0) if scores else None,
        )
        parts += [(ids, each) for each in params]
    return Job(parts=parts, n=n, stops=_stops(request.stop))


def encode_prompts(request: CompletionRequest, prompter: Prompter) -> list[list[int]]:
    prompt = request.prompt
    if isinstance(prompt, str):
        return [prompter.text(prompt)]
    if not prompt:
        raise invalid("the prompt is empty; give at least one token or text", "prompt")
    if all(isinstance(each, int) for each in prompt):
        return [list(prompt)]  # type: ignore[arg-type]
    return [prompter.text(each) if isinstance(each, str) else list(each) for each in prompt]  # type: ignore[arg-type]


def _params(
    request: Sampling,
    tokenizer: Tokenizer,
    info: EngineInfo,
    n: int,
    length: int,
    *,
    max_tokens: int | None,
    logprobs: int = 0,
    prompt_logprobs: int | None = None,
    grammar: Grammar | None = None,
    think_end_id: int | None = None,
) -> list[SamplingParams]:
    """The params of each of n choices. With a seed, choice i is drawn with seed + i."""
    _check_length(length, max_tokens, info)
    told = request if isinstance(request, Told) else None
    routing_from = _routing_from(told, length)
    seed, top_k = request.seed, request.top_k
    common: dict[str, Any] = dict(
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=None if top_k in (None, -1, 0) else top_k,
        min_p=request.min_p or 0.0,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        ignore_eos=request.ignore_eos,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        frequency_penalty=(told and told.frequency_penalty) or 0.0,
        presence_penalty=(told and told.presence_penalty) or 0.0,
        logit_bias=_biases(told.logit_bias if told else None, info),
        priority=request.priority,
        grammar=grammar,
        think_end_id=think_end_id if grammar is not None else None,
        routing_from=routing_from,
    )
    for token in request.stop_token_ids or ():
        _check_id(token, info, "stop_token_ids")
    try:
        return [
            SamplingParams(**common, seed=None if seed is None else (seed + choice) % 2**64)
            for choice in range(n)
        ]
    except ValueError as error:
        raise invalid(str(error)) from error


def _routing_from(told: Told | None, length: int) -> int | None:
    if told is None:
        return None
    start = told.routed_experts_start_len
    if start and not told.return_routed_experts:
        raise invalid(
            "routed_experts_start_len needs return_routed_experts: true", "routed_experts_start_len"
        )
    if start > length:
        raise invalid(
            f"routed_experts_start_len is {start}, but the prompt has {length} tokens; start within it",
            "routed_experts_start_len",
        )
    return start if told.return_routed_experts else None


def _check_length(length: int, max_tokens: int | None, info: EngineInfo) -> None:
    if length == 0:
        raise invalid("the prompt is empty; give at least one token or text", "prompt")
    wanted = 1 if max_tokens is None else max_tokens
    if length + wanted > info.max_len:
        raise ApiError(
            400,
            f"this model's context is {info.max_len} tokens, but the request needs {length + wanted}: "
            f"{length} of the prompt and {wanted} to generate; shorten the prompt or lower max_tokens",
            code="context_length_exceeded",
            param="messages",
        )


def _check_id(token: int, info: EngineInfo, name: str) -> None:
    if not 0 <= token < info.vocab_size:
        raise invalid(f"{name} has token {token}; the vocabulary has ids 0 to {info.vocab_size - 1}", name)


def _biases(biases: dict[str, float] | None, info: EngineInfo) -> tuple[tuple[int, float], ...]:
    found: dict[int, float] = {}
    for name, bias in (biases or {}).items():
        if not (name.isascii() and name.isdigit() and len(name) < 12):
            raise invalid(f"logit_bias has key {name[:40]!r}; keys are token ids", "logit_bias")
        _check_id(int(name), info, "logit_bias")
        found[int(name)] = bias
    return tuple(found.items())


def _stops(stop: str | list[str] | None) -> tuple[str, ...]:
    return () if stop is None else (stop,) if isinstance(stop, str) else tuple(stop)


def _grammar(form: ResponseFormat | None, structured: StructuredOutputs | None) -> Grammar | None:
    wishes: list[Grammar] = []
    if form is not None and form.type == "json_object":
        wishes.append(Grammar("json_object"))
    if form is not None and form.type == "json_schema":
        if form.json_schema is None or form.json_schema.schema_ is None:
            raise invalid("response_format json_schema has no schema; give one", "response_format")
        wishes.append(_schema(form.json_schema.schema_, "response_format"))
    if structured is not None:
        name = "structured_outputs"
        if structured.json_ is not None:
            wishes.append(_schema(structured.json_, name))
        if structured.regex is not None:
            wishes.append(Grammar("regex", _check_size(structured.regex, name)))
        if structured.choice is not None:
            wishes.append(Grammar("choice", _check_size(json.dumps(structured.choice), name)))
        if structured.grammar is not None:
            wishes.append(Grammar("ebnf", _check_size(structured.grammar, name)))
    if len(wishes) > 1:
        raise invalid(f"{len(wishes)} formats are asked for; an answer has one", "response_format")
    return wishes[0] if wishes else None


def _schema(schema: dict[str, Any], name: str) -> Grammar:
    depth, level = 0, [schema]
    while level:  # by levels: a deep schema may not overflow our own stack either
        depth += 1
        if depth > MAX_SCHEMA_DEPTH:
            raise invalid(
                f"{name}'s schema is nested deeper than {MAX_SCHEMA_DEPTH} levels; flatten it", name
            )
        level = [
            inner
            for each in level
            for inner in (each.values() if isinstance(each, dict) else each)
            if isinstance(inner, dict | list)
        ]
    return Grammar("json_schema", _check_size(json.dumps(schema), name))


def _check_size(text: str, name: str) -> str:
    size = len(text.encode("utf-8", "surrogatepass"))
    if size > MAX_GRAMMAR_BYTES:
        raise invalid(f"{name} has {size} bytes; at most {MAX_GRAMMAR_BYTES} are compiled, shorten it", name)
    return text


def _force(tools: Sequence[Tool], choice: object) -> tuple[str | None, Grammar | None]:
    """The tool that must be called, and the grammar of its arguments; of several, that of any call."""
    if isinstance(choice, NamedTool):
        named = [tool for tool in tools if tool.function.name == choice.function.name]
        if not named:
            raise invalid(f"tool_choice names {choice.function.name!r}, which is not in tools", "tool_choice")
        tool = named[0]
    elif choice == "required":
        if len(tools) > 1:
            return None, _schema(_any_call(tools), "tools")
        tool = tools[0]
    else:
        return None, None
    return tool.function.name, _schema(tool.function.parameters or {"type": "object"}, "tools")


def _any_call(tools: Sequence[Tool]) -> dict[str, Any]:
    """A schema of one call of any of the tools. Their definitions move to its root, renamed."""
    definitions: dict[str, Any] = {}
    calls = []
    for number, tool in enumerate(tools):
        schema = _rename(tool.function.parameters or {"type": "object"}, f"#/$defs/tool{number}.")
        for name, definition in schema.pop("$defs", {}).items():
            definitions[f"tool{number}.{name}"] = definition
        properties = {"name": {"const": tool.function.name}, "arguments": schema}
        calls.append(
            {
                "type": "object",
                "properties": properties,
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    return {"anyOf": calls, "$defs": definitions}


def _rename(schema: Any, start: str, depth: int = 0) -> Any:
    """The same schema, its references to its own definitions begun by `start`."""
    if depth > MAX_SCHEMA_DEPTH:
        raise invalid(
            f"a tool's parameters are nested deeper than {MAX_SCHEMA_DEPTH} levels; flatten them", "tools"
        )
    if isinstance(schema, list):
        return [_rename(each, start, depth + 1) for each in schema]
    if not isinstance(schema, dict):
        return schema
    renamed = {name: _rename(each, start, depth + 1) for name, each in schema.items()}
    reference = schema.get("$ref")
    if isinstance(reference, str) and reference.startswith("#/$defs/"):
        renamed["$ref"] = start + reference.removeprefix("#/$defs/")
    return renamed
