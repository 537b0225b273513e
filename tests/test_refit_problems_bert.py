"""Every solved weight of a refit BERT solves the problem that it is said to solve."""

from typing import Any

import pytest
import torch
from common import D, find
from refit_problems import (
    HEAD,
    HEADS,
    NEURONS,
    Problem,
    Refit,
    Rows,
    assert_one_of,
    make_refit,
    metric_of,
    segment_tokens,
)

from tcsp_hf.architectures import sites_of
from tcsp_hf.compression.heads import score_factors
from tcsp_hf.compression.plan import Sizes
from tcsp_hf.compression.subspace import balanced_spectrum, pca_spectrum

BERT_SIZES = Sizes(
    hidden=[24, 16, 20, D, D],
    filters=[NEURONS, 24],
    heads=[HEADS, 3],
    qk=[HEAD, 6],
    vo=[HEAD, 5],
    doomed=[[], [31, 0, 7]],
)
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
