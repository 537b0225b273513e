"""Real-valued masks by least squares, block by block (the third step of Kwon et al. 2022, arXiv 2204.09656)."""

from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..calibration import Calibration
from ..compression.replay import Layers
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
    passes = _Passes(dense, stats), _Passes(small, stats)
    for units, reference, mask in zip(groups, units_of(dense), masks, strict=True):
        if bool(mask.any()):
            yield units, mask, _least_squares(passes, units, reference, mask)
        else:
            yield units, mask, torch.zeros(units.count, dtype=torch.float64)


class _Passes:
    """Forward passes of a model over the sample, block after block: each begins where the last block's layer does.

    The layers before that must not change any more.
    """

    def __init__(self, model: PreTrainedModel, stats: Calibration) -> None:
        self._model, self._stats = model, stats
        self._layers = Layers(model)
        self._known: list[dict[int, Any]] = []
        self._at = 0  # what goes into this layer is known, by batch

    def to(self, units: Units, entries: torch.Tensor | None) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """By batch: what the block's output reads (tokens, entries) and the stream after it (tokens, D).

        Args:
            entries: indices of the inputs of the block's output that are given, and count; all when None.
        """
        layer = self._layers.first_of([units.block.output])
        for i, batch in enumerate(sample_batches(self._model, self._stats)):
            known = self._known[i] if i < len(self._known) else {}
            kept = self._layers.before(layer)
            with self._layers.keeping(kept) as outputs, self._layers.starting_at(self._at, known):
                read, stream = self._captured(units, batch, entries)
            self._known[i : i + 1] = [{at: outputs.get(at, known.get(at)) for at in kept}]
            yield read, stream
        self._at = layer

    def _captured(
        self, units: Units, batch: dict[str, torch.Tensor], entries: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        found: dict[str, torch.Tensor] = {}
        stack = units.block.stack

        def read(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
            if entries is None:
                found["read"] = real_rows(args[0], batch, stack)
                return (args[0],)
            found["read"] = real_rows(args[0][..., entries], batch, stack)
            return (torch.zeros_like(args[0]).index_copy_(-1, entries, args[0][..., entries]),)

        def summed(_module: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            found["stream"] = real_rows(args[0], batch, stack)
            raise _Reached

        hooks = [units.block.output.register_forward_pre_hook(read), units.norm.register_forward_pre_hook(summed)]
        try:
            with suppress(_Reached):
                self._model(**batch)
        finally:
            for hook in hooks:
                hook.remove()
        return found["read"], found["stream"]


@torch.no_grad()
def _least_squares(passes: tuple[_Passes, _Passes], units: Units, reference: Units, mask: torch.Tensor) -> torch.Tensor:
    """(count,) float64: `argmin_m sum over tokens |x + sum_j m_j c_j - target|²` over the kept units; 0 elsewhere.

    c_j is what unit j writes in the pruned model, x the pruned stream it is added to, and `target` the dense stream.

    Args:
        passes: of the dense and of the pruned model.
    """
    dense, small = passes
    entries = mask.repeat_interleave(units.size).nonzero().squeeze(1).to(units.block.output.weight.device)
    weight = units.block.output.weight.detach()[:, entries].double()
    products = weight.T @ weight
    moments = torch.zeros_like(products)
    cross = torch.zeros_like(weight.T)
    for (_, target), (context, stream) in zip(dense.to(reference, None), small.to(units, entries), strict=True):
        moments += (context.T @ context).double()
        cross += (context.T @ (target - stream)).double()
    kept = mask.nonzero().squeeze(1)
    unit = torch.arange(len(kept), device=weight.device).repeat_interleave(units.size)
    spread = nn.functional.one_hot(unit, len(kept)).double()
    normal = spread.T @ (moments * products) @ spread
    right = spread.T @ (cross * weight.T).sum(1)
    damping = _RIDGE * normal.diagonal().mean().clamp(min=1e-30)
    change = torch.linalg.solve(normal + damping * torch.eye(len(kept)).to(normal), right)
    scale = torch.zeros(units.count, dtype=torch.float64)
    tuned = 1.0 + change
    scale[kept] = tuned.cpu() if float(tuned.abs().max()) <= _LARGEST else 1.0
    return scale
