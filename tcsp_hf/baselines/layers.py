"""Whole layers, no refit: two strategies of Sajjad et al. 2020 (arXiv 2004.03844), without their fine-tuning.

`top` drops the last layers, `alternate` every other one from the top (then the remaining ones from the top). The first
layer always stays; a T5 loses the same fraction of both stacks.
"""

from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..architectures import family_of
from ..calibration import Calibration
from ..compression import count_parameters
from .budget import cannot_reach, finished, parameters_to_remove, working_copy


def top_layers(model: PreTrainedModel, stats: Calibration, removed: float) -> PreTrainedModel:
    """Drop the fewest last layers. `stats` is not read.

    Raises:
        TCSPError: one layer is still too much.
    """
    return _drop(model, removed, "top")


def alternate_layers(model: PreTrainedModel, stats: Calibration, removed: float) -> PreTrainedModel:
    """Drop every other layer from the top. `stats` is not read.

    Raises:
        TCSPError: one layer is still too much.
    """
    return _drop(model, removed, "alternate")


def dropped(count: int, drop: int, strategy: str) -> set[int]:
    """Which of `count` layers go."""
    from_top = list(range(count - 1, 0, -1))
    order = from_top if strategy == "top" else from_top[::2] + from_top[1::2]
    return set(order[:drop])


def _layers_of(model: PreTrainedModel) -> dict[str, nn.ModuleList]:
    """The layers of every stack."""
    family, _ = family_of(model)
    base: Any = model.base_model
    if family == "bert":
        return {"encoder": base.encoder.layer}
    return {stack: getattr(base, stack).block for stack in ("encoder", "decoder") if hasattr(base, stack)}


def _drop(model: PreTrainedModel, removed: float, strategy: str) -> PreTrainedModel:
    goal = parameters_to_remove(model, removed)
    small = working_copy(model)
    stacks = _layers_of(small)
    longest = max(len(layers) for layers in stacks.values())
    saved = 0
    for drop in range(longest):
        gone = {
            name: dropped(len(s), round(drop * (len(s) - 1) / max(1, longest - 1)), strategy)
            for name, s in stacks.items()
        }
        saved = sum(
            count_parameters(layer).total for name, s in stacks.items() for i, layer in enumerate(s) if i in gone[name]
        )
        if saved >= goal:
            _keep_others(small, stacks, gone)
            return finished(small)
    raise cannot_reach("Dropping layers", removed, saved, model)


def _keep_others(model: PreTrainedModel, stacks: dict[str, nn.ModuleList], gone: dict[str, set[int]]) -> None:
    family, _ = family_of(model)
    base: Any = model.base_model
    for name, layers in stacks.items():
        kept = nn.ModuleList(layer for i, layer in enumerate(layers) if i not in gone[name])
        for i, layer in enumerate(kept):
            for item in layer.modules():
                module: Any = item
                if hasattr(module, "layer_idx"):
                    module.layer_idx = i  # its place in a decoder's cache
        stack = getattr(base, name)
        if family == "bert":
            stack.layer = kept
            model.config.num_hidden_layers = len(kept)
        else:
            stack.block = kept
            stack.config.num_layers = len(kept)
            setattr(model.config, "num_layers" if name == "encoder" else "num_decoder_layers", len(kept))
