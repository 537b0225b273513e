"""Heads and filters by Fisher information, rescaled: Kwon et al. 2022 (arXiv 2204.09656), without labels.

Three steps on masks over heads and filters, as in the paper:

1. search: diagonal Fisher information of the masks; for every number of kept heads the best filters that still fit;
2. rearrangement: block by block, with the block's full Fisher matrix, the numbers of units staying as they are;
3. tuning: block by block in the order of the forward pass, least squares for real-valued masks, so that the stream of
   the pruned model after the block is nearest to the dense model's.

Differences: labels are drawn from the model's own output (the true Fisher), for an embedding model random unit probes
are; the budget counts parameters where the paper counts FLOPs (the same thing for units of equal cost); the least
squares shrink towards 1. Pruned units are taken out of the weights and the masks' values folded into them.
"""

from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..calibration.objectives import Draws, objective_of
from .budget import cannot_reach, finished, parameters_to_remove, working_copy
from .mask_tuning import tuned_masks
from .sample import keys_of, sample_batches
from .units import Units, keep_units, units_of


def fisher(model: PreTrainedModel, stats: Calibration, removed: float) -> PreTrainedModel:
    """Remove heads and filters by mask search, rearrangement and tuning.

    Raises:
        TCSPError: the budget is out of reach of heads and filters, or the statistics hold no token sample.
    """
    goal = parameters_to_remove(model, removed)
    small = working_copy(model)
    groups = units_of(small)
    largest = sum(units.removable for units in groups)
    if largest < goal:
        raise cannot_reach("Fisher pruning", removed, largest, model)
    if goal == 0:
        return finished(small)
    gradients = mask_gradients(small, stats, groups)
    masks = search(groups, [rows.square().sum(0) for rows in gradients], goal)
    masks = [rearrange(mask, rows.T @ rows, u.least) for mask, rows, u in zip(masks, gradients, groups, strict=True)]
    dense = working_copy(model) if model.training else model  # the targets hold no dropout
    for units, mask, scale in tuned_masks(dense, small, stats, groups, masks):
        kept = mask.nonzero().squeeze(1)
        keep_units(units, kept, scale[kept])
    return finished(small)


def mask_gradients(model: PreTrainedModel, stats: Calibration, groups: Sequence[Units]) -> list[torch.Tensor]:
    """For every block (sequences, count) float64: gradient of each sequence's log-likelihood by the masks, at 1."""
    pooling = stats.objective.removeprefix("embedding-") if stats.objective.startswith("embedding-") else "mean"
    _, objective = objective_of(model, pooling)
    masks: list[torch.Tensor] = []

    def watch(index: int) -> Any:
        def hook(_module: Any, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            wide = masks[index].repeat_interleave(groups[index].size, dim=1)
            return (args[0] * wide.unsqueeze(1),)

        return hook

    found: list[list[torch.Tensor]] = [[] for _ in groups]
    handles = [u.block.output.register_forward_pre_hook(watch(i)) for i, u in enumerate(groups)]
    try:
        for batch in sample_batches(model, stats):
            rows = len(batch["input_ids"])
            masks = [torch.ones(rows, u.count, device=model.device, dtype=model.dtype).requires_grad_() for u in groups]
            likelihood = objective(model, model(**batch), batch, Draws(keys_of(batch, stats.seed)))
            gradients = torch.autograd.grad(likelihood, masks, allow_unused=True)
            for kept, mask, gradient in zip(found, masks, gradients, strict=True):
                kept.append((torch.zeros_like(mask) if gradient is None else gradient).double().cpu())
    finally:
        for handle in handles:
            handle.remove()
    return [torch.cat(rows) for rows in found]


def search(groups: Sequence[Units], importance: Sequence[torch.Tensor], goal: int) -> list[torch.Tensor]:
    """Masks (count,) bool that remove at least `goal` parameters and the least importance, among heads and filters.

    For every number of kept heads (the most important ones) as many filters are kept as fit. All heads cost the same,
    and all filters do. `goal` must be within reach.
    """
    values = [part.clone() for part in importance]
    for units, value in zip(groups, values, strict=True):
        if units.least:
            value[value.topk(units.least).indices] = float("inf")
    order: dict[str, torch.Tensor] = {}
    losses: dict[str, torch.Tensor] = {}
    costs = {units.kind: units.cost for units in groups}
    for kind in costs:
        flat = torch.cat([value for units, value in zip(groups, values, strict=True) if units.kind == kind])
        order[kind] = flat.argsort(stable=True)  # the least important first
        losses[kind] = torch.cat([flat.new_zeros(1), flat[order[kind]].cumsum(0)])  # of removing the first n
    best, counts = float("inf"), {"heads": 0, "filters": 0}
    for heads in range(len(order["heads"]) + 1):
        filters = max(0, -(-(goal - heads * costs["heads"]) // costs["filters"]))
        if filters > len(order["filters"]):
            continue
        loss = float(losses["heads"][heads] + losses["filters"][filters])
        if loss < best:
            best, counts = loss, {"heads": heads, "filters": filters}
    flat_masks = {kind: torch.ones(len(ranks), dtype=torch.bool) for kind, ranks in order.items()}
    for kind, ranks in order.items():
        flat_masks[kind][ranks[: counts[kind]]] = False
    starts = dict.fromkeys(order, 0)
    masks = []
    for units in groups:
        start = starts[units.kind]
        masks.append(flat_masks[units.kind][start : start + units.count].clone())
        starts[units.kind] += units.count
    return masks


def rearrange(mask: torch.Tensor, information: torch.Tensor, least: int = 0) -> torch.Tensor:
    """The same number of kept units, chosen with the block's whole Fisher matrix (units, units).

    The removed set starts with the units of the smallest diagonal; then every other unit, the least important first,
    is offered: it goes in, and the unit whose return leaves the smallest quadratic form comes out.
    """
    count = int((~mask).sum())
    if count == 0 or count >= len(mask) - least:
        return mask
    diagonal = information.diagonal()
    ranks = diagonal.argsort(stable=True)
    out = torch.zeros(len(mask), dtype=torch.bool)
    out[ranks[:count]] = True
    sums = information[:, out].sum(1)
    for unit in ranks[count:].tolist():
        out[unit] = True
        sums = sums + information[:, unit]
        gain = torch.where(out, 2.0 * sums - diagonal, -torch.inf)  # of the quadratic form, by taking a unit back
        back = int(gain.argmax())
        out[back] = False
        sums = sums - information[:, back]
    return ~out
