"""Engine: token ids in, token ids out, for many requests at once, over a model it is handed ready.

`step` is the engine: the scheduler picks, the runner computes, sampling draws, the scheduler commits.
Everything else puts requests in, takes them out, or calls `step` until they are done. There is no text here,
no thread and no clock.

The law: what a request gets depends on its ids, its params and the weights; not on what else is being served,
how its prompt was cut into chunks, what the cache remembered, or how often it was preempted. (To the rounding
of matrix products, which may differ with their shapes.)

The same `Transformer` object may be in training elsewhere: call `forget_prefixes` whenever its weights have
changed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from time import perf_counter

from torch import Tensor

from shoal.engine.blocks import BlockPool
from shoal.engine.grammar import Vocabulary
from shoal.engine.runner import Runner, count_page_bytes
from shoal.engine.sampling import Draw, Sample, hash_pair, sample
from shoal.engine.scheduler import Pick, Scheduler
from shoal.engine.sequence import FinishReason, SamplingParams, Sequence
from shoal.engine.stats import Stats
from shoal.model.transformer import Transformer


@dataclass(frozen=True)
class EngineSettings:
    """How much is served at once.

    The cache has `num_pages` pages; None makes as many as `cache_bytes` hold, but no more than
    `max_sequences` of the model's longest context could fill. A step has at most `max_batch_tokens` tokens of
    `max_sequences` sequences. Requests without a seed are given one from `seed`.
    """

    page_size: int = 64
    num_pages: int | None = None
    cache_bytes: int = 1 << 30
    max_batch_tokens: int = 2048
    max_sequences: int = 64
    prefix_cache: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("page_size", "num_pages", "cache_bytes", "max_batch_tokens", "max_sequences"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} is {value}; it must be at least 1")
        if self.max_sequences > self.max_batch_tokens:
            raise ValueError(
                f"max_sequences {self.max_sequences} exceeds max_batch_tokens {self.max_batch_tokens}; "
                f"every running sequence decodes one token a step, so raise the latter or lower the former"
            )
        if not 0 <= self.seed < 2**64:
            raise ValueError(f"seed is {self.seed}; it must be between 0 and 2**64 - 1")


Top = tuple[tuple[int, float], ...]  # (token, logprob), best first


@dataclass(frozen=True)
class Event:
    """A request got a token, or ended, or both.

    `token` and `logprob` are None where it ended without one: it was cancelled, its logits are not numbers
    (`error` says which), or it asked for none.
    """

    request: int
    token: int | None
    logprob: float | None
    top: Top  # as many as the request asked for
    finish: FinishReason | None
    cached: int = 0  # positions of the prompt that the prefix cache had
    prompt_logprobs: tuple[float, ...] | None = None  # on the first: of each prompt token but the first
    prompt_tops: tuple[Top, ...] | None = None
    routing: Tensor | None = field(default=None, compare=False)  # on the last: (positions - 1, L, K) int16
    error: str | None = None


@dataclass(frozen=True)
class Completion:
    """All that a request got. The token that stopped it is the last of the ids."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tops: tuple[Top, ...]
    finish: FinishReason
    cached: int = 0
    prompt_logprobs: tuple[float, ...] | None = None
    prompt_tops: tuple[Top, ...] | None = None
    routing: Tensor | None = field(default=None, compare=False)


class Engine:
    """`vocabulary`, what the ids mean, is needed by requests with a grammar alone."""

    def __init__(
        self, model: Transformer, settings: EngineSettings, vocabulary: Vocabulary | None = None
    ) -> None:
        self.config, self.settings, self.vocabulary = model.config, settings, vocabulary
        self.pool = BlockPool(
            _count_pages(model, settings), settings.page_size, remember=settings.prefix_cache
        )
        self.scheduler = Scheduler(
            self.pool, max_batch_tokens=settings.max_batch_tokens, max_sequences=settings.max_sequences
        )
        self.runner = Runner(model, self.pool.num_pages, settings.page_size)
        eos = self.config.eos_token_id
        self._eos_ids = frozenset(eos if isinstance(eos, tuple) else () if eos is None else (eos,))
        self._live: dict[int, Sequence] = {}
        self._num_requests = 0
        self._ended: list[Event] = []  # told by the next step
        self._generated = self._steps = 0
        self._step_seconds = 0.0

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs, or an end is still to be told: `step` until none is."""
        return bool(self._live or self._ended)

    def add(self, ids: list[int], params: SamplingParams) -> int:
        """Queue a request and name it. One that could never be served is refused."""
        self._check_ids("prompt", ids)
        self._check_vocabulary("stop_token_ids", params.stop_token_ids)
        self._check_vocabulary("logit_bias", (token for token, _ in params.logit_bias))
        for name, wish in (
            ("grammar", params.grammar),
            ("prompt_logprobs", params.prompt_logprobs),
            ("routing", params.routing or None),
        ):
            if wish is not None:
                raise ValueError(f"{name} is {wish}; this version of the engine does not serve it yet")
        if params.logprobs > self.config.vocab_size:
            raise ValueError(
                f"logprobs is {params.logprobs}; the vocabulary has {self.config.vocab_size} tokens"
            )
        request = self._num_requests
        sequence = Sequence(
            ids=list(ids),
            params=params,
            request=request,
            seed=hash_pair(self.settings.seed, request) if params.seed is None else params.seed,
            stop_ids=frozenset(params.stop_token_ids) | (frozenset() if params.ignore_eos else self._eos_ids),
            max_len=len(ids) + self._count_wanted(len(ids), params),
        )
        self.scheduler.add(sequence)
        self._live[request] = sequence
        self._num_requests += 1
        return request

    def cancel(self, request: int) -> bool:
        """Drop a request and free its pages; its last event, "cancelled", comes with the next step. False if
        there is none: it may just have finished."""
        sequence = self._drop(request)
        if sequence is not None:
            self._ended.append(self._end(sequence, "cancelled"))
        return sequence is not None

    def step(self) -> list[Event]:
        """Run the model once: a token for each request whose prompt has been read; nothing if nothing lives.

        A request whose logits are not numbers ends with an error; the others go on.
        """
        start = perf_counter()
        ended, self._ended = self._ended, []
        picks = self.scheduler.schedule()
        if not picks:
            return ended
        logits_SV = self.runner.run(picks)
        ready = [pick.sequence for pick in picks if pick.samples]
        samples = sample(logits_SV, [_draw(sequence) for sequence in ready])
        self.scheduler.commit(picks, [drawn.token for drawn in samples])
        events = [self._report(sequence, drawn) for sequence, drawn in zip(ready, samples, strict=True)]
        self._steps += 1
        self._step_seconds += perf_counter() - start
        return ended + events

    def stats(self) -> Stats:
        scheduler = self.scheduler
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages=self.pool.num_pages,
            pages_free=self.pool.num_free,
            prompt_positions=scheduler.num_positions_admitted,
            prompt_positions_cached=scheduler.num_positions_remembered,
            preemptions=scheduler.num_preemptions,
            generated=self._generated,
            steps=self._steps,
            step_seconds=self._step_seconds,
        )

    def generate(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[Completion]:
        """Serve these prompts to their end, with params for all or for each. An error leaves none behind.

        FloatingPointError if the logits of one are not numbers.
        """
        each = [params] * len(prompts) if isinstance(params, SamplingParams) else params
        if len(each) != len(prompts):
            raise ValueError(
                f"there are {len(prompts)} prompts and {len(each)} params; give one, or one for each"
            )
        if self.busy:
            raise ValueError(f"{len(self._live)} requests are being served; use add and step beside them")
        events: dict[int, list[Event]] = {}
        try:
            for ids, wish in zip(prompts, each, strict=True):
                events[self.add(ids, wish)] = []
            while self.busy:
                for event in self.step():
                    if event.error is not None:
                        raise FloatingPointError(event.error)
                    events[event.request].append(event)
        finally:
            for request in events:
                self._drop(request)
        return [_complete(of_request) for of_request in events.values()]

    def score(self, ids: list[int]) -> list[float]:
        """Log-probability of each token after the first, given those before it, in float32.

        Read through free pages in steps of `max_batch_tokens`, so memory does not grow with the text.
        """
        self._check_ids("text", ids)
        self._check_positions(len(ids), f"a text of {len(ids)} tokens", "score it in pieces")
        sequence = Sequence(ids[:-1], SamplingParams())
        needed = self.pool.count_pages(sequence.num_pending)
        if needed > self.pool.num_free:
            raise ValueError(
                f"a text of {len(ids)} tokens needs {needed} pages, but {self.pool.num_free} of "
                f"{self.pool.num_pages} are free; score it in pieces, let requests finish, or raise num_pages"
            )
        sequence.pages = self.pool.take(needed)
        logprobs: list[float] = []
        try:
            while sequence.num_pending:
                start = sequence.num_computed
                end = start + min(sequence.num_pending, self.settings.max_batch_tokens)
                logprobs += self.runner.score(Pick(sequence, end - start), ids[start + 1 : end + 1])
                sequence.num_computed = end
        finally:
            self.pool.release(sequence.pages)
        return logprobs

    def forget_prefixes(self) -> None:
        """The weights have changed: what the cache remembers is no longer what the model would compute."""
        self.pool.forget_all()

    def _check_ids(self, what: str, ids: list[int]) -> None:
        if not ids:
            raise ValueError(f"the {what} is empty; give at least one token, such as the beginning of text")
        self._check_vocabulary(f"the {what}", ids)

    def _check_vocabulary(self, what: str, ids: Iterable[int]) -> None:
        size = self.config.vocab_size
        wrong = [token for token in ids if not 0 <= token < size]
        if wrong:
            raise ValueError(
                f"{what} has token {wrong[0]}, outside the vocabulary of {size}; use the model's tokenizer"
            )

    def _check_positions(self, needed: int, what: str, fix: str) -> None:
        limit = self.config.max_position_embeddings
        if needed > limit:
            raise ValueError(
                f"{what} needs {needed} positions, but the model has {limit} (max_position_embeddings); {fix}"
            )

    def _count_wanted(self, num_prompt: int, params: SamplingParams) -> int:
        """Tokens a request may generate: what it says, or else all that the context has room for."""
        room = min(self.config.max_position_embeddings, self.pool.capacity) - num_prompt
        wanted = max(room, params.min_tokens, 1) if params.max_tokens is None else params.max_tokens
        self._check_positions(
            num_prompt + wanted,
            f"a prompt of {num_prompt} tokens with {wanted} to generate",
            "shorten the prompt or lower max_tokens",
        )
        return wanted

    def _drop(self, request: int) -> Sequence | None:
        sequence = self._live.pop(request, None)
        if sequence is not None and sequence.finish is None:
            self.scheduler.remove(sequence)
        return sequence

    def _end(self, sequence: Sequence, finish: FinishReason, error: str | None = None) -> Event:
        """The last event of a request that got no token with it."""
        return Event(sequence.request, None, None, (), finish, cached=sequence.cached, error=error)

    def _report(self, sequence: Sequence, drawn: Sample) -> Event:
        if not math.isfinite(drawn.logprob):
            self._drop(sequence.request)
            place = len(sequence.ids) - 1
            return self._end(
                sequence,
                "error",
                f"request {sequence.request}: the logits of token {place} are not finite; "
                f"the weights are broken, or overflow {self.runner.pages[0].dtype}",
            )
        if sequence.finish:
            del self._live[sequence.request]
        self._generated += 1
        return Event(
            sequence.request,
            drawn.token,
            drawn.logprob,
            drawn.top,
            sequence.finish,
            cached=sequence.cached,
        )


def _count_pages(model: Transformer, settings: EngineSettings) -> int:
    if settings.num_pages is not None:
        return settings.num_pages
    page_bytes = count_page_bytes(model.config, settings.page_size, model.head_weight().dtype)
    affordable = settings.cache_bytes // page_bytes
    if not affordable:
        raise ValueError(
            f"cache_bytes is {settings.cache_bytes}, but a page of {settings.page_size} positions takes "
            f"{page_bytes}; raise it, or lower page_size"
        )
    usable = settings.max_sequences * -(-model.config.max_position_embeddings // settings.page_size)
    return min(affordable, usable)


def _draw(sequence: Sequence) -> Draw:
    """How the next token of a sequence is drawn."""
    return Draw(
        sequence.params,
        sequence.seed,
        len(sequence.ids),
        sequence.banned_ids,
        tuple(sequence.ids[: sequence.num_prompt]),
        tuple(sequence.ids[sequence.num_prompt :]),
    )


def _complete(events: list[Event]) -> Completion:
    first, last = events[0], events[-1]
    assert last.finish is not None
    return Completion(
        ids=tuple(event.token for event in events if event.token is not None),
        logprobs=tuple(event.logprob for event in events if event.logprob is not None),
        tops=tuple(event.top for event in events if event.token is not None),
        finish=last.finish,
        cached=first.cached,
        prompt_logprobs=first.prompt_logprobs,
        prompt_tops=first.prompt_tops,
        routing=last.routing,
    )
