"""The closed-form refit against its own description: every solved weight solves the problem that it is said to solve.

The problems are put together again here, in float64, from what the dense and the compressed model really compute on the
sample's sequences, one after the other and without padding. Models are tiny and everything in them is cut.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from typing import Any

import pytest
import torch
from common import Case, D, find, make_dense, make_rows
from torch import nn
from transformers import PreTrainedModel

from tcsp_hf import Calibration, TCSPError, calibrate, compress
from tcsp_hf.architectures import Block, blocks_of, sites_of
from tcsp_hf.compression.cuts import cut_filters, cut_values, head_rows
from tcsp_hf.compression.filters import drop_inputs
from tcsp_hf.compression.heads import drop_heads, inverse_root, score_factors, score_moments, value_factors
from tcsp_hf.compression.least_squares import LAMBDAS, NormalEquations, Segments, ridge, solve
from tcsp_hf.compression.metrics import Metrics
from tcsp_hf.compression.plan import Sizes
from tcsp_hf.compression.streams import padded_batches
from tcsp_hf.compression.subspace import Basis, balanced_spectrum, pca_spectrum, symmetric_root

COMPRESS = import_module("tcsp_hf.compression.compress")
HEADS, HEAD, NEURONS = 4, 8, 40
CLOSE = 0.02
"""Of a solution found in float32 to the same one in float64, relative (Frobenius)."""
Rows = list[torch.Tensor]


# The dense and the compressed model on the sample, and what was cut --------------------------------------------------


@dataclass
class Refit:
    """A refit model, its dense source, and everything that both compute, by sequence (tokens, width) in float64.

    `cuts` and `metrics`, block by block: what was cut, and the metric of the errors by which it was chosen.
    `scales`: of a T5's last norms.
    """

    case: Case
    dense: PreTrainedModel
    stats: Calibration
    small: PreTrainedModel
    sizes: Sizes
    bases: dict[str, Basis] = field(default_factory=dict)
    cuts: list[tuple[str, Any, Any]] = field(default_factory=list)
    metrics: list[torch.Tensor] = field(default_factory=list)
    scales: dict[str, torch.Tensor] = field(default_factory=dict)
    sums: dict[str, Rows] = field(default_factory=dict)
    seen: dict[str, Rows] = field(default_factory=dict)

    @property
    def held(self) -> list[bool]:
        return [i % 5 == 4 for i in range(len(self.stats.sample.sequences()))]


def record(store: dict[str, Rows], key: str, output: bool) -> Callable[..., None]:
    def hook(module: nn.Module, args: Any, result: Any = None) -> None:
        value = result if output else args[0]
        store.setdefault(key, []).append((value[0] if isinstance(value, tuple) else value)[0].detach().double())

    return hook


def make_refit(case: Case, sizes: Sizes, rows: int, monkeypatch: pytest.MonkeyPatch, **options: Any) -> Refit:
    dense = make_dense(case, torch.float32)
    stats = calibrate(dense, make_rows(case, rows), batch_size=16, progress=False)
    module = import_module(f"tcsp_hf.compression.refit_{case.family}")
    cuts: list[tuple[str, Any, Any]] = []
    metrics: list[torch.Tensor] = []

    def recorded(name: str) -> None:
        original = getattr(module, name)

        def cut(*args: Any) -> Any:
            found = original(*args)
            metrics.append(args[1] @ args[1].T)
            cuts.append((name, found[-1], found[1] if name == "cut_values" else None))
            return found

        monkeypatch.setattr(module, name, cut)

    recorded("cut_values")
    recorded("cut_filters")
    monkeypatch.setattr(COMPRESS, "_choose_sizes", lambda *args: sizes.copy())
    bases: dict[str, Basis] = {}
    scales: dict[str, torch.Tensor] = {}
    if case.family == "bert":
        run = module.BertRefit.run
        monkeypatch.setattr(module.BertRefit, "run", lambda self: (found := run(self), bases.update(found.bases))[0])
    else:
        cut_bases = COMPRESS._cut_bases
        monkeypatch.setattr(COMPRESS, "_cut_bases", lambda *args: (found := cut_bases(*args), bases.update(found))[0])
        refit_t5 = module.refit_t5
        monkeypatch.setattr(
            COMPRESS, "refit_t5", lambda *args: (found := refit_t5(*args), scales.update(found.scales))[0]
        )
    small = compress(dense, stats, hidden_size=D // 2, axes=("hidden",), refit=True, multiple_of=1, **options)
    refit = Refit(case, dense, stats, small, sizes, bases, cuts, metrics, scales)
    run_both(refit)
    return refit


def run_both(refit: Refit) -> None:
    small, base = refit.small.double(), refit.small.base_model
    watched: list[tuple[nn.Module, str]] = []
    if refit.case.family == "bert":
        watched.append((base.embeddings.norm, "embeddings"))
        for i, layer in enumerate(base.encoder.layer):
            for block, site in ((layer.attention, f"layer.{i}.attention"), (layer, f"layer.{i}.output")):
                watched += [(block.output.norm, site), (block.output.dense, f"{site} inputs")]
    else:
        for site in sites_of(refit.dense):
            watched.append((of_small(refit, site.norm), site.name))
        for block in blocks_of(refit.dense):
            watched.append((of_small(refit, block.output), f"{block.writes} inputs"))
    handles = [
        site.norm.register_forward_pre_hook(record(refit.sums, site.name, False)) for site in sites_of(refit.dense)
    ]
    for module, name in watched:
        handles.append(module.register_forward_pre_hook(record(refit.seen, f"{name} before", False)))
        handles.append(module.register_forward_hook(record(refit.seen, name, True)))
    dense = refit.dense.double()
    with torch.no_grad():
        for row in refit.stats.sample.sequences():
            inputs = {name: torch.tensor([values]) for name, values in row.items()}
            dense(**inputs)
            small(**inputs)
    for handle in handles:
        handle.remove()
    dense.float()


def of_small(refit: Refit, module: nn.Module) -> nn.Module:
    """The module of the compressed T5 under the same name."""
    name = next(name for name, found in refit.dense.named_modules() if found is module)
    return refit.small.get_submodule(name)


# The problems, put together again ------------------------------------------------------------------------------------


def pieces(length: int, size: int) -> list[list[int]]:
    """The tokens of a sequence in equal pieces of about `size`."""
    count = max(1, round(length / size))
    found: list[list[int]] = [[] for _ in range(count)]
    for i in range(length):
        found[i * count // length].append(i)
    return found


@dataclass
class Problem:
    """Sums over two folds of sequences."""

    moments: list[torch.Tensor]
    cross: list[torch.Tensor]

    @classmethod
    def of(
        cls, inputs: Rows, targets: Rows, weights: Rows, held: list[bool], segment: int, coherence: float, bias: bool
    ) -> "Problem":
        sizes = inputs[0].shape[1] + bias, targets[0].shape[1]
        moments = [torch.zeros(sizes[0], sizes[0], dtype=torch.float64) for _ in range(2)]
        cross = [torch.zeros(*sizes, dtype=torch.float64) for _ in range(2)]
        apart = segment >= 2 and coherence > 0
        for x, t, w, fold in zip(inputs, targets, weights, held, strict=True):
            if bias:
                x = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
            share = max(1 - coherence, 0.1) if apart else 1.0
            moments[fold] += share * x.T @ (w[:, None] * x)
            cross[fold] += share * x.T @ (w[:, None] * t)
            for part in pieces(len(x), segment) if apart else ():
                root = w[part, None].sqrt()
                both = [(root * rows[part]).sum(0, keepdim=True) for rows in (x, t)]
                scale = coherence * len(x) / len(part)
                moments[fold] += scale * both[0].T @ both[0]
                cross[fold] += scale * both[0].T @ both[1]
        return cls(moments, cross)

    def solutions(self, prior: torch.Tensor, metric: torch.Tensor, bias: bool) -> list[torch.Tensor]:
        """For every strength that predicts the held-out sequences best, or next to best."""

        def solve(h: torch.Tensor, c: torch.Tensor, strength: float) -> torch.Tensor:
            penalty = strength * h.diagonal().clamp(min=1e-8 * float(h.diagonal().mean()))
            if bias:
                penalty[-1] = 1e-7 * h[-1, -1]
            return torch.linalg.solve(h + torch.diag(penalty), c + penalty[:, None] * prior)

        errors: list[float] = []
        for strength in LAMBDAS:
            x = solve(self.moments[0], self.cross[0], strength)
            errors.append(float(((x.T @ self.moments[1] @ x - 2 * x.T @ self.cross[1]) @ metric).trace()))
            if len(errors) > 1 and errors[-1] >= errors[-2]:
                break
        spread = max(errors) - min(errors)
        good = [s for s, e in zip(LAMBDAS, errors, strict=False) if e <= min(errors) + 1e-3 * spread + 1e-9 * abs(e)]
        return [solve(sum(self.moments), sum(self.cross), strength) for strength in good]


def assert_one_of(found: torch.Tensor, expected: list[torch.Tensor], what: str) -> None:
    distances = [float((found.double() - one).norm() / one.norm().clamp(min=1e-9)) for one in expected]
    assert min(distances) < CLOSE, f"{what}: {distances}"


def metric_of(refit: Refit, fisher: torch.Tensor | None) -> torch.Tensor:
    if fisher is None:
        return torch.eye(D, dtype=torch.float64)
    return fisher / (fisher.trace() / D) + 0.3 * torch.eye(D, dtype=torch.float64)


def segment_tokens(refit: Refit) -> int:
    return refit.stats.sample.tokens // (3 * (D + NEURONS))


# BERT ----------------------------------------------------------------------------------------------------------------

BERT_SIZES = Sizes(hidden=[24, 16, 20, D, D], filters=[NEURONS, 24], heads=[HEADS, 3], qk=[HEAD, 6], vo=[HEAD, 5])
BERT_OTHERS = Sizes(hidden=[D, D, 12, 20, 16], filters=[17, NEURONS], heads=[2, HEADS], qk=[5, HEAD], vo=[HEAD, 3])


class BertProblems:
    """The problems of a refit BERT."""

    def __init__(self, refit: Refit, subspace: str) -> None:
        self.refit, self.subspace = refit, subspace
        self.state = {name.removeprefix("bert."): value.double() for name, value in refit.dense.state_dict().items()}
        self.made = {name.removeprefix("bert."): value.double() for name, value in refit.small.state_dict().items()}
        self.names = [site.name for site in sites_of(refit.dense) if site.name != "mlm_head"]
        self.layers = (len(self.names) - 1) // 2
        self.eps = refit.dense.config.layer_norm_eps
        self.centred = {name: [x - x.mean(-1, keepdim=True) for x in rows] for name, rows in refit.sums.items()}
        self.scales = {
            name: [(x.square().mean(-1, keepdim=True) + self.eps).sqrt() for x in rows]
            for name, rows in self.centred.items()
        }
        self.normed = {
            name: [x / s for x, s in zip(rows, self.scales[name], strict=True)] for name, rows in self.centred.items()
        }

    def norm(self, site: int) -> tuple[torch.Tensor, torch.Tensor]:
        name = "embeddings" if site == 0 else f"encoder.layer.{(site - 1) // 2}.{'attention.' * (site % 2)}output"
        return self.state[f"{name}.LayerNorm.weight"], self.state[f"{name}.LayerNorm.bias"]

    def weights(self, site: int) -> Rows:
        """Idle tokens: those that a classifier on the first token does not read any more."""
        idle = self.refit.case.head == "ForSequenceClassification" and site >= 2 * self.layers - 1
        found = [torch.ones(len(rows), dtype=torch.float64) for rows in self.centred[self.names[site]]]
        for rows in found:
            rows[1:] = 0.02 if idle else 1.0
        return found

    def metric(self, site: int) -> torch.Tensor:
        fisher = self.refit.stats.sites[self.names[site]].fisher if self.subspace == "balanced" else None
        return metric_of(self.refit, fisher)

    def problem(self, site: int, inputs: Rows, targets: Rows, weights: Rows) -> Problem:
        coherence = self.refit.stats.sites[self.names[site]].coherence
        return Problem.of(inputs, targets, weights, self.refit.held, segment_tokens(self.refit), coherence, True)

    def decoders(self, site: int) -> list[torch.Tensor]:
        name = self.names[site]
        basis = self.refit.bases[name]
        prior = torch.cat([basis.decoder.T, torch.zeros(1, D, dtype=torch.float64)])
        problem = self.problem(site, self.refit.seen[name], self.normed[name], self.weights(site))
        return problem.solutions(prior, self.metric(site), True)

    def reading(self, linear: str, site: int, decoder: torch.Tensor) -> torch.Tensor:
        """(outputs, k + 1): a linear of the dense hidden state as one of [z, 1]."""
        gamma, beta = self.norm(site)
        weight, bias = self.state[f"{linear}.weight"], self.state[f"{linear}.bias"]
        constant = bias + weight @ beta + (weight * gamma) @ decoder[-1]
        return torch.cat([(weight * gamma) @ decoder[:-1].T, constant[:, None]], 1)

    def made_linear(self, name: str) -> torch.Tensor:
        return torch.cat([self.made[f"{name}.weight"], self.made[f"{name}.bias"][:, None]], 1)

    def written(self, site: int) -> None:
        """The block before a site: output linear, residual map, the site's subspace, and its norm."""
        refit, name, before = self.refit, self.names[site], self.names[site - 1]
        layer = f"encoder.layer.{(site - 1) // 2}.{'attention.' * (site % 2)}output"
        gamma, beta = self.norm(site - 1)
        free = refit.sizes.hidden[site - 1] == refit.sizes.hidden[site] == D
        inputs, carried = refit.seen[f"{name} inputs before"], refit.seen[before]
        targets = self.centred[name]
        if free:
            residual = [gamma * z for z in carried]
            targets = [t - (r - r.mean(-1, keepdim=True)) for t, r in zip(targets, residual, strict=True)]
        else:
            inputs = [torch.cat(pair, 1) for pair in zip(inputs, carried, strict=True)]
        weights = [w / s[:, 0].square() for w, s in zip(self.weights(site), self.scales[name], strict=True)]
        problem = self.problem(site, inputs, targets, weights)
        kind, kept, turn = refit.cuts[site - 1]
        assert_one_of(refit.metrics[site - 1], [self.metric(site)], f"metric of the cut before {name}")
        output = self.state[f"{layer}.dense.weight"].T
        if kind == "cut_filters":
            output = output[kept]
        elif turn is not None:
            output = torch.linalg.pinv(turn.double()).T @ output
        parts = [output, (self.state[f"{layer}.dense.bias"] + beta)[None]]
        if not free:
            parts.insert(1, (gamma[:, None] * refit.bases[before].decoder).T)
        prior = torch.cat(parts)
        solutions = problem.solutions(prior - prior.mean(1, keepdim=True), self.metric(site), True)
        found = [self.made[f"{layer}.dense.weight"].T, self.made[f"{layer}.dense.bias"][None]]
        if free:
            assert torch.allclose(self.made[f"{layer}.residual.weight"], gamma, atol=1e-6)
        else:
            found.insert(1, self.made[f"{layer}.residual.weight"].T)
        basis = refit.bases[name]
        assert basis.decoder.shape == basis.encoder.shape == (D, refit.sizes.hidden[site])
        assert_one_of(torch.cat(found), [one @ basis.encoder for one in solutions], f"written at {name}")
        if basis.size < D:
            chosen = []
            for one in solutions:
                moment = one.T @ sum(problem.moments) @ one / sum(problem.moments)[-1, -1]
                spectrum = pca_spectrum(moment)
                if self.subspace == "balanced":
                    spectrum = balanced_spectrum(moment, refit.stats.sites[name].fisher, 0.3)
                cut = spectrum.cut(basis.size)
                chosen.append(cut.decoder @ cut.encoder.T)
            assert_one_of(basis.decoder @ basis.encoder.T, chosen, f"subspace of {name}")
        else:
            assert torch.equal(basis.decoder, torch.eye(D, dtype=torch.float64))

    def constant(self, site: int) -> None:
        """A site's norm: the least-squares constant of `E' n ~ c y / rms(y)`."""
        name = self.names[site]
        basis, product, square = self.refit.bases[name], 0.0, 0.0
        for y, n, w in zip(self.refit.seen[f"{name} before"], self.normed[name], self.weights(site), strict=True):
            y = y - y.mean(-1, keepdim=True) if basis.size == D else y
            unit = y / y.square().mean(-1, keepdim=True).sqrt()
            product += float((w[:, None] * unit * (n @ basis.encoder)).sum())
            square += float((w[:, None] * unit.square()).sum())
        norm = "embeddings" if site == 0 else f"encoder.layer.{(site - 1) // 2}.{'attention.' * (site % 2)}output"
        expected = torch.full((basis.size,), product / square, dtype=torch.float64)
        torch.testing.assert_close(self.made[f"{norm}.norm.weight"], expected, rtol=1e-3, atol=1e-4)

    def read(self, layer: int) -> None:
        """Query, key and value of the attention, and the neurons of the network."""
        refit, name = self.refit, f"encoder.layer.{layer}"
        sizes = refit.sizes
        _, kept, turn = refit.cuts[2 * layer]
        found = self.made_linear(f"{name}.attention.self.qkv")
        count, qk = len(kept), sizes.qk[layer]
        query, key, value = found.split([count * qk, count * qk, count * sizes.vo[layer]])
        site = 2 * layer
        decoders = self.decoders(site)
        wide = [
            [self.reading(f"{name}.attention.self.{part}", site, one) for part in ("query", "key", "value")]
            for one in decoders
        ]
        if turn is not None:
            assert turn.shape == (count * sizes.vo[layer], HEADS * HEAD)
        expected = [one[2] if turn is None else turn.double() @ one[2] for one in wide]
        assert_one_of(value, expected, f"values of layer {layer}")
        for h, head in enumerate(kept.tolist()):
            rows, narrow = slice(head * HEAD, (head + 1) * HEAD), slice(h * qk, (h + 1) * qk)
            products = []
            for q, k, _ in wide:
                if qk == HEAD:
                    products.append(q[rows].T @ k[rows])
                    continue
                moments = self.score_moments(site, q[rows], k[rows])
                p_q, p_k = score_factors(moments[0][None], moments[1][None], qk)
                products.append((p_q[0] @ q[rows]).T @ (p_k[0] @ k[rows]))
            assert_one_of(query[narrow].T @ key[narrow], products, f"head {head} of layer {layer}")
            if qk == HEAD:
                assert_one_of(query[narrow], [one[0][rows] for one in wide], f"queries of head {head}, layer {layer}")
        kept = refit.cuts[2 * layer + 1][1]
        assert len(kept) == sizes.filters[layer]
        neurons = [self.reading(f"{name}.intermediate.dense", site + 1, one)[kept] for one in self.decoders(site + 1)]
        assert_one_of(self.made_linear(f"{name}.intermediate.dense"), neurons, f"neurons of layer {layer}")

    def score_moments(self, site: int, query: torch.Tensor, key: torch.Tensor) -> list[torch.Tensor]:
        """Sums of q q' and of the attention-weighted covariance of the keys, token by token."""
        found = [torch.zeros(HEAD, HEAD, dtype=torch.float64) for _ in range(2)]
        for z in self.refit.seen[self.names[site]]:
            x = torch.cat([z, torch.ones(len(z), 1, dtype=torch.float64)], 1)
            q, k = x @ query.T, x @ key.T
            attention = (q @ k.T * HEAD**-0.5).softmax(-1)
            found[0] += q.T @ q
            for weights in attention:
                apart = k - weights @ k
                found[1] += apart.T @ (weights[:, None] * apart)
        return found

    def lift(self) -> None:
        gamma, beta = self.norm(2 * self.layers)
        expected = [
            torch.cat([gamma[:, None] * one[:-1].T, (beta + gamma * one[-1])[:, None]], 1)
            for one in self.decoders(2 * self.layers)
        ]
        assert_one_of(self.made_linear("lift_map"), expected, "lift")
        assert_one_of(self.made["lift_map.bias"], [one[:, -1] for one in expected], "offset of the lift")


@pytest.mark.parametrize(
    ("head", "sizes", "rows", "options"),
    [
        ("ForSequenceClassification", BERT_SIZES, 40, {}),
        ("ForTokenClassification", BERT_OTHERS, 90, {}),
        ("ForTokenClassification", BERT_SIZES, 90, {"subspace": "pca"}),
    ],
    ids=["classifier", "tokens", "pca"],
)
def test_bert(head: str, sizes: Sizes, rows: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    refit = make_refit(find(f"bert-{head}"), sizes, rows, monkeypatch, **options)
    assert (segment_tokens(refit) >= 2) == (rows == 90), "with coherent pieces, and without"
    assert list(refit.small.config.site_widths().values()) == sizes.hidden
    problems = BertProblems(refit, options.get("subspace", "balanced"))
    basis = refit.bases["embeddings"]
    first = refit.stats.sites["embeddings"]
    spectrum = pca_spectrum(first.second_moment)
    if problems.subspace == "balanced" and basis.size < D:
        spectrum = balanced_spectrum(first.second_moment, first.fisher, 0.3)
    chosen = spectrum.cut(basis.size)
    torch.testing.assert_close(basis.decoder @ basis.encoder.T, chosen.decoder @ chosen.encoder.T)
    for kind in ("word", "position", "token_type"):
        table = problems.state[f"embeddings.{kind}_embeddings.weight"]
        made = problems.made[f"embeddings.{kind}_embeddings.weight"]
        assert torch.allclose(made, (table - table.mean(-1, keepdim=True)) @ basis.encoder, atol=1e-5)
    for site in range(5):
        problems.constant(site)
        if site > 0:
            problems.written(site)
    for layer in range(2):
        problems.read(layer)
    problems.lift()


def test_a_shared_projection_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """The refit chooses no subspace of its own then."""
    sizes = Sizes([16], [NEURONS] * 2, [HEADS] * 2, [HEAD] * 2, [HEAD] * 2)
    refit = make_refit(find("bert-ForTokenClassification"), sizes, 40, monkeypatch, projection="shared")
    first, *others = refit.bases.values()
    assert all(torch.equal(first.decoder, other.decoder) for other in others)
    assert all(torch.equal(first.encoder, other.encoder) for other in others)


# T5 ------------------------------------------------------------------------------------------------------------------

T5_SIZES = Sizes(
    hidden=[20],
    filters=[NEURONS, 24, 30, NEURONS],
    heads=[HEADS, 3, 2, HEADS, 3, HEADS],
    qk=[HEAD, 6, 5, HEAD, HEAD, 3],
    vo=[HEAD, 5, HEAD, 4, 6, HEAD],
)
"""Attention blocks: two of the encoder, then self and cross of either decoder layer."""


class T5Problems:
    """The problems of a refit T5."""

    def __init__(self, refit: Refit) -> None:
        self.refit = refit
        self.blocks = blocks_of(refit.dense)
        self.eps = refit.dense.config.layer_norm_epsilon
        self.sites = {site.name: site for site in sites_of(refit.dense)}
        self.rms = {
            name: [(x.square().mean(-1, keepdim=True) + self.eps).sqrt() for x in rows]
            for name, rows in refit.sums.items()
        }
        self.normed = {
            name: [x / s for x, s in zip(rows, self.rms[name], strict=True)] for name, rows in refit.sums.items()
        }
        probe = [i for i in range(len(refit.held)) if refit.held[i]][:64]
        self.squares = {
            name: float(torch.cat([rows[i] for i in probe]).square().mean()) for name, rows in self.rms.items()
        }
        self.made = {name: value.double() for name, value in refit.small.state_dict().items()}

    def later(self, name: str) -> list[str]:
        names = [other for other in self.sites if other.split(".")[0] == name.split(".")[0]]
        return names[names.index(name) :]

    def metric(self, name: str) -> torch.Tensor:
        stats = self.refit.stats
        fisher = sum(stats.sites[n].fisher * (self.squares[name] / self.squares[n]) for n in self.later(name))
        return metric_of(self.refit, fisher)

    def coherence(self, name: str) -> float:
        sites = [self.refit.stats.sites[other] for other in self.later(name)]
        weights = [float(site.fisher_sum.trace()) for site in sites]
        return sum(w * site.coherence for w, site in zip(weights, sites, strict=True)) / sum(weights)

    def problem(self, name: str, inputs: Rows, targets: Rows, weights: Rows) -> Problem:
        segment = segment_tokens(self.refit)
        return Problem.of(inputs, targets, weights, self.refit.held, segment, self.coherence(name), False)

    def gamma(self, name: str) -> torch.Tensor:
        return self.sites[name].norm.weight.detach().double()

    def basis(self, name: str) -> Basis:
        return self.refit.bases[f"{name.split('.')[0]}.final"]

    def decoders(self, name: str) -> list[torch.Tensor]:
        carried, basis = self.refit.seen[name], self.basis(name)
        ones = [torch.ones(len(rows), dtype=torch.float64) for rows in carried]
        problem = self.problem(name, carried, self.normed[name], ones)
        return problem.solutions(basis.decoder.T.contiguous(), self.metric(name), False)

    def norm(self, name: str) -> None:
        basis = self.basis(name)
        product, square = torch.zeros(2, basis.size, dtype=torch.float64)
        for own, n in zip(self.refit.seen[f"{name} before"], self.normed[name], strict=True):
            unit = own / (own.square().mean(-1, keepdim=True) + self.eps * D / basis.size).sqrt()
            product += (unit * (n @ basis.encoder)).sum(0)
            square += unit.square().sum(0)
        found = of_small(self.refit, self.sites[name].norm).weight.detach()
        expected = torch.full((basis.size,), float(product.sum() / square.sum()), dtype=torch.float64)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
        if name.endswith(".final"):
            torch.testing.assert_close(self.refit.scales[name.split(".")[0]], product / square, rtol=1e-2, atol=1e-3)

    def written(self, number: int, block: Block) -> None:
        refit, name = self.refit, block.writes
        _, kept, turn = refit.cuts[number]
        basis = self.basis(block.reads)
        inputs = refit.seen[f"{name} inputs before"]
        after = refit.sums[name]
        targets = [a @ basis.encoder - own for a, own in zip(after, refit.seen[f"{block.reads} before"], strict=True)]
        weights = [1 / s[:, 0].square() for s in self.rms[name]]
        problem = self.problem(name, inputs, targets, weights)
        output = block.output.weight.detach().double().T
        if block.kind == "ffn":
            output = output[kept]
        elif turn is not None:
            output = torch.linalg.pinv(turn.double()).T @ output
        metric = basis.decoder.T @ self.metric(name) @ basis.decoder
        assert_one_of(refit.metrics[number], [metric], f"metric of the cut before {name}")
        found = of_small(refit, block.output).weight.detach().T
        assert_one_of(found, problem.solutions(output @ basis.encoder, metric, False), f"written at {name}")

    def read(self, number: int, block: Block) -> None:
        refit = self.refit
        _, kept, turn = refit.cuts[number]
        gamma, decoders = self.gamma(block.reads), self.decoders(block.reads)
        dense = [linear.weight.detach().double() for linear in block.inner]
        found = [of_small(refit, linear).weight.detach().double() for linear in block.inner]
        if block.kind == "ffn":
            for weight, made in zip(dense, found, strict=True):
                assert_one_of(made, [(weight * gamma @ one.T)[kept] for one in decoders], f"neurons of {block.reads}")
            return
        source, memory = (block.reads, decoders)
        if block.kind == "cross":
            source, memory = "encoder.final", self.decoders("encoder.final")
        far = self.gamma(source)
        values = [dense[2] * far @ one.T for one in memory]
        values = [value if turn is None else turn.double() @ value for value in values]
        assert_one_of(found[2], values, f"values of {block.writes}")
        attention = [b for b in self.blocks if b.attends]
        qk = refit.sizes.qk[attention.index(block)]
        queries, keys = [dense[0] * gamma @ one.T for one in decoders], [dense[1] * far @ one.T for one in memory]
        for h, head in enumerate(kept.tolist()):
            rows, narrow = slice(head * HEAD, (head + 1) * HEAD), slice(h * qk, (h + 1) * qk)
            products = []
            for q, k in ((q[rows], k[rows]) for q in queries for k in keys):
                if qk < HEAD:
                    p_q, p_k = score_factors(*(m[None] for m in self.score_moments(block, source, head, q, k)), qk)
                    q, k = p_q[0] @ q, p_k[0] @ k
                products.append(q.T @ k)
            assert_one_of(found[0][narrow].T @ found[1][narrow], products, f"head {head} of {block.writes}")

    def score_moments(
        self, block: Block, source: str, head: int, query: torch.Tensor, key: torch.Tensor
    ) -> list[torch.Tensor]:
        found = [torch.zeros(HEAD, HEAD, dtype=torch.float64) for _ in range(2)]
        for z, memory in zip(self.refit.seen[block.reads], self.refit.seen[source], strict=True):
            q, k = z @ query.T, memory @ key.T
            scores = q @ k.T
            if block.kind != "cross":
                scores = scores + self.position_bias(block.stack, len(z))[head]
            attention = scores.softmax(-1)
            found[0] += q.T @ q
            for weights in attention:
                apart = k - weights @ k
                found[1] += apart.T @ (weights[:, None] * apart)
        return found

    def position_bias(self, stack: str, length: int) -> torch.Tensor:
        first = getattr(self.refit.dense.base_model, stack).block[0].layer[0].SelfAttention
        steps = torch.arange(length)
        sizes = {
            "num_buckets": first.relative_attention_num_buckets,
            "max_distance": first.relative_attention_max_distance,
        }
        bucket = first._relative_position_bucket(
            steps[None] - steps[:, None], bidirectional=stack == "encoder", **sizes
        )
        bias = first.relative_attention_bias.weight.detach().double()[bucket].permute(2, 0, 1)
        if stack == "decoder":
            bias = bias.masked_fill(torch.ones(length, length).triu(1).bool(), -1e9)
        return bias


@pytest.mark.parametrize(
    ("source", "sizes", "rows", "options"),
    [
        ("t5-ForConditionalGeneration", T5_SIZES, 30, {}),
        ("t5-gated-ForSequenceClassification", T5_SIZES, 45, {}),
        (
            "t5-ForConditionalGeneration",
            Sizes([24, 16], [20, 32, NEURONS, 8], [2, HEADS] * 3, [4, HEAD] * 3, [HEAD, 3] * 3),
            45,
            {"projection": "per_site"},
        ),
    ],
    ids=["language-model", "gated", "own-bases"],
)
def test_t5(source: str, sizes: Sizes, rows: int, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    refit = make_refit(find(source), sizes, rows, monkeypatch, **options)
    assert (segment_tokens(refit) >= 2) == (rows == 45), "with coherent pieces, and without"
    problems = T5Problems(refit)
    assert refit.scales.keys() == {"encoder", "decoder"}
    for name in problems.sites:
        problems.norm(name)
    # blocks are refit in the order of the forward pass
    for number, block in enumerate(problems.blocks):
        problems.written(number, block)
        problems.read(number, block)
    for stack in ("encoder", "decoder"):
        name = f"{stack}.final"
        lift = getattr(refit.small.base_model, stack).lift_map.weight.detach().double()
        assert_one_of(
            lift, [problems.gamma(name)[:, None] * one.T for one in problems.decoders(name)], f"lift of {name}"
        )
    kept = [found.tolist() for kind, found, _ in refit.cuts if kind == "cut_values"]
    assert [len(heads) for heads in kept] == sizes.heads and all(heads == sorted(set(heads)) for heads in kept)


# The parts alone: `unit` in a name marks what .ci/mutants runs first -------------------------------------------------


def gaussian(seed: int, *size: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def least_loss(h: torch.Tensor, weights: torch.Tensor, kept: list[int]) -> float:
    """Loss added when only these inputs are left and all are solved again: of `||(W - V) x||` under H, in the trace."""
    gone = [i for i in range(len(h)) if i not in kept]
    left = h[gone][:, gone] - h[gone][:, kept] @ torch.linalg.solve(h[kept][:, kept], h[kept][:, gone])
    return float((weights[:, gone] @ left @ weights[:, gone].T).trace())


@pytest.mark.parametrize("block", [1, 2, 16])
def test_unit_drop_inputs(block: int) -> None:
    """The curve is what re-solving really costs, block after block; inputs behind the candidates stay."""
    x = gaussian(0, 200, 9) * torch.linspace(0.3, 2, 9)
    h, weights = x.T @ x, gaussian(1, 4, 9)
    before = h.clone(), weights.clone()
    kept, curve, order = drop_inputs(h, weights, 7, 3, block)
    assert torch.equal(h, before[0]) and torch.equal(weights, before[1])
    assert kept.tolist() == sorted(kept.tolist()) and len(kept) == 3 and max(kept.tolist()) < 7
    assert sorted([*kept.tolist(), *order.tolist()]) == list(range(7))
    assert [count for count, _ in curve] == [7, *([6, 5, 4, 3] if block == 1 else [5, 3] if block == 2 else [3])]
    assert curve[0][1] == 0.0
    for count, loss in curve:
        left = [i for i in range(9) if i not in order[: 7 - count].tolist()]
        assert loss == pytest.approx(least_loss(h, weights, left), rel=1e-3, abs=1e-9)
    if block == 1:
        inputs = list(range(9))
        for index in order.tolist():
            costs = {i: least_loss(h, weights, [j for j in inputs if j != i]) for i in inputs if i < 7}
            assert costs[index] == pytest.approx(min(costs.values()), rel=1e-3)
            inputs.remove(index)


def test_unit_nothing_is_dropped_where_all_may_stay() -> None:
    kept, curve, order = drop_inputs(torch.eye(4, dtype=torch.float64), gaussian(0, 2, 4), 3, 3)
    assert kept.tolist() == [0, 1, 2] and curve == [(3, 0.0)] and len(order) == 0


def test_unit_drop_heads() -> None:
    x = gaussian(2, 300, 9)
    h, weights = x.T @ x, gaussian(3, 3, 9) * torch.linspace(2, 0.2, 9)
    kept, losses, order = drop_heads(h, weights, 4, 2, 1)
    assert len(kept) == 1 and sorted([*kept.tolist(), *order]) == [0, 1, 2, 3]
    assert losses[0] == 0.0 and len(losses) == 4 and losses == sorted(losses)
    heads = [0, 1, 2, 3]

    def entries(names: list[int]) -> list[int]:
        return [*(2 * n + i for n in names for i in range(2)), 8]

    for gone, loss in zip(order, losses[1:], strict=True):
        costs = {n: least_loss(h, weights, entries([m for m in heads if m != n])) for n in heads}
        assert costs[gone] == pytest.approx(min(costs.values()), rel=1e-3)
        assert loss == pytest.approx(costs[gone], rel=1e-3)
        heads.remove(gone)
    assert drop_heads(h, weights, 4, 2, 4)[0].tolist() == [0, 1, 2, 3]


def test_unit_value_factors_of_one_head_are_the_best() -> None:
    """Of `||W (I - P) H^1/2||` over all projections of the values, with what the other inputs explain taken out."""
    x = gaussian(4, 400, 6) @ gaussian(5, 6, 6)
    h, weights = x.T @ x, gaussian(6, 3, 6)
    (factor,) = value_factors(h, weights, 1, 4, 2)
    assert factor.shape == (2, 4)

    def lost(turn: torch.Tensor) -> float:
        rows = torch.block_diag(turn, torch.eye(2, dtype=torch.float64))
        small = rows @ h @ rows.T
        best = weights @ h @ rows.T @ torch.linalg.inv(small)
        return float(((weights - best @ rows) @ h @ (weights - best @ rows).T).trace())

    conditional = torch.linalg.inv(torch.linalg.inv(h)[:4, :4])
    root = symmetric_root(conditional)
    values = torch.linalg.svdvals(weights[:, :4] @ root)
    assert lost(factor) == pytest.approx(float(values[2:].square().sum()), rel=1e-2)
    assert all(lost(factor) <= lost(gaussian(seed, 2, 4)) for seed in range(20))


def test_unit_value_factors_of_several_heads_solve_again() -> None:
    """The second head knows what the first lost: better than cutting both against the whole problem."""
    x = gaussian(7, 400, 9) @ gaussian(8, 9, 9)
    h, weights = x.T @ x, gaussian(9, 5, 9)
    factors = value_factors(h, weights, 2, 4, 3)
    assert factors.shape == (2, 3, 4)
    # dropping nothing is exact, and turns by an invertible map
    whole = value_factors(h, weights, 2, 4, 4)
    assert all(float(torch.linalg.cond(one)) < 1e6 for one in whole)

    def lost(turns: torch.Tensor) -> float:
        rows = torch.block_diag(*turns, torch.eye(1, dtype=torch.float64))
        small = rows @ h @ rows.T
        best = weights @ h @ rows.T @ torch.linalg.inv(small)
        return float(((weights - best @ rows) @ h @ (weights - best @ rows).T).trace())

    first = value_factors(h, weights, 1, 4, 3)
    order = [*range(4, 8), *range(4), 8]
    second = value_factors(h[order][:, order], weights[:, order], 1, 4, 3)
    assert lost(factors) <= lost(torch.cat([first, second])) * 1.001
    assert lost(whole) < 1e-9 * float((weights @ h @ weights.T).trace())


def test_unit_value_factors_of_every_head_are_those_of_the_problem_that_is_left() -> None:
    """As if the problem were solved again, from the start, after each head."""
    heads, size, keep = 3, 4, 2
    x = gaussian(30, 400, heads * size + 1) @ gaussian(31, heads * size + 1, heads * size + 1)
    h, weights = x.T @ x, gaussian(32, 5, heads * size + 1)
    for head, factor in enumerate(value_factors(h, weights, heads, size, keep)):
        # the head that is next stands first
        (expected,) = value_factors(h, weights, 1, size, keep)
        spaces = [torch.linalg.pinv(one) @ one for one in (factor, expected)]
        torch.testing.assert_close(spaces[0], spaces[1], rtol=0.0, atol=2e-2, msg=f"head {head}")
        rows = torch.block_diag(factor, torch.eye(h.shape[0] - size, dtype=torch.float64))
        small = rows @ h @ rows.T
        weights = weights @ h @ rows.T @ torch.linalg.inv(small)
        order = [*range(keep, len(small)), *range(keep)]
        h, weights = small[order][:, order], weights[:, order]


def test_unit_score_moments() -> None:
    """Sums of q q' and, query by query, of the keys' covariance under its attention; padded queries do not count."""
    query, key, attention = gaussian(10, 2, 3, 4, 5), gaussian(11, 2, 3, 6, 5), gaussian(12, 2, 3, 4, 6).softmax(-1)
    real = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    for queries in (None, real):
        found = score_moments(query, key, attention, queries)
        expected = [torch.zeros(3, 5, 5, dtype=torch.float64) for _ in range(2)]
        for b in range(2):
            for h in range(3):
                for i in range(4):
                    if queries is not None and not queries[b, i]:
                        continue
                    expected[0][h] += torch.outer(query[b, h, i], query[b, h, i])
                    apart = key[b, h] - attention[b, h, i] @ key[b, h]
                    expected[1][h] += apart.T @ (attention[b, h, i][:, None] * apart)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)


def test_unit_score_factors_are_the_best() -> None:
    """Least `||C_q^1/2 (I - M) C_k^1/2||` of any map M of the rank: the singular values that are left out."""
    moments = [m @ m.mT for m in (gaussian(13, 2, 5, 5), gaussian(14, 2, 5, 5))]
    roots = [torch.stack([symmetric_root(one) for one in moment]) for moment in moments]
    for size in (1, 3, 5):
        p_query, p_key = score_factors(*moments, size)
        assert p_query.shape == p_key.shape == (2, size, 5)
        for h in range(2):
            rest = torch.eye(5, dtype=torch.float64) - p_query[h].T @ p_key[h]
            lost = float((roots[0][h] @ rest @ roots[1][h]).square().sum())
            values = torch.linalg.svdvals(roots[0][h] @ roots[1][h])
            assert lost == pytest.approx(float(values[size:].square().sum()), rel=1e-5, abs=1e-9)
            norms = p_query[h] @ moments[0][h] @ p_query[h].T, p_key[h] @ moments[1][h] @ p_key[h].T
            torch.testing.assert_close(norms[0], norms[1], msg="both sides carry the same share")


def test_unit_inverse_root_floors_what_has_no_energy() -> None:
    matrix = torch.diag(torch.tensor([4.0, 1e-20, 0.0], dtype=torch.float64))
    root, inverse = inverse_root(matrix)
    floor = (4.0 * 1e-10) ** 0.5
    torch.testing.assert_close(root.diagonal(), torch.tensor([2.0, floor, floor], dtype=torch.float64))
    torch.testing.assert_close(inverse @ root, torch.eye(3, dtype=torch.float64))
    nothing, inverse = inverse_root(torch.zeros(2, 2, dtype=torch.float64))
    torch.testing.assert_close(nothing, 1e-15 * torch.eye(2, dtype=torch.float64), rtol=1e-6, atol=0)
    assert bool(torch.isfinite(inverse).all())


@pytest.mark.parametrize("bias", [True, False])
def test_unit_cuts_leave_the_problem_of_what_is_left(bias: bool) -> None:
    """Kept heads and turned values: normal equations and prior are those of the new inputs."""
    heads, size, others = 3, 4, 2
    x, t = gaussian(15, 200, heads * size + others).float(), gaussian(16, 200, 5).float()
    prior = gaussian(17, heads * size + others + bias, 5)
    held = torch.arange(200) % 5 == 4
    problem = NormalEquations.zeros(x.shape[1], 5, torch.device("cpu"), bias)
    problem.add([x], t, torch.ones(200), held)
    root = symmetric_root(gaussian(18, 5, 5) @ gaussian(18, 5, 5).T)
    whole = torch.cat([x, torch.ones(200, 1)], 1).double() if bias else x.double()
    for keep, narrow in ((3, 4), (2, 4), (3, 2), (2, 3)):
        (equations, left), turn, kept = cut_values((problem, prior), root, heads, size, keep, narrow)
        assert len(kept) == keep and equations.inputs == keep * narrow + others and equations.tokens == 200
        if (keep, narrow) == (3, 4):
            assert turn is None and equations is problem and left is prior and kept.tolist() == [0, 1, 2]
            continue
        assert turn.shape == (keep * narrow, heads * size)
        rows = torch.block_diag(turn, torch.eye(others + bias, dtype=torch.float64))
        moved = whole @ rows.T
        for fold, chosen in enumerate((~held, held)):
            wanted = moved[chosen].T @ moved[chosen]
            torch.testing.assert_close(equations.moments[fold], wanted, rtol=1e-4, atol=1e-3)
            cross = moved[chosen].T @ t.double()[chosen]
            torch.testing.assert_close(equations.cross[fold], cross, rtol=1e-4, atol=1e-3)
        torch.testing.assert_close(left[: keep * narrow], torch.linalg.pinv(turn).T @ prior[: heads * size])
        assert torch.equal(left[keep * narrow :], prior[heads * size :])
        gone = [n for n in range(heads) if n not in kept.tolist()]
        assert all(not turn[:, n * size : (n + 1) * size].any() for n in gone)
    (equations, left), kept = cut_filters((problem, prior), root, heads * size, 5)
    assert equations.inputs == 5 + others and len(kept) == 5
    rows_ = [*kept.tolist(), *range(heads * size, len(prior))]
    assert torch.equal(left, prior[rows_])
    torch.testing.assert_close(equations.total[0], problem.total[0][rows_][:, rows_])
    same, kept = cut_filters((problem, prior), root, heads * size, heads * size)
    assert same[0] is problem and kept.tolist() == list(range(heads * size))
    assert head_rows(torch.tensor([0, 2]), 3).tolist() == [0, 1, 2, 6, 7, 8]


def test_unit_cuts_keep_what_is_read() -> None:
    """By the ridge solution in the metric: what only the output's unread directions see goes first."""
    x = gaussian(19, 300, 8).float()
    weights = torch.zeros(8, 3)
    weights[:4, 0], weights[4:, 1] = 1.0, 3.0  # the second half is larger, but the metric does not see it
    problem = NormalEquations.zeros(8, 3, torch.device("cpu"))
    problem.add([x], x @ weights, torch.ones(300), torch.arange(300) % 5 == 4)
    root = torch.diag(torch.tensor([1.0, 0.01, 1.0], dtype=torch.float64))
    prior = torch.zeros(9, 3, dtype=torch.float64)
    _, kept = cut_filters((problem, prior), root, 8, 4)
    assert kept.tolist() == [0, 1, 2, 3]
    _, _, heads = cut_values((problem, prior), root, 2, 4, 1, 4)
    assert heads.tolist() == [0]


def test_unit_few_tokens_are_held_to_the_prior() -> None:
    """Fewer than two tokens for an input: only the strong penalties; nothing held out: the strongest."""
    x, t = gaussian(20, 30, 10).float(), gaussian(21, 30, 1).float()
    prior = torch.zeros(11, 1, dtype=torch.float64)

    def fitted(rows: int, held: torch.Tensor) -> tuple[torch.Tensor, NormalEquations]:
        problem = NormalEquations.zeros(10, 1, torch.device("cpu"))
        problem.add([x[:rows]], t[:rows], torch.ones(rows), held[:rows])
        return ridge(problem, prior), problem

    held = torch.arange(30) % 5 == 4
    found, problem = fitted(19, held)
    assert any(torch.equal(found, solve(*problem.total, prior, strength)) for strength in (10.0, 1.0, 0.1))
    exact = (x.double() @ torch.ones(10, 1, dtype=torch.float64)).float()
    for rows, strength in ((19, 0.1), (20, 1e-4)):
        problem = NormalEquations.zeros(10, 1, torch.device("cpu"))
        problem.add([x[:rows]], exact[:rows], torch.ones(rows), held[:rows])
        # the weaker the better here, so the weakest that is tried: twenty tokens are enough for ten inputs
        assert torch.equal(ridge(problem, prior), solve(*problem.total, prior, strength)), rows
    for everything in (torch.zeros(30, dtype=torch.bool), torch.ones(30, dtype=torch.bool)):
        found, problem = fitted(30, everything)
        assert torch.equal(found, solve(*problem.total, prior, 10.0))


def test_unit_sums_that_are_indefinite_to_rounding_are_shrunk_harder() -> None:
    """What rounding made of no energy stays with the prior; sums that are no numbers are refused."""
    moments = torch.diag(torch.tensor([1.0, -1e-6], dtype=torch.float64))
    cross, prior = torch.tensor([[2.0], [1e-9]], dtype=torch.float64), torch.tensor([[0.0], [5.0]], dtype=torch.float64)
    found = solve(moments, cross, prior, 1e-4, bias=False)
    assert found[1].item() == pytest.approx(5.0, rel=0.05) and 0.0 < found[0].item() < 2.0
    with pytest.raises(TCSPError, match="not finite"):
        solve(torch.full((2, 2), float("nan"), dtype=torch.float64), cross, prior, 1e-4, bias=False)


def test_unit_sums_of_one_fold_and_of_two() -> None:
    x = gaussian(33, 50, 3).float()
    problem = NormalEquations.zeros(3, 3, torch.device("cpu"), bias=False)
    problem.add([x], x, torch.ones(50), torch.arange(50) % 5 == 4)
    for part in problem.total:
        torch.testing.assert_close(part, (x.T @ x).double(), rtol=1e-5, atol=1e-5)
    one = NormalEquations(3, problem.moments[:1], problem.cross[:1], bias=False)
    assert torch.equal(one.total[0], problem.moments[0]) and torch.equal(one.total[1], problem.cross[0])


def test_unit_blocks_are_flushed_at_their_size() -> None:
    """Rows wait until they make a block, and none is lost or counted twice."""
    problem = NormalEquations.zeros(1, 1, torch.device("cpu"), bias=False)
    for _ in range(9):
        rows = torch.ones(1000, 1)
        problem.add([rows], rows, torch.ones(1000), torch.arange(1000) % 2 == 1)
        assert sum(len(block) for waiting in problem._waiting for block, _ in waiting) < 2 * 4096
    assert problem.tokens == 9000
    assert problem.moments.flatten().tolist() == [4500.0, 4500.0] == problem.cross.flatten().tolist()


@pytest.mark.parametrize("source", ["bert-ForSequenceClassification", "t5-ForConditionalGeneration"])
def test_unit_metrics(source: str) -> None:
    case = find(source)
    dense = make_dense(case, torch.float32)
    stats = calibrate(dense, make_rows(case, 90), progress=False)
    probe = padded_batches(stats.sample.sequences()[4::5], dense.device)
    metrics = Metrics(dense, stats, probe)
    identity = torch.eye(D, dtype=torch.float64)
    assert metrics.segment_tokens == stats.sample.tokens // (3 * (D + NEURONS)) >= 2
    squares = dict.fromkeys(metrics.sites, 1.0)
    if case.family == "t5":
        handles, found = [], {}
        for site in sites_of(dense):
            handles.append(site.norm.register_forward_pre_hook(record(found, site.name, False)))
        with torch.no_grad():
            for row in stats.sample.sequences()[4::5]:
                dense(**{name: torch.tensor([values]) for name, values in row.items()})
        for handle in handles:
            handle.remove()
        squares = {name: float(torch.cat(rows).square().mean()) for name, rows in found.items()}
        assert len(set(squares.values())) == len(squares)
    for name in metrics.sites:
        later = [other for other in metrics.sites if other.split(".")[0] == name.split(".")[0]]
        later = later[later.index(name) :] if case.family == "t5" else [name]
        fisher = sum(stats.sites[other].fisher * (squares[name] / squares[other]) for other in later)
        assert float((metrics.fisher(name) - fisher).norm() / fisher.norm()) < 1e-4
        mean = float(fisher.trace()) / D
        torch.testing.assert_close(metrics.matrix(name), fisher / mean + 0.3 * identity, rtol=1e-4, atol=1e-6)
        root = metrics.root(name)
        torch.testing.assert_close(root @ root, (fisher + 0.3 * mean * identity) / 1.3, rtol=1e-4, atol=1e-4 * mean)
        assert metrics.unit(name) == pytest.approx(float(stats.sites[name].fisher.trace()) / D / 1.3)
        weights = [float(stats.sites[other].fisher_sum.trace()) for other in later]
        shares = [stats.sites[other].coherence for other in later]
        expected = sum(w * c for w, c in zip(weights, shares, strict=True)) / sum(weights)
        assert metrics.coherence(name) == pytest.approx(expected) and 0 < expected < 1
        site = stats.sites[name]
        query = metrics.query(name, HEADS, HEAD)
        if site.query_fisher_sum is None:
            assert torch.equal(query, torch.eye(HEAD, dtype=torch.float64).expand(HEADS, HEAD, HEAD))
        else:
            gradient = site.query_fisher_sum / site.tokens
            for h in range(HEADS):
                floor = 0.3 * gradient[h].diagonal().mean() * torch.eye(HEAD, dtype=torch.float64)
                torch.testing.assert_close(query[h], (gradient[h] + floor) / 1.3)
    stack = {"encoder": "attention_mask", "decoder": "decoder_attention_mask"}
    assert all(metrics.mask_name(name) == stack[site.stack] for name, site in metrics.sites.items())
    segments = metrics.segments([5, 4])
    assert (
        segments is not None
        and segments.ids.tolist() == Segments.of([5, 4], metrics.segment_tokens, dense.device).ids.tolist()
    )


def test_unit_metrics_without_gradients_or_tokens() -> None:
    """The identity, single tokens, and no coherence."""
    case = find("t5-ForConditionalGeneration")
    dense = make_dense(case, torch.float32)
    stats = calibrate(dense, make_rows(case, 12), progress=False, fisher=False)
    metrics = Metrics(dense, stats)
    name = "encoder.0.attention"
    identity = torch.eye(D, dtype=torch.float64)
    assert metrics.segment_tokens < 2 and metrics.segments([5]) is None and metrics.coherence(name) == 0.0
    assert metrics.fisher(name) is None and metrics.unit(name) == 1.0
    assert torch.equal(metrics.matrix(name), identity)
    torch.testing.assert_close(metrics.root(name), identity)
    many = calibrate(dense, make_rows(case, 90), progress=False, fisher=False)
    assert Metrics(dense, many).segment_tokens >= 2 and Metrics(dense, many).coherence(name) == 0.0


def test_unit_recording_leaves_what_the_norms_divide_by() -> None:
    for source in ("bert-ForSequenceClassification", "t5-ForConditionalGeneration"):
        case = find(source)
        dense = make_dense(case, torch.float32)
        metrics = Metrics(dense, calibrate(dense, make_rows(case, 12), progress=False))
        name = list(metrics.sites)[1]
        sums: dict[str, Rows] = {}
        handle = metrics.sites[name].norm.register_forward_pre_hook(record(sums, "sum", False))
        ids = torch.tensor([[5, 6, 7]])
        with torch.no_grad(), metrics.recording([name]) as found:
            dense(input_ids=ids, **({"decoder_input_ids": ids} if case.family == "t5" else {}))
        handle.remove()
        stream = sums["sum"][0] - (sums["sum"][0].mean(-1, keepdim=True) if case.family == "bert" else 0.0)
        torch.testing.assert_close(found[name][0].double(), stream.square().mean(-1).sqrt(), rtol=1e-5, atol=1e-5)
        assert not metrics.sites[name].norm._forward_pre_hooks
