"""R1's pipeline in small, top to bottom, each step a stage that anybody can run by itself.

    base/     a newborn
    start/    cold start: demonstrations by somebody who slips, and is wrong more often than right
    rl/       reasoning RL: many problems, told right or wrong
    control/  instead of RL, more demonstrations, for as much arithmetic
    kept/     rejection sampling: the right answers that rl/ gives
    tuned/    the newborn tuned on these, and on how to greet: curtly or by name
    taste/    a reward model that prefers to be greeted by name
    final/    RL for all scenarios: right or wrong for sums, the reward model for greetings
    student/  a dense model taught by final/

The law: what is claimed is measured on problems that were held out, for every model alike, and an interval
stands beside each share. What each stage does is told by stages/r1_recipes, and lies in its folder.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from shoal.checkpoint import hf
from shoal.config.tune import GRPOConfig, PreferenceConfig, SFTConfig
from shoal.data.atomic import write_atomically
from shoal.data.text import Tokenizer
from shoal.stages import grpo, preference, reject, sft, tasks
from shoal.stages.judge import Judge
from shoal.stages.r1_recipes import Recipes, Scale
from shoal.stages.rollout import Rollout
from shoal.train.metrics import Observer, Phase
from shoal.train.trainer import Outcome

RESULTS = "results.jsonl"
MEASURED = "measured.json"  # of each model, so that going on does not ask it again


@dataclass(frozen=True)
class Result:
    """What a model does with held-out problems: shares, and the 95% interval of the first."""

    name: str
    accuracy: float  # of the most probable answers
    low: float
    high: float
    sampled: float  # of one answer drawn at temperature 1
    named: float | None  # the share of introductions that are greeted by name; None before greetings
    length: float  # tokens of an answer, on average
    steps: int
    training_tokens: int  # as many tokens forward and backward as its arithmetic amounts to


class Interrupted(Exception):
    """A stage was stopped, and saved itself."""


def run(
    scale: Scale,
    folder: Path,
    seed: int = 0,
    *,
    whole: bool = True,
    device: torch.device | str = "cpu",
    observe: Observer = lambda event: None,
) -> list[Result] | None:
    """All of it, or what is left of it; None if it was interrupted. Without `whole`, up to the control."""

    def train(
        kind: Callable[..., Outcome], config: SFTConfig | GRPOConfig | PreferenceConfig, name: str, told: str
    ) -> None:
        observe(Phase(f"{name}: {told}"))
        if not (folder / name / "export").exists() and (
            kind(config, folder / name, device=device, observe=observe).interrupted
        ):
            raise Interrupted

    recipes = Recipes(scale, folder, seed)
    results: list[Result] = []

    def judge(name: str, steps: int, tokens: int, *, greets: bool = False) -> None:
        told = recall(folder / name, scale.held_out)
        if told is None:
            told = measure(name, recipes, steps, tokens, device, greets=greets)
            with write_atomically(folder / name / MEASURED) as file:
                file.write(json.dumps({"held_out": scale.held_out, **asdict(told)}).encode())
        results.append(told)
        observe(
            Phase(
                f"{name}: {told.accuracy:.1%} of {scale.held_out} held-out problems right "
                f"({told.low:.1%} to {told.high:.1%}), {told.sampled:.1%} at temperature 1"
            )
        )

    try:
        # 1. Problems, and a model that knows nothing.
        recipes.write_problems()
        recipes.make_base()

        # 2. The cold start.
        told = f"{scale.demonstrations} demonstrations with {scale.slips:.0%} slips"
        train(sft.run, recipes.cold_start(), "start", told)
        judge("start", scale.start_steps, trained(folder / "start"))

        # 3. Reasoning RL.
        train(grpo.run, recipes.reasoning(), "rl", f"{scale.problems} problems, no solutions")
        tokens = rl_tokens(folder / "rl")
        judge("rl", scale.rl_steps, tokens)

        # 4. The control: the arithmetic of RL, spent on the demonstrations.
        steps = max(1, round(tokens / (trained(folder / "start") / scale.start_steps)))
        train(sft.run, recipes.control(steps), "control", f"{steps} steps on demonstrations, as much as RL")
        judge("control", steps, trained(folder / "control"))
        if whole:
            # 5. Rejection sampling, and tuning on what is kept.
            observe(Phase("kept: right answers of the model after RL"))
            reject.run(recipes.rejection(), folder / "kept", device=device, observe=observe)
            told = f"{recipes.write_tuning()} conversations, right sums and greetings of both kinds"
            train(sft.run, recipes.tuning(), "tuned", told)
            judge("tuned", scale.tuned_steps, trained(folder / "tuned"), greets=True)

            # 6. RL for all scenarios, rewarded by rules and by a reward model.
            train(preference.run, recipes.taste(), "taste", f"{scale.pairs} pairs of greetings")
            train(grpo.run, recipes.all_scenarios(), "final", "sums by rule, greetings by the reward model")
            judge("final", scale.final_steps, rl_tokens(folder / "final"), greets=True)

            # 7. A dense student of the last.
            recipes.make_student()
            train(sft.run, recipes.distillation(), "student", "a dense model, on the logits of final")
            judge("student", scale.student_steps, trained(folder / "student"), greets=True)
    except Interrupted:
        return None
    with write_atomically(folder / RESULTS) as file:
        file.writelines(json.dumps(asdict(result)).encode() + b"\n" for result in results)
    return results


def recall(folder: Path, held_out: int) -> Result | None:
    """What was measured of a model before, on as many problems."""
    if not (folder / MEASURED).exists():
        return None
    told = json.loads((folder / MEASURED).read_text("utf-8"))
    return Result(**told) if told.pop("held_out") == held_out else None


def rl_tokens(folder: Path) -> int:
    """What RL cost, in tokens of training: 6 FLOPs a parameter and token, of which 2 are the forward pass.

    A token went forward once when drawn, whether it was used or not; once more when looked back on, and then
    with its gradient. Evaluations are not training, and are left out on both sides.
    """
    rounds = (json.loads(line) for line in (folder / "rollouts.jsonl").read_text("utf-8").splitlines())
    drawn = sum(line["drawn"] for line in rounds)
    return round((2 * drawn + (2 + 6) * trained(folder)) / 6)


def trained(folder: Path) -> int:
    """The tokens that a run has stepped on."""
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text("utf-8").splitlines())
    return max(line["tokens"] for line in lines if line["kind"] == "step")


def measure(
    name: str, recipes: Recipes, steps: int, tokens: int, device: torch.device | str, *, greets: bool
) -> Result:
    """Ask a model what is held out. An answer is drawn with the same seed from each."""
    path = recipes.folder / name / "export"
    model, tokenizer = hf.load(path, device=device), Tokenizer.load(path)
    config = recipes.reasoning()
    with Judge(dict.fromkeys(tasks.REWARDS.values(), 1.0)) as judging:
        sampler = Rollout(model, tokenizer, judging, config)

        def ask(file: Path, temperature: float) -> tuple[list[float], float]:
            questions = grpo.read_questions([str(file)], tokenizer)
            groups = sampler.evaluate(questions, 1, 0, temperature)
            lengths = [len(group[0].completion.ids) for group in groups]
            return [group[0].score.total for group in groups], sum(lengths) / len(lengths)

        right, length = ask(recipes.files["held-out"], 0.0)
        drawn, _ = ask(recipes.files["held-out"], 1.0)
        named = ask(recipes.files["introductions"], 1.0)[0] if greets else None
    share = sum(right) / len(right)
    return Result(
        name,
        share,
        *grpo.wilson(share, len(right)),
        sampled=sum(drawn) / len(drawn),
        named=None if named is None else sum(named) / len(named),
        length=length,
        steps=steps,
        training_tokens=tokens,
    )
