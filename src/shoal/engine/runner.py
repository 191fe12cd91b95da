"""Runner: from the scheduler's picks to logits, by one call of the model.

It owns the cache (cache.py). It turns the picks into a Batch with its KVView, everything the step needs in
one transfer to the device, and calls the very `Transformer` that was trained.

A step may be launched before the ids it continues have reached the host: such an id is written as a place in
`tokens`, the table on the device where sampling leaves them. Steps of nothing but decodes are padded to a
few fixed sizes (`buckets`), whose padding writes to one page more than there are; on CUDA each replays a
graph. Others are padded to a few fixed lengths (`pieces`), and replay graphs between their attentions.

Shape letters: T tokens of the step, S sequences, M rows that are drawn from, B pages of a sequence, D hidden,
V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from shoal.batch import Batch, Between, KVView
from shoal.config.cost import IndexKeys
from shoal.engine import burst, staging
from shoal.engine.buckets import Bucket, Buckets
from shoal.engine.cache import make_cache
from shoal.engine.pieces import Pieces
from shoal.engine.records import Records
from shoal.engine.scheduler import Pick
from shoal.engine.sequence import Sequence
from shoal.engine.settings import CacheDtype
from shoal.engine.spans import Inputs, Span, lay_out
from shoal.engine.team import Alone, Team
from shoal.model.moe import MoE
from shoal.model.transformer import Transformer
from shoal.ops import api as ops

_SCORED_AT_ONCE = 256  # rows whose logits over the vocabulary are held at a time


@dataclass(frozen=True, eq=False)
class Step:
    """What a step computes, on the device."""

    logits_MV: Tensor  # of the rows to draw from, in the order of the spans
    hidden_TD: Tensor
    table_SB: Tensor  # int32: the pages of each span


class Runner:
    """`buckets` are the sizes to which steps of decodes are padded, `contexts` the bounds of their contexts,
    `lengths` those to which other steps are padded, `num_drafts` how many tokens may be guessed ahead; `team`
    has the processes that run the model with this one."""

    def __init__(
        self,
        model: Transformer,
        num_pages: int,
        page_size: int,
        *,
        max_sequences: int = 64,
        buckets: tuple[int, ...] = (),
        contexts: tuple[int, ...] = (),
        lengths: tuple[int, ...] = (),
        num_drafts: int = 0,
        record_weights: bool = False,
        index_keys: IndexKeys = "wide",
        cache_dtype: CacheDtype = "auto",
        team: Team | None = None,
    ) -> None:
        config, head = model.config, model.head_weight()
        self.model, self.device, self.page_size = model, head.device, page_size
        self.team = team or Alone()
        self.calls = 0  # of the model, by `run` and `rest`
        self.pages, self.index_keys = make_cache(
            config, (num_pages + 1, page_size), head, num_drafts > 0, index_keys, cache_dtype
        )
        self.records = Records(config, num_pages, page_size, head.device, weights=record_weights)
        self._width = 1 + num_drafts
        self.tokens = torch.zeros(max_sequences * self._width, dtype=torch.int64, device=head.device)
        self._logits = None
        if buckets and head.is_cuda:
            rows = max(buckets) * self._width
            self._logits = torch.empty(rows, config.vocab_size, dtype=head.dtype, device=head.device)
        self.buckets = Buckets(buckets, contexts, page_size, scratch=num_pages, device=head.device)
        self._last: tuple[Inputs, Bucket | None, int] | None = None  # what `again` repeats, for how many rows
        self.pad_slot = num_pages * page_size  # the first of the page that takes what padding writes
        self.pieces = Pieces(lengths, config, self.pad_slot, head.dtype, head.device)

    def place(self, sequence: Sequence, guess: int = 0) -> int:
        """Where `tokens` has the last token of a running sequence, or its `guess`-th draft, from 1."""
        assert 0 <= guess < self._width
        return sequence.row * self._width + guess

    def span(self, pick: Pick) -> Span:
        sequence, start = pick.sequence, pick.sequence.num_computed
        codes = sequence.ids[start : start + pick.num_new]
        if len(codes) < pick.num_new:
            codes.append(-1 - self.place(sequence))
        codes += [-1 - self.place(sequence, guess) for guess in range(1, pick.num_drafts + 1)]
        return Span(sequence.pages, start, codes, 1 + pick.num_drafts if pick.samples else 0)

    def run(self, spans: list[Span], ends: list[int] | None = None) -> Step:
        """The spans through the model. Launches only: the host goes on at once. With `ends`, a position each,
        the decodes may go on by `again` up to there."""
        self.team.tell("run", spans, ends)
        return self._run(spans, ends)

    def again(self, tokens_S: Tensor) -> Step:
        """The same sequences one position further, with the tokens just drawn."""
        self.team.tell("again", None)
        return self._again(tokens_S)

    @torch.inference_mode()
    def rest(self) -> None:
        """No tokens through the model: where its experts are spread, those of others meet the ones here."""
        self.calls += 1
        config, head = self.model.config, self.model.head_weight()
        none_TD = head.new_empty(0, config.hidden_size)
        for layer, block in enumerate(islice(self.model.model.layers, config.num_hidden_layers)):
            if isinstance(block.mlp, MoE):
                block.mlp(none_TD, self.model.hashed(self.tokens[:0], layer))

    @torch.inference_mode()
    def follow(self) -> None:
        """Do what the first of the team does, until its end."""
        calls = {"run": self._run, "again": self._again, "try_out": self._try_out, "capture": self._capture}
        calls |= {"score": self._score, "project": self._project, "predict": self._predict}
        while (told := self.team.hear()) is not None:
            calls[told[0]](*told[1:])

    @torch.inference_mode()
    def _run(self, spans: list[Span], ends: list[int] | None = None) -> Step:
        if self.model.training:
            raise ValueError(
                "the model is in training mode, where experts may drop tokens; call model.eval() first"
            )
        self.calls += 1
        bucket, tokens = None, spans[0].num_drawn
        if all(len(span.codes) == span.num_drawn == tokens for span in spans):
            longest = max(ends) if ends else max(span.start for span in spans) + tokens
            bucket = self.buckets.find(len(spans), tokens, longest)
        if bucket is None:
            inputs = self.inputs(spans, ends)
            step = self._run_unpadded(inputs)
        else:
            inputs = bucket.inputs
            step = self._cut(bucket.run(spans, ends, self._forward_padded), bucket, len(spans))
        self._last = (inputs, bucket, len(spans)) if ends else None
        return step

    @torch.inference_mode()
    def _again(self, tokens_S: Tensor | None) -> Step:
        assert self._last is not None
        self.calls += 1
        inputs, bucket, used = self._last
        if bucket is None:
            burst.hand(inputs, tokens_S)
            burst.advance(inputs, self.page_size, self.pad_slot)
            return self._run_unpadded(inputs._replace(has_prefix=True))
        bucket.advance(tokens_S)
        return self._cut(bucket.again(self._forward_padded), bucket, used)

    def _run_unpadded(self, inputs: Inputs) -> Step:
        length = None if ops.is_batch_invariant() else self.pieces.find(len(inputs.codes_T))
        if length is None:
            return Step(*self._forward(inputs), inputs.table_SB)
        batch = self.batch(inputs)
        hidden_TD = self.pieces.run(batch, length, self._between)
        return Step(self.model.logits(hidden_TD, batch), hidden_TD, inputs.table_SB)

    def _cut(self, outputs: tuple[Tensor, ...], bucket: Bucket, used: int) -> Step:
        """Of a padded step the rows that sequences fill."""
        logits_MV, hidden_TD = outputs
        rows = used * bucket.tokens
        return Step(logits_MV[:rows], hidden_TD[:rows], bucket.inputs.table_SB[:used])

    @torch.inference_mode()
    def keep(self, tokens_S: Tensor, sequences: list[Sequence], guess: int = 0) -> None:
        """Leave the tokens just drawn, or guessed, where the next step reads them."""
        places = np.array([self.place(sequence, guess) for sequence in sequences])
        (places_S,) = staging.send([places], self.device)
        self.tokens.index_copy_(0, places_S, tokens_S)

    @contextmanager
    def _shortened(self) -> Iterator[None]:
        """By a model as short as has all kernels."""
        whole, self.model = self.model, self.model.beginning()
        try:
            yield
        finally:
            self.model = whole

    @torch.inference_mode()
    def rehearse(self, steps: list[list[Span]], rehearsal: ops.Rehearsal, *, first: bool = False) -> None:
        """All graphs and these steps, or the first of them, for the sake of their kernels."""
        with self._shortened():
            forwards = [*self._padded(), *(partial(self._forward, self.inputs(spans)) for spans in steps)]
            for forward in forwards[:1] if first else forwards:
                with rehearsal.attempt():
                    forward()

    def _padded(self) -> Iterator[Callable[[], object]]:
        """The forward passes of all graphs, of padding alone."""
        for tokens in {1, self._width}:
            for inputs in self.buckets.shapes(tokens):
                yield partial(self._forward_padded, inputs)
        for length in self.pieces.lengths:
            yield partial(self.pieces.pad, length, self._between)

    def try_out(self, steps: list[list[Span]]) -> None:
        """Run steps eagerly, by the beginning of the model: what is done the first time only."""
        self.team.tell("try_out", steps)
        self._try_out(steps)

    @torch.inference_mode()
    def _try_out(self, steps: list[list[Span]]) -> None:
        with self._shortened():
            for spans in steps:
                self._forward(self.inputs(spans))

    def capture(self) -> None:
        """Record the graphs of all buckets."""
        self.team.tell("capture")
        self._capture()

    @torch.inference_mode()
    def _capture(self) -> None:
        if self.device.type == "cuda":
            with self._shortened():
                for forward in self._padded():  # what is done the first time only
                    forward()
            if self.pieces.lengths:
                self.pieces.capture(self.pieces.lengths, self._between)
            for tokens in {1, self._width}:
                self.buckets.capture(self._forward_padded, tokens)

    def predict(self, hidden_TD: Tensor, spans: list[Span]) -> tuple[Tensor, Tensor | None]:
        """The first prediction module over spans and the hidden states before them: its own, and the rows to
        draw from (None for all)."""
        self.team.tell("predict", len(hidden_TD), spans)
        return self._predict(hidden_TD, spans)

    @torch.inference_mode()
    def _predict(self, hidden_TD: Tensor | int, spans: list[Span]) -> tuple[Tensor, Tensor | None]:
        inputs = self.inputs(spans)
        batch = self.batch(inputs)
        output = self.model.predict_ahead(self._shared(hidden_TD), batch.ids_T, batch)
        return output.hidden_TD, inputs.last_M

    def project(self, rows_XD: Tensor) -> Tensor:
        """Logits (X, V) of rows that no step asked them for."""
        if self.model.has_plain_head:
            return self.model.project(rows_XD)
        self.team.tell("project", len(rows_XD))
        return self._project(rows_XD)

    @torch.inference_mode()
    def _project(self, rows_XD: Tensor | int) -> Tensor:
        return self.model.project(self._shared(rows_XD))

    def _shared(self, rows_XD: Tensor | int) -> Tensor:
        """Rows that the first of the team has, where the others know their number."""
        if isinstance(rows_XD, int):
            rows_XD = torch.empty(
                rows_XD,
                self.model.config.hidden_size,
                dtype=self.model.head_weight().dtype,
                device=self.device,
            )
        return self.team.share(rows_XD)

    def score(self, span: Span, targets: list[int], routing_TLK: Tensor | None = None) -> list[float]:
        """Log-probability of the token that follows each of the span's, by recorded experts if given."""
        self.team.tell("score", span, targets, routing_TLK)
        return self._score(span, targets, routing_TLK)

    @torch.inference_mode()
    def _score(self, span: Span, targets: list[int], routing_TLK: Tensor | None) -> list[float]:
        if routing_TLK is None:
            hidden_TD = self._run([span]).hidden_TD
        else:
            batch = replace(self.batch(self.inputs([span])), routing=routing_TLK.to(self.device))
            hidden_TD = self.model(batch).hidden_TD
        if not self.model.has_plain_head:
            return self._score_rows(hidden_TD, targets, 0, self.model.project)[:, 0].tolist()
        targets_T = torch.tensor(targets, device=self.device)
        weights_T = torch.ones(len(targets), device=self.device)
        loss = ops.linear_cross_entropy(hidden_TD, self.model.head_weight(), targets_T, weights_T)
        return loss.nll_T.neg().tolist()

    @torch.inference_mode()
    def score_rows(self, hidden_TD: Tensor, targets: list[int], num_top: int) -> Tensor:
        """For each row the log-probability of its target, then the `num_top` best ids, then theirs: float64
        on the device. Only some rows' logits are held at a time."""
        return self._score_rows(hidden_TD, targets, num_top, self.project)

    def _score_rows(
        self, hidden_TD: Tensor, targets: list[int], num_top: int, project: Callable[[Tensor], Tensor]
    ) -> Tensor:
        (targets_T,) = staging.send([np.array(targets, np.int64)], self.device)
        scored = []
        for rows_TD, wanted_T in zip(
            hidden_TD.split(_SCORED_AT_ONCE), targets_T.split(_SCORED_AT_ONCE), strict=True
        ):
            logprobs_TV = project(rows_TD).float().log_softmax(-1)
            best, ids = logprobs_TV.topk(num_top)
            chosen_T1 = logprobs_TV.gather(1, wanted_T.unsqueeze(1))
            if ops.is_batch_invariant():  # by the sums of whoever scores, at the price of a second product
                ones_T = torch.ones(len(rows_TD), device=self.device)
                loss = ops.linear_cross_entropy(rows_TD, self.model.head_weight(), wanted_T, ones_T)
                chosen_T1 = -loss.nll_T.unsqueeze(1)
            columns = chosen_T1, ids, best
            scored.append(torch.cat([column.double() for column in columns], 1))
        return torch.cat(scored)

    def batch(self, inputs: Inputs) -> Batch:
        # An id that has not reached the host is read where sampling left it.
        codes_T = inputs.codes_T
        ids_T = torch.where(codes_T < 0, self.tokens[(-1 - codes_T).clamp(min=0)], codes_T)
        return Batch(
            ids_T=self.team.share(ids_T),
            positions_T=inputs.positions_T,
            cu_seqlens_S1=inputs.cu_seqlens_S1,
            max_seqlen=inputs.max_seqlen,
            kv=KVView(
                pages=self.pages,
                slots_T=inputs.slots_T,
                block_table_SB=inputs.table_SB,
                context_lens_S=inputs.contexts_S,
                max_context_len=inputs.max_context_len,
                has_prefix=inputs.has_prefix,
                index_keys=self.index_keys,
                chunks=inputs.chunks,
            ),
            last_S=inputs.last_M,
        )

    def inputs(self, spans: list[Span], lasts: list[int] | None = None) -> Inputs:
        return lay_out(spans, lasts, self.page_size, self.device)

    def _between(self, rows_3T: Tensor, between: Between) -> Tensor:
        """Hidden states of padded rows, whose attention is asked for."""
        ids_T, positions_T, slots_T = rows_3T
        none_0 = slots_T[:0].int()
        kv = KVView(self.pages, slots_T, none_0, none_0, 0, has_prefix=True, between=between)
        batch = Batch(ids_T, positions_T, cu_seqlens_S1=none_0, max_seqlen=0, kv=kv)
        output = self.model(batch)
        self.records.write(slots_T, ids_T, output.routing)
        return output.hidden_TD

    def _forward_padded(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """The same into memory that all graphs share for what is largest, their logits."""
        return self._forward(inputs, self._logits)

    def _forward(self, inputs: Inputs, logits: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Logits of the rows to draw from, and the hidden states of all."""
        batch = self.batch(inputs)
        output = self.model(batch)
        self.records.write(inputs.slots_T, batch.ids_T, output.routing)
        return self.model.logits(output.hidden_TD, batch, logits), output.hidden_TD
