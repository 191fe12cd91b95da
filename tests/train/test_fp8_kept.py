"""The law of weights kept in FP8: a product is that of the weight as it is, however long what was made of an
older one has been kept. So every run is bit for bit the run that keeps none.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from shoal.config.run import Keep, OptimConfig, ParallelConfig, RunConfig, TrainConfig
from shoal.model.layers import Linear
from shoal.model.transformer import Transformer
from shoal.ops import quantised as ops
from shoal.train import fp8
from shoal.train.fp8 import Fp8Product, Kept, multiply_in_fp8
from shoal.train.recompute import recompute
from shoal.train.trainer import Trainer
from tests.train import parts
from tests.train.test_trainer import HELD_OUT, SETTINGS, assert_same_run

STEPS = replace(SETTINGS, steps=4, evaluate_every=1, checkpoint_every=2)
LEAN = OptimConfig(lr=0.02, master="bfloat16", moments="int8", in_backward=True)
RUNS: dict[str, tuple[TrainConfig, torch.dtype]] = {
    "AdamW": (STEPS, torch.float32),
    "float32 masters": (STEPS, torch.bfloat16),
    "Muon": (replace(STEPS, optim=replace(STEPS.optim, optimizer="muon")), torch.float32),
    "inside backward": (replace(STEPS, accumulation=1, optim=LEAN), torch.bfloat16),
    "recompute": (replace(STEPS, recompute="full"), torch.float32),
}


def _trainer(folder: Path, run: str, model: Transformer) -> Trainer:
    return Trainer(model, parts.batch, RUNS[run][0], folder, generator=torch.Generator(), evaluation=HELD_OUT)


def _model(run: str, keep: Keep) -> Transformer:
    settings, dtype = RUNS[run]
    return multiply_in_fp8(recompute(parts.model(dtype=dtype), settings.recompute), keep)


QUICK = [("AdamW", "step"), ("inside backward", "step")]
SLOW = [(run, keep) for run in RUNS for keep in ("pass", "auto", "step") if (run, keep) not in QUICK]


@pytest.mark.parametrize(
    ("run", "keep"), [*QUICK, *(pytest.param(*each, marks=pytest.mark.slow) for each in SLOW)]
)
def test_a_run_is_that_which_keeps_nothing(run: str, keep: Keep, tmp_path: Path) -> None:
    """With evaluations, and gone on with from a checkpoint by a model that has kept what came after it."""
    folder, model = tmp_path / keep, _model(run, keep)
    _trainer(tmp_path / "use", run, _model(run, "use")).run()
    _trainer(folder, run, model).run()
    assert_same_run(folder, tmp_path / "use")
    shutil.rmtree(folder / "checkpoints" / "step-000004")
    again = _trainer(folder, run, model)
    assert again.resume() and again.step == 2
    again.run()
    assert_same_run(folder, tmp_path / "use")


CHANGES: dict[str, Callable[[nn.Parameter], object]] = {
    "written to": lambda w: w.mul_(2),
    "through its data": lambda w: setattr(w, "data", w.data * 2),
    "copied to, detached": lambda w: w.detach().copy_(torch.ones_like(w)),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_has_changed_is_quantised_anew(change: str) -> None:
    model = parts.model()
    product = Fp8Product(Kept("step", model))
    one = model.get_submodule("model.layers.0.self_attn.o_proj")
    assert isinstance(one, Linear)
    x = torch.randn(3, one.weight.shape[1], generator=torch.Generator().manual_seed(0))
    made: list[Tensor] = []
    with torch.no_grad():
        for _ in range(2):
            made.append(product(x, one.weight, None))
            made.append(product(x, one.weight, None))
            CHANGES[change](one.weight)
        assert torch.equal(made[0], made[1]) and not torch.equal(made[1], made[2])
        (wanted,) = ops.fp8_linears(x, (_was(one.weight, change),))
        assert torch.equal(made[2], made[3]) and torch.equal(made[2], wanted)


def _was(weight: Tensor, change: str) -> Tensor:
    """Before the second change."""
    return weight if change.startswith("copied") else weight / 2


def test_quantised_once_a_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Of two micro-batches; `auto` has seen two before it keeps any."""
    counts, whole = {}, ops.fp8_pair
    for keep in ("step", "auto", "pass", "use"):
        calls: list[object] = []
        with monkeypatch.context() as patched:
            patched.setattr(ops, "fp8_pair", lambda *w, calls=calls: calls.append(w) or whole(*w))
            trainer = _trainer(tmp_path / keep, "AdamW", _model("AdamW", keep))
            for _ in range(3):
                trainer.train_step()
        counts[keep] = len(calls)
    each = counts["step"] // 3
    assert counts == {"step": 3 * each, "auto": 4 * each, "pass": 6 * each, "use": 0}


def test_what_there_is_no_room_for_is_made_again(monkeypatch: pytest.MonkeyPatch) -> None:
    linears = [nn.Linear(8, 4, bias=False) for _ in range(3)]
    kept = Kept("auto", nn.ModuleList(linears))
    monkeypatch.setattr(fp8, "_spare_bytes", lambda device: 2 * 2 * 32.0)  # two of the three
    made: list[int] = []

    def make(*weights: Tensor) -> tuple[ops.Fp8Pair, ...]:
        made.append(id(weights[0]))
        return (ops.fp8_pair(*weights),)

    for _ in range(5):
        for one in linears:
            kept.of((one.weight,), make)
    assert [made.count(id(one.weight)) for one in linears] == [3, 3, 5]


def test_another_tensor_in_a_parameters_place_is_not_kept() -> None:
    """As FSDP2 puts it there: its memory is used again, uncounted."""
    kept = Kept("step", parts.model())
    assert kept.of((torch.ones(4, 8),), lambda w: (ops.fp8_pair(w),)) is None


def test_recipes_are_decided_or_refused() -> None:
    def recipe(keep: Keep = "auto", parallel: int = 1, **train: object) -> RunConfig:
        settings = TrainConfig(steps=1, **train)  # type: ignore[arg-type]
        degrees = ParallelConfig(data=parallel)
        model = replace(parts.config(), max_position_embeddings=4096)
        return RunConfig(model, settings, precision="fp8", fp8_keep=keep, parallel=degrees)

    assert recipe().keeps == "pass"
    assert recipe(accumulation=4).keeps == "auto"
    assert recipe("step", recompute="full").keeps == "step"
    assert recipe(accumulation=4, recompute="full").keeps == "use"
    assert recipe(parallel=2, accumulation=4).keeps == "use"
    with pytest.raises(ValueError, match=r"fp8_keep is 'step', which does not work on the 2 processes"):
        recipe("step", parallel=2, accumulation=4)
    with pytest.raises(ValueError, match="no weight is in FP8"):
        replace(recipe(), precision="dtype", fp8_keep="pass")
