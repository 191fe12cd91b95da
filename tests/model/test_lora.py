"""Laws of adapters: nothing changes until they learn, and merging is the same model."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shoal.model.lora import adapters, add_lora, merge_lora
from shoal.model.transformer import Transformer
from tests.train import parts

TARGETS = ("q_b_proj", "kv_b_proj", "o_proj", "experts.gate_up_proj", "experts.down_proj")


def adapted(*, learned: bool) -> Transformer:
    generator = torch.Generator().manual_seed(1)
    model = add_lora(parts.model(), TARGETS, 2, 4.0, generator)
    if learned:
        for adapter in adapters(model).values():
            nn.init.normal_(adapter.lora_B, std=0.1, generator=generator)
    return model


def test_nothing_changes_until_they_learn() -> None:
    batch = parts.batch(0)
    assert torch.equal(adapted(learned=False)(batch).hidden_TD, parts.model()(batch).hidden_TD)
    learns = [name for name, p in adapted(learned=False).named_parameters() if p.requires_grad]
    assert learns
    assert all("lora_" in name for name in learns)


def test_merged_is_the_same_model_under_its_old_names() -> None:
    batch, model = parts.batch(0), adapted(learned=True)
    before = model(batch).hidden_TD
    assert (before - parts.model()(batch).hidden_TD).abs().max() > 0.01
    merged = merge_lora(model)
    assert torch.equal(merged(batch).hidden_TD, before)
    assert list(merged.state_dict()) == list(parts.model().state_dict())
    assert not adapters(merged)


def test_gradients_reach_every_adapter_and_nothing_else() -> None:
    model = adapted(learned=True)
    model(parts.batch(0)).hidden_TD.square().sum().backward()
    for name, p in model.named_parameters():
        inside = "lora_" in name and "layers.3." not in name  # the prediction module was not run
        assert (p.grad is not None and bool(p.grad.abs().max() > 0)) == inside, name


def test_a_name_that_is_not_there_is_told() -> None:
    with pytest.raises(ValueError, match="no weight 'q_proj' to adapt"):
        add_lora(parts.model(), ["q_proj"], 2, 4.0, torch.Generator())
    with pytest.raises(ValueError, match="rank is 0"):
        add_lora(parts.model(), ["o_proj"], 0, 4.0, torch.Generator())
