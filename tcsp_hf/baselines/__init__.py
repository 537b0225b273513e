"""Other ways to make a dense model smaller without training, small and honest, to compare with.

Each is a function (dense model, statistics, removed fraction) -> a new model that runs like the dense one, with at
least the fraction of the non-embedding parameters taken out for real, so that one counter counts them all. The token
sample of the statistics is the only text that they see.
"""

from collections.abc import Callable
from dataclasses import dataclass

from transformers import PreTrainedModel

from ..calibration import Calibration
from .fisher import fisher
from .layers import alternate_layers, top_layers
from .low_rank import low_rank
from .magnitude import magnitude
from .projection import per_site_pca, shared_pca

Compressor = Callable[[PreTrainedModel, Calibration, float], PreTrainedModel]


@dataclass(frozen=True)
class Baseline:
    """A baseline's title in tables, its source, its function, and whether it reads the statistics or their sample."""

    title: str
    source: str
    compress: Compressor
    reads_statistics: bool


BASELINES: dict[str, Baseline] = {
    "shared-pca": Baseline("hidden only, shared PCA (the paper)", "arXiv 2308.16475", shared_pca, True),
    "per-site-pca": Baseline("hidden only, per-site PCA", "this package", per_site_pca, True),
    "svd": Baseline("whitened low-rank SVD", "arXiv 2403.07378", low_rank, True),
    "fisher": Baseline("Fisher heads + filters, rescaled", "arXiv 2204.09656", fisher, True),
    "magnitude": Baseline("heads + filters by magnitude", "weight norms", magnitude, False),
    "top-layers": Baseline("top layers dropped", "arXiv 2004.03844", top_layers, False),
    "alternate-layers": Baseline("alternate layers dropped", "arXiv 2004.03844", alternate_layers, False),
}

__all__ = ["BASELINES", "Baseline", "Compressor"]
