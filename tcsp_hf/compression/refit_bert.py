"""Closed-form refit of a projected BERT, layer by layer, on the compressed model's own inputs.

Going through the sites in order, every linear of the compressed model is solved again by ridge regression so that it
reproduces what the dense model computes there, from what the compressed model really carries:

- *decoder* of a site: `n ~ B~ z + b`, one regression shared by all linears that read the site;
- *writer*: the dense sum before the next norm from the block's activations and the carried stream together (output
  projection and residual map are one regression), each token divided by its norm so that errors count in the
  normalised stream;
- the next site's subspace is chosen from what this regression can predict (reduced-rank regression), the new norm's
  constant by least squares.

Feed-forward neurons are dropped by the optimal brain surgeon (those first that the search doomed) and heads are
narrowed with the same normal equations, before each writer is solved: cut, re-solve, go on.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ..calibration import Calibration
from ..offload import device_of
from .cuts import cut_filters, cut_values, head_rows
from .heads import score_factors, score_moments
from .least_squares import NormalEquations, ridge
from .memory import Growth, give_back
from .metrics import Metrics
from .plan import Sizes
from .streams import GROUP_TOKENS, Group, PackedSample, Stream
from .subspace import Basis, Kept, balanced_spectrum, pca_spectrum, symmetric_root, whole_basis
from .weights import DenseWeights, Tensors

Affine = tuple[torch.Tensor, torch.Tensor]


@dataclass
class RefitResult:
    """Solved weights on the CPU.

    Attributes:
        tensors: state dict entries of embeddings, layers and norms, with the base model's prefix.
        kept: of the subspace of every site, as chosen.
        reader: (weight (D, k), offset (D,)): dense hidden state ~ weight @ z + offset at the last site.
        carried: z at the last site.
        target: n at the last site.
        sample: what both are in the order of.
    """

    tensors: Tensors
    kept: dict[str, Kept]
    reader: Affine
    carried: Stream
    target: Stream
    sample: PackedSample


class BertRefit:
    """One refit; `run` does the work."""

    def __init__(
        self,
        dense: PreTrainedModel,
        stats: Calibration,
        sample: PackedSample,
        sizes: Sizes,
        subspace: str,
        epsilon: float,
        progress: bool | None = None,
        fixed: dict[str, Basis] | None = None,
    ) -> None:
        """`fixed`: subspaces that must be kept (a shared projection); None lets every site choose its own."""
        config = dense.config
        self.device = device_of(dense)
        self.full = config.hidden_size
        self.heads = config.num_attention_heads
        self.head_size = self.full // self.heads
        self.neurons = config.intermediate_size
        self.layers = config.num_hidden_layers
        self.scaling = self.head_size**-0.5
        self.norm_eps = config.layer_norm_eps
        activation = config.hidden_act
        self.activation: Callable[[torch.Tensor], torch.Tensor] = (
            ACT2FN[activation] if isinstance(activation, str) else activation
        )
        self.prefix = "bert." if hasattr(dense, "bert") else ""
        self.weights = DenseWeights(dense, torch.float32, self.device)
        self.tensors = Tensors(dense)
        self.stats = stats
        self.metrics = Metrics(dense, stats)
        self.sample = sample
        self.sizes = sizes
        self.kind = subspace
        self.epsilon = epsilon
        self.fixed = fixed
        self.growth = Growth(GROUP_TOKENS, self.neurons + self.full)
        self.site_names = [name for name in stats.sites if name != "mlm_head"]
        self.bar = tqdm(
            total=2 * self.layers, unit="block", desc="refit", disable=None if progress is None else not progress
        )

    def run(self) -> RefitResult:
        with torch.no_grad(), self.bar:
            basis, dense, carried = self._embeddings()
            kept = {self.site_names[0]: basis.kept}
            for layer in range(self.layers):
                for block in (self._attention, self._feed_forward):
                    basis, dense, carried = block(layer, basis, dense, carried)
                    kept[self.site_names[len(kept)]] = basis.kept
                    self.bar.update(1)
            decoder = self._decoder(2 * self.layers, basis, dense, carried)
        gamma, beta = self._norm(2 * self.layers)
        weight = gamma.double()[:, None] * decoder[:-1].T
        offset = beta.double() + gamma.double() * decoder[-1]
        return RefitResult(self.tensors, kept, (weight.cpu(), offset.cpu()), carried, dense, self.sample)

    # --- the dense model ---------------------------------------------------------------------------------------

    def _norm(self, site: int) -> Affine:
        if site == 0:
            name = "embeddings.LayerNorm"
        else:
            block = "attention.output" if site % 2 else "output"
            name = f"encoder.layer.{(site - 1) // 2}.{block}.LayerNorm"
        return self._linear(name)

    def _linear(self, name: str) -> Affine:
        return self.weights[f"{self.prefix}{name}.weight"], self.weights[f"{self.prefix}{name}.bias"]

    def _made(self, name: str, value: torch.Tensor) -> None:
        """An entry of the compressed model."""
        self.tensors[f"{self.prefix}{name}"] = value

    def _reading(self, name: str, site: int) -> Affine:
        """A linear that reads a site, as a function of the normalised stream n."""
        weight, bias = self._linear(name)
        gamma, beta = self._norm(site)
        return weight * gamma, bias + weight @ beta

    def _normalise(self, stream: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """n (tokens, D) and the root mean square (tokens, 1) that x was divided by."""
        centred = stream - stream.mean(-1, keepdim=True)
        scale = (centred.square().mean(-1, keepdim=True) + self.norm_eps).sqrt()
        return centred / scale, scale

    def _attend(self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, group: Group) -> torch.Tensor:
        query, key, value = (self._split(states, group) for states in (query, key, value))
        context = nn.functional.scaled_dot_product_attention(query, key, value, scale=self.scaling)
        return context.transpose(1, 2).reshape(group.count * group.length, -1)

    def _split(self, states: torch.Tensor, group: Group) -> torch.Tensor:
        return states.view(group.count, group.length, self.heads, -1).transpose(1, 2)

    # --- what tokens and directions count ----------------------------------------------------------------------

    def _token_weights(self, site: int, group: Group) -> torch.Tensor:
        mask = torch.ones(group.count, group.length, dtype=torch.bool, device=self.device)
        return self.metrics.token_weights(self.site_names[site], mask)

    def _metric(self, site: int) -> torch.Tensor:
        """Weight (D, D) of errors at a site."""
        if self.kind == "pca":
            return torch.eye(self.full, dtype=torch.float64, device=self.device)
        return self.metrics.matrix(self.site_names[site])

    def _add(
        self,
        equations: NormalEquations,
        site: int,
        group: Group,
        inputs: list[torch.Tensor],
        target: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        held_out = self.sample.held_out[group.rows].to(self.device)
        segments = self.metrics.segments([group.length] * group.count)
        equations.add(inputs, target, weights, held_out, segments, self.metrics.coherence(self.site_names[site]))

    def _choose(self, site: int, moment: torch.Tensor) -> Basis:
        """The subspace of a site for a stream with this second moment."""
        size = self.sizes.hidden[site]
        if self.fixed is not None:
            return self.fixed[self.site_names[site]]
        if size == self.full:
            return whole_basis(size)
        if self.kind == "pca":
            return pca_spectrum(moment.cpu()).cut(size)
        fisher = self.stats.sites[self.site_names[site]].fisher
        return balanced_spectrum(moment.cpu(), fisher, self.epsilon).cut(size)

    # --- the compressed model, block by block ------------------------------------------------------------------

    def _stream(self, width: int) -> Stream:
        return Stream(self.sample.tokens, width)

    def _read(self, stream: Stream, group: Group) -> torch.Tensor:
        return stream.read(group.rows).to(self.device)

    def _embeddings(self) -> tuple[Basis, Stream, Stream]:
        names = [f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")]
        tables = [self.weights.stored(f"{self.prefix}{name}") for name in names]
        statistics = self.stats.sites[self.site_names[0]]
        basis = self._choose(0, statistics.second_moment)
        dense = self._stream(self.full)
        sums = self._stream(basis.size)
        encoder = basis.encoder.to(self.device, torch.float32)
        for name in names:
            self._made(name, self.weights.table(f"{self.prefix}{name}", basis.encoder, centred=True))
        for group in self.growth.between(self.sample.groups):
            rows = group.rows
            ids = (self.sample.input_ids[rows], self.sample.positions[rows], self.sample.token_type_ids[rows])
            parts = [table[i.to(table.device)].to(self.device) for table, i in zip(tables, ids, strict=True)]
            stream = torch.stack(parts).float().sum(0)
            normalised, scale = self._normalise(stream)
            dense.write(rows, normalised)
            sums.write(rows, (normalised * scale) @ encoder)
        return basis, dense, self._close_site(0, basis, dense, sums, "embeddings.norm")

    def _close_site(self, site: int, basis: Basis, dense: Stream, sums: Stream, norm: str) -> Stream:
        """Normalise the new sums y and fit the norm's constant; returns z."""
        encoder = basis.encoder.to(self.device, torch.float32)
        product = square = 0.0
        for group in self.growth.between(self.sample.groups):
            unit = self._unit(self._read(sums, group), basis)
            target = self._read(dense, group) @ encoder
            weights = self._token_weights(site, group).unsqueeze(1)
            product += float((weights * unit * target).sum(dtype=torch.float64))
            square += float((weights * unit.square()).sum(dtype=torch.float64))
        constant = product / square if square > 0 else 1.0
        carried = self._stream(basis.size)
        for group in self.growth.between(self.sample.groups):
            carried.write(group.rows, constant * self._unit(self._read(sums, group), basis))
        sums.close()
        self._made(f"{norm}.weight", torch.full((basis.size,), constant, dtype=torch.float32))
        return carried

    def _unit(self, sums: torch.Tensor, basis: Basis) -> torch.Tensor:
        """The norm's output for weight 1: y / sqrt(mean(y²) + eps), eps as in `TCSPBertSiteNorm`."""
        if basis.size == self.full:
            sums = sums - sums.mean(-1, keepdim=True)
        floor = self.norm_eps * self.full / basis.size
        return sums / (sums.square().mean(-1, keepdim=True) + floor).clamp(min=1e-24).sqrt()

    def _decoder(self, site: int, basis: Basis, dense: Stream, carried: Stream) -> torch.Tensor:
        """(k + 1, D) float64: n ~ [z, 1] @ decoder."""
        equations = NormalEquations.zeros(basis.size, self.full, self.device)
        for group in self.growth.between(self.sample.groups):
            inputs, target = [self._read(carried, group)], self._read(dense, group)
            self._add(equations, site, group, inputs, target, self._token_weights(site, group))
        prior = torch.cat([basis.decoder.T, torch.zeros(1, self.full, dtype=torch.float64)]).to(self.device)
        return ridge(equations, prior, self._metric(site))

    def _through(self, decoder: torch.Tensor, reading: Affine) -> Affine:
        """A linear of n as a linear of z."""
        weight, bias = reading
        return (weight.double() @ decoder[:-1].T).float(), (bias.double() + weight.double() @ decoder[-1]).float()

    def _attention(self, layer: int, basis: Basis, dense: Stream, carried: Stream) -> tuple[Basis, Stream, Stream]:
        site, name = 2 * layer, f"encoder.layer.{layer}.attention"
        readings = [self._reading(f"{name}.self.{part}", site) for part in ("query", "key", "value")]
        decoder = self._decoder(site, basis, dense, carried)
        query, key, value = (self._through(decoder, reading) for reading in readings)
        output = self._linear(f"{name}.output.dense")
        query_key = self.sizes.qk[layer]
        moments = [torch.zeros(self.heads, self.head_size, self.head_size, dtype=torch.float64) for _ in range(2)]
        next_dense, scales = self._stream(self.full), self._stream(1)
        gamma, beta = self._norm(site)
        for group in self.growth.between(self.sample.groups):
            stream = self._read(dense, group)
            q, k, v = (nn.functional.linear(stream, *reading) for reading in readings)
            context = self._attend(q, k, v, group)
            sums = nn.functional.linear(context, *output) + gamma * stream + beta
            normalised, scale = self._normalise(sums)
            next_dense.write(group.rows, normalised)
            scales.write(group.rows, scale)
            if query_key < self.head_size:
                mine = self._read(carried, group)
                q, k = (self._split(nn.functional.linear(mine, *part), group) for part in (query, key))
                attention = (q @ k.mT * self.scaling).softmax(-1)
                for total, part in zip(moments, score_moments(q, k, attention), strict=True):
                    total += part.cpu()
        if query_key < self.head_size:
            factors = score_factors(moments[0], moments[1], query_key)
            query, key = (
                _turned(part, factor.to(self.device)) for part, factor in zip((query, key), factors, strict=True)
            )

        contexts = self._stream(self.full)
        for group in self.growth.between(self.sample.groups):
            mine = self._read(carried, group)
            q, k, v = (nn.functional.linear(mine, *part) for part in (query, key, value))
            contexts.write(group.rows, self._attend(q, k, v, group))
        equations, prior, free = self._writer_equations(
            site + 1, basis, output, contexts.read, carried, next_dense, scales
        )
        root = symmetric_root(self._metric(site + 1).cpu()).to(self.device)
        (equations, prior), turn, kept = cut_values(
            (equations, prior), root, self.heads, self.head_size, self.sizes.heads[layer], self.sizes.vo[layer]
        )
        if turn is not None:
            value = turn.float() @ value[0], turn.float() @ value[1]
        if len(kept) < self.heads:
            rows = head_rows(kept, query_key)
            query, key = ((part[0][rows], part[1][rows]) for part in (query, key))

        def read_contexts(rows: slice) -> torch.Tensor:
            read = contexts.read(rows).to(self.device)
            return read if turn is None else read @ turn.float().T

        for kind, index in (("weight", 0), ("bias", 1)):
            self._made(f"{name}.self.qkv.{kind}", torch.cat([part[index] for part in (query, key, value)]))
        solution, next_basis = self._solve_writer(site + 1, equations, prior)
        del equations, prior  # the sums are the largest thing here
        give_back(8 * len(solution) ** 2)
        result = self._write(site + 1, f"{name}.output", solution, next_basis, free, read_contexts, carried, next_dense)
        for stream_ in (contexts, scales, carried, dense):
            stream_.close()
        return result

    def _feed_forward(self, layer: int, basis: Basis, dense: Stream, carried: Stream) -> tuple[Basis, Stream, Stream]:
        site, name = 2 * layer + 1, f"encoder.layer.{layer}"
        reading = self._reading(f"{name}.intermediate.dense", site)
        inner = self._through(self._decoder(site, basis, dense, carried), reading)
        output = self._linear(f"{name}.output.dense")
        candidates = self.sizes.candidates(layer, self.neurons)
        inner = inner[0][candidates], inner[1][candidates]
        gamma, beta = self._norm(site)
        next_dense, scales = self._stream(self.full), self._stream(1)
        for group in self.growth.between(self.sample.groups):
            stream = self._read(dense, group)
            neurons = self.activation(nn.functional.linear(stream, *reading))
            normalised, scale = self._normalise(nn.functional.linear(neurons, *output) + gamma * stream + beta)
            next_dense.write(group.rows, normalised)
            scales.write(group.rows, scale)

        def neurons_of(rows: slice) -> torch.Tensor:
            return self.activation(nn.functional.linear(carried.read(rows).to(self.device), *inner))

        output = output[0][:, candidates], output[1]
        equations, prior, free = self._writer_equations(
            site + 1, basis, output, neurons_of, carried, next_dense, scales
        )
        root = symmetric_root(self._metric(site + 1).cpu()).to(self.device)
        (equations, prior), kept = cut_filters((equations, prior), root, len(candidates), self.sizes.filters[layer])
        inner = inner[0][kept], inner[1][kept]
        for kind, part in zip(("weight", "bias"), inner, strict=True):
            self._made(f"{name}.intermediate.dense.{kind}", part)

        def kept_neurons(rows: slice) -> torch.Tensor:
            return self.activation(nn.functional.linear(carried.read(rows).to(self.device), *inner))

        solution, next_basis = self._solve_writer(site + 1, equations, prior)
        del equations, prior  # the sums are the largest thing here
        give_back(8 * len(solution) ** 2)
        result = self._write(site + 1, f"{name}.output", solution, next_basis, free, kept_neurons, carried, next_dense)
        for stream_ in (scales, carried, dense):
            stream_.close()
        return result

    def _writer_equations(
        self,
        site: int,
        basis: Basis,
        output: Affine,
        block: Callable[[slice], torch.Tensor],
        carried: Stream,
        next_dense: Stream,
        scales: Stream,
    ) -> tuple[NormalEquations, torch.Tensor, bool]:
        """Normal equations of the sum before norm `site` in D entries, its prior, and whether the residual is free.

        Inputs are the block's activations and, unless both sites have the dense width, the carried stream. Tokens
        are divided by the dense norm, so that errors count in the normalised stream.
        """
        free = self.sizes.hidden[site - 1] == self.sizes.hidden[site] == self.full
        gamma, _ = self._norm(site - 1)
        prior = self._writer_prior(site, None if free else basis, output)
        give_back(8 * len(prior) ** 2)  # what the passes before this left, before the sums
        equations = NormalEquations.zeros(prior.shape[0] - 1, self.full, self.device)
        for group in self.growth.between(self.sample.groups):
            rows = group.rows
            scale = self._read(scales, group)
            target = self._read(next_dense, group) * scale
            mine = self._read(carried, group)
            inputs_here = [block(rows).to(self.device)]
            if free:
                residual = mine * gamma
                target = target - (residual - residual.mean(-1, keepdim=True))
            else:
                inputs_here.append(mine)
            importance = self._token_weights(site, group) / scale.squeeze(1).square()
            self._add(equations, site, group, inputs_here, target, importance)
        return equations, prior, free

    def _writer_prior(self, site: int, basis: Basis | None, output: Affine) -> torch.Tensor:
        """The projected weights of the sum before norm `site`; without a basis the residual is no part of them."""
        gamma, beta = self._norm(site - 1)
        weight, bias = (part.double() for part in output)
        parts = [weight.T, bias[None] + beta.double()[None]]
        if basis is not None:
            parts.insert(1, (gamma.double()[:, None] * basis.decoder.to(self.device)).T)
        prior = torch.cat(parts)
        return prior.sub_(prior.mean(1, keepdim=True))

    def _solve_writer(self, site: int, equations: NormalEquations, prior: torch.Tensor) -> tuple[torch.Tensor, Basis]:
        """The sum before norm `site` from its inputs, (entries, D), and the subspace of what it predicts."""
        solution = ridge(equations, prior, self._metric(site))
        if self.sizes.hidden[site] == self.full:
            return solution, whole_basis(self.full)
        with equations.joined() as (moments, _):
            predicted = solution.T @ moments @ solution / moments[-1, -1]
        give_back(equations.nbytes)
        return solution, self._choose(site, predicted)

    def _write(
        self,
        site: int,
        name: str,
        solution: torch.Tensor,
        basis: Basis,
        free: bool,
        block: Callable[[slice], torch.Tensor],
        carried: Stream,
        next_dense: Stream,
    ) -> tuple[Basis, Stream, Stream]:
        """Keep the block's weights, and carry the stream through them to norm `site`."""
        written = solution @ basis.encoder.to(self.device)
        inputs = block(slice(0, 1)).shape[1]
        gamma, _ = self._norm(site - 1)
        self._made(f"{name}.dense.weight", written[:inputs].T)
        self._made(f"{name}.dense.bias", written[-1])
        self._made(f"{name}.residual.weight", gamma if free else written[inputs:-1].T)
        weights = written.float()
        sums = self._stream(basis.size)
        for group in self.growth.between(self.sample.groups):
            mine = self._read(carried, group)
            total = block(group.rows).to(self.device) @ weights[:inputs] + weights[-1]
            total += mine * gamma if free else mine @ weights[inputs:-1]
            sums.write(group.rows, total)
        carried_next = self._close_site(site, basis, next_dense, sums, f"{name}.norm")
        return basis, next_dense, carried_next


def _turned(part: Affine, factors: torch.Tensor) -> Affine:
    """Apply one map per head, factors (H, r, d), to the rows of a linear with H * d outputs."""
    turn = torch.block_diag(*factors).to(part[0])
    return turn @ part[0], turn @ part[1]
