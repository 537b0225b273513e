"""Real-valued masks by least squares, block by block (the third step of Kwon et al. 2022, arXiv 2204.09656)."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..calibration.inputs import Batch
from .blocks import Block, blocks_of
from .sample import real_rows, sample_batches

_RIDGE = 1e-3  # of the mean of the normal equations' diagonal, towards masks of 1
_LARGEST = 10.0  # the paper's bound: beyond it the equations are not to be trusted


class _Reached(Exception):
    """The forward pass has come as far as it must."""


def tuned_masks(
    dense: PreTrainedModel,
    small: PreTrainedModel,
    stats: Calibration,
    blocks: Sequence[Block],
    masks: Sequence[torch.Tensor],
) -> Iterator[tuple[Block, torch.Tensor, torch.Tensor]]:
    """Yield every block of `small` with its mask (units,) bool and scale (units,), in the order of the forward pass.

    The caller cuts a block before it asks for the next one, so each is tuned on what the pruned model gives it; what
    comes behind is still whole, but every pass ends at its block.
    """
    for block, reference, mask in zip(blocks, blocks_of(dense), masks, strict=True):
        if bool(mask.any()):
            yield block, mask, _least_squares(dense, small, stats, block, reference, mask)
        else:
            yield block, mask, torch.zeros(block.units, dtype=torch.float64)


@torch.no_grad()
def _least_squares(
    dense: PreTrainedModel,
    small: PreTrainedModel,
    stats: Calibration,
    block: Block,
    reference: Block,
    mask: torch.Tensor,
) -> torch.Tensor:
    """(units,) float64: `argmin_m sum over tokens |x + sum_j m_j c_j - target|²` over the kept units; 0 elsewhere.

    c_j is what unit j writes in the pruned model, x the pruned stream it is added to, and `target` the dense stream.
    """
    weight = block.writer_linear.weight.detach().double()
    entries = mask.repeat_interleave(block.size).to(weight.device)
    products = weight.T @ weight
    moments = torch.zeros_like(products)
    cross = torch.zeros_like(weight.T)
    for batch in sample_batches(small, stats):
        _, target = _capture(dense, reference, batch, None)
        context, stream = _capture(small, block, batch, entries)
        moments += (context.T @ context).double()
        cross += (context.T @ (target - stream)).double()
    spread = torch.zeros(len(entries), block.units, dtype=torch.float64, device=weight.device)
    spread[torch.arange(len(entries)), torch.arange(len(entries)) // block.size] = 1.0
    kept = mask.nonzero().squeeze(1).to(weight.device)
    normal = (spread.T @ (moments * products) @ spread)[kept][:, kept]
    right = (spread.T @ (cross * weight.T).sum(1))[kept]
    damping = _RIDGE * normal.diagonal().mean().clamp(min=1e-30)
    change = torch.linalg.solve(normal + damping * torch.eye(len(kept)).to(normal), right)
    scale = torch.zeros(block.units, dtype=torch.float64)
    tuned = 1.0 + change
    scale[kept.cpu()] = tuned.cpu() if float(tuned.abs().max()) <= _LARGEST else 1.0
    return scale


def _capture(
    model: PreTrainedModel, block: Block, batch: Batch, entries: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the block's writer reads (tokens, entries), masked by `entries`, and the stream after it (tokens, D)."""
    found: dict[str, torch.Tensor] = {}

    def read(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor] | None:
        inputs = args[0] if entries is None else args[0] * entries.to(args[0])
        found["read"] = real_rows(inputs, batch, block.stack)
        return None if entries is None else (inputs,)

    def summed(stream: torch.Tensor) -> None:
        found["sum"] = real_rows(stream, batch, block.stack)
        raise _Reached

    with _hooks(block, read, summed), suppress(_Reached):
        model(**batch)
    return found["read"], found["sum"]


@contextmanager
def _hooks(block: Block, read: Callable[..., Any], summed: Callable[[torch.Tensor], None]) -> Iterator[None]:
    def before(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
        summed(args[0])

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        summed(output[0] if isinstance(output, tuple) else output)

    handles = [block.writer_linear.register_forward_pre_hook(read)]
    if block.sum_is_input:
        handles.append(block.sum_module.register_forward_pre_hook(before))
    else:
        handles.append(block.sum_module.register_forward_hook(after))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
