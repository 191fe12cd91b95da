"""Lockstep: an engine a process, each with sequences and a cache of its own, over experts that all share out.

A step of one needs the experts of the others, so all step together: the first process says so, with what each
is to add and cancel, and gathers what their requests got. Whoever has nothing to run takes part with no
tokens. Requests go to the process that has the fewest; a server or a script sees one engine.

The law: in a beat every process calls the model exactly once. What a request gets depends neither on its
process nor on what the others do: an unseeded one has its seed from its number among all.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import fields, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from shoal.engine import offline
from shoal.engine.engine import Engine
from shoal.engine.events import Completion, Event, Portion
from shoal.engine.sampling import hash_pair
from shoal.engine.sequence import SamplingParams
from shoal.engine.stats import Stats
from shoal.engine.team import Alone


class Line(Protocol):
    """How the processes speak to the first one."""

    rank: int
    ranks: int

    def tell(self, call: str, *given: Any) -> None: ...

    def hear(self) -> tuple[Any, ...] | None: ...

    def least(self, value: int) -> int: ...

    def collect(self, value: Any) -> list[Any] | None:
        """Of each process, by rank, on the first; None on the others."""
        ...


class Apart(Alone):
    """The team of an engine in lockstep: its runner's calls are its own, its experts everybody's."""

    def __init__(self, line: Line) -> None:
        self.crowd, self._line = line.ranks, line

    def least(self, value: int) -> int:
        return self._line.least(value)


class Order(NamedTuple):
    """What a process is told before it steps."""

    add: list[tuple[int, list[int], SamplingParams]]
    cancel: list[int]


class Place:
    """A process's own engine, and the requests of all that are here, by the numbers that all know."""

    def __init__(self, engine: Engine, line: Line) -> None:
        self.engine, self.line = engine, line
        self._here: dict[int, int] = {}  # by the engine's own numbers
        self._compilers = ThreadPoolExecutor(2, "grammar")
        self._compiling: dict[int, tuple[Future[Any], list[int], SamplingParams]] = {}

    def follow(self) -> None:
        """Do what the first process does, until its end."""
        while (told := self.line.hear()) is not None:
            call, *given = told
            calls: dict[str, Callable[..., Any]] = {
                "beat": self.beat,
                "stats": self.stats,
                "rest": self.rest,
                "warm_up": self.engine.warm_up,
                "forget": self.engine.forget_prefixes,
            }
            calls[call](*given)

    def beat(self, orders: list[Order]) -> list[tuple[list[Portion], bool]] | None:
        """One step of all. On the first process: what each one's requests got, and whether it has more to
        do."""
        order, engine = orders[self.line.rank], self.engine
        for number, ids, params in order.add:
            self._add(number, ids, params)
        for number in order.cancel:
            self._cancel(number)
        for number in [each for each, (compiled, *_) in self._compiling.items() if compiled.done()]:
            compiled, ids, params = self._compiling.pop(number)
            compiled.result()
            self._here[engine.add(ids, params)] = number
        calls = engine.runner.calls
        told = [each._replace(request=self._here[each.request]) for each in engine.run_step()]
        if engine.runner.calls == calls:
            engine.runner.rest()
        assert engine.runner.calls == calls + 1, "a beat is one call of the model"
        ended = {portion.request for portion in told if portion.finish is not None}
        self._here = {own: number for own, number in self._here.items() if number not in ended}
        return self.line.collect((told, engine.busy or bool(self._compiling)))

    def rest(self, calls: int) -> None:
        """The first process calls the model so often for itself."""
        for _ in range(calls):
            self.engine.runner.rest()

    def stats(self) -> list[Stats] | None:
        return self.line.collect(self.engine.stats())

    def _add(self, number: int, ids: list[int], params: SamplingParams) -> None:
        if params.grammar is None:
            self._here[self.engine.add(ids, params)] = number
        else:  # nobody waits for its grammar
            compiled = self._compilers.submit(self.engine.admission.prepare, params)
            self._compiling[number] = compiled, ids, params

    def _cancel(self, number: int) -> None:
        if number in self._compiling:
            compiled, ids, params = self._compiling.pop(number)
            compiled.result()
            self._here[self.engine.add(ids, params)] = number
        for own, known in self._here.items():
            if known == number:
                self.engine.cancel(own)
                return


class Lockstep:
    """The engines of all processes as one: held by the first, with the face of an `Engine`."""

    def __init__(self, place: Place) -> None:
        engine = place.engine
        self._place, self._line = place, place.line
        self.config, self.settings, self.ledger = engine.config, engine.settings, engine.ledger
        self.pool, self.runner, self.admission = engine.pool, engine.runner, engine.admission
        self.places = place.line.ranks
        self._where: dict[int, int] = {}  # of the requests that live
        self._orders = self._no_orders()
        self._busy = False
        self._num_requests = 0

    @property
    def busy(self) -> bool:
        return self._busy

    def add(self, ids: list[int], params: SamplingParams) -> int:
        """As `Engine.add`."""
        request = self._num_requests
        if params.seed is None:
            params = params.seeded(hash_pair(self.settings.seed, request))
        self._place.engine.check(ids, params)
        counts = [0] * self.places
        for rank in self._where.values():
            counts[rank] += 1
        rank = counts.index(min(counts))
        self._orders[rank].add.append((request, list(ids), params))
        self._where[request] = rank
        self._num_requests += 1
        self._busy = True
        return request

    def cancel(self, request: int) -> bool:
        """As `Engine.cancel`."""
        rank = self._where.get(request)
        if rank is None:
            return False
        if request not in self._orders[rank].cancel:
            self._orders[rank].cancel.append(request)
        return True

    def step(self) -> list[Event]:
        """As `Engine.step`: each process runs the model once."""
        return [event for portion in self.run_step() for event in portion.events()]

    def run_step(self) -> list[Portion]:
        """As `Engine.run_step`."""
        orders, self._orders = self._orders, self._no_orders()
        self._line.tell("beat", orders)
        each = self._place.beat(orders)
        assert each is not None
        told = [portion for own, _ in each for portion in own]
        for portion in told:
            if portion.finish is not None:
                del self._where[portion.request]
        self._busy = any(busy for _, busy in each)
        return told

    def warm_up(self, tell: Callable[[str], None] = lambda what: None) -> None:
        self._line.tell("warm_up")
        self._place.engine.warm_up(tell)

    def stats(self, *, wait: bool = True) -> Stats:
        """The sums over all processes; of steps and their time the most, as all step together. They meet for
        it, so it waits for all of them anyway, whatever `wait` says."""
        self._line.tell("stats")
        each = self._place.stats()
        assert each is not None
        first, sums = each[0], {}
        for name in (field.name for field in fields(Stats)):
            values = [getattr(stats, name) for stats in each]
            if isinstance(values[0], Tensor):
                sums[name] = torch.stack(values).sum(0)
            elif isinstance(values[0], int | float):
                sums[name] = max(values) if name.startswith("step") else sum(values)
        return replace(first, **sums)

    def generate(
        self, prompts: list[list[int]], params: SamplingParams | list[SamplingParams]
    ) -> list[Completion]:
        """As `Engine.generate`."""
        return offline.generate(self, prompts, params)

    def score(self, ids: list[int], routing: Tensor | None = None) -> list[float]:
        """As `Engine.score`, read by the first process."""
        engine, length = self._place.engine, len(ids) - 1
        engine.check_score(ids, routing)
        self._line.tell("rest", -(-length // self.settings.max_batch_tokens))
        return engine.score(ids, routing)

    def forget_prefixes(self) -> None:
        self._line.tell("forget")
        self._place.engine.forget_prefixes()

    def _no_orders(self) -> list[Order]:
        return [Order([], []) for _ in range(self.places)]
