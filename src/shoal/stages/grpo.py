"""Reasoning RL, top to bottom: a checkpoint and problems become rollouts, rollouts become steps.

One model object is trained and sampled from: the Trainer asks for the batches of a step, and at the start of
a round they come from a rollout of the very weights it holds. The law: a run that was stopped and resumed is
bit for bit the run that was not. A round's batches are on disk before they are trained on, and so is each
reference policy; everything else is a function of the weights, the recipe and the step.

    config.toml        the resolved recipe         metrics.jsonl            a line an optimizer step
    rollouts.jsonl     a line a round              evaluations.jsonl        accuracy on held-out problems
    round/             the present round           checkpoints/, export/    as in stages/pretrain
    reference/         what the policy is held to
"""

from __future__ import annotations

import itertools
import math
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from shoal.checkpoint import hf
from shoal.config.model import GQAConfig, NSAConfig
from shoal.config.run import to_table
from shoal.config.tune import GRPOConfig
from shoal.data.atomic import write_atomically
from shoal.data.conversations import read_records
from shoal.data.text import Tokenizer
from shoal.engine.sampling import hash_pair
from shoal.model.transformer import Transformer
from shoal.ops import dispatch
from shoal.stages import rollout, round_batches
from shoal.stages.appraise import PREFERENCE, Appraiser
from shoal.stages.claim import claim
from shoal.stages.judge import Judge, chosen
from shoal.stages.published import as_problem
from shoal.stages.rollout import Answer, Question, Rollout
from shoal.train.metrics import MetricsLog, Observer, Phase
from shoal.train.policy import Policy, PolicyBatch
from shoal.train.trainer import Outcome, Trainer

SAMPLING, DEALING, HELD_OUT = 1, 2, 3  # what a seed is for


@dataclass(frozen=True)
class Accuracy:
    """How many held-out problems are solved. `low` and `high` bound pass@1 with 95% confidence (Wilson)."""

    step: int
    problems: int
    samples: int  # of each
    pass_1: float  # the share of right answers
    pass_k: float  # the share of problems with a right one among `samples`
    low: float
    high: float
    length: float
    seconds: float


def run(
    config: GRPOConfig,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    observe: Observer = lambda event: None,
) -> Outcome:
    """Run a recipe in a folder, or go on with the run that is there."""
    # 1. The recipe; with it the folder is this run's.
    claim(folder, config)

    # 2. The model and its tokenizer, as they were when the run began.
    tokenizer = Tokenizer.load(config.model)
    model = load_model(config.model, config.dtype, device)
    invariant = config.rollout.batch_invariant
    attention = model.config.attention
    if (
        invariant
        and not isinstance(attention, GQAConfig)
        and (isinstance(attention, NSAConfig) or attention.indexer)
    ):
        raise ValueError(
            f"rollout.batch_invariant is true, but sparse attention (that of {config.model}) has no "
            f"batch-invariant form; leave it out, or take a model without it"
        )
    known = [*config.weights(), *([] if config.preference is None else [PREFERENCE])]
    questions = read_questions(config.problems, tokenizer, known)
    held_out = read_questions(config.held_out, tokenizer) if config.held_out else []

    # 3. The loop: batches from rollouts, rollouts from the model in the loop.
    generator = torch.Generator(device).manual_seed(config.seed)
    with (
        Judge(config.weights(), config.reward_seconds) as judge,
        dispatch.batch_invariant(invariant or dispatch.is_batch_invariant()),
    ):
        liked = config.preference
        appraiser = None if liked is None else Appraiser.load(liked.model, model)
        sampler = Rollout(model, tokenizer, judge, config, appraiser)
        rounds = Rounds(config, folder, model, sampler, questions, held_out, observe)
        trainer = Trainer(
            model,
            rounds.batch,
            config.train,
            folder,
            generator=generator,
            objective=Policy(config.policy, temperature=config.rollout.temperature),
            recipe=to_table(config),
            observe=observe,
        )
        trainer.resume()
        outcome = trainer.run()
        if not outcome.interrupted:
            rounds.evaluate(outcome.step)

    # 4. What others load.
    if not outcome.interrupted:
        observe(Phase("writing the model for other tools"))
        hf.save(model, folder / "export", tokenizer_files=tokenizer_files(config.model), overwrite=True)
    return outcome


class Rounds:
    """The batches of each step, by its number alone: made at the start of a round, else read back."""

    def __init__(
        self,
        config: GRPOConfig,
        folder: Path,
        model: Transformer,
        sampler: Rollout,
        questions: Sequence[Question],
        held_out: Sequence[Question],
        observe: Observer,
    ) -> None:
        self.config, self.folder, self.model, self.sampler = config, folder, model, sampler
        self.questions, self.held_out, self.observe = questions, held_out, observe
        self.device = model.head_weight().device
        self.reference = _copy(model) if config.policy.kl_weight else None
        if config.teacher is not None:
            self.reference = open_teacher(config.teacher, model)
        self._reference_of = 0  # the step whose weights it has
        self._first = -1  # the step that the round in memory begins with
        self._begun = False  # a round, in this process
        self._steps: list[list[PolicyBatch]] = []

    def batch(self, index: int) -> PolicyBatch:
        step, part = divmod(index, self.config.train.accumulation)
        at = step % self.config.steps_per_round
        if step - at != self._first:
            self._steps = self._open(step - at) if at else self._begin(step)
            self._first = step - at
        return self._steps[at][part]

    def _begin(self, step: int) -> list[list[PolicyBatch]]:
        """A new round, from the present weights."""
        if not self._begun:
            self._begun = True
            self.sampler.warm_up(lambda what: self.observe(Phase(what)))
        config, start = self.config, time.perf_counter()
        every = config.train.evaluate_every
        if every and step % every < config.steps_per_round:
            self.evaluate(step)
        self._refresh(step)
        groups, drawn = self._sample(step)
        sampled = time.perf_counter()
        order = torch.Generator().manual_seed(hash_pair(hash_pair(config.seed, DEALING), step) >> 1)
        answers = [answer for group in groups for answer in group]
        dealt = round_batches.deal(answers, config, order)
        steps = round_batches.batches_of(answers, dealt, config, self.device)
        first = steps[0][0]
        with torch.no_grad():
            out = self.model(first)
        temperature = config.rollout.temperature
        steps = [
            [
                rollout.look_back(
                    self.model, batch, temperature, self.reference, out if batch is first else None
                )
                for batch in batches
            ]
            for batches in steps
        ]
        # The device looks back; the judges need not wait for it.
        judged = groups if rollout.are_judged(groups) else self.sampler.weigh(groups)
        worth = [episode.advantage for group in judged for episode in group]
        steps = [
            [
                round_batches.give_advantages(batch, [worth[i] for i in part])
                for batch, part in zip(batches, parts, strict=True)
            ]
            for batches, parts in zip(steps, dealt, strict=True)
        ]
        gap = rollout.measure_gap(self.model, first, out)
        if config.teacher is not None:
            steps = [[rollout.follow_teacher(batch) for batch in batches] for batches in steps]
        if config.steps_per_round > 1:
            self._save(step, steps)
        timing = {
            "sampling": sampled - start,
            "looking back": time.perf_counter() - sampled,
            "hand-over": self.sampler.hand_over_seconds,
        }
        self._log(
            "rollouts.jsonl",
            step,
            {"kind": "rollout", "step": step, **rollout.count(judged), "drawn": drawn, "gap": asdict(gap)},
            timing,
        )
        for fault, example in self.sampler.judge.examples.items():
            self.observe(Phase(f"rewards: {self.sampler.judge.faults[fault]} {fault}; the first: {example}"))
        return steps

    def _sample(self, step: int) -> tuple[list[Sequence[Answer]], int]:
        """As many groups as a round has questions, and how many tokens it took, prompts and what was not used
        included. Where flat ones may be sampled anew all are judged to know which.
        """
        config, wanted = self.config, self.config.rollout.questions
        chosen = torch.Generator().manual_seed(hash_pair(hash_pair(config.seed, SAMPLING), step) >> 1)
        groups: list[Sequence[Answer]] = []
        flat: list[Sequence[Answer]] = []
        drawn = 0
        for attempt in range(1 + config.rollout.extra_rounds):
            picks = torch.randint(len(self.questions), (wanted,), generator=chosen).tolist()
            asked = [self.questions[i] for i in picks]
            seed = hash_pair(hash_pair(config.seed, step), attempt)
            told: Sequence[Sequence[Answer]]
            if config.rollout.extra_rounds:
                told = judged = self.sampler.sample(asked, seed)
                flat += filter(rollout.is_flat, judged)
                groups += itertools.filterfalse(rollout.is_flat, judged)
            else:
                told = self.sampler.draw(asked, seed)
                groups += told
            drawn += sum(len(a.question.ids) + len(a.completion.ids) for group in told for a in group)
            if len(groups) >= wanted:
                break
        return (groups + flat)[:wanted], drawn

    def _refresh(self, step: int) -> None:
        """The reference of this step: the weights at the last multiple of `refresh_every`."""
        if self.reference is None or not self.config.refresh_every:
            return
        of = step // self.config.refresh_every * self.config.refresh_every
        if of == self._reference_of:
            return
        file = self.folder / "reference" / f"step-{of:06d}.safetensors"
        if not file.exists():
            assert of == step, f"the reference of step {of} is gone"
            shutil.rmtree(file.parent, ignore_errors=True)
            with write_atomically(file) as opened:
                save_file(self.model.state_dict(), opened.name)
        self.reference.load_state_dict(load_file(file))
        self._reference_of = of

    def _save(self, step: int, steps: list[list[PolicyBatch]]) -> None:
        tensors = {
            f"{at}.{part}.{name}": tensor.cpu()
            for at, batches in enumerate(steps)
            for part, batch in enumerate(batches)
            for name, tensor in round_batches.as_tensors(batch).items()
        }
        file = self._round_file(step)
        with write_atomically(file) as opened:
            save_file(tensors, opened.name)
        for old in sorted(file.parent.glob("step-*.safetensors")):
            if old < file and len(list(file.parent.iterdir())) > self.config.train.keep + 1:
                old.unlink()

    def _open(self, step: int) -> list[list[PolicyBatch]]:
        file = self._round_file(step)
        if not file.exists():
            raise ValueError(
                f"{file} is gone, the rollouts that steps {step + 1} to {step + self.config.steps_per_round} "
                f"train on; resume from a checkpoint between rounds, or start anew"
            )
        tensors = load_file(file, device=str(self.device))
        steps: list[list[dict[str, torch.Tensor]]] = [
            [{} for _ in range(self.config.train.accumulation)] for _ in range(self.config.steps_per_round)
        ]
        for name, tensor in tensors.items():
            at, part, field = name.split(".")
            steps[int(at)][int(part)][field] = tensor
        return [[round_batches.from_tensors(batch) for batch in batches] for batches in steps]

    def _round_file(self, step: int) -> Path:
        return self.folder / "round" / f"step-{step:06d}.safetensors"

    def evaluate(self, step: int) -> Accuracy | None:
        """Answer the held-out problems, and write down how many are solved."""
        if not self.held_out:
            return None
        start, k = time.perf_counter(), self.config.pass_k
        seed = hash_pair(self.config.seed, HELD_OUT)  # the same draws at each evaluation
        groups = self.sampler.evaluate(self.held_out, k, seed)
        right = [[episode.score.total >= self.config.correct_at for episode in group] for group in groups]
        share = sum(map(sum, right)) / (len(right) * k)
        low, high = wilson(share, len(right))
        lengths = [len(episode.completion.ids) for group in groups for episode in group]
        accuracy = Accuracy(
            step=step,
            problems=len(right),
            samples=k,
            pass_1=share,
            pass_k=sum(map(any, right)) / len(right),
            low=low,
            high=high,
            length=sum(lengths) / len(lengths),
            seconds=time.perf_counter() - start,
        )
        fields = {name: value for name, value in asdict(accuracy).items() if name != "seconds"}
        self._log("evaluations.jsonl", step, {"kind": "accuracy", **fields}, {"seconds": accuracy.seconds})
        self.observe(
            Phase(
                f"  step {step}: {share:.1%} of answers to {len(right)} held-out problems are right "
                f"({low:.1%} to {high:.1%}), pass@{k} {accuracy.pass_k:.1%}, {accuracy.length:.0f} tokens"
            )
        )
        return accuracy

    def _log(self, name: str, step: int, line: dict[str, Any], timing: dict[str, float]) -> None:
        """Write a line of `step`; one that a run before a resume wrote of it, or of a later step, goes."""
        with MetricsLog(self.folder / name, step - 1) as log:
            log.write({**line, "timing": {what: round(seconds, 6) for what, seconds in timing.items()}})


def wilson(share: float, n: int) -> tuple[float, float]:
    """The 95% interval of a share of n independent problems (Wilson 1927): it holds near 0 and 1 too.

    Several answers to a problem count as one: they are alike, so this errs on the wide side.
    """
    z = 1.959964
    centre = (share + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, centre - half), min(1.0, centre + half)


def load_model(path: str, dtype: str, device: torch.device | str) -> Transformer:
    return hf.load(path, device=device, dtype=getattr(torch, dtype), mtp=False)


def tokenizer_files(path: str) -> list[Path]:
    return [Path(path) / name for name in ("tokenizer.json", "tokenizer_config.json")]


def read_questions(
    files: Sequence[str], tokenizer: Tokenizer, rewards: Sequence[str] | None = None
) -> list[Question]:
    """The problems of JSON Lines files, gzipped or not: each has "prompt", a text, or "messages", to be
    answered, or is laid out as a published set (stages/published).

    One that lists "rewards" must find one at least among those that are known.
    """
    questions: list[Question] = []
    for where, record in read_records(files):
        problem = as_problem(record, where)
        ids = tuple(_prompt(problem, tokenizer, where))
        if rewards is not None and not chosen(problem, rewards):
            raise ValueError(
                f"{where} is judged by {problem['rewards']!r}; this run has {', '.join(rewards)}"
            )
        questions.append(Question(ids, problem))
    if not questions:
        raise ValueError(f"{', '.join(files)} hold no problem")
    return questions


def _prompt(problem: Any, tokenizer: Tokenizer, where: str) -> list[int]:
    if isinstance(problem, dict) and "messages" in problem:
        ids = tokenizer.chat(problem["messages"], add_generation_prompt=True)
        if ids == tokenizer.chat(problem["messages"], add_generation_prompt=False):
            raise ValueError(
                f"{where}: this tokenizer's chat template writes nothing for an answer to begin after (no "
                f"generation prompt); give the problem as a 'prompt' instead"
            )
        return ids
    if isinstance(problem, dict) and "prompt" in problem:
        return tokenizer.encode(problem["prompt"], bos=tokenizer.bos_id is not None)
    raise ValueError(f"{where} has neither 'prompt' nor 'messages'")


def open_teacher(path: str, student: Transformer) -> Transformer:
    """The model to follow, of any family; it must count the student's tokens."""
    head = student.head_weight()
    teacher = hf.load(path, device=head.device, dtype=head.dtype, mtp=False)
    ours, theirs = student.config.vocab_size, teacher.config.vocab_size
    if ours != theirs:
        raise ValueError(
            f"the teacher {path} has {theirs} tokens, the student {ours}; they must share a vocabulary"
        )
    return teacher.eval().requires_grad_(False)


def _copy(model: Transformer) -> Transformer:
    """A model of its own with the same weights, that does not learn."""
    head = model.head_weight()
    twin = Transformer(model.config, device="meta", dtype=head.dtype)
    twin.allocate(head.device)
    twin.load_state_dict(model.state_dict())
    return twin.eval().requires_grad_(False)
