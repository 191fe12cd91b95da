"""Laws of the floor: it is the planner's arithmetic at a machine's rates, and grows with what is asked."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from shoal.analysis import floor
from shoal.analysis.planner import Load, decode_point
from shoal.config import cost
from shoal.config.families import tiny
from shoal.config.hardware import GPUS

CPU = torch.device("cpu")


def test_rates_of_this_machine_are_those_of_a_machine() -> None:
    """Between 10 MB/s and 100 TB/s, between 10 MFLOP/s and 10 PFLOP/s: a wrong unit is a factor of 1000."""
    assert 1e7 < floor.measure_read(CPU, 1 << 22) < 1e14
    assert 1e7 < floor.measure_flops(CPU, torch.float32) < 1e16


def test_floor_is_the_planners_at_the_rates_it_is_given() -> None:
    config, load = tiny("deepseek-v3"), Load(4, 32, 16, "float32", 32.0)
    slow = replace(
        GPUS["h200"],
        bandwidth=2e9,
        measured_bandwidth=None,
        flops={"bfloat16": 1e9},
        measured_flops={},
    )
    found = floor.floor_on(slow, config, load, 4)
    assert found.step == pytest.approx(decode_point(config, slow, 1, load, 4).floor_s)
    assert found.prefill >= 4 * 32 * cost.flops_per_token(config, 32, "prefill") / 1e9
    assert found.latency(16) == pytest.approx(found.prefill + 15 * found.step)
    more = floor.floor_on(slow, config, load, 8)
    assert more.step > found.step and more.prefill > found.prefill
    # One prompt token reads what a decoding step reads of weights, but for the cache.
    one = replace(load, prompt=1, output=1)
    point = decode_point(config, slow, 1, one, 1)
    fast = replace(slow, flops={"bfloat16": 1e18})
    assert floor.floor_on(fast, config, one, 1).prefill == pytest.approx(point.weight_bytes / 2e9)


def test_a_dtype_without_a_rate_is_refused() -> None:
    with pytest.raises(ValueError, match="floors are known for float32 and bfloat16"):
        floor.find_floor(tiny("deepseek-v3"), CPU, torch.float16, batch=1, prompt=1, tokens=1)
