"""Blocks on many processes: each has a stage of them, and micro-batches pass through all.

torch.distributed.pipelining runs the schedule: 1F1B, with a stage a process, or DualPipeV (DeepSeek-V3's
DualPipe, folded to a V), with two: the place that begins the model ends it as well, so that embedding, head
and prediction modules are together. In 1F1B the last stage has an embedding of its own where something behind
the last block reads it, and the gradients of both are added up.

What travels is the stream between two blocks. Everything else of a Batch each stage reads by itself. What a
stage adds to the loss (its routers' balance) joins the backward pass where the stage ends. The law: the sum
of all stages' shares is the loss of the step, and each is differentiated once. Weights get their gradients
together with the inputs, never later, as torch's split of the two would have it (decision 0011).

Shape letters: T tokens, D hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleDualPipeV

from shoal.batch import Batch
from shoal.config.model import ModelConfig
from shoal.model.transformer import Output, Transformer
from shoal.parallel.mesh import Mesh
from shoal.parallel.shard import local

Judge = Callable[[Output, Batch], Tensor]  # what of a stage is to be differentiated: a float32 scalar


def split(config: ModelConfig, stages: int) -> list[range]:
    """The blocks of each stage: as even as may be, a prediction module counting as a block of the last."""
    blocks, ahead = config.num_hidden_layers, config.num_nextn_predict_layers
    if stages > blocks:
        raise ValueError(
            f"{stages} stages are more than the model's {blocks} layers; lower parallel.pipeline"
        )
    last = blocks if stages == 1 else max(1, (blocks + ahead) // stages - ahead)
    each, more = divmod(blocks - last, max(1, stages - 1))
    sizes = [each + (stage < more) for stage in range(stages - 1)] + [last]
    ends = [sum(sizes[: stage + 1]) for stage in range(stages)]
    return [range(end - size, end) for size, end in zip(sizes, ends, strict=True)]


def stages_of(place: int, mesh: Mesh) -> list[int]:
    """The stages that a place of the pipeline axis has, in order."""
    stages = mesh.degrees.stages
    return [place] if stages == mesh.degrees.pipeline else [place, stages - 1 - place]


def keep_stages(model: Transformer, mesh: Mesh) -> Transformer:
    """The model with this process's blocks alone."""
    if mesh.degrees.pipeline > 1:
        parts = split(model.config, mesh.degrees.stages)
        here = stages_of(mesh.devices.get_local_rank("pipeline"), mesh)
        model.keep([layer for stage in here for layer in parts[stage]])
    return model


class Pipeline:
    """Runs a model of which this process has some stages. All processes of its pipeline call together."""

    def __init__(self, model: Transformer, mesh: Mesh) -> None:
        self.model = model
        self.group = mesh.devices.get_group("pipeline")
        self.place = self.group.rank()
        self.stages = mesh.degrees.stages
        self.device = mesh.device
        self.dtype = next(model.parameters()).dtype
        self.place_of = {stage: p for p in range(self.group.size()) for stage in stages_of(p, mesh)}
        parts = split(model.config, self.stages)
        self.legs = {stage: Leg(model, parts[stage]) for stage in stages_of(self.place, mesh)}
        self._schedule: tuple[tuple[int, int], Any] | None = None  # the last one, and what it is for
        if isinstance(model, FSDPModule):
            # Embedding, norm and head stay gathered while any micro-batch of the step is under way.
            model.set_reshard_after_backward(False, recurse=False)

    @property
    def begins(self) -> bool:
        """Whether the first block is here."""
        return 0 in self.legs

    def train(self, batches: Sequence[Batch], judge: Judge) -> None:
        """Forward and backward of a step's micro-batches, which have one number of tokens."""
        sizes = sorted({batch.num_tokens for batch in batches})
        if len(sizes) > 1:
            raise ValueError(
                f"the micro-batches of a step have {sizes[0]} to {sizes[-1]} tokens; a pipeline needs them "
                f"equally long: pack them so, or set parallel.pipeline to 1"
            )
        schedule = self._prepare(len(batches), sizes[0])
        for leg in self.legs.values():
            leg.batches, leg.judge = batches, judge
        index = torch.arange(len(batches))
        try:
            schedule.step(index=index, target=index, return_outputs=False)
        finally:
            for leg in self.legs.values():
                leg.batches, leg.judge = (), None
        if isinstance(self.model, FSDPModule):
            self.model.reshard()
        self._add_copies()

    def forward(self, batch: Batch) -> Output | None:
        """Where the last block is, what the model gives for a batch; elsewhere None. Without gradients."""
        stream_TD, out = None, None
        for stage, leg in self.legs.items():
            if stage > 0 and (before := self.place_of[stage - 1]) != self.place:
                stream_TD = torch.empty(self._shape(batch.num_tokens), dtype=self.dtype, device=self.device)
                dist.recv(stream_TD, group=self.group, group_src=before)
            out = self.model(batch, stream_TD, leg.layers)
            stream_TD = out.hidden_TD
            if not out.ends and (after := self.place_of[stage + 1]) != self.place:
                dist.send(stream_TD.contiguous(), group=self.group, group_dst=after)
        assert out is not None
        return out if out.ends else None

    def _shape(self, tokens: int) -> tuple[int, int]:
        return tokens, self.model.config.hidden_size

    def _prepare(self, batches: int, tokens: int) -> Any:
        """The schedule of so many micro-batches of so many tokens."""
        if self._schedule is None or self._schedule[0] != (batches, tokens):
            stages = [self._stage(stage, leg, tokens) for stage, leg in self.legs.items()]
            kind = Schedule1F1B if len(stages) == 1 else ScheduleDualPipeV
            some: Any = stages[0] if len(stages) == 1 else stages
            schedule = kind(some, batches, loss_fn=lambda total, _: total, scale_grads=False)
            self._schedule = (batches, tokens), schedule
        return self._schedule[1]

    def _stage(self, stage: int, leg: Leg, tokens: int) -> PipelineStage:
        stream = torch.empty(self._shape(tokens), dtype=self.dtype, device="meta")
        total = torch.empty((), device="meta")
        return _Stage(
            leg,
            stage,
            self.stages,
            self.device,
            input_args=(stream,) if stage > 0 else (),
            output_args=(stream if stage < self.stages - 1 else total,),
            group=self.group,
            dw_builder=_nothing_left,
        )

    def _add_copies(self) -> None:
        """Add up the gradients of an embedding that both ends have. Two summands: the same on either side."""
        ends = self.place_of[0], self.place_of[self.stages - 1]
        if self.place not in ends or ends[0] == ends[1] or not self.model.reads_embedding_twice:
            return
        weight = self.model.model.embed_tokens.weight
        # None where nothing behind the last block learned from it: prediction modules that do not run.
        grad = torch.zeros_like(local(weight)) if weight.grad is None else local(weight.grad)
        theirs, peer = torch.empty_like(grad), sum(ends) - self.place
        exchange = [
            dist.P2POp(dist.isend, grad.clone(), group=self.group, group_peer=peer),
            dist.P2POp(dist.irecv, theirs, group=self.group, group_peer=peer),
        ]
        for work in dist.batch_isend_irecv(exchange):
            work.wait()
        grad.add_(theirs)


class _Stage(PipelineStage):
    """One that greets no neighbour in its own process, as torch's does and gloo cannot: it sends to others
    alone."""

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        greetings = super()._get_init_p2p_neighbors_ops()
        return [greeting for greeting in greetings if greeting.group_peer != self.group_rank]


class Leg(nn.Module):
    """A stage, as torch's schedules run one: from the stream that came to the stream that goes, or at the end
    to what is differentiated."""

    def __init__(self, model: Transformer, layers: range) -> None:
        super().__init__()
        self.model = model
        self.layers = layers
        self.batches: Sequence[Batch] = ()
        self.judge: Judge | None = None

    def forward(self, stream_TD: Tensor | None = None, *, index: Tensor) -> Tensor:
        """`index`, on the host, is the micro-batch's place in the step."""
        assert self.judge is not None
        batch = self.batches[int(index)]
        out = self.model(batch, stream_TD, self.layers)
        total = self.judge(out, batch)
        return total if out.ends else _Owing.apply(out.hidden_TD, total)


class _Owing(torch.autograd.Function):
    """The stream, through which a scalar gets a gradient of 1 once the stream gets its own."""

    @staticmethod
    def forward(ctx: Any, stream_TD: Tensor, total: Tensor) -> Tensor:
        return stream_TD.view_as(stream_TD)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor, Tensor]:
        return grad_TD, torch.ones((), device=grad_TD.device)


def _nothing_left() -> Callable[[], None]:
    """What remains to be done for the weights after a backward pass: asked for, so that it is a whole one."""
    return lambda: None
