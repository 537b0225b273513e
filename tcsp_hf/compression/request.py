"""What `compress` is asked for: checked as a whole before anything is worked out."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

from ..architectures import dense_hidden_size, family_of, sites_of
from ..calibration import Calibration
from ..calibration.fingerprint import model_fingerprint
from ..configuration_tcsp import PROJECTION_KINDS, SUBSPACES
from ..errors import TCSPError
from .plan import AXES

logger = logging.getLogger("tcsp_hf")

DEFAULT_KIND = {"bert": "per_site", "t5": "shared"}
SEARCHED = ("remove", "flops", "latency")
"""Budgets that choose among axes; the others set widths."""


@dataclass(frozen=True)
class Request:
    """Exactly one of the budgets is not None; everything else is settled."""

    hidden_size: int | None
    energy: float | None
    remove: float | None
    flops: float | None
    latency: float | None
    axes: tuple[str, ...]
    kind: str
    subspace: str
    refit: bool
    uniform: bool
    epsilon: float
    multiple_of: int

    @property
    def searches(self) -> bool:
        """Whether sizes are chosen by predicted loss (one width for all sites needs no search)."""
        searched = self.remove is not None and (self.refit or self.axes != ("hidden",))
        return searched or self.flops is not None or self.latency is not None


def check_request(
    model: PreTrainedModel,
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
    epsilon: Any = 0.3,
    multiple_of: Any = 8,
    has_sample: bool = True,
) -> Request:
    """Settle what was left open. Needs no statistics, so that nothing is collected for what cannot be.

    Args:
        model: the dense model; the other arguments are `compress`'s.
        has_sample: whether the statistics hold, or will hold, a token sample.

    Raises:
        TCSPError: whatever is wrong, with its value and the remedy.
    """
    full = dense_hidden_size(model)
    budgets = {"hidden_size": hidden_size, "energy": energy, "remove": remove, "flops": flops, "latency": latency}
    kind = DEFAULT_KIND[family_of(model)[0]] if projection is None else projection
    _check_choice("projection", kind, PROJECTION_KINDS)
    _check_choice("subspace", subspace, SUBSPACES)
    _check_budgets(full, budgets)
    for name in ("flops", "latency"):
        if budgets[name] is not None and not has_sample:
            raise TCSPError(
                f"{name}={budgets[name]} is of a mean calibration sequence, but the statistics hold no token sample: "
                "calibrate with sample_tokens above 0, or use remove= or hidden_size=."
            )
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or not 1 <= multiple_of <= full:
        raise TCSPError(f"multiple_of is {multiple_of!r}; it must be an integer from 1 to {full}.")
    if not isinstance(epsilon, (int, float)) or isinstance(epsilon, bool) or not 0.0 < epsilon < float("inf"):
        raise TCSPError(f"epsilon is {epsilon!r}; it must be a positive number.")
    searched = any(budgets[name] is not None for name in SEARCHED)
    chosen = _check_axes(axes, searched, refit, has_sample)
    needed = chosen != ("hidden",)
    if refit is False and needed:
        raise TCSPError(f"refit=False was given, but axes {chosen!r} need the refit: use axes=('hidden',).")
    if (refit or needed) and not has_sample:
        raise TCSPError("The refit needs a token sample in the statistics: calibrate with sample_tokens > 0.")
    unchanged = budgets["hidden_size"] == full or budgets["energy"] == 1.0
    return Request(
        hidden_size=hidden_size,
        energy=energy,
        remove=remove,
        flops=flops,
        latency=latency,
        axes=chosen,
        kind=kind,
        subspace=subspace,
        refit=bool(refit) or needed or (refit is None and has_sample and not unchanged),
        uniform=uniform,
        epsilon=epsilon,
        multiple_of=multiple_of,
    )


def _check_choice(name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise TCSPError(f"{name} is {value!r}; allowed: {', '.join(map(repr, allowed))}.")


def _check_budgets(full: int, budgets: dict[str, Any]) -> None:
    named = [name for name, value in budgets.items() if value is not None]
    if len(named) != 1:
        what = "none was" if not named else f"{' and '.join(named)} were"
        *first, last = budgets
        raise TCSPError(f"Give exactly one of {', '.join(first)} and {last}; {what} given.")
    name, value = named[0], budgets[named[0]]
    if name == "hidden_size":
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= full:
            raise TCSPError(
                f"hidden_size is {value!r}; it must be an integer from 1 to {full}, the dense model's hidden size."
            )
        return
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0.0 < value <= 1.0:
        raise TCSPError(f"{name} is {value!r}; it must be a number in (0, 1].")


def _check_axes(axes: Sequence[str] | None, searched: bool, refit: bool | None, has_sample: bool) -> tuple[str, ...]:
    if axes is None:
        if searched and not has_sample and refit is None:
            logger.warning(
                "The statistics hold no token sample: only the hidden size is cut, and nothing is refit. Calibrate "
                "with sample_tokens > 0 for smaller losses."
            )
        return AXES if searched and has_sample and refit is not False else ("hidden",)
    if isinstance(axes, str) or not axes or any(axis not in AXES for axis in axes):
        raise TCSPError(f"axes is {axes!r}; it must name some of {', '.join(map(repr, AXES))}.")
    if not searched and tuple(axes) != ("hidden",):
        raise TCSPError(
            f"axes is {axes!r}, but only {', '.join(f'{name}=' for name in SEARCHED)} choose among axes; hidden_size "
            "and energy set widths."
        )
    return tuple(axis for axis in AXES if axis in axes)


def check_statistics(model: PreTrainedModel, stats: Calibration) -> None:
    """That the statistics are this model's.

    Raises:
        TCSPError: they are not.
    """
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
        raise TCSPError(
            f"The statistics do not fit the model: sites {missing or list(stats.sites)}. Collect all of them, or join "
            "the runs that hold them (Calibration.join)."
        )
