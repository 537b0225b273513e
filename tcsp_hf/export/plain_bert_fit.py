"""Fits a stock BERT to a compressed one, block by block, in closed form on a token sample.

The coordinates come from `gauge`. Then, as in `compression.refit_bert`, every linear is solved by ridge regression on
what the stock model itself carries, so that it reproduces the compressed model's sums: what one block could not say,
the next ones make up for. Heads are narrowed to `hidden_size / heads` and neurons dropped with the same equations.

Part of a feed-forward network can carry what the LayerNorm's weight cannot: `gelu(x) - gelu(-x) = x` (and so for relu),
so a pair of neurons is one linear path, and pairs for the leading directions of the rest of a residual map go in among
the network's neurons.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers.activations import ACT2FN

from ..compression.cuts import cut_filters, cut_values
from ..compression.heads import score_factors, score_moments
from ..compression.least_squares import NormalEquations, ridge
from ..compression.streams import Group, PackedSample, Stream
from .gauge import Gauge, choose_gauge

Affine = tuple[torch.Tensor, torch.Tensor]
_LEAST_WEIGHT = 1e-2  # of a LayerNorm, relative to the median: readers are divided by it


@dataclass(frozen=True)
class PlainSizes:
    """Of the stock model: heads (each `hidden_size / heads` wide), neurons, and linear paths among the neurons."""

    heads: int
    neurons: int
    linear: int


@dataclass
class PlainFit:
    """A fitted encoder.

    Attributes:
        tensors: state dict entries of a stock `BertModel`, without its prefix.
        gauge: the coordinates.
        last: (k + 1, k) float64: the compressed model's last normalised sum ~ [h, 1] @ last, h the stock one's state.
        sample, carried, exact: the sample, h, and what it stands for, both in the sample's order.
    """

    sample: PackedSample
    gauge: Gauge
    tensors: dict[str, torch.Tensor] = field(default_factory=dict)
    last: torch.Tensor = field(default_factory=lambda: torch.empty(0))
    carried: Stream | None = None
    exact: Stream | None = None

    def close(self) -> None:
        for stream in (self.carried, self.exact):
            if stream is not None:
                stream.close()


def site_norms(small: Any) -> list[Any]:
    """The norm of every site of a compressed BERT."""
    base = small.base_model
    return [
        base.embeddings.norm,
        *(norm for layer in base.encoder.layer for norm in (layer.attention.output.norm, layer.output.norm)),
    ]


class PlainBertFitter:
    """One fit; `run` does the work. `small` must have one width below the dense one."""

    def __init__(self, small: Any, sample: PackedSample, sizes: PlainSizes, progress: bool | None) -> None:
        config = small.config
        self.small, self.sample, self.sizes = small.base_model, sample, sizes
        self.device = small.device
        self.width = int(config.hidden_size)
        self.layers = int(config.num_hidden_layers)
        self.eps = float(config.layer_norm_eps)
        act = config.hidden_act
        self.activation: Callable[[torch.Tensor], torch.Tensor] = ACT2FN[act] if isinstance(act, str) else act
        self.norms = [norm.weight.detach().float() for norm in site_norms(small)]
        self.bar = tqdm(
            total=4 * self.layers, unit="block", desc="plain", disable=None if progress is None else not progress
        )

    def run(self) -> PlainFit:
        with torch.no_grad(), self.bar:
            exact, gauge = self._gauge()
            fit = PlainFit(self.sample, gauge)
            carried = self._embeddings(fit)
            for t in range(2 * self.layers):
                carried = self._block(t, fit, exact[t], exact[t + 1], carried)
                exact[t].close()
                self.bar.update(1)
            fit.last = self._decoder(fit, 2 * self.layers, exact[-1], carried)
            fit.carried, fit.exact = carried, exact[-1]
        norm = self._norm_name(2 * self.layers)
        fit.tensors[f"{norm}.weight"] = torch.ones(self.width)
        fit.tensors[f"{norm}.bias"] = torch.zeros(self.width)
        return fit

    # --- the compressed model ----------------------------------------------------------------------------------

    def _groups(self) -> Iterator[Group]:
        yield from self.sample.groups

    def _stream(self) -> Stream:
        return Stream(self.sample.tokens, self.width)

    def _read(self, stream: Stream, group: Group) -> torch.Tensor:
        return stream.read(group.rows).to(self.device)

    def _unit(self, sums: torch.Tensor) -> torch.Tensor:
        """u = y / rms(y): what every site's norm gives but for its weight."""
        return sums / sums.square().mean(-1, keepdim=True).clamp(min=1e-24).sqrt()

    def _gauge(self) -> tuple[list[Stream], Gauge]:
        """Runs the compressed model: its sums y at every site, and coordinates for them."""
        base = self.small
        sums = [self._stream() for _ in range(2 * self.layers + 1)]
        moments = [torch.zeros(self.width, self.width, dtype=torch.float64) for _ in sums]
        squares = [0.0] * len(sums)
        maps = []
        for i, layer in enumerate(base.encoder.layer):
            for t, output in ((2 * i, layer.attention.output), (2 * i + 1, layer.output)):
                maps.append((output.residual.weight.detach().float() * self.norms[t]).double().cpu())
        for group in self._groups():
            rows = group.rows
            total = (
                base.embeddings.word_embeddings(self.sample.input_ids[rows].to(self.device))
                + base.embeddings.token_type_embeddings(self.sample.token_type_ids[rows].to(self.device))
                + base.embeddings.position_embeddings(self.sample.positions[rows].to(self.device))
            ).float()
            carried = total
            for t in range(len(sums)):
                if t > 0:
                    total = self._exact_block(t - 1, carried, group)
                sums[t].write(rows, total)
                unit = self._unit(total)
                moments[t] += (unit.T @ unit).double().cpu()
                squares[t] += float(total.square().sum(dtype=torch.float64))
                carried = unit * self.norms[t]
        tokens = self.sample.tokens
        moments = [moment / tokens for moment in moments]
        scales = [tokens / square for square in squares[1:]]
        gauge = choose_gauge(maps, moments, scales)
        self.bar.update(2 * self.layers)
        return sums, gauge

    def _exact_block(self, t: int, carried: torch.Tensor, group: Group) -> torch.Tensor:
        """The compressed model's sum before norm t + 1, from its stream z at site t."""
        layer = self.small.encoder.layer[t // 2]
        if t % 2:
            return layer.output.dense(layer.intermediate(carried)) + layer.output.residual(carried)
        own = layer.attention.self
        query, key, value = own.qkv(carried).split(own.split_sizes, dim=-1)
        context = self._attend(query, key, value, group, own.num_heads, own.scaling)
        return layer.attention.output.dense(context) + layer.attention.output.residual(carried)

    def _attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: Group, heads: int, scaling: float
    ) -> torch.Tensor:
        query, key, value = (self._split(states, group, heads) for states in (query, key, value))
        context = nn.functional.scaled_dot_product_attention(query, key, value, scale=scaling)
        return context.transpose(1, 2).reshape(group.count * group.length, -1)

    def _split(self, states: torch.Tensor, group: Group, heads: int) -> torch.Tensor:
        return states.view(group.count, group.length, heads, -1).transpose(1, 2)

    # --- the stock model ---------------------------------------------------------------------------------------

    def _norm_name(self, t: int) -> str:
        if t == 0:
            return "embeddings.LayerNorm"
        block = "attention.output" if t % 2 else "output"
        return f"encoder.layer.{(t - 1) // 2}.{block}.LayerNorm"

    def _normalise(self, sums: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(sums, (self.width,), eps=self.eps)

    def _embeddings(self, fit: PlainFit) -> Stream:
        """Turned tables; returns n, the stock norm's output before its weight."""
        turn = fit.gauge.turns[0].float().to(self.device)
        tables = {}
        for kind in ("word", "position", "token_type"):
            name = f"embeddings.{kind}_embeddings.weight"
            table = getattr(self.small.embeddings, f"{kind}_embeddings").weight.detach().float()
            tables[kind] = fit.tensors[name] = table @ turn.T
        carried = self._stream()
        for group in self._groups():
            rows = group.rows
            ids = {"word": self.sample.input_ids, "position": self.sample.positions}
            ids["token_type"] = self.sample.token_type_ids
            total = sum((tables[kind][of[rows].to(self.device)] for kind, of in ids.items()), torch.tensor(0.0))
            carried.write(rows, self._normalise(total))
        return carried

    def _importance(self, sums: torch.Tensor) -> torch.Tensor:
        """(tokens,): errors count relative to the sum, whose norm is divided out next."""
        return 1.0 / sums.square().mean(-1).clamp(min=1e-24)

    def _decoder(self, fit: PlainFit, t: int, exact: Stream, carried: Stream) -> torch.Tensor:
        """(k + 1, k) float64: u ~ [n, 1] @ decoder."""
        equations = NormalEquations.zeros(self.width, self.width, self.device)
        for group in self._groups():
            unit = self._unit(self._read(exact, group))
            held_out = self.sample.held_out[group.rows].to(self.device)
            equations.add([self._read(carried, group)], unit, torch.ones_like(unit[:, 0]), held_out)
        prior = torch.cat([fit.gauge.turns[t], torch.zeros(1, self.width, dtype=torch.float64)]).to(self.device)
        return ridge(equations, prior)

    def _reading(self, linear: nn.Linear, t: int, decoder: torch.Tensor) -> Affine:
        """A linear of the compressed model that reads site t, as a function of n."""
        weight = linear.weight.detach().double() * self.norms[t].double()
        bias = linear.bias.detach().double() + weight @ decoder[-1]
        return (weight @ decoder[:-1].T).float(), bias.float()

    def _block(self, t: int, fit: PlainFit, exact: Stream, exact_next: Stream, carried: Stream) -> Stream:
        """Solves block t; returns n at site t + 1."""
        layer, name = self.small.encoder.layer[t // 2], f"encoder.layer.{t // 2}"
        decoder = self._decoder(fit, t, exact, carried)
        readers: dict[str, Affine] = {}
        if t % 2:
            output, reading = layer.output, self._reading(layer.intermediate.dense, t, decoder)
            target_name = f"{name}.output"
        else:
            output, target_name = layer.attention.output, f"{name}.attention.output"
            query, key, value = self._queries(layer.attention.self, t, decoder, carried)
            own = layer.attention.self

        def activations(rows: slice) -> torch.Tensor:
            mine = carried.read(rows).to(self.device)
            if t % 2:
                return self.activation(nn.functional.linear(mine, *reading))
            group = next(group for group in self._groups() if group.rows == rows)
            parts = [nn.functional.linear(mine, *part) for part in (query, key, value)]
            return self._attend(parts[0], parts[1], parts[2], group, own.num_heads, self._head_size**-0.5)

        turn = fit.gauge.turns[t + 1].to(self.device)
        prior_block = turn @ output.dense.weight.detach().double()
        inputs = prior_block.shape[1]
        equations = NormalEquations.zeros(inputs + self.width, self.width, self.device)
        for group in self._groups():
            sums = self._read(exact_next, group)
            held_out = self.sample.held_out[group.rows].to(self.device)
            parts_here = [activations(group.rows), self._read(carried, group)]
            equations.add(parts_here, sums @ turn.float().T, self._importance(sums), held_out)
        bias = turn @ output.dense.bias.detach().double()
        prior = torch.cat([prior_block.T, bias[None]])
        weights = self._residual_weights(equations, inputs, fit.gauge.weights[t].to(self.device))
        problem, paths = self._without_residual(equations, inputs, weights, prior, self.sizes.linear if t % 2 else 0)
        root = torch.eye(self.width, dtype=torch.float64, device=self.device)
        if t % 2:
            problem, kept = cut_filters(problem, root, inputs, min(inputs, self.sizes.neurons - 2 * self.sizes.linear))
            readers["intermediate.dense"] = reading = (reading[0][kept], reading[1][kept])
        else:
            problem, turned, kept = cut_values(
                problem, root, own.num_heads, own.vo_head_size, self.sizes.heads, min(own.vo_head_size, self._head_size)
            )
            if turned is not None:
                value = turned.float() @ value[0], turned.float() @ value[1]
            rows = (kept[:, None] * self._head_size + torch.arange(self._head_size, device=self.device)).flatten()
            query, key = ((part[0][rows], part[1][rows]) for part in (query, key))
        solution = ridge(*problem)
        written, offset = solution[:-1].float(), solution[-1].float()
        own_heads = self.sizes.heads

        next_carried = self._stream()
        for group in self._groups():
            mine = self._read(carried, group)
            if t % 2:
                active = self.activation(nn.functional.linear(mine, *reading))
                active = torch.cat([active, mine @ paths.float().T], dim=1)
            else:
                parts = [nn.functional.linear(mine, *part) for part in (query, key, value)]
                active = self._attend(parts[0], parts[1], parts[2], group, own_heads, self._head_size**-0.5)
            next_carried.write(group.rows, self._normalise(active @ written + offset + mine * weights.float()))
        carried.close()
        if t % 2:
            count = reading[0].shape[0]
            rows_in = paths.float()
            reading = (
                torch.cat([reading[0], rows_in, -rows_in]),
                torch.cat([reading[1], reading[1].new_zeros(2 * len(paths))]),
            )
            reading, out = _padded(reading, torch.cat([written, -written[count:]]).T, self.sizes.neurons)
            readers["intermediate.dense"] = reading
        else:
            out = _spread(written.T, own_heads, self._head_size)
            spread_value = _spread(torch.cat([value[0], value[1][:, None]], 1).T, own_heads, self._head_size).T
            readers["attention.self.query"], readers["attention.self.key"] = query, key
            readers["attention.self.value"] = spread_value[:, :-1], spread_value[:, -1]
        for reader, (weight, reader_bias) in readers.items():
            fit.tensors[f"{name}.{reader}.weight"] = weight / weights.float()
            fit.tensors[f"{name}.{reader}.bias"] = reader_bias
        fit.tensors[f"{target_name}.dense.weight"], fit.tensors[f"{target_name}.dense.bias"] = out, offset
        norm = self._norm_name(t)
        fit.tensors[f"{norm}.weight"], fit.tensors[f"{norm}.bias"] = weights.float(), torch.zeros(self.width)
        return next_carried

    @property
    def _head_size(self) -> int:
        return self.width // self.sizes.heads

    def _queries(self, own: Any, t: int, decoder: torch.Tensor, carried: Stream) -> tuple[Affine, Affine, Affine]:
        """Query, key (of the stock head size and scale, all heads) and value as functions of n."""
        weight, bias = self._reading(own.qkv, t, decoder)
        query, key, value = zip(weight.split(own.split_sizes), bias.split(own.split_sizes), strict=True)
        size, wanted, heads = own.qk_head_size, self._head_size, own.num_heads
        if size > wanted:
            moments = [torch.zeros(heads, size, size, dtype=torch.float64) for _ in range(2)]
            for group in self._groups():
                mine = self._read(carried, group)
                q, k = (self._split(nn.functional.linear(mine, *part), group, heads) for part in (query, key))
                attention = (q @ k.mT * own.scaling).softmax(-1)
                for total, part in zip(moments, score_moments(q, k, attention), strict=True):
                    total += part.cpu()
            factors = score_factors(moments[0], moments[1], wanted)
            maps = [torch.block_diag(*factor).float().to(self.device) for factor in factors]
            query, key = ((turn @ part[0], turn @ part[1]) for turn, part in zip(maps, (query, key), strict=True))
        elif size < wanted:
            pads = torch.block_diag(*[torch.eye(wanted, size)] * heads).to(self.device)
            query, key = ((pads @ part[0], pads @ part[1]) for part in (query, key))
        scale = own.scaling * wanted**0.5  # the stock scale is the root of its own head size
        return (query[0] * scale, query[1] * scale), key, value

    def _residual_weights(self, equations: NormalEquations, inputs: int, prior: torch.Tensor) -> torch.Tensor:
        """(k,) g of the residual n * g, each coordinate's least squares beside the block's activations.

        Coordinate i of the sum is regressed on all activations and on n_i alone.
        """
        moments, cross = equations.total
        others = torch.cat([torch.arange(inputs), torch.tensor([moments.shape[0] - 1])]).to(moments.device)
        mine = torch.arange(inputs, inputs + self.width, device=moments.device)
        between = moments[others][:, mine]
        explained = torch.linalg.solve(_damped(moments[others][:, others]), between)  # what the activations say of n
        product = (cross[mine] - explained.T @ cross[others]).diagonal()
        square = moments[mine, mine] - (explained * between).sum(0)
        total = moments[mine, mine]
        pull = 0.1 * total  # towards the gauge's weights
        found = (product + pull * prior) / (square.clamp(min=0) + pull)
        least = _LEAST_WEIGHT * found.abs().median()
        return torch.where(found < 0, -1.0, 1.0) * found.abs().clamp(min=float(least))

    def _without_residual(
        self, equations: NormalEquations, inputs: int, weights: torch.Tensor, prior: torch.Tensor, linear: int
    ) -> tuple[tuple[NormalEquations, torch.Tensor], torch.Tensor]:
        """Equations of the block alone, for what `weights * n` leaves; and its linear paths (linear, k).

        The paths are the leading directions of what a free residual map would add, as far as n has energy that the
        activations do not explain.
        """
        device = prior.device
        size = equations.inputs + 1
        others = torch.cat([torch.arange(inputs, device=device), torch.tensor([size - 1], device=device)])
        mine = torch.arange(inputs, size - 1, device=device)
        for moments, cross in zip(equations.moments, equations.cross, strict=True):
            cross -= moments[:, mine] * weights
        if not linear:
            equations.keep(others[:-1])
            return (equations, prior), torch.zeros(0, self.width, dtype=torch.float64, device=device)
        full_prior = torch.cat([prior[:-1], torch.zeros(self.width, self.width).to(prior), prior[-1:]])
        free = ridge(equations, full_prior)[mine]  # (k, k): n @ free is missing
        total = equations.total[0]
        between = total[others][:, mine]
        own = total[mine][:, mine] - between.T @ torch.linalg.solve(_damped(total[others][:, others]), between)
        values, vectors = torch.linalg.eigh(own)
        root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
        outputs = torch.linalg.svd(free.T @ root)[0][:, :linear]
        paths = outputs.T @ free.T  # the missing map, projected onto its leading outputs
        select = torch.zeros(inputs + linear, equations.inputs, dtype=torch.float64, device=device)
        select[:inputs, :inputs] = torch.eye(inputs, dtype=torch.float64)
        select[inputs:, inputs:] = paths
        equations.transform(select)
        return (equations, torch.cat([prior[:-1], outputs.T, prior[-1:]])), paths


def _damped(moments: torch.Tensor) -> torch.Tensor:
    """With a little ridge, so that it can be inverted."""
    diagonal = moments.diagonal()
    return moments + torch.diag(1e-3 * diagonal.clamp(min=1e-8 * float(diagonal.mean())))


def _padded(reading: Affine, out: torch.Tensor, neurons: int) -> tuple[Affine, torch.Tensor]:
    """Neurons that do nothing, up to the stock number."""
    missing = neurons - reading[0].shape[0]
    weight = torch.cat([reading[0], reading[0].new_zeros(missing, reading[0].shape[1])])
    bias = torch.cat([reading[1], reading[1].new_zeros(missing)])
    return (weight, bias), torch.cat([out, out.new_zeros(out.shape[0], missing)], dim=1)


def _spread(columns: torch.Tensor, heads: int, size: int) -> torch.Tensor:
    """(n, heads * own size) to (n, heads * size), each head padded with zeros."""
    split = columns.reshape(columns.shape[0], heads, -1)
    return nn.functional.pad(split, (0, size - split.shape[-1])).reshape(columns.shape[0], -1)
