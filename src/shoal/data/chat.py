"""The text of a conversation: a checkpoint's jinja template, run where it can do no harm.

A template is a program that came with a download, so it runs in jinja's immutable sandbox, with the settings
and few helpers that published templates count on (those of transformers). The law: a setting that the
template does not read is refused, not dropped. `DEEPSEEK` is the template of the tokenizers we train: the
layout of V3 and R1, where past turns lose their reasoning; `BUILT_IN` has those of the published families,
for checkpoints that come without one. Turning the text into tokens, safely, is left to text.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateError, TemplateSyntaxError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]  # {"role": "user", "content": "..."} and what else the template reads

# The last assistant turn keeps its reasoning: it is there to be learned from, or continued.
DEEPSEEK = """\
{{- bos_token -}}
{%- for message in messages if message.role == 'system' -%}
  {{- ('' if loop.first else '\\n\\n') + message.content -}}
{%- endfor -%}
{%- for message in messages -%}
  {%- set answers_tool = loop.previtem is defined and loop.previtem.role == 'tool' -%}
  {%- if message.role == 'user' -%}
    {{- '<｜User｜>' + message.content -}}
  {%- elif message.role == 'assistant' -%}
    {%- set content = message.content or '' -%}
    {{- '' if answers_tool else '<｜Assistant｜>' -}}
    {{- content if loop.last else content.split('</think>')[-1] -}}
    {%- for call in message.tool_calls or [] -%}
      {{- '<｜tool▁calls▁begin｜>' if loop.first else '\\n' -}}
      {{- '<｜tool▁call▁begin｜>' + call.type + '<｜tool▁sep｜>' + call.function.name -}}
      {{- '\\n```json\\n' + call.function.arguments + '\\n```<｜tool▁call▁end｜>' -}}
      {{- '<｜tool▁calls▁end｜>' if loop.last else '' -}}
    {%- endfor -%}
    {{- eos_token -}}
  {%- elif message.role == 'tool' -%}
    {{- '\\n' if answers_tool else '<｜tool▁outputs▁begin｜>' -}}
    {{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' -}}
    {%- if loop.last or loop.nextitem.role != 'tool' -%}
      {{- '<｜tool▁outputs▁end｜>' -}}
    {%- endif -%}
  {%- elif message.role != 'system' -%}
    {{- raise_exception('unknown role ' + message.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '' if messages[-1].role == 'tool' else '<｜Assistant｜>' -}}
  {{- '<think>\\n' if thinking else '' -}}
{%- endif -%}
"""

# V3.1: one marker less a call, results without a frame, and an answer to a user that opens no reasoning
# begins behind an empty one.
DEEPSEEK_V31 = """\
{{- bos_token -}}
{%- for message in messages if message.role == 'system' -%}
  {{- ('' if loop.first else '\\n\\n') + message.content -}}
{%- endfor -%}
{%- for message in messages if message.role != 'system' -%}
  {%- set answers_user = loop.previtem is defined and loop.previtem.role == 'user' -%}
  {%- set answers_tool = loop.previtem is defined and loop.previtem.role == 'tool' -%}
  {%- if message.role == 'user' -%}
    {{- '<｜User｜>' + message.content -}}
  {%- elif message.role == 'assistant' -%}
    {%- set content = message.content or '' -%}
    {{- '<｜Assistant｜><think></think>' if answers_user else '' -}}
    {{- content if message.tool_calls or answers_tool else content.split('</think>', 1)[-1] -}}
    {%- for call in message.tool_calls or [] -%}
      {{- '<｜tool▁calls▁begin｜>' if loop.first else '' -}}
      {{- '<｜tool▁call▁begin｜>' + call.function.name + '<｜tool▁sep｜>' + call.function.arguments -}}
      {{- '<｜tool▁call▁end｜>' + ('<｜tool▁calls▁end｜>' if loop.last else '') -}}
    {%- endfor -%}
    {{- eos_token -}}
  {%- elif message.role == 'tool' -%}
    {{- '<｜tool▁output▁begin｜>' + message.content + '<｜tool▁output▁end｜>' -}}
  {%- else -%}
    {{- raise_exception('unknown role ' + message.role) -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt and messages[-1].role == 'user' -%}
  {{- '<｜Assistant｜><think>' + ('' if thinking else '</think>') -}}
{%- endif -%}
"""

# V2.5 marks turns with control tokens, which the vocabulary of V2 has not: it writes their names.
DEEPSEEK_V25 = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role == 'user' -%}
    {{- '<｜User｜>' + message.content -}}
  {%- elif message.role == 'assistant' -%}
    {{- '<｜Assistant｜>' + message.content + eos_token -}}
  {%- elif message.role == 'system' -%}
    {{- message.content + '\\n\\n' -}}
  {%- else -%}
    {{- raise_exception('unknown role ' + message.role) -}}
  {%- endif -%}
{%- endfor -%}
{{- '<｜Assistant｜>' if add_generation_prompt else '' -}}
"""
DEEPSEEK_V2 = DEEPSEEK_V25.replace("'<｜User｜>' + message.content", "'User: ' + message.content + '\\n\\n'")
DEEPSEEK_V2 = DEEPSEEK_V2.replace("'<｜Assistant｜>' + message", "'Assistant: ' + message")
DEEPSEEK_V2 = DEEPSEEK_V2.replace("<｜Assistant｜>", "Assistant:")

BUILT_IN: Mapping[str, str] = {
    "v2": DEEPSEEK_V2,
    "v2.5": DEEPSEEK_V25,
    "v3": DEEPSEEK,
    "r1": "{%- set thinking = thinking is not defined or thinking -%}\n" + DEEPSEEK,
    "v3.1": DEEPSEEK_V31,
}


class JsonText(str):
    """JSON that is text already: `tojson` leaves it as it is, where it would quote another text."""

    __slots__ = ()


@dataclass(frozen=True)
class ChatTemplate:
    source: str

    def render(self, messages: Sequence[Message], *, add_generation_prompt: bool, **settings: Any) -> str:
        """`settings` are what the template reads besides; those that are None count as not given."""
        given = {name: value for name, value in settings.items() if value is not None}
        unread = sorted(given.keys() - self.settings - {"bos_token", "eos_token"})
        if unread:
            raise ValueError(f"this chat template has no setting {', '.join(unread)}; leave it out")
        given |= {"messages": messages, "add_generation_prompt": add_generation_prompt}
        try:
            return self._template.render(given)
        except (TemplateError, TypeError, ArithmeticError, LookupError, RecursionError) as error:
            raise ValueError(f"the chat template refused these messages: {error}") from error

    @cached_property
    def _template(self) -> Template:
        return _environment().from_string(self.source)

    @cached_property
    def settings(self) -> set[str]:
        """The names it reads from outside."""
        try:
            return meta.find_undeclared_variables(_environment().parse(self.source))
        except TemplateSyntaxError as error:
            raise ValueError(f"the chat template is not jinja at line {error.lineno}: {error}") from error


def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment


def _to_json(value: Any, **layout: Any) -> str:
    if isinstance(value, JsonText):
        return value
    return json.dumps(value, **{"ensure_ascii": False, **layout})


def _refuse(message: str) -> str:
    raise TemplateError(message)
