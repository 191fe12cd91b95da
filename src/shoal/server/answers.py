"""From tokens to a client's answer: one request of a client while it is served.

`Job` is what is asked of the engine; `serve` hands it in and yields what comes out, piece by piece, as text
that is sure: characters are whole, nothing of a stop string leaves, reasoning and tool calls are told apart.
The law: the pieces of a choice add up to the same whatever the batches in which its tokens came, and when the
caller stops listening, for whatever reason, the engine stops computing.

How pieces are written down is chat.py's, completions.py's and responses.py's.
"""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from shoal.data.text import StopStrings, TextStream, Tokenizer
from shoal.engine import SamplingParams
from shoal.server.errors import ApiError
from shoal.server.metrics import Metrics
from shoal.server.parsers import Delta, ReplyParser
from shoal.server.process import EngineProcess, Ticket, Token

Finish = str  # "stop", "length"
NOTHING = Delta()


@dataclass(frozen=True)
class Job:
    """`parts` are prompts times `n` choices of each, in the order of the answer's choices."""

    parts: list[tuple[list[int], SamplingParams]]
    n: int = 1
    stops: tuple[str, ...] = ()
    parser: Callable[[], ReplyParser] | None = None  # None: the text is the answer
    shown_ids: frozenset[int] = frozenset()
    skip_special: bool = True


class Piece(NamedTuple):
    """What a choice gained: `text` where the job has no parser, `delta` where it has one."""

    choice: int
    text: str
    delta: Delta
    tokens: list[Token]
    gained: int  # of those, that are tokens and not only an end
    finish: Finish | None


@dataclass
class Tally:
    """What a request cost, as `usage` tells it."""

    prompt: int = 0
    cached: int = 0
    generated: int = 0
    reasoning: int = 0

    @property
    def usage(self) -> dict[str, object]:
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.generated,
            "total_tokens": self.prompt + self.generated,
            "prompt_tokens_details": {"cached_tokens": self.cached},
            "completion_tokens_details": {"reasoning_tokens": self.reasoning},
        }


class _Writer:
    """One choice."""

    def __init__(self, job: Job, tokenizer: Tokenizer) -> None:
        self._stream = TextStream(tokenizer, skip_special=job.skip_special, shown=job.shown_ids)
        self._stops = StopStrings(job.stops)
        self._parser = None if job.parser is None else job.parser()
        self.finished = False
        self.num_reasoning = 0

    def push(self, choice: int, tokens: list[Token]) -> Piece:
        text, delta, gained, finish = "", NOTHING, 0, None
        for taken, token in enumerate(tokens, 1):
            if token.error is not None:
                raise ApiError(500, token.error, code="engine_error")
            if self._parser is not None and self._parser.reasoning:
                self.num_reasoning += token.token is not None
            said, finish = "", token.finish
            if token.token is not None:
                gained += 1
                if finish != "stop":  # the token that ends a text says nothing
                    said = self._stops.push(self._stream.push((token.token,)))
            if finish is not None and self._stops.stopped is None:
                said += self._stops.push(self._stream.flush()) + self._stops.flush()
            if self._stops.stopped is not None:
                finish = "stop"
            if self._parser is None:
                text += said
            else:
                delta = _join(delta, self._parser.push(said))
                if finish is not None:
                    delta = _join(delta, self._parser.flush())
            if finish is not None:
                self.finished = True
                tokens = tokens[:taken]
                break
        return Piece(choice, text, delta, tokens, gained, finish)


async def serve(
    job: Job, process: EngineProcess, tokenizer: Tokenizer, metrics: Metrics, tally: Tally
) -> AsyncGenerator[list[Piece], None]:
    """Pieces as they come, until every choice has finished. `tally` grows with them."""
    tally.prompt = sum(len(ids) for ids, _ in job.parts[:: job.n])
    clock = _Clock(metrics, [len(ids) for ids, _ in job.parts])
    ticket: Ticket = process.submit(job.parts)
    writers = [_Writer(job, tokenizer) for _ in job.parts]
    outcome = "abort"
    try:
        unfinished = len(writers)
        while unfinished:
            mail = await ticket.receive()
            pieces = []
            for part, tokens in ({0: mail} if len(writers) == 1 else _by_part(mail)).items():
                if writers[part].finished:
                    continue
                if clock.starts(part) and part % job.n == 0:
                    tally.cached += tokens[0].cached
                piece = writers[part].push(part, tokens)
                tally.generated += piece.gained
                clock.tell(part, piece.gained, tokens[0].began)
                if piece.finish is not None:
                    unfinished -= 1
                    ticket.close(part)  # a stop string ended it, not the engine
                    clock.end(part, piece.finish)
                pieces.append(piece)
            if job.parser is not None:
                tally.reasoning = sum(writer.num_reasoning for writer in writers)
            yield pieces
        outcome = "done"
    except ApiError:
        outcome = "error"
        raise
    finally:
        ticket.close()
        for part, writer in enumerate(writers):
            if not writer.finished:
                clock.end(part, "abort" if outcome == "abort" else "error")


@dataclass
class _Clock:
    """Times of a request's choices, told to the metrics."""

    metrics: Metrics
    prompts: list[int]
    start: float = field(default_factory=time.monotonic)
    last: dict[int, float] = field(default_factory=dict)
    first: dict[int, float] = field(default_factory=dict)
    began: dict[int, float] = field(default_factory=dict)
    count: dict[int, int] = field(default_factory=dict)

    def starts(self, part: int) -> bool:
        return part not in self.first

    def tell(self, part: int, gained: int, began: float | None) -> None:
        """`began`: when the engine's first step for it was launched, by the same clock of this machine."""
        now = time.monotonic()
        if part not in self.first:
            self.first[part] = now
            if began is not None:
                self.began[part] = began
                self.metrics.queue_time.observe(max(0.0, began - self.start))
                self.metrics.prefill_time.observe(max(0.0, now - began))
            self.metrics.first_token.observe(now - self.start)
        elif gained:
            self.metrics.inter_token.observe((now - self.last[part]) / gained, gained)
        self.last[part] = now
        self.count[part] = self.count.get(part, 0) + gained

    def end(self, part: int, finish: str) -> None:
        now = time.monotonic()
        metrics, count = self.metrics, self.count.get(part, 0)
        metrics.success.labels(finish).inc()
        metrics.end_to_end.observe(now - self.start)
        metrics.request_prompt_tokens.observe(self.prompts[part])
        metrics.request_generation_tokens.observe(count)
        if part in self.first:
            metrics.decode_time.observe(now - self.first[part])
            if part in self.began:
                metrics.inference_time.observe(max(0.0, now - self.began[part]))
            if count > 1:
                metrics.per_output_token.observe((now - self.first[part]) / (count - 1))


def _by_part(tokens: list[Token]) -> dict[int, list[Token]]:
    parts: dict[int, list[Token]] = {}
    for token in tokens:
        parts.setdefault(token.part, []).append(token)
    return parts


def _join(one: Delta, other: Delta) -> Delta:
    if not one:
        return other
    if not other:
        return one
    return Delta(one.reasoning + other.reasoning, one.content + other.content, one.calls + other.calls)
