"""How pieces are written down for /v1/chat/completions and /v1/completions: whole, or as chunks of a stream.

Each writer takes pieces as they come. `chunks` gives what a stream sends for them, `whole` the answer at the
end. The law: the chunks of a choice, added up as OpenAI's clients do, are the whole.
"""

from __future__ import annotations

import secrets
import time
from base64 import b64encode
from collections.abc import Iterable
from typing import Any

from shoal.data.text import Tokenizer
from shoal.server.answers import Piece, Tally
from shoal.server.parsers import CallDelta, Delta, Reply
from shoal.server.process import Token
from shoal.server.protocol import ChatRequest, CompletionRequest

Chunk = dict[str, Any]

LEAST = -9999.0  # JSON has no infinity: a token that a grammar or a bias forbids is told as OpenAI tells it


def new_id(kind: str) -> str:
    return f"{kind}-{secrets.token_hex(12)}"


class ChatWriter:
    def __init__(
        self, request: ChatRequest, prompt_ids: list[int], model: str, version: str, tokenizer: Tokenizer
    ) -> None:
        self._tokenizer, n = tokenizer, request.n or 1
        self._head = _head("chatcmpl", model, version)
        self._logprobs = bool(request.logprobs)
        self._single_call = request.parallel_tool_calls is False
        self._replies = [Reply() for _ in range(n)]
        self._ids: list[list[int]] | None = [[] for _ in range(n)] if request.return_token_ids else None
        self._prompt_ids = prompt_ids
        self._noted: list[list[dict[str, Any]]] = [[] for _ in range(n)]
        self._finish = ["stop"] * n
        self._asked = request.return_routed_experts
        self._routed: list[list[Token]] = [[] for _ in range(n)]
        self._begun: set[int] = set()
        self._call_ids: dict[tuple[int, int], str] = {}

    def chunks(self, piece: Piece) -> list[Chunk]:
        delta = self._add(piece)
        out: list[Chunk] = []
        noted = [_note(token, self._tokenizer) for token in piece.tokens if token.token is not None]
        logprobs = {"content": noted, "refusal": None} if self._logprobs and noted else None
        if piece.choice not in self._begun:
            self._begun.add(piece.choice)
            out.append(self._chunk(piece.choice, {"role": "assistant", "content": ""}))
        fields: dict[str, Any] = {}
        if delta.reasoning:
            fields |= {"reasoning_content": delta.reasoning, "reasoning": delta.reasoning}
        if delta.content:
            fields["content"] = delta.content
        if delta.calls:
            fields["tool_calls"] = [self._call(piece.choice, call) for call in delta.calls]
        routed = _routed(piece.tokens)
        if fields or logprobs or routed:
            out.append(self._chunk(piece.choice, fields, logprobs=logprobs, routed=routed))
        if piece.finish is not None:
            last = self._chunk(piece.choice, {}, finish=self._finish[piece.choice])
            if self._ids is not None:
                last["choices"][0]["token_ids"] = self._ids[piece.choice]
                last["prompt_token_ids"] = self._prompt_ids
            out.append(last)
        return out

    def take(self, piece: Piece) -> None:
        """For the whole answer only."""
        self._add(piece)
        self._routed[piece.choice] += piece.tokens if self._asked else []
        if self._logprobs:
            self._noted[piece.choice] += [
                _note(token, self._tokenizer) for token in piece.tokens if token.token is not None
            ]

    def whole(self, tally: Tally) -> dict[str, Any]:
        choices = []
        for index, reply in enumerate(self._replies):
            message: dict[str, Any] = {
                "role": "assistant",
                "content": reply.content if reply.content or not (reply.calls or reply.reasoning) else None,
                "refusal": None,
                "reasoning_content": reply.reasoning or None,
                "reasoning": reply.reasoning or None,
            }
            if reply.calls:
                message["tool_calls"] = [
                    {
                        "id": new_id("call"),
                        "type": "function",
                        "function": {"name": name, "arguments": arguments},
                    }
                    for name, arguments in reply.calls
                ]
            logprobs = {"content": self._noted[index], "refusal": None} if self._logprobs else None
            choices.append(
                {
                    "index": index,
                    "message": message,
                    "logprobs": logprobs,
                    "finish_reason": self._finish[index],
                    **({} if self._ids is None else {"token_ids": self._ids[index]}),
                    **({"routed_experts": _routed(self._routed[index])} if self._asked else {}),
                }
            )
        whole = {**self._head, "object": "chat.completion", "choices": choices, "usage": tally.usage}
        return whole if self._ids is None else {**whole, "prompt_token_ids": self._prompt_ids}

    def last(self, tally: Tally) -> Chunk:
        return {**self._head, "object": "chat.completion.chunk", "choices": [], "usage": tally.usage}

    def _add(self, piece: Piece) -> Delta:
        delta = piece.delta
        if self._single_call and delta.calls:
            calls = tuple(call for call in delta.calls if call.index == 0)
            delta = Delta(delta.reasoning, delta.content, calls)
        reply = self._replies[piece.choice]
        reply.add(delta)
        if self._ids is not None:
            self._ids[piece.choice] += _drawn(piece.tokens)
        if piece.finish is not None:
            called = bool(reply.calls) and piece.finish == "stop"
            self._finish[piece.choice] = "tool_calls" if called else piece.finish
        return delta

    def _call(self, choice: int, call: CallDelta) -> dict[str, Any]:
        if call.name is None:
            return {"index": call.index, "function": {"arguments": call.arguments}}
        return {
            "index": call.index,
            "id": new_id("call"),
            "type": "function",
            "function": {"name": call.name, "arguments": call.arguments},
        }

    def _chunk(
        self,
        choice: int,
        delta: dict[str, Any],
        *,
        logprobs: dict[str, Any] | None = None,
        finish: str | None = None,
        routed: dict[str, Any] | None = None,
    ) -> Chunk:
        body = {"index": choice, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        if routed is not None:
            body["routed_experts"] = routed
        return {**self._head, "object": "chat.completion.chunk", "choices": [body]}


class CompletionWriter:
    def __init__(
        self,
        request: CompletionRequest,
        prompts: list[list[int]],
        model: str,
        version: str,
        tokenizer: Tokenizer,
    ) -> None:
        self._tokenizer, self._n = tokenizer, request.n or 1
        self._head = _head("cmpl", model, version)
        self._echo, self._logprobs = bool(request.echo), request.logprobs
        self._prompts, self._texts = prompts, _texts(request, prompts, tokenizer)
        count = len(prompts) * self._n
        self._said, self._finish = [""] * count, ["length"] * count
        self._records = [_Record(tokenizer) for _ in range(count)]
        self._ids: list[list[int]] | None = [[] for _ in range(count)] if request.return_token_ids else None
        self._asked = request.return_routed_experts
        self._routed: list[list[Token]] = [[] for _ in range(count)]
        self._begun: set[int] = set()

    def chunks(self, piece: Piece) -> list[Chunk]:
        before = len(self._records[piece.choice].tokens)
        text = self.take(piece)
        logprobs = None
        if self._logprobs is not None:
            logprobs = self._records[piece.choice].written(self._logprobs, start=before)
        routed = _routed(piece.tokens)
        if not text and piece.finish is None and not routed and not (logprobs and logprobs["tokens"]):
            return []
        body = {"index": piece.choice, "text": text, "logprobs": logprobs, "finish_reason": piece.finish}
        if routed is not None:
            body["routed_experts"] = routed
        if piece.finish is not None:
            body |= self._both_ids(piece.choice)
        return [{**self._head, "object": "text_completion", "choices": [body]}]

    def take(self, piece: Piece) -> str:
        choice, text = piece.choice, piece.text
        record = self._records[choice]
        self._routed[choice] += piece.tokens if self._asked else []
        if choice not in self._begun:
            self._begun.add(choice)
            if self._echo:
                text = self._texts[choice // self._n] + text
                if self._logprobs is not None:
                    record.add_prompt(self._prompts[choice // self._n], piece.tokens[0])
        if self._logprobs is not None:
            for token in piece.tokens:
                if token.token is not None:
                    record.add(token.token, token.logprob, token.top)
        self._said[choice] += text
        if self._ids is not None:
            self._ids[choice] += _drawn(piece.tokens)
        if piece.finish is not None:
            self._finish[choice] = piece.finish
        return text

    def whole(self, tally: Tally) -> dict[str, Any]:
        choices = [
            {
                "index": index,
                "text": text,
                "logprobs": None if self._logprobs is None else self._records[index].written(self._logprobs),
                "finish_reason": self._finish[index],
                **self._both_ids(index),
                **({"routed_experts": _routed(self._routed[index])} if self._asked else {}),
            }
            for index, text in enumerate(self._said)
        ]
        return {**self._head, "object": "text_completion", "choices": choices, "usage": tally.usage}

    def last(self, tally: Tally) -> Chunk:
        return {**self._head, "object": "text_completion", "choices": [], "usage": tally.usage}

    def _both_ids(self, choice: int) -> dict[str, Any]:
        """The ids of a choice and of its prompt, if asked for: told with its end."""
        if self._ids is None:
            return {}
        return {"token_ids": self._ids[choice], "prompt_token_ids": self._prompts[choice // self._n]}


class _Record:
    """Log-probabilities of a text, prompt included, as /v1/completions lists them."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.tokens: list[str] = []
        self._logprobs: list[float | None] = []
        self._tops: list[dict[str, float] | None] = []
        self._offsets: list[int] = []
        self._length = 0

    def add(self, token: int, logprob: float | None, top: tuple[tuple[int, float], ...] | None) -> None:
        text = self._tokenizer.decode([token])
        self.tokens.append(text)
        self._logprobs.append(None if logprob is None else max(logprob, LEAST))
        self._offsets.append(self._length)
        self._length += len(text)
        if top is None:
            self._tops.append(None)
            return
        listed: dict[str, float] = {}
        for other, value in top:  # best first: of tokens that read the same, the better counts
            listed.setdefault(self._tokenizer.decode([other]), max(value, LEAST))
        if logprob is not None:
            listed.setdefault(text, max(logprob, LEAST))
        self._tops.append(listed)

    def add_prompt(self, ids: list[int], first: Token) -> None:
        self.add(ids[0], None, None)
        tops = first.prompt_tops or ((),) * (len(ids) - 1)
        for token, logprob, top in zip(ids[1:], first.prompt_logprobs or (), tops, strict=True):
            self.add(token, logprob, top)

    def written(self, count: int, start: int = 0) -> dict[str, Any]:
        return {
            "tokens": self.tokens[start:],
            "token_logprobs": self._logprobs[start:],
            "top_logprobs": self._tops[start:] if count else None,
            "text_offset": self._offsets[start:],
        }


def _drawn(tokens: Iterable[Token]) -> list[int]:
    return [token.token for token in tokens if token.token is not None]


def _routed(tokens: Iterable[Token]) -> dict[str, Any] | None:
    """Where the positions of these tokens were sent, in the order of the text; None if nothing was told."""
    parts = [token.routed for token in tokens if token.routed is not None]
    if not parts:
        return None
    starts, shapes, experts, weights = zip(*parts, strict=True)
    told = [each for each in weights if each is not None]
    return {
        "start": starts[0],
        "shape": [sum(shape[0] for shape in shapes), *shapes[0][1:]],
        "experts": b64encode(b"".join(experts)).decode(),
        "weights": b64encode(b"".join(told)).decode() if told else None,
    }


def _head(kind: str, model: str, version: str) -> dict[str, Any]:
    return {
        "id": new_id(kind),
        "created": int(time.time()),
        "model": model,
        "system_fingerprint": f"shoal-{version}",
    }


def _texts(request: CompletionRequest, prompts: list[list[int]], tokenizer: Tokenizer) -> list[str]:
    """The prompts as their sender wrote them."""
    if not request.echo:
        return []
    if isinstance(request.prompt, str):
        return [request.prompt]
    texts = [each for each in request.prompt if isinstance(each, str)]
    return texts or [tokenizer.decode(ids) for ids in prompts]


def _note(token: Token, tokenizer: Tokenizer) -> dict[str, Any]:
    assert token.token is not None and token.logprob is not None
    top = [_entry(other, logprob, tokenizer) for other, logprob in token.top]
    return {**_entry(token.token, token.logprob, tokenizer), "top_logprobs": top}


def _entry(token: int, logprob: float, tokenizer: Tokenizer) -> dict[str, Any]:
    spelled = tokenizer.spelling.bytes_of.get(token, b"")
    text = spelled.decode("utf-8", "replace")

    return {"token": text, "logprob": max(logprob, LEAST), "bytes": list(spelled)}
