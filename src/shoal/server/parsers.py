"""What an assistant's text says: its reasoning, its answer, and the tools it calls.

A format is a table of states: where the text of a state goes, which markers leave it and for where, and what
is dropped at its edges. One machine walks every table. The law: however the text is cut into deltas, what
comes out adds up to the same reply as the whole text in one piece. Text that may yet become a marker waits;
of markers that overlap, the one that ends first counts, the longest of those that end together.

Reasoning that never ends stays reasoning. A call cut off before its arguments is no call. Which markers a
prompt has already opened is left to prompts.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal

Part = Literal["reasoning", "content", "name", "arguments", "choice"]

THINK, THINK_END = "<think>", "</think>"
CALLS, CALLS_END = "<｜tool▁calls▁begin｜>", "<｜tool▁calls▁end｜>"
CALL, CALL_END = "<｜tool▁call▁begin｜>", "<｜tool▁call▁end｜>"
SEPARATOR = "<｜tool▁sep｜>"


@dataclass(frozen=True)
class State:
    """Where text goes, and what ends it.

    `says` None drops the text. `first` are markers that count at the very beginning only, `turns` those that
    count anywhere, each with the state it leads to. `trim` are characters dropped at the beginning,
    `trim_end` before the marker that ends the state, `drop_last` is dropped where the whole text ends.
    """

    says: Part | None = None
    turns: tuple[tuple[str, str], ...] = ()
    first: tuple[tuple[str, str], ...] = ()
    trim: str = ""
    trim_end: str = ""
    drop_last: tuple[str, ...] = ()


Table = Mapping[str, State]

_CLOSING = ("\n```", "```", "")  # the longest first

# Calls of V3 and R1: function<sep>NAME, then the arguments in a fence of JSON.
_FENCED: Table = {
    "calls": State(None, ((CALL, "kind"), (CALLS_END, "content"))),
    "kind": State(None, ((SEPARATOR, "name"), (CALL_END, "calls"))),
    "name": State("name", (("\n", "fence"), (CALL_END, "calls"))),
    "fence": State(
        "arguments",
        tuple((closing + CALL_END, "calls") for closing in _CLOSING),
        drop_last=_CLOSING,
        first=(("```json\n", "arguments"), ("```\n", "arguments")),
    ),
    "arguments": State(
        "arguments", tuple((closing + CALL_END, "calls") for closing in _CLOSING), drop_last=_CLOSING
    ),
}
# Calls of V3.1: NAME<sep>ARGUMENTS.
_BARE: Table = {
    "calls": State(None, ((CALL, "name"), (CALLS_END, "content"))),
    "name": State("name", ((SEPARATOR, "arguments"), (CALL_END, "calls"))),
    "arguments": State("arguments", ((CALL_END, "calls"),)),
}

CallSyntax = Literal["v3", "v3.1"]
_CALLS: Mapping[CallSyntax, Table] = {"v3": _FENCED, "v3.1": _BARE}


@dataclass(frozen=True)
class CallDelta:
    """A piece of call number `index`: its name, once, then its arguments."""

    index: int
    name: str | None = None
    arguments: str = ""


@dataclass(frozen=True)
class Delta:
    reasoning: str = ""
    content: str = ""
    calls: tuple[CallDelta, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.reasoning or self.content or self.calls)


@dataclass
class Reply:
    """Deltas, added up."""

    reasoning: str = ""
    content: str = ""
    calls: list[tuple[str, str]] = field(default_factory=list)  # name, arguments

    def add(self, delta: Delta) -> None:
        self.reasoning += delta.reasoning
        self.content += delta.content
        for call in delta.calls:
            if call.name is not None:
                assert call.index == len(self.calls)
                self.calls.append((call.name, ""))
            name, arguments = self.calls[call.index]
            self.calls[call.index] = (name, arguments + call.arguments)


class ReplyParser:
    """One reply as it comes.

    `reasons`: reasoning is split off. `opened`: the prompt has opened it already. `calls`: the syntax of tool
    calls, None where no tools were offered, so that their markers are text. `forced`: a grammar leaves
    room for the arguments of this one tool only, and the whole answer is those. `chosen`: it leaves room for
    one object, a `name` and its `arguments`, which is told when it is whole.
    """

    def __init__(
        self,
        *,
        reasons: bool = True,
        opened: bool = False,
        calls: CallSyntax | None = None,
        forced: str | None = None,
        chosen: bool = False,
    ) -> None:
        assert reasons or not opened
        assert forced is None or not chosen
        self._table = _build_table(calls, answer="arguments" if forced else "choice" if chosen else "content")
        self._chosen = ""
        self._forced = forced
        self._held, self._name, self._num_calls, self._in_call = "", "", 0, False
        self._pieces: list[tuple[Part, str]] = []
        self._calls: list[CallDelta] = []
        plain = "answer" if forced or chosen else "content"
        self._enter("reasoning" if opened else "opening" if reasons else plain)

    @property
    def reasoning(self) -> bool:
        """Whether the next of the text is reasoning, as far as can be known."""
        return self._state == "reasoning"

    def push(self, text: str) -> Delta:
        self._held += text
        while self._move(final=False):
            pass
        return self._take()

    def flush(self) -> Delta:
        while self._move(final=True):
            pass
        self._tell_choice()
        return self._take()

    def _tell_choice(self) -> None:
        try:
            choice = json.loads(self._chosen)
        except json.JSONDecodeError:
            return  # nothing was chosen, or it was cut off
        if isinstance(choice, dict) and isinstance(choice.get("name"), str):
            arguments = json.dumps(choice.get("arguments", {}), ensure_ascii=False)
            self._calls.append(CallDelta(0, choice["name"], arguments))

    def _move(self, *, final: bool) -> bool:
        """Take what can be taken of the held text. True if the state changed, so that there may be more."""
        state = self._table[self._state]
        if self._at_start:
            marker = self._find_first(state, final=final)
            if marker is None:
                return False
            if marker:
                self._held = self._held[len(marker) :]
                self._enter(dict(state.first)[marker])
                return True
            self._at_start = False
        found = _find(self._held, (marker for marker, _ in state.turns))
        if found is None:
            self._say_what_is_sure(state, final=final)
            return False
        start, marker = found
        said, self._held = self._held[:start], self._held[start + len(marker) :]
        self._say(state, said.rstrip(state.trim_end) if state.trim_end else said)
        to = dict(state.turns)[marker]
        if to == "calls" and state.says in ("name", "arguments"):
            self._close_call()
        self._enter(to)
        return True

    def _find_first(self, state: State, *, final: bool) -> str | None:
        """The marker with which the state begins, "" for none, None while it cannot be told."""
        if state.trim:
            self._held = self._held.lstrip(state.trim)
        longer = (marker for marker, _ in state.first if len(marker) > len(self._held))
        if not final and (not self._held or any(marker.startswith(self._held) for marker in longer)):
            return None
        return max((marker for marker, _ in state.first if self._held.startswith(marker)), default="")

    def _say_what_is_sure(self, state: State, *, final: bool) -> None:
        if final:
            ending = next((each for each in state.drop_last if self._held.endswith(each)), "")
            self._say(state, self._held.removesuffix(ending))
            self._held = ""
        else:
            keep = len(self._held) - self._count_unfinished(state)
            self._say(state, self._held[:keep])
            self._held = self._held[keep:]

    def _enter(self, name: str) -> None:
        self._state, self._at_start = name, True

    def _open_call(self) -> None:
        name = self._name if self._forced is None else self._forced
        self._calls.append(CallDelta(self._num_calls, name))
        self._num_calls += 1
        self._name, self._in_call = "", True

    def _close_call(self) -> None:
        """A call that was ended with no arguments has none of them."""
        if not self._in_call:
            self._open_call()
            self._calls.append(CallDelta(self._num_calls - 1, arguments="{}"))
        self._in_call = False

    def _say(self, state: State, text: str) -> None:
        if not text or state.says is None:
            return
        if state.says == "name":
            self._name += text
        elif state.says == "choice":
            self._chosen += text
        elif state.says == "arguments":
            if not self._in_call:
                self._open_call()
            self._calls.append(CallDelta(self._num_calls - 1, arguments=text))
        else:
            self._pieces.append((state.says, text))

    def _count_unfinished(self, state: State) -> int:
        """Characters at the end of the held text that may yet belong to a marker, or be dropped."""
        text = self._held
        longest = max((len(marker) for marker, _ in state.turns), default=1) - 1
        count = 0
        for length in range(min(longest, len(text)), 0, -1):
            end = text[-length:]
            if any(marker.startswith(end) for marker, _ in state.turns):
                count = length
                break
        if state.trim_end:
            before = text[: len(text) - count]
            count += len(before) - len(before.rstrip(state.trim_end))
        return count

    def _take(self) -> Delta:
        pieces, calls = self._pieces, self._calls
        self._pieces, self._calls = [], []
        return Delta(
            "".join(text for part, text in pieces if part == "reasoning"),
            "".join(text for part, text in pieces if part == "content"),
            _join_calls(calls),
        )


def parse(text: str, parser: ReplyParser) -> Reply:
    """The whole text in one piece."""
    reply = Reply()
    reply.add(parser.push(text))
    reply.add(parser.flush())
    return reply


def _build_table(calls: CallSyntax | None, *, answer: Part) -> Table:
    free = answer == "content"
    to_calls = ((CALLS, "calls"),) if calls is not None and free else ()
    table = {
        "opening": State(
            answer,
            to_calls,
            first=tuple((newlines + THINK, "reasoning") for newlines in ("", "\n", "\n\n")),
        ),
        "reasoning": State("reasoning", ((THINK_END, "answer"), *to_calls), trim="\n", trim_end="\n"),
        "answer": State(answer, to_calls, trim="\n"),
        "content": State("content", to_calls),
    }
    return {**table, **(_CALLS[calls] if calls is not None and free else {})}


def _find(text: str, markers: Iterable[str]) -> tuple[int, str] | None:
    """Where the marker that ends first begins; the longest of those that end together."""
    found = [(start + len(marker), start, marker) for marker in markers if (start := text.find(marker)) >= 0]
    if not found:
        return None
    _, start, marker = min(found)
    return start, marker


def _join_calls(calls: list[CallDelta]) -> tuple[CallDelta, ...]:
    """Pieces of the same call that came together are one."""
    joined: list[CallDelta] = []
    for call in calls:
        if joined and joined[-1].index == call.index:
            last = joined[-1]
            joined[-1] = CallDelta(last.index, last.name, last.arguments + call.arguments)
        else:
            joined.append(call)
    return tuple(joined)
