"""FP8 products in training, as DeepSeek-V3 does them (arXiv 2412.19437, section 3.3), in part.

`multiply_in_fp8` is f(model) -> model: it swaps the product of every linear and of the experts, and nothing
else. Weights, gradients, the optimizer and checkpoints stay what they were. Forward and the gradient of the
inputs are FP8; the gradient of the weights is not, since there both operands would be quantised anew along
the tokens, which costs more than it saves, by what others report.

Weights do not change between the micro-batches of a step, and need be quantised once for all of them
(`Kept`). The law: a product is that of the weight as it is. What is kept is told from what has changed by the
weight's address and by autograd's count of writes to it, which every update, load and fill raises.

Kept as they are: embedding, head, router, norms, the core of attention, and an indexer, which ranks by small
differences.
"""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from shoal.config.run import Keep
from shoal.model.dsa import Indexer
from shoal.model.layers import Linear, add_biases
from shoal.model.moe import Experts
from shoal.model.transformer import Transformer
from shoal.ops import quantised as ops

Pairs = tuple[ops.Fp8Pair, ...]
State = tuple[tuple[int, int], ...]  # of weights: where each lies, and how often it was written to
TRIALS = 3  # passes before memory is divided: by then one has met gradients that were there before it
USABLE = 0.9  # of the device's memory


def multiply_in_fp8(model: Transformer, keep: Keep = "use") -> Transformer:
    """`keep` is how long a weight in FP8 is kept; the numbers are the same.

    - `use`: not at all; it is quantised for the forward pass, and again for the backward pass.
    - `pass`: once for both, and a byte an element lies from the one to the other.
    - `step`: for as long as the weight stays what it is: two bytes an element all the time. One that is
      gathered anew for each pass, as FSDP2 does it, is quantised as in `use`.
    - `auto`: as in `pass`, and after two micro-batches as in `step` those for which there is room beside the
      most that was allocated.
    """
    kept = Kept(keep, model)
    left: set[nn.Module | None] = {model.lm_head}
    for module in model.modules():
        if isinstance(module, Indexer):
            left.update(module.modules())
    product, grouped = Fp8Product(kept), Fp8Grouped(kept)
    for module in model.modules():
        if module in left:
            continue
        if isinstance(module, Linear):
            module.product = product
        elif isinstance(module, Experts):
            module.product = grouped
    return model


class Kept:
    """Weights in FP8, for as long as `keep` says."""

    def __init__(self, keep: Keep, model: nn.Module) -> None:
        self.keep: Keep = keep
        # By identity: what FSDP2 puts in a parameter's place is none of these, and the count of writes to it
        # does not tell of its gathers.
        self._parameters = {id(p): weakref.ref(p) for p in model.parameters()}
        self._pairs: dict[tuple[int, ...], tuple[State, Pairs]] = {}
        self._met: Counter[tuple[int, ...]] = Counter()  # with a gradient to come, while there is no room yet
        self._room: float | None = None  # bytes that may still be kept; None: not known yet

    def of(self, weights: tuple[Tensor, ...], make: Callable[..., Pairs]) -> Pairs | None:
        """What `make` makes of them; None: whoever multiplies is to quantise them."""
        name, trains = tuple(map(id, weights)), torch.is_grad_enabled()
        if self.keep in ("auto", "step") and all(self._is_parameter(w) for w in weights):
            state: State = tuple((w.data_ptr(), w._version) for w in weights)
            if name in self._pairs and self._pairs[name][0] == state:
                return self._pairs[name][1]
            if name in self._pairs or self.keep == "step" or (trains and self._has_room(name, weights)):
                self._pairs.pop(name, None)  # its memory first
                self._pairs[name] = state, make(*weights)
                return self._pairs[name][1]
        return make(*weights) if trains and self.keep in ("auto", "pass") else None

    def _is_parameter(self, weight: Tensor) -> bool:
        known = self._parameters.get(id(weight))
        return known is not None and known() is weight

    def _has_room(self, name: tuple[int, ...], weights: tuple[Tensor, ...]) -> bool:
        self._met[name] += 1
        if self._met[name] != TRIALS:
            return False
        if self._room is None:
            self._room = _spare_bytes(weights[0].device)
        wanted = 2 * sum(w.numel() for w in weights)
        if wanted > self._room:
            return False
        self._room -= wanted
        return True


def _spare_bytes(device: torch.device) -> float:
    """What of the device's memory this process has not needed yet."""
    if device.type != "cuda":
        return math.inf
    free, _ = torch.cuda.mem_get_info(device)
    whole = free + torch.cuda.memory_reserved(device)
    return USABLE * whole - torch.cuda.max_memory_allocated(device)


def _one_pair(*weights: Tensor) -> Pairs:
    return (ops.fp8_pair(*weights),)


def _expert_pairs(gate_up_E2FD: Tensor, down_EDF: Tensor) -> Pairs:
    return ops.fp8_pair(*gate_up_E2FD.chunk(2, 1)), ops.fp8_pair(down_EDF)


@dataclass(frozen=True, eq=False)
class Fp8Product:
    """Of linears, alone or several of the same rows."""

    kept: Kept

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        (y,) = self._multiply(x, (weight,))
        return y if bias is None else y + bias

    def together(self, x: Tensor, linears: tuple[Linear, ...]) -> tuple[Tensor, ...]:
        return add_biases(self._multiply(x, tuple(linear.weight for linear in linears)), linears)

    def _multiply(self, x: Tensor, weights: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        pairs = self.kept.of(weights, _one_pair)
        return ops.fp8_linears(x, weights, None if pairs is None else pairs[0])


@dataclass(frozen=True, eq=False)
class Fp8Grouped:
    """Of experts."""

    kept: Kept

    def __call__(
        self, x_TD: Tensor, experts_TK: Tensor, weights_TK: Tensor, gate_up_E2FD: Tensor, down_EDF: Tensor
    ) -> Tensor:
        stacks = (gate_up_E2FD, down_EDF)
        pairs = self.kept.of(stacks, _expert_pairs)
        assert pairs is None or len(pairs) == 2
        return ops.fp8_grouped_mlp(x_TD, experts_TK, weights_TK, *stacks, pairs)
