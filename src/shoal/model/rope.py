"""Rotary angles of a step: from positions to cosines and sines, in each family's frequencies.

The frequencies are a function of the config alone, so they are not state: they are computed again wherever
the model is put, and appear in no checkpoint. The rotation itself is `ops.rope`.

Shape letters: T tokens, R2 pairs of rotated dimensions.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from shoal.config.model import LinearScaling, Llama3Scaling, RopeConfig, YarnScaling


class Angles(NamedTuple):
    cos_TR2: Tensor  # float32, one angle a pair
    sin_TR2: Tensor


def _yarn(frequencies: list[float], dim: int, theta: float, scaling: YarnScaling) -> list[float]:
    """Keep fast pairs, divide slow ones by the factor, ramp between (arXiv 2309.00071, section 3.2)."""

    def pair_turning(rotations: float) -> float:
        """The pair that turns `rotations` times over the original context."""
        original = scaling.original_max_position_embeddings
        return dim * math.log(original / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_turning(scaling.beta_fast)), 0)
    high = min(math.ceil(pair_turning(scaling.beta_slow)), dim - 1)
    span = max(high - low, 0.001)
    ramp = [min(max((pair - low) / span, 0.0), 1.0) for pair in range(len(frequencies))]
    return [f / scaling.factor * r + f * (1.0 - r) for f, r in zip(frequencies, ramp, strict=True)]


def _llama3(frequencies: list[float], scaling: Llama3Scaling) -> list[float]:
    """Stretch wavelengths longer than original / low_freq_factor, keep short ones, blend between."""
    low, high = scaling.low_freq_factor, scaling.high_freq_factor

    def stretch(frequency: float) -> float:
        turns = scaling.original_max_position_embeddings * frequency / (2 * math.pi)
        keep = min(max((turns - low) / (high - low), 0.0), 1.0)
        return frequency * keep + frequency / scaling.factor * (1.0 - keep)

    return [stretch(f) for f in frequencies]


def inverse_frequencies(rope: RopeConfig, dim: int) -> list[float]:
    """Radians a position, for each of the dim / 2 pairs."""
    frequencies = [rope.theta ** (-2 * pair / dim) for pair in range(dim // 2)]
    match rope.scaling:
        case YarnScaling() as scaling:
            return _yarn(frequencies, dim, rope.theta, scaling)
        case Llama3Scaling() as scaling:
            return _llama3(frequencies, scaling)
        case LinearScaling(factor):
            return [f / factor for f in frequencies]
        case None:
            return frequencies


class RotaryEmbedding(nn.Module):
    """Angles for any positions, computed once a step and shared by all layers."""

    inverse_R2: Tensor

    def __init__(self, rope: RopeConfig, dim: int, *, device: torch.device | None) -> None:
        super().__init__()
        self.rope, self.dim = rope, dim
        self.factor = rope.scaling.rotary_factor if isinstance(rope.scaling, YarnScaling) else 1.0
        self.register_buffer("inverse_R2", torch.empty(dim // 2, device=device), persistent=False)
        self.reset()

    def reset(self) -> None:
        """Compute the frequencies where the buffer now lives (needed after leaving the meta device)."""
        if not self.inverse_R2.is_meta:
            self.inverse_R2.copy_(torch.tensor(inverse_frequencies(self.rope, self.dim)))

    def forward(self, positions_T: Tensor) -> Angles:
        angles_TR2 = positions_T.unsqueeze(1) * self.inverse_R2
        cos_TR2, sin_TR2 = angles_TR2.cos(), angles_TR2.sin()
        if self.factor != 1.0:
            cos_TR2, sin_TR2 = cos_TR2 * self.factor, sin_TR2 * self.factor
        return Angles(cos_TR2, sin_TR2)
