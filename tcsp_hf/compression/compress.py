"""`compress`: dense model + statistics -> a new, smaller model. No data, no labels, no training."""

import copy
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from ..architectures import dense_hidden_size, family_of, sites_of
from ..calibration import Calibration
from ..calibration.fingerprint import model_fingerprint
from ..configuration_tcsp import METHOD_VERSION, PROJECTION_KINDS, SUBSPACES, TCSPConfig
from ..configuration_tcsp_bert import TCSPBertConfig
from ..configuration_tcsp_t5 import TCSPT5Config
from ..errors import TCSPError
from . import bert, t5
from .budget import AXES, LossCurves, Shape, allocate, full_sizes, loss_curves
from .refit_bert import BertRefit, BertSizes, RefitResult
from .sizes import ParameterCount, count_parameters, meta_count, size_table
from .streams import PackedSample
from .subspace import Basis, Spectrum, make_basis, spectrum

logger = logging.getLogger("tcsp_hf")

DEFAULT_KIND = {"bert": "per_site", "t5": "shared"}
_NOT_COPIED = (
    "model_type",
    "architectures",
    "transformers_version",
    "auto_map",
    "dtype",
    "torch_dtype",
    "_name_or_path",
)


def compress(
    model: PreTrainedModel,
    stats: Calibration,
    *,
    hidden_size: int | None = None,
    energy: float | None = None,
    remove: float | None = None,
    axes: Sequence[str] | None = None,
    projection: str | None = None,
    subspace: str = "balanced",
    refit: bool | None = None,
    epsilon: float = 0.3,
    multiple_of: int = 8,
    progress: bool | None = False,
    verbose: bool = False,
) -> PreTrainedModel:
    """Move a dense model into subspaces of its hidden states. No data, no label, no training.

    Exactly one of `hidden_size`, `energy` and `remove` says how small.

    Args:
        model: the dense model that `stats` was collected from; it is left untouched.
        stats: from `calibrate` or `Calibration.load`.
        hidden_size: width k of every site.
        energy: fraction in (0, 1] to keep at every site (at a T5's stack): of the eigenvalues of the second moment
            for `"pca"`, of the squared singular values of `Gamma^½ Sigma^½` for `"balanced"`. Widths differ per site.
        remove: fraction of the non-embedding parameters to remove at least, over `axes`.
        axes: what `remove` may cut: `"hidden"`, and for a BERT with `projection="per_site"` and a refit also
            `"filters"` (feed-forward neurons) and `"heads"` (query/key and value/output sizes). With more than one
            axis, sizes differ per site and layer, chosen by predicted loss. None: `("hidden",)`.
        projection: `"per_site"`: every site of a BERT, every stack of a T5 has its own subspace; `"shared"`: one
            subspace from the pooled statistics (the paper's). None: per_site for BERT, shared for T5 (whose encoder
            and decoder then keep one embedding table, and whose result can be exported as a stock T5).
        subspace: `"balanced"` weighs directions by what the output does with them; `"pca"` is the paper's.
        refit: solve every linear again, in closed form, on the token sample that `stats` carries (BERT). None does so
            where filters or heads are cut.
        epsilon: weight of the identity beside Gamma in `"balanced"`, in units of Gamma's mean eigenvalue.
        multiple_of: widths are rounded up to a multiple (D itself always stays possible); said in a warning.
        progress: show bars; None shows them on a terminal only.
        verbose: print the table of sizes before and after, per module.

    Returns:
        A new model of the matching TCSP class, in evaluation mode, with the dense model's dtype and device.

    Raises:
        TCSPError: bad arguments, statistics of another model, or too few tokens; nothing was built then.
    """
    family, head = family_of(model)
    full = dense_hidden_size(model)
    kind = DEFAULT_KIND[family] if projection is None else projection
    _check_choice("projection", kind, PROJECTION_KINDS)
    _check_choice("subspace", subspace, SUBSPACES)
    _check_request(full, hidden_size, energy, remove, epsilon, multiple_of)
    _check_statistics(model, stats)
    chosen_axes = _check_axes(axes, family, kind, remove)
    refitting = _check_refit(family, stats, refit, chosen_axes)
    builder = _Builder(model, family, head, kind, multiple_of)
    sample = PackedSample(stats.sample.sequences() if refitting else [])

    sites = [site.name for site in sites_of(model)]
    groups = _groups(family, kind, sites)
    spectra = {
        members[0]: _pooled_spectrum(stats, members, subspace, epsilon) for members in groups
    }  # the group's first site names it
    options: dict[str, Any] = {"refit": refitting, "axes": list(chosen_axes)}
    sizes: BertSizes | None = None
    if hidden_size is not None:
        width = builder.round_up(hidden_size)
        widths = {name: width for name in sites}
    elif energy is not None:
        widths = {}
        for members in groups:
            width = builder.round_up(spectra[members[0]].size_for_energy(energy), quiet=True)
            widths.update({name: width for name in members})
    elif chosen_axes == ("hidden",):
        width = builder.width_for_removal(sites, remove or 0.0)
        widths = {name: width for name in sites}
    else:
        curves = loss_curves(model, stats, sample, subspace, epsilon, chosen_axes, progress)
        sizes = builder.allocate(sites, curves, remove or 0.0, chosen_axes)
        options["predicted_kl"] = round(curves.of(sizes), 6)
        widths = builder.widths_of(sites, sizes)
    needed = max(widths.values())
    if stats.tokens < needed:
        raise TCSPError(
            f"The statistics hold {stats.tokens} tokens, but a hidden size of {needed} needs at least {needed}: "
            "calibrate on more text, or choose a smaller size."
        )

    bases: dict[str, Basis] = {}
    for members in groups:
        for name in members:
            cut = spectra[members[0]].cut(widths[name])
            bases[name] = make_basis(cut.decoder, cut.encoder, stats.sites[name].second_moment)
    bases = {name: bases[name] for name in sites}
    made: RefitResult | None = None
    if refitting:
        if sizes is None:
            sizes = builder.uniform_sizes(widths)
        fixed = bases if kind == "shared" else None
        made = BertRefit(model, stats, sample, sizes, subspace, epsilon, progress, fixed).run()
    small = builder.build(bases, stats, subspace, epsilon, sizes, made, options)
    if verbose:
        print(size_table(model, small))
    return small


def _check_axes(axes: Sequence[str] | None, family: str, kind: str, remove: float | None) -> tuple[str, ...]:
    """The axes to cut, in the order of `AXES`.

    Raises:
        TCSPError: an unknown axis, one that is not possible here, or axes without `remove`.
    """
    if axes is None:
        return ("hidden",)
    if isinstance(axes, str) or not axes or any(axis not in AXES for axis in axes):
        raise TCSPError(f"axes is {axes!r}; it must name some of {', '.join(map(repr, AXES))}.")
    possible = AXES if family == "bert" and kind == "per_site" else ("hidden",)
    missing = [axis for axis in axes if axis not in possible]
    if missing:
        raise TCSPError(f"axes names {missing[0]!r}, which needs a BERT with projection='per_site'.")
    if remove is None and tuple(axes) != ("hidden",):
        raise TCSPError(f"axes is {axes!r}, but only remove= chooses among axes; hidden_size and energy set widths.")
    return tuple(axis for axis in AXES if axis in axes)


def _check_refit(family: str, stats: Calibration, refit: bool | None, axes: tuple[str, ...]) -> bool:
    """Whether to refit.

    Raises:
        TCSPError: it is asked for, or needed by the axes, and not possible.
    """
    needed = axes != ("hidden",)
    if refit is False and needed:
        raise TCSPError(f"refit=False was given, but axes {axes!r} need the refit.")
    if not (refit or needed):
        return False
    if family != "bert":
        raise TCSPError("refit=True was given, but the refit exists for BERT only: use refit=False for T5.")
    if stats.sample.tokens == 0:
        raise TCSPError("The refit needs a token sample in the statistics: calibrate with sample_tokens > 0.")
    return True


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
    builder = _Builder(model, family, head, DEFAULT_KIND[family], min(8, full))
    sites = [site.name for site in sites_of(model)]
    before = count_parameters(model).non_embedding
    widths = sorted({builder.round_up(max(1, full * i // steps), quiet=True) for i in range(1, steps + 1)})
    rows = []
    for width in reversed(widths):
        count = builder.count({name: width for name in sites})
        rows.append(WidthRow(width, count.total, count.non_embedding, 1.0 - count.non_embedding / before))
    return rows


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise TCSPError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")


def _check_request(full: int, hidden_size: Any, energy: Any, remove: Any, epsilon: Any, multiple_of: Any) -> None:
    given = {"hidden_size": hidden_size, "energy": energy, "remove": remove}
    named = [name for name, value in given.items() if value is not None]
    if len(named) != 1:
        what = "none was" if not named else f"{' and '.join(named)} were"
        raise TCSPError(f"Give exactly one of hidden_size, energy and remove; {what} given.")
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or not 1 <= multiple_of <= full:
        raise TCSPError(f"multiple_of is {multiple_of!r}; it must be an integer from 1 to {full}.")
    if hidden_size is not None and (
        isinstance(hidden_size, bool) or not isinstance(hidden_size, int) or not 1 <= hidden_size <= full
    ):
        raise TCSPError(
            f"hidden_size is {hidden_size!r}; it must be an integer from 1 to {full}, the dense model's hidden size."
        )
    for name, value, top in (("energy", energy, 1.0), ("remove", remove, 1.0)):
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if value is not None and not (number and 0.0 < value <= top):
            raise TCSPError(f"{name} is {value!r}; it must be a number in (0, 1].")
    if not isinstance(epsilon, (int, float)) or isinstance(epsilon, bool) or not 0.0 < epsilon < float("inf"):
        raise TCSPError(f"epsilon is {epsilon!r}; it must be a positive number.")


def _check_statistics(model: PreTrainedModel, stats: Calibration) -> None:
    if not isinstance(stats, Calibration):
        raise TCSPError(f"stats is a {type(stats).__name__}; it must come from calibrate or Calibration.load.")
    if model_fingerprint(model) != stats.model_fingerprint:
        raise TCSPError(
            f"The statistics belong to another model ({stats.source_model!r}): their fingerprint is not this model's. "
            "Calibrate this model, loaded as it is now."
        )
    expected = [site.name for site in sites_of(model)]
    if list(stats.sites) != expected:
        missing = [name for name in expected if name not in stats.sites]
        raise TCSPError(f"The statistics do not fit the model: sites {missing or list(stats.sites)}.")


def _groups(family: str, kind: str, sites: list[str]) -> list[list[str]]:
    """Sites that share one subspace, in the order of the forward pass."""
    if family == "bert":
        own = [name for name in sites if name == bert.MLM_SITE or kind == "per_site"]
        shared = [name for name in sites if name not in own]
        return ([shared] if shared else []) + [[name] for name in own]
    if kind == "shared":
        return [sites]
    stacks = [[name for name in sites if name.startswith(stack)] for stack in ("encoder.", "decoder.")]
    return [stack for stack in stacks if stack]


def _pooled_spectrum(stats: Calibration, members: list[str], subspace: str, epsilon: float) -> Spectrum:
    """Spectrum of the mean second moments of the group's sites; every site counts alike."""
    moment = torch.stack([stats.sites[name].second_moment for name in members]).mean(0)
    fisher = None
    if subspace == "balanced":
        fisher = torch.stack([stats.sites[name].fisher for name in members]).mean(0)
    return spectrum(subspace, moment, fisher, epsilon)


@dataclass
class _Builder:
    """Builds configurations and models of one dense model's family."""

    dense: PreTrainedModel
    family: str
    head: str
    kind: str
    multiple_of: int

    @property
    def full(self) -> int:
        return dense_hidden_size(self.dense)

    @property
    def model_class(self) -> Callable[[Any], PreTrainedModel]:
        made = (bert if self.family == "bert" else t5).model_class(self.head)
        bare = self.family == "bert" and self.head == "Model" and self.dense.pooler is None
        return partial(made, add_pooling_layer=False) if bare else made

    def round_up(self, size: int, quiet: bool = False) -> int:
        """The next multiple, at most D."""
        rounded = min(-(-size // self.multiple_of) * self.multiple_of, self.full)
        if rounded != size and not quiet:
            logger.warning(
                "hidden_size %d was rounded up to %d, a multiple of %d (multiple_of=1 keeps it).",
                size,
                rounded,
                self.multiple_of,
            )
        return rounded

    def config(self, widths: dict[str, int], sizes: BertSizes | None = None) -> TCSPConfig:
        fields = {name: value for name, value in self.dense.config.to_dict().items() if name not in _NOT_COPIED}
        own: dict[str, Any]
        config_class: Callable[..., TCSPConfig]
        if self.family == "bert":
            own, config_class = bert.config_fields(self.dense, widths, sizes), TCSPBertConfig
            fields.pop("position_embedding_type", None)
        else:
            own_bases = self.kind == "per_site" and "decoder.final" in widths
            own, config_class = t5.config_fields(self.dense, widths, own_bases), TCSPT5Config
        config = config_class(**{**fields, **own})
        config._attn_implementation = self.dense.config._attn_implementation
        return config

    def count(self, widths: dict[str, int], sizes: BertSizes | None = None) -> ParameterCount:
        """Parameters that the model of these sizes would have."""
        return meta_count(self.model_class, self.config(widths, sizes))

    def width_for_removal(self, sites: list[str], remove: float) -> int:
        """Largest width, a multiple or D, that removes at least this fraction.

        Raises:
            TCSPError: even the smallest width removes less; the message names what is reachable.
        """
        before = count_parameters(self.dense).non_embedding
        candidates = sorted({*range(self.multiple_of, self.full + 1, self.multiple_of), self.full})

        def removed(width: int) -> float:
            return 1.0 - self.count({name: width for name in sites}).non_embedding / before

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

    def uniform_sizes(self, widths: dict[str, int]) -> BertSizes:
        """These widths, and everything else as in the dense model."""
        sizes = full_sizes(self.dense)
        sizes.sites[:] = [width for name, width in widths.items() if name != bert.MLM_SITE]
        return sizes

    def widths_of(self, sites: list[str], sizes: BertSizes) -> dict[str, int]:
        """Width by site name; the masked-LM head gets the embeddings' width."""
        main = [name for name in sites if name != bert.MLM_SITE]
        widths = dict(zip(main, sizes.sites, strict=True))
        return {name: widths.get(name, sizes.sites[0]) for name in sites}

    def allocate(self, sites: list[str], curves: LossCurves, remove: float, axes: tuple[str, ...]) -> BertSizes:
        """Sizes that remove at least this fraction at the least predicted loss.

        Raises:
            TCSPError: no sizes do; the message names the smallest result.
        """
        dense, narrow = full_sizes(self.dense), full_sizes(self.dense)
        narrow.sites[-1] -= 1
        config = self.dense.config
        bare = Shape(
            full=self.full,
            heads=config.num_attention_heads,
            head_size=dense.qk[0],
            neurons=config.intermediate_size,
            layers=config.num_hidden_layers,
            fixed=0,
            per_last=0,
        )
        # what the heads cost is counted on models of these sizes rather than listed head by head
        counts = [self.count(self.widths_of(sites, sizes), sizes).non_embedding for sizes in (dense, narrow)]
        per_last = counts[0] - counts[1] - bare.count(dense) + bare.count(narrow)
        fixed = counts[0] - bare.count(dense) - per_last * self.full
        shape = replace(bare, fixed=fixed, per_last=per_last)
        goal = int((1.0 - remove) * count_parameters(self.dense).non_embedding)
        return allocate(curves, shape, goal, axes, self.multiple_of)

    def build(
        self,
        bases: dict[str, Basis],
        stats: Calibration,
        subspace: str,
        epsilon: float,
        sizes: BertSizes | None,
        made: RefitResult | None,
        options: dict[str, Any],
    ) -> PreTrainedModel:
        """The compressed model from the chosen subspaces, or from a refit that chose its own."""
        if made is not None:
            bases = {**bases, **made.bases}
        widths = {name: basis.size for name, basis in bases.items()}
        config = self.config(widths, sizes)
        count = count_parameters(self.dense)
        config.projection = {
            "method_version": METHOD_VERSION,
            "source_model": stats.source_model,
            "source_revision": getattr(self.dense.config, "_commit_hash", None),
            "source_model_type": self.dense.config.model_type,
            "source_hidden_size": self.full,
            "source_parameters": count.total,
            "source_non_embedding_parameters": count.non_embedding,
            "kind": self.kind,
            "subspace": subspace,
            "epsilon": float(epsilon) if subspace == "balanced" else None,
            "sites": [
                {"name": name, "hidden_size": basis.size, "kept_energy": round(basis.kept_energy, 6)}
                for name, basis in bases.items()
                if name in config.site_widths()
            ],
            "calibration": stats.summary(),
            "options": options,
        }
        if made is not None:
            tensors = bert.assemble(self.dense, bases, made)
        elif self.family == "bert":
            tensors = bert.project(self.dense, config, bases)  # type: ignore[arg-type]
        else:
            tensors = t5.project(self.dense, config, bases)  # type: ignore[arg-type]
        with no_init_weights():
            small = self.model_class(config)
        small.tie_weights()
        self._load(small, tensors)
        after = count_parameters(small).non_embedding
        small.config.projection["removed"] = round(1.0 - after / count.non_embedding, 6)
        if self.dense.can_generate():
            small.generation_config = copy.deepcopy(self.dense.generation_config)
        return small.eval()

    def _load(self, small: Any, tensors: dict[str, torch.Tensor]) -> None:
        """Put the projected tensors into the model, in the dense model's dtypes, on its device."""
        broken = [name for name, value in tensors.items() if not torch.isfinite(value).all()]
        if broken:
            raise TCSPError(f"The projected weights hold a NaN or an infinity: {broken[0]}. Check the dense weights.")
        dense = dict(self.dense.named_parameters())
        small.to(dtype=self.dense.dtype)
        for name, parameter in small.named_parameters():
            if name in dense and dense[name].dtype != parameter.dtype:
                parameter.data = parameter.data.to(dense[name].dtype)  # T5 keeps `wo` in float32
        missing, unexpected = small.load_state_dict(tensors, strict=False)
        if missing or unexpected:
            raise TCSPError(f"The dense model is not laid out as expected: missing {missing}, unexpected {unexpected}.")
        small.to(self.dense.device)
