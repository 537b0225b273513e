"""What every part would lose at every size, predicted from the dense model alone and checked on it.

The loss is the second-order (Fisher) estimate of the KL divergence to the dense model, `½ E[(sum over tokens of
g'δ)²]`. What a part loses when it is cut alone, with its block's output linear solved again, comes from normal
equations on the dense model's own activations (`g` enters through Gamma and its coherence over a sequence). Then the
part is really cut in the dense model, on held-out sequences, and the curve is scaled to what that costs:
errors that add up over tokens, or that the estimate cannot see, are counted as they are. Of a deep model's like parts
only some are cut; those between them take their neighbours' scale.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from itertools import groupby, pairwise
from typing import Any

import numpy as np
import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..architectures import Block, blocks_of, family_of, sites_of
from ..calibration import Calibration
from ..calibration.divergence import divergence, model_inputs
from ..modes import evaluating
from ..offload import device_of, read_tensor
from .check import objective_name, probe_sequences
from .filters import drop_inputs
from .heads import drop_heads, inverse_root, score_moments
from .least_squares import HELD_OUT_EVERY, NormalEquations, damped_inverse, floored, solve
from .memory import Growth, give_back
from .metrics import Metrics
from .plan import Costs, LossCurves, filter_step
from .replay import Replay
from .streams import GROUP_TOKENS, padded_batches
from .subspace import SpectrumOf

_ROWS_PER_INPUT = 4  # tokens for every regressor in the curves' normal equations
_HIDDEN_REPAIR = 1 / 3  # what the refit leaves of the loss of a narrower site (measured: see the log)
_HIDDEN_POWER = 0.5  # the refit repairs early sites better than the cut alone shows: half way (on a log scale)
_PROBE_SEQUENCES = 64
_PROBE_TOKENS = 1024
_PROBE_BATCH = 512  # small batches of like lengths: there are few sequences, and padding would be most of it
_SCALE_LIMIT = 100.0
_CHECKED = 6  # of the like curves of a deep model; the others' scale is taken from their neighbours


@dataclass
class _Record:
    """Sums over tokens at one block of the dense model."""

    equations: NormalEquations
    scores: list[torch.Tensor]
    tokens: int = 0
    weight: float = 0.0


@dataclass
class _Curve:
    """A predicted curve, and what cutting the dense model to some sizes really lost over what it predicts.

    Attributes:
        kind: curves of one kind can lend each other their scale.
        place, of: its place among those of its kind, in the order of the forward pass, and how many they are.
        scales: logarithms by size, where they were measured; None for a curve that was not checked.
        order: of a feed-forward network, see `LossCurves`.
    """

    kind: str
    place: int
    of: int
    values: np.ndarray
    scales: dict[int, float] | None = None
    order: list[int] = field(default_factory=list)

    def scaled(self) -> np.ndarray:
        """The curve times its scale at the measured sizes and between; never falling as the size does."""
        if not self.scales:
            return self.values
        sizes = sorted(self.scales)
        factor = np.exp(np.interp(np.arange(len(self.values)), sizes, [self.scales[size] for size in sizes]))
        return np.maximum.accumulate((self.values * factor)[::-1])[::-1].copy()


def _finished(curves: Sequence[_Curve]) -> list[np.ndarray]:
    """The scaled curves; those that were not checked have the scale between their neighbours' of the same kind."""
    measured = [(curve.kind, curve.place, curve.scales) for curve in curves if curve.scales is not None]
    for curve in curves:
        if curve.scales is None:
            like = [(place, scales) for kind, place, scales in measured if kind == curve.kind]
            curve.scales = {}
            for size in {size for _, scales in like for size in scales}:
                known = {place: scales[size] for place, scales in like if size in scales}
                curve.scales[size] = float(np.interp(curve.place, list(known), list(known.values())))
    return [curve.scaled() for curve in curves]


class _Enough(Exception):
    """Ends a forward pass behind the last block that is watched."""


class CurveMeasure:
    """Measures the curves of one model; `run` does the work."""

    def __init__(
        self,
        dense: PreTrainedModel,
        stats: Calibration,
        costs: Costs,
        groups: list[list[str]],
        spectrum_of: SpectrumOf,
        axes: Sequence[str],
    ) -> None:
        """groups: sites that share a subspace, one group for each entry of `Sizes.hidden`."""
        self.dense, self.stats, self.costs, self.axes = dense, stats, costs, axes
        self.groups, self.spectrum_of = groups, spectrum_of
        self.family, _ = family_of(dense)
        self.blocks = blocks_of(dense)
        self.norms = {site.name: site for site in sites_of(dense)}
        self.objective = objective_name(dense, stats)
        self.device = device_of(dense)
        rows = stats.sample.sequences()
        probe = probe_sequences(stats, _PROBE_SEQUENCES, _PROBE_TOKENS)
        self.probe = padded_batches(probe, self.device, _PROBE_BATCH)
        self.sequences = max(1, sum(len(batch["input_ids"]) for batch in self.probe))
        fit = [row for i, row in enumerate(rows) if i % HELD_OUT_EVERY != HELD_OUT_EVERY - 1] or rows
        wanted = _ROWS_PER_INPUT * (costs.neurons + costs.full)
        self.batches = padded_batches(_first(fit, wanted), self.device)
        self.metrics = Metrics(dense, stats, self.probe)
        self.growth = Growth(GROUP_TOKENS, costs.neurons + costs.full)
        count = len(rows) or 1
        self.lengths = {
            "encoder": sum(len(row["input_ids"]) for row in rows) / count,
            "decoder": sum(len(row.get("decoder_input_ids", ())) for row in rows) / count,
        }

    def run(self, progress: bool | None = None) -> LossCurves:
        with torch.no_grad(), _eager(self.dense):
            self.replay = Replay(self.dense, self.probe)
            self.layers = self.replay.layers
            self.known: list[dict[int, Any]] = [{} for _ in self.batches]
            curves: dict[str, list[_Curve]] = {part: [] for part in ("hidden", "filters", "heads", "qk", "vo")}
            for i in range(len(self.groups)):
                curves["hidden"].append(self._hidden_curve(i))
            bar = tqdm(
                total=len(self.blocks), unit="block", desc="search", disable=None if progress is None else not progress
            )
            with bar:
                for chosen, following in pairwise([*self._portions(), []]):
                    records = self._record(chosen, following)
                    for block in chosen:
                        for part, curve in self._block_curves(block, records.pop(block.writes, None)).items():
                            curves[part].append(curve)
                        give_back(8 * self._inputs(block) ** 2)
                        bar.update(1)
        order = [curve.order for curve in curves["filters"]]
        return LossCurves(**{part: _finished(found) for part, found in curves.items()}, order=order)

    def _loss(self, alter: Callable[[ExitStack], None], changed: Sequence[nn.Module]) -> float:
        """Mean divergence of the dense model with these modules changed, nats per sequence."""
        total = 0.0
        with ExitStack() as stack:
            alter(stack)
            runs = zip(self.probe, self.replay.expected, self.replay.outputs(changed), strict=True)
            for batch, expected, found in runs:
                total += float(divergence(self.dense, self.objective, batch, expected, found))
        return total / self.sequences

    def _checked(
        self,
        curve: _Curve,
        sizes: Sequence[int],
        alter: Callable[[int, ExitStack], None],
        changed: Sequence[nn.Module],
        power: float = 1.0,
    ) -> _Curve:
        """The curve with its scale, to a power, measured at these sizes where its turn is to be checked."""
        if curve.place not in {round(place) for place in np.linspace(0, curve.of - 1, min(curve.of, _CHECKED))}:
            return curve
        curve.scales = {}
        for size in sizes:
            predicted = float(curve.values[size])
            measured = self._loss(partial(alter, size), changed)
            if predicted > 0.0 and np.isfinite(measured) and measured > 0.0:
                scale = np.log(np.clip(measured / predicted, 1 / _SCALE_LIMIT, _SCALE_LIMIT))
                curve.scales[size] = power * float(scale)
        return curve

    # --- widths ------------------------------------------------------------------------------------------------

    def _hidden_curve(self, group: int) -> _Curve:
        members = self.groups[group]
        if "hidden" not in self.axes:  # the full width alone will be asked for, which costs nothing
            return _Curve(f"group {group}", 0, 1, np.zeros(self.costs.full + 1), {})
        spectrum = self.spectrum_of(members)
        tail = spectrum.values.flip(0).cumsum(0).flip(0)
        values = torch.cat([tail, tail.new_zeros(1)]).numpy()
        scale = sum(0.5 * self.lengths[self.norms[name].stack] * self.metrics.unit(name) for name in members)
        curve = _Curve(f"group {group}", 0, 1, scale * values)
        for block in self.blocks:
            if [block.writes] == members:
                curve = self._curve(block, scale * values)
        full = self.costs.full

        def alter(size: int, stack: ExitStack) -> None:
            basis = spectrum.cut(size)
            projector = (basis.decoder @ basis.encoder.T).to(self.device, torch.float32)
            for name in members:
                site = self.norms[name]
                weight = read_tensor(site.norm, "weight").to(self.device, torch.float32)

                def project(
                    module: Any, args: Any, output: torch.Tensor, site: Any = site, weight: torch.Tensor = weight
                ) -> torch.Tensor:
                    normalised = site.normalise(args[0].float())
                    lost = (normalised @ projector.T - normalised) * weight
                    return output + lost.to(output.dtype)

                stack.callback(site.norm.register_forward_hook(project).remove)

        sizes = [max(1, full // 2)]
        norms = [self.norms[name].norm for name in members]
        curve = self._checked(curve, sizes, alter, norms, _HIDDEN_POWER)
        curve.values = _HIDDEN_REPAIR * curve.values
        return curve

    # --- blocks ------------------------------------------------------------------------------------------------

    def _portions(self) -> Iterator[list[Block]]:
        """The blocks of one layer at a time: more normal equations than theirs are never held. Then those of which
        nothing is measured."""
        wanted = [block for block in self.blocks if self._is_measured(block)]
        for _, blocks in groupby(wanted, key=lambda block: (block.stack, block.layer)):
            yield list(blocks)
        if len(wanted) < len(self.blocks):
            yield [block for block in self.blocks if block not in wanted]

    def _inputs(self, block: Block) -> int:
        """Regressors of a block's output: its activations and, in a BERT, the stream and a constant."""
        return block.output.in_features + (self.costs.full + 1 if self.family == "bert" else 0)

    def _is_measured(self, block: Block) -> bool:
        return ("heads" if block.attends else "filters") in self.axes

    def _first_layer(self, blocks: list[Block]) -> int:
        """The first layer that must run for the modules that `_record` watches."""
        watched = [(self.norms[b.reads].norm, self.norms[b.writes].norm, b.output, *b.inner) for b in blocks]
        return self.layers.first_of(module for modules in watched for module in modules)

    def _record(self, blocks: list[Block], following: list[Block]) -> dict[str, _Record]:
        """Sums of these blocks; what the following ones need of the layers before them is kept."""
        measured = [b for b in blocks if self._is_measured(b)]
        records: dict[str, _Record] = {}
        if not measured:
            return records
        heads, size = self.costs.heads, self.costs.head_size
        for block in measured:
            inputs = block.output.in_features + (self.costs.full if self.family == "bert" else 0)
            records[block.writes] = _Record(
                NormalEquations.zeros(inputs, 1, self.device, bias=self.family == "bert", folds=1),
                [torch.zeros(heads, size, size, dtype=torch.float64, device=self.device) for _ in range(2)],
            )
        seen: dict[Any, torch.Tensor] = {}

        def keep_input(block: Block, module: Any, args: Any) -> None:
            seen[block.writes, "activations"] = args[0]

        def keep_output(key: Any, module: Any, args: Any, output: Any) -> None:
            seen[key] = output[-1] if isinstance(output, tuple) else output

        def keep_stream(name: str, module: Any, args: Any, output: torch.Tensor) -> None:
            seen[name] = self.norms[name].normalise(args[0].float())

        def stop(*_: Any) -> None:
            raise _Enough  # hooks run in the order of their registration: what is wanted was recorded before

        with ExitStack() as stack:
            for block in measured:
                stack.callback(block.output.register_forward_pre_hook(partial(keep_input, block)).remove)
                norm = self.norms[block.reads].norm
                stack.callback(norm.register_forward_hook(partial(keep_stream, block.reads)).remove)
                if block.attention is not None:
                    watched = (*block.inner[:2], block.attention)
                    for module, key in zip(watched, ("query", "key", "attention"), strict=True):
                        hook = partial(keep_output, (block.writes, key))
                        stack.callback(module.register_forward_hook(hook).remove)
            scales = stack.enter_context(self.metrics.recording([block.writes for block in measured]))
            first = self._first_layer(measured)
            later = [b for b in following if self._is_measured(b)]
            kept = self.layers.before(self._first_layer(later)) if later else []
            outputs = stack.enter_context(self.layers.keeping(kept))
            last = self.norms[measured[-1].writes].norm
            if kept and kept[-1] >= self.layers.first_of([last]):
                stack.callback(self.layers[kept[-1]].register_forward_hook(stop).remove)
            else:
                stack.callback(last.register_forward_pre_hook(stop).remove)
            for i, batch in enumerate(self.growth.between(self.batches)):
                outputs.clear()
                with self.layers.starting_at(first, self.known[i]), suppress(_Enough):
                    self.dense(**model_inputs(self.dense, batch))
                self.known[i] = {layer: outputs.get(layer, self.known[i].get(layer)) for layer in kept}
                for block in measured:
                    self._add(block, records[block.writes], seen, scales[block.writes], batch)
                seen.clear()
        return records

    def _add(
        self, block: Block, record: _Record, seen: dict[Any, torch.Tensor], scale: torch.Tensor, batch: dict[str, Any]
    ) -> None:
        name = "attention_mask" if block.stack == "encoder" else "decoder_attention_mask"
        mask = batch[name].bool()
        parts = [seen[block.writes, "activations"].reshape(*mask.shape, -1)[mask].float()]
        if self.family == "bert":
            parts.append(seen[block.reads].reshape(*mask.shape, -1)[mask])
        importance = self.metrics.token_weights(block.writes, mask)
        weights = importance / scale.reshape(mask.shape)[mask].square()
        nothing = torch.zeros(len(weights), 1, device=self.device)
        held = torch.zeros_like(weights, dtype=torch.bool)
        segments = self.metrics.segments(mask.sum(1).tolist())
        record.equations.add(parts, nothing, weights, held, segments, self.metrics.coherence(block.writes))
        record.tokens += len(weights)
        record.weight += float(importance.sum())
        if block.attends:
            query, key = (
                part.reshape(-1, part.shape[-2], self.costs.heads, self.costs.head_size).transpose(1, 2).float()
                for part in (seen[block.writes, "query"], seen[block.writes, "key"])
            )
            moments = score_moments(query, key, seen[block.writes, "attention"].float(), mask)
            for total, part in zip(record.scores, moments, strict=True):
                total += part

    def _solution(self, block: Block) -> torch.Tensor:
        """The dense output linear in its normal equations' regressors, (D, inputs) float64, centred for a LayerNorm."""
        weight = read_tensor(block.output, "weight").to(self.device, torch.float64)
        if self.family != "bert":
            return weight
        norm: Any = self.norms[block.reads].norm
        gamma = read_tensor(norm, "weight").to(self.device, torch.float64)
        residual = torch.diag(gamma)
        nothing = torch.zeros(self.costs.full, 1, dtype=torch.float64, device=self.device)
        whole = torch.cat([weight, residual, nothing], dim=1)
        return whole - whole.mean(0)

    def _curve(self, block: Block, values: np.ndarray, scales: dict[int, float] | None = None) -> _Curve:
        """A curve of this block, to be checked unless its scales are given."""
        of = sum((other.stack, other.kind) == (block.stack, block.kind) for other in self.blocks)
        return _Curve(f"{block.stack} {block.kind}", block.layer, of, values, scales)

    def _block_curves(self, block: Block, record: _Record | None) -> dict[str, _Curve]:
        """By the list of `LossCurves`."""
        if record is None:
            parts = {"heads": self.costs.heads, "qk": self.costs.head_size, "vo": self.costs.head_size}
            parts = parts if block.attends else {"filters": self.costs.neurons}
            return {part: self._curve(block, np.zeros(size + 1), {}) for part, size in parts.items()}
        per_sequence = 0.5 * self.lengths[block.stack]
        moments = record.equations.total[0].div_(max(1e-9, record.weight))
        whole = self._solution(block)
        weighed = self.metrics.root(block.writes) @ whole
        if not block.attends:
            return {"filters": self._filter_curve(block, moments, whole, weighed, per_sequence)}
        scores = [moment / max(1, record.tokens) for moment in record.scores]
        return {
            "qk": self._score_curve(block, scores, per_sequence),
            "vo": self._value_curve(block, moments, whole, weighed, per_sequence),
            "heads": self._head_curve(block, moments, whole, weighed, per_sequence),
        }

    def _replace(self, block: Block, change: torch.Tensor, stack: ExitStack) -> None:
        """Add to the block's output what `change` (D, inputs) makes of its regressors."""
        weight = change.float()
        width = block.output.in_features
        streams: dict[str, torch.Tensor] = {}

        def keep(module: Any, args: Any, output: torch.Tensor) -> None:
            streams["n"] = self.norms[block.reads].normalise(args[0].float())

        def add(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
            more = nn.functional.linear(args[0].float(), weight[:, :width])
            if self.family == "bert":
                more = more + nn.functional.linear(streams["n"], weight[:, width:-1], weight[:, -1])
            return output + more.to(output.dtype)

        if self.family == "bert":
            stack.callback(self.norms[block.reads].norm.register_forward_hook(keep).remove)
        stack.callback(block.output.register_forward_hook(add).remove)

    def _changed(self, block: Block) -> list[nn.Module]:
        """What `_replace` changes or must see: the output and, in a BERT, the norm that the block reads."""
        return [block.output, *([self.norms[block.reads].norm] if self.family == "bert" else [])]

    def _without(self, moments: torch.Tensor, whole: torch.Tensor, gone: torch.Tensor) -> torch.Tensor:
        """The change of the solution (D, inputs) when the inputs `gone` (mask) go and the others are solved again."""
        stays = (~gone).nonzero().squeeze(1)
        cross = moments[stays] @ whole.T
        again = solve(
            moments[stays[:, None], stays], cross, whole[:, stays].T.contiguous(), 1e-4, self.family == "bert"
        )
        change = -whole.clone()
        change[:, stays] += again.T
        return change

    def _filter_curve(
        self, block: Block, moments: torch.Tensor, whole: torch.Tensor, weighed: torch.Tensor, per_sequence: float
    ) -> _Curve:
        neurons = self.costs.neurons
        step = filter_step(neurons)
        _, points, order = drop_inputs(moments, weighed, neurons, keep=step, block=2 * step)
        left = [float(count) for count, _ in points][::-1]
        curve = per_sequence * np.interp(np.arange(neurons + 1), left, [value for _, value in points][::-1])

        def alter(size: int, stack: ExitStack) -> None:
            gone = torch.zeros(moments.shape[0], dtype=torch.bool, device=self.device)
            gone[order[: neurons - size]] = True
            self._replace(block, self._without(moments, whole, gone), stack)

        sizes = [max(1, neurons // 8), max(1, neurons // 2)]
        found = self._checked(self._curve(block, curve), sizes, alter, self._changed(block))
        found.order = order.tolist()
        return found

    def _value_curve(
        self, block: Block, moments: torch.Tensor, whole: torch.Tensor, weighed: torch.Tensor, per_sequence: float
    ) -> _Curve:
        size, heads = self.costs.head_size, self.costs.heads
        inverse = damped_inverse(moments, 1e-4 * floored(moments.diagonal()))
        curve = torch.zeros(size + 1, dtype=torch.float64)
        turns: list[torch.Tensor] = []
        for head in range(heads):
            mine = slice(head * size, (head + 1) * size)
            root, inverse_of_root = inverse_root(torch.linalg.inv(inverse[mine, mine]))
            _, losses, right = torch.linalg.svd(weighed[:, mine] @ root, full_matrices=len(weighed) < size)
            losses = losses.square().cpu()
            curve[: len(losses)] += losses.flip(0).cumsum(0).flip(0)
            turns.append(right @ inverse_of_root)

        def alter(kept: int, stack: ExitStack) -> None:
            rest = torch.eye(moments.shape[0] - heads * size, dtype=torch.float64, device=self.device)
            factors = torch.stack([turn[:kept] for turn in turns])
            turn, back = (torch.block_diag(*f, rest) for f in (factors, torch.linalg.pinv(factors).mT))
            turned = turn @ moments
            again = solve(turned @ turn.T, turned @ whole.T, back @ whole.T, 1e-4, self.family == "bert")
            self._replace(block, again.T @ turn - whole, stack)

        found = self._curve(block, per_sequence * curve.numpy())
        return self._checked(found, [max(1, size // 2)], alter, self._changed(block))

    def _head_curve(
        self, block: Block, moments: torch.Tensor, whole: torch.Tensor, weighed: torch.Tensor, per_sequence: float
    ) -> _Curve:
        size, heads = self.costs.head_size, self.costs.heads
        if heads == 1:
            return self._curve(block, np.zeros(2), {})
        _, losses, order = drop_heads(moments, weighed, heads, size, 1)
        curve = per_sequence * np.array([2.0 * losses[-1], *losses[::-1]])

        def alter(kept: int, stack: ExitStack) -> None:
            gone = torch.zeros(moments.shape[0], dtype=torch.bool, device=self.device)
            for head in order[: heads - kept]:
                gone[head * size : (head + 1) * size] = True
            self._replace(block, self._without(moments, whole, gone), stack)

        return self._checked(self._curve(block, curve), [max(1, heads // 2)], alter, self._changed(block))

    def _score_curve(self, block: Block, moments: list[torch.Tensor], per_sequence: float) -> _Curve:
        size = self.costs.head_size
        gradient = self.metrics.query(block.writes, self.costs.heads, size)
        identity = torch.eye(size, dtype=torch.float64, device=self.device)
        query_root, _ = inverse_root(moments[0])
        key_root, key_inverse = inverse_root(moments[1])
        _, _, right = torch.linalg.svd(query_root @ key_root)

        def kept(count: int) -> torch.Tensor:
            """(H, d, d): the query that the best rank-`count` score amounts to."""
            return key_inverse @ right[:, :count].mT @ right[:, :count] @ key_root

        curve = torch.zeros(size + 1, dtype=torch.float64)
        for count in range(1, size):
            lost = identity - kept(count)
            curve[count] = (gradient * (lost @ moments[0] @ lost.mT)).sum()
        curve[0] = 2.0 * curve[1]
        losses = np.maximum.accumulate(curve.flip(0).numpy())[::-1].copy()

        def alter(count: int, stack: ExitStack) -> None:
            turn = torch.block_diag(*kept(count)).float()

            def narrow(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
                return nn.functional.linear(output.float(), turn).to(output.dtype)

            stack.callback(block.inner[0].register_forward_hook(narrow).remove)

        found = self._curve(block, per_sequence * losses)
        return self._checked(found, [max(1, size // 2)], alter, block.inner[:1])


def _first(rows: list[dict[str, list[int]]], tokens: int) -> list[dict[str, list[int]]]:
    """The first sequences with at most so many tokens (at least one)."""
    chosen: list[dict[str, list[int]]] = []
    for row in rows:
        tokens -= max(len(row["input_ids"]), len(row.get("decoder_input_ids", ())))
        if chosen and tokens < 0:
            break
        chosen.append(row)
    return chosen


@contextmanager
def _eager(model: PreTrainedModel) -> Iterator[None]:
    """Evaluation mode with attention that returns its probabilities; everything is put back afterwards."""
    # the stacks of a T5 have configurations of their own, which transformers 5.17 leaves alone
    parts = [module for module in model.modules() if isinstance(module, PreTrainedModel)]
    before = [part.config._attn_implementation for part in parts]
    for part in parts:
        part.set_attn_implementation("eager")
    try:
        with evaluating(model):
            yield
    finally:
        for part, name in zip(parts, before, strict=True):
            part.set_attn_implementation(name)
