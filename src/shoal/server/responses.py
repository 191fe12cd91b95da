"""/v1/responses: the same conversation in OpenAI's newer words.

A request becomes a ChatRequest, so that both endpoints answer alike; what comes back is written as items:
reasoning, a message, function calls. Nothing is stored: each request brings its whole conversation. The law
is the other writers': the events of a stream, added up, are the response that its last event carries.
"""

from __future__ import annotations

import time
from typing import Any

from shoal.server.answers import Piece, Tally
from shoal.server.errors import invalid
from shoal.server.parsers import Reply
from shoal.server.protocol import (
    ChatRequest,
    Function,
    FunctionCall,
    InputItem,
    InputPart,
    JsonSchema,
    Message,
    NamedFunction,
    NamedTool,
    ResponseFormat,
    ResponsesRequest,
    Sampling,
    Tool,
    ToolCall,
)
from shoal.server.writing import Chunk, new_id


def to_chat(request: ResponsesRequest) -> ChatRequest:
    messages: list[Message] = []
    if request.instructions is not None:
        messages.append(Message(role="system", content=request.instructions))
    if isinstance(request.input, str):
        messages.append(Message(role="user", content=request.input))
    else:
        for place, item in enumerate(request.input):
            _add_item(messages, item, place)
    if not messages:
        raise invalid("input has no message; give at least one", "input")
    form = request.text.format if request.text else None
    schema = None
    if form is not None and form.type == "json_schema":
        schema = JsonSchema(name=form.name or "answer", schema=form.schema_)
    choice = request.tool_choice
    return ChatRequest(
        **{name: getattr(request, name) for name in Sampling.model_fields},
        model=request.model,
        messages=messages,
        max_completion_tokens=request.max_output_tokens,
        response_format=None if form is None else ResponseFormat(type=form.type, json_schema=schema),
        tools=None
        if request.tools is None
        else [
            Tool(
                type="function",
                function=Function(name=tool.name, description=tool.description, parameters=tool.parameters),
            )
            for tool in request.tools
        ],
        tool_choice=choice
        if choice is None or isinstance(choice, str)
        else NamedTool(type="function", function=NamedFunction(name=choice.name)),
        parallel_tool_calls=request.parallel_tool_calls,
        reasoning_effort=request.reasoning.effort if request.reasoning else None,
        stream=request.stream,
    )


def _add_item(messages: list[Message], item: InputItem, place: int) -> None:
    match item.type or "message":
        case "message":
            if item.role is None:
                raise invalid(f"input[{place}] has no role; give one", "input")
            messages.append(Message(role=item.role, content=_text(item.content, place)))
        case "function_call":
            if item.name is None:
                raise invalid(f"input[{place}] is a call without a name", "input")
            function = FunctionCall(name=item.name, arguments=item.arguments or "{}")
            call = ToolCall(id=item.call_id, function=function)
            last = messages[-1] if messages else None
            if last is not None and last.role == "assistant":
                calls = [*(last.tool_calls or []), call]
                messages[-1] = last.model_copy(update={"tool_calls": calls})
            else:
                messages.append(Message(role="assistant", tool_calls=[call]))
        case "function_call_output":
            content = _text(item.output, place)
            messages.append(Message(role="tool", content=content, tool_call_id=item.call_id))
        case "reasoning":
            pass  # templates drop the reasoning of past turns
        case other:
            raise invalid(
                f"input[{place}] is of type {other!r}; this model reads messages and calls", "input"
            )


def _text(content: str | list[InputPart] | None, place: int) -> str:
    if isinstance(content, str):
        return content
    parts = []
    for part in content or ():
        if part.text is None:
            raise invalid(f"input[{place}] has a part of type {part.type!r}; only text is read", "input")
        parts.append(part.text)
    return "".join(parts)


class ResponseWriter:
    def __init__(self, request: ResponsesRequest, model: str) -> None:
        self._request, self._model = request, model
        self._id, self._created = new_id("resp"), int(time.time())
        self._output: list[dict[str, Any]] = []
        self._finish = "stop"
        self._number = 0
        self._reply = Reply()

    def take(self, piece: Piece) -> None:
        self.chunks(piece)

    def begin(self) -> list[Chunk]:
        shell = self._response("in_progress", None)
        return [self._event(f"response.{what}", response=shell) for what in ("created", "in_progress")]

    def chunks(self, piece: Piece) -> list[Chunk]:
        events: list[Chunk] = []
        delta = piece.delta
        if delta.reasoning:
            item = self._need(events, "reasoning")
            item["content"][0]["text"] += delta.reasoning
            events.append(self._said("response.reasoning_text.delta", item, delta=delta.reasoning))
        if delta.content:
            item = self._need(events, "message")
            item["content"][0]["text"] += delta.content
            events.append(self._said("response.output_text.delta", item, delta=delta.content, logprobs=[]))
        for call in delta.calls:
            if self._request.parallel_tool_calls is False and call.index > 0:
                continue
            item = self._need(events, "function_call", call.name)
            item["arguments"] += call.arguments
            if call.arguments:
                kind = "response.function_call_arguments.delta"
                events.append(self._event(kind, **self._place(item), delta=call.arguments))
        if piece.finish is not None:
            self._finish = piece.finish
            self._close(events)
        return events

    def whole(self, tally: Tally) -> dict[str, Any]:
        if not self._output:
            self._need([], "message")
            self._close([])
        return self._response("incomplete" if self._finish == "length" else "completed", tally)

    def end(self, tally: Tally) -> list[Chunk]:
        response = self.whole(tally)
        return [self._event(f"response.{response['status']}", response=response)]

    def _need(self, events: list[Chunk], kind: str, name: str | None = None) -> dict[str, Any]:
        """The item that is being written, if it is of this kind; else a new one."""
        last = self._output[-1] if self._output else None
        if last is not None and last["type"] == kind and last["status"] == "in_progress" and name is None:
            return last
        self._close(events)
        item: dict[str, Any] = {"type": kind, "status": "in_progress"}
        if kind == "message":
            content = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
            item |= {"id": new_id("msg"), "role": "assistant", "content": content}
        elif kind == "reasoning":
            item |= {"id": new_id("rs"), "summary": [], "content": [{"type": "reasoning_text", "text": ""}]}
        else:
            item |= {"id": new_id("fc"), "call_id": new_id("call"), "name": name, "arguments": ""}
        self._output.append(item)
        place = len(self._output) - 1
        shown = {**item, "content": []} if "content" in item else dict(item)
        events.append(self._event("response.output_item.added", output_index=place, item=shown))
        if "content" in item:
            part = dict(item["content"][0])
            events.append(self._said("response.content_part.added", item, part=part))
        return item

    def _close(self, events: list[Chunk]) -> None:
        """End the item that is being written."""
        if not self._output or self._output[-1]["status"] != "in_progress":
            return
        item = self._output[-1]
        item["status"] = "incomplete" if self._finish == "length" else "completed"
        if item["type"] == "function_call":
            kind = "response.function_call_arguments.done"
            done = {"arguments": item["arguments"], "name": item["name"]}
            events.append(self._event(kind, **self._place(item), **done))
        else:
            text = item["content"][0]["text"]
            if item["type"] == "message":
                events.append(self._said("response.output_text.done", item, text=text, logprobs=[]))
            else:
                events.append(self._said("response.reasoning_text.done", item, text=text))
            events.append(self._said("response.content_part.done", item, part=dict(item["content"][0])))
        place = len(self._output) - 1
        events.append(self._event("response.output_item.done", output_index=place, item=dict(item)))

    def _place(self, item: dict[str, Any]) -> dict[str, Any]:
        return {"item_id": item["id"], "output_index": len(self._output) - 1}

    def _said(self, kind: str, item: dict[str, Any], **fields: Any) -> Chunk:
        return self._event(kind, **self._place(item), content_index=0, **fields)

    def _event(self, kind: str, **fields: Any) -> Chunk:
        self._number += 1
        return {"type": kind, "sequence_number": self._number - 1, **fields}

    def _response(self, status: str, tally: Tally | None) -> dict[str, Any]:
        request = self._request
        usage = None
        if tally is not None:
            usage = {
                "input_tokens": tally.prompt,
                "input_tokens_details": {"cached_tokens": tally.cached},
                "output_tokens": tally.generated,
                "output_tokens_details": {"reasoning_tokens": tally.reasoning},
                "total_tokens": tally.prompt + tally.generated,
            }
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            "instructions": request.instructions,
            "max_output_tokens": request.max_output_tokens,
            "metadata": request.metadata or {},
            "model": self._model,
            "output": [dict(item) for item in self._output],
            "parallel_tool_calls": request.parallel_tool_calls is not False,
            "previous_response_id": None,
            "store": False,
            "temperature": request.temperature,
            "text": {"format": {"type": "text"}}
            if request.text is None
            else request.text.model_dump(by_alias=True, exclude_none=True),
            "tool_choice": "auto"
            if request.tool_choice is None
            else request.tool_choice
            if isinstance(request.tool_choice, str)
            else request.tool_choice.model_dump(),
            "tools": [tool.model_dump() for tool in request.tools or ()],
            "top_p": request.top_p,
            "truncation": "disabled",
            "usage": usage,
        }
