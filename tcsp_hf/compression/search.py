"""What a search measured, kept for the next budget."""

from collections.abc import Callable

from ..calibration import Calibration
from ..clock import NOTHING, Clock
from .plan import LossCurves
from .request import Request


class Search:
    """The predicted losses of one model's parts, shared by several calls of `compress`.

    They depend on the statistics, the projection, the subspace, epsilon and the axes, not on the budget:

        search = Search()
        models = [compress(model, stats, remove=remove, search=search) for remove in (0.25, 0.44, 0.6)]

    measures them once. A call with other statistics or options measures anew and keeps that instead.

    Attributes:
        took: what the kept measurement took.
    """

    def __init__(self) -> None:
        self.took = NOTHING
        self._stats: Calibration | None = None
        self._options: tuple[object, ...] = ()
        self._found: tuple[dict[str, float], LossCurves] = ({}, LossCurves())

    @property
    def seconds(self) -> float:
        """That the kept measurement took, by the clock on the wall."""
        return self.took.wall

    def measured(
        self, stats: Calibration, request: Request, measure: Callable[[], tuple[dict[str, float], LossCurves]]
    ) -> tuple[dict[str, float], LossCurves]:
        """Mean lengths by stack and the curves, from `measure` where they are not known."""
        options = (request.kind, request.subspace, request.epsilon, request.axes)
        if self._stats is not stats or self._options != options:
            clock = Clock()
            self._found = measure()
            self.took = clock.read()
            self._stats, self._options = stats, options
        return self._found
