"""The law of docs/how-to/train-on-several.md: what its table says is equal is the run of one process, and
what it says does not go is refused before anything starts, with what is meant and a way out.

Equal is: after two steps of a Trainer the losses, the norms of the gradients and every weight, by the
tolerance of test_parallel. In FP8 a sum whose last bit differs may fall to the other side of a rounding,
which is 2^-4 of a number and moves what comes after it: there the loss is within 2^-8, the norm within 2^-5,
and a weight, on average, within half of how far it went, since AdamW divides by what is small. On a GPU Muon
makes its steps orthogonal in bfloat16: of entries that differ by 128 eps one in 2^8 crosses a rounding and is
off by 2^-8, 2^-12 of the norm, and five steps of a slope of 3.4445 at most make that an eighth of how far a
weight went.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from shoal.checkpoint import native
from shoal.config.run import ParallelConfig
from shoal.train.optim import Optimizer
from tests.parallel import combinations as c
from tests.parallel import work
from tests.parallel.test_parallel import EPS
from tests.train import parts

# Of what rounds on its way: the loss, the norm, and which share of its way a weight may be off.
NEAR = {(device, "FP8 products"): (2**-8, 2**-5, 2) for device in ("cpu", "cuda")}
NEAR["cuda", "Muon"] = (2**-10, 2**-8, 8)
PAGE = Path(__file__).parents[2] / "docs" / "how-to" / "train-on-several.md"


def test_the_page_says_what_the_code_does() -> None:
    assert "\n".join(c.table()) in PAGE.read_text("utf-8")


def test_what_does_not_go_is_refused_with_a_way_out() -> None:
    refused = 0
    for feature in c.FEATURES:
        assert c.is_refused(feature, ParallelConfig()) is None
        for degrees in c.DEGREES.values():
            told = c.is_refused(feature, degrees)
            refused += told is not None
            assert told is None or ("parallel." in told and ("use" in told or "set" in told)), told
    assert refused == sum(row.count("| no ") for row in c.table())
    with pytest.raises(ValueError, match="context is 2 and pipeline 2, which do not work together"):
        ParallelConfig(context=2, pipeline=2)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [2, 4])
def test_what_goes_is_the_run_of_one_process(ranks: int, tmp_path: Path) -> None:
    """Two processes: every feature on every degree. Four: pairs of degrees, with what is likest to meet."""
    degrees, features = (c.DEGREES, c.FEATURES) if ranks == 2 else (c.PAIRS, c.TOGETHER)
    jobs = [
        (each, [feature for feature in features if c.is_refused(feature, each) is None])
        for each in degrees.values()
    ]
    assert_equal_to_one(jobs, ranks, tmp_path)


def assert_equal_to_one(
    jobs: c.Jobs, ranks: int, folder: Path, device: str = "cpu", backend: str = "gloo"
) -> None:
    several = folder / "several"
    work.launch(c.train_all, ranks, several, jobs, several, device, backend=backend)
    features = {feature for _, features in jobs for feature in features}
    alone = {feature: c.train(feature, None, folder / feature, device) for feature in features}
    for number, (each, features) in enumerate(jobs):
        for index, feature in enumerate(features):
            theirs, told = several / str(number) / str(index), f"{each} {feature}"
            loss, norm, share = NEAR.get((device, feature), (128 * EPS, 128 * EPS, None))
            lines = [json.loads(line) for line in (theirs / "metrics.jsonl").read_text().splitlines()]
            steps = [(line["loss"], line["grad_norm"]) for line in lines if line["kind"] == "step"]
            for one, other in zip(alone[feature], steps, strict=True):
                assert other[0] == pytest.approx(one[0], rel=loss), told
                assert other[1] == pytest.approx(one[1], rel=norm), told
            wanted, got = (weights(feature, place) for place in (folder / feature, theirs))
            born = parts.model(c.FEATURES[feature](ParallelConfig()).model).state_dict()
            for name, tensor in wanted.items():
                off, went = got[name] - tensor, (tensor - born[name]).norm()
                if share is None:
                    assert off.abs().max() <= 128 * EPS, f"{told} {name}: off by {off.abs().max()}"
                elif (
                    "bias" not in name
                ):  # of a router: it moves by the sign of a load, which a near tie decides
                    assert off.norm() <= went / share, f"{told} {name}: off by {off.norm() / went}"


def weights(feature: str, folder: Path) -> dict[str, torch.Tensor]:
    config = c.FEATURES[feature](ParallelConfig())
    model = parts.model(config.model)
    state = {"model": model.state_dict(), "optimizer": Optimizer(model, config.train.optim).state()}
    native.load(folder / "checkpoints" / f"step-{config.train.steps:06d}", state)
    return state["model"]
