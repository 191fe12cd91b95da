"""Engine: token ids in, token ids out, for many requests at once, over a model it is handed ready.

`step` is the engine: the scheduler picks, the runner computes, sampling draws, the scheduler commits. With
`overlap` the device never waits for the host: a step is launched on the last one's tokens before they have
come, and what was computed for a text that turns out to have ended is dropped. There is no text here, and no
thread.

The law: what a request gets depends on its ids, its params and the weights; not on what else is served, how
its prompt was cut, what the cache remembered, how often it was preempted, how its steps were padded, or what
was guessed ahead. (To the rounding of matrix products, which may differ with their shapes.)

The same `Transformer` may be in training elsewhere: call `forget_prefixes` when its weights have changed.
"""

from __future__ import annotations

from collections.abc import Callable
from time import monotonic, perf_counter
from typing import Literal

import torch
from torch import Tensor

from shoal.engine import burst, drawing, ledger, offline, pieces, sampling, scoring, staging, warm
from shoal.engine.admission import Admission
from shoal.engine.blocks import BlockPool
from shoal.engine.buckets import default_contexts, default_sizes
from shoal.engine.desk import Desk
from shoal.engine.events import Completion, Event, Portion
from shoal.engine.flight import Drawing, Flight, collect_routed, score_prompts, take_scores
from shoal.engine.grammar import Vocabulary
from shoal.engine.order import Affinity, Arrival, Order
from shoal.engine.runner import Runner, Step
from shoal.engine.scheduler import Pick, Scheduler
from shoal.engine.sequence import SamplingParams
from shoal.engine.settings import EngineSettings
from shoal.engine.speculation import Drafter, Governor, Seen
from shoal.engine.stats import Stats
from shoal.engine.team import Alone, Team
from shoal.model.offloaded import offloaded
from shoal.model.transformer import Transformer


class Engine:
    """`vocabulary`, what the ids mean, is needed by requests with a grammar alone; `governor` says when to
    guess ahead, where `settings.speculate` does; `team` runs the model with this process."""

    places = 1  # so often `settings.max_sequences` run at once (lockstep.py)

    def __init__(
        self,
        model: Transformer,
        settings: EngineSettings,
        vocabulary: Vocabulary | None = None,
        governor: Governor | None = None,
        team: Team | None = None,
    ) -> None:
        self.config, self.settings, self.vocabulary = model.config, settings, vocabulary
        if self.config.moe is not None and not self.config.moe.is_causal:
            raise ValueError(
                "topk_method is 'expert_choice': which tokens an expert takes depends on later ones, so this "
                "model cannot write a text token by token; train one with another rule to serve it"
            )
        on_cuda = model.head_weight().is_cuda
        self._offloaded = tuple(offloaded(model))
        if self._offloaded and on_cuda and settings.buckets:
            raise ValueError(
                f"buckets are {settings.buckets}, but a graph never waits for the router's choice, and so "
                f"cannot fetch offloaded experts; leave out buckets, or offload"
            )
        buckets = default_sizes(settings.max_sequences) if on_cuda and not self._offloaded else ()
        buckets = buckets if settings.buckets is None else settings.buckets
        team = team or Alone()
        lengths = pieces.choose_lengths(model, settings, team)
        self.ledger = ledger.of_engine(
            model, settings, buckets if on_cuda else (), team, longest_graph=max(lengths, default=0)
        )
        self.pool = BlockPool(self.ledger.num_pages, settings.page_size, remember=settings.prefix_cache)
        if settings.affinity and self.config.moe is None:
            raise ValueError(f"affinity is {settings.affinity}, but this model routes nothing; set it to 0")
        self._order: Order = Arrival()
        if settings.affinity and self.config.moe is not None:
            self._order = Affinity(self.config.moe.n_routed_experts, settings.affinity)
        self.scheduler = Scheduler(
            self.pool,
            max_batch_tokens=settings.max_batch_tokens,
            max_sequences=settings.max_sequences,
            order=self._order,
        )
        if settings.speculate and not self.config.num_nextn_predict_layers:
            raise ValueError(
                f"speculate is {settings.speculate}, but this model has no prediction module "
                f"(num_nextn_predict_layers is 0); set it to 0, or load the model with mtp"
            )
        self.runner = Runner(
            model,
            self.pool.num_pages,
            settings.page_size,
            max_sequences=settings.max_sequences,
            buckets=buckets,
            contexts=default_contexts(self.ledger.longest),
            lengths=lengths,
            num_drafts=settings.speculate,
            record_weights=settings.record_weights,
            index_keys=settings.index_keys,
            cache_dtype=settings.cache_dtype,
            team=team,
        )
        self._drafter = None
        if settings.speculate:
            self._drafter = Drafter(self.runner, settings.speculate, self.scheduler.reserve)
        self._governor = governor or Governor()
        pays = on_cuda and not settings.speculate and not self._offloaded  # who waits for gates wins nothing
        self._overlaps = settings.overlap or (settings.overlap is None and pays)
        self.admission = Admission(self.config, self.ledger.longest, settings.seed, vocabulary)
        self._desk = Desk(self.scheduler, self.runner, self._order)
        self._num_requests = 0
        self._flight: Flight | None = None
        self._holds = False  # whether the next step admits nobody, so that it can be a burst
        self._steps = 0
        self._step_seconds = 0.0

    @property
    def busy(self) -> bool:
        """Whether a request waits or runs, or an end is still to be told: `step` until none is."""
        return self._desk.busy

    def add(self, ids: list[int], params: SamplingParams) -> int:
        """Queue a request and name it. One that could never be served is refused."""
        request = self._num_requests
        self._desk.add(self.admission.admit(request, ids, params))
        self._num_requests += 1
        return request

    def cancel(self, request: int) -> bool:
        """Drop a request and free its pages; its last event, "cancelled", comes with the next step. False if
        there is none: it may just have finished."""
        return self._desk.cancel(request)

    def step(self) -> list[Event]:
        """Run the model once, or `decode_steps` times, and tell what requests got; nothing if nothing lives.

        With `overlap` what is told is mostly what the step before gave. A request whose logits are not
        numbers ends with an error; the others go on.
        """
        return [event for portion in self.run_step() for event in portion.events()]

    def run_step(self) -> list[Portion]:
        """`step`, with what each request got in one."""
        start = perf_counter()
        told = [] if self._flight is not None else self._desk.deliver()
        if self._flight is not None and self._must_wait():
            told += self._land()
        flight = self._launch()
        if self._flight is not None:
            told += self._land()
        self._flight = flight
        if flight is not None and (not self._overlaps or self._must_wait()):
            told += self._land()
        if self._flight is None:
            told += self._desk.deliver()
        seconds = perf_counter() - start
        self._step_seconds += seconds
        if (
            self._drafter is not None
            and flight is not None
            and all(pick.num_new == 1 for pick in flight.picks)
        ):
            tokens = sum(len(portion.tokens) for portion in told)
            self._governor.observe(len(flight.picks), seconds, tokens)
        return told

    def warm_up(self, tell: Callable[[str], None] = lambda what: None) -> None:
        """Do now what would be done the first time only: on CUDA graphs are recorded and kernels compiled, so
        that nothing is compiled while requests are served. On a CPU there is nothing of the kind. `tell` is
        told what begins."""
        if self.busy:
            raise ValueError(f"{len(self._desk.live)} requests are being served; warm up before the first")
        if self.runner.device.type != "cuda":
            return
        most = min(self.settings.max_batch_tokens, self.ledger.longest)
        warm.warm_up(self.runner, self.pool, most, self.settings.max_sequences, tell)
        self.runner.records.reset_counts()
        for experts in self._offloaded:
            experts.reset_counts()

    def stats(self, *, wait: bool = True) -> Stats:
        """Without `wait` what experts were given is not newer than the last such call: it is on the device,
        and to read it there is to wait for the step that runs."""
        scheduler, drafter = self.scheduler, self._drafter
        expert_tokens, experts_touched = self.runner.records.counts(wait=wait)
        return Stats(
            running=len(scheduler.running),
            waiting=len(scheduler.waiting),
            pages=self.pool.num_pages,
            pages_free=self.pool.num_free,
            prompt_positions=scheduler.num_positions_admitted,
            prompt_positions_cached=scheduler.num_positions_remembered,
            preemptions=scheduler.num_preemptions,
            generated=self._desk.generated,
            steps=self._steps,
            step_seconds=self._step_seconds,
            drafted=() if drafter is None else drafter.count(drafter.drafted),
            accepted=() if drafter is None else drafter.count(drafter.accepted),
            expert_tokens=expert_tokens,
            experts_touched=experts_touched,
            expert_cache_queries=self._count("queries"),
            expert_cache_hits=self._count("hits"),
        )

    def generate(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[Completion]:
        """Serve these prompts to their end, with params for all or for each. An error leaves none behind.

        FloatingPointError if the logits of one are not numbers.
        """
        return offline.generate(self, prompts, params)

    def score(self, ids: list[int], routing: Tensor | None = None) -> list[float]:
        """Log-probability of each token after the first, given those before it, in float32.

        Read through free pages in steps of `max_batch_tokens`, so memory does not grow with the text.
        `routing` (tokens - 1, L, K) replays experts that were recorded of this text.
        """
        self.check_score(ids, routing)
        return scoring.score(self.runner, self.pool, ids, routing, most=self.settings.max_batch_tokens)

    def check(self, ids: list[int], params: SamplingParams) -> None:
        """Refuse what `add` would."""
        self.scheduler.check(self.admission.admit(self._num_requests, ids, params))

    def check_score(self, ids: list[int], routing: Tensor | None) -> None:
        """Refuse what `score` would."""
        self.admission.check_text(ids, routing)
        scoring.count_pages(self.pool, ids)

    def forget_prefixes(self) -> None:
        """The weights have changed: what the cache remembers is no longer what the model would compute."""
        self.pool.forget_all()

    # ------------------------------------------------------------------------------------------------
    # A step goes out

    def _must_wait(self) -> bool:
        """Whether the next step cannot be made up before the last one's tokens are here: it needs them on
        the host, or has to take the pages of somebody whose token is on its way."""
        return self.scheduler.is_short() or any(sequence.matcher for sequence in self.scheduler.running)

    def _launch(self) -> Flight | None:
        num_drafts = 0
        if self._drafter is not None and self._guesses():
            num_drafts = self._drafter.num_drafts
        picks = self.scheduler.schedule(num_drafts=num_drafts, admit=not self._holds)
        self._holds = self.settings.decode_steps > 1 and self._is_full(picks)
        if not picks:
            return None
        counts = [int(pick.samples) for pick in picks]  # tokens that each will get
        if self.settings.decode_steps > 1 and all(counts) and burst.can_follow(picks):
            counts = self.scheduler.extend(picks, self.settings.decode_steps)
        steps, starts = max(*counts, 1), [pick.sequence.num_computed for pick in picks]
        ends = [
            start + max(pick.num_tokens, count)
            for start, pick, count in zip(starts, picks, counts, strict=True)
        ]
        drawn = [
            Drawing(pick, count, max(steps, 1 + pick.num_drafts))
            for pick, count in zip(picks, counts, strict=True)
            if count
        ]
        spans = [self.runner.span(pick) for pick in picks]
        try:
            step = self.runner.run(spans, ends if steps > 1 else None)
            samples = self._draw(picks, drawn, step, steps)
        except torch.OutOfMemoryError as error:
            tokens = sum(pick.num_tokens for pick in picks)
            raise ValueError(
                f"the device ran out of memory in a step of {tokens} tokens; lower max_batch_tokens from "
                f"{self.settings.max_batch_tokens} to {max(tokens // 2, 1)}, or memory from "
                f"{self.settings.memory} to {0.9 * self.settings.memory:.2f}"
            ) from error
        scores = score_prompts(self.runner, picks, step)
        read = [
            pick.sequence for pick, count in zip(picks, counts, strict=True) if not count and pick.reads_all
        ]
        routed = collect_routed(self.runner.records, picks, ends)
        now = monotonic()
        for pick in picks:
            if pick.sequence.began is None:
                pick.sequence.began = now
        self.scheduler.launch(picks, counts)
        self._steps += steps
        return Flight(picks, starts, step, drawn, samples, scores, read, routed)

    def _draw(
        self, picks: list[Pick], wanting: list[Drawing], step: Step, steps: int
    ) -> staging.Parcel | None:
        """Draw what the picks want, leave the last tokens for the next step, send all of them home."""
        if not wanting:
            return None
        if steps > 1:
            drawn = drawing.draw_burst(self.runner, picks, step, steps)
        else:
            drawn = drawing.draw(self.runner, picks, step)
        if self._overlaps:
            tokens_S = drawn.tokens_S1.flatten(1)[:, -1]
            self.runner.keep(tokens_S, [pick.sequence for pick, *_ in wanting])
        return staging.Parcel(drawn.pack().flatten(0, -2))

    def _is_full(self, picks: list[Pick]) -> bool:
        """Whether a step reads prompts, and who still waits does so for somebody's place or pages: those that
        are free after it can wait for a burst."""
        tokens = sum(pick.num_tokens for pick in picks)
        reads = any(pick.num_new > 1 for pick in picks)
        return reads and bool(self.scheduler.waiting) and tokens < self.settings.max_batch_tokens

    def _count(self, what: Literal["queries", "hits"]) -> int | None:
        """Of all layers' slots, since the engine began."""
        if not self._offloaded:
            return None
        return sum(getattr(experts.slots, what) for experts in self._offloaded)

    def _guesses(self) -> bool:
        """Whether guessing ahead pays, for as many as decode now."""
        return self._governor.decide(sum(sequence.num_pending == 1 for sequence in self.scheduler.running))

    # ------------------------------------------------------------------------------------------------
    # A step comes in

    def _land(self) -> list[Portion]:
        flight, self._flight = self._flight, None
        assert flight is not None
        desk, drafter = self._desk, self._drafter
        told = desk.deliver()
        for sequence, start, packed in flight.scores:
            take_scores(sequence, start, packed.open())
        for sequence in flight.read:
            told += desk.read(sequence, flight.routed.get(sequence.request))
        if flight.samples is not None:
            tops = (pick.sequence.params.logprobs for pick, _, rows in flight.drawn for _ in range(rows))
            samples, end = sampling.read(flight.samples.open(), tops), 0
            for pick, flown, rows in flight.drawn:
                start, end = end, end + rows
                request = pick.sequence.request
                if request not in desk.live:
                    continue
                stand = flown
                if drafter is not None:
                    stand = drafter.verify(pick.sequence, samples.tokens[start:end])
                drawn = samples.part(start, start + stand)
                told += desk.take(pick, drawn, flown, flight.routed.get(request))
        desk.send()
        if drafter is not None:
            self._draft(drafter, flight)
        return told

    def _draft(self, drafter: Drafter, flight: Flight) -> None:
        """Guess on from what a step has computed for those that still run."""
        seen, row = [], 0
        for pick, start in zip(flight.picks, flight.starts, strict=True):
            sequence = pick.sequence
            if sequence.pages and sequence.num_computed > start:
                up_to_date = sequence.num_computed == len(sequence.ids) - 1 and sequence.matcher is None
                seen.append(Seen(sequence, start, sequence.num_computed - start, row, up_to_date))
            row += pick.num_tokens
        if seen:
            drafter.draft(seen, flight.step.hidden_TD, drafter.num_drafts if self._guesses() else 0)
