"""Reference of float32 values kept in fewer bits: bfloat16, or 8 bits in blocks of 256, rounded at random.

Stochastic rounding keeps the mean: a step too small for the format moves a value now and then, by the right
amount on average. The bits come from a counter, not from a generator: a hash of (key, step, index), so that
they are the same on every device and nothing of them needs saving.

Two codes of 8 bits. `linear`, for signed values: 127 equal steps up to the block's largest. `log`, for
values >= 0 whose size matters in proportion (a second moment is divided by): 12 steps an octave over 21
octaves below the block's largest; what is smaller is kept as the smallest, never as 0, so that no step
explodes.
"""

from __future__ import annotations

import torch
from torch import Tensor

BLOCK = 256
LOG_STEPS = 12  # an octave: neighbours are 5.9% apart
LOG_SMALLEST, LOG_ZERO = 254, 255
_MASK = 0xFFFFFFFF


def _mix(x: Tensor) -> Tensor:
    """A hash of 32 bits, held in int64."""
    x = ((x ^ (x >> 16)) * 0x7FEB352D) & _MASK
    x = ((x ^ (x >> 15)) * 0x846CA68B) & _MASK
    return x ^ (x >> 16)


def random_bits(count: int, key: int, step: Tensor) -> tuple[Tensor, Tensor]:
    """Two words of 32 random bits for each index, in int64: a function of key, step and index alone."""
    stream = _mix((step.long() * 0x9E3779B9 + key) & _MASK)
    first = _mix(torch.arange(count, device=step.device) ^ stream)
    return first, _mix((first + 0x68E31DA4) & _MASK)


def to_bfloat16(x: Tensor, bits: Tensor) -> Tensor:
    """Up or down with the odds that keep the mean; `bits` are 16 random ones, in int64."""
    return ((x.view(torch.int32) + bits.to(torch.int32)) & -65536).view(torch.float32).bfloat16()


def to_chance(bits: Tensor) -> Tensor:
    """8 random bits as a number in (0, 1), 1/2 on average."""
    return (bits.float() + 0.5) / 256


def _in_blocks(x: Tensor) -> Tensor:
    return torch.nn.functional.pad(x, (0, -x.numel() % BLOCK)).view(-1, BLOCK)


def to_linear(x: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of x (int8) and each block's step; `chance` is uniform in [0, 1)."""
    blocks = _in_blocks(x)
    step = blocks.abs().amax(1) / 127
    codes = (blocks / torch.where(step > 0, step, 1.0).unsqueeze(1)).view(-1)[: x.numel()]
    return (codes + chance).floor().clamp(-127, 127).to(torch.int8), step


def from_linear(codes: Tensor, step: Tensor) -> Tensor:
    return codes.float() * step.repeat_interleave(BLOCK)[: codes.numel()]


def to_log(x: Tensor, chance: Tensor) -> tuple[Tensor, Tensor]:
    """Codes of x >= 0 (uint8) and each block's largest.

    The odds are linear in the logarithm; between neighbours 5.9% apart that moves the mean by 0.05% at most.
    """
    blocks = _in_blocks(x)
    largest = blocks.amax(1)
    share = (blocks / torch.where(largest > 0, largest, 1.0).unsqueeze(1)).view(-1)[: x.numel()]
    code = (chance - LOG_STEPS * share.log2()).floor().clamp(0, LOG_SMALLEST)
    return torch.where(share > 0, code, LOG_ZERO).to(torch.uint8), largest


def from_log(codes: Tensor, largest: Tensor) -> Tensor:
    values = torch.exp2(codes.float() / -LOG_STEPS) * largest.repeat_interleave(BLOCK)[: codes.numel()]
    return torch.where(codes == LOG_ZERO, 0.0, values)


def narrow_load(values: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return values.float()
    decode = from_linear if values.dtype == torch.int8 else from_log
    return decode(values.flatten(), scale).view_as(values)


def narrow_store(values: Tensor, scale: Tensor | None, x: Tensor, key: int, step: Tensor) -> None:
    if values.dtype == torch.float32:
        values.copy_(x)
        return
    bits, _ = random_bits(x.numel(), key, step)
    if values.dtype == torch.bfloat16:
        values.copy_(to_bfloat16(x, (bits & 0xFFFF).view_as(x)))
        return
    assert scale is not None
    encode = to_linear if values.dtype == torch.int8 else to_log
    codes, largest = encode(x.flatten(), to_chance(bits & 0xFF))
    values.copy_(codes.view_as(values))
    scale.copy_(largest)
