"""Conversations to learn from: read in the layouts in which they are published, cut into what is learned.

Layouts, told apart by their keys: `messages` (OpenAI's, contents as text or as parts), `conversations`
(ShareGPT's from/value, with tools), `instruction` with `output` or `response` (Alpaca's and Dolly's, with
`input` or `context`, and `history`). English or Chinese is no difference here.

The law: the loss is on what the assistant says, tool calls and the end of its turn included, and on nothing
else. Where a turn's tokens begin is not guessed from markers: it is where the rendering of the conversation
with the answer parts from the one that asks for it. A template that renders past turns otherwise than they
were said (R1's drops their reasoning) gives one sample a turn, since each was said after another text.
"""

from __future__ import annotations

import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shoal.batch import Batch
from shoal.data.chat import ChatTemplate, Message
from shoal.data.text import Tokenizer

SHAREGPT = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "function_call": "call",
    "observation": "tool",
}


@dataclass(frozen=True)
class Conversation:
    messages: tuple[Message, ...]
    tools: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class Sample:
    """Tokens, and which of them are learned."""

    ids: tuple[int, ...]
    learned: tuple[bool, ...]  # of each id; never the first
    num_bytes: int  # of what is learned, as text


def read_conversations(files: Iterable[str | Path]) -> Iterator[Conversation]:
    """Of JSON (a list) or JSON Lines files, gzipped or not."""
    for where, record in read_records(files):
        yield _conversation(record, where)


def read_records(files: Iterable[str | Path]) -> Iterator[tuple[str, Any]]:
    """What such files hold, each with what to call it in errors."""
    for file in map(Path, files):
        try:
            text = (
                gzip.decompress(file.read_bytes()).decode()
                if file.suffix == ".gz"
                else file.read_text("utf-8")
            )
        except OSError as error:
            raise ValueError(f"{file} cannot be read: {error.strerror or error}") from None
        for number, record in enumerate(_records(text, file), 1):
            yield f"{file}, record {number}", record


def _records(text: str, file: Path) -> Iterator[Any]:
    try:
        if text.lstrip().startswith("["):
            yield from json.loads(text)
        else:
            yield from (json.loads(line) for line in text.splitlines() if line.strip())
    except json.JSONDecodeError as error:
        raise ValueError(f"{file} is neither JSON nor JSON Lines: {error}") from None


def _conversation(record: Any, where: str) -> Conversation:
    if isinstance(record, dict):
        if "messages" in record:
            return Conversation(tuple(map(_message, record["messages"])), _tools(record))
        if "conversations" in record:
            messages = [_shared(turn, where) for turn in record["conversations"]]
            system = record.get("system")
            head = [{"role": "system", "content": system}] if system else []
            return Conversation((*head, *messages), _tools(record))
        answer = record.get("output", record.get("response"))
        if "instruction" in record and isinstance(answer, str):
            asked = "\n\n".join(
                part
                for part in (record["instruction"], record.get("input") or record.get("context") or "")
                if part
            )
            turns = [*record.get("history", []), (asked, answer)]
            return Conversation(
                tuple(
                    {"role": role, "content": content}
                    for turn in turns
                    for role, content in zip(("user", "assistant"), turn, strict=True)
                )
            )
    raise ValueError(
        f"{where} has none of the keys messages, conversations, instruction with output or response"
    )


def _message(message: Mapping[str, Any]) -> Message:
    """With its content as text: reasoning in its tags, then what is said; calls apart."""
    content = message.get("content")
    if not isinstance(content, list):
        return message
    text, calls = "", list(message.get("tool_calls") or [])
    for part in content:
        if part["type"] == "reasoning":
            text += f"<think>{part['value']}</think>"
        elif part["type"] == "tool_call":
            calls.append(_call(part["value"]))
        else:
            text += part["value"] if "value" in part else part["text"]
    return {**message, "content": text, **({"tool_calls": calls} if calls else {})}


def _shared(turn: Mapping[str, Any], where: str) -> Message:
    role = SHAREGPT.get(turn.get("from", ""))
    if role is None:
        raise ValueError(f"{where}: a turn is from {turn.get('from')!r}; known are {', '.join(SHAREGPT)}")
    if role == "call":
        return {"role": "assistant", "content": "", "tool_calls": [_call(turn["value"])]}
    return {"role": role, "content": turn["value"]}


def _call(value: Any) -> dict[str, Any]:
    call = json.loads(value) if isinstance(value, str) else value
    arguments = call.get("arguments", {})
    if not isinstance(arguments, str):
        arguments = json.dumps(arguments, ensure_ascii=False)
    return {"type": "function", "function": {"name": call["name"], "arguments": arguments}}


def _tools(record: Mapping[str, Any]) -> tuple[Mapping[str, Any], ...]:
    tools: Any = record.get("tools")
    if isinstance(tools, str):
        tools = json.loads(tools) if tools.strip() else []
    return tuple(tools or [])


def to_samples(conversation: Conversation, tokenizer: Tokenizer) -> list[Sample]:
    """What is learned of a conversation: mostly one sample with all its answers."""
    messages, tools = _with_tools(conversation, tokenizer)
    samples: list[Sample] = []
    for turn, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        asked = tokenizer.chat(messages[:turn], tools=tools) if turn else []
        said = tokenizer.chat(messages[: turn + 1], add_generation_prompt=False, tools=tools)
        start = max(1, _common(asked, said))
        learned = [False] * start + [True] * (len(said) - start)
        size = len(tokenizer.decode(said[start:]).encode())
        if samples and said[: len(samples[-1].ids)] == list(samples[-1].ids):
            before = samples.pop()
            learned[: len(before.learned)] = before.learned
            size += before.num_bytes
        if any(learned):
            samples.append(Sample(tuple(said), tuple(learned), size))
    return samples


def _with_tools(
    conversation: Conversation, tokenizer: Tokenizer
) -> tuple[Sequence[Message], list[dict[str, Any]] | None]:
    """The tools for a template that reads them; else they are told in the system's words, a JSON a line."""
    tools = list(map(dict, conversation.tools))
    if not tools or "tools" in ChatTemplate(tokenizer.chat_template or "").settings:
        return conversation.messages, tools or None
    listed = "\n".join(json.dumps(tool, ensure_ascii=False) for tool in tools)
    return [{"role": "system", "content": f"Tools:\n{listed}"}, *conversation.messages], None


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def split_conversations(
    conversations: Iterable[Conversation], fraction: float
) -> tuple[list[Conversation], list[Conversation]]:
    """Those to train on and those held out, by what they say: the same text is always on the same side."""
    sides: tuple[list[Conversation], list[Conversation]] = [], []
    for conversation in conversations:
        first = next((m for m in conversation.messages if m["role"] == "user"), conversation.messages[0])
        digest = hashlib.sha256(str(first.get("content")).encode("utf-8", "replace")).digest()
        sides[int.from_bytes(digest[:8], "big") / 2**64 < fraction].append(conversation)
    return sides


@dataclass(frozen=True, eq=False)
class SamplePacker:
    """Batches of whole samples, a sequence each: attention never crosses from one to another.

    Batch i is a function of (seed, i): each epoch has an order of its own, cut where the next sample would
    exceed `tokens_per_batch`.
    """

    samples: Sequence[Sample]
    tokens_per_batch: int
    seed: int

    def batch(self, index: int) -> Batch:
        epoch = 0
        while index >= len(bins := self._epoch(epoch)):
            index, epoch = index - len(bins), epoch + 1
        return pack([self.samples[i] for i in bins[index]])

    @cached_property
    def _epoch(self) -> Any:
        return lru_cache(maxsize=None)(self._lay_out)

    def _lay_out(self, epoch: int) -> list[list[int]]:
        key = np.array([self.seed, epoch], np.uint64)
        order = np.argsort(np.random.Philox(key=key).random_raw(len(self.samples)), kind="stable")
        return list(
            _bins(order.tolist(), [len(sample.ids) for sample in self.samples], self.tokens_per_batch)
        )


def in_order(samples: Sequence[Sample], tokens_per_batch: int) -> Iterator[Batch]:
    """Every sample once."""
    lengths = [len(sample.ids) for sample in samples]
    for bin_ in _bins(range(len(samples)), lengths, tokens_per_batch):
        yield pack([samples[i] for i in bin_])


def _bins(order: Iterable[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Samples in order, as many together as fit."""
    filled: list[int] = []
    tokens = 0
    for i in order:
        if filled and tokens + lengths[i] > most:
            yield filled
            filled, tokens = [], 0
        filled.append(i)
        tokens += lengths[i]
    if filled:
        yield filled


def pack(samples: Sequence[Sample]) -> Batch:
    """Samples laid end to end. The last id of each is predicted and never read, so it has no row."""
    lengths = [len(sample.ids) - 1 for sample in samples]
    return Batch(
        ids_T=torch.tensor([token for sample in samples for token in sample.ids[:-1]]),
        positions_T=torch.cat([torch.arange(length) for length in lengths]),
        cu_seqlens_S1=torch.tensor([0, *np.cumsum(lengths).tolist()], dtype=torch.int32),
        max_seqlen=max(lengths),
        targets_T=torch.tensor([token for sample in samples for token in sample.ids[1:]]),
        weights_T=torch.tensor([learned for sample in samples for learned in sample.learned[1:]]).float(),
    )
