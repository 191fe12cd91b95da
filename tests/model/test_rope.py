"""Laws of the rotary angles: published values, transformers' own, and angles that are position times
frequency.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from shoal.config.hf import from_hf
from shoal.config.model import RopeConfig, YarnScaling
from shoal.model.rope import RotaryEmbedding, inverse_frequencies


def test_yarn_of_v2_and_v3() -> None:
    """Worked out by hand from theta 10000, context 4096, factor 40: the ramp runs from pair 10 to pair 23."""
    scaling = YarnScaling(40, 4096, mscale=1.0, mscale_all_dim=1.0)
    inverse = inverse_frequencies(RopeConfig(10000.0, scaling=scaling), 64)
    wanted = {
        0: 1.0,
        10: 5.623413e-2,
        11: 3.900693e-2,
        16: 5.5e-3,
        22: 1.778279e-4,
        23: 3.333804e-5,
        31: 3.333804e-6,
    }
    assert len(inverse) == 32
    assert {pair: inverse[pair] for pair in wanted} == pytest.approx(wanted, rel=1e-6)


ROPES: dict[str, dict[str, Any]] = {
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "llama3, other corners": {"factor": 32.0, "low_freq_factor": 2.0, "high_freq_factor": 3.0},
    "linear": {"factor": 4.0},
    "yarn": {"factor": 16.0},
    "yarn of v3": {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 1.0},
    "yarn, two temperatures": {"factor": 40.0, "mscale": 1.0, "mscale_all_dim": 0.707},
    "yarn, other corners": {"factor": 4.0, "beta_fast": 16.0, "beta_slow": 2.0},
    "yarn, its own factor": {"factor": 4.0, "attention_factor": 0.9},
    "yarn, no stretch": {"factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.707},
}


@pytest.mark.parametrize("theta", [10000.0, 500000.0])
@pytest.mark.parametrize("head_dim", [16, 64, 128])
@pytest.mark.parametrize("name", ROPES)
def test_scalings_are_those_of_transformers(name: str, head_dim: int, theta: float) -> None:
    """Both compute a frequency in a handful of operations, transformers in float32: 2e-6 is room for 30 of
    them."""
    kind = name.split(",")[0].split()[0]
    settings = dict(ROPES[name])
    if kind != "linear":
        settings["original_max_position_embeddings"] = 2048
    parameters = {"rope_type": kind, "rope_theta": theta, **settings}
    theirs = LlamaConfig(head_dim=head_dim, max_position_embeddings=8192, rope_parameters=parameters)
    wanted, wanted_factor = ROPE_INIT_FUNCTIONS[kind](theirs, torch.device("cpu"))
    rope = from_hf(theirs.to_dict()).rope
    assert inverse_frequencies(rope, head_dim) == pytest.approx(wanted.tolist(), rel=2e-6)
    assert RotaryEmbedding(rope, head_dim, device=None).factor == pytest.approx(wanted_factor)


def test_no_scaling_is_the_powers_of_theta() -> None:
    inverse = inverse_frequencies(RopeConfig(10000.0), 8)
    assert inverse == pytest.approx([1, 0.1, 0.01, 0.001])


@pytest.mark.parametrize("factor", [None, 1.3])
def test_angles_are_position_times_frequency(factor: float | None) -> None:
    """An angle of some radians is rounded twice in float32, 2^-24 of itself each time: the frequency and
    the product. Cosine and sine move no faster than their angle, and are rounded once more, with the
    factor twice."""
    scaling = None if factor is None else YarnScaling(2.0, 64, attention_factor=factor)
    rope = RopeConfig(10000.0, scaling=scaling)
    positions_T = torch.tensor([0, 1, 2, 77, 4095])
    cos_TR2, sin_TR2 = RotaryEmbedding(rope, 8, device=None)(positions_T)
    assert (cos_TR2.dtype, sin_TR2.dtype) == (torch.float32, torch.float32)
    for t, position in enumerate(positions_T.tolist()):
        for pair, frequency in enumerate(inverse_frequencies(rope, 8)):
            angle, size = position * frequency, factor or 1.0
            limit = size * (2 * angle + 3) * 2.0**-24
            assert float(cos_TR2[t, pair]) == pytest.approx(size * math.cos(angle), abs=limit)
            assert float(sin_TR2[t, pair]) == pytest.approx(size * math.sin(angle), abs=limit)


def test_frequencies_are_not_state() -> None:
    rotary = RotaryEmbedding(RopeConfig(), 8, device=torch.device("meta"))
    assert rotary.state_dict() == {}
    rotary.to_empty(device="cpu")
    rotary.inverse_R2.fill_(math.nan)
    rotary.reset()
    assert rotary.inverse_R2.tolist() == pytest.approx(inverse_frequencies(RopeConfig(), 8))
