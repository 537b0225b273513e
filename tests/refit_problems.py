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
from common import Case, D, make_dense, make_rows
from torch import nn
from transformers import PreTrainedModel

from tcsp_hf import Calibration, calibrate, compress
from tcsp_hf.architectures import blocks_of, sites_of
from tcsp_hf.compression.least_squares import LAMBDAS
from tcsp_hf.compression.plan import Sizes
from tcsp_hf.compression.subspace import Basis

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
            kept = found[-1]
            if name == "cut_filters":
                number = sum(kind == name for kind, _, _ in cuts)
                kept = torch.tensor(sizes.candidates(number, NEURONS))[kept]
            cuts.append((name, kept, found[1] if name == "cut_values" else None))
            return found

        monkeypatch.setattr(module, name, cut)

    recorded("cut_values")
    recorded("cut_filters")
    monkeypatch.setattr(COMPRESS, "_choose_sizes", lambda *args: sizes.copy())
    bases: dict[str, Basis] = {}
    scales: dict[str, torch.Tensor] = {}
    if case.family == "bert":
        close_site = module.BertRefit._close_site

        def closed(self: Any, site: int, basis: Basis, *args: Any) -> Any:
            bases[self.site_names[site]] = basis
            return close_site(self, site, basis, *args)

        monkeypatch.setattr(module.BertRefit, "_close_site", closed)
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
