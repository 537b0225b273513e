"""Every solved weight of a refit T5 solves the problem that it is said to solve."""

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
    of_small,
    segment_tokens,
)

from tcsp_hf.architectures import Block, blocks_of, sites_of
from tcsp_hf.compression.heads import score_factors
from tcsp_hf.compression.plan import Sizes
from tcsp_hf.compression.subspace import Basis

T5_SIZES = Sizes(
    hidden=[20],
    filters=[NEURONS, 24, 30, NEURONS],
    doomed=[[], [5, 0, 31], [1], []],
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
