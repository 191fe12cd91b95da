"""Where the experts of a layer live: which GPU holds which, with copies of the busy ones (EPLB's task).

Hierarchical, where experts are in groups and nodes divide the groups: 1. groups go to nodes, heaviest first,
each to the lightest node with room, so that a token limited to few groups crosses few links; 2. within a node
the expert with the most tokens a copy gets another copy, until every slot is used; 3. copies go to the node's
GPUs, heaviest first, each to the lightest with room; 4. what the greedy rule left uneven is mended by swaps
of two copies that lighten the heavier GPU of a pair. Global is the same with one node.

The law: an expert has one copy at least, a GPU as many as its neighbour, and a copy carries an equal share.
Policy after DeepSeek's description of EPLB (arXiv 2412.19437, section 3.4); steps 1 to 3 are its.

Shape letters: E experts, G GPUs, S slots of a GPU.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Placement:
    """Of one layer."""

    slots_GS: tuple[tuple[int, ...], ...]  # the expert in each slot
    copies_E: tuple[int, ...]
    load_G: tuple[float, ...]
    bound: float  # no placement on as many slots loads its fullest GPU with less

    @property
    def balance(self) -> float:
        """Mean load of a GPU over the largest: 1 where all work alike."""
        top = max(self.load_G)
        return 1.0 if top == 0 else sum(self.load_G) / len(self.load_G) / top

    @property
    def over_bound(self) -> float:
        """The largest load over the bound, 1 at best."""
        return 1.0 if self.bound == 0 else max(self.load_G) / self.bound


def place(
    load_E: Sequence[float], gpus: int, slots: int | None = None, *, groups: int = 1, nodes: int = 1
) -> Placement:
    """Place experts of this load on `gpus`, with `slots` for copies in all (by default one an expert).

    Groups are equal blocks of experts; they bind only if nodes divide them. ValueError names what does not
    divide.
    """
    experts = len(load_E)
    slots = experts if slots is None else slots
    _check(load_E, gpus, slots, groups, nodes)
    if groups % nodes:
        nodes = 1  # the global policy: groups cannot be kept together
    # 1. Groups to nodes.
    size = experts // groups
    weights = [sum(load_E[group * size : (group + 1) * size]) for group in range(groups)]
    by_node = pack(weights, nodes) if nodes > 1 else [list(range(groups))]
    placed: list[tuple[int, ...]] = []
    copies_E = [0] * experts
    for members in by_node:
        own = sorted(group * size + n for group in members for n in range(size))
        # 2. Copies, within the node.
        copies = replicate([load_E[expert] for expert in own], slots // nodes)
        for expert, count in zip(own, copies, strict=True):
            copies_E[expert] = count
        held = [expert for expert, count in zip(own, copies, strict=True) for _ in range(count)]
        # 3 and 4. Copies to GPUs.
        each = [load_E[expert] / copies_E[expert] for expert in held]
        bins = mend(pack(each, gpus // nodes), each)
        placed += [tuple(sorted(held[item] for item in items)) for items in bins]
    load_G = tuple(sum(load_E[expert] / copies_E[expert] for expert in slots_S) for slots_S in placed)
    return Placement(tuple(placed), tuple(copies_E), load_G, lower_bound(load_E, gpus, slots))


def lower_bound(load_E: Sequence[float], gpus: int, slots: int) -> float:
    """The fullest GPU has at least the mean, and at least the largest copy, which greedy copying makes
    smallest.
    """
    copies = replicate(load_E, slots)
    return max(sum(load_E) / gpus, *(load / count for load, count in zip(load_E, copies, strict=True)))


def replicate(load_E: Sequence[float], slots: int) -> list[int]:
    """Copies of each expert: one, and each further one to whoever carries most a copy (of two, the lower)."""
    copies = [1] * len(load_E)
    queue = [(-load, expert) for expert, load in enumerate(load_E)]
    heapq.heapify(queue)
    for _ in range(slots - len(load_E)):
        _, expert = heapq.heappop(queue)
        copies[expert] += 1
        heapq.heappush(queue, (-load_E[expert] / copies[expert], expert))
    return copies


def pack(weights: Sequence[float], bins: int) -> list[list[int]]:
    """Items into bins of equally many: heaviest first, each to the lightest bin with room."""
    room = len(weights) // bins
    packed: list[list[int]] = [[] for _ in range(bins)]
    queue = [(0.0, number) for number in range(bins)]
    for item in sorted(range(len(weights)), key=lambda item: (-weights[item], item)):
        load, number = heapq.heappop(queue)
        packed[number].append(item)
        if len(packed[number]) < room:
            heapq.heappush(queue, (load + weights[item], number))
    return packed


def mend(bins: list[list[int]], weights: Sequence[float]) -> list[list[int]]:
    """Swap an item of the heaviest bin with a lighter one elsewhere while that lightens the heavier bin."""
    bins = [list(items) for items in bins]
    loads = [sum(weights[item] for item in items) for items in bins]
    while True:
        top = max(range(len(bins)), key=lambda number: loads[number])
        best, found = 0.0, None
        for number, items in enumerate(bins):
            gap = loads[top] - loads[number]
            for there, theirs in enumerate(items):
                for here, ours in enumerate(bins[top]):
                    moved = weights[ours] - weights[theirs]
                    gain = min(moved, gap - moved)  # what the heavier of the two loses
                    if gain > best + 1e-12 * loads[top]:
                        best, found = gain, (number, here, there, moved)
        if found is None:
            return bins
        number, here, there, moved = found
        bins[top][here], bins[number][there] = bins[number][there], bins[top][here]
        loads[top] -= moved
        loads[number] += moved


def _check(load_E: Sequence[float], gpus: int, slots: int, groups: int, nodes: int) -> None:
    experts = len(load_E)
    if min(gpus, groups, nodes) < 1:
        raise ValueError(f"gpus {gpus}, groups {groups} and nodes {nodes} must all be 1 or more")
    if not experts or min(load_E) < 0:
        raise ValueError("a load is a list of numbers, one an expert, none below 0")
    if slots < experts:
        raise ValueError(f"{slots} slots cannot hold {experts} experts; use {experts} or more")
    for name, value, by, divisor in (
        ("slots", slots, "GPUs", gpus),
        ("experts", experts, "groups", groups),
        ("GPUs", gpus, "nodes", nodes),
    ):
        if value % divisor:
            near = -(-value // divisor) * divisor
            raise ValueError(f"{value} {name} cannot be shared by {divisor} {by}; use {near} {name}")
