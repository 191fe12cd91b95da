"""Laws of distillation: it is the written cross-entropy, and a dense student comes near a routed teacher."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from shoal.config.families import tiny
from shoal.config.run import BalanceConfig, OptimConfig, TrainConfig
from shoal.model.transformer import Transformer
from shoal.train import distill
from shoal.train.distill import Distillation
from shoal.train.trainer import Trainer
from tests.train import parts


def test_it_is_the_written_formula_in_value_and_gradient() -> None:
    generator = torch.Generator().manual_seed(0)
    T, V, D, K = 7, 30, 8, 4
    hidden = torch.randn(T, D, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(V, D, generator=generator, dtype=torch.float64).requires_grad_()
    targets = torch.randint(0, V, (T,), generator=generator)
    weights = torch.rand(T, generator=generator, dtype=torch.float64)
    best = torch.randn(T, V, generator=generator, dtype=torch.float64).topk(K)
    probs = best.values.softmax(-1)
    ours = distill.soft_cross_entropy(hidden, head, targets, weights, best.indices, probs)
    logp = (hidden @ head.t()).log_softmax(-1).gather(1, best.indices)
    written = -(weights * (probs * logp).sum(-1)).sum()
    torch.testing.assert_close(ours, written, rtol=1e-12, atol=1e-12)
    for x in (hidden, head):
        grads = [torch.autograd.grad(value, x, retain_graph=True)[0] for value in (ours, written)]
        # Float64; logits of order 10 are added and taken away again: 1e-15 of that.
        torch.testing.assert_close(*grads, rtol=1e-9, atol=1e-12)


def test_all_tokens_kept_is_the_whole_distribution() -> None:
    teacher, batch = parts.model(), parts.batch(0)
    taught = distill.teach(teacher, batch, 50, rows_at_once=5)
    probs = (teacher(batch).hidden_TD @ teacher.head_weight().t()).softmax(-1)
    assert taught.kept_TK is not None
    assert taught.probs_TK is not None
    torch.testing.assert_close(taught.probs_TK, probs.gather(1, taught.kept_TK))
    with pytest.raises(ValueError, match="51 of the teacher's tokens are to be kept; it has 50"):
        distill.teach(teacher, batch, 51)


def test_a_dense_student_comes_near_a_routed_teacher(tmp_path: Path) -> None:
    teacher = parts.model().eval()
    config = replace(
        tiny("r1-distill-qwen-7b"), vocab_size=50, max_position_embeddings=64, initializer_range=0.1
    )
    student = Transformer(config)
    student.init_weights(torch.Generator().manual_seed(1))
    settings = TrainConfig(
        steps=30,
        checkpoint_every=0,
        mtp_loss_weight=0.0,
        optim=OptimConfig(lr=0.01, schedule="constant"),
        balance=BalanceConfig(sequence_loss=0.0),
    )
    batches = [distill.teach(teacher, parts.batch(i), 8) for i in range(2)]
    told: list[float] = []
    Trainer(
        student,
        lambda i: batches[i % 2],
        settings,
        tmp_path,
        generator=torch.Generator(),
        objective=Distillation(),
        observe=lambda event: told.append(event.loss) if hasattr(event, "terms") else None,  # type: ignore[union-attr]
    ).run()
    assert told[-1] < 0.7 * told[0]
