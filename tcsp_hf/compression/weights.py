"""A dense model's weights in float64, one at a time: a second copy of the whole model is never in memory."""

from collections.abc import Iterator, Mapping

import torch
from transformers import PreTrainedModel

_ROWS = 4096


class DenseWeights(Mapping[str, torch.Tensor]):
    """The state dict of a model; every look-up converts that entry to float64 on the CPU."""

    def __init__(self, model: PreTrainedModel) -> None:
        self._state = model.state_dict()

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._state[name].detach().to("cpu", torch.float64)

    def __iter__(self) -> Iterator[str]:
        return iter(self._state)

    def __len__(self) -> int:
        return len(self._state)

    def __contains__(self, name: object) -> bool:
        return name in self._state

    def table(self, name: str, encoder: torch.Tensor, centred: bool = False) -> torch.Tensor:
        """Rows x (n, D) of an embedding table as E' x (n, k), in the table's own dtype; products in float64.

        Args:
            encoder: E (D, k) float64.
            centred: subtract each row's mean first.
        """
        rows = self._state[name].detach()
        result = torch.empty(len(rows), encoder.shape[1], dtype=rows.dtype)
        for start in range(0, len(rows), _ROWS):
            block = rows[start : start + _ROWS].to("cpu", torch.float64)
            if centred:
                block = block - block.mean(dim=1, keepdim=True)
            result[start : start + _ROWS] = block @ encoder
        return result
