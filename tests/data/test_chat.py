"""Laws of chat templates: what transformers renders, we render; ours has the layout DeepSeek published; a
template can do no harm, and drops no setting.
"""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from shoal.data.chat import BUILT_IN, DEEPSEEK, ChatTemplate, JsonText

BOS, EOS = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>"

SYSTEM = {"role": "system", "content": "Be brief.\n"}
ASK = {"role": "user", "content": " What is <b>2+2</b> & 中文? "}
ANSWER = {"role": "assistant", "content": "<think>\neasy\n</think>\n\n4"}
CALL = {
    "role": "assistant",
    "content": None,
    "tool_calls": [
        {"type": "function", "function": {"name": "sum", "arguments": '{"of": ["é", 2]}'}},
    ],
}
RESULT = {"role": "tool", "content": "4"}
CHATS = [
    [ASK],
    [SYSTEM, ASK],
    [SYSTEM, ASK, ANSWER, ASK],
    [ASK, ANSWER, ASK, ANSWER, ASK],
    [SYSTEM, ASK, CALL, RESULT],
    [ASK, CALL, RESULT, {"role": "assistant", "content": "It is 4."}, ASK],
]


def _render(source: str, chat: list[dict[str, Any]], prompt: bool, **settings: object) -> str:
    return ChatTemplate(source).render(
        chat, add_generation_prompt=prompt, bos_token=BOS, eos_token=EOS, **settings
    )


@pytest.mark.parametrize(
    "name",
    [
        "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
        "deepseek-ai-DeepSeek-R1-Distill-Qwen-32B",
        "deepseek-ai-DeepSeek-V3.1",
        "trl-deepseekv3",
        "llama-cpp-deepseek-r1",
        "axolotl-deepseek_v2",
    ],
)
def test_published_templates_render_as_in_transformers(shared_data: Path, name: str) -> None:
    source = (shared_data / "deepseek" / "chat_templates" / f"{name}.jinja").read_text("utf-8")
    chats = [chat for chat in CHATS if CALL not in chat] if name.startswith("axolotl") else CHATS
    for chat, prompt in itertools.product(chats, (False, True)):
        theirs, _ = render_jinja_template(
            [chat], chat_template=source, add_generation_prompt=prompt, bos_token=BOS, eos_token=EOS
        )
        assert _render(source, chat, prompt) == theirs[0]


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("chat", CHATS)
def test_our_layout_is_that_of_r1(shared_data: Path, chat: list[dict[str, Any]], prompt: bool) -> None:
    folder = shared_data / "deepseek" / "chat_templates"
    source = (folder / "deepseek-ai-DeepSeek-R1-Distill-Llama-8B.jinja").read_text("utf-8")
    expected = _render(source, chat, prompt)
    if CALL in chat:  # R1's template forgets to close a single call, and adds no prompt after a result
        expected = expected.replace(
            "```<｜tool▁call▁end｜>", "```<｜tool▁call▁end｜><｜tool▁calls▁end｜>" + EOS
        )
        expected += "<think>\n" if prompt and chat[-1] == RESULT else ""
    assert _render(DEEPSEEK, chat, prompt, thinking=True) == expected


def test_our_layout_has_a_prompt_without_reasoning_and_keeps_that_of_the_last_turn() -> None:
    assert _render(DEEPSEEK, [ASK], True) == f"{BOS}<｜User｜>{ASK['content']}<｜Assistant｜>"
    two_systems = _render(DEEPSEEK, [SYSTEM, ASK, SYSTEM], False)
    assert two_systems == f"{BOS}Be brief.\n\n\nBe brief.\n<｜User｜>{ASK['content']}"
    learned = _render(DEEPSEEK, [ASK, ANSWER, ASK, ANSWER], False)
    assert learned.count("easy") == 1
    assert learned.endswith(ANSWER["content"] + EOS)


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__ }}",
        "{{ raise_exception('no') }}",
        "{{ messages[0].content.x.y }}",
        "{% if %}",
    ],
)
def test_a_template_that_misbehaves_is_one_clear_error(source: str) -> None:
    with pytest.raises(ValueError, match="chat template"):
        _render(source, [ASK], True)


def test_a_setting_the_template_does_not_read_is_refused() -> None:
    with pytest.raises(ValueError, match="no setting thinking, tools"):
        _render("{{ messages[0].content }}", [ASK], True, thinking=False, tools=[])
    assert _render("{{ messages[0].content }}", [ASK], True, thinking=None) == ASK["content"]


def test_an_unknown_role_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown role critic"):
        _render(DEEPSEEK, [{"role": "critic", "content": "no"}], True)


def test_a_content_that_is_not_text_is_refused() -> None:
    with pytest.raises(ValueError, match="chat template refused"):
        _render(DEEPSEEK, [{"role": "user", "content": None}], True)


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("thinking", [None, False, True])
def test_our_layout_of_v31_is_the_published(
    shared_data: Path, chat: list[dict[str, Any]], prompt: bool, thinking: bool | None
) -> None:
    folder = shared_data / "deepseek" / "chat_templates"
    source = (folder / "deepseek-ai-DeepSeek-V3.1.jinja").read_text("utf-8")
    chat = [_with_json_text(message) for message in chat]
    assert _render(BUILT_IN["v3.1"], chat, prompt, thinking=thinking) == _render(
        source, chat, prompt, thinking=thinking
    )


@pytest.mark.parametrize("prompt", [False, True])
@pytest.mark.parametrize("chat", [chat for chat in CHATS if CALL not in chat])
def test_our_layout_of_v25_is_the_published(
    shared_data: Path, chat: list[dict[str, Any]], prompt: bool
) -> None:
    folder = shared_data / "deepseek" / "chat_templates"
    source = (folder / "axolotl-deepseek_v2.jinja").read_text("utf-8")
    assert _render(BUILT_IN["v2.5"], chat, prompt) == _render(source, chat, prompt)


def test_v2_writes_the_names_of_its_turns() -> None:
    said = {"role": "assistant", "content": "4"}
    expected = (
        f"{BOS}Be brief.\n\n\nUser: {ASK['content']}\n\nAssistant: 4{EOS}User: {ASK['content']}\n\nAssistant:"
    )
    assert _render(BUILT_IN["v2"], [SYSTEM, ASK, said, ASK], True) == expected


def test_r1_thinks_unless_told_otherwise() -> None:
    assert _render(BUILT_IN["r1"], [ASK], True) == _render(DEEPSEEK, [ASK], True, thinking=True)
    assert _render(BUILT_IN["r1"], [ASK], True, thinking=False) == _render(DEEPSEEK, [ASK], True)


def test_json_that_is_text_is_not_quoted() -> None:
    assert (
        _render("{{ messages[0].content | tojson }}", [{"content": JsonText('{"a": 1}')}], True) == '{"a": 1}'
    )
    assert _render("{{ messages[0].content | tojson }}", [{"content": "a"}], True) == '"a"'


def _with_json_text(message: dict[str, Any]) -> dict[str, Any]:
    calls = [
        {**call, "function": {**call["function"], "arguments": JsonText(call["function"]["arguments"])}}
        for call in message.get("tool_calls", [])
    ]
    return {**message, "tool_calls": calls} if calls else message
