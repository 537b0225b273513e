"""`compress`: dense model + statistics -> a new, smaller model. No data, no labels, no training."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from ..architectures import dense_hidden_size, family_of
from ..calibration import Calibration
from ..errors import TCSPError
from ..modes import check_device, check_gradients, evaluating, own_defaults
from . import bert, t5
from .builder import Builder
from .check import doubt_about, measured_loss, objective_name
from .curves import CurveMeasure
from .latency import allocate_by_latency
from .least_squares import FEW_TOKENS
from .memory import give_back
from .plan import LossCurves, Sizes, allocate
from .refit_bert import BertRefit
from .refit_t5 import refit_t5
from .request import DEFAULT_KIND, Request, check_request, check_statistics
from .search import Search
from .sizes import count_parameters, size_table
from .streams import PackedSample
from .subspace import Basis, Kept, Spectrum, SpectrumOf, check_fisher, make_basis, spectrum, whole_basis

logger = logging.getLogger("tcsp_hf")


@own_defaults()
def compress(
    model: PreTrainedModel,
    stats: Calibration,
    *,
    hidden_size: int | None = None,
    energy: float | None = None,
    remove: float | None = None,
    flops: float | None = None,
    latency: float | None = None,
    axes: Sequence[str] | None = None,
    projection: str | None = None,
    subspace: str = "balanced",
    refit: bool | None = None,
    uniform: bool = False,
    epsilon: float = 0.3,
    multiple_of: int = 8,
    search: Search | None = None,
    progress: bool | None = False,
    verbose: bool = False,
) -> PreTrainedModel:
    """Move a dense model into subspaces of its hidden states. No data, no label, no training.

    Exactly one of `hidden_size`, `energy`, `remove`, `flops` and `latency` says how small.

    Args:
        model: the dense model that `stats` was collected from; it is left untouched.
        stats: from `calibrate` or `Calibration.load`.
        hidden_size: width k of every site.
        energy: fraction in (0, 1] to keep at every site (at a T5's stack): of the eigenvalues of the second moment
            for `"pca"`, of the squared singular values of `Gamma^½ Sigma^½` for `"balanced"`. Widths differ per site.
        remove: fraction of the non-embedding parameters to remove at least, over `axes`.
        flops: fraction of the dense model's floating-point operations to keep at most, for a mean calibration sequence.
        latency: fraction of the dense model's time to take at most, measured here and now on such sequences.
        axes: what `remove`, `flops` and `latency` may cut: `"hidden"`, `"filters"` (feed-forward neurons), `"heads"`
            (whole heads, and their query/key and value/output sizes). Sizes differ per site and layer, chosen by
            predicted loss. None: all three, or the hidden size alone where the statistics hold no token sample (which
            `flops` and `latency` need).
        projection: `"per_site"`: every site of a BERT, every stack of a T5 has its own subspace; `"shared"`: one
            subspace from the pooled statistics (the paper's). None: per_site for BERT, shared for T5 (whose encoder
            and decoder then keep one embedding table, and whose result can be exported as a stock T5).
        subspace: `"balanced"` weighs directions by what the output does with them; `"pca"` is the paper's.
        refit: solve every linear again, in closed form, on the token sample that `stats` carries. None: wherever there
            is one and anything is cut.
        uniform: one width, and one size of each kind for all layers, for runtimes that want it. Which heads are kept
            may still differ: a stock T5 or BERT (`tcsp export`) wants `axes` without them.
        epsilon: weight of the identity beside Gamma in `"balanced"`, in units of Gamma's mean eigenvalue.
        multiple_of: widths are rounded up to a multiple (D itself always stays possible); said in a warning.
        search: keeps what the search measures for other budgets; None measures and forgets.
        progress: show bars; None shows them on a terminal only.
        verbose: print the table of sizes before and after, per module, and the loss predicted and measured.

    Returns:
        A new model of the matching TCSP class, in evaluation mode, with the dense model's dtype and device.
        `config.projection["options"]` records the loss predicted by the search and measured on the sample's held-out
        sequences: nats per sequence to the dense model, (1 - cosine) / D for an embedding model. Where the second is
        far beyond the first, a warning says so, and `save_pretrained` refuses the model unless `force=True`.

    Raises:
        TCSPError: bad arguments, statistics of another model, or too few tokens; nothing was built then.
    """
    family, head = family_of(model)
    check_device(model)
    check_gradients(model)
    check_statistics(model, stats)
    request = check_request(
        model,
        hidden_size=hidden_size,
        energy=energy,
        remove=remove,
        flops=flops,
        latency=latency,
        axes=axes,
        projection=projection,
        subspace=subspace,
        refit=refit,
        uniform=uniform,
        epsilon=epsilon,
        multiple_of=multiple_of,
        has_sample=stats.sample.tokens > 0,
    )
    with evaluating(model):
        small = _smaller(model, stats, family, head, request, search or Search(), progress)
    small.config.return_dict = model.config.return_dict  # which `evaluating` had put aside
    give_back(sum(parameter.nbytes for parameter in small.parameters()))
    options = small.config.projection["options"]
    predicted, measured = options.get("predicted_kl"), options.get("measured_kl")
    size = dense_hidden_size(model) if objective_name(model, stats).startswith("embedding") else None
    small.doubt = doubt_about(predicted, measured, size)
    if small.doubt is not None:
        logger.warning("%s", small.doubt)
    if verbose:
        print(size_table(model, small))
        if predicted is not None and measured is not None:
            print(f"loss (nats per sequence): predicted {predicted:.3g}, measured {measured:.3g}")
    return small


def _smaller(
    model: PreTrainedModel,
    stats: Calibration,
    family: str,
    head: str,
    request: Request,
    search: Search,
    progress: bool | None,
) -> Any:
    """The compressed model, with what was predicted and measured among the options of its provenance."""
    builder = Builder(model, family, head, request.kind, request.multiple_of)
    if request.subspace == "balanced":
        for members in [*builder.groups, *([bert.MLM_SITE] for site in builder.sites if site == bert.MLM_SITE)]:
            check_fisher(_pooled_fisher(stats, members))
    spectrum_of = partial(_pooled_spectrum, stats, subspace=request.subspace, epsilon=request.epsilon)
    options: dict[str, Any] = {"refit": request.refit, "axes": list(request.axes), "uniform": request.uniform}
    sizes = _choose_sizes(model, stats, request, builder, spectrum_of, search, options, progress)
    needed = max(sizes.hidden)
    if stats.tokens < needed:
        raise TCSPError(
            f"The statistics hold {stats.tokens} tokens, but a hidden size of {needed} needs at least {needed}: "
            "calibrate on more text, or choose a smaller size."
        )
    small: Any
    epsilon = float(request.epsilon) if request.subspace == "balanced" else None
    record = {"subspace": request.subspace, "epsilon": epsilon, "options": options}
    if request.refit:
        small = _refit(model, stats, request, builder, spectrum_of, sizes, record, progress)
    else:
        bases = _cut_bases(stats, builder, spectrum_of, sizes)
        tensors = (bert if family == "bert" else t5).project(model, bases)
        small = builder.build(_kept(bases), stats, sizes, None, tensors, record)
    give_back(sum(parameter.nbytes for parameter in small.parameters()))
    measured = measured_loss(model, small, stats)
    if measured is not None:
        small.config.projection["options"]["measured_kl"] = round(measured, 8)
    return small


def _choose_sizes(
    model: PreTrainedModel,
    stats: Calibration,
    request: Request,
    builder: Builder,
    spectrum_of: SpectrumOf,
    search: Search,
    options: dict[str, Any],
    progress: bool | None,
) -> Sizes:
    """Sizes that meet the budget; what was predicted goes into `options`."""
    if not request.searches:
        sizes = builder.dense_sizes()
        if request.hidden_size is not None:
            sizes.hidden[:] = [builder.round_up(request.hidden_size)] * len(sizes.hidden)
        elif request.energy is not None:
            needed = [spectrum_of(members).size_for_energy(request.energy) for members in builder.groups]
            widths = [builder.round_up(size, quiet=True) for size in needed]
            sizes.hidden[:] = [max(widths)] * len(widths) if request.uniform else widths
            if bert.MLM_SITE in builder.sites and not request.uniform:
                head = spectrum_of([bert.MLM_SITE])
                builder.mlm_size = builder.round_up(head.size_for_energy(request.energy), quiet=True)
        else:
            sizes.hidden[:] = [_width_for_removal(model, builder, request.remove or 0.0)] * len(sizes.hidden)
        return sizes

    def measure() -> tuple[dict[str, float], LossCurves]:
        found = CurveMeasure(model, stats, builder.costs(), builder.groups, spectrum_of, request.axes)
        return found.lengths, found.run(progress)

    lengths, curves = search.measured(stats, request, measure)
    costs = builder.costs(lengths)
    if request.latency is not None:
        sizes, options["latency_table"] = allocate_by_latency(builder, lengths, costs, curves, request)
    elif request.flops is not None:
        goal = request.flops * costs.flops(costs.dense())
        sizes = allocate(curves, costs, goal, request.axes, request.multiple_of, request.uniform, by_flops=True)
    else:
        goal = int((1.0 - (request.remove or 0.0)) * count_parameters(model).non_embedding)
        sizes = allocate(curves, costs, goal, request.axes, request.multiple_of, request.uniform)
    options["predicted_kl"] = round(curves.of(sizes), 8)
    sizes.doomed = curves.doomed(sizes, costs.neurons)
    return sizes


def _cut_bases(stats: Calibration, builder: Builder, spectrum_of: SpectrumOf, sizes: Sizes) -> dict[str, Basis]:
    """The subspace of every site, before any refit."""
    bases: dict[str, Basis] = {}
    for members, size in zip(builder.groups, sizes.hidden, strict=True):
        cut = whole_basis(size) if size == builder.full else spectrum_of(members).cut(size)
        for name in members:
            bases[name] = make_basis(cut.decoder, cut.encoder, stats.sites[name].second_moment)
    return bases | _head_basis(builder, spectrum_of, sizes)


def _head_basis(builder: Builder, spectrum_of: SpectrumOf, sizes: Sizes) -> dict[str, Basis]:
    """The subspace of a masked-LM head's own site, where there is one."""
    if bert.MLM_SITE not in builder.sites:
        return {}
    return {bert.MLM_SITE: spectrum_of([bert.MLM_SITE]).cut(builder.widths(sizes)[bert.MLM_SITE])}


def _kept(bases: dict[str, Basis]) -> dict[str, Kept]:
    return {name: basis.kept for name, basis in bases.items()}


def _refit(
    model: PreTrainedModel,
    stats: Calibration,
    request: Request,
    builder: Builder,
    spectrum_of: SpectrumOf,
    sizes: Sizes,
    record: dict[str, Any],
    progress: bool | None,
) -> PreTrainedModel:
    costs = builder.costs()
    inputs = costs.neurons + (costs.full if costs.maps else 0)
    if stats.sample.tokens < FEW_TOKENS * inputs:
        logger.warning(
            "The sample holds %d tokens for up to %d unknowns of each output: the refit is regularised more strongly. "
            "Calibrate on more text (and keep more of it: sample_tokens) for a smaller loss.",
            stats.sample.tokens,
            inputs,
        )
    if builder.family == "t5":
        bases = _cut_bases(stats, builder, spectrum_of, sizes)
        solved = refit_t5(model, stats, bases, sizes, progress)
        return builder.build(_kept(bases), stats, sizes, solved.kept_heads, t5.assemble(model, bases, solved), record)
    sample = PackedSample(stats.sample.sequences())
    fixed = _cut_bases(stats, builder, spectrum_of, sizes) if request.kind == "shared" else None
    widths = builder.widths(sizes)
    each = replace(sizes, hidden=[width for name, width in widths.items() if name != bert.MLM_SITE])
    made = BertRefit(model, stats, sample, each, request.subspace, request.epsilon, progress, fixed).run()
    head = _head_basis(builder, spectrum_of, sizes)
    tensors = bert.assemble(model, head, made)
    return builder.build(made.kept | _kept(head), stats, sizes, None, tensors, record)


@dataclass(frozen=True)
class WidthRow:
    """What one hidden size would leave: parameters in all and without embeddings, and the fraction removed."""

    hidden_size: int
    total: int
    non_embedding: int
    removed: float


def width_table(model: PreTrainedModel, steps: int = 12) -> list[WidthRow]:
    """What hidden sizes from D down would cost; `model` may be on the meta device.

    Raises:
        TCSPError: an unsupported architecture.
    """
    family, head = family_of(model)
    full = dense_hidden_size(model)
    builder = Builder(model, family, head, DEFAULT_KIND[family], min(8, full))
    before = count_parameters(model).non_embedding
    widths = sorted({builder.round_up(max(1, full * i // steps), quiet=True) for i in range(1, steps + 1)})
    dense = builder.dense_sizes()
    rows = []
    for width in reversed(widths):
        count = builder.count(replace(dense, hidden=[width] * len(dense.hidden)))
        rows.append(WidthRow(width, count.total, count.non_embedding, 1.0 - count.non_embedding / before))
    return rows


def _width_for_removal(model: PreTrainedModel, builder: Builder, remove: float) -> int:
    """Largest width, a multiple or D, that removes at least this fraction.

    Raises:
        TCSPError: even the smallest width removes less; the message names what is reachable.
    """
    before = count_parameters(model).non_embedding
    dense = builder.dense_sizes()
    candidates = sorted({*range(builder.multiple_of, builder.full + 1, builder.multiple_of), builder.full})

    def removed(width: int) -> float:
        return 1.0 - builder.count(replace(dense, hidden=[width] * len(dense.hidden))).non_embedding / before

    most = removed(candidates[0])
    if most < remove:
        raise TCSPError(
            f"remove={remove} cannot be reached through the hidden size alone: the smallest width, "
            f"{candidates[0]}, removes {most:.3f}. Ask for at most that."
        )
    low, high = 0, len(candidates)  # candidates[low] removes enough, candidates[high] does not
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if removed(candidates[middle]) >= remove else (low, middle)
    return candidates[low]


def _pooled_spectrum(stats: Calibration, members: list[str], subspace: str, epsilon: float) -> Spectrum:
    """Spectrum of the mean second moments of the group's sites; every site counts alike."""
    moment = sum((stats.sites[name].second_moment for name in members[1:]), stats.sites[members[0]].second_moment)
    fisher = _pooled_fisher(stats, members) if subspace == "balanced" else None
    return spectrum(subspace, moment / len(members), fisher, epsilon)


def _pooled_fisher(stats: Calibration, members: list[str]) -> torch.Tensor:
    return sum((stats.sites[name].fisher for name in members[1:]), stats.sites[members[0]].fisher) / len(members)
