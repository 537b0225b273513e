"""Closed-form refit of a projected T5, block by block, on the compressed model's own inputs.

The stream of a stack lives in one subspace and blocks add to it, so there are no residual maps to solve. At every
site the constant of the norm and a decoder `n ~ X z` are fitted (the readers' weights become `W diag(gamma) X`), and
every output linear is solved so that the stream with its own error so far, plus what the block writes, is the dense
stream seen from the subspace: what earlier blocks got wrong, later ones make up for. Tokens are divided by the dense
stream's norm. Filters go by the optimal brain surgeon, heads are dropped and narrowed, with the same normal equations.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import PreTrainedModel
from transformers.activations import ACT2FN

from ..architectures import Block, blocks_of, sites_of
from ..calibration import Calibration
from ..offload import device_of, read_tensor
from .check import probe_sequences
from .cuts import cut_filters, cut_values, head_rows
from .heads import score_factors, score_moments
from .least_squares import NormalEquations, ridge
from .memory import Growth
from .metrics import Metrics
from .plan import Sizes
from .streams import GROUP_TOKENS, Group, PackedSample, Stream, padded_batches
from .subspace import Basis, symmetric_root
from .weights import Tensors

_PROBE_SEQUENCES, _PROBE_TOKENS = 64, 4096


@dataclass
class T5Refit:
    """Solved weights on the CPU.

    Attributes:
        tensors: state dict entries of blocks and norms.
        lifts: by stack, (D, k): dense hidden state ~ lift @ z at its last site.
        scales: by stack, (k,): the constants of its last norm, one for each entry: for a norm that keeps its weight.
        kept_heads: indices of the kept heads, for every attention block in the order of the forward pass.
    """

    tensors: Tensors
    lifts: dict[str, torch.Tensor] = field(default_factory=dict)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    kept_heads: list[list[int]] = field(default_factory=list)


@dataclass
class _Memory:
    """What cross-attention reads: normalised streams at the encoder's last site, dense and own, and the decoder."""

    sample: PackedSample
    dense: Stream
    own: Stream
    decoder: torch.Tensor
    gamma: torch.Tensor


class _Stack:
    """The refit of one stack."""

    def __init__(
        self,
        dense: Any,
        stats: Calibration,
        stack: str,
        sample: PackedSample,
        basis: Basis,
        sizes: Sizes,
        metrics: Metrics,
        result: T5Refit,
        numbers: dict[str, int],
        memory: _Memory | None,
    ) -> None:
        config = dense.config
        self.dense, self.stats, self.stack, self.sample = dense, stats, stack, sample
        self.basis, self.sizes, self.metrics, self.result = basis, sizes, metrics, result
        self.memory = memory
        self.numbers = numbers  # index of each block in the lists of `Sizes`, by the site it writes to
        self.device = device_of(dense)
        self.full, self.heads, self.head_size, self.neurons = (
            config.d_model,
            config.num_heads,
            config.d_kv,
            config.d_ff,
        )
        self.growth = Growth(GROUP_TOKENS, self.neurons + self.full)
        self.eps = float(config.layer_norm_epsilon)
        self.activation = ACT2FN[config.dense_act_fn]
        self.sites = {site.name: site for site in sites_of(dense)}
        self.blocks = [block for block in blocks_of(dense) if block.stack == stack]
        self.prefix = f"{'transformer.' if hasattr(dense, 'transformer') else ''}{stack}"
        self.encoder = basis.encoder.to(self.device, torch.float32)
        self.lift = basis.decoder.to(self.device)

    def run(self, bar: Any) -> _Memory:
        """Refit every block; returns what the decoder's cross-attention reads."""
        stream, own = self._embed()
        for block in self.blocks:
            normalised, carried, decoder = self._open(block.reads, stream, own)
            solve = self._feed_forward if block.kind == "ffn" else self._attention
            stream, own = solve(block, stream, own, normalised, carried, decoder)
            for used in (normalised, carried):
                used.close()
            bar.update(1)
        last = f"{self.stack}.final"
        normalised, carried, decoder = self._open(last, stream, own)
        stream.close()
        own.close()
        gamma = self._gamma(last)
        self.result.lifts[self.stack] = (gamma[:, None] * decoder.T).cpu()
        return _Memory(self.sample, normalised, carried, decoder, gamma)

    # --- pieces ------------------------------------------------------------------------------------------------

    def _gamma(self, name: str) -> torch.Tensor:
        norm: Any = self.sites[name].norm
        return read_tensor(norm, "weight").to(self.device, torch.float64)

    def _norm_name(self, name: str) -> str:
        if name.endswith(".final"):
            return f"{self.prefix}.final_layer_norm.weight"
        parts = ("attention", "ffn") if self.stack == "encoder" else ("attention", "cross", "ffn")
        _, layer, part = name.split(".")
        return f"{self.prefix}.block.{layer}.layer.{parts.index(part)}.layer_norm.weight"

    def _block_name(self, block: Block) -> str:
        position = {"attention": 0, "cross": 1, "ffn": 2 if self.stack == "decoder" else 1}[block.kind]
        module = {"attention": "SelfAttention", "cross": "EncDecAttention", "ffn": "DenseReluDense"}[block.kind]
        return f"{self.prefix}.block.{block.layer}.layer.{position}.{module}"

    def _stream(self, width: int) -> Stream:
        return Stream(self.sample.tokens, width)

    def _read(self, stream: Stream, group: Group) -> torch.Tensor:
        return stream.read(group.rows).to(self.device)

    def _rms(self, stream: torch.Tensor, eps: float) -> torch.Tensor:
        return (stream.square().mean(-1, keepdim=True) + eps).sqrt()

    def _embed(self) -> tuple[Stream, Stream]:
        table = read_tensor(self.dense.get_input_embeddings(), "weight")
        stream, own = self._stream(self.full), self._stream(self.basis.size)
        for group in self.growth.between(self.sample.groups):
            rows = table[self.sample.input_ids[group.rows].to(table.device)].to(self.device, torch.float32)
            stream.write(group.rows, rows)
            own.write(group.rows, rows @ self.encoder)
        return stream, own

    def _open(self, name: str, stream: Stream, own: Stream) -> tuple[Stream, Stream, torch.Tensor]:
        """Norm both streams at a site; fit the norm's constant and the decoder X (k, D) float64, n ~ z @ X."""
        normalised, carried = self._stream(self.full), self._stream(self.basis.size)
        product = torch.zeros(self.basis.size, dtype=torch.float64, device=self.device)
        square = torch.zeros_like(product)
        for group in self.growth.between(self.sample.groups):
            dense = self._read(stream, group)
            dense = dense / self._rms(dense, self.eps)
            mine = self._read(own, group)
            mine = mine / self._rms(mine, self.eps * self.full / self.basis.size)
            normalised.write(group.rows, dense)
            carried.write(group.rows, mine)
            product += (mine * (dense @ self.encoder)).sum(0, dtype=torch.float64)
            square += mine.square().sum(0, dtype=torch.float64)
        constant = float(product.sum() / square.sum()) if bool(square.any()) else 1.0
        if name.endswith(".final"):
            self.result.scales[self.stack] = torch.where(square > 0, product / square, 1.0).cpu()
        self.result.tensors[self._norm_name(name)] = torch.full((self.basis.size,), constant, dtype=torch.float64)
        equations = NormalEquations.zeros(self.basis.size, self.full, self.device, bias=False)
        for group in self.growth.between(self.sample.groups):
            mine = constant * self._read(carried, group)
            carried.write(group.rows, mine)
            ones = torch.ones(len(mine), device=self.device)
            self._add(equations, name, group, [mine], self._read(normalised, group), ones)
        decoder = ridge(equations, self.lift.T.contiguous(), self.metrics.matrix(name))
        return normalised, carried, decoder

    def _add(
        self,
        equations: NormalEquations,
        name: str,
        group: Group,
        inputs: list[torch.Tensor],
        target: torch.Tensor,
        weights: torch.Tensor,
    ) -> None:
        held_out = self.sample.held_out[group.rows].to(self.device)
        segments = self.metrics.segments([group.length] * group.count)
        equations.add(inputs, target, weights, held_out, segments, self.metrics.coherence(name))

    def _weights(self, block: Block) -> list[torch.Tensor]:
        return [read_tensor(linear, "weight").to(self.device, torch.float32) for linear in block.inner]

    def _readers(self, weights: list[torch.Tensor], gamma: torch.Tensor, decoder: torch.Tensor) -> list[torch.Tensor]:
        """Linears of gamma * n, as linears of z."""
        return [(weight.double() * gamma @ decoder.T).float() for weight in weights]

    def _write(
        self,
        block: Block,
        stream: Stream,
        own: Stream,
        written: Callable[[Group], torch.Tensor],
        activations: Callable[[Group], torch.Tensor],
        cut: Callable[[Any, torch.Tensor], tuple[Any, torch.Tensor | None]],
        candidates: list[int] | slice = slice(None),
    ) -> tuple[Stream, Stream]:
        """Solve the output linear and move both streams on.

        Args:
            candidates: which of the dense linear's inputs `activations` are.
            written: what the dense block adds to the dense stream, (tokens, D).
            activations: the compressed block's inputs of the output linear, (tokens, candidates).
            cut: from a problem and the root of its metric, the smaller problem and the map or the indices of the
                inputs that are left (None: all).
        """
        output = read_tensor(block.output, "weight").to(self.device, torch.float64)[:, candidates]
        prior = output.T @ self.encoder.double()
        equations = NormalEquations.zeros(output.shape[1], self.basis.size, self.device, bias=False)
        next_stream = self._stream(self.full)
        for group in self.growth.between(self.sample.groups):
            after = self._read(stream, group) + written(group)
            next_stream.write(group.rows, after)
            weights = self._rms(after, self.eps).squeeze(-1).square().reciprocal()
            target = after @ self.encoder - self._read(own, group)
            self._add(equations, block.writes, group, [activations(group)], target, weights)
        metric = self.lift.T @ self.metrics.matrix(block.writes) @ self.lift
        problem, left = cut((equations, prior), symmetric_root(metric.cpu()).to(self.device))
        equations, prior = problem
        solution = ridge(equations, prior, metric)
        kind = "wo" if block.kind == "ffn" else "o"
        self.result.tensors[f"{self._block_name(block)}.{kind}.weight"] = solution.T.cpu()
        weight = solution.float()
        next_own = self._stream(self.basis.size)
        for group in self.growth.between(self.sample.groups):
            inputs = activations(group)
            if left is not None:
                inputs = inputs @ left.float().T if left.is_floating_point() else inputs[:, left]
            next_own.write(group.rows, self._read(own, group) + inputs @ weight)
        stream.close()
        own.close()
        return next_stream, next_own

    # --- feed-forward --------------------------------------------------------------------------------------------

    def _neurons(self, states: torch.Tensor, weights: list[torch.Tensor]) -> torch.Tensor:
        inner = self.activation(nn.functional.linear(states, weights[0]))
        return inner * nn.functional.linear(states, weights[1]) if len(weights) > 1 else inner

    def _feed_forward(
        self, block: Block, stream: Stream, own: Stream, normalised: Stream, carried: Stream, decoder: torch.Tensor
    ) -> tuple[Stream, Stream]:
        gamma = self._gamma(block.reads)
        dense_weights = [(weight * gamma).float() for weight in self._weights(block)]
        number = self.numbers[block.writes]
        candidates = self.sizes.candidates(number, self.neurons)
        mine = [weight[candidates] for weight in self._readers(self._weights(block), gamma, decoder)]
        output = read_tensor(block.output, "weight").to(self.device, torch.float32)
        found: dict[str, torch.Tensor] = {}

        def cut(problem: Any, root: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
            smaller, kept = cut_filters(problem, root, len(candidates), self.sizes.filters[number])
            found["kept"] = kept
            return smaller, kept

        moved = self._write(
            block,
            stream,
            own,
            lambda group: self._neurons(self._read(normalised, group), dense_weights) @ output.T,
            lambda group: self._neurons(self._read(carried, group), mine),
            cut,
            candidates,
        )
        names = ("wi_0", "wi_1") if len(mine) > 1 else ("wi",)
        for name, weight in zip(names, mine, strict=True):
            self.result.tensors[f"{self._block_name(block)}.{name}.weight"] = weight[found["kept"]].cpu()
        return moved

    # --- attention -----------------------------------------------------------------------------------------------

    def _bias(self, block: Block, length: int) -> torch.Tensor | None:
        """Relative position bias and causal mask (1, H, length, length) of a self-attention block."""
        if block.kind == "cross":
            return None
        first: Any = self.blocks[0].attention
        position = torch.arange(length, device=self.device)
        bucket = first._relative_position_bucket(
            position[None, :] - position[:, None],
            bidirectional=self.stack == "encoder",
            num_buckets=first.relative_attention_num_buckets,
            max_distance=first.relative_attention_max_distance,
        )
        bias = first.relative_attention_bias(bucket).permute(2, 0, 1).unsqueeze(0).float()
        if self.stack == "decoder":
            later = position[None, :] > position[:, None]
            bias = bias.masked_fill(later, torch.finfo(torch.float32).min)
        return bias.detach()

    def _split(self, states: torch.Tensor, count: int) -> torch.Tensor:
        return states.view(count, -1, self.heads, states.shape[-1] // self.heads).transpose(1, 2)

    def _sources(
        self, block: Block, group: Group, own: bool, states: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What keys and values read, (count * keys, width), and the additive mask or bias of the scores."""
        if self.memory is None or block.kind != "cross":
            return states, self._bias(block, group.length)
        rows, real = self.memory.sample.padded_rows(group.members)
        stream = self.memory.own if own else self.memory.dense
        padding = torch.zeros(real.shape, dtype=torch.float32).masked_fill(~real, torch.finfo(torch.float32).min)
        return stream.gather(rows.flatten()).to(self.device), padding[:, None, None, :].to(self.device)

    def _heads_of(
        self, block: Block, group: Group, own: bool, states: torch.Tensor, weights: list[torch.Tensor]
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        source, bias = self._sources(block, group, own, states)
        query = self._split(nn.functional.linear(states, weights[0]), group.count)
        key, value = (self._split(nn.functional.linear(source, weight), group.count) for weight in weights[1:])
        return query, key, value, bias

    def _context(self, heads: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]) -> torch.Tensor:
        query, key, value, bias = heads
        context = nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, scale=1.0)
        return context.transpose(1, 2).reshape(context.shape[0] * context.shape[2], -1)

    def _attention(
        self, block: Block, stream: Stream, own: Stream, normalised: Stream, carried: Stream, decoder: torch.Tensor
    ) -> tuple[Stream, Stream]:
        gamma = self._gamma(block.reads)
        weights = self._weights(block)
        mine = self._readers(weights, gamma, decoder)
        dense_weights = [(weight * gamma).float() for weight in weights]
        if block.kind == "cross":
            assert self.memory is not None
            mine[1:] = self._readers(weights[1:], self.memory.gamma, self.memory.decoder)
            dense_weights[1:] = [(weight * self.memory.gamma).float() for weight in weights[1:]]
        number = self.numbers[block.writes]
        query_key = self.sizes.qk[number]
        if query_key < self.head_size:
            factors = self._score_factors(block, carried, mine, query_key)
            mine[0], mine[1] = (
                torch.block_diag(*factor).to(weight) @ weight for factor, weight in zip(factors, mine[:2], strict=True)
            )
        output = read_tensor(block.output, "weight").to(self.device, torch.float32)
        contexts = self._stream(self.heads * self.head_size)
        for group in self.growth.between(self.sample.groups):
            states = self._read(carried, group)
            contexts.write(group.rows, self._context(self._heads_of(block, group, True, states, mine)))
        found: dict[str, Any] = {}

        def cut(problem: Any, root: torch.Tensor) -> tuple[Any, torch.Tensor | None]:
            smaller, turn, kept = cut_values(
                problem, root, self.heads, self.head_size, self.sizes.heads[number], self.sizes.vo[number]
            )
            found.update(turn=turn, kept=kept)
            return smaller, turn

        moved = self._write(
            block,
            stream,
            own,
            lambda group: (
                self._context(self._heads_of(block, group, False, self._read(normalised, group), dense_weights))
                @ output.T
            ),
            lambda group: self._read(contexts, group),
            cut,
        )
        contexts.close()
        rows = head_rows(found["kept"], query_key)
        if found["turn"] is not None:
            mine[2] = found["turn"].float() @ mine[2]
        for name, weight in zip("qkv", (mine[0][rows], mine[1][rows], mine[2]), strict=True):
            self.result.tensors[f"{self._block_name(block)}.{name}.weight"] = weight.cpu()
        self.result.kept_heads.append(found["kept"].tolist())
        return moved

    def _score_factors(
        self, block: Block, carried: Stream, mine: list[torch.Tensor], size: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        moments = [torch.zeros(self.heads, self.head_size, self.head_size, dtype=torch.float64) for _ in range(2)]
        for group in self.growth.between(self.sample.groups):
            query, key, _, bias = self._heads_of(block, group, True, self._read(carried, group), mine)
            scores = query @ key.mT
            attention = (scores if bias is None else scores + bias).softmax(-1)
            for total, part in zip(moments, score_moments(query, key, attention), strict=True):
                total += part.cpu()
        return score_factors(moments[0], moments[1], size)


def refit_t5(
    dense: PreTrainedModel,
    stats: Calibration,
    bases: dict[str, Basis],
    sizes: Sizes,
    progress: bool | None = None,
) -> T5Refit:
    """Refit both stacks (or the only one) in these subspaces; sizes as for `Builder.build`."""
    sequences = stats.sample.sequences()
    probe = padded_batches(probe_sequences(stats, _PROBE_SEQUENCES, _PROBE_TOKENS), device_of(dense))
    metrics = Metrics(dense, stats, probe)
    blocks = blocks_of(dense)
    numbers: dict[str, int] = {}
    for chosen in ([b for b in blocks if b.attends], [b for b in blocks if not b.attends]):
        numbers.update({block.writes: i for i, block in enumerate(chosen)})
    result = T5Refit(Tensors(dense))
    bar = tqdm(total=len(blocks), unit="block", desc="refit", disable=None if progress is None else not progress)
    memory: _Memory | None = None
    with torch.no_grad(), bar:
        for stack, ids in (("encoder", "input_ids"), ("decoder", "decoder_input_ids")):
            if f"{stack}.final" not in bases:
                continue
            sample = PackedSample(sequences, ids)
            basis = bases[f"{stack}.final"]
            walk = _Stack(dense, stats, stack, sample, basis, sizes, metrics, result, numbers, memory)
            after = walk.run(bar)
            if memory is not None:
                memory.dense.close()
                memory.own.close()
            memory = after
    if memory is not None:
        memory.dense.close()
        memory.own.close()
    return result
