"""Real-valued masks by least squares, block by block (the third step of Kwon et al. 2022, arXiv 2204.09656)."""

from collections.abc import Iterator, Sequence
from contextlib import suppress

import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..calibration.inputs import Batch
from .sample import real_rows, sample_batches
from .units import Units, units_of

_RIDGE = 1e-3  # of the mean of the normal equations' diagonal, towards masks of 1
_LARGEST = 10.0  # the paper's bound: beyond it the equations are not to be trusted


class _Reached(Exception):
    """The forward pass has come as far as it must."""


def tuned_masks(
    dense: PreTrainedModel,
    small: PreTrainedModel,
    stats: Calibration,
    groups: Sequence[Units],
    masks: Sequence[torch.Tensor],
) -> Iterator[tuple[Units, torch.Tensor, torch.Tensor]]:
    """Yield the units of `small` with their mask (count,) bool and scale (count,), in the order of the forward pass.

    The caller cuts a block before it asks for the next one, so each is tuned on what the pruned model gives it; what
    comes behind is still whole, but every pass ends at its block.
    """
    for units, reference, mask in zip(groups, units_of(dense), masks, strict=True):
        if bool(mask.any()):
            yield units, mask, _least_squares(dense, small, stats, units, reference, mask)
        else:
            yield units, mask, torch.zeros(units.count, dtype=torch.float64)


@torch.no_grad()
def _least_squares(
    dense: PreTrainedModel,
    small: PreTrainedModel,
    stats: Calibration,
    units: Units,
    reference: Units,
    mask: torch.Tensor,
) -> torch.Tensor:
    """(count,) float64: `argmin_m sum over tokens |x + sum_j m_j c_j - target|²` over the kept units; 0 elsewhere.

    c_j is what unit j writes in the pruned model, x the pruned stream it is added to, and `target` the dense stream.
    """
    weight = units.block.output.weight.detach().double()
    entries = mask.repeat_interleave(units.size).to(weight.device)
    products = weight.T @ weight
    moments = torch.zeros_like(products)
    cross = torch.zeros_like(weight.T)
    for batch in sample_batches(small, stats):
        _, target = _capture(dense, reference, batch, None)
        context, stream = _capture(small, units, batch, entries)
        moments += (context.T @ context).double()
        cross += (context.T @ (target - stream)).double()
    spread = torch.zeros(len(entries), units.count, dtype=torch.float64, device=weight.device)
    spread[torch.arange(len(entries)), torch.arange(len(entries)) // units.size] = 1.0
    kept = mask.nonzero().squeeze(1).to(weight.device)
    normal = (spread.T @ (moments * products) @ spread)[kept][:, kept]
    right = (spread.T @ (cross * weight.T).sum(1))[kept]
    damping = _RIDGE * normal.diagonal().mean().clamp(min=1e-30)
    change = torch.linalg.solve(normal + damping * torch.eye(len(kept)).to(normal), right)
    scale = torch.zeros(units.count, dtype=torch.float64)
    tuned = 1.0 + change
    scale[kept.cpu()] = tuned.cpu() if float(tuned.abs().max()) <= _LARGEST else 1.0
    return scale


def _capture(
    model: PreTrainedModel, units: Units, batch: Batch, entries: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the block's output reads (tokens, entries), masked by `entries`, and the stream after it (tokens, D)."""
    found: dict[str, torch.Tensor] = {}
    stack = units.block.stack

    def read(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        inputs = args[0] if entries is None else args[0] * entries.to(args[0])
        found["read"] = real_rows(inputs, batch, stack)
        return (inputs,)

    def summed(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        found["stream"] = real_rows(args[0], batch, stack)
        raise _Reached

    hooks = [units.block.output.register_forward_pre_hook(read), units.norm.register_forward_pre_hook(summed)]
    try:
        with suppress(_Reached):
            model(**batch)
    finally:
        for hook in hooks:
            hook.remove()
    return found["read"], found["stream"]
