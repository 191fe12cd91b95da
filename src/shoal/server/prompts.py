"""From a conversation to token ids: messages as the checkpoint's chat template wants them.

The template is the checkpoint's own, or the one the server was told. Its source says which syntax of tool
calls the model speaks; where it takes no list of tools, the list is written into the instructions, as V3.1's
model card lays down. The laws: a prompt begins with BOS exactly once, and what a user wrote is never read as
a control token (data/text.py sees to that).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from shoal.data.text import Tokenizer
from shoal.server.errors import invalid
from shoal.server.parsers import CALLS, CALLS_END, SEPARATOR, THINK, THINK_END, CallSyntax
from shoal.server.protocol import Message, Tool

_MARKERS = (CALLS, CALLS_END, SEPARATOR, "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>", THINK, THINK_END)
_SWITCHES = ("thinking", "enable_thinking")


@dataclass(frozen=True)
class Prompt:
    ids: list[int]
    opened: bool  # it ends inside reasoning


@dataclass(frozen=True)
class Prompter:
    """A tokenizer, and how conversations are put to its model."""

    tokenizer: Tokenizer

    @classmethod
    def of(cls, tokenizer: Tokenizer, template: str | None) -> Prompter:
        """`template` takes the place of the checkpoint's own."""
        return cls(tokenizer if template is None else replace(tokenizer, chat_template=template))

    @cached_property
    def call_syntax(self) -> CallSyntax | None:
        source = self.tokenizer.chat_template or ""
        if SEPARATOR not in source:
            return None
        return "v3" if "```json" in source else "v3.1"

    @cached_property
    def shown_ids(self) -> frozenset[int]:
        """Special tokens that are part of a reply."""
        ids = (self.tokenizer.find_id(marker) for marker in _MARKERS)
        return frozenset(token for token in ids if token is not None)

    @cached_property
    def think_end_id(self) -> int | None:
        return self.tokenizer.find_id(THINK_END)

    @cached_property
    def switches_thinking(self) -> bool:
        return bool(self.tokenizer.template_settings & set(_SWITCHES))

    def chat(
        self,
        messages: Sequence[Message],
        tools: Sequence[Tool] = (),
        settings: dict[str, Any] | None = None,
        *,
        add_generation_prompt: bool = True,
    ) -> Prompt:
        """The ids of a conversation. `settings` are the template's, thinking among them."""
        if self.tokenizer.chat_template is None:
            raise invalid(
                "this model has no chat template, so it knows no turns; use /v1/completions, "
                "or start the server with --chat-template",
                "messages",
            )
        turns = [_turn(message, place) for place, message in enumerate(messages)]
        asked = dict(settings or {})
        thinking = None
        for name in _SWITCHES:
            value = asked.pop(name, None)
            thinking = value if value is not None else thinking
        if thinking is not None and not isinstance(thinking, bool):
            raise invalid(f"thinking is {thinking!r}; it must be true or false", "chat_template_kwargs")
        reserved = asked.keys() & {"messages", "tools", "add_generation_prompt", "bos_token", "eos_token"}
        if reserved:
            raise invalid(
                f"chat_template_kwargs has {', '.join(sorted(reserved))}, set by the server; leave it out",
                "chat_template_kwargs",
            )
        listed = None
        if tools:
            if self.call_syntax is None:
                raise invalid("this model's chat template has no tool calls; leave tools out", "tools")
            described = [tool.model_dump(exclude_none=True) for tool in tools]
            if "tools" in self.tokenizer.template_settings:
                listed = described
            else:
                turns = _instruct(turns, _describe(described, self.call_syntax))
        try:
            ids = self.tokenizer.chat(
                turns, add_generation_prompt=add_generation_prompt, thinking=thinking, tools=listed, **asked
            )
        except ValueError as error:
            raise invalid(str(error), "messages") from error
        bos = self.tokenizer.bos_id
        if self.tokenizer.adds_bos and bos is not None and ids[:1] != [bos]:
            ids = [bos, *ids]
        ending = self.tokenizer.decode(ids[-4:]).rstrip("\n") if add_generation_prompt else ""
        return Prompt(ids, opened=ending.endswith(THINK))

    def text(self, prompt: str, *, framed: bool = True) -> list[int]:
        """The ids of a whole prompt, which its sender may have written in control tokens."""
        bos = framed and self.tokenizer.adds_bos and self.tokenizer.bos_id is not None
        try:
            return self.tokenizer.encode(prompt, bos=bos, parse_special=True)
        except ValueError as error:
            raise invalid(str(error), "prompt") from error


def _turn(message: Message, place: int) -> dict[str, Any]:
    """A message as templates know it: its text in one piece, `developer` as the `system` it is."""
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, list):
        parts = []
        for part in message.content:
            text = part.text if part.type == "text" else part.refusal if part.type == "refusal" else None
            if text is None:
                raise invalid(
                    f"messages[{place}] has a part of type {part.type!r}; this model reads text only",
                    "messages",
                )
            parts.append(text)
        content: str | None = "".join(parts)
    else:
        content = message.content
    if content is None and not message.tool_calls:
        raise invalid(f"messages[{place}] has no content; give it a text", "messages")
    if message.tool_calls and role != "assistant":
        raise invalid(f"messages[{place}] has tool_calls, but its role is {role}", "messages")
    turn: dict[str, Any] = {"role": role, "content": content}
    if message.tool_calls:
        turn["tool_calls"] = [call.model_dump() for call in message.tool_calls]
    if message.tool_call_id is not None:
        turn["tool_call_id"] = message.tool_call_id
    return turn


def _instruct(turns: list[dict[str, Any]], text: str) -> list[dict[str, Any]]:
    """The turns, with more instructions behind those there are."""
    if turns[0]["role"] == "system":
        return [{**turns[0], "content": turns[0]["content"] + "\n\n" + text}, *turns[1:]]
    return [{"role": "system", "content": text}, *turns]


def _describe(tools: list[dict[str, Any]], syntax: CallSyntax) -> str:
    """A list of tools in words. Markers in it are shown to the model as text: instructions hold none."""
    listed = "\n\n".join(
        f"### {tool['function']['name']}\nDescription: {tool['function'].get('description', '')}\n\n"
        f"Parameters: {json.dumps(tool['function'].get('parameters', {}), ensure_ascii=False)}"
        for tool in tools
    )
    form = (
        f"{CALLS}<｜tool▁call▁begin｜>function{SEPARATOR}NAME\n```json\nARGUMENTS\n```<｜tool▁call▁end｜>{CALLS_END}"
        if syntax == "v3"
        else f"{CALLS}<｜tool▁call▁begin｜>NAME{SEPARATOR}ARGUMENTS<｜tool▁call▁end｜>{CALLS_END}"
    )
    return (
        f"## Tools\nYou have access to the following tools:\n\n{listed}\n\n"
        f"To use one, write exactly: {form}\n"
        f"NAME is the name of a tool above, ARGUMENTS is JSON that follows its parameters. "
        f"To use several, chain the calls inside the outer pair."
    )
