"""Supervised tuning, top to bottom: a checkpoint and conversations become a model that answers.

The law: a token counts in the loss if the assistant said it, and every such token of a step counts the same.
Samples are packed whole, a sequence each, so none sees another; those that are too long are left out and
counted, not cut. The folder and its resume are those of stages/pretrain; samples.jsonl has what the model
answered to held-out conversations at each evaluation.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from shoal.batch import Batch
from shoal.checkpoint import hf
from shoal.checkpoint.peft import save_adapters
from shoal.config.run import to_table
from shoal.config.tune import SFTConfig
from shoal.data.conversations import (
    Conversation,
    Sample,
    SamplePacker,
    in_order,
    read_conversations,
    split_conversations,
    to_samples,
)
from shoal.data.text import Tokenizer
from shoal.engine import Engine, EngineSettings, SamplingParams
from shoal.model.esft import choose_experts, score_experts, trainable_experts
from shoal.model.lora import add_lora, merge_lora
from shoal.model.transformer import Transformer
from shoal.stages.claim import claim
from shoal.stages.grpo import load_model, open_teacher, tokenizer_files
from shoal.train.distill import Distillation, teach
from shoal.train.metrics import EvaluationReport, Event, MetricsLog, Observer, Phase
from shoal.train.objective import Objective
from shoal.train.optim import Trainable
from shoal.train.trainer import Evaluation, Outcome, Trainer

SAMPLE_TOKENS = 128


@dataclass(frozen=True, eq=False)
class Material:
    """What is learned from, and judged by."""

    train: Sequence[Sample]
    held_out: Sequence[Sample]
    asked: Sequence[Conversation]  # held-out ones, to be answered in front of people


def run(
    config: SFTConfig,
    folder: Path,
    *,
    device: torch.device | str = "cpu",
    observe: Observer = lambda event: None,
) -> Outcome:
    """Run a recipe in a folder, or go on with the run that is there."""
    # 1. The recipe; with it the folder is this run's.
    claim(folder, config)

    # 2. The tokenizer and the conversations.
    tokenizer = Tokenizer.load(config.model)
    observe(Phase("reading the conversations"))
    material = read(config, tokenizer, observe)
    packer = SamplePacker(material.train, config.tokens_per_batch, config.seed)

    # 3. The model. Prediction modules are left behind: they would have to be tuned as well, or lag.
    model = load_model(config.model, config.dtype, device)

    trainable = prepare(model, config, packer, observe)
    batches, objective = follow(model, config, packer)

    # 4. The loop, from the last checkpoint or the start.
    trainer = Trainer(
        model,
        batches,
        config.train,
        folder,
        generator=torch.Generator(device).manual_seed(config.seed),
        objective=objective,
        trainable=trainable,
        evaluation=Evaluation(
            lambda: in_order(material.held_out, config.tokens_per_batch),
            max(1, sum(sample.num_bytes for sample in material.held_out)),
        )
        if material.held_out
        else None,
        recipe=to_table(config),
        observe=Answering(model, tokenizer, material.asked, folder, observe),
    )
    trainer.resume()
    outcome = trainer.run()

    # 5. What others load: adapters by themselves, and the whole model with them in it.
    if not outcome.interrupted:
        if config.lora is not None:
            save_adapters(model, folder / "adapters", config.model, overwrite=True)
            merge_lora(model)
        observe(Phase("writing the model for other tools"))
        hf.save(model, folder / "export", tokenizer_files=tokenizer_files(config.model), overwrite=True)
    return outcome


def prepare(
    model: Transformer, config: SFTConfig, packer: SamplePacker, observe: Observer
) -> Trainable | None:
    """Adapters, or a choice of experts, as the recipe says; what learns, None for all that may."""
    device = model.head_weight().device
    if config.lora is not None:
        generator = torch.Generator(device).manual_seed(config.seed)
        add_lora(model, config.lora.targets, config.lora.rank, config.lora.alpha, generator)
    if config.esft is None:
        return None
    observe(Phase("scoring the experts"))
    batches = (packer.batch(i).to(device) for i in range(config.esft.batches))
    scores_LE = score_experts(model.eval(), batches, config.esft.score)
    chosen = choose_experts(scores_LE, config.esft.share)
    counts = [len(experts) for experts in chosen]
    mean = sum(counts) / len(counts)
    observe(
        Phase(f"{mean:.1f} of {scores_LE.shape[1]} experts a layer learn ({min(counts)} to {max(counts)})")
    )
    return trainable_experts(model, chosen)


def follow(
    model: Transformer, config: SFTConfig, packer: SamplePacker
) -> tuple[Callable[[int], Batch], Objective | None]:
    """The batches, and what is minimised: with a teacher, its distribution over them."""
    if config.distill is None:
        return packer.batch, None
    settings, device = config.distill, model.head_weight().device
    teacher = open_teacher(settings.teacher, model)
    return (
        lambda index: teach(teacher, packer.batch(index).to(device), settings.keep),
        Distillation(settings.soft),
    )


def read(config: SFTConfig, tokenizer: Tokenizer, observe: Observer) -> Material:
    """Both sides as samples. ValueError where nothing is left to learn from."""
    conversations = read_conversations(config.data)
    if config.validation:
        train, held_out = list(conversations), list(read_conversations(config.validation))
    else:
        train, held_out = split_conversations(conversations, config.holdout_fraction)
    sides = [_fitting(side, tokenizer, config.seq_len) for side in (train, held_out)]
    (samples, long), (judged, _) = sides
    if long:
        share = long / (long + len(samples))
        observe(Phase(f"{long} samples ({share:.1%}) are longer than seq_len {config.seq_len}: left out"))
    if not samples:
        raise ValueError(
            f"no answer to learn from in {', '.join(config.data)} is within seq_len {config.seq_len}"
        )
    asked = [conversation for conversation in held_out if len(conversation.messages) > 1]
    return Material(samples, judged, asked[: config.samples])


def _fitting(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, seq_len: int
) -> tuple[list[Sample], int]:
    """The samples that fit, and how many do not."""
    samples = [sample for conversation in conversations for sample in to_samples(conversation, tokenizer)]
    fitting = [sample for sample in samples if len(sample.ids) <= seq_len]
    return fitting, len(samples) - len(fitting)


class Answering:
    """An observer that lets the model answer after each evaluation, and passes everything on."""

    def __init__(
        self,
        model: Transformer,
        tokenizer: Tokenizer,
        asked: Sequence[Conversation],
        folder: Path,
        observe: Observer,
    ) -> None:
        self.model, self.tokenizer, self.asked = model, tokenizer, asked
        self.folder, self.observe = folder, observe

    def __call__(self, event: Event) -> None:
        self.observe(event)
        if isinstance(event, EvaluationReport) and self.asked:
            answers = self._answer()
            with MetricsLog(self.folder / "samples.jsonl", event.step - 1) as log:
                log.write({"kind": "samples", "step": event.step, "answers": answers})
            for answer in answers:
                self.observe(Phase(f"  {answer['asked']!r}: {answer['said']!r}"))

    def _answer(self) -> list[dict[str, str]]:
        prompts = [list(conversation.messages) for conversation in self.asked]
        for messages in prompts:
            while len(messages) > 1 and messages[-1]["role"] != "user":
                messages.pop()
        self.model.eval()
        engine = Engine(self.model, EngineSettings(max_sequences=len(prompts), cache_bytes=1 << 27))
        room = self.model.config.max_position_embeddings - SAMPLE_TOKENS
        ids = [self.tokenizer.chat(messages)[-room:] for messages in prompts]
        done = engine.generate(ids, SamplingParams(temperature=0, max_tokens=SAMPLE_TOKENS))
        self.model.train()
        return [
            {
                "asked": str(messages[-1]["content"])[-200:],
                "said": self.tokenizer.decode(completion.ids, skip_special=True),
            }
            for messages, completion in zip(prompts, done, strict=True)
        ]
