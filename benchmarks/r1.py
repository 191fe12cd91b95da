"""A round of reasoning RL, rollout and update: how much of it the device works, and the hand-over.

    python -m benchmarks.r1 [--scale one-gpu] [--task addition] [--rounds 3] [--questions N] [--model PATH]
                            [--trace FILE]

The rounds are those of `shoal grpo` on the recipe of `shoal r1` at that scale, after three that warm up. A
newborn answers to the end of its budget, so few answers are shorter than the recipe allows; --model takes
one that has learned. One round more is profiled, which costs the host time of its own, so that one is not
timed. Share: the union of its kernels' spans, as torch's profiler saw them, over the wall-clock of a timed
round, and beside it over its own. On a CPU there are no kernels: it shows that all of it runs, at --tiny,
with the share of time in torch's ops. Hand-over: from the trainer's last step to the engine's first, longest
of the rounds.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile

from shoal.stages import grpo
from shoal.stages.r1_recipes import Recipes, scale_of
from shoal.train.metrics import Event, StepReport

SHARE, HAND_OVER_MS = 0.60, 50.0  # wanted on an H200
WARM = 3  # rounds
FEW = {"demonstrations": 20, "problems": 4000, "held_out": 5}  # to choose from: a round asks no more
TINY = {**FEW, "problems": 200, "questions": 4, "group": 4, "max_tokens": 8}


@dataclass(frozen=True)
class Result:
    rounds: int
    seconds: float  # of a round, by wall-clock
    sampling: float
    looking_back: float
    kernels: float  # seconds of the profiled round in kernels (on a CPU: in torch's ops)
    profiled: float  # seconds of that round
    hand_over_ms: float
    drawn: float  # tokens a second, prompts included, over whole rounds
    round_tokens: float  # drawn in a round, prompts included


class Watch:
    """Times what comes after the warm rounds, and profiles the last."""

    def __init__(self, rounds: int, device: str) -> None:
        self.rounds, self.cuda = rounds, device.startswith("cuda")
        self.profiler = profile(
            activities=[ProfilerActivity.CUDA if self.cuda else ProfilerActivity.CPU], acc_events=True
        )
        self.made, self.profiled_from = time.perf_counter(), 0.0
        self.ends: list[float] = []  # of rounds, from the last warm one on

    def __call__(self, event: Event) -> None:
        if not isinstance(event, StepReport):
            return
        print(f"step {event.step} after {time.perf_counter() - self.made:.1f} s", file=sys.stderr, flush=True)
        if event.step < WARM:
            return
        if self.cuda:
            torch.cuda.synchronize()
        self.ends.append(time.perf_counter())
        if event.step == WARM + self.rounds:
            self.profiler.start()
            self.profiled_from = time.perf_counter()
        elif event.step > WARM + self.rounds:
            self.profiler.stop()

    def seconds(self) -> float:
        """Of a round that nobody profiled."""
        return (self.ends[self.rounds] - self.ends[0]) / self.rounds

    def profiled(self) -> float:
        return self.ends[-1] - self.profiled_from

    def kernels(self) -> float:
        kind = DeviceType.CUDA if self.cuda else DeviceType.CPU
        spans = (
            (event.time_range.start, event.time_range.end)
            for event in self.profiler.events() or ()
            if event.device_type == kind
        )
        return covered(spans) / 1e6


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Length of the union."""
    total, end = 0.0, float("-inf")
    for first, last in sorted(spans):
        total += max(0.0, last - max(first, end))
        end = max(end, last)
    return total


def measure(
    recipes: Recipes, rounds: int, device: str, model: str | None, trace: str | None = None
) -> Result:
    recipes.write_problems()
    recipes.make_base()
    recipe = recipes.reasoning()
    optim = replace(recipe.train.optim, warmup_steps=0)  # the recipe's may outlast these rounds
    recipe = replace(
        recipe,
        model=model or str(recipes.folder / "base"),
        held_out=(),
        train=replace(
            recipe.train, steps=WARM + rounds + 1, evaluate_every=0, checkpoint_every=0, optim=optim
        ),
    )
    watch, folder = Watch(rounds, device), recipes.folder / "rl"
    grpo.run(recipe, folder, device=device, observe=watch)
    if trace:
        watch.profiler.export_chrome_trace(trace)
    lines = [json.loads(line) for line in (folder / "rollouts.jsonl").read_text("utf-8").splitlines()]
    lines = lines[WARM : WARM + rounds]
    sampling, looking_back = (
        sum(line["timing"][what] for line in lines) / rounds for what in ("sampling", "looking back")
    )
    return Result(
        rounds=rounds,
        seconds=watch.seconds(),
        sampling=sampling,
        looking_back=looking_back,
        kernels=watch.kernels(),
        profiled=watch.profiled(),
        hand_over_ms=1e3 * max(line["timing"]["hand-over"] for line in lines),
        drawn=sum(line["drawn"] for line in lines) / watch.seconds() / rounds,
        round_tokens=sum(line["drawn"] for line in lines) / rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--scale", default="one-gpu")
    parser.add_argument("--task", default="addition")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--questions", type=int, help="of a round, where not as many as the recipe's")
    parser.add_argument("--model", help="a checkpoint with the recipe's tokenizer; without it a newborn")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="few and short answers: shows that it runs")
    parser.add_argument("--trace", help="where to leave the profile, for chrome://tracing or Perfetto")
    chosen = parser.parse_args()
    changes = TINY if chosen.tiny else FEW
    if chosen.questions is not None:
        changes = {**changes, "questions": chosen.questions}
    scale = scale_of(chosen.scale, chosen.task, changes)
    with tempfile.TemporaryDirectory() as folder:
        recipes = Recipes(scale, Path(folder), 0)
        told = measure(recipes, chosen.rounds, chosen.device, chosen.model, chosen.trace)
    where = torch.cuda.get_device_name() if chosen.device.startswith("cuda") else "a CPU"
    print(f"{where}, torch {torch.__version__}, {chosen.scale}, {chosen.task}: {told.rounds} rounds of "
          f"{scale.questions} x {scale.group} answers of at most {scale.max_tokens} tokens\n")  # fmt: skip
    update = told.seconds - told.sampling - told.looking_back
    for name, seconds in (
        ("a round", told.seconds),
        ("  rollout", told.sampling),
        ("  looking back", told.looking_back),
        ("  update and the rest", update),
    ):
        print(f"{name:24} {1e3 * seconds:12,.1f} ms {seconds / told.seconds:6.1%}")
    kind = "in kernels" if chosen.device.startswith("cuda") else "in torch's ops"
    share, own = told.kernels / told.seconds, told.kernels / told.profiled
    wanted = f"wanted {SHARE:.0%} of an H200's; {own:.1%} of the profiled round"
    print(f"{kind:24} {share:15.1%}    {wanted}")
    print(f"{'hand-over':24} {told.hand_over_ms:12,.3f} ms    wanted {HAND_OVER_MS:.0f}")
    print(f"{'tokens drawn':24} {told.drawn:12,.0f} /s")
    idle = told.seconds - told.kernels
    print(f"{'not in kernels':24} {1e6 * idle / told.round_tokens:12,.2f} us a token")


if __name__ == "__main__":
    main()
