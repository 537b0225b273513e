"""What the baselines share: a copy to cut, and the number of parameters that must go."""

import copy
from typing import cast

from transformers import PreTrainedModel

from ..compression import count_parameters
from ..errors import TCSPError


def working_copy(dense: PreTrainedModel) -> PreTrainedModel:
    """A copy to cut, in evaluation mode, whose parameters need no gradients."""
    return cast(PreTrainedModel, copy.deepcopy(dense).eval().requires_grad_(False))


def finished(model: PreTrainedModel) -> PreTrainedModel:
    """What a baseline hands back: a model that can be trained."""
    return cast(PreTrainedModel, model.eval().requires_grad_(True))


def parameters_to_remove(model: PreTrainedModel, removed: float) -> int:
    """The fewest non-embedding parameters whose removal is at least the fraction `removed`.

    Raises:
        TCSPError: `removed` is not a number in [0, 1).
    """
    if isinstance(removed, bool) or not isinstance(removed, (int, float)) or not 0.0 <= removed < 1.0:
        raise TCSPError(f"removed is {removed!r}; it must be a number from 0 to below 1.")
    count = count_parameters(model).non_embedding
    return count - int((1.0 - removed) * count + 1e-9)


def cannot_reach(method: str, removed: float, largest: int, model: PreTrainedModel) -> TCSPError:
    """The error of a budget that is out of a method's reach; `largest`: the most parameters that it can remove."""
    share = largest / count_parameters(model).non_embedding
    return TCSPError(f"{method} cannot remove {removed:.1%}: at most {share:.1%} of this model.")
