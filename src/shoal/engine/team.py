"""Team: the processes that run one engine's model together, each its part of it.

The first holds the engine: it schedules, samples and answers. The others hold a Runner of the same shape
and do what it does, told in small integers: before each call that reaches the model the first one says which
(`tell`), and they make the same call (`Runner.follow`). Token ids may still be on the device when a step goes
out, so those come from there (`share`).

The law: whoever is told does exactly what the first does, in the same order. What only the first one knows
(requests, texts, seeds) nobody is told.
"""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor


class Team(Protocol):
    crowd: int  # processes whose tokens may all come to the experts of one

    def tell(self, call: str, *given: Any) -> None:
        """The first one's next call, to all others."""
        ...

    def hear(self) -> tuple[Any, ...] | None:
        """What the first one told; None at its end."""
        ...

    def share(self, tensor: Tensor) -> Tensor:
        """The first one's values, in everyone's tensor."""
        ...

    def least(self, value: int) -> int:
        """The least of all."""
        ...


class Alone:
    """The team of a whole model."""

    crowd = 1

    def tell(self, call: str, *given: Any) -> None:
        pass

    def hear(self) -> None:
        return None

    def share(self, tensor: Tensor) -> Tensor:
        return tensor

    def least(self, value: int) -> int:
        return value
