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

from tcsp_hf import Calibration, calibrate, compress
from tcsp_hf.architectures import Block, blocks_of, sites_of
from tcsp_hf.compression.heads import score_factors
from tcsp_hf.compression.least_squares import LAMBDAS
from tcsp_hf.compression.plan import Sizes
from tcsp_hf.compression.subspace import Basis, balanced_spectrum, pca_spectrum

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
