"""The law of parallelism on GPUs: two of them by NCCL give the gradients of one, cut or in stages, and its
runs.

Float32 without TF32, so the sides differ by the order of sums; the tolerance is that of test_parallel.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from shoal.train.team import Team
from tests.parallel import combinations, test_combinations, work
from tests.parallel.test_parallel import EPS, TWO, assert_close
from tests.parallel.test_pipeline import DOWN, VEE, Runs, assert_equal_to_one
from tests.train import parts

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]


def test_loss_and_gradients_of_two_gpus_are_those_of_one(tmp_path: Path) -> None:
    model = parts.model().cuda()
    batches = [parts.batch(i).to(model.head_weight().device) for i in range(work.BATCHES)]
    loss, grads = work.losses_and_gradients(batches, model, Team())
    found = work.launch(work.every_gradient, 2, tmp_path, TWO, "cuda", backend=work.NCCL)
    for mesh in TWO:
        for rank in found:
            theirs, pieces = rank[mesh]
            assert theirs == pytest.approx(loss, rel=128 * EPS)
            assert pieces.keys() == grads.keys()
            for name, ((first, _), grad) in pieces.items():
                whole = grads[name].cpu()
                assert_close(grad.cpu(), whole[first : first + len(grad)], whole, f"{mesh} {name}")


def test_stages_on_two_gpus_are_one(tmp_path: Path) -> None:
    runs: Runs = [(way, work.deep(), mode) for way in (DOWN, VEE) for mode in ("none", "full")]
    assert_equal_to_one(tmp_path, 2, runs, 4, "cuda", work.NCCL)


def test_what_trains_on_two_gpus_is_the_run_of_one(tmp_path: Path) -> None:
    """Weights cut and experts spread, with what is likest to meet; sparse attention and FP8 on all."""
    everywhere = ("FP8 products", "NSA", combinations.SPARSE)
    jobs: combinations.Jobs = []
    for name, degrees in combinations.DEGREES.items():
        asked = combinations.TOGETHER if name in ("`data` (FSDP2)", "`expert`") else everywhere
        jobs.append((degrees, [each for each in asked if combinations.is_refused(each, degrees) is None]))
    test_combinations.assert_equal_to_one(jobs, 2, tmp_path, "cuda", work.NCCL)
