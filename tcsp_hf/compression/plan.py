"""How small each part becomes: sizes, what they cost, and one greedy search over all parts.

A part is whatever can shrink alone: the width of a stream (of each site of a BERT, of each stack of a T5), the neurons
of a feed-forward network, the heads of an attention block and the query/key and value/output sizes of its heads.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..errors import TCSPError

AXES = ("hidden", "filters", "heads")
PARTS = {"hidden": ("hidden",), "filters": ("filters",), "heads": ("heads", "qk", "vo")}
"""Axis -> the lists of `Sizes` that it shrinks."""
_HEAD_STEP = 4
_FILTER_STEPS = 96
_ALIGNED = 8
_SMALLEST_HIDDEN = 16
_DOOMED = 0.5  # of the neurons that go: the more, the faster the refit, which chooses better than the search


def filter_step(neurons: int) -> int:
    """How many of a feed-forward network's neurons go at a time: a multiple of 8, which run faster, but for few."""
    step = max(1, neurons // _FILTER_STEPS)
    return step if step <= _ALIGNED // 2 or neurons % _ALIGNED else round(step / _ALIGNED) * _ALIGNED


@dataclass
class Sizes:
    """What to leave.

    Attributes:
        hidden: widths: of every site (BERT), of every subspace (T5: one, or encoder's and decoder's).
        filters: neurons of every feed-forward network, in the order of the forward pass.
        heads: heads of every attention block, in the order of the forward pass; `qk` and `vo` the sizes of one head.
        doomed: neurons of every feed-forward network that go in any case; among the others the refit chooses.
    """

    hidden: list[int]
    filters: list[int]
    heads: list[int]
    qk: list[int]
    vo: list[int]
    doomed: list[list[int]] = field(default_factory=list)

    def copy(self) -> "Sizes":
        doomed = [list(neurons) for neurons in self.doomed]
        return Sizes(list(self.hidden), list(self.filters), list(self.heads), list(self.qk), list(self.vo), doomed)

    def candidates(self, number: int, neurons: int) -> list[int]:
        """Which of a feed-forward network's neurons the refit may keep, ascending."""
        doomed = set(self.doomed[number]) if self.doomed else set()
        return [neuron for neuron in range(neurons) if neuron not in doomed]


@dataclass
class LossCurves:
    """Predicted loss (nats per sequence) by size: `curve[size]` with size from 0 to the dense size.

    One list of curves for each list of `Sizes`.

    Attributes:
        order: neurons of every feed-forward network in the order in which the search took them out (indices); the
            last ones, or all, may be missing.
    """

    hidden: list[np.ndarray] = field(default_factory=list)
    filters: list[np.ndarray] = field(default_factory=list)
    heads: list[np.ndarray] = field(default_factory=list)
    qk: list[np.ndarray] = field(default_factory=list)
    vo: list[np.ndarray] = field(default_factory=list)
    order: list[list[int]] = field(default_factory=list)

    def attention(self, number: int, sizes: Sizes) -> float:
        """Loss of one attention block: the heads that go, and the smaller sizes of those that stay."""
        heads = sizes.heads[number]
        share = heads / (len(self.heads[number]) - 1)
        narrower = float(self.qk[number][sizes.qk[number]] + self.vo[number][sizes.vo[number]])
        return float(self.heads[number][heads]) + share * narrower

    def of(self, sizes: Sizes) -> float:
        """Predicted loss of a result with these sizes."""
        total = sum(float(curve[size]) for curve, size in zip(self.hidden, sizes.hidden, strict=True))
        total += sum(float(curve[size]) for curve, size in zip(self.filters, sizes.filters, strict=True))
        return total + sum(self.attention(i, sizes) for i in range(len(self.heads)))

    def doomed(self, sizes: Sizes, neurons: int) -> list[list[int]]:
        """`Sizes.doomed`: the first of those that go, in the order of the search."""
        counts = [int(_DOOMED * (neurons - left)) for left in sizes.filters]
        return [order[:count] for order, count in zip(self.order, counts, strict=True)]


@dataclass(frozen=True)
class BlockShape:
    """A residual block, for counting.

    Attributes:
        attends: attention, or else a feed-forward network.
        number: its index in `Sizes.heads` (`qk`, `vo`) or in `Sizes.filters`.
        reads, memory, writes: indices in `Sizes.hidden` of what it reads, what its keys and values read, and of the
            site that it writes to.
        inner: linears that read (2 in a gated feed-forward network).
        tokens, keys: tokens of a sequence that pass it, and that they attend to.
    """

    attends: bool
    number: int
    reads: int
    memory: int
    writes: int
    inner: int
    tokens: float
    keys: float


@dataclass(frozen=True)
class Costs:
    """Counts parameters (embeddings apart) and floating-point operations of a result.

    Attributes:
        full, heads, head_size, neurons: the dense model's sizes.
        blocks: in the order of the forward pass.
        bias: whether linears have biases. `maps`: whether blocks have residual maps (BERT).
        fixed: parameters elsewhere; `per_hidden` those for every entry of a width.
    """

    full: int
    heads: int
    head_size: int
    neurons: int
    widths: int
    blocks: tuple[BlockShape, ...]
    bias: bool
    maps: bool
    fixed: int = 0
    per_hidden: tuple[int, ...] = ()

    def dense(self) -> Sizes:
        """The dense model's own sizes."""
        attention = sum(block.attends for block in self.blocks)
        return Sizes(
            [self.full] * self.widths,
            [self.neurons] * (len(self.blocks) - attention),
            [self.heads] * attention,
            [self.head_size] * attention,
            [self.head_size] * attention,
        )

    def _map(self, block: BlockShape, sizes: Sizes) -> tuple[int, int]:
        """Parameters, and products, of the residual map."""
        if not self.maps:
            return 0, 0
        a, c = sizes.hidden[block.reads], sizes.hidden[block.writes]
        return (self.full, 0) if a == c == self.full else (a * c, a * c)

    def block_parameters(self, block: BlockShape, sizes: Sizes) -> int:
        a, m, c = sizes.hidden[block.reads], sizes.hidden[block.memory], sizes.hidden[block.writes]
        one = int(self.bias)
        total = c + self._map(block, sizes)[0]  # the norm's weight
        if not block.attends:
            neurons = sizes.filters[block.number]
            return total + block.inner * neurons * (a + one) + (neurons + one) * c
        heads, qk, vo = sizes.heads[block.number], sizes.qk[block.number], sizes.vo[block.number]
        return total + heads * (qk * (a + one) + (qk + vo) * (m + one)) + (heads * vo + one) * c

    def block_flops(self, block: BlockShape, sizes: Sizes) -> float:
        a, m, c = sizes.hidden[block.reads], sizes.hidden[block.memory], sizes.hidden[block.writes]
        products = float(self._map(block, sizes)[1])
        if not block.attends:
            neurons = sizes.filters[block.number]
            return 2.0 * block.tokens * (products + neurons * (block.inner * a + c))
        heads, qk, vo = sizes.heads[block.number], sizes.qk[block.number], sizes.vo[block.number]
        products += heads * (qk * a + vo * c + (qk + vo) * block.keys)
        return 2.0 * (block.tokens * products + block.keys * heads * (qk + vo) * m)

    def parameters(self, sizes: Sizes) -> int:
        """Non-embedding parameters of a result."""
        total = self.fixed + sum(a * k for a, k in zip(self.per_hidden, sizes.hidden, strict=True))
        return total + sum(self.block_parameters(block, sizes) for block in self.blocks)

    def flops(self, sizes: Sizes) -> float:
        """Floating-point operations of the blocks for one mean calibration sequence (two for a multiply-add)."""
        return sum(self.block_flops(block, sizes) for block in self.blocks)


@dataclass
class _Move:
    """One part that may shrink: entry `index` of `values`, by `step`, not below `least`."""

    kind: str
    values: list[int]
    indices: list[int]
    step: int
    least: int


class _Search:
    """Sizes that shrink step by step; prices are kept and only those next to a change are worked out again."""

    def __init__(
        self,
        curves: LossCurves,
        costs: Costs,
        axes: Sequence[str],
        multiple_of: int,
        uniform: bool,
        by_flops: bool,
        start: Sizes,
        movable: Sequence[Sequence[int]],
    ) -> None:
        """movable: groups of entries of `Sizes.hidden` that may shrink, each group as one."""
        self.curves, self.costs, self.sizes = curves, costs, start
        self._block_cost: Callable[[BlockShape, Sizes], float] = (
            costs.block_flops if by_flops else costs.block_parameters
        )
        self._by_flops = by_flops
        self.cost: float = costs.flops(start) if by_flops else costs.parameters(start)
        self._moves: list[_Move] = []
        for axis in AXES:
            for kind in PARTS[axis] if axis in axes else ():
                values = getattr(start, kind)
                step, least = _step(kind, costs, multiple_of)
                every = list(range(len(values)))
                groups = movable if kind == "hidden" else [every] if uniform else [[i] for i in every]
                self._moves += [_Move(kind, values, list(group), step, least) for group in groups if group]
        self._touched = [self._blocks_of(move) for move in self._moves]
        self._prices = [self._price(i) for i in range(len(self._moves))]
        touching = [{id(block) for block in touched} for touched in self._touched]
        self._near = [[j for j, other in enumerate(touching) if other & mine] for mine in touching]

    def _blocks_of(self, move: _Move) -> list[BlockShape]:
        if move.kind == "hidden":
            chosen = set(move.indices)
            return [b for b in self.costs.blocks if chosen & {b.reads, b.memory, b.writes}]
        attends = move.kind != "filters"
        return [b for b in self.costs.blocks if b.attends == attends and b.number in move.indices]

    def _state(self, i: int) -> tuple[float, float]:
        """Cost and loss of everything that move `i` touches."""
        move = self._moves[i]
        cost = sum(self._block_cost(block, self.sizes) for block in self._touched[i])
        if move.kind == "hidden":
            if not self._by_flops:
                cost += sum(self.costs.per_hidden[j] * move.values[j] for j in move.indices)
            return cost, sum(float(self.curves.hidden[j][move.values[j]]) for j in move.indices)
        if move.kind == "filters":
            return cost, sum(float(self.curves.filters[j][move.values[j]]) for j in move.indices)
        return cost, sum(self.curves.attention(j, self.sizes) for j in move.indices)

    def _shift(self, i: int, step: int) -> None:
        for j in self._moves[i].indices:
            self._moves[i].values[j] += step

    def _price(self, i: int) -> tuple[float, float]:
        """Loss per unit of cost saved, and the saving; infinite where nothing can go."""
        move = self._moves[i]
        value = move.values[move.indices[0]]
        step = value - max(move.least, (value - 1) // move.step * move.step)
        if step <= 0:
            return float("inf"), 0.0
        saved, lost = self._difference(i, -step)
        return (lost / saved, saved) if saved > 0 else (float("inf"), 0.0)

    def _difference(self, i: int, step: int) -> tuple[float, float]:
        """Cost saved and loss added by a step of move `i`."""
        cost, loss = self._state(i)
        self._shift(i, step)
        after_cost, after_loss = self._state(i)
        self._shift(i, -step)
        return cost - after_cost, after_loss - loss

    def shrink(self, goal: float) -> None:
        """Take the cheapest step until the cost is at most `goal` or nothing can go; then give back what fits."""
        while self.cost > goal:
            i = min(range(len(self._prices)), key=lambda j: self._prices[j][0], default=-1)
            if i < 0 or self._prices[i][0] == float("inf"):
                return
            move = self._moves[i]
            value = move.values[move.indices[0]]
            self._shift(i, max(move.least, (value - 1) // move.step * move.step) - value)
            self.cost -= self._prices[i][1]
            for j in self._near[i]:
                self._prices[j] = self._price(j)
        self._give_back(goal)

    def _give_back(self, goal: float) -> None:
        """Grow the parts again whose growth helps most for its cost, as long as the goal is kept."""
        while True:
            best: tuple[float, int, int, float] | None = None
            for i, move in enumerate(self._moves):
                value = move.values[move.indices[0]]
                step = min(move.step, self._limit(move) - value)
                if step <= 0:
                    continue
                saved, lost = self._difference(i, step)
                if saved < 0 and self.cost - saved <= goal and (best is None or lost / -saved < best[0]):
                    best = (lost / -saved, i, step, -saved)
            if best is None or best[0] >= 0.0:
                return
            self._shift(best[1], best[2])
            self.cost += best[3]

    def _limit(self, move: _Move) -> int:
        full = {"hidden": self.costs.full, "filters": self.costs.neurons, "heads": self.costs.heads}
        most = full.get(move.kind, self.costs.head_size)
        # a site of the dense width next to others would change what residual maps cost: that is the prefix's choice
        return (most - 1) // move.step * move.step if move.kind == "hidden" and self.costs.maps else most


def _step(kind: str, costs: Costs, multiple_of: int) -> tuple[int, int]:
    """By how much a part shrinks at a time, and the smallest size."""
    if kind == "hidden":
        return multiple_of, min(-(-_SMALLEST_HIDDEN // multiple_of) * multiple_of, costs.full)
    if kind == "filters":
        step = filter_step(costs.neurons)
        return step, step
    if kind == "heads":
        return 1, 1
    step = min(_HEAD_STEP, max(1, costs.head_size // 2))
    return step, step


def allocate(
    curves: LossCurves,
    costs: Costs,
    goal: float,
    axes: Sequence[str],
    multiple_of: int,
    uniform: bool = False,
    by_flops: bool = False,
) -> Sizes:
    """Sizes that cost at most `goal` at the least predicted loss, found greedily.

    Parts shrink step by step, the one with the least loss per saved cost first; what the last step saved too much is
    given back.

    Args:
        goal: non-embedding parameters, or with `by_flops` floating-point operations of a mean calibration sequence.
        uniform: one width, and one size of each kind for all blocks.

    Raises:
        TCSPError: the goal cannot be reached; the message names what the smallest result leaves.
    """
    best: tuple[float, Sizes] | None = None
    smallest = float("inf")
    for start, movable in _starts(costs, axes, multiple_of, uniform):
        search = _Search(curves, costs, axes, multiple_of, uniform, by_flops, start, movable)
        search.shrink(goal)
        smallest = min(smallest, search.cost)
        if search.cost <= goal:
            loss = curves.of(search.sizes)
            if best is None or loss < best[0]:
                best = (loss, search.sizes)
    if best is None:
        dense = costs.dense()
        whole: Any = costs.flops(dense) if by_flops else costs.parameters(dense)
        what = "FLOPs" if by_flops else "parameters (embeddings apart)"
        raise TCSPError(
            f"The budget cannot be reached with axes {tuple(axes)}: the smallest possible result keeps "
            f"{smallest / whole:.3f} of the dense model's {what}, {goal / whole:.3f} was asked for."
        )
    return best[1]


def _starts(
    costs: Costs, axes: Sequence[str], multiple_of: int, uniform: bool
) -> Iterator[tuple[Sizes, list[list[int]]]]:
    """Where to search from, and which widths may shrink from there.

    One width for all is tried at every value. Sites with widths of their own need no residual maps among the leading
    ones that keep the dense width: how many these are is tried out.
    """
    if "hidden" not in axes:
        yield costs.dense(), []
        return
    step, least = _step("hidden", costs, multiple_of)
    every = list(range(costs.widths))
    below = (costs.full - 1) // multiple_of * multiple_of
    if uniform or costs.widths == 1:
        for width in [costs.full, *range(below, least - 1, -step)]:
            start = costs.dense()
            start.hidden[:] = [width] * costs.widths
            yield start, []
        return
    for prefix in range(costs.widths + 1) if costs.maps else [0]:
        start = costs.dense()
        if costs.maps and below >= 1:
            start.hidden[prefix:] = [below] * (costs.widths - prefix)
        yield start, [[i] for i in every[prefix:]]
