"""How small each part may become: predicted loss of every size of every part, and one greedy search over all.

The loss is the second-order (Fisher) estimate of the KL divergence to the dense model,
`½ E[(sum over tokens of g'δ)²]`, with the errors δ of different tokens and parts taken as independent: so it adds up,
and it is compared per parameter saved. What each part loses when cut alone, with the others re-solved, comes from the
same normal equations as the refit, on the dense model's own activations.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..errors import TCSPError
from .filters import drop_inputs
from .heads import inverse_root, score_moments
from .least_squares import NormalEquations
from .refit_bert import BertRefit, BertSizes
from .streams import PackedSample, Stream
from .subspace import balanced_spectrum, pca_spectrum, symmetric_root

AXES = ("hidden", "filters", "heads")
_SUBSAMPLE = 3
_METRIC_EPSILON = 0.3
_HIDDEN_SCALE = 1 / 3  # the refit repairs about two thirds of what a narrower site loses (measured on one model)
_HEAD_STEP = 4
_FILTER_STEPS = 96  # a feed-forward network shrinks by this fraction of its neurons at a time
_SMALLEST_HIDDEN = 16


@dataclass
class LossCurves:
    """Predicted loss (nats per sequence) by size: `curve[size]`, size from 0 to the dense size.

    Attributes:
        hidden: one curve per site.
        filters, qk, vo: one curve per layer.
    """

    hidden: list[np.ndarray] = field(default_factory=list)
    filters: list[np.ndarray] = field(default_factory=list)
    qk: list[np.ndarray] = field(default_factory=list)
    vo: list[np.ndarray] = field(default_factory=list)

    def of(self, sizes: BertSizes) -> float:
        """Predicted loss of a result with these sizes."""
        pairs = (
            (self.hidden, sizes.sites),
            (self.filters, sizes.intermediate),
            (self.qk, sizes.qk),
            (self.vo, sizes.vo),
        )
        return float(sum(curve[size] for curves, chosen in pairs for curve, size in zip(curves, chosen, strict=True)))


class _CurveWalk(BertRefit):
    """Walks the dense model (nothing cut) and reads off what cutting each part would lose."""

    def measure(self, axes: Sequence[str]) -> LossCurves:
        curves = LossCurves()
        per_sequence = 0.5 * self.sample.tokens / max(1, self.sample.sequences)
        for name in self.site_names:
            curves.hidden.append(_HIDDEN_SCALE * per_sequence * self._hidden_curve(name))
        with torch.no_grad(), self.bar:
            _, dense, carried = self._embeddings({})
            for layer in range(self.layers):
                scores, values, next_dense = self._attention_curves(layer, dense, "heads" in axes)
                curves.qk.append(per_sequence * scores)
                curves.vo.append(per_sequence * values)
                self.bar.update(1)
                neurons, dense = self._filter_curve(layer, next_dense, "filters" in axes)
                curves.filters.append(per_sequence * neurons)
                self.bar.update(1)
        carried.close()
        return curves

    def _hidden_curve(self, name: str) -> np.ndarray:
        """Energy that k directions leave out, weighed by Gamma; for k = 0 .. D."""
        site = self.stats.sites[name]
        mean = 1.0
        if site.fisher_sum is None:
            values = pca_spectrum(site.second_moment).values
        else:
            mean = float(site.fisher.trace()) / self.full / (1.0 + self.epsilon)
            values = balanced_spectrum(site.second_moment, site.fisher, self.epsilon).values
        tail = values.flip(0).cumsum(0).flip(0)
        return mean * torch.cat([tail, tail.new_zeros(1)]).numpy()

    def _root(self, site: int) -> torch.Tensor:
        """Square root of Gamma, with a floor, in its own units."""
        statistics = self.stats.sites[self.site_names[site]]
        if statistics.fisher_sum is None:
            return torch.eye(self.full, dtype=torch.float64)
        fisher = statistics.fisher
        floor = _METRIC_EPSILON * float(fisher.trace()) / self.full
        identity = torch.eye(self.full, dtype=torch.float64)
        return symmetric_root((fisher + floor * identity) / (1.0 + _METRIC_EPSILON)).to(self.device)

    def _chosen(self) -> set[int]:
        step = _SUBSAMPLE if self.sample.tokens > 4 * self.full * _SUBSAMPLE else 1
        return set(range(0, len(self.sample.groups), step))

    def _attention_curves(self, layer: int, dense: Stream, wanted: bool) -> tuple[np.ndarray, np.ndarray, Stream]:
        site, name = 2 * layer, f"encoder.layer.{layer}.attention"
        readings = [self._reading(f"{name}.self.{part}", site) for part in ("query", "key", "value")]
        output = self._linear(f"{name}.output.dense")
        gamma, beta = self._norm(site)
        next_dense = self._stream(self.full)
        size = self.head_size
        moments = [torch.zeros(self.heads, size, size, dtype=torch.float64) for _ in range(2)]
        equations = NormalEquations.zeros(2 * self.full, 1, self.device)
        measured = self._chosen() if wanted else set()
        for index, group in enumerate(self._groups()):
            stream = self._read(dense, group)
            query, key, value = (nn.functional.linear(stream, *reading) for reading in readings)
            context = self._attend(query, key, value, group)
            normalised, scale = self._normalise(nn.functional.linear(context, *output) + gamma * stream + beta)
            next_dense.write(group.rows, normalised)
            if index in measured:
                parts = score_moments(self._split(query, group), self._split(key, group), self.scaling)
                for total, part in zip(moments, parts, strict=True):
                    total += part.cpu()
                weights = self._token_weights(site + 1, group.rows) / scale.squeeze(1).square()
                nothing = torch.zeros_like(scale)
                equations.add([context, stream], nothing, weights, torch.zeros_like(weights, dtype=torch.bool))
        dense.close()
        scores = values = np.zeros(size + 1)
        if wanted:
            tokens = max(1.0, sum(self.sample.groups[i].count * self.sample.groups[i].length for i in measured))
            scores = self._score_curve(site + 1, [moment / tokens for moment in moments])
            values = self._value_curve(site + 1, equations, output[0], tokens)
        return scores, values, next_dense

    def _score_curve(self, site: int, moments: list[torch.Tensor]) -> np.ndarray:
        statistics = self.stats.sites[self.site_names[site]]
        size = self.head_size
        identity = torch.eye(size, dtype=torch.float64)
        if statistics.query_fisher_sum is None:
            gradient = identity.expand(self.heads, size, size)
        else:
            gradient = statistics.query_fisher_sum / statistics.tokens
            floor = _METRIC_EPSILON * gradient.diagonal(dim1=1, dim2=2).mean(-1)[:, None, None]
            gradient = (gradient + floor * identity) / (1.0 + _METRIC_EPSILON)
        query_root, _ = inverse_root(moments[0])
        key_root, key_inverse = inverse_root(moments[1])
        _, _, right = torch.linalg.svd(query_root @ key_root)
        curve = torch.zeros(size + 1, dtype=torch.float64)
        for kept in range(1, size):
            lost = identity - key_inverse @ right[:, :kept].mT @ right[:, :kept] @ key_root
            curve[kept] = (gradient * (lost @ moments[0] @ lost.mT)).sum()
        curve[0] = 2.0 * curve[1]
        return np.maximum.accumulate(curve.flip(0).numpy())[::-1].copy()

    def _value_curve(self, site: int, equations: NormalEquations, output: torch.Tensor, tokens: float) -> np.ndarray:
        moments = equations.total[0] / tokens
        diagonal = moments.diagonal()
        damping = 1e-4 * diagonal.clamp(min=1e-8 * float(diagonal.mean()))
        inverse = torch.linalg.inv(moments + torch.diag(damping))
        weights = self._root(site) @ (output - output.mean(0)).double()
        curve = torch.zeros(self.head_size + 1, dtype=torch.float64)
        for head in range(self.heads):
            mine = slice(head * self.head_size, (head + 1) * self.head_size)
            conditional = symmetric_root(torch.linalg.inv(inverse[mine, mine]))
            losses = torch.linalg.svdvals(weights[:, mine] @ conditional).square()
            curve[:-1] += losses.flip(0).cumsum(0).flip(0).cpu()
        return curve.numpy()

    def _filter_curve(self, layer: int, dense: Stream, wanted: bool) -> tuple[np.ndarray, Stream]:
        site, name = 2 * layer + 1, f"encoder.layer.{layer}"
        reading = self._reading(f"{name}.intermediate.dense", site)
        output = self._linear(f"{name}.output.dense")
        gamma, beta = self._norm(site)
        next_dense = self._stream(self.full)
        equations = NormalEquations.zeros(self.neurons + self.full, 1, self.device)
        measured = self._chosen() if wanted else set()
        for index, group in enumerate(self._groups()):
            stream = self._read(dense, group)
            neurons = self.activation(nn.functional.linear(stream, *reading))
            normalised, scale = self._normalise(nn.functional.linear(neurons, *output) + gamma * stream + beta)
            next_dense.write(group.rows, normalised)
            if index in measured:
                weights = self._token_weights(site + 1, group.rows) / scale.squeeze(1).square()
                nothing = torch.zeros_like(scale)
                equations.add([neurons, stream], nothing, weights, torch.zeros_like(weights, dtype=torch.bool))
        dense.close()
        curve = np.zeros(self.neurons + 1)
        if wanted:
            tokens = max(1.0, sum(self.sample.groups[i].count * self.sample.groups[i].length for i in measured))
            weight = (output[0] - output[0].mean(0)).double()
            residual = torch.diag(gamma).double()
            whole = torch.cat([weight, residual - residual.mean(0), torch.zeros(self.full, 1).to(weight)], dim=1)
            smallest = filter_step(self.neurons)
            block = max(1, self.neurons // 48)
            _, points = drop_inputs(
                equations.total[0] / tokens, self._root(site + 1) @ whole, self.neurons, smallest, block
            )
            left = [float(count) for count, _ in points][::-1]
            loss = [value for _, value in points][::-1]
            curve = np.interp(np.arange(self.neurons + 1), left, loss)
        return curve, next_dense


def loss_curves(
    dense: PreTrainedModel,
    stats: Calibration,
    sample: PackedSample,
    subspace: str,
    epsilon: float,
    axes: Sequence[str],
    progress: bool | None = None,
) -> LossCurves:
    """Predicted losses of every size of the parts that `axes` names."""
    return _CurveWalk(dense, stats, sample, full_sizes(dense), subspace, epsilon, progress).measure(axes)


def full_sizes(dense: PreTrainedModel) -> BertSizes:
    """The dense model's own sizes."""
    config = dense.config
    layers, head = config.num_hidden_layers, config.hidden_size // config.num_attention_heads
    return BertSizes(
        [config.hidden_size] * (2 * layers + 1),
        [config.intermediate_size] * layers,
        [head] * layers,
        [head] * layers,
    )


def filter_step(neurons: int) -> int:
    """Neurons that go at a time, and the fewest that stay."""
    return max(1, neurons // _FILTER_STEPS)


@dataclass(frozen=True)
class Shape:
    """Sizes of the dense model, for counting."""

    full: int
    heads: int
    head_size: int
    neurons: int
    layers: int
    fixed: int
    per_last: int

    def count(self, sizes: BertSizes) -> int:
        """Non-embedding parameters of a result; `fixed` of the heads, `per_last` for each entry of the last site."""
        total = self.fixed + self.per_last * sizes.sites[-1] + sizes.sites[0]
        for i in range(self.layers):
            a, b, c = sizes.sites[2 * i : 2 * i + 3]
            wide = self.heads * (2 * sizes.qk[i] + sizes.vo[i])
            total += wide * (a + 1) + (self.heads * sizes.vo[i] + 1) * b + b
            total += sizes.intermediate[i] * (b + 1) + (sizes.intermediate[i] + 1) * c + c
            total += self.full if a == b == self.full else a * b
            total += self.full if b == c == self.full else b * c
        return total


def allocate(curves: LossCurves, shape: Shape, goal: int, axes: Sequence[str], multiple_of: int) -> BertSizes:
    """Sizes with at most `goal` non-embedding parameters and the least predicted loss, found greedily.

    Parts shrink step by step, the one with the least loss per saved parameter first. Sites of the dense width need no
    residual maps, so the number of leading sites that keep it is tried out.

    Raises:
        TCSPError: the goal cannot be reached; the message names the smallest count that can.
    """
    best: tuple[float, BertSizes] | None = None
    smallest = None
    sites = 2 * shape.layers + 1
    prefixes = range(sites + 1) if "hidden" in axes else [sites]
    for prefix in prefixes:
        sizes, count = _shrink(curves, shape, goal, axes, multiple_of, prefix)
        smallest = count if smallest is None else min(smallest, count)
        if count <= goal:
            loss = curves.of(sizes)
            if best is None or loss < best[0]:
                best = (loss, sizes)
    if best is None:
        raise TCSPError(
            f"The budget of {goal:,} parameters (embeddings apart) cannot be reached with axes {tuple(axes)}: the "
            f"smallest possible result has {smallest:,}."
        )
    return best[1]


def _shrink(
    curves: LossCurves, shape: Shape, goal: int, axes: Sequence[str], multiple_of: int, prefix: int
) -> tuple[BertSizes, int]:
    sites = 2 * shape.layers + 1
    sizes = BertSizes(
        [shape.full] * sites,
        [shape.neurons] * shape.layers,
        [shape.head_size] * shape.layers,
        [shape.head_size] * shape.layers,
    )
    below = (shape.full - 1) // multiple_of * multiple_of
    if below >= 1:
        sizes.sites[prefix:] = [below] * (sites - prefix)
    moves: list[tuple[list[int], list[np.ndarray], int, int, int]] = []  # sizes, curves, index, step, smallest
    if "hidden" in axes:
        least = min(max(multiple_of, _SMALLEST_HIDDEN), below) if below else shape.full
        moves += [(sizes.sites, curves.hidden, i, multiple_of, least) for i in range(prefix, sites)]
    if "filters" in axes:
        step = filter_step(shape.neurons)
        moves += [(sizes.intermediate, curves.filters, i, step, step) for i in range(shape.layers)]
    if "heads" in axes:
        for chosen, losses in ((sizes.qk, curves.qk), (sizes.vo, curves.vo)):
            step = min(_HEAD_STEP, max(1, shape.head_size // 2))
            moves += [(chosen, losses, i, step, step) for i in range(shape.layers)]
    count = shape.count(sizes)
    while count > goal:
        best: tuple[float, int, int] | None = None
        for number, (chosen, losses, i, step, least) in enumerate(moves):
            if chosen[i] - step < least:
                continue
            before = chosen[i]
            chosen[i] = before - step
            saved = count - shape.count(sizes)
            chosen[i] = before
            price = float(losses[i][before - step] - losses[i][before]) / max(1, saved)
            if best is None or price < best[0]:
                best = (price, number, saved)
        if best is None:
            break
        chosen, _, i, step, _ = moves[best[1]]
        chosen[i] -= step
        count -= best[2]
    return sizes, count
