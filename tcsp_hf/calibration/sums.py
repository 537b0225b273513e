"""Sums of outer products: products of blocks in the rows' own precision, added up in float64."""

import torch

_PANEL = 128
_BLOCK_ROWS = 4096


class OuterSums:
    """For every name the sum of `r r'` over rows r (D,), float64.

    Only the panels on and above the diagonal are computed. A block of at most 4,096 float32 rows is multiplied in
    float32 (relative error about 1e-7 of the largest entry, the error that the rows bring themselves) and added to the
    float64 sum, so that the error does not grow with the number of blocks. float64 rows are multiplied in float64.
    """

    def __init__(self, size: int) -> None:
        """size: D."""
        self._size = size
        self.upper: dict[str, torch.Tensor] = {}
        self._scratch: dict[torch.device, torch.Tensor] = {}

    def add(self, name: str, rows: torch.Tensor) -> None:
        """Add the rows (n, D), float32 or float64, to the sum `name`."""
        total = self.upper.get(name)
        if total is None:
            total = torch.zeros(self._size, self._size, dtype=torch.float64)
        total = self.upper[name] = total.to(rows.device)
        for block in rows.split(_BLOCK_ROWS):
            wide = exact(block)
            for start in range(0, self._size, _PANEL):
                left, right = wide[:, start : start + _PANEL], wide[:, start:]
                into = total[start : start + _PANEL, start:]
                if wide.dtype == torch.float64:
                    into.addmm_(left.T, right)
                else:
                    into.add_(torch.mm(left.T, right, out=self._room(wide, left.shape[1], right.shape[1])))

    def _room(self, like: torch.Tensor, height: int, width: int) -> torch.Tensor:
        """(height, width) to write a product into; `out=` is also what keeps autocast from rounding the rows."""
        if like.device not in self._scratch:
            self._scratch[like.device] = like.new_empty(min(_PANEL, self._size) * self._size)
        return self._scratch[like.device][: height * width].view(height, width)

    def first_not_finite(self) -> str | None:
        """The first name whose sum holds a NaN or an infinity; its squares, on the diagonal, tell."""
        if not self.upper:
            return None
        found = [total.diagonal().sum() for total in self.upper.values()]
        traces = torch.stack([trace.to(found[-1].device) for trace in found])  # restored ones may be on the CPU still
        if bool(torch.isfinite(traces.sum())):  # on a GPU the only time that a batch is waited for
            return None
        return next((name for name, trace in zip(self.upper, traces.tolist(), strict=True) if trace - trace != 0), None)

    def whole(self, name: str) -> torch.Tensor:
        """The symmetric sum (D, D) on the CPU; zeros where nothing was added."""
        if name not in self.upper:
            return torch.zeros(self._size, self._size, dtype=torch.float64)
        upper = torch.triu(self.upper[name].cpu())
        return upper + torch.triu(upper, 1).T


def exact(rows: torch.Tensor) -> torch.Tensor:
    """Rows whose product keeps float32's precision: float64 where products of float32 are set to be rounded."""
    try:
        plain = torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set by PyTorch's newer settings, and not to full precision
        plain = False
    return rows if plain else rows.double()
