"""Forward passes of a changed dense model that start at the first layer that changed."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

from torch import nn
from transformers import PreTrainedModel

from ..architectures import family_of
from ..calibration.divergence import model_inputs
from ..calibration.inputs import Batch
from ..offload import put_forward_back


class Layers:
    """The layers of a model, its encoder's before its decoder's.

    The norm at the end of a BERT's layer counts to the next one, the last layer's to one behind all: what is kept of
    a layer is what that norm reads.
    """

    def __init__(self, dense: PreTrainedModel) -> None:
        family, _ = family_of(dense)
        base: Any = dense.base_model
        stacks = [getattr(base, name) for name in ("encoder", "decoder") if hasattr(base, name)]
        groups = [list(stack.layer if family == "bert" else stack.block) for stack in stacks]
        self._layers: list[Any] = [layer for group in groups for layer in group]
        self._ends = list(accumulate(len(group) for group in groups))
        self._norms: list[Any] = [layer.output.LayerNorm if family == "bert" else None for layer in self._layers]
        self._position = {module: i for i, layer in enumerate(self._layers) for module in layer.modules()}
        if family == "t5":  # the last norm of a stack comes behind its layers
            self._position |= {stack.final_layer_norm: end for stack, end in zip(stacks, self._ends, strict=True)}
        else:
            self._position |= {norm: i + 1 for i, norm in enumerate(self._norms)}

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, i: int) -> nn.Module:
        return self._layers[i]

    def first_of(self, modules: Iterable[nn.Module]) -> int:
        """Index of the first layer that must run for these to; 0 also for what stands before all layers."""
        return min(self._position.get(module, 0) for module in modules)

    def before(self, first: int) -> list[int]:
        """The layers whose outputs are all that layer `first` and those behind it need: the last of every stack."""
        return [end - 1 for end in self._ends if end < first] + ([first - 1] if first else [])

    @contextmanager
    def keeping(self, indices: Iterable[int]) -> Iterator[dict[int, Any]]:
        """Within, a forward pass leaves here what `starting_at` needs of these layers."""
        outputs: dict[int, Any] = {}

        def keep_sum(i: int) -> Any:
            def hook(_module: Any, args: Any) -> None:
                outputs[i] = args[0]

            return hook

        def keep_output(i: int) -> Any:
            def hook(_module: Any, _args: Any, output: Any) -> None:
                outputs[i] = output

            return hook

        handles = [
            self._layers[i].register_forward_hook(keep_output(i))
            if self._norms[i] is None
            else self._norms[i].register_forward_pre_hook(keep_sum(i))
            for i in indices
        ]
        try:
            yield outputs
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def starting_at(self, first: int, outputs: dict[int, Any]) -> Iterator[None]:
        """Within, layers before `first` return what is known instead of working."""

        def returning(i: int, last: int) -> Any:
            norm = self._norms[i] if i == last else None
            return lambda *_args, **_kwargs: outputs[last] if norm is None else norm(outputs[last])

        skipped = self._layers[:first]
        own = [vars(layer).get("forward") for layer in skipped]
        needed = self.before(first)
        try:
            for i, layer in enumerate(skipped):
                layer.forward = returning(i, next(last for last in needed if last >= i))
            yield
        finally:
            for layer, forward in zip(skipped, own, strict=True):
                put_forward_back(layer, forward)


class Replay:
    """Fixed batches, and what the layers of the unchanged model make of them.

    Attributes:
        layers: of the model.
        expected: the model's outputs, by batch.
    """

    def __init__(self, dense: PreTrainedModel, batches: Sequence[Batch]) -> None:
        """Run every batch once; what `Layers.starting_at` needs of every layer is kept (on the model's device)."""
        self.dense, self.batches = dense, batches
        self.layers = Layers(dense)
        self._outputs: list[dict[int, Any]] = []
        self.expected = [self._record(batch) for batch in batches]

    def _record(self, batch: Batch) -> Any:
        with self.layers.keeping(range(len(self.layers))) as outputs:
            self._outputs.append(outputs)
            return self.dense(**model_inputs(self.dense, batch), return_dict=True)

    def outputs(self, changed: Sequence[nn.Module]) -> Iterator[Any]:
        """The model's outputs on every batch, where nothing before these modules changed."""
        first = self.layers.first_of(changed)
        for batch, known in zip(self.batches, self._outputs, strict=True):
            with self.layers.starting_at(first, known):
                found = self.dense(**model_inputs(self.dense, batch), return_dict=True)
            yield found
