"""Laws of the loop: a step is what it is said to be, and a run that is stopped anywhere is the run that was
not.

Runs are compared bit for bit: weights, router biases, optimizer, generators, and metrics but for their
timing.
"""

from __future__ import annotations

import gc
import json
import math
import os
import random
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from shoal.batch import Batch
from shoal.checkpoint import native
from shoal.config.cost import flops_per_token, peak_flops
from shoal.config.run import BalanceConfig, OptimConfig, TrainConfig
from shoal.train.metrics import CheckpointReport, EvaluationReport, Event, StepReport
from shoal.train.optim import learning_rate
from shoal.train.trainer import Evaluation, Trainer
from tests.train import parts

SETTINGS = TrainConfig(
    steps=12,
    accumulation=2,
    evaluate_every=3,
    checkpoint_every=2,
    optim=OptimConfig(lr=0.02, clip=0.5, warmup_steps=3),
    balance=BalanceConfig(bias_update_speed=0.01, sequence_loss=0.01),
)
HELD_OUT = Evaluation(lambda: [parts.batch(-1), parts.batch(-2, (30, 2))], num_bytes=123)


def trainer(
    folder: Path,
    settings: TrainConfig = SETTINGS,
    *,
    batches: Callable[[int], Batch] = parts.batch,
    evaluation: Evaluation | Mapping[str, Evaluation] | None = HELD_OUT,
    observe: Callable[[Event], None] = lambda event: None,
    dtype: torch.dtype = torch.float32,
) -> Trainer:
    return Trainer(
        parts.model(dtype=dtype),
        batches,
        settings,
        folder,
        generator=torch.Generator().manual_seed(7),
        evaluation=evaluation,
        observe=observe,
    )


def state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint but torch's own generator, which the tests around this one draw from."""
    tensors = {
        f"{file.stem}/{name}": tensor
        for file in checkpoint.glob("*.safetensors")
        for name, tensor in load_file(file).items()
    }
    del tensors["generators/torch"]
    return tensors


def metrics(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert all(line.pop("timing")["seconds"] > 0 for line in lines if line["kind"] != "spike")
    return lines


def assert_same_run(folder: Path, other: Path) -> None:
    ours, theirs = (native.latest(run / "checkpoints") for run in (folder, other))
    assert ours is not None
    assert theirs is not None
    assert ours.name == theirs.name
    mine, others = state(ours), state(theirs)
    assert mine.keys() == others.keys()
    assert {name for name in mine if not torch.equal(mine[name], others[name])} == set()
    assert metrics(folder) == metrics(other)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("uninterrupted")
    outcome = trainer(folder).run()
    assert outcome.step == 12
    assert not outcome.interrupted
    return folder


# A step


def test_a_step_is_accumulate_clip_update_balance(tmp_path: Path) -> None:
    """Two steps equal a loop written out by hand. The model is dense and the loss plain."""
    cfg = replace(parts.config(num_nextn_predict_layers=0), moe=None)
    settings = replace(SETTINGS, steps=2, optim=replace(SETTINGS.optim, warmup_steps=0))
    model = parts.model(cfg)
    run = Trainer(model, parts.batch, settings, tmp_path, generator=torch.Generator())
    run.run()
    twin = parts.model(cfg)
    moments = {p: (torch.zeros_like(p), torch.zeros_like(p)) for p in twin.parameters()}
    for step in range(2):
        nll = []
        for pack in (parts.batch(2 * step), parts.batch(2 * step + 1)):
            logits_TV = twin.logits(twin(pack).hidden_TD, pack)
            assert pack.targets_T is not None
            assert pack.weights_T is not None
            nll.append(F.cross_entropy(logits_TV, pack.targets_T, reduction="none")[pack.weights_T > 0])
        twin.zero_grad()
        torch.cat(nll).mean().backward()
        assert torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5) > 0.5
        lr = learning_rate(step, settings.optim, 2)
        with torch.no_grad():
            for p, (m, v) in moments.items():
                assert p.grad is not None
                m.lerp_(p.grad, 0.1)
                v.lerp_(p.grad**2, 0.05)
                update = (m / (1 - 0.9 ** (step + 1))) / ((v / (1 - 0.95 ** (step + 1))).sqrt() + 1e-8)
                p.mul_(1 - lr * (0.1 if p.ndim > 1 else 0.0)).sub_(lr * update)
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        # AdamW divides a gradient by its own size: of a small one it keeps the relative error, 1e-3, of lr
        # 0.02.
        torch.testing.assert_close(p, q, rtol=0, atol=5e-5, msg=name)


def test_garbage_is_looked_for_once_a_step_and_never_by_itself(tmp_path: Path) -> None:
    class Knot:
        def __init__(self) -> None:
            self.itself = self

    seen: list[tuple[bool, int]] = []
    knots: list[weakref.ref[Knot]] = []

    def batches(index: int) -> Batch:
        seen.append((gc.isenabled(), sum(knot() is not None for knot in knots)))
        knots.append(weakref.ref(Knot()))
        return parts.batch(index)

    settings = replace(SETTINGS, steps=3, accumulation=2)
    trainer(tmp_path, settings, batches=batches, evaluation=None).run()
    assert gc.isenabled()
    assert seen == [(False, 0), (False, 1), (False, 0), (False, 1), (False, 0), (False, 1)]


def test_metrics_tell_every_step_evaluation_and_checkpoint(tmp_path: Path) -> None:
    events: list[Event] = []
    run = trainer(tmp_path, observe=events.append)
    run.run()
    assert [event.step for event in events if isinstance(event, StepReport)] == list(range(1, 13))
    assert [event.step for event in events if isinstance(event, EvaluationReport)] == [3, 6, 9, 12]
    assert [event.step for event in events if isinstance(event, CheckpointReport)] == [2, 4, 6, 8, 10, 12]
    lines = metrics(tmp_path)
    assert [(line["kind"], line["step"]) for line in lines[:5]] == [
        ("step", 1), ("step", 2), ("step", 3), ("evaluation", 3), ("step", 4)
    ]  # fmt: skip
    last = lines[-2]
    assert last["tokens"] == 12 * 2 * sum(parts.LENGTHS)
    assert len(last["max_violation"]) == 3
    loads = torch.tensor(lines[-1]["expert_load"])
    assert (loads.sum(-1) == 3 * 2 * sum(parts.LENGTHS)).all()  # 3 experts for each token of 2 micro-batches


def test_bits_per_byte_are_all_nats_over_all_bytes(tmp_path: Path) -> None:
    reports: list[Event] = []
    run = trainer(tmp_path, replace(SETTINGS, steps=3), observe=reports.append)
    run.run()
    nats, tokens = 0.0, 0
    for pack in HELD_OUT.batches():
        assert pack.targets_T is not None
        assert pack.weights_T is not None
        logits_TV = run.model.logits(run.model(pack).hidden_TD, pack)
        nll_T = F.cross_entropy(logits_TV.detach(), pack.targets_T, reduction="none")
        nats += float((nll_T * pack.weights_T).sum())
        tokens += int(pack.weights_T.sum())
    (report,) = [event for event in reports if isinstance(event, EvaluationReport)]
    # Two float32 sums of some 30 terms.
    assert report.bits_per_byte == pytest.approx(nats / 123 / math.log(2), rel=1e-5)
    assert report.loss == pytest.approx(nats / tokens, rel=1e-5)


def test_several_texts_are_told_by_name_and_together(tmp_path: Path) -> None:
    texts = {
        name: Evaluation(lambda i=i: [parts.batch(i)], num_bytes=50 + i) for i, name in ((7, "en"), (8, "zh"))
    }
    reports: dict[str, EvaluationReport] = {}

    def watch(name: str) -> Callable[[Event], None]:
        def keep(event: Event) -> None:
            if isinstance(event, EvaluationReport):
                reports[name] = event

        return keep

    settings = replace(SETTINGS, steps=3)
    for name, text in texts.items():
        run = trainer(tmp_path / name, settings, evaluation=text, observe=watch(name))
        run.run()
    run = trainer(tmp_path / "both", settings, evaluation=texts, observe=watch("both"))
    run.run()
    both = reports["both"]
    assert both.domains == {name: reports[name].bits_per_byte for name in texts}
    num_bytes = {name: text.num_bytes for name, text in texts.items()}
    nats = sum(both.domains[name] * num_bytes[name] for name in texts)
    assert both.bits_per_byte == pytest.approx(nats / sum(num_bytes.values()))


def test_a_step_tells_its_flops_by_the_cost_table(tmp_path: Path) -> None:
    reports: list[Event] = []
    settings = replace(SETTINGS, steps=3)
    run = trainer(tmp_path, settings, observe=reports.append)
    run.run()
    report = next(event for event in reports if isinstance(event, StepReport))
    lengths = [n for n in parts.LENGTHS for _ in range(2)]
    context = round(sum(n * n for n in lengths) / sum(lengths))
    flops = sum(lengths) * flops_per_token(run.model.config, context, mtp=True)
    assert report.flops_per_second == pytest.approx(flops / report.seconds)
    assert report.mfu is None  # of a CPU no peak is known
    assert peak_flops("NVIDIA H200") == 989e12
    assert torch.tensor(report.expert_load).sum() == 3 * 3 * sum(lengths)


def test_evaluation_changes_nothing(uninterrupted: Path, tmp_path: Path) -> None:
    """Held-out tokens move no bias, no weight, no generator: without them the run is the same, bit for
    bit."""
    outcome = trainer(tmp_path, evaluation=None).run()
    expected = native.latest(uninterrupted / "checkpoints")
    assert expected is not None
    ours, theirs = state(outcome.checkpoint), state(expected)
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert metrics(tmp_path) == [line for line in metrics(uninterrupted) if line["kind"] == "step"]


def test_training_balances_the_experts(tmp_path: Path) -> None:
    """Each step moves each bias by u or not at all, so all are small multiples of u, and some moved."""
    run = trainer(tmp_path, replace(SETTINGS, steps=5))
    run.run()
    bias_LE = torch.stack(
        [g.e_score_correction_bias for g in run.model.gates() if g.e_score_correction_bias is not None]
    )
    steps_LE = bias_LE / 0.01
    # 5 float32 additions of values below 0.05, told in units of 0.01.
    torch.testing.assert_close(steps_LE, steps_LE.round(), rtol=0, atol=1e-4)
    assert 0 < steps_LE.abs().max() <= 5.001


# Stopping and going on


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_saves_and_the_run_goes_on(
    number: signal.Signals, uninterrupted: Path, tmp_path: Path
) -> None:
    def interrupt(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == 5:
            os.kill(os.getpid(), number)

    before = signal.getsignal(number)
    outcome = trainer(tmp_path, observe=interrupt).run()
    assert (outcome.step, outcome.interrupted) == (5, True)
    assert outcome.checkpoint.name == "step-000005"
    assert signal.getsignal(number) is before
    again = trainer(tmp_path)
    assert again.resume()
    assert again.step == 5
    assert again.run().step == 12
    assert_same_run(tmp_path, uninterrupted)


@pytest.mark.parametrize("rule", ["adamw", "muon"])
@pytest.mark.parametrize(
    "kept",
    [
        {},
        {"master": "bfloat16", "moments": "bfloat16"},
        {"master": "bfloat16", "moments": "int8", "in_backward": True},
        {"in_backward": True},
    ],
    ids=lambda kept: "-".join(f"{k}-{v}" for k, v in kept.items()) or "float32",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_every_rule_and_dtype_resumes_bit_for_bit(
    rule: Any, kept: dict[str, Any], dtype: torch.dtype, tmp_path: Path
) -> None:
    optim = replace(SETTINGS.optim, optimizer=rule, **kept)
    settings = replace(SETTINGS, steps=4, accumulation=1 if optim.in_backward else 2, optim=optim)
    for name, stops in (("whole", (4,)), ("parts", (1, 2, 4))):
        for stop in stops:

            def interrupt(event: Event, stop: int = stop) -> None:
                if isinstance(event, StepReport) and event.step == stop:
                    os.kill(os.getpid(), signal.SIGINT)

            run = trainer(tmp_path / name, settings, observe=interrupt, dtype=dtype)
            run.resume()
            run.run()
    assert_same_run(tmp_path / "parts", tmp_path / "whole")


def test_what_was_written_after_the_checkpoint_is_written_again(uninterrupted: Path, tmp_path: Path) -> None:
    class Killed(BaseException):
        pass

    def kill(event: Event) -> None:
        if isinstance(event, StepReport) and event.step == 7:
            raise Killed

    with pytest.raises(Killed):
        trainer(tmp_path, observe=kill).run()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "st')  # a line the kill cut short
    run = trainer(tmp_path)
    run.resume()
    assert run.step == 6
    run.run()
    assert_same_run(tmp_path, uninterrupted)


def test_a_finished_run_has_nothing_left_to_do(uninterrupted: Path) -> None:
    before = metrics(uninterrupted)
    run = trainer(uninterrupted)
    assert run.resume()
    assert run.run().step == 12
    assert metrics(uninterrupted) == before


def test_a_folder_without_checkpoints_is_a_new_run(tmp_path: Path) -> None:
    assert not trainer(tmp_path).resume()


VICTIM = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from tests.train.test_trainer import trainer

# The parent imports once and computes nothing; each child is a run that is killed, or ends.
folder, seed = Path(sys.argv[1]), int(sys.argv[2])
moments, kills = random.Random(seed), 0
while True:
    child = os.fork()
    if child == 0:
        run = trainer(folder)
        run.resume()
        run.run()
        os._exit(0)
    time.sleep(moments.uniform(0.02, 0.4 if kills else 0.05))  # the first one meets it, however quick it is
    if kills < 8:
        os.kill(child, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status == 0:
        print(kills)
        break
    assert status == -signal.SIGKILL, status
    kills += 1
"""


def test_a_run_killed_at_any_moment_is_the_run_that_was_not(uninterrupted: Path, tmp_path: Path) -> None:
    seed = random.SystemRandom().randrange(1 << 32)
    run = subprocess.run(
        [sys.executable, "-c", VICTIM, str(tmp_path / "run"), str(seed)],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parents[2],
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
        timeout=600,
    )
    assert run.returncode == 0, run.stderr
    assert_same_run(tmp_path / "run", uninterrupted)
    assert int(run.stdout) > 0, "no kill met the run"
    assert not list((tmp_path / "run" / "checkpoints").glob(".step-*")), "what kills left behind is cleared"


# What cannot go on


def poisoned(step: int) -> Callable[[int], Batch]:
    """Batches of which the first micro-batch of a step has a target of infinite weight."""

    def batches(index: int) -> Batch:
        pack = parts.batch(index)
        assert pack.weights_T is not None
        return replace(pack, weights_T=pack.weights_T * math.inf) if index == 2 * step else pack

    return batches


def test_a_loss_that_is_not_finite_stops_before_it_touches_a_weight(tmp_path: Path) -> None:
    run = trainer(tmp_path, batches=poisoned(step=7))
    with pytest.raises(ValueError, match="step 8: loss is nan") as error:
        run.run()
    message = str(error.value)
    assert "weights are finite; the first gradient that is not, from the loss back, is " in message
    assert f"The last good checkpoint is {tmp_path / 'checkpoints' / 'step-000006'}" in message
    assert all(tensor.isfinite().all() for tensor in run.model.state_dict().values())
    assert metrics(tmp_path)[-1]["step"] == 7


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    run = trainer(tmp_path)
    run.model.get_parameter("model.layers.1.mlp.gate.weight").data[3, 3] = math.nan
    with pytest.raises(
        ValueError, match=r"the first weight that is not finite is model\.layers\.1\.mlp\.gate\.weight"
    ):
        run.run()


def test_a_gradient_that_is_not_finite_is_told_from_the_loss_back(tmp_path: Path) -> None:
    """Born in the backward pass of layer 2, NaN reaches everything before it and nothing after."""
    run = trainer(tmp_path)
    run.model.get_parameter("model.layers.2.input_layernorm.weight").register_hook(
        lambda grad: grad * math.nan
    )
    with pytest.raises(
        ValueError, match=r"norm is nan; .* is model\.layers\.2\.input_layernorm\.weight's"
    ) as error:
        run.run()
    assert "loss is" not in str(error.value)
    assert "There is no checkpoint yet" in str(error.value)


def test_inside_backward_what_is_not_finite_moves_nothing_it_touches(tmp_path: Path) -> None:
    """Born in the backward pass of layer 2: what is after it has learned already, what is before has not."""
    settings = replace(SETTINGS, accumulation=1, optim=replace(SETTINGS.optim, in_backward=True))
    run = trainer(tmp_path, settings)
    before = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.model.get_parameter("model.layers.2.input_layernorm.weight").register_hook(
        lambda grad: grad * math.nan
    )
    with pytest.raises(
        ValueError, match=r"is model\.layers\.2\.input_layernorm\.weight's\. The step was taken where"
    ):
        run.run()
    after = dict(run.model.named_parameters())
    assert all(p.isfinite().all() for p in after.values())
    assert torch.equal(
        before["model.layers.2.input_layernorm.weight"], after["model.layers.2.input_layernorm.weight"]
    )
    assert not torch.equal(before["lm_head.weight"], after["lm_head.weight"])


def test_a_damaged_checkpoint_is_refused_and_the_one_before_offered(
    uninterrupted: Path, tmp_path: Path
) -> None:
    run = trainer(tmp_path, replace(SETTINGS, steps=4))
    checkpoint = run.run().checkpoint
    with (checkpoint / "optimizer.safetensors").open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(
        ValueError, match=r"step-000004 is damaged: optimizer\.safetensors has 1000 of its"
    ) as error:
        trainer(tmp_path).resume()
    assert f"{checkpoint.with_name('step-000002')} is whole" in str(error.value)


def test_a_checkpoint_of_another_model_is_refused(uninterrupted: Path) -> None:
    run = Trainer(
        parts.model(parts.config(hidden_size=16)),
        parts.batch,
        SETTINGS,
        uninterrupted,
        generator=torch.Generator(),
    )
    with pytest.raises(
        ValueError, match=r"of another run: model has .* as torch\.float32 \(50, 32\); .* \(50, 16\)"
    ):
        run.resume()
