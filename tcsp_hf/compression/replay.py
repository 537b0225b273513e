"""Forward passes of a changed dense model that start at the first layer that changed."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..architectures import family_of
from ..calibration.divergence import model_inputs
from ..calibration.inputs import Batch
from ..offload import put_forward_back


class Replay:
    """Fixed batches, and what the layers of the unchanged model make of them.

    Attributes:
        expected: the model's outputs, by batch.
    """

    def __init__(self, dense: PreTrainedModel, batches: Sequence[Batch]) -> None:
        """Run every batch once; the outputs of every layer are kept (on the model's device)."""
        self.dense, self.batches = dense, batches
        family, _ = family_of(dense)
        base: Any = dense.base_model
        stacks = [getattr(base, name) for name in ("encoder", "decoder") if hasattr(base, name)]
        self._layers: list[Any] = [layer for s in stacks for layer in (s.layer if family == "bert" else s.block)]
        self._position = {module: i for i, layer in enumerate(self._layers) for module in layer.modules()}
        if family == "t5":  # the last norm of a stack comes behind its layers
            ends = [sum(len(stack.block) for stack in stacks[: i + 1]) for i in range(len(stacks))]
            self._position |= {stack.final_layer_norm: end for stack, end in zip(stacks, ends, strict=True)}
        self._outputs: list[list[Any]] = []
        self.expected = [self._record(batch) for batch in batches]

    def _record(self, batch: Batch) -> Any:
        outputs: list[Any] = [None] * len(self._layers)

        def keep(i: int) -> Any:
            def hook(_module: Any, _args: Any, output: Any) -> None:
                outputs[i] = output

            return hook

        handles = [layer.register_forward_hook(keep(i)) for i, layer in enumerate(self._layers)]
        try:
            return self.dense(**model_inputs(self.dense, batch), return_dict=True)
        finally:
            for handle in handles:
                handle.remove()
            self._outputs.append(outputs)

    def outputs(self, changed: Sequence[nn.Module]) -> Iterator[Any]:
        """The model's outputs on every batch, where nothing before these modules changed."""
        first = min(self._position.get(module, 0) for module in changed)
        for batch, known in zip(self.batches, self._outputs, strict=True):
            with _replaced(self._layers[:first], known):
                found = self.dense(**model_inputs(self.dense, batch), return_dict=True)
            yield found


@contextmanager
def _replaced(layers: Sequence[Any], outputs: Sequence[Any]) -> Iterator[None]:
    """Within, these layers return what is given instead of working."""

    def returning(output: Any) -> Any:
        return lambda *_args, **_kwargs: output

    before = [vars(layer).get("forward") for layer in layers]
    try:
        for layer, output in zip(layers, outputs, strict=False):
            layer.forward = returning(output)
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            put_forward_back(layer, own)
