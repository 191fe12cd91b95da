"""The Trainer: one loop, from any step to the last, in each process of a run.

A step is: accumulate micro-batches, clip, update the weights, balance the experts, report. The law: what a
step does depends on the state at its start and on its number, so a run that was stopped, or killed, and
resumed is bit for bit the run that was not. The state is weights, router biases, optimizer, generators and
the step, which is also the place in the data: batch i of the run is `batches(i)`.

What is minimised is an Objective's business, and which parameters learn the caller's: frozen ones take no
gradient and no memory here, nor in checkpoints. Several processes are a Team that is passed in: a step has
the same micro-batches whatever their number, each takes some of them, and the first tells and writes.

A loss that leaps is skipped or rolled back from (guards.py). Ctrl-C and SIGTERM finish the step, save, and
return. A loss or gradient that is not finite stops the run before it touches a weight. Where batches come
from and what is done with the model is for the stage; watching, for an Observer.
"""

from __future__ import annotations

import dataclasses
import math
import signal
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from shoal.batch import Batch
from shoal.checkpoint import native
from shoal.config.cost import flops_per_token, peak_flops
from shoal.config.run import TrainConfig
from shoal.model.moe import max_violation
from shoal.model.transformer import Output, Transformer
from shoal.train import garbage, loss
from shoal.train.balance import Balancer, add_noise
from shoal.train.guards import Interrupt, SpikeGuard
from shoal.train.metrics import (
    EvaluationReport,
    MetricsLog,
    Observer,
    SpikeReport,
    StepReport,
    bits_per_byte,
    to_line,
)
from shoal.train.objective import Objective, Share, StagedObjective, Step
from shoal.train.optim import Optimizer, Trainable, learning_rate
from shoal.train.saving import Saver
from shoal.train.team import ALONE, Team


@dataclass(frozen=True)
class Evaluation:
    """Held-out text: batches that predict each token once, and how many bytes of text the tokens stand
    for."""

    batches: Callable[[], Iterable[Batch]]
    num_bytes: int


MOST_ROLLBACKS = 3  # to one checkpoint
GENERATORS = "generators"


@dataclass(frozen=True)
class Outcome:
    """How a run ended: after its last step, or stopped by a signal. Its checkpoint resumes either."""

    step: int
    checkpoint: Path
    interrupted: bool
    preempted: bool = False  # by SIGTERM, which asks to end well


class Trainer:
    """Trains a model that is ready: built, filled, on its device. `folder` is where the run keeps its
    record."""

    def __init__(
        self,
        model: Transformer,
        batches: Callable[[int], Batch],
        settings: TrainConfig,
        folder: Path,
        *,
        generator: torch.Generator,
        objective: Objective
        | None = None,  # next token, prediction modules and balance, as settings weigh them
        trainable: Trainable | None = None,  # all that the model has
        team: Team = ALONE,
        evaluation: Evaluation | Mapping[str, Evaluation] | None = None,  # one text, or several by name
        recipe: Mapping[str, Any] | None = None,
        observe: Observer = lambda event: None,
    ) -> None:
        self.model = model
        self.batches = batches
        self.settings = settings
        self.folder = folder
        self.evaluation = {"": evaluation} if isinstance(evaluation, Evaluation) else evaluation or {}
        self.recipe = recipe  # JSON that checkpoints carry, for people
        self.observe = observe
        self.device = next(model.parameters()).device
        self.objective = objective or loss.NextToken.of(model.config, settings)
        self.team = team
        if team.stages is not None and not isinstance(self.objective, StagedObjective):
            raise ValueError(
                f"the objective {type(self.objective).__name__} needs a model whose layers are all in one "
                f"process; set parallel.pipeline to 1"
            )
        self.optimizer = Optimizer(model, settings.optim, trainable, team.local, team.join)
        for name, p in model.named_parameters():
            p.requires_grad_(name in self.optimizer.parameters)
        if settings.optim.in_backward:
            self.optimizer.attach()
        self.balancer = Balancer(model, settings.balance)
        add_noise(model, settings.balance.noise, generator)
        self.generators = {"run": generator, "torch": torch.default_generator}
        if self.device.type == "cuda":
            self.generators["cuda"] = torch.cuda.default_generators[self.device.index or 0]
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        peak = peak_flops(name)
        self.peak_flops = None if peak is None else peak * team.ranks
        self.step = 0  # steps done
        self.tokens = 0  # tokens they had
        self.passed_over = 0  # micro-batches that rolling back has left out, all before the next
        self.guard = SpikeGuard(settings.spike_deviations)
        self.saved: Path | None = None  # the checkpoint of this very step
        self.saver = Saver(
            folder / "checkpoints",
            settings.keep,
            team.aside or team.peers,
            background=settings.background_saves,
        )
        self._spike: SpikeReport | None = None  # of the last step
        self._rolled_back: list[int] = []  # the steps of the checkpoints gone back to

    def run(self) -> Outcome:
        """Train from the present step to the last, or until a signal."""
        self.model.train()
        with garbage.by_hand(), self._open_log() as log, Interrupt() as interrupt, self.saver:
            while self.step < self.settings.steps and not self._stopped(interrupt):
                report, load_LE = self.train_step()
                if self._spike is not None and self.settings.spike_action == "rollback":
                    self._roll_back(log, self._spike)
                    continue
                if self._spike is not None:
                    self._report(log, self._spike)
                self._report(log, report)
                if self.evaluation and self._due(self.settings.evaluate_every):
                    self._report(log, self._evaluate(self.evaluation, load_LE))
                if self.saver.ended and not self.saver.failed:
                    self._settle()
                if self._due(self.settings.checkpoint_every):
                    self.save(log)
            self._settle()
            if self.saved is None:
                self.save(log)
                self._settle()
            checkpoint = self.saved
            assert checkpoint is not None
            stopped, preempted = self.step < self.settings.steps, interrupt.signal == signal.SIGTERM
            preempted = self.team.any(stopped and preempted, self.device)
        return Outcome(self.step, checkpoint, interrupted=stopped, preempted=preempted)

    def resume(self) -> bool:
        """Go back to the newest checkpoint; False where there is none. A damaged one is a ValueError.

        Generators are each process's own; one that was not there when it was saved keeps its own.
        """
        self._settle()
        if self.team.rank == 0:
            native.clear_leftovers(self.folder / "checkpoints")
        path = self.team.peers.gather(native.latest(self.folder / "checkpoints"))[0]
        if path is None:
            return False
        state = native.load(path, self._state(), self.team.peers)
        generators = native.stored(path, GENERATORS)
        for name, generator in self.generators.items():
            if (kept := generators.get(self._own(name, self.team.rank))) is not None:
                generator.set_state(kept)
        self.step, self.tokens, self.saved = state["step"], state["tokens"], path
        self.passed_over = state.get("passed_over", 0)
        self.guard.restore(state.get("losses", ()))
        return True

    def save(self, log: MetricsLog) -> None:
        """Have this step saved; `_settle` waits for it, and until then, in the background, it may fail."""
        self._settle()
        log.sync()
        self.saver.begin(
            self.step,
            {**self._state(), GENERATORS: self._generators()},
            {
                "step": self.step,
                "tokens": self.tokens,
                "passed_over": self.passed_over,
                "losses": self.guard.state(),
                "recipe": self.recipe,
            },
        )
        if not self.settings.background_saves:
            self._settle()

    def _settle(self) -> None:
        """Wait for the save that is under way, if one is, and tell of it. OSError if it failed, in all."""
        if (report := self.saver.settle()) is not None:
            self.saved = report.path if report.step == self.step else self.saved
            self.observe(report)

    def train_step(self) -> tuple[StepReport, Tensor]:
        """One step, and the experts' loads (L, E) in it."""
        settings, start = self.settings, time.perf_counter()
        lr = learning_rate(self.step, settings.optim, settings.steps)
        batches = self._next_batches()
        # 1. Gradients, 2. weights: one after the other, or the second inside the first.
        take = self._step_inside_backward if settings.optim.in_backward else self._step_after_backward
        self._spike = None
        terms, grad_norm = take(batches, lr)
        if self._spike is None:
            self.guard.accept(terms["loss"])
        # 3. Balance.
        moving = self._spike is None and self.step < settings.balance.bias_share * settings.steps
        load_LE = self.balancer.update(self.team.reduce, moving=moving)
        # 4. Report.
        tokens = sum(batch.num_tokens for batch in batches)
        flops = sum(self._flops(batch) for batch in batches)
        if self.team.ranks > 1:
            told = torch.tensor([tokens, flops], dtype=torch.float64, device=self.device)
            tokens, flops = self.team.tally(told).tolist()
            tokens = round(tokens)
        self.step, self.tokens, self.saved = self.step + 1, self.tokens + tokens, None
        violation = tuple(max_violation(load_LE).tolist())
        seconds = time.perf_counter() - start
        report = StepReport(
            step=self.step,
            steps=settings.steps,
            terms=terms,
            lr=lr,
            grad_norm=grad_norm,
            tokens=self.tokens,
            max_violation=violation,
            seconds=seconds,
            tokens_per_second=tokens / seconds,
            flops_per_second=flops / seconds,
            mfu=flops / seconds / self.peak_flops if self.peak_flops else None,
            peak_bytes=torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else 0,
            expert_load=tuple(map(tuple, load_LE.tolist())),
        )
        return report, load_LE

    def _step_after_backward(self, batches: list[Batch], lr: float) -> tuple[dict[str, float], float]:
        terms = self._accumulate(batches)
        grads = self.optimizer.gradients()
        # The one wait for the device: what is not finite goes no further.
        told, grad_norm = self._tell(terms, self.team.norm(grads))
        self._refuse_nonfinite(told, grad_norm)
        if self._is_spike(told["loss"]):
            self.optimizer.zero_grad()
            return told, grad_norm
        if grad_norm > self.settings.optim.clip:
            torch._foreach_mul_(list(grads.values()), self.settings.optim.clip / grad_norm)
        self.optimizer.step(lr)
        self.optimizer.zero_grad()
        return told, grad_norm

    def _step_inside_backward(self, batches: list[Batch], lr: float) -> tuple[dict[str, float], float]:
        with self.optimizer.inside_backward(lr):
            terms = self._accumulate(batches)
            if self._spike is not None:
                self.optimizer.call_off()
                return {name: value.item() for name, value in terms.items()}, 0.0
        told, grad_norm = self._tell(terms, self.optimizer.close_step())
        self._refuse_nonfinite(told, grad_norm)
        return told, grad_norm

    @staticmethod
    def _tell(terms: Mapping[str, Tensor], norm: Tensor) -> tuple[dict[str, float], float]:
        """Terms and norm on the host, in one wait."""
        *values, grad_norm = torch.stack([*terms.values(), norm]).tolist()
        return dict(zip(terms, values, strict=True)), grad_norm

    def _flops(self, batch: Batch) -> float:
        lengths_S = batch.cu_seqlens_S1.diff().double()  # of a part's whole pack
        context = max(1, round(float(lengths_S.square().sum() / lengths_S.sum())))
        mtp = self.settings.mtp_loss_weight > 0
        return batch.num_tokens * flops_per_token(self.model.config, context, mtp=mtp)

    def _next_batches(self) -> list[Batch]:
        first = self.step * self.settings.accumulation + self.passed_over
        mine = self.team.mine(first, self.settings.accumulation)
        return [self.team.bring(self.batches(index), self.device) for index in mine]

    def _accumulate(self, batches: list[Batch]) -> dict[str, Tensor]:
        """Add up the gradients of the step's micro-batches, and the objective's terms."""
        step = Step(self.step, self.settings.steps, self.team.tally(self.objective.count(batches)))
        shares: list[Mapping[str, Tensor]] = []

        def take(share: Share) -> Tensor:
            self.balancer.count(share.experts, share.scores, share.before)
            shares.append(share.terms)
            return share.total

        def judge(out: Output, batch: Batch) -> Tensor:
            assert isinstance(self.objective, StagedObjective)
            return take(self.objective.judge(self.model, out, batch, step))

        if self.team.stages is not None:
            self.team.stages.train(batches, judge)
        else:
            for batch in batches:
                share = self.objective.compute(self.model, batch, step)
                # Inside backward there is no later moment to ask; it costs a wait for the device.
                inside = self.settings.optim.in_backward and self.guard.deviations
                if not inside or not self._is_spike(self.team.reduce(share.terms["loss"].clone()).item()):
                    share.total.backward()
                take(share)
        garbage.collect(self.step)  # the device is at work
        if "loss" not in shares[0]:
            raise ValueError(f"the objective's terms are {', '.join(shares[0])}; one must be named 'loss'")
        return {
            name: self.team.reduce(torch.stack([terms[name] for terms in shares]).sum()) for name in shares[0]
        }

    def _refuse_nonfinite(self, terms: Mapping[str, float], grad_norm: float) -> None:
        values = {**terms, "gradient norm": grad_norm}
        bad = [f"{name} is {value}" for name, value in values.items() if not math.isfinite(value)]
        if not bad:
            return
        good = native.latest(self.folder / "checkpoints")
        taken = "not taken" if not self.settings.optim.in_backward else "taken where gradients were finite"
        raise ValueError(
            f"step {self.step + 1}: {' and '.join(bad)}; {self._first_nonfinite()}. The step was {taken}. "
            + (f"The last good checkpoint is {good}; " if good else "There is no checkpoint yet; ")
            + "a lower train.optim.lr or a longer warm-up may get past it"
        )

    def _is_spike(self, loss: float) -> bool:
        limit = self.guard.limit()
        if loss > limit:
            self._spike = SpikeReport(self.step + 1, loss, limit, self.settings.spike_action)
        return self._spike is not None

    def _roll_back(self, log: MetricsLog, spike: SpikeReport) -> None:
        """Return to the last checkpoint, and go on with the batches after the spike."""
        next_batch = self.step * self.settings.accumulation + self.passed_over
        if not self.resume():
            raise ValueError(
                f"step {spike.step}: the loss leapt to {spike.loss:.4g}, above {spike.limit:.4g}, and there "
                f"is no checkpoint to roll back to; lower train.checkpoint_every, or set spike_action to skip"
            )
        self._rolled_back.append(self.step)
        if self._rolled_back.count(self.step) > MOST_ROLLBACKS:
            raise ValueError(
                f"step {spike.step}: the loss leapt to {spike.loss:.4g} again, {MOST_ROLLBACKS} times after "
                f"rolling back to step {self.step}; other data does not help: lower train.optim.lr"
            )
        self.passed_over = next_batch - self.step * self.settings.accumulation
        log.rewind(self.step)
        # Told at the step that comes next: resuming from this checkpoint will tell it again.
        self._report(log, dataclasses.replace(spike, step=self.step + 1))

    def _first_nonfinite(self) -> str:
        """A weight, else the gradient nearest to the loss: the backward pass met it first."""
        parameters = self.optimizer.parameters
        for name, p in parameters.items():
            if not self.team.local(p).isfinite().all():
                return f"the first weight that is not finite is {name}"
        told = "weights are finite; the first gradient that is not, from the loss back, is {}'s"
        if (name := self.optimizer.first_nonfinite()) is not None:
            return told.format(name)
        for name, p in reversed(parameters.items()):
            if p.grad is not None and not self.team.local(p.grad).isfinite().all():
                return told.format(name)
        return "every weight and gradient is finite"

    def _evaluate(self, evaluation: Mapping[str, Evaluation], load_LE: Tensor) -> EvaluationReport:
        start = time.perf_counter()
        self.model.eval()
        told = {name: self._nats(text) for name, text in evaluation.items()}
        self.model.train()
        nats, count = (sum(values) for values in zip(*told.values(), strict=True))
        named = {
            name: bits_per_byte(told[name][0], text.num_bytes) for name, text in evaluation.items() if name
        }
        return EvaluationReport(
            step=self.step,
            loss=nats / count,
            bits_per_byte=bits_per_byte(nats, sum(text.num_bytes for text in evaluation.values())),
            expert_load=tuple(map(tuple, load_LE.tolist())),
            seconds=time.perf_counter() - start,
            domains=named,
        )

    @torch.no_grad()
    def _nats(self, evaluation: Evaluation) -> tuple[float, int]:
        """Of a whole text, and how many tokens they are of."""
        nats, count = 0.0, 0
        for batch, counts in self.team.share(evaluation.batches()):
            batch = self.team.bring(batch, self.device)
            assert batch.weights_T is not None
            out = self.model(batch) if self.team.stages is None else self.team.stages.forward(batch)
            if counts and out is not None:
                # Detached: the op makes the gradient of a weight that wants one as it goes.
                head_VD = self.model.head_weight().detach()
                nats += loss.cross_entropy(out.hidden_TD, head_VD, batch).item()
                count += int(batch.weights_T.count_nonzero())
        if self.team.ranks > 1:
            told = torch.tensor([nats, count], dtype=torch.float64, device=self.device)
            nats, count = self.team.reduce(told).tolist()
        return nats, round(count)

    def _due(self, every: int) -> bool:
        return self.step == self.settings.steps or (every > 0 and self.step % every == 0)

    def _report(self, log: MetricsLog, event: StepReport | EvaluationReport | SpikeReport) -> None:
        log.write(to_line(event))
        self.observe(event)

    def _open_log(self) -> MetricsLog:
        """The run's own, of the first process; the others' lines go nowhere."""
        path = self.folder / "metrics.jsonl" if self.team.rank == 0 else None
        return MetricsLog(path, self.step)

    def _stopped(self, interrupt: Interrupt) -> bool:
        """Whether a signal came, or a save failed, to any process: they stop after the same step."""
        return self.team.any(interrupt.signal is not None or self.saver.failed, self.device)

    def _state(self) -> dict[str, dict[str, Tensor]]:
        """Every tensor of the run's state but the generators', live: what of each is on this process."""
        frozen = {name for name, p in self.model.named_parameters() if not p.requires_grad}
        kept = {name: tensor for name, tensor in self.model.state_dict().items() if name not in frozen}
        return {
            "model": {name: self.team.local(tensor).detach() for name, tensor in kept.items()},
            "optimizer": self.optimizer.state(),
        }

    def _generators(self) -> dict[str, Tensor]:
        """The states of every process's."""
        states = {name: generator.get_state() for name, generator in self.generators.items()}
        return {
            self._own(name, rank): state
            for rank, theirs in enumerate(self.team.peers.gather(states))
            for name, state in theirs.items()
        }

    @staticmethod
    def _own(name: str, rank: int) -> str:
        return name if rank == 0 else f"{name}.{rank}"
