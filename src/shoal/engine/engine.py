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
from dataclasses import dataclass

from shoal.engine.blocks import BlockPool
from shoal.engine.runner import Runner, count_page_bytes
from shoal.engine.sampling import Draw, Sample, hash_pair, sample
from shoal.engine.scheduler import Pick, Scheduler
from shoal.engine.sequence import FinishReason, SamplingParams, Sequence
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


@dataclass(frozen=True)
class Event:
    """A request got a token; its last one if `finish` says so."""

    request: int
    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]  # as many (token, logprob) as the request asked for
    finish: FinishReason | None


@dataclass(frozen=True)
class Completion:
    """All that a request got. The token that stopped it is the last of the ids."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    tops: tuple[tuple[tuple[int, float], ...], ...]
    finish: FinishReason


class Engine:
    def __init__(self, model: Transformer, settings: EngineSettings) -> None:
        self.config, self.settings = model.config, settings
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

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs: `step` until none does."""
        return bool(self._live)

    def add(self, ids: list[int], params: SamplingParams) -> int:
        """Queue a request and name it. One that could never be served is refused."""
        self._check_ids("prompt", ids)
        self._check_vocabulary("stop_token_ids", params.stop_token_ids)
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
        """Drop a request and free its pages. False if there is none: it may just have finished."""
        sequence = self._live.pop(request, None)
        if sequence is None:
            return False
        self.scheduler.remove(sequence)
        return True

    def step(self) -> list[Event]:
        """Run the model once: a token for each request whose prompt has been read; nothing if nothing lives.

        FloatingPointError if a request's logits are not numbers: it has not moved, nor has any other.
        """
        picks = self.scheduler.schedule()
        if not picks:
            return []
        logits_SV = self.runner.run(picks)
        ready = [pick.sequence for pick in picks if pick.samples]
        samples = sample(logits_SV, [_draw(sequence) for sequence in ready])
        for sequence, drawn in zip(ready, samples, strict=True):
            if not math.isfinite(drawn.logprob):
                raise FloatingPointError(
                    f"request {sequence.request}: the logits of token {len(sequence.ids)} are not finite; "
                    f"the weights are broken, or overflow {self.runner.pages[0].dtype}"
                )
        self.scheduler.commit(picks, [drawn.token for drawn in samples])
        return [self._report(sequence, drawn) for sequence, drawn in zip(ready, samples, strict=True)]

    def generate(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[Completion]:
        """Serve these prompts to their end, with params for all or for each. An error leaves none behind."""
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
                    events[event.request].append(event)
        finally:
            for request in events:
                self.cancel(request)
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

    def _report(self, sequence: Sequence, drawn: Sample) -> Event:
        if sequence.finish:
            del self._live[sequence.request]
        return Event(sequence.request, drawn.token, drawn.logprob, drawn.top, sequence.finish)


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
    return Draw(sequence.params, sequence.seed, len(sequence.ids), sequence.banned_ids)


def _complete(events: list[Event]) -> Completion:
    finish = events[-1].finish
    assert finish is not None
    return Completion(
        ids=tuple(event.token for event in events),
        logprobs=tuple(event.logprob for event in events),
        tops=tuple(event.top for event in events),
        finish=finish,
    )
