"""The law of adapters in PEFT's layout: `peft` on `transformers` computes what we do."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import peft
import pytest
import torch
import transformers
from torch import nn

from shoal.checkpoint import hf
from shoal.checkpoint.peft import save_adapters
from shoal.model.lora import adapters, add_lora
from tests.train import parts

# peft 0.21 asks transformers 5.23 for a name that it is about to lose.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")


@pytest.mark.parametrize(
    "targets",
    [
        ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
        ("experts.gate_up_proj", "experts.down_proj"),
        ("o_proj", "experts.down_proj"),
    ],
)
def test_peft_loads_them_and_computes_the_same_logits(tmp_path: Path, targets: tuple[str, ...]) -> None:
    model = parts.model(replace(parts.config(num_nextn_predict_layers=0)))
    hf.save(model, tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    add_lora(model, targets, 2, 6.0, generator)
    for adapter in adapters(model).values():
        nn.init.normal_(adapter.lora_B, std=0.2, generator=generator)
    save_adapters(model, tmp_path / "adapters", str(tmp_path / "base"))

    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    batch = parts.batch(0, (12,))
    with torch.no_grad():
        plain = base(batch.ids_T.unsqueeze(0)).logits[0]
        adapted = peft.PeftModel.from_pretrained(base, tmp_path / "adapters")
        theirs = adapted(batch.ids_T.unsqueeze(0)).logits[0]
        ours = model.logits(model(batch).hidden_TD, batch)
    assert (theirs - plain).abs().max() > 0.01
    # Float32 through three layers in another order: as in tests/model/test_parity.
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


def test_a_model_without_adapters_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no adapters to save"):
        save_adapters(parts.model(), tmp_path / "adapters", "base")
