"""Laws of the parser: however a reply is cut, it says the same; what templates write, it reads."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.server.parsers import (
    CALL,
    CALL_END,
    CALLS,
    CALLS_END,
    SEPARATOR,
    THINK,
    THINK_END,
    CallSyntax,
    Reply,
    ReplyParser,
    parse,
)

SYNTAXES: list[CallSyntax] = ["v3", "v3.1"]
MARKERS = [THINK, THINK_END, CALLS, CALLS_END, CALL, CALL_END, SEPARATOR]
# Text made of markers, of their beginnings, and of what stands around them.
pieces = st.one_of(
    st.sampled_from(
        [*MARKERS, "function", "f", "\n", "\n\n", "```json\n", "\n```", "```", '{"a": 1}', " ", "é"]
    ),
    st.sampled_from(MARKERS).flatmap(lambda marker: st.integers(1, len(marker)).map(lambda n: marker[:n])),
    st.text(max_size=4),
)
texts = st.lists(pieces, max_size=25).map("".join)


def call(syntax: CallSyntax, name: str, arguments: str) -> str:
    if syntax == "v3":
        return f"{CALL}function{SEPARATOR}{name}\n```json\n{arguments}\n```{CALL_END}"
    return f"{CALL}{name}{SEPARATOR}{arguments}{CALL_END}"


@settings(max_examples=400)
@given(
    texts,
    st.sampled_from([None, *SYNTAXES]),
    st.sampled_from([{}, {"forced": "f"}, {"chosen": True}]),
    st.sampled_from([(True, False), (True, True), (False, False)]),
    st.data(),
)
def test_however_it_is_cut_it_says_the_same(
    text: str,
    syntax: CallSyntax | None,
    forced: dict[str, Any],
    thinks: tuple[bool, bool],
    data: st.DataObject,
) -> None:
    def parser() -> ReplyParser:
        return ReplyParser(reasons=thinks[0], opened=thinks[1], calls=syntax, **forced)

    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=12)))
    for parts in (pairwise([0, *cuts, len(text)]), pairwise(range(len(text) + 1))):
        reply, stream = Reply(), parser()
        for start, stop in parts:
            reply.add(stream.push(text[start:stop]))
        reply.add(stream.flush())
        assert reply == parse(text, parser())


@given(texts)
def test_text_without_markers_is_the_answer(text: str) -> None:
    for marker in MARKERS:
        text = text.replace(marker, "")
    if not any(marker in text for marker in MARKERS):
        assert parse(text, ReplyParser(calls="v3")) == Reply(content=text)
        assert parse(text, ReplyParser(reasons=False)) == Reply(content=text)


@pytest.mark.parametrize("syntax", SYNTAXES)
def test_reasoning_an_answer_and_parallel_calls(syntax: CallSyntax) -> None:
    calls = [("sum", '{"of": [1, 2]}'), ("greet", '{"who": "<｜é``"}')]
    written = "\n".join(call(syntax, *each) for each in calls)
    text = f"{THINK}\nhm\n{THINK_END}\n\nLet me see.{CALLS}{written}{CALLS_END}"
    assert parse(text, ReplyParser(calls=syntax)) == Reply("hm", "Let me see.", calls)
    opened = ReplyParser(opened=True, calls=syntax)
    assert parse(text.removeprefix(THINK), opened) == Reply("hm", "Let me see.", calls)


def test_markers_are_text_where_nothing_was_offered() -> None:
    text = call("v3", "sum", "{}")
    assert parse(text, ReplyParser()) == Reply(content=text)
    assert parse(f"{THINK}a{THINK_END}b", ReplyParser(reasons=False)) == Reply(
        content=f"{THINK}a{THINK_END}b"
    )


def test_what_models_leave_out() -> None:
    v3 = CALLS + call("v3", "f", "{}")
    assert parse(v3.removesuffix(CALL_END), ReplyParser(calls="v3")) == Reply(calls=[("f", "{}")])
    bare = f"{CALLS}{CALL}function{SEPARATOR}f\n{{}}{CALL_END}"
    assert parse(bare, ReplyParser(calls="v3")) == Reply(calls=[("f", "{}")])
    assert parse(f"{CALLS}{CALL}f{CALL_END}", ReplyParser(calls="v3.1")) == Reply(calls=[("f", "{}")])
    assert parse(f"{CALLS}{CALL}f", ReplyParser(calls="v3.1")) == Reply()
    assert parse("no end", ReplyParser(opened=True)) == Reply(reasoning="no end")


def test_a_forced_call_is_all_arguments() -> None:
    assert parse('{"a": 1}', ReplyParser(calls="v3", forced="f")) == Reply(calls=[("f", '{"a": 1}')])
    reasoned = parse(f"why\n{THINK_END}\n\n{{}}", ReplyParser(opened=True, forced="f"))
    assert reasoned == Reply("why", calls=[("f", "{}")])
    assert parse("still thinking", ReplyParser(opened=True, forced="f")) == Reply("still thinking")


def test_a_chosen_call_is_told_when_it_is_whole() -> None:
    text = '{"name": "f", "arguments": {"a": [1, "é"]}}'
    assert parse(text, ReplyParser(chosen=True)) == Reply(calls=[("f", '{"a": [1, "é"]}')])
    assert parse(f"why{THINK_END}\n{text}", ReplyParser(opened=True, chosen=True)).reasoning == "why"
    assert parse(text[:-5], ReplyParser(chosen=True)) == Reply()


def test_a_delta_leaves_as_soon_as_it_is_sure() -> None:
    parser = ReplyParser(calls="v3.1")
    assert parser.push("<th").content == ""
    assert parser.push("e answer").content == "<the answer"
    assert parser.push(f"{CALLS}{CALL}f{SEPARATOR}").calls == ()
    first = parser.push('{"a"').calls
    assert [(each.index, each.name, each.arguments) for each in first] == [(0, "f", '{"a"')]
    assert parser.push(": 1").calls[0].arguments == ": 1"
