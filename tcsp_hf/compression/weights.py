"""A dense model's weights, one at a time, and those of its compressed one as they are made."""

from collections import UserDict
from collections.abc import Iterator, Mapping

import torch
from transformers import PreTrainedModel

from ..offload import read_tensor

_ROWS = 4096


class DenseWeights(Mapping[str, torch.Tensor]):
    """The state dict of a model; every look-up reads that entry, from its file if need be, and converts it.

    So a second copy of the whole model is never in memory, nor a first one of a model that is offloaded.
    """

    def __init__(
        self, model: PreTrainedModel, dtype: torch.dtype = torch.float64, device: torch.device | None = None
    ) -> None:
        """dtype, device: what look-ups give; the CPU when None."""
        self._state = model.state_dict()
        self._modules = dict(model.named_modules())
        self._dtype = dtype
        self._device = torch.device("cpu") if device is None else device

    def __getitem__(self, name: str) -> torch.Tensor:
        return self.stored(name).to(self._device, self._dtype)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def __contains__(self, name: object) -> bool:
        return name in self._state

    def stored(self, name: str) -> torch.Tensor:
        """The entry as it is, in the model's dtype."""
        found = self._state[name].detach()
        if found.device.type != "meta":
            return found
        module, _, own = name.rpartition(".")
        return read_tensor(self._modules[module], own)

    def table(
        self, name: str, reader: torch.Tensor, dtype: torch.dtype | None = None, centred: bool = False
    ) -> torch.Tensor:
        """Rows x (n, D) of a table as reader' x (n, k); products in float64, a block of rows at a time.

        Args:
            reader: (D, k) float64.
            dtype: of the result; the table's own when None.
            centred: subtract each row's mean first.
        """
        rows = self.stored(name)
        result = torch.empty(len(rows), reader.shape[1], dtype=rows.dtype if dtype is None else dtype)
        for start in range(0, len(rows), _ROWS):
            block = rows[start : start + _ROWS].to("cpu", torch.float64)
            if centred:
                block = block - block.mean(dim=1, keepdim=True)
            result[start : start + _ROWS] = block @ reader
        return result


class Tensors(UserDict[str, torch.Tensor]):
    """A compressed model's state dict in the dtypes that it will have: products in float64 are rounded as they come."""

    def __init__(self, dense: PreTrainedModel) -> None:
        super().__init__()
        self._default = dense.dtype
        self._dtypes = {name: parameter.dtype for name, parameter in dense.named_parameters()}

    def dtype_of(self, name: str) -> torch.dtype:
        """The dense model's, entry by entry: T5 keeps `wo` in float32."""
        return self._dtypes.get(name, self._default)

    def __setitem__(self, name: str, value: torch.Tensor) -> None:
        super().__setitem__(name, value.to("cpu", self.dtype_of(name)).contiguous())
